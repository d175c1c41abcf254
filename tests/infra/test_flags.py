"""Command lines: what a user types becomes a config, or one line that names the flag."""

from dataclasses import dataclass

import pytest

from infra.errors import UserError
from infra.flags import check_ranges, flag, parse_config

TOY_DEFAULTS = {"model": "toy", "steps": 3, "share": 0.9, "fast": True}


@dataclass
class Config:
    model: str = flag("", "a model")
    data: str = flag("", "a file")
    kinds: list[str] = flag(["image", "video"], "kinds of rows", choices=("image", "video"))
    steps: int = flag(100, "steps", low=0)
    epochs: float = flag(1.0, "passes", above=0)
    group_size: int = flag(8, "responses", low=2)
    share: float = flag(0.5, "a share", low=0, high=1)
    fast: bool = flag(False, "whether to hurry")
    order: str = flag("", "an order", choices=("", "reversed", "shuffled"))


def parse(*argv):
    """The config of a command line, and whether it is the toy's."""
    return parse_config(Config, TOY_DEFAULTS, "train.py --model m --data d", list(argv))


def test_without_model_and_data_it_is_the_toy_and_given_flags_win():
    assert parse() == (Config(**TOY_DEFAULTS), True)
    real = ("--model", "m", "--data", "d.json", "--kinds", "video", "--share", "1e-1")
    assert parse(*real) == (Config("m", "d.json", kinds=["video"], share=0.1), False)
    # Also where a flag says no more than the default of a real run.
    assert parse("--steps", "100", "--fast=false", "--share", "0.5") == (Config(model="toy"), True)


def test_help_shows_the_papers_values_and_only_names_that_are_accepted(capsys):
    with pytest.raises(SystemExit) as stopped:
        parse("--help")
    assert stopped.value.code == 0
    text = " ".join(capsys.readouterr().out.split())
    assert "steps (default: 100)" in text
    assert "train.py --model m --data d" in text
    assert "--no_fast" not in text and "--group-size" not in text


WRONG = {
    "unknown": (["--oops=1"], ["--oops"]),
    "misspelt": (["--grup_size", "4"], ["--grup_size", "--group_size?"]),
    "abbreviated": (["--ste", "3"], ["--ste", "--steps?"]),
    "kebab-case": (["--group-size", "3"], ["--group-size", "--group_size?"]),
    "negated": (["--no_fast"], ["--no_fast"]),
    "stray-word": (["stray"], ["stray"]),
    "word-for-int": (["--steps", "abc"], ["--steps", "abc"]),
    "word-for-bool": (["--fast", "maybe"], ["--fast", "maybe"]),
    "empty-list": (["--kinds"], ["--kinds"]),
    "model-alone": (["--model", "m"], ["--model", "--data"]),
    "data-alone": (["--data=d.json"], ["--data", "--model"]),
}


@pytest.mark.parametrize(("argv", "words"), WRONG.values(), ids=WRONG)
def test_a_wrong_command_line_is_one_line_that_names_the_flag(argv, words):
    with pytest.raises(UserError) as caught:
        parse(*argv)
    message = str(caught.value)
    assert [word for word in words if word not in message] == []
    assert "\n" not in message


OUT_OF_RANGE = {
    "low": ({"steps": -1}, "--steps must be at least 0, not -1"),
    "above": ({"epochs": 0.0}, "--epochs must be above 0, not 0.0"),
    "high": ({"share": 1.5}, "--share must be at most 1, not 1.5"),
    "nan": ({"share": float("nan")}, "--share must be a finite number, not nan"),
    "infinite": ({"epochs": float("inf")}, "--epochs must be a finite number, not inf"),
    "choice": ({"order": "sorted"}, "--order takes reversed, shuffled, not 'sorted'"),
    "item": ({"kinds": ["video", "audio"]}, "--kinds takes image, video, not 'audio'"),
}


@pytest.mark.parametrize(("values", "message"), OUT_OF_RANGE.values(), ids=OUT_OF_RANGE)
def test_a_value_out_of_its_range_is_named(values, message):
    """Fault 23: inf reached time-outs and ended in a traceback."""
    check_ranges(Config(steps=0, share=1.0, group_size=2))  # the ends belong to a range
    with pytest.raises(UserError) as caught:
        check_ranges(Config(**values))
    assert str(caught.value) == message
