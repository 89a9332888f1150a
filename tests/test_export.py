"""The exported folder computes what the masked model computes, in every layout, wherever transformers is."""

import json
import os
import subprocess
import sys
from collections.abc import Callable, Iterable, Mapping
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from huggingface_hub import ModelCard
from models import (
    VOCABULARY,
    WIDTHS,
    compact_model,
    compacted,
    export,
    logits,
    own_registrations,
    random_keep,
    tiny_config,
    tiny_model,
    tokens,
)
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from torch import Tensor
from transformers import (
    AutoConfig,
    AutoModel,
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    GenerationConfig,
    LlamaTokenizer,
    Phi3Config,
    PretrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerFast,
)

from scale_prune.core.groups import Kind, UnitGroup
from scale_prune.export.card import model_card
from scale_prune.export.config_files import write_config, write_tokenizer
from scale_prune.export.layouts import check_layout, resolve_layout
from scale_prune.export.modeling_files import FACTORIZED_FILE, NEMOTRON_FILE
from scale_prune.export.plain_configs import MODELING_FILE
from scale_prune.models.families import FAMILIES, Family, register
from scale_prune.models.layer_units import unit_groups

NEW_FAMILY = Family(
    model_types=("persimmon",),
    layers="model.layers",
    mlp="mlp",
    inputs=("dense_h_to_4h",),
    output="dense_4h_to_h",
    width_key="intermediate_size",
)
CASES = [
    (model_type, layout)
    for family in dict.fromkeys((*FAMILIES.values(), NEW_FAMILY))
    for model_type in family.model_types
    for layout in WIDTHS
    if layout != "pad" or model_type == family.model_types[0]  # which is a uniform one with zeros
]

# Runs where scale_prune cannot be imported, in a folder that holds `folders` and `expected`; writes `results.json`.
LOADER = """
import json
import sys
sys.modules["scale_prune"] = None
from pathlib import Path
import torch
from safetensors.torch import load_file
from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForSequenceClassification

def measure(folder, expected):
    config = AutoConfig.from_pretrained(folder, trust_remote_code="per_layer" in str(folder))
    classifies = config.architectures[0].endswith("ForSequenceClassification")
    loader = AutoModelForSequenceClassification if classifies else AutoModelForCausalLM
    model = loader.from_pretrained(folder, trust_remote_code="per_layer" in str(folder)).eval()
    with torch.no_grad():
        difference = (model(expected["ids"], use_cache=False).logits - expected["logits"]).abs().max().item()
    generated = expected["ids"]
    if not classifies:
        generated = model.generate(expected["ids"], max_new_tokens=3, do_sample=False, eos_token_id=None)
    tied = not classifies and model.get_input_embeddings().weight is model.get_output_embeddings().weight
    kind = type(model).__name__
    return model, {"difference": difference, "generated": generated.shape[1], "tied": tied, "class": kind}

results = {}
for folder in sorted(Path("folders").iterdir()):
    expected = load_file(f"expected/{folder.name}")
    model, results[folder.name] = measure(folder, expected)
    if "per_layer" in folder.name:
        again = Path("again") / folder.name
        model.save_pretrained(again)
        results[folder.name + "-again"] = measure(again, expected)[1]
Path("results.json").write_text(json.dumps(results))
"""


Made = tuple[PreTrainedModel, tuple[UnitGroup, ...], Tensor]


