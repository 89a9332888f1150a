"""Pruning in a DeepSpeed loop of your own: `attach`, two calls in the loop, then `compact` and `save`.

`prepare` comes before the engine where a criterion removes components; `save_state` and `load_state` go with the
loop's own checkpoints.
"""

import warnings
from collections.abc import Callable
from os import PathLike
from pathlib import Path
from typing import Any
from weakref import WeakKeyDictionary

from torch import Tensor, nn
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from scale_prune.config import PruningConfig, refuse_harmful
from scale_prune.criteria import CRITERIA, IN_A_LOOP, READERS, check_scope, check_uniqueness, with_defaults
from scale_prune.export import LAYOUTS, Export, check_width_key, model_card
from scale_prune.models import auto_model, stored_groups, tied_output
from scale_prune.pruning import Pruner, check_reachable, components_of, removes_components, units_of
from scale_prune.zero3 import Zero3Backend, check_maskable, compact_engine, prepare_units, write_model

_uncompacted: WeakKeyDictionary[Any, bool] = WeakKeyDictionary()  # engines with a pruner, and whether they have gates


def prepare(
    model: PreTrainedModel, config: PruningConfig, *, seed: int = 0, token_counts: Tensor | None = None
) -> None:
    """Factorize what the criterion wants factorized; before `deepspeed.initialize`, on all ranks. A collective.

    Only criteria that remove components (flop, flop_agp, factorize) need it; for the others it does nothing.

    Args:
        model: a model that ZeRO-3 has partitioned while it was loaded; changed in place.
        config: the same that `attach` gets.
        seed: of random factors.
        token_counts: (V,) how often each token occurs in training, for the target embedding; without them tokens are
            taken to come in order of their frequency.

    Raises:
        ValueError: the model has no weights of the targets, or is not partitioned.
    """
    if removes_components(config):
        if not all(hasattr(param, "ds_id") for param in model.parameters()):
            raise ValueError(
                f"criterion {config.criterion} needs a model that ZeRO-3 has partitioned while it was loaded: make "
                "HfDeepSpeedConfig(ds_config) or TrainingArguments(deepspeed=ds_config) before from_pretrained"
            )
        if config.factors == "whitened":
            raise ValueError(
                "factors whitened belong to launch/prune.py, which has text to calibrate on; give svd or random"
            )
        prepare_units(model, config, seed=seed, values=config.factors, token_counts=token_counts)


def attach(engine: Any, config: PruningConfig, *, total_steps: int, seed: int = 0) -> Pruner:
    """Make a pruner for an engine.

    In the loop, call `pruner.after_backward()` after every `engine.backward(loss)` and `pruner.after_step()`
    after every `engine.step()`; nothing else changes. All ranks call them.

    Args:
        engine: a DeepSpeed engine with ZeRO stage 3 around a Hugging Face causal language model.
        config: what is pruned, how far and how fast.
        total_steps: optimizer steps that the loop will make, at least 1.
        seed: seed of random scores and of the sampled tokens, at least 0.

    Raises:
        ValueError: this is no engine, its ds_config asks for what pruning cannot work with, the architecture is unknown
            or cannot be written when pruned, the MLPs are frozen, or the settings cannot be met.
    """
    if not hasattr(engine, "zero_optimization_stage"):
        raise ValueError(
            f"got a {type(engine).__name__} where a DeepSpeed engine is needed: give what deepspeed.initialize or "
            "accelerator.prepare returns"
        )
    config = with_defaults(config, IN_A_LOOP)
    check_uniqueness(config)
    check_scope(config)
    _check_in_a_loop(config)
    backend = Zero3Backend(engine)
    refuse_harmful(engine._config._param_dict)  # `engine.config` may be the path of a file
    groups = units_of(engine.module, config)
    check_maskable(engine.module, groups)
    check_reachable(groups, config)
    if not removes_components(config):
        check_width_key(engine.module)
    pruner = Pruner(backend, groups, config, total_steps=total_steps, seed=seed)
    _uncompacted[engine] = pruner.gating is not None
    return pruner


