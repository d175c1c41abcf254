"""Real processes: gloo, FSDP2, torchrun, signals, lost ranks. The training runs that are compared
are in ranks.py, one launch for each number of processes; those that are killed in kills.py."""

import json
import os
import random
import shutil
import signal
import subprocess
import sys
import time

import kills
import pytest
import torch
from conftest import ROOT
from ranks import UNUSABLE
from safetensors.torch import load_file, save_file
from transformers import AutoConfig, Qwen2_5_VLForConditionalGeneration

import infra.distributed
from infra.distributed import choose_device, process_group
from infra.errors import UserError
from model import hub_name

TORCHRUN = (sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node")
ENVIRONMENT = {**os.environ, "PYTHONPATH": str(ROOT)}


# ------------------------------------------------------------------- the same run on any ranks


@pytest.fixture(scope="module")
def runs(toy_folder):
    """Launch ranks.py on 1, 2 and 4 processes: a function from their number to the output."""
    outputs = {}

    def launch(num_processes):
        if num_processes not in outputs:
            out = toy_folder / f"ranks-{num_processes}"
            subprocess.run(
                [*TORCHRUN, str(num_processes), ROOT / "tests/ranks.py", out],
                cwd=toy_folder, env=ENVIRONMENT, check=True, timeout=400,
            )  # fmt: skip
            assert (out / "done").is_file()
            outputs[num_processes] = out
        return outputs[num_processes]

    return launch


def records(file):
    return [json.loads(line) for line in file.read_text().splitlines()]


def metrics(folder):
    return records(folder / "metrics.jsonl")


RANKS = (2, pytest.param(4, marks=pytest.mark.slow))  # 2 in passes of one prompt, see ranks.py
COMPARED = {
    "sft": ("loss", "grad_norm", "tokens"),
    "rl-token": ("loss", "grad_norm", "kl", "reward", "accuracy", "temporal", "zero_std"),
    "rl-sequence": ("loss", "grad_norm", "kl", "clip_fraction", "completion_length"),
}


@pytest.mark.parametrize("num_processes", RANKS)
@pytest.mark.parametrize("stage", COMPARED)
def test_losses_do_not_depend_on_how_a_step_is_split(runs, stage, num_processes):
    expected, found = (metrics(runs(number) / stage) for number in (1, num_processes))
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


@pytest.mark.parametrize("num_processes", RANKS)
def test_tied_embeddings_train_alike_on_any_number_of_processes(runs, num_processes):
    expected, found = (metrics(runs(number) / "tied") for number in (1, num_processes))
    for mine, other in zip(found, expected, strict=True):
        for key in COMPARED["sft"]:
            assert mine[key] == pytest.approx(other[key], abs=1e-5, rel=1e-5), key


def test_the_same_seed_gives_the_same_metrics_bit_for_bit(runs):
    once, again = (
        [{key: value for key, value in line.items() if not key.startswith(kills.TIMINGS)}
         for line in metrics(runs(2) / f"sampled-{name}")]
        for name in ("once", "again")
    )  # fmt: skip
    assert once == again
    rollouts = [
        (runs(2) / f"sampled-{name}/rollouts.jsonl").read_bytes() for name in ("once", "again")
    ]
    assert rollouts[0] == rollouts[1]
    assert all(line["logp_gap"] < 1e-5 for line in once)


def test_ranks_with_images_alone_and_videos_alone_train_together(runs):
    for stage in ("sft", "rl"):
        assert len(metrics(runs(2) / f"unlike-{stage}")) == 5
    lengths = {}
    for record in records(runs(2) / "unlike-rl/rollouts.jsonl"):
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
        skipped, lines = records(folder / "skipped.jsonl"), metrics(folder)
        assert len(lines) == 6
        assert [line["skipped"] for line in lines] == [
            sum(record["step"] == step for record in skipped) for step in range(1, 7)
        ]
        # 24 samples are wanted: each bad file is met in the first 24 places or just after.
        assert {record["row"] for record in skipped} == bad
        assert {record["rank"] for record in skipped} == {0, 1}
        for record in skipped:
            name = record["path"].rpartition("/")[2]
            assert rows[record["row"]]["path"].endswith(name)
            assert reasons[name] in record["reason"]
    used = [record["row"] for record in records(runs(2) / "unusable-rl/rollouts.jsonl")]
    assert len(used) == 24
    assert not set(used) & bad


def test_a_frozen_vision_tower_stays_and_the_rest_learns(runs, toy_folder):
    source = load_file(toy_folder / "runs/toy/base/model.safetensors")
    for stage in ("sft", "rl"):
        found = load_file(runs(2) / f"frozen-{stage}/model/model.safetensors")
        assert found.keys() == source.keys()
        for name, weight in found.items():
            assert torch.equal(weight, source[name]) is name.startswith("visual."), name


def test_the_exported_model_opens_in_transformers_and_has_moved(runs, toy_folder):
    base = toy_folder / "runs/toy/base"
    source = Qwen2_5_VLForConditionalGeneration.from_pretrained(base, dtype=torch.float32)
    for name in ("sft", "rl-token"):
        folder = runs(2) / name / "model"
        names = {file.name for file in base.iterdir()} | {"README.md"}
        assert {file.name for file in folder.iterdir()} == names
        trained = Qwen2_5_VLForConditionalGeneration.from_pretrained(folder, dtype=torch.float32)
        for (key, mine), theirs in zip(
            trained.state_dict().items(), source.state_dict().values(), strict=True
        ):
            assert not torch.equal(mine, theirs), key
            assert torch.isfinite(mine).all(), key


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
    done = subprocess.run(
        [*TORCHRUN, "4", ROOT / "tests/loading.py", gigabyte_model], env=ENVIRONMENT, check=True,
        timeout=400, capture_output=True,
    )  # fmt: skip
    readings = json.loads(done.stdout.splitlines()[-1])
    assert len(readings) == 4
    assert sum(rank["shard"] for rank in readings) == readings[0]["model"] > 0.9 * 2**30
    for rank in readings:
        # Beside the shard: a copy of the rows that are read, the pages they are read from.
        assert rank["peak"] < rank["shard"] + rank["largest"] / 2 + 32 * 2**20, readings


# ------------------------------------------------------------------------------ device and dtype


def test_fewer_gpus_than_ranks_are_refused_or_left_alone(monkeypatch, capsys):
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "2")
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    with pytest.raises(UserError, match=r"2 processes and 1 GPU here: start 1 at most"):
        choose_device()
    assert choose_device(cpu_fallback=True) == torch.device("cpu")
    assert capsys.readouterr().out == "2 processes and 1 GPU here: running on CPU\n"


