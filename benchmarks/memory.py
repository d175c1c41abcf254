"""Peak memory per GPU of a T-GRPO run, from the model's config alone.

    python benchmarks/memory.py                               the paper's run: 7B, 8 x 80 GiB
    python benchmarks/memory.py --model CONFIG --num_gpus 4 --max_frames 32
    python benchmarks/memory.py --check true --model FOLDER   against real steps on this machine

What train_rl.py holds, in bytes. W GPUs, P parameters, c = 2 bytes of a bfloat16 number (4 on CPU,
where all is float32). FSDP2 gathers by groups (distributed.shard): one per decoder layer, one per
vision block, and the root with embedding, lm_head, final norm, patch embedding and merger.

    kept all the time   4 P / W  policy, float32 master weights      8 P / W  AdamW, two moments
                        c P / W  reference
    rollout             c P      whole weights: distributed.unsharded gathers every group, and
                                 FSDP2 casts to MixedPrecisionPolicy.param_dtype before it gathers
                        cache    2 layers key-width c for each token of each of G + G~ rows
    reference           root     c of the root group while its pass lasts, layers come and go
    update              root     c of the root group from the forward pass to the end of the
                                 backward: the policy's root is not resharded in between
                        saved    with checkpointing the input of each layer and block, and all of
                                 one of them again in the backward pass; without, all of all
                        logits   a block of the vocabulary at a time (fused.LOGITS_PER_BLOCK), in
                                 float32 and as the matrix product gives and takes them
                        4 P / W  gradients; a group's are c before, and 4 in the reduction

Exact, and compared with counted bytes in tests/test_benchmarks.py: parameters, shards, optimizer,
cache, saved activations. Estimated: what is in flight inside a layer, FSDP2's buffers (two groups
gathered and one on its way), and the share of a GPU that CUDA, NCCL, cuBLAS and fragmentation take.
"""

import dataclasses
import json
import sys
import tempfile
from dataclasses import dataclass
from math import ceil, isqrt
from pathlib import Path

import numpy as np
import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from transformers import AutoConfig, Qwen2_5_VLConfig, Qwen2_5_VLForConditionalGeneration

import toy
from benchmarks import rl_step
from benchmarks.counting import cache_bytes_per_token
from benchmarks.measure import keep_no_freed_memory, release_memory, used_bytes
from infra.distributed import World, log, process_group, run
from infra.errors import require
from infra.flags import FlagParser, flag
from infra.fused import block_width
from model import resolve_folder

GIB = 2**30
RESERVE = 0.1  # of a GPU: CUDA, NCCL, cuBLAS, fragmentation. A guess: measured on no such machine
LAYOUTS = ((8, 80.0), (4, 80.0), (8, 40.0))  # GPUs and GiB of each

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
class MemoryConfig:
    """Flags. A name of RLConfig's means what it means there, with the same default."""

    model: str = flag("7B", "7B, 3B, a model folder, a config.json or a Hub id")
    num_gpus: int = flag(8, "W, ranks that share weights, gradients and optimizer")
    gpu_gib: float = flag(80.0, "memory of one GPU, in GiB")
    max_frames: int = flag(16, "frames of a clip at most")
    max_pixels: int = flag(128 * 28 * 28, "pixels of a frame at most")
    text_tokens: int = flag(200, "tokens of a prompt beside its vision tokens, an assumption")
    group_size: int = flag(8, "G, responses to the ordered frames")
    shuffled_group_size: int = flag(4, "G~, responses to the shuffled frames")
    max_new_tokens: int = flag(768, "length of a response: all are taken to be as long as they may")
    prompts_per_rank: int = flag(1, "prompts in one pass of a rank")
    activation_checkpointing: bool = flag(True, "recompute each layer in the backward pass")
    freeze_vision: bool = flag(False, "train the language model alone")
    check: bool = flag(False, "measure a real step of --model here, and compare")

    def check_values(self) -> None:
        """Raises ValueError naming the first flag whose value makes no sense."""
        for name in ("num_gpus", "group_size", "max_new_tokens", "prompts_per_rank"):
            require(getattr(self, name) >= 1, f"--{name} must be at least 1")
        require(self.gpu_gib > 0, "--gpu_gib must be positive")
        require(self.max_frames >= 2, "--max_frames must be at least 2")
        require(self.max_pixels >= 28 * 28, "--max_pixels must be at least 784, one token")
        for name in ("text_tokens", "shuffled_group_size"):
            require(getattr(self, name) >= 0, f"--{name} must not be negative")


