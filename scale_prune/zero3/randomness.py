"""The states of all random generators that a model may draw from, as tensors."""

import json
import random
from typing import Any

import numpy as np
import torch
from deepspeed.accelerator import get_accelerator
from torch import Tensor


def random_state() -> dict[str, Tensor]:
    """Return the states of this process's generators, uint8 tensors by name."""
    kind, keys, *rest = np.random.get_state()
    plain = {"python": random.getstate(), "numpy": [kind, np.asarray(keys).tolist(), *rest]}
    return {
        "plain": torch.frombuffer(bytearray(json.dumps(plain).encode()), dtype=torch.uint8),
        "torch": torch.get_rng_state(),
        "device": get_accelerator().get_rng_state(),
    }


def set_random_state(state: dict[str, Tensor]) -> None:
    """Set this process's generators to what `random_state` returned."""
    plain: dict[str, Any] = json.loads(state["plain"].numpy().tobytes())
    version, keys, gauss = plain["python"]
    random.setstate((version, tuple(keys), gauss))
    np.random.set_state(tuple(plain["numpy"]))
    get_accelerator().set_rng_state(state["device"])
    torch.set_rng_state(state["torch"])
