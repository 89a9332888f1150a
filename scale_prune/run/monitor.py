"""A run as it is watched: TensorBoard events and a progress bar, on rank 0 only."""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path

import torch
from torch import Tensor
from torch.utils.tensorboard import SummaryWriter
from tqdm import tqdm

LARGEST = 1e19  # what histograms of TensorBoard have room for
POINTS = 400  # in time that the heat map has at most
CELL = 12  # pixels a layer and a point in time take in the heat map
COLORS = torch.tensor([[68, 1, 84], [33, 145, 140], [253, 231, 37]], dtype=torch.float32)  # 0, 0.5, 1


class Monitor:
    """Writes what happens; on ranks other than 0 every call does nothing.

    Args:
        folder: where events go; None writes none.
        total_steps: optimizer steps of the run, for the progress bar.
        active: True on rank 0.
        steps_made: steps of a run that goes on; events of later steps, which were lost, are hidden.
    """

    def __init__(self, folder: Path | None, *, total_steps: int, active: bool, steps_made: int = 0) -> None:
        self.writer: SummaryWriter | None = None
        self.bar = tqdm(
            initial=steps_made, total=total_steps, unit="step", disable=not active, dynamic_ncols=True, mininterval=1.0
        )
        self.history: list[Tensor] = []
        self._logged, self._stride = 0, 1
        if active and folder is not None:
            purged = steps_made + 1 if steps_made else 0  # step 0 is measured at the start only
            with self._events():
                self.writer = SummaryWriter(str(folder), purge_step=purged)

    @contextmanager
    def _events(self) -> Iterator[None]:
        """Do without events from here on where they cannot be written: no run ends for them, on one rank alone."""
        try:
            yield
        except OSError as problem:
            self.writer = None
            self.say(f"TensorBoard's events are written no more: {problem}")

    def progress(self, step: int, *, loss: float, remaining: float, tokens_per_second: float) -> None:
        """Move the progress bar to a step."""
        self.bar.update(step - self.bar.n)
        self.bar.set_postfix_str(
            f"loss {loss:.3f}, remaining {remaining:.1%}, {tokens_per_second:,.0f} tokens/s", refresh=False
        )

    def scalars(self, step: int, values: Mapping[str, float]) -> None:
        """Write numbers by tag."""
        if self.writer is not None:
            with self._events():
                for tag, value in values.items():
                    self.writer.add_scalar(tag, value, step)

    def layers(self, step: int, names: Sequence[str], *, masks: Sequence[Tensor], scores: Sequence[Tensor]) -> None:
        """Write the kept share of every layer by name, a heat map of it over time, and histograms of the scores."""
        if self.writer is None:
            return
        kept = torch.tensor([float(mask.float().mean()) for mask in masks])
        if self._logged % self._stride == 0:
            self.history.append(kept)
        self._logged += 1
        if len(self.history) > POINTS:  # every second one stays, so that a long run does not draw ever larger pictures
            self.history, self._stride = self.history[::2], 2 * self._stride
        with self._events():
            for name, share, score in zip(names, kept, scores, strict=True):
                self.writer.add_scalar(f"kept/{name}", float(share), step)
                self.writer.add_histogram(f"scores/{name}", score.float().cpu().clamp(-LARGEST, LARGEST), step)
            self.writer.add_image("kept/layers_over_time", heat_map(torch.stack(self.history, 1)), step)

    def say(self, message: str) -> None:
        """Print a line above the progress bar."""
        if not self.bar.disable:
            self.bar.write(message)

    def close(self) -> None:
        """Finish bar and files."""
        self.bar.close()
        if self.writer is not None:
            with self._events():
                self.writer.close()


def heat_map(shares: Tensor) -> Tensor:
    """Draw shares in [0, 1] as colors: dark violet 0, green 0.5, yellow 1.

    Args:
        shares: (L, P) layers from top to bottom, points in time from left to right.

    Returns:
        (3, L * CELL, P * CELL) uint8.
    """
    position = shares.clamp(0, 1) * (len(COLORS) - 1)
    lower = position.floor().clamp(max=len(COLORS) - 2).long()
    colors = torch.lerp(COLORS[lower], COLORS[lower + 1], (position - lower)[..., None])
    return colors.byte().permute(2, 0, 1).repeat_interleave(CELL, 1).repeat_interleave(CELL, 2)
