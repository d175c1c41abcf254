"""Seconds, FLOPs and memory of one whole T-GRPO step by phase, beside a plain recipe.

    python benchmarks/rl_step.py --model FOLDER --video VIDEO --json step.json

A step: decode the video, sample the ordered and the shuffled group, score, reference, forward,
backward, AdamW. It runs the project's own functions on one process, sharded as a run is; the
phases are split by timing calls inside them. Every response has exactly --max_new_tokens tokens,
in both recipes: the end token that sampling looks for is replaced by one that it never draws, so
that the softmax is what it was. The plain recipe (plain_recipe.py) takes the same step the way the
official trainer does; the two alternate, on the same model and the same prompts.
"""

import dataclasses
import gc
import json
import statistics
import sys
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path

import numpy
import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import sampling
import train_rl
from benchmarks.counting import Load, decode_bytes, step_flops
from benchmarks.measure import (
    Meter,
    copy_bandwidth,
    matmul_peak,
    metered,
    patched,
    release_memory,
    used_bytes,
)
from benchmarks.plain_recipe import copies_logprobs, plain_step
from benchmarks.plan import GIB, PlanConfig, estimate
from config import RLConfig
from data import Prompt, Sample, read_frames
from infra.distributed import World, log, process_group, run_main, unsharded
from infra.errors import require
from infra.flags import FlagParser, check_ranges, flag
from infra.optim import make_optimizer
from model import forbidden_tokens, group_logprobs, load_normalisation, load_tokenizer
from train_rl import (
    load_policy_and_reference,
    logprobs,
    make_prompts,
    sample_rollouts,
    score_group,
    update_policy,
)

# What the phases are called in the table, in the order of a step. A phase is without its parts.
PHASES = {
    "data": "data: decode the video, make the prompts",
    "rollout": "rollout: gather and lay out weights, cache, texts",
    "rollout.vision": "rollout: vision tower",
    "rollout.prefill": "rollout: prefill",
    "rollout.decode": "rollout: decode",
    "reward": "reward",
    "reference.vision": "reference: vision tower",
    "reference": "reference: language model",
    "forward.vision": "forward: vision tower",
    "forward": "forward: language model",
    "backward": "backward, recomputation included",
    "optimizer": "optimizer: clip, AdamW",
}
# Phases of PHASES and the ones of plan.py, the largest of which they should show.
PLANNED = {
    "rollout.prefill": ("prefill",),
    "rollout.decode": ("decode",),
    "reference": ("gather root", "reference"),
    "forward": ("gather root", "forward"),
    "backward": ("backward: logits", "backward: layers", "backward: root"),
    "optimizer": ("optimizer",),
}
AGREEMENT = 1e-4  # nats, between plain and packed log-probabilities in float32


@dataclass
class StepConfig:
    """Flags of the benchmark. A name of RLConfig's means what it means there."""

    model: str = flag("", "model folder or Hub id")
    video: str = flag("", "video; a short one repeats until it has --max_frames frames")
    max_new_tokens: int = flag(64, "tokens of every response", low=1)
    group_size: int = flag(8, "G, responses to the ordered frames", low=2)
    shuffled_group_size: int = flag(4, "G~, responses to the shuffled frames", low=1)
    max_frames: int = flag(16, "frames of the video, an even number", low=2)
    max_pixels: int = flag(32 * 28 * 28, "pixels of a frame at most", low=4 * 28 * 28)
    prompts_per_rank: int = flag(1, "prompts in the step", low=1)
    activation_checkpointing: bool = flag(True, "recompute each layer in the backward pass")
    repeats: int = flag(3, "steps of each recipe, of which the median counts", low=1)
    plain: bool = flag(True, "take the plain recipe's steps too")
    json: str = flag("", "file for the results")

    def rl_config(self) -> RLConfig:
        """The settings as train_rl.py takes them."""
        names = {item.name for item in dataclasses.fields(RLConfig)}
        shared = {key: value for key, value in vars(self).items() if key in names}
        return RLConfig(**shared, prompts_per_step=self.prompts_per_rank)

    def check(self) -> None:
        """Raise UserError naming the first flag whose value makes no sense."""
        check_ranges(self)
        require(self.model, "--model is missing: a model folder or a Hub id")
        require(self.video, "--video is missing: the video to take the step on")
        require(self.max_frames % 2 == 0, "--max_frames must be even: frames come in pairs")