def run_alone(script: str, folder: Path) -> None:
    """Run a script in a fresh interpreter that sees neither this repository nor PYTHONPATH."""
    environment = os.environ | {"HF_MODULES_CACHE": str(folder / "modules"), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-I", "-c", script]
    done = subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def loaded_alone(root: Path, cases: Iterable[tuple[str, str]], make: Callable[[str, str], Made]) -> dict[str, dict]:
    """Export what `make` makes of every (model type, layout), and load all of it in one fresh process.

    Args:
        root: an empty folder.
        cases: model types and layouts.
        make: returns a compacted model, its groups, and the logits of its masked form for `tokens()`.
    """
    (root / "expected").mkdir()
    for model_type, layout in cases:
        model, groups, masked = make(model_type, layout)
        export(root / "folders" / f"{model_type}-{layout}", model, groups, layout)
        save_file({"ids": tokens(), "logits": masked}, root / "expected" / f"{model_type}-{layout}")
    run_alone(LOADER, root)
    results: dict[str, dict] = json.loads((root / "results.json").read_text())
    return results


@pytest.fixture(scope="module")
def loaded(tmp_path_factory: pytest.TempPathFactory) -> Mapping[str, dict]:
    """Export every family in every layout and load all of it in one fresh process."""
    with own_registrations():
        register(NEW_FAMILY)
        return loaded_alone(tmp_path_factory.mktemp("export"), CASES, compacted)


@pytest.mark.parametrize(("model_type", "layout"), CASES)
def test_reloaded_folder_equals_masked_model(loaded: Mapping[str, dict], model_type: str, layout: str) -> None:
    result = loaded[f"{model_type}-{layout}"]
    assert result["difference"] < 1e-5
    writes = model_type not in FAMILIES or not FAMILIES[model_type].classifies
    assert result["generated"] == tokens().shape[1] + 3 * writes
    assert result["class"].startswith("PerLayer") == (layout == "per_layer")


@pytest.mark.parametrize("model_type", [model_type for model_type, layout in CASES if layout == "per_layer"])
def test_per_layer_model_can_be_saved_again(loaded: Mapping[str, dict], model_type: str) -> None:
    assert loaded[f"{model_type}-per_layer-again"] == loaded[f"{model_type}-per_layer"]


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("model_type", ["gpt2", "llama", "opt"])
def test_tied_weights_stay_tied_and_are_written_once(tmp_path: Path, model_type: str, tied: bool) -> None:
    model, groups, masked = compacted(model_type, "pad", tie_word_embeddings=tied)
    folder = export(tmp_path / "pruned", model, groups, "pad")
    assert ("lm_head.weight" in load_file(folder / "model.safetensors")) != tied
    again = AutoModelForCausalLM.from_pretrained(folder)
    assert (again.get_input_embeddings().weight is again.get_output_embeddings().weight) == tied
    torch.testing.assert_close(logits(again, tokens()), masked, rtol=0, atol=1e-5)


@pytest.mark.parametrize("model_type", FAMILIES)
def test_tensors_have_the_names_that_transformers_gives_them(tmp_path: Path, model_type: str) -> None:
    model, groups, _ = compacted(model_type, "uniform")
    folder = export(tmp_path / "ours", model, groups, "uniform")
    model.save_pretrained(tmp_path / "theirs")
    ours, theirs = (load_file(path / "model.safetensors") for path in (folder, tmp_path / "theirs"))
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(tensor, theirs[name]) for name, tensor in ours.items())


@pytest.mark.parametrize("layout", WIDTHS)
@pytest.mark.parametrize("family", set(FAMILIES.values()), ids=lambda family: family.model_types[0])
def test_config_tells_the_widths_under_the_family_key(tmp_path: Path, family: Family, layout: str) -> None:
    model, groups, _ = compacted(family.model_types[0], layout)
    before = model.config.to_dict()
    config = json.loads((export(tmp_path / "pruned", model, groups, layout) / "config.json").read_text())
    assert config[family.width_key] == max(WIDTHS[layout])
    told = {int(layer): values[family.width_key] for layer, values in config.get("per_layer_config", {}).items()}
    assert told == (dict(enumerate(WIDTHS[layout])) if layout == "per_layer" else {})
    assert config["dtype"] == "float32"
    assert model.config.to_dict() == before


