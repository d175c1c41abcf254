"""Command lines and bad input: what a user types becomes a config, or one line that says why not.

Most scripts run inside this process, as `python train_rl.py ..` would; torchrun is launched twice.
"""

import contextlib
import dataclasses
import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch.distributed as dist

import eval as evaluation
import train_rl
import train_sft
from infra.distributed import run_main
from infra.flags import parse_config

ROOT = Path(__file__).parent.parent
SCRIPTS = {"sft": train_sft, "rl": train_rl, "eval": evaluation}
CONFIGS = {
    "sft": train_sft.SFTConfig,
    "rl": train_rl.RLConfig,
    "eval": evaluation.EvalConfig,
}
REAL = ("--model", "some/model", "--data", "rows.json")


def toy_defaults(script: str, world_size: int = 1) -> dict:
    if script == "eval":
        return evaluation.TOY_DEFAULTS
    return SCRIPTS[script].toy_defaults(world_size)


def parse(script: str, *argv: str):
    """The config of a command line, and whether it is the toy's."""
    module = SCRIPTS[script]
    return parse_config(CONFIGS[script], toy_defaults(script), module.REAL_COMMAND, list(argv))


def as_words(value: object) -> list[str]:
    """A flag's value as it is typed."""
    return [str(item) for item in value] if isinstance(value, list) else [str(value)]


# ----------------------------------------------------------------------------- names and defaults

# The paper's sentences: Sections 3.2 (alpha, threshold), 3.3 (omega, lengths), 4.1 (groups, frames,
# pixels, steps, decoding) and Appendix D (optimizer, beta, response length).
FRAMES = "we limit the maximum number of video frames to 16 during training"
PIXELS = "Each frame is processed at a max resolution of 128 x 28 x 28 pixels"
ADAM = "We use the Adam optimizer with a learning rate of 1e-6"
DECAY = "we apply a weight decay rate of 0.01 and clip the maximum gradient norm to 5"
WINDOW = "we set omega = 0.2, l_min = 320 and l_max = 512"
DECODING = "with top_p = 0.001 and temperature = 0.01"
LENGTH = "The maximum response length is set to 768 tokens"


