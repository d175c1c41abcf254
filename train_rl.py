"""Stage 2: T-GRPO reinforcement learning (Sections 3.2 and 3.3).

    torchrun --standalone --nproc_per_node 2 train_rl.py                      the embedded toy
    torchrun --nproc_per_node 8 train_rl.py --model runs/sft/model \\
        --data Video-R1-data/Video-R1-260k.json

Each step, on every rank: sample G responses to a prompt with its frames in order and G~ with the
frames shuffled; score them; add the temporal and the length reward; normalise within the group;
take the clipped objective with a KL to the frozen reference. Images get plain GRPO.

Shapes: P prompts, G responses of a group, T tokens of the longest response.
"""

import dataclasses
import math
from concurrent.futures import Future
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor
from torch.nn.functional import pad

import toy
import train_sft
from config import RLConfig, SFTConfig
from data import (
    Prompt,
    Sample,
    load_template,
    load_usable_samples,
    make_prompt,
    require_solution,
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
    unsharded,
)
from infra.flags import parse_config
from infra.optim import make_optimizer, update
from infra.run import Run
from infra.video import DecoderPool
from model import (
    enable_checkpointing,
    export_model,
    group_logprobs,
    load_model,
    load_normalisation,
    load_tokenizer,
    model_card,
    require_room,
    shard,
)
from rewards import accuracy_reward, format_reward
from sampling import Rollout, derive_seed, sample_groups
from tgrpo import (
    add_length_reward,
    add_temporal_reward,
    advantages_of_parts,
    group_advantages,
    temporal_effect,
    temporal_reward,
    tgrpo_loss,
)

REAL_COMMAND = (
    "torchrun --nproc_per_node 8 train_rl.py --model runs/sft/model "
    "--data Video-R1-data/Video-R1-260k.json"
)
TOY_DEFAULTS = {
    "model": str(toy.SFT / "model"), "data": str(toy.RL_DATA), "output_dir": str(toy.RL),
    "max_steps": 300, "prompts_per_step": 16, "prompts_per_rank": 16, "learning_rate": 4e-4,
    "warmup_steps": 20, "max_frames": toy.NUM_FRAMES, "max_new_tokens": 40, "l_min": 12,
    "l_max": 24, "num_workers": 1, "activation_checkpointing": False,
}  # fmt: skip
ORDERED, SHUFFLED, PERMUTATION = range(3)  # the fourth part of a random number's key


# ---------------------------------------------------------------------------------------- the loop


def train(config: RLConfig, world: World) -> bool:
    """Run T-GRPO in its output folder; False: stopped before its end."""
    samples = load_usable_samples(config, require_solution)
    validation_samples = load_validation(config)
    tokenizer = load_tokenizer(config.model)
    prompt_options = {
        "template": load_template(config.prompt_template), **load_normalisation(config.model)
    }  # fmt: skip
    num_prompts = config.rank_prompts(world.size)
    num_steps = config.num_steps(len(samples))
    run = Run(config, world, "rl", num_steps, on_main(world, lambda: input_hashes(config)))
    if run.is_finished:
        return True
    policy, reference = load_policy_and_reference(config, world)
    optimizer = make_optimizer(policy, config.learning_rate, config.weight_decay)
    run.restore(policy, optimizer)

    def submit(index: int) -> Future:
        return submit_decode(pool, samples[index], config.limits())

    def prepare(index: int, decoded: tuple, step: int, epoch: int) -> list[Prompt]:
        prompts = make_prompts(
            samples[index], decoded, step, epoch, tokenizer, config, prompt_options
        )
        require_room(prompts[0], config.max_new_tokens, policy.config)  # the shuffled is as long
        return prompts

    with run, DecoderPool(config.num_workers, config.decode_timeout) as pool:
        loader = run.loader(len(samples), submit, prepare, lambda index: samples[index].identity)
        validation = Validation(config, world, pool, tokenizer, prompt_options, validation_samples)
        run.validate(validation, policy, 0)
        for step, questions in run.steps(loader, num_prompts):
            rate = run.learning_rate(step)
            with run.phase("rollout"), unsharded(policy):
                rollouts = [
                    rollout
                    for batch in cut(questions, config.prompts_per_rank)
                    for rollout in sample_rollouts(policy, tokenizer, batch, config, step)
                ]
            name_missing_ranks(world)
            with run.phase("reward"):
                groups = [score_group(*rollout, config) for rollout in rollouts]  # Eq. 1, 2, 5, 3
                batches = cut(groups, config.prompts_per_rank)
            with run.phase("reference"), torch.no_grad():
                logps_ref = [logprobs(reference, batch) for batch in batches]
            with run.phase("update"):
                updated = update_policy(policy, optimizer, batches, logps_ref, config, world, rate)
            run.validate(validation, policy, step + 1)
            record_step(step, groups, updated, rate, loader.sync(), run)
        if run.is_complete:
            card = model_card(config, "T-GRPO (stage 2)", num_steps, run.history)
            run.finish(lambda folder: export_model(policy, config.model, folder, world, card))
    return run.is_complete


