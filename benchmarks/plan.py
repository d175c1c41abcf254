"""What a T-GRPO run needs: memory per GPU, seconds per step, GPU-hours, from the config alone.

    python benchmarks/plan.py                                  the paper's run: 7B, 8 x A100-80
    python benchmarks/plan.py --model 3B --num_gpus 1 --prompts_per_step 1
    python benchmarks/plan.py --num_gpus 512 --replicas 64 --prompts_per_step 512 --gpu H100

Memory, in bytes. S GPUs share P parameters (num_gpus / replicas); c = 2 bytes of a bfloat16 number
(4 on a CPU, where all is float32). FSDP2 gathers by groups: one per decoder layer and per vision
block, and the root with embedding, lm_head, final norm, patch embedding and merger.

    at all times    4 P / S  policy, float32 master weights      8 P / S  AdamW, two moments
                    c P / S  reference
    rollout         c P      whole weights, and the cache: 2 layers key-width c per token and row
    validation      the same with VALIDATED rows of their own prompts
    reference       c root   while its pass lasts; layers come and go
    update          c root   from the forward pass to the end of the backward pass
                    saved    with checkpointing the input of each layer and block, and all of one of
                             them again in the backward pass; without, all of all
                    logits   a block of the vocabulary at a time, in float32 and in c
                    4 P / S  gradients; a group's are c before, and 4 in, the reduction

Exact, and compared with counted bytes in the tests: parameters, shards, optimizer, cache, saved
activations, FLOPs. Estimated: tensors in flight inside a layer, FSDP2's buffers, RESERVE.

Seconds are a range between two assumptions, not a measurement: see EFFICIENCY and the lines that
the program prints under the table. All responses are taken to be as long as they may be.
"""

import dataclasses
import json
import sys
from dataclasses import dataclass
from math import ceil, isqrt, prod
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from transformers import AutoConfig, Qwen2_5_VLConfig, Qwen2_5_VLForConditionalGeneration

from benchmarks import counting
from benchmarks.counting import Load, cache_bytes_per_token
from infra.distributed import run_main
from infra.errors import require
from infra.flags import FlagParser, check_ranges, flag
from infra.fused import block_width
from model import resolve_folder

GIB = 2**30
RESERVE = 0.1  # of a GPU: CUDA, NCCL, cuBLAS, fragmentation. Assumed, measured on no machine
VALIDATED = 16  # prompts that a rank validates together (evaluation/validation.py)
GPUS_PER_NODE = 8


@dataclass(frozen=True)
class Gpu:
    """NVIDIA's data sheets: dense bfloat16 FLOP/s, memory and NVLink (one direction) bytes/s; DGX
    systems: network bytes/s per GPU."""

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
# Of the data sheet's figures, from slow to fast. All assumed: none was measured with this code.
EFFICIENCY = {"compute": (0.3, 0.6), "memory": (0.3, 0.6), "links": (0.5, 0.8)}
KERNELS_PER_LAYER = 42  # of a decoded token: 1,180 counted at 28 layers
LAUNCH_SECONDS = (27e-6, 18e-6)  # per kernel of an eager decoding step, assumed

