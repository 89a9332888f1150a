"""Tiny random models of every family, shared by the tests: prime sizes, layers of different kept widths."""

import json
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer, normalizers, pre_tokenizers
from tokenizers.models import BPE
from tokenizers.processors import TemplateProcessing
from tokenizers.trainers import BpeTrainer
from torch import Tensor, nn
from transformers import AutoConfig, LlamaTokenizer, PretrainedConfig, PreTrainedModel, PreTrainedTokenizerFast

from scale_prune.config.settings import PruningConfig
from scale_prune.core.compaction import select_units, set_members
from scale_prune.core.groups import UnitGroup
from scale_prune.core.low_rank import svd_factors
from scale_prune.criteria import CRITERIA
from scale_prune.export.writing import Export
from scale_prune.models.factorized import put_factors
from scale_prune.models.families import FAMILIES, Family, auto_model, family_of
from scale_prune.models.layer_units import linear_names, unit_groups
from scale_prune.pruning.units import removes_components, units_of

VOCABULARY, HIDDEN, WIDTH, LAYERS, POSITIONS = 29, 11, 17, 3, 31

# Widths of the layers that each layout is tried with.
WIDTHS = {"uniform": (7, 7, 7), "pad": (5, 13, 2), "per_layer": (5, 13, 2)}

# What a model type needs beside the common sizes.
EXTRAS: dict[str, dict[str, Any]] = {
    "gpt_neo": {"attention_types": [[["global", "local", "global"], 1]], "window_size": 5},
    "gptj": {"rotary_dim": 4},
    "opt": {"word_embed_proj_dim": HIDDEN},
    "codegen": {"hidden_size": 12, "num_attention_heads": 4, "rotary_dim": 2},
    "falcon": {"hidden_size": 16, "num_attention_heads": 2, "num_kv_heads": 1, "new_decoder_architecture": True},
    **{key: {"hidden_size": 16, "num_attention_heads": 2, "head_dim": 8} for key in ("phi", "persimmon")},
    **{key: {"sliding_window": 5} for key in ("gemma2", "gemma3_text", "cohere2", "exaone4", "olmo3", "ministral")},
    **{model_type: {"num_labels": 5} for model_type, family in FAMILIES.items() if family.classifies},
}

# Families whose heads cannot leave, in the sizes of the tests, and all others.
HEADS_REMAIN = {"codegen", "phi3", "olmo2", "olmo3", "cohere", "stablelm"}
LOSE_HEADS = sorted(set(FAMILIES) - HEADS_REMAIN)


@contextmanager
def own_registrations() -> Iterator[dict[str, Family]]:
    """Give the registry of families; what is registered meanwhile is forgotten at the end."""
    before = dict(FAMILIES)
    try:
        yield FAMILIES
    finally:
        FAMILIES.clear()
        FAMILIES.update(before)


def tiny_config(model_type: str, **settings: Any) -> PretrainedConfig:
    """Return a config of a registered model type; `settings` win over the tiny sizes."""
    sizes: dict[str, Any] = {
        "vocab_size": VOCABULARY,
        "hidden_size": HIDDEN,
        "num_hidden_layers": LAYERS,
        "num_attention_heads": 1,
        "max_position_embeddings": POSITIONS,
        "pad_token_id": 0,
        "bos_token_id": 1,
        "eos_token_id": 2,
        FAMILIES[model_type].width_key: WIDTH,
    }
    if FAMILIES[model_type].layers == "model.layers":
        sizes |= {"num_key_value_heads": 1, "head_dim": 4}
    return AutoConfig.for_model(model_type, **{**sizes, **EXTRAS.get(model_type, {}), **settings})


def several_heads(model_type: str) -> dict[str, Any]:
    """Return settings of a tiny model with 6 heads of 4, or 3 of keys and values with 2 of queries each."""
    sizes: dict[str, Any] = {"hidden_size": 24, "num_attention_heads": 6, "head_dim": 4, "num_key_value_heads": 3}
    if FAMILIES[model_type].layers != "model.layers":
        sizes = {"hidden_size": 24, "num_attention_heads": 6}
    own: dict[str, dict[str, Any]] = {
        "falcon": {"num_kv_heads": 3},
        "gpt_bigcode": {"multi_query": False},
        "cohere": {"use_qk_norm": True},
        "stablelm": {"qk_layernorm": True},
        "opt": {"word_embed_proj_dim": 24},
    }
    return sizes | own.get(model_type, {})


def tiny_model(model_type: str, seed: int = 0, **settings: Any) -> PreTrainedModel:
    """Return a model in evaluation mode with every parameter random, biases included."""
    config = tiny_config(model_type, **settings)
    model = auto_model(config).from_config(config).eval()
    generator = torch.Generator().manual_seed(seed)
    for parameter in model.parameters():
        parameter.data.normal_(std=0.3, generator=generator)
    return model


def prepared_units(model: PreTrainedModel, pruning: PruningConfig) -> tuple[UnitGroup, ...]:
    """Factorize the weights of a model in one piece, as `prepare` does under ZeRO-3, and list the units."""
    if removes_components(pruning):
        criterion, transposed = CRITERIA[pruning.criterion](pruning, 0), family_of(model.config).transposed
        for name in linear_names(model, pruning.target_names):
            weight = model.get_parameter(f"{name}.weight").detach()
            weight = weight.T if transposed else weight
            down, up = svd_factors(weight, criterion.components((weight.shape[0], weight.shape[1])))
            put_factors(model, name, nn.Parameter(down), nn.Parameter(up))
    return units_of(model, pruning)


