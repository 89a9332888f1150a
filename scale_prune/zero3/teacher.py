"""Distillation: the student learns the dense teacher's distribution beside the text itself.

    loss = (1 - alpha) * CE + alpha * T^2 * KL(teacher || student)

Source: arXiv 2302.03773, section 4; alpha 0.5 and T = 2 are the authors' choice. T^2 keeps the gradient's size where
the temperature T flattens both distributions (arXiv 1503.02531).
Deviation: KL is a mean over predicted tokens, the same ones as in CE; the authors' code adds up positions.

Shape legend: B blocks, T tokens in a block, V vocabulary.
"""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from scale_prune.zero3.backend import num_parameters
from scale_prune.zero3.loading import load_model
from scale_prune.zero3.rebuild import release
from scale_prune.zero3.runtime import inference_engine


class Teacher:
    """A dense model that only predicts, sharded over the ranks like the student.

    Args:
        path: Hugging Face folder or hub name.
        ds_config: the run's, without "auto" values.
        trust_remote_code: run code that comes with the model.
    """

    def __init__(self, path: str, ds_config: dict[str, Any], *, trust_remote_code: bool = False) -> None:
        model = load_model(path, ds_config, trust_remote_code=trust_remote_code, flag="teacher")
        self.num_parameters = num_parameters(model)
        self.engine = inference_engine(model, ds_config)
        self.engine.eval()

    @torch.no_grad()
    def logits(self, arguments: Mapping[str, Any]) -> Tensor:
        """Return the logits for a model's arguments. A collective.

        What is gathered in advance for the next pass stays: emptying that every time costs as much as two more passes.
        """
        logits: Tensor = self.engine(**arguments).logits
        return logits

    def let_go(self) -> None:
        """Free the teacher's memory; it cannot be used any more. A collective."""
        self.engine.empty_partition_cache()
        release(self.engine)
        del self.engine
