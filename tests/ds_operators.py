"""DeepSpeed's operators for CPUs. Importing this loads what every rank needs; as a program it compiles them all.

Compiling takes minutes the first time, which launch/test.sh begins with, beside what needs no ranks.
"""

from contextlib import suppress

from deepspeed.accelerator import get_accelerator


def load(builder: str) -> None:
    """Load an operator, and compile it where that was not done before."""
    with suppress(Exception):  # the ranks that need it say why
        get_accelerator().create_op_builder(builder).load(verbose=False)


load("ShareMemCommBuilder")
if __name__ == "__main__":
    load("CPUAdamBuilder")
