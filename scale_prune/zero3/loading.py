"""A model from its files straight into shards: every rank reads its own slices."""

import copy
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from deepspeed import comm as dist
from deepspeed.runtime.zero.partition_parameters import GatheredParameters
from torch import Tensor
from transformers import AutoConfig, PretrainedConfig, PreTrainedModel, modeling_utils
from transformers.integrations import HfDeepSpeedConfig

from scale_prune.models import auto_model, classifies
from scale_prune.zero3.runtime import precision

UNREADABLE = ("loading state_dict", "PytorchStreamReader", "magic number")


def load_model(
    path: str, ds_config: dict[str, Any], *, trust_remote_code: bool = False, config: PretrainedConfig | None = None
) -> PreTrainedModel:
    """Load a model straight into ZeRO-3 shards, in the precision of the ds_config. A collective.

    Args:
        path: Hugging Face folder or hub name.
        ds_config: without "auto" values.
        trust_remote_code: run code that comes with the model.
        config: takes the place of the folder's; a classifier that is new to an encoder begins at random.

    Raises:
        ValueError: its weights are missing, damaged or of another shape, as some rank sees it.
    """
    keep_alive = HfDeepSpeedConfig(copy.deepcopy(ds_config))
    options: dict[str, Any] = {"dtype": precision(ds_config), "trust_remote_code": trust_remote_code}
    model, problem = None, ""
    try:
        config = config or AutoConfig.from_pretrained(path, trust_remote_code=trust_remote_code)
        load = auto_model(config).from_pretrained
        with _ties_compared_whole():
            model, found = load(path, config=config, output_loading_info=True, **options)
        if missing := sorted(name for name in found["missing_keys"] if not _may_begin(model, name)):
            problem = f"{len(missing)} of them are missing and would be random, {missing[0]} for one"
    except Exception as error:  # a broken file raises whatever its content comes to
        if isinstance(error, RuntimeError) and not any(words in str(error) for words in UNREADABLE):
            raise
        problem = " ".join(str(error).split())[:300] or type(error).__name__
    del keep_alive
    _raise_together(f"--model {path}: its weights cannot be loaded: {problem}" if problem else "")
    assert model is not None
    return model


@contextmanager
def _ties_compared_whole() -> Iterator[None]:
    """Let a checkpoint's own output stay untied, as plain `from_pretrained` does where it is not the embedding.

    transformers 5 ties the two only if their values are equal, and of partitioned parameters it would compare two empty
    tensors. The comparison is a collective.
    """
    compare = modeling_utils._tied_params_are_equal

    def compare_whole(source: Tensor, target: Tensor) -> bool:
        with GatheredParameters([source, target]):
            return compare(source, target)

    modeling_utils._tied_params_are_equal = compare_whole
    try:
        yield
    finally:
        modeling_utils._tied_params_are_equal = compare


def _may_begin(model: PreTrainedModel, name: str) -> bool:
    """Tell whether a parameter belongs to the classifier of an encoder, which is there to be trained."""
    inner = f"{model.base_model_prefix}."
    return classifies(model.config) and (not name.startswith(inner) or name.startswith(f"{inner}pooler."))


def _raise_together(problem: str) -> None:
    """Raise on all ranks where one has a problem: only rank 0 sees shapes that do not fit. A collective."""
    problems: list[Any] = [None] * dist.get_world_size()
    torch.distributed.all_gather_object(problems, problem)
    if any(problems):
        raise ValueError(next(filter(None, problems)))
