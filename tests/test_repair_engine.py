"""The repair on real ZeRO-3 engines: the same for every number of ranks, and exact where it can be."""

from pathlib import Path
from typing import Any

import pytest
import torch
from distributed import run_ranks
from engines import ds_config, saved_model
from models import VOCABULARY
from torch import Tensor
from transformers import AutoModelForCausalLM

from scale_prune.models import Gates, recompute_in_training, recomputing, unit_groups
from scale_prune.pruning import Calibration, takeovers_of
from scale_prune.zero3 import FrozenEngine, Zero3Backend, inference_engine, load_model, repair_weights, training_engine

DAMPING, ROWS = 1e-3, 12
FAMILIES = ("gpt_neo", "gpt2", "llama")


def repaired(folder: str, repair: str, trains: bool) -> dict[str, Any]:
    """Remove every second unit of every group; return Gram matrices, weights and logits. On one rank or more."""
    config = ds_config(train_micro_batch_size_per_gpu=None)
    del config["train_micro_batch_size_per_gpu"]
    model = load_model(folder, config)
    engine = training_engine(model, config) if trains else inference_engine(model, config)
    backend, groups = Zero3Backend(engine), unit_groups(model)
    engine.eval()
    rows = torch.randint(VOCABULARY, (ROWS, 7), generator=torch.Generator().manual_seed(0))
    own = rows.chunk(backend.world_size)[backend.rank]
    calibration = Calibration(backend, groups)
    with torch.no_grad(), calibration.watching():
        for part in own.split(2):
            engine(input_ids=part, use_cache=False)
    masks = [torch.arange(group.num_units) % 2 > 0 for group in groups]
    if repair != "none":
        takeovers = takeovers_of(calibration, masks, repair, lambda features: DAMPING)
        repair_weights(backend, groups, masks, takeovers)
    for group, mask in zip(groups, masks, strict=True):
        backend.mask_working_copy(group, mask)
    with torch.no_grad():
        logits = engine(input_ids=rows, use_cache=False).logits.float()
    return {"grams": calibration.grams, "logits": logits, "weights": dict(backend.named_tensors())}


def there_and_back(folder: str, trains: bool, checkpointing: bool) -> tuple[dict[int, Tensor], dict[int, Tensor], int]:
    """Return Gram matrices of activations and of the gradients of tokens' losses, and how often a projection ran."""
    config = ds_config()
    model = load_model(folder, config)
    if checkpointing:
        recompute_in_training(model)
    engine = training_engine(model, config) if trains else inference_engine(model, config)
    backend = Zero3Backend(engine)
    calibration, runs = Calibration(backend, unit_groups(engine.module)), list[None]()
    last = engine.module.get_submodule(calibration.groups[-1].output)
    last.register_forward_pre_hook(lambda module, args: runs.append(None))
    embedded: list[Tensor] = []
    engine.module.get_input_embeddings().register_forward_hook(lambda module, args, output: embedded.append(output))
    engine.eval()
    rows = torch.randint(VOCABULARY, (ROWS, 7), generator=torch.Generator().manual_seed(0))
    with calibration.watching(), calibration.watching_gradients(), recomputing(engine.module):
        for part in rows.chunk(backend.world_size)[backend.rank].split(2):
            loss = engine.module(input_ids=part, labels=part, use_cache=False).loss
            torch.autograd.grad(loss * 2 * 6, embedded.pop())
    return calibration.grams, calibration.output_grams, len(runs)


@pytest.mark.distributed
@pytest.mark.parametrize("model_type", FAMILIES)
def test_gradients_are_those_of_plain_autograd(tmp_path: Path, model_type: str) -> None:
    folder = str(saved_model(tmp_path, model_type))
    model: Any = AutoModelForCausalLM.from_pretrained(folder).eval()
    inputs: dict[int, Tensor] = {}
    outputs: dict[int, Tensor] = {}
    for index, group in enumerate(unit_groups(model)):
        module = model.get_submodule(group.output)
        module.register_forward_hook(lambda _, args, output, index=index: outputs.update({index: output}))
        module.register_forward_hook(lambda _, args, output, index=index: inputs.update({index: args[0].detach()}))
    rows = torch.randint(VOCABULARY, (ROWS, 7), generator=torch.Generator().manual_seed(0))
    loss = model(input_ids=rows, labels=rows, use_cache=False).loss * ROWS * 6
    gradients = torch.autograd.grad(loss, list(outputs.values()))
    for world_size, trains, checkpointing in ((1, False, False), (2, True, True), (3, False, True)):
        ranks = run_ranks(there_and_back, world_size, folder, trains, checkpointing)
        for index, gradient in enumerate(gradients):
            grams, output_grams, runs = ranks[index % world_size]
            assert runs == ROWS // 2 // world_size * (1 + checkpointing), "it was not recomputed"
            for values, by_group in ((gradient, output_grams), (inputs[index], grams)):
                by_token = values.reshape(-1, values.shape[-1])
                expected, size = by_token.T @ by_token, float(by_token.square().sum())
                found = by_group[index][: len(expected), : len(expected)]  # the last feature is the bias's 1
                torch.testing.assert_close(found, expected, rtol=1e-3, atol=1e-5 * size)


