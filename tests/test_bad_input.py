"""Bad input, whole: a script ends with one line that says why, and leaves nothing behind.

Scripts run inside this process, as `python train_rl.py ..` would; test_commands.py launches them.
"""

import gc
import importlib.util
import json
import shutil
import sys
from pathlib import Path

import pytest
import torch.distributed as dist

import eval as evaluation
import train_rl
import train_sft
from infra.distributed import run_main

SCRIPTS = {"sft": train_sft, "rl": train_rl, "eval": evaluation}


@pytest.fixture
def folder(tmp_path, toy_folder, monkeypatch):
    """An empty working folder beside one with good input: a model, two rows and their videos."""
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


def write_rows(folder: Path, toy_folder: Path, changes: dict) -> None:
    """Two good rows of the toy, the second changed; None takes a key away."""
    rows = json.loads((toy_folder / "runs/toy/data/sft.json").read_text())
    rows = [row for row in rows if row["data_type"] == "video"][:2]
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


BAD_INPUT = {  # changes of row 1, flags, words of the error. More rows: test_data.py
    "unknown-flag": ({}, {"oops": "1"}, ["--oops"]),
    "missing-data-file": ({}, {"data": "{}/none.json"}, ["none.json"]),
    "missing-data-root": ({}, {"data_root": "{}/none"}, ["none"]),
    "no-solution": ({"solution": None}, {}, ["rows.json", "row 1", "solution"]),
    "missing-model": ({}, {"model": "{}/none"}, ["--model", "none"]),
    "no-model-folder": ({}, {"model": "{}/sft"}, ["--model", "sft"]),
    "not-a-qwen2.5-vl": ({}, {"model": "{}/llama"}, ["--model", "llama"]),
    "missing-template": ({}, {"prompt_template": "{}/x"}, ["--prompt_template"]),
}


@pytest.mark.parametrize("script", SCRIPTS)
@pytest.mark.parametrize(("row", "flags", "words"), BAD_INPUT.values(), ids=BAD_INPUT)
def test_bad_input_ends_with_one_line(
    script, row, flags, words, folder, toy_folder, capsys, monkeypatch
):
    write_rows(folder, toy_folder, row)
    (folder / "llama").mkdir()
    (folder / "llama/config.json").write_text('{"model_type": "llama"}')
    refused(SCRIPTS[script], command_line(folder, flags), words, capsys, monkeypatch)


EARLY = {
    "keep_best": ({"keep_best": "val_acuracy"}, ["--keep_best", "val_accuracy"]),
    "missing-val_data": ({"val_data": "{}/none.json"}, ["none.json"]),
    "bad-val_data": ({"val_data": "{}/bad.json"}, ["bad.json", "row 0"]),
    "no-tensorboard": ({"tensorboard": "true"}, ["--tensorboard", "pip install"]),
    "infinite-timeout": ({"timeout": "inf"}, ["--timeout", "finite"]),
}


@pytest.mark.parametrize("script", ["sft", "rl"])
@pytest.mark.parametrize(("flags", "words"), EARLY.values(), ids=EARLY)
def test_bad_training_flags_are_refused_before_the_model_is_loaded(
    script, flags, words, folder, toy_folder, capsys, monkeypatch
):
    """Fault 8: some showed only after the model was loaded, or after a step. Fault 23: inf."""
    write_rows(folder, toy_folder, {})
    (folder / "bad.json").write_text('[{"problem": "Which?"}]')
    find_spec = importlib.util.find_spec
    monkeypatch.setattr(
        importlib.util, "find_spec",
        lambda name, *rest: None if name == "tensorboard" else find_spec(name, *rest),
    )  # fmt: skip

    def load(*_, **__):
        raise AssertionError("the model is loaded")

    monkeypatch.setattr(SCRIPTS[script], "load_model", load)
    refused(SCRIPTS[script], command_line(folder, flags), words, capsys, monkeypatch)


OF_ONE_STAGE = {
    "sft-no-process": ("sft", {"process": None}, {}, ["row 1", "process"]),
    "rl-no-answer-matches": ("rl", {"solution": "<answer>left</answer>"}, {}, ["row 1", "left"]),
    "no-such-rows": ("rl", {}, {"data_types": "image"}, ["--data_types"]),
    "eval-output-is-a-file": ("eval", {}, {"output_dir": "{}/rows.json", "max_new_tokens": "1"},
                              ["--output_dir"]),
    "rl-output-is-a-file": ("rl", {}, {"output_dir": "{}/rows.json"}, ["--output_dir"]),
}  # fmt: skip


@pytest.mark.parametrize(
    ("script", "row", "flags", "words"), OF_ONE_STAGE.values(), ids=OF_ONE_STAGE
)
def test_bad_input_of_one_stage(script, row, flags, words, folder, toy_folder, capsys, monkeypatch):
    write_rows(folder, toy_folder, row)
    refused(SCRIPTS[script], command_line(folder, flags), words, capsys, monkeypatch)


DAMAGES = {  # what is left of a file of the model folder: nothing, or this text
    "config-cut-short": ("config.json", "{"),
    "config-is-a-list": ("config.json", "[1]"),
    "no-tokenizer": ("tokenizer.json", None),
    "no-chat-template": ("tokenizer_config.json", None),
    "no-preprocessor": ("preprocessor_config.json", None),
    "no-weights": ("model.safetensors", None),
}


@pytest.mark.parametrize(("name", "content"), DAMAGES.values(), ids=DAMAGES)
def test_a_damaged_model_folder_is_named(name, content, folder, toy_folder, capsys, monkeypatch):
    """A download or a copy that broke off; more of the weights in test_model.py."""
    write_rows(folder, toy_folder, {})
    shutil.copytree(folder / "base", folder / "damaged")
    (folder / "damaged" / name).unlink()
    if content:
        (folder / "damaged" / name).write_text(content)
    argv = command_line(folder, {"model": "{}/damaged", "max_new_tokens": "1"})
    refused(evaluation, argv, ["--model", "damaged"], capsys, monkeypatch)


def test_an_error_in_the_first_step_has_a_line_of_its_own_and_can_be_mended(
    folder, toy_folder, capfd, monkeypatch
):
    """Videos that are not there show only when their turn comes, under the progress bar."""
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
        gc.collect()  # the lock is held as long as the process, here as long as the run
        lines = capfd.readouterr().err.split("\n")
        errors = [line for line in lines if "error: " in line]
        assert len(errors) == 1
        assert errors[0].startswith("error: 11 of 11 samples could not be used")
        listed = lines[lines.index(errors[0]) + 1 :][:11]
        assert all("none.mp4: No such file" in line for line in listed)
