"""Extrapolates the time that the whole paper takes, from a few epochs of all its experiments.

    python benchmarks/paper.py                              on this machine's GPU, or else its CPU
    python benchmarks/paper.py --experiments fc-tanh std-118
    python benchmarks/paper.py --precision tf32 --parallel-runs 4

The rows of best_practices.py (without those of backpropagation, and these for themselves) and of
bottleneck.py are run as the scripts run them, on random images, twice: for one epoch, and for some
more. The difference is the time of an epoch, the rest that of setting up. (What a process sets up
once, a run before them does, and is counted once.) From both follows the time of 50 epochs of all
runs: 10 seeds of each row of the first script, 14 sizes with each initialisation of the second, of
which SIZES are run here. Where several runs go on at once, there are at least twice as many, so
that what an epoch costs beside others is measured too. `bound` is the number of multiply-adds in
the training steps' matrix products and convolutions, at the rate of one large matrix product in the
same process.
"""

import argparse
import tempfile
from collections.abc import Sequence
from dataclasses import replace
from functools import cache, partial
from pathlib import Path

import torch
from harness import machine, products, rate_of_a_large_product, seconds, write_random_images

import best_practices
import bottleneck
from mltools import sweep
from mltools.data import DataSet
from mltools.training import PRECISIONS, Experiment

EPOCHS, SEEDS, BATCH = 50, 10, 128
SIZES = (18, 118, 308)
INITS = ("std", "pai")
# Title, rows, and how many runs of the paper each stands for.
GROUPS: list[tuple[str, list[Experiment], float]] = [
    (
        "best_practices.py",
        [row for row in best_practices.EXPERIMENTS if row.training_method == "dfa"],
        SEEDS,
    ),
    (
        "bottleneck.py",
        [bottleneck.experiment("gradient", init, size) for init in INITS for size in SIZES],
        len(bottleneck.SIZES) / len(SIZES),
    ),
    (
        "backpropagation",
        [row for row in best_practices.EXPERIMENTS if row.training_method == "bp"],
        SEEDS,
    ),
]


def train(rows: Sequence[Experiment], options: sweep.Options) -> float:
    """Seconds of a sweep, whose results are thrown away."""
    with tempfile.TemporaryDirectory() as folder:
        run = partial(sweep.run, "paper", rows, replace(options, results_dir=Path(folder)))
        return seconds(run, torch.device(options.device))


def measure(
    rows: Sequence[Experiment], options: sweep.Options, epochs: int
) -> tuple[float, float, int]:
    """Seconds for setting up and for an epoch, of all runs together, and how many these are."""
    seeds = range(-(-2 * options.at_once() // len(rows)) if options.at_once() > 1 else 1)
    options = replace(options, seeds=tuple(seeds))
    short, long = (train(rows, replace(options, epochs=length)) for length in (1, 1 + epochs))
    epoch = (long - short) / epochs
    return short - epoch, epoch, len(rows) * len(seeds)


def multiply_adds(row: Experiment, data: DataSet, device: torch.device) -> int:
    """Of an epoch of training."""
    method = {"training_method": row.training_method}
    model = row.network.build(data.input_shape, data.classes, **method).to(device)
    images = torch.randn(BATCH, *data.input_shape, device=device)
    return products(model, images)[0] * (len(data.train) // BATCH)


def main() -> None:
    names = [row.name for _, rows, _ in GROUPS for row in rows]
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--epochs", type=int, default=1, help="beside the first (default: 1)")
    parser.add_argument("--precision", choices=PRECISIONS, default="float32")
    parser.add_argument("--parallel-runs", type=int, help="default: as the scripts choose")
    parser.add_argument(
        "--experiments", nargs="+", choices=names, default=names, metavar="ROW",
        help="default: all",
    )  # fmt: skip
    args = parser.parse_args()
    device = torch.device(args.device)
    options = sweep.Options(
        "CIFAR-10", Path(), Path(), device=args.device, precision=args.precision,
        parallel_runs=args.parallel_runs, quiet=True,
    )  # fmt: skip
    print(f"{machine(device)}; {args.precision}, {options.at_once()} run(s) at once")
    # Once, as in a sweep of all rows.
    sweep.load = cache(sweep.load)  # type: ignore[assignment]  # only what hashes
    with tempfile.TemporaryDirectory() as folder:
        write_random_images(Path(folder) / "cifar10.npz")
        options = replace(options, data_dir=Path(folder))
        data = sweep.load(options.dataset, options.data_dir)
        rate = rate_of_a_large_product(device)
        first = next(row for _, rows, _ in GROUPS for row in rows if row.name in args.experiments)
        paper = train([first], replace(options, seeds=(0,), epochs=1))
        print(f"{paper:.1f} seconds for the first run, of one epoch")
        print(f"{'':18} {'runs':>5} {'set-up s':>9} {'epoch s':>9} {'minutes':>9} {'bound':>9}")
        for title, rows, stands_for in GROUPS:
            rows = [row for row in rows if row.name in args.experiments]
            if not rows:
                continue
            setup, epoch, measured = measure(rows, options, args.epochs)
            count = len(rows) * stands_for
            own = count * (setup + EPOCHS * epoch) / measured
            work = sum(multiply_adds(row, data, device) for row in rows)
            least = EPOCHS * stands_for * work / rate
            if title != "backpropagation":
                paper += own
            print(
                f"{title:18} {count:5.0f} {setup / measured:9.2f} {epoch / measured:9.3f} "
                f"{own / 60:9.1f} {least / 60:9.1f}",
                flush=True,
            )
    whole = "the whole paper" if args.experiments == names else "these rows"
    print(f"extrapolated to {EPOCHS} epochs: {paper / 60:.1f} minutes for {whole}, BP aside")


if __name__ == "__main__":
    main()
