"""How few tokens and units tell the order of units: scores by samples beside scores by everything.

    python benchmarks/sampling.py --model smollm2 --text wikitext2_train.txt.gz --tokens 16384

One process. Spearman's correlation between the order by a sample and the order by all tokens and all units, mean and
least over layers; then what each takes for one layer of `--wide` units, with random activations. `benchmarks/scale.md`
has the result.
"""

import argparse
import gzip
import time
from collections.abc import Callable
from itertools import islice

import torch
from einops import rearrange
from scipy.stats import spearmanr
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer

from scale_prune.core.repair import elimination_scores
from scale_prune.core.similarity import similarity_of_live
from scale_prune.models import unit_groups
from scale_prune.system import markdown_table, versions

BLOCK, DAMPING, ROUNDS = 256, 1e-3, 16
FEWER_TOKENS, FEWER_UNITS = (256, 1024, 4096), (8, 4, 2)
Score = Callable[[Tensor], Tensor]


def main() -> None:
    args = parse()
    torch.manual_seed(0)
    layers = activations(args)
    samples: dict[str, Score] = {f"{tokens:,} tokens": similar_in(tokens) for tokens in FEWER_TOKENS}
    samples |= {f"compared with one of {part} units": similar_to(part) for part in FEWER_UNITS}
    exact = [similarity(h) for h, _ in layers]
    rows = [told("similarity", name, exact, [score(h) for h, _ in layers]) for name, score in samples.items()]
    exact = [second_order(h, weight) for h, weight in layers]
    for tokens in FEWER_TOKENS:
        fewer = [second_order(some_tokens(h, tokens), weight) for h, weight in layers]
        rows.append(told("obs", f"{tokens:,} tokens", exact, fewer))
    print("\n".join(markdown_table(["score", "by", "mean", "least"], rows, texts=2)))

    wide = torch.randn(1024, args.wide)
    costs = {"similarity": similarity, "similarity to one of 8 units": similar_to(8), "Gram matrix": lambda h: h.T @ h}
    rows = [[name, f"{seconds(cost, wide):.2f}"] for name, cost in costs.items()]
    print(f"\n1,024 tokens of {args.wide:,} units, {torch.get_num_threads()} threads:\n")
    print("\n".join(markdown_table(["what", "seconds"], rows)))
    print("\n" + ", ".join(f"{package} {number}" for package, number in versions().items()) + ".")


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", required=True)
    parser.add_argument("--text", required=True, help="gzipped text")
    parser.add_argument("--tokens", type=int, default=16384)
    parser.add_argument("--wide", type=int, default=16384)
    return parser.parse_args()


@torch.no_grad()
def activations(args: argparse.Namespace) -> list[tuple[Tensor, Tensor]]:
    """Return (tokens, N) bfloat16 activations and the (D, N) float32 weight that reads them, layer by layer."""
    tokenizer = AutoTokenizer.from_pretrained(args.model)
    with gzip.open(args.text, "rt", encoding="utf-8") as file:
        ids = tokenizer("".join(islice(file, args.tokens)))["input_ids"][: args.tokens]
    model = AutoModelForCausalLM.from_pretrained(args.model, dtype=torch.bfloat16).eval()
    outputs = [model.get_submodule(group.output) for group in unit_groups(model)]
    seen: list[list[Tensor]] = [[] for _ in outputs]
    for output, kept in zip(outputs, seen, strict=True):
        output.register_forward_pre_hook(lambda module, given, kept=kept: kept.append(given[0]))
    for rows in torch.tensor(ids).view(-1, BLOCK).split(8):
        model(rows, use_cache=False)
    tokens = [rearrange(torch.cat(kept), "... unit -> (...) unit") for kept in seen]
    return [(h, output.weight.float()) for h, output in zip(tokens, outputs, strict=True)]


def some_tokens(h: Tensor, tokens: int) -> Tensor:
    """Return that many rows, drawn at random, of (T, N)."""
    return h[torch.randperm(len(h))[:tokens]]


def similarity(h: Tensor) -> Tensor:
    """Return (N,) the mean absolute cosine to all other units."""
    num_units = h.shape[1]
    return similarity_of_live(h.float(), torch.ones(num_units, dtype=torch.bool), 0, num_units)


def similarity_to(others: Tensor, h: Tensor) -> Tensor:
    """Return (N,) the mean absolute cosine to some of the units."""
    unit = torch.nn.functional.normalize(h.float(), dim=0)
    cosines = (unit[:, others].T @ unit).abs()
    cosines[torch.arange(len(others)), others] = 0.0
    return cosines.mean(0)


def similar_in(tokens: int) -> Score:
    return lambda h: similarity(some_tokens(h, tokens))


def similar_to(part: int) -> Score:
    return lambda h: similarity_to(torch.randperm(h.shape[1])[: h.shape[1] // part], h)


def second_order(h: Tensor, weight: Tensor) -> Tensor:
    gram = sum(rows.float().T @ rows.float() for rows in h.split(1024))
    assert isinstance(gram, Tensor)
    return elimination_scores(gram, weight, damping=DAMPING, rounds=ROUNDS)


def told(score: str, name: str, exact: list[Tensor], sampled: list[Tensor]) -> list[str]:
    found = [float(spearmanr(whole, some).statistic) for whole, some in zip(exact, sampled, strict=True)]
    return [score, name, f"{sum(found) / len(found):.3f}", f"{min(found):.3f}"]


def seconds(score: Score, h: Tensor) -> float:
    score(h[:, :1024])
    begun = time.perf_counter()
    score(h)
    return time.perf_counter() - begun


if __name__ == "__main__":
    main()
