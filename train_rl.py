"""Stage 2: T-GRPO reinforcement learning (Sections 3.2 and 3.3).

    torchrun --standalone --nproc_per_node 2 train_rl.py                      the embedded toy
    torchrun --nproc_per_node 8 train_rl.py --model runs/sft/model \\
        --data Video-R1-data/Video-R1-260k.json

Each step, on every rank: sample G responses to a prompt with its frames in order and G~ with the
frames shuffled; score them; add the temporal and the length reward; normalise within the group;
take the clipped objective with a KL to the frozen reference. Images get plain GRPO.
"""

import math
import os
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor
from torch.nn.functional import pad

import toy
import train_sft
from config import TrainConfig
from data import Media, Prompt, require_solution
from evaluation.validation import Validation
from infra.distributed import (
    World,
    gather_to_main,
    log,
    main_does,
    process_group,
    run,
    sum_over_ranks,
    unsharded,
)
from infra.errors import require
from infra.flags import flag, parse_config
from infra.optim import learning_rate_at, make_optimizer, update
from infra.run import PhaseTimer, RunFolder
from infra.video import DecoderPool
from model import (
    enable_checkpointing,
    group_logprobs,
    load_model,
    require_room,
    shard,
)
from rewards import accuracy_reward, format_reward
from sampling import Rollout, derive_seed, sample_groups
from tgrpo import (
    add_length_reward,
    add_temporal_reward,
    group_advantages,
    temporal_reward,
    tgrpo_loss,
)
from training import Alarms, cut, load_inputs, make_loader, micro_batches, num_steps

REAL_COMMAND = (
    "torchrun --nproc_per_node 8 train_rl.py --model runs/sft/model "
    "--data Video-R1-data/Video-R1-260k.json"
)
ORDERED, SHUFFLED, PERMUTATION = range(3)  # the fourth part of a random number's key


@dataclass
class RLConfig(TrainConfig):
    """Flags of stage 2."""

    output_dir: str = flag("runs/rl", "the run's folder")
    max_steps: int = flag(1000, "optimizer steps (Sec. 4.1); 0: by --num_epochs")
    group_size: int = flag(8, "G, responses to the ordered frames (Sec. 4.1)")
    shuffled_group_size: int = flag(4, "G~, responses to the shuffled frames (Sec. 4.1)")
    max_new_tokens: int = flag(768, "length of a response at most, in tokens (App. D)")
    correct_threshold: float = flag(0.5, "accuracy reward of a correct response (Sec. 3.2)")
    temporal: bool = flag(True, "the temporal reward, Eq. 1 and 2; false: plain GRPO")
    temporal_target: str = flag("reward", "what r_t is added to: reward (Eq. 2) or advantage")
    alpha: float = flag(0.3, "temporal reward (Eq. 1)")
    length_reward: bool = flag(True, "the length reward, Eq. 5")
    omega: float = flag(0.2, "length reward (Eq. 5)")
    l_min: int = flag(320, "shortest rewarded response, in tokens (Eq. 5)")
    l_max: int = flag(512, "longest rewarded response, in tokens (Eq. 5)")
    beta: float = flag(0.04, "weight of the KL (Eq. 4, App. D)")
    clip_eps: float = flag(0.2, "clip range of the ratio (Eq. 4; the paper gives none)")
    ratio_level: str = flag("token", "ratio of Eq. 4 per token, or per sequence as printed")
    num_iterations: int = flag(1, "updates on the same rollouts")

    def check(self) -> None:
        super().check()
        require(self.group_size >= 2, "--group_size must be at least 2: Eq. 3 compares responses")
        for name in ("shuffled_group_size", "num_iterations"):
            require(getattr(self, name) >= 1, f"--{name} must be at least 1")
        for name in ("alpha", "omega", "beta", "clip_eps", "l_min"):
            require(getattr(self, name) >= 0, f"--{name} must not be negative")
        require(self.l_max >= self.l_min, "--l_max is below --l_min")
        targets, levels = ("reward", "advantage"), ("token", "sequence")
        require(self.temporal_target in targets, "--temporal_target takes reward or advantage")
        require(self.ratio_level in levels, "--ratio_level takes token or sequence")


