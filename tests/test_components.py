"""Components under the real ZeRO-3 engine: factorized, gated, compacted, exported and loaded again."""

import json
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from distributed import run_ranks
from engines import BLOCKS, STEPS, call_each, ds_config, logits, masters, pruning, saved_model, start
from memory_backend import train
from models import HIDDEN, WIDTH
from safetensors.torch import save_file
from test_export import run_alone
from torch import Tensor
from transformers import AutoModelForCausalLM

from scale_prune import compact, save
from scale_prune.config.settings import PruningConfig
from scale_prune.core.low_rank import svd_factors
from scale_prune.zero3 import load_model, training_engine

pytestmark = pytest.mark.distributed

TARGETS = "mlp,attention"
BF16: dict[str, Any] = {"bf16": {"enabled": True}}

# Runs where scale_prune cannot be imported, in a folder that holds `folders` and `expected`; writes `results.json`.
LOADER = """
import json
import sys
sys.modules["scale_prune"] = None
from pathlib import Path
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

def measure(folder, expected):
    model = AutoModelForCausalLM.from_pretrained(folder, trust_remote_code="factors" in str(folder)).eval()
    with torch.no_grad():
        difference = (model(expected["ids"], use_cache=False).logits - expected["logits"]).abs().max().item()
    generated = model.generate(expected["ids"], max_new_tokens=3, do_sample=False, eos_token_id=None).shape[1]
    parameters = sum(parameter.numel() for parameter in model.parameters())
    kind = type(model).__name__
    return model, {"difference": difference, "class": kind, "parameters": parameters, "length": generated}

results = {}
for folder in sorted(Path("folders").iterdir()):
    expected = load_file(f"expected/{folder.name}")
    model, results[folder.name] = measure(folder, expected)
    model.save_pretrained(Path("again") / folder.name)
    results[folder.name + "-again"] = measure(Path("again") / folder.name, expected)[1]
Path("results.json").write_text(json.dumps(results))
"""


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("models")


def life(path: Path, settings: PruningConfig, config: dict[str, Any], output: Path) -> dict[str, Any]:
    """Prune, compact, and write the model with its factors and multiplied out."""
    dense = training_engine(load_model(str(path), config), config)
    before = logits(dense)
    dense.destroy()
    engine, pruner = start(path, config, settings)
    found: dict[str, Any] = {"difference": float((logits(engine) - before).abs().max())}
    train(engine, pruner, BLOCKS, STEPS)
    groups, masked = pruner.groups, logits(engine)
    found |= {"masked": masked, "masks": torch.cat(pruner.masks), "scores": torch.cat(pruner.scores)}
    found |= {"remaining": pruner.remaining, "widths": dict(zip([g.name for g in groups], pruner.widths, strict=True))}
    engine = compact(pruner, partial(training_engine, ds_config=config))
    found["compacted"] = logits(engine)
    for layout in ("per_layer", "uniform"):
        save(engine, output / {"per_layer": "factors", "uniform": "dense"}[layout], layout=layout)
    engine.destroy()
    return found


