"""A script's results as one page for a browser: tables, figures, settings, versions, every run.

The page is a single file with the figures in it. Its only links lead to the folders of runs below
its own folder.
"""

import base64
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from html import escape
from pathlib import Path
from urllib.parse import quote

from mltools.figures import Figure
from mltools.results import RunResult, flattened, write_text
from mltools.tables import Table

# The browser's own colours, so that a dark theme is followed; the figures stay on white paper.
STYLE = """
:root { color-scheme: light dark; }
body { font: 16px/1.5 system-ui, sans-serif; max-width: 76rem; margin: 0 auto; padding: 1rem; }
p, figcaption { max-width: 46rem; }
.wide, figure { overflow-x: auto; margin: 1.5rem 0; }
table { border-collapse: collapse; font-size: 0.8125rem; font-variant-numeric: tabular-nums; }
caption { text-align: left; font-weight: 600; padding-bottom: 0.4rem; }
th, td { padding: 0.2rem 0.5rem; text-align: right; }
td, tbody th { white-space: nowrap; }
thead th { border-bottom: 1px solid; vertical-align: bottom; }
th:first-child { position: sticky; left: 0; background: Canvas; text-align: left; }
tbody tr + tr > * { border-top: 1px solid #8884; }
img { display: block; background: #fff;
  width: clamp(calc(6rem * var(--inches)), 100%, calc(9rem * var(--inches))); }
figcaption { font-size: 0.875rem; margin-top: 0.4rem; }
"""
PAGE = """<!DOCTYPE html>
<html lang="en">
<head>
<meta charset="utf-8"/>
<meta name="viewport" content="width=device-width, initial-scale=1"/>
<title>{title}</title>
<style>{style}</style>
</head>
<body>
<h1>{title}</h1>
{body}
</body>
</html>
"""
DIGITS = {"test_accuracy": 2, "train_accuracy": 2, "test_loss": 4, "train_loss": 4, "seconds": 1}
HOW_TO_READ = (
    "Accuracies are in percent, after the last epoch: mean ± standard deviation (n - 1) over as "
    "many runs as the column seeds counts; the train accuracy is the running one of the last "
    "epoch. cos is the cosine between the DFA signal and the BP gradient at the output of a layer, "
    "of which act1 is the activation of the first hidden block: "
    "mean ± standard deviation over the samples of the one run named beside it. Runs that "
    "diverged or are not finished are in none of these numbers and in no figure."
)


def write_report(
    folder: Path,
    title: str,
    tables: Sequence[Table],
    figures: Sequence[Figure],
    runs: Mapping[str, Sequence[RunResult]],
) -> None:
    """Writes `report.html` into `folder`.

    Args:
        folder: where to write; folders of runs that lie below it are linked.
        title: the heading.
        tables, figures: shown in this order; the figures' PNG files are read.
        runs: for each experiment its runs, one per seed.
    """
    experiments = {name: [run for run in found if run.settings] for name, found in runs.items()}
    sections = {
        "Tables": [f"<p>{HOW_TO_READ}</p>", *(_text_table(t.cells(), t.title) for t in tables)],
        "Figures": [_figure(figure) for figure in figures],
        "Settings and versions": [*_settings_tables(experiments), *_versions_table(experiments)],
        "Runs": [_runs_table(folder, runs)],
    }
    body = "\n".join(
        f"<h2>{heading}</h2>\n" + "\n".join(parts) for heading, parts in sections.items() if parts
    )
    page = PAGE.format(title=escape(title), style=STYLE, body=body)
    folder.mkdir(parents=True, exist_ok=True)
    write_text(folder / "report.html", page)


def _figure(figure: Figure) -> str:
    data = base64.b64encode(figure.png.read_bytes()).decode()
    return (
        f'<figure style="--inches: {figure.width}">\n'
        f'<img alt="{escape(figure.alt)}" src="data:image/png;base64,{data}"/>\n'
        f"<figcaption>{escape(figure.caption)}</figcaption>\n</figure>"
    )


def _settings_tables(experiments: Mapping[str, Sequence[RunResult]]) -> list[str]:
    """Returns a table of the settings that all experiments share, and one of the others."""
    values = {
        name: _values(run.settings for run in runs) for name, runs in experiments.items() if runs
    }
    common, differing = [], [["experiment", *values]]
    for key in dict.fromkeys(key for found in values.values() for key in found):
        column = [" / ".join(found.get(key, ())) for found in values.values()]
        words = key.rpartition(".")[2].replace("_", " ")
        if key in ("experiment.name", "seed"):
            continue  # they are the run's name
        if len(set(column)) == 1:
            common.append([words, column[0]])
        else:
            differing.append([words, *column])
    tables = []
    if common:
        tables.append(_text_table([["setting", "value"], *common], "Common to all experiments"))
    if len(differing) > 1:
        tables.append(_text_table(zip(*differing), "Different between experiments"))
    return tables


def _versions_table(experiments: Mapping[str, Sequence[RunResult]]) -> list[str]:
    """Returns a table of the environments, with the number of runs where they differ."""
    environments = [run.environment for runs in experiments.values() for run in runs]
    lines, total = [["of the runs", "value"]], len(environments)
    for key, counts in _values(environments).items():
        texts = [x if n == total else f"{x} ({n} of {total} runs)" for x, n in counts.items()]
        lines.append([key, ", ".join(texts)])
    return [_text_table(lines, "Versions and devices")] if len(lines) > 1 else []


def _values(nested: Iterable[dict]) -> dict[str, Counter[str]]:
    """Counts, for each key of some settings, its values as text."""
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


def _runs_table(folder: Path, runs: Mapping[str, Sequence[RunResult]]) -> str:
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
        link = _link(folder, run.path, text) or escape(text)
        lines.append([link, _state(run), *numbers, _link(folder, run.path / "log.txt", "log")])
    return _table(lines, "Every run, after its last epoch so far")


def _state(run: RunResult) -> str:
    if not run.settings:
        return "not run"
    epoch = run.epochs[-1]["epoch"] if run.epochs else 0
    state = "finished" if run.finished else f"epoch {epoch} of {run.settings['epochs']}"
    if run.diverged:
        state = f"diverged in epoch {epoch}"
    return state + (", out of a log" if run.environment.get("retrieved") else "")


def _link(folder: Path, target: Path, text: str) -> str:
    """Returns a link to an existing target below the folder, which may then be moved as a whole."""
    folder, target = folder.resolve(), target.resolve()
    if not target.exists() or not target.is_relative_to(folder):
        return ""
    address = quote(target.relative_to(folder).as_posix()) + "/" * target.is_dir()
    return f'<a href="{escape(address)}">{escape(text)}</a>'


def _text_table(lines: Iterable[Iterable[str]], caption: str) -> str:
    return _table([[escape(cell) for cell in line] for line in lines], caption)


def _table(lines: Iterable[Sequence[str]], caption: str) -> str:
    """Returns a table of cells that are HTML; the first line and the first column are headers."""
    header, *body = lines
    head = "".join(f'<th scope="col">{cell}</th>' for cell in header)
    rows = "\n".join(
        f'<tr><th scope="row">{first}</th>' + "".join(f"<td>{cell}</td>" for cell in rest) + "</tr>"
        for first, *rest in body
    )
    return (
        f'<div class="wide">\n<table>\n<caption>{escape(caption)}</caption>\n'
        f"<thead><tr>{head}</tr></thead>\n<tbody>\n{rows}\n</tbody>\n</table>\n</div>"
    )
