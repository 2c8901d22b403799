"""The table, figures and report of the bottleneck sweep."""

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from mltools.errors import UserError
from mltools.figures import (
    ACCURACY,
    COSINE,
    Curves,
    Figure,
    Series,
    curves,
    epochs_figure,
    sweep_figure,
)
from mltools.logs import retrieve_log
from mltools.report import write_report
from mltools.results import RunFolder, RunResult, differences
from mltools.tables import Row, Table, protocols, reference_row, summarise, write_tables

KINDS = {
    "": "Gradient bottleneck in the second layer",
    "width-": "Bottleneck of b units as the second layer",
}
INITS = {"std": "standard init", "pai": "pre-alignment"}
LAYERS = ["act1", "act2", "act3"]
LAYER = "act2"  # the output of the bottleneck layer
IN_FRONT = ["lin1", "act1"]  # whose cosines in logs of the 2019 release do not measure alignment
SPLITS = ["test", "train"]
SIZE = "bottleneck size b"


@dataclass
class _Point:
    """An experiment of the sweep."""

    init: str
    size: int
    row: Row
    published: list[Row]
    curves: Curves


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
            rows = [row for point in points for row in (point.row, *point.published)]
            tables.append(Table(f"{title}: {protocols(rows)}", rows, LAYERS))
            figures += _figures(points, title, folder, prefix)
            shown |= {point.row.name: runs[point.row.name] for point in points}
    if not tables:
        raise UserError("no run is of the bottleneck sweep: experiments are called std-118, ...")
    markdown = write_tables(folder, tables)
    title = "The bottleneck effect in Direct Feedback Alignment"
    write_report(folder, title, tables, figures, shown)
    return markdown


def _points(runs: Mapping[str, Sequence[RunResult]], prefix: str, published: Path) -> list[_Point]:
    """Returns the experiments of a kind, by initialisation and size."""
    points = []
    for name, found in runs.items():
        if match := re.fullmatch(rf"{prefix}(std|pai)-([1-9]\d*)", name):
            row, lines = summarise(name, found), curves(found)
            experiment = row.settings.get("experiment", {})
            # A log of the 2019 release has only the experiment's name. So has our log if its line
            # of settings is lost, but then the batch size is unknown.
            if list(experiment) == ["name"] and row.settings["batch_size"]:
                for layer in IN_FRONT:
                    row.alignment.pop(layer, None)
                    lines.pop(layer, None)
            beside = reference_row(row, published, "published")
            points.append(_Point(match[1], int(match[2]), row, beside, lines))
    return sorted(points, key=lambda point: (list(INITS).index(point.init), point.size))


def _figures(points: Sequence[_Point], title: str, folder: Path, prefix: str) -> list[Figure]:
    """Draws alignment and accuracy, against the size with published numbers, and against epochs."""
    alignment, accuracy, groups = [], [], {}
    for init, label in INITS.items():
        chosen = [point for point in points if point.init == init and point.row.test]
        if chosen:
            groups[label] = {str(point.size): point.curves for point in chosen}
        for suffix in ("", ", published"):
            rows = {
                point.size: row
                for point in chosen
                for row in (point.published if suffix else [point.row])
            }
            cosines = {b: row.alignment[LAYER] for b, row in rows.items() if LAYER in row.alignment}
            alignment.append(Series(label + suffix, cosines, init, reference=bool(suffix)))
            for split in SPLITS:
                spreads = {b: getattr(row, split) for b, row in rows.items()}
                name = f"{label}, {split}{suffix}"
                accuracy.append(Series(name, spreads, init, split, bool(suffix)))
    layers = [layer for layer in LAYERS if any(point.curves.get(layer) for point in points)]
    cosine = "cosine at the bottleneck layer"
    figures = [
        sweep_figure(alignment, title, SIZE, cosine, folder / f"{prefix}alignment"),
        sweep_figure(accuracy, title, SIZE, ACCURACY, folder / f"{prefix}accuracy"),
        epochs_figure(groups, layers, COSINE, title, folder / f"{prefix}alignment-epochs", SIZE),
        epochs_figure(groups, SPLITS, ACCURACY, title, folder / f"{prefix}accuracy-epochs", SIZE),
    ]
    return [figure for figure in figures if figure]
