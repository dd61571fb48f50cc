"""Python files that users write, configs and studies: whatever goes wrong in one is told in one sentence."""

from __future__ import annotations

import contextlib
import importlib.util
import sys
import traceback
from collections.abc import Iterator
from importlib.machinery import SourceFileLoader
from pathlib import Path
from types import ModuleType

from maxlm.errors import UserError


@contextlib.contextmanager
def told(path: Path) -> Iterator[None]:
    """Turns whatever the file's code raises into a UserError that names the file, and the line where it is known."""
    try:
        yield
    except UserError as error:  # says already what to type
        raise UserError(f"{path}: {error}") from error
    except Exception as error:  # the file is the user's own Python and may raise anything
        if isinstance(error, SyntaxError) and error.filename == str(path):
            lines, what = [error.lineno], error.msg
        else:
            frames = traceback.extract_tb(error.__traceback__)
            lines = [frame.lineno for frame in frames if frame.filename == str(path)]
            what = " ".join(str(error).split())
        where = f"line {lines[-1]}: " if lines else ""
        raise UserError(f"{path} cannot be loaded ({where}{type(error).__name__}: {what})") from error


def load(path: Path) -> ModuleType:
    """The file as a module.

    Raises:
      UserError: there is no such file, or its code raises.
    """
    if not path.is_file():
        raise UserError(f"there is no file {path}; give the path of a Python file")
    name = f"maxlm_file_{path.stem}"
    spec = importlib.util.spec_from_file_location(name, path, loader=SourceFileLoader(name, str(path)))
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module  # where dataclasses look up what their annotations name
    with told(path):
        spec.loader.exec_module(module)
    return module
