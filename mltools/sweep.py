"""The command line of the scripts, and the loop over experiments and seeds.

Any number of copies of a script share a sweep, started by torchrun, by Slurm or by hand. The locks
on the runs' folders are the queue: each copy trains the unfinished runs whose lock is free, the
longest first, and then waits for the other copies. If a copy is killed, another resumes its runs.
"""

import argparse
import dataclasses
import os
import re
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import AbstractContextManager, closing, contextmanager, nullcontext, suppress
from dataclasses import dataclass
from importlib.util import find_spec
from itertools import product
from pathlib import Path
from tempfile import TemporaryFile
from typing import Any, NoReturn

import torch
from filelock import Timeout

from mltools.data import DataSet, cores
from mltools.errors import UserError, show, user_errors
from mltools.gpu import own_stream
from mltools.progress import Progress, add_scalars
from mltools.results import Metrics, RunFolder, RunResult, user_path
from mltools.training import Experiment, Run, Settings, Trainer, option, train_run

PARALLEL_ON_CUDA = 8  # on an H200, more parallel runs gain nothing
STREAMS_ON_CUDA = 32  # size of PyTorch's stream pool; runs on one stream would mix their work
SECONDS_BETWEEN_LOCKS = 0.2  # pause while other threads or copies train all unfinished runs


def _count_or_auto(text: str) -> int | None:
    if text == "auto":
        return None
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"takes a number from 1 up, or auto, not {text!r}")
    return int(text)


@dataclass(frozen=True, kw_only=True)
class Options(Settings):
    """The options of every script; a script with more options defines a subclass."""

    data_dir: Path = option("folder of data sets; most are downloaded if missing", type=user_path)
    results_dir: Path = option("folder of the results", type=user_path)
    experiments: Sequence[str] = option("names of experiments to run, see --list", (), nargs="+")
    seeds: Sequence[int] = option("seeds to run each experiment with", nargs="+", type=int)
    device: str = option(
        "cpu, cuda, cuda:N or auto (cuda if there is a GPU); under torchrun, cuda gives each "
        "process its own GPU",
        "auto",
    )
    parallel_runs: int | None = option(
        f"number of runs to train at once, or auto ({PARALLEL_ON_CUDA} on CUDA, 1 on a CPU); runs "
        "on a CPU share its threads",
        None,
        type=_count_or_auto,
    )
    deterministic: bool = option("give the same bits for the same seed on CUDA too; slower", False)
    force: bool = option("rename run folders with other settings, and start anew", False)
    quiet: bool = option("print only tables and errors", False)
    tensorboard: bool = option("write TensorBoard files into the folders of the runs", False)
    tables_only: bool = option("write tables and figures without training", False)

    def at_once(self) -> int:
        """Returns the number of runs to train at once."""
        if self.parallel_runs is None:
            return PARALLEL_ON_CUDA if self.device.startswith("cuda") else 1
        return self.parallel_runs


