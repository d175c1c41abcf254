"""Slow: the README's flags, and one small run through all scripts, by command line.

Nothing here imports the project, so that it holds whatever the code looks like inside.
"""

import json
import os
import re
import shlex
import signal
import subprocess
import sys
import time

import pytest
import torch
from conftest import ROOT
from transformers import Qwen2_5_VLForConditionalGeneration

pytestmark = pytest.mark.slow
TOY = "runs/toy/data"
SMALL = ["--max_frames", "8", "--num_workers", "1", "--max_new_tokens", "12"]


def start(script, *flags, cwd):
    return subprocess.Popen(
        [sys.executable, ROOT / script, *map(str, flags)], cwd=cwd, text=True,
        stdout=subprocess.PIPE, stderr=subprocess.PIPE, env={**os.environ, "OMP_NUM_THREADS": "1"},
    )  # fmt: skip


def end(process, code=0):
    """Wait for a script; it must end with this exit code. Returns stdout and stderr."""
    out, err = process.communicate(timeout=300)
    assert process.returncode == code, out + err
    assert "Traceback" not in err
    return out, err


def command(script, *flags, cwd, code=0):
    return end(start(script, *flags, cwd=cwd), code)


def read_lines(file):
    return [json.loads(line) for line in file.read_text().splitlines()]


# ------------------------------------------------------------------------------------ command lines


def readme_commands():
    """Every command of the README's code blocks that starts one of the scripts, in words."""
    for block in re.findall(r"```bash\n(.*?)```", (ROOT / "README.md").read_text(), re.S):
        for line in block.replace("\\\n", " ").replace("&&", "\n").splitlines():
            words = shlex.split(line, comments=True)
            scripts = [place for place, word in enumerate(words) if word.endswith(".py")]
            if scripts and words[0] in ("python", "torchrun"):
                yield words[scripts[0] :]


SCRIPTS = ("train_sft.py", "train_rl.py", "eval.py", "annotate.py", "data.py", "plot.py")


@pytest.mark.parametrize("script", SCRIPTS)
def test_the_readmes_flags_are_in_help(script, tmp_path):
    flags = re.findall(r"--\w+", command(script, "--help", cwd=tmp_path)[0])
    for name, *words in readme_commands():
        if name == script:
            unknown = {word.split("=")[0] for word in words if word.startswith("--")} - {*flags}
            assert not unknown, words
    assert not list(tmp_path.iterdir())


def test_the_readme_uses_no_model_before_a_command_makes_it():
    """Fault 25: the first real command wanted runs/sft/model; an empty line cut a table in two."""
    made = set()
    for name, *words in readme_commands():
        assert set(re.findall(r"runs/(sft|rl)/model", " ".join(words))) <= made, words
        if "--model" in words:  # else the toy, which is not in runs/sft
            made |= {stage for stage in ("sft", "rl") if name == f"train_{stage}.py"}
    assert made == {"sft", "rl"}
    assert not re.search(r"^\|.*\n\n\|", (ROOT / "README.md").read_text(), re.M)


WRONG = {
    "model-without-data": ("train_sft.py", ["--model", "m"], "--data"),
    "nothing-to-compare": ("eval.py", ["--compare", "a", "b"], "a does not exist"),
    "no-data-file": ("data.py", ["none.json"], "none.json"),
}


@pytest.mark.parametrize(("script", "flags", "words"), WRONG.values(), ids=WRONG)
def test_a_wrong_command_is_one_line_and_exit_code_2(script, flags, words, tmp_path):
    lines = command(script, *flags, cwd=tmp_path, code=2)[1].splitlines()
    errors = [line for line in lines if line.startswith("error: ")]
    assert len(errors) == 1 and words in errors[0]
    assert not list(tmp_path.iterdir())


# ----------------------------------------------------------------------- a run through all scripts


@pytest.fixture(scope="module")
def folder(toy_folder, tmp_path_factory):
    """A working folder with the toy's data, and 12 rows of its test set as a benchmark's file."""
    folder = tmp_path_factory.mktemp("commands")
    (folder / "runs").mkdir()
    (folder / "runs/toy").symlink_to(toy_folder / "runs/toy")
    rows = json.loads((folder / TOY / "test.json").read_text())[:12]
    (folder / "eval_mmvu.json").write_text(json.dumps(rows))
    broken = [row | {"path": "./test/none.y4m"} if place == 3 else row
              for place, row in enumerate(rows)]  # fmt: skip
    (folder / "broken.json").write_text(json.dumps(broken))
    return folder