@pytest.mark.parametrize(
    ("model_type", "criterion", "targets"),
    [
        ("gpt_neo", "flop", "mlp,attention,embedding"),  # with an output tied to the embedding
        pytest.param("gpt2", "flop_agp", "embedding,mlp", marks=pytest.mark.slow),
        ("llama", "factorize", TARGETS),
        ("gptj", "flop", "attention,embedding"),  # whose output is not tied
    ],
)
def test_dense_is_factorized_and_masked_is_compacted_is_exported(
    model_type: str, criterion: str, targets: str, folder: Path, tmp_path: Path
) -> None:
    settings = pruning(criterion, targets=targets, remaining=0.5, embedding_clusters=3)
    found = run_ranks(life, 2, saved_model(folder, model_type), settings, ds_config(), tmp_path / "folders")
    for rank in found:
        if criterion != "factorize":
            assert rank["difference"] < 1e-4
        torch.testing.assert_close(rank["compacted"], rank["masked"], rtol=1e-5, atol=1e-5)
        assert rank["remaining"] <= 0.5
        assert torch.equal(rank["masks"], found[0]["masks"])
    (tmp_path / "expected").mkdir()
    for name in ("factors", "dense"):
        expected = {"ids": BLOCKS.block(1)[None], "logits": found[0]["masked"].contiguous()}
        save_file(expected, tmp_path / "expected" / name)
    run_alone(LOADER, tmp_path)
    results = json.loads((tmp_path / "results.json").read_text())
    assert all(result["difference"] < 1e-5 for result in results.values())
    assert all(result["length"] == BLOCKS.block_size + 3 for result in results.values())
    assert results["factors"]["class"].startswith("Factorized")
    assert not results["dense"]["class"].startswith("Factorized")
    assert results["factors"]["parameters"] < results["dense"]["parameters"]
    config = json.loads((tmp_path / "folders" / "factors" / "config.json").read_text())
    assert config.get("factorized", {}).items() <= found[0]["widths"].items()
    assert ("factorized_embedding" in config) == ("embedding" in targets)


def test_one_two_and_three_ranks_keep_the_same_components(folder: Path, tmp_path: Path) -> None:
    path = saved_model(folder, "gpt_neo")
    cases = [
        (path, pruning(criterion, targets=TARGETS), ds_config(), tmp_path / criterion)
        for criterion in ("flop", "flop_agp")
    ]
    alone = run_ranks(call_each, 1, life, [(*case[:3], case[3] / "1") for case in cases])[0]
    for world_size in (2, 3):
        several = run_ranks(call_each, world_size, life, [(*case[:3], case[3] / str(world_size)) for case in cases])
        for rank in several:
            for own, expected in zip(rank, alone, strict=True):
                assert torch.equal(own["masks"], expected["masks"])
                torch.testing.assert_close(own["scores"], expected["scores"], rtol=1e-3, atol=1e-5)
                torch.testing.assert_close(own["masked"], expected["masked"], rtol=1e-3, atol=1e-3)


def factors_by_name(path: Path, config: dict[str, Any], settings: PruningConfig) -> dict[str, Tensor]:
    engine, pruner = start(path, config, settings)
    found = masters(engine, [member.name for group in pruner.groups for member in group.members])
    engine.destroy()
    return found


def test_factors_are_those_of_the_weights_whoever_computes_them(folder: Path) -> None:
    path = saved_model(folder, "gpt_neo")
    (ranks,) = (run_ranks(factors_by_name, 3, path, ds_config(), pruning("flop", initial_rank=5)),)
    dense = AutoModelForCausalLM.from_pretrained(path)
    names = sorted({name.rpartition(".")[0] for name in ranks[0]})
    assert len(names) == 4
    for name in names:
        down, up = svd_factors(dense.get_parameter(f"{name}.weight").detach(), 5)
        for rank in ranks:
            torch.testing.assert_close(rank[f"{name}.up"] @ rank[f"{name}.down"], up @ down, rtol=1e-4, atol=1e-5)
            assert sorted(rank[f"{name}.down"].shape) in ([5, HIDDEN], [5, WIDTH])


def test_random_factors_do_not_depend_on_ranks(folder: Path) -> None:
    path, settings = saved_model(folder, "gpt_neo"), pruning("flop", factors="random")
    (alone,) = run_ranks(factors_by_name, 1, path, ds_config(), settings)
    for rank in run_ranks(factors_by_name, 2, path, ds_config(), settings):
        assert all(torch.equal(rank[name], alone[name]) for name in alone)


def test_in_bf16_what_is_compacted_is_what_was_masked_to_rounding(folder: Path, tmp_path: Path) -> None:
    config = ds_config(**BF16)
    for rank in run_ranks(life, 2, saved_model(folder, "gpt_neo"), pruning("flop"), config, tmp_path / "folders"):
        torch.testing.assert_close(rank["compacted"], rank["masked"], rtol=0.05, atol=0.05)
