"""Examples of prompt and completion: what is learnt of them, who sees them, and which cannot be used."""

import csv
from collections.abc import Sequence
from dataclasses import replace
from itertools import islice
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import pytest
import torch
from memory_backend import steady_model
from models import BLANKS, VOCABULARY, tiny_tokenizer
from transformers import PreTrainedTokenizerFast

from scale_prune.config.settings import Config
from scale_prune.core.likelihood import negative_log_likelihood
from scale_prune.data.embedded import train_tokenizer
from scale_prune.data.forms import with_templates
from scale_prune.data.rows import Text
from scale_prune.data.tokens import Pieces, Tokens
from scale_prune.tasks.examples import Examples, collate, prepare, training_steps, validation_batches

BATCH = 12
ROWS = [("name[A]", "A is."), ("name[B], area[x]", "B is in x, NA."), ("2020", "7")]


@pytest.fixture(autouse=True)
def own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")


@pytest.fixture(scope="module")
def byte_tokenizer() -> PreTrainedTokenizerFast:
    """Return one with a token for every byte."""
    return train_tokenizer([], 257)


def write(path: Path, rows: list[tuple[str, str]], header: tuple[str, str] = ("mr", "ref")) -> Path:
    with path.open("w", newline="", encoding="utf-8") as file:
        csv.writer(file).writerows([header, *rows])
    return path


def settings(file: Path, **more: Any) -> Config:
    config = Config.from_flat({"task": "data_to_text", "train_file": str(file), "validation_file": str(file), **more})
    values = config.flat()
    filled = with_templates(config.task)
    return Config.from_flat(values | {name: getattr(filled, name) for name in filled.__dataclass_fields__})


def made(lengths: list[tuple[int, int]]) -> Examples:
    """Return examples of so many random tokens of prompt and completion each."""
    generator = torch.Generator().manual_seed(0)

    def random(length: int) -> torch.Tensor:
        return torch.randint(3, VOCABULARY, (length,), generator=generator, dtype=torch.int32)

    parts = [(random(prompt), random(completion)) for prompt, completion in lengths]
    text = Text(name="made", rows=datasets.Dataset.from_dict({"mr": []}), columns=("mr",))
    prompts, completions = zip(*parts, strict=True)
    return Examples(prompts=pieces(prompts), completions=pieces(completions), text=text, dropped=0)


def pieces(rows: Sequence[torch.Tensor]) -> Pieces:
    lengths = np.array([len(row) for row in rows], dtype=np.int32)
    return Pieces(Tokens(torch.cat([*rows]).numpy(), lengths), np.arange(len(rows)))


LENGTHS = [(2, 5), (7, 1), (3, 3), (1, 9), (5, 2), (2, 2), (4, 6)]


def test_an_example_is_prompt_completion_and_end(tmp_path: Path, byte_tokenizer: PreTrainedTokenizerFast) -> None:
    examples = prepare(settings(write(tmp_path / "rows.csv", ROWS)), "train", byte_tokenizer)
    for (mr, ref), prompt, completion in zip(ROWS, examples.prompts, examples.completions, strict=True):
        assert byte_tokenizer.decode(prompt) == f"{mr}\ntext:"
        assert byte_tokenizer.decode(completion[:-1]) == f" {ref}"
        assert completion[-1] == byte_tokenizer.eos_token_id


@pytest.mark.parametrize("blank", BLANKS)
@pytest.mark.parametrize(("template", "bos"), [("{mr}:", "auto"), ("<s>{mr}:", "auto"), ("{mr}:", "never")])
def test_prompt_and_completion_are_the_whole_text_with_bos_once(
    template: str, bos: str, blank: str, tmp_path: Path
) -> None:
    rows, tokenizer = [("the model", "keeps"), ("fast", "drops")], tiny_tokenizer(blank)
    config = settings(write(tmp_path / "rows.csv", rows), prompt_template=template, bos=bos)
    examples = prepare(config, "train", tokenizer)
    for (mr, ref), prompt, completion in zip(rows, examples.prompts, examples.completions, strict=True):
        adds = bos == "auto" and template[0] == "{"
        expected = tokenizer(f"{template.format(mr=mr)} {ref}", add_special_tokens=adds)["input_ids"]
        assert torch.cat([prompt, completion]).tolist() == [*expected, 2]
        assert prompt.tolist().count(1) == (bos == "auto")


