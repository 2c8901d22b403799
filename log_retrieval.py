"""Brings results back out of logs, when the files that held them are lost.

    python log_retrieval.py LOG [LOG ...]                  lines of metrics.jsonl, to stdout
    python log_retrieval.py LOG [LOG ...] --output DIR     DIR/<experiment>/seed-<n>/, as from a run

It reads our own log.txt and the logs of the 2019 release. With --output results/bottleneck, say,
`bottleneck.py --tables-only` and `bottleneck_from_log.py` take what comes out for the original; a
metrics.jsonl that is already there is left as it is. What was skipped is said on stderr. The exit
code is 0 if something was recovered, 1 if nothing, 2 for bad usage.
"""

import argparse
import json
import sys
from pathlib import Path

from mltools.logs import Run, parse
from mltools.results import RunFolder


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__.splitlines()[0],
        epilog="Exit code: 0 if something was recovered, 1 if nothing, 2 for bad usage.",
    )
    parser.add_argument("logs", type=Path, nargs="+", metavar="LOG", help="a log file")
    parser.add_argument("--output", type=Path, metavar="DIR", help="where the folders go")
    arguments = parser.parse_args()
    recovered = False
    for path in arguments.logs:
        try:
            runs = retrieve(path)
        except OSError as error:
            print(f"error: cannot read {path} ({error.strerror})", file=sys.stderr)
            return 2
        for run in runs:
            recovered = True
            if arguments.output is None:
                for metrics in in_order(run):
                    print(json.dumps({"run": run.name, **metrics}))
            elif restore(run, arguments.output):
                print(f"{arguments.output / run.name}: {len(run.epochs)} epochs")
            else:
                print(f"{arguments.output / run.name}: has its metrics.jsonl, left as it is")
    if not recovered:
        print("error: no epoch of any run was found", file=sys.stderr)
    return 0 if recovered else 1


def retrieve(path: Path) -> list[Run]:
    """The runs in a log; says on stderr what was skipped, and where."""
    runs, skipped = parse(path.read_bytes())
    for skip in skipped:
        place = f"{path}:{skip.line}" if skip.line else f"{path}"
        print(f"{place}: skipped, {skip.reason}", file=sys.stderr)
    return runs


def in_order(run: Run) -> list[dict]:
    return [run.epochs[epoch] for epoch in sorted(run.epochs)]


def restore(run: Run, output: Path) -> bool:
    """Writes a run's folder below `output`, unless there is one with metrics."""
    folder = RunFolder(output / run.name)
    if (folder.path / "metrics.jsonl").exists():
        return False
    folder.start(run.settings, {"retrieved": True})
    folder.write_metrics(in_order(run))
    return True


if __name__ == "__main__":
    sys.exit(main())
