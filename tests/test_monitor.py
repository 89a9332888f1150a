"""What TensorBoard is given, without a run."""

from pathlib import Path

import torch
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from scale_prune.run.monitor import Monitor


def test_scores_of_any_size_have_a_histogram(tmp_path: Path) -> None:
    monitor = Monitor(tmp_path, total_steps=3, active=True)
    scores = [torch.full((5,), 1e38), torch.tensor([-3e38, 0.0, 1.0, 2.0, 3e38])]
    monitor.layers(1, masks=[torch.ones(5, dtype=torch.bool)] * 2, scores=scores)
    monitor.close()
    events = EventAccumulator(str(tmp_path)).Reload()
    for layer in range(2):
        (found,) = events.Histograms(f"scores/layer_{layer:02d}")
        assert found.histogram_value.num == 5
