"""Figures: what is drawn are the numbers of the runs, and all of it can be read."""

import itertools

import numpy as np
import pytest
from matplotlib import colors
from matplotlib.text import Text

from mltools import figures
from mltools.figures import Curves, Panel
from mltools.results import RunFolder
from mltools.tables import Row, Table


def run(path, cosines, test=(30.0, 40.0), epochs=None, diverged=False):
    """A run's folder: `cosines`, per epoch, of act1; act2 has half as much."""
    folder = RunFolder(path)
    settings = {"dataset": "tiny", "batch_size": 8, "feedback_placement": "every-layer"}
    settings |= {"seed": int(path.name.split("-")[1]), "epochs": epochs or len(cosines)}
    folder.start(settings, {})
    folder.write_metrics(
        [
            {
                "epoch": epoch,
                "train_loss": None if diverged and epoch == len(cosines) else 1.0,
                "train_accuracy": accuracy + 10,
                "test_loss": 1.0,
                "test_accuracy": accuracy,
                "alignment": {
                    "act1": {"mean": cosine, "std": 0.5},
                    "act2": {"mean": cosine / 2, "std": 0.5},
                }
                if cosine is not None
                else {},
            }
            for epoch, (cosine, accuracy) in enumerate(zip(cosines, test), 1)
        ]
    )
    return folder


@pytest.fixture
def drawn(monkeypatch):
    """All figures that are made, in order."""
    made = []
    subplots = figures.plt.subplots

    def spy(*arguments, **options):
        figure, axes = subplots(*arguments, **options)
        made.append(figure)
        return figure, axes

    monkeypatch.setattr(figures.plt, "subplots", spy)
    return made


@pytest.fixture
def rows(tmp_path):
    """Two rows of two epochs and one without alignment; fc-a has two seeds that count."""
    a = [
        run(tmp_path / "fc-a/seed-0", [0.1, 0.2], test=(30.0, 40.0)),
        run(tmp_path / "fc-a/seed-1", [0.3, 0.4], test=(32.0, 44.0)),
        run(tmp_path / "fc-a/seed-2", [0.9, 0.9], test=(90.0, 90.0), diverged=True),
        run(tmp_path / "fc-a/seed-3", [0.9, 0.9], test=(90.0, 90.0), epochs=3),
        RunFolder(tmp_path / "fc-a/seed-4"),
    ]
    bp = [run(tmp_path / "fc-bp/seed-0", [None, None])]
    b = [run(tmp_path / "fc-b/seed-0", [-0.1, 0.0], test=(20.0, 25.0))]
    return {name: figures.curves(row) for name, row in (("fc-a", a), ("fc-bp", bp), ("fc-b", b))}


def test_curves_are_means_and_sample_deviations_over_the_runs_that_count(rows):
    deviation = 0.2 / 2**0.5  # of 0.1 and 0.3, and of 0.2 and 0.4
    assert rows["fc-a"].alignment["act1"] == {
        1: pytest.approx((0.2, deviation)), 2: pytest.approx((0.3, deviation))
    }  # fmt: skip
    assert rows["fc-a"].alignment["act2"][2] == pytest.approx((0.15, deviation / 2))
    assert rows["fc-a"].test == {
        1: pytest.approx((31, 2**0.5)), 2: pytest.approx((42, 8**0.5))
    }  # fmt: skip
    assert rows["fc-a"].train[2] == pytest.approx((52, 8**0.5))
    assert rows["fc-b"].alignment["act1"] == {1: (-0.1, None), 2: (0.0, None)}
    assert rows["fc-bp"].alignment == {} and rows["fc-bp"].test == {1: (30, None), 2: (40, None)}
    assert figures.curves([]) == Curves()


def test_an_epoch_that_some_runs_lack_is_the_mean_of_the_others(tmp_path):
    gone, null, whole = (
        run(tmp_path / f"seed-{seed}", cosines, test=(30.0, 40.0, 50.0))
        for seed, cosines in enumerate(([0.1, None, 0.3], [0.3, 0.4, 0.5], [0.5, 0.6, 0.7]))
    )
    gone.write_metrics([gone.metrics()[0], gone.metrics()[2]])  # as out of a damaged log
    metrics = null.metrics()
    metrics[1]["alignment"]["act1"]["mean"] = None
    null.write_metrics(metrics)
    found = figures.curves([gone, null, whole]).alignment["act1"]
    assert found == {
        1: pytest.approx((0.3, 0.2)), 2: (0.6, None), 3: pytest.approx((0.5, 0.2))
    }  # fmt: skip


