"""What TensorBoard is given, without a run."""

from pathlib import Path

import pytest
import torch
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from scale_prune.run.monitor import POINTS, Monitor


def test_scores_of_any_size_have_a_histogram(tmp_path: Path) -> None:
    monitor = Monitor(tmp_path, total_steps=3, active=True)
    scores = [torch.full((5,), 1e38), torch.tensor([-3e38, 0.0, 1.0, 2.0, 3e38])]
    monitor.layers(1, ["layer_00", "layer_01"], masks=[torch.ones(5, dtype=torch.bool)] * 2, scores=scores)
    monitor.close()
    events = EventAccumulator(str(tmp_path)).Reload()
    for layer in range(2):
        (found,) = events.Histograms(f"scores/layer_{layer:02d}")
        assert found.histogram_value.num == 5


def test_the_map_of_a_long_run_keeps_its_points_few_and_evenly_apart(tmp_path: Path) -> None:
    monitor = Monitor(tmp_path, total_steps=3, active=True)
    for step in range(5 * POINTS):
        mask = torch.arange(5 * POINTS) < step
        monitor.layers(step, ["layer_00"], masks=[mask], scores=[torch.ones(3)])
        assert len(monitor.history) <= POINTS
    monitor.close()
    kept = torch.stack(monitor.history).flatten()
    assert len(kept) > POINTS / 2
    torch.testing.assert_close(kept.diff(), torch.full((len(kept) - 1,), 8 / (5 * POINTS)))


def test_events_that_cannot_be_written_end_no_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def full(*args: object) -> None:
        raise OSError("No space left on device")

    monitor = Monitor(tmp_path, total_steps=3, active=True)
    monkeypatch.setattr(monitor.writer, "add_scalar", full)
    for step in (1, 2):
        monitor.scalars(step, {"loss": 1.0})
    monitor.close()
    assert capsys.readouterr().out.count("No space left on device") == 1
