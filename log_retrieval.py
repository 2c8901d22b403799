"""Brings results back out of logs, when the files that held them are lost.

    python log_retrieval.py LOG [LOG ...]                  lines of metrics.jsonl, to stdout,
                                                           each with its run
    python log_retrieval.py LOG [LOG ...] --output DIR     DIR/<experiment>/seed-<n>/, as from a run

It reads our own log.txt and the logs of the 2019 release. With --output results/bottleneck, say,
`bottleneck.py --tables-only` and `bottleneck_from_log.py` take what comes out for the original; a
metrics.jsonl that is already there is left as it is. What was skipped is said on stderr. The exit
code is 0 if something was recovered, 1 if nothing, 2 for bad usage, for a log that cannot be read,
or for a stdout that cannot be written to.
"""

import argparse
import json
import sys
from pathlib import Path

from mltools.errors import UserError, one_line, show
from mltools.files import reading, user_path
from mltools.logs import Run, parse
from mltools.records import checksum, sealed_metrics
from mltools.results import RunFolder


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("logs", type=user_path, nargs="+", metavar="LOG", help="a log file")
    parser.add_argument(
        "--output",
        type=user_path,
        metavar="DIR",
        help="where the folders go (default: lines to stdout instead)",
    )
    arguments = parser.parse_args()
    recovered = refused = False
    for path in arguments.logs:
        try:
            for run in retrieve(path):
                if not _put(run, arguments.output):
                    return 2
                recovered = True
        except UserError as error:
            show(f"error: {error}", error=True)
            refused = True  # the next log may be a good one
        except OSError as error:
            show(f"error: {error.filename}: {one_line(error)}", error=True)
            return 2
    if not (recovered or refused):
        show("error: no epoch of any run was found", error=True)
    return 2 if refused else 0 if recovered else 1


def _put(run: Run, output: Path | None) -> bool:
    """Restores a run below `output` and says so, or prints its lines; False if these are lost."""
    if output is None:
        lines = sealed_metrics(in_order(run), checksum(run.settings))
        return show("\n".join(json.dumps({"run": run.name, **line}) for line in lines))
    restored = restore(run, output)
    said = f"{len(run.epochs)} epochs" if restored else "has its metrics.jsonl, left as it is"
    show(f"{output / run.name}: {said}")
    return True


def retrieve(path: Path) -> list[Run]:
    """The runs in a log; says on stderr what was skipped, and where.

    Raises UserError if the file cannot be read.
    """
    with reading(path, "give the path of a log"):
        data = path.read_bytes()
    runs, skipped = parse(data)
    for skip in skipped:
        place = f"{path}:{skip.line}" if skip.line else f"{path}"
        show(f"{place}: skipped, {skip.reason}", error=True)
    return runs


def in_order(run: Run) -> list[dict]:
    return [run.epochs[epoch] for epoch in sorted(run.epochs)]


def restore(run: Run, output: Path) -> bool:
    """Writes a run's folder below `output`, unless there is one with metrics.

    Raises UserError if it is that of other settings.
    """
    folder = RunFolder(output / run.name)
    if (folder.path / "metrics.jsonl").exists():
        return False
    folder.check(run.settings)
    folder.start(run.settings, {"retrieved": True})
    folder.write_metrics(in_order(run))
    return True


if __name__ == "__main__":
    sys.exit(main())