@pytest.mark.parametrize(
    "script, name, value, quote",
    [
        pytest.param("rl", "group_size", 8, "The ordered group size G is set to 8", id="G"),
        pytest.param("rl", "shuffled_group_size", 4, "G~ is set to half of that", id="G~"),
        pytest.param("rl", "alpha", 0.3, "Here we set alpha = 0.3", id="alpha"),
        pytest.param("rl", "omega", 0.2, WINDOW, id="omega"),
        pytest.param("rl", "l_min", 320, WINDOW, id="l_min"),
        pytest.param("rl", "l_max", 512, WINDOW, id="l_max"),
        pytest.param("rl", "correct_threshold", 0.5, "a threshold (e.g., 0.5)", id="threshold"),
        pytest.param("rl", "beta", 0.04, "beta in the KL .. is set to 0.04", id="beta"),
        pytest.param("rl", "max_steps", 1000, "only 1k RL steps", id="rl-steps"),
        pytest.param("sft", "max_steps", 0, "SFT .. for one epoch", id="sft-by-epochs"),
        pytest.param("sft", "num_epochs", 1.0, "SFT .. for one epoch", id="sft-one-epoch"),
        pytest.param("sft", "learning_rate", 1e-6, ADAM, id="sft-learning-rate"),
        pytest.param("rl", "learning_rate", 1e-6, ADAM, id="rl-learning-rate"),
        pytest.param("sft", "weight_decay", 0.01, DECAY, id="sft-weight-decay"),
        pytest.param("rl", "weight_decay", 0.01, DECAY, id="rl-weight-decay"),
        pytest.param("sft", "max_grad_norm", 5.0, DECAY, id="sft-grad-norm"),
        pytest.param("rl", "max_grad_norm", 5.0, DECAY, id="rl-grad-norm"),
        pytest.param("rl", "max_new_tokens", 768, LENGTH, id="rl-length"),
        pytest.param("eval", "max_new_tokens", 768, LENGTH, id="eval-length"),
        pytest.param("sft", "max_frames", 16, FRAMES, id="sft-frames"),
        pytest.param("rl", "max_frames", 16, FRAMES, id="rl-frames"),
        pytest.param("eval", "max_frames", 16, "frames to 16~64", id="eval-frames"),
        pytest.param("sft", "max_pixels", 128 * 28 * 28, PIXELS, id="sft-pixels"),
        pytest.param("rl", "max_pixels", 128 * 28 * 28, PIXELS, id="rl-pixels"),
        pytest.param("eval", "max_pixels", 256 * 28 * 28, "256 x 28 x 28", id="eval-pixels"),
        pytest.param("eval", "temperature", 0.01, DECODING, id="eval-temperature"),
        pytest.param("eval", "top_p", 0.001, DECODING, id="eval-top-p"),
        # Where the paper gives no number: GRPO's defaults, and the form of its own equations.
        pytest.param("rl", "clip_eps", 0.2, "(not given)", id="epsilon"),
        pytest.param("rl", "num_iterations", 1, "(not given)", id="iterations"),
        pytest.param("rl", "temporal", True, "Eq. 1", id="temporal"),
        pytest.param("rl", "temporal_target", "reward", "Eq. 2", id="temporal-target"),
        pytest.param("rl", "length_reward", True, "Eq. 5", id="length-reward"),
        pytest.param("rl", "image_max_pixels", 256 * 28 * 28, "(not given)", id="image-pixels"),
        pytest.param("rl", "data_types", ["image", "video"], "mixed data", id="data-types"),
        pytest.param("eval", "order", "ordered", "(not given)", id="order"),
    ],
)
def test_a_real_run_has_the_papers_values(script, name, value, quote):
    config, is_toy = parse(script, *REAL)
    assert not is_toy
    assert getattr(config, name) == value, quote


SHARED_NAMES = ["model", "data", "data_root", "output_dir", "seed", "max_frames", "min_pixels",
                "max_pixels", "image_max_pixels", "prompt_template"]  # fmt: skip
TRAINING_NAMES = ["max_steps", "num_epochs", "learning_rate", "weight_decay", "max_grad_norm",
                  "warmup_steps", "prompts_per_rank", "gradient_accumulation_steps",
                  "data_types"]  # fmt: skip
RL_NAMES = ["group_size", "shuffled_group_size", "alpha", "omega", "l_min", "l_max", "beta",
            "clip_eps", "correct_threshold", "num_iterations", "temporal", "temporal_target",
            "length_reward", "max_new_tokens"]  # fmt: skip
EVAL_NAMES = ["order", "batch_size", "temperature", "top_p", "max_new_tokens"]


@pytest.mark.parametrize(
    "script, names",
    [
        pytest.param("sft", SHARED_NAMES + TRAINING_NAMES, id="sft"),
        pytest.param("rl", SHARED_NAMES + TRAINING_NAMES + RL_NAMES, id="rl"),
        pytest.param("eval", SHARED_NAMES + EVAL_NAMES, id="eval"),
    ],
)
def test_the_names_that_others_rely_on_are_flags(script, names):
    fields = {item.name: item for item in dataclasses.fields(CONFIGS[script])}
    assert set(names) <= set(fields)
    without_help = [name for name, item in fields.items() if not item.metadata.get("help")]
    assert without_help == []


@pytest.mark.parametrize("script", SCRIPTS)
def test_help_lists_every_flag_by_the_name_that_is_accepted(script, capsys):
    with pytest.raises(SystemExit) as stopped:
        parse(script, "--help")
    assert stopped.value.code == 0
    text = capsys.readouterr().out
    options = "\n".join(line for line in text.splitlines() if line.startswith("  -"))
    names = {item.name for item in dataclasses.fields(CONFIGS[script])}
    listed = set(re.findall(r"--([\w-]+)", options)) - {"help"}
    assert names - listed == set(), "flags that --help does not show"
    assert listed - names == set(), "names that --help shows and parse_config refuses"
    command = SCRIPTS[script].REAL_COMMAND
    assert command in " ".join(text.split())


