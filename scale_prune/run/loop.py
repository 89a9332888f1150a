"""The training loop."""

import time
from collections.abc import Iterator

from scale_prune.run.going_on import save_if_due
from scale_prune.run.log import log
from scale_prune.run.losses import loss_of, mean_over_ranks
from scale_prune.run.run import Run
from scale_prune.tasks import Step


def train(run: Run, steps: Iterator[Step], last: int) -> None:
    """Make optimizer steps until the last one is made; up to the last pruning step the pruner has its part in them.

    Raises:
        SystemExit: a rank was asked to stop, and the run is saved; with the code STOPPED.
        ValueError: the loss or a gradient is not finite, or a checkpoint cannot be written.
    """
    engine, pruner, progress, output = run.student.engine, run.student.pruner, run.progress, run.config.output
    pruning = not run.student.finished  # afterwards the masked units are gone
    stages = {run.last_step} | ({pruner.schedule.removal_steps[-1]} if pruning else set())  # measured anyway
    engine.train()
    seconds_before, tokens_before = progress.stepping, progress.tokens
    for step in range(progress.step + 1, last + 1):
        batch = next(steps)
        step_begun, own_loss = time.monotonic(), 0.0
        run.student.backend.received.clear()
        for number, micro_batch in enumerate(batch.micro_batches, 1):
            loss = loss_of(run, micro_batch)
            with progress.seconds.measure("forward_backward"):
                engine.backward(loss)
                own_loss += loss.item()
            if pruning:
                pruner.after_backward()
            if number == len(batch.micro_batches):  # the optimizer's turn: nothing broken may reach the weights
                mean_loss, stopping = mean_over_ranks(run, own_loss / number)
            with progress.seconds.measure("step"):
                engine.step()
            if pruning:
                pruner.after_step()
        if pruning:
            progress.count_received(run.student.backend.received)
        progress.count_step(batch.tokens, time.monotonic() - step_begun)
        rate = (progress.tokens - tokens_before) / (progress.stepping - seconds_before)
        run.monitor.progress(step, loss=mean_loss, remaining=pruner.remaining, tokens_per_second=rate)
        if step % output.log_every == 0 or step == last:
            log(run, loss=mean_loss, tokens_per_second=rate)
        if output.eval_every and step % output.eval_every == 0 and step not in stages:
            run.measure()
            engine.train()
        save_if_due(run, stopping)
