"""Real processes on two hosts of one machine, one of which is cut off in the middle of a run."""

import time
from collections.abc import Iterator
from pathlib import Path
from subprocess import Popen, TimeoutExpired

import pytest
from command import ROOT, arguments, make_work, report_of, wait_until
from two_nodes import Node, NotPermittedError, deepspeed_command, torchrun_command, two_nodes

from scale_prune.system.exits import LOST_CONTACT

pytestmark = [pytest.mark.distributed, pytest.mark.faults]

PATIENCE = 20
STEPS = 60
SETTINGS = {
    "criterion": "gum",
    "remaining": 0.4,
    "max_steps": STEPS,
    "save_every": 5,
    "keep_checkpoints": 3,
    "collective_timeout": PATIENCE,
}


@pytest.fixture
def nodes() -> Iterator[tuple[Node, Node]]:
    try:
        with two_nodes() as nodes:
            yield nodes
    except NotPermittedError as error:
        pytest.skip(f"hosts cannot be made here: {error}")


@pytest.fixture(scope="module")
def work(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_work(tmp_path_factory.mktemp("work"))


def start(nodes: tuple[Node, Node], launcher: str, flags: list[str], folder: Path) -> list[Popen[bytes]]:
    program = [str(ROOT / "launch" / "prune.py"), *flags]
    commands = [
        deepspeed_command(rank, folder / f"hosts-{rank}", program)
        if launcher == "deepspeed"
        else torchrun_command(rank, program)
        for rank in (0, 1)
    ]
    return [node.start(words, log_of(folder, node)) for node, words in zip(nodes, commands, strict=True)]


def log_of(folder: Path, node: Node) -> Path:
    return folder / f"{node.address}.log"


def ended(processes: list[Popen[bytes]], timeout: float) -> list[int]:
    deadline = time.monotonic() + timeout
    try:
        return [process.wait(max(0.1, deadline - time.monotonic())) for process in processes]
    except TimeoutExpired:
        return []
    finally:
        for process in processes:
            process.kill()


@pytest.mark.parametrize("launcher", ["deepspeed", "torchrun"])
def test_two_nodes_make_the_same_run_whichever_launcher_starts_them(
    launcher: str, nodes: tuple[Node, Node], work: Path, tmp_path: Path
) -> None:
    flags = arguments(work, tmp_path / "out", **SETTINGS | {"max_steps": 4})
    codes = ended(start(nodes, launcher, flags, tmp_path), 120)
    logs = [log_of(tmp_path, node).read_text() for node in nodes]
    assert codes == [0, 0], logs
    assert report_of(tmp_path / "out")["world_size"] == 2
    assert ["(exported)" in log for log in logs] == [True, False], "only rank 0 speaks"


@pytest.mark.parametrize("dead", [0, 1])
def test_when_a_node_is_cut_off_the_other_says_so_and_the_run_goes_on_later(
    dead: int, nodes: tuple[Node, Node], work: Path, tmp_path: Path
) -> None:
    whole, cut = tmp_path / "whole", tmp_path / "cut"
    assert ended(start(nodes, "deepspeed", arguments(work, whole, **SETTINGS), tmp_path), 200) == [0, 0]

    flags = arguments(work, cut, **SETTINGS)
    processes = start(nodes, "deepspeed", flags, tmp_path)
    wait_until(lambda: (cut / "checkpoints" / "step-00000010").exists(), timeout=120)
    nodes[dead].plug("down")
    cut_off = time.monotonic()
    code = processes[1 - dead].wait(PATIENCE + 60)
    waited = time.monotonic() - cut_off
    assert code == LOST_CONTACT
    assert waited < PATIENCE + 15
    said = log_of(tmp_path, nodes[1 - dead]).read_text()
    assert said.count(f"error: rank {1 - dead} has lost contact with the other ranks") == 1
    assert "Traceback" not in said
    ended(processes, PATIENCE + 60)

    nodes[dead].plug("up")
    assert ended(start(nodes, "deepspeed", [*flags, "--resume"], tmp_path), 200) == [0, 0]
    assert report_of(cut)["resumed_at"][0] >= 10
    for file in ("kept.json", "scores.safetensors", "pruned/model.safetensors"):
        assert (cut / file).read_bytes() == (whole / file).read_bytes(), file
