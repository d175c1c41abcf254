"""Seconds, FLOPs and memory of one whole T-GRPO step by phase, beside a plain recipe.

    python benchmarks/rl_step.py --model FOLDER --video VIDEO --json step.json

A step: decode the video, sample the ordered and the shuffled group, score, reference, forward,
backward, AdamW. It runs the project's own functions in one process, sharded as in a run; the phases
are split by timing calls inside them. Every response has exactly --max_new_tokens tokens, in both
recipes: the end token that sampling looks for is replaced by one that is never drawn, which leaves
the softmax as it was. The plain recipe (plain_recipe.py) takes the same step as the official
trainer does; the two alternate, on the same model and the same prompts.
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
from unittest import mock

import numpy as np
import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import sampling
import train_rl
from benchmarks import measure, plan
from benchmarks.counting import Load, decode_bytes, step_flops
from benchmarks.measure import GIB, Meter, metered
from benchmarks.plain_recipe import copies_logprobs, plain_step
from config import RLConfig
from data import Prompt, Sample, read_frames
from infra.distributed import World, log, process_group, run_main, unsharded
from infra.errors import require
from infra.flags import check_ranges, flag
from infra.optim import make_optimizer
from model import forbidden_tokens, group_logprobs, load_normalisation, load_tokenizer

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
PREDICTED = {
    "rollout.prefill": ("prefill",),
    "rollout.decode": ("decode",),
    "reference": ("gather root", "reference"),
    "forward": ("gather root", "forward"),
    "backward": ("backward: logits", "backward: layers", "backward: root"),
    "optimizer": ("optimizer",),
}
reference_logprobs = train_rl.logprobs  # not through the name that split_phases bills as forward
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
    """What a step works with, made as train_rl.train makes it.

    Where that does not fit on one GPU, gpu.py takes the policy for its own reference, and an
    optimizer without state.
    """

    world: World
    policy: torch.nn.Module
    reference: torch.nn.Module
    optimizer: torch.optim.Optimizer
    tokenizer: object
    prompt_options: dict

    @classmethod
    def load(cls, config: RLConfig, world: World) -> "System":
        policy, reference = train_rl.load_policy_and_reference(config, world)
        optimizer = make_optimizer(policy, config.learning_rate, config.weight_decay)
        options = load_normalisation(config.model)
        return cls(world, policy, reference, optimizer, load_tokenizer(config.model), options)


# --------------------------------------------------------------------------------------- the steps


def read_prompts(system: System, config: RLConfig, video: str, step: int) -> list[list[Prompt]]:
    """The video, decoded anew for each prompt, ordered and shuffled.

    In a run worker processes decode ahead of the step, so this phase is shorter there.
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
        decoded = frames[np.arange(config.max_frames) % len(frames)], seconds
        options = (system.tokenizer, config, system.prompt_options)
        batch.append(train_rl.make_prompts(sample, decoded, step, 0, *options))
    return batch


def our_step(system: System, batch: list[list[Prompt]], config: RLConfig, meter: Meter) -> None:
    """One step as train_rl.train takes it, after the prompts are made."""
    learn_step(system, sample_step(system, batch, config, meter), config, meter)


def sample_step(system: System, batch: list[list[Prompt]], config: RLConfig, meter: Meter) -> list:
    """The rollouts of a step: for each prompt an ordered and a shuffled one."""
    with meter("rollout"), unsharded(system.policy):
        return train_rl.sample_rollouts(system.policy, system.tokenizer, batch, config, step=0)


def learn_step(system: System, rollouts: list, config: RLConfig, meter: Meter) -> None:
    """What a step does with its rollouts."""
    with meter("reward"):
        groups = [train_rl.score_group(*pair, config) for pair in rollouts]
    with meter("reference"), torch.no_grad():
        logps_ref = reference_logprobs(system.reference, groups)
    with meter("backward"):  # and, in phases of their own, forward and optimizer
        train_rl.update_policy(
            system.policy, system.optimizer, [groups], [logps_ref], config, system.world,
            config.learning_rate,
        )  # fmt: skip


