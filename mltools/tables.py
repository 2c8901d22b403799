"""Tables of experiments: their accuracies over seeds, and the alignment of each layer."""

import csv
import io
import json
import statistics
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from mltools.errors import UserError
from mltools.results import RunResult, differences, write_text

Spread = tuple[float, float | None]
"""Mean and standard deviation (n - 1) of some values; the latter is None for a single value."""
Curve = dict[int, Spread]
"""Maps an epoch, or a size in a sweep, to a mean and a standard deviation."""
Curves = dict[str, Curve]
"""Maps `test` and `train` (accuracy) and each layer (mean cosine) to curves against epochs."""

SPLITS = ("test", "train")
LATEX = r"""\begin{table}
\centering
\caption{%s}
\resizebox{\ifdim\width>\linewidth\linewidth\else\width\fi}{!}{%%
\begin{tabular}{%s}
\toprule
%s \\
\midrule
%s
\bottomrule
\end{tabular}}
\end{table}
"""


@dataclass
class Row:
    """A table row, accuracies in percent. A run counts if it is finished and did not diverge."""

    name: str
    test: Spread | None = None
    """Final test accuracy over seeds; None if no run counts."""
    train: Spread | None = None
    """Running train accuracy of the last epoch, over seeds."""
    alignment: dict[str, Spread] = field(default_factory=dict)
    """Maps a layer to the mean and standard deviation of its cosine, over the samples of the run
    with the highest final train accuracy."""
    angles_from: str = ""
    """The name of the run measured in `alignment`, or the source of reference numbers."""
    seeds: int = 0
    """The number of runs that count."""
    note: str = ""
    """The number of other runs, such as "1 diverged, 2 not finished"."""
    settings: dict = field(default_factory=dict)
    """The settings that the runs share, without the seed; empty for reference numbers."""
    curves: Curves = field(default_factory=dict)
    """The curves over the runs that count; empty for reference numbers."""
    runs: list["Row"] = field(default_factory=list)
    """A row for each run that counts."""


@dataclass
class Table:
    """Rows under one title."""

    title: str
    rows: list[Row]
    layers: list[str]
    """The layers whose alignment is shown."""

    def cells(self) -> list[list[str]]:
        """Returns the header and the rows as text, without empty columns."""
        cosines = [f"cos {layer}" for layer in self.layers]
        header = ["experiment", "test accuracy (%)", "train accuracy (%)", *cosines]
        table = [[*header, "seeds", "angles from", "note"]]
        for row in self.rows:
            accuracies = _text(row.test, 2), _text(row.train, 2)
            cosines = [_text(row.alignment.get(layer), 3) for layer in self.layers]
            last = str(row.seeds), row.angles_from, row.note
            table.append([row.name, *accuracies, *cosines, *last])
        columns = [column for column in zip(*table) if any(column[1:])]
        return [list(line) for line in zip(*columns)]

    def markdown(self) -> str:
        """Returns a Markdown table, with cells padded for reading in a terminal."""
        cells = self.cells()
        widths = [max(map(len, column)) for column in zip(*cells)]
        header, *body = [f"| {' | '.join(map(str.ljust, line, widths))} |" for line in cells]
        rule = "|".join("-" * (width + 2) for width in widths)
        return "\n".join([f"### {self.title}", "", header, f"|{rule}|", *body, ""])

    def latex(self) -> str:
        """Returns a LaTeX table at most one column wide; it needs booktabs and graphicx."""
        columns = [column for column in zip(*self.cells()) if column[0] != "angles from"]
        header, *body = [[_escape_latex(cell) for cell in line] for line in zip(*columns)]
        lines = [" & ".join(line) + r" \\" for line in body]
        caption, alignment = _escape_latex(self.title), "l" + "r" * (len(header) - 1)
        return LATEX % (caption, alignment, " & ".join(header), "\n".join(lines))


def summarise(name: str, runs: Sequence[RunResult]) -> Row:
    """Summarises an experiment's runs, one per seed, in a row.

    Runs that diverged or are not finished appear in the row's note only.

    Raises UserError if a run's folder does not have the name of its experiment and seed, or if the
    settings differ between runs.
    """
    counted = [run for run in runs if run.finished and not run.diverged]
    common: dict = {}
    for run in runs:
        _check_name(name, run)
    for run in counted:
        settings = {key: value for key, value in run.settings.items() if key != "seed"}
        if differing := differences(common or settings, settings):
            raise UserError(
                f"{run.path} cannot be averaged with the other seeds, which have other settings "
                f"({differing}): move it away"
            )
        common = settings
    diverged = sum(run.finished and run.diverged for run in runs)
    left_out = {"diverged": diverged, "not finished": len(runs) - len(counted) - diverged}
    note = ", ".join(f"{number} {state}" for state, number in left_out.items() if number)
    row = Row(name, seeds=len(counted), note=note, settings=common, curves=_curves(counted))
    if counted:
        row.runs = [_row_of_run(run) for run in counted]
        last = [run.epochs[-1] for run in counted]
        row.test, row.train = (_spread([x[f"{split}_accuracy"] for x in last]) for split in SPLITS)
        best = _row_of_run(max(counted, key=lambda run: run.epochs[-1]["train_accuracy"]))
        row.alignment, row.angles_from = best.alignment, best.angles_from
    return row


