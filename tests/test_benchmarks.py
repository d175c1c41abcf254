"""benchmarks/: both recipes take a step and write what they promise; FLOPs, bytes and parameters
computed from shapes equal those counted on the toy."""

import gc
import json
import math
import sys
from pathlib import Path

import plain
import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

import model as model_module
import sampling
import train_rl
from benchmarks import counting, gpu, measure, plan, rl_step
from benchmarks.counting import Load
from infra.errors import UserError
from infra.optim import make_optimizer
from model import enable_packing, forbidden_tokens, load_model, load_tokenizer, pack_groups

CPU = torch.device("cpu")
GROUP, SHUFFLED, TOKENS = 3, 2, 4


@pytest.fixture(scope="module")
def base(toy_folder):
    return str(toy_folder / "runs/toy/base")


@pytest.fixture(scope="module")
def toy(base):
    model = load_model(base, CPU)
    enable_packing(model)
    return model.eval()


@pytest.fixture(scope="module")
def prompts(toy_folder, base):
    return plain.toy_prompts(toy_folder, load_tokenizer(base), ["video", "video"])


# ------------------------------------------------------------------------------------ rl_step.py


def test_both_recipes_take_a_step_and_write_what_they_promise(
    toy_folder, base, tmp_path, monkeypatch, capsys
):
    lengths = []  # of all responses that were scored

    def spy(ordered, shuffled, config, score_group=train_rl.score_group):
        lengths.append(ordered.lengths.tolist() + shuffled.lengths.tolist())
        return score_group(ordered, shuffled, config)

    monkeypatch.setattr(train_rl, "score_group", spy)
    monkeypatch.setattr(measure, "fastest", lambda run, device: run() is None or 1.0)  # run once
    video = min((toy_folder / "runs/toy/data/rl").glob("*.y4m"))  # 8 frames, 4 x 4 patches each
    flags = {
        "model": base, "video": video, "max_new_tokens": TOKENS, "group_size": GROUP,
        "shuffled_group_size": SHUFFLED, "repeats": 1, "max_frames": 12, "prompts_per_rank": 2,
        "json": tmp_path / "step.json",
    }  # fmt: skip
    argv = [str(word) for name, value in flags.items() for word in (f"--{name}", value)]
    monkeypatch.setattr(sys, "argv", ["rl_step.py", *argv])
    rl_step.main()

    # Two prompts; warm-up, memory and seconds of two recipes: all of the length asked for.
    assert lengths == [[2] * 5] * 4 + [[TOKENS] * 5] * 8
    results = json.loads((tmp_path / "step.json").read_text())
    # 12 of the video's 8 frames: it starts again. 6 grids of 4 merged patches.
    assert results["tokens"]["vision"] == 2 * 6 * 4
    assert results["tokens"]["sampled"] == 2 * (GROUP + SHUFFLED) * TOKENS
    assert results["agreement_nats"] <= 1e-4  # the packed and the plain log-probabilities
    assert results["machine"]["matmul_flops"] > 0
    assert results["decode_share_of_copy"] > 0
    for recipe in ("ours", "plain"):
        found, flops = results[recipe], results[recipe]["flops"]
        assert list(found["seconds"]) == list(rl_step.PHASES)
        assert all(seconds > 0 for seconds in found["seconds"].values())
        assert sum(found["seconds"].values()) == pytest.approx(found["total_seconds"])
        assert flops["backward"] == 2 * (flops["forward"] + flops["forward.vision"])
        assert 0 < found["before_gib"] <= found["peak_gib"]
    # 5 copies of each video are seen in rollouts and 3 in passes, against 2 and 1.
    ours, theirs = (results[recipe]["flops"] for recipe in ("ours", "plain"))
    assert theirs["rollout.vision"] * 2 == ours["rollout.vision"] * 5
    assert theirs["reference.vision"] == ours["reference.vision"] * 3
    printed = capsys.readouterr().out
    assert all(label in printed for label in rl_step.PHASES.values())
    assert "plain / ours:" in printed


# ---------------------------------------------------------------------------------------- gpu.py


def run_gpu(monkeypatch, file, *flags):
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")  # what the program sets is undone
    argv = ["gpu.py", "--device", "cpu", "--tiny", "--json", str(file), *flags]
    monkeypatch.setattr(sys, "argv", argv)
    gpu.main()
    return json.loads(file.read_text())