def test_alignment_has_a_panel_for_each_layer_and_a_line_for_each_row_that_has_some(
    rows, drawn, tmp_path
):
    made = figures.alignment_figure(rows, ["act1", "act2"], "Title", tmp_path / "new" / "figure")
    (figure,) = drawn
    act1, act2 = figure.axes
    assert [axes.get_title() for axes in figure.axes] == ["act1", "act2"]
    assert [axes.get_xlabel() for axes in figure.axes] == ["epoch", "epoch"]
    assert figure.get_supylabel() == "cosine with the BP gradient"
    _, a, b = act1.lines  # after the line at zero
    np.testing.assert_allclose(a.get_xydata(), [[1, 0.2], [2, 0.3]])
    np.testing.assert_allclose(b.get_xydata(), [[1, -0.1], [2, 0.0]])
    (band,) = act1.collections  # one row has several seeds
    corners = {tuple(corner) for corner in band.get_paths()[0].vertices.round(6)}
    deviation = 0.2 / 2**0.5
    assert corners == {
        (epoch, round(mean + sign * deviation, 6))
        for epoch, mean in ((1, 0.2), (2, 0.3))
        for sign in (-1, 1)
    }
    assert colors.same_color(band.get_facecolor()[0][:3], a.get_color())
    assert len(act2.collections) == 1
    assert [text.get_text() for text in figure.legends[0].texts] == ["fc-a", "fc-b"]
    assert "fc-a, fc-b" in made.alt and made.caption.startswith("Title: cosine")
    names = sorted(path.name for path in made.png.parent.iterdir())
    assert names == ["figure.pdf", "figure.png"]


def test_accuracy_is_solid_for_test_and_dashed_for_train_and_a_row_looks_alike_everywhere(
    rows, drawn, tmp_path
):
    figures.accuracy_figure(rows, "Title", tmp_path / "accuracy")
    figures.alignment_figure(rows, ["act1"], "Title", tmp_path / "alignment")
    accuracy, alignment = drawn
    test, train = accuracy.axes
    assert (test.get_title(), train.get_title()) == ("test", "train")
    assert [line.get_linestyle() for line in test.lines] == ["-"] * 3
    assert [line.get_linestyle() for line in train.lines] == ["--"] * 3
    np.testing.assert_allclose(test.lines[0].get_ydata(), [31, 42])
    np.testing.assert_allclose(train.lines[2].get_ydata(), [30, 35])
    assert [text.get_text() for text in accuracy.legends[0].texts] == list(rows)

    def looks(line):
        return line.get_color(), line.get_marker()

    zero, a, b = alignment.axes[0].lines
    assert list(zero.get_ydata()) == [0, 0]
    assert [looks(a), looks(b)] == [looks(test.lines[0]), looks(test.lines[2])]
    assert len({looks(line) for line in test.lines}) == 3


@pytest.mark.parametrize("ylabel, shared", [(figures.COSINE, True), ("accuracy (%)", False)])
def test_cosines_of_all_layers_share_their_axis(drawn, tmp_path, ylabel, shared):
    panels = [Panel(str(top), {"fc": {1: (0.0, None), 2: (top, None)}}) for top in (0.1, 0.9)]
    figures.epochs_figure([panels], "", ylabel, tmp_path / "figure")
    low, high = (axes.get_ylim() for axes in drawn[0].axes)
    assert (low == high) == shared


def test_a_bar_beyond_what_a_cosine_can_be_does_not_stretch_the_axis(drawn, tmp_path):
    series = [figures.Series("std", {1: (0.5, 0.9), 8: (-0.9, 0.4)})]
    for ylabel in ("cosine at the layer", "accuracy (%)"):
        figures.sweep_figure(series, "", "b", ylabel, tmp_path / "figure")
    (low, high), others = (figure.axes[0].get_ylim() for figure in drawn)
    assert (low, high) == (-1.05, 1.05) and others[0] < -1.3 and others[1] > 1.4