def test_each_rank_takes_its_gpu_and_no_cudnn_attention(monkeypatch):
    chosen = []
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "2")
    monkeypatch.setenv("LOCAL_RANK", "1")
    monkeypatch.setenv("PYTORCH_ALLOC_CONF", "")  # which it would set for the tests that follow
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(torch.cuda, "set_device", chosen.append)
    before, tf32 = torch.backends.cuda.cudnn_sdp_enabled(), torch.backends.cudnn.allow_tf32
    try:
        assert choose_device() == torch.device("cuda", 1)
        assert not torch.backends.cuda.cudnn_sdp_enabled()
        assert not torch.backends.cudnn.allow_tf32
    finally:
        torch.backends.cuda.enable_cudnn_sdp(before)
        torch.backends.cudnn.allow_tf32 = tf32
    assert chosen == [torch.device("cuda", 1)]


@pytest.mark.parametrize("given", ["", "max_split_size_mb:512"], ids=["default", "the-users-own"])
def test_memory_is_allocated_in_segments_that_grow(given, monkeypatch):
    monkeypatch.setenv("PYTORCH_ALLOC_CONF", given)
    if not given:
        monkeypatch.delenv("PYTORCH_ALLOC_CONF")
    choose_device()
    assert os.environ.get("PYTORCH_ALLOC_CONF", "") == given  # a machine without a GPU needs none
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    monkeypatch.setattr(torch.cuda, "set_device", lambda device: None)
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", True)  # restored afterwards
    monkeypatch.setattr(torch.backends.cuda, "enable_cudnn_sdp", lambda enabled: None)
    choose_device()
    assert os.environ["PYTORCH_ALLOC_CONF"] == (given or "expandable_segments:True")


