"""Slow: both stages and the evaluation on a real clip and picture with a Hub-shaped model of 81M
random parameters and a real tokenizer; and what the README's command left behind."""

import json
import os
import subprocess
import sys

import pytest
import torch
from conftest import ROOT
from transformers import Qwen2_5_VLForConditionalGeneration

pytestmark = pytest.mark.slow
REAL = ROOT.parent / "shared/real"
SHORT = ["--max_steps", "3", "--prompts_per_step", "2", "--max_frames", "16",
         "--max_pixels", "25088"]  # fmt: skip
RESULTS = ROOT / "runs/toy/eval"


@pytest.fixture(scope="module")
def mini_qwen(tmp_path_factory):
    if not REAL.is_dir():
        pytest.skip("the folder with real input is not there")
    folder = tmp_path_factory.mktemp("real") / "mini-qwen"
    make = REAL / "make_mini_qwen.py"
    subprocess.run([sys.executable, make, REAL / "tokenizer", folder], check=True)
    return folder


def launch(script, *flags, cwd):
    torchrun = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
    subprocess.run(
        [sys.executable, *torchrun, ROOT / script, *map(str, flags)],
        cwd=cwd, env={**os.environ, "PYTHONPATH": str(ROOT)}, check=True, timeout=900,
    )  # fmt: skip


def read_metrics(folder):
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def test_both_stages_and_the_evaluation_on_real_input(mini_qwen, tmp_path):
    rows = REAL / "real.json"
    new_tokens = ["--max_new_tokens", "64"]
    launch("train_sft.py", "--model", mini_qwen, "--data", rows,
           "--learning_rate", "1e-4", *SHORT, cwd=tmp_path)  # fmt: skip
    sft = read_metrics(tmp_path / "runs/sft")
    assert len(sft) == 3
    assert sft[2]["loss"] < sft[0]["loss"]

    sft_model = tmp_path / "runs/sft/model"
    launch("train_rl.py", "--model", sft_model, "--data", rows,
           *SHORT, *new_tokens, cwd=tmp_path)  # fmt: skip
    rl = read_metrics(tmp_path / "runs/rl")
    assert len(rl) == 3
    assert all(line["logp_gap"] < 1e-4 for line in rl)
    assert all(line["completion_length"] <= 64 for line in rl)
    records = (tmp_path / "runs/rl/rollouts.jsonl").read_text().splitlines()
    assert len(records) == 3 * 2

    rl_model = tmp_path / "runs/rl/model"
    launch("eval.py", "--model", rl_model, "--data", rows, "--batch_size", "2",
           "--max_frames", "16", "--max_pixels", "25088", *new_tokens, cwd=tmp_path)  # fmt: skip
    (summary,) = (tmp_path / "runs/eval").glob("*/real.ordered.summary.json")
    assert json.loads(summary.read_text())["num_items"] == 5

    source = {file.name for file in mini_qwen.iterdir()}
    assert {file.name for file in rl_model.iterdir()} == source | {"README.md"}
    assert (rl_model / "config.json").read_bytes() == (mini_qwen / "config.json").read_bytes()
    trained = Qwen2_5_VLForConditionalGeneration.from_pretrained(rl_model, dtype=torch.float32)
    assert all(torch.isfinite(parameter).all() for parameter in trained.parameters())


@pytest.mark.skipif(not RESULTS.is_dir(), reason="the README's first command has not been run")
def test_the_readmes_command_taught_the_toy_the_order_of_frames():
    found = {}
    for file in RESULTS.glob("*/test.*.summary.json"):
        summary = json.loads(file.read_text())
        stage = "rl" if "rl" in summary["model"] else "sft"
        found[stage, summary["order"]] = 100 * summary["accuracy"]
        assert summary["n"] >= 200
    gaps = {stage: found[stage, "ordered"] - found[stage, "shuffled"] for stage in ("sft", "rl")}
    # One seed may lie below the mean of several.
    assert found["rl", "ordered"] >= 75
    assert found["rl", "ordered"] >= found["sft", "ordered"] + 5
    assert gaps["rl"] >= gaps["sft"] + 5
