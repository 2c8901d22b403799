"""Logs for people, and the way back from them to metrics.

Our own `log.txt` says all that `metrics.jsonl` does, in the same precision: a line with the
settings, then for each epoch the alignment of every layer and, to end it, a line with the losses
and accuracies. Each line ends with its checksum: the CRC-32 of its text, without the time, XOR that
of the run's settings. So it says that the line is whole, and whose it is: in a damaged line it is
that of no run.

The logs of the 2019 release hold the same in another form, without checksums: there a damaged line
is found by its form alone, and a digit that has become another one is not.
"""

import math
import re
import zlib
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from functools import partial
from itertools import pairwise

from mltools.records import Metrics, checksum, from_json, metrics_problem, settings_problem


def epoch_lines(metrics: Metrics, epochs: int) -> list[str]:
    """One epoch of `epochs` as lines of our log; the last is the summary."""

    def text(value: float | None) -> str:
        return "nan" if value is None else f"{value:.4f}"

    lines = [
        f"alignment {layer}, epoch {metrics['epoch']}: "
        f"mean {text(cosine['mean'])} std {text(cosine['std'])}"
        for layer, cosine in metrics["alignment"].items()
    ]
    summary = (
        f"epoch {metrics['epoch']}/{epochs}: train loss {text(metrics['train_loss'])} accuracy "
        f"{text(metrics['train_accuracy'])}%, test loss {text(metrics['test_loss'])} accuracy "
        f"{text(metrics['test_accuracy'])}%, {metrics['seconds']:.3f} s"
    )
    return [*lines, summary]


def sealed(line: str, run: int) -> str:
    """A line of our log with its checksum; `run` is that of the run's settings."""
    return f"{line} #{zlib.crc32(line.encode()) ^ run:08x}"


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

    def add(self, metrics: Metrics) -> str | None:
        """Takes an epoch, or says what is wrong with it."""
        problem = metrics_problem(metrics)
        if problem:
            return f"damaged line ({problem})"
        self.epochs[metrics["epoch"]] = metrics
        return None


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
    runs: list[Run] = []
    skipped: list[Skipped] = []
    readers = _OwnReader(runs), _ReleaseReader(runs)
    for number, line in enumerate(text.split("\n"), 1):
        for part in _PARTS.split(line):
            part = _STAMP.sub("", part, count=1).strip()
            for reader in readers:
                problem = reader.read(part)
                if problem:
                    shown = "".join(c if c.isprintable() else "\ufffd" for c in part[:60])
                    skipped.append(Skipped(number, f"{problem}: {shown}"))
    runs = [run for run in runs if run.epochs]
    _count_attempts(runs)
    for reader in readers:
        skipped += [Skipped(0, reason) for reason in reader.end()]
    skipped += [Skipped(0, f"{run.name}: {gap}") for run in runs for gap in _gaps(run)]
    return runs, skipped


def _count_attempts(runs: list[Run]) -> None:
    seen: Counter[str] = Counter()
    for run in runs:
        name = run.name
        run.attempt = seen[name]
        seen[name] += 1


def _gaps(run: Run) -> Iterator[str]:
    """What an intact log would have beside."""
    for before, after in pairwise([0, *sorted(run.epochs)]):
        if after > before + 2:
            yield f"epochs {before + 1} to {after - 1} are missing"
        elif after > before + 1:
            yield f"epoch {before + 1} is missing"
    layers = dict.fromkeys(x for metrics in run.epochs.values() for x in metrics["alignment"])
    for epoch, metrics in run.epochs.items():
        missing = [layer for layer in layers if layer not in metrics["alignment"]]
        if missing:
            yield f"epoch {epoch} lacks the alignment of {', '.join(missing)}"


_ESCAPES = re.compile(r"\x1b\[[0-9;]*[A-Za-z]")
_compile = partial(re.compile, flags=re.ASCII)  # no digits of other scripts
_TIME = r"\d{4}-\d\d-\d\d \d\d:\d\d:\d\d "
_STAMP = _compile(rf"\s*{_TIME} ?(?:-- +)?")
# A progress bar returns to the start of its line, or stands in front of what is logged next; and
# where a process was killed within a line, the next one goes on in it.
_PARTS = _compile(rf"\r|(?={_TIME})")

_COUNT = r"(\d{1,19})"
_NUMBER = r"(-?\d+\.\d{4}|nan)"
_SEALED = _compile(r"(.*) #([0-9a-f]{8})")
_OWN = _compile(r"[\w.-]+ seed \d+: \d+ epochs of |settings \{|alignment |epoch \d")
_HEADING = _compile(rf"([\w.-]+) seed {_COUNT}: {_COUNT} epochs of ([\w.-]+) on \S+")
_SETTINGS = _compile(r"settings (\{[ -~]*\})")
_ALIGNMENT = _compile(rf"alignment ([\w.-]+), epoch {_COUNT}: mean {_NUMBER} std {_NUMBER}")
_EPOCH = _compile(
    rf"epoch {_COUNT}/\d+: train loss {_NUMBER} accuracy {_NUMBER}%, "
    rf"test loss {_NUMBER} accuracy {_NUMBER}%, (\d+\.\d{{3}}) s"
)