def numbers(value):
    """All numbers in what a JSON file holds."""
    if isinstance(value, dict):
        value = list(value.values())
    if isinstance(value, list):
        return [number for item in value for number in numbers(item)]
    return [value] if isinstance(value, (int, float)) else []


def test_every_part_is_measured_once(tmp_path, monkeypatch, capsys):
    advantages = []

    def spy(policy, optimizer, batches, *rest, update_policy=train_rl.update_policy):
        advantages.extend(group.advantages for group in batches[0])
        return update_policy(policy, optimizer, batches, *rest)

    monkeypatch.setattr(train_rl, "update_policy", spy)
    file = tmp_path / "tiny.json"
    assert list(run_gpu(monkeypatch, file, "--parts", "update")["parts"]) == ["update"]
    first = file.read_text()
    results = run_gpu(monkeypatch, file)
    assert f"update: {file} has it" in capsys.readouterr().out
    assert results["parts"]["update"] == json.loads(first)["parts"]["update"]
    assert results["parts"].keys() == gpu.PARTS.keys()
    assert (results["gpu"], results["flags"]["tiny"]) == ("CPU", True)
    assert results["versions"]["torch"] == torch.__version__
    assert all(map(math.isfinite, numbers(results)))
    assert any(advantage.any() for advantage in advantages)  # else all gradients would be zero

    # By hand: a video of 2 grids of 4 x 4 patches, 3 and 2 rows of 12 tokens.
    found = results["parts"]["rollout"]["ours"]
    load = Load(**found["load"])
    assert (load.grids, load.num_rows, load.response_tokens) == ([[2, 4, 4]], 5, 12)
    config = plan.Qwen2_5_VLConfig(**gpu.TINY)
    flops = counting.step_flops(config, load)
    layer = 64 * (2 * 64 + 2 * 32 + 3 * 128) + 2 * 64 + 64 + 2 * 32  # matrices, norms, biases
    num_weights = 2 * layer + 64 + 1024 * 64
    floor = counting.decode_bytes(config, load, num_weights, itemsize=4) / 3.35e12
    assert found["floor_ms_per_token"] == pytest.approx(1e3 * floor / 12)
    seconds = found["seconds"]["rollout.decode"]
    assert found["share_of_bandwidth"] == pytest.approx(floor / seconds)
    assert found["flops"] == flops and found["kernels_per_token"] > 100
    longest = results["parts"]["update"]["12 tokens"]
    assert longest["flops"] == results["parts"]["step"]["ours"]["flops"] == flops
    expected = flops["backward"] / longest["seconds"]["backward"] / 989e12
    assert longest["mfu"]["backward"] == pytest.approx(expected)
    theirs = results["parts"]["plain"]["plain"]
    assert theirs["flops"] == counting.step_flops(config, load, plain=True)
    assert theirs["agreement_nats"] < 1e-4
    # The step holds reference and AdamW as well: 10 bytes more per parameter on a GPU, 12 here.
    held = [results["parts"][part]["ours"] for part in ("step", "plain")]
    assert [case["holds"] for case in held] == ["policy, reference, AdamW", "policy"]
    gib = [case["predicted_gib_by_phase"]["forward"] for case in held]
    total = plan.numel(plan.count_groups(config).all)
    assert gib[0] - gib[1] == pytest.approx(12 * total / 2**30)

    with pytest.raises(UserError, match="has results of flags"):
        gpu.open_results(file, gpu.GpuConfig(model="7B", device="cpu", tiny=True))


# ------------------------------------------------------------------------------------ measure.py


def test_a_phase_has_its_own_seconds_and_memory(monkeypatch):
    clock = [0.0]
    monkeypatch.setattr(measure.time, "perf_counter", lambda: clock[0])
    gc.collect()
    measure.release_memory()  # else the tensor below may find room that is resident already
    meter = measure.Meter(CPU)

    def wait(seconds):
        clock[0] += seconds

    with meter("outer"):
        wait(1)
        with meter("inner"):
            wait(2)
            torch.ones(2**28, dtype=torch.uint8)  # 256 MiB, gone at once
        wait(4)
    wait(100)
    with meter("outer"):
        wait(8)
    assert meter.seconds == {"outer": 13, "inner": 2}
    assert meter.peaks["inner"] - meter.peaks["outer"] > 2**27


# ------------------------------------------------------------------------------------ counting.py