@contextmanager
def split_phases(system: System, meter: Meter) -> Iterator[None]:
    """For the block, bill the calls that make up a phase of a step separately."""

    def vision(*_, **__) -> str:
        return f"{meter.open[-1].partition('.')[0]}.vision"

    def prefill(*_, inputs_embeds, **__) -> str | None:
        several = inputs_embeds.shape[1] > 1
        return "rollout.prefill" if several and meter.open[-1].startswith("rollout") else None

    calls = [
        (system.policy, "generate", lambda *_, **__: "rollout.decode"),
        (train_rl, "logprobs", lambda *_: "forward"),
        (train_rl, "update", lambda *_: "optimizer"),
    ]
    for inner in {system.policy.model, system.reference.model}:
        calls += [(inner.visual, "forward", vision), (inner.language_model, "forward", prefill)]
    with ExitStack() as stack:
        for owner, name, phase_of in calls:
            stack.enter_context(metered(meter, owner, name, phase_of))
        yield


def measure_step(
    take_step, system: System, config: RLConfig, video: str, step: int, release: bool = True
) -> dict:
    """One step of a recipe: seconds and peak memory (bytes) by phase, and its load.

    release: begin without what earlier steps have freed, for a peak of the step's own. In a run
        the next step reuses it, which is quicker than fresh memory.
    """
    gc.collect()
    if release:
        measure.release_memory()
    meter = Meter(system.world.device)
    before = measure.used_bytes(system.world.device)
    never = forbidden_tokens(system.policy.config)[:1]
    with split_phases(system, meter), mock.patch.object(sampling, "end_tokens", lambda _: never):
        with meter("data"):
            batch = read_prompts(system, config, video, step)
        take_step(system, batch, config, meter)
    ordered = [prompts[0] for prompts in batch]
    return {
        "seconds": {phase: meter.seconds[phase] for phase in PHASES if phase in meter.seconds},
        "peaks": meter.peaks,
        "before": before,
        "load": Load(
            tuple(tuple(prompt.grid_thw.tolist()) for prompt in ordered),
            tuple(len(prompt.input_ids) for prompt in ordered),
            config.group_size, config.shuffled_group_size, config.max_new_tokens,
        ),
    }  # fmt: skip


@torch.no_grad()
def agreement(system: System, config: RLConfig, video: str) -> float:
    """Largest difference between the two recipes' log-probabilities of the same responses, in
    nats: they are the same function of the weights."""
    batch = read_prompts(system, config, video, step=0)
    with unsharded(system.policy):
        pairs = train_rl.sample_rollouts(system.policy, system.tokenizer, batch, config, step=0)
        rollout, _ = pairs[0]
        ids, mask = rollout.completion_ids, rollout.completion_mask
        packed = group_logprobs(system.policy, [rollout.prompt], ids[None], mask[None])[0]
        plain = copies_logprobs(system.policy, rollout, forbidden_tokens(system.policy.config))
    return float(torch.where(mask.to(plain.device), packed - plain, 0.0).abs().max())


# ----------------------------------------------------------------------------------------- results


def summarise(measured: list[dict], alone: dict, flops: dict[str, int], matmul: float) -> dict:
    """One recipe: medians of the measured steps' seconds, shares of the matrix product's FLOP/s,
    and the peaks of the step that began with released memory."""
    seconds = {
        phase: statistics.median(one["seconds"][phase] for one in measured)
        for phase in measured[0]["seconds"]
    }
    totals = [sum(one["seconds"].values()) for one in measured]
    shares = {
        phase: flops[phase] / seconds[phase] / matmul for phase in seconds if phase in flops
    }
    useful = sum(flops[phase] for phase in shares)  # without what is recomputed
    return {
        "total_seconds": statistics.median(totals),
        "seconds": seconds,
        "all_total_seconds": totals,
        "flops": flops,
        "share_of_matmul": shares,
        "total_share_of_matmul": useful / statistics.median(totals) / matmul,
        "peak_gib": max(alone["peaks"].values()) / GIB,
        "peak_gib_by_phase": {phase: alone["peaks"][phase] / GIB for phase in seconds},
        "before_gib": alone["before"] / GIB,
    }