# The config.json of Qwen/Qwen2.5-VL-7B-Instruct and -3B-Instruct, what decides sizes.
VISION = {
    "model_type": "qwen2_5_vl", "depth": 32, "hidden_size": 1280, "intermediate_size": 3420,
    "num_heads": 16, "in_chans": 3, "patch_size": 14, "spatial_patch_size": 14,
    "spatial_merge_size": 2, "temporal_patch_size": 2, "window_size": 112,
    "fullatt_block_indexes": [7, 15, 23, 31], "tokens_per_second": 2,
}  # fmt: skip
OFFICIAL = {
    "7B": {
        "vocab_size": 152064, "hidden_size": 3584, "intermediate_size": 18944,
        "num_hidden_layers": 28, "num_attention_heads": 28, "num_key_value_heads": 4,
        "tie_word_embeddings": False, "vision_config": VISION | {"out_hidden_size": 3584},
    },
    "3B": {
        "vocab_size": 151936, "hidden_size": 2048, "intermediate_size": 11008,
        "num_hidden_layers": 36, "num_attention_heads": 16, "num_key_value_heads": 2,
        "tie_word_embeddings": True, "vision_config": VISION | {"out_hidden_size": 2048},
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
        require(
            self.prompts_per_step % self.num_gpus == 0,
            f"--prompts_per_step {self.prompts_per_step} must be a multiple of --num_gpus "
            f"{self.num_gpus}",
        )

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

    def load(self, num_prompts: int) -> Load:
        """So many prompts with as many pixels as the flags allow."""
        merged = self.max_pixels // 28**2  # vision tokens of a pair of frames, in a near square
        height = next(side for side in range(isqrt(merged), 0, -1) if merged % side == 0)
        grid = (ceil(self.max_frames / 2), 2 * height, 2 * merged // height)
        return Load(
            (grid,) * num_prompts, (grid[0] * merged + self.text_tokens,) * num_prompts,
            self.group_size, self.shuffled_group_size, self.max_new_tokens,
        )  # fmt: skip


# --------------------------------------------------------------------------------------- parameters


def load_config(name: str) -> Qwen2_5_VLConfig:
    """The config of an official model, a folder, a config.json or a Hub id.

    Raises:
        UserError: there is none, or it is of another model.
    """
    if name in OFFICIAL:
        return Qwen2_5_VLConfig(**OFFICIAL[name])
    path = Path(name)
    if not path.is_file():
        return AutoConfig.from_pretrained(resolve_folder(name))
    try:
        kind = json.loads(path.read_text(encoding="utf-8")).get("model_type")
    except (ValueError, AttributeError) as error:
        require(False, f"--model {name} is no config.json: {error}")
    require(kind == "qwen2_5_vl", f"--model {name} is not a Qwen2.5-VL: it is a {kind!r}")
    return AutoConfig.from_pretrained(path)


@dataclass(frozen=True)
class Group:
    """The shapes of one FSDP group's parameters."""

    shapes: tuple[tuple[int, ...], ...]

    @property
    def numel(self) -> int:
        return sum(map(prod, self.shapes))

    def shard(self, num_shards: int) -> int:
        """Numbers that the first rank holds: FSDP2 cuts the first dimension, rounded up."""
        return sum(ceil(shape[0] / num_shards) * prod(shape[1:]) for shape in self.shapes)


@dataclass(frozen=True)
class Groups:
    """All FSDP groups of a model; vision_root is the vision tower's part of the root."""

    layers: list[Group]
    blocks: list[Group]
    root: Group
    vision_root: Group

    @property
    def all(self) -> list[Group]:
        return [*self.layers, *self.blocks, self.root]

    @property
    def numel(self) -> int:
        return sum(group.numel for group in self.all)

    def trainable_shard(self, num_shards: int, freeze_vision: bool) -> int:
        """Numbers of the first rank that are trained: they have gradients and optimizer state."""
        frozen = [*self.blocks, self.vision_root] if freeze_vision else []
        return sum(group.shard(num_shards) for group in self.all) - sum(
            group.shard(num_shards) for group in frozen
        )


def count_groups(config: Qwen2_5_VLConfig) -> Groups:
    """The groups of model.shard, from a model that is built without memory."""
    with torch.device("meta"):
        model = Qwen2_5_VLForConditionalGeneration(config)
    model.tie_weights()
    shapes: dict[str, list] = {}
    for name, parameter in model.named_parameters():  # a tied weight comes once
        parts = name.split(".")
        is_group = ".".join(parts[1:3]) in ("language_model.layers", "visual.blocks")
        kind = ".".join(parts[1:4]) if is_group else f"root.{parts[1]}"
        shapes.setdefault(kind, []).append(tuple(parameter.shape))
    groups = {kind: Group(tuple(found)) for kind, found in shapes.items()}
    root = [shape for kind, found in shapes.items() if kind.startswith("root") for shape in found]
    return Groups(
        [group for kind, group in groups.items() if kind.startswith("language_model.layers.")],
        [group for kind, group in groups.items() if kind.startswith("visual.blocks.")],
        Group(tuple(root)),
        groups["root.visual"],
    )


# ------------------------------------------------------------------------------------------- memory


def in_flight(config: Qwen2_5_VLConfig, tokens: int, patches: int, keys: int, c: int) -> int:
    """Estimate: bytes of a layer's or block's own tensors in a pass without gradient."""
    text, vision = config.get_text_config(), config.vision_config
    return max(
        c * tokens * (3 * text.intermediate_size + 2 * text.hidden_size),  # MLP
        c * (4 * tokens * text.hidden_size + 2 * keys * counting.key_width(config)),  # attention
        c * patches * (3 * vision.intermediate_size + 2 * vision.hidden_size),
        30 * patches * vision.hidden_size,  # rotary: query and key in float32, several times
    )


def block_logits(config: Qwen2_5_VLConfig, num_tokens: int, on_gpu: bool) -> int:
    """Numbers in the logits of one block of the vocabulary."""
    width = block_width(num_tokens, "cuda" if on_gpu else "cpu")
    return num_tokens * min(width, config.get_text_config().vocab_size)


def estimate(config: Qwen2_5_VLConfig, flags: PlanConfig, on_gpu: bool = True) -> dict:
    """Bytes on one GPU: {phase: {part: bytes}}; a phase's parts exist together at its peak."""
    c, groups = 2 if on_gpu else 4, count_groups(config)
    load = flags.load(min(flags.prompts_per_rank, flags.rank_prompts))
    shard = sum(group.shard(flags.num_shards) for group in groups.all)
    trained = groups.trainable_shard(flags.num_shards, flags.freeze_vision)
    always = {
        "policy, float32, shard": 4 * shard,
        "AdamW, two moments": 8 * trained,
        "reference, shard": c * shard,
    }
    rows_per_prompt = (flags.group_size, flags.shuffled_group_size)
    phases = generation(config, groups, load, [rows for rows in rows_per_prompt if rows], c)
    phases |= update_phases(config, flags, groups, load, trained, c)
    phases["optimizer"] = {"gradients, float32": 4 * trained}
    if flags.validation:
        both = generation(config, groups, flags.load(VALIDATED), [1], c).values()
        phases["validation"] = max(both, key=lambda parts: sum(parts.values()))
    return {phase: always | parts for phase, parts in phases.items()}


def generation(config, groups: Groups, load: Load, rows: list[int], c: int) -> dict:
    """Prefill and decoding with the whole weights.

    rows: responses to each prompt, for each order of frames in which it is shown.
    """
    text, per_token = config.get_text_config(), cache_bytes_per_token(config, c)
    prefilled, patches = (len(rows) * count for count in (sum(load.prompt_tokens), load.patches))
    num_rows = sum(rows) * len(load.prompt_tokens)
    room = max(load.prompt_tokens) - 1 + load.response_tokens
    whole = {"whole weights (unsharded)": c * groups.numel}
    pixels = patches * 1176 * (4 + c)
    head = text.vocab_size * text.hidden_size
    laid_out = {} if c == 2 else {"lm_head laid out for the CPU": c * head}
    return {
        "prefill": whole | {
            "key-value cache": prefilled * per_token,
            "in flight": pixels + in_flight(config, prefilled, patches, 0, c),
        },
        "decode": whole | laid_out | {
            "key-value cache": (prefilled + num_rows * room) * per_token,  # the prompts' own stays
            "in flight": pixels + num_rows * text.vocab_size * 12,  # logits twice, softmax
        },
    }  # fmt: skip


def kept_by_forward(config: Qwen2_5_VLConfig, load: Load, flags: PlanConfig, c: int) -> int:
    """Bytes of activations between the forward and the backward pass."""
    text, vision = config.get_text_config(), config.vision_config
    layer = counting.saved_by_layer(config, load, c)
    block = counting.saved_by_block(config, load, c)
    if flags.activation_checkpointing:  # the inputs alone
        layer = c * load.packed * text.hidden_size
        block = c * load.patches * vision.hidden_size
    return text.num_hidden_layers * layer + (0 if flags.freeze_vision else vision.depth * block)


def update_phases(
    config, flags: PlanConfig, groups: Groups, load: Load, trained: int, c: int
) -> dict:
    """Reference, forward and the three places where the backward pass may have its peak."""
    num_shards, text = flags.num_shards, config.get_text_config()
    largest = max(group.numel for group in [*groups.layers, *groups.blocks])
    # Of the groups two are whole and a third is on its way; one process copies only what it uses.
    gathered = (3 if num_shards > 1 else 1) * c * largest
    root, head = c * groups.root.numel, c * text.vocab_size * text.hidden_size
    root_trained = groups.root.numel - (groups.vision_root.numel if flags.freeze_vision else 0)
    logits = block_logits(config, load.scored, on_gpu=c == 2)
    kept = kept_by_forward(config, load, flags, c)
    pixels = load.patches * 1176 * (4 + c)
    hidden = c * (2 * load.packed + load.scored) * text.hidden_size
    work = in_flight(config, load.packed, load.patches, counting.keys_seen(load), c)
    work = pixels + hidden + max(work, (8 + c) * logits)
    layer = counting.saved_by_layer(config, load, c) if flags.activation_checkpointing else 0
    # The gradients of gate, up and their product, and of the residual.
    layer += c * load.packed * (3 * text.intermediate_size + 2 * text.hidden_size)
    done = 4 * trained - 4 * groups.root.shard(num_shards)  # all groups but the root
    earlier = {"gradients, float32": 4 * trained} if flags.num_passes > 1 else {}
    fsdp, gradients = "FSDP: gathered, or on the way", "gradients, float32"
    # The root on its way: this rank's part, all parts in one row, and cut into parameters.
    root_gathered = root * 2 + root // num_shards if num_shards > 1 else root
    return {
        "gather root": {fsdp: root_gathered, "in flight": pixels},
        "reference": {fsdp: root + gathered, "in flight": work},
        "forward": earlier
        | {fsdp: root + gathered, "saved activations": kept, "in flight": work},
        "backward: logits": earlier | {
            fsdp: root + head,  # and the gradient of lm_head
            "saved activations": kept + hidden,
            "in flight": pixels + (4 + 2 * c) * (logits + load.scored * text.hidden_size),
        },
        "backward: layers": {
            # A layer's gradients, and the reduction of those before.
            fsdp: root + head + gathered + (c + 4) * largest,
            "saved activations": kept,
            "in flight": pixels + layer,
        } | ({gradients: done} | earlier),
        # Either c and 4 of them, or 4 and, if this rank is alone, all of the result.
        "backward: root": {fsdp: (c + 4) * root_trained} | ({gradients: done} | earlier),
    }  # fmt: skip


def peak(phases: dict) -> tuple[str, int]:
    """The phase with the most bytes, and how many."""
    sums = {phase: sum(parts.values()) for phase, parts in phases.items()}
    phase = max(sums, key=sums.get)
    return phase, sums[phase]


def fitting_flags(config: Qwen2_5_VLConfig, flags: PlanConfig) -> tuple[dict, int] | None:
    """The fewest changes of flags that make a run fit, and its bytes; None: none of these does.

    They are tried in the order of what they cost: first what only takes time.
    """
    limit = (1 - RESERVE) * GPUS[flags.gpu].gib * GIB
    changes: dict = {}
    steps = ({}, {"activation_checkpointing": True}, {"prompts_per_rank": 1},
             {"validation": False}, {"freeze_vision": True}, {"max_pixels": 64 * 28 * 28},
             {"max_new_tokens": 512}, {"group_size": 4, "shuffled_group_size": 2})  # fmt: skip
    for step in steps:
        changes |= {key: value for key, value in step.items() if getattr(flags, key) != value}
        needed = peak(estimate(config, dataclasses.replace(flags, **changes)))[1]
        if needed <= limit:
            return changes, needed
    return None


# ------------------------------------------------------------------------------------------ seconds


def traffic(groups: Groups, flags: PlanConfig) -> dict[str, float]:
    """Bytes that one GPU receives in a step, over NVLink and over the network.

    A step gathers the policy's weights for the rollout (bfloat16), and in each pass the reference's
    once, the policy's in the forward pass and all but its root again in the backward pass; it
    reduces the gradients of each pass in float32, over the shards, and with replicas the shards of
    these over the replicas.
    """
    shards, passes = flags.num_shards, flags.num_passes
    root, numel = groups.root.numel, groups.numel
    bytes_ = 2 * (numel + passes * (3 * numel - root)) + passes * 4 * numel
    inside = min(shards, GPUS_PER_NODE)  # GPUs of a node that share one copy of the model
    nodes = max(1, shards // GPUS_PER_NODE)
    copies = 2 * passes * 4 * numel / shards * (1 - 1 / flags.replicas)
    over_network = flags.num_gpus > GPUS_PER_NODE  # each node receives a part once, by all its GPUs
    return {
        "nvlink": bytes_ * (1 - 1 / inside) + (0 if over_network else copies),
        "network": bytes_ * (1 - 1 / nodes) / inside + (copies if over_network else 0),
    }


def seconds(config: Qwen2_5_VLConfig, flags: PlanConfig) -> dict[str, tuple[float, float]]:
    """Seconds of a step by part: (slow, fast). Fast: the links' work is hidden behind compute."""
    gpu, groups = GPUS[flags.gpu], count_groups(config)
    whole = flags.load(flags.rank_prompts)
    flops = counting.step_flops(
        config, whole, checkpointing=flags.activation_checkpointing,
        freeze_vision=flags.freeze_vision,
    )  # fmt: skip
    text = config.get_text_config()
    weights = sum(group.numel for group in groups.layers)
    weights += text.hidden_size * (text.vocab_size + 1)  # lm_head, final norm
    one = flags.load(min(flags.prompts_per_rank, flags.rank_prompts))
    read = flags.num_passes * counting.decode_bytes(config, one, weights, 2)
    num_steps = flags.num_passes * flags.max_new_tokens
    trained = groups.trainable_shard(flags.num_shards, flags.freeze_vision)
    received = traffic(groups, flags)
    parts: dict[str, list[float]] = {}
    for place in (0, 1):
        compute, memory, links = (EFFICIENCY[key][place] for key in ("compute", "memory", "links"))

        def passes(prefix: str, rate: float = gpu.flops * compute) -> float:
            return sum(n for name, n in flops.items() if name.startswith(prefix)) / rate

        launches = num_steps * KERNELS_PER_LAYER * text.num_hidden_layers * LAUNCH_SECONDS[place]
        found = {
            "rollout: vision, prefill": passes("rollout.vision") + passes("rollout.prefill"),
            "rollout: decode": max(read / gpu.memory / memory, launches),
            "reference": passes("reference"),
            "update": passes("forward") + passes("backward") + passes("recompute"),
            "optimizer": 28 * trained / gpu.memory / memory,  # read w, g, m, v; write w, m, v
            "gather, reduce": sum(received[link] / getattr(gpu, link) for link in received) / links,
        }
        for name, value in found.items():
            parts.setdefault(name, []).append(value)
    hidden = min(parts["gather, reduce"][1], parts["reference"][1] + parts["update"][1])
    parts["gather, reduce"][1] -= hidden
    return {name: tuple(pair) for name, pair in parts.items()}


# ------------------------------------------------------------------------------------------- report


def table(phases: dict) -> str:
    """The parts of every phase in GiB."""
    parts = list(dict.fromkeys(part for found in phases.values() for part in found))
    heads = [phase.partition(": ") for phase in phases]  # two lines
    lines = [f"{title:31}" + "".join(f"{head[place]:>12}" for head in heads)
             for title, place in (("GiB", 0), ("", 2))]  # fmt: skip
    for part in parts:
        cells = [f"{found[part] / GIB:.2f}" if part in found else "" for found in phases.values()]
        lines.append(f"{part:31}" + "".join(f"{cell:>12}" for cell in cells))
    sums = [f"{sum(found.values()) / GIB:.2f}" for found in phases.values()]
    lines.append(f"{'together':31}" + "".join(f"{cell:>12}" for cell in sums))
    return "\n".join(lines)


def verdict(config: Qwen2_5_VLConfig, flags: PlanConfig) -> str:
    """One line: whether the run fits, and with which flags."""
    place = f"{flags.num_gpus} x {flags.gpu}"
    found = fitting_flags(config, flags)
    if found is None:
        needed = peak(estimate(config, flags))[1] / GIB
        return f"{place}: needs {needed:.1f} GiB; no flag of this program makes it fit"
    changes, needed = found
    words = " ".join(f"--{key} {str(value).lower()}" for key, value in changes.items())
    return f"{place}: fits with {needed / GIB:.1f} GiB" + (f" and {words}" if words else "")


def report(config: Qwen2_5_VLConfig, flags: PlanConfig) -> str:
    """Memory by phase, the verdict, seconds by part, traffic, hours, and what was assumed."""
    groups, phases, parts = count_groups(config), estimate(config, flags), seconds(config, flags)
    lines = [f"{flags.model}: {groups.numel:,} parameters", table(phases)]
    training = {phase: found for phase, found in phases.items() if phase != "validation"}
    for name, found in (("peak of a step", training), ("with validation", phases)):
        lines.append(f"{name}: {peak(found)[1] / GIB:.1f} GiB in {peak(found)[0]}")
    lines.append(f"{verdict(config, flags)}; {RESERVE:.0%} of a GPU is left free (assumed)")
    lines += ["", f"{'seconds of a step':31}{'from':>12}{'to':>12}"]
    totals = [sum(pair[place] for pair in parts.values()) for place in (1, 0)]
    for name, (slow, fast) in [*parts.items(), ("together", tuple(reversed(totals)))]:
        lines.append(f"{name:31}{fast:12.2f}{slow:12.2f}")
    hours = [flags.max_steps * total / 3600 for total in totals]
    gpu_hours = [flags.num_gpus * one for one in hours]
    received = {link: number / 1e9 for link, number in traffic(groups, flags).items()}
    ranges = [f"{low:.0%} to {high:.0%} of {name}" for name, (low, high) in EFFICIENCY.items()]
    slow, fast = (1e6 * one for one in LAUNCH_SECONDS)
    lines += [
        f"{flags.max_steps} steps: {hours[0]:.1f} to {hours[1]:.1f} hours, {gpu_hours[0]:.0f} to "
        f"{gpu_hours[1]:.0f} GPU-hours",
        f"a GPU receives {received['nvlink']:.1f} GB a step by NVLink and "
        f"{received['network']:.1f} GB by the network",
        "No figure here was measured. Peaks are those of NVIDIA's data sheets.",
        f"Assumed: {', '.join(ranges)}; {fast:.0f} to {slow:.0f} us for a kernel of decoding, of "
        f"which a layer has {KERNELS_PER_LAYER} (counted); every response is as long as it may be.",
        "Not counted: decoding videos (ahead of the step), scoring, validation, checkpoints.",
    ]
    return "\n".join(lines)


def parse_flags(argv: list[str] | None = None) -> PlanConfig:
    """The config of a command line; a UserError names an unknown flag or a wrong value."""
    parser = FlagParser(PlanConfig, allow_abbrev=False, description="What a T-GRPO run needs.")
    flags, rest = parser.parse_args_into_dataclasses(argv, return_remaining_strings=True)
    require(not rest, f"unknown argument {rest[0]!r}; --help lists the flags" if rest else "")
    flags.check()
    return flags


def main() -> None:
    flags = parse_flags()
    print(report(load_config(flags.model), flags))


if __name__ == "__main__":
    run_main(main)
