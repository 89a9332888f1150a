"""From one YAML recipe to the cells of a grid, each of them the settings of an ordinary run.

Any value may be a list, which is an axis of the grid. `cells` lists mappings, each laid over the common settings, for
settings that belong together. All cells are checked before any of them is used.
"""

import json
import re
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import product
from pathlib import Path
from typing import Any

from scale_prune.config import Config, as_settings, check_value, load_plugins, read_recipe, read_yaml, with_keys
from scale_prune.criteria import AUTO, CRITERIA, check_uniqueness, with_defaults
from scale_prune.export import resolve_layout
from scale_prune.study.naming import differing, short
from scale_prune.study.rows import NO_METHOD, PARTS
from scale_prune.system import RECIPE, REPORT

CELLS = "cells"
NAMES_ITSELF = ("criterion", "scope")
"""Settings whose values say what they are: `gum-global`, but `seed_0`."""

PLACES = ("model", "dataset", "train_file", "validation_file", "trust_remote_code", "ds_config")
"""Where things lie: a cell that was begun goes on with them elsewhere, and judges itself whether they are the same."""

NOT_A_CELLS = {
    "output_dir": "the cells' folders are made in the sweep's output_dir, which stands beside `cells`",
    "overwrite": "a sweep leaves finished cells as they are; remove a cell's folder to run it again",
    "resume": "a sweep goes on with unfinished cells by itself",
}


@dataclass(frozen=True, kw_only=True)
class Cell:
    """One run of a sweep.

    Attributes:
        folder: the run's own folder; its name is the cell's.
        settings: what the recipe gives, with this folder as `output_dir`.
        config: all settings, the criterion's own filled in.
    """

    folder: Path
    settings: dict[str, Any]
    config: Config

    @property
    def name(self) -> str:
        """What tells the cell from the others."""
        return self.folder.name

    @property
    def recipe(self) -> Path:
        """The file from which it is run."""
        return self.folder.with_name(f"{self.name}.yaml")

    @property
    def log(self) -> Path:
        """The file with what the run says."""
        return self.folder.with_name(f"{self.name}.log")

    @property
    def is_done(self) -> bool:
        """Whether the run has come to its end."""
        return (self.folder / REPORT).is_file()

    @property
    def is_begun(self) -> bool:
        """Whether there is a run to go on with."""
        return (self.folder / RECIPE).is_file() and not self.is_done

    @property
    def seconds(self) -> float:
        """Seconds that the finished run took."""
        return float(json.loads((self.folder / REPORT).read_text(encoding="utf-8"))["seconds"]["total"])


def read_sweep(path: str, plugin: str | None = None) -> list[Cell]:
    """Read the recipe of a sweep and check every cell.

    Args:
        path: a YAML file; keys as in a run's recipe, and `cells`.
        plugin: that of all cells; None leaves it to the recipe.

    Returns:
        the cells, in the order of `cells` first and of the last list fastest.

    Raises:
        ValueError: the recipe cannot be read; a key is unknown, or one that a sweep cannot have; a list is empty; the
            settings of a cell are not valid; two cells are the same run or have the same name; a file that no sweep has
            written stands where a cell's recipe would; a finished or begun cell has been run with other settings; or a
            plugin cannot be imported.
    """
    common = with_keys(path, read_yaml(path), also=(CELLS,))
    over = _over(path, common.pop(CELLS, [{}]))
    sweep = _output_dir(path, common.pop("output_dir", Config().output.output_dir))
    _refuse(path, common, *over)
    points = [point for lines in over for point in _points(common | lines)]
    given = [as_settings(path, point | ({"plugin": plugin} if plugin else {})) for point in points]
    for each in given:
        load_plugins(each.get("plugin"))
    axes = {key for lines in (*over, common) for key in lines if isinstance(lines[key], list)}
    names = _names(given, {*differing(given), *axes})
    cells = [_cell(path, sweep / name, each) for name, each in zip(names, given, strict=True)]
    _refuse_same(path, cells)
    if (sweep / RECIPE).is_file():
        raise ValueError(f"{path}: output_dir {sweep} holds a run, a sweep needs a folder of its own")
    for cell in cells:
        _check_own_recipe(path, cell)
        _check_settings(cell)
    return cells


def _over(path: str, cells: Any) -> list[dict[str, Any]]:
    if not isinstance(cells, list) or not all(isinstance(lines, dict) for lines in cells):
        raise ValueError(f"{path}: {CELLS} must be a list of mappings, like `- {{criterion: gum, seed: 1}}`")
    if not cells:
        raise ValueError(f"{path}: {CELLS} is an empty list, which makes no run; leave it out")
    return [with_keys(path, lines) for lines in cells]


