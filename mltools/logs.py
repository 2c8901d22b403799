"""Logs for people, and the way back from them to metrics.

Our own `log.txt` says all that `metrics.jsonl` does, in the same precision: a line with the
settings, then for each epoch the alignment of every layer and, to end it, a line with the losses
and accuracies. The logs of the 2019 release hold the same in another form.
"""

import json
import math
import re
from dataclasses import dataclass, field
from functools import partial

Metrics = dict
"""A line of `metrics.jsonl`."""


def epoch_lines(metrics: Metrics, epochs: int) -> list[str]:
    """One epoch of `epochs` as lines of our log; the last is the summary."""

    def text(value: float | None) -> str:
        return "nan" if value is None else f"{value:.4f}"

    lines = [
        f"alignment {layer}: mean {text(cosine['mean'])} std {text(cosine['std'])}"
        for layer, cosine in metrics["alignment"].items()
    ]
    summary = (
        f"epoch {metrics['epoch']}/{epochs}: train loss {text(metrics['train_loss'])} accuracy "
        f"{text(metrics['train_accuracy'])}%, test loss {text(metrics['test_loss'])} accuracy "
        f"{text(metrics['test_accuracy'])}%, {metrics['seconds']:.3f} s"
    )
    return [*lines, summary]


@dataclass
class Run:
    """A run as its log tells it."""

    settings: dict
    """As in `config.json`, as far as the log says."""
    attempt: int = 0
    """How many runs of this experiment and seed the log holds before this one."""
    epochs: dict[int, Metrics] = field(default_factory=dict)
    """By number."""

    @property
    def name(self) -> str:
        """`<experiment>/seed-<n>`, the run's place among the results."""
        again = f"-attempt-{self.attempt + 1}" if self.attempt else ""
        seed = "unknown" if self.settings["seed"] is None else self.settings["seed"]
        return f"{self.settings['experiment']['name']}/seed-{seed}{again}"


@dataclass
class Skipped:
    """A line that seems to hold results, but is not intact."""

    line: int
    """Its number, from 1; 0 for what concerns no single line."""
    reason: str


def parse(data: bytes) -> tuple[list[Run], list[Skipped]]:
    """All runs and all their intact epochs in a log, ours or the 2019 release's.

    Anything else in it, such as progress output, is passed over; a line that is damaged costs the
    epoch that it belongs to, and no more.

    Args:
        data: the file's bytes, with line ends of any kind.

    Returns: the runs that have an epoch, in order, and what was skipped.
    """
    # Corrupt bytes become a character that no pattern below matches.
    text = _ESCAPES.sub("", data.decode("utf-8", errors="replace"))
    reader = _Reader()
    for number, line in enumerate(text.split("\n"), 1):
        for part in _PARTS.split(line):
            reader.read(number, part)
    return reader.end()


_ESCAPES = re.compile(r"\x1b\[[0-9;]*[A-Za-z]")
_compile = partial(re.compile, flags=re.ASCII)  # no digits of other scripts
_TIME = r"\d{4}-\d\d-\d\d \d\d:\d\d:\d\d "
_STAMP = _compile(rf"\s*{_TIME} ?(?:-- +)?")
# A progress bar returns to the start of its line, or stands in front of what is logged next; and
# where a process was killed within a line, the next one goes on in it.
_PARTS = _compile(rf"\r|(?={_TIME})")

_NUMBER = r"(-?\d+\.\d{4}|nan)"
_HEADING = _compile(r"([\w.-]+) seed (\d+): (\d+) epochs of ([\w.-]+) on \S+")
_SETTINGS = _compile(r"settings (\{[ -~]*\})")
_ALIGNMENT = _compile(rf"alignment ([\w.]+): mean {_NUMBER} std {_NUMBER}")
_EPOCH = _compile(
    rf"epoch (\d+)/\d+: train loss {_NUMBER} accuracy {_NUMBER}%, "
    rf"test loss {_NUMBER} accuracy {_NUMBER}%, (\d+\.\d{{3}}) s"
)