def _check_in_a_loop(config: PruningConfig) -> None:
    """Refuse what only the command can do.

    Raises:
        ValueError: the settings ask for it.
    """
    rounds, needs = config.rounds, CRITERIA[config.criterion].needs
    calibrates = "gram" in needs or config.budget in READERS
    if calibrates or rounds != 0 or config.repair not in (None, "none"):
        raise ValueError(
            f"criterion {config.criterion}, rounds {rounds}, repair {config.repair}, budget "
            f"{config.budget}: rounds, repairs and redundancy belong to launch/prune.py, which has text to calibrate "
            "on; in a loop of your own give none of them, and a criterion that needs no Gram matrix"
        )
    if CRITERIA[config.criterion].freezes:
        raise ValueError(f"criterion {config.criterion} learns on frozen weights, which only launch/prune.py has")
    if words := [
        name for name in ("table", "max_parameters", "max_flops", "latency_target") if getattr(config, name) is not None
    ]:
        raise ValueError(f"{', '.join(words)}: only launch/prune.py knows them; give remaining")


def compact(pruner: Pruner, make_engine: Callable[[nn.Module], Any] | None = None) -> Any:
    """Remove the masked neurons for good and return a new, smaller engine; the old one is destroyed. A collective.

    Args:
        pruner: from `attach`; it is used up.
        make_engine: builds an engine around a module, as the loop built its own, with the same optimizer; without it
            the new engine can be evaluated and saved, not trained.

    Raises:
        ValueError: the engine has made steps that the pruner has not seen, or its optimizer keeps what a smaller one
            cannot take over: it is left as it was. Or the optimizer of `make_engine` is not as the old one was, by
            groups or schedule; the old engine is gone then.
    """
    assert isinstance(pruner.backend, Zero3Backend)
    pruner.calls.check(pruner.step, "pruner.after_backward() and pruner.after_step()")
    last = pruner.schedule.last_pruning_step
    if pruner.pruning and pruner.step < last and pruner.backend.rank == 0:
        warnings.warn(
            f"compact after {pruner.step} of the {last} steps in which the pruner was to prune, by its total_steps: it "
            f"keeps {pruner.remaining:.1%}, the target is {pruner.config.remaining:.1%}",
            stacklevel=2,
        )
    masks, take_gates_off = pruner.masking.by_name, pruner.take_gates_off
    engine, _ = compact_engine(pruner.backend, pruner.groups, masks, make_engine, take_gates_off)
    return engine


def save(
    engine: Any,
    folder: str | PathLike[str],
    *,
    layout: str = "per_layer",
    tokenizer: PreTrainedTokenizerBase | None = None,
) -> None:
    """Write a compacted engine's model as a Hugging Face folder. A collective; all ranks write.

    Args:
        engine: from `compact`.
        folder: a new or empty folder.
        layout: "per_layer", "pad", "uniform" or "nemotron_nas".
        tokenizer: written along, if there is one.

    Raises:
        ValueError: the layout is unknown or cannot hold the widths, the folder holds something or is a mount point, or
            the model still has gates.
    """
    if layout not in LAYOUTS:
        raise ValueError(f"unknown layout {layout!r}; valid are {', '.join(LAYOUTS)}")
    backend = Zero3Backend(engine)
    if _uncompacted.get(engine):
        raise ValueError("saved without `compact`, which alone puts gates into the weights")
    if engine in _uncompacted and backend.rank == 0:
        warnings.warn("saved without `compact`: the removed units are still there, as zeros", stacklevel=2)
    groups = components_of(engine.module) or stored_groups(engine.module)
    config = engine.module.config
    export = Export(
        config=config,
        groups=groups,
        layout=layout,
        tokenizer=tokenizer,
        card=model_card(config.name_or_path, groups=groups, layout=layout, loader=auto_model(config).__name__),
        generation_config=getattr(engine.module, "generation_config", None),
        tied_output=tied_output(engine.module),
    )
    write_model(backend, export, Path(folder))
