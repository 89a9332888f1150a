"""What every command does around its work: who am I, join the others, and leave them, also where they are gone."""

import ctypes
import gc
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager, suppress

import torch
from deepspeed.accelerator import get_accelerator

from scale_prune.system import LOST_CONTACT
from scale_prune.zero3.runtime import Runtime, is_lost_contact, remove_shared_memory

COLLECTIVE_TIMEOUT = 1800.0
SIZES = ("OMPI_COMM_WORLD_SIZE", "PMI_SIZE", "SLURM_STEP_NUM_TASKS")
"""What mpirun and srun say of how many processes they have started."""


def launched_as() -> tuple[int, int]:
    """Return this process's rank and the number of ranks, as the launcher says; a process by itself is 0 of 1."""
    return int(os.environ.get("RANK", "0")), int(os.environ.get("WORLD_SIZE", "1"))


def check_launcher() -> None:
    """Refuse to be one of several processes that were not told which: each would be a run of its own.

    Raises:
        ValueError: it is.
    """
    several = [name for name in SIZES if int(os.environ.get(name, "1")) > 1]
    if "RANK" not in os.environ and several:
        raise ValueError(
            f"{os.environ[several[0]]} processes were started ({several[0]}), but none knows which it is, by RANK, "
            "LOCAL_RANK and WORLD_SIZE; start one launcher a node, deepspeed or torchrun, as launch/slurm.sbatch does, "
            f"or unset {several[0]} where each is to be a run of its own"
        )


def own_device() -> tuple[torch.device, int]:
    """Return the device that a rank of this machine computes on, and its free bytes; no other rank is asked."""
    accelerator = get_accelerator()
    return torch.device(accelerator.current_device_name()), int(accelerator.available_memory())


def give_back() -> None:
    """Give the system back what nothing holds any more: engines, which hold themselves, and what glibc keeps."""
    gc.collect()
    get_accelerator().empty_cache()
    with suppress(OSError, AttributeError):  # another C library
        ctypes.CDLL("libc.so.6").malloc_trim(0)


@contextmanager
def joined(rank: int, timeout: float = COLLECTIVE_TIMEOUT, way_out: str = "") -> Iterator[Runtime]:
    """Join the process group for the time of the `with` block.

    Args:
        rank: this process's.
        timeout: seconds that a rank waits for the others before it gives them up.
        way_out: what to do where contact is lost.
    """
    with lost_contact(rank, way_out):
        runtime = Runtime.start(timeout)
    try:
        with lost_contact(rank, way_out):
            yield runtime
    finally:
        runtime.stop()


@contextmanager
def lost_contact(rank: int, way_out: str) -> Iterator[None]:
    """Turn a failed collective into one message of this rank and the exit code LOST_CONTACT.

    The process ends at once: whatever would close the process group in good order could wait for the others again.
    """
    try:
        yield
    except RuntimeError as error:
        if not is_lost_contact(error):
            raise
        reason, port = " ".join(str(error).split())[:300], os.environ.get("MASTER_PORT", "")
        if "EADDRINUSE" in reason:  # whose shared memory has this port in its name
            print(
                f"error: port {port}, where the ranks are to meet, is taken on this machine, by another run perhaps; "
                f"give the launcher another one, as in deepspeed --master_port {int(port) + 1}",
                file=sys.stderr,
                flush=True,
            )
            sys.exit(2)
        print(
            f"error: rank {rank} has lost contact with the other ranks, one of which has died or cannot be reached; "
            f"{way_out}{reason}",
            file=sys.stderr,
            flush=True,
        )
        remove_shared_memory(rank)
        os._exit(LOST_CONTACT)
