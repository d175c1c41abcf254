"""Stage 1: supervised cold start on chain-of-thought data (Section 3.3).

    torchrun --standalone --nproc_per_node 2 train_sft.py                     the embedded toy
    torchrun --nproc_per_node 8 train_sft.py --model Qwen/Qwen2.5-VL-7B-Instruct \\
        --data Video-R1-data/Video-R1-COT-165k.json

The loss is the mean over all response tokens of a step: only the assistant's turn is learned. It
runs through the same packed log-probabilities as the RL stage, with groups of one response.
"""

import math
import os
from dataclasses import dataclass
from functools import partial

from torch import Tensor

import toy
from config import TrainConfig
from data import Media, Prompt, require_process, response_ids
from evaluation.validation import Validation
from infra.distributed import World, log, main_does, process_group, run, sum_over_ranks
from infra.flags import flag, parse_config
from infra.optim import learning_rate_at, make_optimizer, update
from infra.run import PhaseTimer, RunFolder
from infra.video import DecoderPool
from model import (
    enable_checkpointing,
    forbidden_tokens,
    load_model,
    pack_groups,
    require_room,
    shard,
)
from training import load_inputs, make_loader, micro_batches, num_steps

REAL_COMMAND = (
    "torchrun --nproc_per_node 8 train_sft.py --model Qwen/Qwen2.5-VL-7B-Instruct "
    "--data Video-R1-data/Video-R1-COT-165k.json"
)


@dataclass
class SFTConfig(TrainConfig):
    """Flags of stage 1."""

    output_dir: str = flag("runs/sft", "the run's folder")


def toy_defaults(world_size: int) -> dict:
    """What the toy changes. Its batch of 32 is the same for any number of ranks that divides it."""
    return {
        "model": str(toy.BASE), "data": str(toy.SFT_DATA), "output_dir": str(toy.SFT),
        "max_steps": 360, "prompts_per_rank": max(1, 32 // world_size), "learning_rate": 1e-3,
        "warmup_steps": 10, "max_grad_norm": 1.0, "max_frames": toy.NUM_FRAMES, "num_workers": 1,
        "max_new_tokens": 40, "activation_checkpointing": False,
    }  # fmt: skip


def accumulate_gradients(
    model, batch: list[tuple[Prompt, Tensor]], num_tokens: float, config: SFTConfig, world: World
) -> float:
    """Forward and backward over a rank's batch; returns this rank's share of the loss.

    num_tokens: response tokens of the step over all ranks and micro-batches. It is the denominator
    everywhere, so the gradient does not depend on how the batch is cut.
    """
    forbidden = forbidden_tokens(model.config)
    tokens_per_second = model.config.vision_config.tokens_per_second
    loss = 0.0
    lengths = [len(prompt.input_ids) + len(response) for prompt, response in batch]
    for micro_batch in micro_batches(batch, lengths, config):
        prompts, responses = zip(*micro_batch, strict=True)
        pack = pack_groups(prompts, [[response] for response in responses], tokens_per_second)
        logps = model.packed_logprobs(pack.to(world.device), forbidden)  # (M,)
        part = -logps.sum() / num_tokens
        (part * world.size).backward()  # FSDP averages gradients over the ranks
        loss += float(part.detach())
    return loss


def train(config: SFTConfig, world: World) -> bool:
    """Run the cold start in its output folder (run_folder.py); False: stopped before its end."""
    samples, tokenizer, prompt_options = load_inputs(config, require_process)
    total_steps = num_steps(config, len(samples), world)
    this_run = RunFolder(config, world, "sft")
    if this_run.is_finished(total_steps):
        return True
    sharding = partial(shard, world=world, freeze_vision=config.freeze_vision)
    model = load_model(config.model, world.device, shard=sharding)
    if config.activation_checkpointing:
        enable_checkpointing(model)
    optimizer = make_optimizer(model, config.learning_rate, config.weight_decay)
    rate_at = partial(learning_rate_at, peak=config.learning_rate, warmup_steps=config.warmup_steps)
    this_run.restore(model, optimizer, total_steps, rate_at)

    def prepare(media: Media, step: int) -> tuple[Prompt, Tensor]:
        prompt = media.prompt(tokenizer, **prompt_options)
        response = response_ids(media.sample, tokenizer)
        require_room(prompt, len(response), model.config)
        return prompt, response

    with (
        this_run.open(total_steps),
        DecoderPool(config.num_workers, config.decode_timeout) as pool,
    ):
        loader = make_loader(config, samples, pool, prepare, this_run.progress, world.rank)
        validation = Validation(config, world, pool, tokenizer, prompt_options)
        this_run.validate_at_start(validation, model)
        for step in range(this_run.start, total_steps):
            timer = PhaseTimer(world, step)
            rate = rate_at(step, total_steps)
            with timer("data"):
                batch = loader.take(config.rank_batch_size, step)
            num_tokens = float(sum(len(response) for _, response in batch))
            num_tokens = sum_over_ranks({"tokens": num_tokens})["tokens"]
            with timer("update"):
                loss = accumulate_gradients(model, batch, num_tokens, config, world)
                grad_norm = update(model, optimizer, rate, config.max_grad_norm)
            this_run.validate(validation, model, step + 1)
            skipped = loader.sync()
            this_run.records("skipped.jsonl", skipped)
            is_bad = not math.isfinite(grad_norm)
            this_run.count_bad_step(step, is_bad, [prompt.sample for prompt, _ in batch])
            this_run.metrics({
                "step": step + 1,
                "loss": sum_over_ranks({"loss": loss})["loss"],
                "grad_norm": grad_norm,
                "lr": rate,
                "tokens": int(num_tokens),
                "skipped": len(skipped),
                "bad_steps": this_run.num_bad_steps,
                **timer.metrics(num_tokens),
            })  # fmt: skip
            if this_run.end_step(step, loader, model, optimizer):
                return False
        this_run.finish(model)
    return True


def main() -> None:
    defaults = toy_defaults(int(os.environ.get("WORLD_SIZE", 1)))
    config, is_toy = parse_config(SFTConfig, defaults, REAL_COMMAND)
    config.check()
    with process_group(config.timeout, config.replicas) as world:
        if is_toy:
            log(f"the embedded toy (neither --model nor --data given); a real run: {REAL_COMMAND}")
            main_does(world, toy.ensure_toy)
        train(config, world)


if __name__ == "__main__":
    run(main)