# --------------------------------------------------------------------------------------- parameters


def load_config(name: str) -> Qwen2_5_VLConfig:
    """The config of an official model, a folder, a config.json or a Hub id.

    Raises:
        ValueError: there is none, or it is of another model.
    """
    if name in OFFICIAL:
        return Qwen2_5_VLConfig(**OFFICIAL[name])
    path = Path(name)
    if path.is_file():
        try:
            kind = json.loads(path.read_text(encoding="utf-8")).get("model_type")
        except (ValueError, AttributeError) as error:
            require(False, f"--model {name} is no config.json: {error}")
        require(kind == "qwen2_5_vl", f"--model {name} is not a Qwen2.5-VL: it is a {kind!r}")
        return AutoConfig.from_pretrained(path)
    return AutoConfig.from_pretrained(resolve_folder(name))


@dataclass(frozen=True)
class Group:
    """The shapes of one FSDP group's parameters."""

    shapes: tuple[tuple[int, ...], ...]

    @property
    def numel(self) -> int:
        return sum(torch.Size(shape).numel() for shape in self.shapes)

    def shard(self, num_gpus: int) -> int:
        """Numbers that the first rank holds: FSDP2 cuts the first dimension, rounded up."""
        return sum(
            ceil(shape[0] / num_gpus) * torch.Size(shape[1:]).numel() for shape in self.shapes
        )


@dataclass(frozen=True)
class Groups:
    """All FSDP groups of a model, and what of the root is the vision tower's."""

    layers: list[Group]
    blocks: list[Group]
    root: Group
    root_vision: Group

    @property
    def all(self) -> list[Group]:
        return [*self.layers, *self.blocks, self.root]

    @property
    def numel(self) -> int:
        return sum(group.numel for group in self.all)

    def trainable_shard(self, num_gpus: int, freeze_vision: bool) -> int:
        """Numbers of the first rank that learn: they have gradients and optimizer state."""
        total = sum(group.shard(num_gpus) for group in self.all)
        frozen = [*self.blocks, self.root_vision] if freeze_vision else []
        return total - sum(group.shard(num_gpus) for group in frozen)


def count_groups(config: Qwen2_5_VLConfig) -> Groups:
    """The groups of distributed.shard, from a model that is built without memory."""
    with torch.device("meta"):
        model = Qwen2_5_VLForConditionalGeneration(config)
    model.tie_weights()
    layers, blocks, root, root_vision = {}, {}, {}, {}
    for name, parameter in model.named_parameters():  # a tied weight comes once
        parts = name.split(".")
        shape = tuple(parameter.shape)
        if name.startswith("model.language_model.layers."):
            layers.setdefault(int(parts[3]), []).append(shape)
        elif name.startswith("model.visual.blocks."):
            blocks.setdefault(int(parts[3]), []).append(shape)
        else:
            root[name] = shape
            if name.startswith("model.visual."):
                root_vision[name] = shape
    return Groups(
        [Group(tuple(shapes)) for shapes in layers.values()],
        [Group(tuple(shapes)) for shapes in blocks.values()],
        Group(tuple(root.values())),
        Group(tuple(root_vision.values())),
    )


# -------------------------------------------------------------------------------------- activations


@dataclass(frozen=True)
class Pass:
    """The packed row of one forward pass: P prompts of S tokens, G responses of T to each.

    patches: of one prompt's clip. itemsize: c, bytes of a number that is computed with.
    """

    num_prompts: int
    prompt_tokens: int
    patches: int
    group_size: int
    response_tokens: int
    itemsize: int

    @property
    def tokens(self) -> int:
        """N, of the packed row."""
        return self.num_prompts * self.prompt_tokens + self.responses

    @property
    def responses(self) -> int:
        """M, response tokens."""
        return self.num_prompts * self.group_size * self.response_tokens

    @property
    def seen(self) -> int:
        """Keys that the attention of the responses holds: one copy of the prompt per response."""
        width = self.prompt_tokens + self.response_tokens
        return self.num_prompts * self.group_size * width


