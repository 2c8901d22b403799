"""The code in the documentation and in docstrings runs as written, and so do the examples."""

import doctest
import os
import re
import runpy
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest
import torch
from matplotlib import image
from torch import nn
from torch.nn import functional as F

import dfatools

ROOT = Path(__file__).resolve().parents[1]
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
WITH_CODE = ["README.md", "from-tinydfa.md", "own-network.md", "scaling.md"]


def program(page: Path) -> str:
    """Returns the Python blocks of a page, each in its lines; the lines of all else are empty."""
    lines, inside = [], False
    for line in page.read_text().splitlines():
        if line.startswith("```"):
            inside = line == "```python"
            line = ""
        lines.append(line if inside else "")
    return "\n".join(lines)


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_the_code_of_a_page_runs_as_written(page, tmp_path):
    code = program(page)
    assert bool(code.strip()) == (page.name in WITH_CODE)
    run = subprocess.run(
        [sys.executable, "-c", f"exec(compile({code!r}, {page.name!r}, 'exec'))"],
        cwd=tmp_path,
        # With the variables that torchrun sets for a single process.
        env=os.environ
        | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
        | {"RANK": "0", "WORLD_SIZE": "1", "MASTER_ADDR": "localhost", "MASTER_PORT": "0"},
        capture_output=True,
        text=True,
    )
    assert run.returncode == 0, run.stderr


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_the_files_that_a_page_links_to_are_there(page):
    links = re.findall(r"\]\(([^)#]+)", re.sub("`[^`]+`", "", page.read_text()))
    files = [link for link in links if "://" not in link]
    assert [link for link in files if not (page.parent / link).exists()] == []


@pytest.mark.parametrize("name", dfatools.__all__)
def test_the_docstring_of_a_public_name_has_examples_that_run(name):
    public = {name: getattr(dfatools, name) for name in dfatools.__all__}
    names = {"torch": torch, "nn": nn, "F": F, **public}
    runner, finder = doctest.DocTestRunner(), doctest.DocTestFinder(exclude_empty=True)
    for test in finder.find(public[name], name, globs=names):
        runner.run(test)
    assert runner.tries > 0 and runner.failures == 0


def test_fc_tanh_learns_and_aligns(one_thread, monkeypatch, capsys):
    lines = run_example(monkeypatch, capsys, "fc_tanh.py --dataset Digits --epochs 20")
    assert len(lines) == 20
    accuracy, *cosines = map(float, re.findall(r"[\d.]{5}", lines[-1]))
    assert accuracy > 70
    assert cosines[0] > cosines[1] > cosines[2] > 0.05


def test_fc_tanh_reports_an_unknown_data_set_in_one_line(monkeypatch, capsys):
    with pytest.raises(SystemExit):
        run_example(monkeypatch, capsys, "fc_tanh.py --dataset Nope")
    error = capsys.readouterr().err.splitlines()[-1]
    assert error.startswith("fc_tanh.py: error: unknown data set 'Nope'; choose one of Digits")


def test_own_network_draws_its_figure(one_thread, monkeypatch, capsys, tmp_path):
    figure = tmp_path / "figure.png"
    monkeypatch.setattr(sys, "argv", ["own_network.py", "--epochs", "2", "--output", str(figure)])
    runpy.run_path(str(ROOT / "examples" / "own_network.py"), run_name="__main__")
    assert image.imread(figure).shape[:2] == (720, 1800)
    lines = capsys.readouterr().out.splitlines()
    accuracy = {line.split()[0]: float(line.split()[-2]) for line in lines[:6]}  # after epoch 2
    assert accuracy["bp"] > accuracy["dfa"] > 60
    cosines = [float(part.split()[-1]) for part in lines[6].split(", ")]
    assert len(cosines) == 7
    # The last block aligns first; the first layers are not aligned yet.
    assert cosines[6] > 0.4
    assert cosines[6] > cosines[5] > cosines[4] > max(cosines[:3])


def needs(package):
    return pytest.mark.skipif(find_spec(package) is None, reason=f"{package} is not installed")


def run_example(monkeypatch, capsys, command):
    """Returns the lines that an example prints."""
    name, *options = command.split()
    monkeypatch.setattr(sys, "argv", [name, *options])
    runpy.run_path(str(ROOT / "examples" / name), run_name="__main__")
    return capsys.readouterr().out.splitlines()


def test_feedback_rules_all_learn(monkeypatch, capsys):
    lines = run_example(monkeypatch, capsys, "feedback_rules.py --epochs 2")
    accuracy = {line.split(":")[0].strip(): float(line.split()[-6]) for line in lines}
    assert len(accuracy) == 7 and accuracy.pop("sign of the error") > 20
    assert min(accuracy.values()) > 75


@needs("torchvision")
def test_resnet18_of_torchvision_aligns(one_thread, monkeypatch, capsys):
    first, second = run_example(monkeypatch, capsys, "resnet18.py --epochs 1 --methods dfa")
    assert re.fullmatch(r"dfa: test accuracy [\d.]+ %", first)
    cosines = {part.split()[0]: float(part.split()[1]) for part in second[12:].split(", ")}
    assert len(cosines) == 9 and cosines["avgpool"] > 0.1


@needs("transformers")
def test_gpt2_of_transformers_learns(one_thread, monkeypatch, capsys):
    lines = run_example(monkeypatch, capsys, "gpt2.py --steps 20")
    losses = {line.split(":")[0]: float(line.split()[1]) for line in lines if "nats" in line}
    assert [*losses] == ["dfa", "shallow", "bp"]
    assert losses["bp"] < max(losses.values()) < 5.5  # log 256 is 5.55
    assert len(lines[1].split(", ")) == 4


LARGE = ROOT / "examples" / "large_network.py"


def losses_of_large_network(*command):
    """Trains a small network; returns the loss of each epoch."""
    small = "--width 32 --depth 2 --batch-size 500 --epochs 3 --learning-rate 0.01 --bf16"
    run = subprocess.run(
        [sys.executable, *command, *small.split()],
        env=os.environ | {"OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""},
        capture_output=True,
        text=True,
    )
    assert run.returncode == 0, run.stderr
    epochs, memory, accuracy = re.fullmatch(
        r"((?:epoch \d: loss .+ s\n)+)(memory of each of \d .+ MB)\ntest accuracy (.+) %\n",
        run.stdout,
    ).groups()
    assert float(accuracy) > 20 and int(memory.split()[-2]) > 100
    return [float(line.split()[3].rstrip(",")) for line in epochs.splitlines()]


def test_two_processes_train_a_large_network_as_one_does():
    torchrun = "-m torch.distributed.run --standalone --nproc_per_node=2".split()
    two = losses_of_large_network(*torchrun, str(LARGE), "--recompute")
    one = losses_of_large_network(str(LARGE), "--engine", "ddp")
    assert len(two) == 3 and two[0] > two[1] > two[2]
    assert two == pytest.approx(one, rel=0.02)


def test_a_batch_not_divisible_by_the_processes_is_refused(start):
    main = runpy.run_path(str(LARGE))["main"]
    code, _, err = start(main, "--batch-size", 5)
    assert code == 2 and "--batch-size must be a multiple of --accumulation times" in err


def test_more_processes_than_gpus_are_refused(start, monkeypatch):
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "2")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    code, _, err = start(runpy.run_path(str(LARGE))["main"])
    assert code == 2 and "2 processes cannot share 1 GPUs" in err
