"""A model from its files into the shards of real ranks."""

import json
from pathlib import Path
from typing import Any
from unittest.mock import patch

import pytest
import torch
from distributed import run_ranks
from engines import ALL_GATHERED, call_each, ds_config
from models import FAMILIES, tiny_model
from safetensors.torch import load_file
from torch import Tensor
from transformers import AutoConfig, modeling_utils

from scale_prune.models import auto_model
from scale_prune.zero3 import load_model
from scale_prune.zero3.shard import Shard

pytestmark = pytest.mark.distributed

SOME_FAMILIES = ("llama", "gpt_neo", "gemma3_text", "falcon", "codegen")
FORMS = ("sharded", "without prefix", "bin")
SEND_WHOLE = modeling_utils._load_state_dict_into_zero3_model
BF16 = ds_config(bf16={"enabled": True})


def stored(folder: Path, model_type: str, form: str) -> Path:
    """Return the folder of a tiny model whose weights are stored in some form."""
    path, model = folder / f"{model_type} {form}", tiny_model(model_type, seed=3)
    model.save_pretrained(path, max_shard_size="2KB" if form == "sharded" else "5GB")
    if form == "without prefix":
        getattr(model, model.base_model_prefix).save_pretrained(path)
        (path / "config.json").write_text(json.dumps(model.config.to_dict(), default=str))
    if form == "bin":
        torch.save(load_file(path / "model.safetensors"), path / "pytorch_model.bin")
        (path / "model.safetensors").unlink()
    return path


def slices(path: Path, config: dict[str, Any]) -> dict[str, tuple[int, Tensor]]:
    """Return where this rank's slices begin and what is in them, and whole buffers; only a pickle may be sent whole."""
    with patch.object(modeling_utils, "_load_state_dict_into_zero3_model", wraps=SEND_WHOLE) as sent_whole:
        model = load_model(str(path), config)
    assert sent_whole.called == path.name.endswith("bin")
    found = {name: (0, buffer) for name, buffer in model.named_buffers()}
    for name, parameter in model.named_parameters():
        shard = Shard(parameter)
        found[name] = (shard.start, shard.working().clone())
    return found


@pytest.mark.parametrize(
    ("world_size", "model_types"),
    [(3, SOME_FAMILIES), *(pytest.param(size, tuple(FAMILIES), marks=pytest.mark.slow) for size in (1, 2))],
    ids=str,
)
def test_every_rank_has_the_slices_of_the_plain_model(
    world_size: int, model_types: tuple[str, ...], tmp_path: Path
) -> None:
    cases = [(stored(tmp_path, model_type, "one"), ds_config()) for model_type in model_types]
    cases += [(stored(tmp_path, "gpt2", form), config) for form in FORMS for config in (ds_config(), BF16)]
    cases += [(cases[0][0], ds_config(persistence=ALL_GATHERED))]
    for found in run_ranks(call_each, world_size, slices, cases):
        for (path, config), own in zip(cases, found, strict=True):
            dtype = torch.bfloat16 if config is BF16 else torch.float32
            plain: Any = auto_model(AutoConfig.from_pretrained(path)).from_pretrained(path, dtype=dtype)
            whole = dict(plain.named_parameters()) | dict(plain.named_buffers())
            assert own.keys() == whole.keys()
            for name, (start, values) in own.items():
                expected = whole[name].detach().flatten()[start : start + values.numel()]
                assert torch.equal(values.flatten(), expected), (path, name)