# The 2019 release's.
_LOSS = r"(\d+\.\d+(?:e-\d+)?|nan|inf)"
_SEEDING = _compile(r"Seeding with (\d+)\.")
_TRAINING = _compile(
    r"Training ([ -~]+) for (\d+) epochs on dataset ([\w.-]+) with a batch size of (\d+):"
)
_START = _compile(r"EPOCH (\d+)/(\d+)(?:, last epoch processed in (\d+\.\d+)s)?:")
_LAYER = _compile(rf"(\d+)_(\w+)\(.*\) -- mean:{_NUMBER}, std:{_NUMBER}")
_LOSSES = _compile(
    rf"Training loss: {_LOSS} \(top-1:(\d+\.\d)%\) -- "
    rf"Validation loss: {_LOSS} \(top-1:(\d+\.\d)%\)\."
)
_BOTTLENECK = _compile(r"with a bottlenecking rate ([01]\.\d+) initialized by (\w+)")
_RUN_NAME = _compile(r"\w[\w.-]*/seed-\d+")
CNN_LAYERS = (
    *("conv1", "act1", "maxp1", "conv2", "act2", "maxp2", "conv3", "act3", "maxp3"),
    *("flat", "lin1", "act4", "lin2"),
)


class _Reader:
    """Takes a log line by line; what it has learned is in `runs` and `skipped` after `end`."""

    def __init__(self) -> None:
        self.runs: dict[str, Run] = {}
        self.skipped: list[Skipped] = []
        self.run: Run | None = None  # whose lines these are
        self.heading: Run | None = None  # ours that is announced, its settings to come
        self.release = False  # whether that is a run of the 2019 release
        self.last = 0  # its last epoch so far
        self.seed: int | None = 0  # None: not legible
        self.epoch: int | None = None  # of the 2019 release, which says it first
        self.alignment: dict = {}
        self.structure: dict[str, dict[int, str]] = {}  # run: position to module, release only

    def read(self, number: int, line: str) -> None:
        line = _STAMP.sub("", line, count=1).strip()
        for start, pattern, take in (
            (r"[\w.-]+ seed \d+: \d+ epochs of ", _HEADING, self._heading),
            (r"settings \{", _SETTINGS, self._settings),
            (r"alignment ", _ALIGNMENT, self._alignment),
            (r"epoch \d", _EPOCH, self._epoch),
            (r"Seeding ", _SEEDING, self._release_seed),
            (r"Training .* epochs on ", _TRAINING, self._release_run),
            (r"EPOCH ", _START, self._release_epoch),
            (r"\d+_\w+\(", _LAYER, self._release_layer),
            (r"Training loss", _LOSSES, self._release_losses),
        ):
            if re.match(start, line):
                match = pattern.fullmatch(line)
                if not match and pattern in (_SETTINGS, _TRAINING):
                    self.run = None  # another one begins here
                if not match and pattern is _SEEDING:
                    self.seed = None
                problem = take(*match.groups()) if match else "damaged line"
                if problem:
                    self.skipped.append(Skipped(number, f"{problem}: {line[:60]}"))
                return

    def _heading(self, experiment: str, seed: str, epochs: str, dataset: str) -> None:
        settings = {
            "experiment": {"name": experiment},
            "seed": int(seed),
            "dataset": dataset,
            "epochs": int(epochs),
            "batch_size": None,
            "feedback_placement": None,
        }
        self.run, self.heading, self.alignment = None, Run(settings), {}

    def _settings(self, text: str) -> str | None:
        try:
            run = Run(json.loads(text))
            intact = _RUN_NAME.fullmatch(run.name) and isinstance(run.settings["epochs"], int)
        except (ValueError, KeyError, TypeError):
            intact = False
        if not intact:
            self.run = None
            return "damaged settings"
        self._begin_own(run)

    def _begin_own(self, run: Run) -> None:
        """Begins a run, or goes on with that of the same settings."""
        while (known := self.runs.setdefault(run.name, run)).settings != run.settings:
            run.attempt += 1
        self._begin(known, release=False)

    def _begin(self, run: Run, release: bool) -> None:
        self.run, self.release, self.last, self.heading = run, release, 0, None
        self.epoch, self.alignment = None, {}

    def _lost(self, release: bool, epoch: int) -> bool:
        """Whether this epoch cannot be the current run's: the line that began its run is lost.

        Epochs ascend; ours may come twice, when a run was killed and gone on with.
        """
        if self.run is None or self.release != release or epoch < self.last:
            self.run = None
            return True
        self.last = epoch
        return False

    def _alignment(self, layer: str, mean: str, std: str) -> None:
        self.alignment[layer] = {"mean": _value(mean), "std": _value(std)}

    def _epoch(self, epoch: str, *numbers: str) -> str | None:
        alignment, self.alignment = self.alignment, {}
        if self.run is None and self.heading:
            self._begin_own(self.heading)
            self.skipped.append(Skipped(0, f"{self.run.name}: its settings are lost"))
        if self._lost(False, int(epoch)):
            return "epoch of an unknown run"
        train_loss, train_accuracy, test_loss, test_accuracy, seconds = map(_value, numbers)
        self.run.epochs[int(epoch)] = {
            "epoch": int(epoch),
            "train_loss": train_loss,
            "train_accuracy": train_accuracy,
            "test_loss": test_loss,
            "test_accuracy": test_accuracy,
            "alignment": alignment,
            "seconds": seconds,
        }

    def _release_seed(self, seed: str) -> None:
        self.seed = int(seed)

    def _release_run(self, what: str, epochs: str, dataset: str, batch_size: str) -> None:
        bottleneck = _BOTTLENECK.fullmatch(what)
        if bottleneck:  # the rate is what is dropped, of 800
            what = f"{bottleneck[2]}-{round(800 * (1 - float(bottleneck[1])))}"
        settings = {
            "experiment": {"name": re.sub(r"[^\w.]+", "-", what.lower())},
            "seed": self.seed,
            "dataset": dataset,
            "epochs": int(epochs),
            "batch_size": int(batch_size),
            "feedback_placement": "release",
        }
        run = Run(settings)
        while run.name in self.runs and self.runs[run.name].epochs:
            run.attempt += 1
        self.runs[run.name] = run
        self._begin(run, release=True)

    def _release_epoch(self, epoch: str, _: str, seconds: str | None) -> str | None:
        self.epoch = None
        if self._lost(True, int(epoch)):
            return "epoch of an unknown run"
        self.epoch, self.alignment = int(epoch), {}
        if seconds and self.epoch - 1 in self.run.epochs:
            self.run.epochs[self.epoch - 1]["seconds"] = round(float(seconds), 3)

    def _release_layer(self, position: str, module: str, mean: str, std: str) -> str | None:
        if self.run is None or not self.release:
            return "layer of an unknown run"
        self.structure.setdefault(self.run.name, {})[int(position)] = module
        self.alignment[int(position)] = {"mean": _value(mean), "std": _value(std)}

    def _release_losses(
        self, train_loss: str, train_accuracy: str, test_loss: str, test_accuracy: str
    ) -> str | None:
        if self.run is None or self.epoch is None:
            return "losses of an unknown epoch"
        # The release divides a mean loss by the batch size.
        losses = [_value(loss) for loss in (train_loss, test_loss)]
        scale = self.run.settings["batch_size"]
        losses = [None if loss is None else round(loss * scale, 4) for loss in losses]
        self.run.epochs[self.epoch] = {
            "epoch": self.epoch,
            "train_loss": losses[0],
            "train_accuracy": float(train_accuracy),
            "test_loss": losses[1],
            "test_accuracy": float(test_accuracy),
            "alignment": self.alignment,
            "seconds": None,
        }
        self.epoch, self.alignment = None, {}

    def end(self) -> tuple[list[Run], list[Skipped]]:
        """Names the release's layers, and tells which epochs lack some."""
        runs = [run for run in self.runs.values() if run.epochs]
        for run in runs:
            names = _layer_names(self.structure.get(run.name, {}))
            for metrics in run.epochs.values():
                alignment = metrics["alignment"].items()
                metrics["alignment"] = {names.get(layer, str(layer)): c for layer, c in alignment}
            layers = dict.fromkeys(
                layer for metrics in run.epochs.values() for layer in metrics["alignment"]
            )
            for epoch, metrics in run.epochs.items():
                missing = [layer for layer in layers if layer not in metrics["alignment"]]
                if missing:
                    reason = (
                        f"{run.name}: epoch {epoch} lacks the alignment of {', '.join(missing)}"
                    )
                    self.skipped.append(Skipped(0, reason))
        return runs, self.skipped


def _layer_names(structure: dict[int, str]) -> dict[int, str]:
    """The release's modules, position to class, under our names.

    Its FC logs name each layer rightly. In its CNN logs each line carries the name of the layer
    after it, but the lines are in network order, whose names are known.
    """
    if any(module in ("Conv2d", "MaxPool2d") for module in structure.values()):
        return dict(enumerate(CNN_LAYERS)) if len(structure) == len(CNN_LAYERS) else {}
    names, block = {}, 0
    for position, module in sorted(structure.items()):
        block += module in ("Linear", "Bottleneck")
        kind = {"Linear": "lin", "Bottleneck": "lin", "BatchNorm1d": "bn", "Dropout": "drop"}
        names[position] = f"{kind.get(module, 'act')}{block}"
    return names


def _value(text: str) -> float | None:
    value = float(text)
    return value if math.isfinite(value) else None
