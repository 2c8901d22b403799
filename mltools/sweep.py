"""What the scripts share: their options, and running experiments over seeds."""

import argparse
import dataclasses
import os
import sys
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import NoReturn

import torch
from tqdm import tqdm

from mltools.data import DATASETS, DataSet, load
from mltools.errors import UserError
from mltools.networks import PLACEMENTS
from mltools.results import RunFolder
from mltools.training import Experiment, train


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


def parse(
    script: str,
    description: str,
    experiments: Callable[[argparse.Namespace], Sequence[Experiment]],
    defaults: Options,
    more_options: Callable[[argparse.ArgumentParser], None] = lambda parser: None,
) -> tuple[Options, list[Experiment], bool]:
    """Reads the command line of a script.

    Args:
        script, description: for `--help`.
        experiments: all rows there are, given the parsed command line.
        defaults: of the common options.
        more_options: adds the script's own options.

    Returns: the common options, the rows chosen, and whether only tables are asked for. `--list`
    prints the rows and exits.

    Raises UserError for an unknown experiment or device, a number out of range, or a results folder
    that cannot be written to.
    """
    parser = _Parser(prog=script, description=description, allow_abbrev=False)

    def option(name: str, help: str, **kind) -> None:
        default = getattr(defaults, name)
        if isinstance(default, tuple):
            default = " ".join(map(str, default))
        flag = f"--{name.replace('_', '-')}"
        parser.add_argument(flag, help=f"{help} (default: {default})", **kind)

    names = ", ".join(DATASETS)
    option("dataset", f"one of {names}", choices=DATASETS, metavar="NAME")
    option("data_dir", "where the data is; what is not there is fetched", type=Path, metavar="DIR")
    option("results_dir", "where the results go", type=Path, metavar="DIR")
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
    option("device", "cpu, cuda or cuda:N")
    option(
        "feedback_placement",
        "every-layer: a feedback point before every weight layer but the first, which is DFA "
        "proper; release: the same, less the points that the 2019 release missed",
        choices=PLACEMENTS,
        metavar="PLACEMENT",
    )
    parser.set_defaults(**dataclasses.asdict(defaults))
    parser.add_argument("--tables-only", action="store_true", help="run nothing, write the tables")
    parser.add_argument("--list", action="store_true", help="list the rows and exit")
    more_options(parser)
    arguments = parser.parse_args()
    rows = experiments(arguments)
    known = {experiment.name: experiment for experiment in rows}
    if arguments.list:
        print("\n".join(known))
        sys.exit()
    for name in arguments.experiments:
        if name not in known:
            raise UserError(f"no experiment is called {name!r}; there are: {', '.join(known)}")
    values = {field.name: getattr(arguments, field.name) for field in dataclasses.fields(Options)}
    options = Options(**{**values, "seeds": tuple(arguments.seeds)})
    if options.epochs < 1 or options.batch_size < 2:
        raise UserError("--epochs must be at least 1 and --batch-size at least 2")
    in_range = all(0 <= seed < 2**63 for seed in options.seeds)
    if not in_range or len(set(options.seeds)) < len(options.seeds):
        raise UserError("--seeds takes different numbers, from 0 to 2**63 - 1")
    _check_device(options.device)
    _check_writable(options.results_dir)
    chosen = [known[name] for name in known if name in (arguments.experiments or known)]
    return options, chosen, arguments.tables_only


def run(script: str, experiments: Iterable[Experiment], options: Options) -> None:
    """Runs every experiment with every seed, those aside that are finished already.

    Raises UserError, before any training, if the data or a run's folder is not as it must be.
    """
    device = torch.device(options.device)
    # Full float32 on CUDA, as in 2019: its convolutions would otherwise round to TF32.
    torch.backends.cudnn.allow_tf32 = False
    todo = []
    for experiment in experiments:
        for seed in options.seeds:
            folder = folder_of(script, experiment.name, seed, options)
            settings = settings_of(experiment, seed, options)
            folder.check(settings)
            if not _complete(folder):
                todo.append((experiment, folder, settings))
    if not todo:
        return
    data: DataSet = load(options.dataset, options.data_dir)
    for network in {experiment.network for experiment, _, _ in todo}:
        network.build(data.input_shape, data.classes)  # says now if the images do not fit
    epochs = sum(options.epochs - len(folder.metrics()) for _, folder, _ in todo)
    report = partial(tqdm.write, file=sys.stdout)  # above the bar
    with tqdm(total=epochs, unit="epoch", disable=None, dynamic_ncols=True) as bar:
        for experiment, folder, settings in todo:
            bar.set_description(f"{experiment.name} seed {settings['seed']}")
            train(experiment, data, folder, settings, device, report, bar.update)


def folder_of(script: str, experiment: str, seed: int, options: Options) -> RunFolder:
    """The folder of one run: `<results-dir>/<script>/<experiment>/seed-<n>`."""
    return RunFolder(options.results_dir / script / experiment / f"seed-{seed}")


def settings_of(experiment: Experiment, seed: int, options: Options) -> dict:
    """What a run's results depend on; two runs with the same settings give the same results."""
    return {
        "experiment": dataclasses.asdict(experiment),
        "seed": seed,
        "dataset": options.dataset,
        "epochs": options.epochs,
        "batch_size": options.batch_size,
        "feedback_placement": options.feedback_placement,
    }


def exit_code(main: Callable[[], None]) -> int:
    """Runs a script's `main`; what the user can mend is one line on stderr, and exit code 2."""
    try:
        main()
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("interrupted: the same command goes on after the last epoch", file=sys.stderr)
        return 130
    return 0


def _complete(folder: RunFolder) -> bool:
    """Whether nothing is left to do: the last file of a run is there, or it came out of a log."""
    names = {path.name for path in folder.path.glob("*")}
    ended = "state.pt" in names or "log.txt" not in names
    return folder.finished() and ended and "checkpoint.pt" not in names


class _Parser(argparse.ArgumentParser):
    """Complains in one line, as the scripts do of everything."""

    def error(self, message: str) -> NoReturn:
        raise UserError(f"{message}; see --help")


def _check_device(name: str) -> None:
    try:
        device = torch.device(name)
    except RuntimeError:
        device = None
    if device is None or device.type not in ("cpu", "cuda"):
        raise UserError(f"--device must be cpu, cuda or cuda:N, not {name!r}")
    if device.type == "cuda" and (device.index or 0) >= torch.cuda.device_count():
        raise UserError(
            f"--device {name} is not there: PyTorch sees {torch.cuda.device_count()} CUDA devices"
        )


def _check_writable(folder: Path) -> None:
    probe = folder / f".writable.{os.getpid()}"
    try:
        folder.mkdir(parents=True, exist_ok=True)
        probe.touch()
        probe.unlink()
    except OSError as error:
        raise UserError(
            f"results cannot be written to {folder} ({error.strerror}): "
            "choose another --results-dir"
        ) from None