def test_one_epoch_of_one_seed_is_a_marker_at_a_whole_number(drawn, tmp_path):
    row = figures.curves([run(tmp_path / "seed-0", [0.25])])
    figures.alignment_figure({"other": Curves(), "fc": row}, ["act1"], "", tmp_path / "figure")
    ordered = Panel("act1", {"18": row.alignment["act1"]})
    figures.epochs_figure([[ordered]], "", "cosine", tmp_path / "ordered", "size")
    for figure in drawn:
        axes = figure.axes[0]
        line = axes.lines[-1]
        assert line.get_xydata().tolist() == [[1, 0.25]] and not axes.collections
        assert line.get_marker() not in ("", "None") and line.get_markevery()[0] == 0
        low, high = axes.get_xlim()
        assert [tick for tick in axes.get_xticks() if low <= tick <= high] == [1]


def test_lines_in_an_order_go_from_dark_to_light_and_the_bar_names_them(drawn, tmp_path):
    grid = [
        [Panel("one", {"1": {1: (0.1, None)}, "800": {1: (0.8, None)}, "5": {}})],
        [Panel("two", {"18": {1: (0.3, None), 2: (0.4, None)}})],
    ]
    figures.epochs_figure(grid, "Title", "accuracy", tmp_path / "figure", "size")
    one, two, bar = drawn[0].axes
    assert [text.get_text() for text in bar.get_yticklabels()] == ["1", "18", "800"]
    assert bar.get_ylabel() == "size" and not drawn[0].legends
    lines = [*one.lines, *two.lines]
    by_size = [lines[0], lines[2], lines[1]]  # 1, 18, 800
    light = [np.dot(colors.to_rgb(line.get_color()), (0.299, 0.587, 0.114)) for line in by_size]
    assert light[0] + 0.2 < light[1] < light[2] - 0.2 and light[2] < 0.8


def test_the_final_alignment_is_a_marker_with_its_bar_for_each_layer_of_each_row(drawn, tmp_path):
    rows = [
        Row("a", alignment={"act1": (0.25, 0.1), "act2": (0.5, 0.2)}, settings={"epochs": 2}),
        Row("bp", test=(50.0, None), settings={"epochs": 2}),
        Row("a, elsewhere", alignment={"act2": (0.75, 0.05)}),
    ]
    tables = [
        Table("First: protocol", rows, ["act1", "act2"]),
        Table("Second: protocol", [Row("c")], ["act1"]),
    ]
    made = figures.final_figure(tables, tmp_path / "figure")
    (axes,) = drawn[0].axes
    assert axes.get_title() == "First" and axes.get_xlabel() == "cosine with the BP gradient"
    assert [text.get_text() for text in axes.get_yticklabels()] == ["a", "a, elsewhere"]
    places = {}
    for bars in axes.containers:
        ((x, y),) = bars.lines[0].get_xydata()
        (segment,) = bars.lines[2][0].get_segments()
        places[x] = (round(y), pytest.approx(segment[:, 0]), bars.lines[0].get_markerfacecolor())
    assert places[0.25][:2] == (0, [0.15, 0.35]) and places[0.5][:2] == (0, [0.3, 0.7])
    assert places[0.75] == (1, [0.7, 0.8], "white") and places[0.5][2] != "white"
    assert [text.get_text() for text in drawn[0].legends[0].texts] == ["act1", "act2"]
    assert "Open markers" in made.caption


def test_what_has_nothing_to_show_is_not_written_and_an_old_figure_goes(rows, tmp_path):
    bp = {"fc-bp": rows["fc-bp"]}
    for kind in ("png", "pdf"):
        (tmp_path / f"figure.{kind}").write_text("of other runs")
    assert figures.alignment_figure(bp, ["act1"], "", tmp_path / "figure") is None
    assert not list(tmp_path.glob("figure.*"))
    for made in (
        figures.accuracy_figure({}, "", tmp_path / "figure"),
        figures.epochs_figure([], "", "cosine", tmp_path / "figure", "size"),
        figures.final_figure([Table("", [Row("fc-bp")], ["act1"])], tmp_path / "figure"),
        figures.sweep_figure([figures.Series("", {})], "", "", "", tmp_path / "figure"),
    ):
        assert made is None
    assert not list(tmp_path.glob("figure.*"))


