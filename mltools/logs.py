"""The lines of logs, and a parser that restores results from them.

A run's `log.txt` contains the numbers of its `metrics.jsonl`. Each line names its run, so logs may
be concatenated. Logs of the 2019 release, whose format differs, are parsed as well.

    2026-11-23 16:56:17  fc-tanh seed 0: 9 epochs of Digits on cpu
    2026-11-23 16:56:17  fc-tanh seed 0: settings {"experiment": {"name": "fc-tanh", ...}, ...}
    2026-11-23 16:56:19  fc-tanh seed 0: alignment act1, epoch 1: mean 0.2670 std 0.1140
    2026-11-23 16:56:19  fc-tanh seed 0: epoch 1/9: train loss 2.1000 accuracy 21.0000%, ...
"""

import json
import re
from collections import Counter, defaultdict
from collections.abc import Iterator
from functools import partial
from itertools import pairwise
from pathlib import Path
from typing import NamedTuple

from mltools import results
from mltools.errors import UserError, one_line, show, user_errors
from mltools.results import Metrics, RunFolder, RunResult, make_metrics, rounded


def first_lines(run: str, settings: dict, device: object) -> tuple[str, str]:
    """Returns the first lines of a run, such as `fc-tanh seed 0`: its heading and its settings."""
    heading = f"{run}: {settings['epochs']} epochs of {settings['dataset']} on {device}"
    return heading, f"{run}: settings {json.dumps(settings)}"


def number_text(value: float | None, digits: int = 4) -> str:
    """Returns a number as text for a log; None becomes `nan`."""
    return "nan" if value is None else f"{value:.{digits}f}"


def epoch_lines(run: str, metrics: Metrics, epochs: int) -> list[str]:
    """Returns the lines of one epoch out of `epochs`: each layer's alignment, then a summary."""
    epoch, text = metrics["epoch"], number_text
    lines = [
        f"{run}: alignment {layer}, epoch {epoch}: mean {text(c['mean'])} std {text(c['std'])}"
        for layer, c in metrics["alignment"].items()
    ]
    train = f"train loss {text(metrics['train_loss'])} accuracy {text(metrics['train_accuracy'])}%"
    test = f"test loss {text(metrics['test_loss'])} accuracy {text(metrics['test_accuracy'])}%"
    seconds = f"{text(metrics['seconds'], 3)} s"
    return [*lines, f"{run}: epoch {epoch}/{epochs}: {train}, {test}, {seconds}"]


_compile = partial(re.compile, flags=re.ASCII)  # \d matches 0 to 9 only
_COUNT = r"(\d{1,19})"
_NUMBER = r"(-?\d+\.\d{4}|nan)"
_RUN = r"([\w.-]+ seed \d{1,19}): "
_HEADING = _compile(rf"{_RUN}{_COUNT} epochs of ([\w.-]+) on \S+")
_SETTINGS = _compile(rf"{_RUN}settings (\{{[ -~]*\}})")
_ALIGNMENT = _compile(rf"{_RUN}alignment ([\w.-]+), epoch {_COUNT}: mean {_NUMBER} std {_NUMBER}")
_SPLIT = rf"loss {_NUMBER} accuracy {_NUMBER}%"
_SUMMARY = _compile(
    rf"{_RUN}epoch {_COUNT}/{_COUNT}: train {_SPLIT}, test {_SPLIT}, (\d+\.\d{{3}}|nan) s"
)
_OURS = _compile(r"(?:^|: )(?:\d+ epochs of |settings \{|alignment |epoch \d)")  # damaged or not

