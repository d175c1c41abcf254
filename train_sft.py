"""Stage 1: supervised cold start on chain-of-thought data (Section 3.3).

    torchrun --standalone --nproc_per_node 2 train_sft.py                     the embedded toy
    torchrun --nproc_per_node 8 train_sft.py --model Qwen/Qwen2.5-VL-7B-Instruct \\
        --data Video-R1-data/Video-R1-COT-165k.json

The loss is the mean over all response tokens of a step: only the assistant's turn is learned. It
runs through the same packed log-probabilities as the RL stage, with groups of one response.
"""

from dataclasses import dataclass
from pathlib import Path

import torch

import toy
from checkpoint import export_model
from config import TrainConfig, flag, parse_config, save_config
from data import DecoderPool, load_samples, load_steps, load_template, make_prompt, response_ids
from distributed import (
    World,
    log,
    main_does,
    max_over_ranks,
    peak_memory_gib,
    process_group,
    run,
    shard,
    sum_over_ranks,
)
from model import (
    PACKED_METHODS,
    forbidden_tokens,
    load_model,
    load_normalisation,
    load_tokenizer,
    pack_groups,
)
from training import (
    PhaseTimer,
    RunLog,
    claim_folder,
    learning_rate_at,
    make_optimizer,
    num_steps,
    update,
)

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
        "max_steps": 240, "prompts_per_rank": max(1, 32 // world_size), "learning_rate": 1e-3,
        "warmup_steps": 10, "max_grad_norm": 1.0, "max_frames": toy.NUM_FRAMES, "num_workers": 1,
        "activation_checkpointing": False,
    }  # fmt: skip


def train(config: SFTConfig, world: World) -> None:
    folder = Path(config.output_dir)
    claim_folder(folder)
    samples = load_samples(config.data, config.data_root or None)
    samples = [sample for sample in samples if sample.data_type in config.data_types]
    tokenizer = load_tokenizer(config.model)
    prompt_options = {"template": load_template(config.prompt_template),
                      **load_normalisation(config.model)}  # fmt: skip
    model = load_model(
        config.model, world.device, shard=lambda m: shard(m, world, PACKED_METHODS)
    )
    if config.activation_checkpointing:
        model.gradient_checkpointing_enable({"use_reentrant": False})
    optimizer = make_optimizer(model, config.learning_rate, config.weight_decay)
    forbidden = torch.tensor(forbidden_tokens(model.config), device=world.device)
    tokens_per_second = model.config.vision_config.tokens_per_second

    total_steps = num_steps(config, len(samples), world)
    main_does(world, lambda: (folder.mkdir(parents=True, exist_ok=True), save_config(config, folder)))
    run_log = RunLog(folder, world, total_steps, "sft")
    with DecoderPool(config.num_workers, config.decode_timeout) as pool:
        steps = load_steps(
            samples, pool, range(total_steps), config.seed, config.batch_size(world.size),
            world.rank, world.size, config.limits(),
        )  # fmt: skip
        for step in range(total_steps):
            timer = PhaseTimer()
            with timer("data"):
                batch = [
                    (
                        make_prompt(
                            media.sample, tokenizer, (media.frames, media.seconds_between_frames),
                            **prompt_options,
                        ),
                        response_ids(media.sample, tokenizer),
                    )
                    for media in next(steps)
                ]  # fmt: skip
            # The denominator is fixed before the first micro-batch, over all ranks: the result
            # does not depend on how the batch is cut.
            num_tokens = sum(len(response) for _, response in batch)
            num_tokens = sum_over_ranks({"tokens": num_tokens})["tokens"]
            with timer("update"):
                loss = 0.0
                for start in range(0, len(batch), config.prompts_per_rank):
                    prompts, responses = zip(*batch[start : start + config.prompts_per_rank], strict=True)
                    pack = pack_groups(prompts, [[response] for response in responses], tokens_per_second)
                    logps = model.packed_logprobs(pack.to(world.device), forbidden)  # (M,)
                    part = -logps.sum() / num_tokens
                    (part * world.size).backward()  # FSDP averages gradients over the ranks
                    loss += float(part.detach())
                rate = learning_rate_at(step, total_steps, config.learning_rate, config.warmup_steps)
                grad_norm = update(model, optimizer, rate, config.max_grad_norm)
            sums = sum_over_ranks({"loss": loss})
            peaks = max_over_ranks(
                {"peak_memory_gib": peak_memory_gib(world.device), **timer.seconds}
            )
            seconds = peaks["data"] + peaks["update"]
            run_log.metrics({
                "step": step + 1, "loss": sums["loss"], "grad_norm": grad_norm, "lr": rate,
                "tokens": int(num_tokens), "seconds": seconds, "seconds_data": peaks["data"],
                "seconds_update": peaks["update"], "tokens_per_second": num_tokens / seconds,
                "peak_memory_gib": round(peaks["peak_memory_gib"], 2),
            })  # fmt: skip
    export_model(model, config.model, folder / "model", world)
    run_log.close()
    log(f"model written to {folder / 'model'}")


def main() -> None:
    import os

    defaults = toy_defaults(int(os.environ.get("WORLD_SIZE", 1)))
    config, is_toy = parse_config(SFTConfig, defaults, REAL_COMMAND)
    with process_group() as world:
        config.check(world.size)
        if is_toy:
            log(f"the embedded toy (neither --model nor --data given); a real run: {REAL_COMMAND}")
            main_does(world, toy.ensure_toy)
        train(config, world)


if __name__ == "__main__":
    run(main)
