"""The table and the figures of the bottleneck sweep, from results or from logs; no training code.

    python bottleneck_from_log.py results/bottleneck            results, original or retrieved
    python bottleneck_from_log.py LOG [LOG ...] --output DIR    logs, ours or the 2019 release's

Writes table.md, table.csv, table.tex, the figures as PNG and PDF (alignment and accuracy, against
the size; alignment-epochs and accuracy-epochs) and report.html, which holds all of them, into DIR;
without --output into the results folder given first.
"""

import argparse
import re
import sys
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path

from log_retrieval import restore, retrieve
from mltools.errors import UserError, exit_code, show
from mltools.figures import (
    COSINE,
    Curves,
    Figure,
    Panel,
    Series,
    curves,
    epochs_figure,
    sweep_figure,
)
from mltools.files import user_path
from mltools.records import differences
from mltools.report import write_html
from mltools.results import RunFolder
from mltools.tables import Row, Table, protocols, reference_row, summarise, write_tables

PUBLISHED = Path(__file__).resolve().parent / "reference" / "published_bottleneck.json"
KINDS = {
    "": "Gradient bottleneck in the second layer",
    "width-": "Bottleneck of b units as the second layer",
}
INITS = {"std": "standard init", "pai": "pre-alignment"}
LAYERS = ["act1", "act2", "act3"]
SIZE = "bottleneck size b"
BOTTLENECK = "act2"  # the output of the bottleneck layer
RUN = "*/seed-*/config.json"  # below a results folder
FRONT = ("lin1", "act1")  # whose cosine in the 2019 release's logs is no measure of alignment


def write_report(runs: Mapping[str, Sequence[RunFolder]], folder: Path) -> str:
    """Writes the tables, the figures and report.html, and returns the tables in Markdown.

    Args:
        runs: for each row, called `[width-]<init>-<size>`, its runs, one per seed.
        folder: where to.

    Raises UserError if none of the rows is a bottleneck's, or if a result is damaged.
    """
    tables, figures = [], []
    shown: dict[str, Sequence[RunFolder]] = {}
    for prefix, title in KINDS.items():
        named = {name: _size(name, prefix) for name in runs}
        found = [name for name, size in named.items() if size]
        found.sort(key=lambda name: (name.rsplit("-", 1)[0] != f"{prefix}std", named[name]))
        rows, published = [], []
        courses = {}
        for name in found:
            rows.append(summarise(name, runs[name]))
            courses[name] = curves(runs[name])
            if _of_the_release(rows[-1]):
                for alignment in (rows[-1].alignment, courses[name].alignment):
                    for layer in FRONT:
                        alignment.pop(layer, None)
            published += reference_row(rows[-1], PUBLISHED, "published")
        if rows:
            both = [row for one in rows for row in (one, *_beside(one, published))]
            tables.append(Table(f"{title}: {protocols(rows)}", both, LAYERS))
            figures += _figures(rows, published, prefix, title, folder)
            shown |= {name: runs[name] for name in found}
            figures += _epochs_figures(courses, prefix, title, folder)
    if not tables:
        raise UserError("there is no run of a bottleneck: rows are called std-118, pai-118, ...")
    markdown = write_tables(folder, tables)
    title = "The bottleneck effect in Direct Feedback Alignment"
    write_html(folder, title, tables, [figure for figure in figures if figure], shown)
    return markdown


def _size(name: str, prefix: str) -> int | None:
    match = re.fullmatch(rf"{prefix}(?:std|pai)-(\d+)(?:, published)?", name)
    return int(match[1]) if match else None


def _of_the_release(row: Row) -> bool:
    """Whether the row comes out of a log of the 2019 release, which does not say the network."""
    return list(row.settings.get("experiment", {})) == ["name"] and (
        row.settings["batch_size"] is not None  # which the heading of our own logs does not say
    )


def _beside(row: Row, published: list[Row]) -> list[Row]:
    return [other for other in published if other.name == f"{row.name}, published"]


