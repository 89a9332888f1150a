"""One run: the start, the loop, its stages, what is measured on the way, and what it leaves."""

from scale_prune.run.output import drop_replaced
from scale_prune.run.start import embedded_default, prune
