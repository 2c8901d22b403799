"""Best practices for Direct Feedback Alignment: the tables of Sections 3 and 4.

    python best_practices.py                                    the paper: CIFAR-10, 10 seeds
    python best_practices.py --experiments fc-tanh --seeds 0    one run
    python best_practices.py --dataset Digits --epochs 5        no data set needed
    python best_practices.py --tables-only                      tables, figures of what is there
    torchrun --nproc_per_node=8 best_practices.py               the runs spread over 8 GPUs

Results go to results/best_practices/<experiment>/seed-<n>/, the tables, the figures and report.html
to results/best_practices/. Finished runs are skipped, and interrupted ones are resumed.
"""

import sys
from dataclasses import replace
from functools import partial
from pathlib import Path

from mltools.data import load_dataset
from mltools.errors import exit_code, show
from mltools.figures import Figure, accuracy_figure, alignment_figure, curves, final_figure
from mltools.networks import Network
from mltools.report import write_report
from mltools.results import RunResult
from mltools.sweep import Options, is_first, load_runs, parse_options, run_sweep
from mltools.tables import Table, protocols, reference_row, summarise, write_tables
from mltools.training import Experiment

# TODO: where the data is; what is not there is fetched.
DATA_DIR = Path("data")
# TODO: where the results go.
RESULTS_DIR = Path("results")
# TODO: what to train on; "Digits" needs no data.
DATASET = "CIFAR-10"

SCRIPT = "best_practices"
RELEASE = Path(__file__).resolve().parent / "reference" / "release.json"
# The 2019 protocol.
EPOCHS = 50
BATCH_SIZE = 128
SEEDS = range(10)
# Hidden layers get the error summed over the batch, the output layer its mean.
dfa = partial(Experiment, reduction="sum", learning_rate=5e-4)
# Plain backpropagation under the mean loss.
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
    bp("fc-bp", FC, learning_rate=0.01),  # larger steps make its accuracy jump about
    dfa("cnn-tanh", CNN),
    dfa("cnn-no-normalization", CNN, normalization=False),
    dfa("cnn-batchnorm", replace(CNN, batchnorm=True)),
    dfa("cnn-dropout-0.1-0.5", replace(CNN, dropout_input=0.1, dropout_fc=0.5)),
    dfa("cnn-dropout-0.1-0.1", replace(CNN, dropout_input=0.1, dropout_fc=0.1)),
    bp("cnn-bp", CNN, learning_rate=0.05),
]
# The tables: title, architecture, and the layers whose alignment is shown.
ARCHITECTURES = [
    ("Fully connected", "fc", ["act1", "act2", "act3"]),
    ("Convolutional", "cnn", ["act1", "act2", "act3", "act4"]),
]


def main() -> None:
    defaults = Options(
        dataset=DATASET,
        data_dir=DATA_DIR,
        results_dir=RESULTS_DIR,
        seeds=SEEDS,
        epochs=EPOCHS,
        batch_size=BATCH_SIZE,
    )
    options, chosen = parse_options(SCRIPT, __doc__, defaults, lambda options: EXPERIMENTS)
    if not options.tables_only:
        run_sweep(SCRIPT, chosen, options, load_dataset(options.dataset, options.data_dir))
    folder, runs = options.results_dir / SCRIPT, load_runs(SCRIPT, chosen, options)
    tables = make_tables(chosen, runs)
    markdown = write_tables(folder, tables)
    figures = make_figures(chosen, tables, runs, folder)
    write_report(folder, "Best practices for Direct Feedback Alignment", tables, figures, runs)
    if is_first():
        show(markdown)


def make_tables(experiments: list[Experiment], runs: dict[str, list[RunResult]]) -> list[Table]:
    """Returns a table for each architecture, with the 2019 release's numbers beside ours."""
    tables = []
    for title, architecture, layers in ARCHITECTURES:
        rows = []
        for experiment in experiments:
            if experiment.network.architecture == architecture:
                rows.append(summarise(experiment.name, runs[experiment.name]))
                rows += reference_row(rows[-1], RELEASE, "2019 release")
        if rows:
            tables.append(Table(f"{title}: {protocols(rows)}", rows, layers))
    return tables


def make_figures(
    experiments: list[Experiment],
    tables: list[Table],
    runs: dict[str, list[RunResult]],
    folder: Path,
) -> list[Figure]:
    """Draws the final alignment, and for each architecture the curves against epochs."""
    figures = [final_figure(tables, folder / "alignment")]
    for title, architecture, layers in ARCHITECTURES:
        lines = {
            experiment.name: curves(runs[experiment.name])
            for experiment in experiments
            if experiment.network.architecture == architecture
        }
        if lines:
            stem = folder / f"{architecture}-alignment-epochs"
            figures.append(alignment_figure(lines, layers, title, stem))
            figures.append(
                accuracy_figure(lines, title, folder / f"{architecture}-accuracy-epochs")
            )
    return [figure for figure in figures if figure]


if __name__ == "__main__":
    sys.exit(exit_code(main))
