"""A model from its files straight into shards: every rank reads its own slices."""

import copy
import math
import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from types import ModuleType
from typing import Any

import torch
from deepspeed.runtime.zero.partition_parameters import GatheredParameters
from safetensors import safe_open
from torch import Tensor
from transformers import AutoConfig, PretrainedConfig, PreTrainedModel, modeling_utils
from transformers.core_model_loading import WeightConverter, rename_source_key
from transformers.integrations import HfDeepSpeedConfig

from scale_prune.models import auto_model, classifies, full_shape
from scale_prune.zero3.runtime import working_dtype
from scale_prune.zero3.saving import of_all_ranks
from scale_prune.zero3.shard import Shard

Stored = tuple[Any, str]
"""An open safetensors file, and a name in it."""

UNREADABLE = ("loading state_dict", "PytorchStreamReader", "magic number")


def load_model(
    path: str,
    ds_config: dict[str, Any],
    *,
    trust_remote_code: bool = False,
    config: PretrainedConfig | None = None,
    flag: str = "model",
) -> PreTrainedModel:
    """Load a model straight into ZeRO-3 shards, in the precision of the ds_config. A collective.

    Of safetensors files a rank reads what lies in its slices, P / W of P parameters; of others, and where a weight is
    put together of several, rank 0 reads and the others receive them all. DeepSpeed's own broadcast of each parameter
    as it is made, P more, stays in either case.

    Args:
        path: Hugging Face folder or hub name.
        ds_config: without "auto" values.
        trust_remote_code: run code that comes with the model.
        config: takes the place of the folder's; a classifier that is new to an encoder begins at random.
        flag: by which the user has named it.

    Raises:
        ValueError: its weights are missing, damaged or of another shape, as some rank sees it.
    """
    keep_alive = HfDeepSpeedConfig(copy.deepcopy(ds_config))
    model, problem = None, ""
    try:
        config = config or AutoConfig.from_pretrained(path, trust_remote_code=trust_remote_code)
        model, missing = _in_shards(path, config, dtype=working_dtype(ds_config), trust_remote_code=trust_remote_code)
        if missing:
            problem = f"{len(missing)} of them are missing and would be random, {missing[0]} for one"
    except Exception as error:  # a broken file raises whatever its content comes to
        if isinstance(error, RuntimeError) and not any(words in str(error) for words in UNREADABLE):
            raise
        problem = " ".join(str(error).split())[:300] or type(error).__name__
    del keep_alive
    if problems := list(filter(None, of_all_ranks(problem))):  # only rank 0 may have seen it
        raise ValueError(f"--{flag} {path}: its weights cannot be loaded: {problems[0]}")
    assert model is not None
    return model


def _in_shards(path: str, config: PretrainedConfig, **options: Any) -> tuple[PreTrainedModel, list[str]]:
    """Return a model and the names of its parameters that the files lack and that must not begin at random."""
    if getattr(config, "chunk_size_feed_forward", 0):
        config.chunk_size_feed_forward = 0  # computes the same, and activations are seen as a whole
    with _ties_compared_whole(), _slices_read_by_their_ranks():
        model, found = auto_model(config).from_pretrained(path, config=config, output_loading_info=True, **options)
    return model, sorted(name for name in found["missing_keys"] if not _may_begin(model, name))


@contextmanager
def _slices_read_by_their_ranks() -> Iterator[None]:
    """Let every rank read its own slices, where transformers has rank 0 read all and send it parameter by parameter."""
    if not all(hasattr(modeling_utils, name) for name in ("load_state_dict", "_load_state_dict_into_zero3_model")):
        yield  # of a version that calls them otherwise
        return
    list_tensors, send_whole = modeling_utils.load_state_dict, modeling_utils._load_state_dict_into_zero3_model
    stored: dict[str, Stored] = {}

    def list_and_open(file: str, *args: Any, **options: Any) -> Any:
        if os.fspath(file).endswith(".safetensors"):
            opened = safe_open(file, framework="pt", backend="pread")  # mapped pages would count as the rank's memory
            stored.update({name: (opened, name) for name in opened.keys()})  # noqa: SIM118
        return list_tensors(file, *args, **options)

    def read_slices(model: PreTrainedModel, tensors: dict[str, Tensor], options: Any) -> tuple[list[str], set[str]]:
        changes = options.weight_mapping or []
        if stored.keys() != tensors.keys() or any(isinstance(change, WeightConverter) for change in changes):
            found: tuple[list[str], set[str]] = send_whole(model, tensors, options)
            return found
        known, prefix = model.state_dict(), model.base_model_prefix
        renamed = {rename_source_key(name, changes, [], prefix, known)[0]: place for name, place in stored.items()}
        return _read_slices(model, renamed), known.keys() - renamed.keys()

    with _replaced(modeling_utils, load_state_dict=list_and_open, _load_state_dict_into_zero3_model=read_slices):
        yield


@torch.no_grad()
def _read_slices(model: PreTrainedModel, stored: Mapping[str, Stored]) -> list[str]:
    """Fill this rank's slices of parameters, and whole buffers, with what is stored; return what does not fit."""
    problems = []
    for name, tensor in model.state_dict(keep_vars=True).items():
        if name not in stored:
            continue
        file, stored_name = stored[name]
        found = tuple(file.get_slice(stored_name).get_shape())
        if found != full_shape(tensor):
            problems.append(f"size mismatch for {name}: {found} in the files, {full_shape(tensor)} by the config")
        elif hasattr(tensor, "ds_id"):
            shard = Shard(tensor)
            shard.write_working(_elements(file, stored_name, shard.start, shard.count))
        else:
            tensor.copy_(file.get_tensor(stored_name))
        tensor._is_hf_initialized = True  # so that transformers does not begin it at random
    return problems


def _elements(file: Any, name: str, start: int, count: int) -> Tensor:
    """Return (count,) elements of a stored tensor from a flat offset on; read are the rows in which they lie."""
    stored = file.get_slice(name)
    shape = stored.get_shape()
    if not count:
        return torch.empty(0)
    if not shape:
        return file.get_tensor(name).flatten()
    row = math.prod(shape[1:])
    first, last = start // row, -(-(start + count) // row)
    elements: Tensor = stored[first:last].flatten()[start - first * row :][:count]
    return elements


@contextmanager
def _ties_compared_whole() -> Iterator[None]:
    """Let a checkpoint's own output stay untied, as plain `from_pretrained` does where it is not the embedding.

    transformers ties the two only if `torch.equal` finds them so, by itself or behind a function of its own, and of
    partitioned parameters it would compare two empty tensors. The comparison is a collective.
    """
    compare = torch.equal

    def compare_whole(source: Tensor, target: Tensor) -> bool:
        with GatheredParameters([source, target]):
            return compare(source, target)

    with _replaced(torch, equal=compare_whole):
        yield


@contextmanager
def _replaced(module: ModuleType, **functions: Any) -> Iterator[None]:
    """Put functions in the place of those of the same names in a module."""
    before = {name: getattr(module, name) for name in functions}
    try:
        vars(module).update(functions)
        yield
    finally:
        vars(module).update(before)


def _may_begin(model: PreTrainedModel, name: str) -> bool:
    """Tell whether a parameter belongs to the classifier of an encoder, which is there to be trained."""
    inner = f"{model.base_model_prefix}."
    return classifies(model.config) and (not name.startswith(inner) or name.startswith(f"{inner}pooler."))
