"""Best practices for Direct Feedback Alignment: the tables of Sections 3 and 4.

    python best_practices.py                                    as in 2019: CIFAR-10, 10 seeds
    python best_practices.py --experiments fc-tanh --seeds 0    one run
    python best_practices.py --protocol corrected --results-dir results/corrected
                                                                DFA at every layer, exact alignment
    python best_practices.py --dataset Digits --epochs 5        without a download
    python best_practices.py --tables-only                      tables and figures of existing runs
    torchrun --nproc_per_node=8 best_practices.py               all runs, spread over 8 GPUs

Each run is saved in results/best_practices/<experiment>/seed-<n>/; the tables, the figures and
report.html are in results/best_practices/. Finished runs are skipped, interrupted runs are resumed.
"""

import sys
from dataclasses import replace
from functools import partial
from pathlib import Path

from mltools.data import load_dataset
from mltools.errors import exit_code, show
from mltools.figures import ACCURACY, COSINE, Figure, epochs_figure, final_figure
from mltools.networks import Network
from mltools.report import write_report
from mltools.results import RunResult
from mltools.sweep import Options, is_first, load_runs, parse_options, run_sweep
from mltools.tables import SPLITS, Table, protocols, reference_row, summarise, write_tables
from mltools.training import Experiment

SCRIPT = "best_practices"
OPTIONS = Options(
    # TODO: set the folder of the data sets; missing ones are downloaded.
    data_dir=Path("data"),
    # TODO: set the folder of the results.
    results_dir=Path("results"),
    # TODO: choose a data set; "Digits" comes with the code.
    dataset="CIFAR-10",
    # The 2019 protocol.
    epochs=50,
    batch_size=128,
    protocol="release",
    seeds=range(10),
)
RELEASE = Path(__file__).resolve().parent / "reference" / "release.json"
# As in 2019, hidden layers get the error summed over the batch, and the output layer gets the mean
# loss's gradient; lr 5e-4 suits this. The library's default is "mean", the plain gradient.
dfa = partial(Experiment, reduction="sum", learning_rate=5e-4)
bp = partial(Experiment, training_method="bp")

FC = Network("fc")
CNN = Network("cnn")
EXPERIMENTS = [
    dfa("fc-tanh", FC),
    dfa("fc-relu", replace(FC, activation="relu")),
    *(
        dfa(f"fc-leaky-relu-{slope}", replace(FC, activation="leaky-relu", negative_slope=slope))
        for slope in (0.5, 0.1, 0.01)
    ),
    dfa("fc-no-normalization", FC, normalization=False),
    dfa("fc-batchnorm", replace(FC, batchnorm=True)),
    dfa("fc-dropout-0.1-0.5", replace(FC, dropout_input=0.1, dropout_fc=0.5)),
    dfa("fc-dropout-0.1-0.1", replace(FC, dropout_input=0.1, dropout_fc=0.1)),
    bp("fc-bp", FC, learning_rate=0.01),  # a larger rate makes the accuracy fluctuate
    dfa("cnn-tanh", CNN),
    dfa("cnn-no-normalization", CNN, normalization=False),
    dfa("cnn-batchnorm", replace(CNN, batchnorm=True)),
    dfa("cnn-dropout-0.1-0.5", replace(CNN, dropout_input=0.1, dropout_fc=0.5)),
    dfa("cnn-dropout-0.1-0.1", replace(CNN, dropout_input=0.1, dropout_fc=0.1)),
    bp("cnn-bp", CNN, learning_rate=0.05),
]
# The tables: title, architecture, and the layers in the alignment columns.
# act1, act2, ... are the activations of the hidden blocks, in network order.
ARCHITECTURES = [
    ("Fully connected", "fc", ["act1", "act2", "act3"]),
    ("Convolutional", "cnn", ["act1", "act2", "act3", "act4"]),
]


def main() -> None:
    options, chosen = parse_options(SCRIPT, __doc__, OPTIONS, lambda options: EXPERIMENTS)
    folder = options.results_dir / SCRIPT
    if not options.tables_only:
        run_sweep(folder, chosen, options, load_dataset(options.dataset, options.data_dir))
    runs = load_runs(folder, chosen, options.seeds)
    tables = make_tables(chosen, runs)
    markdown = write_tables(folder, [*tables.values()])
    figures = make_figures(tables, folder)
    title = "Best practices for Direct Feedback Alignment"
    write_report(folder, title, [*tables.values()], figures, runs)
    if is_first():
        show(f"{markdown}\nreport: {folder / 'report.html'}")


def make_tables(
    experiments: list[Experiment], runs: dict[str, list[RunResult]]
) -> dict[str, Table]:
    """Returns `{architecture: table}`, with the 2019 release's numbers below ours."""
    tables = {}
    for title, architecture, layers in ARCHITECTURES:
        rows = []
        for experiment in experiments:
            if experiment.network.architecture == architecture:
                rows.append(summarise(experiment.name, runs[experiment.name]))
                rows += reference_row(rows[-1], RELEASE, "2019 release")
        if rows:
            tables[architecture] = Table(f"{title}: {protocols(rows)}", rows, layers)
    return tables


def make_figures(tables: dict[str, Table], folder: Path) -> list[Figure]:
    """Draws the final alignment, and per architecture alignment and accuracy against epochs."""
    figures = [final_figure(tables.values(), folder / "alignment")]
    for architecture, table in tables.items():
        title = table.title.partition(":")[0]
        # Rows of reference numbers have no curves.
        lines = {"": {row.name: row.curves for row in table.rows if row.curves}}
        stem = folder / f"{architecture}-alignment-epochs"
        figures.append(epochs_figure(lines, table.layers, COSINE, title, stem))
        stem = folder / f"{architecture}-accuracy-epochs"
        figures.append(epochs_figure(lines, SPLITS, ACCURACY, title, stem))
    return [figure for figure in figures if figure]


if __name__ == "__main__":
    sys.exit(exit_code(main))
