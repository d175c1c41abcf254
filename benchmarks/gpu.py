"""Measures one GPU on the real shapes, with random weights; plan.py's predictions put to a test.

    python benchmarks/gpu.py --model 3B --json 3B.json                   every part
    python benchmarks/gpu.py --model 7B --json 7B.json --parts rollout   one of them
    python benchmarks/gpu.py --device cpu --tiny --json tiny.json        every line of it, on a CPU

    rollout   vision tower, prefill, decoding: milliseconds and kernels a token, and the floor that
              reading weights and cache sets
    update    reference, forward and backward pass for responses of several lengths
    step      the whole T-GRPO step
    plain     our step and that of plain_recipe.py

Each gives, by phase, seconds, MFU (FLOPs without recomputation, over the data sheet's peak) and the
peak memory beside plan.py's prediction. The file is written after each part; a part that it holds
is not measured again. Where policy, reference and AdamW do not fit together, the policy is its own
reference and SGD has no state: "holds" says which. The weights are drawn on the device. A model of
random weights answers nothing, so a coin decides what is correct: without it, all advantages and
gradients would be zero.
"""

import dataclasses
import gc
import json
import os
import sys
import tempfile
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from unittest import mock

import numpy as np
import torch
import transformers
from torch.autograd import DeviceType
from torch.distributed.tensor import DTensor
from torch.optim import SGD

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import data
import model as model_module
import toy
import train_rl
from benchmarks import counting, plan, rl_step
from benchmarks.measure import GIB, Meter, parse_flags
from benchmarks.plain_recipe import plain_step
from benchmarks.rl_step import StepConfig, System
from config import RLConfig
from data import Prompt
from infra.distributed import World, log, process_group, run_main
from infra.errors import require
from infra.flags import check_ranges, flag
from model import enable_checkpointing, load_model, load_normalisation, load_tokenizer, shard
from sampling import Rollout, decode_texts

COLUMNS = {"seconds": ".3f", "mfu": ".1%", "peak_gib_by_phase": ".2f",
           "predicted_gib_by_phase": ".2f"}  # fmt: skip
PROFILED = (2, 6)  # tokens of two rollouts: their difference is what a token adds
SIZES = {  # the paper's (Sec. 4.1, App. D)
    "max_new_tokens": 768, "group_size": 8, "shuffled_group_size": 4, "max_frames": 16,
    "max_pixels": 128 * 28 * 28, "repeats": 2,
}  # fmt: skip
TINY_SIZES = {
    "max_new_tokens": 12, "group_size": 3, "shuffled_group_size": 2, "max_frames": 4,
    "max_pixels": 4 * 28 * 28, "repeats": 1,
}  # fmt: skip
TINY = {  # in the form of plan.OFFICIAL
    "vocab_size": 1024, "hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2,
    "num_attention_heads": 4, "num_key_value_heads": 2, "tie_word_embeddings": False,
    "vision_config": {
        "depth": 2, "hidden_size": 64, "intermediate_size": 128, "num_heads": 4,
        "out_hidden_size": 64, "fullatt_block_indexes": [1],
    },
}  # fmt: skip


@dataclass(frozen=True)
class Bench:
    """What every part gets. machine: rl_step.machine_facts."""

    world: World
    config: StepConfig
    sheet: plan.Gpu
    machine: dict


# --------------------------------------------------------------------- a model that is in no file


