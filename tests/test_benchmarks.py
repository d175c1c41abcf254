"""benchmarks/: the steps run and report what they promise; FLOPs, bytes and parameters that are
computed from shapes equal those that are counted on the toy."""

import gc
import json
import math
import sys
from pathlib import Path

import plain
import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode
from transformers import Qwen2_5_VLConfig

import model as model_module
import sampling
from benchmarks import counting, measure, plain_recipe, plan, rl_step
from benchmarks.counting import Load
from infra.errors import UserError
from infra.optim import make_optimizer
from model import enable_packing, load_model, load_tokenizer, pack_groups
from sampling import sample_groups

CPU = torch.device("cpu")
GROUP, SHUFFLED, TOKENS = 3, 2, 4


@pytest.fixture(scope="module")
def base(toy_folder):
    return str(toy_folder / "runs/toy/base")


@pytest.fixture(scope="module")
def clip(toy_folder):
    """A clip of the toy: 8 frames of 56 x 56, which are 4 grids of 4 x 4 patches."""
    return str(min((toy_folder / "runs/toy/data/rl").glob("*.y4m")))


@pytest.fixture(scope="module")
def toy(base):
    model = load_model(base, CPU)
    enable_packing(model)
    return model.eval()


@pytest.fixture(scope="module")
def prompts(toy_folder, base):
    return plain.toy_prompts(toy_folder, load_tokenizer(base), ["video", "video"])


def flags(base, clip, *more):
    sizes = {"--max_new_tokens": TOKENS, "--group_size": GROUP, "--shuffled_group_size": SHUFFLED,
             "--repeats": 1}  # fmt: skip
    words = [str(word) for pair in sizes.items() for word in pair]
    return ["--model", base, "--video", clip, *words, *map(str, more)]


# ------------------------------------------------------------------------------------ rl_step.py


def test_both_recipes_take_a_step_and_write_what_they_promise(
    base, clip, tmp_path, monkeypatch, capsys
):
    lengths = []  # of all responses that were scored

    def spy(ordered, shuffled, config, score_group=rl_step.score_group):
        lengths.append(ordered.lengths.tolist() + shuffled.lengths.tolist())
        return score_group(ordered, shuffled, config)

    monkeypatch.setattr(rl_step, "score_group", spy)
    monkeypatch.setattr(plain_recipe, "score_group", spy)
    file = tmp_path / "step.json"
    arguments = flags(base, clip, "--max_frames", 12, "--prompts_per_rank", 2, "--json", file)
    monkeypatch.setattr(sys, "argv", ["rl_step.py", *arguments])
    rl_step.main()

    # Two prompts, warm-up, memory and seconds of two recipes: all of the length asked for.
    assert lengths == [[2] * 5] * 4 + [[TOKENS] * 5] * 8
    results = json.loads(file.read_text())
    # 12 of the clip's 8 frames: it begins again. 6 grids of 4 merged patches.
    assert results["tokens"]["vision"] == 2 * 6 * 4
    assert results["tokens"]["sampled"] == 2 * (GROUP + SHUFFLED) * TOKENS
    assert results["agreement_nats"] <= 1e-4
    assert results["machine"]["matmul_flops"] > 0
    assert 0 < results["decode_share_of_copy"] < 1
    for recipe in ("ours", "plain"):
        found = results[recipe]
        assert list(found["seconds"]) == list(rl_step.PHASES)
        assert all(seconds > 0 for seconds in found["seconds"].values())
        assert sum(found["seconds"].values()) == pytest.approx(found["total_seconds"])
        assert found["flops"]["backward"] == 2 * (
            found["flops"]["forward"] + found["flops"]["forward.vision"]
        )
        assert 0 < found["before_gib"] <= found["peak_gib"]
    # 5 copies of each clip are seen in rollouts and 3 in passes, against 2 and 1.
    ours, theirs = (results[recipe]["flops"] for recipe in ("ours", "plain"))
    assert theirs["rollout.vision"] * 2 == ours["rollout.vision"] * 5
    assert theirs["reference.vision"] == ours["reference.vision"] * 3

    shown = capsys.readouterr().out
    assert all(label in shown for label in rl_step.PHASES.values())
    assert "plain / ours:" in shown


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

    kinds = {attention: square, torch.ops.mkldnn._linear_pointwise: product}
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
    forbidden = model_module.forbidden_tokens(config)
    found = counted_flops(lambda: toy.packed_logprobs(pack, forbidden))
    flops = counting.step_flops(config, load)
    # A response's square holds the prompt and all of the response.
    saved = uncounted_half(config, load.prompt_tokens) + uncounted_half(config, [TOKENS] * 6)
    assert found == flops["forward"] + flops["forward.vision"] + saved


