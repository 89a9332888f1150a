"""The stages of a run: prune, compact, recover, export, and load the result again."""

from typing import Any

from scale_prune.checkpoint import Checkpoint
from scale_prune.config import precision
from scale_prune.export import GGUF, multiplies_out, needs_code
from scale_prune.run.going_on import go_on_from
from scale_prune.run.loop import train
from scale_prune.run.removal import remove
from scale_prune.run.report import write_kept
from scale_prune.run.results import results
from scale_prune.run.run import Run
from scale_prune.zero3 import give_back, inference_engine, load_model, num_parameters, release, told_to_all


def go(run: Run, checkpoint: Checkpoint | None) -> dict[str, Any]:
    """Train, prune, compact, export and measure, from the start or from a checkpoint; return the report.

    Raises:
        SystemExit: the run was asked to stop, and is saved; with the code STOPPED.
        ValueError: the loss is not finite, or something cannot be written.
        RuntimeError: masks did not take hold, or the exported model is not the one that was trained.
    """
    student, progress = run.student, run.progress
    if checkpoint is None:
        _measure_start(run)
    else:
        go_on_from(run, checkpoint)
    steps = run.task.steps(student.engine.gradient_accumulation_steps(), progress.step)
    removals = student.pruner.schedule.removal_steps
    for removal in removals:
        if not student.finished and progress.step <= removal:
            if run.config.training.max_steps:
                train(run, steps, removal)
            remove(run, removal, finished=removal == removals[-1])
    if (removals[-1] if run.config.training.max_steps else 0) < run.last_step:
        train(run, steps, run.last_step)
        run.measure("recovered")
    pruned_parameters, groups, layout = student.num_parameters, student.stored, _layout(run)
    _export(run)
    stored_parameters = _reload(run)
    if run.config.output.reference is not None:
        _measure_reference(run, run.config.output.reference)
    report = results(run, pruned_parameters=pruned_parameters, stored_parameters=stored_parameters)
    if run.runtime.is_main:
        run.writer.write_card(run.folder / "pruned", groups, layout, report)
    return report


def _measure_start(run: Run) -> None:
    """Measure the dense model, and the one that training starts from, if its weights are factorized."""
    if (dense := run.student.measured_dense) is None:
        run.measure("dense")
        return
    run.quality.keep(dense, run.progress.step, "dense")
    run.note(dense, "dense", 1.0)
    run.measure("factorized")


def _layout(run: Run) -> str:
    """Return the layout of the folder: what was asked for, beside a GGUF file the plainest that holds the model."""
    if (asked := str(run.config.output.layout)) != GGUF:
        return asked
    return run.student.layout


def _export(run: Run) -> None:
    student = run.student
    with run.progress.seconds.measure("export"):
        dense, pruner = student.dense, student.pruner
        with told_to_all(run.folder):
            if run.runtime.is_main:
                write_kept(run.folder, dense.groups, dense.masks_with(pruner), dense.scores_with(pruner))
        folder = run.writer.write("pruned", student.backend, student.stored, _layout(run))
        if run.config.output.layout == GGUF:
            run.writer.write_gguf(folder)


def _reload(run: Run) -> int:
    """Load the exported folder as a user would, measure it, and return the number of parameters it stores.

    Raises:
        RuntimeError: it is not as good as the model it was written from.
    """
    # The code of such a folder is ours; a base model's own code runs only where the user trusts it.
    trusted = needs_code(_layout(run)) or run.config.training.trust_remote_code
    run.student.let_go()
    if run.teacher is not None:
        run.teacher.let_go()
    give_back()
    folder = run.folder / "pruned"
    model = load_model(str(folder), run.inputs.ds_config, trust_remote_code=trusted)
    run.student.engine = inference_engine(model, run.inputs.ds_config)
    run.measure("exported")
    student = run.student
    product = student.kind == "component" and multiplies_out(_layout(run), student.stored)
    run.quality.check_exported(folder, rounded=product and precision(run.inputs.ds_config) is not None)
    with told_to_all(run.folder):
        if run.runtime.is_main:
            run.quality.write_generations(run.folder)
    return num_parameters(model)


def _measure_reference(run: Run, name: str) -> None:
    """Measure the model that the result is compared with."""
    release(run.student.engine)
    ds_config, trusted = run.inputs.ds_config, run.config.training.trust_remote_code
    engine = inference_engine(load_model(name, ds_config, trust_remote_code=trusted, flag="reference"), ds_config)
    run.quality.measure(engine, run.progress.step, "reference")
    release(engine)
