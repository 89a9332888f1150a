"""Try bad input on the whole command, on two ranks, and print what each says.

    PYTHONPATH=.:tests python benchmarks/bad_input.py > table.md

The cases are those of `tests/bad_inputs.yaml`, and random changes. Each has a folder of its own with a tiny model, a
little text, a ds_config and a run with checkpoints, and spoils one thing in it. The law: the command runs, or all ranks
end with exit code 2 and one message from rank 0, the one that the table lists; no traceback, no rank that waits for
ever, nothing changed in what was there before. The exit code is 1 where a case breaks the law. `--only WORD` tries the
cases whose name has that word.

The ranks are processes that run `launch/prune.py`, forked from a server that has imported everything already, which
saves most of their start; cases of the kind "launcher" go through `deepspeed` itself.
"""

import argparse
import multiprocessing
import os
import runpy
import shlex
import shutil
import socket
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from bad_inputs import A_RUN, USUAL, Case, make_template, read_cases
from command import ROOT, launch
from distributed import PRELOADED
from fuzzed_inputs import fuzz_cases

RANKS = 2
TIMEOUT = 90.0


@dataclass
class Outcome:
    """What a case came to: exit codes and stderr by rank, and whether anything that was there before has changed."""

    says: str | None
    codes: list[int | None]
    errors: list[str]
    touched: list[str] = field(default_factory=list)
    seconds: float = 0.0

    @property
    def messages(self) -> list[str]:
        """Messages of all ranks."""
        return [line for text in self.errors for line in text.splitlines() if line.startswith("error: ")]

    @property
    def verdict(self) -> str:
        """One of ran, refused, and the ways to break the law."""
        if None in self.codes:
            return "hang"
        if any("Traceback" in text for text in self.errors):
            return "traceback"
        if set(self.codes) == {0}:
            return "ran" if not self.says else "ran, which it should not"
        if set(self.codes) != {2}:
            return f"exit codes {self.codes}"
        if len(self.messages) != 1 or self.messages[0] not in self.errors[0]:
            return f"{len(self.messages)} messages"
        if self.says is None or self.says not in self.messages[0]:
            return "another message"
        return f"changed {self.touched[0]}" if self.touched else "refused"


# --- trying them -----------------------------------------------------------------------------------------------------


def try_case(case: Case, template: Path, place: Path, timeout: float) -> Outcome:
    """Give a case a folder of its own, spoil it, and run the command in it."""
    folder = place / "case"
    shutil.copytree(template, folder, symlinks=True)
    try:
        case.spoil(folder)
        before = {path: contents_of(path) for path in folder.rglob("*")}
        started = time.monotonic()
        run = try_by_launcher if case.kind == "launcher" else try_on_ranks
        codes, errors = run(case.words, folder, timeout)
        seconds = time.monotonic() - started
        errors = [text.replace(f"{folder}/", "") for text in errors]
        touched = [str(path.relative_to(folder)) for path in before if contents_of(path) != before[path]]
        return Outcome(case.says, codes, errors, touched, seconds)
    finally:
        if (folder / "disk").is_mount():
            subprocess.run(["umount", "-l", str(folder / "disk")], check=True)
        shutil.rmtree(folder)


def contents_of(path: Path) -> Any:
    """Return what a file holds, or the names in a folder."""
    if path.is_file():
        return path.read_bytes()
    return sorted(os.listdir(path)) if path.is_dir() else path.exists()


def try_on_ranks(words: list[str], folder: Path, timeout: float) -> tuple[list[int | None], list[str]]:
    """Run the command in processes of a process group of their own."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(PRELOADED)
    with tempfile.TemporaryDirectory() as logs:
        port = free_port()
        processes = [
            context.Process(target=be_rank, args=(rank, port, words, str(folder), logs)) for rank in range(RANKS)
        ]
        for process in processes:
            process.start()
        deadline = time.monotonic() + timeout
        for process in processes:
            process.join(max(0.0, deadline - time.monotonic()))
        codes = [process.exitcode for process in processes]
        for process in processes:
            process.kill()
            process.join()
        errors = [(Path(logs) / f"{rank}.err").read_text(errors="replace") for rank in range(RANKS)]
    return codes, errors


def be_rank(rank: int, port: int, words: list[str], folder: str, logs: str) -> None:
    """Be a rank: run the command's own file, as a launcher does."""
    for number, suffix in ((1, "out"), (2, "err")):
        os.dup2(os.open(f"{logs}/{rank}.{suffix}", os.O_WRONLY | os.O_CREAT), number)
    os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(RANKS)}
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    os.chdir(folder)
    sys.argv = [str(ROOT / "launch" / "prune.py"), *words]
    runpy.run_path(sys.argv[0], run_name="__main__")


