"""Finished models: how good they are, how fast, and what is inside them."""

from scale_prune.inspection.analysis import GroupAnalysis, Sampling, analyze
from scale_prune.inspection.analysis_figures import draw_all
from scale_prune.inspection.analysis_tables import as_json
from scale_prune.inspection.finished_models import add_models, positive, read_models
from scale_prune.inspection.gguf_model import GgufModel, is_gguf
from scale_prune.inspection.latency import speeds
