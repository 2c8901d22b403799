"""What the scripts share: their options, and running experiments over seeds."""

import argparse
import dataclasses
import os
import signal
import sys
import threading
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple, NoReturn

import torch

from mltools import processes
from mltools.board import Board, check_installed
from mltools.data import DATASETS, DataSet, load
from mltools.errors import UserError, show
from mltools.files import user_path
from mltools.networks import PLACEMENTS
from mltools.progress import progress_of_all
from mltools.results import RunFolder
from mltools.runs import train
from mltools.training import PRECISIONS, Experiment

PARALLEL_ON_CUDA = 8  # on an H200, more bring no more
STREAMS_ON_CUDA = 32  # that PyTorch keeps apart; runs that shared one would mix their work


@dataclass(frozen=True)
class Options:
    """What a user chooses: the fields are the scripts' options, see `parse`."""

    dataset: str
    data_dir: Path
    results_dir: Path
    seeds: tuple[int, ...] = tuple(range(10))
    epochs: int = 50
    batch_size: int = 128
    device: str = "cuda" if torch.cuda.is_available() else "cpu"
    feedback_placement: str = "release"
    precision: str = "float32"
    parallel_runs: int | None = None
    deterministic: bool = False
    force: bool = False
    quiet: bool = False
    tensorboard: bool = False

    def at_once(self) -> int:
        """How many runs to train at once."""
        if self.parallel_runs is None:
            return PARALLEL_ON_CUDA if self.device.startswith("cuda") else 1
        return self.parallel_runs


class Job(NamedTuple):
    """A run that is not finished."""

    experiment: Experiment
    folder: RunFolder
    settings: dict


def parse(
    script: str,
    description: str | None,
    experiments: Callable[[argparse.Namespace], Sequence[Experiment]],
    defaults: Options,
    more_options: Callable[[argparse.ArgumentParser], None] = lambda parser: None,
) -> tuple[Options, list[Experiment], bool]:
    """Reads the command line of a script.

    Args:
        script: its name, for `--help`.
        description: its docstring, for `--help`; None under `python -OO`.
        experiments: all rows there are, given the parsed command line.
        defaults: of the common options.
        more_options: adds the script's own options.

    Returns: the common options, the rows chosen, and whether only tables are asked for. `--list`
    prints the rows and exits.

    Raises UserError for an unknown experiment or device, a number out of range, or a results folder
    that cannot be written to, or has no results of which to make tables.
    """
    parser = _Parser(
        prog=script,
        description=description,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )

    def option(name: str, help: str, **kind) -> None:
        default = getattr(defaults, name)
        if isinstance(default, tuple):
            default = " ".join(map(str, default))
        elif default is None:
            default = "auto"
        flag = f"--{name.replace('_', '-')}"
        parser.add_argument(flag, help=f"{help} (default: {default})", **kind)

    def switch(name: str, help: str) -> None:
        parser.add_argument(f"--{name}", action="store_true", help=f"{help} (default: no)")

    names = ", ".join(DATASETS)
    option("dataset", f"one of {names}", choices=DATASETS, metavar="NAME")
    option(
        "data_dir",
        "folder of the data sets; a missing one is fetched",
        type=user_path,
        metavar="DIR",
    )
    option("results_dir", "where the results go", type=user_path, metavar="DIR")
    parser.add_argument(
        "--experiments",
        nargs="+",
        default=[],
        metavar="ROW",
        help="the rows to run, see --list (default: all)",
    )
    option("seeds", "the seeds to run each row with", nargs="+", type=int, metavar="N")
    option("epochs", "how long to train", type=int, metavar="N")
    option("batch_size", "samples in a training step", type=int, metavar="N")
    option("device", "cpu, cuda or cuda:N; under torchrun, cuda is another GPU for each process")
    option(
        "feedback_placement",
        "every-layer: a feedback point before every weight layer but the first, which is DFA "
        "proper; release: the same, less the points that the 2019 release missed",
        choices=PLACEMENTS,
        metavar="PLACEMENT",
    )
    option(
        "precision",
        "of the training and the evaluation: float32, as in the paper; tf32, faster matrix "
        "products on CUDA; bf16, mixed precision",
        choices=PRECISIONS,
        metavar="PRECISION",
    )
    option(
        "parallel_runs",
        f"how many runs to train at once, or auto, which is {PARALLEL_ON_CUDA} on CUDA and 1 on a "
        "CPU, whose threads the runs share",
        type=_count_or_auto,
        metavar="N",
    )
    switch("deterministic", "on CUDA too, the same seed gives the same bits; slower there")
    switch("force", "set a folder with other settings aside, and start anew")
    switch("quiet", "show nothing but the tables and errors")
    # argparse applies the type of an option only to a default that is text.
    folders = {name: str(getattr(defaults, name)) for name in ("data_dir", "results_dir")}
    parser.set_defaults(**dataclasses.asdict(defaults) | folders)
    switch("tensorboard", "write each run's epochs for TensorBoard too, into its folder")
    switch("tables-only", "run nothing, write the tables and figures of what is there")
    switch("list", "list the rows and exit")
    more_options(parser)
    arguments = parser.parse_args()
    if (arguments.list or arguments.tables_only) and processes.rank() > 0:
        sys.exit()  # what is left to do, rank 0 does
    rows = experiments(arguments)
    known = {experiment.name: experiment for experiment in rows}
    if arguments.list:
        show("\n".join(known))
        sys.exit()
    for name in arguments.experiments:
        if name not in known:
            raise UserError(f"no experiment is called {name!r}; there are: {', '.join(known)}")
    values = {field.name: getattr(arguments, field.name) for field in dataclasses.fields(Options)}
    values["seeds"] = tuple(arguments.seeds)
    values["device"] = processes.own_device(arguments.device)
    options = Options(**values)
    if options.epochs < 1 or options.batch_size < 2:
        raise UserError("--epochs must be at least 1 and --batch-size at least 2")
    in_range = all(0 <= seed < 2**63 for seed in options.seeds)
    if not in_range or len(set(options.seeds)) < len(options.seeds):
        raise UserError("--seeds takes different numbers, from 0 to 2**63 - 1")
    _check_device(options.device)
    if options.device.startswith("cuda") and options.at_once() > STREAMS_ON_CUDA:
        raise UserError(f"--parallel-runs takes at most {STREAMS_ON_CUDA} on CUDA")
    if options.precision == "tf32" and not options.device.startswith("cuda"):
        raise UserError("--precision tf32 needs a CUDA device: choose float32 or bf16")
    if options.tensorboard:
        check_installed()
    if arguments.tables_only:
        _check_results(options.results_dir / Path(script).stem)
    _check_writable(options.results_dir)
    chosen = [known[name] for name in known if name in (arguments.experiments or known)]
    return options, chosen, arguments.tables_only


