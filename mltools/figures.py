"""Figures of accuracy and alignment: against epochs, after the last epoch, and against a size.

Each figure has its printed size, one column or one page wide, and no text below 7 points. Its lines
also differ in greyscale: by marker, filling and dashes, or by lightness if they are ordered. A
drawing function that gets no points removes the earlier figure and returns None.
"""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import product
from pathlib import Path
from typing import Any

import matplotlib
import matplotlib.figure
import numpy as np
from matplotlib.axes import Axes
from matplotlib.cm import ScalarMappable
from matplotlib.colors import BoundaryNorm, ListedColormap
from matplotlib.ticker import LogFormatter, MaxNLocator

from mltools.results import write_atomically
from mltools.tables import Curve, Curves, Spread, Table

COLUMN, PAGE = 3.4, 7.0  # inches
STYLE: dict[Any, Any] = {
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
# Colour-blind readers can tell the colours apart; 10 colours and 11 markers make 110 pairs.
COLORS = "#0072b2 #d55e00 #009e73 #cc79a7 #e69f00 #56b4e9 #882255 #999933 #777777 #000000".split()
MARKERS = "osD^vPX<>*p"
LINES = {"test": "-", "train": "--"}
COSINE = "cosine with the BP gradient"
ACCURACY = "accuracy (%)"


@dataclass
class Figure:
    """A figure on disk, with its texts for the report."""

    png: Path
    alt: str
    """A description for readers who cannot see the figure."""
    caption: str
    width: float
    """Printed width in inches."""


@matplotlib.rc_context(STYLE)
def epochs_figure(
    groups: Mapping[str, Mapping[str, Curves]],
    columns: Sequence[str],
    ylabel: str,
    title: str,
    stem: Path,
    order: str = "",
) -> Figure | None:
    """Draws curves against epochs, each with a band of one standard deviation; None without any.

    Args:
        groups: maps the title of each row of panels, or "", to its experiments: label to curves.
        columns: the key of the curves in each column of panels: "test" and "train", or layers.
        ylabel: ACCURACY or COSINE; all panels of cosines share one y axis.
        title: the beginning of the caption.
        stem: the path of the files, without suffix.
        order: if the labels are numbers, the name of their quantity. The lines then go from dark to
            light with increasing number, and a colour bar replaces the legend.
    """
    panels = {
        (group, key): {label: found[key] for label, found in lines.items() if found.get(key)}
        for (group, lines), key in product(groups.items(), columns)
    }
    labels = list(dict.fromkeys(label for lines in groups.values() for label in lines))
    shown = [label for label in labels if any(label in lines for lines in panels.values())]
    if not shown:
        _remove(stem)
        return None
    if order:
        labels = shown = sorted(shown, key=int)
    shades = matplotlib.colormaps["viridis"](np.linspace(0, 0.85, len(labels)))
    figure = matplotlib.figure.Figure((PAGE, 0.5 + 1.75 * len(groups)), layout="constrained")
    axes = figure.subplots(
        len(groups), len(columns), sharex=True, sharey=ylabel == COSINE or "col", squeeze=False
    )
    handles: dict[str, Any] = {}
    for ax, ((group, key), lines) in zip(axes.flat, panels.items()):
        ax.set_title(f"{group}, {key}" if group else key)
        locator = MaxNLocator("auto", steps=[1, 2, 5, 10], integer=True, min_n_ticks=1)
        ax.xaxis.set_major_locator(locator)
        if ylabel == COSINE:
            ax.axhline(0, color="0.4", linewidth=0.6)
        for i, label in enumerate(labels):
            if label in lines:
                style = {"color": shades[i]} if order else _style(i)
                style["linestyle"] = LINES.get(key, "-")
                handles.setdefault(label, _draw_curve(ax, lines[label], i / len(labels), style))
    for ax in axes[-1]:
        ax.set_xlabel("epoch")
    figure.supylabel(ylabel)
    if order:
        _add_color_bar(figure, axes, shades, shown, order)
    else:
        _add_legend(figure, {label: handles[label] for label in shown})
    titles = ", ".join(ax.get_title() for ax in axes.flat)
    by = f", by {order}" if order else ""
    alt = f"Line chart of {ylabel} against epochs. Panels: {titles}. Lines{by}: {', '.join(shown)}."
    caption = (
        f"{title}: {ylabel} against epochs. Mean over seeds, with a band of one standard deviation "
        "over seeds where there are several."
    )
    return _save(figure, stem, alt, caption)


@matplotlib.rc_context(STYLE)
def final_figure(tables: Iterable[Table], stem: Path) -> Figure | None:
    """Draws the final alignment: a panel for each table, with a marker for each row and layer.

    Rows without alignment are omitted. Rows without settings, which are reference numbers, have
    open markers.
    """
    panels = []
    for table in tables:
        rows = [row for row in table.rows if any(map(row.alignment.get, table.layers))]
        if rows:
            panels.append((table.title.partition(":")[0], rows, table.layers))
    if not panels:
        _remove(stem)
        return None
    heights = [len(rows) + 1 for _, rows, _ in panels]
    figure = matplotlib.figure.Figure((COLUMN, 0.6 + 0.22 * sum(heights)), layout="constrained")
    axes = figure.subplots(len(panels), height_ratios=heights, sharex=True, squeeze=False)
    handles: dict[str, Any] = {}
    for (title, rows, layers), ax in zip(panels, axes.flat):
        for i, layer in enumerate(layers):
            offset = 0.6 * ((i + 0.5) / len(layers) - 0.5)
            for y, row in enumerate(rows):
                if layer not in row.alignment:
                    continue
                mean, std = row.alignment[layer]
                style = {**_style(i), "markerfacecolor": None if row.settings else "white"}
                drawn = ax.errorbar(
                    mean, y + offset, xerr=std, linestyle="none", elinewidth=0.8, **style
                )
                if row.settings or layer not in handles:
                    handles[layer] = drawn
        ax.set_title(title)
        ax.set_yticks(range(len(rows)), [row.name for row in rows])
        ax.set_ylim(len(rows) - 0.4, -0.6)
        ax.axvline(0, color="0.4", linewidth=0.6)
        ax.grid(axis="y", visible=False)
        ax.tick_params(axis="y", length=0)
    axes.flat[-1].set_xlabel(COSINE)
    _add_legend(figure, handles)
    shown = [row for _, rows, _ in panels for row in rows]
    names = ", ".join(row.name for row in shown)
    alt = f"Dot chart of the final {COSINE} at {', '.join(handles)}, for {names}."
    caption = f"Final {COSINE}: mean and standard deviation over the samples of one run each."
    if not all(row.settings for row in shown):
        caption += " Open markers: reference numbers."
    return _save(figure, stem, alt, caption)


@matplotlib.rc_context(STYLE)
def sweep_figure(
    panels: Mapping[str, Mapping[str, tuple[Curve, dict[str, Any]]]],
    title: str,
    xlabel: str,
    ylabel: str,
    stem: Path,
) -> Figure | None:
    """Draws series against sizes on a log axis.

    Args:
        panels: maps the title of a panel to its series, and the label of a series to its points and
            its style (keyword arguments of `Axes.errorbar`).
        title: the beginning of the caption.
        xlabel, ylabel: axis labels; a COSINE axis goes from 0, or a negative lowest mean, to 1.
        stem: the path of the files, without suffix.
    """
    panels = {
        panel: shown
        for panel, series in panels.items()
        if (shown := {label: line for label, line in series.items() if line[0]})
    }
    if not panels:
        _remove(stem)
        return None
    width = COLUMN if len(panels) == 1 else PAGE
    figure = matplotlib.figure.Figure((width, 2.5), layout="constrained")
    axes = figure.subplots(1, len(panels), sharey=True, squeeze=False)
    handles: dict[str, Any] = {}
    lowest = 0.0
    common: dict[str, Any] = {"markeredgewidth": 0.8, "capsize": 2, "elinewidth": 0.7}
    for ax, (panel, series) in zip(axes.flat, panels.items()):
        for label, (points, style) in series.items():
            sizes, spreads = zip(*sorted(points.items()))
            means, stds = _means_and_stds(spreads)
            bars = stds if stds.any() else None
            line = ax.errorbar(sizes, means, yerr=bars, **common, **style)
            line.lines[0].set_clip_on(False)  # whole markers at the ends of the axis
            handles.setdefault(label, line)
            lowest = min(lowest, *means)
        ax.set_xscale("log")
        ax.xaxis.set_major_formatter("{x:g}")
        # Minor ticks get plain numbers too, if there is room.
        ax.xaxis.set_minor_formatter(LogFormatter(minor_thresholds=(len(panels) == 1, 0.4)))
        ax.set(title=panel, xlabel=xlabel)
    axes[0, 0].set_ylabel(ylabel)
    if ylabel == COSINE:
        axes[0, 0].set_ylim(lowest, 1)
    _add_legend(figure, handles)
    titles = ", ".join(panels)
    alt = (
        f"Line chart of {ylabel} against {xlabel}, on a log axis. Panels: {titles}. "
        f"Lines: {', '.join(handles)}."
    )
    caption = f"{title}: {ylabel} against {xlabel}. Bars: one standard deviation, where known."
    return _save(figure, stem, alt, caption)


def _means_and_stds(spreads: Iterable[Spread]) -> np.ndarray:
    return np.array([(mean, std or 0.0) for mean, std in spreads]).T


def _style(i: int) -> dict[str, Any]:
    """Returns the colour and the marker of the i-th line of a figure."""
    return {"color": COLORS[i % len(COLORS)], "marker": MARKERS[i % len(MARKERS)]}


def _draw_curve(ax: Axes, curve: Curve, shift: float, style: dict[str, Any]) -> Any:
    """Draws a curve with its band; `shift` moves its markers by a fraction of their spacing."""
    epochs = list(curve)
    means, stds = _means_and_stds(curve.values())
    if stds.any():
        band = {"color": style["color"], "alpha": 0.15, "linewidth": 0}
        ax.fill_between(epochs, means - stds, means + stds, **band)
    if len(epochs) == 1:
        style = {"marker": "o", **style}  # a line of one point is invisible
    step = 1 + len(epochs) // 5
    return ax.plot(epochs, means, markevery=(int(shift * step), step), **style)[0]


def _add_color_bar(
    figure: matplotlib.figure.Figure,
    axes: np.ndarray,
    shades: np.ndarray,
    labels: Sequence[str],
    title: str,
) -> None:
    """Adds a colour bar with one shade per label, in place of a legend."""
    norm = BoundaryNorm(range(len(labels) + 1), len(labels))
    scale = ScalarMappable(norm, ListedColormap(shades))
    bar = figure.colorbar(scale, ax=axes, label=title, pad=0.02, aspect=30)
    bar.set_ticks([i + 0.5 for i in range(len(labels))], labels=labels)
    bar.ax.tick_params(length=0)
    bar.minorticks_off()


def _add_legend(figure: matplotlib.figure.Figure, handles: Mapping[str, Any]) -> None:
    """Adds a legend below the axes, in as few lines as fit, and enlarges the figure for it."""
    for lines in range(1, len(handles) + 1):
        columns = -(-len(handles) // lines)
        legend = figure.legend(
            handles.values(), handles.keys(), loc="outside lower center", ncols=columns
        )
        box = legend.get_window_extent()
        if box.width <= figure.bbox.width or columns == 1:
            break
        legend.remove()
    figure.set_figheight(figure.get_figheight() + box.height / figure.dpi)


def _save(figure: matplotlib.figure.Figure, stem: Path, alt: str, caption: str) -> Figure:
    stem.parent.mkdir(parents=True, exist_ok=True)
    for kind, path in _paths(stem).items():
        write_atomically(path, partial(figure.savefig, format=kind, dpi=200))
    return Figure(_paths(stem)["png"], alt, caption, figure.get_figwidth())


def _remove(stem: Path) -> None:
    """Removes an earlier figure, which does not show the current runs."""
    for path in _paths(stem).values():
        path.unlink(missing_ok=True)


def _paths(stem: Path) -> dict[str, Path]:
    return {kind: stem.with_name(f"{stem.name}.{kind}") for kind in ("png", "pdf")}
