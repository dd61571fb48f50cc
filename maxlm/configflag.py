"""The flag `--config=FILE[:WORD]` and the overrides `--config.section.key=VALUE`.

ml_collections reads both; here is what it says nothing useful of: a file that gives no config, a setting that there is
not, a value of another type.
"""

from __future__ import annotations

import inspect
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from absl import flags
from ml_collections import ConfigDict, config_flags
from ml_collections.config_flags import config_path

from maxlm.errors import UserError
from maxlm.pythonfile import load, told
from maxlm.resolve import ConfigError, misnamed

_OVERRIDE = re.compile(r"--?(?:no)?config\.([^=]*)")


def define_config(values: flags.FlagValues, args: list[str]) -> None:
    """Defines the flag and the overrides that stand in the arguments."""
    config_flags.DEFINE_config_file("config", None, "config file", flag_values=values, sys_argv=args)
    values["config"].parser = _ConfigFile(args)
    for kind, parser in ((int, _Whole()), (float, _Number()), (bool, _Switch())):
        config_flags.register_flag_parser_for_type(kind, parser)


def read_flags(values: flags.FlagValues, args: list[str]) -> list[str]:
    """Parses the arguments; returns those that are no flags.

    Raises:
      UserError: the file gives no config, or overrides name what is no setting of it.
      flags.Error: any other mistake.
    """
    try:
        return values(args)
    except flags.IllegalFlagValueError as error:
        if isinstance(error.__context__, UserError):  # absl puts the flag's whole text before it
            raise error.__context__ from None
        raise


class _ConfigFile(flags.ArgumentParser):
    """What `get_config()` of a file returns, held against the overrides that will be applied to it."""

    def __init__(self, args: list[str]):
        self._args = args

    def parse(self, argument: str) -> ConfigDict:
        config = load_config(argument).lock()
        problems = [problem for path in self._overrides() for problem in misnamed(path, config)]
        if problems:
            raise ConfigError(problems)
        return config

    def _overrides(self) -> Iterator[tuple[str, ...]]:
        """The names that each override's path is made of."""
        found = flags.FlagValues().read_flags_from_files(self._args, force_gnu=False)
        for path in dict.fromkeys(match[1] for arg in found if (match := _OVERRIDE.match(arg))):
            try:
                yield tuple(map(str, config_path.split(path)))
            except ValueError:
                raise UserError(
                    f"--config.{path} has more than letters, digits and _ in a name; put that one in brackets and "
                    "quotes, as in \"--config.data.stores['c4-en'].source=text:c4/*\""
                ) from None


def load_config(where: str) -> ConfigDict:
    """The config of FILE or FILE:WORD, where the word is an argument of its `get_config()`.

    Raises:
      UserError: it cannot be loaded, or gives no config.
    """
    name, *words = where.split(":", 1)
    path = Path(name)
    module = load(path)
    maker: Any = getattr(module, "get_config", None)
    if maker is None:
        study = f"; a study is planned by `maxlm study plan {path}`" if hasattr(module, "get_study") else ""
        raise UserError(f"{path} has no get_config(){study}")
    try:
        inspect.signature(maker).bind(*words)
    except TypeError:
        if not words:
            raise UserError(f"get_config() of {path} needs a word; type --config={path}:WORD") from None
        raise UserError(f"get_config() of {path} takes no word after a colon; type --config={path}") from None
    with told(path):
        config = maker(*words)
    if not isinstance(config, ConfigDict):
        raise UserError(
            f"get_config() of {path} returns a {type(config).__name__}; end it with "
            "`return as_config_dict(Config(...))`, as_config_dict being of maxlm.resolve"
        )
    return config


class _Whole(flags.IntegerParser):
    def convert(self, argument: Any) -> int:
        try:
            return super().convert(argument)
        except ValueError:
            raise ValueError("a whole number was expected, as in 10000") from None


class _Number(flags.FloatParser):
    def convert(self, argument: Any) -> float:
        try:
            return super().convert(argument)
        except ValueError:
            raise ValueError("a number was expected, as in 3e-4") from None


class _Switch(flags.BooleanParser):
    def parse(self, argument: Any) -> bool:
        try:
            return super().parse(argument)
        except ValueError:
            raise ValueError("true or false was expected") from None