def saved_by_layer(config: Qwen2_5_VLConfig, row: Pass) -> int:
    """Bytes that one decoder layer keeps for its backward pass, its input included."""
    text, c = config.get_text_config(), row.itemsize
    width, heads = text.hidden_size, text.num_attention_heads
    key_width = text.num_key_value_heads * width // heads
    per_token = (
        2 * 4 * width  # both norms' inputs in float32
        + 5 * c * width  # both norms before and after their weight, o_proj's input
        + c * width  # query
        + 2 * c * key_width  # key, value
        + 4 * c * text.intermediate_size  # gate, its SiLU, up, their product
        + 2 * 4  # the norms' scales
        + 4 * heads  # the attention's logsumexp
    )
    responses = row.responses * (2 * c * width + 2 * 8)  # query and output as rows, two indices
    keys = 2 * c * row.seen * width  # key and value of all heads, the prompt's once per response
    prompt_out = c * row.num_prompts * row.prompt_tokens * width  # the attention's output
    mask_width = row.prompt_tokens + row.response_tokens
    mask = c * row.num_prompts * row.response_tokens * mask_width
    return row.tokens * per_token + responses + keys + prompt_out + mask


def saved_by_block(config: Qwen2_5_VLConfig, row: Pass) -> int:
    """Bytes that one vision block keeps for its backward pass, its input included."""
    vision, c = config.vision_config, row.itemsize
    width = vision.hidden_size
    per_patch = (
        2 * 4 * width  # both norms' inputs in float32
        + 5 * c * width  # both norms before and after their weight, the output projection's input
        + 2 * c * width  # query, key
        + 3 * c * width  # value, a view of the projection to all three
        + c * width  # the attention's output
        + 4 * c * vision.intermediate_size
        + 2 * 4
        + 4 * vision.num_heads
    )
    return row.num_prompts * row.patches * per_patch


def kept_by_forward(
    config: Qwen2_5_VLConfig, row: Pass, checkpointing: bool, freeze_vision: bool
) -> int:
    """Bytes of activations between the forward and the backward pass."""
    text, vision, c = config.get_text_config(), config.vision_config, row.itemsize
    layer, block = saved_by_layer(config, row), saved_by_block(config, row)
    if checkpointing:
        layer = c * row.tokens * text.hidden_size
        block = c * row.num_prompts * row.patches * vision.hidden_size
    blocks = 0 if freeze_vision else vision.depth * block
    return text.num_hidden_layers * layer + blocks


def in_flight(config: Qwen2_5_VLConfig, tokens: int, patches: int, keys: int, c: int) -> int:
    """Estimate: bytes of a layer's or block's own tensors in a pass without gradient."""
    text, vision = config.get_text_config(), config.vision_config
    mlp = c * tokens * (3 * text.intermediate_size + 2 * text.hidden_size)
    attention = c * (4 * tokens + 2 * keys) * text.hidden_size
    block_mlp = c * patches * (3 * vision.intermediate_size + 2 * vision.hidden_size)
    rotary = 30 * patches * vision.hidden_size  # query and key in float32, several times
    return max(mlp, attention, block_mlp, rotary)


def block_logits(config: Qwen2_5_VLConfig, num_tokens: int, on_gpu: bool) -> int:
    """Logits of one block of the vocabulary (fused.TokenLogprobs): numbers."""
    width = block_width(num_tokens, "cuda" if on_gpu else "cpu")
    return num_tokens * min(width, config.get_text_config().vocab_size)


# ------------------------------------------------------------------------------------------ phases


