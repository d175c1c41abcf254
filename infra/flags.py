"""Command lines: the fields of a dataclass are the flags of a script.

A field's help text and range stand in its metadata, so that one line says all about a flag. A run
is the toy if neither --model nor --data is given; the toy replaces some defaults, never a flag that
the user gave.
"""

import argparse
import dataclasses
import difflib
import math
import sys
from dataclasses import field
from typing import Any, TypeVar

from transformers import HfArgumentParser

from infra.errors import UserError, require

Config = TypeVar("Config")


def flag(
    default: Any,
    help: str,
    *,
    low: float | None = None,
    above: float | None = None,
    high: float | None = None,
    choices: tuple[str, ...] = (),
    neutral: bool = False,
    instead_of: str = "",
) -> Any:
    """A field with the text that --help shows for it, and the values that it takes.

    Args:
        low, above, high: value >= low, value > above, value <= high.
        choices: the allowed values, or of a list its allowed items.
        neutral: a run that is resumed may have another value.
        instead_of: the flag whose default this one, when given, sets to 0. Not both are given.
    """
    metadata = {
        "help": help, "low": low, "above": above, "high": high, "allowed": choices,
        "neutral": neutral, "instead_of": instead_of,
    }  # fmt: skip
    if isinstance(default, list):
        return field(default_factory=lambda: list(default), metadata=metadata)
    return field(default=default, metadata=metadata)


def check_ranges(config: object) -> None:
    """Raise UserError naming the first flag whose value is out of its range or not finite."""
    for item in dataclasses.fields(config):
        value, limits = getattr(config, item.name), item.metadata
        if isinstance(value, float):
            require(math.isfinite(value), f"--{item.name} must be a finite number, not {value}")
        for key, holds, words in (
            ("low", lambda x, y: x >= y, "at least"),
            ("above", lambda x, y: x > y, "above"),
            ("high", lambda x, y: x <= y, "at most"),
        ):
            bound = limits.get(key)
            if bound is not None:
                fits = holds(value, bound)
                require(fits, f"--{item.name} must be {words} {bound}, not {value}")
        allowed = limits.get("allowed")
        for word in (value if isinstance(value, list) else [value]) if allowed else []:
            fits = word in allowed
            require(fits, f"--{item.name} takes {', '.join(filter(None, allowed))}, not {word!r}")


def neutral_flags(config: object) -> set[str]:
    """The names of the flags that may differ in a resumed run."""
    return {item.name for item in dataclasses.fields(config) if item.metadata.get("neutral")}


class FlagParser(HfArgumentParser):
    """HfArgumentParser with one name per flag, the field's, and with UserError for an exit."""

    def add_argument(self, *names: str, **settings: Any) -> argparse.Action | None:
        """Leave out the spellings with hyphens, and --no_x beside --x false."""
        names = tuple(name for name in names if name == "--help" or "-" not in name[2:])
        if names[0].startswith("--no_"):
            return None
        ours = ("low", "above", "high", "allowed", "neutral", "instead_of")  # argparse has no such
        settings = {key: value for key, value in settings.items() if key not in ours}
        return super().add_argument(*names, **settings)

    def error(self, message: str) -> None:
        raise UserError(message.removeprefix("argument "))


def parse_config(
    cls: type[Config],
    toy_defaults: dict[str, Any],
    real_command: str,
    argv: list[str] | None = None,
) -> tuple[Config, bool]:
    """The config of a command line, and whether it is the toy's.

    Raises:
        UserError: an unknown or abbreviated flag, a value of the wrong type, --model without
            --data or the other way round.
    """
    argv = sys.argv[1:] if argv is None else argv
    names = [item.name for item in dataclasses.fields(cls)]
    given = [word[2:].split("=")[0] for word in argv if word.startswith("--")]
    for name in given:
        if name not in [*names, "help"]:
            near = difflib.get_close_matches(name, names, n=1)
            hint = f"; did you mean --{near[0]}?" if near else "; --help lists them"
            raise UserError(f"unknown flag --{name}{hint}")
    is_toy = "model" not in given and "data" not in given
    for one, other in (("model", "data"), ("data", "model")):
        require(
            one not in given or other in given,
            f"--{one} is given without --{other}: give both, or neither for the embedded toy",
        )
    parser = FlagParser(cls, allow_abbrev=False, epilog=f"A real run: {real_command}")
    wants_help = "help" in given or "-h" in argv  # which shows the paper's values
    if is_toy and not wants_help:
        parser.set_defaults(**toy_defaults)
    for item in dataclasses.fields(cls):
        other = item.metadata.get("instead_of")
        if other and item.name in given:
            require(other not in given, f"--{item.name} and --{other} exclude each other")
            parser.set_defaults(**{other: 0})
    config, rest = parser.parse_args_into_dataclasses(argv, return_remaining_strings=True)
    require(not rest, f"unknown argument {rest[0]!r}" if rest else "")
    return config, is_toy