@dataclass(frozen=True)
class System:
    """What a step works with."""

    world: World
    policy: torch.nn.Module
    reference: torch.nn.Module
    optimizer: torch.optim.Optimizer
    tokenizer: object
    prompt_options: dict


def load_system(config: RLConfig, world: World) -> System:
    """Policy, reference and optimizer as train_rl.train makes them."""
    policy, reference = load_policy_and_reference(config, world)
    optimizer = make_optimizer(policy, config.learning_rate, config.weight_decay)
    options = load_normalisation(config.model)
    return System(world, policy, reference, optimizer, load_tokenizer(config.model), options)


# -------------------------------------------------------------------------------------- the steps


def read_prompts(system: System, config: RLConfig, video: str, step: int) -> list[list[Prompt]]:
    """The video, decoded anew for each prompt, in order and shuffled.

    In a run worker processes decode ahead of the step, so that this phase is shorter there.
    """
    batch = []
    for row in range(config.prompts_per_rank):
        sample = Sample(
            problem_id=row, problem="What happens in the video?", data_type="video",
            problem_type="multiple choice", solution="<answer>B</answer>", path=video,
            options=("A. It stays as it is", "B. Somebody moves", "C. Nothing", "D. It ends"),
            data_source="", process="", row=row,
        )  # fmt: skip
        limits = (config.max_frames, config.min_pixels, config.max_pixels)
        frames, seconds = read_frames(video, *limits)
        frames = frames[numpy.arange(config.max_frames) % len(frames)]
        batch.append(make_prompts(
            sample, (frames, seconds), step, 0, system.tokenizer, config, system.prompt_options
        ))  # fmt: skip
    return batch


def our_step(system: System, batch: list[list[Prompt]], config: RLConfig, meter: Meter) -> None:
    """One step as train_rl.train takes it, after the prompts are made."""
    policy = system.policy
    with meter("rollout"), unsharded(policy):
        rollouts = sample_rollouts(policy, system.tokenizer, batch, config, step=0)
    with meter("reward"):
        groups = [score_group(ordered, shuffled, config) for ordered, shuffled in rollouts]
    with meter("reference"), torch.no_grad():
        logps_ref = logprobs(system.reference, groups)
    with meter("backward"):  # and, in phases of their own, forward and optimizer
        update_policy(
            policy, system.optimizer, [groups], [logps_ref], config, system.world,
            config.learning_rate,
        )  # fmt: skip


@contextmanager
def split_phases(system: System, meter: Meter) -> Iterator[None]:
    """For the block, the calls that make up a phase of a step are billed apart."""

    def vision(*_, **__) -> str:
        return f"{meter.open[-1].partition('.')[0]}.vision"

    def prefill(*_, inputs_embeds, **__) -> str | None:
        several = inputs_embeds.shape[1] > 1
        return "rollout.prefill" if several and meter.open[-1].startswith("rollout") else None

    with ExitStack() as stack:
        for model in (system.policy, system.reference):
            inner = model.model
            stack.enter_context(metered(meter, inner.visual, "forward", vision))
            stack.enter_context(metered(meter, inner.language_model, "forward", prefill))
        decode_phase = metered(meter, system.policy, "generate", lambda *_, **__: "rollout.decode")
        stack.enter_context(decode_phase)
        # The reference's log-probabilities are not taken through the module's name.
        stack.enter_context(metered(meter, train_rl, "logprobs", lambda *_: "forward"))
        stack.enter_context(metered(meter, train_rl, "update", lambda *_: "optimizer"))
        yield


