"""Restores lost results from logs.

    python log_retrieval.py LOG [LOG ...]                  prints lines of metrics.jsonl, each with
                                                           its run
    python log_retrieval.py LOG [LOG ...] --output DIR     writes DIR/<experiment>/seed-<n>/

LOG is a log.txt of these scripts, or a log of the 2019 release. `bottleneck.py --tables-only` and
`bottleneck_from_log.py` use results restored to --output results/bottleneck like original results.
An existing metrics.jsonl is not changed. Skipped lines are reported on stderr. The exit code is 0
if a run was found, 1 if none was, and 2 for bad usage, an unreadable log or an unusable output.
"""

import argparse
import json
import sys

from mltools.errors import UserError, one_line, show
from mltools.logs import restore_run, retrieve_log
from mltools.results import user_path


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("logs", type=user_path, nargs="+", metavar="LOG", help="a log file")
    output_help = "the folder to write to (default: print the lines instead)"
    parser.add_argument("--output", type=user_path, metavar="DIR", help=output_help)
    arguments = parser.parse_args()
    recovered = refused = False
    for path in arguments.logs:
        try:
            for run in retrieve_log(path):
                if arguments.output:
                    restored = restore_run(run, arguments.output)
                    epochs = f"{len(run.epochs)} epochs"
                    outcome = epochs if restored else "has a metrics.jsonl, which is not changed"
                    show(f"{arguments.output / run.path}: {outcome}")
                else:
                    lines = (json.dumps({"run": run.name, **metrics}) for metrics in run.epochs)
                    if not show("\n".join(lines)):
                        return 2
                recovered = True
        except UserError as error:
            show(f"error: {error}", error=True)
            refused = True  # but continue: the next log may be intact
        except OSError as error:
            show(f"error: {error.filename}: {one_line(error)}", error=True)
            return 2
    if not (recovered or refused):
        show("error: no epoch of any run was found", error=True)
    return 2 if refused else 0 if recovered else 1


if __name__ == "__main__":
    sys.exit(main())