def write_model(folder: Path, shapes: dict) -> None:
    """A model folder without weights: config, the toy's tokenizer, the usual normalisation."""
    ids = toy.make_tokenizer(folder)
    half = shapes["hidden_size"] // shapes["num_attention_heads"] // 2
    sections = [half // 4, 3 * half // 8, 3 * half // 8]  # Qwen2.5-VL: 16, 24, 24
    config = shapes | {
        "model_type": "qwen2_5_vl", "rope_theta": 1e6,
        "rope_scaling": {"type": "mrope", "mrope_section": sections},
        "vision_config": shapes["vision_config"] | {"tokens_per_second": 2},
        "image_token_id": ids["<|image_pad|>"], "video_token_id": ids["<|video_pad|>"],
        "vision_start_token_id": ids["<|vision_start|>"],
        "vision_end_token_id": ids["<|vision_end|>"], "eos_token_id": ids["<|im_end|>"],
    }  # fmt: skip
    normalisation = {"image_mean": data.CLIP_MEAN, "image_std": data.CLIP_STD}
    for name, content in (("config", config), ("preprocessor_config", normalisation)):
        (folder / f"{name}.json").write_text(json.dumps(content))


def write_video(file: Path, config: StepConfig) -> None:
    """Noise, of as many frames and pixels as a prompt takes."""
    limits = {"max_frames": config.max_frames, "max_pixels": config.max_pixels}
    _, height, width = plan.PlanConfig(**limits).load(1).grids[0]  # patches of 14 x 14 pixels
    shape = (config.max_frames, 14 * height, 14 * width, 3)
    toy.write_y4m(file, np.random.default_rng(0).integers(0, 256, shape, np.uint8))


@torch.no_grad()
def draw_weights(model, folder: Path) -> None:
    """In place of model._fill, which reads them from the folder."""
    for name, parameter in model.named_parameters():
        local = parameter.to_local() if isinstance(parameter, DTensor) else parameter
        if parameter.ndim > 1:
            local.normal_(std=0.02)
        else:  # a bias, or the weight of a norm
            local.fill_(0.0 if name.endswith("bias") else 1.0)


def toss_coin(text: str, solution: str, problem_type: str) -> float:
    """In place of rewards.accuracy_reward."""
    return float(len(text) % 2)


def policy_alone(bench: Bench) -> System:
    """The policy, sharded as in a run, and nothing else that stays in memory."""
    name, world = bench.config.model, bench.world
    policy = load_model(name, world.device, shard=partial(shard, world=world))
    enable_checkpointing(policy)
    optimizer = SGD(policy.parameters(), lr=1e-6, foreach=False)  # the same lines on any device
    return System(world, policy, policy, optimizer, load_tokenizer(name), load_normalisation(name))


# --------------------------------------------------------------------------------------- the parts


def rollout(bench: Bench) -> dict:
    system, num_tokens = policy_alone(bench), bench.config.max_new_tokens
    found = measure(bench, system, rl_step.sample_step, num_tokens)
    load, itemsize = counting.Load(**found["load"]), bench.world.dtype.itemsize
    num_weights = rl_step.num_decode_weights(system.policy)
    needed = counting.decode_bytes(system.policy.config, load, num_weights, itemsize)
    seconds, floor = found["seconds"]["rollout.decode"], needed / bench.sheet.memory
    few, more = (count_kernels(bench, system, number) for number in PROFILED)
    found |= {
        "ms_per_token": 1e3 * seconds / num_tokens,
        "floor_ms_per_token": 1e3 * floor / num_tokens,
        "share_of_bandwidth": floor / seconds,
        "kernels_per_token": (more - few) / (PROFILED[1] - PROFILED[0]),
    }
    return {"ours": found}


def count_kernels(bench: Bench, system: System, num_tokens: int) -> int:
    """Kernels and copies of a rollout; on a CPU operators, those inside others too."""
    config = replace(bench.config, max_new_tokens=num_tokens).rl_config()
    with torch.profiler.profile() as profile:
        rl_step.measure_step(rl_step.sample_step, system, config, bench.config.video, step=0)
    kind = getattr(DeviceType, bench.world.device.type.upper())
    return sum(e.device_type == kind and not e.is_user_annotation for e in profile.events())


def update(bench: Bench) -> dict:
    system, longest = policy_alone(bench), bench.config.max_new_tokens
    lengths = (longest // 12, longest // 3, longest)  # 64, 256, 768
    return {f"{n} tokens": measure(bench, system, learn_random_tokens, n) for n in lengths}


def learn_random_tokens(
    system: System, batch: list[list[Prompt]], config: RLConfig, meter: Meter
) -> None:
    """What a step does with its rollouts, on responses that nobody sampled."""
    shape = (config.group_size, config.max_new_tokens)
    ids, mask = torch.randint(250, shape), torch.ones(shape, dtype=torch.bool)  # ids of plain text
    texts = decode_texts(system.tokenizer, ids, mask, [])
    ended, logps = torch.zeros(config.group_size, dtype=torch.bool), torch.zeros(shape)
    rollouts = [(Rollout(ordered, ids, mask, ended, logps, texts), None) for ordered, _ in batch]
    rl_step.learn_step(system, rollouts, config, meter)


def step(bench: Bench) -> dict:
    options = plan.PlanConfig(num_gpus=1, prompts_per_step=1, validation=False)
    needed = plan.peak(plan.estimate(plan.load_config(bench.config.model), options))[1]
    if needed <= (1 - plan.RESERVE) * bench.sheet.gib * GIB:
        system = System.load(bench.config.rl_config(), bench.world)
    else:
        system = policy_alone(bench)
    return {"ours": measure(bench, system, rl_step.our_step, bench.config.max_new_tokens)}


def plain(bench: Bench) -> dict:
    system, num_tokens = policy_alone(bench), bench.config.max_new_tokens
    ours = measure(bench, system, rl_step.our_step, num_tokens)
    theirs = measure(bench, system, plain_step, num_tokens)
    config = replace(bench.config, max_new_tokens=num_tokens // 12).rl_config()
    theirs["agreement_nats"] = rl_step.agreement(system, config, bench.config.video)
    return {"ours": ours, "plain": theirs}


PARTS = {part.__name__: part for part in (rollout, update, step, plain)}


# --------------------------------------------------------------------------------------- measuring


def measure(bench: Bench, system: System, take_step: Callable, num_tokens: int) -> dict:
    """Seconds, FLOPs, MFU and memory by phase."""
    config = replace(bench.config, max_new_tokens=num_tokens)
    one = partial(rl_step.measure_step, take_step, system, config.rl_config(), config.video)
    alone = one(step=0)
    steps = [one(step=number, release=False) for number in range(1, config.repeats + 1)]
    load, matmul, is_plain = alone["load"], bench.machine["matmul_flops"], take_step is plain_step
    flops = counting.step_flops(system.policy.config, load, is_plain)
    found = rl_step.summarise(steps, alone, flops, matmul)
    shares, predicted = found["share_of_matmul"], {}
    if not is_plain:
        predicted = rl_step.predicted_memory(system, config, load)
    return found | {
        "holds": "policy" if system.reference is system.policy else "policy, reference, AdamW",
        "load": dataclasses.asdict(load),
        "mfu": {phase: share * matmul / bench.sheet.flops for phase, share in shares.items()},
        "predicted_gib_by_phase": {p: predicted[p] for p in predicted if p in found["seconds"]},
    }


def table(title: str, found: dict) -> str:
    """The figures of one case as lines for the console."""
    lines = [f"{title}; held: {found['holds']}", f"{'':50}  seconds      MFU      GiB  planned"]
    for phase in found["seconds"]:
        cells = [format(found[key][phase], form) if phase in found[key] else ""
                 for key, form in COLUMNS.items()]  # fmt: skip
        lines.append(f"{rl_step.PHASES[phase]:50}" + "".join(f"{cell:>9}" for cell in cells))
    if "ms_per_token" in found:
        lines.append(f"{found['ms_per_token']:.2f} ms and {found['kernels_per_token']:.0f} kernels "
                     f"a token, {found['share_of_bandwidth']:.1%} of the bandwidth")  # fmt: skip
    return "\n".join(lines)


# --------------------------------------------------------------------------- the flags and the file


@dataclass
class GpuConfig:
    """Flags."""

    model: str = flag("3B", "shapes of the model", choices=tuple(plan.OFFICIAL))
    parts: list[str] = flag(list(PARTS), "parts to measure", choices=tuple(PARTS))
    gpu: str = flag("H100", "kind of GPU, for its data sheet", choices=tuple(plan.GPUS))
    device: str = flag("cuda", "cuda or cpu", choices=("cuda", "cpu"))
    tiny: bool = flag(False, "a tiny model, few tokens: to try the program out")
    json: str = flag("gpu.json", "file of the results; parts that it holds are skipped")

    def check(self) -> None:
        """Raise UserError naming the first flag whose value makes no sense."""
        check_ranges(self)


def open_results(file: Path, flags: GpuConfig) -> dict:
    """The results so far: none if there is no file.

    Raises:
        UserError: they are of another GPU, other versions or other flags, or --gpu is wrong.
    """
    name = torch.cuda.get_device_name() if flags.device == "cuda" else "CPU"
    fits = flags.device == "cpu" or flags.gpu[:4] in name
    require(fits, f"this GPU is a {name}, not of the kind --gpu {flags.gpu}")
    head = {
        "gpu": name,
        "versions": {module.__name__: module.__version__ for module in (torch, transformers)},
        "flags": {key: value for key, value in vars(flags).items() if key not in ("parts", "json")},
    }
    if not file.exists():
        return {**head, "parts": {}}
    results = json.loads(file.read_text(encoding="utf-8"))
    for key, value in head.items():
        there = results.get(key)
        require(there == value, f"--json {file} has results of {key} {there}, not of {value}")
    return results


def main() -> None:
    flags = parse_flags(GpuConfig, "One GPU on the real shapes, with random weights.")
    if flags.device == "cpu":
        os.environ["CUDA_VISIBLE_DEVICES"] = ""
    file = Path(flags.json)
    scratch = file.with_name(f".{file.name}")
    torch.manual_seed(0)
    with process_group() as world, ExitStack() as stack:
        require(world.device.type == flags.device, "no GPU here; --device cpu --tiny needs none")
        require(world.size == 1, "this benchmark measures one process: start it without torchrun")
        results = open_results(file, flags)
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory()))
        shapes, sizes = (TINY, TINY_SIZES) if flags.tiny else (plan.OFFICIAL[flags.model], SIZES)
        config = StepConfig(model=str(folder), video=str(folder / "noise.y4m"), **sizes)
        write_model(folder, shapes)
        write_video(Path(config.video), config)
        stack.enter_context(mock.patch.object(model_module, "_fill", draw_weights))
        stack.enter_context(mock.patch.object(train_rl, "accuracy_reward", toss_coin))
        if "machine" not in results:
            results["machine"] = rl_step.machine_facts(world.device, world.dtype)
        bench = Bench(world, config, plan.GPUS[flags.gpu], results["machine"])
        for part in flags.parts:
            if part in results["parts"]:
                log(f"{part}: {file} has it")
                continue
            gc.collect()  # the model of the part before
            results["parts"][part] = found = PARTS[part](bench)
            scratch.write_text(json.dumps(results, indent=1) + "\n", encoding="utf-8")
            os.replace(scratch, file)  # whole whenever the job is killed
            log("\n".join(table(f"{part}, {case}", figures) for case, figures in found.items()))


if __name__ == "__main__":
    run_main(main)