def run(script: str, experiments: Sequence[Experiment], options: Options) -> None:
    """Runs every experiment with every seed, those aside that are finished already.

    Seed by seed: so the table is whole early, and where several runs go on at once, small networks
    fill the gaps that large ones leave. Processes that torchrun has started share the runs, the
    longest first, so that all have work to the end; then rank 0 returns, and the others exit.

    Ctrl-C, or a request to terminate, lets each run end its batch and write a checkpoint; a second
    one ends the process at once, and costs no more than the epoch under way.

    Raises:
        UserError: before any training, if the data or a run's folder is not as it must be.
        KeyboardInterrupt: it was interrupted, and all runs have ended.
    """
    _set_arithmetic(options)
    todo: list[Job] = []
    aside = []
    with processes.rank_zero_first():
        data = load(options.dataset, options.data_dir)
        for seed in options.seeds:
            for experiment in experiments:
                folder = folder_of(script, experiment.name, seed, options)
                settings = settings_of(experiment, seed, data, options)
                try:
                    folder.check(settings)
                    if folder.complete():
                        continue
                except UserError:
                    if not options.force:
                        raise
                    aside.append(folder)
                todo.append(Job(experiment, folder, settings))
        if todo:
            cost = {
                network: network.multiply_adds(data.input_shape, data.classes)
                for network in {job.experiment.network for job in todo}
            }  # says now if the images do not fit
            if processes.rank() == 0:
                for folder in aside:
                    show(f"{folder.path} set aside as {folder.set_aside()}")
            if processes.launched():
                todo.sort(key=lambda job: -cost[job.experiment.network])
    if todo:
        _train(todo, data, options)
    if processes.rank() > 0:
        sys.exit()


def _train(todo: Sequence[Job], data: DataSet, options: Options) -> None:
    """Trains the runs that this process takes, and waits for those that others have taken."""
    device = torch.device(options.device)
    for part in (data.train, data.test):
        part.resident(device)  # once, before runs share it
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    epochs = sum(options.epochs - len(job.folder.metrics()) for job in todo)
    stop = threading.Event()

    with progress_of_all(len(todo), epochs, options.quiet) as progress:

        def one(experiment: Experiment, folder: RunFolder, settings: dict) -> None:
            name = f"{experiment.name} seed {settings['seed']}"
            try:
                if stop.is_set() or not processes.take(name):
                    return
                with _board(folder, options) as board:

                    def epoch_ended(metrics: dict) -> None:
                        progress.epoch_ended(name, options.epochs, metrics)
                        if board:
                            board.epoch_ended(metrics)

                    line = progress.line
                    train(experiment, data, folder, settings, device, line, epoch_ended, stop)
            except BaseException:
                stop.set()  # an error ends the others as Ctrl-C does
                raise
            progress.run_ended()

        with _stopped_by_signals(stop):
            if options.at_once() == 1:
                # Not in a thread of its own: with more of OpenMP's threads than cores, they would
                # sleep between any two products.
                for job in todo:
                    one(*job)
            else:
                with _threads_shared(options), ThreadPoolExecutor(options.at_once()) as pool:
                    futures = [pool.submit(one, *job) for job in todo]
                for future in futures:
                    future.result()
            for job in todo:
                processes.wait(job.folder.ended, stop)
    if stop.is_set():
        raise KeyboardInterrupt


