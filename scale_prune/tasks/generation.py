"""Completions of prompts, written by an engine's model: greedy or by beam search, in batches spread over the ranks.

Prompts of a batch are padded on the left, so that all of them end where the completions begin; transformers' `generate`
takes position ids from the attention mask.
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence
from transformers import GenerationConfig, PreTrainedTokenizerBase

from scale_prune.config import TaskConfig
from scale_prune.zero3 import Runtime


@contextmanager
def neutral(model: Any) -> Iterator[None]:
    """Let a model generate as asked, with nothing from the checkpoint's generation_config but special tokens.

    `generate` fills in from there whatever is not given: penalties, forced and forbidden tokens, caches. Nor is it
    one of the checkpoint's own, which transformers puts into a model whose folder has it. Both are back afterwards.
    """
    own, custom = model.generation_config, model.__dict__.pop("generate", None)
    ids = {name: getattr(own, name) for name in ("bos_token_id", "eos_token_id", "pad_token_id")}
    model.generation_config = GenerationConfig(**ids)
    try:
        yield
    finally:
        model.generation_config = own
        if custom is not None:
            model.generate = custom


@torch.no_grad()
def complete(
    engine: Any,
    prompts: Sequence[Tensor],
    spec: TaskConfig,
    *,
    tokenizer: PreTrainedTokenizerBase,
    batch_size: int,
    runtime: Runtime,
) -> list[str]:
    """Return what a model writes after each prompt, without the end-of-text token and blanks at both ends.

    A collective: each rank completes its part, and all ranks get all. A rank whose completions have ended goes on with
    forward passes until all ranks' have, because each pass gathers parameters.

    Args:
        engine: a DeepSpeed engine; it is in evaluation mode afterwards.
        prompts: tokens, one tensor a prompt.
        spec: how many tokens, how many beams.
        tokenizer: turns tokens into text.
        batch_size: prompts that a rank completes at once.
        runtime: the ranks.
    """
    engine.eval()
    order = sorted(range(len(prompts)), key=lambda index: -len(prompts[index]))  # the largest batch first
    # Tokens are stored plus 1, so that adding up over ranks brings them together, and 0 means none.
    written = torch.zeros(len(prompts), spec.max_new_tokens, dtype=torch.int64)
    for start in range(0, len(order), batch_size * runtime.world_size):
        first = start + runtime.rank * batch_size
        own = order[first : first + batch_size]
        batch = [prompts[index] for index in own or order[-1:]]  # a rank without prompts must take part
        tokens = _generate(engine.module, batch, spec, tokenizer, runtime)
        for index, row in zip(own, tokens, strict=False):
            written[index, : len(row)] = row + 1
    engine.empty_partition_cache()  # as after every evaluation
    return [_text(row[row > 0] - 1, tokenizer) for row in runtime.add_over_ranks(written)]


def _generate(
    model: Any, prompts: Sequence[Tensor], spec: TaskConfig, tokenizer: PreTrainedTokenizerBase, runtime: Runtime
) -> Tensor:
    """Return the new tokens of each prompt, int64 (B, at most max_new_tokens), on the CPU."""
    ids = pad_sequence([prompt.long() for prompt in prompts], batch_first=True, padding_side="left")
    mask = pad_sequence([torch.ones(len(p), dtype=torch.int64) for p in prompts], batch_first=True, padding_side="left")
    end = tokenizer.eos_token_id
    wanted = GenerationConfig(
        do_sample=False,
        num_beams=spec.num_beams,
        max_new_tokens=spec.max_new_tokens,
        eos_token_id=end,
        pad_token_id=end,
    )
    with neutral(model):
        made = model.generate(
            input_ids=ids.to(runtime.device),
            attention_mask=mask.to(runtime.device),
            generation_config=wanted,
            synced_gpus=runtime.world_size > 1,
        )
    new: Tensor = made[:, ids.shape[1] :].cpu()
    return new


def _text(tokens: Tensor, tokenizer: PreTrainedTokenizerBase) -> str:
    ended = (tokens == tokenizer.eos_token_id).nonzero()
    text = tokenizer.decode(tokens[: int(ended[0])] if len(ended) else tokens, skip_special_tokens=True)
    return str(text).strip()