# The 2019 release's.
_LOSS = r"(\d+\.\d+(?:e-\d+)?|nan|inf)"
_SEEDING = _compile(rf"Seeding with {_COUNT}\.")
_TRAINING = _compile(
    rf"Training ([ -~]+) for {_COUNT} epochs on dataset ([\w.-]+) with a batch size of {_COUNT}:"
)
_START = _compile(rf"EPOCH {_COUNT}/\d+(?:, last epoch processed in (\d{{1,9}}\.\d+)s)?:")
_LAYER = _compile(rf"{_COUNT}_(\w+)\(.*\) -- mean:{_NUMBER}, std:{_NUMBER}")
_LOSSES = _compile(
    rf"Training loss: {_LOSS} \(top-1:(\d+\.\d)%\) -- "
    rf"Validation loss: {_LOSS} \(top-1:(\d+\.\d)%\)\."
)
_BOTTLENECK = _compile(r"with a bottlenecking rate ([01]\.\d+) initialized by (\w+)")
LAYER_KINDS = {
    "Linear": "lin",
    "Bottleneck": "lin",
    "Conv2d": "conv",
    "MaxPool2d": "maxp",
    "BatchNorm1d": "bn",
    "BatchNorm2d": "bn",
    "Dropout": "drop",
    "Dropout2d": "drop",
    "Flatten": "flat",
}
"""The release's module classes under our names; the others are activations."""


class _OwnReader:
    """Takes a log of ours line by line, and adds its runs to `runs`.

    Runs are known by the checksum of their settings, which every line is checked against.
    """

    def __init__(self, runs: list[Run]) -> None:
        self.runs = runs
        self.known: dict[int, Run] = {}
        self.announced: set[int] = set()  # by their heading, without their settings so far
        self.alignment: dict[tuple[int, str], dict] = {}  # (run, epoch): layers

    def read(self, line: str) -> str | None:
        """Takes a line, or says what is wrong with it."""
        intact = _SEALED.fullmatch(line)
        if not intact:
            return "damaged line" if _OWN.match(line) else None
        text, seal = intact.groups()
        run = int(seal, 16) ^ zlib.crc32(text.encode())
        take: Callable[..., str | None]  # given the run and the groups of a pattern
        for pattern, take in ((_HEADING, self._heading), (_SETTINGS, self._settings)):
            if match := pattern.fullmatch(text):
                return take(run, *match.groups())
        if run not in self.known:
            return "damaged line, or of an unknown run"
        for pattern, take in ((_ALIGNMENT, self._alignment), (_EPOCH, self._epoch)):
            if match := pattern.fullmatch(text):
                return take(run, *match.groups())
        return None

    def _heading(
        self, run: int, experiment: str, seed: str, epochs: str, dataset: str
    ) -> str | None:
        if run in self.known:
            return None
        settings = {
            "experiment": {"name": experiment},
            "seed": int(seed),
            "dataset": dataset,
            "epochs": int(epochs),
            "batch_size": None,
            "feedback_placement": None,
        }
        if settings_problem(settings):
            return "damaged line"
        # Were this line damaged, `run` would be that of no other line.
        self.announced.add(run)
        self._begin(run, settings)
        return None

    def _settings(self, run: int, text: str) -> str | None:
        try:
            settings = from_json(text)
        except ValueError:
            return "damaged settings"
        if settings_problem(settings) or "experiment" not in settings or checksum(settings) != run:
            return "damaged settings"
        if run not in self.known:
            self._begin(run, settings)
        self.known[run].settings = settings
        self.announced.discard(run)
        return None

    def _begin(self, run: int, settings: dict) -> None:
        self.known[run] = Run(settings)
        self.runs.append(self.known[run])

    def _alignment(self, run: int, layer: str, epoch: str, mean: str, std: str) -> None:
        layers = self.alignment.setdefault((run, epoch), {})
        if layer in layers:  # the run was killed in this epoch, and has come to it again
            layers.clear()
        layers[layer] = {"mean": _value(mean), "std": _value(std)}

    def _epoch(self, run: int, epoch: str, *numbers: str) -> str | None:
        train_loss, train_accuracy, test_loss, test_accuracy, seconds = map(_value, numbers)
        return self.known[run].add(
            {
                "epoch": int(epoch),
                "train_loss": train_loss,
                "train_accuracy": train_accuracy,
                "test_loss": test_loss,
                "test_accuracy": test_accuracy,
                "alignment": self.alignment.pop((run, epoch), {}),
                "seconds": seconds,
            }
        )

    def end(self) -> list[str]:
        """What is wrong with the log as a whole."""
        lost = [self.known[run] for run in self.announced if self.known[run].epochs]
        return [f"{run.name}: its settings are lost" for run in lost]


