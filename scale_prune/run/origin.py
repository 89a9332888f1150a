"""Where a result is from: when, on which machine, by which command and commit, and where the time went."""

import shlex
from collections.abc import Mapping
from datetime import UTC, datetime
from typing import Any

from scale_prune.config import Config, specs
from scale_prune.export import public_name
from scale_prune.system import commit, host


def origin(config: Config) -> dict[str, Any]:
    """Return what report.json says of a run's origin."""
    now = datetime.now(UTC).isoformat(timespec="seconds")
    return {"date": now, "host": host(), "commit": commit(), "command": command_line(config)}


def command_line(config: Config) -> str:
    """Return a command that does what a run did, with its settings that are not defaults, and of paths the names."""
    defaults, told = Config().flat(), []
    for name, value in config.flat().items():
        if value == defaults[name] or name in ("output_dir", "overwrite", "resume"):
            continue
        shown = public_name(str(value)) if specs()[name].metadata["is_path"] else str(value)
        flag = f"--{name}" if value is True else f"--no-{name}" if value is False else f"--{name} {shlex.quote(shown)}"
        told.append(flag)
    return " ".join(["deepspeed launch/prune.py", *told])


def with_other(total: float, parts: Mapping[str, float]) -> dict[str, float]:
    """Return the parts of the seconds with the total before them, and behind them what belongs to none."""
    return {"total": total, **parts, "other": max(0.0, total - sum(parts.values()))}
