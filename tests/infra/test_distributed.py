"""Real processes: gloo, FSDP2, torchrun. The trainings are in ranks.py, one launch for each
number of processes; here their metrics are compared."""

import json
import os
import shutil
import subprocess
import sys
import time

import pytest
import torch
import torch.distributed as dist
from conftest import ROOT
from ranks import UNUSABLE
from safetensors.torch import load_file, save_file
from transformers import AutoConfig, Qwen2_5_VLForConditionalGeneration

from infra.distributed import Watch
from model import hub_name

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
    "budget": (1, "budget"),
    "2-processes": (2, "whole"),
    "2-processes-budget": (2, "budget"),
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


def test_unusable_files_are_replaced_and_recorded(runs):
    rows = json.loads((runs(2) / "unusable/rows.json").read_text())
    bad = {number for number, row in enumerate(rows) if "/unusable/" in row["path"]}
    assert len(bad) == len(UNUSABLE) == 6
    reasons = {
        "garbage.mp4": "not a video", "empty.mp4": "zero bytes", "directory.mp4": "a directory",
        "fifo.mp4": "a FIFO", "truncated.mp4": "truncated", "none.mp4": "No such file",
    }  # fmt: skip
    for stage in ("sft", "rl"):
        folder = runs(2) / f"unusable-{stage}"
        skipped = [json.loads(line) for line in (folder / "skipped.jsonl").read_text().splitlines()]
        lines = metrics(folder)
        assert len(lines) == 6
        assert [line["skipped"] for line in lines] == [
            sum(record["step"] == step for record in skipped) for step in range(1, 7)
        ]
        # 24 samples are wanted: each bad file is met in the first 24 places or just behind.
        assert {record["row"] for record in skipped} == bad
        assert {record["rank"] for record in skipped} == {0, 1}
        for record in skipped:
            name = record["path"].rpartition("/")[2]
            assert rows[record["row"]]["path"].endswith(name)
            assert reasons[name] in record["reason"]
    records = (runs(2) / "unusable-rl/rollouts.jsonl").read_text().splitlines()
    used = [json.loads(line)["row"] for line in records]
    assert len(used) == 24
    assert not set(used) & bad


def test_a_frozen_vision_tower_stays_and_the_rest_learns(runs, toy_folder):
    source = load_file(toy_folder / "runs/toy/base/model.safetensors")
    for stage in ("sft", "rl"):
        found = load_file(runs(2) / f"frozen-{stage}/model/model.safetensors")
        assert found.keys() == source.keys()
        for name, weight in found.items():
            assert torch.equal(weight, source[name]) is name.startswith("visual."), name


@pytest.fixture(scope="module")
def gigabyte_model(toy_folder, tmp_path_factory):
    """A model folder of 253 M parameters in float32, in shards with an index."""
    base, folder = toy_folder / "runs/toy/base", tmp_path_factory.mktemp("large") / "model"
    shutil.copytree(base, folder, ignore=shutil.ignore_patterns("*.safetensors"))
    config = json.loads((folder / "config.json").read_text())
    config |= {"hidden_size": 1024, "intermediate_size": 4096, "num_hidden_layers": 12,
               "num_attention_heads": 16, "num_key_value_heads": 4,
               "vocab_size": 32000}  # fmt: skip
    config["rope_scaling"]["mrope_section"] = [8, 12, 12]
    config["vision_config"]["out_hidden_size"] = 1024
    (folder / "config.json").write_text(json.dumps(config))
    with torch.device("meta"):
        shapes = Qwen2_5_VLForConditionalGeneration(AutoConfig.from_pretrained(folder))
    weight_map, shard = {}, {}
    for number, (name, parameter) in enumerate(shapes.named_parameters()):
        shard[hub_name(name)] = torch.full(parameter.shape, float(number))
        if sum(weight.nbytes for weight in shard.values()) > 2**28:
            file = f"model-{len(set(weight_map.values())):05d}.safetensors"
            save_file(shard, folder / file, metadata={"format": "pt"})
            weight_map |= dict.fromkeys(shard, file)
            shard = {}
    save_file(shard, folder / "model-rest.safetensors", metadata={"format": "pt"})
    weight_map |= dict.fromkeys(shard, "model-rest.safetensors")
    index = {"metadata": {}, "weight_map": weight_map}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    return folder


@pytest.mark.slow
def test_loading_takes_a_rank_its_shard_and_a_buffer(gigabyte_model):
    launcher = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "4"]
    done = subprocess.run(
        [sys.executable, *launcher, ROOT / "tests/loading.py", gigabyte_model],
        env={**os.environ, "PYTHONPATH": str(ROOT)}, check=True, timeout=400, capture_output=True,
    )  # fmt: skip
    readings = json.loads(done.stdout.splitlines()[-1])
    print(readings)
    assert len(readings) == 4
    assert sum(rank["shard"] for rank in readings) == readings[0]["model"] > 0.9 * 2**30
    for rank in readings:
        # Beside the shard: a copy of the rows that are read, the pages they are read from.
        assert rank["peak"] < rank["shard"] + rank["largest"] / 2 + 32 * 2**20


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


def test_a_rank_that_stops_after_its_first_beat_is_missed():
    store = dist.HashStore()
    store.set("beat/1", json.dumps({"number": 1, "place": "the start", "pid": 0, "host": "far"}))
    with Watch(store, rank=0, size=2, timeout=1000) as watch:
        assert not watch.lost(60)
        time.sleep(0.2)
        assert watch.lost(0.1)[1]["place"] == "the start"