@pytest.fixture(scope="module")
def sft(folder):
    """runs/sft: four steps, killed by SIGKILL after the second and resumed."""
    flags = ["--model", "runs/toy/base", "--data", f"{TOY}/sft.json", *SMALL, "--max_steps", 4,
             "--save_every", 1, "--learning_rate", "1e-3"]  # fmt: skip
    command("train_sft.py", *flags, "--output_dir", "runs/undisturbed", cwd=folder)
    process = start("train_sft.py", *flags, cwd=folder)
    give_up = time.monotonic() + 120
    while not (folder / "runs/sft/checkpoints/step_000002").exists():
        assert process.poll() is None and time.monotonic() < give_up
        time.sleep(0.01)
    process.send_signal(signal.SIGKILL)
    process.communicate()
    command("train_sft.py", *flags, cwd=folder)
    return folder / "runs/sft"


@pytest.fixture(scope="module")
def rl(folder, sft):
    flags = ["--model", "runs/sft/model", "--data", f"{TOY}/rl.json", *SMALL, "--max_steps", 2]
    command("train_rl.py", *flags, "--group_size", 4, "--shuffled_group_size", 2, cwd=folder)
    return folder / "runs/rl"


@pytest.fixture(scope="module")
def results(folder, sft, rl):
    for model in ("runs/sft/model", "runs/rl/model"):
        command("eval.py", "--model", model, "--data", "eval_mmvu.json", "--data_root", TOY,
                *SMALL, "--order", "ordered,shuffled", cwd=folder)  # fmt: skip
    return folder / "runs/eval"


def test_a_killed_run_resumes_bit_for_bit(folder, sft):
    undisturbed = folder / "runs/undisturbed"
    weights = [path / "model/model.safetensors" for path in (sft, undisturbed)]
    assert weights[0].read_bytes() == weights[1].read_bytes()
    found, expected = (read_lines(path / "metrics.jsonl") for path in (sft, undisturbed))
    assert [line["step"] for line in found] == [1, 2, 3, 4]
    assert [line["loss"] for line in found] == [line["loss"] for line in expected]


METRICS = {
    "step", "reward", "accuracy", "accuracy_shuffled", "gap", "format", "temporal",
    "temporal_earned", "length_reward", "completion_length", "clipped_length", "zero_std", "kl",
    "clip_fraction", "loss", "grad_norm", "lr", "logp_gap", "seconds", "seconds_data",
    "seconds_rollout", "seconds_reward", "seconds_reference", "seconds_update",
    "tokens_per_second", "peak_memory_gib",
}  # fmt: skip


def test_an_rl_run_leaves_what_is_promised(rl, folder):
    assert json.loads((rl / "config.json").read_text())["group_size"] == 4
    metrics, rollouts = (read_lines(rl / f"{name}.jsonl") for name in ("metrics", "rollouts"))
    assert [line["step"] for line in metrics] == [1, 2]
    assert all(set(line) >= METRICS for line in metrics)
    assert {record["step"] for record in rollouts} == {1, 2}
    assert all(len(record["responses"]) == 4 for record in rollouts)
    opened = Qwen2_5_VLForConditionalGeneration.from_pretrained(rl / "model", dtype="auto")
    assert opened.dtype == torch.float32
    assert all(torch.isfinite(parameter).all() for parameter in opened.parameters())
    base, model = folder / "runs/toy/base", rl / "model"
    assert {file.name for file in base.iterdir()} <= {file.name for file in model.iterdir()}


def test_results_can_be_compared_and_tabulated(results, folder):
    summaries = {file: json.loads(file.read_text()) for file in results.rglob("*.summary.json")}
    assert len(summaries) == 4  # two models, two orders
    for file, summary in summaries.items():
        benchmark, order = file.name.split(".")[:2]
        assert (summary["benchmark"], summary["order"]) == (benchmark, order)
        assert {"model", "n", "accuracy", "by_type"} <= set(summary)
        assert len(read_lines(file.with_name(f"{benchmark}.{order}.jsonl"))) == 12
    folders = sorted({file.parent for file in summaries})
    assert "minus" in command("eval.py", "--compare", *folders, cwd=folder)[0]
    table = command("eval.py", "--table", "runs/eval", cwd=folder)[0]
    assert all(f"| {model} |" in table for model in ("runs/sft/model", "runs/rl/model"))


def test_a_question_about_one_video_is_answered(folder, sft):
    video = min((folder / TOY / "test").glob("*.y4m"))
    asked = ["--model", "runs/sft/model", "--video", video, "--question", "Which way?"]
    assert command("eval.py", *asked, *SMALL, cwd=folder)[0].strip()


@pytest.mark.parametrize("file, code", [("eval_mmvu.json", 0), ("broken.json", 1)])
def test_data_says_whether_all_rows_can_be_used(folder, file, code):
    out, _ = command("data.py", file, "--data_root", TOY, "--decode", "all", cwd=folder, code=code)
    assert f"{12 - code} of 12 rows would be used" in out
