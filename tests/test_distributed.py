"""The helper that the distributed tests stand on: a rank that fails or hangs is a failed test, not a silent one."""

import os
import signal
import socket
import subprocess
import sys
import time
from contextlib import suppress

import pytest
import torch
from deepspeed import comm as dist
from deepspeed.accelerator import get_accelerator
from distributed import run_ranks

from scale_prune.system import LOST_CONTACT
from scale_prune.zero3 import Runtime
from scale_prune.zero3.runtime import is_lost_contact

pytestmark = pytest.mark.distributed


def own_and_sum(value: float) -> tuple[int, float]:
    total = torch.tensor(value + dist.get_rank())
    dist.all_reduce(total)
    return dist.get_rank(), float(total)


def fail_on_last_rank() -> None:
    if dist.get_rank() == dist.get_world_size() - 1:
        raise ValueError("out of neurons")
    dist.barrier()


def hang() -> None:
    time.sleep(600)


def test_results_come_in_order_of_rank() -> None:
    assert run_ranks(own_and_sum, 3, 2.0) == [(0, 9.0), (1, 9.0), (2, 9.0)]


def test_a_rank_that_raises_ends_the_others_and_is_quoted() -> None:
    started = time.monotonic()
    with pytest.raises(
        AssertionError, match=r"rank 2: Traceback[\s\S]*fail_on_last_rank[\s\S]*ValueError: out of neurons"
    ):
        run_ranks(fail_on_last_rank, 3)
    assert time.monotonic() - started < 60


def test_ranks_that_hang_are_ended() -> None:
    with pytest.raises(AssertionError, match=r"not all ranks came to their end, exit codes \[-15, -15\]"):
        run_ranks(hang, 2, timeout=5)


@pytest.mark.parametrize("launcher", ["LOCAL_WORLD_SIZE", "LOCAL_SIZE"])
def test_ranks_of_a_host_without_gpus_share_its_memory(launcher: str, monkeypatch: pytest.MonkeyPatch) -> None:
    runtime = Runtime()
    runtime.device = torch.device("cpu")
    monkeypatch.setattr(Runtime, "gather_numbers", lambda self, number: [number])
    monkeypatch.setattr(type(get_accelerator()), "available_memory", lambda self, index=None: 2**34)
    monkeypatch.delenv("LOCAL_WORLD_SIZE", raising=False)
    alone = runtime.free_memory()
    monkeypatch.setenv(launcher, "4")
    assert runtime.free_memory() == pytest.approx(alone / 4)


def turns(local_size: int) -> list[float]:
    rank = dist.get_rank()
    os.environ["LOCAL_RANK"] = str(rank % local_size)
    runtime, spent = Runtime.start(), []
    for _ in range(2):
        with runtime.main_first():
            spent += [time.monotonic()]
            time.sleep(0.1)
            spent += [time.monotonic()]
        spent += [time.monotonic()]
    with suppress(ValueError), runtime.main_first():
        raise ValueError("the same mistake on all ranks")
    return spent


def test_of_every_host_one_rank_goes_first_and_all_go_on_together() -> None:
    found = run_ranks(turns, 4, 2)
    for turn in (0, 3):
        begun, done, left = ([spent[turn + place] for spent in found] for place in range(3))
        assert done[0] < min(begun[1:]), "rank 0 goes first"
        assert done[2] < begun[3], "then the first rank of the other host"
        assert min(left) > max(done)
    assert max(spent[2] for spent in found) > max(spent[1] for spent in found)


WAITING = """
import os, sys, time
from scale_prune.zero3 import joined
rank, dead = map(int, sys.argv[1:])
with joined(rank, timeout=2) as runtime:
    with runtime.main_first():
        time.sleep(6 * (rank == 0))
    print("waited", flush=True)
    with runtime.main_first():
        if rank == dead:
            os._exit(9)
"""


def free_port() -> int:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return int(free.getsockname()[1])


def started(program: str, rank: int, port: int, *words: str) -> subprocess.Popen[str]:
    place = {"WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    return subprocess.Popen(
        [sys.executable, "-c", program, str(rank), *words],
        env=os.environ | place | {"RANK": str(rank), "LOCAL_RANK": str(rank)},
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


@pytest.mark.parametrize("dead", [0, 1])
def test_ranks_wait_for_the_first_without_end_but_not_for_one_that_is_gone(dead: int) -> None:
    port = free_port()
    ranks = [started(WAITING, rank, port, str(dead)) for rank in range(2)]
    said = [process.communicate(timeout=100) for process in ranks]
    assert [ranks[dead].returncode, ranks[1 - dead].returncode] == [9, LOST_CONTACT], said
    assert all("waited" in out for out, _ in said)
    assert said[1 - dead][1].count(f"error: rank {1 - dead} has lost contact with the other ranks") == 1


SILENT = """
import sys, time
from scale_prune.zero3 import joined
rank, does = int(sys.argv[1]), sys.argv[2]
def here(waits):
    print("joined", file=sys.stderr, flush=True)
    if waits:
        sys.stdin.readline()
with joined(rank, timeout=2) as runtime:
    if does == "works":
        with runtime.main_first():
            here(rank == 1)
    else:
        here(True)
    if does == "waits":
        with runtime.main_first():
            pass
"""


@pytest.mark.parametrize(
    ("does", "code"),
    [
        ("waits", LOST_CONTACT),
        pytest.param("leaves", 0, marks=pytest.mark.slow),
        pytest.param("works", LOST_CONTACT, marks=pytest.mark.slow),
    ],
)
def test_a_store_that_gives_no_answer_is_not_waited_for(does: str, code: int) -> None:
    """As that of a host that is cut off: its socket stays open, and nothing ever comes."""
    port = free_port()
    first, second = (started(SILENT, rank, port, does) for rank in range(2))
    try:
        assert all("joined\n" in iter(process.stderr.readline, "") for process in (first, second) if process.stderr)
        first.send_signal(signal.SIGSTOP)
        _, said = second.communicate("\n", timeout=60)
    finally:
        first.kill()
        second.kill()
    assert second.returncode == code, said
    assert said.count("error: rank 1 has lost contact with the other ranks") == (code == LOST_CONTACT)


def test_a_port_that_another_run_has_taken_is_named() -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        place = {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1"}
        place["MASTER_PORT"] = str(port)
        program = [sys.executable, "-c", "from scale_prune.zero3 import joined\nwith joined(0): pass"]
        done = subprocess.run(program, env=os.environ | place, capture_output=True, text=True, timeout=100)
    assert done.returncode == 2
    assert f"error: port {port}, where the ranks are to meet, is taken on this machine" in done.stderr
    assert "Traceback" not in done.stderr


@pytest.mark.parametrize(
    ("words", "lost"),
    [
        ("[gloo/transport/tcp/unbound_buffer.cc:129] Timed out waiting 20000ms for send operation", True),
        ("Application timeout caused pair closure", True),
        ("NCCL communicator was aborted on rank 1", True),
        ("mat1 and mat2 shapes cannot be multiplied", False),
    ],
)
def test_what_collectives_say_when_another_rank_is_gone_is_known(words: str, lost: bool) -> None:
    assert is_lost_contact(RuntimeError(words)) == lost
