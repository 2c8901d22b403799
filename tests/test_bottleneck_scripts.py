"""bottleneck.py runs the paper's sweep, and its results and logs give the same report."""

import csv
import subprocess
import sys
from pathlib import Path

import pytest
from made import made_run, record_figures, release_log, save_run

import bottleneck
import bottleneck_from_log
from mltools.bottleneck import write_bottleneck_report
from mltools.networks import Network

ROOT = Path(bottleneck.__file__).parent
SIZES = [1, 3, 5, 8, 11, 18, 28, 46, 73, 118, 191, 308, 496, 800]
SWEPT = ("std-18", "std-800", "pai-18", "pai-800")
TABLES = {f"table.{kind}" for kind in ("md", "csv", "tex")}
FIGURES = ("alignment", "accuracy", "alignment-epochs", "accuracy-epochs")
PNGS, PDFS = ({f"{stem}.{kind}" for stem in FIGURES} for kind in ("png", "pdf"))
DIGITS = ("--dataset", "Digits", "--device", "cpu", "--epochs", "1")


def cells_of(folder):
    """Returns {experiment: its line of table.csv}, without the lines of single runs."""
    with open(folder / "table.csv", encoding="utf-8") as file:
        lines = {line["experiment"]: line for line in csv.DictReader(file)}
    return {name: line for name, line in lines.items() if "/" not in name}


def experiments(**options):
    common = {"dataset": "Digits", "data_dir": "", "results_dir": "", "seeds": (0,)}
    return bottleneck.experiments(
        bottleneck.BottleneckOptions(**common, epochs=1, batch_size=128, **options)
    )


# The sweep


def test_the_experiments_match_the_paper():
    chosen = experiments()
    assert [x.name for x in chosen] == [f"{init}-{b}" for init in ("std", "pai") for b in SIZES]
    for x, size in zip(chosen, 2 * SIZES):
        assert x.network == Network(bottleneck=size / 800, hidden=(800, 800, 800))
        assert x.prealigned == x.name.startswith("pai")
        assert (x.training_method, x.reduction, x.learning_rate) == ("dfa", "sum", 5e-4)


def test_kind_width_makes_the_layer_itself_narrow(start):
    (narrow,) = experiments(kind="width", sizes=[18], init=["pai"])
    assert narrow.prealigned and narrow.network == Network(hidden=(800, 18, 800))
    options = "--kind width --sizes 18 --init pai --list".split()
    assert start(bottleneck.main, *options)[:2] == (0, "width-pai-18\n")


@pytest.mark.parametrize("size", [0, 801])
def test_a_size_out_of_range_is_reported_in_one_line(start, tmp_path, size):
    options = ("--results-dir", tmp_path / "results", "--sizes", 18, size)
    code, out, err = start(bottleneck.main, *options)
    assert (code, out) == (2, "")
    assert err == f"error: --sizes takes numbers from 1 to 800, not {size}\n"
    assert not (tmp_path / "results").exists()


@pytest.fixture(scope="module")
def swept(tmp_path_factory):
    """Runs a short sweep on Digits from the command line; returns its folder and its stdout."""
    results = tmp_path_factory.mktemp("results")
    arguments = [*DIGITS, "--sizes", "18", "800", "--results-dir", results]
    command = [sys.executable, ROOT / "bottleneck.py", *arguments]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    return results / "bottleneck", done.stdout


def test_a_sweep_writes_its_files(swept):
    folder, out = swept
    names = {path.name for path in folder.iterdir() if not path.name.startswith(".")}
    assert names == {*TABLES, *PNGS, *PDFS, "report.html", *SWEPT}
    assert (folder / "table.md").read_text(encoding="utf-8") in out and "epoch 1/1" in out
    assert tuple(cells_of(folder)) == SWEPT  # no published rows for Digits


@pytest.mark.filterwarnings("error")
def test_tables_only_without_a_run_trains_nothing(start, tmp_path):
    (tmp_path / "bottleneck").mkdir()
    options = ("--sizes", 18, "--init", "pai", "--results-dir", tmp_path, "--tables-only")
    code, out, _ = start(bottleneck.main, *DIGITS, *options)
    assert code == 0 and "pai-18" in out and "1 not finished" in out
    assert not (tmp_path / "bottleneck/pai-18").exists()


# The report from results and logs


@pytest.mark.parametrize("with_folder", [False, True], ids=["logs", "folder and logs"])
def test_logs_give_the_same_report(start, swept, tmp_path, with_folder):
    folder, _ = swept
    before = {name: (folder / name).read_bytes() for name in (*TABLES, *PNGS)}
    sources = [folder] * with_folder + [*folder.glob("*/*/log.txt")]  # a run counts once
    code, out, err = start(bottleneck_from_log.main, *sources, "--output", tmp_path / "out")
    table, _, last = out.rstrip("\n").rpartition("\n")
    assert (code, err) == (0, "") and table.strip() == before["table.md"].decode().strip()
    assert last == f"report: {tmp_path / 'out/report.html'}"
    assert {name: (tmp_path / "out" / name).read_bytes() for name in before} == before
    report = (tmp_path / "out/report.html").read_text(encoding="utf-8")
    assert report.count("finished, from a log") == (0 if with_folder else 4)
    assert "<a " not in report