def counted_flops(run):
    """FLOPs of the matrix products that a function runs, attention's full squares included."""
    attention = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu

    def square(query, key, value, *_, out_shape=None, **__):
        batch, heads, queries, size = query
        return 4 * batch * heads * queries * key[2] * size

    def product(x, weight, *_, out_shape=None, **__):
        return 2 * math.prod(x) * weight[0]

    def batched(x, y, *_, out_shape=None, **__):
        # transformers 5.17 multiplies positions and frequencies so: one factor, no sum.
        return 0 if x[2] == 1 else 2 * math.prod(x) * y[2]

    kinds = {attention: square, torch.ops.mkldnn._linear_pointwise: product,
             torch.ops.aten.bmm: batched}  # fmt: skip
    with FlopCounterMode(display=False, custom_mapping=kinds) as counter:
        run()
    return counter.get_total_flops()


def load_of(prompts):
    return Load(
        grids=tuple(tuple(prompt.grid_thw.tolist()) for prompt in prompts),
        prompt_tokens=tuple(len(prompt.input_ids) for prompt in prompts),
        group_size=GROUP, shuffled_group_size=SHUFFLED, response_tokens=TOKENS,
    )  # fmt: skip


def uncounted_half(config, lengths):
    """What causal attention saves of the squares (length, length), in FLOPs."""
    return sum(
        counting.language_flops(config, 0, length**2 - counting.causal_pairs(length))
        for length in lengths
    )


@torch.no_grad()
def test_flops_of_a_pass_equal_those_of_the_kernels(toy, prompts):
    config, load = toy.config, load_of(prompts)
    pack = pack_groups(prompts, [[torch.tensor([5, 6, 7, 8])] * GROUP] * 2)
    forbidden = forbidden_tokens(config)
    found = counted_flops(lambda: toy.packed_logprobs(pack, forbidden))
    flops = counting.step_flops(config, load)
    # A response's square holds the prompt and all of the response.
    saved = uncounted_half(config, load.prompt_tokens) + uncounted_half(config, [TOKENS] * 6)
    assert found == flops["forward"] + flops["forward.vision"] + saved


@torch.no_grad()
def test_flops_of_a_rollout_equal_those_of_the_kernels(toy, base, prompts, monkeypatch):
    never = forbidden_tokens(toy.config)[:1]
    monkeypatch.setattr(sampling, "end_tokens", lambda _: never)
    # The first prompt stands for the ordered one, the second for the shuffled.
    sizes = (GROUP, SHUFFLED)
    keys = [[(0, group, row) for row in range(size)] for group, size in enumerate(sizes)]
    tokenizer = load_tokenizer(base)
    found = counted_flops(lambda: sampling.sample_groups(toy, tokenizer, prompts, keys, TOKENS))
    load, length = load_of(prompts[:1]), len(prompts[0].input_ids)
    flops = counting.step_flops(toy.config, load)
    expected = sum(count for phase, count in flops.items() if phase.startswith("rollout"))
    assert found == expected + uncounted_half(toy.config, [length, length])


def test_window_pairs_by_hand(toy):
    """Windows of 8 x 8 patches, smaller ones at the right and lower edge."""
    vision = toy.config.vision_config
    assert counting.window_pairs(vision, (1, 12, 10)) == 64**2 + 32**2 + 16**2 + 8**2
    assert counting.window_pairs(vision, (3, 4, 4)) == 3 * 16**2


def test_bytes_of_the_cache_equal_those_of_a_cache(toy, prompts):
    with torch.no_grad():
        cache = toy.packed_prefill(pack_groups(prompts, [[], []]))
    found = sum(layer.keys.nbytes + layer.values.nbytes for layer in cache.layers)
    num_tokens = sum(len(prompt.input_ids) for prompt in prompts)
    assert found == num_tokens * counting.cache_bytes_per_token(toy.config, itemsize=4)


# ---------------------------------------------------------------------------------------- plan.py

# Total; root: embedding and lm_head (one of them if tied), final norm, patch embedding, merger.
VISION_ROOT = 1280 * 3 * 2 * 14 * 14 + 1280 + 5120 * 5120 + 5120
PUBLISHED = {
    "7B": (8_292_166_656, 2 * 152064 * 3584 + 3584, 3584),
    "3B": (3_754_622_976, 151936 * 2048 + 2048, 2048),
}