def _row_of_run(run: RunResult) -> Row:
    """Returns the row of one run, under its own name."""
    last = run.epochs[-1]
    test, train = ((last[f"{split}_accuracy"], None) for split in SPLITS)
    cosines = last["alignment"].items()
    alignment = {layer: (c["mean"], c["std"]) for layer, c in cosines if c["mean"] is not None}
    return Row(run.name, test, train, alignment, run.name if alignment else "", seeds=1)


def _curves(runs: Iterable[RunResult]) -> Curves:
    """Returns the curves over the runs; an epoch lost in one run is averaged over the others."""
    found: dict[str, dict[int, list[float]]] = {split: {} for split in SPLITS}
    for metrics in (metrics for run in runs for metrics in run.epochs):
        values = {split: metrics[f"{split}_accuracy"] for split in SPLITS}
        values |= {layer: cosine["mean"] for layer, cosine in metrics["alignment"].items()}
        for key, value in values.items():
            if value is not None:
                found.setdefault(key, {}).setdefault(metrics["epoch"], []).append(value)
    return {
        key: {epoch: _spread(values) for epoch, values in sorted(epochs.items())}
        for key, epochs in found.items()
    }


def _spread(values: Sequence[float]) -> Spread:
    return statistics.mean(values), statistics.stdev(values) if len(values) > 1 else None


def reference_row(row: Row, path: Path, source: str) -> list[Row]:
    """Returns the reference row of an experiment in a list, which is empty if there is none.

    Args:
        row: our row; the reference must have its name and its last epoch, and equal settings.
        path: a JSON file that maps an experiment's name to its settings, its epochs, and for each
            epoch the accuracies and the cosines of `layers`.
        source: the origin of the reference numbers, for the row's name.
    """
    known = json.loads(path.read_text(encoding="utf-8"))["runs"].get(row.name)
    if not known or not known["settings"].items() <= row.settings.items():
        return []
    if row.settings["epochs"] not in known["epochs"]:
        return []
    i = known["epochs"].index(row.settings["epochs"])
    test, train = [(known[split][i], None) for split in SPLITS]
    alignment = dict(zip(known["layers"], zip(known["mean"][i], known["std"][i])))
    return [Row(f"{row.name}, {source}", test, train, alignment, angles_from=source, seeds=1)]


def protocols(rows: Iterable[Row]) -> str:
    """Returns the data set, epochs, batch size and protocol of the rows, as part of a title."""
    found = []
    for settings in (row.settings for row in rows if row.settings):
        batch, protocol = (settings[name] or "unknown" for name in ("batch_size", "protocol"))
        precision = settings.get("precision", "float32")
        found.append(
            f"{settings['dataset']}, {settings['epochs']} epochs, batch {batch}, "
            f"protocol {protocol}" + (f", {precision}" if precision != "float32" else "")
        )
    return "; ".join(dict.fromkeys(found)) or "no finished run"


def write_tables(folder: Path, tables: Sequence[Table]) -> str:
    """Writes `table.md`, `table.tex` and `table.csv`, and returns the Markdown.

    The CSV has the rows of all tables, unrounded, with all measured layers. Each row is followed by
    a row for each of its finished runs that did not diverge.
    """
    folder.mkdir(parents=True, exist_ok=True)
    markdown = "\n".join(table.markdown() for table in tables)
    write_text(folder / "table.md", markdown)
    write_text(folder / "table.tex", "\n".join(table.latex() for table in tables))
    rows = [line for table in tables for row in table.rows for line in (row, *row.runs)]
    layers = list(dict.fromkeys(layer for row in rows for layer in row.alignment))
    spreads = ["test_accuracy", "train_accuracy", *layers]
    columns = [f"{name}_{statistic}" for name in spreads for statistic in ("mean", "std")]
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(["experiment", *columns, "seeds", "angles_from", "note"])
    for row in rows:
        values = [row.test, row.train, *map(row.alignment.get, layers)]
        numbers = [number for value in values for number in value or (None, None)]
        writer.writerow([row.name, *numbers, row.seeds, row.angles_from, row.note])
    write_text(folder / "table.csv", text.getvalue())
    return markdown


def _check_name(name: str, run: RunResult) -> None:
    """Raises UserError if a run's folder has the name of another run."""
    if not run.settings:
        return
    experiment, seed = run.settings["experiment"]["name"], run.settings["seed"]
    seed = "unknown" if seed is None else seed
    # `parse_log` numbers several runs of one seed.
    if (experiment, f"seed-{seed}") != (name, run.path.name.partition("-attempt-")[0]):
        raise UserError(
            f"{run.path} holds {experiment} with seed {seed}: move it where it belongs, or away"
        )


def _text(value: Spread | None, digits: int) -> str:
    numbers = [number for number in value or () if number is not None]
    return " ± ".join(f"{number:.{digits}f}" for number in numbers)


def _escape_latex(text: str) -> str:
    for special in "&%_#":
        text = text.replace(special, "\\" + special)
    return text.replace("±", r"$\pm$")
