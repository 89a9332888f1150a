"""Recipes: YAML files of settings, `flag: value` on a line. What is wrong in one is a ValueError of one sentence."""

import difflib
import re
import sys
from collections.abc import Hashable, Iterable, Mapping, Sequence
from dataclasses import Field, fields
from pathlib import Path
from types import NoneType
from typing import Any, get_args

import yaml

from scale_prune.config.setting import check_field
from scale_prune.config.settings import concerns

NOUNS = {int: "a whole number", float: "a number", str: "a text", bool: "true or false"}


def read_recipe(path: str) -> dict[str, Any]:
    """Read settings from a YAML file; keys are flags' names without dashes in front, `-` may stand for `_`.

    A key whose value is null counts as not given, where null is the default.

    Raises:
        ValueError: the file cannot be read or is not a YAML mapping, a key is unknown or twice there, or a value is not
            of the setting's type.
    """
    return as_settings(path, with_keys(path, read_yaml(path)))


def read_yaml(path: str) -> dict[Any, Any]:
    """Read a YAML file that holds a mapping.

    Raises:
        ValueError: the file cannot be read or is not a YAML mapping, or a key is twice there.
    """
    try:
        content = yaml.load(Path(path).read_text(encoding="utf-8"), Loader=_RecipeLoader)
    except OSError as error:
        raise ValueError(f"--config {path} cannot be read: {error.strerror}") from error
    except yaml.MarkedYAMLError as error:
        line = error.problem_mark.line + 1 if error.problem_mark else "?"
        raise ValueError(f"--config {path}, line {line} is not valid YAML: {error.problem}") from error
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise ValueError(f"--config {path} is not a YAML text: {' '.join(str(error).split())}") from error
    if not isinstance(content, dict | None):
        raise ValueError(f"--config {path} holds {content!r}, it must hold lines of the form `flag: value`")
    return content or {}


def with_keys(path: str, content: Mapping[Any, Any], also: Sequence[str] = ()) -> dict[str, Any]:
    """Return a recipe's lines under the settings' own names.

    Args:
        path: the recipe, for messages.
        content: its lines.
        also: keys that it may have beside the settings' names.

    Raises:
        ValueError: a key is unknown, or there twice, once with - and once with _.
    """
    lines = [(_key(path, key, also), value) for key, value in content.items()]
    if twice := [name for place, (name, _) in enumerate(lines) if name in dict(lines[:place])]:
        raise ValueError(f"--config {path} has the key {twice[0]} twice, once with - and once with _")
    return dict(lines)


def as_settings(path: str, lines: Mapping[str, Any]) -> dict[str, Any]:
    """Return the values of a recipe's lines as their settings' types, without those that count as not given.

    Raises:
        ValueError: a value is not of the setting's type.
    """
    return {
        name: _from_recipe(path, name, value)
        for name, value in lines.items()
        if value is not None or specs()[name].default is not None
    }


def nearest(name: str, valid: Iterable[str]) -> str:
    """Return a hint at the valid name nearest to `name`, or the way to all names where none is near."""
    close = difflib.get_close_matches(name, list(valid), n=1)
    return f"did you mean {close[0]}?" if close else "--help lists all"


def check_value(name: str, value: Any, criteria: Sequence[str]) -> None:
    """Refuse a value that is out of range or not one of the choices.

    Raises:
        ValueError: it is; the message says what would be valid.
    """
    check_field(specs()[name], value)
    if name == "criterion" and value not in criteria:
        raise ValueError(f"--criterion {value} is unknown, choose one of {', '.join(criteria)}")


def specs() -> Mapping[str, Field[Any]]:
    """Return the fields of all settings by name."""
    return {spec.name: spec for concern in concerns().values() for spec in fields(concern)}


def kind_of(spec: Field[Any]) -> type:
    """Return a field's type without the None."""
    kinds = [kind for kind in get_args(spec.type) or (spec.type,) if kind is not NoneType]
    return kinds[0]


class _RecipeLoader(yaml.SafeLoader):
    """YAML as people write it: 1e-4 is a number, a key that is twice there is a mistake."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Hashable, Any]:
        seen = []
        for key, _ in node.value:
            if key.value in seen:
                raise yaml.MarkedYAMLError(problem=f"the key {key.value} is there twice", problem_mark=key.start_mark)
            seen.append(key.value)
        return super().construct_mapping(node, deep)


_RecipeLoader.add_implicit_resolver(
    "tag:yaml.org,2002:float", re.compile(r"[-+]?(\d+\.?\d*|\.\d+)[eE][-+]?\d+"), list("-+.0123456789")
)


def _from_recipe(path: str, name: str, value: Any) -> Any:
    kind = kind_of(specs()[name])
    whole_as_float = kind is float and type(value) is int and abs(value) < sys.float_info.max
    if type(value) is not kind and not whole_as_float:
        raise ValueError(f"--config {path}: `{name}: {value!r}` is not valid, it must be {NOUNS[kind]}")
    return kind(value)


def _key(path: str, key: Any, also: Sequence[str] = ()) -> str:
    name, valid = str(key).replace("-", "_"), [*specs(), *also]
    if name not in valid:
        raise ValueError(f"--config {path} has the unknown key {key}, {nearest(name, valid)}")
    return name
