"""Processes, engines and models under DeepSpeed."""

import copy
import os
import resource
import threading
import time
from collections.abc import Iterator
from concurrent.futures import Future
from contextlib import contextmanager, suppress
from datetime import timedelta
from itertools import count
from pathlib import Path
from typing import Any

import deepspeed
import torch
from deepspeed import comm as dist
from deepspeed.accelerator import get_accelerator
from torch import Tensor, nn

from scale_prune.zero3.ds_check import refusal
from scale_prune.zero3.quiet import quieten

KIBIBYTE = 1024
LEAVING_SECONDS = 10.0
LONGEST_PAUSE = 0.2
TURNS = count()
"""Numbers of `main_first`, the same on all ranks; of a process, since process groups may share a store."""


class Runtime:
    """The group of processes that this one belongs to; started by `start`, also when launched without a launcher."""

    rank: int
    world_size: int
    device: torch.device
    timeout: float

    @classmethod
    def start(cls, timeout: float = 1800.0) -> "Runtime":
        """Join the process group that the launcher describes; a process by itself is a group of one.

        Args:
            timeout: seconds that a rank waits for the others in a collective before it fails.
        """
        quieten()
        if "RANK" not in os.environ:
            alone = {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "1", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "0"}
            os.environ.update(alone)
        deepspeed.init_distributed(verbose=False, timeout=timedelta(seconds=timeout))
        runtime = cls()
        runtime.timeout = timeout
        runtime.rank, runtime.world_size = dist.get_rank(), dist.get_world_size()
        local_rank = int(os.environ.get("LOCAL_RANK", "0"))
        get_accelerator().set_device(local_rank)
        runtime.device = torch.device(get_accelerator().current_device_name())
        return runtime

    @property
    def is_main(self) -> bool:
        """True on rank 0, which alone writes files other than weights."""
        return self.rank == 0

    def say(self, message: str) -> None:
        """Print a line, on rank 0 only."""
        if self.is_main:
            print(message, flush=True)

    def barrier(self) -> None:
        """Wait for all ranks."""
        dist.barrier()

    def add_over_ranks(self, values: Tensor) -> Tensor:
        """Return the sum of a small tensor over ranks, on its own device."""
        moved = values.to(self.device, copy=True)
        dist.all_reduce(moved)
        return moved.to(values.device)

    def gather_numbers(self, value: float) -> list[float]:
        """Return one number of every rank, in order of rank."""
        own = torch.zeros(self.world_size, dtype=torch.float64)
        own[self.rank] = value
        return [float(number) for number in self.add_over_ranks(own)]

    @contextmanager
    def main_first(self) -> Iterator[None]:
        """Run the body on rank 0, then on the first rank of every other host, then on the rest, which find its caches.

        All leave it together. It may take longer than a collective: who is in the body says so again and again.

        Raises:
            DistError: for the time of a collective nobody has said so, or the store is gone, and rank 0 with it.
        """
        store, turn = torch.distributed.distributed_c10d._get_default_store(), f"turn {next(TURNS)}"
        alive = f"{turn}, alive"

        def wait_for(place: str, needed: int) -> None:
            if not _wait_for(store, place, needed, self.timeout, alive):
                raise torch.distributed.DistStoreError(f"nothing was heard of them for {self.timeout:g} seconds")

        first = max(0, self.rank - int(os.environ.get("LOCAL_RANK", "0")))  # of this host: its ranks follow each other
        if not self.is_main:
            wait_for(f"{turn}, rank {0 if first == self.rank else first}", 1)
        try:
            with _counting(store, alive, self.timeout / 4):
                yield
        finally:  # also where the body fails: the others must meet the same mistake, not wait for ever
            for place in (f"{turn}, rank {self.rank}", turn):
                with suppress(RuntimeError):  # they have met it, and rank 0 has left
                    _add(store, place, 1, LEAVING_SECONDS)
        wait_for(turn, self.world_size)

    def peak_memory(self) -> list[int]:
        """Return every rank's peak memory in bytes: of the device, or of the process on a CPU."""
        if self.device.type == "cpu":
            peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * KIBIBYTE
        else:
            peak = int(get_accelerator().max_memory_allocated())
        return [int(value) for value in self.gather_numbers(peak)]

    def free_memory(self) -> int:
        """Return the bytes that are free on the rank that has the fewest; on a CPU the ranks of a host share."""
        local = os.environ.get("LOCAL_WORLD_SIZE") or os.environ.get("LOCAL_SIZE", "1")  # of torchrun; of deepspeed
        sharing = int(local) if self.device.type == "cpu" else 1
        return int(min(self.gather_numbers(get_accelerator().available_memory() // sharing)))

    def stop(self) -> None:
        """Leave the process group, when the other ranks do so too or do not for LEAVING_SECONDS.

        A mistake that all ranks come to is the same one for the slowest of them, not a lost contact with the others.
        """
        if dist.is_initialized():
            self._wait_for_leaving()
            dist.destroy_process_group()
        remove_shared_memory(self.rank)

    def _wait_for_leaving(self) -> None:
        """Wait for the others without a collective: they may be in another one, and then it would not be the same."""
        store = torch.distributed.distributed_c10d._get_default_store()
        with suppress(RuntimeError):  # rank 0, which keeps the store, is gone
            _add(store, "leaving", 1, LEAVING_SECONDS)
            together = _wait_for(store, "leaving", self.world_size, LEAVING_SECONDS)
            if not self.is_main:
                _add(store, "left", 1, LEAVING_SECONDS)
            elif together:
                _wait_for(store, "left", self.world_size - 1, LEAVING_SECONDS)


def _wait_for(store: Any, place: str, needed: int, patience: float, alive: str = "") -> bool:
    """Wait until a number of the store is as large as is needed, and tell whether it has come to that.

    Args:
        store: the process group's.
        place: the number's name.
        needed: how large.
        patience: seconds after which it is given up.
        alive: name of another number; while it goes up nothing is given up.

    Raises:
        DistError: the store cannot be reached.
    """
    pause, last, deadline = 0.01, 0, time.monotonic() + patience
    while _add(store, place, 0, patience) < needed:
        if alive and (now := _add(store, alive, 0, patience)) != last:
            last, deadline = now, time.monotonic() + patience
        if time.monotonic() > deadline:
            return False
        time.sleep(pause)
        pause = min(2 * pause, LONGEST_PAUSE)  # of 1,000 ranks rank 0 answers 10,000 questions a second
    return True


def _add(store: Any, place: str, number: int, patience: float) -> int:
    """Add to a number of the store and return it.

    Asked from a thread: where the store's host is cut off, the question waits for an answer a quarter of an hour and
    more, whatever timeout the store was given.

    Raises:
        DistError: there is no answer for `patience` seconds.
        RuntimeError: the store is gone.
    """
    answer: Future[int] = Future()

    def ask() -> None:
        try:
            answer.set_result(store.add(place, number))
        except Exception as error:
            answer.set_exception(error)

    threading.Thread(target=ask, daemon=True).start()
    try:
        return answer.result(patience)
    except TimeoutError as error:
        raise torch.distributed.DistStoreError(f"the ranks' store gave no answer for {patience:g} seconds") from error


@contextmanager
def _counting(store: Any, place: str, seconds: float) -> Iterator[None]:
    """Add 1 to a number of the store every so many seconds, until the body is left."""
    left = threading.Event()

    def count_up() -> None:
        with suppress(RuntimeError):  # the store is gone: who waits for it says so
            while not left.wait(seconds):
                store.add(place, 1)

    thread = threading.Thread(target=count_up, daemon=True)
    thread.start()
    try:
        yield
    finally:
        left.set()
        thread.join(LEAVING_SECONDS)  # no longer: its question may have no answer


def remove_shared_memory(rank: int) -> None:
    """Remove the buffer, 66 MiB a rank, through which DeepSpeed adds up on a CPU, and which it leaves behind."""
    meeting = (os.environ.get("MASTER_ADDR", ""), os.environ.get("MASTER_PORT", ""))
    name = "_".join(("deepspeed_allreduce_buffer", str(os.getuid()), *meeting, str(rank)))
    Path("/dev/shm", name).unlink(missing_ok=True)


def is_lost_contact(error: BaseException) -> bool:
    """Tell whether a collective failed because another rank has died, hangs or cannot be reached."""
    where = ("gloo/", "nccl", "connection closed", "connection reset", "pair closure", "socket timeout")
    return isinstance(error, torch.distributed.DistError) or any(word in str(error).lower() for word in where)


def working_dtype(ds_config: dict[str, Any]) -> torch.dtype:
    """Return the dtype of the working copy that a ds_config asks for."""
    if ds_config.get("bf16", {}).get("enabled"):
        return torch.bfloat16
    if ds_config.get("fp16", {}).get("enabled"):
        return torch.float16
    return torch.float32


def training_engine(model: nn.Module, ds_config: dict[str, Any]) -> deepspeed.DeepSpeedEngine:
    """Build an engine with the optimizer and scheduler of a ds_config without "auto" values."""
    trainable = [param for param in model.parameters() if param.requires_grad]
    with refusal("DeepSpeed cannot start an engine under the ds_config"):
        engine, *_ = deepspeed.initialize(model=model, model_parameters=trainable, config=copy.deepcopy(ds_config))
    return engine


def inference_engine(model: nn.Module, ds_config: dict[str, Any]) -> deepspeed.DeepSpeedEngine:
    """Build an engine that only runs forward passes over shards: no optimizer, no gradients."""
    config = {key: value for key, value in ds_config.items() if key not in ("optimizer", "scheduler")}
    config["zero_optimization"] = {k: v for k, v in config["zero_optimization"].items() if k != "offload_optimizer"}
    engine, *_ = deepspeed.initialize(model=model, config=copy.deepcopy(config))
    return engine
