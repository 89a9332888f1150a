"""Text becomes the stream of tokens that anyone can recompute, whatever the format it comes in."""

import csv
import gzip
import json
import logging
import os
import re
import time
from collections import Counter
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import pytest
import torch
from models import BLANKS, tiny_tokenizer
from tokenizers.processors import TemplateProcessing
from transformers import PreTrainedTokenizerFast

from scale_prune.config.settings import AS_LINES, DataConfig
from scale_prune.data import text_files
from scale_prune.data.beginnings import continuing
from scale_prune.data.embedded import END_OF_TEXT, train_tokenizer
from scale_prune.data.holdout import neighbors, stratified
from scale_prune.data.rows import SPLITS, Split, Text, _one_message, load_text
from scale_prune.data.text import check_length, prepare, token_stream
from scale_prune.data.tokens import tokenized

DOCUMENTS = ["A first one.", "", "NA", "2020", 'two\nlines, "quoted"', "  null ", "größer ≥ 7 🌲", "A first one."]
LINES = ["A first one.\n", "\n", " page\x0cbreak \n", "line\u2028separator\n", "2020\n", "no newline at the end"]


@pytest.fixture(autouse=True)
def own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    return tmp_path / "cache"


@pytest.fixture(scope="module")
def tokenizer() -> PreTrainedTokenizerFast:
    """Return one that adds special tokens where it is not told otherwise."""
    trained = train_tokenizer(DOCUMENTS + LINES, 270)
    template = f"{END_OF_TEXT} $A {END_OF_TEXT}"
    special_tokens = [(END_OF_TEXT, trained.eos_token_id)]
    trained.backend_tokenizer.post_processor = TemplateProcessing(single=template, special_tokens=special_tokens)
    assert trained("a")["input_ids"][0] == trained.eos_token_id
    return trained


@pytest.fixture(scope="module")
def byte_tokenizer() -> PreTrainedTokenizerFast:
    """Return one with a token for every byte."""
    return train_tokenizer([], 257)


def write_csv(path: Path) -> None:
    with path.open("w", newline="", encoding="utf-8") as file:
        csv.writer(file).writerows(zip(["number", *range(len(DOCUMENTS))], ["text", *DOCUMENTS], strict=True))


def as_dataset() -> datasets.Dataset:
    return datasets.Dataset.from_dict({"number": range(len(DOCUMENTS)), "text": DOCUMENTS})


WRITERS: dict[str, Callable[[Path], object]] = {
    "rows.jsonl": lambda path: path.write_text("".join(json.dumps({"text": text}) + "\n" for text in DOCUMENTS)),
    "rows.json": lambda path: path.write_text(json.dumps([{"text": text} for text in DOCUMENTS])),
    "rows.csv": write_csv,
    "rows.parquet": lambda path: as_dataset().to_parquet(path),
}


def compressed(path: Path) -> Path:
    target = path.with_name(f"{path.name}.gz")
    target.write_bytes(gzip.compress(path.read_bytes()))
    return target


def fails(*args: Any, **kwargs: Any) -> None:
    raise OSError("no space left")


def documents_stream(tokenizer: PreTrainedTokenizerFast, documents: list[str]) -> list[int]:
    stream: list[int] = []
    for document in documents:
        stream += [*tokenizer.encode(document, add_special_tokens=False), tokenizer.eos_token_id]
    return stream[:-1]


def stream_of(tokenizer: PreTrainedTokenizerFast, **spec: Any) -> list[int]:
    return token_stream(load_text(DataConfig(**spec), "train"), tokenizer).tolist()


@pytest.mark.parametrize("packed", [False, True], ids=["plain", "gz"])
@pytest.mark.parametrize("name", WRITERS)
def test_every_format_of_documents_gives_the_same_stream(
    name: str, packed: bool, tmp_path: Path, tokenizer: PreTrainedTokenizerFast
) -> None:
    path = tmp_path / name
    WRITERS[name](path)
    file = str(compressed(path) if packed else path)
    assert stream_of(tokenizer, train_file=file, validation_file=file) == documents_stream(tokenizer, DOCUMENTS)


@pytest.mark.parametrize(
    ("name", "packed"), [("lines.txt", False), ("lines.txt", True), ("a pattern [1] *.txt", False)]
)
def test_a_txt_file_is_its_lines_with_their_newline(
    name: str, packed: bool, tmp_path: Path, tokenizer: PreTrainedTokenizerFast
) -> None:
    path = tmp_path / name
    path.write_text("".join(LINES), encoding="utf-8")
    with path.open(encoding="utf-8") as file:
        expected = [token for line in file for token in tokenizer.encode(line, add_special_tokens=False)]
    given = str(compressed(path) if packed else path)
    assert stream_of(tokenizer, train_file=given, validation_file=given, text_column="any") == expected


