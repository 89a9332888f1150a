"""Hugging Face's Trainer and an accelerate loop keep the neurons that a loop of one's own keeps."""

import json
import os
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState, PartialState
from accelerate.utils import DeepSpeedPlugin, DummyOptim
from distributed import run_ranks
from engines import LAYERS, saved_model
from models import VOCABULARY, WIDTH, tiny_model, tiny_tokenizer
from torch import Tensor
from torch.utils.data import DataLoader
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    GenerationConfig,
    Trainer,
    TrainerCallback,
    TrainerControl,
    TrainerState,
    TrainingArguments,
    default_data_collator,
)

import scale_prune
from scale_prune.config.settings import PruningConfig
from scale_prune.pruning.pruner import Pruner
from scale_prune.zero3 import load_model, training_engine

pytestmark = pytest.mark.distributed

RANKS, STEPS, SAVED, ACCUMULATED, BATCH = 2, 6, 4, 2, 2
PRUNING = PruningConfig(criterion="gum", remaining=0.4, warmup_fraction=0.2, cooldown_fraction=0.2, similarity_every=2)
COMPONENTS = PruningConfig(criterion="flop", remaining=0.5)
DS_CONFIG = {
    "train_micro_batch_size_per_gpu": BATCH,
    "gradient_accumulation_steps": ACCUMULATED,
    "optimizer": {"type": "AdamW", "params": {"lr": 1e-2, "torch_adam": True}},
    "zero_optimization": {"stage": 3},
    "steps_per_print": 10**9,
}
TOKENS = torch.randint(VOCABULARY, (STEPS * ACCUMULATED * RANKS * BATCH, 7), generator=torch.Generator().manual_seed(0))
ROWS = [{"input_ids": row, "labels": row} for row in TOKENS]


def own_loop(model_folder: Path, output: Path) -> Pruner:
    engine = training_engine(load_model(str(model_folder), DS_CONFIG), DS_CONFIG)
    pruner = scale_prune.attach(engine, PRUNING, total_steps=STEPS)
    for tokens in TOKENS.split(BATCH)[pruner.backend.rank :: RANKS]:
        engine.backward(engine(input_ids=tokens, labels=tokens).loss)
        pruner.after_backward()
        engine.step()
        pruner.after_step()
    scale_prune.save(scale_prune.compact(pruner), output)
    return pruner


def accelerate_loop(model_folder: Path, output: Path) -> Pruner:
    accelerator = Accelerator(deepspeed_plugin=DeepSpeedPlugin(hf_ds_config=DS_CONFIG))
    model = AutoModelForCausalLM.from_pretrained(model_folder)
    rows: Any = ROWS
    optimizer, loader = DummyOptim(list(model.parameters())), DataLoader(rows, batch_size=BATCH)
    model, optimizer, loader = accelerator.prepare(model, optimizer, loader)
    pruner = scale_prune.follow(model, PRUNING, total_steps=STEPS)
    for batch in loader:
        with accelerator.accumulate(model):
            accelerator.backward(model(**batch).loss)
            optimizer.step()
            optimizer.zero_grad()
    scale_prune.save(scale_prune.compact(pruner), output)
    return pruner


def make_trainer(model_folder: Path, output: Path, **more: Any) -> Trainer:
    """Make a Trainer without pruning, of batches in the order of the other loops."""
    settings: dict[str, Any] = {"deepspeed": DS_CONFIG, "lr_scheduler_type": "constant", "save_strategy": "no"} | more
    rows = settings.pop("rows", ROWS)
    arguments = TrainingArguments(
        output_dir=str(output),
        learning_rate=1e-2,
        per_device_train_batch_size=BATCH,
        gradient_accumulation_steps=ACCUMULATED,
        num_train_epochs=1,
        train_sampling_strategy="sequential",
        report_to="none",
        logging_steps=1,
        accelerator_config={"use_configured_state": True},
        **settings,
    )
    model = AutoModelForCausalLM.from_pretrained(model_folder)
    data: dict[str, Any] = {"data_collator": default_data_collator, "train_dataset": rows, "eval_dataset": ROWS}
    return Trainer(model, arguments, processing_class=tiny_tokenizer(), **data)


