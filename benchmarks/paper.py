"""Estimates the time of the whole paper from a few epochs of all its experiments.

    python benchmarks/paper.py                              on a GPU if there is one, or on the CPU
    python benchmarks/paper.py --experiments fc-tanh std-118
    python benchmarks/paper.py --precision tf32 --parallel-runs 4

It trains the experiments of best_practices.py (DFA and backpropagation separately) and of
bottleneck.py twice on random images: for one epoch, and for 1 + `--epochs`. The difference is the
time of the further epochs; the remaining time is the set-up. An earlier, single run includes the
set-up of the process, and is counted once.

The estimate is for 50 epochs of all runs: 10 seeds of each experiment in best_practices.py, and 14
sizes with each initialisation in bottleneck.py, of which only SIZES are measured. If N runs train
at once, at least 2 N runs are measured, so that an epoch is timed while other runs train.

`bound` is the time of the multiply-adds in the training steps' matrix products and convolutions, at
the rate of one large matrix product in the same process.
"""

import argparse
import tempfile
from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path

import torch
from harness import machine, products, rate_of_a_large_product, seconds, write_random_images

import best_practices
import bottleneck
from mltools.data import DataSet, load_dataset
from mltools.sweep import Options, run_sweep
from mltools.training import PRECISIONS, Experiment

EPOCHS, SEEDS, BATCH = 50, 10, 128
SIZES = (18, 118, 308)
INITS = ("std", "pai")
# Title, measured experiments, and the number of the paper's runs per measured experiment.
GROUPS: list[tuple[str, list[Experiment], float]] = [
    (
        "best_practices.py",
        [each for each in best_practices.EXPERIMENTS if each.training_method == "dfa"],
        SEEDS,
    ),
    (
        "bottleneck.py",
        [bottleneck.experiment("gradient", init, size) for init in INITS for size in SIZES],
        len(bottleneck.SIZES) / len(SIZES),
    ),
    (
        "backpropagation",
        [each for each in best_practices.EXPERIMENTS if each.training_method == "bp"],
        SEEDS,
    ),
]


def train(experiments: Sequence[Experiment], options: Options, data: DataSet) -> float:
    """Runs a sweep in a temporary folder; returns its seconds."""
    with tempfile.TemporaryDirectory() as folder:
        run = partial(run_sweep, Path(folder), experiments, options, data)
        return seconds(run, torch.device(options.device))


def measure(
    experiments: Sequence[Experiment], options: Options, epochs: int, data: DataSet
) -> tuple[float, float, int]:
    """Returns the seconds of set-up and of an epoch, for all runs together; and their number."""
    at_once = options.at_once()
    seeds = range(-(-2 * at_once // len(experiments)) if at_once > 1 else 1)
    options = replace(options, seeds=seeds)
    short, long = (
        train(experiments, replace(options, epochs=length), data) for length in (1, 1 + epochs)
    )
    epoch = (long - short) / epochs
    return short - epoch, epoch, len(experiments) * len(seeds)


def multiply_adds(experiment: Experiment, data: DataSet, device: torch.device) -> int:
    """Counts the multiply-adds of the products and convolutions in one epoch of training."""
    shape, method = data.input_shape, experiment.training_method
    model = experiment.network.build(shape, data.classes, "release", training_method=method)
    images = torch.randn(BATCH, *shape, device=device)
    return products(model.to(device), images)[0] * (len(data.train) // BATCH)


def main() -> None:
    names = [experiment.name for _, group, _ in GROUPS for experiment in group]
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--epochs", type=int, default=1, help="epochs after the first (default: 1)")
    parser.add_argument("--precision", choices=PRECISIONS, default="float32")
    parser.add_argument("--parallel-runs", type=int, help="default: the scripts' choice")
    parser.add_argument(
        "--experiments", nargs="+", choices=names, default=names, metavar="NAME",
        help="default: all",
    )  # fmt: skip
    args = parser.parse_args()
    device = torch.device(args.device)
    options = Options(
        dataset="CIFAR-10", epochs=1, batch_size=BATCH, protocol="release",
        precision=args.precision, seeds=(0,), data_dir=Path(), results_dir=Path(),
        device=args.device, parallel_runs=args.parallel_runs, quiet=True,
    )  # fmt: skip
    print(f"{machine(device)}; {args.precision}, {options.at_once()} run(s) at once")
    with tempfile.TemporaryDirectory() as folder:
        write_random_images(Path(folder) / "cifar10.npz")
        data = load_dataset(options.dataset, folder)
    rate = rate_of_a_large_product(device)
    groups = [
        (title, [experiment for experiment in group if experiment.name in args.experiments], runs)
        for title, group, runs in GROUPS
    ]
    first = next(experiment for _, group, _ in groups for experiment in group)
    paper = train([first], options, data)
    print(f"{paper:.1f} seconds for the first run, of one epoch")
    print(f"{'':18} {'runs':>5} {'set-up s':>9} {'epoch s':>9} {'minutes':>9} {'bound':>9}")
    for title, group, runs in groups:
        if not group:
            continue
        setup, epoch, measured = measure(group, options, args.epochs, data)
        count = len(group) * runs
        own = count * (setup + EPOCHS * epoch) / measured
        work = sum(multiply_adds(experiment, data, device) for experiment in group)
        least = EPOCHS * runs * work / rate
        if title != "backpropagation":
            paper += own
        print(
            f"{title:18} {count:5.0f} {setup / measured:9.2f} {epoch / measured:9.3f} "
            f"{own / 60:9.1f} {least / 60:9.1f}",
            flush=True,
        )
    whole = "the whole paper" if args.experiments == names else "these experiments"
    print(f"extrapolated to {EPOCHS} epochs: {paper / 60:.1f} minutes for {whole}, without BP")


if __name__ == "__main__":
    main()
