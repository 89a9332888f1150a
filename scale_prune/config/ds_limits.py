"""What a DeepSpeed configuration must not ask for, because pruning under it would be wrong or impossible."""

import json
from typing import Any

OBJECTS = (
    *("zero_optimization", "zero_optimization.offload_optimizer", "zero_optimization.offload_param"),
    *("optimizer", "optimizer.params", "scheduler", "scheduler.params", "bf16", "fp16"),
    # DeepSpeed looks into these without a look at what they are.
    *("activation_checkpointing", "aio", "checkpoint", "comms_logger", "data_types", "flops_profiler", "tensorboard"),
)
SWITCHES = ("wall_clock_breakdown", "flops_profiler.enabled")

_COPIES = "a second copy of the weights would bypass the masks; remove the key"
_QUANTIZED = "scores and masks need the weights and gradients as they are, not quantized; remove the key"
_MASTER = "the dense values and the scores live in the float32 master weights; remove the key"
_REMOVED = "DeepSpeed no longer has it; remove the section"
REFUSED: dict[str, tuple[tuple[Any, ...], str]] = {
    "compression_training": (
        (),
        "DeepSpeed 0.19.7 removed its compression library; remove the section, "
        "--criterion and --remaining say what is pruned here",
    ),
    "amp": ((), _REMOVED),
    "curriculum_learning": ((), _REMOVED),
    "elasticity": ((), _REMOVED),
    "progressive_layer_drop": ((), _REMOVED),
    "quantize_training": ((), _REMOVED),
    "sparse_attention": ((), _REMOVED),
    "bfloat16": ((), 'it is the old name of "bf16"; rename it'),
    "pipeline": (({},), "a pipeline splits the model by layers, ZeRO-3 splits every tensor; remove the section"),
    "hybrid_engine.enabled": ((False,), "it keeps weights of its own for inference; remove the section"),
    "compile.deepcompile": ((False,), "it keeps some weights gathered, past the masks; remove the key"),
    "tensor_parallel.autotp_size": ((0, 1), "shards must be ZeRO-3's flat slices over all ranks; remove the section"),
    "sequence_parallel_size": ((1,), "shards must be ZeRO-3's flat slices over all ranks; remove the key"),
    "bf16.bf16_master_weights_and_grads": ((False,), _MASTER),
    "fp16.fp16_master_weights_and_grads": ((False,), _MASTER),
    "torch_autocast.dtype": (
        ("bf16", "bfloat16", "torch.bfloat16", "fp32", "float32", "torch.float32"),
        'scores would not know by what the loss is scaled; give "bfloat16", or turn on "fp16" in its place',
    ),
    "zero_optimization.zero_hpz_partition_size": ((0, 1), _COPIES),
    "zero_optimization.zero_quantized_weights": ((False,), _QUANTIZED),
    "zero_optimization.zero_quantized_nontrainable_weights": ((False,), _QUANTIZED),
    "zero_optimization.zero_quantized_gradients": ((False,), _QUANTIZED),
    "managed_gradient_accumulation": (
        (True,),
        "gradients are read before a step, which alone knows then that it is one; remove the key",
    ),
    "zero_optimization.cpu_offload": (
        (False,),
        'it is the old name of "offload_optimizer"; give {"device": "cpu"} there',
    ),
    "zero_optimization.cpu_offload_param": (
        (False,),
        'it is the old name of "offload_param"; give {"device": "cpu"} there',
    ),
    "zero_optimization.zenflow": ((), "it updates weights between steps, past the masks; remove the section"),
    "zero_optimization.offload_optimizer.device": (
        ("none", "cpu"),
        'shares and scores read the master weights at every step, and that was never tried from NVMe; use "cpu"',
    ),
    "zero_optimization.offload_optimizer.ratio": (
        (1,),
        "the part that stays on the GPU has its moments where neither a checkpoint nor a smaller model finds them; "
        "remove the key",
    ),
    "zero_optimization.offload_optimizer.super_offload": (
        (False,),
        "it updates weights within the backward pass, before scores have seen the gradients; remove the key",
    ),
    "zero_optimization.offload_param.device": (
        ("none", "cpu"),
        'masking writes the working copy of the weights in memory; use "cpu"',
    ),
}
"""What scale_prune cannot run with: the key's path, the only values that are harmless, the reason and the way out."""


def refuse_harmful(ds_config: dict[str, Any]) -> None:
    """Refuse the keys of a ds_config under which masks and scores would not hold.

    Raises:
        ValueError: a key of `REFUSED` has a harmful value.
    """
    for path, (harmless, reason) in REFUSED.items():
        value = get(ds_config, path)
        if value is not None and value not in harmless:
            found = json.dumps(value)[:60]
            raise ValueError(f'the ds_config has "{path}": {found}, which scale_prune cannot work with: {reason}')


def refuse_unsupported(ds_config: dict[str, Any]) -> None:
    """Refuse a ds_config under which masks would not hold or the engine would not start.

    Raises:
        ValueError: as `refuse_harmful`; or a section is not an object, a switch neither true nor false, ZeRO's stage is
            not 3.
    """
    refuse_harmful(ds_config)
    for path in OBJECTS:
        value = get(ds_config, path)
        if not isinstance(value, dict | None):
            raise ValueError(f'the ds_config has "{path}": {json.dumps(value)}, it must be an object in {{}}')
    for path in SWITCHES:
        value = get(ds_config, path)
        if not isinstance(value, bool | None):
            raise ValueError(f'the ds_config has "{path}": {json.dumps(value)}, it must be true or false')
    steps = get(ds_config, "steps_per_print")
    if steps is not None and (type(steps) is not int or steps < 1):
        raise ValueError(
            f'the ds_config has "steps_per_print": {json.dumps(steps)}, it must be a whole number, at least 1'
        )
    if get(ds_config, "zero_optimization") is None:
        raise ValueError('the ds_config has no "zero_optimization", add {"stage": 3}, as in ds_configs/zero3.json')
    stage = get(ds_config, "zero_optimization.stage") or 0
    if stage != 3:
        raise ValueError(
            f'the ds_config has "zero_optimization.stage": {stage}, it must be 3: masks and scores are sharded as '
            f"ZeRO-3 shards the parameters (on a single rank stage 3 costs nothing)"
        )


def get(ds_config: dict[str, Any], path: str) -> Any:
    """Return the value at a path of keys joined with dots, None where there is none."""
    value: Any = ds_config
    for key in path.split("."):
        value = value.get(key) if isinstance(value, dict) else None
    return value
