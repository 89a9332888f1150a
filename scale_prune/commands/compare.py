"""The command that compares finished runs."""

import argparse
from collections.abc import Sequence
from functools import partial
from os.path import expanduser
from pathlib import Path

from scale_prune.config import parse_some, user_errors
from scale_prune.study import PERPLEXITY, as_json, as_table, check_same, draw, find, read, rows_of
from scale_prune.system import check_new, complete_or_absent

DESCRIPTION = "Compare finished runs: one table and one figure, with mean and standard deviation over seeds."


def main(argv: Sequence[str]) -> None:
    """Run `launch/compare.py`; a user's mistake ends in one message and exit code 2."""
    with user_errors(rank=0):
        own = parse_some(argv, (), DESCRIPTION, add_own)[2]
        folder = Path(own.output_dir)
        check_new(folder, f"--output_dir {folder}")
        reports, unfinished = find(own.runs)
        runs = [read(report, own.metric) for report in reports]
        if not own.any:
            check_same(runs)
        rows = rows_of(runs)
        table = as_table(rows, unfinished)
        with complete_or_absent(folder) as partial:
            (partial / "comparison.json").write_text(as_json(rows, unfinished), encoding="utf-8")
            (partial / "table.md").write_text(table, encoding="utf-8")
            draw(partial, rows)
        print(f"{table}\n{folder}: table.md, comparison.json, quality.png and quality.svg")


def add_own(parser: argparse.ArgumentParser) -> None:
    """Add the command's own flags."""
    add_path = partial(parser.add_argument, type=expanduser)
    add_path("runs", nargs="+", metavar="RUN", help="folders of runs, or folders with runs anywhere below")
    add_path("--output_dir", default="comparison", help="new folder for the results; default: comparison")
    parser.add_argument(
        "--metric", default=PERPLEXITY, help="what quality is, e.g. bleu, rougeL, exact_match; default: perplexity"
    )
    parser.add_argument("--any", action="store_true", help="compare also runs of different models or data")
