"""A written model in another layout, tensor by tensor, without a GPU and without running the folder's code."""

import json
from fnmatch import fnmatch
from pathlib import Path

from transformers import PretrainedConfig, PreTrainedTokenizerBase, PreTrainedTokenizerFast

from scale_prune.export.card import in_other_layout
from scale_prune.export.gguf_file import dialect_of, padding, write_gguf
from scale_prune.export.gguf_tokens import check_tokens
from scale_prune.export.heads import plainest
from scale_prune.export.layouts import AUTO, GGUF, LAYOUTS, check_layout
from scale_prune.export.plain_configs import stock_config
from scale_prune.export.stored import Stored
from scale_prune.export.writing import Export
from scale_prune.models import family_of
from scale_prune.system import check_new, whole_or_absent
from scale_prune.system.tensor_files import TensorFiles

FORMS = (AUTO, *LAYOUTS, GGUF)
BESIDE = (
    *("tokenizer*.json", "tokenizer.model*", "*.model", "*.tiktoken", "tekken.json", "vocab.*", "merges.txt"),
    *("special_tokens_map.json", "added_tokens.json", "chat_template*", "additional_chat_templates"),
    "tokenization_*.py",
    *("generation_config.json", "license*", "notice*", "use_policy*"),
)
"""In small letters, what comes along with a model: tokenizer, templates, settings of generation, terms of use."""


def open_folder(folder: Path) -> Stored:
    """Read what a model's folder says of itself; its weights are read later.

    Args:
        folder: a folder of safetensors files, in any layout, or of a dense model.

    Raises:
        ValueError: it holds no model, or one of no known family, or quantized weights.
    """
    try:
        written = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    except (OSError, ValueError) as problem:
        raise ValueError(f"{folder} is no model's folder: {problem}") from problem
    if quantized := written.get("quantization_config"):
        raise ValueError(
            f"{folder} has weights quantized by {quantized.get('quant_method', 'some method')}; give the 16-bit model "
            "that they were made from"
        )
    config = stock_config(written)
    family_of(config)
    return Stored(folder=folder, config=config, files=TensorFiles(folder), written=written)


def check_form(stored: Stored, form: str) -> str:
    """Return the layout that a model is to be written in, "auto" resolved.

    Raises:
        ValueError: the layout cannot hold the model.
    """
    if form == GGUF:
        if any(group.kind == "head" for group in stored.groups):
            raise ValueError(
                f"gguf has no place for layers' own numbers of heads, which {stored.folder} has; convert it --to pad "
                "first"
            )
        return form
    factors = "factorized" in stored.written or "factorized_embedding" in stored.written
    if form == "per_layer" and factors:
        raise ValueError(f"{stored.folder} is per_layer already, with factors; the other layouts multiply them out")
    widths = [group.num_units for group in stored.groups if group.kind == "neuron"]
    heads = any(group.kind == "head" for group in stored.groups)
    if form == AUTO:
        return plainest(stored.config, stored.groups)
    if form == "uniform" and len(set(widths)) > 1:
        raise ValueError(
            f"--to uniform needs layers of one width, but they have {widths} "
            f"neurons; choose pad or per_layer, or prune with --scope per_group"
        )
    check_layout(form, stored.config, heads=heads)
    return form


def check_gguf(config: PretrainedConfig, tokenizer: PreTrainedTokenizerBase, *, heads: bool = False) -> None:
    """Make sure, before training, that a model of this kind and its tokenizer can be written as GGUF.

    Args:
        config: the model's config.
        tokenizer: its tokenizer.
        heads: heads will leave.

    Raises:
        ValueError: llama.cpp does not know the kind, takes heads to be as wide together as the model though some will
            leave, or could not read texts as the tokenizer does; a token has no row of the embedding.
    """
    if not dialect_of(config).own_heads and heads:
        raise ValueError(
            f"gguf cannot tell that heads of a {config.model_type} have left: llama.cpp takes them to be as wide "
            "together as the model; give --targets mlp or --layout pad"
        )
    if not isinstance(tokenizer, PreTrainedTokenizerFast):
        raise ValueError(f"gguf needs a tokenizer with a tokenizer.json, {type(tokenizer).__name__} has none")
    check_tokens(json.loads(tokenizer.backend_tokenizer.to_str()), config.vocab_size)


def convert(
    stored: Stored, form: str, destination: Path, *, dtype: str | None = None, replace: bool = False
) -> list[str]:
    """Write a model in another layout.

    At most one tensor and one file of weights are in memory.

    Args:
        stored: the model.
        form: one of `FORMS`.
        destination: of "gguf" the file, else the folder; must not exist, or be an empty folder.
        dtype: of "gguf" the type of its matrices, one of `GGUF_TYPES`; None for the folder's.
        replace: what has the name already goes when the new one is complete.

    Returns:
        What it has become, in sentences.

    Raises:
        ValueError: the layout cannot hold the model, or the destination holds something or is a mount point.
    """
    if form != GGUF and not replace:
        check_new(destination)
    layout = check_form(stored, form)
    if layout == GGUF:
        if destination.exists() and not replace:
            raise ValueError(f"{destination} exists already; give the name of a new file")
        destination.parent.mkdir(parents=True, exist_ok=True)
        with whole_or_absent(destination, alone=True) as partial:
            return write_gguf(stored, partial, dtype)
    card = stored.folder / "README.md"
    export = Export(
        config=stored.config,
        groups=stored.groups,
        layout=layout,
        tokenizer=None,
        card=in_other_layout(card.read_text(encoding="utf-8", errors="replace"), layout) if card.is_file() else "",
        beside=_beside(stored.folder),
    )
    export.write(destination, ((name, stored.tensor(name)) for name in stored.names), replace=replace)
    return [f"layout {layout}", *(padding(stored.groups) if layout == "pad" else [])]


def _beside(folder: Path) -> list[Path]:
    """Return what comes along as it is."""
    return [path for path in sorted(folder.iterdir()) if any(fnmatch(path.name.lower(), each) for each in BESIDE)]
