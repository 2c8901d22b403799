"""Times a sweep in one process and in two, and simulates it on many GPUs.

    python benchmarks/sweep.py                     both
    python benchmarks/sweep.py --seeds 1000        the simulation with more seeds than the paper's

The measurement runs best_practices.py on the embedded digits under torchrun, with one process and
with two, that share this machine's cores; their ratio says what the shared queue costs.

The simulation is of the whole paper: best_practices.py, then bottleneck.py. A run is so many
seconds of a busy GPU (RUNS, measured), and takes longer where too few others fill the GPU beside it
(SPEED, measured as well). Every process has one GPU and AT_ONCE threads, which take the longest run
that is left.

    seconds    until the last run has ended
    / bound    the same over the lower bound, max(longest run by itself, all work / GPUs)
    idle       share of the GPUs' time in which they do nothing, or would do more with more runs
    killed     seconds where each process is killed once in 100 minutes on average: torchrun then
               starts all its processes again, which takes RESTART seconds, and the runs of the one
               that was killed go back to their last epoch
    by nodes   the same with a torchrun of its own for every NODE GPUs, each with its share of seeds
"""

import argparse
import math
import os
import random
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path

import torch
from harness import machine

import best_practices
import bottleneck

# Seconds of a GPU for a run of 50 epochs, set-up included, eight at once; see docs/scaling.md.
RUNS = {"fc": 3.5, "cnn": 9.8, "bottleneck": 3.8}
# How much of a GPU's work gets done with so many runs at once, for the fully connected network.
SPEED = {1: 0.43, 2: 0.55, 4: 0.81, 8: 1.0}
AT_ONCE, EPOCHS, NODE = 8, 50, 8
DEATHS, RESTART = 1 / 6000, 15.0  # per second and process; seconds
GPUS = (8, 16, 64, 256, 1024)


class Run:
    """A run's work and what is left of it, in seconds of a busy GPU."""

    def __init__(self, work: float) -> None:
        self.work = self.left = work


def speed(runs: int) -> float:
    """Between the measured numbers, a straight line."""
    if runs in SPEED:
        return SPEED[runs]
    low, high = max(n for n in SPEED if n < runs), min(n for n in SPEED if n > runs)
    return SPEED[low] + (SPEED[high] - SPEED[low]) * (runs - low) / (high - low)


def makespan(
    work: Sequence[float], gpus: int, deaths: float = 0.0, seed: int = 0
) -> tuple[float, float]:
    """Seconds that a sweep takes, and of these the ones in which it starts again.

    Args:
        work: of each run, in seconds of a busy GPU, in the order in which they are taken.
        gpus: how many processes, each with a GPU.
        deaths: per second and process.
    """
    chance = random.Random(seed)
    queue = list(reversed(work))
    running: list[list[Run]] = [[] for _ in range(gpus)]
    for slot in range(min(len(queue), gpus * AT_ONCE)):
        running[slot % gpus].append(Run(queue.pop()))
    since = [0.0] * gpus  # when what is done of a GPU's runs was added up
    now = stalled = 0.0
    next_death = chance.expovariate(gpus * deaths) if deaths else math.inf

    def end(gpu: int) -> float:
        runs = running[gpu]
        if not runs:
            return math.inf
        return since[gpu] + min(run.left for run in runs) * len(runs) / speed(len(runs))

    def advance(gpu: int, until: float) -> None:
        runs = running[gpu]
        for run in runs:
            run.left -= (until - since[gpu]) * speed(len(runs)) / len(runs)
        since[gpu] = until

    ends = [end(gpu) for gpu in range(gpus)]
    while (first := min(ends)) < math.inf:
        if next_death < first:
            now = next_death
            killed = chance.randrange(gpus)
            advance(killed, now)
            for run in running[killed]:  # an epoch is done again from its start
                run.left += (run.work - run.left) % (run.work / EPOCHS)
            ends[killed] = end(killed)
            # Who dies while all start again makes them start once more.
            while (soon := chance.expovariate(gpus * deaths)) < RESTART:
                stalled += soon
            stalled += RESTART
            next_death = now + chance.expovariate(gpus * deaths)
            continue
        now, gpu = first, ends.index(first)
        advance(gpu, now)
        running[gpu] = [run for run in running[gpu] if run.left > 1e-9]
        while queue and len(running[gpu]) < AT_ONCE:
            running[gpu].append(Run(queue.pop()))
        ends[gpu] = end(gpu)
    return now + stalled, stalled


