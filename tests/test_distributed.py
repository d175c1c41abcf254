"""Real processes: gloo, FSDP2, torchrun. The trainings are in ranks.py, one launch for each
number of processes; here their metrics are compared."""

import json
import os
import subprocess
import sys

import pytest
import torch
from conftest import ROOT
from transformers import Qwen2_5_VLForConditionalGeneration

TIMINGS = ("seconds", "tokens_per_second", "peak_memory_gib")


@pytest.fixture(scope="module")
def runs(toy_folder):
    """Launch ranks.py on 1, 2 and 4 processes: a function from their number to the output."""
    outputs = {}

    def launch(num_processes):
        if num_processes not in outputs:
            out = toy_folder / f"ranks-{num_processes}"
            launcher = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node"]
            subprocess.run(
                [sys.executable, *launcher, str(num_processes), ROOT / "tests/ranks.py", out],
                cwd=toy_folder, env={**os.environ, "PYTHONPATH": str(ROOT)}, check=True,
                timeout=400,
            )  # fmt: skip
            assert (out / "done").is_file()
            outputs[num_processes] = out
        return outputs[num_processes]

    return launch


def metrics(folder):
    lines = (folder / "metrics.jsonl").read_text().splitlines()
    return [json.loads(line) for line in lines]


def without_timings(folder):
    return [
        {key: value for key, value in line.items() if not key.startswith(TIMINGS)}
        for line in metrics(folder)
    ]


CUTS = {
    "accumulated": (1, "accumulated"),
    "2-processes": (2, "whole"),
    "4-processes": (4, "whole"),
}
COMPARED = {
    "sft": ("loss", "grad_norm", "tokens"),
    "rl-token": ("loss", "grad_norm", "kl", "reward", "accuracy", "temporal", "zero_std"),
    "rl-sequence": ("loss", "grad_norm", "kl", "clip_fraction", "completion_length"),
}


@pytest.mark.parametrize(("num_processes", "name"), CUTS.values(), ids=CUTS)
@pytest.mark.parametrize("stage", COMPARED)
def test_losses_do_not_depend_on_how_a_step_is_cut(runs, stage, num_processes, name):
    expected = metrics(runs(1) / f"{stage}-whole")
    found = metrics(runs(num_processes) / f"{stage}-{name}")
    assert len(found) == len(expected) == 3
    for mine, other in zip(found, expected, strict=True):
        for key in COMPARED[stage]:
            relative = 1e-5 if key == "grad_norm" else 0  # the others are compared to 1e-5 flat
            assert mine[key] == pytest.approx(other[key], abs=1e-5, rel=relative), key
    # The comparison means something: rewards differ within groups, and the weights moved.
    assert expected[0]["grad_norm"] > 1e-3
    if stage == "sft":
        assert expected[2]["loss"] < expected[0]["loss"] - 0.1
    else:
        assert expected[2]["kl"] > 1e-5
    if stage == "rl-sequence":
        assert expected[2]["clip_fraction"] > 0


@pytest.mark.parametrize("num_processes", [2, 4])
def test_tied_embeddings_train_alike_on_any_number_of_processes(runs, num_processes):
    expected, found = (metrics(runs(number) / "tied-whole") for number in (1, num_processes))
    for mine, other in zip(found, expected, strict=True):
        for key in COMPARED["sft"]:
            assert mine[key] == pytest.approx(other[key], abs=1e-5, rel=1e-5), key


def test_the_same_seed_gives_the_same_metrics_bit_for_bit(runs):
    once, again = (without_timings(runs(2) / f"sampled-{name}") for name in ("once", "again"))
    assert once == again
    rollouts = [
        (runs(2) / f"sampled-{name}/rollouts.jsonl").read_bytes() for name in ("once", "again")
    ]
    assert rollouts[0] == rollouts[1]
    assert all(line["logp_gap"] < 1e-5 for line in once)


def test_ranks_with_images_alone_and_videos_alone_train_together(runs):
    for stage in ("sft", "rl"):
        assert len(metrics(runs(2) / f"unlike-{stage}")) == 5
    lines = (runs(2) / "unlike-rl/rollouts.jsonl").read_text().splitlines()
    lengths = {}
    for record in map(json.loads, lines):
        longest = max(response["length"] for response in record["responses"])
        kind = "image" if record["path"].endswith(".png") else "video"
        lengths.setdefault(kind, []).append(longest)
        assert bool(record["shuffled_responses"]) is (kind == "video")
    assert max(lengths["image"]) == 3
    assert max(lengths["video"]) == 12
    assert len(lengths["image"]) == len(lengths["video"]) == 10


def test_the_exported_model_opens_in_transformers_and_has_moved(runs, toy_folder):
    base = toy_folder / "runs/toy/base"
    for name in ("sft-whole", "rl-token-whole"):
        folder = runs(2) / name / "model"
        assert {file.name for file in folder.iterdir()} == {file.name for file in base.iterdir()}
        trained = Qwen2_5_VLForConditionalGeneration.from_pretrained(folder, dtype=torch.float32)
        source = Qwen2_5_VLForConditionalGeneration.from_pretrained(base, dtype=torch.float32)
        for (key, mine), theirs in zip(
            trained.state_dict().items(), source.state_dict().values(), strict=True
        ):
            assert mine.dtype == theirs.dtype == torch.float32
            assert not torch.equal(mine, theirs), key
            assert torch.isfinite(mine).all(), key
