"""A GGUF file in llama.cpp, called like a model of transformers."""

from pathlib import Path
from typing import Any, Self

import numpy as np
import torch
from gguf import GGUFReader
from torch import Tensor
from transformers.utils import ModelOutput

SUFFIX = ".gguf"


def is_gguf(path: str) -> bool:
    """Tell whether a model is named as a GGUF file."""
    return path.endswith(SUFFIX)


def check_gguf_model(path: str) -> None:
    """Make sure that a file can be measured.

    Raises:
        ValueError: there is none, or llama-cpp-python is not installed.
    """
    if not Path(path).is_file():
        raise ValueError(f"--model {path}: there is no such file")
    try:
        import llama_cpp  # noqa: F401
    except ImportError as missing:
        raise ValueError(
            f'--model {path} is measured in llama.cpp: pip install "scale_prune[llama_cpp]"; '
            f"where its own build dies of an illegal instruction, with CMAKE_ARGS=-DGGML_NATIVE=OFF"
        ) from missing


class GgufModel:
    """The model in a file, on this rank's processor.

    Args:
        path: the file.
        positions: tokens of the longest text.
    """

    device = torch.device("cpu")

    def __init__(self, path: str, positions: int) -> None:
        from llama_cpp import Llama

        threads = torch.get_num_threads()
        self.llama = Llama(path, n_ctx=positions, n_batch=positions, n_threads=threads, logits_all=True, verbose=False)
        tensors = GGUFReader(path).tensors
        self.sizes = {tensor.name: (int(tensor.n_elements), int(tensor.n_bytes)) for tensor in tensors}
        self.is_matrix = {tensor.name: len(tensor.shape) > 1 for tensor in tensors}

    def __call__(self, input_ids: Tensor, past_key_values: Any = None, use_cache: bool = False) -> Any:
        """Return the logits, float32 (B, T, V); with a cache, of one row that goes on where it was left."""
        rows = []
        for ids in input_ids.tolist():
            if past_key_values is None:
                self.llama.reset()
            self.llama.eval(ids)
            scores = self.llama.scores[self.llama.n_tokens - len(ids) : self.llama.n_tokens]
            rows.append(torch.from_numpy(np.array(scores)))
        return ModelOutput(logits=torch.stack(rows), past_key_values=True)

    def eval(self) -> Self:
        """Do what callers ask a model of torch for: nothing is to be done."""
        return self

    def to(self, device: torch.device) -> Self:
        """Do what callers ask a model of torch for: it stays where it is."""
        return self

    def empty_partition_cache(self) -> None:
        """Do what callers ask an engine for: nothing is partitioned."""
