"""Tables of many runs: per experiment its accuracies over seeds, and the alignment per layer."""

import csv
import io
import json
import re
import statistics
from collections.abc import Sequence
from dataclasses import dataclass, field
from html import escape
from pathlib import Path

from mltools.errors import UserError
from mltools.files import write_text
from mltools.records import differences, diverged
from mltools.results import RunFolder

Spread = tuple[float, float | None]
"""A mean, and a standard deviation where there is more than one value to take it over."""


@dataclass
class Row:
    """One line of a table. Accuracies are in percent."""

    name: str
    test: Spread | None = None
    """Final test accuracy: mean and standard deviation (n - 1) over seeds; None without a run."""
    train: Spread | None = None
    """The same of the running train accuracy of the last epoch."""
    alignment: dict[str, Spread] = field(default_factory=dict)
    """Layer to the mean and standard deviation of the cosine over the samples of one run."""
    angles_from: str = ""
    """That run."""
    seeds: int = 0
    """How many runs the accuracies are taken over."""
    note: str = ""
    """What is missing: runs that diverged, or that are not finished."""
    settings: dict = field(default_factory=dict)
    """What all these runs have in common: their `config.json`, the seed aside."""


def summarise(name: str, folders: Sequence[RunFolder]) -> Row:
    """Reads the runs of one experiment, one per seed asked for; only finished ones count.

    Raises UserError if they are not this experiment's, or not of the same settings and of the seeds
    that their folders are named after, or if a file is damaged.
    """
    last: dict[str, dict] = {}
    settings: dict = {}
    missing = broken = 0
    for folder in folders:
        metrics, config = folder.metrics(), folder.config()
        if config is not None:
            _check_place(folder.path, name, config["settings"])
        if config is None or not folder.finished():
            missing += 1
        elif diverged(metrics[-1]):
            broken += 1
        else:
            last[folder.path.name] = metrics[-1]
            settings = _same(settings, config["settings"], folder.path)
    notes = [f"{broken} diverged"] * bool(broken) + [f"{missing} not finished"] * bool(missing)
    row = Row(name, seeds=len(last), settings=settings, note=", ".join(notes))
    if last:
        row.test = spread([metrics["test_accuracy"] for metrics in last.values()])
        row.train = spread([metrics["train_accuracy"] for metrics in last.values()])
        first, shown = next(iter(last.items()))
        row.alignment = {
            layer: (cosine["mean"], cosine["std"])
            for layer, cosine in shown.get("alignment", {}).items()
            if cosine["mean"] is not None
        }
        row.angles_from = f"{name}/{first}" if row.alignment else ""
    return row


def reference_row(row: Row, path: Path, source: str) -> list[Row]:
    """The same row as a file of reference numbers has it: one row, or none if it does not know it.

    The file maps run names to the settings that the numbers hold for, the epochs that are known,
    and for each of these the accuracies and the cosines of `layers`.
    """
    run = json.loads(path.read_text(encoding="utf-8"))["runs"].get(row.name)
    if run is None or not run["settings"].items() <= row.settings.items():
        return []
    if row.settings["epochs"] not in run["epochs"]:
        return []
    i = run["epochs"].index(row.settings["epochs"])
    spreads = zip(run["layers"], run["mean"][i], run["std"][i])
    return [
        Row(
            f"{row.name}, {source}",
            test=(run["test"][i], None),
            train=(run["train"][i], None),
            alignment={layer: (mean, std) for layer, mean, std in spreads},
            angles_from=source,
            seeds=1,
        )
    ]


def protocols(rows: Sequence[Row]) -> str:
    """What rows were run with, for a title."""
    found = {_protocol(row.settings): None for row in rows if row.settings}
    return "; ".join(found) or "no finished run"


def _protocol(settings: dict) -> str:
    precision = settings.get("precision", "float32")
    return (
        f"{settings['dataset']}, {settings['epochs']} epochs, batch {settings['batch_size']}, "
        f"feedback placement {settings['feedback_placement']}"
        + (f", {precision}" if precision != "float32" else "")
    )


def _check_place(path: Path, name: str, settings: dict) -> None:
    """A folder that was renamed would be taken for what it is not."""
    experiment = settings.get("experiment", {}).get("name", name)
    seed = "unknown" if settings["seed"] is None else settings["seed"]
    again = r"(-attempt-\d+)?"  # of a log that holds the run twice
    if experiment != name or not re.fullmatch(rf"seed-{seed}{again}", path.name):
        raise UserError(
            f"{path} holds {experiment} with seed {seed}: move it where it belongs, or away"
        )


def _same(settings: dict, others: dict, path: Path) -> dict:
    own = {key: value for key, value in others.items() if key != "seed"}
    differing = differences(settings, own) if settings else ""
    if differing:
        raise UserError(
            f"{path} was run with other settings than the seeds before it ({differing}): they "
            "cannot stand in one row"
        )
    return own