def tokens(batch: int = 2, length: int = 7, seed: int = 0) -> Tensor:
    """Return int64 (batch, length) random token ids."""
    return torch.randint(3, VOCABULARY, (batch, length), generator=torch.Generator().manual_seed(seed))


def random_keep(groups: Sequence[UnitGroup], widths: Sequence[int], seed: int = 0) -> dict[str, Tensor]:
    """Return for each group the ascending indices of as many random units as `widths` says."""
    generator = torch.Generator().manual_seed(seed)
    return {
        group.name: torch.randperm(group.num_units, generator=generator)[:width].sort().values
        for group, width in zip(groups, widths, strict=True)
    }


def compact_model(model: nn.Module, groups: Sequence[UnitGroup], keep: Mapping[str, Tensor]) -> tuple[UnitGroup, ...]:
    """Take all units but those in `keep` out of a model that lies in one piece, and return the smaller groups."""
    smaller = []
    for group in groups:
        parameters = {}
        for member in group.members:
            old = model.get_parameter(member.name)
            kept = select_units(old.detach(), keep[group.name], member)
            parameters[member.name] = nn.Parameter(kept, old.requires_grad)
        smaller.append(set_members(model, group, parameters, keep[group.name].numel()))
    return tuple(smaller)


@torch.no_grad()
def mask_units(model: PreTrainedModel, groups: Sequence[UnitGroup], keep: Mapping[str, Tensor]) -> None:
    """Zero everything that the units outside `keep` own, in place."""
    for group in groups:
        masked = torch.ones(group.num_units, dtype=torch.bool)
        masked[keep[group.name]] = False
        for member in group.members:
            by_unit = model.get_parameter(member.name).view(member.unit_shape)
            by_unit.movedim(member.unit_dim, 0)[masked] = 0.0


@torch.no_grad()
def logits(model: PreTrainedModel, ids: Tensor) -> Tensor:
    """Return float32 (batch, length, vocabulary), of a classifier (batch, classes)."""
    return model(ids, use_cache=False).logits


def named_state(model: nn.Module) -> Iterator[tuple[str, Tensor]]:
    """Yield name and tensor of what a checkpoint of a model in one piece holds, tied ones once, by the first name."""
    seen = set()
    for name, tensor in model.state_dict(keep_vars=True).items():
        if id(tensor) not in seen:
            seen.add(id(tensor))
            yield name, tensor.detach()


def export(folder: Path, model: PreTrainedModel, groups: tuple[UnitGroup, ...], layout: str, **settings: Any) -> Path:
    """Write a compacted model that lies in memory."""
    writing: dict[str, Any] = {"tensors": named_state(model)}
    writing |= {name: settings.pop(name) for name in (*writing, "max_file_bytes", "replace") if name in settings}
    beside: dict[str, Any] = {"tokenizer": None, "card": "# Pruned"} | settings
    Export(config=model.config, groups=groups, layout=layout, **beside).write(folder, **writing)
    return folder


def compacted(model_type: str, layout: str, **settings: Any) -> tuple[PreTrainedModel, tuple[UnitGroup, ...], Tensor]:
    """Return a compacted model, its groups, and the logits of its masked form for `tokens()`."""
    model = tiny_model(model_type, **settings)
    groups = unit_groups(model)
    keep = random_keep(groups, WIDTHS[layout])
    mask_units(model, groups, keep)
    masked = logits(model, tokens())
    return model, compact_model(model, groups, keep), masked


BLANKS = ("none", "normalizer", "metaspace", "bytes", "llama")
"""How a tokenizer puts a blank before a text: Llama 2's file, newer files like it, GPT-2's option, Llama's class."""

SPOKEN = "the a neuron layer model keeps drops\nlearns prunes fast slowly and then again while training on text\n"


def tiny_tokenizer(blank: str = "none", *, bos: bool = True) -> PreTrainedTokenizerFast:
    """Return a trained tokenizer, of <unk>, <s> and </s> as 0, 1 and 2, which puts <s> before a text where `bos`."""
    space = "Ġ" if blank in ("none", "bytes") else "▁"
    tokenizer = Tokenizer(BPE(unk_token="<unk>"))
    if blank == "normalizer":
        tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    elif space == "▁":
        tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="first")
    else:
        tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=blank == "bytes")
    alphabet = [*map(chr, range(ord("!"), 127)), space, "\n" if space == "▁" else "Ċ"]
    trainer = BpeTrainer(vocab_size=150, special_tokens=["<unk>", "<s>", "</s>"], initial_alphabet=alphabet)
    tokenizer.train_from_iterator([f" {word}" for word in SPOKEN.split()], trainer)
    template, special = ("<s> $A", [("<s>", 1)]) if bos else ("$A", [])
    tokenizer.post_processor = TemplateProcessing(single=template, special_tokens=special)
    if blank == "llama":
        model = json.loads(tokenizer.to_str())["model"]
        return LlamaTokenizer(model["vocab"], [tuple(pair) for pair in model["merges"]], add_bos_token=bos)
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>", unk_token="<unk>")