def test_help_shows_the_papers_values_not_the_toys(capsys):
    with pytest.raises(SystemExit):
        parse("rl", "--help")
    text = " ".join(capsys.readouterr().out.split())
    shown = re.search(r"shortest rewarded response.*?\(default: (\d+)\)", text)
    assert shown.group(1) == "320"


# ------------------------------------------------------------------------------ toy or real run


@pytest.mark.parametrize("script", SCRIPTS)
def test_the_toy_replaces_its_defaults_and_nothing_else(script):
    config, is_toy = parse(script)
    assert is_toy
    assert config == CONFIGS[script](**toy_defaults(script))


EVERY_TOY_DEFAULT = [
    pytest.param(script, name, id=f"{script}-{name}")
    for script in SCRIPTS
    for name in toy_defaults(script)
    if name not in ("model", "data")
]


@pytest.mark.parametrize("script, name", EVERY_TOY_DEFAULT)
def test_a_flag_that_the_user_gives_wins_over_the_toy(script, name):
    """Also where it says no more than the default of a real run."""
    papers = getattr(CONFIGS[script](), name)
    assert papers != toy_defaults(script)[name], "the toy changes nothing here"
    spaced, is_toy = parse(script, f"--{name}", *as_words(papers))
    assert is_toy
    assert getattr(spaced, name) == papers
    joined, _ = parse(script, f"--{name}={papers}")
    assert joined == spaced
    others = {key: value for key, value in toy_defaults(script).items() if key != name}
    assert spaced == CONFIGS[script](**others)


@pytest.mark.parametrize("script", ["sft", "rl"])
def test_the_toys_batch_is_the_same_for_any_number_of_ranks(script):
    sizes = [
        CONFIGS[script](**toy_defaults(script, world_size)).batch_size(world_size)
        for world_size in (1, 2, 4, 8)
    ]
    assert len(set(sizes)) == 1, sizes


@pytest.mark.parametrize(
    "script, argv, name, value",
    [
        pytest.param("rl", ["--temporal", "false"], "temporal", False, id="false"),
        pytest.param("rl", ["--temporal", "True"], "temporal", True, id="True"),
        pytest.param("rl", ["--length_reward=false"], "length_reward", False, id="joined"),
        pytest.param("rl", ["--data_types", "video"], "data_types", ["video"], id="list-of-one"),
        pytest.param(
            "rl",
            ["--data_types", "video", "image", "--seed", "3"],
            "data_types",
            ["video", "image"],
            id="list-before-a-flag",
        ),
        pytest.param("rl", ["--learning_rate", "1e-5"], "learning_rate", 1e-5, id="exponent"),
        pytest.param("rl", ["--alpha", "0"], "alpha", 0.0, id="whole-number-as-float"),
        pytest.param("rl", ["--seed", "1", "--seed", "2"], "seed", 2, id="last-one-counts"),
        pytest.param(
            "eval",
            ["--model", "m", "--data", "a.json", "b.json"],
            "data",
            ["a.json", "b.json"],
            id="several-data-files",
        ),
    ],
)
def test_values(script, argv, name, value):
    config, _ = parse(script, *argv)
    assert getattr(config, name) == value
    assert type(getattr(config, name)) is type(value)


# ---------------------------------------------------------------------------- wrong command lines