def test_tokenizer_generation_config_and_card_come_along(tmp_path: Path) -> None:
    model, groups, _ = compacted("gpt2", "uniform")
    words = WordLevel({str(token): token for token in range(VOCABULARY)}, unk_token="0")
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=Tokenizer(words), unk_token="0")
    generation_config = GenerationConfig(temperature=0.5, do_sample=False)
    extras = {"tokenizer": tokenizer, "card": "# Kept 7 of 17", "generation_config": generation_config}
    folder = export(tmp_path / "new" / "pruned", model, groups, "uniform", **extras)
    assert (folder / "README.md").read_text() == "# Kept 7 of 17"
    assert GenerationConfig.from_pretrained(folder).temperature == 0.5
    assert PreTrainedTokenizerFast.from_pretrained(folder).get_vocab() == tokenizer.get_vocab()
    assert json.loads((folder / "tokenizer_config.json").read_text())["tokenizer_class"] == "PreTrainedTokenizerFast"
    modes = {file.name: file.stat().st_mode for file in folder.iterdir()}
    assert modes.keys() >= {"config.json", "model.safetensors", "tokenizer.json"}
    assert modes["model.safetensors"] == modes["config.json"]


PRUNED_CARD = {"criterion": "gum", "max_steps": 6, "recovery_steps": 0, "targets": "mlp"}
STORY = "fine-tuned for {} steps on {} tokens of a-text"


@pytest.mark.parametrize(
    ("settings", "steps", "target", "told"),
    [
        ({}, 6, 0.5, f"MLP neurons of a-model were removed (gum) while it was {STORY.format(6, 600)}. What is left"),
        ({}, 6, 1.0, f"a-model was {STORY.format(6, 600)}. Nothing was removed."),
        ({"max_steps": 0}, 0, 1.0, "# a-model\n\na-model was left as it was. Nothing was removed."),
        ({"max_steps": 0}, 0, 0.5, "were removed (gum) without training. What is left"),
        (
            {"criterion": "ddp"},
            6,
            0.5,
            "were removed (ddp) by gates that learned for 6 steps, the weights frozen. What is left",
        ),
        (
            {"criterion": "ddp", "recovery_steps": 3},
            9,
            0.5,
            f"for 6 steps, the weights frozen; then it was {STORY.format(3, 300)}. What is left",
        ),
    ],
)
def test_the_card_says_what_was_done(settings: dict[str, Any], steps: int, target: float, told: str) -> None:
    report = {
        "settings": PRUNED_CARD | settings,
        "steps": steps,
        "tokens": 100 * steps,
        "dataset": "a-text",
        "validation": "a-text",
        "remaining": {"target": target, "measured": target},
        "parameters": {"dense": 2000, "stored": 1100},
        "perplexity": {"dense": 20.0, "exported": 25.0},
        "command": "deepspeed launch/prune.py",
        "date": "2026-11-26T12:00:00+00:00",
        "world_size": 2,
        "versions": {"python": "3"},
    }
    groups = unit_groups(tiny_model("gpt2"))
    card = model_card("a-model", groups=groups, layout="uniform", loader="AutoModelForCausalLM", report=report)
    learned = steps - 6 * (settings.get("criterion") == "ddp")
    assert told in card
    assert ("before any fine-tuning" in card) == (learned > 0)
    assert ("- pruned" in card) == ("structurally pruned" in card) == (target < 1)


@pytest.mark.parametrize("license", [b"mit", b"[", b"\xe9", b"mit\n3: 4", b"mit\nmodel-index: 5"])
def test_the_card_takes_from_the_base_what_can_be_read_of_its_own(tmp_path: Path, license: bytes) -> None:
    (tmp_path / "README.md").write_bytes(b"---\nlicense: " + license + b"\n---\n")
    groups = unit_groups(tiny_model("gpt2"))
    readable = license in (b"mit", b"mit\nmodel-index: 5")
    with nullcontext() if readable else pytest.warns(UserWarning, match="its license and languages are not told on"):
        card: Any = ModelCard(model_card(str(tmp_path), groups=groups, layout="uniform", loader="AutoModelForCausalLM"))
    assert card.data.license == ("mit" if readable else None)


