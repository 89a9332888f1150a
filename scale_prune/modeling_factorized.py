"""A causal language model some of whose linear maps are products of two smaller ones.

Written beside a pruned model's weights, for `from_pretrained(folder, trust_remote_code=True)`. It is the model of
`transformers` in everything else. The ranks stand in config.json, under `factorized`.
"""

from collections import OrderedDict
from typing import Any

from torch import nn
from transformers import GPTNeoConfig, GPTNeoForCausalLM


class FactorizedGPTNeoForCausalLM(GPTNeoForCausalLM):
    _auto_class = "AutoModelForCausalLM"  # makes save_pretrained copy this file along

    def __init__(self, config: GPTNeoConfig) -> None:
        super().__init__(config)
        ranks: dict[str, int] = config.to_dict()["factorized"]
        for name, rank in ranks.items():
            parent, _, child = name.rpartition(".")
            setattr(self.get_submodule(parent), child, _factors(self.get_submodule(name), rank))
        self.post_init()


def _factors(linear: Any, rank: int) -> nn.Sequential:
    # The second names are those of the Conv1D of transformers.
    d_in = linear.in_features if hasattr(linear, "in_features") else linear.nx
    d_out = linear.out_features if hasattr(linear, "out_features") else linear.nf
    up = nn.Linear(rank, d_out, bias=linear.bias is not None)
    return nn.Sequential(OrderedDict(down=nn.Linear(d_in, rank, bias=False), up=up))
