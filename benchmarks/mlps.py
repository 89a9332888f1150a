"""Time MLPs alone at fewer neurons, by turns: what of their arithmetic comes back as time. benchmarks/latency.md.

    OMP_NUM_THREADS=1 python benchmarks/mlps.py

A width has as many copies as a model has layers, so that weights come from memory and not from a cache.
"""

import time
from statistics import median

import torch
from torch import nn
from transformers import GPTNeoConfig, LlamaConfig
from transformers.models.gpt_neo.modeling_gpt_neo import GPTNeoMLP
from transformers.models.llama.modeling_llama import LlamaMLP

from scale_prune.system import markdown_table

LAYERS, ROUNDS, WARM_UP = 24, 10, 2
SHARES = (1.0, 0.75, 0.5, 0.25)
MODELS = {"SmolLM2-135M": (576, 1536), "GPT-Neo-125M": (768, 3072)}


@torch.no_grad()
def main() -> None:
    rows = []
    for name, (hidden, neurons) in MODELS.items():
        mlps = {share: [mlp_of(name, hidden, int(share * neurons)) for _ in range(LAYERS)] for share in SHARES}
        for tokens in (256, 1):
            seconds = timed(mlps, torch.randn(1, tokens, hidden))
            ratios = (f"{seconds[share] / seconds[1.0]:.3f}" for share in SHARES[1:])
            rows.append([name, str(tokens), f"{1000 * seconds[1.0] / LAYERS:.2f}", *ratios])
    header = ["MLPs of", "tokens", "dense, ms a layer", *(f"{share:.0%}" for share in SHARES[1:])]
    print("\n".join(markdown_table(header, rows)))


def mlp_of(name: str, hidden: int, neurons: int) -> nn.Module:
    if name.startswith("GPT-Neo"):
        return GPTNeoMLP(neurons, GPTNeoConfig(hidden_size=hidden)).eval()
    return LlamaMLP(LlamaConfig(hidden_size=hidden, intermediate_size=neurons)).eval()


def timed(mlps: dict[float, list[nn.Module]], x: torch.Tensor) -> dict[float, float]:
    """Return the median seconds of all layers, by the share of the neurons."""
    seconds: dict[float, list[float]] = {share: [] for share in mlps}
    for number in range(WARM_UP + ROUNDS):
        for share in (*SHARES[number % len(SHARES) :], *SHARES[: number % len(SHARES)]):
            begun = time.perf_counter()
            for mlp in mlps[share]:
                mlp(x)
            seconds[share].append(time.perf_counter() - begun)
    return {share: median(each[WARM_UP:]) for share, each in seconds.items()}


if __name__ == "__main__":
    main()
