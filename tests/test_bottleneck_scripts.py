"""The bottleneck sweep, its report, and the same report from logs."""

import csv
import shutil
import statistics
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from made import made_run, record_figures, release_log, save_run

import bottleneck
import bottleneck_from_log
import log_retrieval
from mltools.bottleneck import write_bottleneck_report
from mltools.networks import Network
from mltools.results import RunFolder

ROOT = Path(bottleneck.__file__).parent
SIZES = [1, 3, 5, 8, 11, 18, 28, 46, 73, 118, 191, 308, 496, 800]
SWEPT = ("std-18", "std-800", "pai-18", "pai-800")
TABLES = {f"table.{kind}" for kind in ("md", "csv", "tex")}
FIGURES = ("alignment", "accuracy", "alignment-epochs", "accuracy-epochs")
PNGS, PDFS = ({f"{stem}.{kind}" for stem in FIGURES} for kind in ("png", "pdf"))
DIGITS = ("--dataset", "Digits", "--device", "cpu", "--epochs")


def cells_of(folder):
    with open(folder / "table.csv", encoding="utf-8") as file:
        return {line["experiment"]: line for line in csv.DictReader(file)}


def experiments(**options):
    common = {"dataset": "Digits", "data_dir": "", "results_dir": "", "seeds": (0,)}
    return bottleneck.experiments(
        bottleneck.BottleneckOptions(**common, epochs=1, batch_size=128, **options)
    )


# The sweep


def test_the_experiments_are_the_papers():
    chosen = experiments()
    assert [x.name for x in chosen] == [f"{init}-{b}" for init in ("std", "pai") for b in SIZES]
    for x, size in zip(chosen, 2 * SIZES):
        assert x.network == Network(bottleneck=size / 800, hidden=(800, 800, 800))
        assert x.prealigned == x.name.startswith("pai")
        assert (x.training_method, x.reduction, x.learning_rate) == ("dfa", "sum", 5e-4)


def test_the_kind_width_has_a_narrow_layer():
    (narrow,) = experiments(kind="width", sizes=[18], init=["pai"])
    assert narrow.name == "width-pai-18" and narrow.prealigned
    assert narrow.network == Network(hidden=(800, 18, 800))


@pytest.mark.parametrize("arguments, message", [
    ("--sizes 0", "from 1 to 800, not 0"),
    ("--sizes 18 801", "from 1 to 800, not 801"),
    ("--sizes 1.5", "--sizes"),
    ("--init zero", "--init"),
    ("--kind depth", "--kind"),
    ("--experiments std-7", "std-7"),
])  # fmt: skip
def test_wrong_options_are_one_line(start, tmp_path, arguments, message):
    options = ("--results-dir", tmp_path / "results", *arguments.split())
    code, out, err = start(bottleneck.main, *options)
    assert code == 2 and out == "" and err.count("\n") == 1 and message in err
    assert not (tmp_path / "results").exists()


@pytest.fixture(scope="module")
def swept(tmp_path_factory):
    """A short sweep on the digits, by the command itself: its folder, arguments and output."""
    results = tmp_path_factory.mktemp("results")
    arguments = [*DIGITS, "1", "--sizes", "18", "800", "--results-dir", str(results)]
    command = [sys.executable, ROOT / "bottleneck.py", *arguments]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    return results / "bottleneck", arguments, done.stdout


@pytest.fixture
def copied(swept, tmp_path):
    """A copy of the sweep's folder, which a test may change."""
    return Path(shutil.copytree(swept[0], tmp_path / "results" / "bottleneck"))


def contents(folder, names):
    return {name: (folder / name).read_bytes() for name in names}


def test_a_sweep_leaves_its_files_and_is_not_run_again(start, swept):
    folder, arguments, out = swept
    names = {path.name for path in folder.iterdir() if not path.name.startswith(".")}
    assert names == {*TABLES, *PNGS, *PDFS, "report.html", *SWEPT}
    assert (folder / "table.md").read_text(encoding="utf-8") in out and "epoch 1/1" in out
    before = {file: file.stat().st_mtime_ns for file in folder.glob("*/*/*")}
    code, again, _ = start(bottleneck.main, *arguments)
    assert {file: file.stat().st_mtime_ns for file in folder.glob("*/*/*")} == before
    assert code == 0 and "epoch 1/1" not in again


@pytest.mark.parametrize("name", SWEPT)
def test_each_run_is_as_its_name_says(swept, name):
    folder, (init, size) = swept[0] / name / "seed-0", name.split("-")
    experiment = RunFolder(folder).load().settings["experiment"]
    assert experiment["prealigned"] == (init == "pai")
    keep = experiment["network"]["bottleneck"]
    assert keep == int(size) / 800
    mask = torch.load(folder / "state.pt", weights_only=True)["lin2.weight_mask"].double()
    deviation = (keep * (1 - keep) / mask.numel()) ** 0.5
    assert mask.shape == (800, 800) and abs(mask.mean().item() - keep) <= 5 * deviation


