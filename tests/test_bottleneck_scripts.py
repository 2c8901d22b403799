"""bottleneck.py, and the way back from its logs to the same table and figures."""

import csv
import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from test_logs import release_log

import bottleneck
import bottleneck_from_log
import log_retrieval
from mltools import figures
from mltools import sweep as mltools_sweep
from mltools.errors import exit_code
from mltools.results import RunFolder

ROOT = Path(bottleneck.__file__).parent
OUTPUTS = [
    *(f"table.{kind}" for kind in ("md", "csv", "tex")),
    *(
        f"{what}{against}.{kind}"
        for what in ("alignment", "accuracy")
        for against in ("", "-epochs")
        for kind in ("png", "pdf")
    ),
]


def test_the_rows_are_the_papers():
    parser = bottleneck.argparse.ArgumentParser()
    bottleneck.add_options(parser)
    rows = bottleneck.experiments(parser.parse_args([]))
    sizes = [1, 3, 5, 8, 11, 18, 28, 46, 73, 118, 191, 308, 496, 800]
    names = [f"{init}-{size}" for init in ("std", "pai") for size in sizes]
    assert [row.name for row in rows] == names
    for row, size in zip(rows, 2 * sizes):
        assert row.network.bottleneck == size / 800 and row.network.hidden == (800, 800, 800)
        assert row.prealigned == row.name.startswith("pai")
        assert (row.reduction, row.learning_rate, row.training_method) == ("sum", 5e-4, "dfa")
    (narrow,) = bottleneck.experiments(
        parser.parse_args(["--kind", "width", "--sizes", "18", "--init", "pai"])
    )
    assert narrow.name == "width-pai-18" and narrow.prealigned
    assert narrow.network.hidden == (800, 18, 800) and narrow.network.bottleneck is None


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--sizes", "0"], "from 1 to 800, not 0"),
        (["--sizes", "801"], "from 1 to 800, not 801"),
        (["--sizes", "18", "-1"], "from 1 to 800, not -1"),
        (["--sizes", "1.5"], "--sizes"),
        (["--sizes"], "--sizes"),
        (["--init", "zero"], "--init"),
        (["--kind", "depth"], "--kind"),
        (["--experiments", "std-7"], "std-7"),
    ],
)
def test_wrong_options_are_one_line(start, tmp_path, arguments, message):
    code, out, err = start(bottleneck.main, "--results-dir", tmp_path / "results", *arguments)
    assert code == 2 and out == "" and err.count("\n") == 1 and message in err
    assert not (tmp_path / "results").exists()


@pytest.fixture(scope="module")
def sweep(tmp_path_factory):
    """A short sweep on the digits, by the command itself."""
    results = tmp_path_factory.mktemp("results")
    command = [sys.executable, ROOT / "bottleneck.py", "--dataset", "Digits", "--epochs", "2"]
    command += ["--sizes", "18", "800", "--device", "cpu", "--results-dir", results]
    run = subprocess.run(command, capture_output=True, text=True, check=True)
    return results / "bottleneck", command, run.stdout


def test_a_sweep_leaves_its_files_and_is_not_run_again(start, sweep):
    folder, command, out = sweep
    assert {path.name for path in folder.iterdir()} == {
        *OUTPUTS, "report.html", "std-18", "std-800", "pai-18", "pai-800"
    }  # fmt: skip
    assert (folder / "table.md").read_text() in out and "std-18/seed-0" in out
    before = {file: file.stat().st_mtime_ns for file in folder.glob("*/*/*")}
    code, again, _ = start(bottleneck.main, *command[2:])
    assert {file: file.stat().st_mtime_ns for file in folder.glob("*/*/*")} == before
    assert code == 0 and "epoch 1/2" in out and "epoch 1/2" not in again