LIKE_WIKITEXT = ["", " = Title = \n", "", " größer ≥ 7 🌲 .\n", " The next .\n"]


@pytest.mark.parametrize(
    ("rows", "asked", "lines"),
    [
        (LIKE_WIKITEXT, "auto", True),
        (LIKE_WIKITEXT, "documents", False),
        ([*LIKE_WIKITEXT, "no newline"], "auto", False),
        ([*LIKE_WIKITEXT, "one\ntwo\n"], "auto", False),
        (["a tweet\n", "another\n"], "auto", False),
        (["a tweet\n", "another\n"], "lines", True),
        (["a", "", "b"], "auto", False),
        (["a", "", "b"], "lines", True),
        (["a", "one\ninside", "b"], "lines", True),
    ],
)
def test_the_rows_of_a_data_set_are_documents_but_where_they_are_lines(
    rows: list[str], asked: str, lines: bool, tmp_path: Path, tokenizer: PreTrainedTokenizerFast
) -> None:
    """A text of the hub that is cut behind its newlines is read as the same text in a txt file."""
    split = datasets.Dataset.from_dict({"text": rows * 3})
    datasets.DatasetDict({"train": split, "validation": split}).save_to_disk(tmp_path / "rows")
    found = stream_of(tokenizer, dataset=str(tmp_path / "rows"), rows=asked)
    between = "" if any(row.endswith("\n") for row in rows) else "\n"
    (tmp_path / "lines.txt").write_text(between.join(rows * 3), encoding="utf-8")
    as_text = stream_of(tokenizer, train_file=str(tmp_path / "lines.txt"), validation_file=str(tmp_path / "lines.txt"))
    assert found == (as_text if lines else documents_stream(tokenizer, rows * 3))


def test_held_out_lines_are_lines(tmp_path: Path) -> None:
    """Of the rows as a whole it is decided, not of those that are left: some alone look like lines."""
    rows = [*LIKE_WIKITEXT * 20, "no newline"]
    datasets.Dataset.from_dict({"text": rows}).save_to_disk(tmp_path / "rows")
    datasets.Dataset.from_dict({"text": rows[:-1]}).save_to_disk(tmp_path / "lines")
    for name, lines in (("rows", False), ("lines", True)):
        texts = [load_text(DataConfig(dataset=str(tmp_path / name)), split) for split in SPLITS]
        assert [text.lines for text in texts] == [lines, lines]
        assert (AS_LINES in texts[1].part) == lines


def test_documents_need_a_token_between_them(tmp_path: Path, byte_tokenizer: PreTrainedTokenizerFast) -> None:
    (tmp_path / "rows.jsonl").write_text('{"text": "some words"}\n' * 9)
    spec = DataConfig(
        train_file=str(tmp_path / "rows.jsonl"), validation_file=str(tmp_path / "rows.jsonl"), block_size=7
    )
    without = PreTrainedTokenizerFast(tokenizer_object=byte_tokenizer.backend_tokenizer)
    for check in (prepare, lambda *args: check_length(args[0], args[1], load_text(*args[:2]), args[2])):
        with pytest.raises(ValueError, match="has no eos_token, which stands between the documents"):
            check(spec, "train", without)


def test_a_folder_on_disk_gives_its_splits(tmp_path: Path, tokenizer: PreTrainedTokenizerFast) -> None:
    rows = as_dataset()
    datasets.DatasetDict({"train": rows, "validation": rows.select(range(3))}).save_to_disk(tmp_path / "both")
    rows.save_to_disk(tmp_path / "one")
    both = DataConfig(dataset=str(tmp_path / "both"))
    before = sorted(path.name for path in (tmp_path / "both" / "train").iterdir())
    assert stream_of(tokenizer, dataset=str(tmp_path / "both")) == documents_stream(tokenizer, DOCUMENTS)
    validation = token_stream(load_text(both, "validation"), tokenizer).tolist()
    assert validation == documents_stream(tokenizer, DOCUMENTS[:3])
    train, held_out = (load_text(DataConfig(dataset=str(tmp_path / "one")), split).rows["text"][:] for split in SPLITS)
    assert stream_of(tokenizer, dataset=str(tmp_path / "one")) == documents_stream(tokenizer, train)
    assert (len(held_out), sorted(train + held_out)) == (1, sorted(DOCUMENTS))
    assert sorted(path.name for path in (tmp_path / "both" / "train").iterdir()) == before


