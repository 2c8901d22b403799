"""The bottleneck effect: how alignment and accuracy fall as the gradient is narrowed (Section 4).

    python bottleneck.py                              the paper: 14 sizes, two initialisations
    python bottleneck.py --sizes 118 --init std       one run
    python bottleneck.py --kind width                 a really narrow layer instead
    python bottleneck.py --tables-only                table and figures of what is there
    torchrun --nproc_per_node=8 bottleneck.py         the runs spread over 8 GPUs

Results go to results/bottleneck/<experiment>/seed-<n>/, the table, the figures and report.html to
results/bottleneck/. What is finished is not run again; what was interrupted goes on.
"""

import argparse
import sys
from pathlib import Path

from bottleneck_from_log import write_report
from mltools.errors import UserError, exit_code, show
from mltools.networks import Network
from mltools.sweep import Options, parse, run, runs_of
from mltools.training import Experiment

# TODO: where the data is; what is not there is fetched.
DATA_DIR = Path("data")
# TODO: where the results go.
RESULTS_DIR = Path("results")
# TODO: what to train on; "Digits" needs no data.
DATASET = "CIFAR-10"

SCRIPT = "bottleneck"
WIDTH = 800
SIZES = (1, 3, 5, 8, 11, 18, 28, 46, 73, 118, 191, 308, 496, 800)


def experiment(kind: str, init: str, size: int) -> Experiment:
    """A row: three hidden layers, with the bottleneck in or instead of the second."""
    if kind == "gradient":
        name, network = f"{init}-{size}", Network(bottleneck=size / WIDTH)
    else:
        name, network = f"width-{init}-{size}", Network(hidden=(WIDTH, size, WIDTH))
    # The 2019 protocol, as in best_practices.py.
    return Experiment(name, network, prealigned=init == "pai", reduction="sum", learning_rate=5e-4)


def add_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--sizes",
        type=int,
        nargs="+",
        default=SIZES,
        metavar="B",
        help=f"the bottleneck sizes, 1 to {WIDTH} (default: {' '.join(map(str, SIZES))})",
    )
    parser.add_argument(
        "--init",
        choices=("std", "pai"),
        nargs="+",
        default=("std", "pai"),
        help="std: PyTorch's own initialisation; pai: pre-alignment (default: std pai)",
    )
    parser.add_argument(
        "--kind",
        choices=("gradient", "width"),
        default="gradient",
        help=f"gradient: B of {WIDTH} gradient entries pass on average; width: the layer has B "
        "units (default: gradient)",
    )


def experiments(arguments: argparse.Namespace) -> list[Experiment]:
    for size in arguments.sizes:
        if not 1 <= size <= WIDTH:
            raise UserError(f"--sizes takes numbers from 1 to {WIDTH}, not {size}")
    return [
        experiment(arguments.kind, init, size)
        for init in arguments.init
        for size in arguments.sizes
    ]


def main() -> None:
    defaults = Options(dataset=DATASET, data_dir=DATA_DIR, results_dir=RESULTS_DIR, seeds=(0,))
    options, chosen, tables_only = parse(
        f"{SCRIPT}.py", __doc__, experiments, defaults, add_options
    )
    if not tables_only:
        run(SCRIPT, chosen, options)
    show(write_report(runs_of(SCRIPT, chosen, options), options.results_dir / SCRIPT))


if __name__ == "__main__":
    sys.exit(exit_code(main))
