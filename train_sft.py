"""Stage 1: supervised cold start on chain-of-thought data (Section 3.3).

    torchrun --standalone --nproc_per_node 2 train_sft.py                     the embedded toy
    torchrun --nproc_per_node 8 train_sft.py --model Qwen/Qwen2.5-VL-7B-Instruct \\
        --data Video-R1-data/Video-R1-COT-165k.json

The loss is the mean over all response tokens of a step: only the assistant's turn is learned. It
goes through the same packed log-probabilities as the RL stage, with groups of one response.
"""

import math
from concurrent.futures import Future
from functools import partial

from torch import Tensor

import toy
from config import SFTConfig
from data import (
    Prompt,
    load_template,
    load_usable_samples,
    make_prompt,
    require_process,
    response_ids,
    submit_decode,
)
from evaluation.results import input_hashes
from evaluation.validation import Validation, load_validation
from infra.distributed import (
    World,
    log,
    main_does,
    name_missing_ranks,
    on_main,
    process_group,
    run_main,
    sum_over_ranks,
)
from infra.flags import parse_config
from infra.optim import make_optimizer, update
from infra.run import Run
from infra.video import DecoderPool
from model import (
    enable_checkpointing,
    export_model,
    forbidden_tokens,
    load_model,
    load_normalisation,
    load_tokenizer,
    model_card,
    pack_groups,
    require_possible,
    require_room,
    shard,
)

REAL_COMMAND = (
    "torchrun --nproc_per_node 8 train_sft.py --model Qwen/Qwen2.5-VL-7B-Instruct "
    "--data Video-R1-data/Video-R1-COT-165k.json"
)
TOY_DEFAULTS = {
    "model": str(toy.BASE), "data": str(toy.SFT_DATA), "output_dir": str(toy.SFT),
    "max_steps": 360, "prompts_per_step": 32, "prompts_per_rank": 32, "learning_rate": 1e-3,
    "warmup_steps": 10, "max_grad_norm": 1.0, "max_frames": toy.NUM_FRAMES, "num_workers": 1,
    "max_new_tokens": 40, "activation_checkpointing": False,
}  # fmt: skip


def train(config: SFTConfig, world: World) -> bool:
    """Run the cold start in its output folder; False: stopped before its end."""
    samples = load_usable_samples(config, require_process)
    validation_samples = load_validation(config)
    tokenizer = load_tokenizer(config.model)
    prompt_options = {
        "template": load_template(config.prompt_template), **load_normalisation(config.model)
    }  # fmt: skip
    num_prompts = config.rank_prompts(world.size)
    num_steps = config.num_steps(len(samples))
    run = Run(config, world, "sft", num_steps, on_main(world, lambda: input_hashes(config)))
    if run.is_finished:
        return True
    sharding = partial(shard, world=world, freeze_vision=config.freeze_vision)
    model = load_model(config.model, world.device, shard=sharding)
    if config.activation_checkpointing:
        enable_checkpointing(model)
    optimizer = make_optimizer(model, config.learning_rate, config.weight_decay)
    run.restore(model, optimizer)

    def submit(index: int) -> Future:
        return submit_decode(pool, samples[index], config.limits())

    def prepare(index: int, decoded: tuple, step: int, epoch: int) -> tuple[Prompt, Tensor]:
        prompt = make_prompt(samples[index], tokenizer, decoded, **prompt_options)
        response = response_ids(samples[index], tokenizer)
        require_room(prompt, len(response), model.config)
        require_possible(response, model.config)
        return prompt, response

    with run, DecoderPool(config.num_workers, config.decode_timeout) as pool:
        loader = run.loader(len(samples), submit, prepare, lambda index: samples[index].identity)
        validation = Validation(config, world, pool, tokenizer, prompt_options, validation_samples)
        run.validate(validation, model, 0)
        for step, batch in run.steps(loader, num_prompts):
            name_missing_ranks(world)
            num_tokens = sum(len(response) for _, response in batch)
            num_tokens = sum_over_ranks({"tokens": num_tokens})["tokens"]
            rate = run.learning_rate(step)
            with run.phase("update"):
                loss = accumulate_gradients(model, batch, num_tokens, config, world)
                grad_norm = update(model, optimizer, rate, config.max_grad_norm, loss)
            run.validate(validation, model, step + 1)
            skipped = loader.sync()
            run.records("skipped.jsonl", skipped)
            identities = [prompt.sample.identity for prompt, _ in batch]
            run.count_bad_step(step, not math.isfinite(grad_norm), identities)
            metrics = {
                "step": step + 1, "loss": loss, "grad_norm": grad_norm, "lr": rate,
                "tokens": int(num_tokens), "skipped": len(skipped),
            }  # fmt: skip
            run.log(metrics, num_tokens)
        if run.is_complete:
            card = model_card(config, "supervised cold start (stage 1)", num_steps, run.history)
            run.finish(lambda folder: export_model(model, config.model, folder, world, card))
    return run.is_complete


def accumulate_gradients(
    model, batch: list[tuple[Prompt, Tensor]], num_tokens: float, config: SFTConfig, world: World
) -> float:
    """Forward and backward over a rank's prompts; returns the loss of the step, over all ranks.

    num_tokens: response tokens of the step over all ranks. It is the denominator everywhere, so
    the gradient does not depend on how the step is cut into passes and ranks.
    """
    forbidden = forbidden_tokens(model.config)
    tokens_per_second = model.config.vision_config.tokens_per_second
    loss = 0.0
    for start in range(0, len(batch), config.prompts_per_rank):
        prompts, responses = zip(*batch[start : start + config.prompts_per_rank], strict=True)
        pack = pack_groups(prompts, [[response] for response in responses], tokens_per_second)
        logps = model.packed_logprobs(pack.to(world.device), forbidden)  # (M,)
        part = -logps.sum() / num_tokens
        (part * world.size).backward()  # FSDP averages gradients over the ranks
        loss += float(part.detach())
    return sum_over_ranks({"loss": loss})["loss"]


def main() -> None:
    config, is_toy = parse_config(SFTConfig, TOY_DEFAULTS, REAL_COMMAND)
    config.check()
    with process_group(
        config.timeout, config.replicas, config.precision, cpu_fallback=is_toy
    ) as world:
        if is_toy:
            log(f"the embedded toy (neither --model nor --data given); a real run: {REAL_COMMAND}")
            main_does(world, toy.ensure_toy)
        train(config, world)


if __name__ == "__main__":
    run_main(main)
