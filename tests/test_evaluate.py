"""Models that are measured after their run: the same perplexity, and speeds that add up."""

import json
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from command import BLOCK, errors_of, make_work, recomputed_perplexity
from distributed import run_ranks
from models import tiny_config, tiny_model
from transformers import AutoConfig, AutoModelForCausalLM

from scale_prune.commands import evaluate
from scale_prune.config.command_line import user_errors
from scale_prune.inspection.finished_models import names_of
from scale_prune.inspection.latency import describe, speeds
from scale_prune.models.families import FAMILIES

pytestmark = pytest.mark.distributed


@pytest.fixture(scope="module")
def work(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_work(tmp_path_factory.mktemp("work"))


def flags(work: Path, *more: str) -> list[str]:
    text = ["--validation_file", str(work / "validation.txt"), "--block_size", str(BLOCK)]
    return ["--model", str(work / "model"), *text, "--output", str(work / "evaluation.json"), *more]


def save_unknown(work: Path) -> tuple[Path, Path]:
    """Make models of no family: a plain one, and a composite one that reads images too."""
    sizes: dict[str, Any] = {
        "hidden_size": 16,
        "num_attention_heads": 2,
        "num_hidden_layers": 2,
        "intermediate_size": 17,
    }
    text, folders = sizes | {"vocab_size": 300, "max_position_embeddings": 64}, (work / "persimmon", work / "gemma3")
    vision = sizes | {"image_size": 28, "patch_size": 14}
    composite: dict[str, Any] = {
        "text_config": text | {"num_key_value_heads": 1, "head_dim": 8},
        "vision_config": vision,
    }
    for folder, settings in zip(folders, (text, composite), strict=True):
        AutoModelForCausalLM.from_config(AutoConfig.for_model(folder.name, **settings)).save_pretrained(folder)
        for file in (work / "model").glob("token*"):
            (folder / file.name).write_bytes(file.read_bytes())
    return folders


def test_perplexity_is_that_of_the_plain_model_of_any_family_on_any_number_of_ranks(work: Path) -> None:
    folders = (work / "model", *save_unknown(work))
    run_ranks(evaluate.main, 2, ["--model", *map(str, folders), *flags(work, "--micro_batch_size", "3")[2:]])
    found = json.loads((work / "evaluation.json").read_text())
    assert found["bos"] == {folder.name: False for folder in folders}
    assert len(found["models"]) == len(folders)
    for folder in folders:
        model: Any = AutoModelForCausalLM.from_pretrained(folder)
        expected = recomputed_perplexity(model, folder, work / "validation.txt")
        assert found["models"][folder.name] == {"perplexity": pytest.approx(expected, rel=1e-5)}


def test_speed_is_measured_by_turns_and_reported_beside_perplexity_with_bos(work: Path) -> None:
    tiny_model("gpt_neo", vocab_size=300, intermediate_size=5).save_pretrained(work / "small" / "pruned")
    for file in (work / "model").glob("token*"):
        (work / "small" / "pruned" / file.name).write_bytes(file.read_bytes())
    both = ["--baseline", str(work / "model"), "--model", str(work / "small" / "pruned")]
    quick = ["--latency", "--prompt_tokens", "8", "--new_tokens", "3", "--rounds", "2", "--batch", "2"]
    run_ranks(evaluate.main, 1, [*flags(work)[2:], *both, *quick, "--bos", "always"])
    found = json.loads((work / "evaluation.json").read_text())
    expected = recomputed_perplexity(
        AutoModelForCausalLM.from_pretrained(work / "model"), work / "model", work / "validation.txt", [0]
    )
    assert found["models"]["model"]["perplexity"] == pytest.approx(expected, rel=1e-5)
    assert found["bos"] == {"model": True, "small": True}
    assert found["baseline"] == "model"
    dense, small = found["models"]["model"], found["models"]["small"]
    assert small["parameters"] < dense["parameters"]
    assert small["flops_per_token"] < dense["flops_per_token"]
    for each in (dense, small):
        assert each["tokens_per_second"] == pytest.approx(2000 / each["ms_per_token"])
        assert each["ms_per_token"] > 0
        assert each["peak_bytes"] is None


def test_flops_are_those_of_the_matrices_with_the_tied_output_counted() -> None:
    model = tiny_model("gpt_neo")
    matrices = sum(w.numel() for name, w in model.named_parameters() if w.dim() == 2 and "wpe" not in name)
    assert describe(model).flops_per_token == 2 * matrices
    assert describe(model).weight_bytes == 4 * sum(w.numel() for w in model.parameters())


@pytest.mark.parametrize("model_type", ["gpt_neo", "mamba"])
def test_generation_with_the_cache_chooses_what_the_whole_text_would(model_type: str) -> None:
    sizes = {"vocab_size": 29, "hidden_size": 16, "num_hidden_layers": 2}
    config = tiny_config(model_type) if model_type in FAMILIES else AutoConfig.for_model(model_type, **sizes)
    model: Any = AutoModelForCausalLM.from_config(config).eval()
    calls: list[torch.Tensor] = []
    forward = model.forward

    def noted(input_ids: torch.Tensor, **options: Any) -> Any:
        calls.append(input_ids)
        return forward(input_ids, **options)

    model.forward = noted
    speeds({"model": model}, vocabulary=20, batch=2, prompt=5, new_tokens=3, rounds=1)
    text = torch.cat(calls[-4:], 1)
    for place in range(5, 8):
        expected = forward(text[:, :place]).logits[:, -1].argmax(-1)
        assert torch.equal(text[:, place], expected)


def test_names_are_as_short_as_they_can_be() -> None:
    assert names_of(["out/gum/pruned", "out/random/pruned"], "base") == {
        "base": "base",
        "gum": "out/gum/pruned",
        "random": "out/random/pruned",
    }
    assert list(names_of(["a/gum/pruned", "b/gum/pruned"], None)) == ["a/gum", "b/gum"]
    with pytest.raises(ValueError, match="base is there twice"):
        names_of(["base"], "base")


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (["--latency", "--prompt_tokens", "30"], "are more than the 31 positions of model"),
        (["--rounds", "0"], "0 is not valid"),
        (["--output", "{work}/model/config.json"], "model/config.json is there already and no earlier result"),
        (["--output", "{work}/train.txt"], "train.txt is there already and no earlier result"),
        (["--output", "{work}"], " is there already and no earlier result"),
        (["--output", "{work}/mine"], "mine is written as {work}/mine.part first, which is there already"),
        (["--output", "{work}/train.txt/new/a.json"], "a.json cannot be made: {work}/train.txt is not a folder"),
        (["--baseline", "/nowhere"], "--baseline /nowhere: its model cannot be read"),
        (["--remaining", "0.5"], "unknown argument --remaining"),
        (["--block_size", "50"], "--block_size 50 is more than the 31 positions"),
    ],
)
def test_mistakes_are_named(more: list[str], message: str, work: Path, capsys: Any) -> None:
    (work / "mine.part").touch()
    with pytest.raises(SystemExit) as exit, user_errors(0):
        evaluate.main(flags(work, *(word.format(work=work) for word in more)))
    assert exit.value.code == 2
    (error,) = errors_of(capsys.readouterr().err)
    assert message.format(work=work) in error


