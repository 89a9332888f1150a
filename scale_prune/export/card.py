"""The model card: what an exported folder says of itself, without a word of the machine that it was made on."""

import os
import re
import warnings
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from huggingface_hub import ModelCard, ModelCardData
from yaml import YAMLError

from scale_prune import __version__
from scale_prune.core import Kind, UnitGroup
from scale_prune.criteria import CRITERIA
from scale_prune.export.layouts import needs_code

TRUST = ", trust_remote_code=True"
PARAMETERS = "| parameters | {} | {} |"
PRUNED = ("pruned", "structured-pruning")
"""Tags, which a model that was pruned before keeps when it is trained on."""

REMOVED = {"neuron": "MLP neurons", "head": "attention heads", "component": "Rank-1 components of weights"}


def model_card(
    model: str, *, groups: Sequence[UnitGroup], layout: str, loader: str, report: Mapping[str, Any] | None = None
) -> str:
    """Say in the exported folder's README what the model is, how it was made and how it is loaded.

    Args:
        model: the folder or hub name of the model that was pruned.
        groups: what is left.
        layout: of the folder.
        loader: name of the class that loads it.
        report: contents of report.json, once there are any.
    """
    name = public_name(model)
    lines = [
        "---",
        _front_matter(model, report, loader).to_yaml(),
        "---",
        "",
        f"# {name}{_what_it_is(report)}",
        "",
        _story(name, groups, report),
        "",
        *(_numbers(name, report) if report else []),
        "```python",
        f"from transformers import {loader}, AutoTokenizer",
        "",
        f'model = {loader}.from_pretrained("PATH"{TRUST if needs_code(layout) else ""})',
        'tokenizer = AutoTokenizer.from_pretrained("PATH")',
        "```",
        "",
        *(_limits(name, report) if report else []),
        f"Made with scale_prune {__version__}.",
    ]
    return "\n".join(lines) + "\n"


def in_other_layout(card: str, layout: str) -> str:
    """Return a card of another layout, which is loaded otherwise, and which stores another number of parameters."""
    card = re.sub(PARAMETERS.format(r"[\d,]+", r"[\d,]+").replace("|", r"\|") + "\n", "", card.replace(TRUST, ""))
    code = TRUST if needs_code(layout) else ""
    return card.replace('from_pretrained("PATH")', f'from_pretrained("PATH"{code})', 1)


def public_name(path: str) -> str:
    """Return what others may know of a path: a hub name as it is, of a file or folder its own name, of a run's result
    the run's."""
    if not path:
        return "a model without a name"
    if not (path.startswith((".", os.sep, "~")) or Path(path).exists()):
        return path
    whole = Path(path).resolve()
    return whole.parent.name if whole.name == "pruned" else whole.name


def _front_matter(model: str, report: Mapping[str, Any] | None, loader: str) -> ModelCardData:
    """Return what the Hub reads; base model, license and languages come from the base's own card, if it has one."""
    here = not model or Path(model).exists()
    base = _stated(Path(model) / "README.md") if model else {}
    settings = report["settings"] if report else {}
    return ModelCardData(
        base_model=base.get("base_model") if here else model,
        license=base.get("license"),
        language=base.get("language"),
        datasets=[settings["dataset"]] if settings.get("dataset") and not Path(settings["dataset"]).exists() else None,
        library_name="transformers",
        pipeline_tag="text-generation" if "Causal" in loader else "text-classification",
        tags=[*(tag for tag in PRUNED if _is_pruned(report) or tag in base.get("tags", [])), "scale_prune"],
        **{key: base[key] for key in ("license_name", "license_link") if key in base},
    )


def _stated(readme: Path) -> dict[str, Any]:
    """Return the front matter of a card, nothing where there is none; a card that cannot be read is warned of."""
    try:
        return dict(ModelCard.load(readme, ignore_metadata_errors=True).data.to_dict()) if readme.is_file() else {}
    except (OSError, TypeError, ValueError, YAMLError) as problem:  # TypeError: of keys that are no words
        reason = " ".join(str(problem).split())[:200]
        warnings.warn(f"{readme} cannot be read, so its license and languages are not told on: {reason}", stacklevel=2)
        return {}


def _widths(widths: Sequence[int]) -> str:
    if len(set(widths)) == 1:
        return f"{widths[0]:,} a layer"
    return f"{min(widths):,} to {max(widths):,}: {', '.join(map(str, widths))}"


def _is_pruned(report: Mapping[str, Any] | None) -> bool:
    return report is None or report["remaining"]["target"] < 1


def _what_it_is(report: Mapping[str, Any] | None) -> str:
    if _is_pruned(report):
        return ", structurally pruned"
    return ", fine-tuned" if report and _learned(report) else ""