def _output_dir(path: str, value: Any) -> Path:
    if not isinstance(value, str) or not value:
        raise ValueError(f"{path}: output_dir is {value!r}, it must be one text, the sweep's folder")
    return Path(value).expanduser()


def _refuse(path: str, *mappings: Mapping[str, Any]) -> None:
    for lines in mappings:
        for name, value in lines.items():
            if name in NOT_A_CELLS:
                raise ValueError(f"{path} has {name}: {NOT_A_CELLS[name]}")
            if value == []:
                raise ValueError(f"{path}: {name} is an empty list, which makes no run")


def _points(lines: Mapping[str, Any]) -> Iterator[dict[str, Any]]:
    """Yield the grid that a mapping's lists make; the last list changes fastest."""
    axes = [value if isinstance(value, list) else [value] for value in lines.values()]
    for values in product(*axes):
        yield dict(zip(lines, values, strict=True))


def _names(given: Sequence[Mapping[str, Any]], names: Collection[str]) -> list[str]:
    """Name the cells after what differs and what is a list: names stay as lists grow."""
    first = [name for name in NAMES_ITSELF if name in names or "scope" in names]
    middle = dict.fromkeys(name for each in given for name in each if name in names)
    ordered = [*first, *(name for name in middle if name not in (*NAMES_ITSELF, "seed"))]
    ordered += ["seed"] if "seed" in names else []
    texts = {name: short(each.get(name) for each in given) for name in ordered}
    words = [[_word(name, texts[name][each[name]]) for name in ordered if name in each] for each in given]
    return [re.sub(r"[^\w.+-]+", "_", "-".join(each)) or "run" for each in words]


def _word(name: str, text: str) -> str:
    return text if name in NAMES_ITSELF else f"{name}_{text}"


def _cell(path: str, folder: Path, given: Mapping[str, Any]) -> Cell:
    try:
        for name, value in given.items():
            check_value(name, value, (AUTO, *CRITERIA))
        settings = {**given, "output_dir": str(folder)}
        config = Config.from_flat(settings)
        pruning = with_defaults(config.pruning)
        resolve_layout(config.output.layout, str(pruning.scope), CRITERIA[pruning.criterion].kind)
        cell = Cell(folder=folder, settings=settings, config=replace(config, pruning=pruning))
        if not (cell.is_done or cell.is_begun):
            check_uniqueness(pruning)
        return cell
    except ValueError as error:
        raise ValueError(f"{path}, cell {folder.name}: {error}") from error


def _refuse_same(path: str, cells: Sequence[Cell]) -> None:
    results = [_result(cell.config) for cell in cells]
    for place, cell in enumerate(cells):
        for other, result in zip(cells[:place], results, strict=False):
            if result == results[place]:
                names = cell.name if cell.name == other.name else f"{other.name} and {cell.name}"
                raise ValueError(f"{path}: two cells are the same run, {names}")
            if cell.folder == other.folder:
                raise ValueError(f"{path}: two cells would have the same name, {cell.name}")


def _check_own_recipe(path: str, cell: Cell) -> None:
    """Refuse to write a cell's recipe over a file that is not one of a run in the cell's folder."""
    if not cell.recipe.is_file():
        return
    try:
        output = read_recipe(str(cell.recipe)).get("output_dir", "")
    except ValueError:
        output = ""
    if Path(output).name != cell.name:
        raise ValueError(
            f"{path}: {cell.recipe} would be written for cell {cell.name}, but is another file already; give "
            "another output_dir, or move that file"
        )


def _check_settings(cell: Cell) -> None:
    """Refuse a cell that is finished or begun and whose settings are not those of the recipe any more."""
    own = cell.folder / RECIPE
    if not (cell.is_done or cell.is_begun) or not cell.recipe.is_file():
        return
    ran = read_recipe(str(own)) if own.is_file() else {}
    chosen = {name: ran[name] for name in NAMES_ITSELF if name in ran}  # by the defaults of the time
    config = Config.from_flat(read_recipe(str(cell.recipe)) | chosen)
    before = _result(replace(config, pruning=with_defaults(config.pruning)))
    free = PARTS if cell.config.training.train_batch_size else ()
    for name, value in _result(cell.config).items():
        if before[name] != value and name not in (free if cell.is_done else (*free, *PLACES)):
            raise ValueError(
                f"{cell.folder} is {'finished' if cell.is_done else 'begun'} and was run with {name} {before[name]}, "
                f"the recipe now has {value}; give another output_dir, or remove that folder"
            )


def _result(config: Config) -> dict[str, Any]:
    """Return the settings that can make a difference to a run's result."""
    without = NO_METHOD - {"seed", "remaining"}
    return {name: value for name, value in config.flat().items() if name not in without}
