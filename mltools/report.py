"""A script's results as one HTML page: tables, figures, settings, versions, every run.

The template is mltools/report.html. The page is a single file that contains the figures. Its only
links lead to folders and logs of runs below its own folder.
"""

import base64
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from urllib.parse import quote

from markupsafe import Markup

from mltools.figures import Figure
from mltools.results import RunResult, flattened, write_text
from mltools.tables import Table

TEMPLATE = Path(__file__).with_name("report.html")
DIGITS = {"test_accuracy": 2, "train_accuracy": 2, "test_loss": 4, "train_loss": 4, "seconds": 1}


def write_report(
    folder: Path,
    title: str,
    tables: Sequence[Table],
    figures: Sequence[Figure],
    runs: Mapping[str, Sequence[RunResult]],
) -> None:
    """Writes `report.html` into `folder`.

    Args:
        folder: the folder to write to; folders of runs below it are linked.
        title: the heading.
        tables, figures: shown in this order; the page embeds the figures' PNG files.
        runs: for each experiment its runs, one per seed.
    """
    from jinja2 import Environment  # only here, to keep the start of the scripts fast

    begun = {name: [run for run in found if run.settings] for name, found in runs.items()}
    environment = Environment(autoescape=True, trim_blocks=True)
    page = environment.from_string(TEMPLATE.read_text(encoding="utf-8")).render(
        title=title,
        tables=[(table.title, table.cells()) for table in tables],
        figures=[
            (figure, base64.b64encode(figure.png.read_bytes()).decode()) for figure in figures
        ],
        settings=_settings_tables(begun) | _versions_table(begun),
        runs=_runs_lines(folder, runs),
    )
    folder.mkdir(parents=True, exist_ok=True)
    write_text(folder / "report.html", page)


def _settings_tables(experiments: Mapping[str, Sequence[RunResult]]) -> dict[str, list]:
    """Returns a table of the settings common to all experiments, and a table of the others."""
    values = {
        name: _values(run.settings for run in runs) for name, runs in experiments.items() if runs
    }
    common, columns = [["setting", "value"]], [["experiment", *values]]
    for key in dict.fromkeys(key for found in values.values() for key in found):
        if key in ("experiment.name", "seed"):
            continue  # both are in the run's name
        column = [" / ".join(found.get(key, ())) for found in values.values()]
        words = key.rpartition(".")[2].replace("_", " ")
        if len(set(column)) == 1:
            common.append([words, column[0]])
        else:
            columns.append([words, *column])
    tables: dict[str, list] = {"Common to all experiments": common} if common[1:] else {}
    if columns[1:]:
        tables["Different between experiments"] = [*zip(*columns)]
    return tables


def _versions_table(experiments: Mapping[str, Sequence[RunResult]]) -> dict[str, list]:
    """Returns a table of the environments, with the number of runs for values that differ."""
    environments = [run.environment for runs in experiments.values() for run in runs]
    lines, total = [["environment", "value"]], len(environments)
    for key, counts in _values(environments).items():
        texts = [x if n == total else f"{x} ({n} of {total} runs)" for x, n in counts.items()]
        lines.append([key, ", ".join(texts)])
    return {"Versions and devices": lines} if lines[1:] else {}


def _values(nested: Iterable[dict]) -> dict[str, Counter[str]]:
    """Counts how often each key of the nested dicts has each value, as text."""
    found: dict[str, Counter[str]] = {}
    for settings in nested:
        for key, value in flattened(settings).items():
            words = map(_word, value if isinstance(value, list) else [value])
            found.setdefault(key, Counter())[", ".join(words)] += 1
    return found


def _word(value: object) -> str:
    if isinstance(value, bool):
        return "yes" if value else "no"
    return "none" if value is None else str(value)


def _runs_lines(folder: Path, runs: Mapping[str, Sequence[RunResult]]) -> list[list[str]]:
    """Returns the lines of the table of runs: a header, and one line per run."""
    header = ["test accuracy (%)", "train accuracy (%)", "test loss", "train loss", "seconds"]
    lines = [["run", "state", *header, "log"]]
    for name, run in ((name, run) for name, found in runs.items() for run in found):
        last = dict(run.epochs[-1]) if run.epochs else {}
        last["seconds"] = sum(metrics["seconds"] or 0 for metrics in run.epochs) or None
        numbers = [
            "" if last.get(key) is None else f"{last[key]:.{digits}f}"
            for key, digits in DIGITS.items()
        ]
        text = f"{name}/{run.path.name}"
        link = _link(folder, run.path, text) or text
        lines.append([link, _state(run), *numbers, _link(folder, run.path / "log.txt", "log")])
    return lines


def _state(run: RunResult) -> str:
    if not run.settings:
        return "not run"
    epoch = run.epochs[-1]["epoch"] if run.epochs else 0
    state = "finished" if run.finished else f"epoch {epoch} of {run.settings['epochs']}"
    if run.diverged:
        state = f"diverged in epoch {epoch}"
    return state + (", from a log" if run.environment.get("retrieved") else "")


def _link(folder: Path, target: Path, text: str) -> str:
    """Returns a relative link to `target`, or "" if it does not exist below `folder`."""
    folder, target = folder.resolve(), target.resolve()
    if not target.exists() or not target.is_relative_to(folder):
        return ""
    address = quote(target.relative_to(folder).as_posix()) + "/" * target.is_dir()
    return Markup('<a href="{}">{}</a>').format(address, text)