# The 2019 release's lines, and our names for its modules; all other modules are activations.
_SEEDING = _compile(rf"Seeding with {_COUNT}\.")
_TRAINING = _compile(
    rf"Training ([ -~]+) for {_COUNT} epochs on dataset ([\w.-]+) with a batch size of {_COUNT}:"
)
_EPOCH = _compile(rf"EPOCH {_COUNT}/\d+(?:, last epoch processed in (\d{{1,9}}\.\d+)s)?:")
_LAYER = _compile(rf"(\d{{1,19}}_\w+)\(.*\) -- mean:{_NUMBER}, std:{_NUMBER}")
_LOSS = r"loss: (\d+\.\d+(?:e-\d+)?|nan|inf) \(top-1:(\d+\.\d)%\)"
_LOSSES = _compile(rf"Training {_LOSS} -- Validation {_LOSS}\.")
_BOTTLENECK = _compile(r"with a bottlenecking rate ([01]\.\d+) initialized by (\w+)")
_KINDS = {
    "Linear": "lin", "Bottleneck": "lin", "Conv2d": "conv", "MaxPool2d": "maxp", "Flatten": "flat",
    "BatchNorm1d": "bn", "BatchNorm2d": "bn", "Dropout": "drop", "Dropout2d": "drop",
}  # fmt: skip

# Start of a log line. A progress bar, or the incomplete line of a killed run, may precede it.
_BEGINNING = _compile(r"\r|\d{4}-\d\d-\d\d \d\d:\d\d:\d\d (?:-- +)?")


class Skipped(NamedTuple):
    """A damaged line, numbered from 1, or a gap in a run, with line number 0."""

    line: int
    reason: str


def parse_log(data: bytes) -> tuple[list[RunResult], list[Skipped]]:
    """Parses a log of ours or of the 2019 release, without its damaged lines.

    Returns: the runs with at least one epoch, and the skipped lines and gaps. A damaged line costs
    its epoch or its run's settings; without settings, a run of the release is lost. A run's path is
    `<experiment>/seed-<n>`, with `-attempt-2`, `-attempt-3`, ... for further runs of that seed.
    """
    # Colour codes are removed; corrupt bytes become a character that no pattern matches.
    text = re.sub(r"\x1b\[[0-9;]*[A-Za-z]", "", data.decode("utf-8", errors="replace"))
    runs: list[RunResult] = []
    skipped: list[Skipped] = []
    ours, release = _OwnReader(runs), _ReleaseReader(runs)
    for number, line in enumerate(text.split("\n"), 1):
        for part in map(str.strip, _BEGINNING.split(line)):
            try:
                ours.read(part)
                release.read(part)
            except (ValueError, KeyError, TypeError, RecursionError) as error:
                shown = "".join(c if c.isprintable() else "\ufffd" for c in part[:60])
                skipped.append(Skipped(number, f"{one_line(error)}: {shown}"))
    runs = [run for run in runs if run.epochs]
    attempts: Counter[Path] = Counter()
    for run in runs:
        attempts[run.path] += 1
        if attempts[run.path] > 1:
            run.path = run.path.with_name(f"{run.path.name}-attempt-{attempts[run.path]}")
        _rename_layers(run.epochs)
        skipped += [Skipped(0, f"{run.name}: {gap}") for gap in _gaps(run)]
    return runs, skipped


def retrieve_log(path: Path) -> list[RunResult]:
    """Loads the runs in a log, and reports skipped lines and gaps on stderr.

    Raises UserError if the file cannot be read.
    """
    with user_errors(path, "give the path of a log"):
        data = path.read_bytes()
    runs, skipped = parse_log(data)
    for line, reason in skipped:
        show(f"{path}{f':{line}' if line else ''}: skipped, {reason}", error=True)
    return runs


def restore_run(run: RunResult, output: Path) -> bool:
    """Writes a retrieved run to its folder below `output`; returns False if metrics exist there.

    Raises UserError if the folder contains a run with other settings, or cannot be read.
    """
    folder = RunFolder(output / run.path)
    if (folder.path / "metrics.jsonl").exists():
        return False
    there = folder.load().settings or run.settings  # `check` would refuse the lost metrics
    if differing := results.differences(there, run.settings):
        raise UserError(f"{folder.path} holds another run ({differing}): choose another --output")
    folder.start(run.settings, run.environment)
    folder.write_metrics(run.epochs)
    return True


