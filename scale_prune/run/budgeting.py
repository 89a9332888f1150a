"""What the layers deserve, measured: how far the model's predictions move when one group alone loses units."""

from collections.abc import Sequence
from itertools import islice
from typing import Any

import torch
from torch import Tensor

from scale_prune.core import LevelTable, levels_of, top_mask
from scale_prune.pruning import Calibration, takeovers_of
from scale_prune.run.calibrating import calibration_text
from scale_prune.run.run import Run
from scale_prune.zero3 import tried

TABLE = "table.json"
MEASURED_TOKENS = 4096  # at least, if the calibration text has as many: every level of every group reads them


class Comparison:
    """A part of the calibration text, and what the dense model predicts there. Making one is a collective.

    A rank keeps the logits of its part on the host: 2 bytes a token and word of the vocabulary.

    Args:
        run: the run, before anything has left.
    """

    def __init__(self, run: Run) -> None:
        self.run, self.engine = run, run.student.engine
        accumulation = self.engine.gradient_accumulation_steps()
        in_a_step = int(run.inputs.ds_config["train_batch_size"]) * run.config.data.block_size
        passes = accumulation * -(-MEASURED_TOKENS // in_a_step)
        self.batches = list(islice(calibration_text(self.engine, run.inputs, run.task), passes))
        self.dense = [self._logits(batch).to("cpu", torch.bfloat16) for batch in self.batches]

    def loss(self) -> float:
        """Return the mean divergence of the model as it is from the dense one, over all ranks. A collective."""
        task, total = self.run.task, 0.0
        for batch, dense in zip(self.batches, self.dense, strict=True):
            logits, labels = self._logits(batch), batch.inputs["labels"].to(self.engine.device)
            divergence = task.divergence(logits, dense.to(logits), labels, 1.0)
            total += float(divergence * batch.weight) / len(self.batches)
        runtime = self.run.runtime
        return float(runtime.add_over_ranks(torch.tensor(total, dtype=torch.float64))) / runtime.world_size

    @torch.no_grad()
    def _logits(self, batch: Any) -> Tensor:
        logits: Tensor = self.engine(**{**batch.to(self.engine.device), **self.run.task.options, "labels": None}).logits
        return logits


def measure_levels(run: Run, calibration: Calibration | None, scores: Sequence[Tensor]) -> LevelTable:
    """Measure every level of every group, each repaired as the run repairs. A collective.

    What moves in one forward pass: the parameters, and what the repair of one weight moves.

    Args:
        run: the run, before anything has left.
        calibration: with Gram matrices, where the run repairs.
        scores: (N,) a group; the highest stay.
    """
    student, pruning = run.student, run.config.pruning
    with run.progress.seconds.measure("budget"):
        student.engine.eval()
        comparison, losses = Comparison(run), []
        whole = [torch.ones_like(group, dtype=torch.bool) for group in scores]
        for index, group in enumerate(student.groups):
            own = []
            for kept in levels_of(group.num_units)[:-1]:
                masks = [*whole[:index], top_mask(scores[index], kept), *whole[index + 1 :]]
                takeovers = None
                if calibration is not None and pruning.repair != "none":
                    takeovers = takeovers_of(calibration, masks, str(pruning.repair), pruning.repair_damping)
                with tried(student.backend, student.groups, masks, takeovers):
                    own.append(comparison.loss())
            losses.append([*own, 0.0])
            run.monitor.say(f"{group.name}: {', '.join(f'{loss:.4f}' for loss in own)}")
        student.engine.empty_partition_cache()
        student.engine.train()
    return LevelTable.of(student.groups, losses)
