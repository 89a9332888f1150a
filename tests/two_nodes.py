"""Two hosts on one machine: network namespaces, joined by a pair of virtual cables."""

import os
import subprocess
import sys
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
ADDRESSES = ("10.213.77.1", "10.213.77.2")
CABLE = "cable"


class NotPermittedError(Exception):
    """Namespaces cannot be made here."""


@dataclass(frozen=True)
class Node:
    """One host.

    Attributes:
        name: of its namespace.
        address: where the other one reaches it.
    """

    name: str
    address: str

    def start(self, command: list[str], log: Path) -> subprocess.Popen[bytes]:
        """Run a command on the host; what it says goes to a file."""
        environment = os.environ | {"PYTHONPATH": str(ROOT), "GLOO_SOCKET_IFNAME": CABLE}
        with log.open("wb") as file:
            return subprocess.Popen(
                ["ip", "netns", "exec", self.name, *command],
                cwd=ROOT,
                env=environment,
                stdout=file,
                stderr=subprocess.STDOUT,
            )

    def plug(self, state: str) -> None:
        """Set the cable "up" or "down"."""
        _ip("-n", self.name, "link", "set", CABLE, state)


@contextmanager
def two_nodes() -> Iterator[tuple[Node, Node]]:
    """Give two hosts that reach each other.

    Raises:
        NotPermittedError: this machine does not let us.
    """
    names = [f"node-{uuid.uuid4().hex[:8]}" for _ in ADDRESSES]
    nodes = Node(names[0], ADDRESSES[0]), Node(names[1], ADDRESSES[1])
    try:
        for name in names:
            _ip("netns", "add", name)
        _ip("link", "add", CABLE, "netns", names[0], "type", "veth", "peer", "name", CABLE, "netns", names[1])
        for node in nodes:
            _ip("-n", node.name, "address", "add", f"{node.address}/24", "dev", CABLE)
            _ip("-n", node.name, "link", "set", "lo", "up")
            node.plug("up")
        yield nodes
    finally:
        for name in names:
            subprocess.run(["ip", "netns", "delete", name], capture_output=True, check=False)


def deepspeed_command(node_rank: int, hostfile: Path, program: list[str]) -> list[str]:
    """Return how DeepSpeed's launcher is started on one of two hosts, each by itself, without ssh."""
    hostfile.write_text("".join(f"{address} slots=1\n" for address in ADDRESSES))
    where = ["--master_addr", ADDRESSES[0], "--master_port", "29511"]
    return [
        *(sys.executable, "-m", "deepspeed.launcher.runner", "--hostfile", str(hostfile), "--no_ssh"),
        *("--node_rank", str(node_rank), *where, *program),
    ]


def torchrun_command(node_rank: int, program: list[str]) -> list[str]:
    """Return how torchrun is started on one of two hosts."""
    where = ["--master_addr", ADDRESSES[0], "--master_port", "29511", "--nproc_per_node", "1", "--nnodes", "2"]
    return [sys.executable, "-m", "torch.distributed.run", *where, "--node_rank", str(node_rank), *program]


def _ip(*words: str) -> None:
    try:
        done = subprocess.run(["ip", *words], capture_output=True, text=True, check=False)
    except FileNotFoundError as error:
        raise NotPermittedError("there is no command `ip`") from error
    if done.returncode:
        raise NotPermittedError(f"ip {' '.join(words)}: {done.stderr.strip()}")
