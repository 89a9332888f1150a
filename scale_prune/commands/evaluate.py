"""The command that measures finished models: `launch/evaluate.py --model FOLDER [--task TASK] [--latency]`."""

import argparse
import gc
import json
import os
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from os.path import expanduser
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM

from scale_prune.config import CLASSIFICATION, Config, load_plugins, parse_some, said_once, settings_where, user_errors
from scale_prune.data import Inputs
from scale_prune.inspection import GgufModel, add_models, harness, is_gguf, positive, read_models, speeds
from scale_prune.models import positions_of
from scale_prune.system import check_writable, json_text, markdown_table, versions, write_atomically
from scale_prune.tasks import make_task
from scale_prune.zero3 import (
    Runtime,
    check_launcher,
    inference_engine,
    joined,
    launched_as,
    load_model,
    release,
    working_dtype,
)

DESCRIPTION = "Measure how good models are at a task on validation data, and how fast they generate."
SPEED = {
    "prefill_ms": "prefill, ms",
    "ms_per_token": "a token, ms",
    "tokens_per_second": "tokens a second",
    "parameters": "parameters",
    "flops_per_token": "FLOPs a token",
    "weight_bytes": "bytes of weights",
    "peak_bytes": "peak bytes",
}
"""What the table calls the numbers of a model's speed."""

LM_EVAL = "lm_eval"
PART = ".part"
RESULT = ("baseline", "models", "flags", "versions")


def main(argv: Sequence[str]) -> None:
    """Run `launch/evaluate.py`; a user's mistake ends in one message a host and exit code 2."""
    rank, world_size = launched_as()
    with user_errors(rank):
        with said_once(speaks=rank == 0):
            config, explicit, own = parse_some(argv, settings_where("commands", "evaluate"), DESCRIPTION, add_own)
        check_launcher()
        load_plugins(config.training.plugin)
        _check_output(own)
        _check_gguf(own, config)
        inputs = read_models(own, config, explicit, world_size, "validation", needs_groups=False)
        if (own.latency or own.lm_eval) and config.task.task == CLASSIFICATION:
            asked = "--latency" if own.latency else "--lm_eval"
            raise ValueError(f"{asked} needs models that write text, not encoders of --task {CLASSIFICATION}")
        if own.latency:
            _check_positions(inputs, own)
        tasks = harness.tasks_of(own, world_size)
        way_out = f"what was measured before is in {own.output}{PART}. " if own.output else ""
        with joined(rank, way_out=way_out) as runtime:
            report: dict[str, dict[str, Any]] = {}
            measure = partial(tasks.measure, runtime=runtime) if tasks is not None else None
            try:
                for _ in _parts(report, inputs, own, runtime, measure):
                    _save(report, inputs, own, runtime)
            finally:
                _show(report, own, runtime)
            if runtime.is_main and own.output:
                os.replace(own.output + PART, own.output)


def add_own(parser: argparse.ArgumentParser) -> None:
    """Add the command's own flags."""
    add_models(parser)
    parser.add_argument("--latency", action="store_true", help="measure speed too, all models by turns, on rank 0")
    parser.add_argument("--batch", type=positive, default=1, help="prompts at once; default: 1")
    parser.add_argument("--prompt_tokens", type=positive, default=64, help="tokens of a prompt; default: 64")
    parser.add_argument("--new_tokens", type=positive, default=32, help="tokens generated after it; default: 32")
    parser.add_argument("--rounds", type=positive, default=5, help="turns of each model, the median counts; default: 5")
    harness.add_flags(parser)
    output = "JSON file for the results; default: they are only printed"
    parser.add_argument("--output", type=expanduser, metavar="FILE", help=output)


def _check_gguf(own: argparse.Namespace, config: Config) -> None:
    """Refuse to ask of a GGUF file what llama.cpp is not asked for here."""
    asked = [f"--task {config.task.task}"] if config.task.task != "lm" else []
    asked += ["--lm_eval"] if own.lm_eval else []
    asked += [f"--batch {own.batch}"] if own.latency and own.batch > 1 else []
    for path in filter(is_gguf, [*([own.baseline] if own.baseline else []), *own.model]):
        if asked:
            raise ValueError(f"{path}: of a GGUF file perplexity and --latency are measured, not {asked[0]}")


def _check_output(own: argparse.Namespace) -> None:
    """Refuse to write the results where nothing can be written, or over anything but earlier ones."""
    if own.output is None:
        return
    check_writable(Path(own.output).parent, f"--output {own.output}")
    for file in (Path(own.output), Path(own.output + PART)):
        if os.path.lexists(file) and not _is_result(file):
            there = "is" if file == Path(own.output) else f"is written as {file} first, which is"
            raise ValueError(f"--output {own.output} {there} there already and no earlier result; give another name")


def _is_result(file: Path) -> bool:
    try:
        return file.is_file() and json.loads(file.read_text(encoding="utf-8")).keys() >= set(RESULT)
    except (OSError, ValueError, AttributeError):
        return False


