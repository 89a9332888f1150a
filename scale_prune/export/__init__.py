"""The pruned model as a Hugging Face folder."""

from scale_prune.export.card import model_card, public_name
from scale_prune.export.conversion import FORMS, check_gguf, convert, open_folder
from scale_prune.export.factors import multiplies_out
from scale_prune.export.gguf_tensors import TYPES as GGUF_TYPES
from scale_prune.export.heads import fitting_heads, plainest, tells_heads
from scale_prune.export.layouts import AUTO, GGUF, LAYOUTS, check_layout, check_width_key, needs_code, resolve_layout
from scale_prune.export.writing import Export
