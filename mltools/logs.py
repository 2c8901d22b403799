"""The lines of logs, and the way back from them to results.

A run's `log.txt` has the numbers of its `metrics.jsonl`. Each line names its run, so logs may be
concatenated. The logs of the 2019 release, in another format, can be parsed as well.

    2026-11-23 16:56:17  fc-tanh seed 0: 9 epochs of Digits on cpu
    2026-11-23 16:56:17  fc-tanh seed 0: settings {"experiment": {"name": "fc-tanh", ...}, ...}
    2026-11-23 16:56:19  fc-tanh seed 0: alignment act1, epoch 1: mean 0.2670 std 0.1140
    2026-11-23 16:56:19  fc-tanh seed 0: epoch 1/9: train loss 2.1000 accuracy 21.0000%, ...
"""

import json
import math
import re
from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from functools import partial
from itertools import pairwise
from pathlib import Path

from mltools import results
from mltools.errors import UserError, one_line, reading, show
from mltools.results import Metrics, RunFolder, RunResult


def heading(run: str, epochs: int, dataset: str, device: object) -> str:
    """Returns the line that begins a run; `run` is its name, such as `fc-tanh seed 0`."""
    return f"{run}: {epochs} epochs of {dataset} on {device}"


def settings_line(run: str, settings: dict) -> str:
    """Returns the line that has all settings of a run."""
    return f"{run}: settings {json.dumps(settings)}"


def number_text(value: float | None, digits: int = 4) -> str:
    """Returns a number as in logs; None is `nan`."""
    return "nan" if value is None else f"{value:.{digits}f}"


def epoch_lines(run: str, metrics: Metrics, epochs: int) -> list[str]:
    """Returns the lines of one epoch of `epochs`; the last one is the summary."""
    epoch, text = metrics["epoch"], number_text
    lines = [
        f"{run}: alignment {layer}, epoch {epoch}: mean {text(c['mean'])} std {text(c['std'])}"
        for layer, c in metrics["alignment"].items()
    ]
    train = f"train loss {text(metrics['train_loss'])} accuracy {text(metrics['train_accuracy'])}%"
    test = f"test loss {text(metrics['test_loss'])} accuracy {text(metrics['test_accuracy'])}%"
    seconds = f"{text(metrics['seconds'], 3)} s"
    return [*lines, f"{run}: epoch {epoch}/{epochs}: {train}, {test}, {seconds}"]


_compile = partial(re.compile, flags=re.ASCII)  # no digits of other scripts
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
_OURS = _compile(r"(?:^|: )(?:\d+ epochs of |settings \{|alignment |epoch \d)")  # or damaged

# The 2019 release's lines, and our names of its modules, of which the others are activations.
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

# Where a line begins, though it may stand behind a progress bar, or a line that a kill has torn.
_BEGINNING = _compile(r"\r|\d{4}-\d\d-\d\d \d\d:\d\d:\d\d (?:-- +)?")


@dataclass
class Skipped:
    """A damaged line, by its number from 1, or a gap in a run, whose number is 0."""

    line: int
    reason: str


def parse_log(data: bytes) -> tuple[list[RunResult], list[Skipped]]:
    """Parses a log of ours or of the 2019 release; a damaged line costs no more than its epoch.

    Returns: the runs that have an epoch, and the skipped lines and gaps. The path of a run is
    `<experiment>/seed-<n>`, with `-attempt-<k>` from the second run of that experiment and seed on.
    """
    # Colours are removed; corrupt bytes become a character that no pattern matches.
    text = re.sub(r"\x1b\[[0-9;]*[A-Za-z]", "", data.decode("utf-8", errors="replace"))
    reader, skipped = _Reader(), []
    for number, line in enumerate(text.split("\n"), 1):
        for part in map(str.strip, _BEGINNING.split(line)):
            try:
                reader.read(part)
                reader.read_release(part)
            except (ValueError, KeyError, TypeError, RecursionError) as error:
                shown = "".join(c if c.isprintable() else "\ufffd" for c in part[:60])
                skipped.append(Skipped(number, f"{one_line(error)}: {shown}"))
    runs: list[RunResult] = []
    for run in (run for run in reader.runs if run.epochs):
        same = [known for known in runs if known.settings == run.settings]
        if same and id(run) in reader.described:  # it began again, and has the same numbers
            epochs = {metrics["epoch"]: metrics for metrics in same[0].epochs + run.epochs}
            same[0].epochs = [epochs[number] for number in sorted(epochs)]
        else:
            runs.append(run)
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
    with reading(path, "give the path of a log"):
        data = path.read_bytes()
    runs, skipped = parse_log(data)
    for skip in skipped:
        place = f"{path}:{skip.line}" if skip.line else path
        show(f"{place}: skipped, {skip.reason}", error=True)
    return runs


def restore_run(run: RunResult, output: Path) -> bool:
    """Writes the folder of a retrieved run below `output`; returns False if it has metrics already.

    Raises UserError if the folder holds a run with other settings, or cannot be read.
    """
    folder = RunFolder(output / run.path)
    if (folder.path / "metrics.jsonl").exists():
        return False
    there = folder.load().settings or run.settings  # `check` refuses a run without its metrics
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