def _gaps(run: RunResult) -> Iterator[str]:
    if run.settings["batch_size"] is None:
        yield "its settings are lost"
    for last, epoch in pairwise([0, *(metrics["epoch"] for metrics in run.epochs)]):
        if epoch == last + 2:
            yield f"epoch {last + 1} is missing"
        elif epoch > last + 2:
            yield f"epochs {last + 1} to {epoch - 1} are missing"
    layers = dict.fromkeys(layer for metrics in run.epochs for layer in metrics["alignment"])
    for metrics in run.epochs:
        missing = [layer for layer in layers if layer not in metrics["alignment"]]
        if missing:
            yield f"epoch {metrics['epoch']} lacks the alignment of {', '.join(missing)}"


class _OwnReader:
    """Parses lines of our format, and appends their runs to `runs`."""

    def __init__(self, runs: list[RunResult]) -> None:
        self.runs = runs
        self.latest: dict[str, RunResult] = {}  # by run name, such as "fc-tanh seed 0"
        self.reached: Counter[str] = Counter()  # the last epoch, by run name
        self.alignment: dict = defaultdict(lambda: defaultdict(dict))  # by run name and epoch

    def read(self, line: str) -> None:
        """Reads a line, or ignores one of another format. Raises ValueError if it is damaged."""
        if match := _HEADING.fullmatch(line):
            self._begin(_basic_settings(*match.groups()))
        elif match := _SETTINGS.fullmatch(line):  # `parse_log` drops the empty run of the heading
            settings = json.loads(match[2])
            same = (run for run in self.runs if run.settings == settings)
            self._begin(settings, next(same, None))
        elif match := _ALIGNMENT.fullmatch(line):
            name, layer, epoch, mean, std = match.groups()
            self.alignment[name][epoch][layer] = _cosine(mean, std)
        elif match := _SUMMARY.fullmatch(line):
            name, epoch, epochs, *numbers, seconds = match.groups()
            if int(epoch) > int(epochs):
                raise ValueError("damaged line")
            alignment, seconds = self.alignment[name].pop(epoch, {}), rounded(float(seconds))
            metrics = make_metrics(int(epoch), map(float, numbers), alignment, seconds)
            run = self.latest.get(name)
            if not run or int(epoch) < self.reached[name]:
                run = self._begin(_basic_settings(name, epochs, "unknown"))
            self.reached[name] = int(epoch)
            _add_epoch(run, metrics)
        elif _OURS.search(line):
            raise ValueError("damaged line")

    def _begin(self, settings: dict, run: RunResult | None = None) -> RunResult:
        """Begins a new run, or reuses `run`, because equal settings give equal numbers."""
        if run is None:
            run = _new_run(settings)
            self.runs.append(run)
        name = f"{settings['experiment']['name']} seed {settings['seed']}"
        self.latest[name], self.reached[name] = run, 0
        self.alignment.pop(name, None)  # of an epoch in which a kill ended the run
        return run


