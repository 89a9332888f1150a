"""Every metric against its package's own result on the same strings."""

from typing import Any

import pytest
from rouge_score.rouge_scorer import RougeScorer
from sacrebleu.metrics import BLEU, CHRF

from scale_prune.data.forms import FORMS
from scale_prune.tasks.metrics import METRICS, bleu, chrf, exact_match, normalized, rouge

WRITTEN = ["Alimentum is a place in the city.", "The Eagle serves food", "Nothing alike here at all."]
REFERENCES = [
    ["Alimentum is a family place in the city centre.", "In the city there is Alimentum."],
    ["The Eagle serves Indian food.", "The Eagle is serving foods.", "Eagle."],
    ["Completely different words stand there."],
]


def test_bleu_and_chrf_are_sacrebleus_with_as_many_references_as_there_are() -> None:
    streams: Any = [[own[place] if place < len(own) else None for own in REFERENCES] for place in range(3)]
    assert bleu(WRITTEN, REFERENCES) == {"bleu": BLEU().corpus_score(WRITTEN, streams).score}
    assert chrf(WRITTEN, REFERENCES) == {"chrf": CHRF().corpus_score(WRITTEN, streams).score}
    assert bleu(WRITTEN, REFERENCES)["bleu"] > bleu(WRITTEN, [own[:1] for own in REFERENCES])["bleu"] > 0
    same = [own[-1:] for own in REFERENCES]
    assert bleu([own[0] for own in same], same)["bleu"] == pytest.approx(100)


def test_rouge_is_the_mean_of_rouge_scores_best_reference() -> None:
    found = rouge(WRITTEN, REFERENCES)
    assert list(found) == ["rouge1", "rouge2", "rougeL"]
    for name, value in found.items():
        scorer = RougeScorer([name], use_stemmer=True)
        best = [
            max(scorer.score(reference, text)[name].fmeasure for reference in own)
            for text, own in zip(WRITTEN, REFERENCES, strict=True)
        ]
        assert value == pytest.approx(100 * sum(best) / 3)


@pytest.mark.parametrize(
    ("text", "reference", "exact", "alike"),
    [
        ("SELECT a FROM t", "SELECT a FROM t", True, True),
        ("select A from T ;", "SELECT a FROM t", False, True),
        ("SELECT a FROM t WHERE b='x y'", 'SELECT a  FROM t WHERE b = "X y"', False, True),
        ("SELECT a FROM t WHERE b = xy", "SELECT a FROM t WHERE b = x y", False, False),
        ("SELECT b FROM t", "SELECT a FROM t", False, False),
        ("SELECT a FROM t WHERE b > 1", "SELECT a FROM t WHERE b < 1", False, False),
    ],
)
def test_queries_match_as_they_are_or_by_what_they_say(text: str, reference: str, exact: bool, alike: bool) -> None:
    assert exact_match([text], [["other", reference]]) == {
        "exact_match": 100.0 * exact,
        "exact_match_normalised": 100.0 * alike,
    }
    assert normalized(normalized(text)) == normalized(text)


def test_every_metric_of_a_task_is_known() -> None:
    assert {name for form in FORMS.values() for name in form.metrics} == set(METRICS)