def load_policy_and_reference(config: RLConfig, world: World):
    """The policy to train, and the same checkpoint frozen."""
    sharding = partial(shard, world=world, freeze_vision=config.freeze_vision)
    policy = load_model(config.model, world.device, shard=sharding)
    if config.activation_checkpointing:
        enable_checkpointing(policy)
    reference = load_model(
        config.model, world.device,
        dtype=world.dtype,  # never updated, it needs no more digits than it computes with
        shard=partial(shard, world=world, trainable=False),
    )  # fmt: skip
    return policy, reference


# ----------------------------------------------------------------------------- the parts of a step


@dataclass(frozen=True)
class Group:
    """The G responses to one prompt, scored. Every tensor is (G,) unless it says otherwise.

    parts: each part of R_i by its name, float64, in the order of the paper: accuracy, format,
    temporal, length_reward. A part that is added to this dict is trained on, logged and recorded.
    """

    ordered: Rollout
    shuffled: Rollout | None  # None: an image, a single frame, or plain GRPO
    parts: dict[str, Tensor]
    correct: Tensor  # bool
    accuracy_shuffled: Tensor | None  # float64 (G~,)
    r_t: float  # Eq. 1
    advantages: Tensor  # float64
    advantages_without: Tensor  # float64, what they were without r_t

    @property
    def rewards(self) -> Tensor:
        """float64 (G,): the R_i that Eq. 3 normalises."""
        return sum(self.parts.values())


def make_prompts(
    sample: Sample,
    decoded: tuple,
    step: int,
    epoch: int,
    tokenizer,
    config: RLConfig,
    prompt_options: dict,
) -> list[Prompt]:
    """The prompt with the frames in order and, for a video, the one with the frames shuffled.

    A single frame has no order: its shuffled prompt would be the same one, and r_t noise.
    """
    orders = ["ordered"]
    if config.temporal and sample.is_video and len(decoded[0]) > 1:
        orders.append("shuffled")
    generator = torch.Generator()
    prompts = []
    for order in orders:
        key = (config.seed, step, draw_key(sample.row, epoch), PERMUTATION)
        generator.manual_seed(derive_seed(*key))
        prompt = make_prompt(sample, tokenizer, decoded, order, generator, **prompt_options)
        prompts.append(dataclasses.replace(prompt, epoch=epoch))
    return prompts


def draw_key(row: int, epoch: int) -> int:
    """One number for a row in an epoch: two copies of a row in one step draw different numbers."""
    return row + (epoch << 32)


def sample_rollouts(
    policy, tokenizer, batch: list[list[Prompt]], config: RLConfig, step: int
) -> list[tuple[Rollout, Rollout | None]]:
    """Responses to the ordered and, for videos, to the shuffled frames, in one batch."""
    sizes = {ORDERED: config.group_size, SHUFFLED: config.shuffled_group_size}
    keys = [
        [
            (config.seed, step, draw_key(prompt.sample.row, prompt.epoch), group, row)
            for row in range(sizes[group])
        ]
        for prompts in batch
        for group, prompt in enumerate(prompts)
    ]
    prompts = [prompt for prompts in batch for prompt in prompts]
    rollouts = iter(sample_groups(policy, tokenizer, prompts, keys, config.max_new_tokens))
    return [(next(rollouts), next(rollouts) if len(prompts) > 1 else None) for prompts in batch]


