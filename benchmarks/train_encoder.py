"""Train the small BERT classifiers that benchmarks/tasks.md prunes: an own WordPiece tokenizer, then plain PyTorch.

    python benchmarks/train_encoder.py --train_file sst2_train.jsonl.gz --validation_file sst2_validation.jsonl.gz \
        --text_column sentence --output_dir sst2-bert --epochs 3

One process, bfloat16 arithmetic. From scratch, on the labeled texts alone: no pretraining.
"""

import argparse
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import datasets
import torch
from tokenizers import BertWordPieceTokenizer
from torch.nn.utils.rnn import pad_sequence
from transformers import BertConfig, BertForSequenceClassification, BertTokenizer

MAX_TOKENS = 128


def train_tokenizer(texts: list[str], vocab_size: int, folder: Path) -> BertTokenizer:
    trained = BertWordPieceTokenizer(lowercase=True)
    trained.train_from_iterator(texts, vocab_size=vocab_size, show_progress=False)
    trained.save_model(str(folder))
    tokenizer = BertTokenizer(vocab=str(folder / "vocab.txt"), do_lower_case=True, model_max_length=MAX_TOKENS)
    tokenizer.save_pretrained(folder)
    return tokenizer


def build_model(tokenizer: BertTokenizer, classes: list[str], args: argparse.Namespace) -> Any:
    torch.manual_seed(args.seed)
    config = BertConfig(
        vocab_size=len(tokenizer),
        hidden_size=args.hidden_size,
        num_hidden_layers=args.layers,
        num_attention_heads=args.hidden_size // 32,
        intermediate_size=4 * args.hidden_size,
        max_position_embeddings=MAX_TOKENS,
        id2label=dict(enumerate(classes)),
        label2id={name: index for index, name in enumerate(classes)},
        problem_type="single_label_classification",
    )
    return BertForSequenceClassification(config)


def batches(texts: list[torch.Tensor], size: int, seed: int | None) -> Iterator[list[int]]:
    """Yield rows of similar length; in a random order where there is a seed."""
    order = list(range(len(texts)))
    if seed is not None:
        generator = torch.Generator().manual_seed(seed)
        order = torch.randperm(len(texts), generator=generator).tolist()
    for first in range(0, len(order), 32 * size):
        chunk = sorted(order[first : first + 32 * size], key=lambda row: len(texts[row]))
        groups = [chunk[start : start + size] for start in range(0, len(chunk), size)]
        if seed is not None:
            groups = [groups[place] for place in torch.randperm(len(groups), generator=generator).tolist()]
        yield from groups


def as_inputs(texts: list[torch.Tensor], rows: list[int]) -> dict[str, torch.Tensor]:
    ids = pad_sequence([texts[row] for row in rows], batch_first=True)
    return {"input_ids": ids, "attention_mask": (ids != 0).long()}


@torch.no_grad()
def accuracy(model: Any, texts: list[torch.Tensor], labels: torch.Tensor) -> float:
    model.eval()
    right = sum(
        int((model(**as_inputs(texts, rows)).logits.argmax(-1) == labels[rows]).sum())
        for rows in batches(texts, 64, None)
    )
    model.train()
    return right / len(texts)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--train_file", required=True)
    parser.add_argument("--validation_file", required=True)
    parser.add_argument("--text_column", default="text")
    parser.add_argument("--label_column", default="label")
    parser.add_argument("--output_dir", required=True, type=Path)
    parser.add_argument("--epochs", type=int, default=3)
    parser.add_argument("--batch_size", type=int, default=32, help="texts a step")
    parser.add_argument("--learning_rate", type=float, default=5e-4)
    parser.add_argument("--hidden_size", type=int, default=128, help="a multiple of 32")
    parser.add_argument("--layers", type=int, default=4)
    parser.add_argument("--vocab_size", type=int, default=8000)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    args.output_dir.mkdir(parents=True, exist_ok=True)

    files = {"train": args.train_file, "validation": args.validation_file}
    rows = datasets.load_dataset("json", data_files=files)
    tokenizer = train_tokenizer(rows["train"][args.text_column][:], args.vocab_size, args.output_dir)
    classes = [str(value) for value in sorted(set(rows["train"][args.label_column]))]
    texts, labels = {}, {}
    for split, part in rows.items():
        encoded = tokenizer(part[args.text_column][:], truncation=True)["input_ids"]
        texts[split] = [torch.tensor(ids) for ids in encoded]
        labels[split] = torch.tensor([classes.index(str(value)) for value in part[args.label_column]])
    model = build_model(tokenizer, classes, args)
    optimizer = torch.optim.AdamW(model.parameters(), args.learning_rate, weight_decay=0.01)
    steps = args.epochs * -(-len(texts["train"]) // args.batch_size)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, args.learning_rate, total_steps=steps, pct_start=0.1)
    print(
        f"{sum(p.numel() for p in model.parameters()):,} parameters, {len(classes)} classes, {steps:,} steps",
        flush=True,
    )
    for epoch in range(args.epochs):
        started = time.monotonic()
        for chosen in batches(texts["train"], args.batch_size, args.seed * 1000 + epoch):
            with torch.autocast("cpu", dtype=torch.bfloat16):
                loss = model(**as_inputs(texts["train"], chosen), labels=labels["train"][chosen]).loss
            loss.backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            schedule.step()
            optimizer.zero_grad()
        value = accuracy(model, texts["validation"], labels["validation"])
        print(f"epoch {epoch} accuracy {value:.4f} seconds {time.monotonic() - started:.0f}", flush=True)
        model.save_pretrained(args.output_dir)


if __name__ == "__main__":
    main()
