"""What the state of a checkpoint must hold, so that one which does not is damaged, and not a surprise later on."""

from typing import Any

from scale_prune.config import get

NUMBER = (int, float)
SHAPE: dict[str, tuple[type, ...]] = {
    "step": (int,),
    "world_size": (int,),
    "settings": (dict,),
    "settings.max_steps": (int,),
    "ds_config": (dict,),
    "ds_config.train_batch_size": (int,),
    "texts": (dict,),
    "texts.train": (str,),
    "texts.validation": (str,),
    "pruner": (dict,),
    "pruner.step": (int,),
    "pruner.churn": NUMBER,
    "pruner.sampled": (bool,),
    "pruner.scalars": (dict,),
    "pruner.groups": (dict,),
    "engine": (dict,),
    "engine.counters": (dict,),
    "engine.counters.global_steps": (int,),
    "engine.counters.global_samples": (int,),
    "engine.counters.skipped_steps": (int,),
    "engine.moments": (list,),
    "engine.scalars": (dict,),
    "engine.options": (list,),
    "engine.scheduler": (dict,),
    "engine.loss_scaler": (dict,),
    "measured": (dict,),
    "measured.total_seconds": NUMBER,
    "measured.seconds": (dict,),
    "measured.pruner_seconds": (dict,),
    "measured.perplexities": (dict,),
    "measured.resumed_at": (list,),
}


def problem_of_pruner(facts: Any) -> str | None:
    """Return what is wrong with what a pruner remembers, None where it has everything."""
    return _problem_of_shape({"pruner": facts}, "pruner")


def _problem_of_shape(state: dict[str, Any], within: str = "") -> str | None:
    for path, kinds in SHAPE.items():
        value = get(state, path)
        if path.startswith(within) and type(value) not in kinds:
            return f'has {str(value)[:60]!r} as "{path}", it must be {" or ".join(kind.__name__ for kind in kinds)}'
    return None


def problem_of(state: dict[str, Any]) -> str | None:
    """Return what is wrong with a state, None where it has everything."""
    if problem := _problem_of_shape(state):
        return problem
    if state["step"] < 1:
        return f"has made {state['step']} steps"
    for options in state["engine"]["options"]:
        betas = get(options, "betas") or []
        if type(betas) is not list or any(type(each) not in NUMBER for each in (get(options, "lr"), *betas)):
            return (
                f'has {str(options)[:60]!r} in "engine.options", it must have a number as "lr" and numbers as "betas"'
            )
    for path in ("engine.scalars", "engine.loss_scaler", "pruner.scalars"):
        for name, held in get(state, path).items():
            if type(get(held, "tensor") if isinstance(held, dict) else held) not in (*NUMBER, bool):
                return f'has {str(held)[:60]!r} as "{path}.{name}", it must be a number'
    return None