def estimate(config: Qwen2_5_VLConfig, flags: MemoryConfig, on_gpu: bool = True) -> dict:
    """Bytes on one GPU: for each phase of a step, what they are made of.

    Returns:
        {phase: {part: bytes}}; a phase's parts exist together at its peak.
    """
    num_gpus, c = flags.num_gpus, 2 if on_gpu else 4
    groups = count_groups(config)
    patches = flags.max_frames // 2 * (flags.max_pixels // 28**2) * 4
    row = Pass(
        flags.prompts_per_rank, patches // 4 + flags.text_tokens, patches, flags.group_size,
        flags.max_new_tokens, c,
    )  # fmt: skip
    shard = sum(group.shard(num_gpus) for group in groups.all)
    learning = groups.trainable_shard(num_gpus, flags.freeze_vision)
    always = {
        "policy, float32, shard": 4 * shard,
        "AdamW, two moments": 8 * learning,
        "reference, shard": c * shard,
    }
    return {
        phase: always | parts
        for phase, parts in {
            **rollout_phases(config, flags, groups, row),
            **update_phases(config, flags, groups, row, learning),
            "optimizer": {"gradients, float32": 4 * learning},
        }.items()
    }


def rollout_phases(config, flags: MemoryConfig, groups: Groups, row: Pass) -> dict:
    """Prefill and decoding, with the whole weights."""
    c, text = row.itemsize, config.get_text_config()
    orders = 2 if flags.shuffled_group_size else 1
    rows = flags.prompts_per_rank * (flags.group_size + flags.shuffled_group_size)
    prefilled = orders * row.num_prompts * row.prompt_tokens
    per_token = cache_bytes_per_token(config, c)
    room = row.prompt_tokens - 1 + row.response_tokens  # sampling.RoomyLayer
    pixels = orders * row.num_prompts * row.patches * 1176 * (4 + c)
    whole = {"whole weights (unsharded)": c * groups.numel}
    head = text.vocab_size * text.hidden_size
    laid_out = {} if c == 2 else {"lm_head laid out for the CPU": c * head}  # fused.fast_linear
    return {
        "prefill": whole | {
            "key-value cache": prefilled * per_token,
            "in flight": pixels
            + in_flight(config, prefilled, orders * row.num_prompts * row.patches, 0, c),
        },
        "decode": whole | laid_out | {
            "key-value cache": (prefilled + rows * room) * per_token,  # the prompts' own stays
            "in flight": pixels + rows * text.vocab_size * 12,  # logits twice, softmax
        },
    }  # fmt: skip


def update_phases(config, flags: MemoryConfig, groups: Groups, row: Pass, learning: int) -> dict:
    """Reference, forward and the three places where the backward pass may have its peak."""
    c, num_gpus, text = row.itemsize, flags.num_gpus, config.get_text_config()
    largest = max(group.numel for group in [*groups.layers, *groups.blocks])
    # Of the groups two are whole and a third is on its way; one process copies only what it uses.
    gathered = (3 if num_gpus > 1 else 1) * c * largest
    root, head = c * groups.root.numel, c * text.vocab_size * text.hidden_size
    root_learns = groups.root.numel - (groups.root_vision.numel if flags.freeze_vision else 0)
    logits = block_logits(config, row.responses, on_gpu=c == 2)
    kept = kept_by_forward(config, row, flags.activation_checkpointing, flags.freeze_vision)
    work = in_flight(config, row.tokens, row.num_prompts * row.patches, row.seen, c)
    pixels = row.num_prompts * row.patches * 1176 * (4 + c)
    hidden = c * (2 * row.tokens + row.responses) * text.hidden_size
    layer = saved_by_layer(config, row) if flags.activation_checkpointing else 0
    # The gradients of gate, up and their product, and of the residual.
    layer += c * row.tokens * (3 * text.intermediate_size + 2 * text.hidden_size)
    done = 4 * learning - 4 * Group(groups.root.shapes).shard(num_gpus)  # all groups but the root
    fsdp = "FSDP: gathered, or on the way"
    # The root on its way: this rank's part, all parts in one row, and cut into parameters.
    root_gathered = root * 2 + root // num_gpus if num_gpus > 1 else root
    return {
        "gather root": {fsdp: root_gathered, "in flight": pixels},
        "reference": {
            fsdp: root + gathered,
            "in flight": pixels + hidden + max(work, (8 + c) * logits),
        },
        "forward": {
            fsdp: root + gathered,
            "saved activations": kept,
            "in flight": pixels + hidden + max(work, (8 + c) * logits),
        },
        "backward: logits": {
            fsdp: root + head,  # and the gradient of lm_head
            "saved activations": kept + hidden,
            "in flight": pixels + (4 + 2 * c) * logits
            + (4 + 2 * c) * row.responses * text.hidden_size,  # of the hidden states
        },
        "backward: layers": {
            # A layer's gradients, and the reduction of those before.
            fsdp: root + head + gathered + (c + 4) * largest,
            "gradients, float32": done,
            "saved activations": kept,
            "in flight": pixels + layer,
        },
        "backward: root": {
            # Either c and 4 of them, or 4 and, if this rank is alone, all of the result.
            fsdp: (c + 4) * root_learns,
            "gradients, float32": done,
        },
    }


