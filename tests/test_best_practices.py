"""best_practices.py: the paper's experiments, its files, and one line for each error."""

import json
import os
import urllib.error
from pathlib import Path

import numpy as np
import pytest
import torch
from made import made_run

import best_practices
import bottleneck
from mltools.data import import_torchvision, load_dataset
from mltools.training import Run, Trainer

pytestmark = pytest.mark.usefixtures("one_thread")

ROOT = Path(best_practices.__file__).parent
EXPERIMENTS = {experiment.name: experiment for experiment in best_practices.EXPERIMENTS}
DIGITS = ("--dataset", "Digits", "--device", "cpu")


def test_the_experiments_are_the_papers():
    fc, cnn = {"architecture": "fc"}, {"architecture": "cnn"}
    leaky = {**fc, "activation": "leaky-relu"}
    expected = {
        "fc-tanh": fc,
        "fc-relu": {**fc, "activation": "relu"},
        "fc-leaky-relu-0.5": {**leaky, "negative_slope": 0.5},
        "fc-leaky-relu-0.1": {**leaky, "negative_slope": 0.1},
        "fc-leaky-relu-0.01": {**leaky, "negative_slope": 0.01},
        "fc-no-normalization": fc,
        "fc-batchnorm": {**fc, "batchnorm": True},
        "fc-dropout-0.1-0.5": {**fc, "dropout_input": 0.1, "dropout_fc": 0.5},
        "fc-dropout-0.1-0.1": {**fc, "dropout_input": 0.1, "dropout_fc": 0.1},
        "fc-bp": fc,
        "cnn-tanh": cnn,
        "cnn-no-normalization": cnn,
        "cnn-batchnorm": {**cnn, "batchnorm": True},
        "cnn-dropout-0.1-0.5": {**cnn, "dropout_input": 0.1, "dropout_fc": 0.5},
        "cnn-dropout-0.1-0.1": {**cnn, "dropout_input": 0.1, "dropout_fc": 0.1},
        "cnn-bp": cnn,
    }
    plain = {"activation": "tanh", "batchnorm": False, "bottleneck": None}
    plain |= {"dropout_input": 0, "dropout_fc": 0, "negative_slope": None}
    assert list(EXPERIMENTS) == list(expected)
    for name, experiment in EXPERIMENTS.items():
        network = {**plain, **expected[name], "hidden": (800, 800, 800)}
        assert vars(experiment.network) == network, name
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


def test_the_defaults_are_the_papers(start):
    _, out, _ = start(best_practices.main, "--help")
    for default in ("CIFAR-10", "50", "128", "0 1 2 3 4 5 6 7 8 9", "release", "float32"):
        assert f"(default: {default})" in " ".join(out.split())


def test_a_run_leaves_its_files_and_is_not_run_again(start, tmp_path):
    options = [*DIGITS, "--results-dir", tmp_path, "--epochs", "1", "--seeds", "0", "1"]
    options += ["--experiments", "fc-tanh", "fc-bp"]
    code, out, err = start(best_practices.main, *options)
    assert (code, err) == (0, "") and out.count("epoch 1/1") == 4
    results = tmp_path / "best_practices"
    files = {"config.json", "metrics.jsonl", "angles.npz", "log.txt", "state.pt"}
    for run in ("fc-tanh/seed-0", "fc-tanh/seed-1", "fc-bp/seed-0", "fc-bp/seed-1"):
        names = {file.name for file in (results / run).iterdir()}
        assert names == files
        config = json.loads((results / run / "config.json").read_text())
        assert config["settings"]["dataset"] == "Digits" and "torch" in config["environment"]
        assert "dfa.feedback_matrix" in torch.load(results / run / "state.pt", weights_only=True)
    with np.load(results / "fc-tanh/seed-0/angles.npz", allow_pickle=False) as angles:
        assert angles["act3"].shape == (1, 128) and (angles["lin4"] == 1).all()
    table = (results / "table.md").read_text()
    assert table in out and "fc-tanh/seed-0" in table
    figures = {"alignment", "fc-alignment-epochs", "fc-accuracy-epochs"}
    assert {path.stem for path in results.glob("*.png")} == figures
    assert {path.stem for path in results.glob("*.pdf")} == figures
    report = (results / "report.html").read_text()
    assert report.count("<img ") == 3 and report.count(">finished<") == 4

    before = {file: file.stat().st_mtime_ns for file in results.glob("*/*/*")}
    for again in (options, [*options, "--tables-only"]):
        (results / "table.md").unlink()
        (results / "report.html").unlink()
        assert start(best_practices.main, *again)[:2] == (0, table + "\n")
        assert (results / "table.md").read_text() == table
        assert (results / "report.html").read_text() == report
        assert {file: file.stat().st_mtime_ns for file in results.glob("*/*/*")} == before


def test_list_prints_the_experiments_and_runs_nothing(start, tmp_path):
    code, out, _ = start(best_practices.main, "--list", "--results-dir", tmp_path / "results")
    assert code == 0 and out.split() == list(EXPERIMENTS) and list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--dataset", "CIFAR10"], "CIFAR-10"),
        (["--experiments", "fc-tnah"], "no experiment is called 'fc-tnah'"),
        (["--device", "tpu"], "--device must be auto, cpu, cuda or cuda:N"),
        (["--device", "cuda:99"], "--device cuda:99 is not there"),
        (["--feedback-placement", "nowhere"], "every-layer"),
        (["--epochs", "0"], "--epochs must be at least 1"),
        (["--epochs", "many"], "--epochs"),
        (["--batch-size", "1"], "--batch-size at least 2"),
        (["--batch-size", "5000"], "5000"),
        (["--seeds", "1", "1"], "--seeds takes different numbers"),
        (["--seeds", "-1"], "--seeds"),
        (["--seeds", str(2**64)], "--seeds"),
        (["--nonsense"], "--nonsense"),
    ],
)
def test_wrong_options_are_one_line_and_leave_nothing(start, tmp_path, arguments, message):
    short = ("--experiments", "fc-bp", "--epochs", "1", "--seeds", "0")  # were it to run after all
    command = (*DIGITS, *short, "--results-dir", tmp_path / "results", *arguments)
    code, out, err = start(best_practices.main, *command)
    assert code == 2 and out == "" and err.count("\n") == 1
    assert err.startswith("error: ") and message in err
    assert not list(tmp_path.glob("results/*/*/seed-0"))