def measure_step(
    take_step, system: System, config: RLConfig, video: str, step: int, release: bool = True
) -> dict:
    """One step of a recipe: seconds and peak memory by phase, in bytes, and its load.

    release: begin without what earlier steps have freed, for a peak of the step's own. In a run
        the next step takes it up again, which is quicker than fresh memory.
    """
    gc.collect()
    if release:
        release_memory()
    meter = Meter(system.world.device)
    before = used_bytes(system.world.device)
    never = forbidden_tokens(system.policy.config)[:1]
    with split_phases(system, meter), patched(sampling, "end_tokens", lambda _: never):
        with meter("data"):
            batch = read_prompts(system, config, video, step)
        take_step(system, batch, config, meter)
    return {
        "seconds": {phase: meter.seconds.get(phase, 0.0) for phase in PHASES},
        "peaks": meter.peaks,
        "peak": max(meter.peaks.values()),
        "before": before,
        "load": load_of(batch, config),
    }


def load_of(batch: list[list[Prompt]], config: RLConfig) -> Load:
    """What a step on these prompts computes."""
    ordered = [prompts[0] for prompts in batch]
    return Load(
        grids=tuple(tuple(prompt.grid_thw.tolist()) for prompt in ordered),
        prompt_tokens=tuple(len(prompt.input_ids) for prompt in ordered),
        group_size=config.group_size,
        shuffled_group_size=config.shuffled_group_size,
        response_tokens=config.max_new_tokens,
    )


@torch.no_grad()
def agreement(system: System, config: RLConfig, video: str) -> float:
    """Largest difference between the two recipes' log-probabilities of the same responses, in
    nats: they are the same function of the weights."""
    batch = read_prompts(system, config, video, step=0)
    with unsharded(system.policy):
        rollout, _ = sample_rollouts(system.policy, system.tokenizer, batch, config, step=0)[0]
        ids, mask = rollout.completion_ids, rollout.completion_mask
        packed = group_logprobs(system.policy, [rollout.prompt], ids[None], mask[None])[0]
        forbidden = forbidden_tokens(system.policy.config)
        plain = copies_logprobs(system.policy, rollout, forbidden)
    return float(torch.where(mask.to(plain.device), packed - plain, 0.0).abs().max())


# --------------------------------------------------------------------------------------- results


def summarise(measured: list[dict], alone: dict, flops: dict[str, int], machine: dict) -> dict:
    """One recipe: medians of the measured steps' seconds, shares, and the peaks of the step that
    began with released memory."""
    seconds = {
        phase: statistics.median(one["seconds"][phase] for one in measured) for phase in PHASES
    }
    totals = [sum(one["seconds"].values()) for one in measured]
    rates = {  # of the measured matrix product
        phase: count / seconds[phase] / machine["matmul_flops"] if seconds[phase] else 0.0
        for phase, count in flops.items()
        if phase in seconds
    }
    total = statistics.median(totals)
    useful = sum(count for phase, count in flops.items() if phase != "recompute")
    peaks = {phase: alone["peaks"].get(phase, 0) / GIB for phase in PHASES}
    return {
        "total_seconds": total,
        "seconds": seconds,
        "all_total_seconds": totals,
        "flops": flops,
        "share_of_matmul": rates,
        "total_share_of_matmul": useful / total / machine["matmul_flops"],
        "peak_gib": alone["peak"] / GIB,
        "peak_gib_by_phase": peaks,
        "before_gib": alone["before"] / GIB,
    }


def machine_facts(device: torch.device) -> dict:
    """The machine, and what it was measured to do."""
    cuda = device.type == "cuda"
    dtype = torch.bfloat16 if cuda else torch.float32
    return {
        "device": torch.cuda.get_device_name(device) if cuda else "CPU",
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
        "compute_dtype": str(dtype).removeprefix("torch."),
        "itemsize": dtype.itemsize,
        "matmul_flops": matmul_peak(device, dtype),
        "copy_bytes": copy_bandwidth(device),
    }


