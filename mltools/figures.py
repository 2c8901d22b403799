"""Figures: what runs give, against epochs and against what was swept, and where they end.

Each is drawn in the size it is printed at, a column or a page wide, with no letter below 7 points,
and is told apart in greyscale too: by marker, filling and line, or by lightness where lines have an
order. A figure that has nothing to show is not written, and one from before is taken away.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path

import matplotlib
import numpy as np

matplotlib.use("Agg")  # files only: no display is needed
from matplotlib import pyplot as plt
from matplotlib.cm import ScalarMappable
from matplotlib.colors import BoundaryNorm, ListedColormap
from matplotlib.ticker import LogFormatter, MaxNLocator

from mltools.files import write_atomically
from mltools.records import diverged
from mltools.results import RunFolder
from mltools.tables import Spread, Table, spread

COLUMN, PAGE = 3.4, 7.0  # inches
matplotlib.rcParams.update(
    {
        "font.size": 7,
        "axes.titlesize": 8,
        "figure.labelsize": 7.5,
        "axes.labelsize": 7.5,
        "axes.spines.top": False,
        "axes.spines.right": False,
        "axes.linewidth": 0.6,
        "axes.grid": True,
        "grid.alpha": 0.3,
        "grid.linewidth": 0.5,
        "lines.linewidth": 1.1,
        "lines.markersize": 4,
        "legend.frameon": False,
        "legend.borderpad": 0.1,
        "legend.columnspacing": 0.7,
        "legend.handlelength": 1.4,
        "legend.handletextpad": 0.3,
        "pdf.fonttype": 42,  # text that can be searched and edited
    }
)

STYLES = {"std": ("#1f5fa8", "o"), "pai": ("#d1711a", "s")}  # colour and marker
CROSSES = {"std": "x", "pai": "+"}  # instead of open markers, where these are taken
# Told apart by the colour-blind; as many markers as make each pair come once in 110 lines.
COLORS = (
    *("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00"),
    *("#56b4e9", "#882255", "#999933", "#777777", "#000000"),
)
MARKERS = "osD^vPX<>*p"
LINES = {"test": "-", "train": "--"}
COSINE = "cosine with the BP gradient"


@dataclass
class Figure:
    """What a page needs to show a figure that is on disk."""

    png: Path
    alt: str
    """What is drawn, for those who cannot see it."""
    caption: str
    width: float
    """Of print, in inches."""


@dataclass
class Series:
    """One line of a sweep's figure."""

    label: str
    points: dict[int, Spread]
    """Size to mean and standard deviation."""
    init: str = "std"
    """A key of STYLES."""
    hollow: bool = False
    """Open markers without a line: somebody else's numbers."""
    half: str = "test"
    """A key of LINES: `"test"` is a solid line, `"train"` a dashed one."""


@dataclass
class Curves:
    """One row against epochs: epoch to mean and standard deviation (n - 1) over seeds."""

    test: dict[int, Spread] = field(default_factory=dict)
    """Accuracy in percent."""
    train: dict[int, Spread] = field(default_factory=dict)
    alignment: dict[str, dict[int, Spread]] = field(default_factory=dict)
    """For each layer, of a run's mean cosine over its samples."""


@dataclass
class Panel:
    """One pair of axes in a figure against epochs."""

    title: str
    lines: Mapping[str, dict[int, Spread]]
    """Label to epoch to mean and standard deviation; a line without points is not drawn."""
    half: str = "test"
    """A key of LINES."""


def curves(folders: Sequence[RunFolder]) -> Curves:
    """Reads the runs of one row, those that its table counts: finished, and not diverged.

    Where a log that runs were retrieved from lacks an epoch, the seeds that have it count.

    Raises UserError if a file is damaged.
    """
    found: dict[str, dict[int, list[float]]] = {"test": {}, "train": {}}
    layers: dict[str, dict[int, list[float]]] = {}
    for folder in folders:
        epochs = folder.metrics()
        if not folder.finished() or diverged(epochs[-1]):
            continue
        for metrics in epochs:
            epoch = metrics["epoch"]
            for half, values in found.items():
                _add(values, epoch, metrics[f"{half}_accuracy"])
            for layer, cosine in metrics.get("alignment", {}).items():
                _add(layers.setdefault(layer, {}), epoch, cosine["mean"])
    alignment = {layer: _spreads(values) for layer, values in layers.items()}
    return Curves(_spreads(found["test"]), _spreads(found["train"]), alignment)


def alignment_figure(
    rows: Mapping[str, Curves], layers: Sequence[str], title: str, stem: Path
) -> Figure | None:
    """The cosine of each layer against epochs: a panel for each layer, a line for each row."""
    panels = [
        Panel(layer, {name: row.alignment.get(layer, {}) for name, row in rows.items()})
        for layer in layers
    ]
    return epochs_figure([panels], title, COSINE, stem)