@pytest.mark.parametrize(
    "argv, words",
    [
        pytest.param(["--oops", "1"], ["--oops"], id="unknown"),
        pytest.param(["--max_steps=3", "--oops=1"], ["--oops"], id="unknown-joined"),
        pytest.param(["--grup_size", "4"], ["--grup_size", "--group_size?"], id="misspelt"),
        pytest.param(["--lerning_rate", "1"], ["--lerning_rate", "--learning_rate?"], id="typo"),
        pytest.param(["--learn", "1"], ["--learn"], id="abbreviated"),
        pytest.param(["--max_st", "3"], ["--max_st", "--max_steps?"], id="nearly-whole"),
        pytest.param(["--max-steps", "3"], ["--max-steps", "--max_steps?"], id="kebab-case"),
        pytest.param(["--no_temporal"], ["--no_temporal"], id="negated"),
        pytest.param(["--MAX_STEPS", "3"], ["--MAX_STEPS"], id="upper-case"),
        pytest.param(["stray"], ["stray"], id="stray-word"),
        pytest.param(["--seed", "1", "2"], ["2"], id="value-too-many"),
        pytest.param(["-s", "1"], ["-s"], id="one-dash"),
        pytest.param(["--max_steps", "abc"], ["--max_steps", "abc"], id="word-for-int"),
        pytest.param(["--max_steps", "1.5"], ["--max_steps", "1.5"], id="float-for-int"),
        pytest.param(["--alpha", "much"], ["--alpha", "much"], id="word-for-float"),
        pytest.param(["--temporal", "maybe"], ["--temporal", "maybe"], id="word-for-bool"),
        pytest.param(["--group_size"], ["--group_size"], id="no-value"),
        pytest.param(["--data_types"], ["--data_types"], id="empty-list"),
        pytest.param(["--model", "m"], ["--model", "--data"], id="model-alone"),
        pytest.param(["--data", "d.json"], ["--data", "--model"], id="data-alone"),
        pytest.param(["--model=m"], ["--model", "--data"], id="model-alone-joined"),
    ],
)
def test_a_wrong_command_line_is_one_line_that_names_the_flag(argv, words):
    with pytest.raises(ValueError) as caught:  # noqa: PT011  the words follow
        parse("rl", *argv)
    message = str(caught.value)
    assert [word for word in words if word not in message] == []
    assert "\n" not in message


@pytest.mark.parametrize("script", ["sft", "eval"])
@pytest.mark.parametrize(
    "argv", [["--output_dri", "x"], ["--model", "m"], ["--seed", "x"], ["--group_size", "8"]]
)
def test_the_other_scripts_refuse_the_same(script, argv):
    with pytest.raises(ValueError, match=argv[0]):
        parse(script, *argv)


@pytest.mark.parametrize(
    "script, name, value",
    [
        *[
            pytest.param(script, name, value, id=f"{script}-{name}-{value}")
            for script in ("sft", "rl")
            for name, value in [
                ("prompts_per_rank", 0), ("gradient_accumulation_steps", 0), ("max_frames", 0),
                ("num_workers", 0), ("min_pixels", 0), ("seed", -1), ("max_steps", -1),
                ("warmup_steps", -1), ("learning_rate", -0.1), ("weight_decay", -0.1),
                ("max_grad_norm", 0), ("max_pixels", 100), ("image_max_pixels", 100),
                ("data_types", "audio"), ("learning_rate", "nan"), ("decode_timeout", 0),
            ]
        ],
        pytest.param("sft", "num_epochs", 0, id="sft-num_epochs-0"),
        *[
            pytest.param("rl", name, value, id=f"rl-{name}-{value}")
            for name, value in [
                ("group_size", 1), ("shuffled_group_size", 0), ("max_new_tokens", 0),
                ("num_iterations", 0), ("alpha", -0.1), ("omega", -0.1), ("beta", -0.1),
                ("clip_eps", -0.1), ("l_min", -1), ("l_max", 319), ("temporal_target", "return"),
                ("ratio_level", "word"),
            ]
        ],
        *[
            pytest.param("eval", name, value, id=f"eval-{name}-{value}")
            for name, value in [
                ("order", "sorted"), ("batch_size", 0), ("max_new_tokens", 0), ("max_frames", 0),
                ("num_workers", 0), ("temperature", 0), ("temperature", "nan"), ("top_p", 0),
                ("top_p", 1.5), ("seed", -1), ("min_pixels", 0), ("max_pixels", 100),
                ("image_max_pixels", 100), ("decode_timeout", 0),
            ]
        ],
    ],
)  # fmt: skip
def test_a_value_that_makes_no_sense_is_refused_by_its_flags_name(script, name, value):
    config, _ = parse(script, *REAL, f"--{name}", str(value))
    with pytest.raises(ValueError, match=f"--{name}") as caught:
        config.check()
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    "script, argv",
    [
        pytest.param("sft", "--prompts_per_rank 1 --warmup_steps 0 --weight_decay 0", id="sft"),
        pytest.param("sft", "--max_steps 3 --num_epochs 0", id="steps-instead-of-epochs"),
        pytest.param("rl", "--alpha 0 --omega 0 --beta 0 --clip_eps 0", id="weights-of-0"),
        pytest.param("rl", "--group_size 2 --shuffled_group_size 1", id="smallest-groups"),
        pytest.param("rl", "--l_min 320 --l_max 320", id="window-of-one-length"),
        pytest.param("rl", "--temporal_target advantage --data_types video", id="words"),
        pytest.param("rl", "--min_pixels 784 --max_pixels 784", id="one-size"),
        pytest.param("eval", "--order single --top_p 1 --temperature 1", id="eval"),
        pytest.param("eval", "--batch_size 1 --max_new_tokens 1 --max_frames 1", id="eval-ones"),
    ],
)
def test_the_ends_of_each_range_are_allowed(script, argv):
    parse(script, *REAL, *argv.split())[0].check()