def test_wrong_data_and_folders_are_one_line(start, tmp_path, monkeypatch):
    def fails(*arguments):
        code, _, err = start(best_practices.main, "--device", "cpu", *arguments)
        assert code == 2 and err.count("\n") == 1 and err.startswith("error: ")
        return err

    results, data = tmp_path / "results", tmp_path / "data"
    data.mkdir()
    (data / "cifar10.npz").write_bytes(b"PK\x03\x04 not all of it")
    message = fails("--data-dir", data, "--results-dir", results)
    assert str(data / "cifar10.npz") in message
    assert (data / "cifar10.npz").read_bytes() == b"PK\x03\x04 not all of it"
    (tmp_path / "file").write_text("mine")
    for more in ([], ["--tables-only"]):
        message = fails("--dataset", "Digits", "--results-dir", tmp_path / "file", *more)
        assert "--results-dir" in message
    assert (tmp_path / "file").read_text() == "mine"


def test_missing_data_without_a_network_is_one_line(start, tmp_path, monkeypatch):
    def unreachable(*arguments, **options):
        raise urllib.error.URLError("no route to host")

    monkeypatch.setattr(import_torchvision().datasets, "CIFAR10", unreachable)
    folders = ("--data-dir", tmp_path / "data", "--results-dir", tmp_path / "results")
    code, out, err = start(best_practices.main, "--device", "cpu", *folders)
    assert code == 2 and out == "" and err.count("\n") == 1
    assert "cannot fetch CIFAR-10" in err and "cifar10.npz" in err
    assert not [path for path in tmp_path.rglob("[!.]*") if path.is_file()]


def test_tables_only_without_a_finished_run_says_so(start, tmp_path):
    (tmp_path / "best_practices").mkdir()
    code, out, _ = start(best_practices.main, "--tables-only", "--results-dir", tmp_path)
    assert code == 0 and out.count("no finished run") == 2
    assert out.count("10 not finished") == len(EXPERIMENTS)


@pytest.mark.parametrize("script", [best_practices, bottleneck])
def test_tables_only_of_a_folder_that_is_not_there_is_refused(start, tmp_path, script):
    mistyped = tmp_path / "reslts"
    code, out, err = start(script.main, "--tables-only", "--results-dir", mistyped)
    assert code == 2 and out == "" and err.count("\n") == 1
    assert str(mistyped) in err and "--results-dir" in err and not mistyped.exists()


@pytest.mark.parametrize(
    ("name", "settings", "shown"),
    [
        ("fc-tanh", {"epochs": 3}, "38.80"),
        ("cnn-tanh", {"epochs": 5}, "37.30"),
        ("cnn-tanh", {"epochs": 6}, None),
        ("fc-relu", {"epochs": 3}, None),
        ("fc-tanh", {"epochs": 3, "batch_size": 64}, None),
        ("fc-tanh", {"epochs": 3, "dataset": "CIFAR-100"}, None),
        ("cnn-tanh", {"epochs": 5, "feedback_placement": "every-layer"}, None),
    ],
)
def test_the_release_stands_beside_runs_of_its_protocol_only(name, settings, shown):
    common = {"dataset": "CIFAR-10", "batch_size": 128, "feedback_placement": "release"}
    run = made_run(name, test=[12.5] * settings["epochs"], **{**common, **settings})
    (table,) = best_practices.make_tables([EXPERIMENTS[name]], {name: [run]})
    text = table.markdown()
    assert "12.50" in text
    if shown:
        assert f"| {name}, 2019 release |" in text and shown in text
    else:
        assert "2019" not in text


def test_the_reference_numbers_are_whole():
    for name in ("release.json", "published_bottleneck.json"):
        runs = json.loads((ROOT / "reference" / name).read_text())["runs"]
        for run in runs.values():
            epochs = len(run["epochs"])
            assert {len(run[key]) for key in ("train", "test", "mean", "std")} == {epochs}
            assert all(0 < accuracy < 100 for accuracy in run["train"] + run["test"])
            for row in run["mean"] + run["std"]:
                assert len(row) == len(run["layers"]) and all(0 <= c <= 1 for c in row)
    assert set(json.loads((ROOT / "reference/release.json").read_text())["runs"]) <= set(
        EXPERIMENTS
    )


def test_the_papers_network_learns_cifar10():
    folder = os.environ.get("DFA_TEST_DATA_DIR")
    if not folder or not (Path(folder) / "cifar10.npz").exists():
        pytest.skip("DFA_TEST_DATA_DIR names no folder with cifar10.npz")
    data = load_dataset("CIFAR-10", folder)
    run = Run(
        experiment=EXPERIMENTS["fc-tanh"], seed=0, dataset="CIFAR-10", epochs=1, batch_size=128
    )
    trainer = Trainer(run, data, torch.device("cpu"))
    untrained, _ = trainer.evaluate()
    trainer.begin(1)
    for _ in range(60):
        trainer.step()
    loss, accuracy = trainer.evaluate()
    assert loss < untrained - 0.05 and accuracy > 13
