"""Where a result is from: when, on which machine, by which command and commit, and where the time went."""

import os
import platform
import shlex
import subprocess
from collections.abc import Mapping
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import torch

from scale_prune.config import Config, specs
from scale_prune.export import public_name


def origin(config: Config) -> dict[str, Any]:
    """Return what report.json says of a run's origin."""
    now = datetime.now(UTC).isoformat(timespec="seconds")
    return {"date": now, "host": host(), "commit": commit(), "command": command_line(config)}


def host() -> dict[str, Any]:
    """Return the processor's name, cores, memory in bytes, and the accelerator's name, None without one."""
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
        names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    except OSError:
        names = []
    return {
        "processor": names[0] if names else platform.processor() or platform.machine(),
        "cores": os.cpu_count(),
        "memory_bytes": os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"),
        "accelerator": torch.cuda.get_device_name() if torch.cuda.is_available() else None,
    }


def commit() -> str | None:
    """Return the commit of the package's own checkout, None where it is not one."""
    asked = ["git", "-C", str(Path(__file__).parent), "rev-parse", "--show-prefix", "--short", "HEAD"]
    try:
        told = subprocess.run(asked, capture_output=True, text=True, check=True, timeout=10).stdout
    except (OSError, subprocess.SubprocessError):
        return None
    place, _, found = told.partition("\n")
    return found.strip() if place == "scale_prune/run/" else None  # else it lies in somebody else's checkout


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
