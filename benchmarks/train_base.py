"""Train the 6 M GPT-Neo of criteria_gpt_neo.yaml: its own BPE tokenizer, then plain PyTorch on one process.

    python benchmarks/train_base.py --train_file wikitext2_train.txt.gz --validation_file wikitext2_validation.txt.gz \
        --output_dir base-6m --epochs 8

5 to 12 minutes an epoch on two cores with bfloat16 arithmetic. Restartable: every epoch ends with a checkpoint and the
same command goes on from the newest one.
"""

import argparse
import gzip
import math
import os
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch.nn.functional import cross_entropy
from transformers import GPTNeoConfig, GPTNeoForCausalLM, PreTrainedTokenizerFast

from scale_prune.data.embedded import train_tokenizer


def read_lines(path: str) -> list[str]:
    with gzip.open(path, "rt", encoding="utf-8") as file:
        return list(file)


def token_stream(tokenizer: PreTrainedTokenizerFast, lines: list[str]) -> torch.Tensor:
    return torch.tensor([token for ids in tokenizer(lines)["input_ids"] for token in ids])


def build_model(vocab_size: int, seed: int) -> GPTNeoForCausalLM:
    torch.manual_seed(seed)
    return GPTNeoForCausalLM(
        GPTNeoConfig(
            vocab_size=vocab_size,
            hidden_size=256,
            num_layers=6,
            num_heads=8,
            attention_types=[[["global", "local"], 3]],
            window_size=64,
            intermediate_size=1024,
            max_position_embeddings=256,
            resid_dropout=0.1,
            embed_dropout=0.1,
            bos_token_id=0,
            eos_token_id=0,
        )
    )


def batches(stream: torch.Tensor, block_size: int, batch_size: int, seed: int) -> Iterator[torch.Tensor]:
    """Yield one epoch of (batch, block) tokens; the cut starts at a random token, so that no two epochs agree."""
    generator = torch.Generator().manual_seed(seed)
    first = int(torch.randint(block_size, (), generator=generator))
    blocks = stream[first:].unfold(0, block_size, block_size)
    order = torch.randperm(len(blocks), generator=generator)
    for start in range(0, len(blocks) - batch_size + 1, batch_size):
        yield blocks[order[start : start + batch_size]]


@torch.no_grad()
def perplexity(model: GPTNeoForCausalLM, stream: torch.Tensor, block_size: int) -> float:
    model.eval()
    total, count = 0.0, 0
    for block in stream.split(block_size * 32):
        rows = block[: len(block) // block_size * block_size].view(-1, block_size)
        if len(rows) == 0:
            continue
        logits = model(input_ids=rows).logits[:, :-1].float()
        total += cross_entropy(logits.flatten(0, 1), rows[:, 1:].flatten(), reduction="sum").item()
        count += rows[:, 1:].numel()
    model.train()
    return math.exp(total / count)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--train_file", required=True, help="gzipped text")
    parser.add_argument("--validation_file", required=True, help="gzipped text")
    parser.add_argument("--output_dir", required=True, type=Path)
    parser.add_argument("--epochs", type=int, default=8)
    parser.add_argument("--batch_size", type=int, default=16, help="blocks a step")
    parser.add_argument("--block_size", type=int, default=128, help="tokens a block")
    parser.add_argument("--learning_rate", type=float, default=2e-3)
    parser.add_argument("--vocab_size", type=int, default=4096)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    args.output_dir.mkdir(parents=True, exist_ok=True)

    lines = read_lines(args.train_file)
    tokenizer = train_tokenizer(lines, args.vocab_size)
    train, validation = (token_stream(tokenizer, text) for text in (lines, read_lines(args.validation_file)))
    model = build_model(len(tokenizer), args.seed)
    optimizer = torch.optim.AdamW(model.parameters(), args.learning_rate, betas=(0.9, 0.95), weight_decay=0.1)
    total_steps = args.epochs * (len(train) // args.block_size // args.batch_size - 1)
    warmup = total_steps // 50
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda step: min((step + 1) / warmup, 0.5 + 0.5 * math.cos(math.pi * min(step / total_steps, 1)))
    )
    first_epoch, checkpoint = 0, args.output_dir / "training.pt"
    if checkpoint.exists():
        saved = torch.load(checkpoint, weights_only=True)
        for key, part in (("model", model), ("optimizer", optimizer), ("schedule", schedule)):
            part.load_state_dict(saved[key])
        first_epoch = saved["epoch"]
    print(f"{len(train):,} training tokens, {total_steps:,} steps, from epoch {first_epoch}", flush=True)

    for epoch in range(first_epoch, args.epochs):
        torch.manual_seed(args.seed * 1000 + epoch)
        started = time.monotonic()
        for step, batch in enumerate(batches(train, args.block_size, args.batch_size, args.seed * 1000 + epoch)):
            with torch.autocast("cpu", dtype=torch.bfloat16):
                loss = model(input_ids=batch, labels=batch).loss
            loss.backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            schedule.step()
            optimizer.zero_grad()
            if step % 200 == 0:
                print(f"epoch {epoch} step {step} loss {loss.item():.3f}", flush=True)
        value = perplexity(model, validation, args.block_size)
        print(f"epoch {epoch} perplexity {value:.3f} seconds {time.monotonic() - started:.0f}", flush=True)
        state: dict[str, Any] = {"model": model, "optimizer": optimizer, "schedule": schedule}
        temporary = checkpoint.with_suffix(".tmp")
        torch.save({key: part.state_dict() for key, part in state.items()} | {"epoch": epoch + 1}, temporary)
        os.replace(temporary, checkpoint)
        model.save_pretrained(args.output_dir)
        tokenizer.save_pretrained(args.output_dir)


if __name__ == "__main__":
    main()