class Older(TrainerCallback):
    """Sees what is on the disk when the Trainer has removed what is older than its newest checkpoint."""

    def on_save(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """See that the run could go on from the only checkpoint, were it killed now."""
        torch.distributed.barrier()
        (only,) = Path(str(args.output_dir)).glob("checkpoint-*")
        assert json.loads((only / "pruner.json").read_text())["step"] == state.global_step


def trainer_loop(model_folder: Path, output: Path) -> Pruner:
    trainer = make_trainer(model_folder, output, save_strategy="steps", save_steps=SAVED)
    trainer.add_callback(callback := scale_prune.PruningCallback(trainer, PRUNING))
    trainer.train()
    assert trainer.evaluate()["eval_loss"] > 0  # of the pruned model
    return callback.pruner


def resumed_trainer(model_folder: Path, output: Path) -> Pruner:
    trainer = make_trainer(model_folder, output.with_name("trainer_loop"))
    trainer.add_callback(callback := scale_prune.PruningCallback(trainer, PRUNING, output))
    trainer.train(resume_from_checkpoint=str(output.with_name("trainer_loop") / f"checkpoint-{SAVED}"))
    return callback.pruner


def trainer_of_its_own_optimizer(model_folder: Path, output: Path) -> Pruner:
    """Train with the Trainer's optimizer and scheduler, and components in the place of neurons."""
    more = {"deepspeed": {key: value for key, value in DS_CONFIG.items() if key != "optimizer"}}
    saves: dict[str, Any] = {"save_strategy": "steps", "save_steps": 1, "save_total_limit": 1}
    trainer = make_trainer(model_folder, output.with_name("own"), lr_scheduler_type="linear", **more, **saves)
    trainer.add_callback(Older())
    trainer.add_callback(callback := scale_prune.PruningCallback(trainer, COMPONENTS, output))
    trainer.train()
    return callback.pruner


class Passes(TrainerCallback):
    """Notes how many passes the pruner takes each step to have."""

    def __init__(self, callback: Any) -> None:
        self.callback, self.seen = callback, list[int]()

    def on_pre_optimizer_step(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Note it."""
        self.seen.append(self.callback.pruner.backend.accumulation_steps)


def odd_trainer(model_folder: Path, output: Path) -> Pruner:
    """Train where an epoch's last step has fewer passes than the others."""
    trainer = make_trainer(model_folder, output.with_name("odd"), rows=ROWS[: 3 * RANKS * BATCH])
    trainer.add_callback(callback := scale_prune.PruningCallback(trainer, PRUNING, output))
    trainer.add_callback(passes := Passes(callback))
    trainer.train()
    assert passes.seen == [ACCUMULATED, 1]
    return callback.pruner


LOOPS = (own_loop, accelerate_loop, trainer_loop, resumed_trainer, trainer_of_its_own_optimizer, odd_trainer)


def refused(model_folder: Path, output: Path) -> None:
    """See that what cannot be done is refused before the first step."""
    (output / "pruned" / "something").mkdir(parents=True, exist_ok=True)  # all ranks do
    best = {"load_best_model_at_end": True, "eval_strategy": "epoch", "save_strategy": "epoch"}
    cases: list[tuple[dict[str, Any], str]] = [
        ({"deepspeed": DS_CONFIG | {"zero_optimization": {"stage": 2}}}, "stage 2"),
        (best, "load_best_model_at_end"),
        ({}, "pruned holds something"),
    ]
    for settings, words in cases:
        find_ranks()
        trainer = make_trainer(model_folder, output, **settings)
        with pytest.raises(ValueError, match=words):
            scale_prune.PruningCallback(trainer, PRUNING)
    with pytest.raises(ValueError, match=r"accelerator\.prepare returns"):
        scale_prune.follow(trainer.model, PRUNING, total_steps=STEPS)
    trainer.add_callback(scale_prune.PruningCallback(trainer, PRUNING, output / "new"))
    saved = output.with_name("trainer_loop") / f"checkpoint-{SAVED}"
    with pytest.raises(ValueError, match=f"checkpoint-{SAVED} cannot be gone on from: it holds no pruner.json"):
        trainer.train(resume_from_checkpoint=str(saved))
    if trainer.is_world_process_zero():  # another run's of the same step
        told = json.loads((saved / "trainer_state.json").read_text())
        shutil.copytree(saved, other := output / saved.name)
        told["log_history"][0]["loss"] += 1
        (other / "trainer_state.json").write_text(json.dumps(told))
    torch.distributed.barrier()
    find_ranks()
    trainer = make_trainer(model_folder, output)
    trainer.add_callback(scale_prune.PruningCallback(trainer, PRUNING, output / "new"))
    with pytest.raises(ValueError, match="or is not what the Trainer has loaded"):
        trainer.train(resume_from_checkpoint=str(saved))


def find_ranks() -> None:
    """Let accelerate find the ranks without an accelerator, and DeepSpeed, which its launcher would announce."""
    AcceleratorState._reset_state(reset_partial_state=True)
    os.environ["ACCELERATE_USE_DEEPSPEED"] = "true"
    PartialState(backend="gloo")


def masks_of_all(model_folder: Path, output: Path) -> dict[str, list[Tensor]]:
    masks = {}
    for loop in LOOPS:
        find_ranks()
        masks[loop.__name__] = loop(model_folder, output / loop.__name__).masks
    refused(model_folder, output / "refused")
    return masks


def test_trainer_and_accelerate_keep_the_neurons_of_an_own_loop(tmp_path: Path) -> None:
    model_folder = saved_model(tmp_path, "gpt_neo")
    GenerationConfig(do_sample=True, temperature=0.5).save_pretrained(model_folder)
    for masks in run_ranks(masks_of_all, RANKS, model_folder, tmp_path):
        own = masks["own_loop"]
        assert sum(int(mask.sum()) for mask in own) == int(PRUNING.remaining * LAYERS * WIDTH)
        for loop in ("accelerate_loop", "trainer_loop", "resumed_trainer"):
            assert all(map(torch.equal, masks[loop], own)), loop
    folders = [tmp_path / name for name in ("own_loop", "accelerate_loop", "trainer_loop/pruned", "resumed_trainer")]
    models: list[Any] = [AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True) for folder in folders]
    assert models[0].transformer.h[0].mlp.c_fc.out_features < WIDTH
    logits = [model(TOKENS[:2]).logits for model in models]
    for found in logits[1:]:
        torch.testing.assert_close(found, logits[0], rtol=1e-3, atol=1e-3)
    assert {GenerationConfig.from_pretrained(folder).temperature for folder in folders} == {0.5}
    assert len(AutoTokenizer.from_pretrained(folders[2])) == len(tiny_tokenizer())
    components = AutoModelForCausalLM.from_pretrained(tmp_path / "trainer_of_its_own_optimizer", trust_remote_code=True)
    assert components(TOKENS[:2]).logits.isfinite().all()


def test_components_are_made_of_sharded_weights_alone() -> None:
    with pytest.raises(ValueError, match="before from_pretrained"):
        scale_prune.prepare(tiny_model("gpt_neo"), COMPONENTS)
