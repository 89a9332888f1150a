"""What DeepSpeed and torch say that no user can act on."""

import logging
import warnings


def quieten() -> None:
    """Leave warnings and errors, drop DeepSpeed's chatter and torch's notes on collectives that DeepSpeed calls."""
    chatter = logging.getLogger("DeepSpeed")
    chatter.setLevel(logging.WARNING)
    chatter.addFilter(_is_news)
    warnings.filterwarnings("ignore", category=FutureWarning, module=r"torch\.distributed|deepspeed")


def _is_news(record: logging.LogRecord) -> bool:
    return "before it has started" not in record.getMessage()  # said of every scheduler that is made
