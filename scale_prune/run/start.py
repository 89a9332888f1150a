"""One run from its settings to the report."""

from collections.abc import Callable
from typing import Any

import torch

from scale_prune.checkpoint import choose, filled_from
from scale_prune.config import Config, cache_folder, precision
from scale_prune.data import Inputs, build
from scale_prune.preflight import calibration_warning, check_same, read_inputs, unused_settings
from scale_prune.run.figure import draw
from scale_prune.run.output import check_shared, drop_replaced
from scale_prune.run.report import write_report
from scale_prune.run.run import set_up
from scale_prune.run.stages import go
from scale_prune.system import REPORT, StopSignal
from scale_prune.tasks import make_task
from scale_prune.zero3 import Runtime, of_all_ranks

CACHE = cache_folder()
BASE = {"max_steps": 250, "learning_rate": 3e-3, "remaining": 1.0, "criterion": "random", "eval_tokens": 20_000}


def embedded_default(config: Config, explicit: frozenset[str], runtime: Runtime) -> Config:
    """Build and train the small model that stands in where the user names none; both are cached.

    Returns:
        The settings with that model, and with its text where the user names none; a validation file is the user's.
    """
    with runtime.main_first():
        folder = build(CACHE)
    base = folder / "base"
    text = {"train_file": str(folder / "train.jsonl"), "validation_file": str(folder / "validation.jsonl")}
    if not all(of_all_ranks((base / REPORT).is_file())):
        advice = "where no --model is given one is made there, so give one, or in SCALE_PRUNE_CACHE a folder"
        check_shared(folder, runtime, "the cache", advice)
        if runtime.is_main:
            print(f"training the small base model, {BASE['max_steps']} steps; it is kept in {base}", flush=True)
        given = {name: getattr(config.training, name) for name in ("ds_config", "precision")}
        settings = (
            BASE | text | given | {"model": str(folder / "untrained"), "output_dir": str(base), "overwrite": True}
        )
        prune(Config.from_flat(settings), frozenset(), runtime)  # the ds_config wins
        runtime.barrier()
    if config.data.dataset is not None or config.data.train_file is not None:
        text = {}
    elif config.data.validation_file is not None:
        text["validation_file"] = config.data.validation_file
    return Config.from_flat(config.flat() | text | {"model": str(base / "pruned")})


def prune(
    config: Config, explicit: frozenset[str], runtime: Runtime, read: Callable[..., Inputs] = read_inputs
) -> dict[str, Any]:
    """Fine-tune and prune one model; the report, and everything else, is in the output folder.

    Args:
        config: the settings, as the user gave them.
        explicit: names of those that the user gave.
        runtime: the ranks.
        read: `read_inputs`, or what remembers what that has read already.

    Raises:
        SystemExit: SIGTERM came, and the run is saved; with the code STOPPED.
        ValueError: an input cannot be used, the loss is not finite, or the disk is full.
        RuntimeError: masks did not take hold, or the exported model is not the one that was trained.
    """
    stop = StopSignal()
    checkpoint = choose(config, runtime)
    inputs = read(filled_from(checkpoint, config), explicit, runtime.world_size)
    config = inputs.config
    if checkpoint is not None:
        for line in check_same(checkpoint, inputs):
            runtime.say(line)
    elif config.checkpoint.resume is not None:
        runtime.say(f"{config.output.output_dir} has no checkpoint yet, so the run starts from the beginning")
    for line in filter(None, (unused_settings(config), slow_precision(runtime.device, inputs.ds_config))):
        runtime.say(line)
    run = set_up(make_task(inputs, runtime), runtime, checkpoint, stop)
    if line := calibration_warning(config, run.student.groups, run.inputs.calibration_tokens):
        runtime.say(line)
    try:
        report = go(run, checkpoint)
    finally:
        run.monitor.close()  # so that a message does not stand behind the progress bar
    if runtime.is_main:
        write_report(run.folder, report)
        drop_replaced(config)
        if config.output.tensorboard:  # last: a run is complete without its picture
            draw(run.folder, report)
    return report


def slow_precision(device: torch.device, ds_config: dict[str, Any]) -> str:
    """Return a line where another precision would be much faster on the device, else nothing."""
    asked = precision(ds_config)
    if asked is None and device.type != "cpu" and "torch_autocast" not in ds_config:
        return "all is in fp32 on this device, as without --ds_config; --ds_config zero3 is in bf16"
    if asked is None or device.type != "cpu" or torch.backends.cpu.get_cpu_capability() != "AVX2":
        return ""
    return f"this processor has no instructions for {asked}, which may take forty times as long here as fp32"
