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
# Colour, marker, and the marker of published train accuracies, whose open marker is taken.
STYLES = {"std": ("#1f5fa8", "o", "x"), "pai": ("#d1711a", "s", "+")}
LAYERS = ["act1", "act2", "act3"]
LAYER = "act2"  # the output of the bottleneck layer
IN_FRONT = ["lin1", "act1"]  # whose cosines in logs of the 2019 release do not measure alignment
SIZE = "bottleneck size b"

Points = dict[tuple[str, int], list[Row]]
"""Initialisation and size to the row of the experiment, and the published one if there is one."""


def load_bottleneck_runs(*sources: Path) -> dict[str, list[RunResult]]:
    """Loads the runs of results folders and logs, by the name of their experiment.

    Of several runs of one seed the first finished one counts.

    Raises UserError if a run cannot be read, or if such runs differ in their settings.
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
                    f"({differing}): give one of them"
                )
    return {name: list(seeds.values()) for name, seeds in runs.items()}


def write_bottleneck_report(
    runs: Mapping[str, Sequence[RunResult]], folder: Path, published: Path
) -> str:
    """Writes the tables, the figures and `report.html`, and returns the tables in Markdown.

    Args:
        runs: for each experiment, called `[width-]<init>-<size>`, its runs, one per seed.
        folder: where to write.
        published: the JSON of the published numbers, see `tables.reference_row`.

    Raises UserError if no experiment has such a name, or as `tables.summarise` does.
    """
    tables, figures = [], []
    shown: dict[str, Sequence[RunResult]] = {}
    for prefix, title in KINDS.items():
        points = _points(runs, prefix, published)
        if points:
            rows = [row for point in points.values() for row in point]
            tables.append(Table(f"{title}: {protocols(rows)}", rows, LAYERS))
            figures += _figures(points, title, folder, prefix)
            shown |= {row.name: runs[row.name] for row, *_ in points.values()}
    if not tables:
        raise UserError("no run is of the bottleneck sweep: experiments are called std-118, ...")
    markdown = write_tables(folder, tables)
    title = "The bottleneck effect in Direct Feedback Alignment"
    write_report(folder, title, tables, figures, shown)
    return markdown


def _points(runs: Mapping[str, Sequence[RunResult]], prefix: str, published: Path) -> Points:
    """Returns the experiments of a kind, by initialisation and size."""
    points = {}
    for name, found in runs.items():
        if match := re.fullmatch(rf"{prefix}(std|pai)-([1-9]\d*)", name):
            row = summarise(name, found)
            experiment = row.settings.get("experiment", {})
            # A log of the 2019 release has only the experiment's name. So has our log if its line
            # of settings is lost, but then the batch size is unknown.
            if list(experiment) == ["name"] and row.settings["batch_size"]:
                for layer in IN_FRONT:
                    row.alignment.pop(layer, None)
                    row.curves.pop(layer, None)
            beside = reference_row(row, published, "published")
            points[match[1], int(match[2])] = [row, *beside]
    return {key: points[key] for init in INITS for key in sorted(points) if key[0] == init}


def _figures(points: Points, title: str, folder: Path, prefix: str) -> list[Figure]:
    """Draws alignment and accuracy, against the size with published numbers, and against epochs."""
    alignment, accuracy, groups = {}, {}, {}
    for init, label in INITS.items():
        chosen = {b: rows for (i, b), rows in points.items() if i == init and rows[0].test}
        if chosen:
            groups[label] = {str(b): rows[0].curves for b, rows in chosen.items()}
        for i, suffix in enumerate(("", ", published")):
            rows = {b: found[i] for b, found in chosen.items() if found[i:]}
            cosines = {b: row.alignment[LAYER] for b, row in rows.items() if LAYER in row.alignment}
            alignment[label + suffix] = cosines, _style(init, "test", i == 1)
            for split in SPLITS:
                spreads = {b: getattr(row, split) for b, row in rows.items()}
                accuracy[f"{label}, {split}{suffix}"] = spreads, _style(init, split, i == 1)
    layers = [x for x in LAYERS if any(row.curves.get(x) for row, *_ in points.values())]
    cosine = "cosine at the bottleneck layer"
    figures = [
        sweep_figure(alignment, title, SIZE, cosine, folder / f"{prefix}alignment"),
        sweep_figure(accuracy, title, SIZE, ACCURACY, folder / f"{prefix}accuracy"),
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
