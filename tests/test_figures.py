"""Figures draw the numbers of the runs, with legible texts and distinct lines."""

import itertools

import matplotlib
import numpy as np
import pytest
from made import record_figures
from matplotlib import colors
from matplotlib.text import Text

from mltools import figures
from mltools.figures import ACCURACY, COSINE
from mltools.tables import Row, Table


@pytest.fixture
def drawn(monkeypatch):
    return record_figures(monkeypatch)


@pytest.fixture
def stem(tmp_path):
    return tmp_path / "figure"


def legend(figure):
    return [text.get_text() for text in figure.legends[0].texts]


def accuracies(*means):
    """Makes test and train accuracy curves, with a standard deviation of 2 over seeds."""
    return {split: {i: (x, 2.0) for i, x in enumerate(means, 1)} for split in ("test", "train")}


EXPERIMENTS = {
    "fc-a": accuracies(31, 42) | {"act1": {1: (0.2, 0.1), 2: (0.3, 0.1)}},
    "fc-bp": accuracies(35, 45),
    "fc-b": accuracies(20, 25) | {"act1": {1: (-0.1, None), 2: (0.0, None)}},
}


def test_alignment_has_a_panel_per_layer_and_a_line_with_a_band_per_experiment(drawn, stem):
    made = figures.epochs_figure({"": EXPERIMENTS}, ["act1", "act2"], COSINE, "Title", stem)
    act1, act2 = drawn[0].axes
    assert (act1.get_title(), act2.get_title()) == ("act1", "act2")
    assert act1.get_ylim() == act2.get_ylim()  # though act2 has no line
    assert act1.get_xlabel() == "epoch" and drawn[0].get_supylabel() == COSINE
    _, a, b = act1.lines  # the first line is at zero
    assert a.get_xydata().tolist() == [[1, 0.2], [2, 0.3]]
    assert b.get_xydata().tolist() == [[1, -0.1], [2, 0.0]]
    (band,) = act1.collections  # fc-b has one seed, and so no band
    corners = {(x, round(y, 6)) for x, y in band.get_paths()[0].vertices}
    assert corners == {(1, 0.1), (1, 0.3), (2, 0.2), (2, 0.4)}
    assert colors.same_color(band.get_facecolor()[0][:3], a.get_color())
    assert legend(drawn[0]) == ["fc-a", "fc-b"]
    assert "fc-a, fc-b" in made.alt and made.caption.startswith("Title: cosine")


def test_test_lines_are_solid_train_lines_dashed_and_experiments_keep_their_style(drawn, stem):
    figures.epochs_figure({"": EXPERIMENTS}, ["test", "train"], ACCURACY, "Title", stem)
    figures.epochs_figure({"": EXPERIMENTS}, ["act1"], COSINE, "Title", stem)
    test, train = drawn[0].axes
    assert (test.get_title(), train.get_title()) == ("test", "train")
    assert [line.get_linestyle() for line in (*test.lines, *train.lines)] == 3 * ["-"] + 3 * ["--"]
    assert [line.get_ydata().tolist() for line in train.lines] == [[31, 42], [35, 45], [20, 25]]
    assert legend(drawn[0]) == list(EXPERIMENTS)
    a, bp, b = [(line.get_color(), line.get_marker()) for line in test.lines]
    _, *aligned = drawn[1].axes[0].lines
    assert [(line.get_color(), line.get_marker()) for line in aligned] == [a, b]


@pytest.mark.parametrize("order", ["", "size"])
def test_a_single_epoch_is_a_marker_with_an_integer_tick(drawn, stem, order):
    lines = {"5": {}, "18": {"act1": {1: (0.25, None)}}}
    figures.epochs_figure({"": lines}, ["act1"], COSINE, "", stem, order)
    ax = drawn[0].axes[0]
    line = ax.lines[-1]
    assert line.get_xydata().tolist() == [[1, 0.25]] and not ax.collections
    assert line.get_marker() not in ("", "None") and line.get_markevery()[0] == 0
    assert [tick for tick in ax.get_xticks() if ax.get_xlim()[0] <= tick <= ax.get_xlim()[1]] == [1]


