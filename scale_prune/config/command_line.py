"""The command line: flags and a YAML recipe become a `Config`.

Flags, their help and their checks come from the fields of `scale_prune.config.settings`; nothing is declared twice.
Whatever is wrong leaves `parse` as a ValueError of one sentence, and `user_errors` turns that into one message and exit
code 2. A dry run collects `Mistakes` instead, and goes on after each.
"""

import argparse
import errno
import logging
import os
import re
import socket
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext, redirect_stdout, suppress
from dataclasses import Field, fields
from io import StringIO
from typing import Any, NoReturn

from scale_prune.config.recipes import NOUNS, check_value, kind_of, nearest, read_recipe, read_yaml, specs
from scale_prune.config.setting import describe
from scale_prune.config.settings import Config, concerns

DS_CONFIG_HINT = "give the DeepSpeed configuration as --ds_config FILE, scale_prune starts the engine itself"
HINTS = {"--deepspeed": DS_CONFIG_HINT, "--deepspeed_config": DS_CONFIG_HINT}
METAVARS = {int: "INT", float: "FLOAT", str: "TEXT"}
USER_MISTAKES = (ValueError, FileNotFoundError, FileExistsError, PermissionError, IsADirectoryError, NotADirectoryError)
FULL_DISK = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
DRY_RUN_FLAGS = ("dry_run", "world_size", "measure")

Noted = Callable[[], AbstractContextManager[None]]


def parse(argv: Sequence[str], *, criteria: Sequence[str], noted: Noted = nullcontext) -> tuple[Config, frozenset[str]]:
    """Read a command line and the recipe it names.

    Flags win over the recipe, the recipe wins over the defaults. `--help` prints and exits with code 0.

    Args:
        argv: the arguments, without the program's name.
        criteria: names that `--criterion` accepts.
        noted: a context for each thing that can be wrong; where it holds a mistake back, the setting's default stands
            in for what cannot be used.

    Returns:
        the settings, and the names of those that were given by a flag or by the recipe.

    Raises:
        ValueError: a flag, recipe key, value or combination of values that is not valid, or an unreadable recipe.
    """
    flags: dict[str, Any] = {}
    given: dict[str, Any] = {}
    with noted():
        flags, unknown = _read_flags(argv, criteria)
        with noted():
            _refuse_unknown(unknown, criteria)
    if "config" in flags:
        with noted():
            given = read_recipe(flags.pop("config"))
    for name, value in flags.items():
        with noted():
            given[name] = _from_flag(name, value)
    usable = {}
    for name, value in given.items():
        with noted():
            check_value(name, value, criteria)
            usable[name] = value
    return _build(usable, noted), frozenset(usable)


def parse_some(
    argv: Sequence[str], names: Sequence[str], description: str, add_own: Callable[[argparse.ArgumentParser], None]
) -> tuple[Config, frozenset[str], argparse.Namespace]:
    """Read the command line of another command, which has some of the settings and flags of its own.

    Args:
        argv: the arguments, without the program's name.
        names: the settings it has.
        description: what it does, for `--help`.
        add_own: adds its own flags.

    Returns:
        the settings, the names of those that were given, and its own flags' values.

    Raises:
        ValueError: a flag or value that is not valid.
    """
    parser = _Parser(description=description, allow_abbrev=False)
    add_own(parser)
    own = [action.dest for action in parser._actions]
    parser.add_argument("--local_rank", "--local-rank", type=int, help=argparse.SUPPRESS)
    group = parser.add_argument_group("settings, as of launch/prune.py", argument_default=argparse.SUPPRESS)
    for name in names:
        _add_flag(group, specs()[name], specs()[name].metadata["choices"])
    flags, rest = parser.parse_known_args(argv)
    if rest:
        valid = [name for action in parser._actions for name in action.option_strings]
        raise ValueError(f"unknown argument {rest[0]}, {nearest(rest[0].split('=')[0], valid)}")
    given = {name: _from_flag(name, value) for name, value in vars(flags).items() if name in names}
    return Config.from_flat(given), frozenset(given), argparse.Namespace(**{n: getattr(flags, n, None) for n in own})


def dry_run_ranks(argv: Sequence[str], world_size: int) -> int | None:
    """Return the number of ranks that a dry run is asked for, None where none is asked for.

    Args:
        argv: the arguments, without the program's name.
        world_size: the number of ranks where `--world_size` does not say.

    Raises:
        ValueError: `--world_size` is not a whole number of at least 1, or a flag of `--dry_run` stands without it.
    """
    parser = _Parser(add_help=False, allow_abbrev=False)
    _add_dry_run(parser)
    asked, _ = parser.parse_known_args(argv)
    if asked.world_size is not None and not asked.dry_run:
        raise ValueError("--world_size belongs to --dry_run; the launcher says how many ranks a run has")
    if asked.measure and not asked.dry_run:
        raise ValueError("--measure belongs to --dry_run, which it lets measure a step; give both, or neither")
    if asked.world_size is not None and not re.fullmatch("0*[1-9][0-9]*", asked.world_size):
        raise ValueError(f"--world_size {asked.world_size} is not valid, it must be a whole number, at least 1")
    return int(asked.world_size or world_size) if asked.dry_run else None


def plugins_of(argv: Sequence[str]) -> str | None:
    """Return what `--plugin` or the recipe says, before anything is checked that plugins can add to.

    Args:
        argv: the arguments, without the program's name.

    Returns:
        None where there are none, or a mistake that `parse` will name.
    """
    parser = _Parser(add_help=False, allow_abbrev=False)
    parser.add_argument("--plugin")
    parser.add_argument("--config", type=os.path.expanduser)
    with suppress(ValueError):
        asked, _ = parser.parse_known_args(argv)
        given = asked.plugin or (read_yaml(asked.config).get("plugin") if asked.config else None)
        return given if isinstance(given, str) else None
    return None


