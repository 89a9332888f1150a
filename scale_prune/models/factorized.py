"""Linear maps as products of two factors, in the place of a model's own.

Shape letters: C components, D_in and D_out the sides of the weight.
"""

from collections.abc import Callable
from typing import Any

from torch import Tensor, nn
from torch.nn.functional import linear

from scale_prune.core import Member, UnitGroup

FACTOR_WORDS = ("factorized", "factorized_embedding")
"""What config.json calls what stays factorized."""
WORTHWHILE = 0.9
"""A smaller product is made where at most this fraction of the components is live; it costs a copy of them."""


class FactorizedLinear(nn.Module):
    """y = up @ diag(gates) @ down @ x + bias.

    Only components whose gate is not exactly 0 are multiplied, once enough of them are.

    Args:
        down: (C, D_in).
        up: (D_out, C).
        bias: (D_out,), if there is one.

    Attributes:
        gate: tells the (C,) gates for this module's present mode, None where there are none.
    """

    def __init__(self, down: nn.Parameter, up: nn.Parameter, bias: nn.Parameter | None) -> None:
        super().__init__()
        self.down, self.up = down, up
        self.bias: nn.Parameter | None
        self.register_parameter("bias", bias)
        self.gate: Callable[[nn.Module], Tensor | None] | None = None

    def forward(self, x: Tensor) -> Tensor:
        """Return (..., D_out) for (..., D_in)."""
        gates = self.gate(self) if self.gate is not None else None
        if gates is None:
            return linear(linear(x, self.down), self.up, self.bias)
        live = gates.detach().nonzero().flatten()
        if len(live) > WORTHWHILE * len(gates):
            return linear(linear(x, self.down) * gates.to(x.dtype), self.up, self.bias)
        down, up = self.down.index_select(0, live), self.up.index_select(1, live)
        return linear(linear(x, down) * gates[live].to(x.dtype), up, self.bias)


def put_factors(model: nn.Module, name: str, down: nn.Parameter, up: nn.Parameter) -> None:
    """Replace a linear module by its factors; its bias stays the parameter that it is."""
    parent, _, child = name.rpartition(".")
    old = model.get_submodule(name)
    factors = FactorizedLinear(down, up, getattr(old, "bias", None))
    setattr(model.get_submodule(parent), child, factors.train(old.training))


def component_groups(model: nn.Module) -> tuple[UnitGroup, ...]:
    """List the components of a model's factorized weights, one group a weight.

    Nothing is communicated: of a partitioned parameter only the recorded full shape is read.
    """
    names = [name for name, module in model.named_modules() if isinstance(module, FactorizedLinear)]
    layers = [next((int(part) for part in name.split(".") if part.isdecimal()), 0) for name in names]
    return tuple(component_group(model, name, layer) for name, layer in zip(names, layers, strict=True))


def component_group(model: nn.Module, name: str, layer: int) -> UnitGroup:
    """Describe the components of a module with the factors `down` and `up`, in a layer."""
    module = model.get_submodule(name)
    (components, d_in), (d_out, _) = full_shape(module.down), full_shape(module.up)
    return UnitGroup(
        name=name,
        layer=layer,
        num_units=components,
        members=(
            Member(name=f"{name}.down", shape=(components, d_in), dim=0, role="in"),
            Member(name=f"{name}.up", shape=(d_out, components), dim=1, role="out"),
        ),
        output=name,
        kind="component",
        cost=d_in + d_out,
        matrix_cost=d_in * d_out,
    )


def full_shape(parameter: Any) -> tuple[int, ...]:
    """Return a parameter's shape, also where ZeRO-3 has left it with the shape (0,)."""
    return tuple(getattr(parameter, "ds_shape", parameter.shape))