# -------------------------------------------------------------------------------- bad input, whole


@pytest.fixture
def folder(tmp_path, toy_folder, monkeypatch):
    """An empty working folder beside one with good input: a model, two rows and their clips."""
    given, work = tmp_path / "given", tmp_path / "work"
    given.mkdir()
    work.mkdir()
    (given / "base").symlink_to(toy_folder / "runs/toy/base")
    (given / "sft").symlink_to(toy_folder / "runs/toy/data/sft")
    monkeypatch.chdir(work)
    for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK"):
        monkeypatch.delenv(name, raising=False)
    yield given
    if dist.is_initialized():  # an error leaves the group as it is, and the process ends
        dist.destroy_process_group()


def write_rows(folder: Path, toy_folder: Path, changes: dict, data_type: str = "video") -> None:
    """Two good rows of the toy, the second changed; None takes a key away."""
    rows = json.loads((toy_folder / "runs/toy/data/sft.json").read_text())
    rows = [row for row in rows if row["data_type"] == data_type][:2]
    rows[1] = {key: value for key, value in {**rows[1], **changes}.items() if value is not None}
    (folder / "rows.json").write_text(json.dumps(rows))


def command_line(folder: Path, changes: dict[str, str | None]) -> list[str]:
    """A good command line with some flags changed; None takes one away."""
    flags = {"model": "{}/base", "data": "{}/rows.json", "output_dir": "out", **changes}
    flags = {name: value for name, value in flags.items() if value is not None}
    pairs = [(f"--{name}", value.replace("{}", str(folder))) for name, value in flags.items()]
    return [word for pair in pairs for word in pair]


def refused(module, argv: list[str], words: list[str], capsys, monkeypatch) -> None:
    """Run a script as `python` would; it must end in one error line and leave nothing behind."""
    monkeypatch.setattr(sys, "argv", ["script.py", *argv])
    with pytest.raises(SystemExit) as stopped:
        run_main(module.main)
    assert stopped.value.code == 2
    output = capsys.readouterr().err
    lines = [line for line in output.split("\n") if line.startswith("error: ")]
    assert len(lines) == 1, output
    assert [word for word in words if word not in lines[0]] == [], lines[0]
    assert "Traceback" not in output
    assert list(Path().iterdir()) == [], "something was written"


