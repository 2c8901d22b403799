"""What is kept as JSON, `config.json` and `metrics.jsonl`: its checksums, and what it must hold.

The last key of a record, `crc32`, is the CRC-32 of the rest as `json.dumps` writes it, in 8
hexadecimal digits. In `metrics.jsonl` it goes on from that of the line before, and in the first
line from that of the run's settings: a line that is lost, moved or another run's is found as well.
"""

import json
import re
import reprlib
import sys
import zlib
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import NoReturn

Metrics = dict
"""A line of `metrics.jsonl`."""


def checksum(record: object, start: int = 0) -> int:
    """The CRC-32 of a record's JSON, going on from `start`."""
    return zlib.crc32(json.dumps(record).encode(), start)


def sealed(record: dict, start: int = 0) -> dict:
    """The record with its checksum."""
    return {**record, "crc32": f"{checksum(record, start):08x}"}


def sealed_metrics(epochs: Iterable[Metrics], start: int) -> Iterator[dict]:
    """The lines of a whole `metrics.jsonl`; `start` is the checksum of the run's settings."""
    for metrics in epochs:
        yield sealed(metrics, start)
        start = checksum(metrics, start)


def unsealed(text: bytes, start: int = 0) -> dict:
    """The record without its checksum. Raises ValueError if it is damaged."""
    record = from_json(text.decode("utf-8"))
    said = record.pop("crc32", "missing")
    if said != f"{checksum(record, start):08x}":
        raise ValueError("its checksum is " + ("missing" if said == "missing" else "wrong"))
    return record


def from_json(text: str) -> dict:
    """A JSON object, and none of what Python takes for JSON beside. Raises ValueError."""
    try:
        record = json.loads(text, object_pairs_hook=_object, parse_constant=_no_number)
    except RecursionError:
        raise ValueError("it is nested too deep") from None
    if not isinstance(record, dict):
        raise ValueError("it is no JSON object")
    return record


def _object(pairs: list[tuple[str, object]]) -> dict:
    record = dict(pairs)
    if len(record) < len(pairs):
        raise ValueError("a key is there twice")
    return record


def _no_number(constant: str) -> NoReturn:
    raise ValueError(f"{constant} is no JSON")


# What the keys of a record hold.

Rule = Callable[[object], bool]
NAME = re.compile(r"\w[\w.-]{0,99}", re.ASCII)


def _number(low: float, high: float) -> Rule:
    return lambda value: (type(value) is int or type(value) is float) and low <= value <= high


def _whole(low: int, high: int) -> Rule:
    return lambda value: type(value) is int and low <= value <= high


def _name(value: object) -> bool:
    return isinstance(value, str) and NAME.fullmatch(value) is not None


def _or_null(rule: Rule) -> Rule:
    return lambda value: value is None or rule(value)


def _plain(value: object, depth: int = 6) -> bool:
    """Whether it can be printed on one line, and is nested no deeper."""
    if isinstance(value, dict):
        return depth > 0 and all(_plain(x, depth - 1) for x in (*value, *value.values()))
    if isinstance(value, list):
        return depth > 0 and all(_plain(x, depth - 1) for x in value)
    return not isinstance(value, str) or value.isprintable()


def _cosines(value: object) -> bool:
    return isinstance(value, dict) and all(
        _name(layer) and isinstance(cosine, dict) and not _problem(cosine, COSINE)
        for layer, cosine in value.items()
    )


COSINE = {"mean": _or_null(_number(-1, 1)), "std": _or_null(_number(0, 2))}
METRICS = {
    "epoch": _whole(1, 10**9),
    "train_loss": _or_null(_number(0, sys.float_info.max)),
    "train_accuracy": _or_null(_number(0, 100)),
    "test_loss": _or_null(_number(0, sys.float_info.max)),
    "test_accuracy": _or_null(_number(0, 100)),
    "alignment": _cosines,
    "seconds": _or_null(_number(0, sys.float_info.max)),
}
SETTINGS = {
    "experiment": lambda value: isinstance(value, dict) and _name(value.get("name")),
    "seed": _or_null(_whole(0, 2**63 - 1)),
    "dataset": _name,
    "epochs": _whole(1, 10**9),
    "batch_size": _or_null(_whole(1, 10**9)),
    "feedback_placement": _or_null(_name),
}
OPTIONAL = ("experiment", "alignment", "seconds")


def _problem(record: dict, rules: Mapping[str, Rule]) -> str | None:
    for key, rule in rules.items():
        if key not in record and key not in OPTIONAL:
            return f"{key} is missing"
        if key in record and not rule(record[key]):
            return f"{key} is {reprlib.repr(record[key])}"
    return None


def metrics_problem(metrics: Metrics) -> str | None:
    """What is wrong with a line of `metrics.jsonl`, in a few words."""
    problem = _problem(metrics, METRICS)
    if not problem and not diverged(metrics):
        lost = [key for key in ("train_accuracy", "test_accuracy") if metrics[key] is None]
        problem = f"{lost[0]} is None" if lost else None
    return problem


def settings_problem(settings: object) -> str | None:
    """What is wrong with the settings of `config.json`, in a few words."""
    if not isinstance(settings, dict) or not _plain(settings):
        return "its settings are none"
    return _problem(settings, SETTINGS)


def differences(there: dict, asked: dict) -> str:
    """What differs between the settings of two runs, in a few words; nothing if they are equal."""
    there, asked = _flat(there), _flat(asked)
    return "; ".join(
        f"{key} is {there.get(key)!r} there, now {asked.get(key)!r}"
        for key in sorted({*there, *asked})
        if there.get(key) != asked.get(key)
    )


def _flat(nested: dict, prefix: str = "") -> dict:
    flat = {}
    for key, value in nested.items():
        if isinstance(value, dict):
            flat.update(_flat(value, f"{prefix}{key}."))
        else:
            flat[prefix + key] = value
    return flat


def diverged(metrics: Metrics) -> bool:
    """Whether this epoch ended with a loss that is no number."""
    return metrics["train_loss"] is None or metrics["test_loss"] is None