def test_a_license_of_another_name_keeps_it(tmp_path: Path) -> None:
    (tmp_path / "README.md").write_text("---\nlicense: other\nlicense_name: own\nlicense_link: LICENSE\n---\n")
    groups = unit_groups(tiny_model("gpt2"))
    card: Any = ModelCard(model_card(str(tmp_path), groups=groups, layout="uniform", loader="AutoModelForCausalLM"))
    assert (card.data.license, card.data.license_name, card.data.license_link) == ("other", "own", "LICENSE")


def test_a_model_without_a_name_takes_no_card_of_the_working_folder(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "README.md").write_text("---\nlicense: mit\n---\n")
    monkeypatch.chdir(tmp_path)
    text = model_card("", groups=unit_groups(tiny_model("gpt2")), layout="uniform", loader="AutoModelForCausalLM")
    card: Any = ModelCard(text)
    assert (card.data.license, card.data.base_model) == (None, None)
    assert tmp_path.name not in text


LLAMA3 = {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0}
YARN = {"rope_type": "yarn", "factor": 4.0}


@pytest.mark.parametrize(
    ("model_type", "scaling", "base", "share"),
    [
        ("llama", LLAMA3, "rope_theta", ""),
        ("cohere", {}, "rope_theta", ""),
        ("gemma", {}, "rope_theta", ""),
        ("qwen2", YARN, "rope_theta", ""),
        ("stablelm", {}, "rope_theta", "partial_rotary_factor"),
        ("gpt_neox", YARN, "rotary_emb_base", "rotary_pct"),
        ("phi3", {}, "rope_theta", ""),
        ("olmo3", {}, "rope_theta", ""),
    ],
)
def test_rotary_embeddings_are_told_to_older_versions_too(
    tmp_path: Path, model_type: str, scaling: dict[str, Any], base: str, share: str
) -> None:
    rope = {"rope_type": "default", "rope_theta": 5e5} | scaling
    rope |= {"original_max_position_embeddings": 16} if scaling else {}
    rope |= {"partial_rotary_factor": 0.25} if share else {}
    model, groups, masked = compacted(model_type, "pad", rope_parameters=rope)
    folder = export(tmp_path / "pruned", model, groups, "pad")
    told = json.loads((folder / "config.json").read_text())
    assert told[base] == 5e5
    assert told.get(share) == (0.25 if share else None)
    without = {key: value for key, value in rope.items() if key not in ("rope_theta", "partial_rotary_factor")}
    assert told.get("rope_scaling") == (without if scaling else None)
    assert "rope_local_base_freq" not in told
    again = AutoModelForCausalLM.from_pretrained(folder)
    assert again.config.rope_parameters == model.config.rope_parameters
    torch.testing.assert_close(logits(again, tokens()), masked, rtol=0, atol=1e-5)


def test_long_rotary_embeddings_are_told_in_the_three_words_that_older_versions_take(tmp_path: Path) -> None:
    factors = {"short_factor": [1.0, 1.1], "long_factor": [1.0, 2.0]}
    rope = {"rope_type": "longrope", "rope_theta": 1e5, "partial_rotary_factor": 0.5} | factors
    sizes = {"hidden_size": 32, "num_attention_heads": 4, "num_key_value_heads": 4, "pad_token_id": 0}
    settings: dict[str, Any] = sizes | {"rope_parameters": rope, "original_max_position_embeddings": 16}
    config = Phi3Config(**settings)
    write_config(tmp_path, config)
    told = json.loads((tmp_path / "config.json").read_text())
    assert told["rope_scaling"] == {"type": "longrope"} | factors
    assert (told["rope_theta"], told["partial_rotary_factor"]) == (1e5, 0.5)
    again = Phi3Config.from_pretrained(tmp_path).rope_parameters
    assert again == {**(config.rope_parameters or {}), "type": "longrope"}


