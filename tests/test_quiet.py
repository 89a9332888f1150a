"""What no user can act on is not said, and everything else is."""

import logging

import pytest
from transformers import LlamaConfig

from scale_prune.zero3.quiet import quieten

TRANSFORMERS = logging.getLogger("transformers.integrations.heterogeneity.configuration_utils")
DEEPSPEED = logging.getLogger("DeepSpeed")


def test_only_news_are_said(caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(logging.Logger, "warning_once", logging.Logger.warning)  # it may have spoken before
    for speaker in (TRANSFORMERS, DEEPSPEED):
        monkeypatch.setattr(speaker, "handlers", [caplog.handler])
        monkeypatch.setattr(speaker, "filters", [])
        monkeypatch.setattr(speaker, "propagate", False)
        caplog.set_level(logging.WARNING, logger=speaker.name)
    config = LlamaConfig(num_hidden_layers=2)
    config.allow_global_per_layer_attribute_access = True
    config.per_layer_config = {0: {"intermediate_size": 5}}
    assert config.intermediate_size
    assert "per-layer attribute `intermediate_size`" in caplog.text
    quieten()
    caplog.clear()
    assert config.intermediate_size
    DEEPSPEED.warning("Attempting to get learning rate from scheduler before it has started")
    assert not caplog.text
    for speaker in (TRANSFORMERS, DEEPSPEED):
        speaker.warning("a disk is slow")
    assert caplog.messages == ["a disk is slow"] * 2
