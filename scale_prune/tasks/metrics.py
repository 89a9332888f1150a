"""Metrics of written texts, from the packages that others report with; all of them times 100.

Every metric takes the written texts, and for each of them its references, at least one.
"""

import re
from collections.abc import Callable, Sequence
from itertools import zip_longest
from statistics import fmean
from typing import Any

import sacrebleu
from rouge_score.rouge_scorer import RougeScorer

Metric = Callable[[Sequence[str], Sequence[Sequence[str]]], dict[str, float]]

ROUGE = ("rouge1", "rouge2", "rougeL")


def bleu(written: Sequence[str], references: Sequence[Sequence[str]]) -> dict[str, float]:
    """Return BLEU of the whole corpus, by sacrebleu's defaults (13a tokens, mixed case, exponential smoothing)."""
    return {"bleu": sacrebleu.corpus_bleu(written, _streams(references)).score}


def chrf(written: Sequence[str], references: Sequence[Sequence[str]]) -> dict[str, float]:
    """Return chrF2 of the whole corpus, by sacrebleu's defaults."""
    return {"chrf": sacrebleu.corpus_chrf(written, _streams(references)).score}


def rouge(written: Sequence[str], references: Sequence[Sequence[str]]) -> dict[str, float]:
    """Return the mean F-measures of ROUGE-1, 2 and L by rouge-score, with stemming; of several references the best."""
    scorer = RougeScorer(ROUGE, use_stemmer=True)
    scores = [scorer.score_multi(own, text) for text, own in zip(written, references, strict=True)]
    return {name: 100 * fmean(score[name].fmeasure for score in scores) for name in ROUGE}


def exact_match(written: Sequence[str], references: Sequence[Sequence[str]]) -> dict[str, float]:
    """Return how many texts are one of their references: as they are, and by `normalized`."""
    pairs = list(zip(written, references, strict=True))
    return {
        "exact_match": 100 * fmean(text in own for text, own in pairs),
        "exact_match_normalised": 100 * fmean(normalized(text) in map(normalized, own) for text, own in pairs),
    }


def normalized(query: str) -> str:
    """Return a query without what does not change it.

    Lower case, one blank between words, none around punctuation and operators, no quotation marks, no semicolon at the
    end. Values lose their case and quotation marks too.
    """
    text = re.sub(r"[\"'`]", "", query.lower()).strip().rstrip(";")
    return re.sub(r"\s*([^\w\s])\s*", r"\1", " ".join(text.split()))


def _streams(references: Sequence[Sequence[str]]) -> Any:
    """Turn the references of each text into sacrebleu's form: the first ones, the second ones ..., None where none."""
    return [list(stream) for stream in zip_longest(*references)]


METRICS: dict[str, Metric] = {"bleu": bleu, "chrf": chrf, "rouge": rouge, "exact_match": exact_match}