def test_the_table_has_the_last_epochs(swept):
    cells = cells_of(swept[0])
    assert tuple(cells) == SWEPT  # by initialisation and size; none is published for Digits
    for name, line in cells.items():
        last = RunFolder(swept[0] / name / "seed-0").load().epochs[-1]
        expected = {f"{x}_mean": last[x] for x in ("test_accuracy", "train_accuracy")}
        for layer, cosine in last["alignment"].items():
            expected |= {f"{layer}_{statistic}": x for statistic, x in cosine.items()}
        assert {key: float(line[key]) for key in expected} == expected


def test_tables_only_writes_the_same_report_again(start, swept, copied):
    names = {*TABLES, *PNGS, "report.html"}
    before = contents(copied, names)
    for name in (*names, *PDFS):
        (copied / name).unlink()
    arguments = [*swept[1][:-1], copied.parent, "--tables-only"]
    code, out, _ = start(bottleneck.main, *arguments)
    assert code == 0 and out.strip() == before["table.md"].decode().strip()
    assert contents(copied, names) == before


@pytest.mark.filterwarnings("error")
def test_tables_only_without_a_run_trains_nothing(start, tmp_path):
    (tmp_path / "bottleneck").mkdir()
    options = ("--sizes", 18, "--init", "pai", "--results-dir", tmp_path, "--tables-only")
    code, out, _ = start(bottleneck.main, *DIGITS, "1", *options)
    assert code == 0 and "pai-18" in out and "1 not finished" in out
    assert not (tmp_path / "bottleneck/pai-18").exists()


@pytest.mark.usefixtures("quick_figures")
def test_a_narrow_layer_has_that_width_and_masks_nothing(start, tmp_path):
    options = ("--kind", "width", "--sizes", 5, "--init", "std", "--results-dir", tmp_path)
    code, _, _ = start(bottleneck.main, *DIGITS, "1", *options)
    folder = tmp_path / "bottleneck"
    state = torch.load(folder / "width-std-5/seed-0/state.pt", weights_only=True)
    shapes = [tuple(state[f"lin{i}.weight"].shape) for i in (1, 2, 3, 4)]
    assert code == 0 and shapes == [(800, 1024), (5, 800), (800, 5), (10, 800)]
    assert not any(name.endswith("_mask") for name in state)
    assert list(cells_of(folder)) == ["width-std-5"]
    assert (folder / "width-alignment.png").exists() and not (folder / "alignment.png").exists()


# The report from results and logs


def test_logs_give_the_same_report(start, swept, tmp_path):
    before = contents(swept[0], {*TABLES, *PNGS})
    logs = swept[0].glob("*/*/log.txt")
    code, out, err = start(bottleneck_from_log.main, *logs, "--output", tmp_path / "out")
    assert (code, err) == (0, "") and out.strip() == before["table.md"].decode().strip()
    assert contents(tmp_path / "out", before) == before
    report = (tmp_path / "out/report.html").read_text(encoding="utf-8")
    assert report.count("finished, out of a log") == 4 and "<a " not in report


def test_results_that_were_retrieved_from_logs_give_the_same_report(start, copied, monkeypatch):
    before = contents(copied, {*TABLES, *PNGS})
    for path in copied.glob("*/*/*"):
        if path.name != "log.txt":
            path.unlink()
    logs = map(str, copied.glob("*/*/log.txt"))
    monkeypatch.setattr("sys.argv", ["log_retrieval.py", *logs, "--output", str(copied)])
    assert log_retrieval.main() == 0
    assert start(bottleneck_from_log.main, copied)[0] == 0
    assert contents(copied, before) == before


@pytest.mark.usefixtures("quick_figures")
def test_a_run_in_a_folder_and_in_a_log_counts_once(start, copied):
    before = contents(copied, TABLES)
    log = copied / "std-18/seed-0/log.txt"
    assert start(bottleneck_from_log.main, copied, log)[0] == 0
    assert contents(copied, TABLES) == before


def test_the_report_needs_no_torch(swept, tmp_path):
    code = (
        "import sys, bottleneck_from_log as script; sys.argv[0] = 'x'; script.main(); "
        "assert not {'torch', 'mltools.training', 'mltools.data', 'dfatools'} & set(sys.modules)"
    )
    log = swept[0] / "std-18/seed-0/log.txt"
    command = [sys.executable, "-c", code, log, "--output", tmp_path]
    subprocess.run(command, cwd=ROOT, capture_output=True, check=True)


@pytest.mark.usefixtures("quick_figures")
@pytest.mark.parametrize("before", [
    "", release_log(), release_log()[: release_log().index("EPOCH 3")] + "\n"
], ids=["once", "twice", "after an interrupted run"])  # fmt: skip
def test_a_log_of_the_release_counts_a_run_once_and_shows_no_cosine_in_front(
    start, tmp_path, before
):
    (tmp_path / "log.txt").write_text(before + release_log())
    arguments = (tmp_path / "log.txt", "--output", tmp_path)
    assert start(bottleneck_from_log.main, *arguments)[0] == 0
    (line,) = cells_of(tmp_path).values()
    assert (line["seeds"], line["note"], line["test_accuracy_mean"]) == ("1", "", "24.5")
    assert line["act2_mean"] == "0.4003" and not {"lin1_mean", "act1_mean"} & line.keys()