def toy_defaults(world_size: int) -> dict:
    """What the toy changes. Its 16 prompts a step are the same for 1, 2, 4, 8 and 16 ranks."""
    return {
        "model": str(toy.SFT / "model"), "data": str(toy.RL_DATA), "output_dir": str(toy.RL),
        "max_steps": 300, "prompts_per_rank": max(1, 16 // world_size), "learning_rate": 4e-4,
        "warmup_steps": 20, "max_frames": toy.NUM_FRAMES, "max_new_tokens": 40, "l_min": 12,
        "l_max": 24, "num_workers": 1, "activation_checkpointing": False,
    }  # fmt: skip


# ----------------------------------------------------------------------------- the parts of a step


@dataclass(frozen=True)
class Group:
    """The G responses to one prompt, scored. Every tensor is (G,) unless it says otherwise."""

    ordered: Rollout
    shuffled: Rollout | None  # None: an image, or plain GRPO
    accuracy: Tensor  # float64
    format: Tensor  # float64
    correct: Tensor  # bool
    accuracy_shuffled: Tensor | None  # float64 (G~,)
    r_t: float  # Eq. 1
    temporal: Tensor  # float64, what Eq. 2 added
    length_reward: Tensor  # float64, what Eq. 5 added
    rewards: Tensor  # float64, the R_i that Eq. 3 normalises
    advantages: Tensor  # float64

    @property
    def num_tokens(self) -> int:
        """Tokens of the packed row of the prompt and its responses."""
        return len(self.ordered.prompt.input_ids) + int(self.ordered.completion_mask.sum())


def make_prompts(
    media: Media, step: int, tokenizer, config: RLConfig, prompt_options: dict
) -> list[Prompt]:
    """The prompt with the frames in order and, for a video, the one with the frames shuffled."""
    prompts = [media.prompt(tokenizer, "ordered", **prompt_options)]
    if config.temporal and media.sample.is_video:
        key = (config.seed, step, media.sample.row, PERMUTATION)
        generator = torch.Generator().manual_seed(derive_seed(*key))
        prompts.append(media.prompt(tokenizer, "shuffled", generator, **prompt_options))
    return prompts


def sample_rollouts(
    policy, tokenizer, batch: list[list[Prompt]], config: RLConfig, step: int
) -> list[tuple[Rollout, Rollout | None]]:
    """Responses to the ordered and, for videos, to the shuffled frames, in one batch."""
    sizes = {ORDERED: config.group_size, SHUFFLED: config.shuffled_group_size}
    keys = [
        [(config.seed, step, prompt.sample.row, group, row) for row in range(sizes[group])]
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
    correct = accuracy >= config.correct_threshold
    rewards = accuracy + format_  # r_i

    r_t, accuracy_shuffled = 0.0, None
    if shuffled is not None:
        accuracy_shuffled = accuracies(shuffled.texts)  # (G~,)
        correct_shuffled = accuracy_shuffled >= config.correct_threshold
        r_t = temporal_reward(correct, correct_shuffled, config.alpha)  # Eq. 1
    temporal = add_temporal_reward(torch.zeros_like(rewards), correct, r_t)
    if config.temporal_target == "reward":
        rewards = add_temporal_reward(rewards, correct, r_t)  # Eq. 2
    length_reward = torch.zeros_like(rewards)
    if config.length_reward:
        window = (config.omega, config.l_min, config.l_max)
        length_reward = add_length_reward(length_reward, correct, ordered.lengths, *window)
        rewards = add_length_reward(rewards, correct, ordered.lengths, *window)  # Eq. 5
    advantages = group_advantages(rewards)  # Eq. 3
    if config.temporal_target == "advantage":  # the end of Section 3.2
        advantages = add_temporal_reward(advantages, correct, r_t)
    return Group(
        ordered, shuffled, accuracy, format_, correct, accuracy_shuffled, r_t, temporal,
        length_reward, rewards, advantages,
    )  # fmt: skip


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

    Returns this rank's share of loss, kl and clip_fraction (means over the iterations, to be
    summed over ranks), the gradient's norm, the number of updates that were not applied, and sums
    for logp_gap.
    """
    total_prompts = config.batch_size(world.size)
    logps_old: list[Tensor] = []
    metrics = dict.fromkeys(("loss", "kl", "clip_fraction", "gap_sum", "gap_count"), 0.0)
    metrics["bad_updates"] = 0
    for iteration in range(config.num_iterations):
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
            # Every prompt of the step weighs the same, however it is cut into micro-batches and
            # ranks. FSDP averages the ranks' gradients, so their number is multiplied back in.
            weight = len(groups) / total_prompts
            (loss * weight * world.size).backward()
            # What waits for the GPU comes after all of its work has been asked for.
            for name, value in {"loss": loss.detach(), **parts}.items():
                metrics[name] += float(value) * weight / config.num_iterations
            if iteration == 0:
                sampled = stack([group.ordered.sampler_logps for group in groups])
                metrics["gap_sum"] += float((sampled - logps_old[number].cpu()).abs().sum())
                metrics["gap_count"] += int(mask.sum())
        metrics["grad_norm"] = update(policy, optimizer, learning_rate, config.max_grad_norm)
        metrics["bad_updates"] += not math.isfinite(metrics["grad_norm"])
    return metrics


# ---------------------------------------------------------------------------------------- the loop


def train(config: RLConfig, world: World) -> bool:
    """Run T-GRPO in its output folder (run_folder.py); False: stopped before its end."""
    samples, tokenizer, prompt_options = load_inputs(config, require_solution)
    total_steps = num_steps(config, len(samples), world)
    this_run = RunFolder(config, world, "rl")
    if this_run.is_finished(total_steps):
        return True
    policy, reference = load_policy_and_reference(config, world)
    optimizer = make_optimizer(policy, config.learning_rate, config.weight_decay)
    rate_at = partial(learning_rate_at, peak=config.learning_rate, warmup_steps=config.warmup_steps)
    this_run.restore(policy, optimizer, total_steps, rate_at)

    def prepare(media: Media, step: int) -> list[Prompt]:
        prompts = make_prompts(media, step, tokenizer, config, prompt_options)
        require_room(prompts[0], config.max_new_tokens, policy.config)  # the shuffled is as long
        return prompts

    with (
        this_run.open(total_steps),
        DecoderPool(config.num_workers, config.decode_timeout) as pool,
    ):
        loader = make_loader(config, samples, pool, prepare, this_run.progress, world.rank)
        validation = Validation(config, world, pool, tokenizer, prompt_options)
        alarms = Alarms(this_run.history())
        this_run.validate_at_start(validation, policy)
        for step in range(this_run.start, total_steps):
            timer = PhaseTimer(world, step)
            rate = rate_at(step, total_steps)
            with timer("data"):
                batch = cut(loader.take(config.rank_batch_size, step), config.prompts_per_rank)
            with timer("rollout"), unsharded(policy):
                rollouts = [
                    sample_rollouts(policy, tokenizer, micro, config, step) for micro in batch
                ]
            with timer("reward"):
                groups = [
                    score_group(ordered, shuffled, config)
                    for micro in rollouts
                    for ordered, shuffled in micro
                ]
                batches = micro_batches(groups, [group.num_tokens for group in groups], config)
            with timer("reference"), torch.no_grad():
                logps_ref = [logprobs(reference, batch) for batch in batches]
            with timer("update"):
                updated = update_policy(policy, optimizer, batches, logps_ref, config, world, rate)
            this_run.validate(validation, policy, step + 1)
            log_step(step, groups, updated, rate, loader.sync(), timer, this_run, alarms)
            if this_run.end_step(step, loader, policy, optimizer):
                return False
        this_run.finish(policy)
    return True


def load_policy_and_reference(config: RLConfig, world: World):
    """The policy to train, and the same checkpoint frozen, for ever as it was loaded."""
    sharding = partial(shard, world=world)
    policy = load_model(
        config.model, world.device, shard=partial(sharding, freeze_vision=config.freeze_vision)
    )
    if config.activation_checkpointing:
        enable_checkpointing(policy)
    reference = load_model(
        config.model, world.device,
        # It is never updated, so it needs no more digits than it computes with.
        dtype=world.dtype,
        shard=partial(sharding, trainable=False),
    )  # fmt: skip
    return policy, reference


# ------------------------------------------------------------------------------------- the record


def log_step(
    step: int,
    groups: list[Group],
    updated: dict[str, float],
    rate: float,
    skipped: list[dict],
    timer: PhaseTimer,
    this_run: RunFolder,
    alarms: Alarms,
) -> None:
    """What a step leaves in the run's folder: rollouts, unusable samples, metrics."""
    mine = [rollout_record(step, group) for group in groups]
    records = gather_to_main(mine, this_run.world)
    this_run.records("rollouts.jsonl", [record for rank in records or [] for record in rank])
    this_run.records("skipped.jsonl", skipped)
    samples = [group.ordered.prompt.sample for group in groups]
    this_run.count_bad_step(step, updated["bad_updates"], samples)
    counts = {"skipped": len(skipped), "bad_steps": this_run.num_bad_steps}
    metrics = step_metrics(step, groups, updated, rate, timer) | counts
    this_run.metrics(metrics)
    if step == 0:
        show_first_step(groups, metrics, this_run)
    for text in alarms.check(metrics):
        this_run.say(text)


def step_metrics(
    step: int, groups: list[Group], updated: dict[str, float], rate: float, timer: PhaseTimer
) -> dict[str, float | int | None]:
    """One line of metrics.jsonl, over all ranks; the README explains each key."""
    videos = [group for group in groups if group.shuffled is not None]
    rollouts = [group.ordered for group in groups]
    everyone = rollouts + [group.shuffled for group in videos]

    def total(tensors: list[Tensor]) -> float:
        return float(sum(float(tensor.sum()) for tensor in tensors))

    sums = sum_over_ranks({
        **{name: updated[name] for name in ("loss", "kl", "clip_fraction", "gap_sum", "gap_count")},
        "groups": len(groups), "videos": len(videos),
        "responses": total([torch.ones(len(rollout.texts)) for rollout in rollouts]),
        "video_responses": total([torch.ones_like(group.accuracy) for group in videos]),
        "shuffled_responses": total([torch.ones_like(g.accuracy_shuffled) for g in videos]),
        "reward": total([group.rewards for group in groups]),
        "accuracy": total([group.accuracy for group in groups]),
        "accuracy_ordered": total([group.accuracy for group in videos]),
        "accuracy_shuffled": total([group.accuracy_shuffled for group in videos]),
        "format": total([group.format for group in groups]),
        "temporal": sum(group.r_t > 0 for group in videos),
        "temporal_earned": total([group.temporal > 0 for group in videos]),
        "length_reward": total([group.length_reward for group in groups]),
        "length": total([rollout.lengths for rollout in rollouts]),
        "cut": total([~rollout.ended for rollout in rollouts]),
        "zero_std": sum(bool((group_advantages(group.rewards) == 0).all()) for group in groups),
        "tokens": total([rollout.lengths for rollout in everyone]),
    })  # fmt: skip

    def mean(name: str, count: str) -> float | None:
        return sums[name] / sums[count] if sums[count] else None

    gap = None
    if sums["videos"]:  # of the same questions: images have no shuffled group
        gap = mean("accuracy_ordered", "video_responses")
        gap -= mean("accuracy_shuffled", "shuffled_responses")
    return {
        "step": step + 1,
        "reward": mean("reward", "responses"),
        "accuracy": mean("accuracy", "responses"),
        "accuracy_shuffled": mean("accuracy_shuffled", "shuffled_responses"),
        "gap": gap,
        "format": mean("format", "responses"),
        "temporal": mean("temporal", "videos"),
        "temporal_earned": mean("temporal_earned", "video_responses"),
        "length_reward": mean("length_reward", "responses"),
        "completion_length": mean("length", "responses"),
        "clipped_length": mean("cut", "responses"),
        "zero_std": mean("zero_std", "groups"),
        "kl": sums["kl"],
        "clip_fraction": sums["clip_fraction"],
        "loss": sums["loss"],
        "grad_norm": updated["grad_norm"],
        "lr": rate,
        "logp_gap": mean("gap_sum", "gap_count"),
        **timer.metrics(sums["tokens"]),
    }


def show_first_step(groups: list[Group], metrics: dict, this_run: RunFolder) -> None:
    """Three of the first responses and their rewards; and in words what makes a run hopeless."""
    group = groups[0]
    sample = group.ordered.prompt.sample
    this_run.say(f"the first responses, to row {sample.row} (solution {sample.solution!r}):")
    for index, text in enumerate(group.ordered.texts[:3]):
        this_run.say(
            f"  reward {float(group.rewards[index]):.3g} (accuracy "
            f"{float(group.accuracy[index]):.3g}, format {float(group.format[index]):.3g}), "
            f"{int(group.ordered.lengths[index])} tokens: {text!r}"
        )
    if metrics["format"] == 0:
        this_run.say(
            "warning: no response of the first step has the format <think>..</think> "
            "<answer>..</answer>, so the format reward is 0 everywhere. Is --model the model of "
            "stage 1, and does --prompt_template ask for the tags that it learned?"
        )
    if metrics["clipped_length"] > 0.9:
        this_run.say(
            f"warning: {100 * metrics['clipped_length']:.0f}% of the first step's responses were "
            f"cut at --max_new_tokens {this_run.config.max_new_tokens}: they end before their "
            "answer. Raise it, or see whether the model ever writes its end token "
            "(rollouts.jsonl)."
        )


def rollout_record(step: int, group: Group) -> dict:
    """One line of rollouts.jsonl: a prompt, its responses and each part of their rewards."""
    sample = group.ordered.prompt.sample
    columns = {
        "text": group.ordered.texts, "length": group.ordered.lengths.tolist(),
        "accuracy": group.accuracy.tolist(), "format": group.format.tolist(),
        "temporal": group.temporal.tolist(), "length_reward": group.length_reward.tolist(),
        "reward": group.rewards.tolist(), "advantage": group.advantages.tolist(),
    }  # fmt: skip
    record = {
        "step": step + 1, "problem_id": sample.problem_id, "row": sample.row, "path": sample.path,
        "problem_type": sample.problem_type, "problem": sample.problem,
        "options": sample.options, "solution": sample.solution, "r_t": group.r_t,
        "responses": [dict(zip(columns, row, strict=True))
                      for row in zip(*columns.values(), strict=True)],
        "shuffled_responses": [],
    }  # fmt: skip
    if group.shuffled is not None:
        pairs = zip(group.shuffled.texts, group.accuracy_shuffled.tolist(), strict=True)
        record["shuffled_responses"] = [{"text": text, "accuracy": a} for text, a in pairs]
    return record


def main() -> None:
    defaults = toy_defaults(int(os.environ.get("WORLD_SIZE", 1)))
    config, is_toy = parse_config(RLConfig, defaults, REAL_COMMAND)
    config.check()
    with process_group(config.timeout, config.replicas) as world:
        if is_toy:
            log(f"the embedded toy (neither --model nor --data given); a real run: {REAL_COMMAND}")
            main_does(world, toy.ensure_toy)
            if not (toy.SFT / "model").is_dir():
                log(f"{toy.SFT / 'model'} is not there: the cold start (train_sft.py) comes first")
                cold_start = train_sft.toy_defaults(world.size) | {"seed": config.seed}
                if not train_sft.train(train_sft.SFTConfig(**cold_start), world):
                    return
        train(config, world)


if __name__ == "__main__":
    run(main)
