"""BOS follows the tokenizer, and text that goes on gets no blank that the tokenizer puts before a text."""

from pathlib import Path

import pytest
from models import BLANKS, tiny_tokenizer
from transformers import AutoTokenizer, PreTrainedTokenizerBase

from scale_prune.data.beginnings import adds_bos, bos_of, continuing, with_bos
from scale_prune.data.embedded import train_tokenizer


def ids(tokenizer: PreTrainedTokenizerBase, text: str) -> list[int]:
    found: list[int] = tokenizer(text, add_special_tokens=False)["input_ids"]
    return found


@pytest.mark.parametrize(
    ("adds", "choice", "expected"),
    [(True, "auto", 1), (False, "auto", None), (False, "always", 1), (True, "never", None)],
)
def test_bos_is_the_tokenizers_own_unless_it_is_overridden(adds: bool, choice: str, expected: int | None) -> None:
    assert bos_of(choice, tiny_tokenizer(bos=adds)) == expected


def test_the_embedded_tokenizer_adds_none_and_one_without_a_bos_token_cannot() -> None:
    tokenizer = train_tokenizer([], 257)
    assert bos_of("auto", tokenizer) is None
    tokenizer.bos_token = None
    assert bos_of("auto", tokenizer) is None
    with pytest.raises(ValueError, match="--bos always needs a bos_token, which the model's tokenizer has not"):
        bos_of("always", tokenizer)


@pytest.mark.parametrize("adds", [True, False])
def test_a_copy_adds_bos_as_it_is_wanted(adds: bool) -> None:
    tokenizer = tiny_tokenizer(bos=adds)
    assert with_bos(tokenizer, adds) is tokenizer
    other = with_bos(tokenizer, not adds)
    assert (adds_bos(tokenizer), adds_bos(other)) == (adds, not adds)
    assert other("keeps")["input_ids"] == [1] * (not adds) + ids(tokenizer, "keeps")


@pytest.mark.parametrize("blank", BLANKS)
def test_text_that_goes_on_is_tokenised_as_in_the_whole(blank: str, tmp_path: Path) -> None:
    """Also after the tokenizer was saved, and read by the class that transformers takes for it."""
    tiny_tokenizer(blank).save_pretrained(tmp_path)
    tokenizer = AutoTokenizer.from_pretrained(tmp_path)
    following = continuing(tokenizer)
    assert (following is tokenizer) == (blank == "none")
    assert (ids(tokenizer, "keeps") == ids(following, " keeps")) == (blank != "none")
    assert adds_bos(tokenizer)
    for first, second in (("the model", " keeps drops\n"), ("a model\n", "keeps drops"), ("fast\n", " then")):
        assert ids(tokenizer, first) + ids(following, second) == ids(tokenizer, first + second)