def score_group(ordered: Rollout, shuffled: Rollout | None, config: RLConfig) -> Group:
    """Rewards and advantages of one prompt's responses: Section 3.1, then Eq. 1, 2, 5 and 3."""
    sample = ordered.prompt.sample

    def accuracies(texts: list[str]) -> Tensor:
        scores = [accuracy_reward(text, sample.solution, sample.problem_type) for text in texts]
        return torch.tensor(scores, dtype=torch.float64)

    accuracy = accuracies(ordered.texts)  # (G,)
    format_ = torch.tensor([format_reward(text) for text in ordered.texts], dtype=torch.float64)
    correct = accuracy >= config.correct_threshold  # (G,)
    r_t, accuracy_shuffled = 0.0, None
    if shuffled is not None:
        accuracy_shuffled = accuracies(shuffled.texts)  # (G~,)
        correct_shuffled = accuracy_shuffled >= config.correct_threshold
        if config.shuffled_group_size:
            r_t = temporal_reward(correct, correct_shuffled, config.alpha)  # Eq. 1
        else:  # departure, a placebo: p~ = 0, r_t for every correct response
            r_t = config.alpha

    zeros = torch.zeros_like(accuracy)
    temporal = add_temporal_reward(zeros, correct, r_t)  # Eq. 2
    length_reward = zeros
    if config.length_reward:
        window = (config.omega, config.l_min, config.l_max)
        length_reward = add_length_reward(zeros, correct, ordered.lengths, *window)  # Eq. 5
    parts = {
        "accuracy": accuracy, "format": format_, "temporal": temporal,
        "length_reward": length_reward,
    }  # fmt: skip
    # Eq. 3; departure: --advantage_norm none or separate.
    normalise = partial(
        advantages_of_parts,
        weights={"temporal": config.alpha, "length_reward": config.omega},
        norm=config.advantage_norm,
    )
    advantages_without = normalise({**parts, "temporal": zeros})
    if config.temporal_target == "reward":
        advantages = normalise(parts)
    else:  # the end of Section 3.2: r_t is no part of the reward
        parts["temporal"] = zeros
        advantages = add_temporal_reward(advantages_without, correct, r_t)
    return Group(
        ordered, shuffled, parts, correct, accuracy_shuffled, r_t, advantages, advantages_without
    )


def logprobs(model, groups: list[Group]) -> Tensor:
    """float32 (P, G, T): log-probabilities of the ordered responses of P groups."""
    prompts = [group.ordered.prompt for group in groups]
    return group_logprobs(model, prompts, *completions(groups))


def completions(groups: list[Group]) -> tuple[Tensor, Tensor]:
    """Ids int64 and mask bool, (P, G, T) both, T that of the longest response."""
    ids = stack([group.ordered.completion_ids for group in groups])
    return ids, stack([group.ordered.completion_mask for group in groups])


def stack(rows: list[Tensor]) -> Tensor:
    """Groups of tensors (G, T), each of its own T, as (P, G, T) with zeros on the right."""
    longest = max(row.shape[1] for row in rows)
    return torch.stack([pad(row, (0, longest - row.shape[1])) for row in rows])


def cut(items: list, size: int) -> list[list]:
    """A list in parts of `size`, the last one maybe shorter."""
    return [items[start : start + size] for start in range(0, len(items), size)]


def update_policy(
    policy,
    optimizer: torch.optim.Optimizer,
    batches: list[list[Group]],
    logps_ref: list[Tensor],
    config: RLConfig,
    world: World,
    learning_rate: float,
) -> dict[str, float]:
    """Eq. 4 on one step's groups: --num_iterations times forward, backward, clip and step.

    Returns, over all ranks and averaged over the iterations: loss, kl, clip_fraction; logp_gap of
    the first; grad_norm of the last, nan if it was not applied; and num_bad_updates, how many were
    not applied.
    """
    logps_old: list[Tensor] = []
    totals = dict.fromkeys(("loss", "kl", "clip_fraction"), 0.0)
    gap = {"sum": 0.0, "count": 0}
    num_bad_updates = 0
    for iteration in range(config.num_iterations):
        sums = dict.fromkeys(totals, 0.0)
        for number, groups in enumerate(batches):
            logp = logprobs(policy, groups)  # (P, G, T), with gradient
            mask = completions(groups)[1].to(logp.device)
            if iteration == 0:  # before the first update the policy is the one that sampled
                logps_old.append(logp.detach())
            advantages = torch.stack([group.advantages for group in groups]).to(logp.device)
            loss, parts = tgrpo_loss(
                logp, logps_old[number], logps_ref[number], advantages, mask,
                config.clip_eps, config.beta, config.ratio_level,
            )  # fmt: skip
            # Every prompt of the step weighs the same, however it is cut into passes and ranks.
            # FSDP averages the ranks' gradients, so their number is multiplied back in.
            weight = len(groups) / config.prompts_per_step
            (loss * weight * world.size).backward()
            # What waits for the GPU comes after all of its work has been queued.
            for name, value in {"loss": loss.detach(), **parts}.items():
                sums[name] += float(value) * weight
            if iteration == 0:
                sampled = stack([group.ordered.sampler_logps for group in groups])
                gap["sum"] += float((sampled - logps_old[number].cpu()).abs().sum())
                gap["count"] += int(mask.sum())
        sums = sum_over_ranks(sums)
        totals = {name: totals[name] + sums[name] / config.num_iterations for name in totals}
        grad_norm = update(policy, optimizer, learning_rate, config.max_grad_norm, sums["loss"])
        num_bad_updates += not math.isfinite(grad_norm)
    gap = sum_over_ranks(gap)
    logp_gap = gap["sum"] / gap["count"] if gap["count"] else None
    return {
        **totals, "logp_gap": logp_gap, "grad_norm": grad_norm, "num_bad_updates": num_bad_updates
    }  # fmt: skip