@pytest.mark.parametrize("failing", ["_save", "_add_speeds"])
def test_what_is_measured_is_shown_and_written_whatever_comes_next(
    failing: str, work: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def fails(*args: Any) -> None:
        raise OSError("no space left")

    output = tmp_path / "evaluation.json"
    monkeypatch.setattr(evaluate, "_measured", lambda *args: {"perplexity": 7.5})
    monkeypatch.setattr(evaluate, failing, fails)
    asked = ["--latency", "--prompt_tokens", "8", "--new_tokens", "3", "--output", str(output)]
    with pytest.raises(OSError, match="no space left"):
        evaluate.main(flags(work, *asked))
    assert "| model | 7.50 |" in capsys.readouterr().out
    if failing != "_save":
        assert json.loads(Path(f"{output}.part").read_text())["models"] == {"model": {"perplexity": 7.5}}
    assert not output.exists(), "an earlier result stays until there is a whole one"


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (["--model", "nowhere.gguf"], "--model nowhere.gguf: there is no such file"),
        (["--model", "a.gguf"], 'measured in llama.cpp: pip install "scale_prune[llama_cpp]"'),
        (["--model", "a.gguf", "--latency", "--batch", "2"], "perplexity and --latency are measured, not --batch 2"),
        (["--model", "a.gguf", "--task", "summarization"], "measured, not --task summarization"),
    ],
)
def test_a_gguf_is_measured_where_it_can_be(
    more: list[str], message: str, work: Path, capsys: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "llama_cpp", None)
    monkeypatch.chdir(work)
    Path("a.gguf").touch()
    with pytest.raises(SystemExit) as exit_:
        evaluate.main(["--baseline", "model", "--validation_file", "validation.txt", "--block_size", "16", *more])
    assert exit_.value.code == 2
    assert message in capsys.readouterr().err
