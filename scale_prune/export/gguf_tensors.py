"""The tensors of a model in the names, orders and types of llama.cpp."""

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import numpy as np
import torch
from einops import rearrange
from gguf import MODEL_ARCH_NAMES, GGMLQuantizationType, get_tensor_name_map
from gguf.quants import quant_shape_to_byte_shape, quantize
from torch import Tensor

from scale_prune.core import pad_units
from scale_prune.export.gguf_words import rope_factors
from scale_prune.export.stored import Stored
from scale_prune.models import family_of, linear_names, stock_class

TYPES = ("f32", "f16", "bf16", "q8_0")
"""Of `gguf`, in small letters."""

SAME = {torch.float32: "f32", torch.float16: "f16", torch.bfloat16: "bf16"}


@dataclass(frozen=True, kw_only=True)
class GgufTensor:
    """A tensor of the file, made when it is written.

    Attributes:
        name: its name in the file.
        shape: its shape, as of torch.
        type: a GGMLQuantizationType.
        make: gives it.
    """

    name: str
    shape: tuple[int, ...]
    type: Any
    make: Callable[[], Tensor]

    def announce(self, writer: Any) -> None:
        """Tell the writer of a file what will come."""
        plain = {GGMLQuantizationType.F32: np.float32, GGMLQuantizationType.F16: np.float16}.get(self.type)
        shape = self.shape if plain else quant_shape_to_byte_shape(self.shape, self.type)
        size = int(np.prod(shape)) * np.dtype(plain or np.uint8).itemsize
        writer.add_tensor_info(self.name, shape, np.dtype(plain or np.uint8), size, self.type)

    def data(self) -> Any:
        """Return the array that is written."""
        return quantize(self.make().float().contiguous().numpy(), self.type)


def type_of(stored: Stored) -> str:
    """Return the one of `TYPES` for what a folder's matrices are."""
    name = stored.groups[0].members[0].name
    return SAME.get(stored.tensor(name).dtype, "f32")


def tensors_for(stored: Stored, dialect: Any, widths: list[int], dtype: str) -> list[GgufTensor]:
    """List the tensors of the file.

    Args:
        stored: the model.
        dialect: how llama.cpp wants it.
        widths: neurons of each layer in the file.
        dtype: of matrices, one of `TYPES`.

    Raises:
        ValueError: a tensor has no name there.
    """
    arch = next(arch for arch, name in MODEL_ARCH_NAMES.items() if name == dialect.arch)
    names = get_tensor_name_map(arch, len(widths))
    orders = _Orders(stored, dialect, widths)
    found = []
    for name in stored.names:
        called = names.get_name(name, try_suffixes=(".weight", ".bias"))
        if called is None:
            raise ValueError(f"gguf has no name for {name} in its architecture {dialect.arch}")
        shape = orders.shape(name)
        wanted = dtype if len(shape) > 1 and not called.startswith("position_embd") else "f32"
        wanted = "f16" if wanted == "q8_0" and shape[-1] % 32 else wanted
        kind = GGMLQuantizationType[wanted.upper()]
        found.append(GgufTensor(name=called, shape=shape, type=kind, make=partial(orders.tensor, name)))
    if dialect.own_output and not any(tensor.name == "output.weight" for tensor in found):
        embedding = next(tensor for tensor in found if tensor.name == "token_embd.weight")
        found.append(replace(embedding, name="output.weight"))
    if (factors := rope_factors(stored.config)) is not None:
        kind = GGMLQuantizationType.F32
        found.append(GgufTensor(name="rope_freqs.weight", shape=tuple(factors.shape), type=kind, make=lambda: factors))
    return found


class _Orders:
    """The tensors of a model with rows, columns and widths as llama.cpp wants them.

    Args:
        stored: the model.
        dialect: what llama.cpp wants.
        widths: neurons of each layer in the file.
    """

    def __init__(self, stored: Stored, dialect: Any, widths: list[int]) -> None:
        self.stored, self.dialect, self.config = stored, dialect, stored.config
        self.members = {
            member.name: (member, width)
            for group, width in zip(stored.groups, widths, strict=True)
            for member in group.members
        }
        with torch.device("meta"):
            linear = linear_names(stock_class(stored.config)(stored.config), ("mlp", "attention"))
        transposed = family_of(stored.config).transposed
        self.transposed = {f"{name}.weight" for name in linear} if transposed else set()

    def shape(self, name: str) -> tuple[int, ...]:
        """Return the shape in the file."""
        shape = [*self.stored.shape(name)]
        if name in self.members:
            member, width = self.members[name]
            shape[member.dim] = member.pieces * member.block * width
        return tuple(shape[::-1] if name in self.transposed else shape)

    def tensor(self, name: str) -> Tensor:
        """Return the tensor of the file."""
        tensor, dialect = self.stored.tensor(name), self.dialect
        if name in self.members:
            member, width = self.members[name]
            tensor = pad_units(tensor, width, member)
        if name in self.transposed:
            tensor = tensor.T
        module = name.rpartition(".")[0].rpartition(".")[2]
        if dialect.pairs and module in ("q_proj", "k_proj"):
            heads = self.config.num_attention_heads if module == "q_proj" else self.config.num_key_value_heads
            tensor = rearrange(tensor, "(head half row) ... -> (head row half) ...", head=heads, half=2)
        by_head = dialect.fused and not getattr(self.config, "multi_query", False)
        if by_head and module in ("query_key_value", "c_attn"):
            heads = self.config.num_attention_heads
            tensor = rearrange(tensor, "(head part row) ... -> (part head row) ...", head=heads, part=3)
        # In float32, as transformers adds it: bfloat16 has no numbers between 1 and 1.0078.
        return tensor.float() + dialect.shift if dialect.shift and module.endswith("norm") else tensor
