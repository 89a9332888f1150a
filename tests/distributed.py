"""Functions that run on several ranks of this machine: real processes, gloo, DeepSpeed on the CPU.

The processes are forked from a server that has imported everything already, which saves most of their start.
"""

import gc
import multiprocessing
import os
import tempfile
import threading
import time
import traceback
import warnings
from collections.abc import Callable, Sequence
from multiprocessing.connection import wait
from multiprocessing.context import ForkServerContext
from multiprocessing.forkserver import ensure_running
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

# The commands, what an engine imports when it is made, and what the test modules import, which every rank imports anew.
PRELOADED = [
    *("torch", "torch.distributed", "deepspeed", "transformers.generation.utils", "scale_prune.api"),
    *(f"scale_prune.commands.{command}" for command in ("prune", "evaluate", "analyze")),
    *("deepspeed.runtime.zero.stage3", "torch._dynamo.debug_utils", "torch._inductor.compile_fx"),
    *("deepspeed.runtime.superoffload.superoffload_stage3", "deepspeed.module_inject.auto_ep_layer"),
    *("pytest", "command", "engines", "scipy.stats", "sklearn.metrics", "einops._torch_specific", "PIL.PngImagePlugin"),
    *("tensorboard.backend.event_processing.event_accumulator", "ds_operators"),
]


def run_ranks(worker: Callable[..., Any], world_size: int, *args: Any, timeout: float = 120.0) -> list[Any]:
    """Call a function of a test module on several ranks of one process group.

    Args:
        worker: a module's own function, called as `worker(*args)`; what it returns goes through `torch.save`.
        world_size: number of ranks.
        args: what it is called with, picklable.
        timeout: seconds after which the ranks are ended.

    Returns:
        What it returned, in order of rank, tensors on the CPU.

    Raises:
        AssertionError: a rank raised, which ends the others, or the time is over; with the ranks' tracebacks.
    """
    import torch

    with tempfile.TemporaryDirectory() as folder:
        processes = start_ranks(worker, world_size, Path(folder), *args)
        ended = _wait_for_all(processes, timeout)
        for left in Path("/dev/shm").glob(f"deepspeed_allreduce_buffer_*_{Path(folder).name}_*"):
            left.unlink()
        first_first = sorted(Path(folder).glob("*.txt"), key=lambda path: path.stat().st_mtime_ns)
        tracebacks = [path.read_text() for path in first_first]
        assert ended, "\n".join([f"not all ranks came to their end, exit codes {_codes(processes)}", *tracebacks])
        return [torch.load(Path(folder) / f"{rank}.pt", "cpu", weights_only=False) for rank in range(world_size)]


def start_ranks(worker: Callable[..., Any], world_size: int, folder: Path, *args: Any) -> list[BaseProcess]:
    """Start the ranks and return their processes; results and tracebacks go to an existing folder."""
    context = start_server()
    processes = [
        context.Process(target=_rank, args=(worker, rank, world_size, folder, args), daemon=True)
        for rank in range(world_size)
    ]
    for process in processes:
        process.start()
    return [*processes]


def start_server() -> ForkServerContext:
    """Let the server of ranks start, if it has not, and return without waiting for it."""
    context = multiprocessing.get_context("forkserver")
    # A process that has begun with CUDA cannot be forked, and an import may begin with it.
    context.set_forkserver_preload(PRELOADED if os.environ["DS_ACCELERATOR"] == "cpu" else [])
    before = os.environ.get("PYTHONPATH", "")
    os.environ["PYTHONPATH"] = os.pathsep.join([str(Path(__file__).parent), before])  # it looks nowhere else
    ensure_running()
    os.environ["PYTHONPATH"] = before
    return context


def _wait_for_all(processes: Sequence[BaseProcess], timeout: float) -> bool:
    """Wait until all have ended well; as soon as one fails, or when the time is over, end the others."""
    deadline = time.monotonic() + timeout
    while (running := [process for process in processes if process.is_alive()]) and time.monotonic() < deadline:
        wait([process.sentinel for process in running], timeout=deadline - time.monotonic())
        if any(_codes(processes)):
            break
    for process in processes:
        process.terminate()
        process.join()
    return not any(_codes(processes))


def _codes(processes: Sequence[BaseProcess]) -> list[int | None]:
    return [process.exitcode for process in processes]


def _rank(worker: Callable[..., Any], rank: int, world_size: int, folder: Path, args: tuple[Any, ...]) -> None:
    import deepspeed
    import torch
    from tqdm import tqdm

    try:
        tqdm.set_lock(threading.RLock())  # its own lock would leave a semaphore behind where a rank is killed
        gc.freeze()  # engines collect garbage all the time, which takes long with so much imported
        torch.set_num_threads(1)
        warnings.simplefilter("ignore", FutureWarning)  # torch's notes on collectives that DeepSpeed calls
        os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(world_size)}
        os.environ["MASTER_ADDR"] = folder.name  # DeepSpeed names shared memory after it
        meeting = f"file://{folder}/rendezvous"
        deepspeed.init_distributed(
            auto_mpi_discovery=False, verbose=False, init_method=meeting, rank=rank, world_size=world_size
        )
        result = worker(*args)
        torch.save(result, folder / f"{rank}.pt")
        if deepspeed.comm.is_initialized():
            deepspeed.comm.destroy_process_group()
    except BaseException:
        (folder / f"{rank}.txt").write_text(f"rank {rank}: {traceback.format_exc()}")
        os._exit(1)
