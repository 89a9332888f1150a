"""What DeepSpeed, torch and transformers say that no user can act on."""

import logging
import warnings


def quieten() -> None:
    """Leave warnings and errors, drop DeepSpeed's chatter and torch's notes on collectives that DeepSpeed calls."""
    logging.getLogger("DeepSpeed").setLevel(logging.WARNING)
    for speaker in ("DeepSpeed", "transformers.integrations.heterogeneity.configuration_utils"):
        logging.getLogger(speaker).addFilter(_is_news)
    warnings.filterwarnings("ignore", category=FutureWarning, module=r"torch\.distributed|deepspeed")


def _is_news(record: logging.LogRecord) -> bool:
    """Tell whether it is anything but what is said of every scheduler that is made, or every config by layer."""
    said = record.getMessage()
    return "before it has started" not in said and "Reading global config value for per-layer" not in said