def test_lost_results_come_back_out_of_the_logs(sweep, tmp_path, monkeypatch, capsys):
    folder = sweep[0]
    before = {name: (folder / name).read_bytes() for name in OUTPUTS if ".pdf" not in name}
    lines = {path: path.read_text() for path in folder.glob("*/*/metrics.jsonl")}
    logs = [str(path) for path in folder.glob("*/*/log.txt")]
    assert len(lines) == len(logs) == 4
    for path in lines:
        path.unlink()
        path.with_name("angles.npz").unlink()
    for name in (*OUTPUTS, "report.html"):
        (folder / name).unlink()
    monkeypatch.setattr("sys.argv", ["log_retrieval.py", *logs, "--output", str(folder)])
    assert log_retrieval.main() == 0
    monkeypatch.setattr("sys.argv", ["bottleneck_from_log.py", str(folder)])
    assert exit_code(bottleneck_from_log.main) == 0
    assert {path: path.read_text() for path in lines} == lines
    assert {name: (folder / name).read_bytes() for name in before} == before
    monkeypatch.setattr(
        "sys.argv", ["bottleneck_from_log.py", *logs, "--output", str(tmp_path / "out")]
    )
    assert exit_code(bottleneck_from_log.main) == 0
    assert {name: (tmp_path / "out" / name).read_bytes() for name in before} == before
    assert (tmp_path / "out" / "accuracy.pdf").exists()
    report = (tmp_path / "out" / "report.html").read_text()
    assert report.count("finished, out of a log") == 4 and "<a " not in report  # nowhere to lead


def test_figures_from_logs_need_no_training_code(sweep):
    code = (
        "import sys; sys.argv = ['x', sys.argv[1]]; import bottleneck_from_log as b; b.main(); "
        "assert not {'torch', 'mltools.training', 'mltools.data', 'dfatools'} & set(sys.modules)"
    )
    command = [sys.executable, "-c", code, sweep[0]]
    subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True)


def retrieved(path, name, test, cosine, seed=0, **settings):
    folder = RunFolder(path / name / f"seed-{seed}")
    common = {"dataset": "CIFAR-10", "epochs": 50, "batch_size": 128}
    folder.start({**common, "feedback_placement": "release", "seed": seed, **settings}, {})
    folder.write_metrics(
        [
            {
                "epoch": 50,
                "train_loss": 1.0,
                "train_accuracy": test + 10,
                "test_loss": 1.0,
                "test_accuracy": test,
                "alignment": {"act2": {"mean": cosine, "std": 0.03}},
            }
        ]
    )


def test_the_figures_show_our_numbers_and_the_published_ones_beside_them(tmp_path, monkeypatch):
    retrieved(tmp_path, "std-118", 40.0, 0.7)
    retrieved(tmp_path, "std-18", 39.0, 0.4)
    retrieved(tmp_path, "pai-118", 41.0, 0.9, dataset="CIFAR-100")
    shown = []
    monkeypatch.setattr(
        bottleneck_from_log,
        "sweep_figure",
        lambda series, *arguments: shown.append({one.label: one.points for one in series}),
    )
    table = bottleneck_from_log.write_report(bottleneck_from_log.runs_below(tmp_path), tmp_path)
    alignment, accuracy = shown
    assert alignment["standard init"] == {18: (0.4, 0.03), 118: (0.7, 0.03)}
    assert alignment["standard init, published"] == {18: (0.4655, 0.0736), 118: (0.7597, 0.0361)}
    assert alignment["pre-alignment"] == {118: (0.9, 0.03)}
    assert alignment["pre-alignment, published"] == {}  # the settings are others
    assert accuracy["standard init, test"] == {18: (39.0, None), 118: (40.0, None)}
    assert accuracy["standard init, train"] == {18: (49.0, None), 118: (50.0, None)}
    assert accuracy["standard init, train, published"] == {18: (45.3, None), 118: (58.5, None)}
    lines = [line.split("|")[1].strip() for line in table.splitlines() if line.startswith("| ")]
    names = ["std-18", "std-18, published", "std-118", "std-118, published", "pai-118"]
    assert lines == ["experiment", *names]