@pytest.mark.parametrize("name", PUBLISHED)
def test_parameters_of_the_official_models(name):
    total, text_root, width = PUBLISHED[name]
    groups = plan.count_groups(plan.load_config(name))
    vision_root = VISION_ROOT + 5120 * width + width
    assert plan.numel(groups.all) == total
    assert plan.numel(groups.vision_root) == vision_root
    assert plan.numel(groups.root) == text_root + vision_root
    assert len(groups.blocks) == 32


def test_groups_of_the_toy_are_those_that_fsdp_gathers(toy, base):
    def numel(*modules):
        return sum(parameter.numel() for part in modules for parameter in part.parameters())

    groups, inner = plan.count_groups(plan.load_config(base)), toy.model
    assert [*map(plan.numel, groups.layers)] == [*map(numel, inner.language_model.layers)]
    assert [*map(plan.numel, groups.blocks)] == [*map(numel, inner.visual.blocks)]
    assert plan.numel(groups.all) == numel(toy)
    trained = [groups.trained_shard(1, freeze_vision=frozen) for frozen in (False, True)]
    assert trained[0] - trained[1] == numel(inner.visual)
    assert plan.count_groups(plan.load_config(f"{base}/config.json")) == groups
    # A decoded token reads everything but the vision tower and the embedding.
    outside = numel(inner.visual, toy.get_input_embeddings())
    assert rl_step.num_decode_weights(toy) == numel(toy) - outside


def test_bytes_of_the_optimizer_equal_those_allocated(base):
    model = load_model(base, CPU)
    model.model.visual.requires_grad_(False)
    optimizer = make_optimizer(model, 1e-3, 0.01)
    state = [value for one in optimizer.state.values() for value in one.values()]
    found = sum(value.nbytes for value in state if value.numel() > 1)
    options = plan.PlanConfig(num_gpus=1, prompts_per_step=1, freeze_vision=True)
    phases = plan.estimate(model.config, options, on_gpu=False)
    assert phases["optimizer"]["AdamW, two moments"] == found
    assert phases["optimizer"]["gradients, float32"] * 2 == found