# What torch does with it is checked without a GPU: a value that it cannot parse raises where it is
# first read.
READ_LATE = """
import os, torch
torch.cuda.device_count()
os.environ.setdefault("PYTORCH_ALLOC_CONF", "expandable_segments:ours")
torch._C._accelerator_setAllocatorSettings("")
"""


@pytest.mark.parametrize(("given", "read"), [
    ({}, "ours"), ({"PYTORCH_CUDA_ALLOC_CONF": "expandable_segments:old"}, "old"),
])  # fmt: skip
def test_torch_reads_the_variable_late_and_its_older_name_first(given, read):
    done = subprocess.run(
        [sys.executable, "-c", READ_LATE], env=ENVIRONMENT | given, text=True, capture_output=True
    )
    assert f"but got '{read}'" in done.stderr


@pytest.mark.parametrize(("precision", "dtype"), [
    ("", torch.float32), ("fp32", torch.float32), ("bf16", torch.bfloat16),
])  # fmt: skip
def test_the_precision_on_cpu(precision, dtype):
    with process_group(precision=precision) as world:
        assert (world.device.type, world.dtype, world.size) == ("cpu", dtype, 1)


# --------------------------------------------------------------------- lost ranks and signals


LOST = """
import time
import torch.distributed as dist
import infra.distributed as ours

ours.SHORTEST_TIMEOUT = 6

def main():
    with ours.process_group(6) as world:
        ours.name_missing_ranks(world)
        if world.rank == 1:
            time.sleep(100)
        ours.name_missing_ranks(world)
        dist.barrier()

ours.run_main(main)
"""


def test_a_missing_rank_is_named_and_ends_the_job(tmp_path):
    (tmp_path / "lost.py").write_text(LOST)
    begun = time.monotonic()
    done = subprocess.run([*TORCHRUN, "3", tmp_path / "lost.py"], env=ENVIRONMENT, timeout=60,
                          capture_output=True, text=True)  # fmt: skip
    assert done.returncode == 1
    assert ("error: a rank has died (torchrun's report below names it) or hangs: "
            "[Rank 0]: Ranks 1 failed to pass monitoredBarrier in 3000 ms") in done.stderr
    assert time.monotonic() - begun < 30
    assert "Traceback" not in done.stderr.partition("torch/distributed")[0]


def log_of(folder):
    return (folder.parent / f"{folder.name}.log").read_text(errors="replace")


def wait_for_steps(folder, number):
    file = folder / "metrics.jsonl"
    kills.wait_until(
        lambda: file.exists() and file.read_bytes().count(b"\n") >= number, 100, f"step {number}"
    )


@pytest.mark.slow
def test_sigkill_to_a_rank_ends_the_job_at_once(killed_base):
    folder = killed_base / "killed"
    process = kills.start("sft", folder)
    wait_for_steps(folder, 4)
    begun = time.monotonic()
    kills.kill(process, "rank", number=1)
    assert time.monotonic() - begun < 30  # and not the 1800 s of --timeout
    assert "error: a rank has died (torchrun's report below names it)" in log_of(folder)
    assert "(SIGKILL)" in log_of(folder)
    assert not (folder / "model").exists()
    kills.finish("sft", folder)
    assert kills.outcome(folder) == kills.outcome(killed_base / "undisturbed")


SIGNALS = """
import time
from infra.distributed import StopRequest, run_main

def main():
    with StopRequest() as request:
        print("ready", flush=True)
        while not request.name:
            time.sleep(0.01)
        print(request.name, flush=True)
        time.sleep(60)

run_main(main)
"""