def machine_facts(device: torch.device, dtype: torch.dtype) -> dict:
    """The machine, and what it was measured to do."""
    return {
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else "CPU",
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
        "compute_dtype": str(dtype).removeprefix("torch."),
        "matmul_flops": measure.matmul_peak(device, dtype),
        "copy_bytes": measure.copy_bandwidth(device),
    }


def predicted_memory(system: System, config: StepConfig, load: Load) -> dict[str, float]:
    """GiB that plan.py predicts for each phase, to be set beside the measured peaks."""
    names = {item.name for item in dataclasses.fields(plan.PlanConfig)}
    shared = {key: value for key, value in vars(config).items() if key in names}
    shared["text_tokens"] = load.prompt_tokens[0] - load.tokens()["vision"] // len(load.grids)
    shared["max_pixels"] = 14**2 * load.grids[0][1] * load.grids[0][2]  # as the video has them
    shared |= {"num_gpus": 1, "prompts_per_step": config.prompts_per_rank}
    on_gpu = system.world.device.type == "cuda"
    phases = plan.estimate(system.policy.config, plan.PlanConfig(**shared), on_gpu)
    absent = (plan.ADAMW, plan.REFERENCE) if system.reference is system.policy else ()

    def held(phase: str) -> int:
        return sum(size for part, size in phases[phase].items() if part not in absent)

    return {phase: max(map(held, parts)) / GIB for phase, parts in PREDICTED.items()}


def num_decode_weights(model) -> int:
    """Parameters that a decoded token reads: layers, final norm, lm_head."""
    inner = model.model.language_model
    parts = (inner.layers, inner.norm, model.lm_head)
    return sum(parameter.numel() for part in parts for parameter in part.parameters())


def compare(system: System, config: StepConfig, machine: dict) -> dict:
    """Both recipes in turns: warm up, check that they agree, measure memory, then seconds."""
    rl_config, video, world = config.rl_config(), config.video, system.world
    recipes = {"ours": our_step} | ({"plain": plain_step} if config.plain else {})
    short = dataclasses.replace(rl_config, max_new_tokens=2)  # first calls allocate and look up
    for take_step in recipes.values():
        measure_step(take_step, system, short, video, step=0)
    gap = agreement(system, rl_config, video) if config.plain else 0.0
    is_exact = world.dtype == torch.float32
    assert gap <= AGREEMENT or not is_exact, f"the recipes' log-probabilities differ by {gap}"
    alone = {
        name: measure_step(take_step, system, rl_config, video, step=0)
        for name, take_step in recipes.items()
    }
    measured: dict[str, list[dict]] = {name: [] for name in recipes}
    for step in range(1, config.repeats + 1):
        for name, take_step in recipes.items():
            one = measure_step(take_step, system, rl_config, video, step, release=False)
            measured[name].append(one)
            log(f"step {step} {name}: {sum(one['seconds'].values()):.2f} s")
    load: Load = measured["ours"][0]["load"]
    results: dict = {}
    for name, steps in measured.items():
        is_plain, qwen = name == "plain", system.policy.config
        flops = step_flops(qwen, load, is_plain, config.activation_checkpointing)
        results[name] = summarise(steps, alone[name], flops, machine["matmul_flops"])
    num_weights = num_decode_weights(system.policy)
    needed = decode_bytes(system.policy.config, load, num_weights, world.dtype.itemsize)
    moved = results["ours"]["seconds"]["rollout.decode"] * machine["copy_bytes"]
    results["ours"]["predicted_gib_by_phase"] = predicted_memory(system, config, load)
    return results | {
        "decode_bytes": needed, "decode_share_of_copy": needed / moved,
        "tokens": load.tokens(), "agreement_nats": gap if config.plain else None,
    }  # fmt: skip


