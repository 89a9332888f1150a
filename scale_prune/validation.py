"""Perplexity of an engine on the validation text, each rank measuring its part."""

from typing import Any

import torch

from scale_prune.batches import TokenBlocks, validation_batches
from scale_prune.evaluation import perplexity
from scale_prune.zero3 import Runtime


class Validation:
    """The validation text.

    Args:
        blocks: the text.
        micro_batch_size: blocks in a forward pass of a rank.
        runtime: the ranks that share it.
    """

    def __init__(self, blocks: TokenBlocks, micro_batch_size: int, runtime: Runtime) -> None:
        self.blocks, self.micro_batch_size, self.runtime = blocks, micro_batch_size, runtime

    @torch.no_grad()
    def perplexity(self, engine: Any) -> float:
        """Return the perplexity of what an engine holds; it is in evaluation mode afterwards. A collective."""
        engine.eval()
        batches = validation_batches(
            self.blocks,
            micro_batch_size=self.micro_batch_size,
            rank=self.runtime.rank,
            world_size=self.runtime.world_size,
        )
        device = self.runtime.device
        value = perplexity(
            lambda input_ids: engine(input_ids=input_ids, use_cache=False).logits,
            ((input_ids.to(device), labels.to(device)) for input_ids, labels in batches),
            self.runtime.add_over_ranks,
        )
        engine.empty_partition_cache()  # finishes prefetches that only a backward pass would use
        return value
