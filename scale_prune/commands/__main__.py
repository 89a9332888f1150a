"""All commands by name: `scale-prune prune ...`, or a launcher and this file: `deepspeed FILE prune ...`."""

import sys
from importlib import import_module
from pathlib import Path

COMMANDS = ("prune", "evaluate", "analyze", "sweep", "compare", "convert")
USAGE = f"usage: scale-prune {{{','.join(COMMANDS)}}} [--FLAG VALUE ...]; scale-prune COMMAND --help lists the flags"


def main() -> None:
    """Run the command that `sys.argv` names, with exit code 2 where it names none."""
    words = sys.argv[1:]
    name = next((word for word in words if not word.startswith("-")), None)  # launchers put --local_rank first
    if name not in COMMANDS:
        asked = name is None and {"-h", "--help"} & set(words)
        print(USAGE if asked else f"error: {name or 'nothing'} is not a command; {USAGE}", file=sys.stderr)
        raise SystemExit(0 if asked else 2)
    words.remove(name)
    sys.argv[0] = f"scale-prune {name}"
    import_module(f"scale_prune.commands.{name}").main(words)


if __name__ == "__main__":
    # A script's folder is where Python looks first, and `evaluate` is also a package that others import.
    sys.path = [place for place in sys.path if Path(place).resolve() != Path(__file__).resolve().parent]
    main()
