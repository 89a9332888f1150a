"""The pruned model as a Hugging Face folder."""

from scale_prune.export.card import model_card
from scale_prune.export.layouts import check_layout, check_width_key, resolve_layout
from scale_prune.export.writing import Export
