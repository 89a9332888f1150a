"""What a run ran on, and from which commit."""

import os
import platform
import subprocess
from pathlib import Path
from typing import Any

import torch


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
    return found.strip() if place == "scale_prune/system/" else None  # else it lies in somebody else's checkout