def test_the_second_signal_ends_the_process_at_once():
    process = subprocess.Popen([sys.executable, "-c", SIGNALS], stdout=subprocess.PIPE, text=True,
                               env=ENVIRONMENT)  # fmt: skip
    assert process.stdout.readline() == "ready\n"
    process.send_signal(signal.SIGINT)
    process.send_signal(signal.SIGTERM)  # what torchrun passes on at once counts as the same
    assert process.stdout.readline() in ("SIGINT\n", "SIGTERM\n")
    time.sleep(1.2)
    assert process.poll() is None
    process.send_signal(signal.SIGINT)
    assert process.wait(10) == -signal.SIGINT


ENDS = {
    "ctrl-c": ("os.kill(os.getpid(), signal.SIGINT); time.sleep(9)", 130, "interrupted\n"),
    "user": ("raise UserError('--model x is no folder')", 2, "error: --model x is no folder\n"),
}


@pytest.mark.parametrize(("what", "code", "words"), ENDS.values(), ids=ENDS)
def test_what_ends_with_one_line_and_no_traceback(what, code, words):
    """Ctrl-C outside training gave a traceback (fault 23)."""
    script = f"""
import os, signal, time
from infra.distributed import run_main
from infra.errors import UserError

signal.signal(signal.SIGINT, signal.default_int_handler)  # a background job inherits SIG_IGN

def main():
    {what}

run_main(main)
"""
    done = subprocess.run([sys.executable, "-c", script], env=ENVIRONMENT, capture_output=True,
                          text=True, timeout=60)  # fmt: skip
    assert (done.returncode, done.stderr) == (code, words)


def test_a_bug_keeps_its_traceback():
    def main():
        raise RuntimeError("gloo is mentioned, but this process is alone")

    with pytest.raises(RuntimeError, match="gloo"):
        infra.distributed.run_main(main)


# -------------------------------------------------------------------------------------------- slow


@pytest.mark.slow
def test_torchrun_restarts_a_run_whose_rank_is_killed(killed_base):
    folder = killed_base / "restarted"
    process = kills.start("sft", folder, launcher=("--standalone", "--max-restarts", "3"))
    wait_for_steps(folder, 4)
    os.kill(kills.children(process.pid)[1], signal.SIGKILL)
    assert process.wait(200) == 0, log_of(folder)[-3000:]
    assert "resumed from" in log_of(folder)
    assert kills.outcome(folder) == kills.outcome(killed_base / "undisturbed")


@pytest.mark.slow
def test_two_nodes_of_two_processes_with_a_copy_of_the_model_each(killed_base):
    """HSDP: two launchers that find each other as two nodes would, --replicas 2."""
    for name, replicas in (("copies", 2), ("shards", 1)):
        port = 20000 + random.Random().randrange(20000)
        nodes = [
            kills.start(
                "sft", killed_base / name, "--replicas", str(replicas), "--prompts_per_rank", "2",
                "--max_steps", "4",
                launcher=("--nnodes", "2", "--node_rank", str(node), "--master_addr", "127.0.0.1",
                          "--master_port", str(port)),
            )
            for node in range(2)
        ]  # fmt: skip
        for process in nodes:
            assert process.wait(300) == 0, log_of(killed_base / name)[-3000:]
    found, expected = (kills.outcome(killed_base / name) for name in ("copies", "shards"))
    for mine, other in zip(found["metrics"], expected["metrics"], strict=True):
        assert mine["loss"] == pytest.approx(other["loss"], abs=1e-5)
        assert mine["grad_norm"] == pytest.approx(other["grad_norm"], rel=1e-5)
    weights, others = (
        load_file(killed_base / name / "model/model.safetensors") for name in ("copies", "shards")
    )
    for key, weight in weights.items():
        torch.testing.assert_close(weight, others[key], rtol=0, atol=1e-4)
