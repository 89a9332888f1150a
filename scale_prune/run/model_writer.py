"""A run's model as a Hugging Face folder."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from transformers import GenerationConfig

from scale_prune.core import UnitGroup
from scale_prune.data import Inputs
from scale_prune.export import GGUF, Export, convert, model_card, open_folder
from scale_prune.models import auto_model, tied_output
from scale_prune.system import write_atomically
from scale_prune.zero3 import Runtime, Zero3Backend, told_to_all, write_model


class ModelWriter:
    """Writes what an engine holds into the run's folder.

    Args:
        inputs: the run's inputs, of which configuration and tokenizer are written along.
        generation_config: of the model as it was loaded, if it has one.
        runtime: the ranks.
    """

    def __init__(self, inputs: Inputs, generation_config: GenerationConfig | None, runtime: Runtime) -> None:
        self.inputs, self.generation_config, self.runtime = inputs, generation_config, runtime

    def write(self, name: str, backend: Zero3Backend, groups: tuple[UnitGroup, ...], layout: str) -> Path:
        """Write a folder of a name, and return it when it is there for all ranks. A collective.

        Raises:
            ValueError: a rank cannot write it, e.g. because the disk is full.
        """
        config, model_config = self.inputs.config, self.inputs.model_config
        folder = Path(config.output.output_dir) / name
        loader, prunes = auto_model(model_config).__name__, config.pruning.remaining < 1
        export = Export(
            config=model_config,
            groups=groups,
            layout=layout,
            tokenizer=self.inputs.tokenizer,
            # Of a model of which nothing leaves there is nothing to tell before there are numbers.
            card=model_card(str(config.training.model), groups=groups, layout=layout, loader=loader) if prunes else "",
            generation_config=self.generation_config,
            tied_output=tied_output(backend.module),
        )
        # It replaces what this run wrote before it was killed, and resumed.
        write_model(backend, export, folder, replace=True)
        return folder

    def write_card(self, folder: Path, groups: tuple[UnitGroup, ...], layout: str, report: Mapping[str, Any]) -> None:
        """Write a folder's card anew, with the numbers that are known now; on rank 0."""
        model, loader = str(self.inputs.config.training.model), auto_model(self.inputs.model_config).__name__
        card = model_card(model, groups=groups, layout=layout, loader=loader, report=report)
        write_atomically(folder / "README.md", card)

    def write_gguf(self, folder: Path) -> None:
        """Write a folder once more, as a file beside it. A collective; rank 0 writes.

        Raises:
            ValueError: rank 0 cannot write it.
        """
        file = folder.with_suffix(".gguf")
        with told_to_all(file):
            if self.runtime.is_main:
                convert(open_folder(folder), GGUF, file, replace=True)