def _story(name: str, groups: Sequence[UnitGroup], report: Mapping[str, Any] | None) -> str:
    """Say what was removed, how, and what is left."""
    if report is not None and not _is_pruned(report):
        return f"{name} was {_tuned(report) if _learned(report) else 'left as it was'}. Nothing was removed."
    kinds = dict.fromkeys(group.kind for group in groups)
    removed = " and ".join(REMOVED[kind] for kind in _removed(kinds, report))
    made = _made(report) if report else "while it was fine-tuned under DeepSpeed ZeRO-3"
    share = f", {report['remaining']['measured']:.1%}" if report else ""
    lefts = {kind: _widths([group.num_units for group in groups if group.kind == kind]) for kind in kinds}
    left = "; ".join(f"{REMOVED[kind]} {each}" if len(lefts) > 1 else each for kind, each in lefts.items())
    return f"{removed} of {name} were removed {made}. What is left{share}: {left}."


def _removed(kinds: Iterable[Kind], report: Mapping[str, Any] | None) -> list[Kind]:
    """Return which kinds of units a run has removed, of those that the folder tells of."""
    targets = report["settings"].get("targets", "mlp") if report else "mlp,attention"
    asked = {"neuron": "mlp" in targets, "head": "attention" in targets, "component": True}
    return [kind for kind in kinds if asked[kind]]


def _made(report: Mapping[str, Any]) -> str:
    """Say by which method, and in how many steps."""
    settings = report["settings"]
    how = [settings["criterion"]]
    if settings.get("rounds"):
        how += [f"{settings['rounds']} rounds" if settings["rounds"] > 1 else "all at once"]
    how += [f"repair by {settings['repair']}"] if settings.get("repair") not in (None, "none") else []
    by = f"({', '.join(how)})"
    if gates := _steps_of_gates(report):
        by += f" by gates that learned for {gates:,} steps, the weights frozen"
    elif settings["max_steps"]:
        return f"{by} while it was {_tuned(report)}"
    else:
        by += " without training"
    return f"{by}; then it was {_tuned(report)}" if _learned(report) else by


def _steps_of_gates(report: Mapping[str, Any]) -> int:
    """Return the steps in which gates learned and weights did not."""
    criterion = CRITERIA.get(report["settings"]["criterion"])
    frozen = criterion is not None and criterion.freezes and _is_pruned(report)
    return int(report["settings"]["max_steps"]) if frozen else 0


def _learned(report: Mapping[str, Any]) -> int:
    """Return the steps in which weights learned."""
    return int(report["steps"]) - _steps_of_gates(report)


def _tuned(report: Mapping[str, Any]) -> str:
    learned = _learned(report)
    tokens = report["tokens"] * learned // max(1, report["steps"])  # as many in a step of gates as in one of weights
    text = f"{tokens:,} tokens of {public_name(str(report['dataset']))}" if report["dataset"] else "its text"
    return f"fine-tuned for {learned:,} steps on {text}"


def _numbers(name: str, report: Mapping[str, Any]) -> list[str]:
    parameters, perplexity = report["parameters"], report["perplexity"]
    rows = [
        f"| | {name} | this model |",
        "|---|---:|---:|",
        PARAMETERS.format(f"{parameters['dense']:,}", f"{parameters['stored']:,}"),
    ]
    if perplexity["exported"] is not None and perplexity["dense"] is not None:
        rows += [f"| validation perplexity | {perplexity['dense']:.2f} | {perplexity['exported']:.2f} |"]
    metrics = report.get("metrics", {})
    for key, value in metrics.get("exported", {}).items():
        rows += [f"| {key} | {metrics['dense'][key]:.3f} | {value:.3f} |"]
    beside = f" {name} was measured before any fine-tuning." if _learned(report) else ""
    if (reference := perplexity.get("reference")) is not None:
        other = public_name(str(report["settings"]["reference"]))
        beside += f" For comparison: {other} has a perplexity of {reference:.2f}."
    text = str(report["validation"])
    for path in filter(None, map(report["settings"].get, ("train_file", "validation_file", "dataset"))):
        text = text.replace(path, public_name(path))
    return [*rows, "", f"Measured on {text}.{beside}", ""]


def _limits(name: str, report: Mapping[str, Any]) -> list[str]:
    return [
        "## Limits",
        "",
        f"Nothing else was measured. What {name} can do beyond that text may have suffered more than the table shows, "
        "and what it does wrong this model does too.",
        "",
        "## How it was made",
        "",
        f"    {report['command']}",
        "",
        f"{report['date'][:10]}, {report['world_size']} ranks, {', '.join(map(' '.join, report['versions'].items()))}.",
        "",
    ]