def count_threads(machine: dict) -> str:
    return "1 thread" if machine["threads"] == 1 else f"{machine['threads']} threads"


def planned_memory(system: System, config: StepConfig, load: Load) -> dict[str, float]:
    """GiB that plan.py expects in each phase, to be set beside the measured peaks."""
    names = {item.name for item in dataclasses.fields(PlanConfig)}
    shared = {key: value for key, value in vars(config).items() if key in names}
    shared["text_tokens"] = load.prompt_tokens[0] - load.tokens()["vision"] // len(load.grids)
    shared["max_pixels"] = 14**2 * load.grids[0][1] * load.grids[0][2]  # as the video has them
    flags = PlanConfig(**shared | {"num_gpus": 1, "prompts_per_step": config.prompts_per_rank})
    phases = estimate(system.policy.config, flags, on_gpu=system.world.device.type == "cuda")
    return {
        phase: max(sum(phases[part].values()) for part in parts) / GIB
        for phase, parts in PLANNED.items()
    }


def num_decode_weights(model) -> int:
    """Parameters that a decoded token reads: layers, final norm, lm_head."""
    inner = model.model.language_model
    parts = (inner.layers, inner.norm, model.lm_head)
    return sum(parameter.numel() for part in parts for parameter in part.parameters())


def compare(system: System, config: StepConfig, machine: dict) -> dict:
    """Both recipes in turns: warm up, check that they agree, measure memory, then seconds."""
    rl_config, world = config.rl_config(), system.world
    recipes = {"ours": our_step} | ({"plain": plain_step} if config.plain else {})
    short = dataclasses.replace(rl_config, max_new_tokens=2)  # first calls allocate and look up
    for take_step in recipes.values():
        measure_step(take_step, system, short, config.video, step=0)
    gap = None
    if config.plain:
        gap = agreement(system, rl_config, config.video)
        in_float32 = world.device.type == "cpu"
        assert gap <= AGREEMENT or not in_float32, f"the recipes' log-probabilities differ by {gap}"
    alone = {
        name: measure_step(take_step, system, rl_config, config.video, step=0)
        for name, take_step in recipes.items()
    }
    measured: dict[str, list[dict]] = {name: [] for name in recipes}
    for step in range(1, config.repeats + 1):
        for name, take_step in recipes.items():
            one = measure_step(take_step, system, rl_config, config.video, step, release=False)
            measured[name].append(one)
            log(f"step {step} {name}: {sum(measured[name][-1]['seconds'].values()):.2f} s")
    load: Load = measured["ours"][0]["load"]
    results: dict = {}
    for name, steps in measured.items():
        flops = step_flops(
            system.policy.config, load, name == "plain", config.activation_checkpointing
        )
        results[name] = summarise(steps, alone[name], flops, machine)
    results["ours"]["planned_gib_by_phase"] = planned_memory(system, config, load)
    needed = decode_bytes(
        system.policy.config, load, num_decode_weights(system.policy), machine["itemsize"]
    )
    results["decode_bytes"] = needed
    results["decode_share_of_copy"] = (
        needed / results["ours"]["seconds"]["rollout.decode"] / machine["copy_bytes"]
    )
    results["tokens"] = load.tokens()
    results["agreement_nats"] = gap
    return results