def saved_bytes(model, run, *constants):
    """Bytes of all tensors that autograd keeps, each storage once, weights and constants apart."""
    known = {tensor.untyped_storage().data_ptr() for tensor in [*model.parameters(), *constants]}
    kept = {}

    def pack(tensor):
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in known:
            kept[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        output = run()
    del output
    return sum(kept.values())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
def test_saved_activations_equal_what_autograd_keeps(base, dtype):
    model, load = load_model(base, CPU, dtype), Load(((2, 8, 12),), (37,), 3, 0, 7)
    text, vision = model.model.language_model, model.model.visual

    # A packed row: a prompt of 37 tokens and 3 responses of 7.
    hidden = torch.randn(1, 58, 128, dtype=dtype, requires_grad=True)
    slots = 37 + torch.arange(21).view(3, 7)
    segments = [model_module.Segment(0, 37, slots, torch.arange(21))]
    rotary = text.rotary_emb(hidden, torch.arange(58).expand(3, 1, 58))
    layer = text.layers[0].train()
    found = saved_bytes(model, lambda: layer(
        hidden, attention_mask=None, position_embeddings=rotary, segments=segments
    ), *rotary)  # fmt: skip
    assert found == counting.saved_by_layer(model.config, load, dtype.itemsize)

    # Two frames of 8 x 12 patches, in windows.
    hidden = torch.randn(192, 64, dtype=dtype, requires_grad=True)
    ends = torch.tensor([0, 64, 96, 160, 192], dtype=torch.int32)
    rotary = torch.randn(192, 16).cos(), torch.randn(192, 16).sin()
    block = vision.blocks[0].train()
    found = saved_bytes(model, lambda: block(
        hidden, cu_seqlens=ends, max_seqlen=64, position_embeddings=rotary
    ), *rotary)  # fmt: skip
    assert found == counting.saved_by_block(model.config, load, dtype.itemsize)


def test_memory_of_the_papers_run_by_hand():
    phases = plan.estimate(plan.load_config("7B"), plan.PlanConfig())
    total, decode = PUBLISHED["7B"][0], phases["decode"]
    # All first dimensions of the 7B model but the vision MLPs' 3420 are multiples of 8.
    padding = 32 * 2 * 4 * (1280 + 1)  # rows of gate and up: 3420 / 8 is 427.5
    assert decode["policy, float32, shard"] == 4 * (total + padding) // 8
    assert decode["AdamW, two moments"] == 2 * decode["policy, float32, shard"]
    assert decode["reference, shard"] * 2 == decode["policy, float32, shard"]
    assert decode["unsharded weights"] == 2 * total
    # 8 grids of 128 tokens and 200 of text; 2 prompts, and 12 rows with room for 768 more, less
    # the prompt's last token, which generate runs again.
    tokens = 2 * (8 * 128 + 200) + 12 * (8 * 128 + 199 + 768)
    assert decode["key-value cache"] == tokens * 2 * 28 * 512 * 2
    # 16 validated prompts, one response each: the peak is their prefill.
    assert phases["validation"]["key-value cache"] == 16 * (8 * 128 + 200) * 2 * 28 * 512 * 2
    # With checkpointing the inputs of 28 layers and 32 blocks; a packed row of 1224 + 8 * 768.
    inputs = 2 * (28 * (1224 + 8 * 768) * 3584 + 32 * 8 * 512 * 1280)
    assert phases["forward"]["saved activations"] == inputs


# The rollout's and three passes' weights in 2 bytes, all but one root; gradients in 4.
TOTAL, ROOT = 8_292_166_656, 1_136_078_080
SHARDING = 12 * TOTAL - 2 * ROOT
TRAFFIC = {  # GPUs (a prompt each), replicas: bytes over NVLink and over the network
    "one-node": (8, 1, SHARDING * 7 / 8, 0),
    "two-nodes": (16, 1, SHARDING * 7 / 8, SHARDING / 2 / 8),
    # Each GPU's eighth of the gradients is reduced over 64 nodes: sent and received.
    "64-replicas": (512, 64, SHARDING * 7 / 8, 2 * 4 * TOTAL / 8 * 63 / 64),
}


@pytest.mark.parametrize(("gpus", "replicas", "nvlink", "network"), TRAFFIC.values(), ids=TRAFFIC)
def test_traffic_by_hand(gpus, replicas, nvlink, network):
    options = plan.PlanConfig(num_gpus=gpus, prompts_per_step=gpus, replicas=replicas)
    groups = plan.count_groups(plan.load_config("7B"))
    found = plan.traffic(groups, options)
    assert found == pytest.approx({"nvlink": nvlink, "network": network})


def test_a_report_is_called_a_prediction(capsys, monkeypatch):
    argv = "plan.py --model 3B --num_gpus 512 --prompts_per_step 512 --replicas 64 --gpu H100"
    monkeypatch.setattr(sys, "argv", argv.split())
    plan.main()
    printed = capsys.readouterr().out
    assert printed.startswith("A prediction for 3B") and "nothing is measured" in printed
    assert "512 x H100: fits" in printed and "GPU-hours" in printed
    assert "30% to 60% of compute" in printed


CONFIGS = {
    "rl_step.py": rl_step.StepConfig, "plan.py": plan.PlanConfig, "gpu.py": gpu.GpuConfig
}  # fmt: skip
FAULTS = {
    "unknown-flag": ("rl_step.py --model x --video y --rounds 3", "--rounds"),
    "no-video": ("rl_step.py --model x", "--video is missing"),
    "odd-frames": ("rl_step.py --model x --video y --max_frames 5", "--max_frames"),
    "uneven-share": ("plan.py --num_gpus 16", "--prompts_per_step 8"),
}


@pytest.mark.parametrize(("command", "message"), FAULTS.values(), ids=FAULTS)
def test_a_wrong_flag_is_named(command, message):
    script, *argv = command.split()
    with pytest.raises(UserError, match=message):
        measure.parse_flags(CONFIGS[script], "", argv)


def test_a_model_without_a_qwen_config_is_named(tmp_path):
    other = tmp_path / "config.json"
    other.write_text(json.dumps({"model_type": "llama"}))
    for name, message in (
        (str(tmp_path / "nowhere"), "nowhere has no config"),
        (str(other), "not a Qwen2.5-VL: it is a 'llama'"),
    ):
        with pytest.raises(UserError, match=message):
            plan.load_config(name)


def test_the_readmes_commands_are_known():
    text = (Path(plan.__file__).parent / "README.md").read_text()
    commands = [line.split()[1:] for line in text.splitlines() if line.startswith("python ")]
    assert {Path(script).name for script, *_ in commands} == set(CONFIGS)
    for script, *argv in commands:
        measure.parse_flags(CONFIGS[Path(script).name], "", argv)