@torch.no_grad()
def test_flops_of_a_rollout_equal_those_of_the_kernels(toy, base, prompts, monkeypatch):
    never = model_module.forbidden_tokens(toy.config)[:1]
    monkeypatch.setattr(sampling, "end_tokens", lambda _: never)
    # The first stands for the ordered and the second for the shuffled prompt of one clip.
    sizes = (GROUP, SHUFFLED)
    keys = [[(0, group, row) for row in range(size)] for group, size in enumerate(sizes)]
    tokenizer = load_tokenizer(base)
    found = counted_flops(lambda: sample_groups(toy, tokenizer, prompts, keys, TOKENS))
    load, length = load_of(prompts[:1]), len(prompts[0].input_ids)
    flops = counting.step_flops(toy.config, load)
    expected = sum(count for phase, count in flops.items() if phase.startswith("rollout"))
    assert found == expected + uncounted_half(toy.config, [length, length])


@torch.no_grad()
def test_flops_of_the_plain_recipe_equal_those_of_the_kernels(toy, base, prompts):
    config, load, (prompt, other) = toy.config, load_of(prompts[:1]), prompts
    tokenizer, rollouts = load_tokenizer(base), []

    def generate():
        for one, size in ((prompt, GROUP), (other, SHUFFLED)):
            rollouts.append(plain_recipe.generate(toy, tokenizer, one, size, TOKENS))

    flops = counting.step_flops(config, load, plain=True)
    expected = sum(count for phase, count in flops.items() if phase.startswith("rollout"))
    length = len(prompt.input_ids)
    saved = uncounted_half(config, [length] * (GROUP + SHUFFLED))
    assert counted_flops(generate) == expected + saved
    assert [rollout.lengths.tolist() for rollout in rollouts] == [[TOKENS] * 3, [TOKENS] * 2]

    found = counted_flops(lambda: plain_recipe.copies_logprobs(toy, rollouts[0]))
    saved = uncounted_half(config, [length + TOKENS] * GROUP)
    assert found == flops["reference"] + flops["reference.vision"] + saved


def test_the_plain_recipe_computes_the_same_function(toy, prompts):
    ids = torch.tensor([[5, 6, 7], [9, 9, 9]])
    mask = torch.ones_like(ids).bool()
    rollout = sampling.Rollout(prompts[0], ids, mask, mask[:, 0], mask * 0.0, ["", ""])
    forbidden = model_module.forbidden_tokens(toy.config)
    expected = torch.stack([plain.logprobs(toy, prompts[0], row) for row in ids])
    found = plain_recipe.copies_logprobs(toy, rollout, forbidden)
    torch.testing.assert_close(found, expected, atol=1e-5, rtol=0)
    without = plain_recipe.copies_logprobs(toy, rollout)
    assert (without < found).all()  # the forbidden tokens take their share


WINDOWS = {
    "whole": ((1, 8, 8), 64**2),
    "cut-below": ((1, 12, 8), 64**2 + 32**2),
    "corner": ((1, 12, 10), 64**2 + 32**2 + 16**2 + 8**2),
    "frames": ((3, 4, 4), 3 * 16**2),
}


