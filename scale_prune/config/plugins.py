"""A user's own modules: they register criteria and families while they are imported."""

import sys
from importlib import import_module
from importlib.util import module_from_spec, spec_from_file_location
from pathlib import Path


def load_plugins(names: str | None) -> None:
    """Import modules, each of them once.

    Args:
        names: as of `--plugin`: names of modules or paths of .py files, with commas; None for none.

    Raises:
        ValueError: one of them cannot be imported, whatever the reason.
    """
    for name in names.split(",") if names else ():
        try:
            _load(name.strip())
        except Exception as error:
            raise ValueError(
                f"--plugin {name.strip()} cannot be imported, {type(error).__name__}: {error}; give a module that "
                "Python can import, also from this folder, or the path of a .py file"
            ) from error


def _load(name: str) -> None:
    if not name.endswith(".py"):
        if str(Path.cwd()) not in sys.path:
            sys.path.append(str(Path.cwd()))  # launchers and console scripts leave it out; last, so it hides nothing
        import_module(name)
        return
    path = str(Path(name).expanduser().resolve())  # as the module's name too: a file random.py hides no other module
    if path in sys.modules:
        return
    spec = spec_from_file_location(path, path)
    assert spec is not None
    assert spec.loader is not None
    module = sys.modules[path] = module_from_spec(spec)
    try:
        spec.loader.exec_module(module)
    except BaseException:
        del sys.modules[path]
        raise
