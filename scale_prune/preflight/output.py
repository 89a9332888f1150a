"""The output folder, looked at before anything is written."""

import os
from pathlib import Path

from scale_prune.checkpoint import NEWEST, newest_first
from scale_prune.config import Config, settings_where
from scale_prune.system import RECIPE, REPORT, check_writable


def check_output(config: Config) -> None:
    """Refuse an output folder that holds something.

    Raises:
        ValueError: the folder holds a run that is neither to be overwritten nor gone on with, or it holds something
            else, or it cannot be written or set aside.
    """
    folder = Path(config.output.output_dir)
    check_writable(folder, f"--output_dir {folder}")
    try:
        if is_empty(folder):
            return
    except OSError as error:
        raise ValueError(f"--output_dir {folder} cannot be read: {error.strerror}") from error
    if not (folder / RECIPE).is_file():
        raise ValueError(f"--output_dir {folder} holds something that is not a run; give a new or empty folder")
    if goes_on(config):
        return
    if not config.output.overwrite:
        other = f", and --resume {config.checkpoint.resume} is not of it" if config.checkpoint.resume else ""
        raise ValueError(
            f"--output_dir {folder} holds a run already{other}; give another folder, --resume to go on with it, or "
            "--overwrite to replace it"
        )
    _refuse_losses(config, folder)
    if os.path.ismount(folder) or not os.access(folder.resolve().parent, os.W_OK):
        raise ValueError(
            f"--output_dir {folder} cannot be set aside until the new run is complete: its parent cannot be written, "
            "or it is a disk of its own; give a folder below it"
        )


def _refuse_losses(config: Config, folder: Path) -> None:
    """Refuse to replace a folder in which is more than one run, or what the new run reads.

    Raises:
        ValueError: it names that.
    """
    if others := sorted(path.parent for path in folder.rglob(RECIPE) if path.parent != folder):
        raise ValueError(
            f"--output_dir {folder} holds other runs besides its own, as {others[0]}, which --overwrite would remove; "
            "give another folder, or move them"
        )
    replaced, asked = folder.resolve(), config.flat()
    for name in settings_where("is_path", True):
        given = asked[name]
        if name != "output_dir" and given and replaced in (path := Path(given).resolve(), *path.parents):
            raise ValueError(
                f"--output_dir {folder} holds --{name} {given}, which --overwrite would remove; give another folder"
            )


def goes_on(config: Config) -> bool:
    """Tell whether the run goes on in its output folder, and does not begin there."""
    wanted = config.checkpoint.resume
    if wanted is None or wanted == NEWEST:
        return wanted == NEWEST
    return Path(config.output.output_dir).resolve() in Path(wanted).resolve().parents


def finds_checkpoint(config: Config) -> bool:
    """Tell whether there is a checkpoint that the run goes on from."""
    wanted = config.checkpoint.resume
    return bool(newest_first(Path(config.output.output_dir))) if wanted == NEWEST else wanted is not None


def is_complete(config: Config) -> bool:
    """Tell whether the output folder holds a run that has come to its end."""
    return (Path(config.output.output_dir) / REPORT).is_file()


def is_empty(folder: Path) -> bool:
    """Tell whether a folder is not there or holds nothing, or only what a run leaves that is killed as it begins."""
    return not folder.exists() or all(path.name.startswith(f"{RECIPE}.partial-") for path in folder.iterdir())