def table(results: dict, machine: dict) -> str:
    """The results as lines for the console."""
    recipes = {name: results[name] for name in ("ours", "plain") if name in results}

    def row(label: str, cell) -> str:
        return f"{label:50}" + "".join(f"{cell(result):>28}" for result in recipes.values())

    def phase_cell(result: dict, phase: str) -> str:
        work = ""
        if phase in result["share_of_matmul"]:
            work = f"({result['flops'][phase] / 1e9:.0f}, {result['share_of_matmul'][phase]:.0%})"
        return f"{result['seconds'][phase]:.2f} {work:>16}"

    ours, tokens, threads = results["ours"], results["tokens"], machine["threads"]
    lines = [f"{'seconds (GFLOP, share of matmul)':50}" + "".join(f"{n:>28}" for n in recipes)]
    lines += [row(label, lambda r, p=phase: phase_cell(r, p)) for phase, label in PHASES.items()]
    lines += [
        row("whole step", lambda r: f"{r['total_seconds']:.2f} "
            f"{'(' + format(r['total_share_of_matmul'], '.0%') + ')':>16}"),
        row("from the fastest to the slowest", lambda r: f"{min(r['all_total_seconds']):.2f} to "
            f"{max(r['all_total_seconds']):.2f}"),
        row("recomputed in backward, GFLOP", lambda r: f"{r['flops']['recompute'] / 1e9:.0f}"),
        row("peak memory, GiB", lambda r: f"{r['peak_gib']:.2f}"),
        row("of it before the step", lambda r: f"{r['before_gib']:.2f}"),
    ]  # fmt: skip
    for phase, predicted in ours["predicted_gib_by_phase"].items():
        found = f"{ours['peak_gib_by_phase'][phase]:.2f}, predicted {predicted:.2f}"
        lines.append(f"{'  ' + PHASES[phase]:50}{found:>28}")
    lines += [
        f"tokens: prompt {tokens['prompt']} (vision {tokens['vision']}), sampled "
        f"{tokens['sampled']}, {tokens['sampled'] / ours['total_seconds']:.1f} a second",
        f"decode has to read {results['decode_bytes'] / 1e9:.1f} GB, "
        f"{results['decode_share_of_copy']:.0%} of what a copy moves in its time",
        f"{machine['device']}, {threads} thread{'s' if threads > 1 else ''}, "
        f"{machine['compute_dtype']}: matrix product {machine['matmul_flops'] / 1e9:.0f} GFLOP/s, "
        f"copy {machine['copy_bytes'] / 1e9:.1f} GB/s",
    ]
    if "plain" in recipes:
        seconds, memory = (
            recipes["plain"][key] / ours[key] for key in ("total_seconds", "peak_gib")
        )
        lines.append(
            f"plain / ours: {seconds:.2f} in seconds, {memory:.2f} in peak memory; their "
            f"log-probabilities agree to {results['agreement_nats']:.1e}"
        )
    return "\n".join(lines)


def main() -> None:
    config = measure.parse_flags(StepConfig, "One T-GRPO step by phase.")
    with process_group() as world:
        require(world.size == 1, "this benchmark measures one process: start it without torchrun")
        machine = machine_facts(world.device, world.dtype)
        system = System.load(config.rl_config(), world)
        results = {
            "settings": dataclasses.asdict(config),
            "machine": machine,
            "num_parameters": sum(parameter.numel() for parameter in system.policy.parameters()),
            **compare(system, config, machine),
        }
        log(table(results, machine))
    if config.json:
        Path(config.json).write_text(json.dumps(results, indent=1) + "\n", encoding="utf-8")
        log(f"results written to {config.json}")


if __name__ == "__main__":
    run_main(main)
