"""best_practices.py runs the paper's experiments, writes files, and reports errors in one line."""

import json
from pathlib import Path

import pytest
from made import made_run

import best_practices
from mltools.networks import Network

pytestmark = pytest.mark.usefixtures("one_thread", "quick_figures")

ROOT = Path(best_practices.__file__).parent
EXPERIMENTS = {experiment.name: experiment for experiment in best_practices.EXPERIMENTS}
DIGITS = ("--dataset", "Digits", "--device", "cpu")
PROTOCOL = {"dataset": "CIFAR-10", "batch_size": 128, "protocol": "release"}


def test_the_experiments_match_the_paper():
    changes = {
        "tanh": {},
        "relu": {"activation": "relu"},
        "leaky-relu-0.5": {"activation": "leaky-relu", "negative_slope": 0.5},
        "leaky-relu-0.1": {"activation": "leaky-relu", "negative_slope": 0.1},
        "leaky-relu-0.01": {"activation": "leaky-relu", "negative_slope": 0.01},
        "no-normalization": {},
        "batchnorm": {"batchnorm": True},
        "dropout-0.1-0.5": {"dropout_input": 0.1, "dropout_fc": 0.5},
        "dropout-0.1-0.1": {"dropout_input": 0.1, "dropout_fc": 0.1},
        "bp": {},
    }
    networks = {f"fc-{name}": Network("fc", **change) for name, change in changes.items()} | {
        f"cnn-{name}": Network("cnn", **change)
        for name, change in changes.items()
        if "relu" not in name
    }
    assert list(EXPERIMENTS) == list(networks)
    for name, experiment in EXPERIMENTS.items():
        assert experiment.network == networks[name]
        assert experiment.normalization == ("no-normalization" not in name)
        assert not experiment.prealigned
        method, lr = experiment.training_method, experiment.learning_rate
        if name.endswith("-bp"):
            assert (method, lr) == ("bp", {"fc-bp": 0.01, "cnn-bp": 0.05}[name])
        else:
            assert (method, experiment.reduction, lr) == ("dfa", "sum", 5e-4)


def test_the_tables_show_every_activation():
    for _, architecture, layers in best_practices.ARCHITECTURES:
        model = EXPERIMENTS[f"{architecture}-tanh"].network.build((3, 32, 32), 10)
        assert layers == [name for name, _ in model.named_children() if name.startswith("act")]


def test_the_defaults_match_the_paper(start):
    _, out, _ = start(best_practices.main, "--help")
    for default in ("CIFAR-10", "50", "128", "0 1 2 3 4 5 6 7 8 9", "release", "float32"):
        assert f"(default: {default})" in " ".join(out.split())


def test_a_sweep_writes_its_files_and_skips_finished_runs(start, tmp_path):
    options = [*DIGITS, "--results-dir", tmp_path, "--epochs", "1", "--seeds", "0", "1"]
    options += ["--experiments", "fc-tanh", "fc-bp"]
    code, out, err = start(best_practices.main, *options)
    assert (code, err) == (0, "") and out.count("epoch 1/1") == 4
    results = tmp_path / "best_practices"
    files = {"config.json", "metrics.jsonl", "angles.npz", "log.txt", "state.pt"}
    for run in ("fc-tanh/seed-0", "fc-tanh/seed-1", "fc-bp/seed-0", "fc-bp/seed-1"):
        assert {file.name for file in (results / run).iterdir()} == files
    table = (results / "table.md").read_text()
    assert table in out and "fc-tanh/seed-0" in table
    figures = {"alignment", "fc-alignment-epochs", "fc-accuracy-epochs"}
    for kind in ("png", "pdf"):
        assert {path.stem for path in results.glob(f"*.{kind}")} == figures
    report = (results / "report.html").read_text()
    assert report.count("<img ") == 3 and report.count(">finished<") == 4

    before = {file: file.stat().st_mtime_ns for file in results.glob("*/*/*")}
    for again in (options, [*options, "--tables-only"]):
        (results / "table.md").unlink()
        (results / "report.html").unlink()
        shown = f"{table}\nreport: {results / 'report.html'}\n"
        assert start(best_practices.main, *again)[:2] == (0, shown)
        assert (results / "table.md").read_text() == table
        assert (results / "report.html").read_text() == report
        assert {file: file.stat().st_mtime_ns for file in results.glob("*/*/*")} == before


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--dataset", "CIFAR10"], "CIFAR-10"),
        (["--experiments", "fc-tnah"], "no experiment is called 'fc-tnah'"),
        (["--device", "tpu"], "--device must be auto, cpu, cuda or cuda:N"),
        (["--device", "cuda:99"], "--device cuda:99 does not exist"),
        (["--protocol", "nowhere"], "corrected"),
        (["--epochs", "0"], "--epochs must be at least 1"),
        (["--batch-size", "1"], "--batch-size at least 2"),
        (["--batch-size", "5000"], "5000"),
        (["--seeds", "1", "1"], "--seeds must be distinct numbers"),
        (["--seeds", str(2**64)], "--seeds"),
        (["--dataset", "MNIST", "--data-dir", "file"], "file/mnist.npz cannot be written"),
        (["--results-dir", "file"], "choose another --results-dir"),
        (["--tables-only", "--results-dir", "reslts"], "reslts/best_practices has no results"),
    ],
)
def test_wrong_options_are_reported_in_one_line_and_create_nothing(
    start, tmp_path, monkeypatch, arguments, message
):
    monkeypatch.chdir(tmp_path)
    Path("file").write_text("mine")
    short = ("--experiments", "fc-bp", "--epochs", "1", "--seeds", "0")  # in case it runs
    code, out, err = start(best_practices.main, *DIGITS, *short, *arguments)
    assert code == 2 and out == "" and err.count("\n") == 1
    assert err.startswith("error: ") and message in err
    assert Path("file").read_text() == "mine"
    assert not Path("reslts").exists() and not list(tmp_path.glob("results/*/*/seed-0"))


def test_tables_only_without_a_finished_run_says_so(start, tmp_path):
    (tmp_path / "best_practices").mkdir()
    code, out, _ = start(best_practices.main, "--tables-only", "--results-dir", tmp_path)
    assert code == 0 and out.count("no finished run") == 2
    assert out.count("10 not finished") == len(EXPERIMENTS)


@pytest.mark.parametrize("name, epochs, shown", [("fc-tanh", 3, "38.80"), ("cnn-tanh", 5, "37.30")])
def test_the_table_has_the_releases_numbers_beside_ours(name, epochs, shown):
    run = made_run(name, test=epochs * [12.5], **PROTOCOL)
    (table,) = best_practices.make_tables([EXPERIMENTS[name]], {name: [run]}).values()
    text = table.markdown()
    assert "12.50" in text and f"| {name}, 2019 release |" in text and shown in text


def test_the_reference_numbers_are_complete():
    for name in ("release.json", "published_bottleneck.json"):
        runs = json.loads((ROOT / "reference" / name).read_text())["runs"]
        for run in runs.values():
            assert run["settings"] == PROTOCOL
            epochs = len(run["epochs"])
            assert {len(run[key]) for key in ("train", "test", "mean", "std")} == {epochs}
            assert all(0 < accuracy < 100 for accuracy in run["train"] + run["test"])
            for row in run["mean"] + run["std"]:
                assert len(row) == len(run["layers"]) and all(-1 <= c <= 1 for c in row)