def test_ordered_lines_go_from_dark_to_light_and_the_colour_bar_names_them(drawn, stem):
    groups = {
        "one": {"8": {"act1": {1: (0.1, None)}}, "800": {"act1": {1: (0.8, None)}}, "5": {}},
        "two": {"18": {"act1": {1: (0.3, None), 2: (0.4, None)}}},
    }
    figures.epochs_figure(groups, ["act1"], ACCURACY, "Title", stem, "size")
    one, two, bar = drawn[0].axes
    assert (one.get_title(), two.get_title()) == ("one, act1", "two, act1")
    assert [text.get_text() for text in bar.get_yticklabels()] == ["8", "18", "800"]
    assert bar.get_ylabel() == "size" and not drawn[0].legends
    by_size = [one.lines[0], two.lines[0], one.lines[1]]
    light = [np.dot(colors.to_rgb(line.get_color()), (0.299, 0.587, 0.114)) for line in by_size]
    assert light[0] + 0.2 < light[1] < light[2] - 0.2 and light[2] < 0.8


def test_final_alignment_is_a_marker_with_a_bar_per_layer_and_row(drawn, stem):
    rows = [
        Row("a", alignment={"act1": (0.25, 0.1), "act2": (0.5, 0.2)}, settings={"epochs": 2}),
        Row("bp", test=(50.0, None), settings={"epochs": 2}),
        Row("a, elsewhere", alignment={"act2": (0.75, 0.05)}),
    ]
    tables = [Table("First: protocol", rows, ["act1", "act2"]), Table("2:", [Row("c")], ["act1"])]
    made = figures.final_figure(tables, stem)
    (ax,) = drawn[0].axes
    assert ax.get_title() == "First" and ax.get_xlabel() == COSINE
    assert [text.get_text() for text in ax.get_yticklabels()] == ["a", "a, elsewhere"]
    drawn_bars = []
    for bars in ax.containers:
        ((x, y),) = bars.lines[0].get_xydata()
        low, high = bars.lines[2][0].get_segments()[0][:, 0]
        is_open = bars.lines[0].get_markerfacecolor() == "white"
        drawn_bars.append((x, round(y), round((high - low) / 2, 6), is_open))
    assert drawn_bars == [(0.25, 0, 0.1, False), (0.5, 0, 0.2, False), (0.75, 1, 0.05, True)]
    assert legend(drawn[0]) == ["act1", "act2"]
    assert "Open markers" in made.caption and "a, a, elsewhere" in made.alt


def test_a_sweep_figure_has_means_with_bars_on_a_log_axis(drawn, stem):
    series = {
        "ours": ({118: (0.7, 0.5), 1: (0.1, None)}, {"linestyle": "-"}),
        "theirs": ({118: (0.8, None)}, {"linestyle": "none"}),
        "nothing": ({}, {}),
    }
    below = {"ours": ({1: (-0.25, None)}, {})}
    for panels, ylabel in (
        ({"act1": series}, COSINE),
        ({"act1": series, "act2": below, "act3": {"nothing": ({}, {})}}, COSINE),
        ({"act1": series}, ACCURACY),
    ):
        figures.sweep_figure(panels, "title", "size", ylabel, stem)
    (ax,) = drawn[0].axes
    ours, theirs = ax.containers
    assert ours.lines[0].get_xydata().tolist() == [[1, 0.1], [118, 0.7]]
    assert theirs.lines[0].get_xydata().tolist() == [[118, 0.8]]
    assert ours.lines[2][0].get_segments()[1][:, 1] == pytest.approx([0.2, 1.2])
    assert theirs.lines[0].get_linestyle() == "None" and ax.get_xscale() == "log"
    assert (ax.get_xlabel(), ax.get_ylabel(), ax.get_title()) == ("size", COSINE, "act1")
    # The axis of a cosine is from 0, or the lowest mean, to 1, whatever the bars.
    assert ax.get_ylim() == (0, 1) and drawn[2].axes[0].get_ylim()[1] > 1.2
    assert [(ax.get_title(), ax.get_ylim()) for ax in drawn[1].axes] == [
        ("act1", (-0.25, 1)), ("act2", (-0.25, 1))
    ]  # fmt: skip
    assert legend(drawn[1]) == ["ours", "theirs"]


@pytest.mark.parametrize("draw", [
    lambda stem: figures.epochs_figure({"": {"bp": accuracies(30)}}, ["act1"], COSINE, "", stem),
    lambda stem: figures.final_figure([Table("", [Row("fc-bp")], ["act1"])], stem),
    lambda stem: figures.sweep_figure({"": {"": ({}, {})}}, "", "", "", stem),
])  # fmt: skip
def test_without_a_point_no_figure_is_written_and_an_earlier_figure_is_removed(draw, stem):
    for kind in ("png", "pdf"):
        stem.with_suffix(f".{kind}").write_text("of other runs")
    assert draw(stem) is None and list(stem.parent.iterdir()) == []