def test_a_figure_draws_means_with_their_spreads_on_a_log_axis(tmp_path, monkeypatch):
    axes = []
    subplots = figures.plt.subplots

    def spy(**options):
        figure, one = subplots(**options)
        axes.append(one)
        return figure, one

    monkeypatch.setattr(figures.plt, "subplots", spy)
    series = [
        figures.Series("ours", {118: (0.7, 0.1), 1: (0.1, None)}),
        figures.Series("theirs", {118: (0.8, None)}, hollow=True),
        figures.Series("nothing", {}),
    ]
    figures.sweep_figure(series, "title", "size", "cosine", tmp_path / "new" / "figure")
    (drawn,) = axes
    ours, theirs = drawn.containers
    assert ours.lines[0].get_xydata().tolist() == [[1, 0.1], [118, 0.7]]
    assert theirs.lines[0].get_xydata().tolist() == [[118, 0.8]]
    (bars,) = ours.lines[2]
    assert bars.get_segments()[1][:, 1] == pytest.approx([0.6, 0.8])
    assert theirs.lines[0].get_linestyle() == "None" and drawn.get_xscale() == "log"
    assert (drawn.get_xlabel(), drawn.get_ylabel()) == ("size", "cosine")
    names = sorted(path.name for path in (tmp_path / "new").iterdir())
    assert names == ["figure.pdf", "figure.png"]


def test_what_is_no_sweep_is_one_line(tmp_path, monkeypatch, capsys):
    for sources, message in (
        ([tmp_path], "there is no run of a bottleneck"),
        ([tmp_path / "missing", "--output", tmp_path], "missing"),
    ):
        monkeypatch.setattr("sys.argv", ["bottleneck_from_log.py", *map(str, sources)])
        assert exit_code(bottleneck_from_log.main) == 2
        err = capsys.readouterr().err
        assert err.count("\n") == 1 and message in err
    assert list(tmp_path.iterdir()) == []


@pytest.fixture
def copied(sweep, tmp_path):
    """A copy of the sweep that a test may change: the results folder, the script's in it."""
    shutil.copytree(sweep[0], tmp_path / "results" / "bottleneck")
    return tmp_path / "results", tmp_path / "results" / "bottleneck"


def call(script, monkeypatch, capsys, *arguments):
    """Exit code, stdout and stderr of a script whose main returns the first."""
    monkeypatch.setattr("sys.argv", [script.__name__, *map(str, arguments)])
    capsys.readouterr()
    try:
        code = script.main() if script is log_retrieval else exit_code(script.main)
    except SystemExit as end:
        code = end.code
    return code, *capsys.readouterr()


def no_training(*arguments):
    raise AssertionError("this trains")


def cells_of(folder):
    with open(folder / "table.csv", encoding="utf-8") as file:
        return {row["experiment"]: row for row in csv.DictReader(file)}


SWEPT = ("std-18", "std-800", "pai-18", "pai-800")
DIGITS = ("--dataset", "Digits", "--device", "cpu", "--epochs")


def test_each_run_is_what_its_name_says(sweep):
    for row in SWEPT:
        folder, (init, size) = sweep[0] / row / "seed-0", row.split("-")
        experiment = RunFolder(folder).config()["settings"]["experiment"]
        keep = int(size) / 800
        assert experiment["network"]["bottleneck"] == keep
        assert experiment["prealigned"] == (init == "pai")
        mask = torch.load(folder / "state.pt", weights_only=True)["lin2.weight_mask"]
        spread = (keep * (1 - keep) / mask.numel()) ** 0.5
        assert mask.shape == (800, 800) and set(mask.unique().tolist()) <= {0.0, 1.0}
        assert abs(mask.double().mean().item() - keep) <= 5 * spread


def test_the_table_holds_the_last_epochs(sweep):
    cells = cells_of(sweep[0])
    assert tuple(cells) == SWEPT  # by initialisation and size; nothing is published for Digits
    for row in SWEPT:
        last = json.loads((sweep[0] / row / "seed-0/metrics.jsonl").read_text().splitlines()[-1])
        assert float(cells[row]["test_accuracy_mean"]) == last["test_accuracy"]
        assert float(cells[row]["train_accuracy_mean"]) == last["train_accuracy"]
        for layer, cosine in last["alignment"].items():
            found = [float(cells[row][f"{layer}_{part}"]) for part in ("mean", "std")]
            assert found == [cosine["mean"], cosine["std"]]


