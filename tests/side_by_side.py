"""Run pytest twice side by side, each on half of the cores, until every test file is claimed by one of the two.

The ranks of a test wait for each other more than they compute, and a test without ranks fills one core. The halves
share no core, because ranks that wait for those of another test take several times as long.
"""

import os
import subprocess
import sys
import tempfile
from pathlib import Path


def main(arguments: list[str]) -> int:
    """Return pytest's exit code: of the half that failed, if one did."""
    cores = sorted(os.sched_getaffinity(0))
    if len(cores) == 1:
        return subprocess.run(["pytest", *arguments], check=False).returncode
    with tempfile.TemporaryDirectory() as claims:
        second_log = Path(claims, "log")
        with second_log.open("w") as log:
            halves = []
            for half, output in enumerate((None, log)):
                os.sched_setaffinity(0, cores[half::2])  # which the half inherits
                halves.append(subprocess.Popen(["pytest", f"--claims={claims}", *arguments], stdout=output))
            codes = [half.wait() for half in halves]
        print("\nThe other half:\n", second_log.read_text(), sep="")
    return max(codes)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