def test_figures_are_png_and_pdf_and_change_no_global_state(tmp_path):
    lines = {"": {"fc": accuracies(30)}}
    figures.epochs_figure(lines, ["test"], ACCURACY, "", tmp_path / "new" / "figure.v2")
    png, pdf = ((tmp_path / "new" / f"figure.v2.{kind}").read_bytes() for kind in ("png", "pdf"))
    assert png.startswith(b"\x89PNG") and pdf.startswith(b"%PDF")
    assert b"/Subtype /Type3" not in pdf  # so the text can be edited
    for key in figures.STYLE:
        assert matplotlib.rcParams[key] == matplotlib.rcParamsDefault[key]


LAYERS = [f"act{i}" for i in range(1, 5)]


def long_curves(names):
    """Makes curves of 50 epochs, different for each name."""
    means = [{x: ((i + 1) / 20 + x / 200, 0.02) for x in range(1, 51)} for i in range(len(names))]
    return {x: dict.fromkeys(["test", "train", *LAYERS], y) for x, y in zip(names, means)}


LONG = long_curves([f"fc-a-quite-long-name-{i}" for i in range(10)])
SIZED = long_curves("1 3 5 8 11 18 28 46 73 118 191 308 496 800".split())
ALIGNMENT = {layer: (0.2 * i, 0.1) for i, layer in enumerate(LAYERS, 1)}
ROWS = [Row(name, alignment=ALIGNMENT, settings={"epochs": 1}) for name in LONG]
POINTS = {18: (0.3, 0.1), 800: (0.5, 0.1)}
SERIES = {
    f"{label}, {split}{suffix}": (POINTS, {"marker": "o"})
    for label in ("standard init", "pre-alignment")
    for suffix in ("", ", published")
    for split in ("test", "train")
}


def tick_labels(axis):
    low, high = sorted(axis.get_view_interval())
    labels = [
        *zip(axis.get_majorticklocs(), axis.get_majorticklabels()),
        *zip(axis.get_minorticklocs(), axis.get_minorticklabels()),
    ]
    shown = (label for at, label in labels if low <= at <= high and label.get_text())
    return [label.get_window_extent() for label in shown]


@pytest.mark.parametrize("draw", [
    lambda stem: figures.epochs_figure({"": LONG}, LAYERS, COSINE, "t", stem),
    lambda stem: figures.epochs_figure({"": LONG}, ["test", "train"], ACCURACY, "t", stem),
    lambda stem: figures.epochs_figure(
        {"standard init": SIZED, "pre-alignment": SIZED}, LAYERS[:3], COSINE, "t", stem, "size b"
    ),
    lambda stem: figures.final_figure([Table(f"{i}: t", ROWS, LAYERS) for i in (1, 2)], stem),
    lambda stem: figures.sweep_figure({"Bottleneck": SERIES}, "t", "size b", ACCURACY, stem),
    lambda stem: figures.sweep_figure(
        dict.fromkeys(LAYERS[:3], SERIES), "t", "size b", COSINE, stem
    ),
])  # fmt: skip
def test_no_text_is_clipped_too_small_or_overlapping(draw, drawn, stem):
    made = draw(stem)
    (figure,) = drawn
    figure.draw_without_rendering()
    around = figure.get_tightbbox()
    width, height = figure.get_size_inches()
    assert width == made.width and width in (3.4, 7.0) and height < 6
    assert around.x0 >= 0 and around.y0 >= 0 and around.x1 <= width and around.y1 <= height
    boxes = [ax.get_tightbbox() for ax in figure.axes]
    boxes += [text.get_window_extent() for text in (*figure.legends, *figure.texts)]
    axis = [axis for ax in figure.axes for axis in (ax.xaxis, ax.yaxis)]
    for group in (boxes, *map(tick_labels, axis)):
        assert not any(box.overlaps(other) for box, other in itertools.combinations(group, 2))
    texts = [text for text in figure.findobj(Text) if text.get_text() and text.get_visible()]
    assert min(text.get_fontsize() for text in texts) >= 7


def test_lines_differ_in_colour_in_marker_and_in_marker_position(drawn, stem):
    figures.epochs_figure({"": LONG}, ["test"], ACCURACY, "t", stem)
    lines = drawn[0].axes[0].lines
    for styles in zip(*((x.get_color(), x.get_marker(), x.get_markevery()[0]) for x in lines)):
        assert len(set(styles)) == 10
