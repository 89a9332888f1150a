"""The house's sizes: functions, classes and modules that are taken in at a glance."""

import ast
from pathlib import Path

import pytest

import scale_prune

ROOT = Path(scale_prune.__file__).parent
FILES = sorted(ROOT.rglob("*.py"))
LINES, METHODS, ATTRIBUTES, IMPORTS = 40, 12, 12, 12

SETTINGS = ("PruningConfig", "TrainingConfig")  # one attribute a setting


def name_of(path: Path) -> str:
    return path.relative_to(ROOT).with_suffix("").as_posix()


def own_imports(tree: ast.AST) -> set[str]:
    """Return the modules of the package that a module imports, also inside functions."""
    modules = [node.module or "" for node in ast.walk(tree) if isinstance(node, ast.ImportFrom)]
    modules += [alias.name for node in ast.walk(tree) if isinstance(node, ast.Import) for alias in node.names]
    return {module for module in modules if module.split(".")[0] == "scale_prune"}


def attributes_of(kind: ast.ClassDef) -> set[str]:
    """Return the fields of a class, and what its methods set on `self`."""
    fields = {
        node.target.id for node in kind.body if isinstance(node, ast.AnnAssign) and isinstance(node.target, ast.Name)
    }
    stored = [node for node in ast.walk(kind) if isinstance(node, ast.Attribute) and isinstance(node.ctx, ast.Store)]
    return fields | {node.attr for node in stored if isinstance(node.value, ast.Name) and node.value.id == "self"}


def too_large(source: str) -> list[str]:
    """Say what in a module exceeds the limits."""
    tree = ast.parse(source)
    found = [f"{count} imports of ours" for count in [len(own_imports(tree))] if count > IMPORTS]
    for node in ast.walk(tree):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef) and node.end_lineno is not None:
            lines = node.end_lineno - node.lineno + 1
            found += [f"{node.name} has {lines} lines"] if lines > LINES else []
        elif isinstance(node, ast.ClassDef) and node.name not in SETTINGS:
            methods = sum(isinstance(each, ast.FunctionDef | ast.AsyncFunctionDef) for each in node.body)
            attributes = len(attributes_of(node))
            found += [f"{node.name} has {methods} methods"] if methods > METHODS else []
            found += [f"{node.name} has {attributes} attributes"] if attributes > ATTRIBUTES else []
    return found


@pytest.mark.parametrize("path", FILES, ids=name_of)
def test_everything_is_taken_in_at_a_glance(path: Path) -> None:
    found = too_large(path.read_text(encoding="utf-8"))
    assert not found


def test_the_limits_can_be_exceeded() -> None:
    function = "def long():\n" + "    pass\n" * LINES
    methods = "class Many:\n" + "".join(f"    def m{n}(self): self.a{n} = 0\n" for n in range(METHODS + 1))
    fields = "class Wide:\n" + "".join(f"    f{n}: int\n" for n in range(ATTRIBUTES + 1))
    imports = "".join(f"from scale_prune.m{n} import x\n" for n in range(IMPORTS + 1))
    assert [len(too_large(source)) for source in (function, methods, fields, imports)] == [1, 2, 1, 1]


def test_faces_show_no_name_that_is_a_module_of_their_room() -> None:
    for face in ROOT.glob("*/__init__.py"):
        nodes = [node for node in ast.parse(face.read_text(encoding="utf-8")).body if isinstance(node, ast.ImportFrom)]
        shown = {alias.asname or alias.name for node in nodes for alias in node.names}
        assert not shown & {path.stem for path in face.parent.iterdir()}, face
