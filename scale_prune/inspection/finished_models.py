"""What the commands on finished models share: which models, what they are called, and what they need."""

import argparse
from collections.abc import Mapping, Sequence
from dataclasses import replace
from functools import partial
from os.path import expanduser
from pathlib import Path

from scale_prune.config import Config
from scale_prune.data import Inputs, Split
from scale_prune.inspection.gguf_model import check_gguf_model, is_gguf
from scale_prune.preflight import read_inputs


def add_models(parser: argparse.ArgumentParser) -> None:
    """Add the flags that name the models."""
    add = partial(parser.add_argument, type=expanduser, metavar="FOLDER")
    add("--model", nargs="+", required=True, help="models, folders or hub names")
    add("--baseline", help="the dense model that they are compared with")


def read_models(
    own: argparse.Namespace,
    config: Config,
    explicit: frozenset[str],
    world_size: int,
    split: Split,
    *,
    needs_groups: bool,
) -> dict[str, Inputs]:
    """Read and check the inputs of every model, the baseline first.

    Args:
        own: the values of the flags of `add_models`.
        config: the settings, without a model.
        explicit: names of the settings that the user gave.
        world_size: number of ranks.
        split: the text that is needed.
        needs_groups: False where any model will do, also one that cannot be pruned.

    Raises:
        ValueError: a model is there twice, or an input cannot be used.
    """
    named = names_of(own.model, own.baseline)
    found: dict[str, Inputs] = {}
    for name, path in sorted(named.items(), key=lambda item: is_gguf(item[1])):
        try:
            if is_gguf(path) and needs_groups:
                raise ValueError(f"{path}: what is in a GGUF file is not seen here; give the folder it was made from")
            own_config = replace(config, training=replace(config.training, model=path))
            read = partial(read_inputs, own_config, explicit, world_size, splits=(split,), needs_groups=needs_groups)
            found[name] = _as_first(path, found) if is_gguf(path) else read()
        except ValueError as error:
            flag = "--baseline" if path == own.baseline else "--model"
            raise ValueError(str(error).replace(f"--model {path}", f"{flag} {path}")) from error
    return {name: found[name] for name in named}


def _as_first(path: str, folders: Mapping[str, Inputs]) -> Inputs:
    """Return the inputs of a GGUF file: the tokens of the first folder, which must be those of its vocabulary.

    Raises:
        ValueError: it cannot be measured, or there is no folder.
    """
    check_gguf_model(path)
    if not folders:
        raise ValueError(f"--model {path}: a folder's tokenizer reads the text; give that too, e.g. as --baseline")
    inputs = next(iter(folders.values()))
    training = replace(inputs.config.training, model=path)
    return replace(inputs, config=replace(inputs.config, training=training))


def names_of(models: Sequence[str], baseline: str | None) -> dict[str, str]:
    """Return short names of the models, the baseline first: the shortest ends of their paths that tell them apart.

    Raises:
        ValueError: a model is there twice.
    """
    paths = [*([baseline] if baseline else []), *models]
    if twice := [path for place, path in enumerate(paths) if path in paths[:place]]:
        raise ValueError(f"{twice[0]} is there twice, among --model and --baseline")
    parts = [[part for part in Path(path).parts if part not in ("/", "pruned")] or [path] for path in paths]
    for length in range(1, max(map(len, parts)) + 1):
        names = ["/".join(each[-length:]) for each in parts]
        if len(set(names)) == len(names):
            return dict(zip(names, paths, strict=True))
    return dict(zip(paths, paths, strict=True))


def positive(text: str, least: int = 1) -> int:
    """Return a flag's whole number, of a least size."""
    if not text.isdigit() or int(text) < least:
        raise argparse.ArgumentTypeError(f"{text} is not valid, it must be a whole number, at least {least}")
    return int(text)