def test_vllm_reads_the_width_of_a_phi(tmp_path: Path) -> None:
    model, groups, _ = compacted("phi", "uniform")
    folder = export(tmp_path / "pruned", model, groups, "uniform")
    told = json.loads((folder / "config.json").read_text())
    assert told["n_inner"] == told["intermediate_size"] == WIDTHS["uniform"][0]


def test_a_qwen2_whose_window_is_its_context_generates_as_a_nemotron(tmp_path: Path) -> None:
    windows = {"use_sliding_window": True, "sliding_window": 31, "max_window_layers": 0, "max_position_embeddings": 31}
    model, groups, masked = compacted("qwen2", "per_layer", **windows)
    folder = export(tmp_path / "pruned", model, groups, "nemotron_nas")
    again: Any = AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True)
    torch.testing.assert_close(logits(again, tokens()), masked, rtol=0, atol=1e-5)
    assert again.generate(tokens()[:1, :3], max_new_tokens=2, do_sample=False, pad_token_id=0).shape == (1, 5)


@pytest.mark.parametrize(("begins", "told"), [(True, {}), (False, {"add_bos_token": False})])
def test_older_versions_know_the_tokenizer_and_where_it_begins(
    tmp_path: Path, begins: bool, told: dict[str, bool]
) -> None:
    vocabulary = {"<unk>": 0, "<s>": 1, "</s>": 2, "a": 3}
    tokenizer = LlamaTokenizer(vocab=vocabulary, merges=[], add_bos_token=begins, extra_special_tokens=["<x>"])
    write_tokenizer(tmp_path, tokenizer)
    config = json.loads((tmp_path / "tokenizer_config.json").read_text())
    assert {key: config.get(key) for key in told} == told
    assert config["additional_special_tokens"] == ["<x>"]
    assert "extra_special_tokens" not in config
    again = LlamaTokenizer.from_pretrained(tmp_path)
    assert again("a<x>")["input_ids"] == tokenizer("a<x>")["input_ids"]


def test_a_modelling_file_names_the_version_that_it_needs(monkeypatch: pytest.MonkeyPatch) -> None:
    # Its own lazy loading may have put another module in the place of the one that was imported first.
    monkeypatch.setattr(sys.modules["transformers"], "__version__", "4.57.6")
    for file in (MODELING_FILE, FACTORIZED_FILE, NEMOTRON_FILE):
        with pytest.raises(ImportError, match=r"this model needs transformers 5\.14 or newer, here is 4\.57\.6"):
            exec(file.read_text(), {"__name__": "old"})


def test_other_heads_on_the_same_layers_load_too(tmp_path: Path) -> None:
    model, groups, _ = compacted("opt", "per_layer")
    folder = export(tmp_path / "pruned", model, groups, "per_layer")
    body = AutoModel.from_pretrained(folder, trust_remote_code=True).eval()
    own = model.base_model(tokens()).last_hidden_state
    torch.testing.assert_close(body(tokens()).last_hidden_state, own, rtol=0, atol=1e-5)
    classifier = AutoModelForSequenceClassification.from_pretrained(folder, trust_remote_code=True, num_labels=3)
    assert classifier(tokens()[:1]).logits.shape == (1, 3)


DISTILBERT = Family(
    model_types=("distilbert",),
    layers="distilbert.transformer.layer",
    mlp="ffn",
    inputs=("lin1",),
    output="lin2",
    width_key="hidden_dim",
    classifies=True,
)


