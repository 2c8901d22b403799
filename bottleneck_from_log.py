"""Makes the table and figures of the bottleneck sweep from results or logs, without training.

    python bottleneck_from_log.py results/bottleneck            results, original or restored
    python bottleneck_from_log.py LOG [LOG ...] --output DIR    logs, ours or the 2019 release's

Writes into DIR, or without --output into the first results folder: table.md, table.csv, table.tex,
figures as PNG and PDF (alignment and accuracy against the size, alignment-epochs and
accuracy-epochs against epochs), and report.html, which shows the table and all figures.
"""

import argparse
import sys
from pathlib import Path

from mltools.bottleneck import load_bottleneck_runs, write_bottleneck_report
from mltools.errors import exit_code, show
from mltools.results import user_path

REFERENCE = Path(__file__).resolve().parent / "reference"


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "sources", type=user_path, nargs="+", metavar="PATH", help="a results folder, or a log file"
    )
    parser.add_argument(
        "--output",
        type=user_path,
        metavar="DIR",
        help="the folder to write to (default: the first results folder)",
    )
    arguments = parser.parse_args()
    folders = [source for source in arguments.sources if source.is_dir()]
    output = arguments.output or next(iter(folders), None)
    if output is None:
        parser.error("logs alone need --output, the folder to write to")
    runs = load_bottleneck_runs(*arguments.sources)
    markdown = write_bottleneck_report(runs, output, REFERENCE)
    show(f"{markdown}\nreport: {output / 'report.html'}")


if __name__ == "__main__":
    sys.exit(exit_code(main))