@pytest.mark.parametrize(("grid", "pairs"), WINDOWS.values(), ids=WINDOWS)
def test_window_pairs_by_hand(toy, grid, pairs):
    assert counting.window_pairs(toy.config.vision_config, grid) == pairs


def test_recomputation_by_hand(toy):
    # One patch-free clip, S = 1, G = 2, T = 1: a row of 3 tokens, 2 of them responses.
    load = Load(((0, 0, 0),), (1,), 2, 0, 1)
    config = toy.config
    layers = counting.language_flops(config, 3, 1 + 2 * 2)
    head = counting.head_flops(config, 2)
    assert counting.step_flops(config, load)["recompute"] == layers + head
    assert counting.step_flops(config, load, checkpointing=False)["recompute"] == head
    assert counting.step_flops(config, load, True, False)["recompute"] == 0


def test_a_frozen_tower_is_passed_forward_alone(toy):
    load = Load(((4, 4, 4),), (20,), 2, 2, 3)
    flops = counting.step_flops(toy.config, load, freeze_vision=True)
    assert flops["backward"] == 2 * flops["forward"]
    assert flops["forward.vision"] > 0


def test_bytes_of_the_cache_equal_those_of_a_cache(toy, prompts):
    with torch.no_grad():
        cache = toy.packed_prefill(pack_groups(prompts, [[], []]))
    found = sum(layer.keys.nbytes + layer.values.nbytes for layer in cache.layers)
    num_tokens = sum(len(prompt.input_ids) for prompt in prompts)
    assert found == num_tokens * counting.cache_bytes_per_token(toy.config, itemsize=4)


def test_bytes_of_decoding_by_hand(toy):
    # Two rows, prompt of 10: three steps read 10, 11 and 12 cached tokens a row, and the weights.
    load = Load(((4, 4, 4),), (10,), 2, 0, 3)
    per_token = counting.cache_bytes_per_token(toy.config, 2)
    found = counting.decode_bytes(toy.config, load, num_weights=1000, itemsize=2)
    assert found == 3 * 1000 * 2 + 2 * (10 + 11 + 12) * per_token


def test_weights_of_a_decoded_token_are_all_but_vision_and_embedding(toy):
    outside = [*toy.model.visual.parameters(), toy.get_input_embeddings().weight]
    total = sum(parameter.numel() for parameter in toy.parameters())
    others = sum(parameter.numel() for parameter in outside)
    assert rl_step.num_decode_weights(toy) == total - others


# -------------------------------------------------------------------------------------- plan.py

# Total; root: embedding and lm_head (one of them if tied), final norm, patch embedding, merger.
PATCH_EMBED, NORM = 1280 * 3 * 2 * 14 * 14, 1280
PUBLISHED = {
    "7B": (8_292_166_656, 2 * 152064 * 3584 + 3584, 3584),
    "3B": (3_754_622_976, 151936 * 2048 + 2048, 2048),
}


@pytest.mark.parametrize(("name", "total", "text_root", "width"), [
    (name, *numbers) for name, numbers in PUBLISHED.items()
])  # fmt: skip
def test_parameters_of_the_official_models(name, total, text_root, width):
    groups = plan.count_groups(plan.load_config(name))
    merger = NORM + 5120 * 5120 + 5120 + 5120 * width + width
    assert groups.numel == total
    assert groups.vision_root.numel == PATCH_EMBED + merger
    assert groups.root.numel == text_root + PATCH_EMBED + merger
    assert len(groups.blocks) == 32