class _ReleaseReader:
    """Parses lines of the 2019 release's format, and appends their runs to `runs`."""

    def __init__(self, runs: list[RunResult]) -> None:
        self.runs = runs
        self.seed = "0"
        self.run: RunResult | None = None  # None if unknown
        self.epoch = 0
        self.layers: dict | None = None  # the epoch's alignment; None between epochs

    def read(self, line: str) -> None:
        """Reads a line, or ignores one of another format. Raises ValueError if it is damaged."""
        if line.startswith("Seeding "):
            self.seed = "None"
            (self.seed,) = _groups(_SEEDING, line)
        elif re.match("Training .* epochs on ", line):
            self.run = None
            title, epochs, dataset, batch_size = _groups(_TRAINING, line)
            if match := _BOTTLENECK.fullmatch(title):  # the rate is the masked share of 800
                title = f"{match[2]}-{round(800 * (1 - float(match[1])))}"
            name = re.sub(r"[^\w.]+", "-", title.lower()).strip("-.")
            settings = _basic_settings(f"{name} seed {self.seed}", epochs, dataset)
            settings |= {"batch_size": int(batch_size), "protocol": "release"}
            self.run, self.epoch, self.layers = _new_run(settings), 0, None
            self.runs.append(self.run)
        elif line.startswith("EPOCH "):
            self.layers = None
            epoch, seconds = _groups(_EPOCH, line)
            if self.run is None or int(epoch) < self.epoch:
                self.run = None  # its first line is lost
                raise ValueError("epoch of an unknown run")
            self.epoch, self.layers = int(epoch), {}
            if seconds and self.run.epochs and self.run.epochs[-1]["epoch"] == self.epoch - 1:
                self.run.epochs[-1]["seconds"] = round(float(seconds), 3)
        elif re.match(r"[0-9]+_\w+\(", line):
            layer, mean, std = _groups(_LAYER, line)
            if self.layers is not None:
                self.layers[layer] = _cosine(mean, std)
        elif line.startswith("Training loss"):
            texts = _groups(_LOSSES, line)
            if self.run is None or self.layers is None:
                raise ValueError("losses of an unknown epoch")
            layers, self.layers = self.layers, None
            scale = self.run.settings["batch_size"]  # the release divides its mean loss by this
            numbers = [float(text) * x for text, x in zip(texts, (scale, 1, scale, 1))]
            _add_epoch(self.run, make_metrics(self.epoch, numbers, layers, None))


def _new_run(settings: dict) -> RunResult:
    results.check_settings(settings)
    name, seed = settings["experiment"]["name"], settings["seed"]
    path = Path(name, "seed-unknown" if seed is None else f"seed-{seed}")
    return RunResult(path, settings, {"retrieved": True})


def _groups(pattern: re.Pattern, line: str) -> tuple[str, ...]:
    match = pattern.fullmatch(line)
    if match is None:
        raise ValueError("damaged line")
    return match.groups()


def _basic_settings(run: str, epochs: str, dataset: str) -> dict:
    name, _, seed = run.partition(" seed ")
    return {
        "experiment": {"name": name}, "seed": None if seed == "None" else int(seed),
        "dataset": dataset, "epochs": int(epochs), "batch_size": None, "protocol": None,
    }  # fmt: skip


def _add_epoch(run: RunResult, metrics: Metrics) -> None:
    # A killed and resumed run may log an epoch twice.
    others = [known for known in run.epochs if known["epoch"] != metrics["epoch"]]
    run.epochs = sorted([*others, metrics], key=lambda metrics: metrics["epoch"])


def _cosine(mean: str, std: str) -> dict:
    return {"mean": rounded(float(mean)), "std": rounded(float(std))}


def _rename_layers(epochs: list[Metrics]) -> None:
    """Replaces the release's layer names, such as `0_Linear`, by ours.

    In its CNN logs without dropout, each line has the name of the next layer; the first name, of a
    convolution, is missing. If a layer before the last is lost in all epochs, the numbers in our
    names are unknown, so layers are named by position.
    """
    layers = [layer.split("_", 1) for metrics in epochs for layer in metrics["alignment"]]
    if not all(len(parts) == 2 and parts[0].isdigit() for parts in layers):
        return  # they are our names
    modules = dict(sorted((int(position), module) for position, module in layers))
    kinds = [_KINDS.get(module, "act") for module in modules.values()]
    if "maxp" in kinds and "drop" not in kinds:
        kinds = ["conv", *kinds[:-1]]
    names = {}
    for position, kind in enumerate(kinds):
        linears, convolutions = (kinds[: position + 1].count(x) for x in ("lin", "conv"))
        number = linears if kind == "lin" else linears + convolutions
        names[position] = "flat" if kind == "flat" else f"{kind}{number}"
    if list(modules) != list(names):
        names = {position: str(position) for position in modules}
    for metrics in epochs:
        cosines = metrics["alignment"].items()
        metrics["alignment"] = {names[int(layer.split("_")[0])]: c for layer, c in cosines}
