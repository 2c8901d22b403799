"""Scripts in unusual surroundings: a link, no docstrings, a stdout that fails, a home folder."""

import json
import os
import subprocess
import sys
from pathlib import Path

import matplotlib
import pytest
from test_logs import own_log

import best_practices
import bottleneck
import bottleneck_from_log
import log_retrieval

ROOT = Path(best_practices.__file__).parent
RUN = "--dataset Digits --device cpu --experiments fc-tanh --seeds 0 --epochs 1".split()
MADE = {"table.md", "table.csv", "table.tex", "alignment.png", "alignment.pdf", "report.html"}


def test_a_linked_script_with_an_ascii_stdout_and_a_tilde_that_no_shell_expands(tmp_path):
    """All three in one process, for a start takes seconds."""
    link, here = tmp_path / "best.py", tmp_path / "here"
    link.symlink_to(ROOT / "best_practices.py")
    here.mkdir()
    home = {"HOME": str(tmp_path), "MPLCONFIGDIR": matplotlib.get_cachedir()}  # with its fonts
    done = subprocess.run(
        [sys.executable, link, *RUN, "--results-dir=~/results"],
        cwd=here, capture_output=True, text=True,
        env=os.environ | home | {"PYTHONIOENCODING": "ascii"},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert list(here.iterdir()) == []
    folder = tmp_path / "results" / "best_practices"
    assert {path.name for path in folder.iterdir()} >= MADE
    table = (folder / "table.md").read_text(encoding="utf-8")
    assert "\u00b1" in table and table.replace("\u00b1", "?") in done.stdout


def test_every_program_has_its_help_without_docstrings():
    files = [*ROOT.glob("*.py"), *ROOT.glob("examples/*.py"), *ROOT.glob("benchmarks/*.py")]
    programs = [str(path) for path in files if '__name__ == "__main__"' in path.read_text()]
    assert len(programs) >= 9
    code = (
        "import runpy, sys\n"
        "programs, sys.argv = sys.argv[1:], ['program', '--help']\n"
        "for program in programs:\n"
        "    try:\n"
        "        runpy.run_path(program, run_name='__main__')\n"
        "    except SystemExit as end:\n"
        "        print(program, end.code)"
    )
    done = subprocess.run(
        [sys.executable, "-OO", "-c", code, *programs], capture_output=True, text=True,
        env=os.environ | {"PYTHONPATH": f"{ROOT}{os.pathsep}{ROOT / 'benchmarks'}"},
    )  # fmt: skip
    ended = [line for line in done.stdout.splitlines() if line.endswith(".py 0")]
    assert ended == [f"{program} 0" for program in programs], done.stderr


def failing(kind):
    """Opens a stdout that fails in the given way; None is a closed one."""
    if kind == "closed":
        return None
    if kind == "ascii":
        return open(os.devnull, "w", encoding="ascii")
    if kind == "full disk":
        return open("/dev/full", "w")
    reader, writer = os.pipe()
    os.close(reader)
    return open(writer, "w")


KINDS = ["ascii", "closed", "no reader", pytest.param("full disk", marks=pytest.mark.skipif(
    not os.path.exists("/dev/full"), reason="there is no /dev/full"))]  # fmt: skip


@pytest.mark.usefixtures("one_thread", "quick_figures")
@pytest.mark.parametrize("kind", KINDS)
def test_results_are_on_disk_whatever_becomes_of_stdout(start, tmp_path, monkeypatch, kind):
    with monkeypatch.context() as patch:
        patch.setattr(sys, "stdout", failing(kind))
        code, _, err = start(best_practices.main, *RUN, "--results-dir", tmp_path)
    said = "stdout cannot be written to (No space left on device): the rest is lost\n"
    assert (code, err) == (0, said if kind == "full disk" else "")
    assert {path.name for path in (tmp_path / "best_practices").iterdir()} >= MADE
    assert (tmp_path / "best_practices" / "fc-tanh" / "seed-0" / "state.pt").exists()


@pytest.mark.parametrize("kind", KINDS)
def test_runs_are_restored_whatever_becomes_of_stdout(tmp_path, monkeypatch, kind):
    log = tmp_path / "log.txt"
    log.write_bytes(own_log() + own_log(seed=1))
    monkeypatch.setattr(sys, "argv", ["", str(log), "--output", str(tmp_path / "out")])
    with monkeypatch.context() as patch:
        patch.setattr(sys, "stdout", failing(kind))
        assert log_retrieval.main() == 0
    assert len(list(tmp_path.glob("out/*/*/metrics.jsonl"))) == 2


@pytest.mark.parametrize("kind", KINDS[1:])
def test_lines_that_are_nowhere_else_are_an_error_when_they_are_lost(tmp_path, monkeypatch, kind):
    log = tmp_path / "log.txt"
    log.write_bytes(own_log())
    monkeypatch.setattr(sys, "argv", ["", str(log)])
    with monkeypatch.context() as patch:
        patch.setattr(sys, "stdout", failing(kind))
        assert log_retrieval.main() == 2


def test_nothing_but_lines_goes_to_stdout_where_stderr_is_closed(tmp_path, monkeypatch, capsys):
    log = tmp_path / "log.txt"
    log.write_bytes(own_log().replace(b"epoch 3/5", b"epoch \xff/5"))
    monkeypatch.setattr(sys, "argv", ["", str(log)])
    with monkeypatch.context() as patch:
        patch.setattr(sys, "stderr", None)
        assert log_retrieval.main() == 0
    epochs = [json.loads(line)["epoch"] for line in capsys.readouterr().out.splitlines()]
    assert epochs == [1, 2, 4, 5]


# Paths


@pytest.fixture
def home(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    monkeypatch.chdir(tmp_path)
    (tmp_path / "home").mkdir()
    return tmp_path / "home"


@pytest.mark.parametrize("todo", ["~/there", Path("~/there")], ids=["text", "path"])
@pytest.mark.parametrize("script", [best_practices, bottleneck])
def test_a_todo_line_may_begin_with_a_tilde(start, home, monkeypatch, script, todo):
    monkeypatch.setattr(script, "RESULTS_DIR", todo)
    code, _, err = start(script.main, "--tables-only")
    assert code == 2 and err.startswith(f"error: {home / 'there' / script.SCRIPT} has no results")
    monkeypatch.setattr(script, "DATA_DIR", todo)
    (home / "there").mkdir()
    (home / "there" / "cifar10.npz").write_text("no archive")
    code, _, err = start(script.main, "--device", "cpu")
    assert code == 2 and err.startswith(f"error: {home / 'there' / 'cifar10.npz'} cannot be read")


def test_the_paths_of_logs_may_begin_with_a_tilde(home, start):
    (home / "log.txt").write_bytes(own_log("std-18"))
    start(log_retrieval.main, "~/log.txt", "--output=~/out")
    assert (home / "out" / "std-18" / "seed-0" / "metrics.jsonl").exists()
    assert start(bottleneck_from_log.main, "~/log.txt", "--output=~/figures")[0] == 0
    assert (home / "figures" / "report.html").exists()


@pytest.mark.parametrize("main, arguments", [
    (best_practices.main, ["--results-dir=~nobody-is-called-that/r"]),
    (best_practices.main, ["--data-dir=~nobody-is-called-that/d"]),
    (bottleneck_from_log.main, ["~nobody-is-called-that/r"]),
    (log_retrieval.main, ["log.txt", "--output=~nobody-is-called-that/r"]),
])  # fmt: skip
def test_the_home_of_nobody_is_an_error(home, start, main, arguments):
    code, out, err = start(main, *arguments)
    assert (code, out) == (2, "") and "there is no home folder for ~nobody-is-called-that" in err
    assert [path.name for path in home.parent.iterdir()] == ["home"]