BAD_INPUT = [
    pytest.param({}, {"oops": "1"}, ["--oops"], id="unknown-flag"),
    pytest.param({}, {"outp": "x"}, ["--outp"], id="abbreviated-flag"),
    pytest.param({}, {"seed": "x"}, ["--seed", "'x'"], id="word-for-int"),
    pytest.param({}, {"max_frames": "0"}, ["--max_frames"], id="value-without-sense"),
    pytest.param({}, {"data": None}, ["--model", "--data"], id="model-without-data"),
    pytest.param({}, {"model": None}, ["--data", "--model"], id="data-without-model"),
    pytest.param({}, {"data": "{}/none.json"}, ["none.json"], id="missing-data-file"),
    pytest.param({}, {"data": "{}/base"}, ["base"], id="folder-as-data-file"),
    pytest.param({}, {"data_root": "{}/none"}, ["none"], id="missing-data-root"),
    pytest.param({"solution": None}, {}, ["rows.json", "row 1", "solution"], id="no-solution"),
    pytest.param({"solution": " "}, {}, ["rows.json", "row 1", "solution"], id="blank-solution"),
    pytest.param(
        {"problem_type": "riddle"}, {}, ["rows.json", "row 1", "riddle"], id="unknown-type"
    ),
    pytest.param({"path": "../x.mp4"}, {}, ["rows.json", "row 1", "path"], id="path-that-leaves"),
    pytest.param({}, {"model": "{}/none"}, ["--model", "none"], id="missing-model"),
    pytest.param({}, {"model": "{}/sft"}, ["--model", "sft"], id="no-model-folder"),
    pytest.param({}, {"model": "{}/llama"}, ["--model", "llama"], id="not-a-qwen2.5-vl"),
    pytest.param({}, {"prompt_template": "{}/x"}, ["--prompt_template"], id="missing-template"),
]


@pytest.mark.parametrize("script", SCRIPTS)
@pytest.mark.parametrize("row, flags, words", BAD_INPUT)
def test_bad_input_ends_with_one_line(
    script, row, flags, words, folder, toy_folder, capsys, monkeypatch
):
    write_rows(folder, toy_folder, row)
    (folder / "llama").mkdir()
    (folder / "llama/config.json").write_text('{"model_type": "llama"}')
    refused(SCRIPTS[script], command_line(folder, flags), words, capsys, monkeypatch)


@pytest.mark.parametrize(
    "script, row, flags, words",
    [
        pytest.param(
            "sft", {"process": None}, {}, ["row 1", "process"], id="sft-no-process"
        ),
        pytest.param(
            "rl", {"solution": "<answer>left</answer>"}, {}, ["row 1", "left"],
            id="rl-solution-that-no-answer-matches",
        ),
        pytest.param("sft", {}, {"data_types": "image"}, ["--data_types"], id="sft-no-such-rows"),
        pytest.param("rl", {}, {"data_types": "image"}, ["--data_types"], id="rl-no-such-rows"),
        pytest.param(
            "eval", {}, {"output_dir": "{}/rows.json", "max_new_tokens": "1"}, ["--output_dir"],
            id="eval-output-is-a-file",
        ),
        pytest.param(
            "rl", {}, {"output_dir": "{}/rows.json"}, ["--output_dir"], id="rl-output-is-a-file"
        ),
    ],
)  # fmt: skip
def test_bad_input_of_one_stage(script, row, flags, words, folder, toy_folder, capsys, monkeypatch):
    write_rows(folder, toy_folder, row)
    more = {} if script == "eval" else {"max_steps": "1", "max_frames": "2"}
    argv = command_line(folder, {**more, **flags})
    refused(SCRIPTS[script], argv, words, capsys, monkeypatch)


def cut_weights(model: Path) -> None:
    with (model / "model.safetensors").open("r+b") as file:
        file.truncate(100_000)