def test_groups_of_the_toy_are_those_that_fsdp_gathers(toy, base):
    config = plan.load_config(base)
    groups = plan.count_groups(config)

    def numel(module):
        return sum(parameter.numel() for parameter in module.parameters())

    inner = toy.model
    assert [group.numel for group in groups.layers] == [*map(numel, inner.language_model.layers)]
    assert [group.numel for group in groups.blocks] == [*map(numel, inner.visual.blocks)]
    assert groups.numel == numel(toy)
    frozen = groups.trainable_shard(1, freeze_vision=True)
    assert groups.trainable_shard(1, freeze_vision=False) - frozen == numel(inner.visual)
    assert plan.count_groups(plan.load_config(f"{base}/config.json")) == groups


@pytest.mark.parametrize("freeze_vision", [False, True], ids=["all", "frozen-vision"])
def test_optimizer_state_is_eight_bytes_a_number(base, freeze_vision):
    model = load_model(base, CPU)
    model.model.visual.requires_grad_(not freeze_vision)
    optimizer = make_optimizer(model, 1e-3, 0.01)
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.grad = torch.zeros_like(parameter)
    optimizer.step()
    state = [value for one in optimizer.state.values() for value in one.values()]
    found = sum(value.nbytes for value in state if value.numel() > 1)
    options = plan.PlanConfig(num_gpus=1, prompts_per_step=1, freeze_vision=freeze_vision)
    phases = plan.estimate(model.config, options, on_gpu=False)
    assert phases["optimizer"]["AdamW, two moments"] == found
    assert phases["optimizer"]["gradients, float32"] * 2 == found