@pytest.mark.usefixtures("quick_figures")
def test_two_finished_runs_of_one_seed_that_differ_are_refused(start, tmp_path):
    for i, settings in enumerate(({}, {"batch_size": 64}, {"batch_size": 32, "epochs": 3})):
        save_run(made_run("std-118", root=tmp_path / str(i), **settings))
    first, other, unfinished = (tmp_path / str(i) for i in range(3))
    code, _, err = start(bottleneck_from_log.main, first, unfinished, other)
    assert code == 2 and "batch_size is 8 there, now 64" in err and err.count("\n") == 1
    assert start(bottleneck_from_log.main, unfinished, first)[0] == 0
    assert cells_of(unfinished)["std-118"]["seeds"] == "1"


@pytest.mark.parametrize("arguments, message", [
    (["log.txt"], "--output"),
    (["log.txt", "--output", "out"], "bottleneck sweep"),
    (["."], "bottleneck sweep"),
    (["missing", "--output", "out"], "missing"),
])  # fmt: skip
def test_sources_without_a_sweep_are_an_error(start, tmp_path, monkeypatch, arguments, message):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "log.txt").write_text("nothing here\n")
    code, _, err = start(bottleneck_from_log.main, *arguments)
    assert code == 2 and message in err.splitlines()[-1]
    assert [path.name for path in tmp_path.iterdir()] == ["log.txt"]


# The published numbers

PAPERS = {"dataset": "CIFAR-10", "epochs": 50, "batch_size": 128}


def made(name, test, cosine, seed=0, **settings):
    """A run of 50 epochs as in the paper, of which only the last is known."""
    run = made_run(name, seed, [test], cosines={"act2": [cosine]}, **{**PAPERS, **settings})
    run.epochs[0]["epoch"] = 50
    return run


def report(folder, *runs):
    """The table of a report on one run of each experiment, or on several of the first."""
    by_name = {}
    for run in runs:
        by_name.setdefault(run.path.parent.name, []).append(run)
    write_bottleneck_report(by_name, folder, bottleneck_from_log.PUBLISHED)
    return cells_of(folder)


def test_figures_show_our_numbers_and_the_published_ones_beside_them(tmp_path, monkeypatch):
    saved = record_figures(monkeypatch)
    runs = [made("std-118", 40.0, 0.75), made("std-18", 39.0, 0.5), made("std-8", 9, 0, epochs=51)]
    cells = report(tmp_path, *runs, made("pai-118", 41.0, 1, dataset="CIFAR-100"))
    assert list(cells) == [
        "std-8", "std-18", "std-18, published", "std-118", "std-118, published", "pai-118"
    ]  # fmt: skip
    assert cells["std-8"]["note"] == "1 not finished"
    alignment, accuracy = (
        {
            text.get_text(): bars.lines[0].get_xydata().tolist()
            for text, bars in zip(figure.legends[0].texts, figure.axes[0].containers)
        }
        for figure in saved[:2]
    )
    assert alignment == {
        "standard init": [[18, 0.5], [118, 0.75]],
        "standard init, published": [[18, 0.4655], [118, 0.7597]],
        "pre-alignment": [[118, 1]],
    }
    assert accuracy["standard init, test"] == [[18, 39.0], [118, 40.0]]
    assert accuracy["standard init, train"] == [[18, 49.0], [118, 50.0]]
    assert accuracy["standard init, train, published"] == [[18, 45.3], [118, 58.5]]


@pytest.mark.usefixtures("quick_figures")
@pytest.mark.parametrize("name, settings", [
    ("std-118", {"dataset": "CIFAR-100"}),
    ("std-118", {"batch_size": 64}),
    ("std-118", {"feedback_placement": "every-layer"}),
    ("std-118", {"epochs": 49}),
    ("std-117", {}),
    ("width-std-118", {}),
])  # fmt: skip
def test_no_published_numbers_stand_beside_another_protocol(tmp_path, name, settings):
    assert list(report(tmp_path, made(name, 40.0, 0.5, **settings))) == [name]


@pytest.mark.usefixtures("quick_figures")
def test_the_published_numbers_are_not_in_our_means(tmp_path):
    runs = [made("std-118", test, 0.5, seed) for seed, test in enumerate((40.0, 42.0))]
    ours, published = report(tmp_path, *runs).values()
    assert float(ours["test_accuracy_mean"]) == 41 and ours["seeds"] == "2"
    assert float(ours["test_accuracy_std"]) == pytest.approx(statistics.stdev((40, 42)))
    assert float(published["test_accuracy_mean"]) == 47.9 and "act1_mean" not in published