def test_the_tokens_are_cached_by_content(
    tmp_path: Path, own_cache: Path, tokenizer: PreTrainedTokenizerFast, byte_tokenizer: PreTrainedTokenizerFast
) -> None:
    file = str(tmp_path / "rows.csv")
    write_csv(tmp_path / "rows.csv")
    tokenizer.save_pretrained(tmp_path / "tokenizer")
    used, unused = (PreTrainedTokenizerFast.from_pretrained(tmp_path / "tokenizer") for _ in range(2))
    used(["one", "and a longer one"], truncation=True, max_length=5)
    streams = [stream_of(one, train_file=file, validation_file=file) for one in (used, unused, byte_tokenizer)]
    assert streams[0] == streams[1] == documents_stream(tokenizer, DOCUMENTS)
    assert streams[2] == documents_stream(byte_tokenizer, DOCUMENTS)
    assert len(list((own_cache / "scale_prune").glob("*.arrow"))) == 2


def test_other_code_reads_its_own_cache(
    tmp_path: Path, own_cache: Path, tokenizer: PreTrainedTokenizerFast, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = tmp_path / "rows.csv"
    write_csv(file)
    for version in ("a", "b"):
        monkeypatch.setattr(text_files, "code_version", lambda version=version: version)
        stream_of(tokenizer, train_file=str(file), validation_file=str(file))
    assert len(list((own_cache / "scale_prune").glob("*.arrow"))) == 2
    assert len(list((own_cache / "scale_prune").glob("*/csv.arrow"))) == 2


@pytest.mark.parametrize(("letters", "rows_at_once"), [(2**22, 4), (5 * 2**24, 1), (1, 10)])
def test_long_rows_are_tokenized_a_few_at_a_time(letters: int, rows_at_once: int, tmp_path: Path) -> None:
    seen = []

    def encode(batch: dict[str, list[str]]) -> dict[str, list[list[int]]]:
        seen.append(len(batch["text"]))
        return {"tokens": [[1, 2] for _ in batch["text"]]}

    rows = datasets.Dataset.from_dict({"text": ["x" * letters] * (10 if letters < 2**24 else 2)})
    tokenized(Text(name="long", rows=rows, columns=("text",)), encode, ("tokens",))
    assert max(seen) in (rows_at_once, rows_at_once - 1)  # beside the texts there are their places


def test_the_ranks_of_a_host_share_the_memory_of_the_tokens(
    tmp_path: Path, own_cache: Path, tokenizer: PreTrainedTokenizerFast, monkeypatch: pytest.MonkeyPatch
) -> None:
    """They map one file, which is there as a whole or not at all."""
    write_csv(tmp_path / "rows.csv")
    spec = DataConfig(train_file=str(tmp_path / "rows.csv"), validation_file=str(tmp_path / "rows.csv"))
    text = load_text(spec, "train")
    with monkeypatch.context() as patch:
        patch.setattr("os.replace", fails)
        with pytest.raises(OSError, match="no space left"):
            token_stream(text, tokenizer)
    cache = own_cache / "scale_prune"
    assert not list(cache.glob("*.npy*"))
    stream = token_stream(text, tokenizer)
    (file,) = cache.glob("*.npy*")
    assert str(file) in Path("/proc/self/maps").read_text()
    with file.open("r+b") as written:
        written.write(bytes(file.stat().st_size))
    assert not stream.any(), "the process has a copy of its own"


@pytest.mark.parametrize(
    ("split", "num_tokens", "eval_tokens", "lengths"),
    [
        ("train", 21, 0, [7, 7, 7]),
        ("train", 20, 2, [7, 7]),
        ("train", 7, 0, [7]),
        ("validation", 21, 0, [7, 7, 7]),
        ("validation", 20, 0, [7, 7, 6]),
        ("validation", 16, 0, [7, 7, 2]),
        ("validation", 15, 0, [7, 7]),
        ("validation", 20, 12, [7, 5]),
        ("validation", 20, 8, [7]),
        ("validation", 20, 99, [7, 7, 6]),
        ("validation", 2, 0, [2]),
    ],
)
def test_blocks_are_consecutive(
    split: Split,
    num_tokens: int,
    eval_tokens: int,
    lengths: list[int],
    tmp_path: Path,
    byte_tokenizer: PreTrainedTokenizerFast,
) -> None:
    text = "".join(chr(ord("a") + place) for place in range(num_tokens))
    (tmp_path / "text.txt").write_text(text)
    file = str(tmp_path / "text.txt")
    spec = DataConfig(train_file=file, validation_file=file, block_size=7, eval_tokens=eval_tokens)
    blocks = prepare(spec, split, byte_tokenizer)
    found = [blocks.block(index) for index in range(len(blocks))]
    assert [len(block) for block in found] == lengths
    assert byte_tokenizer.decode(torch.cat(found)) == text[: sum(lengths)]


@pytest.mark.parametrize(
    ("split", "num_tokens", "eval_tokens", "lengths"),
    [
        ("train", 20, 0, [7, 7, 7]),
        ("train", 6, 0, [7]),
        ("train", 5, 0, None),
        ("validation", 18, 0, [7, 7, 7]),
        ("validation", 19, 0, [7, 7, 7, 2]),
        ("validation", 19, 13, [7, 7, 2]),
        ("validation", 1, 0, [2]),
        ("validation", 0, 0, None),
    ],
)
def test_every_block_begins_with_bos_where_there_is_one(
    split: Split,
    num_tokens: int,
    eval_tokens: int,
    lengths: list[int] | None,
    tmp_path: Path,
    byte_tokenizer: PreTrainedTokenizerFast,
) -> None:
    text = "".join(chr(ord("a") + place) for place in range(num_tokens))
    (tmp_path / "rows.jsonl").write_text(json.dumps({"text": text}) + "\n")
    file = str(tmp_path / "rows.jsonl")
    spec = DataConfig(train_file=file, validation_file=file, block_size=7, eval_tokens=eval_tokens, bos="always")
    if lengths is None:
        for check in (prepare, lambda *args: check_length(args[0], args[1], load_text(*args[:2]), args[2])):
            with pytest.raises(ValueError, match=rf"has {num_tokens} tokens, at least {num_tokens + 1} .*7 with BOS"):
                check(spec, split, byte_tokenizer)
        return
    check_length(spec, split, load_text(spec, split), byte_tokenizer)
    blocks = prepare(spec, split, byte_tokenizer)
    found = [blocks.block(index).tolist() for index in range(len(blocks))]
    assert [len(block) for block in found] == lengths
    assert {block[0] for block in found} == {byte_tokenizer.bos_token_id}
    joined = [token for block in found for token in block[1:]]
    assert byte_tokenizer.decode(joined) == text[: sum(lengths) - len(lengths)]


@pytest.mark.parametrize("blank", BLANKS)
def test_a_blank_stands_before_documents_not_before_lines(blank: str, tmp_path: Path) -> None:
    tokenizer, lines = tiny_tokenizer(blank), ["the model\n", "keeps drops\n"]
    (tmp_path / "lines.txt").write_text("".join(lines))
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps({"text": line}) + "\n" for line in lines))
    text, rows = str(tmp_path / "lines.txt"), str(tmp_path / "rows.jsonl")
    whole = continuing(tokenizer)("".join(lines), add_special_tokens=False)["input_ids"]
    assert stream_of(tokenizer, train_file=text, validation_file=text) == whole
    assert stream_of(tokenizer, train_file=rows, validation_file=rows) == documents_stream(tokenizer, lines)


