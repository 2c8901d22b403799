"""The scripts run from a link, without docstrings, with a failing stdout, and with ~ in paths."""

import json
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import matplotlib
import pytest
from made import own_log

import best_practices
import bottleneck_from_log
import log_retrieval

ROOT = Path(best_practices.__file__).parent
RUN = "--dataset Digits --device cpu --experiments fc-tanh --seeds 0 --epochs 1".split()
MADE = {"table.md", "table.csv", "table.tex", "alignment.png", "alignment.pdf", "report.html"}


def test_a_linked_script_with_an_ascii_stdout_and_a_tilde_not_expanded_by_a_shell(tmp_path):
    """One process tests all three, since a start takes seconds."""
    link, here = tmp_path / "best.py", tmp_path / "here"
    link.symlink_to(ROOT / "best_practices.py")
    here.mkdir()
    home = {"HOME": str(tmp_path), "MPLCONFIGDIR": matplotlib.get_cachedir()}  # for its font list
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


def test_every_program_has_its_help_without_docstrings_and_refuses_an_unknown_option():
    files = [*ROOT.glob("*.py"), *ROOT.glob("examples/*.py"), *ROOT.glob("benchmarks/*.py")]
    programs = [str(path) for path in files if '__name__ == "__main__"' in path.read_text()]
    assert len(programs) >= 9
    code = (
        "import runpy, sys\n"
        "for program in sys.argv[1:]:\n"
        "    for option in ('--help', '--nonsense'):\n"
        "        sys.argv = ['program', option]\n"
        "        try:\n"
        "            runpy.run_path(program, run_name='__main__')\n"
        "        except SystemExit as end:\n"
        "            print(program, end.code)"
    )
    done = subprocess.run(
        [sys.executable, "-OO", "-c", code, *programs], capture_output=True, text=True,
        env=os.environ | {"PYTHONPATH": f"{ROOT}{os.pathsep}{ROOT / 'benchmarks'}"},
    )  # fmt: skip
    ended = [line for line in done.stdout.splitlines() if line[:-2].endswith(".py")]
    expected = [f"{program} {code}" for program in programs for code in (0, 2)]
    assert ended == expected, done.stderr


def failing(kind):
    """Returns a stdout that fails in the given way; Python sets a closed stdout to None."""
    if kind == "closed":
        return None
    if kind == "full disk":
        return open("/dev/full", "w")
    reader, writer = os.pipe()
    os.close(reader)
    return open(writer, "w")


KINDS = ["closed", "no reader", pytest.param("full disk", marks=pytest.mark.skipif(
    not os.path.exists("/dev/full"), reason="there is no /dev/full"))]  # fmt: skip


@pytest.mark.usefixtures("one_thread", "quick_figures")
@pytest.mark.parametrize("kind", KINDS)
def test_a_failing_stdout_does_not_affect_results_on_disk(start, tmp_path, monkeypatch, kind):
    with monkeypatch.context() as patch:
        patch.setattr(sys, "stdout", failing(kind))
        code, _, err = start(best_practices.main, *RUN, "--results-dir", tmp_path)
    said = "stdout cannot be written to (No space left on device): the rest is lost\n"
    assert (code, err) == (0, said if kind == "full disk" else "")
    assert {path.name for path in (tmp_path / "best_practices").iterdir()} >= MADE
    assert (tmp_path / "best_practices" / "fc-tanh" / "seed-0" / "state.pt").exists()


@pytest.mark.parametrize("kind", KINDS)
def test_lost_lines_are_an_error_only_if_no_file_contains_them(tmp_path, monkeypatch, kind):
    log = tmp_path / "log.txt"
    log.write_bytes(own_log())
    for more, code in (("--output", str(tmp_path / "out")), 0), ((), 2):
        with monkeypatch.context() as patch:
            patch.setattr(sys, "argv", ["", str(log), *more])
            patch.setattr(sys, "stdout", failing(kind))
            assert log_retrieval.main() == code
    assert (tmp_path / "out" / "fc-tanh" / "seed-0" / "metrics.jsonl").exists()


def test_warnings_do_not_go_to_stdout_if_stderr_is_closed(tmp_path, monkeypatch, capsys):
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
def test_the_results_dir_in_a_script_may_begin_with_a_tilde(start, home, monkeypatch, todo):
    options = replace(best_practices.OPTIONS, results_dir=todo)
    monkeypatch.setattr(best_practices, "OPTIONS", options)
    _, _, err = start(best_practices.main, "--tables-only")
    assert err.startswith(f"error: {home / 'there' / 'best_practices'} has no results")


def test_paths_of_logs_may_begin_with_a_tilde(home, start):
    (home / "log.txt").write_bytes(own_log("std-18"))
    start(log_retrieval.main, "~/log.txt", "--output=~/out")
    assert (home / "out" / "std-18" / "seed-0" / "metrics.jsonl").exists()
    assert start(bottleneck_from_log.main, "~/log.txt", "--output=~/figures")[0] == 0
    assert (home / "figures" / "report.html").exists()


def test_an_unknown_home_folder_is_an_error(home, start):
    for main, arguments in (
        (best_practices.main, ["--results-dir=~not-a-user/r"]),
        (log_retrieval.main, ["log.txt", "--output=~not-a-user/r"]),
    ):
        code, out, err = start(main, *arguments)
        assert (code, out) == (2, "") and "there is no home folder for ~not-a-user/r" in err
    assert [path.name for path in home.parent.iterdir()] == ["home"]