# ----------------------------------------------------------------------------------------- verdict


def peak(phases: dict) -> tuple[str, int]:
    """The phase with the most bytes, and how many."""
    sums = {phase: sum(parts.values()) for phase, parts in phases.items()}
    phase = max(sums, key=sums.get)
    return phase, sums[phase]


def fitting_flags(config: Qwen2_5_VLConfig, flags: MemoryConfig) -> tuple[dict, int] | None:
    """The fewest changes of flags that make a run fit, and its bytes; None: none of these does.

    They are tried in the order of what they cost: first what only takes time.
    """
    limit = (1 - RESERVE) * flags.gpu_gib * GIB
    changes: dict = {}
    steps = ({}, {"activation_checkpointing": True}, {"prompts_per_rank": 1},
             {"freeze_vision": True}, {"max_pixels": 64 * 28 * 28}, {"max_new_tokens": 512},
             {"group_size": 4, "shuffled_group_size": 2})  # fmt: skip
    for step in steps:
        changes |= {key: value for key, value in step.items() if getattr(flags, key) != value}
        needed = peak(estimate(config, dataclasses.replace(flags, **changes)))[1]
        if needed <= limit:
            return changes, needed
    return None


def verdict(config: Qwen2_5_VLConfig, flags: MemoryConfig) -> str:
    """One line: whether the run fits, and with which flags."""
    place = f"{flags.num_gpus} x {flags.gpu_gib:g} GiB"
    found = fitting_flags(config, flags)
    if found is None:
        needed = peak(estimate(config, flags))[1] / GIB
        return f"{place}: needs {needed:.1f} GiB; no flag of this program makes it fit"
    changes, needed = found
    words = " ".join(f"--{key} {str(value).lower()}" for key, value in changes.items())
    return f"{place}: fits with {needed / GIB:.1f} GiB" + (f" and {words}" if words else "")


def table(phases: dict) -> str:
    """The parts of every phase in GiB."""
    parts = list(dict.fromkeys(part for found in phases.values() for part in found))
    heads = [phase.partition(": ") for phase in phases]  # two lines
    lines = [f"{title:31}" + "".join(f"{head[place]:>12}" for head in heads)
             for title, place in (("GiB", 0), ("", 2))]  # fmt: skip
    for part in parts:
        cells = [found.get(part) for found in phases.values()]
        shown = ["" if cell is None else f"{cell / GIB:.2f}" for cell in cells]
        lines.append(f"{part:31}" + "".join(f"{cell:>12}" for cell in shown))
    sums = [f"{sum(found.values()) / GIB:.2f}" for found in phases.values()]
    lines.append(f"{'together':31}" + "".join(f"{cell:>12}" for cell in sums))
    return "\n".join(lines)


# ------------------------------------------------------------------------------------------- check


KEPT = ("policy, float32, shard", "AdamW, two moments", "reference, shard")
# Phases of rl_step.PHASES and the ones here whose largest they should show.
MEASURED = {
    "rollout.prefill": ("prefill",),
    "rollout.decode": ("decode",),
    "reference": ("gather root", "reference"),
    "forward": ("gather root", "forward"),
    "backward": ("backward: logits", "backward: layers", "backward: root"),
    "optimizer": ("optimizer",),
}


