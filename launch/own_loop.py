"""Pruning added to a DeepSpeed loop of one's own: the lines with `pruner` are all there is to add.

deepspeed --num_accelerators 2 launch/own_loop.py MODEL_FOLDER OUTPUT_FOLDER
"""

import argparse
from typing import Any

import deepspeed
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer
from transformers.integrations import HfDeepSpeedConfig

import scale_prune

STEPS = 30
DS_CONFIG = {
    "train_micro_batch_size_per_gpu": 2,
    "optimizer": {"type": "AdamW", "params": {"lr": 5e-4, "torch_adam": True}},
    "zero_optimization": {"stage": 3},
    "steps_per_print": 1_000_000,
}


def make_engine(module: torch.nn.Module) -> Any:
    return deepspeed.initialize(model=module, model_parameters=list(module.parameters()), config=DS_CONFIG)[0]


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("model")
    parser.add_argument("output")
    parser.add_argument("--local_rank", type=int, default=0)
    args = parser.parse_args()

    deepspeed.init_distributed()
    keep_alive = HfDeepSpeedConfig(DS_CONFIG)  # from_pretrained then loads straight into shards
    model = AutoModelForCausalLM.from_pretrained(args.model)
    del keep_alive
    engine = make_engine(model)
    pruner = scale_prune.attach(engine, scale_prune.PruningConfig(criterion="gum", remaining=0.5), total_steps=STEPS)

    torch.manual_seed(deepspeed.comm.get_rank())
    for _ in range(STEPS):
        tokens = torch.randint(model.config.vocab_size, (2, 16), device=engine.device)  # your data here
        loss = engine(input_ids=tokens, labels=tokens, use_cache=False).loss
        engine.backward(loss)
        pruner.after_backward()
        engine.step()
        pruner.after_step()

    engine = scale_prune.compact(pruner, make_engine)
    scale_prune.save(engine, args.output, tokenizer=AutoTokenizer.from_pretrained(args.model))
    if deepspeed.comm.get_rank() == 0:
        print(f"kept {pruner.widths} neurons a layer; the model is in {args.output}")
    deepspeed.comm.destroy_process_group()


if __name__ == "__main__":
    main()