def test_tables_only_makes_the_report_anew_and_trains_nothing(start, copied, monkeypatch):
    results, folder = copied
    before = {name: (folder / name).read_bytes() for name in OUTPUTS if ".pdf" not in name}
    for path in folder.iterdir():
        if path.is_file():
            path.unlink()
    monkeypatch.setattr(mltools_sweep, "train", no_training)
    options = (*DIGITS, "2", "--sizes", 800, 18, "--results-dir", results, "--tables-only")
    code, out, _ = start(bottleneck.main, *options)
    assert code == 0 and out.strip() == before["table.md"].decode().strip()
    assert {name: (folder / name).read_bytes() for name in before} == before
    assert {path.name for path in folder.iterdir()} == {*SWEPT, *OUTPUTS, "report.html"}


@pytest.mark.filterwarnings("error")
def test_tables_only_without_a_run_says_so(start, tmp_path, monkeypatch):
    (tmp_path / "bottleneck").mkdir()
    monkeypatch.setattr(mltools_sweep, "train", no_training)
    options = ("--sizes", 18, "--init", "pai", "--results-dir", tmp_path, "--tables-only")
    code, out, _ = start(bottleneck.main, *DIGITS, "1", *options)
    assert code == 0 and "pai-18" in out and "1 not finished" in out
    assert not (tmp_path / "bottleneck/pai-18").exists()


@pytest.mark.usefixtures("quick_figures")
def test_a_narrow_layer_has_that_width_and_thins_nothing(start, tmp_path):
    options = ("--kind", "width", "--sizes", 5, "--init", "std", "--results-dir", tmp_path)
    code, _, _ = start(bottleneck.main, *DIGITS, "1", *options)
    folder = tmp_path / "bottleneck"
    state = torch.load(folder / "width-std-5/seed-0/state.pt", weights_only=True)
    shapes = [tuple(state[f"lin{i}.weight"].shape) for i in (1, 2, 3, 4)]
    assert code == 0 and shapes == [(800, 1024), (5, 800), (800, 5), (10, 800)]
    assert not any(name.endswith("_mask") for name in state)
    assert list(cells_of(folder)) == ["width-std-5"]
    assert (folder / "width-alignment.png").exists() and not (folder / "alignment.png").exists()


def test_logs_are_enough_when_the_settings_are_lost_too(copied, monkeypatch, capsys):
    folder = copied[1]
    before = {name: (folder / name).read_bytes() for name in OUTPUTS if ".pdf" not in name}
    for path in folder.glob("*/*/*"):
        if path.name != "log.txt":
            path.unlink()
    logs = sorted(folder.glob("*/*/log.txt"))
    code, _, err = call(log_retrieval, monkeypatch, capsys, *logs, "--output", folder)
    assert code == 0 and err == ""
    code, out, err = call(bottleneck_from_log, monkeypatch, capsys, folder)
    assert code == 0 and err == "" and out.strip() == before["table.md"].decode().strip()
    assert {name: (folder / name).read_bytes() for name in before} == before


@pytest.mark.usefixtures("quick_figures")
def test_a_run_that_comes_from_its_folder_and_from_its_log_counts_once(copied, monkeypatch, capsys):
    folder = copied[1]
    before = (folder / "table.csv").read_bytes()
    log = folder / "std-18/seed-0/log.txt"
    assert call(bottleneck_from_log, monkeypatch, capsys, folder, log)[0] == 0
    assert (folder / "table.csv").read_bytes() == before


@pytest.mark.usefixtures("quick_figures")
@pytest.mark.parametrize("times", [1, 2])
def test_a_log_of_the_release_counts_each_run_once_and_shows_no_cosine_in_front(
    tmp_path, monkeypatch, capsys, times
):
    log, output = tmp_path / "log.txt", tmp_path / "out"
    log.write_bytes(times * release_log())
    assert call(bottleneck_from_log, monkeypatch, capsys, log, "--output", output)[0] == 0
    (row,) = cells_of(output).values()
    assert row["seeds"] == "1" and row["act2_mean"] == "0.4003"
    assert not {"lin1_mean", "act1_mean"} & row.keys()
    assert call(log_retrieval, monkeypatch, capsys, log, "--output", output)[0] == 0
    (line, *_) = RunFolder(output / "std-118/seed-0").metrics()
    assert line["alignment"]["act1"]["mean"] == 0.1001  # the log's numbers are all there


