"""One page of a script's results, for a browser: tables, figures, settings, versions, every run.

The page is a single file that needs nothing else: figures are in it, and all it refers to are the
runs' folders below its own. It is made from what is on disk alone.
"""

import base64
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from html import escape
from pathlib import Path
from urllib.parse import quote

from mltools.figures import Figure
from mltools.files import write_text
from mltools.records import diverged
from mltools.results import RunFolder
from mltools.tables import Table, html_table

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
HOW_TO_READ = (
    "Accuracies are in percent, after the last epoch: mean ± standard deviation (n - 1) over as "
    "many runs as the column seeds counts; the train accuracy is the running one of the last "
    "epoch. cos is the cosine between the DFA signal and the BP gradient at the output of a layer, "
    "of which act1 is the activation of the first hidden block: "
    "mean ± standard deviation over the samples of the one run named beside it. Runs that "
    "diverged or are not finished are in none of these numbers and in no figure."
)


def write_html(
    folder: Path,
    title: str,
    tables: Sequence[Table],
    figures: Sequence[Figure],
    runs: Mapping[str, Sequence[RunFolder]],
) -> None:
    """Writes `report.html` into `folder`.

    Args:
        folder: where to; runs that lie below it are linked.
        title: what the page is about.
        tables, figures: what it shows; the figures are read from their PNG files.
        runs: for each row its runs, one per seed.

    Raises UserError if a run's files are damaged.
    """
    configs = {
        name: [config for run in row if (config := run.config())] for name, row in runs.items()
    }
    sections = {
        "Tables": [f"<p>{escape(HOW_TO_READ)}</p>", *(_wide(table.html()) for table in tables)],
        "Figures": [_figure(figure) for figure in figures],
        "Settings and versions": [*_settings(configs), *_versions(configs)],
        "Runs": [_runs(folder, runs)],
    }
    parts = [
        "<!DOCTYPE html>",
        '<html lang="en">',
        "<head>",
        '<meta charset="utf-8">',
        '<meta name="viewport" content="width=device-width, initial-scale=1">',
        f"<title>{escape(title)}</title>",
        f"<style>{STYLE}</style>",
        "</head>",
        "<body>",
        f"<h1>{escape(title)}</h1>",
    ]
    for heading, section in sections.items():
        if section:
            parts += [f"<h2>{heading}</h2>", *section]
    parts += ["</body>", "</html>", ""]
    folder.mkdir(parents=True, exist_ok=True)
    write_text(folder / "report.html", "\n".join(parts))


def _wide(table: str) -> str:
    """Scrolls by itself where the window is too narrow for it."""
    return f'<div class="wide">\n{table}\n</div>'


def _figure(figure: Figure) -> str:
    data = base64.b64encode(figure.png.read_bytes()).decode()
    return "\n".join(
        [
            f'<figure style="--inches: {figure.width}">',
            f'<img alt="{escape(figure.alt)}" src="data:image/png;base64,{data}">',
            f"<figcaption>{escape(figure.caption)}</figcaption>",
            "</figure>",
        ]
    )


def _settings(configs: Mapping[str, Sequence[dict]]) -> list[str]:
    """What all rows have in common, and what differs between them."""
    rows = {
        name: _values(config["settings"] for config in row) for name, row in configs.items() if row
    }
    cells = {
        key: [" / ".join(row.get(key, ())) for row in rows.values()]
        for key in dict.fromkeys(key for row in rows.values() for key in row)
        if key not in ("experiment.name", "seed")  # they name the run
    }
    common, differing = [["setting", "value"]], [["experiment", *map(escape, rows)]]
    for key, column in cells.items():
        words = key.rpartition(".")[2].replace("_", " ")
        if len(set(column)) == 1:
            common.append([words, column[0]])
        else:
            differing.append([words, *column])
    tables = []
    if len(common) > 1:
        tables.append(_wide(html_table(common, "Common to all rows")))
    if len(differing) > 1:
        tables.append(_wide(html_table([*zip(*differing)], "Different between rows")))
    return tables


def _versions(configs: Mapping[str, Sequence[dict]]) -> list[str]:
    """What the runs were made with; where it is not the same for all, by how many."""
    environments = [config.get("environment", {}) for row in configs.values() for config in row]
    lines = []
    for key, counts in _values(environments).items():
        everywhere = list(counts.values()) == [len(environments)]
        texts = [
            text if everywhere else f"{text} ({n} run{'s' * (n > 1)})" for text, n in counts.items()
        ]
        lines.append([key, ", ".join(texts)])
    table = html_table([["of the runs", "value"], *lines], "Versions and devices")
    return [_wide(table)] if lines else []


def _values(nested: Iterable[dict]) -> dict[str, Counter[str]]:
    """For each key of some settings its values, escaped, and how often each is there."""
    found: dict[str, Counter[str]] = {}
    for settings in nested:
        for key, text in _flat(settings):
            found.setdefault(escape(key), Counter())[escape(text)] += 1
    return found


def _flat(settings: dict, prefix: str = "") -> Iterator[tuple[str, str]]:
    for key, value in settings.items():
        if isinstance(value, dict):
            yield from _flat(value, f"{prefix}{key}.")
        else:
            values = value if isinstance(value, list) else [value]
            yield prefix + key, ", ".join(map(_word, values))


def _word(value: object) -> str:
    if isinstance(value, bool):
        return "yes" if value else "no"
    return "none" if value is None else str(value)


def _runs(folder: Path, runs: Mapping[str, Sequence[RunFolder]]) -> str:
    header = ["run", "state", "test accuracy (%)", "train accuracy (%)", "test loss", "train loss"]
    lines = [[*header, "seconds", "log"]]
    for name, row in runs.items():
        for run in row:
            text = f"{name}/{run.path.name}"
            epochs = run.metrics()
            last = epochs[-1] if epochs else {}
            numbers = ["test_accuracy", "train_accuracy", "test_loss", "train_loss"]
            seconds = [metrics["seconds"] for metrics in epochs if metrics.get("seconds")]
            lines.append(
                [
                    _link(folder, run.path, text) or escape(text),
                    escape(_state(run, last)),
                    *(_number(last.get(key), 2) for key in numbers[:2]),
                    *(_number(last.get(key), 4) for key in numbers[2:]),
                    _number(sum(seconds) if seconds else None, 1),
                    _link(folder, run.path / "log.txt", "log"),
                ]
            )
    return _wide(html_table(lines, "Every run, after its last epoch so far"))


def _state(run: RunFolder, last: dict) -> str:
    config = run.config()
    if config is None:
        return "not run"
    if last and diverged(last):
        state = f"diverged in epoch {last['epoch']}"
    elif run.finished():
        state = "finished"
    else:
        state = f"epoch {last.get('epoch', 0)} of {config['settings']['epochs']}"
    return state + (", out of a log" if config.get("environment", {}).get("retrieved") else "")


def _number(value: float | None, digits: int) -> str:
    return "" if value is None else f"{value:.{digits}f}"


def _link(folder: Path, target: Path, text: str) -> str:
    """A link to what is there and below the page's folder, which may then be moved as a whole."""
    folder, target = folder.resolve(), target.resolve()
    if not target.exists() or not target.is_relative_to(folder):
        return ""
    address = quote(target.relative_to(folder).as_posix()) + "/" * target.is_dir()
    return f'<a href="{escape(address)}">{escape(text)}</a>'