def accuracy_figure(rows: Mapping[str, Curves], title: str, stem: Path) -> Figure | None:
    """Test and train accuracy against epochs: a panel for each, a line for each row."""
    panels = [
        Panel(half, {name: getattr(row, half) for name, row in rows.items()}, half)
        for half in LINES
    ]
    return epochs_figure([panels], title, "accuracy (%)", stem)


def epochs_figure(
    grid: Sequence[Sequence[Panel]], title: str, ylabel: str, stem: Path, order: str = ""
) -> Figure | None:
    """Draws panels against epochs, each line with a band of one standard deviation around it.

    Args:
        grid: rows of panels, all of the same length; those below each other share their y axis, and
            cosines all of them.
        title: for the caption.
        ylabel: what all of them show.
        stem: where to, without the suffix.
        order: what the labels count, if they are numbers: then the lines are coloured from dark to
            light in their order, with a bar for a legend.

    Returns None if there is no point to draw.
    """
    panels = [panel for row in grid for panel in row]
    labels = list(dict.fromkeys(label for panel in panels for label in panel.lines))
    shown = [label for label in labels if any(panel.lines.get(label) for panel in panels)]
    if not shown:
        _nothing(stem)
        return None
    if order:
        labels = shown = sorted(shown, key=int)
    shades = matplotlib.colormaps["viridis"](np.linspace(0, 0.85, len(labels)))
    figure, axes = plt.subplots(
        len(grid),
        len(grid[0]),
        figsize=(PAGE, 0.5 + 1.75 * len(grid)),
        sharex=True,
        sharey="all" if ylabel == COSINE else "col",
        squeeze=False,
        layout="constrained",
    )
    handles: dict[str, plt.Line2D] = {}
    for panel, one in zip(panels, axes.flat):
        one.set_title(panel.title)
        one.xaxis.set_major_locator(
            MaxNLocator("auto", steps=[1, 2, 5, 10], integer=True, min_n_ticks=1)
        )
        if ylabel == COSINE:
            one.axhline(0, color="0.4", linewidth=0.6)  # nothing in common with BP
        for i, label in enumerate(labels):
            points = panel.lines.get(label)
            if points:
                look = {"color": shades[i]} if order else _look(i)
                line = _curve(one, points, i / len(labels), linestyle=LINES[panel.half], **look)
                handles.setdefault(label, line)
    for one in axes[-1]:
        one.set_xlabel("epoch")
    figure.supylabel(ylabel)
    if order:
        norm = BoundaryNorm(range(len(shown) + 1), len(shown))
        bar = figure.colorbar(
            ScalarMappable(norm, ListedColormap(shades)), ax=axes, label=order, pad=0.02, aspect=30
        )
        bar.set_ticks([i + 0.5 for i in range(len(shown))], labels=shown)
        bar.ax.tick_params(length=0)
        bar.minorticks_off()
    else:
        _legend(figure, {label: handles[label] for label in shown})
    titles = ", ".join(panel.title for panel in panels)
    return _save(
        figure,
        stem,
        f"Line chart of {ylabel} against epochs. Panels: {titles}. "
        f"Lines{f', by {order}' if order else ''}: {', '.join(shown)}.",
        f"{title}: {ylabel} against epochs. Mean over seeds, with a band of one standard deviation "
        "over seeds where there are several.",
    )


def final_figure(tables: Sequence[Table], stem: Path) -> Figure | None:
    """Draws where alignment ends: a panel for each table, a marker for each layer.

    Rows without alignment are left out; those without settings, which are somebody else's numbers,
    have open markers.

    Returns None if no row has alignment.
    """
    groups = []
    for table in tables:
        rows = [row for row in table.rows if any(row.alignment.get(one) for one in table.layers)]
        if rows:
            groups.append((table.title.partition(":")[0], rows, table.layers))
    if not groups:
        _nothing(stem)
        return None
    heights = [len(rows) + 1 for _, rows, _ in groups]
    figure, axes = plt.subplots(
        len(groups),
        1,
        figsize=(COLUMN, 0.6 + 0.22 * sum(heights)),
        height_ratios=heights,
        sharex=True,
        squeeze=False,
        layout="constrained",
    )
    handles = {}
    for (title, rows, layers), one in zip(groups, axes.flat):
        for i, layer in enumerate(layers):
            for y, row in enumerate(rows):
                if layer in row.alignment:
                    mean, std = row.alignment[layer]
                    drawn = one.errorbar(
                        mean,
                        y + 0.6 * ((i + 0.5) / len(layers) - 0.5),
                        xerr=std,
                        linestyle="none",
                        markerfacecolor=None if row.settings else "white",
                        elinewidth=0.8,
                        **_look(i),
                    )
                    if row.settings or layer not in handles:
                        handles[layer] = drawn
        one.set_title(title)
        one.set_yticks(range(len(rows)), [row.name for row in rows])
        one.set_ylim(len(rows) - 0.4, -0.6)
        one.axvline(0, color="0.4", linewidth=0.6)
        one.grid(axis="y", visible=False)
        one.tick_params(axis="y", length=0)
    axes.flat[-1].set_xlabel(COSINE)
    _legend(figure, handles)
    shown = [row for _, rows, _ in groups for row in rows]
    others = "" if all(row.settings for row in shown) else " Open markers: reference numbers."
    return _save(
        figure,
        stem,
        f"Dot chart of the final {COSINE} at {', '.join(handles)}, for "
        f"{', '.join(row.name for row in shown)}.",
        f"Final {COSINE}: mean and standard deviation over the samples of one run of each row."
        f"{others}",
    )