@pytest.mark.usefixtures("quick_figures")
def test_a_run_that_was_begun_again_in_a_log_counts_as_what_it_became(
    tmp_path, monkeypatch, capsys
):
    log, output = tmp_path / "log.txt", tmp_path / "out"
    whole = release_log()
    log.write_bytes(whole[: whole.index(b"EPOCH 3")] + b"\n" + whole)
    assert call(bottleneck_from_log, monkeypatch, capsys, log, "--output", output)[0] == 0
    (row,) = cells_of(output).values()
    assert (row["seeds"], row["note"], row["test_accuracy_mean"]) == ("1", "", "24.5")


@pytest.mark.usefixtures("quick_figures")
def test_two_runs_of_one_seed_that_differ_are_refused(tmp_path, monkeypatch, capsys):
    for i, changes in enumerate(({}, {"batch_size": 64}, {"batch_size": 32, "epochs": 51})):
        retrieved(tmp_path / str(i), "std-118", 40.0, 0.7, **changes)
    one, other, unfinished = (tmp_path / str(i) for i in range(3))
    code, _, err = call(bottleneck_from_log, monkeypatch, capsys, one, unfinished, other)
    assert code == 2 and "batch_size is 128 there, now 64" in err and err.count("\n") == 1
    assert call(bottleneck_from_log, monkeypatch, capsys, unfinished, one)[0] == 0
    assert cells_of(unfinished)["std-118"]["seeds"] == "1"


def test_logs_alone_need_an_output_and_a_run(tmp_path, monkeypatch, capsys):
    log = tmp_path / "log.txt"
    log.write_text("nothing here\n")
    code, _, err = call(bottleneck_from_log, monkeypatch, capsys, log)
    assert code == 2 and "--output" in err
    code, _, err = call(bottleneck_from_log, monkeypatch, capsys, log, "--output", tmp_path / "out")
    assert code == 2 and err.count("\n") == 1 and "no run of a bottleneck" in err
    assert not (tmp_path / "out").exists()


@pytest.mark.usefixtures("quick_figures")
@pytest.mark.parametrize(
    ("name", "settings"),
    [
        ("std-118", {"dataset": "CIFAR-100"}),
        ("std-118", {"batch_size": 64}),
        ("std-118", {"feedback_placement": "every-layer"}),
        ("std-118", {"epochs": 49}),
        ("std-117", {}),
        ("width-std-118", {}),
    ],
)
def test_nothing_published_stands_beside_another_protocol(tmp_path, name, settings):
    retrieved(tmp_path, name, 40.0, 0.7, **settings)
    table = bottleneck_from_log.write_report(bottleneck_from_log.runs_below(tmp_path), tmp_path)
    assert "published" not in table and list(cells_of(tmp_path)) == [name]


@pytest.mark.usefixtures("quick_figures")
def test_the_published_numbers_are_not_in_our_means(tmp_path):
    for seed, test in enumerate((40.0, 42.0)):
        retrieved(tmp_path, "std-118", test, 0.7, seed)
    bottleneck_from_log.write_report(bottleneck_from_log.runs_below(tmp_path), tmp_path)
    ours, published = cells_of(tmp_path).values()
    assert [float(ours[f"test_accuracy_{part}"]) for part in ("mean", "std")] == [
        41, pytest.approx(2**0.5)
    ]  # fmt: skip
    assert (ours["seeds"], float(ours["act2_mean"])) == ("2", 0.7)
    assert float(published["test_accuracy_mean"]) == 47.9
    assert "act1_mean" not in published  # there it is no measure of alignment


def test_what_is_not_finished_is_noted_and_not_drawn(tmp_path, monkeypatch):
    retrieved(tmp_path, "std-18", 39.0, 0.4)
    retrieved(tmp_path, "std-118", 40.0, 0.7, epochs=51)
    shown = []
    monkeypatch.setattr(
        bottleneck_from_log,
        "sweep_figure",
        lambda series, *arguments: shown.append([one.points for one in series if one.points]),
    )
    bottleneck_from_log.write_report(bottleneck_from_log.runs_below(tmp_path), tmp_path)
    assert cells_of(tmp_path)["std-118"]["note"] == "1 not finished"
    assert [list(points) for figure in shown for points in figure] == [[18]] * 6