# ------------------------------------------------------------------------------------- the record


def record_step(
    step: int, groups: list[Group], updated: dict, rate: float, skipped: list[dict], run: Run
) -> None:
    """What a step leaves in the run's folder: rollouts, skipped samples, metrics, warnings."""
    run.gather_records("rollouts.jsonl", [rollout_record(step, group) for group in groups])
    run.records("skipped.jsonl", skipped)
    identities = [group.ordered.prompt.sample.identity for group in groups]
    num_bad_updates = updated.pop("num_bad_updates")
    run.count_bad_step(step, num_bad_updates, identities)
    means, num_tokens = group_metrics(groups)
    run.log({"step": step + 1, **means, **updated, "lr": rate, "skipped": len(skipped)}, num_tokens)
    if step == 0:
        show_first_step(groups[0], run)
    warn(run)


def group_metrics(groups: list[Group]) -> tuple[dict[str, float | None], float]:
    """The metrics that follow from the rollouts of a step and their rewards, over all ranks (the
    README explains each key), and the number of sampled tokens."""
    videos = [group for group in groups if group.shuffled is not None]
    everyone = [group.ordered for group in groups] + [group.shuffled for group in videos]
    ordered_videos = [group.parts["accuracy"] for group in videos]
    shuffled_videos = [group.accuracy_shuffled for group in videos]
    flat = [(group_advantages(group.rewards) == 0).all() for group in groups]
    changes = [temporal_effect(group.advantages, group.advantages_without) for group in videos]
    parts = {name: [group.parts[name] for group in groups] for name in groups[0].parts}
    del parts["temporal"]  # `temporal` is the share of groups, see below
    values = {
        "reward": [group.rewards for group in groups],
        "accuracy_ordered": ordered_videos,
        "accuracy_shuffled": shuffled_videos,
        "temporal": [torch.tensor(group.r_t > 0) for group in videos],
        "temporal_earned": [group.correct & (group.r_t > 0) for group in videos],
        "temporal_effect": changes,
        "completion_length": [group.ordered.lengths for group in groups],
        "clipped_length": [~group.ordered.ended for group in groups],
        "zero_std": flat,
        "tokens": [rollout.lengths for rollout in everyone],
    }
    assert not parts.keys() & values.keys(), "a part of the reward is named like a metric"
    values = {**values, **parts}
    sums = {name: sum(float(tensor.sum()) for tensor in tensors)
            for name, tensors in values.items()}  # fmt: skip
    counts = {f"num {name}": sum(tensor.numel() for tensor in tensors)
              for name, tensors in values.items()}  # fmt: skip
    total = sum_over_ranks(sums | counts)
    means = {name: total[name] / total[f"num {name}"] if total[f"num {name}"] else None
             for name in values}  # fmt: skip
    ordered, shuffled = means.pop("accuracy_ordered"), means["accuracy_shuffled"]
    means["gap"] = None if shuffled is None else ordered - shuffled  # of the same questions
    del means["tokens"]
    return means, total["tokens"]


def show_first_step(group: Group, run: Run) -> None:
    """Three of the first responses and each part of their rewards."""
    sample = group.ordered.prompt.sample
    run.say(f"the first responses, to row {sample.row} (solution {sample.solution!r}):")
    for index, text in enumerate(group.ordered.texts[:3]):
        parts = ", ".join(f"{name} {float(part[index]):.3g}" for name, part in group.parts.items())
        run.say(f"  reward {float(group.rewards[index]):.3g} ({parts}), "
                f"{int(group.ordered.lengths[index])} tokens: {text!r}")  # fmt: skip