def _check_positions(inputs: dict[str, Inputs], own: argparse.Namespace) -> None:
    """Refuse to generate past a model's positions."""
    for name, each in inputs.items():
        positions = positions_of(each.model_config)
        if positions is not None and own.prompt_tokens + own.new_tokens > positions:
            raise ValueError(
                f"--prompt_tokens {own.prompt_tokens} and --new_tokens {own.new_tokens} are more than the {positions} "
                f"positions of {name}"
            )


def _parts(
    report: dict[str, dict[str, Any]],
    inputs: dict[str, Inputs],
    own: argparse.Namespace,
    runtime: Runtime,
    measure: Callable[[Inputs], Any] | None,
) -> Iterator[None]:
    """Fill in the report, and yield after each part of it."""
    for name, each in inputs.items():
        report[name] = _measured(each, runtime)
        yield
    if measure is not None:
        for name, each in inputs.items():
            report[name][LM_EVAL] = measure(each)
            yield
    if own.latency and runtime.is_main:  # the others do not wait for it: it may take longer than their patience
        _add_speeds(report, inputs, own, runtime.device)
        yield


def _measured(inputs: Inputs, runtime: Runtime) -> dict[str, float | None]:
    training = inputs.config.training
    task = make_task(inputs, runtime, ("validation",))
    if is_gguf(str(training.model)):
        gguf = GgufModel(str(training.model), inputs.config.data.block_size)
        return {"perplexity": task.measure(gguf, thorough=True).perplexity}
    model = load_model(
        str(training.model), inputs.ds_config, trust_remote_code=training.trust_remote_code, config=task.model_config
    )
    engine = inference_engine(model, inputs.ds_config)
    found = task.measure(engine, thorough=True)
    release(engine)
    return {"perplexity": found.perplexity, **found.metrics}


def _add_speeds(
    report: dict[str, dict[str, Any]], inputs: dict[str, Inputs], own: argparse.Namespace, device: torch.device
) -> None:
    """Load every model whole on one device and measure them in turns."""
    gc.collect()
    models: dict[str, Any] = {}
    for name, each in inputs.items():
        training = each.config.training
        if is_gguf(str(training.model)):
            models[name] = GgufModel(str(training.model), own.prompt_tokens + own.new_tokens)
            continue
        models[name] = AutoModelForCausalLM.from_pretrained(
            str(training.model), dtype=working_dtype(each.ds_config), trust_remote_code=training.trust_remote_code
        )
        models[name].eval().to(device)
    vocabulary = min(each.model_config.get_text_config().vocab_size for each in inputs.values())
    measured = speeds(
        models,
        vocabulary=vocabulary,
        batch=own.batch,
        prompt=own.prompt_tokens,
        new_tokens=own.new_tokens,
        rounds=own.rounds,
    )
    for name, speed in measured.items():
        report[name] |= speed.summary(own.batch)


def _save(
    report: dict[str, dict[str, Any]], inputs: dict[str, Inputs], own: argparse.Namespace, runtime: Runtime
) -> None:
    """Write what has been measured so far beside `--output`, so that it is not lost with what is measured next."""
    if not (runtime.is_main and own.output):
        return
    baseline = next(iter(inputs)) if own.baseline else None
    bos = {name: each.begins_with_bos for name, each in inputs.items()}
    contents = dict(zip(RESULT, (baseline, report, vars(own), versions()), strict=True)) | {"bos": bos}
    Path(own.output).parent.mkdir(parents=True, exist_ok=True)
    write_atomically(Path(own.output + PART), json_text(contents))


def _show(report: dict[str, dict[str, Any]], own: argparse.Namespace, runtime: Runtime) -> None:
    if not (runtime.is_main and report):
        return
    print(f"\n{as_table(report, next(iter(report)) if own.baseline else None)}")
    if scores := {name: each[LM_EVAL] for name, each in report.items() if LM_EVAL in each}:
        print(harness.as_table(scores))


def as_table(report: dict[str, dict[str, Any]], baseline: str | None) -> str:
    """Lay the models out, one row each; with a baseline its ratios stand in brackets."""
    metrics = [key for each in report.values() for key in each if key not in (*SPEED, LM_EVAL)]
    columns = {key: key for key in metrics} | SPEED
    shown = [key for key in columns if any(each.get(key) is not None for each in report.values())]
    dense = report[baseline] if baseline else {}
    rows = ([name, *(_cell(each.get(key), dense.get(key)) for key in shown)] for name, each in report.items())
    lines = [*markdown_table(["model", *(columns[key] for key in shown)], rows)]
    if baseline:
        lines += ["", f"In brackets: ratio to {baseline}."]
        if "prefill_ms" in shown:
            lines += ["At best prefill follows the FLOPs, and a token of a small batch the bytes of the weights."]
    return "\n".join(lines) + "\n"


def _cell(value: float | None, dense: float | None) -> str:
    if value is None:
        return ""
    number = f"{value:,}" if isinstance(value, int) else f"{value:,.2f}"
    return f"{number} ({value / dense:.3f})" if dense else number
