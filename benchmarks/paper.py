"""Extrapolates the time that the whole paper takes, from a few epochs of each of its experiments.

    python benchmarks/paper.py                              on this machine's GPU, or else its CPU
    python benchmarks/paper.py --experiments fc-tanh std-118
    python benchmarks/paper.py --precision tf32 --parallel-runs 4

Every row of best_practices.py and, of bottleneck.py, the size 118 (the others cost the same) is run
as the scripts run it, on random images, twice: for one epoch, and for some more. The difference is
the time of an epoch, the rest that of setting up. From both follows the time of 50 epochs with 10
seeds, or 14 sizes. As many seeds are run as go on at once, so that what an epoch costs beside
others is measured too. `bound` is the number of multiply-adds in the training steps' matrix
products and convolutions, at the rate of one large matrix product in the same process.
"""

import argparse
import functools
import tempfile
from pathlib import Path

import torch
from harness import machine, products, rate_of_a_large_product, seconds, write_random_images

import best_practices
import bottleneck
from mltools import sweep
from mltools.training import PRECISIONS, Experiment

EPOCHS, SEEDS, BATCH = 50, 10, 128
ROWS = [(row, SEEDS) for row in best_practices.EXPERIMENTS] + [
    (bottleneck.experiment("gradient", init, 118), len(bottleneck.SIZES)) for init in ("std", "pai")
]


def measure(row: Experiment, options: sweep.Options, epochs: int) -> tuple[float, float]:
    """Seconds for setting up and for an epoch, per run, where as many go on as may at once."""
    device = torch.device(options.device)
    times = []
    for length in (1, 1 + epochs):
        with tempfile.TemporaryDirectory() as folder:
            values = {**vars(options), "results_dir": Path(folder), "epochs": length}
            run = functools.partial(sweep.run, "paper", [row], sweep.Options(**values))
            times.append(seconds(run, device) / len(options.seeds))
    epoch = (times[1] - times[0]) / epochs
    return times[0] - epoch, epoch


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--epochs", type=int, default=1, help="beside the first (default: 1)")
    parser.add_argument("--precision", choices=PRECISIONS, default="float32")
    parser.add_argument("--parallel-runs", type=int, help="default: as the scripts choose")
    parser.add_argument(
        "--experiments", nargs="+", choices=[row.name for row, _ in ROWS], metavar="ROW",
        help="default: all",
    )  # fmt: skip
    args = parser.parse_args()
    device = torch.device(args.device)
    options = sweep.Options(
        "CIFAR-10", Path(), Path(), device=args.device, precision=args.precision,
        parallel_runs=args.parallel_runs, quiet=True,
    )  # fmt: skip
    at_once = options.at_once()
    print(f"{machine(device)}; {args.precision}, {at_once} run(s) at once")
    # Once, as in a sweep of all rows.
    sweep.load = functools.cache(sweep.load)  # type: ignore[assignment]  # only what hashes
    total = bound = 0.0
    with tempfile.TemporaryDirectory() as folder:
        write_random_images(Path(folder) / "cifar10.npz")
        values = {**vars(options), "data_dir": Path(folder), "seeds": tuple(range(at_once))}
        options = sweep.Options(**values)
        data = sweep.load(options.dataset, options.data_dir)
        rate = rate_of_a_large_product(device)
        images = torch.randn(BATCH, *data.input_shape, device=device)
        print(f"{'row':22} {'set-up s':>9} {'epoch s':>9} {'runs':>5} {'minutes':>9} {'bound':>9}")
        for row, runs in ROWS:
            if args.experiments and row.name not in args.experiments:
                continue
            setup, epoch = measure(row, options, args.epochs)
            model = row.network.build(data.input_shape, data.classes).to(device)
            count = products(model, images)[0] * (len(data.train) // BATCH)
            own, least = runs * (setup + EPOCHS * epoch), runs * EPOCHS * count / rate
            total, bound = total + own, bound + least
            print(
                f"{row.name:22} {setup:9.2f} {epoch:9.3f} {runs:5} {own / 60:9.1f} "
                f"{least / 60:9.1f}",
                flush=True,
            )
    what = "these rows" if args.experiments else "the whole paper"
    print(
        f"extrapolated to {EPOCHS} epochs: {total / 60:.1f} minutes for {what}, "
        f"{total / bound:.2f} of the bound"
    )


if __name__ == "__main__":
    main()