def spread(values: Sequence[float]) -> Spread:
    """The mean and the standard deviation (n - 1) of one value or more."""
    return statistics.mean(values), statistics.stdev(values) if len(values) > 1 else None


@dataclass
class Table:
    """Rows under one title; `layers` are those whose alignment is shown."""

    title: str
    rows: list[Row]
    layers: list[str]

    HEADER = ("experiment", "test accuracy (%)", "train accuracy (%)")

    def cells(self) -> list[list[str]]:
        """The header and the rows as text, columns that nothing fills left out."""
        layers = [f"cos {layer}" for layer in self.layers]
        table = [[*self.HEADER, *layers, "seeds", "angles from", "note"]]
        for row in self.rows:
            table.append(
                [
                    row.name,
                    _text(row.test, 2),
                    _text(row.train, 2),
                    *(_text(row.alignment.get(layer), 3) for layer in self.layers),
                    str(row.seeds),
                    row.angles_from,
                    row.note,
                ]
            )
        kept = [i for i in range(len(table[0])) if any(line[i] for line in table[1:])]
        return [[line[i] for i in kept] for line in table]

    def markdown(self) -> str:
        """Padded, so that it reads as well in a terminal."""
        cells = self.cells()
        widths = [max(map(len, column)) for column in zip(*cells)]
        lines = [" | ".join(cell.ljust(w) for cell, w in zip(line, widths)) for line in cells]
        rule = "|".join("-" * (w + 2) for w in widths)
        body = "\n".join(f"| {line} |" for line in lines[1:])
        return f"### {self.title}\n\n| {lines[0]} |\n|{rule}|\n{body}\n"

    def html(self) -> str:
        """An HTML table."""
        cells = [[escape(cell) for cell in line] for line in self.cells()]
        return html_table(cells, escape(self.title))

    def latex(self) -> str:
        """A booktabs table."""
        header, *rows = [[_escape(cell) for cell in line] for line in self.cells()]
        lines = [" & ".join(line) + r" \\" for line in rows]
        return "\n".join(
            [
                r"\begin{table}",
                r"\centering",
                rf"\caption{{{_escape(self.title)}}}",
                rf"\begin{{tabular}}{{l{'r' * (len(header) - 1)}}}",
                r"\toprule",
                " & ".join(header) + r" \\",
                r"\midrule",
                *lines,
                r"\bottomrule",
                r"\end{tabular}",
                r"\end{table}",
                "",
            ]
        )


def html_table(lines: Sequence[Sequence[str]], caption: str) -> str:
    """A table of cells that are HTML; the first line and the first column are headers."""
    header, *rows = lines
    head = "".join(f'<th scope="col">{cell}</th>' for cell in header)
    body = [
        f'<tr><th scope="row">{first}</th>' + "".join(f"<td>{cell}</td>" for cell in rest) + "</tr>"
        for first, *rest in rows
    ]
    return "\n".join(
        [
            "<table>",
            f"<caption>{caption}</caption>",
            f"<thead><tr>{head}</tr></thead>",
            "<tbody>",
            *body,
            "</tbody>",
            "</table>",
        ]
    )


def write_tables(folder: Path, tables: Sequence[Table]) -> str:
    """Writes `table.md`, `table.tex` and `table.csv`, and returns the Markdown.

    The CSV holds all rows of all tables, unrounded, with all layers that were measured.
    """
    markdown = "\n".join(table.markdown() for table in tables)
    files = {
        "table.md": markdown,
        "table.tex": "\n".join(table.latex() for table in tables),
        "table.csv": _csv(tables),
    }
    folder.mkdir(parents=True, exist_ok=True)
    for name, text in files.items():
        write_text(folder / name, text)
    return markdown


def _csv(tables: Sequence[Table]) -> str:
    rows = [row for table in tables for row in table.rows]
    layers = list(dict.fromkeys(layer for row in rows for layer in row.alignment))
    out = io.StringIO()
    writer = csv.writer(out, lineterminator="\n")
    spreads = ["test_accuracy", "train_accuracy", *layers]
    columns = [f"{name}_{part}" for name in spreads for part in ("mean", "std")]
    writer.writerow(["experiment", *columns, "seeds", "angles_from", "note"])
    for row in rows:
        values = [row.test, row.train, *(row.alignment.get(layer) for layer in layers)]
        numbers = [number for spread in values for number in spread or (None, None)]
        writer.writerow([row.name, *numbers, row.seeds, row.angles_from, row.note])
    return out.getvalue()


def _text(spread: Spread | None, digits: int) -> str:
    if spread is None:
        return ""
    mean, std = spread
    return f"{mean:.{digits}f}" + (f" ± {std:.{digits}f}" if std is not None else "")


def _escape(text: str) -> str:
    for special in "&%_#":
        text = text.replace(special, "\\" + special)
    return text.replace("±", r"$\pm$")
