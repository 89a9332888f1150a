"""DeepSpeed's operators for CPUs, loaded once for all ranks; the first time they are compiled, which takes minutes."""

from contextlib import suppress

from deepspeed.accelerator import get_accelerator

for name in ("ShareMemCommBuilder", "CPUAdamBuilder"):
    with suppress(Exception):  # the ranks that need it say why
        get_accelerator().create_op_builder(name).load(verbose=False)