def many(names, epochs=50):
    """Rows of many epochs, no two alike, as many as there are names."""
    result = {}
    for i, name in enumerate(names):
        course = {e: ((i + 1) / 20 + e / 200, 0.02) for e in range(1, epochs + 1)}
        accuracy = {e: (100 * mean, 1.0) for e, (mean, _) in course.items()}
        result[name] = Curves(accuracy, accuracy, {f"act{k}": course for k in range(1, 5)})
    return result


NAMES = [f"fc-a-quite-long-name-{i}" for i in range(10)]


def draw_alignment(stem):
    return figures.alignment_figure(many(NAMES), ["act1", "act2", "act3", "act4"], "t", stem)


def draw_accuracy(stem):
    return figures.accuracy_figure(many(NAMES), "t", stem)


def draw_final(stem):
    alignment = {f"act{k}": (0.2 * k, 0.1) for k in range(1, 5)}
    rows = [Row(name, alignment=alignment, settings={"epochs": 1}) for name in NAMES]
    return figures.final_figure([Table(f"{i}: t", rows, list(alignment)) for i in (1, 2)], stem)


def draw_ordered(stem):
    sizes = [1, 3, 5, 8, 11, 18, 28, 46, 73, 118, 191, 308, 496, 800]
    lines = {str(size): row.test for size, row in many(sizes).items()}
    grid = [[Panel(f"panel {i} {j}", lines) for j in range(3)] for i in range(2)]
    return figures.epochs_figure(grid, "t", figures.COSINE, stem, "bottleneck size")


def draw_sweep(stem):
    points = {1: (30.0, 1.0), 18: (40.0, 2.0), 800: (50.0, 1.0)}
    series = [
        figures.Series(f"{label}, {half}{other}", points, init, bool(other), half)
        for init, label in (("std", "standard init"), ("pai", "pre-alignment"))
        for other in ("", ", published")
        for half in ("test", "train")
    ]
    title = "Gradient bottleneck in the second layer"
    return figures.sweep_figure(series, title, "bottleneck size", "accuracy (%)", stem)


def tick_labels(axis):
    low, high = sorted(axis.get_view_interval())
    labels = zip(axis.get_majorticklocs(), axis.get_majorticklabels())
    return [label.get_window_extent() for at, label in labels if low <= at <= high]


@pytest.mark.parametrize(
    "draw", [draw_alignment, draw_accuracy, draw_final, draw_ordered, draw_sweep]
)
def test_no_label_is_cut_small_or_over_another_and_no_legend_hides_data(draw, drawn, tmp_path):
    made = draw(tmp_path / "figure")
    (figure,) = drawn
    figure.draw_without_rendering()
    around = figure.get_tightbbox()  # of all that is drawn, in inches
    width, height = figure.get_size_inches()
    assert width == made.width and width in (3.4, 7.0) and height < 6
    assert around.x0 >= 0 and around.y0 >= 0 and around.x1 <= width and around.y1 <= height
    boxes = [axes.get_tightbbox() for axes in figure.axes]
    boxes += [one.get_window_extent() for one in (*figure.legends, *figure.texts)]
    axis = [axis for axes in figure.axes for axis in (axes.xaxis, axes.yaxis)]
    for group in (boxes, *map(tick_labels, axis)):
        for one, other in itertools.combinations(group, 2):
            assert not one.overlaps(other)
    texts = [text for text in figure.findobj(Text) if text.get_text() and text.get_visible()]
    assert min(text.get_fontsize() for text in texts) >= 7


def test_ten_rows_are_told_apart_without_colour(drawn, tmp_path):
    draw_accuracy(tmp_path / "figure")
    for axes in drawn[0].axes:
        assert len({line.get_marker() for line in axes.lines}) == 10
        assert len({line.get_color() for line in axes.lines}) == 10
        first = [line.get_markevery()[0] for line in axes.lines]
        assert len(set(first)) == 10  # nor do markers hide each other where lines coincide
    draw_sweep(tmp_path / "figure")
    looks = [
        (line.get_marker(), line.get_linestyle(), line.get_markerfacecolor() == "none")
        for line in (bars.lines[0] for bars in drawn[1].axes[0].containers)
    ]
    assert len(set(looks)) == 8
