"""Running text, cut into blocks: every token but a block's first, which may be BOS, is predicted."""

import hashlib
from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import Any

from torch import Tensor

from scale_prune.data import Inputs, Split, TokenBlocks, check_tokens, prepare, training_batches, validation_batches
from scale_prune.tasks.task import Measured, MicroBatch, Step, Task
from scale_prune.zero3 import Runtime


class LanguageModeling(Task):
    """The task of predicting running text; `splits` says which texts are needed. All ranks make it together."""

    def __init__(self, inputs: Inputs, runtime: Runtime, splits: Sequence[Split]) -> None:
        super().__init__(inputs, runtime)
        with runtime.main_first():
            self.blocks = {split: prepare(inputs.config.data, split, inputs.tokenizer) for split in splits}
        self.inputs = replace(inputs, train_rows=len(self.blocks["train"]) if "train" in splits else None)
        check_tokens({split: int(blocks.all_tokens.max()) for split, blocks in self.blocks.items()}, inputs)
        self.fingerprints = {split: fingerprint(blocks) for split, blocks in self.blocks.items()}

    @property
    def training_tokens(self) -> Tensor:
        """The stream, and the BOS token of every block where there is one."""
        return self.blocks["train"].all_tokens

    def steps(self, accumulation: int, first_step: int) -> Iterator[Step]:
        """Yield blocks; input and labels are the same."""
        tokens = self.inputs.batch_size * self.config.data.block_size
        for blocks in training_batches(
            self.blocks["train"],
            batch_size=self.inputs.batch_size,
            micro_batch_size=self.inputs.micro_batch_size,
            accumulation=accumulation,
            rank=self.runtime.rank,
            world_size=self.runtime.world_size,
            seed=self.config.training.seed,
            first_step=first_step,
        ):
            passes = [MicroBatch(inputs={"input_ids": each, "labels": each}) for each in blocks]
            yield Step(micro_batches=passes, tokens=tokens)

    def measure(self, engine: Any, *, thorough: bool) -> Measured:
        """Return the perplexity; there is nothing to generate."""
        batches = validation_batches(
            self.blocks["validation"],
            micro_batch_size=self.inputs.micro_batch_size,
            rank=self.runtime.rank,
            world_size=self.runtime.world_size,
        )
        return Measured(perplexity=self._perplexity(engine, batches))


def fingerprint(blocks: TokenBlocks) -> str:
    """Return a hash of a text's tokens."""
    return hashlib.sha256(blocks.all_tokens.numpy().data).hexdigest()
