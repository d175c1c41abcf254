"""Predicts what a T-GRPO run needs: memory per GPU, seconds per step, GPU-hours. Measures nothing.

    python benchmarks/plan.py                                  the paper's run: 7B, 8 x A100-80
    python benchmarks/plan.py --model 3B --num_gpus 1 --prompts_per_step 1
    python benchmarks/plan.py --num_gpus 512 --replicas 64 --prompts_per_step 512 --gpu H100

Memory in bytes: P parameters over S shards (num_gpus / replicas), c = 2 bytes per bfloat16 number
(4 on CPU, where everything is float32). FSDP groups are those of model.shard.

    always          4 P / S  policy, float32 master weights      8 P / S  AdamW, two moments
                    c P / S  reference
    rollout         c P      unsharded weights, and the key-value cache
    validation      the same with VALIDATED prompts, one response each
    reference       c root   root group, gathered while its pass lasts; layers come and go
    update          c root   from the forward pass to the end of the backward pass
                    saved    with checkpointing the input of each layer and block, plus all
                             activations of one of them in the backward pass; without, all of all
                    logits   one block of the vocabulary at a time, in float32 and in c
                    4 P / S  gradients; a group's are c before its reduction and 4 within

Exact, compared with counted bytes in the tests: parameters, shards, optimizer, cache, saved
activations, FLOPs. Estimated: tensors in flight inside a layer, FSDP2's buffers, RESERVE. Seconds
are a range between two assumptions (EFFICIENCY). Responses are taken to be as long as they may be.
"""

import sys
from dataclasses import dataclass
from math import ceil, isqrt, prod
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from transformers import AutoConfig, Qwen2_5_VLConfig, Qwen2_5_VLForConditionalGeneration

from benchmarks import counting
from benchmarks.counting import Load, cache_bytes_per_token, key_width
from benchmarks.measure import GIB, parse_flags
from evaluation.validation import BATCH_SIZE as VALIDATED
from infra.distributed import run_main
from infra.errors import UserError, require
from infra.flags import check_ranges, flag
from infra.fused import block_width

RESERVE = 0.1  # of a GPU, for CUDA, NCCL, cuBLAS and fragmentation: assumed
GPUS_PER_NODE = 8


# Parts of several phases.
GRADIENTS, SAVED, FSDP = "gradients, float32", "saved activations", "FSDP: gathered, in transit"
ADAMW, REFERENCE = "AdamW, two moments", "reference, shard"


@dataclass(frozen=True)
class Gpu:
    """SXM modules by NVIDIA's data sheets: dense bfloat16 FLOP/s (half of those with sparsity), and
    bytes/s of memory and of NVLink in one direction (half of both directions).

    Network bytes/s per GPU: an adapter of 200 Gb/s (DGX A100 user guide) or 400 Gb/s (DGX H100 and
    H200, DGX BasePOD reference architecture) for each.
    """

    gib: float
    flops: float
    memory: float
    nvlink: float
    network: float


GPUS = {
    "A100-40": Gpu(40, 312e12, 1.555e12, 300e9, 25e9),
    "A100-80": Gpu(80, 312e12, 2.039e12, 300e9, 25e9),
    "H100": Gpu(80, 989e12, 3.35e12, 450e9, 50e9),
    "H200": Gpu(140, 989e12, 4.8e12, 450e9, 50e9),
}
# Fraction of the data sheet's figures, from slow to fast: assumed, not measured with this code.
# Elsewhere: 33 to 39% MFU on 8 H100, 57 to 58% on 64 A100 (FSDP2 with an 8B model, torchtitan's
# docs/performance.md).
EFFICIENCY = {"compute": (0.3, 0.6), "memory": (0.3, 0.6), "links": (0.5, 0.8)}
KERNELS_PER_LAYER = 42  # per decoded token: 1,180 counted at 28 layers
LAUNCH_SECONDS = (27e-6, 18e-6)  # per kernel of an eager decoding step, assumed

