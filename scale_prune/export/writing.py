"""The pruned model as a Hugging Face folder, written tensor by tensor."""

import os
import shutil
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from itertools import chain
from pathlib import Path

from torch import Tensor
from transformers import GenerationConfig, PretrainedConfig, PreTrainedTokenizerBase

from scale_prune.core import UnitGroup
from scale_prune.export.config_files import write_config, write_tokenizer
from scale_prune.export.factors import Plan, plan_for, stored_factors
from scale_prune.export.layouts import config_for, factorized_config, in_layout
from scale_prune.export.modeling_files import code_of, modeling_source, own_code
from scale_prune.models import family_of, stock_class
from scale_prune.system import complete_or_absent
from scale_prune.system.tensor_files import Portions, name_portions, write_portions

FILE_BYTES = 2**30


@dataclass(frozen=True, kw_only=True)
class Export:
    """A compacted model as it is to be loaded, by `from_pretrained` of the class that its family is loaded by.

    Attributes:
        config: the model's config; not changed, its width is not read.
        groups: the groups of the compacted model.
        layout: "uniform": one width, in the config key of the family; "pad": zero neurons up to the widest layer;
            "per_layer": each layer's own, in `per_layer_config`, with a modeling file for `trust_remote_code`.
        tokenizer: written along, if there is one.
        card: the model card, Markdown.
        generation_config: written along as it is, if there is one.
        tied_output: name of the output that a clustered embedding is tied to, "" where there is none.
        beside: files and folders that come along as they are.
    """

    config: PretrainedConfig
    groups: Sequence[UnitGroup]
    layout: str
    tokenizer: PreTrainedTokenizerBase | None
    card: str
    generation_config: GenerationConfig | None = None
    tied_output: str = ""
    beside: Sequence[Path] = ()

    def write(
        self,
        folder: str | os.PathLike[str],
        tensors: Iterable[tuple[str, Tensor]],
        *,
        max_file_bytes: int = FILE_BYTES,
        replace: bool = False,
    ) -> None:
        """Write the folder in one process. No more than one file is in memory at a time.

        Args:
            folder: the folder to make; must not exist, or be empty, or be one to `replace`.
            tensors: as for `write_weights`.
            max_file_bytes: as for `write_weights`.
            replace: a folder of this name goes when the new one is complete.

        Raises:
            ValueError: as `write_weights`; or the folder is not empty.
        """
        with complete_or_absent(Path(folder), replace=replace) as partial:
            self.write_beside(partial, self.write_weights(partial, tensors, max_file_bytes=max_file_bytes))

    def write_weights(
        self,
        folder: Path,
        tensors: Iterable[tuple[str, Tensor]],
        *,
        writes: Callable[[int], bool] = lambda number: True,
        max_file_bytes: int = FILE_BYTES,
    ) -> Portions:
        """Write the files of weights that this process is to write, as yet without their names.

        Args:
            folder: an existing folder.
            tensors: state-dict names and full tensors, already compacted, each name once and of tied tensors one. A
                tensor is copied before the next is asked for.
            writes: tells whether the file of a number is written here.
            max_file_bytes: largest size of a file of weights, in bytes; a larger tensor has a file to itself.

        Returns:
            What stands in all files, for `write_beside`.

        Raises:
            ValueError: the layout is uniform and layers differ in width; the layout is per_layer and transformers has
                no class for the config; the model belongs to no registered family.
        """
        plan = self._plan()
        config = self._config(plan)
        if plan is None:
            stored = in_layout(self.layout, tensors, self.groups, self.config)
        else:
            stored = stored_factors(tensors, self.groups, plan, transposed=family_of(self.config).transposed)
        in_files = self._names_in_files(config)
        named = ((in_files.get(name, name), tensor) for name, tensor in stored)
        return write_portions(folder, named, max_file_bytes, writes)

    def write_beside(self, folder: Path, portions: Portions) -> None:
        """Name the files of weights, and write all that stands beside them."""
        name_portions(folder, portions)
        config = self._config(self._plan())
        config.dtype = portions.dtype
        in_files, tied = self._names_in_files(config), getattr(stock_class(config), "_tied_weights_keys", None) or ()
        if {in_files.get(name, name) for name in tied}.intersection(chain.from_iterable(portions.names)):
            config.tie_word_embeddings = False  # whatever the config says, the model has an output of its own
        write_config(folder, config)
        if (code := code_of(config)) is not None:
            (folder / code.name).write_text(modeling_source(code, config), encoding="utf-8")
        if self.generation_config is not None:
            # Not save_pretrained, which refuses combinations that published models do have.
            self.generation_config.to_json_file(folder / "generation_config.json")
        if self.tokenizer is not None:
            write_tokenizer(folder, self.tokenizer)
        for path in (*own_code(config), *self.beside):
            (shutil.copytree if path.is_dir() else shutil.copyfile)(path, folder / path.name)
        if self.card:
            (folder / "README.md").write_text(self.card, encoding="utf-8")

    def _names_in_files(self, config: PretrainedConfig) -> dict[str, str]:
        """Return what the classes of transformers translate; code that comes with a model gets no translation."""
        return {} if code_of(config) is not None else dict(family_of(self.config).checkpoint_names)

    def _plan(self) -> Plan | None:
        """Return what becomes of factors, None where neurons were removed."""
        return plan_for(self.layout, self.groups, self.tied_output) if self.groups[0].kind == "component" else None

    def _config(self, plan: Plan | None) -> PretrainedConfig:
        if plan is None:
            return config_for(self.layout, self.config, self.groups)
        return factorized_config(self.layout, self.config, plan)