def redundancy(folder: str) -> list[float]:
    """Compare what goes into layers with what comes out, of rows of two lengths."""
    config = ds_config()
    engine = inference_engine(load_model(folder, config), config)
    backend = Zero3Backend(engine)
    rows = torch.randint(VOCABULARY, (ROWS, 7), generator=torch.Generator().manual_seed(0))
    calibration = Calibration(backend, unit_groups(engine.module), portion=(), redundancy=True)
    with torch.no_grad(), calibration.watching():
        for part in rows.chunk(backend.world_size)[backend.rank].split(2):
            mask = torch.ones_like(part)
            mask[0, 4:] = 0
            engine(input_ids=part, attention_mask=mask, use_cache=False)
    return calibration.redundancy()


@pytest.mark.distributed
@pytest.mark.parametrize("model_type", FAMILIES)
def test_redundancy_is_that_of_the_hidden_states(tmp_path: Path, model_type: str) -> None:
    folder = str(saved_model(tmp_path, model_type))
    alone, *others = (run_ranks(redundancy, world_size, folder)[0] for world_size in (1, 2, 3))
    rows = torch.randint(VOCABULARY, (ROWS, 7), generator=torch.Generator().manual_seed(0))
    mask = torch.ones_like(rows)
    mask[::2, 4:] = 0
    model: Any = AutoModelForCausalLM.from_pretrained(folder).eval()
    outputs: dict[int, tuple[Tensor, Tensor]] = {}
    for index, group in enumerate(unit_groups(model)):
        layer = model.get_submodule(group.output.rpartition(".mlp.")[0])
        layer.register_forward_hook(lambda _, args, output, index=index: outputs.update({index: (args[0], output)}))
    with torch.no_grad():
        model(input_ids=rows, attention_mask=mask, use_cache=False)
    for index, (before, after) in outputs.items():
        cosines = torch.cosine_similarity(before, after[0] if isinstance(after, tuple) else after, dim=-1)
        assert alone[index] == pytest.approx(float(cosines[mask.bool()].mean()), abs=1e-5)
    for each in others:
        assert each == pytest.approx(alone, abs=1e-5)


@pytest.mark.distributed
@pytest.mark.parametrize("model_type", FAMILIES)
@pytest.mark.parametrize("trains", [True, False])
def test_any_number_of_ranks_repairs_alike(tmp_path: Path, model_type: str, trains: bool) -> None:
    folder = str(saved_model(tmp_path, model_type))
    alone = run_ranks(repaired, 1, folder, "least_squares", trains)[0]
    for world_size in (2, 3):
        together = run_ranks(repaired, world_size, folder, "least_squares", trains)
        for index, gram in alone["grams"].items():
            torch.testing.assert_close(together[index % world_size]["grams"][index], gram)
        for name, weight in alone["weights"].items():
            torch.testing.assert_close(together[0]["weights"][name], weight, rtol=1e-3, atol=1e-3)
        for rank in together:
            torch.testing.assert_close(rank["logits"], alone["logits"], rtol=1e-3, atol=1e-3)


def twins(folder: Path) -> Path:
    """Give every second unit of a saved model the activation of its neighbor; what it writes stays its own."""
    model: Any = AutoModelForCausalLM.from_pretrained(folder)
    tensors = dict(model.named_parameters())
    for group in unit_groups(model):
        goes = torch.arange(0, group.num_units, 2)
        stays = torch.where(goes + 1 < group.num_units, goes + 1, goes - 1)
        for member in group.members:
            if member.role != "out":
                values = tensors[member.name].data
                values.index_copy_(member.dim, goes, values.index_select(member.dim, stays))
    model.save_pretrained(folder)
    return folder


def before_and_after(folder: str, repair: str, gated: bool) -> tuple[Tensor, Tensor]:
    """Return the logits with all units, and without every second one."""
    config = ds_config()
    model = load_model(folder, config)
    engine = FrozenEngine(model, config) if gated else training_engine(model, config)
    backend, groups = Zero3Backend(engine), unit_groups(model)
    if gated:  # no two twins have the same gate
        line = torch.linspace(0.3, 1.7, sum(group.num_units for group in groups))
        Gates(model, groups).put_on(line, lambda: line)
    engine.eval()
    rows = torch.randint(VOCABULARY, (ROWS, 7), generator=torch.Generator().manual_seed(0))
    calibration = Calibration(backend, groups)
    with torch.no_grad(), calibration.watching():
        dense = engine(input_ids=rows, use_cache=False).logits.float()
    masks = [torch.arange(group.num_units) % 2 > 0 for group in groups]
    if repair != "none":
        repair_weights(backend, groups, masks, takeovers_of(calibration, masks, repair, lambda features: 1e-7))
    for group, mask in zip(groups, masks, strict=True):
        backend.mask_working_copy(group, mask)
    with torch.no_grad():
        return dense, engine(input_ids=rows, use_cache=False).logits.float()


@pytest.mark.distributed
@pytest.mark.parametrize("gated", [False, True])
@pytest.mark.parametrize("model_type", FAMILIES)
def test_what_leaves_twins_behind_changes_nothing(tmp_path: Path, model_type: str, gated: bool) -> None:
    """With gates the repair is of what they let through, as the model has it that they are multiplied into."""
    folder = str(twins(saved_model(tmp_path, model_type)))
    for repair, exact in (("least_squares", True), ("none", False)):
        for dense, smaller in run_ranks(before_and_after, 2, folder, repair, gated):
            worst = float((smaller - dense).abs().max() / dense.abs().max())
            assert (worst < 1e-3) == exact, worst
