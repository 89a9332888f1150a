"""A written model in another layout computes what it did, and what cannot hold it is refused."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from command import arguments, make_work, outcome, report_of
from distributed import run_ranks
from gguf import GGUFReader
from huggingface_hub import ModelCard
from memory_backend import steady_model
from models import (
    LAYERS,
    WIDTHS,
    compacted,
    export,
    logits,
    named_state,
    tiny_config,
    tiny_model,
    tiny_tokenizer,
    tokens,
)
from safetensors.torch import load_file, save_file
from test_embedding import ZIPF, clustered
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel

from scale_prune.commands.convert import main
from scale_prune.core import svd_factors
from scale_prune.export import check_gguf, convert, open_folder
from scale_prune.export.gguf_tokens import check_tokens
from scale_prune.export.plain_configs import without_layout
from scale_prune.models import cluster_groups, component_groups, put_factors, tied_output

FAMILIES = ("gpt2", "gptj", "gpt_neox", "llama", "qwen2", "phi3", "opt")
HEADS = {"hidden_size": 32, "num_attention_heads": 2, "num_key_value_heads": 1, "head_dim": 16}
WIDE = {"vocab_size": 150, **HEADS}
READ_BY_TRANSFORMERS = ("llama", "qwen2", "starcoder2")  # of others its reader takes sizes for granted


def load(folder: Path, **settings: Any) -> PreTrainedModel:
    loader = AutoModelForCausalLM
    return loader.from_pretrained(folder, trust_remote_code=True, **settings).eval()


@pytest.mark.parametrize("model_type", FAMILIES)
def test_every_layout_becomes_every_other_and_computes_the_same(tmp_path: Path, model_type: str) -> None:
    model, groups, masked = compacted(model_type, "per_layer")
    (code,) = export(tmp_path / "per_layer", model, groups, "per_layer").glob("*.py")
    code.write_text("raise SystemExit")  # conversion runs nothing of a folder
    before, forms = "per_layer", ["pad", "per_layer", "auto"]
    forms += ["nemotron_nas", "pad", "nemotron_nas", "per_layer"] if model_type in ("llama", "qwen2") else []
    for step, form in enumerate(forms):
        stored, after = open_folder(tmp_path / before), f"{step}-{form}"
        assert tuple(group.num_units for group in stored.groups) == WIDTHS["per_layer"]
        convert(stored, form, tmp_path / after)
        torch.testing.assert_close(logits(load(tmp_path / after), tokens()), masked, rtol=0, atol=1e-5)
        before = after


def test_a_plain_folder_stays_plain(tmp_path: Path) -> None:
    model, groups, masked = compacted("gpt_neox", "uniform")
    stored = open_folder(export(tmp_path / "pruned", model, groups, "uniform"))
    assert convert(stored, "auto", tmp_path / "auto") == ["layout uniform"]
    assert {path.name for path in (tmp_path / "auto").iterdir()} == {path.name for path in stored.folder.iterdir()}
    plain = AutoModelForCausalLM.from_pretrained(tmp_path / "auto").eval()
    torch.testing.assert_close(logits(plain, tokens()), masked, rtol=0, atol=1e-5)


def factorized(model_type: str) -> PreTrainedModel:
    """Return a model of which some weights and the tied token table are factors."""
    model = tiny_model(model_type, tie_word_embeddings=True)
    for name in ("transformer.h.0.mlp.c_fc", "transformer.h.1.attn.c_attn"):
        weight = model.get_parameter(f"{name}.weight").detach()
        down, up = svd_factors(weight.T, 3)
        put_factors(model, name, torch.nn.Parameter(down), torch.nn.Parameter(up))
    return clustered(model, ZIPF[: model.config.vocab_size])


@pytest.mark.parametrize("form", ["uniform", "auto", "pad"])
def test_factors_are_multiplied_out(tmp_path: Path, form: str) -> None:
    model = factorized("gpt2")
    groups = (*component_groups(model), *cluster_groups(model))
    folder = export(tmp_path / "factors", model, groups, "per_layer", tied_output=tied_output(model))
    assert json.loads((folder / "config.json").read_text())["model_type"] == "factorized_gpt2"
    convert(open_folder(folder), form, tmp_path / "plain")
    plain = AutoModelForCausalLM.from_pretrained(tmp_path / "plain").eval()
    assert plain.get_input_embeddings().weight is plain.get_output_embeddings().weight
    torch.testing.assert_close(logits(plain, tokens()), logits(load(folder), tokens()), rtol=0, atol=1e-4)


def test_what_stands_beside_comes_along_and_the_card_says_how_to_load(tmp_path: Path) -> None:
    model, groups, _ = compacted("llama", "per_layer")
    card = '# Mine\n\n| parameters | 2,000 | 1,100 |\n\nmodel = Auto.from_pretrained("PATH", trust_remote_code=True)\n'
    folder = export(tmp_path / "pruned", model, groups, "per_layer", tokenizer=tiny_tokenizer(), card=card)
    (folder / "chat_template.jinja").write_text("{{ messages }}")
    (folder / "tokenization_own.py").touch()
    (folder / "README.md").write_bytes(card.encode() + b"Caf\xe9")  # not UTF-8
    for form in ("pad", "nemotron_nas"):
        convert(open_folder(folder), form, tmp_path / form)
        names = {path.name for path in (tmp_path / form).iterdir()}
        assert names >= {"tokenizer.json", "tokenizer_config.json", "chat_template.jinja"}
        code = {"modeling_nemotron_nas.py"} if form == "nemotron_nas" else set()
        assert {name for name in names if name.endswith(".py")} == {"tokenization_own.py"} | code
        told = (tmp_path / form / "README.md").read_text()
        assert ("trust_remote_code" in told) == (form == "nemotron_nas")
        assert "1,100" not in told  # of the folder that it was made from; another layout has another number


OF_OLD = {"gpt2": "h.0.attn.bias", "gpt_neox": "gpt_neox.layers.0.attention.masked_bias", "llama": "inv_freq"}
"""Buffers that folders of the Hub hold and that models have no more."""


@pytest.mark.parametrize("model_type", OF_OLD)
def test_a_dense_folder_of_the_hub_is_read_as_transformers_reads_it(tmp_path: Path, model_type: str) -> None:
    model, folder = tiny_model(model_type, **WIDE), tmp_path / "dense"
    tiny_tokenizer().save_pretrained(folder)
    model.config.save_pretrained(folder)
    in_files = {name.removeprefix("transformer."): tensor for name, tensor in named_state(model)}
    save_file(in_files | {OF_OLD[model_type]: torch.ones(3)}, folder / "model.safetensors")
    (folder / "original").mkdir()
    for name in ("tf_model.h5", "flax_model.msgpack", "pytorch_model.bin.index.json", "LICENSE.txt", "original/a.pth"):
        (folder / name).touch()
    for form in ("auto", "gguf"):
        convert(open_folder(folder), form, tmp_path / form)
    names = {"config.json", "model.safetensors", "tokenizer.json", "tokenizer_config.json", "LICENSE.txt"}
    assert {path.name for path in (tmp_path / "auto").iterdir()} == names
    plain = AutoModelForCausalLM.from_pretrained(tmp_path / "auto").eval()
    torch.testing.assert_close(logits(plain, tokens()), logits(model, tokens()), rtol=0, atol=1e-5)


def test_a_folder_of_other_names_is_refused_with_some_of_them(tmp_path: Path) -> None:
    tiny_model("gpt2").config.save_pretrained(tmp_path)
    save_file({"my.weight": torch.ones(3)}, tmp_path / "model.safetensors")
    with pytest.raises(ValueError, match=r"holds no transformer\.wte\.weight, only my\.weight and so on"):
        convert(open_folder(tmp_path), "pad", tmp_path / "new")


def test_quantized_weights_are_refused(tmp_path: Path) -> None:
    config = tiny_model("llama").config.to_dict() | {"quantization_config": {"quant_method": "fp8"}}
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(ValueError, match="has weights quantized by fp8; give the 16-bit model"):
        open_folder(tmp_path)


@pytest.mark.parametrize("code", ["configuration_x.XConfig", "their/model--configuration_x.XConfig"])
def test_code_that_a_base_names_and_nobody_ran_is_named_no_more(code: str) -> None:
    config = tiny_model("llama").config
    config.auto_map = {"AutoConfig": code, "AutoModelForCausalLM": "their/model--modeling_x.X"}
    assert not hasattr(without_layout(config), "auto_map")
    config.auto_map = {"AutoModelForCausalLM": "their/model--modeling_x.X"}  # on a stock config, which may have run
    assert without_layout(config).auto_map == config.auto_map


def test_the_only_copy_of_a_tied_weight_may_have_the_name_of_the_output(tmp_path: Path) -> None:
    model = tiny_model("llama", tie_word_embeddings=True)
    model.config.save_pretrained(tmp_path / "dense")
    stored = dict(named_state(model))
    stored["lm_head.weight"] = stored.pop("model.embed_tokens.weight")
    save_file({name: tensor.clone() for name, tensor in stored.items()}, tmp_path / "dense" / "model.safetensors")
    convert(open_folder(tmp_path / "dense"), "pad", tmp_path / "pad")
    torch.testing.assert_close(logits(load(tmp_path / "pad"), tokens()), logits(model, tokens()), rtol=0, atol=1e-5)
    del stored["model.layers.0.self_attn.q_proj.weight"]
    save_file({name: tensor.clone() for name, tensor in stored.items()}, tmp_path / "dense" / "model.safetensors")
    with pytest.raises(ValueError, match=r"dense holds no model\.layers\.0\.self_attn\.q_proj\.weight"):
        convert(open_folder(tmp_path / "dense"), "pad", tmp_path / "again")


@pytest.mark.parametrize("own", [False, True], ids=["copy", "own"])
def test_an_output_that_is_stored_beside_the_embedding_is_tied_only_if_it_is_the_same(
    tmp_path: Path, own: bool
) -> None:
    model = tiny_model("llama", tie_word_embeddings=True)
    model.config.save_pretrained(tmp_path / "dense")
    output: Any = model.get_output_embeddings()
    stored = dict(named_state(model)) | {"lm_head.weight": output.weight.detach() * (1 + own)}
    save_file({name: tensor.clone() for name, tensor in stored.items()}, tmp_path / "dense" / "model.safetensors")
    convert(open_folder(tmp_path / "dense"), "pad", tmp_path / "pad")
    assert ("lm_head.weight" in load_file(tmp_path / "pad" / "model.safetensors")) == own
    expected = logits(model, tokens()) * (1 + own)
    torch.testing.assert_close(logits(load(tmp_path / "pad"), tokens()), expected, rtol=0, atol=1e-5)


def gguf(tmp_path: Path, model_type: str, layout: str, dtype: str | None = None, **settings: Any) -> tuple[Path, Any]:
    """Write a model of widths that differ as GGUF; return the file, and the logits of the masked model."""
    model, groups, masked = compacted(model_type, layout, **WIDE | settings)
    folder = export(tmp_path / "pruned", model, groups, layout, tokenizer=tiny_tokenizer())
    convert(open_folder(folder), "gguf", tmp_path / "model.gguf", dtype=dtype)
    return tmp_path / "model.gguf", masked


@pytest.mark.parametrize("model_type", READ_BY_TRANSFORMERS)
def test_transformers_reads_the_gguf_of_one_width(tmp_path: Path, model_type: str) -> None:
    file, masked = gguf(tmp_path, model_type, "uniform", num_hidden_layers=LAYERS)
    model = AutoModelForCausalLM.from_pretrained(tmp_path, gguf_file=file.name).eval()
    torch.testing.assert_close(logits(model, tokens()), masked, rtol=0, atol=1e-4)


@pytest.mark.parametrize("model_type", ["phi", "gpt_neox", "olmo2"])
def test_an_output_that_is_the_embedding_stands_in_gguf_where_llama_cpp_wants_it(
    tmp_path: Path, model_type: str
) -> None:
    file, _ = gguf(tmp_path, model_type, "uniform", tie_word_embeddings=True)
    told = {tensor.name: torch.from_numpy(tensor.data.copy()) for tensor in GGUFReader(file).tensors}
    assert torch.equal(told["output.weight"], told["token_embd.weight"])


@pytest.mark.parametrize(
    ("blank", "changes", "message"),
    [
        ("none", {"normalizer": {"type": "Lowercase"}}, "does to texts first: Lowercase"),
        ("metaspace", {"pre_tokenizer": {"type": "Whitespace"}}, "does to texts first: Whitespace"),
        ("normalizer", {"pre_tokenizer": {"type": "Split", "pattern": {"String": "a"}}}, "does to texts first: Split"),
        (
            "none",
            {
                "pre_tokenizer": {
                    "type": "Sequence",
                    "pretokenizers": [
                        {"type": "Digits", "individual_digits": True},
                        {"type": "ByteLevel", "add_prefix_space": False, "use_regex": False},
                    ],
                }
            },
            "no known name for the way",
        ),
    ],
)
def test_tokenizers_that_llama_cpp_would_not_follow_are_refused(
    blank: str, changes: dict[str, Any], message: str
) -> None:
    own = json.loads(tiny_tokenizer(blank).backend_tokenizer.to_str())
    check_tokens(own, 200)
    with pytest.raises(ValueError, match=message):
        check_tokens(own | changes, 200)


@pytest.mark.parametrize("model_type", ["llama", "qwen2"])
def test_a_llama_of_many_widths_keeps_them_in_gguf(tmp_path: Path, model_type: str) -> None:
    reader = GGUFReader(gguf(tmp_path, model_type, "per_layer")[0])
    field = reader.fields["deci.feed_forward_length"]
    assert [int(field.parts[place][0]) for place in field.data] == list(WIDTHS["per_layer"])
    shapes = {tensor.name: tensor.shape.tolist() for tensor in reader.tensors}
    assert [shapes[f"blk.{layer}.ffn_down.weight"] for layer in range(LAYERS)] == [[n, 32] for n in WIDTHS["per_layer"]]
    assert ("blk.0.attn_q.bias" in shapes) == (model_type == "qwen2")


def test_q8_needs_rows_of_whole_blocks(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    model, groups, _ = compacted("llama", "per_layer", **WIDE)
    folder = export(tmp_path / "pruned", model, groups, "per_layer")
    main([str(folder), "--to", "gguf", "--dtype", "q8_0", "--output", str(tmp_path / "m.gguf")])
    told = capsys.readouterr().out
    assert "2 to 13 neurons a layer; architecture deci, q8_0; 3 matrices are f16" in told
    assert "without a tokenizer" in told
    types = {tensor.name: tensor.tensor_type.name for tensor in GGUFReader(tmp_path / "m.gguf").tensors}
    assert types["blk.0.attn_q.weight"] == "Q8_0"
    assert types["blk.0.ffn_down.weight"] == "F16"
    assert types["blk.0.attn_norm.weight"] == "F32"


def test_queries_keys_and_values_of_a_starcoder_stand_one_after_another_in_gguf(tmp_path: Path) -> None:
    file, _ = gguf(tmp_path, "gpt_bigcode", "uniform", num_attention_heads=4, head_dim=8, multi_query=False)
    told = {tensor.name: torch.from_numpy(tensor.data.copy()) for tensor in GGUFReader(file).tensors}
    for kind in ("weight", "bias"):
        own = load_file(tmp_path / "pruned" / "model.safetensors")[f"transformer.h.0.attn.c_attn.{kind}"]
        by_head = own.unflatten(0, (4, 3, -1))  # as transformers reads it
        assert torch.equal(told[f"blk.0.attn_qkv.{kind}"], by_head.transpose(0, 1).flatten(0, 2))


def test_norms_of_bfloat16_are_as_exact_in_gguf_as_in_transformers(tmp_path: Path) -> None:
    model, groups, _ = compacted("gemma", "uniform", **WIDE)
    folder = export(tmp_path / "pruned", model.bfloat16(), groups, "uniform", tokenizer=tiny_tokenizer())
    left = tmp_path / "model.gguf.partial-0123abcd"
    for file in (left, tmp_path / "model.gguf.partial-mine"):
        file.touch()
    convert(open_folder(folder), "gguf", tmp_path / "model.gguf")
    told = {tensor.name: torch.tensor(tensor.data) for tensor in GGUFReader(tmp_path / "model.gguf").tensors}
    assert torch.equal(told["output_norm.weight"], 1 + model.model.norm.weight.float())
    assert sorted(path.name for path in tmp_path.iterdir()) == ["model.gguf", "model.gguf.partial-mine", "pruned"]


@pytest.mark.parametrize(
    ("heads", "size", "message"),
    [(True, 60, "heads of a qwen2 have left"), (False, 3, "needs a row of the embedding for every token: .* 3 rows")],
)
def test_what_gguf_will_not_hold_is_refused_before_training(heads: bool, size: int, message: str) -> None:
    config = tiny_config("qwen2", **HEADS, vocab_size=size)
    with pytest.raises(ValueError, match=message):
        check_gguf(config, tiny_tokenizer(), heads=heads)


LLAMA_3 = {"rope_type": "llama3", "rope_theta": 1e4, "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0}
LLAMA_3 |= {"original_max_position_embeddings": 16}


@pytest.mark.parametrize(
    ("model_type", "form", "settings", "message"),
    [
        ("gpt2", "uniform", {}, r"--to uniform needs layers of one width.*\[5, 13, 2\].*choose pad or per_layer"),
        ("gpt2", "nemotron_nas", {}, r"is for models that are a Llama.*but this is a gpt2; ask for layout 'pad'"),
        ("mistral", "nemotron_nas", {"sliding_window": 5}, "reaches back only 5 of 31 tokens"),
        ("gptj", "gguf", {}, "not written for models of type gptj, only for .*llama.* has none of gptj, gpt_neo"),
        ("llama", "gguf", {"hidden_act": "gelu"}, "activation function is gelu, not silu; every other layout can"),
        ("gpt2", "gguf", {"scale_attn_by_inverse_layer_idx": True}, "not scaled by the root of a head's width alone"),
        ("starcoder2", "gguf", {"sliding_window": 5}, "reaches back only 5 of 31 tokens"),
        ("stablelm", "gguf", {**HEADS, "qk_layernorm": True}, "its queries and keys have norms"),
        ("gemma", "gguf", {"tie_word_embeddings": False}, "its output is not its embedding"),
        ("olmo2", "gguf", {"attention_bias": True}, "its projections have biases"),
        ("starcoder2", "gguf", {"use_bias": False}, "its projections have no biases"),
        ("qwen3", "gguf", {"attention_bias": True}, "its projections have biases"),
        ("gpt_neox", "gguf", {"attention_bias": False}, "its attention has no biases"),
        ("gpt2", "gguf", {"activation_function": "quick_gelu"}, "its activation function is quick_gelu, not gelu"),
        ("qwen2", "gguf", {"rope_parameters": {"rope_type": "yarn", "rope_theta": 1e4, "factor": 4.0}}, '"yarn"'),
        ("qwen3", "gguf", {"rope_parameters": LLAMA_3}, '"llama3"'),
    ],
)
def test_what_a_format_cannot_hold_is_refused(
    tmp_path: Path, model_type: str, form: str, settings: dict[str, Any], message: str
) -> None:
    model, groups, _ = compacted(model_type, "per_layer", **settings)
    stored = open_folder(export(tmp_path / "pruned", model, groups, "per_layer"))
    with pytest.raises(ValueError, match=message):
        convert(stored, form, tmp_path / "other")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["pruned"]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["nowhere", "--to", "pad", "--output", "x"], "nowhere is no model's folder"),
        (["empty", "--to", "pad", "--output", "x"], "has no complete weights in safetensors files"),
        (["strange", "--to", "pad", "--output", "x"], "model type 'mine' is not known to transformers"),
        (["pruned", "--to", "pad", "--output", "pruned"], "pruned holds something; give a new or empty folder"),
        (["pruned", "--to", "gguf", "--output", "pruned"], "pruned exists already; give the name of a new file"),
        (["pruned", "--to", "pad", "--dtype", "f16", "--output", "x"], "--dtype f16 is for --to gguf"),
        (["pruned", "--to", "onyx", "--output", "x"], "argument --to: invalid choice: 'onyx'"),
    ],
)
def test_mistakes_end_in_one_message(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    arguments: list[str],
    message: str,
) -> None:
    monkeypatch.chdir(tmp_path)
    model, groups, _ = compacted("llama", "per_layer")
    export(tmp_path / "pruned", model, groups, "per_layer")
    for name, model_type in (("empty", "gpt2"), ("strange", "mine")):
        (tmp_path / name).mkdir()
        (tmp_path / name / "config.json").write_text(json.dumps({"model_type": model_type}))
    with pytest.raises(SystemExit) as exit_:
        main(arguments)
    assert exit_.value.code == 2
    assert message in capsys.readouterr().err
    assert not (tmp_path / "x").exists()


@pytest.mark.distributed
def test_a_run_leaves_any_layout_and_goes_on_from_it(tmp_path: Path) -> None:
    (tmp_path / "work").mkdir()
    work = make_work(tmp_path / "work")
    tokenizer = AutoTokenizer.from_pretrained(work / "model")
    tokenizer.save_pretrained(tmp_path / "llama")
    steady_model("llama", vocab_size=len(tokenizer), **HEADS).save_pretrained(tmp_path / "llama")
    (tmp_path / "llama/README.md").write_text("---\nlicense: apache-2.0\nlanguage: en\n---\n")
    settings: dict[str, Any] = {"criterion": "magnitude", "scope": "global", "max_steps": 0, "remaining": 0.6}
    settings |= {"calibration_tokens": 384, "train_batch_size": 6}
    runs = [
        arguments(work, tmp_path / "first", model=tmp_path / "llama", layout="nemotron_nas", **settings),
        [
            *arguments(work, tmp_path / "second", model=tmp_path / "first/pruned", layout="gguf", **settings),
            *("--trust_remote_code", "--reference", str(tmp_path / "llama")),
        ],
    ]
    for flags in runs:
        codes = run_ranks(outcome, 2, flags)
        assert [code for code, _ in codes] == [0, 0], codes
    report = report_of(tmp_path / "second")
    assert report["perplexity"]["reference"] == pytest.approx(report_of(tmp_path / "first")["perplexity"]["dense"])
    parts = [seconds for part, seconds in report["seconds"].items() if part != "total"]
    assert sum(parts) == pytest.approx(report["seconds"]["total"])
    field = GGUFReader(tmp_path / "second/pruned.gguf").fields["deci.feed_forward_length"]
    assert [int(field.parts[place][0]) for place in field.data] == report["widths"]
    assert (tmp_path / "second/report.png").stat().st_size > 1000
    cards = [ModelCard.load(tmp_path / name / "pruned/README.md") for name in ("first", "second")]
    assert [card.data.license for card in cards] == ["apache-2.0"] * 2
    assert not [card for card in cards if str(tmp_path) in card.content]
    assert "| parameters |" in cards[1].text
