"""The house rules: which part may import which, and which packages stay in one place."""

import ast
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

import scale_prune

ROOT = Path(scale_prune.__file__).parent

# From the ground up. A part, which is a module or a package, imports itself and what stands on lower lines.
LAYERS = (
    {"settings", "config_files", "modeling_per_layer", "modeling_factorized"},
    {"config"},
    {"forms", "recipes", "ds_limits", "folders", "labels", "latency", "seconds", "stop", "text_files", "holdout"},
    {"core", "cli", "ds_config", "files", "batches", "evaluation", "monitor", "comparison_rows", "beginnings"},
    {"checkpoint_state", "comparison_figures", "criteria", "families", "report", "rows", "embedded", "job", "slices"},
    {"factorized"},
    {"embedding"},
    {"export_factors"},
    {"shard_backend", "data", "export", "estimate", "rehearsal", "comparison", "gates"},
    {"gating", "activations", "sweep_cells"},
    {"zero3", "pruner", "sweep"},  # on one line: pruning knows a shard backend, not DeepSpeed
    {"pruner_state", "units"},
    {"inputs", "api", "checkpoint", "distillation", "ranks"},
    {"finished_models", "output", "resume", "tasks", "model_writer", "analysis"},
    {"quality"},
    {"run", "dry_run"},
    {"train", "analysis_report"},
    {"analysis_figures", "lm_eval_tasks"},
    {"analyze", "harness"},
    {"evaluate"},
)
# Copied into exported folders, where there is no scale_prune.
ALONE = ("modeling_per_layer", "modeling_factorized")

ONLY_IN = {
    "deepspeed": {"zero3"},
    "datasets": {"rows", "text_files"},
    "pyarrow": {"rows", "text_files"},
    "sacrebleu": {"tasks"},
    "scipy": {"tasks"},
    "sklearn": {"tasks"},
    "rouge_score": {"tasks"},
    "torch.utils.tensorboard": {"monitor"},
    "tqdm": {"monitor"},
    "tokenizers": {"embedded"},
    "lm_eval": {"lm_eval_tasks"},
    "matplotlib": {"analysis_figures", "comparison_figures"},
}

FILES = sorted(path for path in ROOT.rglob("*.py") if path != ROOT / "__init__.py")


def name_of(path: Path) -> str:
    return ".".join(path.relative_to(ROOT).with_suffix("").parts)


def part_of(path: Path) -> str:
    return name_of(path).partition(".")[0]


def imports(path: Path) -> Iterator[str]:
    """Yield the dotted name of everything that a file imports, also inside functions."""
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path} imports by a relative name"
            assert node.module is not None
            yield from (f"{node.module}.{alias.name}" for alias in node.names)


def inside(name: str, package: str) -> bool:
    return f"{name}.".startswith(f"{package}.")


def own_parts(path: Path) -> set[str]:
    """Return the parts of scale_prune that a file imports."""
    names = [name.split(".") for name in imports(path) if inside(name, "scale_prune")]
    return {name[1] for name in names if len(name) > 1} - {"__version__"}


def test_every_part_stands_on_one_layer() -> None:
    parts = [part for layer in LAYERS for part in layer]
    assert sorted(parts) == sorted({part_of(path) for path in FILES})


@pytest.mark.parametrize("path", FILES, ids=name_of)
def test_a_layer_imports_only_from_layers_below(path: Path) -> None:
    part = part_of(path)
    height = next((height for height, layer in enumerate(LAYERS) if part in layer), 0)
    below = set().union(*LAYERS[:height])
    assert own_parts(path) <= below | {part}


@pytest.mark.parametrize("path", FILES, ids=name_of)
def test_packages_stay_in_their_place(path: Path) -> None:
    for package, places in ONLY_IN.items():
        if part_of(path) not in places:
            assert not [name for name in imports(path) if inside(name, package)]


@pytest.mark.parametrize("path", sorted((ROOT / "core").glob("*.py")), ids=name_of)
def test_the_core_is_pure(path: Path) -> None:
    packages = {name.partition(".")[0] for name in imports(path)} - {"scale_prune"}
    assert packages <= {"torch", "einops"} | sys.stdlib_module_names
    impure = ("torch.distributed", "os", "pathlib", "io", "random", "time")
    assert not [name for name in imports(path) if any(inside(name, package) for package in impure)]


def test_criteria_know_no_ranks_and_no_models() -> None:
    for path in (ROOT / "criteria").glob("*.py"):
        packages = {name.partition(".")[0] for name in imports(path)} - {"scale_prune"}
        assert packages <= {"torch"} | sys.stdlib_module_names
        assert not [name for name in imports(path) if inside(name, "torch.distributed")]


@pytest.mark.parametrize("name", ALONE)
def test_what_is_copied_into_exports_needs_no_scale_prune(name: str) -> None:
    packages = {name.partition(".")[0] for name in imports(ROOT / f"{name}.py")}
    assert packages <= {"transformers", "torch"} | sys.stdlib_module_names


def test_the_front_door_imports_nothing_at_once() -> None:
    tree = ast.parse((ROOT / "__init__.py").read_text(encoding="utf-8"))
    assert [type(node).__name__ for node in tree.body if isinstance(node, ast.Import | ast.ImportFrom)] == [
        "ImportFrom"
    ]
    assert own_parts(ROOT / "__init__.py") == {"api"}