def test_rows_are_held_out_where_no_validation_text_is_given(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    lines = [f"line {number}\n" for number in range(41)]
    file = tmp_path / "text.txt"
    file.write_text("".join(lines))
    with caplog.at_level(logging.WARNING, logger="scale_prune.data.rows"):
        train, held_out = (load_text(DataConfig(dataset=str(file)), split) for split in SPLITS)
    assert held_out.rows["text"][:] == lines[36:38]
    assert train.rows["text"][:] == lines[:36] + lines[38:]
    assert [held_out.number(0), train.number(0), train.number(36)] == [37, 1, 39]
    assert held_out.part == f"held out: 2 of 41 rows of {file}, 1 runs of neighboring rows, drawn at random"
    assert [record.message for record in caplog.records] == [
        f"no validation text is given: it is {held_out.part.removeprefix('held out: ')}, the same ones in every run"
    ]


@pytest.mark.parametrize(
    ("num_rows", "lines", "runs", "held_out"),
    [
        (2, True, 1, 1),
        (41, True, 1, 2),
        (600, True, 3, 30),
        (50_000, True, 20, 2500),
        (41, False, 2, 2),
        (600, False, 20, 30),
        (50_000, False, 20, 2500),
    ],
)
def test_neighbors_are_held_out_together_and_from_everywhere(
    num_rows: int, lines: bool, runs: int, held_out: int
) -> None:
    rows, how = neighbors(num_rows, lines=lines)
    assert len(rows) == pytest.approx(held_out, rel=0.2)
    assert how.startswith(f"{runs} runs of")
    assert 1 + (np.diff(rows) > 1).sum() <= runs  # two of them may meet
    assert (np.diff(rows) >= 1).all()
    assert runs < 20 or (rows.min() < num_rows / 5 and rows.max() > num_rows * 4 / 5)


def test_every_label_is_held_out_by_its_share() -> None:
    labels = ["neg"] * 960 + ["pos"] * 40 + ["rare "] + ["rare"] + ["alone"]
    rows, how = stratified(labels)
    assert Counter(labels[row].strip() for row in rows) == {"neg": 48, "pos": 2, "rare": 1}
    assert how.startswith("drawn at random from each of 4 labels by its share; 1 labels have one row only, which is")
    assert rows[:48].mean() == pytest.approx(480, abs=120)
    numbers, how = stratified([number / 7 for number in range(1000)])
    assert (len(numbers), how) == (50, "drawn at random")
    assert numbers.mean() == pytest.approx(500, abs=120)
    assert len(stratified([0.0, 1.0] * 50)[0]) == len(stratified([0, 1] * 50)[0]) == 4
    assert stratified(labels)[0].tolist() == rows.tolist()


@pytest.mark.parametrize("labels", [["a", "b"], ["a"]])
def test_labels_of_which_none_can_be_held_out(labels: list[str], tmp_path: Path) -> None:
    datasets.Dataset.from_dict({"text": labels, "label": labels}).to_parquet(tmp_path / "few.parquet")
    with pytest.raises(ValueError, match=rf"few.parquet has {len(labels)} rows, too few to hold out any"):
        load_text(DataConfig(dataset=str(tmp_path / "few.parquet")), "train", ("text",), "label")


@pytest.mark.parametrize(("content", "reads"), [("text\na\n", True), ("text\na,b\n", False)])
def test_of_all_ranks_of_a_host_one_converts_a_file(
    content: str, reads: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file, write, written = tmp_path / "rows.csv", text_files._write, []

    def write_slowly(*args: Any) -> None:
        written.append(args)
        time.sleep(0.3)
        write(*args)

    def load(_: int) -> str:
        try:
            return load_text(DataConfig(train_file=str(file), validation_file=str(file)), "train").rows["text"][0]
        except ValueError as error:
            return str(error)

    monkeypatch.setattr(text_files, "_write", write_slowly)
    file.write_text(content)
    with ThreadPoolExecutor(3) as ranks:
        (found,) = set(ranks.map(load, range(3)))
    assert (found == "a") == reads
    assert reads or "rows.csv cannot be read: row 1 has 2 fields, the header 1" in found
    assert len(written) == 1


@pytest.mark.parametrize("name", ["rows.jsonl", "rows.json"])
def test_texts_that_look_like_dates_stay_as_they_are_written(name: str, tmp_path: Path) -> None:
    written = ["2020-01-01", None, "2020-01-02T10:00:00Z"]
    rows = [{"when": each, "text": "a"} for each in written]
    lines = json.dumps(rows) if name.endswith(".json") else "".join(json.dumps(row) + "\n" for row in rows)
    (tmp_path / name).write_text(lines)
    spec = DataConfig(train_file=str(tmp_path / name), validation_file=str(tmp_path / name), text_column="when")
    assert load_text(spec, "train").rows["when"][:] == written
    assert load_text(spec, "train", ("text",), "when").rows["when"][:] == written
    lists = [{"when": [each, each], "text": "a"} for each in written]
    (tmp_path / name).write_text("".join(json.dumps(row) + "\n" for row in lists))
    assert load_text(spec, "train", ("when",)).rows["when"][:] == [[each, each] for each in written]


def test_dates_that_nobody_asks_for_cost_nothing(tmp_path: Path) -> None:
    """Read as they stand, a blank line would be a mistake."""
    (tmp_path / "rows.jsonl").write_text('{"when": "2020-01-01", "text": "a"}\n\n{"when": "2020-01-02", "text": "b"}\n')
    spec = DataConfig(train_file=str(tmp_path / "rows.jsonl"), validation_file=str(tmp_path / "rows.jsonl"))
    assert load_text(spec, "train").rows["text"][:] == ["a", "b"]


def test_all_that_a_reader_says_is_told_on_in_one_line() -> None:
    reason = "Config name is missing.\nPlease pick one among the available configs: ['raw', 'v1']"
    with pytest.raises(ValueError, match=r"a/b cannot be read: Config name is missing\. Please"), _one_message("a/b"):
        raise ValueError(reason)
    with pytest.raises(ValueError, match=r"cannot be read: x+$") as caught, _one_message("a/b"):
        raise ValueError(9999 * "x")
    assert len(str(caught.value)) < 600


def test_other_splits_are_named(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    names = ("train", "dev", "test", "validation_matched")
    datasets.DatasetDict(dict.fromkeys(names, as_dataset())).save_to_disk(tmp_path / "glue")
    with caplog.at_level(logging.WARNING, logger="scale_prune.data.rows"):
        load_text(DataConfig(dataset=str(tmp_path / "glue")), "train")
    told, held_out = (record.message for record in caplog.records)
    assert told.endswith("glue, dev, test, validation_matched are not used; only train and validation are")
    assert "glue (train)" in held_out


def test_rows_that_say_that_they_have_no_label_are_left_out(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    label = datasets.ClassLabel(names=["entailment", "neutral"])
    rows = datasets.Dataset.from_dict({"text": list("abcdef"), "label": [0, -1, 1, 1, -1, 0]})
    rows.cast_column("label", label).to_parquet(tmp_path / "nli.parquet")
    file = str(tmp_path / "nli.parquet")
    with caplog.at_level(logging.WARNING, logger="scale_prune.data.rows"):
        found = load_text(DataConfig(train_file=file, validation_file=file), "train", ("text",), "label")
    assert "".join(found.rows["text"]) == "acdf"
    assert [found.number(row) for row in range(4)] == [1, 3, 4, 6]
    assert [record.message for record in caplog.records] == [
        f"2 of 6 rows of {file} have no label (-1) and are left out"
    ]


REPLACED: dict[str, Callable[[Path, str], object]] = {
    "rows.txt": lambda path, word: path.write_text(f"{word}\n" * 9),
    "rows.jsonl": lambda path, word: path.write_text(json.dumps({"text": word}) + "\n"),
    "rows.csv": lambda path, word: path.write_text(f"text\n{word}\n"),
    "rows.txt.gz": lambda path, word: path.write_bytes(gzip.compress(word.encode(), compresslevel=0, mtime=0)),
    "rows.parquet": lambda path, word: datasets.Dataset.from_dict({"text": [word]}).to_parquet(path),
    "folder": lambda path, word: datasets.DatasetDict(
        {split: datasets.Dataset.from_dict({"text": [word]}) for split in SPLITS}
    ).save_to_disk(path),
}


@pytest.mark.parametrize("name", REPLACED)
def test_a_file_of_the_same_path_size_and_date_is_read_anew(
    name: str, tmp_path: Path, byte_tokenizer: PreTrainedTokenizerFast
) -> None:
    path, found = tmp_path / name, []
    file = {"dataset": str(path)} if name == "folder" else {"train_file": str(path), "validation_file": str(path)}
    for word in ("neurons", "pruners"):
        REPLACED[name](path, word)
        for state in path.glob("*/state.json"):
            state.write_text(json.dumps(json.loads(state.read_text()) | {"_fingerprint": "the same"}))
        os.utime(path, (1e9, 1e9))
        found.append((str(byte_tokenizer.decode(stream_of(byte_tokenizer, **file))).split()[0], path.stat().st_size))
    assert found == [("neurons", found[0][1]), ("pruners", found[0][1])]


BOM = b"\xef\xbb\xbf"
CSV: list[tuple[bytes, list[str] | str]] = [
    (b"text\nNA\nnull\nNone\nnan\n2020\n007\n", ["NA", "null", "None", "nan", "2020", "007"]),
    (b"text,n\n1.50,1\n,2\n", ["1.50", ""]),
    (b',text\r\n0,"a, ""b""\nc"\r\n\r\n1,5" disk\r\n', ['a, "b"\nc', '5" disk']),
    (b"text\n" + b"long " * 40_000 + b"\n", ["long " * 40_000]),
    (b"text\nIn the year, the ship, sailed\n", "row 1 has 3 fields, the header 1; a text with a comma stands in"),
    (b"text,n\na,1\nb,c,2\n", "row 2 has 3 fields, the header 2"),
    (b"text,n\na,1,\n", "row 1 has 3 fields, the header 2"),
    (b"text,n\na,1\n\nb\n", "row 2 has 1 fields, the header 2"),
    (b'text,n\n"say \\"a\\" b",1\n', "row 1: ',' expected after '\"'; a text with a comma"),
    (b'text,n\n"say \\", b",1\n', "row 1 has 3 fields, the header 2"),
    (b'text,n\na,1\n"b,2\nc,3\n', "row 2: unexpected end of data"),
    (b"text,n,text\na,1,b\n", "its header has the column 'text' twice"),
    (b"\n\n", "it has no header"),
    (b"text\n\xff\n", "'utf-8' codec can't decode byte 0xff"),
]


@pytest.mark.parametrize("mark", [b"", BOM], ids=["plain", "bom"])
@pytest.mark.parametrize("packed", [False, True], ids=["plain", "gz"])
@pytest.mark.parametrize(("content", "expected"), CSV)
def test_a_csv_file_is_read_as_it_stands_or_refused_by_the_row(
    content: bytes, expected: list[str] | str, packed: bool, mark: bytes, tmp_path: Path
) -> None:
    (tmp_path / "rows.csv").write_bytes(mark + content)
    file = str(compressed(tmp_path / "rows.csv") if packed else tmp_path / "rows.csv")
    spec = DataConfig(train_file=file, validation_file=file)
    for split in SPLITS:
        if isinstance(expected, list):
            assert load_text(spec, split).rows["text"][:] == expected
        else:
            with pytest.raises(ValueError, match=re.escape(f"data set {file} cannot be read: {expected}")):
                load_text(spec, split)


@pytest.mark.parametrize(
    ("column", "labels"),
    [
        ("1\n0\n-1", [1, 0, -1]),
        ("0.5\n1\n2e1", [0.5, 1.0, 20.0]),
        ("True\nfalse\nTRUE", [True, False, True]),
        ("1\nNA\n2020", ["1", "NA", "2020"]),
        ("yes\nyes \n007", ["yes", "yes ", "007"]),
    ],
)
def test_the_labels_of_a_csv_file_are_numbers_where_all_of_them_are(
    column: str, labels: list[Any], tmp_path: Path
) -> None:
    file = tmp_path / "rows.csv"
    file.write_text("n,label,text\n" + "".join(f"7,{label},2020\n" for label in column.splitlines()))
    spec = DataConfig(train_file=str(file), validation_file=str(file))
    rows = load_text(spec, "train", ("text", "n"), "label").rows
    assert (rows["label"][:], rows["text"][:], rows["n"][:]) == (labels, ["2020"] * 3, ["7"] * 3)
    assert list(map(type, rows["label"][:])) == list(map(type, labels))


@pytest.mark.parametrize("name", ["rows.txt", "rows.jsonl", "rows.json", "rows.jsonl.gz", "rows.txt.gz"])
def test_a_byte_order_mark_is_no_text(name: str, tmp_path: Path) -> None:
    rows = {"txt": "a\nNA\n", "jsonl": '{"text": "a"}\n{"text": "NA"}\n', "json": '[{"text": "a"}, {"text": "NA"}]'}
    content = BOM + rows[name.split(".")[1]].encode()
    (tmp_path / name).write_bytes(gzip.compress(content) if name.endswith("gz") else content)
    found = load_text(DataConfig(validation_file=str(tmp_path / name)), "validation").rows["text"]
    assert [text.strip() for text in found] == ["a", "NA"]


def test_files_take_the_place_of_the_splits(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    for name in ("first", "second", "third"):
        (tmp_path / f"{name}.txt").write_text(f"{name}\n")
    first, second, third = (str(tmp_path / f"{name}.txt") for name in ("first", "second", "third"))
    cases: list[tuple[Split, str, DataConfig]] = [
        ("train", "first\n", DataConfig(dataset=first, validation_file=second)),
        ("validation", "second\n", DataConfig(dataset=first, validation_file=second)),
        ("train", "third\n", DataConfig(dataset=first, train_file=third, validation_file=second)),
        ("validation", "second\n", DataConfig(validation_file=second)),
    ]
    for split, expected, spec in cases:
        assert list(load_text(spec, split).rows["text"]) == [expected]
    assert not caplog.records


FILES = {
    "good.jsonl": b'{"text": "word", "n": 1}\n' * 30,
    "one.txt": b"only one row",
    "empty.txt": b"",
    "empty.jsonl.gz": gzip.compress(b""),
    "header.csv": b"text,n\n",
    "invalid.jsonl": b"{no json\n",
    "latin1.txt": "größer".encode("latin-1"),
    "plain.txt.gz": b"not compressed",
    "short.parquet": b"PAR1",
    "numbers.jsonl": b'{"text": 3}\n' * 30,
    "notes.md": b"text",
}


@pytest.mark.parametrize(
    ("dataset", "settings", "message"),
    [
        (None, {}, "no train text: no data set is given; give --dataset or --train_file"),
        ("missing.txt", {}, "missing.txt is missing"),
        ("notes.md", {}, "notes.md is of no known format; a file ends in one of .txt, .jsonl, .json, .csv, .parquet"),
        ("empty.txt", {}, "empty.txt cannot be read: it is empty"),
        ("empty.jsonl.gz", {}, "empty.jsonl.gz cannot be read: it is empty"),
        ("header.csv", {"validation_file": "good.jsonl"}, "header.csv is empty"),
        ("no_rows.parquet.gz", {"validation_file": "good.jsonl"}, "no_rows.parquet.gz is empty"),
        ("no_rows.parquet.gz", {}, "no_rows.parquet.gz has 0 rows, too few to hold out any for validation"),
        ("one.txt", {}, "one.txt has 1 rows, too few to hold out any for validation"),
        ("invalid.jsonl", {}, "invalid.jsonl cannot be read: .*JSON"),
        ("latin1.txt", {}, "latin1.txt cannot be read: 'utf-8' codec"),
        ("plain.txt.gz", {}, "plain.txt.gz cannot be read: Not a gzipped file"),
        ("short.parquet", {}, "short.parquet cannot be read: Parquet"),
        ("folder", {}, "folder cannot be read: .*neither a `Dataset` directory nor a `DatasetDict`"),
        ("good.jsonl", {"text_column": "body"}, "has no column 'body', its columns are text, n"),
        ("good.jsonl", {"text_column": "n"}, "column 'n' of data set .* holds int64, not text"),
        ("numbers.jsonl", {}, "column 'text' of data set .* holds int64, not text"),
        ("good.jsonl", {"block_size": 500}, r"good.jsonl has 139 tokens, at least 500 are needed \(block_size 500"),
        ("good.jsonl", {"validation_file": "missing.csv"}, "missing.csv is missing"),
    ],
)
def test_bad_data_is_one_sentence(
    dataset: str | None,
    settings: dict[str, Any],
    message: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    byte_tokenizer: PreTrainedTokenizerFast,
) -> None:
    for name, content in FILES.items():
        (tmp_path / name).write_bytes(content)
    (tmp_path / "folder").mkdir()
    as_dataset().select([]).to_parquet(tmp_path / "no_rows.parquet")
    compressed(tmp_path / "no_rows.parquet")
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ValueError, match=message) as caught:
        prepare(DataConfig(dataset=dataset, **settings), "train", byte_tokenizer)
    assert "\n" not in str(caught.value)


def test_a_split_that_nothing_gives_is_named(tmp_path: Path) -> None:
    datasets.DatasetDict({"test": as_dataset()}).save_to_disk(tmp_path / "odd")
    with pytest.raises(
        ValueError, match=r"no validation text: .*odd has only test; give --dataset or --validation_file"
    ):
        load_text(DataConfig(dataset=str(tmp_path / "odd")), "validation")


def test_a_hub_name_that_cannot_be_reached_is_one_sentence() -> None:
    with pytest.raises(ValueError, match="data set nobody/nothing cannot be read: "):
        load_text(DataConfig(dataset="nobody/nothing"), "train")


def test_too_few_tokens_to_predict(tmp_path: Path, byte_tokenizer: PreTrainedTokenizerFast) -> None:
    (tmp_path / "one.txt").write_text("a")
    with pytest.raises(ValueError, match=r"validation text .* has 1 tokens, at least 2 are needed"):
        prepare(DataConfig(validation_file=str(tmp_path / "one.txt")), "validation", byte_tokenizer)


def test_documents_need_an_end_of_text_token(tmp_path: Path) -> None:
    write_csv(tmp_path / "rows.csv")
    (tmp_path / "lines.txt").write_text("ab")
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=train_tokenizer([], 257).backend_tokenizer)
    with pytest.raises(ValueError, match=r"no eos_token, which stands between the documents of .*rows\.csv"):
        stream_of(tokenizer, train_file=str(tmp_path / "rows.csv"), validation_file=str(tmp_path / "rows.csv"))
    lines = str(tmp_path / "lines.txt")
    assert len(stream_of(tokenizer, train_file=lines, validation_file=lines)) == 2