def lower_bound(work: Sequence[float], gpus: int) -> float:
    return max(max(work) / speed(1), sum(work) / gpus)


def paper(seeds: int) -> tuple[list[float], list[float]]:
    """The runs of both scripts, longest first."""
    rows = [row for row in best_practices.EXPERIMENTS if row.training_method == "dfa"]
    first = sorted(RUNS[row.network.architecture] for row in rows for _ in range(seeds))
    sizes = 2 * len(bottleneck.SIZES)
    return first[::-1], [RUNS["bottleneck"]] * max(sizes, sizes * seeds // 10)


def by_nodes(work: Sequence[float], gpus: int) -> float:
    """The longest of the nodes' times; runs are dealt out to them in turn."""
    nodes = gpus // NODE
    shares = [work[node::nodes] for node in range(nodes)]
    return max(makespan(share, NODE, DEATHS, i)[0] for i, share in enumerate(shares) if share)


def simulate(seeds: int) -> None:
    sweeps = paper(seeds)
    work = [run for sweep in sweeps for run in sweep]
    print(
        f"simulated: {len(work)} runs, {sum(work):.0f} seconds of a GPU; of a run of fc "
        f"{RUNS['fc']}, cnn {RUNS['cnn']}, bottleneck {RUNS['bottleneck']}"
    )
    print(f"{'GPUs':>5} {'seconds':>8} {'/ bound':>8} {'idle':>6} {'killed':>8} {'by nodes':>9}")
    for gpus in GPUS:
        whole = sum(makespan(sweep, gpus)[0] for sweep in sweeps)
        killed = sum(makespan(sweep, gpus, DEATHS)[0] for sweep in sweeps)
        nodes = sum(by_nodes(sweep, gpus) for sweep in sweeps)
        idle = 1 - sum(work) / gpus / whole
        print(
            f"{gpus:5} {whole:8.0f} {whole / lower_bound(work, gpus):8.2f} {100 * idle:4.0f} % "
            f"{killed:8.0f} {nodes:9.0f}"
        )


def measure() -> None:
    """The same eight short runs in one process and in two."""
    script = Path(best_practices.__file__)
    times = []
    for processes in (1, 2):
        with tempfile.TemporaryDirectory() as folder:
            command = [
                sys.executable, "-m", "torch.distributed.run", "--standalone",
                f"--nproc_per_node={processes}", str(script), "--dataset", "Digits", "--quiet",
                "--device", "cpu", "--epochs", "30", "--batch-size", "32", "--results-dir", folder,
                "--experiments", "fc-tanh", "fc-bp", "--seeds", "0", "1", "2", "3",
            ]  # fmt: skip
            start = time.perf_counter()
            environment = {**os.environ, "OMP_NUM_THREADS": "1"}
            subprocess.run(command, check=True, stdout=subprocess.DEVNULL, env=environment)
            times.append(time.perf_counter() - start)
    print(
        f"8 runs of 30 epochs of the digits: {times[0]:.1f} s in one process, {times[1]:.1f} in "
        f"two, {times[1] / times[0]:.2f} of it"
    )


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--seeds", type=int, default=10, help="of each row (default: 10)")
    args = parser.parse_args()
    print(machine(torch.device("cpu")))
    measure()
    simulate(args.seeds)


if __name__ == "__main__":
    main()