def test_only_the_completion_is_learnt_by_a_mask_made_by_hand() -> None:
    examples = made([(2, 3), (4, 3)])
    (a, b), (c, d) = ((p.tolist(), q.tolist()) for p, q in zip(examples.prompts, examples.completions, strict=True))
    found = collate(examples, [0, 1, 2])
    assert found["input_ids"].tolist() == [[*a, *b, 0, 0], [*c, *d], [*a, *b, 0, 0]]
    assert found["attention_mask"].tolist() == [[1, 1, 1, 1, 1, 0, 0], [1] * 7, [1, 1, 1, 1, 1, 0, 0]]
    assert found["labels"].tolist() == [
        [-100, -100, *b, -100, -100],
        [-100, -100, -100, -100, *d],
        [-100] * 7,  # filling
    ]


@pytest.mark.parametrize(("world_size", "accumulation"), [(1, 1), (1, 4), (2, 1), (2, 3), (3, 2)])
def test_the_mean_is_over_the_completion_tokens_of_the_global_batch(world_size: int, accumulation: int) -> None:
    """The weighted losses of all passes, and their gradients, do not depend on who sees which example."""
    examples, model = made(LENGTHS), steady_model("gpt_neo")
    shape = (accumulation, world_size, BATCH // accumulation // world_size)
    ranks = [next(training_steps(examples, shape, rank=rank, seed=0)) for rank in range(world_size)]
    passes = [each for step in ranks for each in step.micro_batches]
    loss = torch.stack([model(**each.inputs).loss * each.weight for each in passes]).mean()
    loss.backward()
    (whole,) = next(training_steps(examples, (1, 1, BATCH), rank=0, seed=0)).micro_batches
    assert whole.weight == 1.0
    with torch.no_grad():
        logits = model(input_ids=whole.inputs["input_ids"]).logits
        total, count = negative_log_likelihood(logits, whole.inputs["labels"])
    assert float(loss.detach()) == pytest.approx(float(total / count), rel=1e-5)
    reference = steady_model("gpt_neo")
    reference(**whole.inputs).loss.backward()
    for ours, theirs in zip(model.parameters(), reference.parameters(), strict=True):
        if theirs.grad is not None:
            assert ours.grad is not None
            assert torch.allclose(ours.grad, theirs.grad, atol=1e-6)
    assert {step.tokens for step in ranks} == {int(sum(each.inputs["attention_mask"].sum() for each in passes))}


@pytest.mark.parametrize("first_step", [0, 3])
def test_the_order_follows_from_the_seed_and_goes_on_where_it_stopped(first_step: int) -> None:
    examples = made(LENGTHS)

    def ids(first_step: int, count: int, seed: int = 1) -> list[Any]:
        steps = training_steps(examples, (2, 1, 3), rank=0, seed=seed, first_step=first_step)
        return [[each.inputs["input_ids"].tolist() for each in s.micro_batches] for s in islice(steps, count)]

    assert ids(first_step, 2) == ids(0, first_step + 2)[first_step:]
    assert ids(0, 2) != ids(0, 2, seed=2)


@pytest.mark.parametrize("world_size", [1, 2, 3])
@pytest.mark.parametrize("count", [1, 4, 7])
def test_validation_counts_every_completion_once_and_keeps_ranks_together(world_size: int, count: int) -> None:
    examples = made(LENGTHS)
    ranks = [
        list(validation_batches(examples, count, micro_batch_size=2, rank=rank, world_size=world_size))
        for rank in range(world_size)
    ]
    assert {len(batches) for batches in ranks} == {-(-count // (2 * world_size))}
    counted = [row[row >= 0].tolist() for batches in ranks for _, labels in batches for row in labels]
    assert sorted(filter(None, counted)) == sorted(each.tolist() for each in islice(examples.completions, count))


def test_rows_that_are_left_out_leave_the_others_as_they_are() -> None:
    rows = [torch.arange(first, last, dtype=torch.int32) for first, last in ((0, 2), (2, 7), (7, 8), (8, 12))]
    whole, kept = pieces(rows), np.array([1, 3])
    some = Pieces(Tokens(whole.joined().numpy(), np.array([2, 5, 1, 4], dtype=np.int32)), kept)
    assert [each.tolist() for each in some] == [rows[row].tolist() for row in kept]
    assert torch.equal(some.joined(), torch.cat([rows[1], rows[3]]))
    assert some.lengths.tolist() == [5, 4]


def test_the_fingerprint_sees_tokens_and_where_they_are_cut() -> None:
    first = made([(2, 3), (4, 3)])
    assert first.fingerprint() == made([(2, 3), (4, 3)]).fingerprint()
    (a, b), (c, d) = first.prompts, first.completions
    other = replace(first, completions=pieces([c.flip(0), d]))
    moved = replace(first, prompts=pieces([a[:1], b]), completions=pieces([torch.cat([a[1:], c]), d]))
    assert len({each.fingerprint() for each in (first, other, moved)}) == 3


# --- bad input -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("rows", "more", "message"),
    [
        (
            [("a", "b"), ("c", " ")],
            {},
            r"row 2 of .*rows.csv has an empty completion, by --completion_template ' {ref}'",
        ),
        (
            [("", "b")],
            {"prompt_template": "{mr}"},
            r"row 1 of .*rows.csv has an empty prompt, by --prompt_template '{mr}'",
        ),
        ([("", "b")], {"prompt_template": "{mr}", "bos": "always"}, "row 1 of .*rows.csv has an empty prompt"),
        (
            [("a", "b"), ("c" * 20, "d" * 9)],
            {"block_size": 32},
            r"row 2 of .*rows.csv has a prompt of 26 tokens and a completion of 11 tokens, special ones included, "
            r"more than --block_size 32; 1 of 2 rows are too long, the longest has 37: give a larger --block_size, or "
            "--long_examples drop",
        ),
        ([("c" * 40, "d")], {"block_size": 32, "long_examples": "drop"}, "give a larger --block_size$"),
        ([("a", "b")], {"prompt_template": "{meaning}"}, r"has no column 'meaning', its columns are mr, ref"),
    ],
)
def test_what_cannot_be_learnt_is_one_sentence(
    rows: list[tuple[str, str]],
    more: dict[str, Any],
    message: str,
    tmp_path: Path,
    byte_tokenizer: PreTrainedTokenizerFast,
) -> None:
    with pytest.raises(ValueError, match=message) as caught:
        prepare(settings(write(tmp_path / "rows.csv", rows), **more), "train", byte_tokenizer)
    assert "\n" not in str(caught.value)


def test_long_examples_can_be_dropped(tmp_path: Path, byte_tokenizer: PreTrainedTokenizerFast) -> None:
    rows = [("c" * 40, "d"), ("a", "b"), ("e" * 50, "f"), ("g", "h")]
    config = settings(write(tmp_path / "rows.csv", rows), block_size=32, long_examples="drop")
    examples = prepare(config, "train", byte_tokenizer)
    assert (len(examples), examples.dropped) == (2, 2)
    assert examples.text.rows["mr"][:] == ["a", "g"]
    assert [byte_tokenizer.decode(prompt) for prompt in examples.prompts] == ["a\ntext:", "g\ntext:"]


def test_the_end_needs_a_token(tmp_path: Path, byte_tokenizer: PreTrainedTokenizerFast) -> None:
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=byte_tokenizer.backend_tokenizer)
    with pytest.raises(ValueError, match=r"no eos_token, which ends the completions of .*rows\.csv"):
        prepare(settings(write(tmp_path / "rows.csv", ROWS)), "train", tokenizer)
