"""Rows to tokens to batches."""

from scale_prune.data.batches import TokenBlocks, assigned, training_batches, validation_batches
from scale_prune.data.beginnings import bos_of, continuing, with_bos
from scale_prune.data.embedded import build
from scale_prune.data.forms import FORMS, Template, columns_of, templates_of, with_templates
from scale_prune.data.inputs import SELF, Inputs, calibration_steps, check_tokens
from scale_prune.data.rows import SPLITS, Split, Text, load_text, say
from scale_prune.data.text import prepare
from scale_prune.data.tokens import Pieces, Tokens, tokenized
