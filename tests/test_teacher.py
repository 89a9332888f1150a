"""Runs that learn from a teacher, on two ranks, and teachers that cannot be used."""

from pathlib import Path

import pytest
from command import arguments, errors_of, make_work, outcome, outcomes, report_of
from distributed import run_ranks
from memory_backend import steady_model
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from scale_prune.data.embedded import train_tokenizer

pytestmark = pytest.mark.distributed

SETTINGS = {"criterion": "gum", "remaining": 0.4, "max_steps": 4, "recovery_steps": 1, "log_every": 1}


@pytest.fixture(scope="module")
def work(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_work(tmp_path_factory.mktemp("work"))


def losses(output: Path) -> dict[int, float]:
    events = EventAccumulator(str(output / "tensorboard")).Reload()
    return {event.step: event.value for event in events.Scalars("train/loss")}


def run(work: Path, name: str, **settings: object) -> Path:
    ranks = run_ranks(outcome, 2, arguments(work, work / name, **SETTINGS | settings))
    assert [code for code, _ in ranks] == [0, 0], ranks[0][1]
    return work / name


def test_the_model_itself_teaches_nothing_at_first_and_holds_it_back_later(work: Path) -> None:
    plain = run(work, "plain")
    taught = run(work, "taught", teacher="self", distill_alpha=0.75)
    alone, together = losses(plain), losses(taught)
    assert together[1] == pytest.approx(0.25 * alone[1], rel=1e-5)
    assert together[5] > 0.25 * alone[5]
    cost = report_of(taught)["distillation"]
    dense = report_of(taught)["parameters"]["dense"]
    assert (cost["teacher"], cost["parameters"]) == ("self", dense)
    assert cost["bytes_per_rank"] == 4 * -(-dense // 2)
    assert 0 < cost["seconds"] < report_of(taught)["seconds"]["total"]
    assert report_of(plain)["distillation"] is None
    assert "teacher" not in report_of(plain)["seconds"]


def other_teachers(work: Path) -> dict[str, Path]:
    """Make a teacher with one token more, and one whose tokens are others."""
    ids = dict.fromkeys(("bos_token_id", "eos_token_id", "pad_token_id"), 0)
    made = {}
    for name, more in {"larger": 1, "other": 0}.items():
        tokenizer = train_tokenizer(["quite another text, with words of its own: zebra, quagga, okapi. " * 50], 300)
        tokenizer.save_pretrained(work / name)
        size = report_vocabulary(work) + more
        steady_model("gpt_neo", vocab_size=size, **ids).save_pretrained(work / name)
        made[name] = work / name
    return made


def report_vocabulary(work: Path) -> int:
    from transformers import AutoConfig

    return int(AutoConfig.from_pretrained(work / "model").vocab_size)


def test_a_teacher_of_another_vocabulary_is_refused(work: Path) -> None:
    teachers = other_teachers(work)
    size = report_vocabulary(work)
    expected = {
        teachers["larger"]: f"predicts {size + 1} tokens, --model {work / 'model'} {size};",
        teachers["other"]: "has other tokens than --model",
        work / "nowhere": f"--teacher {work / 'nowhere'}: its model cannot be read",
    }
    cases = [arguments(work, work / "never", teacher=teacher) for teacher in expected]
    for message, (code, stderr) in zip(expected.values(), run_ranks(outcomes, 1, cases)[0], strict=True):
        assert code == 2
        (error,) = errors_of(stderr)
        assert message in error
    assert not (work / "never").exists()