def test_layers_that_are_built_without_an_index_have_widths_of_their_own_too(tmp_path: Path) -> None:
    with own_registrations():
        register(DISTILBERT)
        model, groups, masked = compacted("distilbert", "per_layer")
        folder = export(tmp_path / "pruned", model, groups, "per_layer")
    again = AutoModelForSequenceClassification.from_pretrained(folder, trust_remote_code=True).eval()
    assert again.distilbert.transformer.layer[2].ffn.lin1.out_features == WIDTHS["per_layer"][2]
    torch.testing.assert_close(again(tokens()).logits, masked, rtol=0, atol=1e-5)


OWN_CONFIG = """
from transformers import PretrainedConfig

class OwnConfig(PretrainedConfig):
    model_type = "own"

    def __init__(self, hidden_size=8, intermediate_size=17, num_hidden_layers=3, vocab_size=29, **others):
        self.hidden_size, self.intermediate_size = hidden_size, intermediate_size
        self.num_hidden_layers, self.vocab_size = num_hidden_layers, vocab_size
        super().__init__(**others)
"""
OWN_MODEL = """
from torch import nn
from transformers import PreTrainedModel
from transformers.modeling_outputs import CausalLMOutput

from .configuration_own import OwnConfig

class Layer(nn.Module):
    def __init__(self, config, index):
        super().__init__()
        self.up = nn.Linear(config.hidden_size, config.intermediate_size)
        self.down = nn.Linear(config.intermediate_size, config.hidden_size)

class OwnForCausalLM(PreTrainedModel):
    config_class = OwnConfig

    def __init__(self, config):
        super().__init__(config)
        self.table = nn.Embedding(config.vocab_size, config.hidden_size)
        self.layers = nn.ModuleList(Layer(config, index) for index in range(config.num_hidden_layers))
        self.head = nn.Linear(config.hidden_size, config.vocab_size)
        self.post_init()

    def forward(self, input_ids, use_cache=False, **others):
        hidden = self.table(input_ids)
        for layer in self.layers:
            hidden = hidden + layer.down(layer.up(hidden).relu())
        return CausalLMOutput(logits=self.head(hidden))
"""
OWN_CODE = {"AutoConfig": "configuration_own.OwnConfig", "AutoModelForCausalLM": "modeling_own.OwnForCausalLM"}


OWN_NAMES: dict[str, Any] = {
    "model_types": ("own",),
    "layers": "layers",
    "mlp": "",
    "inputs": ("up",),
    "output": "down",
}


@pytest.mark.parametrize("layout", ["pad", "uniform"])
def test_the_code_of_a_local_folder_comes_along_where_nothing_takes_its_place(tmp_path: Path, layout: str) -> None:
    folder = tmp_path / "own"
    folder.mkdir()
    (folder / "configuration_own.py").write_text(OWN_CONFIG)
    (folder / "modeling_own.py").write_text(OWN_MODEL)
    (folder / "config.json").write_text(json.dumps({"model_type": "own", "auto_map": OWN_CODE}))
    config = AutoConfig.from_pretrained(folder, trust_remote_code=True)
    model = AutoModelForCausalLM.from_config(config, trust_remote_code=True).eval()
    with own_registrations():
        register(replace(DISTILBERT, **OWN_NAMES, width_key="intermediate_size", classifies=False))
        groups = unit_groups(model)
        groups = compact_model(model, groups, random_keep(groups, WIDTHS[layout]))
        pruned = export(tmp_path / "pruned", model, groups, layout)
    again = AutoModelForCausalLM.from_pretrained(pruned, trust_remote_code=True).eval()
    torch.testing.assert_close(logits(again, tokens()), logits(model, tokens()), rtol=0, atol=1e-5)


def test_code_in_the_folder_of_a_base_never_takes_the_place_of_ours(tmp_path: Path) -> None:
    tiny_model("llama").save_pretrained(tmp_path / "base")
    for name in (MODELING_FILE.name, "train.py"):
        (tmp_path / "base" / name).write_text("raise SystemExit")
    model: Any = AutoModelForCausalLM.from_pretrained(tmp_path / "base")
    groups = unit_groups(model)
    groups = compact_model(model, groups, random_keep(groups, WIDTHS["per_layer"]))
    for layout in ("per_layer", "pad", "nemotron_nas"):
        folder = export(tmp_path / layout, model, groups, layout)
        assert "SystemExit" not in "".join(path.read_text() for path in folder.glob("*.py"))
        assert len(list(folder.glob("*.py"))) == (layout != "pad")


