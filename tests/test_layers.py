"""The house rules: rooms, which of them may import which, and which packages stay in one room."""

import ast
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

import scale_prune

ROOT = Path(scale_prune.__file__).parent

# Copied into exported folders, where there is no scale_prune.
ALONE = ("models/modeling_per_layer", "models/modeling_factorized")

ONLY_IN = {
    "deepspeed": {"zero3"},
    "datasets": {"data"},
    "pyarrow": {"data"},
    "tokenizers": {"data"},
    "sacrebleu": {"tasks"},
    "scipy": {"tasks"},
    "sklearn": {"tasks"},
    "rouge_score": {"tasks"},
    "torch.utils.tensorboard": {"run"},
    "tqdm": {"run"},
    "lm_eval": {"inspection"},
    "matplotlib": {"inspection", "run", "study"},
    "gguf": {"export", "inspection"},
    "llama_cpp": {"inspection"},
    "huggingface_hub": {"export"},
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


def test_imports_run_down_from_floor_to_floor() -> None:
    # In a process of its own, because it disables the loggers that are there.
    lint = "import sys; from importlinter.cli import lint_imports as lint; sys.exit(lint(sys.argv[1], no_cache=True))"
    subprocess.run([sys.executable, "-c", lint, str(ROOT.parent / "pyproject.toml")], check=True)


def test_rooms_are_few_and_have_faces_that_are_taken_in_at_a_glance() -> None:
    rooms = [path for path in ROOT.iterdir() if path.is_dir() and path.name != "__pycache__"]
    assert len(rooms) <= 16
    assert len([path for path in ROOT.glob("*.py") if path.name != "__init__.py"]) <= 2
    for room in rooms:
        assert len((room / "__init__.py").read_text(encoding="utf-8").splitlines()) <= 20, room


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
    assert {name.partition(".")[0] for name in imports(ROOT / "__init__.py")} <= sys.stdlib_module_names
    assert [name for name in scale_prune.__all__ if getattr(scale_prune, name, None) is None] == []
    with pytest.raises(AttributeError, match="has no attribute 'prunes'"):
        _ = scale_prune.prunes