@pytest.mark.parametrize(
    "damage",
    [
        pytest.param(lambda m: (m / "config.json").write_text("{"), id="config-cut-short"),
        pytest.param(lambda m: (m / "config.json").write_text("[1]"), id="config-is-a-list"),
        pytest.param(lambda m: (m / "tokenizer.json").unlink(), id="no-tokenizer"),
        pytest.param(lambda m: (m / "tokenizer_config.json").unlink(), id="no-chat-template"),
        pytest.param(lambda m: (m / "preprocessor_config.json").unlink(), id="no-preprocessor"),
        pytest.param(lambda m: (m / "model.safetensors").unlink(), id="no-weights"),
        pytest.param(cut_weights, id="weights-cut-short"),
    ],
)
def test_a_damaged_model_folder_is_named(damage, folder, toy_folder, capsys, monkeypatch):
    """A download or a copy that broke off."""
    write_rows(folder, toy_folder, {})
    shutil.copytree(folder / "base", folder / "damaged")
    damage(folder / "damaged")
    argv = command_line(folder, {"model": "{}/damaged", "max_new_tokens": "1"})
    refused(evaluation, argv, ["--model", "damaged"], capsys, monkeypatch)


def test_an_output_folder_with_a_run_is_left_alone(folder, toy_folder, capsys, monkeypatch):
    write_rows(folder, toy_folder, {})
    (folder / "old").mkdir()
    (folder / "old/metrics.jsonl").write_text('{"step": 1}\n')
    argv = command_line(folder, {"output_dir": "{}/old", "max_steps": "1"})
    refused(train_rl, argv, ["--output_dir", "old"], capsys, monkeypatch)
    names = {path.name for path in (folder / "old").iterdir()}
    assert names == {"metrics.jsonl", ".lock"}
    assert (folder / "old/metrics.jsonl").read_text() == '{"step": 1}\n'


def test_an_error_in_the_first_step_has_a_line_of_its_own_and_can_be_mended(
    folder, toy_folder, capfd, monkeypatch
):
    """Clips that are not there show only when their turn comes, under the progress bar."""
    write_rows(folder, toy_folder, {})
    rows = json.loads((folder / "rows.json").read_text())
    rows = [row | {"path": "./sft/none.mp4"} for row in rows]
    (folder / "rows.json").write_text(json.dumps(rows))
    flags = {"max_steps": "1", "max_frames": "2", "prompts_per_rank": "2"}
    monkeypatch.setattr(sys, "argv", ["train_sft.py", *command_line(folder, flags)])
    for _ in range(2):  # the second time the output folder is there already
        with pytest.raises(SystemExit):
            run_main(train_sft.main)
        dist.destroy_process_group()
        lines = capfd.readouterr().err.split("\n")
        errors = [line for line in lines if "error: " in line]
        assert len(errors) == 1
        assert errors[0].startswith("error: 11 of 11 samples could not be used")
        listed = lines[lines.index(errors[0]) + 1 :][:11]
        assert all("none.mp4: No such file" in line for line in listed)


# -------------------------------------------------------------------------------- real processes


def test_under_torchrun_the_line_comes_before_torchruns_report(folder, toy_folder):
    """Once before the processes have met, once after; both launches run side by side."""
    write_rows(folder, toy_folder, {"solution": None})
    commands = {
        "train_rl.py": (command_line(folder, {"groop_size": "4"}), ["--groop_size"]),
        "train_sft.py": (command_line(folder, {}), ["rows.json", "row 1", "solution"]),
    }
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone",
              "--nproc_per_node", "2"]  # fmt: skip
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    with contextlib.ExitStack() as stack:
        launched = {
            script: stack.enter_context(
                subprocess.Popen(
                    [*launch, str(ROOT / script), *argv], env=environment, text=True,
                    stdout=subprocess.PIPE, stderr=subprocess.PIPE,
                )
            )
            for script, (argv, _) in commands.items()
        }  # fmt: skip
        for script, process in launched.items():
            _, output = process.communicate(timeout=300)
            assert process.returncode not in (0, None)
            lines = output.split("\n")
            errors = [line for line in lines if line.startswith("error: ")]
            assert len(errors) == 1, output
            assert [word for word in commands[script][1] if word not in errors[0]] == []
            report = next(n for n, line in enumerate(lines) if "ChildFailedError" in line)
            assert lines.index(errors[0]) < report
            assert not any("Traceback" in line for line in lines[: lines.index(errors[0])])
    assert list(Path().iterdir()) == [], "something was written"