def write_clip(path: Path, flags: MemoryConfig) -> None:
    """A clip of noise with exactly as many frames and pixels as the flags allow."""
    tokens = flags.max_pixels // 28**2
    height = isqrt(tokens)
    size = (flags.max_frames, 28 * height, 28 * (tokens // height), 3)
    toy.write_y4m(path, np.random.default_rng(0).integers(0, 256, size, dtype=np.uint8))


def check(flags: MemoryConfig, world: World) -> dict[str, tuple[int, int]]:
    """Take real steps, and compare memory with the estimate for this device and number of
    processes: what the models take between two steps, and by how much each phase's peak is higher.

    Between two steps a process on CPU also holds libraries' buffers and a tokenizer (Qwen's: more
    than 0.1 GiB), and with several processes gloo copies what NCCL sends as it is.

    Returns:
        measured and estimated bytes of "kept", and of each phase above it.
    """
    with tempfile.TemporaryDirectory() as folder:
        clip = Path(folder) / "noise.y4m"
        write_clip(clip, flags)
        names = {item.name for item in dataclasses.fields(rl_step.StepConfig)}
        shared = {key: value for key, value in vars(flags).items() if key in names}
        step_config = rl_step.StepConfig(**shared, video=str(clip))
        config = step_config.rl_config()
        config.freeze_vision = flags.freeze_vision
        keep_no_freed_memory()
        square = torch.ones(512, 512, device=world.device)
        square @ square  # libraries load, and start their threads
        release_memory()
        before = used_bytes(world.device)
        system = rl_step.load_system(config, world)
        for step in range(2):  # the optimizer's state comes with the first
            measured = rl_step.measure_step(rl_step.our_step, system, config, str(clip), step)
    load = measured["load"]
    text_tokens = load.prompt_tokens[0] - load.tokens()["vision"] // len(load.grids)
    flags = dataclasses.replace(flags, num_gpus=world.size, text_tokens=text_tokens)
    phases = estimate(system.policy.config, flags, on_gpu=world.device.type == "cuda")
    rest = sum(min(parts.get(name, 0) for parts in phases.values()) for name in KEPT)
    results = {"kept": (measured["before"] - before, rest)}
    for phase, ours in MEASURED.items():
        expected = max(sum(phases[name].values()) for name in ours) - rest
        results[phase] = (measured["peaks"][phase] - measured["before"], expected)
    for phase, (found, expected) in results.items():
        log(f"{phase:18} measured {found / GIB:6.3f} GiB, estimated {expected / GIB:6.3f} GiB: "
            f"{(expected - found) / GIB:+.3f}")  # fmt: skip
    log(table(phases))
    return results


# ------------------------------------------------------------------------------------ command line


def parse_flags(argv: list[str] | None = None) -> MemoryConfig:
    """The config of a command line.

    Raises:
        ValueError: an unknown flag, or a value that makes no sense; names the flag.
    """
    parser = FlagParser(MemoryConfig, allow_abbrev=False, description="Memory of a T-GRPO run.")
    flags, rest = parser.parse_args_into_dataclasses(argv, return_remaining_strings=True)
    require(not rest, f"unknown argument {rest[0]!r}; --help lists the flags" if rest else "")
    flags.check_values()
    return flags


def main() -> None:
    flags = parse_flags()
    if flags.check:
        with process_group() as world:
            check(flags, world)
        return
    config = load_config(flags.model)
    groups = count_groups(config)
    print(f"{flags.model}: {groups.numel:,} parameters, {groups.root.numel:,} in the root group")
    phases = estimate(config, flags)
    print(table(phases))
    phase, needed = peak(phases)
    print(f"peak: {needed / GIB:.1f} GiB in {phase}; {RESERVE:.0%} of a GPU is left free")
    for num_gpus, gib in dict.fromkeys([(flags.num_gpus, flags.gpu_gib), *LAYOUTS]):
        print(verdict(config, dataclasses.replace(flags, num_gpus=num_gpus, gpu_gib=gib)))


if __name__ == "__main__":
    run(main)