def try_by_launcher(words: list[str], folder: Path, timeout: float) -> tuple[list[int | None], list[str]]:
    """Run the command as a user does. The launcher ends with the exit code of a rank, and mixes what they write."""
    process = launch(words, cwd=folder)
    try:
        written, _ = process.communicate(timeout=timeout)
    except subprocess.TimeoutExpired:
        os.killpg(process.pid, 9)
        return [None], [process.communicate()[0]]
    return [process.returncode], [written]


def free_port() -> int:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return int(free.getsockname()[1])


# --- the table -------------------------------------------------------------------------------------------------------


def main() -> None:
    args = parse()
    os.environ |= {"HF_HUB_DISABLE_TELEMETRY": "1", "PYTHONPATH": f"{ROOT}:{os.environ.get('PYTHONPATH', '')}"}
    with tempfile.TemporaryDirectory() as place:
        os.environ["HF_DATASETS_CACHE"] = f"{place}/cache"
        template = Path(place) / "template"
        template.mkdir()
        make_template(template)
        make_run(template)

        def outcomes(cases: Iterator[Case]) -> Iterator[tuple[Case, Outcome]]:
            for case in cases:
                if args.only in f"{case.kind}: {case.name}" and not (args.late and case.is_found_early):
                    outcome = try_case(case, template, Path(place), args.timeout)
                    print(f"{outcome.seconds:5.1f} s  {outcome.verdict:10}  {case.name}", file=sys.stderr, flush=True)
                    if args.verbose:
                        print(shlex.join(case.words), *outcome.errors, sep="\n---\n", file=sys.stderr, flush=True)
                    yield case, outcome

        tried, fuzzed = list(outcomes(read_cases())), list(outcomes(fuzz_cases(args.fuzz, args.seed)))
    print_table(tried)
    print_summary("input", tried)
    print_summary("fuzzed", fuzzed)
    sys.exit(any(outcome.verdict not in ("ran", "refused") for _, outcome in [*tried, *fuzzed]))


def make_run(folder: Path) -> None:
    """Make a run of 5 steps with checkpoints after 2 and 4, as if it had been killed, so that it can go on."""
    words = Case(name="a run", kind="", flags=f"{USUAL} {A_RUN} --output_dir run").words
    codes, errors = try_on_ranks(words, folder, TIMEOUT)
    if set(codes) != {0}:
        sys.exit("the run that the cases start from failed:\n" + "\n".join(errors))
    (folder / "run" / "report.json").unlink()


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", default="", help="try only cases whose name has this in it")
    parser.add_argument("--late", action="store_true", help="leave out the cases that tests/test_bad_input.py tries")
    parser.add_argument("--fuzz", type=int, default=8, help="random changes of each kind")
    parser.add_argument("--seed", type=int, default=0, help="seed of the random changes")
    parser.add_argument("--timeout", type=float, default=TIMEOUT, help="seconds after which a case counts as hanging")
    parser.add_argument("--verbose", action="store_true", help="show what every rank wrote")
    return parser.parse_args()


def print_table(tried: list[tuple[Case, Outcome]]) -> None:
    print("| input | exit code | message |\n|---|---:|---|")
    for case, outcome in tried:
        codes = ", ".join(str(code) for code in sorted(set(outcome.codes), key=str))
        print(f"| {cell(f'{case.kind}: {case.name}')} | {codes} | {cell(said(outcome))} |")


def said(outcome: Outcome) -> str:
    if outcome.verdict == "refused":
        return outcome.messages[0].removeprefix("error: ")
    last = (outcome.errors[0].strip().splitlines() or [""])[-1]
    return "runs" if outcome.verdict == "ran" else f"BROKEN, {outcome.verdict}: {last}"


def cell(text: str) -> str:
    shown = "".join(each if each.isprintable() else repr(each)[1:-1] for each in text).replace("|", "\\|")
    return shown if len(shown) <= 330 else f"{shown[:300]} ..."


def print_summary(name: str, tried: list[tuple[Case, Outcome]]) -> None:
    print(f"\n| {name} | tried | ran | refused with one message | broke the law |\n|---|---:|---:|---:|---:|")
    for kind in [*dict.fromkeys(case.kind for case, _ in tried), "all"]:
        verdicts = Counter(outcome.verdict for case, outcome in tried if kind in (case.kind, "all"))
        ran, refused = verdicts.pop("ran", 0), verdicts.pop("refused", 0)
        broken = ", ".join(f"{count} {verdict}" for verdict, count in verdicts.items()) or 0
        print(f"| {kind} | {ran + refused + sum(verdicts.values())} | {ran} | {refused} | {broken} |")


if __name__ == "__main__":
    main()
