"""The model card: what an exported folder says of itself."""

from collections.abc import Mapping, Sequence
from importlib.metadata import version
from typing import Any

from scale_prune.core import UnitGroup
from scale_prune.export.layouts import needs_code

TRUST = ", trust_remote_code=True"


def model_card(
    settings: Mapping[str, Any], *, groups: Sequence[UnitGroup], layout: str, loader: str = "AutoModelForCausalLM"
) -> str:
    """Say in the exported folder's README how the model was made and how it is loaded."""
    code = TRUST if needs_code(layout) else ""
    lines = [
        "---",
        "library_name: transformers",
        "tags: [pruned, structured-pruning, scale_prune]",
        "---",
        "",
        f"# {settings['model']}, structurally pruned",
        "",
        f"{_REMOVED[groups[0].kind]} of {settings['model']} were removed while it was fine-tuned under DeepSpeed "
        f"ZeRO-3. What is left: {', '.join(str(group.num_units) for group in groups)}.",
        "",
        "```python",
        f"from transformers import {loader}, AutoTokenizer",
        "",
        f'model = {loader}.from_pretrained("PATH"{code})',
        'tokenizer = AutoTokenizer.from_pretrained("PATH")',
        "```",
        "",
        "## Settings",
        "",
        *(f"- {name}: {value}" for name, value in settings.items() if value is not None),
        "",
        f"Made with scale_prune {version('scale_prune')}.",
    ]
    return "\n".join(lines) + "\n"


_REMOVED = {"neuron": "MLP neurons", "component": "Rank-1 components of weights"}


def in_other_layout(card: str, layout: str) -> str:
    """Return a card that says how the folder is loaded in another layout."""
    card = card.replace(TRUST, "")
    code = TRUST if needs_code(layout) else ""
    return card.replace('from_pretrained("PATH")', f'from_pretrained("PATH"{code})', 1)