def folder_of(script: str, experiment: str, seed: int, options: Options) -> RunFolder:
    """The folder of one run: `<results-dir>/<script>/<experiment>/seed-<n>`."""
    return RunFolder(options.results_dir / script / experiment / f"seed-{seed}")


def runs_of(
    script: str, experiments: Iterable[Experiment], options: Options
) -> dict[str, list[RunFolder]]:
    """For each row its runs, one per seed."""
    return {
        row.name: [folder_of(script, row.name, seed, options) for seed in options.seeds]
        for row in experiments
    }


def settings_of(experiment: Experiment, seed: int, data: DataSet, options: Options) -> dict:
    """What a run's results depend on; two runs with the same settings give the same results."""
    return {
        "experiment": dataclasses.asdict(experiment),
        "seed": seed,
        "dataset": data.name,
        "data_crc32": data.crc32,
        "epochs": options.epochs,
        "batch_size": options.batch_size,
        "feedback_placement": options.feedback_placement,
        "precision": options.precision,
    }


def _board(folder: RunFolder, options: Options) -> AbstractContextManager[Board | None]:
    if not options.tensorboard:
        return nullcontext()
    return Board(folder.path / "tensorboard", len(folder.metrics()))


def _set_arithmetic(options: Options) -> None:
    """Sets what PyTorch keeps for the whole process."""
    precision = "tf32" if options.precision == "tf32" else "ieee"
    torch.backends.cuda.matmul.fp32_precision = precision
    torch.backends.cudnn.conv.fp32_precision = precision  # type: ignore[attr-defined]  # set at import
    if processes.launched() and options.device == "cpu":
        torch.set_num_threads(processes.own_threads())
    elif processes.launched():
        torch.cuda.set_device(options.device)  # what does not name one shall not take the first
    if options.deterministic:
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    if options.deterministic != torch.are_deterministic_algorithms_enabled():
        torch.use_deterministic_algorithms(options.deterministic)  # imports a lot


@contextmanager
def _threads_shared(options: Options) -> Iterator[None]:
    """On the CPU, runs that go on at once share its threads."""
    threads = torch.get_num_threads()
    if options.device == "cpu":
        torch.set_num_threads(max(1, threads // options.at_once()))
    try:
        yield
    finally:
        torch.set_num_threads(threads)


@contextmanager
def _stopped_by_signals(stop: threading.Event) -> Iterator[None]:
    """Makes the first Ctrl-C or SIGTERM set `stop`; the second one kills."""

    def handle(number: int, frame: object) -> None:
        stop.set()
        signal.signal(number, signal.SIG_DFL)

    before = {number: signal.signal(number, handle) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


class _Parser(argparse.ArgumentParser):
    """Complains in one line, as the scripts do of everything."""

    def error(self, message: str) -> NoReturn:
        raise UserError(f"{message}; see --help")


def _count_or_auto(text: str) -> int | None:
    if text == "auto":
        return None
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"takes a number from 1 up, or auto, not {text!r}")
    return int(text)


def _check_device(name: str) -> None:
    try:
        device = torch.device(name)
    except RuntimeError:
        device = None
    if device is None or device.type not in ("cpu", "cuda"):
        raise UserError(f"--device must be cpu, cuda or cuda:N, not {name!r}")
    if device.type == "cuda" and (device.index or 0) >= torch.cuda.device_count():
        remedy = "; have torchrun start one process for each" if processes.launched() else ""
        raise UserError(
            f"--device {name} is not there: PyTorch sees {torch.cuda.device_count()} CUDA devices"
            f"{remedy}"
        )


def _check_results(folder: Path) -> None:
    if not folder.is_dir():
        raise UserError(
            f"{folder}, of which to make the tables, is not there: give the --results-dir that "
            "the runs had"
        )


def _check_writable(folder: Path) -> None:
    probe = folder / f".writable.{os.getpid()}"
    try:
        folder.mkdir(parents=True, exist_ok=True)
        probe.touch()
        probe.unlink(missing_ok=True)  # on another machine a process may have the same number
    except OSError as error:
        raise UserError(
            f"results cannot be written to {folder} ({error.strerror}): "
            "choose another --results-dir"
        ) from None
