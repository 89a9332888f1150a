"""A model's folder, read tensor by tensor: what a conversion starts from. No code of the folder runs."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import PretrainedConfig, PreTrainedModel
from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.core_model_loading import WeightRenaming, rename_source_key

from scale_prune.core import Member, UnitGroup, resize_group, select_units
from scale_prune.export.factors import product, whole_table
from scale_prune.models import family_of, stock_class, unit_groups
from scale_prune.system.tensor_files import TensorFiles


@dataclass(frozen=True, kw_only=True)
class Stored:
    """A folder in any layout, as a model of neurons: factors are multiplied out, padding is left out.

    Attributes:
        folder: the folder.
        config: of the class of transformers, without what tells a layout.
        files: the weights, under their names in the files.
        written: config.json as it is.
    """

    folder: Path
    config: PretrainedConfig
    files: TensorFiles
    written: Mapping[str, Any]

    @cached_property
    def groups(self) -> tuple[UnitGroup, ...]:
        """The neurons that are there: up to the last one of a layer that is not zero in all its tensors; and heads, if
        some have left."""
        neurons = tuple(resize_group(group, self._live(group)) for group in unit_groups(self._model))
        own = self.written.get("per_layer_config") or {}
        if not any("num_attention_heads" in words for words in own.values()):
            return neurons
        heads = unit_groups(self._model, ("attention",))
        return (*neurons, *(resize_group(group, self._in_files(group.members[0]).num_units) for group in heads))

    @cached_property
    def names(self) -> dict[str, Sequence[str]]:
        """Names in the state dict of the model of transformers, and the tensors in the files that each is made of.

        What that model does not know, e.g. buffers of its older versions, is left out, as where transformers loads it.

        Raises:
            ValueError: the files lack a parameter, but for a head that they have none of at all.
        """
        known, prefix = self._model.state_dict(), self._model.base_model_prefix
        conversions = get_model_conversion_mapping(self._model)
        renamings = [each for each in conversions if isinstance(each, WeightRenaming)]
        found: dict[str, list[str]] = {}
        for stored_name in self.files.names:
            name, _ = rename_source_key(self._whole(stored_name), renamings, [], prefix, known)
            if name in known:
                found.setdefault(name, []).append(stored_name)
        ties = (getattr(self._model, "_tied_weights_keys", None) or {}) if self.config.tie_word_embeddings else {}
        for output, table in ties.items():
            if output in found and table not in found:
                found[table] = found.pop(output)  # files have the only copy by either name
            elif _alike(self.files, found.get(output, []), found.get(table, [])):
                del found[output]  # a second copy would be read as an output of the model's own
        inner = [name for name, _ in self._model.named_parameters() if name.startswith(f"{prefix}.")]
        needed = (name for name in inner if name not in ties and "pooler" not in name)
        if missing := next((name for name in needed if name not in found), None):
            raise ValueError(
                f"{self.folder} holds no {missing}, only {', '.join(self.files.names[:3])} and so on; give a model by "
                f"the names that {type(self._model).__name__} of transformers loads"
            )
        return dict(found)

    def shape(self, name: str) -> tuple[int, ...]:
        """Return the shape of a tensor of the state dict, without reading it."""
        if (member := self._members.get(name)) is not None:
            return member.shape
        return self._full_shape(name)

    def tensor(self, name: str) -> Tensor:
        """Return a tensor of the state dict, a copy of its own."""
        tensor, member = self._full(name), self._members.get(name)
        return (
            tensor if member is None else select_units(tensor, torch.arange(member.num_units), self._in_files(member))
        )

    @cached_property
    def _members(self) -> dict[str, Any]:
        return {member.name: member for group in self.groups for member in group.members}

    @cached_property
    def _model(self) -> PreTrainedModel:
        """The dense model of transformers, without memory."""
        with torch.device("meta"):
            model: PreTrainedModel = stock_class(self.config)(self.config)
        return model

    def _whole(self, name: str) -> str:
        """Return the name in the state dict of what a tensor of the files is a part of."""
        module, _, part = name.rpartition(".")
        owner, _, factor = module.rpartition(".")
        if owner in self.written.get("factorized", {}) and factor in ("down", "up"):
            return f"{owner}.{part}"
        table = self._table
        return f"{table}.weight" if table and name.startswith(f"{table}.") else name

    @property
    def _table(self) -> str:
        """The name of a clustered embedding, "" where there is none."""
        return str(self.written.get("factorized_embedding", {"names": [""]})["names"][0])

    def _full_shape(self, name: str) -> tuple[int, ...]:
        parts = self.names[name]
        if name == f"{self._table}.weight":
            width = next(self.files.shape(part)[1] for part in parts if part.endswith(".down"))
            return sum(self.written["factorized_embedding"]["sizes"]), width
        if len(parts) == 1:
            return self.files.shape(parts[0])
        down, up = (self.files.shape(part) for part in sorted(parts))
        return (down[1], up[0]) if family_of(self.config).transposed else (up[0], down[1])

    def _full(self, name: str) -> Tensor:
        parts = self.names[name]
        if name == f"{self._table}.weight":
            clusters = {part.removeprefix(f"{self._table}."): self.files.read(part) for part in parts}
            return whole_table(clusters, len(self.written["factorized_embedding"]["sizes"]))
        if len(parts) == 1:
            return self.files.read(parts[0])
        down, up = (self.files.read(part) for part in sorted(parts))
        whole = product(down, up)
        return whole.T.contiguous() if family_of(self.config).transposed else whole

    def _in_files(self, member: Member) -> Member:
        """Return a member as the files have it, with all their units."""
        return replace(member, shape=self._full_shape(member.name))

    def _live(self, group: UnitGroup) -> int:
        """Return the number of neurons up to the last that is not zero everywhere; at least 1."""
        members = [self._in_files(member) for member in group.members]
        live = torch.zeros(members[0].num_units, dtype=torch.bool)
        for member in reversed(members):
            if live[-1:].any():
                break
            by_unit = self._full(member.name).reshape(member.unit_shape).movedim(member.unit_dim, 0)
            live |= by_unit.reshape(len(live), -1).ne(0).any(1)
        return max(1, int(live.nonzero().max()) + 1) if live.any() else 1


def _alike(files: TensorFiles, first: Sequence[str], second: Sequence[str]) -> bool:
    """Tell whether two tensors of a state dict are each one tensor in the files, and equal."""
    return len(first) == len(second) == 1 and torch.equal(files.read(first[0]), files.read(second[0]))