def sweep_figure(
    series: Sequence[Series], title: str, xlabel: str, ylabel: str, stem: Path
) -> Figure | None:
    """Draws series against sizes on a log axis, as `<stem>.png` and `<stem>.pdf`.

    Returns None if there is no point to draw.
    """
    series = [one for one in series if one.points]
    if not series:
        _nothing(stem)
        return None
    figure, axes = plt.subplots(figsize=(COLUMN, 2.5), layout="constrained")
    handles = {}
    for one in series:
        sizes = sorted(one.points)
        means = [one.points[size][0] for size in sizes]
        stds = [one.points[size][1] or 0.0 for size in sizes]
        color, marker = STYLES[one.init]
        if one.hollow and one.half == "train":
            marker = CROSSES[one.init]
        handles[one.label] = axes.errorbar(
            sizes,
            means,
            yerr=stds if any(stds) else None,
            color=color,
            marker=marker,
            linestyle="none" if one.hollow else LINES[one.half],
            markerfacecolor="none" if one.hollow or one.half == "train" else None,
            markersize=5.5 if one.hollow else 3.5,
            markeredgewidth=0.8,
            capsize=2,
            elinewidth=0.7,
        )
    axes.set_xscale("log")
    axes.xaxis.set_major_formatter("{x:g}")
    axes.xaxis.set_minor_formatter(LogFormatter())  # plain numbers too, where there is room
    axes.set_xlabel(xlabel)
    axes.set_ylabel(ylabel)
    if ylabel.startswith("cosine"):  # bars may go beyond what there is
        low, high = axes.get_ylim()
        axes.set_ylim(max(low, -1.05), min(high, 1.05))
    axes.set_title(title)
    _legend(figure, handles)
    return _save(
        figure,
        stem,
        f"Line chart of {ylabel} against {xlabel}, on a log axis. Lines: {', '.join(handles)}.",
        f"{title}: {ylabel} against {xlabel}. Bars: one standard deviation, where "
        "the table has one.",
    )


def _add(values: dict[int, list[float]], epoch: int, value: float | None) -> None:
    if value is not None:
        values.setdefault(epoch, []).append(value)


def _spreads(values: dict[int, list[float]]) -> dict[int, Spread]:
    return {epoch: spread(over_seeds) for epoch, over_seeds in sorted(values.items())}


def _look(i: int) -> dict[str, str]:
    """Colour and marker of the i-th line of a figure."""
    return {"color": COLORS[i % len(COLORS)], "marker": MARKERS[i % len(MARKERS)]}


def _curve(axes: plt.Axes, points: dict[int, Spread], shift: float, **look) -> plt.Line2D:
    """A line with its band; its few markers are moved on by this part of their distance."""
    epochs = list(points)
    means = np.array([mean for mean, _ in points.values()])
    stds = np.array([std or 0.0 for _, std in points.values()])
    if stds.any():
        band = {"color": look["color"], "alpha": 0.15, "linewidth": 0}
        axes.fill_between(epochs, means - stds, means + stds, **band)
    step = 1 + len(epochs) // 5
    if len(epochs) == 1:
        look.setdefault("marker", "o")  # a line of one point is not seen
    (line,) = axes.plot(epochs, means, markevery=(int(shift * step), step), **look)
    return line


def _legend(figure: plt.Figure, handles: Mapping) -> None:
    """Below the axes, in as few lines as it fits into, on height of its own."""
    for lines in range(1, len(handles) + 1):
        legend = figure.legend(
            handles.values(),
            handles.keys(),
            loc="outside lower center",
            ncols=-(-len(handles) // lines),
        )
        box = legend.get_window_extent()
        if box.width <= figure.bbox.width or lines == len(handles):
            break
        legend.remove()
    figure.set_figheight(figure.get_figheight() + box.height / figure.dpi)


def _save(figure: plt.Figure, stem: Path, alt: str, caption: str) -> Figure:
    stem.parent.mkdir(parents=True, exist_ok=True)
    for kind, path in _files(stem).items():
        write_atomically(path, partial(figure.savefig, format=kind, dpi=200))
    plt.close(figure)
    return Figure(_files(stem)["png"], alt, caption, figure.get_figwidth())


def _nothing(stem: Path) -> None:
    """An earlier figure, of other runs, would be taken for that of these."""
    for path in _files(stem).values():
        path.unlink(missing_ok=True)


def _files(stem: Path) -> dict[str, Path]:
    return {kind: stem.with_name(f"{stem.name}.{kind}") for kind in ("png", "pdf")}