def table(results: dict, machine: dict) -> str:
    """The results as lines for the console."""
    names = [name for name in ("ours", "plain") if name in results]
    head = f"{'seconds (GFLOP, share of matmul)':50}" + "".join(f"{name:>28}" for name in names)
    lines = [head]

    def row(label: str, cells: list[str]) -> None:
        lines.append(f"{label:50}" + "".join(f"{cell:>28}" for cell in cells))

    def cell(result: dict, phase: str) -> str:
        flops = result["flops"].get(phase)
        work = f"({flops / 1e9:.0f}, {result['share_of_matmul'][phase]:.0%})" if flops else ""
        return f"{result['seconds'][phase]:.2f} {work:>16}"

    for phase, label in PHASES.items():
        row(label, [cell(results[name], phase) for name in names])
    row("whole step", [
        f"{results[name]['total_seconds']:.2f} "
        f"{'(' + format(results[name]['total_share_of_matmul'], '.0%') + ')':>16}"
        for name in names
    ])  # fmt: skip
    row("from the fastest to the slowest", [
        f"{min(results[name]['all_total_seconds']):.2f} to "
        f"{max(results[name]['all_total_seconds']):.2f}"
        for name in names
    ])  # fmt: skip
    row("recomputed in backward, GFLOP", [
        f"{results[name]['flops']['recompute'] / 1e9:.0f}" for name in names
    ])  # fmt: skip
    row("peak memory, GiB", [f"{results[name]['peak_gib']:.2f}" for name in names])
    row("of it before the step", [f"{results[name]['before_gib']:.2f}" for name in names])
    for phase, planned in results["ours"]["planned_gib_by_phase"].items():
        found = results["ours"]["peak_gib_by_phase"][phase]
        row(f"  {PHASES[phase]}", [f"{found:.2f}, planned {planned:.2f}"])
    tokens = results["tokens"]
    sampled = tokens["sampled"] / results["ours"]["total_seconds"]
    lines += [
        f"tokens: prompt {tokens['prompt']} (vision {tokens['vision']}), sampled "
        f"{tokens['sampled']}, which is {sampled:.1f} a second",
        f"decode has to read {results['decode_bytes'] / 1e9:.1f} GB, "
        f"{results['decode_share_of_copy']:.0%} of what a copy moves in its time",
        f"{machine['device']}, {count_threads(machine)}, {machine['compute_dtype']}: matrix "
        f"product {machine['matmul_flops'] / 1e9:.0f} GFLOP/s, copy "
        f"{machine['copy_bytes'] / 1e9:.1f} GB/s",
    ]
    if "plain" in results:
        ours, plain = results["ours"], results["plain"]
        lines.append(
            f"plain / ours: {plain['total_seconds'] / ours['total_seconds']:.2f} in seconds, "
            f"{plain['peak_gib'] / ours['peak_gib']:.2f} in peak memory; their log-probabilities "
            f"agree to {results['agreement_nats']:.1e}"
        )
    return "\n".join(lines)


# ---------------------------------------------------------------------------------- command line


def parse_flags(argv: list[str] | None = None) -> StepConfig:
    """The config of a command line.

    Raises:
        ValueError: an unknown flag, or a value that makes no sense; names the flag.
    """
    parser = FlagParser(StepConfig, allow_abbrev=False, description="One T-GRPO step by phase.")
    config, rest = parser.parse_args_into_dataclasses(argv, return_remaining_strings=True)
    require(not rest, f"unknown argument {rest[0]!r}; --help lists the flags" if rest else "")
    config.check()
    return config


def measure(config: StepConfig, world: World) -> dict:
    """Everything that the flags ask for: what goes into --json."""
    require(world.size == 1, "this benchmark measures one process: start it without torchrun")
    machine = machine_facts(world.device)
    system = load_system(config.rl_config(), world)
    num_parameters = sum(parameter.numel() for parameter in system.policy.parameters())
    results = {
        "settings": dataclasses.asdict(config),
        "machine": machine,
        "num_parameters": num_parameters,
        **compare(system, config, machine),
    }
    log(table(results, machine))
    return results


def main() -> None:
    config = parse_flags()
    with process_group() as world:
        results = measure(config, world)
    if config.json:
        Path(config.json).write_text(json.dumps(results, indent=1) + "\n", encoding="utf-8")
        log(f"results written to {config.json}")


if __name__ == "__main__":
    run_main(main)