def _figures(
    rows: list[Row], published: list[Row], prefix: str, title: str, folder: Path
) -> list[Figure | None]:
    """Alignment and accuracy against the size, the published ones beside ours."""
    alignment, accuracy = [], []
    for init, label in INITS.items():
        for source, source_label in ((rows, ""), (published, ", published")):
            points = {
                size: row
                for row in source
                if row.name.startswith(f"{prefix}{init}-")
                and row.test
                and (size := _size(row.name, prefix))
            }
            cosines = {
                size: row.alignment[BOTTLENECK]
                for size, row in points.items()
                if BOTTLENECK in row.alignment
            }
            hollow = bool(source_label)
            alignment.append(Series(f"{label}{source_label}", cosines, init, hollow))
            for half in ("test", "train"):
                spreads = {size: getattr(row, half) for size, row in points.items()}
                name = f"{label}, {half}{source_label}"
                accuracy.append(Series(name, spreads, init, hollow, half))
    cosine = "cosine at the bottleneck layer"
    return [
        sweep_figure(alignment, title, SIZE, cosine, folder / f"{prefix}alignment"),
        sweep_figure(accuracy, title, SIZE, "accuracy (%)", folder / f"{prefix}accuracy"),
    ]


def _epochs_figures(
    rows: dict[str, Curves], prefix: str, title: str, folder: Path
) -> list[Figure | None]:
    """Alignment and accuracy against epochs: the panels of an initialisation in a row."""
    layers = [layer for layer in LAYERS if any(row.alignment.get(layer) for row in rows.values())]
    alignment, accuracy = [], []
    for init, label in INITS.items():
        sized = {
            str(_size(name, prefix)): row
            for name, row in rows.items()
            if name.startswith(f"{prefix}{init}-") and row.test
        }
        if sized:
            aligned = {
                layer: {size: row.alignment.get(layer, {}) for size, row in sized.items()}
                for layer in layers
            }
            halves = {
                half: {size: getattr(row, half) for size, row in sized.items()}
                for half in ("test", "train")
            }
            alignment.append([Panel(f"{label}, {layer}", aligned[layer]) for layer in layers])
            accuracy.append([Panel(f"{label}, {half}", halves[half], half) for half in halves])
    stems = [folder / f"{prefix}{what}-epochs" for what in ("alignment", "accuracy")]
    return [
        epochs_figure(alignment, title, COSINE, stems[0], SIZE),
        epochs_figure(accuracy, title, "accuracy (%)", stems[1], SIZE),
    ]


def runs_below(*folders: Path) -> dict[str, list[RunFolder]]:
    """`<experiment>/seed-<n>/` in results folders; of each seed one, the first that is finished.

    Raises UserError if two of one seed are, with other settings.
    """
    runs: dict[str, dict[str, RunFolder]] = {}
    for config in (path for folder in folders for path in sorted(folder.glob(RUN))):
        run = RunFolder(config.parent)
        seeds = runs.setdefault(run.path.parent.name, {})
        seed = run.path.name.partition("-attempt-")[0]  # as log_retrieval.py calls a second one
        known = seeds.get(seed)
        if known is None or not known.finished():
            seeds[seed] = run
        elif run.finished():
            differing = differences(_settings(known), _settings(run))
            if differing:
                raise UserError(
                    f"{known.path} and {run.path} differ ({differing}): give one of them"
                )
    return {name: list(seeds.values()) for name, seeds in runs.items()}


def _settings(run: RunFolder) -> dict:
    config = run.config()
    return config["settings"] if config else {}


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "sources", type=user_path, nargs="+", metavar="PATH", help="a results folder, or a log file"
    )
    parser.add_argument(
        "--output",
        type=user_path,
        metavar="DIR",
        help="where to (default: the first results folder)",
    )
    arguments = parser.parse_args()
    folders = [source for source in arguments.sources if source.is_dir()]
    logs = [retrieve(source) for source in arguments.sources if source not in folders]
    output = arguments.output or (folders[0] if folders else None)
    if output is None:
        parser.error("with logs alone, --output says where the figures go")
    with tempfile.TemporaryDirectory() as temporary:
        retrieved = []
        for i, runs in enumerate(logs):
            retrieved.append(Path(temporary, str(i)))
            for run in runs:
                restore(run, retrieved[-1])
        show(write_report(runs_below(*folders, *retrieved), output))


if __name__ == "__main__":
    sys.exit(exit_code(main))