class Mistakes(list[str]):
    """The user's mistakes so far, one sentence each."""

    @contextmanager
    def noted(self) -> Iterator[None]:
        """Note a mistake that is made inside, and go on behind."""
        try:
            yield
        except USER_MISTAKES as error:
            self.append(str(error))


@contextmanager
def user_errors(rank: int) -> Iterator[None]:
    """Turn a user's mistake into one message on stderr and exit code 2.

    A mistake is a ValueError, a file that is missing, in the way or not permitted, or a full disk; anything else keeps
    its traceback. With SCALE_PRUNE_TRACEBACK=1 in the environment every rank shows the traceback of a mistake as well.

    Args:
        rank: rank of this process; only rank 0 prints, warnings too, and the first rank of every other host, whose
            files and disks are its own. Every rank exits.
    """
    if rank:
        logging.getLogger("scale_prune").setLevel(logging.ERROR)
    try:
        yield
    except (*USER_MISTAKES, OSError) as error:
        full = isinstance(error, OSError) and error.errno in FULL_DISK
        if not full and not isinstance(error, USER_MISTAKES):
            raise
        if os.environ.get("SCALE_PRUNE_TRACEBACK") == "1":
            sys.excepthook(type(error), error, error.__traceback__)
        if rank == 0 or os.environ.get("LOCAL_RANK") == "0":
            where, reason = f"{socket.gethostname()}: " if rank else "", " ".join(str(error).splitlines())
            print(f"error: {where}{'a disk is full: ' if full else ''}{reason}", file=sys.stderr, flush=True)
        raise SystemExit(2) from None


def said_once(*, speaks: bool) -> AbstractContextManager[Any]:
    """Let one process alone be heard, as where `--help` is printed; without any stdout argparse would take stderr."""
    return redirect_stdout(sys.stdout if speaks else StringIO())


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        raise ValueError(message)


def _build(given: Mapping[str, Any], noted: Noted) -> Config:
    """Join settings that are valid one by one."""
    parts: dict[str, Any] = {}
    for name, concern in concerns().items():
        parts[name] = concern()
        with noted():
            parts[name] = concern(**{key: given[key] for key in concern.__dataclass_fields__ if key in given})
    return Config(**parts)


def _read_flags(argv: Sequence[str], criteria: Sequence[str]) -> tuple[dict[str, Any], list[str]]:
    """Return the settings that were given, as texts, switches as booleans; and the arguments that are none."""
    flags, rest = _build_parser(criteria).parse_known_args(argv)
    own = ("local_rank", *DRY_RUN_FLAGS)
    return {name: value for name, value in vars(flags).items() if name not in own}, rest


def _refuse_unknown(rest: Sequence[str], criteria: Sequence[str]) -> None:
    if not rest:
        return
    unknown = next((word for word in rest if word.startswith("-")), rest[0]).split("=")[0]
    if not unknown.startswith("-"):
        raise ValueError(f"unexpected argument {unknown!r}, every setting is a flag of the form --name value")
    valid = [name for action in _build_parser(criteria)._actions for name in action.option_strings]
    raise ValueError(f"unknown flag {unknown}, {HINTS.get(unknown) or nearest(unknown, valid)}")


def _build_parser(criteria: Sequence[str]) -> _Parser:
    parser = _Parser(
        usage="%(prog)s [--config FILE] [--FLAG VALUE ...]",
        description="Prune a causal language model while it is fine-tuned under DeepSpeed ZeRO-3.",
        epilog="SCALE_PRUNE_TRACEBACK=1 in the environment shows where an error arose.",
        argument_default=argparse.SUPPRESS,
        allow_abbrev=False,
    )
    recipe = "YAML file of settings, `flag: value` on each line; flags win"
    parser.add_argument("--config", type=os.path.expanduser, metavar="FILE", help=recipe)
    parser.add_argument("--local_rank", "--local-rank", type=int, help=argparse.SUPPRESS)
    _add_dry_run(parser.add_argument_group("before the queue", "What a run would need, and all that is wrong with it."))
    for name, concern in concerns().items():
        group = parser.add_argument_group(name, concern.__doc__)
        for spec in fields(concern):
            _add_flag(group, spec, criteria if spec.name == "criterion" else spec.metadata["choices"])
    return parser


def _add_dry_run(parser: Any) -> None:
    parser.add_argument("--dry_run", action="store_true", help="print it and end; no GPU is used, nothing is written")
    parser.add_argument("--world_size", metavar="INT", help="ranks that --dry_run assumes, else the launcher's")
    parser.add_argument(
        "--measure", action="store_true", help="let --dry_run measure a step's passes here, for the time"
    )


def _add_flag(group: Any, spec: Field[Any], choices: Sequence[str] | None) -> None:
    text = describe(spec).replace("%", "%%")
    bare = spec.metadata["bare"]
    if kind_of(spec) is bool:
        group.add_argument(f"--{spec.name}", action=argparse.BooleanOptionalAction, help=text)
    elif bare is not None:
        group.add_argument(f"--{spec.name}", nargs="?", const=bare, metavar=METAVARS[kind_of(spec)], help=text)
    else:
        metavar = "{" + ",".join(choices) + "}" if choices else METAVARS[kind_of(spec)]
        group.add_argument(f"--{spec.name}", metavar=metavar, help=text)


def _from_flag(name: str, value: str | bool) -> Any:
    kind = kind_of(specs()[name])
    try:
        return kind(value)
    except ValueError as error:
        raise ValueError(f"--{name} {value} is not valid, it must be {NOUNS[kind]}") from error
