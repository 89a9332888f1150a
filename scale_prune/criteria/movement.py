"""Movement: scores trained by the gradient that a mask would get, so that neurons whose weights grow away from 0 stay.

    S <- S - eta_S * step(g + lambda(t) * dR/dS),   g_i = sum_j W1_ij G1_ij + sum_j W2_ji G2_ji

G is the gradient of the loss with respect to the masked weights, W the unmasked weights: g is dL/dM of a mask M that
multiplies both. R(S) is the score penalty; its derivative is taken in closed form, so the loss itself stays untouched.

Source: arXiv 2302.03773, equations of section 3, structured form from the authors' code; movement pruning is
arXiv 2005.07683. S = 0 at the start, no weight decay on S, Adam with betas (.9, .999), or plain SGD as in the paper.
Deviation: R is divided by the number of groups L, where the authors' code divides by 3 L; the scores' learning rate
rises over the dense steps and then falls linearly, whatever the weights' schedule is.
"""

from collections.abc import Sequence
from typing import Any, ClassVar

import torch
from torch import Tensor

from scale_prune.core import UnitSpan
from scale_prune.core.adam import adam_step
from scale_prune.criteria.base import Criterion, Moment, ShardView, State


class Movement(Criterion):
    """Keep the units with the highest trained scores ("hard movement", top-v)."""

    needs = frozenset({"grad"})
    grows = 0.0  # an optimizer step is as long for any unit
    defaults: ClassVar[dict[str, Any]] = {"scope": "per_group", "regularization": 0.0, "uniqueness": 0.0}
    settings = Criterion.settings | {"score_learning_rate", "score_optimizer", "regularization"}

    def share(self, view: ShardView) -> Tensor:
        """Return the slice's part of the units' w * dL/dw, (N,)."""
        assert view.grad is not None
        return view.unit_sum(view.weight * view.grad)

    def initial_state(self, spans: Sequence[UnitSpan], device: torch.device) -> State:
        """Start scores, Adam's moments and its step count at 0."""
        zeros = super().initial_state(spans, device)["total"]
        return {"score": zeros, "mean": zeros.clone(), "square": zeros.clone(), "count": torch.zeros((), device=device)}

    def update(self, state: State, total: Tensor, moment: Moment) -> State:
        """Make one optimizer step on the scores."""
        gradient = total + self.penalty_gradient(state["score"], moment)
        rate = self.config.score_learning_rate * moment.schedule.learning_rate(moment.step)
        if self.config.score_optimizer == "sgd":
            return state | {"score": state["score"] - rate * gradient}
        count = state["count"] + 1
        step, mean, square = adam_step(gradient, state["mean"], state["square"], count)
        return {"score": state["score"] - rate * step, "mean": mean, "square": square, "count": count}

    def penalty_gradient(self, score: Tensor, moment: Moment) -> Tensor:
        """Return lambda(t) * dR/dS, with R = mean over groups and units of sigmoid(S) * (1 + lambda_gum * U)."""
        assert self.config.regularization is not None
        assert self.config.uniqueness is not None
        strength = self.config.regularization * self.penalty_schedule(moment)
        sigmoid = score.sigmoid()
        return strength * moment.weight * sigmoid * (1 - sigmoid) * (1 + self.config.uniqueness * moment.similarity)

    def penalty_schedule(self, moment: Moment) -> float:
        """Return lambda(t) / lambda_f = v(t) / v_f: the penalty falls as units go."""
        return moment.schedule.remaining(moment.step) / moment.schedule.target

    def score(self, state: State) -> Tensor:
        """Return the trained scores."""
        return state["score"]