def parse_options(
    script: str,
    description: str | None,
    defaults: Options,
    experiments: Callable[[Any], Sequence[Experiment]],
) -> tuple[Options, list[Experiment]]:
    """Parses the command line of a script, whose options are the fields of `defaults`.

    Args:
        script: the script's name, without `.py`.
        description: the script's docstring, for `--help`; None under `python -OO`.
        defaults: the options of an empty command line.
        experiments: a function that returns all experiments of the script, given the options.

    Returns: the options and the chosen experiments. `--list` prints all experiments and exits.

    Raises UserError for a wrong option, an unknown experiment, a results folder that cannot be
    written to, or `--tables-only` without results.
    """
    parser = _Parser(
        prog=f"{script}.py",
        description=description,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    for field in dataclasses.fields(defaults):
        flag = f"--{field.name.replace('_', '-')}"
        default, argument = getattr(defaults, field.name), dict(field.metadata)
        shown, help = default, argument.pop("help")
        if default is False:
            shown, argument = "no", {"action": "store_true"}
        elif default is None:
            shown = "auto"
        elif isinstance(default, Path):
            argument["default"] = str(default)  # argparse converts only defaults of type str
        elif isinstance(default, Iterable) and not isinstance(default, str):
            shown = " ".join(map(str, default)) or "all"
        parser.add_argument(
            flag, **{"default": default, "help": f"{help} (default: {shown})", **argument}
        )
    parser.add_argument("--list", action="store_true", help="list the experiments and exit")
    arguments = vars(parser.parse_args())
    only_list = arguments.pop("list")
    options = dataclasses.replace(defaults, **arguments)
    known = {experiment.name: experiment for experiment in experiments(options)}
    if only_list:
        if is_first():
            show("\n".join(known))
        sys.exit()
    for name in options.experiments:
        if name not in known:
            raise UserError(f"no experiment is called {name!r}; there are: {', '.join(known)}")
    options = dataclasses.replace(options, device=_own_device(options.device))
    _check_options(options)
    folder = options.results_dir / script
    if options.tables_only and not folder.is_dir():
        raise UserError(f"{folder} has no results to make tables of: give another --results-dir")
    with user_errors(options.results_dir, "choose another --results-dir", "written to"):
        options.results_dir.mkdir(parents=True, exist_ok=True)
        TemporaryFile(dir=options.results_dir).close()
    chosen = [known[name] for name in known if name in (options.experiments or known)]
    return options, chosen


def run_sweep(
    results: Path, experiments: Sequence[Experiment], options: Options, data: DataSet
) -> None:
    """Trains every experiment with every seed, and skips finished runs.

    The folder of a run is `<results>/<experiment>/seed-<n>`.

    Ctrl-C or SIGTERM stops each run after its current `Trainer.step`, with a checkpoint. The same
    signal again ends the process at once, and each run loses at most its current epoch.

    Raises:
        UserError: before any training, if the data does not fit the networks or the batch size, or
            a run's folder cannot be resumed and `force` is not set; later, as `train_run` does.
        KeyboardInterrupt: a signal stopped the sweep, and all threads have ended.
    """
    _set_arithmetic(options)
    shared = {field.name: getattr(options, field.name) for field in dataclasses.fields(Settings)}
    folders: dict[Run, RunFolder] = {}
    for seed, experiment in product(options.seeds, experiments):
        run = Run(**shared, experiment=experiment, seed=seed, data_crc32=data.crc32)
        folder = _folder(results, experiment, seed)
        try:
            if folder.check(run.settings).finished:
                continue
        except UserError:
            if not options.force:
                raise
        folders[run] = folder
    if not folders:
        return
    if options.batch_size > len(data.train):
        raise UserError(f"--batch-size {options.batch_size} is more than {len(data.train)} images")
    networks = {run.experiment.network for run in folders}
    size = data.input_shape, data.classes
    cost = {network: network.multiply_adds(*size) for network in networks}
    longest_first = sorted(folders, key=lambda run: -cost[run.experiment.network])
    _train({run: folders[run] for run in longest_first}, options, data)


def _train(folders: Mapping[Run, RunFolder], options: Options, data: DataSet) -> None:
    """Trains the runs whose lock is free, until this and other copies have finished all runs."""
    device = torch.device(options.device)
    for split in (data.train, data.test):
        split.resident(device)  # on the device before several threads use it
    left = dict(folders)
    stop = threading.Event()
    progress = Progress(folders, options.quiet or not is_first())

    def train(run: Run, folder: RunFolder) -> None:
        try:
            if folder.check(run.settings).finished:  # another copy or thread trained it
                return
        except UserError:
            if not options.force:
                raise
            show(f"{folder.path} renamed to {folder.rename()}")
            progress.update_run(run)

        def epoch_ended(metrics: Metrics) -> None:
            if options.tensorboard:
                add_scalars(writer, metrics)
            progress.update()

        with own_stream(device):
            trainer = Trainer(run, data, device)
            with _tensorboard(folder, options) as writer:
                train_run(trainer, folder, progress.line, epoch_ended, stop.is_set)
        progress.update_run(run)

    def work() -> None:
        try:
            while left and not stop.is_set():
                for run, folder in list(left.items()):
                    with suppress(Timeout), folder.lock():  # skipped if locked elsewhere
                        if not stop.is_set():
                            train(run, folder)
                        if not stop.is_set():
                            left.pop(run, None)
                progress.update()
                if left:
                    time.sleep(SECONDS_BETWEEN_LOCKS)
        except BaseException:
            stop.set()  # an error stops the other threads' runs, as Ctrl-C does
            raise

    with closing(progress), _stopped_by_signals(stop):
        if options.at_once() == 1:
            # In the main thread: another thread would start more OpenMP threads. If OpenMP has
            # more threads than cores, they sleep between any two matrix products.
            work()
        else:
            with _threads_shared(options), ThreadPoolExecutor(options.at_once()) as pool:
                list(pool.map(lambda _: work(), range(options.at_once())))
    if stop.is_set():
        raise KeyboardInterrupt


def load_runs(
    results: Path, experiments: Sequence[Experiment], seeds: Sequence[int]
) -> dict[str, list[RunResult]]:
    """Loads `{experiment name: runs}`, one run per seed; a run that has not begun is empty.

    Raises UserError if a file cannot be read.
    """
    return {
        experiment.name: [_folder(results, experiment, seed).load() for seed in seeds]
        for experiment in experiments
    }


def is_first() -> bool:
    """Returns whether this process prints: under torchrun, only the first process does."""
    return _torchrun("RANK") in (None, "0")


def _torchrun(variable: str) -> str | None:
    """Returns an environment variable set by torchrun, or None without torchrun."""
    return os.environ[variable] if "TORCHELASTIC_RUN_ID" in os.environ else None


def _folder(results: Path, experiment: Experiment, seed: int) -> RunFolder:
    return RunFolder(results / experiment.name / f"seed-{seed}")


def _set_arithmetic(options: Options) -> None:
    """Sets PyTorch's precision, threads, device and determinism for the whole process."""
    precision = "tf32" if options.precision == "tf32" else "ieee"
    torch.backends.cuda.matmul.fp32_precision = precision
    torch.backends.cudnn.conv.fp32_precision = precision  # type: ignore[attr-defined]  # set at import
    copies = _torchrun("LOCAL_WORLD_SIZE")
    if copies and options.device == "cpu":
        # torchrun sets OMP_NUM_THREADS to 1, so PyTorch would leave cores idle.
        torch.set_num_threads(max(1, cores() // int(copies)))
    elif torch.device(options.device).index is not None:
        torch.cuda.set_device(options.device)  # else work without a named device uses cuda:0
    if options.deterministic:
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    if options.deterministic != torch.are_deterministic_algorithms_enabled():
        torch.use_deterministic_algorithms(options.deterministic)  # its imports are slow


def _tensorboard(folder: RunFolder, options: Options) -> AbstractContextManager:
    """Returns the TensorBoard writer of a run, or without the option a context manager of None."""
    if not options.tensorboard:
        return nullcontext()
    from torch.utils.tensorboard import SummaryWriter

    return SummaryWriter(folder.path / "tensorboard")


@contextmanager
def _threads_shared(options: Options) -> Iterator[None]:
    """Context manager that divides the threads of a CPU among the parallel runs."""
    threads = torch.get_num_threads()
    if options.device == "cpu":
        torch.set_num_threads(max(1, threads // options.at_once()))
    try:
        yield
    finally:
        torch.set_num_threads(threads)


@contextmanager
def _stopped_by_signals(stop: threading.Event) -> Iterator[None]:
    """Context manager: Ctrl-C or SIGTERM sets `stop`; the same signal again ends the process."""

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
    """Raises UserError for wrong usage, so that the scripts report it in one line."""

    def error(self, message: str) -> NoReturn:
        raise UserError(f"{message}; see --help")


def _own_device(name: str) -> str:
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    local_rank = _torchrun("LOCAL_RANK")
    return f"cuda:{local_rank}" if name == "cuda" and local_rank else name


def _check_options(options: Options) -> None:
    if options.epochs < 1 or options.batch_size < 2:
        raise UserError("--epochs must be at least 1 and --batch-size at least 2")
    in_range = all(0 <= seed < 2**63 for seed in options.seeds)
    if not in_range or len(set(options.seeds)) < len(options.seeds):
        raise UserError("--seeds must be distinct numbers from 0 to 2**63 - 1")
    if not re.fullmatch(r"cpu|cuda(:(0|[1-9][0-9]?))?", options.device):
        raise UserError(f"--device must be auto, cpu, cuda or cuda:N, not {options.device!r}")
    device = torch.device(options.device)
    if device.type == "cuda":
        if (device.index or 0) >= torch.cuda.device_count():
            raise UserError(
                f"--device {options.device} does not exist: PyTorch sees "
                f"{torch.cuda.device_count()} CUDA devices"
            )
        if options.at_once() > STREAMS_ON_CUDA:
            raise UserError(f"--parallel-runs must be at most {STREAMS_ON_CUDA} on CUDA")
    elif options.precision == "tf32":
        raise UserError("--precision tf32 needs a CUDA device: choose float32 or bf16")
    if options.tensorboard and find_spec("tensorboard") is None:
        raise UserError("--tensorboard needs a package: pip install tensorboard")