# What decides sizes in the config.json of Qwen/Qwen2.5-VL-7B-Instruct and -3B-Instruct; the rest
# of the vision tower is transformers' default.
OFFICIAL = {
    "7B": {
        "vocab_size": 152064, "hidden_size": 3584, "intermediate_size": 18944,
        "num_hidden_layers": 28, "num_attention_heads": 28, "num_key_value_heads": 4,
        "tie_word_embeddings": False,
        "vision_config": {"hidden_size": 1280, "out_hidden_size": 3584},
    },
    "3B": {
        "vocab_size": 151936, "hidden_size": 2048, "intermediate_size": 11008,
        "num_hidden_layers": 36, "num_attention_heads": 16, "num_key_value_heads": 2,
        "tie_word_embeddings": True,
        "vision_config": {"hidden_size": 1280, "out_hidden_size": 2048},
    },
}  # fmt: skip


@dataclass
class PlanConfig:
    """Flags. A name of RLConfig's means what it means there, with the same default."""

    model: str = flag("7B", "7B, 3B, a model folder, a config.json or a Hub id")
    num_gpus: int = flag(8, "GPUs of the run, 8 per node", low=1, high=64 * GPUS_PER_NODE)
    gpu: str = flag("A100-80", "kind of GPU", choices=tuple(GPUS))
    replicas: int = flag(1, "copies of the sharded model (HSDP)", low=1)
    prompts_per_step: int = flag(8, "prompts of one optimizer step, over all ranks", low=1)
    prompts_per_rank: int = flag(1, "prompts in one pass of a rank at most", low=1)
    max_steps: int = flag(1000, "optimizer steps (Sec. 4.1)", low=1)
    max_frames: int = flag(16, "frames of a video at most", low=2)
    max_pixels: int = flag(128 * 28 * 28, "pixels of a frame at most", low=28 * 28)
    text_tokens: int = flag(200, "tokens of a prompt beside its vision tokens, assumed", low=0)
    group_size: int = flag(8, "G, responses to the ordered frames", low=1)
    shuffled_group_size: int = flag(4, "G~, responses to the shuffled frames", low=0)
    max_new_tokens: int = flag(768, "length of every response, in tokens", low=1)
    activation_checkpointing: bool = flag(True, "recompute each layer in the backward pass")
    freeze_vision: bool = flag(False, "train the language model alone")
    validation: bool = flag(True, "count the memory of --val_data as well")

    def check(self) -> None:
        """Raise UserError naming the first flag whose value makes no sense."""
        check_ranges(self)
        require(self.num_gpus % self.replicas == 0, "--replicas must divide --num_gpus")
        uneven = self.prompts_per_step % self.num_gpus
        given = f"--prompts_per_step {self.prompts_per_step}"
        require(not uneven, f"{given} must be a multiple of --num_gpus {self.num_gpus}")

    @property
    def num_shards(self) -> int:
        return self.num_gpus // self.replicas

    @property
    def rank_prompts(self) -> int:
        """Prompts of a rank in one step."""
        return self.prompts_per_step // self.num_gpus

    @property
    def num_passes(self) -> int:
        """Forward and backward passes of a rank in one step."""
        return ceil(self.rank_prompts / self.prompts_per_rank)

    def pass_load(self) -> Load:
        """The prompts of one pass."""
        return self.load(min(self.prompts_per_rank, self.rank_prompts))

    def load(self, num_prompts: int) -> Load:
        """So many prompts with as many pixels as the flags allow."""
        merged = self.max_pixels // 28**2  # vision tokens of a pair of frames, in a near square
        height = next(side for side in range(isqrt(merged), 0, -1) if merged % side == 0)
        grid = (ceil(self.max_frames / 2), 2 * height, 2 * merged // height)
        return Load(
            (grid,) * num_prompts, (grid[0] * merged + self.text_tokens,) * num_prompts,
            self.group_size, self.shuffled_group_size, self.max_new_tokens,
        )  # fmt: skip


# -------------------------------------------------------------------------------------- parameters


def load_config(name: str) -> Qwen2_5_VLConfig:
    """The config of an official model, a folder, a config.json or a Hub id.

    Raises:
        UserError: there is none, or it is of another model.
    """
    if name in OFFICIAL:
        return Qwen2_5_VLConfig(**OFFICIAL[name])
    try:
        config = AutoConfig.from_pretrained(name)
    except (OSError, ValueError) as error:
        raise UserError(f"--model {name} has no config: {str(error).splitlines()[0]}") from None
    is_qwen = isinstance(config, Qwen2_5_VLConfig)
    require(is_qwen, f"--model {name} is not a Qwen2.5-VL: it is a {config.model_type!r}")
    return config


Shapes = list[tuple[int, ...]]


def numel(shapes: Shapes) -> int:
    return sum(map(prod, shapes))


def shard_numel(shapes: Shapes, num_shards: int) -> int:
    """Numbers on the first rank: FSDP2 cuts the first dimension, rounded up."""
    return sum(ceil(shape[0] / num_shards) * prod(shape[1:]) for shape in shapes)


@dataclass(frozen=True)
class ParameterGroups:
    """Shapes of the parameters by FSDP group; vision_root: the vision tower's part of the root."""

    layers: list[Shapes]
    blocks: list[Shapes]
    root: Shapes
    vision_root: Shapes

    @property
    def all(self) -> Shapes:
        return sum([*self.layers, *self.blocks], []) + self.root

    def trained_shard(self, num_shards: int, freeze_vision: bool) -> int:
        """Numbers on the first rank that have gradients and optimizer state."""
        frozen = sum(self.blocks, []) + self.vision_root if freeze_vision else []
        return shard_numel(self.all, num_shards) - shard_numel(frozen, num_shards)


def count_groups(config: Qwen2_5_VLConfig) -> ParameterGroups:
    """The groups of model.shard, from a model on the meta device."""
    with torch.device("meta"):
        model = Qwen2_5_VLForConditionalGeneration(config)
    model.tie_weights()

    def shapes(part) -> Shapes:
        return [tuple(parameter.shape) for parameter in part.parameters()]

    inner, inside = model.model, ("model.language_model.layers.", "model.visual.blocks.")
    root = {  # a tied weight comes once
        name: tuple(parameter.shape)
        for name, parameter in model.named_parameters() if not name.startswith(inside)
    }  # fmt: skip
    vision_root = [shape for name, shape in root.items() if name.startswith("model.visual.")]
    layers = [shapes(layer) for layer in inner.language_model.layers]
    blocks = [shapes(block) for block in inner.visual.blocks]
    return ParameterGroups(layers, blocks, [*root.values()], vision_root)


# ------------------------------------------------------------------------------------------ memory


def in_flight(config: Qwen2_5_VLConfig, tokens: int, patches: int, keys: int, c: int) -> int:
    """Estimate: bytes of a layer's or block's own tensors in a pass without gradient."""
    text, vision = config.get_text_config(), config.vision_config
    return max(
        c * tokens * (3 * text.intermediate_size + 2 * text.hidden_size),  # MLP
        c * (4 * tokens * text.hidden_size + 2 * keys * key_width(config)),  # attention
        c * patches * (3 * vision.intermediate_size + 2 * vision.hidden_size),
        30 * patches * vision.hidden_size,  # rotary: query and key in float32, several times
    )


def estimate(config: Qwen2_5_VLConfig, flags: PlanConfig, on_gpu: bool = True) -> dict:
    """Bytes on one GPU: {phase: {part: bytes}}; a phase's parts exist together at its peak."""
    c, groups, num_shards = 2 if on_gpu else 4, count_groups(config), flags.num_shards
    load, shard = flags.pass_load(), shard_numel(groups.all, num_shards)
    trained = groups.trained_shard(num_shards, flags.freeze_vision)
    always = {
        "policy, float32, shard": 4 * shard,
        ADAMW: 8 * trained,
        REFERENCE: c * shard,
    }
    rows_per_prompt = (flags.group_size, flags.shuffled_group_size)
    phases = generation(config, groups, load, [rows for rows in rows_per_prompt if rows], c)
    phases |= update_phases(config, flags, groups, load, c)
    phases["optimizer"] = {GRADIENTS: 4 * trained}
    if flags.validation:
        both = generation(config, groups, flags.load(VALIDATED), [1], c).values()
        phases["validation"] = max(both, key=lambda parts: sum(parts.values()))
    return {phase: always | parts for phase, parts in phases.items()}


def generation(config, groups: ParameterGroups, load: Load, rows: list[int], c: int) -> dict:
    """Prefill and decoding with the unsharded weights.

    rows: responses to each prompt, for each frame order in which it is shown.
    """
    text, per_token = config.get_text_config(), cache_bytes_per_token(config, c)
    prefilled, patches = (len(rows) * count for count in (sum(load.prompt_tokens), load.patches))
    num_rows = sum(rows) * len(load.prompt_tokens)
    room = max(load.prompt_tokens) - 1 + load.response_tokens
    weights = {"unsharded weights": c * numel(groups.all)}
    pixels = patches * 1176 * (4 + c)
    on_cpu = {"lm_head laid out for the CPU": c * text.vocab_size * text.hidden_size}
    return {
        "prefill": weights | {
            "key-value cache": prefilled * per_token,
            "in flight": pixels + in_flight(config, prefilled, patches, 0, c),
        },
        "decode": weights | (on_cpu if c == 4 else {}) | {
            "key-value cache": (prefilled + num_rows * room) * per_token,  # the prompts' stays
            "in flight": pixels + num_rows * text.vocab_size * 12,  # logits twice, softmax
        },
    }  # fmt: skip


def saved_activations(config: Qwen2_5_VLConfig, load: Load, flags: PlanConfig, c: int) -> int:
    """Bytes of activations between the forward and the backward pass."""
    text, vision = config.get_text_config(), config.vision_config
    layer = counting.saved_by_layer(config, load, c)
    block = counting.saved_by_block(config, load, c)
    if flags.activation_checkpointing:  # the inputs alone
        layer = c * load.packed * text.hidden_size
        block = c * load.patches * vision.hidden_size
    return text.num_hidden_layers * layer + (0 if flags.freeze_vision else vision.depth * block)


def update_phases(config, flags: PlanConfig, groups: ParameterGroups, load: Load, c: int) -> dict:
    """Reference, forward, and the three places where the backward pass may have its peak."""
    num_shards, text = flags.num_shards, config.get_text_config()
    trained = groups.trained_shard(num_shards, flags.freeze_vision)
    root_trained = numel(groups.root) - flags.freeze_vision * numel(groups.vision_root)
    largest = max(map(numel, [*groups.layers, *groups.blocks]))
    # Two groups are whole and a third is on its way; one process copies only what it uses.
    gathered = (3 if num_shards > 1 else 1) * c * largest
    root, head = c * numel(groups.root), c * text.vocab_size * text.hidden_size
    # The root on its way: this rank's part, all parts in one row, and cut into parameters.
    root_gathered = root * 2 + root // num_shards if num_shards > 1 else root

    pixels = load.patches * 1176 * (4 + c)
    hidden = c * (2 * load.packed + load.scored) * text.hidden_size
    width = block_width(load.scored, "cuda" if c == 2 else "cpu")
    logits = load.scored * min(width, text.vocab_size)
    work = in_flight(config, load.packed, load.patches, counting.keys_seen(load), c)
    work = pixels + hidden + max(work, (8 + c) * logits)
    layer = counting.saved_by_layer(config, load, c) if flags.activation_checkpointing else 0
    # The gradients of gate, up and their product, and of the residual.
    layer += c * load.packed * (3 * text.intermediate_size + 2 * text.hidden_size)

    saved = {SAVED: saved_activations(config, load, flags, c)}
    earlier = {GRADIENTS: 4 * trained} if flags.num_passes > 1 else {}
    done = earlier or {GRADIENTS: 4 * trained - 4 * shard_numel(groups.root, num_shards)}
    return {
        "gather root": {FSDP: root_gathered, "in flight": pixels},
        "reference": {FSDP: root + gathered, "in flight": work},
        "forward": earlier | saved | {FSDP: root + gathered, "in flight": work},
        "backward: logits": earlier | {
            FSDP: root + head,  # and the gradient of lm_head
            SAVED: saved[SAVED] + hidden,
            "in flight": pixels + (4 + 2 * c) * (logits + load.scored * text.hidden_size),
        },
        # A layer's gradients, and the reduction of those before.
        "backward: layers": done | saved | {
            FSDP: root + head + gathered + (c + 4) * largest, "in flight": pixels + layer,
        },
        # Either c and 4 of them, or 4 and, if this rank is alone, all of the result.
        "backward: root": done | {FSDP: (c + 4) * root_trained},
    }  # fmt: skip


def peak(phases: dict) -> tuple[str, int]:
    """The phase with the most bytes, and how many."""
    sums = {phase: sum(parts.values()) for phase, parts in phases.items()}
    return max(sums.items(), key=lambda item: item[1])


# ----------------------------------------------------------------------------------------- seconds


def traffic(groups: ParameterGroups, flags: PlanConfig) -> dict[str, float]:
    """Bytes that one GPU receives in a step, over NVLink and over the network.

    A step gathers the policy's weights for the rollout (bfloat16), and in each pass the reference's
    once, the policy's in the forward pass and all but its root again in the backward pass; it
    reduces the gradients of each pass in float32 over the shards, and those shards over the
    replicas.
    """
    shards, passes = flags.num_shards, flags.num_passes
    root, total = numel(groups.root), numel(groups.all)
    sharding = 2 * (total + passes * (3 * total - root)) + passes * 4 * total
    inside = min(shards, GPUS_PER_NODE)  # GPUs of a node that share one copy of the model
    nodes = max(1, shards // GPUS_PER_NODE)
    replicas = 2 * passes * 4 * total / shards * (1 - 1 / flags.replicas)
    across = flags.num_gpus > GPUS_PER_NODE  # each node receives a part once, through all its GPUs
    return {
        "nvlink": sharding * (1 - 1 / inside) + (0 if across else replicas),
        "network": sharding * (1 - 1 / nodes) / inside + (replicas if across else 0),
    }


def seconds(config: Qwen2_5_VLConfig, flags: PlanConfig) -> dict[str, tuple[float, float]]:
    """Seconds of a step by part: (slow, fast). Fast: communication is hidden behind the passes."""
    gpu, groups, text = GPUS[flags.gpu], count_groups(config), config.get_text_config()
    flops = counting.step_flops(
        config, flags.load(flags.rank_prompts), checkpointing=flags.activation_checkpointing,
        freeze_vision=flags.freeze_vision,
    )  # fmt: skip
    head_and_norm = text.hidden_size * (text.vocab_size + 1)
    num_weights = sum(map(numel, groups.layers)) + head_and_norm
    read = counting.decode_bytes(config, flags.pass_load(), num_weights, 2) * flags.num_passes
    num_kernels = KERNELS_PER_LAYER * text.num_hidden_layers
    num_kernels *= flags.num_passes * flags.max_new_tokens
    trained = groups.trained_shard(flags.num_shards, flags.freeze_vision)
    received = traffic(groups, flags)

    def parts(case: int) -> dict[str, float]:
        compute, memory, links = (EFFICIENCY[key][case] for key in ("compute", "memory", "links"))

        def passes(*phases: str) -> float:
            work = sum(count for phase, count in flops.items() if phase.startswith(phases))
            return work / gpu.flops / compute

        return {
            "rollout: vision, prefill": passes("rollout.vision", "rollout.prefill"),
            "rollout: decode": max(read / gpu.memory / memory, num_kernels * LAUNCH_SECONDS[case]),
            "reference": passes("reference"),
            "update": passes("forward", "backward", "recompute"),
            "optimizer": 28 * trained / gpu.memory / memory,  # read w, g, m, v; write w, m, v
            "gather, reduce": sum(received[link] / getattr(gpu, link) for link in received) / links,
        }

    slow, fast = parts(0), parts(1)
    hidden = fast["reference"] + fast["update"]
    fast["gather, reduce"] = max(0.0, fast["gather, reduce"] - hidden)
    return {name: (slow[name], fast[name]) for name in slow}


# ------------------------------------------------------------------------------------------ report


def table(phases: dict) -> list[str]:
    """The parts of every phase in GiB."""
    parts = dict.fromkeys(part for found in phases.values() for part in found)
    heads = [phase.partition(": ") for phase in phases]  # two lines
    rows = {"GiB": [head[0] for head in heads], "": [head[2] for head in heads]}
    for part in parts:
        sizes = [found.get(part) for found in phases.values()]
        rows[part] = ["" if size is None else f"{size / GIB:.2f}" for size in sizes]
    rows["total"] = [f"{sum(found.values()) / GIB:.2f}" for found in phases.values()]
    return [f"{title:31}" + "".join(f"{cell:>12}" for cell in row) for title, row in rows.items()]


def verdict(phases: dict, flags: PlanConfig) -> str:
    """One line: whether the run fits."""
    needed, limit = peak(phases)[1] / GIB, (1 - RESERVE) * GPUS[flags.gpu].gib
    answer = "fits" if needed <= limit else "does not fit"
    return (f"{flags.num_gpus} x {flags.gpu}: {answer}, {needed:.1f} of {limit:.1f} GiB; "
            f"{RESERVE:.0%} is left free (assumed)")  # fmt: skip


def report(config: Qwen2_5_VLConfig, flags: PlanConfig) -> str:
    """Memory by phase, the verdict, seconds by part, traffic, hours, and what was assumed."""
    groups, phases, parts = count_groups(config), estimate(config, flags), seconds(config, flags)
    head = (
        f"A prediction for {flags.model} ({numel(groups.all):,} parameters): nothing is measured."
    )
    lines = [head, *table(phases)]
    step = {phase: found for phase, found in phases.items() if phase != "validation"}
    for name, found in (("peak of a step", step), ("with validation", phases)):
        lines.append(f"{name}: {peak(found)[1] / GIB:.1f} GiB in {peak(found)[0]}")
    lines.append(verdict(phases, flags))
    slow, fast = (sum(case) for case in zip(*parts.values(), strict=True))
    lines += ["", f"{'seconds of a step':31}{'from':>12}{'to':>12}"]
    for name, (longest, shortest) in (parts | {"total": (slow, fast)}).items():
        lines.append(f"{name:31}{shortest:12.2f}{longest:12.2f}")
    hours = [flags.max_steps * total / 3600 for total in (fast, slow)]
    gpu_hours = [flags.num_gpus * number for number in hours]
    nvlink, network = (number / 1e9 for number in traffic(groups, flags).values())
    ranges = [f"{low:.0%} to {high:.0%} of {name}" for name, (low, high) in EFFICIENCY.items()]
    most, least = (1e6 * number for number in LAUNCH_SECONDS)
    return "\n".join([
        *lines,
        f"{flags.max_steps} steps: {hours[0]:.1f} to {hours[1]:.1f} hours, {gpu_hours[0]:.0f} to "
        f"{gpu_hours[1]:.0f} GPU-hours",
        f"a GPU receives {nvlink:.1f} GB a step over NVLink and {network:.1f} GB over the network",
        f"Assumed: {', '.join(ranges)} (peaks of NVIDIA's data sheets); {least:.0f} to {most:.0f} "
        f"us per kernel of decoding, {KERNELS_PER_LAYER} kernels per layer (counted); every "
        "response as long as it may be.",
        "Not counted: decoding videos (ahead of the step), scoring, validation, checkpoints.",
    ])  # fmt: skip


def main() -> None:
    flags = parse_flags(PlanConfig, "Predicts what a T-GRPO run needs.")
    print(report(load_config(flags.model), flags))


if __name__ == "__main__":
    run_main(main)
