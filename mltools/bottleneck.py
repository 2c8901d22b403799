"""The table, figures and report of the bottleneck sweep."""

import re
from collections.abc import Mapping, Sequence
from pathlib import Path

from mltools.errors import UserError
from mltools.figures import ACCURACY, COSINE, LINES, Figure, epochs_figure, sweep_figure
from mltools.logs import retrieve_log
from mltools.report import write_report
from mltools.results import RunFolder, RunResult, differences
from mltools.tables import SPLITS, Row, Table, protocols, reference_row, summarise, write_tables

KINDS = {
    "": "Gradient bottleneck in the second layer",
    "width-": "Bottleneck of b units as the second layer",
}
INITS = {"std": "standard init", "pai": "pre-alignment"}
# Colour, marker, and a marker of its own for published train accuracies.
STYLES = {"std": ("#1f5fa8", "o", "x"), "pai": ("#d1711a", "s", "+")}
LAYERS = ["act1", "act2", "act3"]
# Sources of reference numbers, and their files.
REFERENCES = {"published": "published_bottleneck.json", "2019 release": "release.json"}
SIZE = "bottleneck size b"

Points = dict[tuple[str, int], dict[str, Row]]
"""Maps (initialisation, size) to rows: our row under "", reference rows under their source."""


def load_bottleneck_runs(*sources: Path) -> dict[str, list[RunResult]]:
    """Loads the runs of results folders and logs, and returns them by experiment name.

    Of several runs of a seed, the first finished run is kept, or else the last run.

    Raises UserError if a run cannot be read, or if finished runs of a seed differ in settings.
    """
    runs: dict[str, dict[str, RunResult]] = {}
    for source in sources:
        if source.is_dir():
            configs = sorted(source.glob("*/seed-*/config.json"))
            found = [RunFolder(config.parent).load() for config in configs]
        else:
            found = retrieve_log(source)
        for run in found:
            seeds = runs.setdefault(run.path.parent.name, {})
            seed = run.path.name.partition("-attempt-")[0]
            known = seeds.setdefault(seed, run)
            if not known.finished:
                seeds[seed] = run
            elif run.finished and (differing := differences(known.settings, run.settings)):
                raise UserError(
                    f"{source} holds {run.name} with other settings than the run before it "
                    f"({differing}): give only one of the two"
                )
    return {name: list(seeds.values()) for name, seeds in runs.items()}


def write_bottleneck_report(
    runs: Mapping[str, Sequence[RunResult]], folder: Path, reference: Path
) -> str:
    """Writes the tables, the figures and `report.html`, and returns the tables in Markdown.

    Args:
        runs: for each experiment, called `[width-]<init>-<size>`, its runs, one per seed.
        folder: the folder to write to.
        reference: the folder of the reference numbers, see REFERENCES and `tables.reference_row`;
            the figures show the published numbers.

    Raises UserError if no experiment has such a name, or as `tables.summarise` does.
    """
    tables, figures = [], []
    shown: dict[str, Sequence[RunResult]] = {}
    for prefix, title in KINDS.items():
        points = _points(runs, prefix, reference)
        if points:
            rows = [row for point in points.values() for row in point.values()]
            tables.append(Table(f"{title}: {protocols(rows)}", rows, LAYERS))
            figures += _figures(points, title, folder, prefix)
            shown |= {point[""].name: runs[point[""].name] for point in points.values()}
    if not tables:
        raise UserError("no run of the bottleneck sweep found: give runs with names like std-118")
    markdown = write_tables(folder, tables)
    title = "The bottleneck effect in Direct Feedback Alignment"
    write_report(folder, title, tables, figures, shown)
    return markdown


def _points(runs: Mapping[str, Sequence[RunResult]], prefix: str, reference: Path) -> Points:
    """Returns the rows of the experiments of a kind, by initialisation and size."""
    points: Points = {}
    for name, found in runs.items():
        if match := re.fullmatch(rf"{prefix}(std|pai)-([1-9]\d*)", name):
            row = summarise(name, found)
            points[match[1], int(match[2])] = {"": row} | {
                source: known
                for source, file in REFERENCES.items()
                for known in reference_row(row, reference / file, source)
            }
    return {key: points[key] for init in INITS for key in sorted(points) if key[0] == init}


def _figures(points: Points, title: str, folder: Path, prefix: str) -> list[Figure]:
    """Draws alignment and accuracy: against size, with published numbers, and against epochs."""
    alignment: dict[str, dict] = {layer: {} for layer in LAYERS}
    accuracy, groups = {}, {}
    for init, label in INITS.items():
        chosen = {b: rows for (i, b), rows in points.items() if i == init and rows[""].test}
        if chosen:
            groups[label] = {str(b): rows[""].curves for b, rows in chosen.items()}
        for source, suffix in (("", ""), ("published", ", published")):
            rows = {b: found[source] for b, found in chosen.items() if source in found}
            for layer, series in alignment.items():
                cosines = {b: x.alignment[layer] for b, x in rows.items() if layer in x.alignment}
                series[label + suffix] = cosines, _style(init, "test", bool(source))
            for split in SPLITS:
                spreads = {b: getattr(row, split) for b, row in rows.items()}
                accuracy[f"{label}, {split}{suffix}"] = spreads, _style(init, split, bool(source))
    layers = [x for x in LAYERS if any(point[""].curves.get(x) for point in points.values())]
    figures = [
        sweep_figure(alignment, title, SIZE, COSINE, folder / f"{prefix}alignment"),
        sweep_figure({title: accuracy}, title, SIZE, ACCURACY, folder / f"{prefix}accuracy"),
        epochs_figure(groups, layers, COSINE, title, folder / f"{prefix}alignment-epochs", SIZE),
        epochs_figure(groups, SPLITS, ACCURACY, title, folder / f"{prefix}accuracy-epochs", SIZE),
    ]
    return [figure for figure in figures if figure]


def _style(init: str, split: str, published: bool) -> dict:
    """Returns the style of a line; published numbers have open markers and no line."""
    color, marker, marker_of_published_train = STYLES[init]
    return {
        "color": color,
        "marker": marker_of_published_train if published and split == "train" else marker,
        "linestyle": "none" if published else LINES[split],
        "markerfacecolor": "none" if published or split == "train" else None,
        "markersize": 5.5 if published else 3.5,
    }