class _ReleaseReader:
    """Takes a log of the 2019 release line by line, and adds its runs to `runs`."""

    def __init__(self, runs: list[Run]) -> None:
        self.runs = runs
        self.run: Run | None = None  # whose lines these are
        self.last = 0  # its last epoch so far
        self.seed: int | None = 0  # None: not legible
        self.epoch: int | None = None  # whose lines these are: it is said first
        self.alignment: dict = {}
        self.structure: list[tuple[Run, dict[int, str]]] = []  # position to module

    def read(self, line: str) -> str | None:
        """Takes a line, or says what is wrong with it."""
        for start, pattern, take in (
            (r"Seeding ", _SEEDING, self._seed),
            (r"Training .* epochs on ", _TRAINING, self._run),
            (r"EPOCH ", _START, self._epoch),
            (r"\d+_\w+\(", _LAYER, self._layer),
            (r"Training loss", _LOSSES, self._losses),
        ):
            if re.match(start, line):
                match = pattern.fullmatch(line)
                if not match and pattern is _TRAINING:
                    self.run = None  # another one begins here
                if not match and pattern is _SEEDING:
                    self.seed = None
                return take(*match.groups()) if match else "damaged line"
        return None

    def _seed(self, seed: str) -> None:
        self.seed = int(seed)

    def _run(self, what: str, epochs: str, dataset: str, batch_size: str) -> str | None:
        bottleneck = _BOTTLENECK.fullmatch(what)
        if bottleneck:  # the rate is what is dropped, of 800
            what = f"{bottleneck[2]}-{round(800 * (1 - float(bottleneck[1])))}"
        settings = {
            "experiment": {"name": re.sub(r"[^\w.]+", "-", what.lower()).strip("-.")},
            "seed": self.seed,
            "dataset": dataset,
            "epochs": int(epochs),
            "batch_size": int(batch_size),
            "feedback_placement": "release",
        }
        self.run = self.epoch = None
        problem = settings_problem(settings)
        if problem:
            return f"damaged line ({problem})"
        self.run, self.last, self.alignment = Run(settings), 0, {}
        self.runs.append(self.run)
        self.structure.append((self.run, {}))
        return None

    def _epoch(self, epoch: str, seconds: str | None) -> str | None:
        self.epoch = None
        # Epochs ascend: otherwise the line that began this one's run is lost.
        if self.run is None or int(epoch) < self.last:
            self.run = None
            return "epoch of an unknown run"
        self.last = self.epoch = int(epoch)
        self.alignment = {}
        if seconds and self.epoch - 1 in self.run.epochs:
            self.run.epochs[self.epoch - 1]["seconds"] = round(float(seconds), 3)
        return None

    def _layer(self, position: str, module: str, mean: str, std: str) -> str | None:
        if self.run is None:
            return "layer of an unknown run"
        self.structure[-1][1][int(position)] = module
        self.alignment[int(position)] = {"mean": _value(mean), "std": _value(std)}
        return None

    def _losses(
        self, train_loss: str, train_accuracy: str, test_loss: str, test_accuracy: str
    ) -> str | None:
        if self.run is None or self.epoch is None:
            return "losses of an unknown epoch"
        # The release divides a mean loss by the batch size.
        losses = [_value(loss) for loss in (train_loss, test_loss)]
        scale = self.run.settings["batch_size"]
        losses = [None if loss is None else round(loss * scale, 4) for loss in losses]
        metrics = {
            "epoch": self.epoch,
            "train_loss": losses[0],
            "train_accuracy": float(train_accuracy),
            "test_loss": losses[1],
            "test_accuracy": float(test_accuracy),
            "alignment": {str(position): cosine for position, cosine in self.alignment.items()},
            "seconds": None,
        }
        self.epoch, self.alignment = None, {}
        return self.run.add(metrics)

    def end(self) -> list[str]:
        """Names the layers, once all are known; nothing is wrong with the log as a whole."""
        for run, structure in self.structure:
            names = _layer_names(structure)
            for metrics in run.epochs.values():
                alignment = metrics["alignment"].items()
                metrics["alignment"] = {names.get(int(at), at): c for at, c in alignment}
        return []


def _layer_names(structure: dict[int, str]) -> dict[int, str]:
    """The release's modules, position to class, under our names.

    In its CNN logs without dropout, each line carries the name of the next layer, and no line the
    name of the first layer, a convolution. The names in its FC logs are right as they stand, and so
    are those in its logs of a CNN with dropout.

    Returns no names where a line before the last is lost: the others' numbers are not known then.
    """
    if sorted(structure) != list(range(len(structure))):
        return {}
    modules = [module for _, module in sorted(structure.items())]
    if "MaxPool2d" in modules and not any(module.startswith("Dropout") for module in modules):
        modules = ["Conv2d", *modules[:-1]]
    names: dict[int, str] = {}
    blocks = linears = 0
    for position, module in zip(sorted(structure), modules):
        kind = LAYER_KINDS.get(module, "act")
        blocks += kind in ("conv", "lin")
        linears += kind == "lin"
        number = {"lin": linears, "flat": ""}.get(kind, blocks)
        names[position] = f"{kind}{number}"
    return names


def _value(text: str) -> float | None:
    value = float(text)
    return value if math.isfinite(value) else None