class _Reader:
    """Collects runs from lines."""

    def __init__(self) -> None:
        self.runs: list[RunResult] = []
        self.described: set[int] = set()  # the id of each run whose line of settings was read
        self.latest: dict[str, RunResult] = {}  # the last run that is called, say, "fc-tanh seed 0"
        self.alignment: dict = defaultdict(lambda: defaultdict(dict))  # by that name and the epoch
        # The state of the 2019 release's lines; a run is None where it is unknown.
        self.seed = "0"
        self.run: RunResult | None = None
        self.epoch = 0
        self.layers: dict | None = None  # the alignment; None outside of an epoch

    def read(self, line: str) -> None:
        """Reads a line of our format. Raises ValueError if it is damaged."""
        if match := _HEADING.fullmatch(line):
            self._begin(_basic_settings(*match.groups()))
            self.alignment.pop(match[1], None)  # of an epoch in which an earlier run was killed
        elif match := _SETTINGS.fullmatch(line):  # the heading's run is dropped: it has no epochs
            self.described.add(id(self._begin(json.loads(match[2]))))
            self.alignment.pop(match[1], None)
        elif match := _ALIGNMENT.fullmatch(line):
            name, layer, epoch, mean, std = match.groups()
            self.alignment[name][epoch][layer] = {"mean": _value(mean), "std": _value(std)}
        elif match := _SUMMARY.fullmatch(line):
            name, epoch, epochs, *texts = match.groups()
            run = self.latest.get(name)
            if not run or (run.epochs and int(epoch) < run.epochs[-1]["epoch"]):
                run = self._begin(_basic_settings(name, epochs, "unknown"))
            _add_epoch(run, int(epoch), map(_value, texts), self.alignment[name].pop(epoch, {}))
        elif _OURS.search(line):
            raise ValueError("damaged line")

    def read_release(self, line: str) -> None:
        """Reads a line of the release's format. Raises ValueError if it is damaged."""
        if line.startswith("Seeding "):
            self.seed = "None"
            (self.seed,) = _groups(_SEEDING, line)
        elif re.match("Training .* epochs on ", line):
            self.run = None
            title, epochs, dataset, batch_size = _groups(_TRAINING, line)
            if match := _BOTTLENECK.fullmatch(title):  # with the share of 800 that is dropped
                title = f"{match[2]}-{round(800 * (1 - float(match[1])))}"
            name = re.sub(r"[^\w.]+", "-", title.lower()).strip("-.")
            settings = _basic_settings(f"{name} seed {self.seed}", epochs, dataset)
            settings |= {"batch_size": int(batch_size), "feedback_placement": "release"}
            self.run, self.epoch, self.layers = self._begin(settings), 0, None
        elif line.startswith("EPOCH "):
            self.layers = None
            epoch, seconds = _groups(_EPOCH, line)
            if self.run is None or int(epoch) < self.epoch:
                self.run = None  # the line that begins it is lost
                raise ValueError("epoch of an unknown run")
            self.epoch, self.layers = int(epoch), {}
            if seconds and self.run.epochs and self.run.epochs[-1]["epoch"] == self.epoch - 1:
                self.run.epochs[-1]["seconds"] = round(float(seconds), 3)
        elif re.match(r"[0-9]+_\w+\(", line):
            layer, mean, std = _groups(_LAYER, line)
            if self.layers is not None:
                self.layers[layer] = {"mean": _value(mean), "std": _value(std)}
        elif line.startswith("Training loss"):
            texts = _groups(_LOSSES, line)
            if self.run is None or self.layers is None:
                raise ValueError("losses of an unknown epoch")
            layers, self.layers = self.layers, None
            scale = self.run.settings["batch_size"]  # the release divides a mean loss by it
            texts, scales = (*texts, "nan"), (scale, 1, scale, 1, 1)
            _add_epoch(self.run, self.epoch, map(_value, texts, scales), layers)

    def _begin(self, settings: dict) -> RunResult:
        results.check_settings(settings)
        name, seed = settings["experiment"]["name"], settings["seed"]
        path = Path(name, "seed-unknown" if seed is None else f"seed-{seed}")
        run = RunResult(path, settings, {"retrieved": True})
        self.runs.append(run)
        self.latest[f"{name} seed {seed}"] = run
        return run


def _groups(pattern: re.Pattern, line: str) -> tuple[str, ...]:
    match = pattern.fullmatch(line)
    if match is None:
        raise ValueError("damaged line")
    return match.groups()


def _basic_settings(run: str, epochs: str, dataset: str) -> dict:
    name, _, seed = run.partition(" seed ")
    return {
        "experiment": {"name": name}, "seed": None if seed == "None" else int(seed),
        "dataset": dataset, "epochs": int(epochs), "batch_size": None, "feedback_placement": None,
    }  # fmt: skip


def _add_epoch(run: RunResult, epoch: int, numbers: Iterable, alignment: dict) -> None:
    train_loss, train_accuracy, test_loss, test_accuracy, seconds = numbers
    metrics = {
        "epoch": epoch, "train_loss": train_loss, "train_accuracy": train_accuracy,
        "test_loss": test_loss, "test_accuracy": test_accuracy,
        "alignment": alignment, "seconds": seconds,
    }  # fmt: skip
    results.check_metrics(metrics)
    if run.epochs and run.epochs[-1]["epoch"] == epoch:
        run.epochs.pop()  # a killed run repeats an epoch
    run.epochs.append(metrics)


def _value(text: str, scale: int = 1) -> float | None:
    value = float(text) * scale
    return round(value, 4) if math.isfinite(value) else None


def _rename_layers(epochs: list[Metrics]) -> None:
    """Replaces the release's names of layers, such as `0_Linear`, by ours.

    In its CNN logs without dropout, each line has the name of the next layer, and no line that of
    the first, a convolution. Where a line before the last is lost in all epochs, the numbers in our
    names cannot be known, so layers are named by position.
    """
    layers = [layer.split("_", 1) for metrics in epochs for layer in metrics["alignment"]]
    if not all(len(parts) == 2 and parts[0].isdigit() for parts in layers):
        return  # our names
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