def warn(run: Run) -> None:
    """Say in words, each once, what in the metrics shows that training cannot work or slowly goes
    wrong."""
    if not run.history:  # not rank 0
        return
    config, last = run.config, run.history[-1]

    def mean(key: str, steps: list[dict]) -> float:
        values = [metrics[key] for metrics in steps if metrics[key] is not None]
        return sum(values) / len(values) if values else math.nan  # nan compares as false

    if last["step"] == 1:
        run.warn(last["format"] == 0, (
            "no response of the first step has the format <think>..</think> <answer>..</answer>, "
            "so the format reward is 0 everywhere. Is --model the model of stage 1, and does "
            "--prompt_template ask for the tags that it learned?"
        ))  # fmt: skip
        run.warn(last["clipped_length"] > 0.9, (
            "more than 90% of the first step's responses were cut at --max_new_tokens "
            f"{config.max_new_tokens}: they end before their answer. Raise it, or see whether the "
            "model ever writes its end token (rollouts.jsonl)"
        ))  # fmt: skip
    recent, first = run.history[-20:], run.history[:20]
    if len(run.history) > 20:
        run.warn(mean("completion_length", recent) < mean("completion_length", first) / 3, (
            "over the last 20 steps responses had less than a third of the tokens they had at "
            "first: the model stops reasoning. See rollouts.jsonl; a larger --omega or --beta, or "
            "a smaller --learning_rate, helps"
        ))  # fmt: skip
        run.warn(mean("zero_std", recent) > 0.5, (
            "over the last 20 steps more than half of the groups had no spread of rewards: they "
            "teach nothing. The questions are too easy or too hard for the model, see accuracy"
        ))  # fmt: skip
        run.warn(mean("kl", recent) > 1, (
            "over the last 20 steps the KL to the reference was above 1 nat per token: the policy "
            "runs away. A smaller --learning_rate or a larger --beta holds it"
        ))  # fmt: skip
    if len(run.history) >= 50 and config.temporal:
        run.warn(mean("temporal_effect", run.history[-50:]) < 0.01, (
            "over the last 50 steps the temporal reward moved the advantages by less than 0.01: "
            "Eq. 3 cancels it where rewards are binary. See temporal_effect in the README; "
            "--temporal_target advantage always acts"
        ))  # fmt: skip


def rollout_record(step: int, group: Group) -> dict:
    """One line of rollouts.jsonl: a prompt, its responses and each part of their rewards."""
    sample, ordered = group.ordered.prompt.sample, group.ordered
    columns = {
        "text": ordered.texts, "length": ordered.lengths.tolist(),
        **{name: part.tolist() for name, part in group.parts.items()},
        "reward": group.rewards.tolist(), "advantage": group.advantages.tolist(),
    }  # fmt: skip
    record = {
        "step": step + 1, **sample.identity, "problem_type": sample.problem_type,
        "problem": sample.problem, "options": sample.options, "solution": sample.solution,
        "r_t": group.r_t, "shuffled_responses": [],
        "responses": [dict(zip(columns, row, strict=True))
                      for row in zip(*columns.values(), strict=True)],
    }  # fmt: skip
    if group.shuffled is not None:
        pairs = zip(group.shuffled.texts, group.accuracy_shuffled.tolist(), strict=True)
        record["shuffled_responses"] = [
            {"text": text, "accuracy": accuracy} for text, accuracy in pairs
        ]
    return record


def main() -> None:
    config, is_toy = parse_config(RLConfig, TOY_DEFAULTS, REAL_COMMAND)
    config.check()
    with process_group(
        config.timeout, config.replicas, config.precision, cpu_fallback=is_toy
    ) as world:
        if is_toy:
            log(f"the embedded toy (neither --model nor --data given); a real run: {REAL_COMMAND}")
            main_does(world, toy.ensure_toy)
            if not (toy.SFT / "model").is_dir():
                log(f"{toy.SFT / 'model'} is not there: the cold start (train_sft.py) comes first")
                cold_start = SFTConfig(**train_sft.TOY_DEFAULTS | {"seed": config.seed})
                if not train_sft.train(cold_start, world):
                    return
        train(config, world)


if __name__ == "__main__":
    run_main(main)