def saved_bytes(model, run):
    """Bytes of all tensors that autograd keeps, each storage once, weights and cos, sin apart."""
    known = {parameter.untyped_storage().data_ptr() for parameter in model.parameters()}
    kept = {}

    def pack(tensor):
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in known:
            kept[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        known |= {tensor.untyped_storage().data_ptr() for tensor in run.embeddings}
        output = run()
    del output
    return sum(kept.values())


class LayerPass:
    """One decoder layer on a packed row of a prompt of 37 tokens and 3 responses of 7."""

    def __init__(self, model, dtype):
        self.layer = model.model.language_model.layers[0].train()
        slots = 37 + torch.arange(21).view(3, 7)
        self.segment = model_module.Segment(0, 37, slots, torch.arange(21))
        self.hidden = torch.randn(1, 58, 128, dtype=dtype, requires_grad=True)
        positions = torch.arange(58).expand(3, 1, 58)
        self.embeddings = model.model.language_model.rotary_emb(self.hidden, positions)

    def __call__(self):
        return self.layer(
            self.hidden, attention_mask=None, position_embeddings=self.embeddings,
            segments=[self.segment],
        )  # fmt: skip


class BlockPass:
    """One vision block on two frames of 8 x 12 patches, in windows."""

    def __init__(self, model, dtype):
        self.block = model.model.visual.blocks[0].train()
        self.hidden = torch.randn(192, 64, dtype=dtype, requires_grad=True)
        angles = torch.randn(192, 16)
        self.embeddings = (angles.cos(), angles.sin())

    def __call__(self):
        ends = torch.tensor([0, 64, 96, 160, 192], dtype=torch.int32)
        return self.block(
            self.hidden, cu_seqlens=ends, max_seqlen=64, position_embeddings=self.embeddings
        )


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
@pytest.mark.parametrize("part", ["layer", "block"])
def test_saved_activations_equal_what_autograd_keeps(base, part, dtype):
    model = load_model(base, CPU, dtype)
    load = Load(((2, 8, 12),), (37,), 3, 0, 7)
    if part == "layer":
        expected = counting.saved_by_layer(model.config, load, dtype.itemsize)
        assert saved_bytes(model, LayerPass(model, dtype)) == expected
    else:
        expected = counting.saved_by_block(model.config, load, dtype.itemsize)
        assert saved_bytes(model, BlockPass(model, dtype)) == expected


# ------------------------------------------------------------------------------- plan.py, by hand


def test_memory_of_the_papers_run_by_hand():
    phases = plan.estimate(plan.load_config("7B"), plan.PlanConfig())
    numbers, decode = 8_292_166_656, phases["decode"]
    # All first dimensions of the 7B model but the vision MLPs' 3420 are multiples of 8.
    padding = 32 * 2 * 4 * (1280 + 1)  # rows of gate and up: 3420 / 8 is 427.5
    assert decode["policy, float32, shard"] == 4 * (numbers + padding) // 8
    assert decode["AdamW, two moments"] == 2 * decode["policy, float32, shard"]
    assert decode["reference, shard"] * 2 == decode["policy, float32, shard"]
    assert decode["whole weights (unsharded)"] == 2 * numbers
    # 8 grids of 128 tokens and 200 of text; 2 prompts, and 12 rows with room for 768 more, less
    # the prompt's last token, which generate runs again.
    tokens = 2 * (8 * 128 + 200) + 12 * (8 * 128 + 199 + 768)
    assert decode["key-value cache"] == tokens * 2 * 28 * 512 * 2
    # 16 validated prompts, one row each.
    validated = 16 * (8 * 128 + 200)
    assert phases["validation"]["key-value cache"] in (
        validated * 2 * 28 * 512 * 2,  # the prefill's, or decoding's
        (validated + 16 * (8 * 128 + 199 + 768)) * 2 * 28 * 512 * 2,
    )
    # With checkpointing the inputs of 28 layers and 32 blocks; a packed row of 1224 + 8 * 768.
    inputs = 2 * (28 * (1224 + 8 * 768) * 3584 + 32 * 8 * 512 * 1280)
    assert phases["forward"]["saved activations"] == inputs


PEAKS = {  # model, flags: GiB of a step and with validation
    "7B-8x80": ("7B", {}, 30.4, 32.8),
    "7B-4x80": ("7B", {"num_gpus": 4, "prompts_per_step": 4}, 44.0, 46.3),
    "3B-1x80": ("3B", {"num_gpus": 1, "prompts_per_step": 1}, 66.3, 66.3),
}


@pytest.mark.parametrize(("name", "flags", "step", "validated"), PEAKS.values(), ids=PEAKS)
def test_peaks_of_the_official_models(name, flags, step, validated):
    config = plan.load_config(name)
    for validation, expected in ((False, step), (True, validated)):
        options = plan.PlanConfig(**flags, validation=validation)
        found = plan.peak(plan.estimate(config, options))[1] / 2**30
        assert found == pytest.approx(expected, abs=0.06)


def test_the_verdict_names_the_flags_that_help():
    config = plan.load_config("7B")
    options = plan.PlanConfig(activation_checkpointing=False, gpu="A100-40")
    assert plan.verdict(config, options).endswith("--activation_checkpointing true")
    # One GPU would hold 14 bytes for each of 8.3e9 numbers.
    options = plan.PlanConfig(num_gpus=1, gpu="A100-40")
    assert "no flag of this program makes it fit" in plan.verdict(config, options)
    assert plan.fitting_flags(config, plan.PlanConfig())[0] == {}


def test_seconds_of_the_papers_run_by_hand():
    parts = plan.seconds(plan.load_config("7B"), plan.PlanConfig())
    # Decoding: 28 layers of 42 kernels, 768 times; reading the weights takes less.
    assert parts["rollout: decode"] == pytest.approx((768 * 1176 * 27e-6, 768 * 1176 * 18e-6))
    # The reference passes 7368 tokens through 6.5e9 parameters, 2 FLOPs each, 6144 of them through
    # the vocabulary's 0.545e9; attention and the vision tower add a sixth.
    flops = 2 * (7368 * 6.525e9 + 6144 * 0.545e9)
    for seconds, efficiency in zip(parts["reference"], (0.3, 0.6), strict=True):
        assert 1 < seconds / (flops / 312e12 / efficiency) < 1.2
    assert all(slow >= fast >= 0 for slow, fast in parts.values())


NUMBERS, ROOT = 8_292_166_656, 1_136_078_080  # of the 7B model, and its root group
TRAFFIC = {  # flags: bytes over NVLink and over the network
    # The rollout's and three passes' weights in 2 bytes, all but one root; gradients in 4.
    "one-node": ({}, ((12 * NUMBERS - 2 * ROOT) * 7 / 8, 0)),
    "alone": ({"num_gpus": 1}, (0, 0)),
    "two-nodes": ({"num_gpus": 16, "prompts_per_step": 16},
                  ((12 * NUMBERS - 2 * ROOT) * 7 / 8, (12 * NUMBERS - 2 * ROOT) / 2 / 8)),
    # Each GPU's eighth of the gradients is reduced over 64 nodes: sent and received.
    "64-replicas": ({"num_gpus": 512, "prompts_per_step": 512, "replicas": 64},
                    ((12 * NUMBERS - 2 * ROOT) * 7 / 8, 2 * 4 * NUMBERS / 8 * 63 / 64)),
}  # fmt: skip


@pytest.mark.parametrize(("flags", "expected"), TRAFFIC.values(), ids=TRAFFIC)
def test_traffic_by_hand(flags, expected):
    options = plan.PlanConfig(**{"prompts_per_step": 8} | flags)
    if options.num_gpus == 1:
        options.prompts_per_step = 1
    groups = plan.count_groups(plan.load_config("7B"))
    assert groups.root.numel == ROOT
    assert tuple(plan.traffic(groups, options).values()) == pytest.approx(expected)


def test_a_report_says_what_was_assumed(capsys, monkeypatch):
    argv = "plan.py --model 3B --num_gpus 512 --prompts_per_step 512 --replicas 64 --gpu H100"
    monkeypatch.setattr(sys, "argv", argv.split())
    plan.main()
    printed = capsys.readouterr().out
    assert "512 x H100: fits" in printed and "GPU-hours" in printed
    assert "30% to 60% of compute" in printed and "No figure here was measured" in printed


FAULTS = {
    "unknown-flag": (rl_step, "--model x --video y --rounds 3", "--rounds"),
    "no-video": (rl_step, "--model x", "--video is missing"),
    "odd-frames": (rl_step, "--model x --video y --max_frames 5", "--max_frames"),
    "uneven-share": (plan, "--num_gpus 16", "--prompts_per_step 8"),
    "too-many-gpus": (plan, "--num_gpus 1024", "--num_gpus"),
    "unknown-gpu": (plan, "--gpu B200", "--gpu"),
}


@pytest.mark.parametrize(("module", "argv", "message"), FAULTS.values(), ids=FAULTS)
def test_a_wrong_flag_is_named(module, argv, message):
    with pytest.raises(UserError, match=message):
        module.parse_flags(argv.split())


@pytest.mark.parametrize(("name", "message"), [
    ("./nowhere", "neither a folder nor a Hub id"), (__file__, "is no config.json"),
])  # fmt: skip
def test_a_model_that_is_none_is_named(name, message):
    with pytest.raises(UserError, match=message):
        plan.load_config(name)


def test_another_models_config_is_refused(tmp_path):
    file = tmp_path / "config.json"
    file.write_text(json.dumps({"model_type": "llama"}))
    with pytest.raises(UserError, match="not a Qwen2.5-VL: it is a 'llama'"):
        plan.load_config(str(file))
    file.write_text(json.dumps(Qwen2_5_VLConfig(**plan.OFFICIAL["3B"]).to_dict()))
    assert plan.count_groups(plan.load_config(str(file))).numel == PUBLISHED["3B"][0]


def test_the_readmes_commands_are_known():
    text = (Path(plan.__file__).parent / "README.md").read_text()
    commands = [line.split() for line in text.splitlines() if line.startswith("python benchmarks/")]
    modules = {"benchmarks/rl_step.py": rl_step, "benchmarks/plan.py": plan}
    assert {command[1] for command in commands} == set(modules)
    for command in commands:
        modules[command[1]].parse_flags(command[2:])
