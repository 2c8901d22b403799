"""The bottleneck effect: how alignment and accuracy fall as the gradient is masked (Section 4).

    python bottleneck.py                              as published: 14 sizes, two initialisations
    python bottleneck.py --sizes 118 --init std       one run
    python bottleneck.py --protocol corrected --results-dir results/corrected
                                                      DFA at every layer, exact alignment
    python bottleneck.py --kind width                 a narrow layer instead of masked gradients
    python bottleneck.py --tables-only                table and figures of existing runs
    torchrun --nproc_per_node=8 bottleneck.py         all runs, spread over 8 GPUs

Each run is saved in results/bottleneck/<experiment>/seed-<n>/; the table, the figures and
report.html are in results/bottleneck/. Finished runs are skipped, interrupted runs are resumed.
"""

import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from mltools.bottleneck import write_bottleneck_report
from mltools.data import load_dataset
from mltools.errors import UserError, exit_code, show
from mltools.networks import Network
from mltools.sweep import Options, is_first, load_runs, parse_options, run_sweep
from mltools.training import Experiment, option

SCRIPT = "bottleneck"
REFERENCE = Path(__file__).resolve().parent / "reference"
WIDTH = 800
SIZES = (1, 3, 5, 8, 11, 18, 28, 46, 73, 118, 191, 308, 496, 800)


@dataclass(frozen=True, kw_only=True)
class BottleneckOptions(Options):
    """The options of this script."""

    sizes: Sequence[int] = option(
        f"bottleneck sizes, from 1 to {WIDTH}", SIZES, nargs="+", type=int, metavar="B"
    )
    init: Sequence[str] = option(
        "initialisations of the weights; std: PyTorch's default, pai: pre-alignment",
        ("std", "pai"),
        nargs="+",
        choices=("std", "pai"),
    )
    kind: str = option(
        f"gradient: keep B of {WIDTH} gradient entries on average; width: use a layer of B units",
        "gradient",
        choices=("gradient", "width"),
    )


OPTIONS = BottleneckOptions(
    # TODO: set the folder of the data sets; missing ones are downloaded.
    data_dir=Path("data"),
    # TODO: set the folder of the results.
    results_dir=Path("results"),
    # TODO: choose a data set; "Digits" comes with the code.
    dataset="CIFAR-10",
    # The 2019 protocol, as in best_practices.py.
    epochs=50,
    batch_size=128,
    protocol="release",
    seeds=(0,),
)
LEARNING_RATE = 5e-4


def experiments(options: BottleneckOptions) -> list[Experiment]:
    """Returns an experiment for each initialisation and size.

    Raises UserError for a size out of range.
    """
    for size in options.sizes:
        if not 1 <= size <= WIDTH:
            raise UserError(f"--sizes takes numbers from 1 to {WIDTH}, not {size}")
    return [experiment(options.kind, init, size) for init in options.init for size in options.sizes]


def experiment(kind: str, init: str, size: int) -> Experiment:
    """Returns an FC experiment whose second layer has masked gradients, or `size` units."""
    if kind == "gradient":
        name, network = f"{init}-{size}", Network(bottleneck=size / WIDTH)
    else:
        name, network = f"width-{init}-{size}", Network(hidden=(WIDTH, size, WIDTH))
    return Experiment(
        name, network, prealigned=init == "pai", reduction="sum", learning_rate=LEARNING_RATE
    )


def main() -> None:
    options, chosen = parse_options(SCRIPT, __doc__, OPTIONS, experiments)
    folder = options.results_dir / SCRIPT
    if not options.tables_only:
        run_sweep(folder, chosen, options, load_dataset(options.dataset, options.data_dir))
    runs = load_runs(folder, chosen, options.seeds)
    markdown = write_bottleneck_report(runs, folder, REFERENCE)
    if is_first():
        show(f"{markdown}\nreport: {folder / 'report.html'}")


if __name__ == "__main__":
    sys.exit(exit_code(main))
