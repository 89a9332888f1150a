"""One run from the command line to the report: read, fine-tune and prune, compact, export, measure.

inputs -> sharded model -> engine + pruner -> loop -> smaller engine -> recovery -> pruned/ -> re-load -> report
"""

from collections.abc import Sequence
from functools import cache

from scale_prune.checkpoint import filled_from, glance
from scale_prune.config import dry_run_ranks, load, load_plugins, parse, plugins_of, said_once, user_errors
from scale_prune.criteria import AUTO, CRITERIA, check_uniqueness
from scale_prune.preflight import check_output, check_same, dry_run, fill_in, goes_on, is_complete, read_inputs
from scale_prune.run import drop_replaced, embedded_default, prune
from scale_prune.zero3 import check_launcher, joined, launched_as


def main(argv: Sequence[str]) -> None:
    """Run `launch/prune.py`; a user's mistake ends in one message a host and exit code 2."""
    rank, world_size = launched_as()
    with user_errors(rank):
        load_plugins(plugins_of(argv))
        ranks = dry_run_ranks(argv, world_size)
        if ranks is not None:
            raise SystemExit(dry_run(argv, ranks, speaks=rank == 0))
        with said_once(speaks=rank == 0):
            config, explicit = parse(argv, criteria=(AUTO, *CRITERIA))
        check_launcher()
        fill_in(config)
        load(config.training.ds_config)
        check_output(config)
        checkpoint = glance(config)
        if goes_on(config) and is_complete(config):
            with said_once(speaks=rank == 0):
                print(f"the run in {config.output.output_dir} is complete, there is nothing to go on with", flush=True)
            if rank == 0:
                drop_replaced(config)  # what a kill has kept it from
            return
        if checkpoint is None:
            check_uniqueness(config.pruning)
        read = cache(read_inputs)  # again only where the checkpoint turns out damaged, and another one fills other gaps
        if config.training.model is not None:
            inputs = read(filled_from(checkpoint, config), explicit, world_size)
            if checkpoint is not None:
                check_same(checkpoint, inputs)
        way_out = "--resume goes on from the newest checkpoint. "
        with joined(rank, config.training.collective_timeout, way_out) as runtime:
            if config.training.model is None:
                config = embedded_default(config, explicit, runtime)
            prune(config, explicit, runtime, read)
