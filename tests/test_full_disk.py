"""A full disk ends a run with one error line, and leaves the run resumable."""

import os
import shutil
import subprocess

import pytest
from faults import SOAK
from tiny import checkpoint_of, outcome

import best_practices

pytestmark = pytest.mark.usefixtures("one_thread", "quick_figures")
COMMAND = (
    "--dataset Digits --device cpu --experiments fc-dropout-0.1-0.5 --seeds 0 --epochs 3 "
    "--batch-size 500 --quiet --results-dir"
).split()
RUN = "results/best_practices/fc-dropout-0.1-0.5/seed-0"
ROOM_FOR_ONE = 12  # MB: a second checkpoint does not fit beside the first


@pytest.fixture
def small_disk(tmp_path, request):
    """Mounts a disk of `request.param` MB; skips the test where this is not allowed."""
    disk = tmp_path / "disk"
    disk.mkdir()
    command = ["mount", "-t", "tmpfs", "-o", f"size={request.param}m", "tmpfs", disk]
    if os.name != "posix" or os.geteuid() or subprocess.run(command).returncode:
        pytest.skip("a small disk cannot be mounted here")
    yield disk
    subprocess.run(["umount", disk], check=True)


@pytest.mark.parametrize(
    "small_disk", range(1, 17) if SOAK else [ROOM_FOR_ONE], indirect=True, ids="{}-MB".format
)
def test_a_run_ended_by_a_full_disk_is_resumed_once_there_is_room(start, small_disk, tmp_path):
    code, _, err = start(best_practices.main, *COMMAND, small_disk / "results")
    assert code == 1 and err.count("\n") == 1
    assert err.startswith("error: ") and "No space left on device" in err
    if shutil.disk_usage(small_disk).total >= ROOM_FOR_ONE * 1e6:
        assert checkpoint_of(small_disk / RUN)["epochs"] == []  # the first checkpoint is kept
    subprocess.run(["mount", "-o", "remount,size=64m", small_disk], check=True)
    for folder in (small_disk, tmp_path):
        assert start(best_practices.main, *COMMAND, folder / "results")[0] == 0
    assert outcome(small_disk / RUN) == outcome(tmp_path / RUN)