@pytest.mark.usefixtures("quick_figures")
@pytest.mark.parametrize("before", [
    b"", release_log(), release_log()[: release_log().index(b"EPOCH 3")] + b"\n"
], ids=["once", "twice", "after an interrupted run"])  # fmt: skip
def test_a_log_of_the_release_counts_a_run_once(start, tmp_path, before):
    (tmp_path / "log.txt").write_bytes(before + release_log())
    arguments = (tmp_path / "log.txt", "--output", tmp_path)
    assert start(bottleneck_from_log.main, *arguments)[0] == 0
    line = cells_of(tmp_path)["std-118"]
    assert (line["seeds"], line["note"], line["test_accuracy_mean"]) == ("1", "", "24.5")
    assert (line["act1_mean"], line["act2_mean"]) == ("0.4001", "0.4003")
    report = (tmp_path / "report.html").read_text(encoding="utf-8")
    assert "standard init, act1" in report and "protocol release" in report


@pytest.mark.usefixtures("quick_figures")
def test_finished_runs_of_one_seed_with_different_settings_are_refused(start, tmp_path):
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
def test_sources_without_a_sweep_are_refused(start, tmp_path, monkeypatch, arguments, message):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "log.txt").write_text("nothing here\n")
    code, _, err = start(bottleneck_from_log.main, *arguments)
    assert code == 2 and message in err.splitlines()[-1]
    assert [path.name for path in tmp_path.iterdir()] == ["log.txt"]


# The published numbers

PAPERS = {"dataset": "CIFAR-10", "epochs": 50, "batch_size": 128}


def made(name, test, cosine, **settings):
    """Makes a run with the paper's settings, and only the last of its 50 epochs."""
    cosines = {"act1": [cosine / 2], "act2": [cosine]}
    run = made_run(name, test=[test], cosines=cosines, **{**PAPERS, **settings})
    run.epochs[0]["epoch"] = 50
    return run


def report(folder, *runs):
    """Writes the report of runs, one per experiment; returns the lines of its table."""
    by_name = {run.path.parent.name: [run] for run in runs}
    write_bottleneck_report(by_name, folder, bottleneck.REFERENCE)
    return cells_of(folder)


def test_figures_show_our_numbers_beside_the_published_numbers(tmp_path, monkeypatch):
    saved = record_figures(monkeypatch)
    runs = [made("std-118", 40.0, 0.75), made("std-18", 39.0, 0.5), made("std-8", 9, 0, epochs=51)]
    runs += [made("pai-18", 38.0, 0.25), made("pai-118", 41.0, 1, dataset="CIFAR-100")]
    cells = report(tmp_path, *runs)
    assert list(cells) == [
        "std-8", "std-18", "std-18, published",
        "std-118", "std-118, published", "std-118, 2019 release",
        "pai-18", "pai-18, published", "pai-118",
    ]  # fmt: skip
    assert cells["std-8"]["note"] == "1 not finished"
    published = cells["std-118, published"]
    assert float(cells["std-118"]["test_accuracy_mean"]) == 40
    assert float(published["test_accuracy_mean"]) == 47.9 and published["act1_mean"] == "0.1375"
    assert cells["std-118, 2019 release"]["act1_mean"] == "0.1392"
    assert [ax.get_title() for ax in saved[0].axes] == ["act1", "act2", "act3"]
    first, alignment, accuracy = (
        {
            text.get_text(): bars.lines[0].get_xydata().tolist()
            for text, bars in zip(figure.legends[0].texts, ax.containers)
        }
        for figure, ax in zip([saved[0], *saved[:2]], [*saved[0].axes[:2], *saved[1].axes])
    )
    assert first["standard init"] == [[18, 0.25], [118, 0.375]]
    assert first["standard init, published"] == [[18, 0.0238], [118, 0.1375]]
    assert alignment == {
        "standard init": [[18, 0.5], [118, 0.75]],
        "standard init, published": [[18, 0.4655], [118, 0.7597]],
        "pre-alignment": [[18, 0.25], [118, 1]],
        "pre-alignment, published": [[18, 0.7268]],
    }
    assert accuracy["standard init, test"] == [[18, 39.0], [118, 40.0]]
    assert accuracy["standard init, train"] == [[18, 49.0], [118, 50.0]]
    assert accuracy["standard init, train, published"] == [[18, 45.3], [118, 58.5]]
    lines = [bars.lines[0] for bars in saved[1].axes[0].containers]
    styles = {(x.get_marker(), x.get_linestyle(), x.get_markerfacecolor()) for x in lines}
    assert len(styles) == len(lines) == 8  # even without their colours


@pytest.mark.usefixtures("quick_figures")
@pytest.mark.parametrize("name, prefix", [("std-117", ""), ("width-std-118", "width-")])
def test_other_experiments_get_no_published_numbers(tmp_path, name, prefix):
    assert list(report(tmp_path, made(name, 40.0, 0.5))) == [name]
    stems = {path.stem for path in tmp_path.glob("*.png")}
    assert stems == {f"{prefix}{stem}" for stem in FIGURES}