def test_a_per_layer_model_can_be_pruned_again_to_a_plain_one(tmp_path: Path) -> None:
    model, groups, _ = compacted("llama", "per_layer")
    first = export(tmp_path / "first", model, groups, "per_layer")
    again = AutoModelForCausalLM.from_pretrained(first, trust_remote_code=True)
    groups = unit_groups(again)
    assert tuple(group.num_units for group in groups) == WIDTHS["per_layer"]
    groups = compact_model(again, groups, random_keep(groups, (2, 2, 2)))
    second = export(tmp_path / "second", again, groups, "uniform")
    plain = AutoModelForCausalLM.from_pretrained(second)
    assert type(plain).__name__ == "LlamaForCausalLM"
    torch.testing.assert_close(logits(plain, tokens()), logits(again, tokens()), rtol=0, atol=1e-5)


def test_more_than_ten_layers_keep_their_order(tmp_path: Path) -> None:
    model = tiny_model("llama", num_hidden_layers=11)
    groups = unit_groups(model)
    groups = compact_model(model, groups, random_keep(groups, range(1, 12)))
    folder = export(tmp_path / "pruned", model, groups, "per_layer")
    again = AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True)
    assert [group.num_units for group in unit_groups(again)] == list(range(1, 12))
    torch.testing.assert_close(logits(again, tokens()), logits(model, tokens()), rtol=0, atol=1e-5)


def test_uniform_layout_refuses_layers_of_different_widths(tmp_path: Path) -> None:
    model, groups, _ = compacted("gpt2", "pad")
    with pytest.raises(ValueError, match=r"'uniform' needs layers of one width.*\[5, 13, 2\].*'pad' or 'per_layer'"):
        export(tmp_path / "pruned", model, groups, "uniform")


@pytest.mark.parametrize(
    ("layout", "scope", "kind", "resolved"),
    [
        (None, "global", "neuron", "per_layer"),
        ("auto", "global", "neuron", "per_layer"),
        ("nemotron_nas", "per_group", "neuron", "nemotron_nas"),
        (None, "per_group", "neuron", "uniform"),
        (None, "per_group", "component", "per_layer"),
        ("pad", "global", "neuron", "pad"),
        ("per_layer", "per_group", "neuron", "per_layer"),
        ("uniform", "per_group", "neuron", "uniform"),
        ("uniform", "global", "component", "uniform"),
    ],
)
def test_layout_defaults_to_what_loses_nothing(layout: str | None, scope: str, kind: Kind, resolved: str) -> None:
    assert resolve_layout(layout, scope, kind) == resolved


@pytest.mark.parametrize(
    ("layout", "kind", "message"),
    [
        ("uniform", "neuron", "choose --layout pad or per_layer, or --scope per_group"),
        ("dense", "neuron", "'dense'; valid are auto, uniform, pad, per_layer, nemotron_nas, gguf"),
        ("pad", "component", r"choose --layout per_layer \(factors\) or uniform \(multiplied out\)"),
    ],
)
def test_impossible_layouts_are_refused(layout: str, kind: Kind, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        resolve_layout(layout, "global", kind)


def test_per_layer_layout_needs_a_class_of_transformers() -> None:
    class OwnConfig(PretrainedConfig):
        model_type = "gpt2"

    check_layout("per_layer", tiny_config("gpt2"))
    check_layout("pad", OwnConfig())
    with pytest.raises(ValueError, match="has none for OwnConfig; ask for layout 'pad'"):
        check_layout("per_layer", OwnConfig())
