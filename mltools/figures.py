"""Figures: what a sweep gives, against what was swept."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import matplotlib

matplotlib.use("Agg")  # files only: no display is needed
from matplotlib import pyplot as plt  # noqa: E402
from matplotlib.ticker import LogFormatter  # noqa: E402

from mltools.files import write_atomically  # noqa: E402
from mltools.tables import Spread  # noqa: E402

# Told apart in greyscale too: by marker, filling and line.
STYLES = {"std": {"color": "#1f5fa8", "marker": "o"}, "pai": {"color": "#d1711a", "marker": "s"}}


@dataclass
class Series:
    """One line of a figure."""

    label: str
    points: dict[int, Spread]
    """Size to mean and standard deviation."""
    init: str = "std"
    """A key of STYLES."""
    hollow: bool = False
    """Open markers without a line: somebody else's numbers."""
    half: str = "test"
    """`"test"`: a solid line; `"train"`: a dashed one."""


def sweep_figure(
    series: Sequence[Series], title: str, xlabel: str, ylabel: str, stem: Path
) -> None:
    """Draws series against sizes on a log axis, as `<stem>.png` and `<stem>.pdf`."""
    figure, axes = plt.subplots(figsize=(5.2, 4.2), layout="constrained")
    for one in series:
        if not one.points:
            continue
        sizes = sorted(one.points)
        means = [one.points[size][0] for size in sizes]
        stds = [one.points[size][1] or 0.0 for size in sizes]
        axes.errorbar(
            sizes,
            means,
            yerr=stds if any(stds) else None,
            label=one.label,
            linestyle="none" if one.hollow else {"test": "-", "train": "--"}[one.half],
            markerfacecolor="none" if one.hollow or one.half == "train" else None,
            markersize=8 if one.hollow else 4,
            linewidth=1.2,
            capsize=2,
            elinewidth=0.7,
            **(STYLES[one.init] | ({"marker": "x"} if one.hollow and one.half == "train" else {})),
        )
    axes.set_xscale("log")
    axes.xaxis.set_major_formatter("{x:g}")
    axes.xaxis.set_minor_formatter(LogFormatter())  # plain numbers too, where there is room
    axes.set_xlabel(xlabel)
    axes.set_ylabel(ylabel)
    axes.set_title(title, fontsize=10)
    axes.grid(alpha=0.3, linewidth=0.5)
    if axes.containers:
        figure.legend(loc="outside lower center", ncols=2, fontsize=7.5, frameon=False)
    stem.parent.mkdir(parents=True, exist_ok=True)
    for suffix in ("png", "pdf"):
        path = stem.with_name(f"{stem.name}.{suffix}")
        write_atomically(path, lambda file, kind=suffix: figure.savefig(file, format=kind, dpi=200))
    plt.close(figure)
