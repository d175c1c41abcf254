"""What both training stages share: optimizer, schedule, the update, inputs, seconds by phase."""

import math
from collections import deque
from collections.abc import Callable
from typing import TypeVar

from config import TrainConfig
from data import Sample, load_samples, load_template, require_no_vision_tokens
from infra.distributed import World, log, max_over_ranks
from infra.errors import UserError, require
from infra.loader import Loader, Progress
from infra.video import DecoderPool
from model import load_normalisation, load_tokenizer

Item = TypeVar("Item")


def num_steps(config: TrainConfig, num_samples: int, world: World) -> int:
    """Optimizer steps of a run: --max_steps, or as many as --num_epochs take, rounded up."""
    batch_size = config.batch_size(world.size)
    return config.max_steps or math.ceil(config.num_epochs * num_samples / batch_size)


def load_inputs(
    config: TrainConfig, check: Callable[[Sample], None]
) -> tuple[list[Sample], object, dict]:
    """The samples, the tokenizer, and what make_prompt needs besides (template, mean, std).

    Args:
        check: raises UserError, naming the row, for a sample that the stage cannot use.
    Raises:
        UserError: naming the flag, the file, or the file's row.
    """
    samples = load_samples(config.data, config.data_root or None)
    samples = [sample for sample in samples if sample.data_type in config.data_types]
    usable, reasons = [], []
    for sample in samples:
        try:
            require_no_vision_tokens(sample)
            check(sample)
            usable.append(sample)
        except UserError as error:
            reasons.append(f"{config.data}, {error}")
    require(config.skip_bad_samples or not reasons, "; ".join(reasons[:1]))
    if reasons:
        count = f"{len(reasons)} of {len(samples)} rows are left out"
        log(f"--skip_bad_samples: {count}, the first: {reasons[0]}")
    kinds = " ".join(config.data_types)
    require(usable, f"--data {config.data} holds no row of --data_types {kinds}")
    template = load_template(config.prompt_template)
    options = {"template": template, **load_normalisation(config.model)}
    return usable, load_tokenizer(config.model), options


def make_loader(
    config: TrainConfig,
    samples: list[Sample],
    pool: DecoderPool,
    prepare: Callable,
    progress: Progress,
    rank: int,
) -> Loader:
    """A rank's stream of samples from where the run stands."""
    return Loader(
        samples, pool, prepare, limits=config.limits(), progress=progress, rank=rank,
        seed=config.seed, max_skipped=config.max_skipped,
    )  # fmt: skip


def cut(items: list, size: int) -> list[list]:
    """A list in parts of `size`, the last one maybe shorter."""
    return [items[start : start + size] for start in range(0, len(items), size)]


def micro_batches(items: list[Item], lengths: list[int], config: TrainConfig) -> list[list[Item]]:
    """A rank's part of a step as the passes that it is updated in: as many on every rank, since
    each is a collective.

    Args:
        items: as many on every rank. lengths: of each, in tokens of its packed row.
    Returns:
        by --prompts_per_rank, or by --tokens_per_micro_batch: the longest first, in parts that do
        not exceed the budget where one item alone does not.
    """
    budget = config.tokens_per_micro_batch
    if not budget:
        return cut(items, config.prompts_per_rank)
    parts: list[list[int]] = []
    used = 0
    for index in sorted(range(len(items)), key=lambda index: -lengths[index]):
        if not parts or used + lengths[index] > budget:
            parts.append([])
            used = 0
        parts[-1].append(index)
        used += lengths[index]
    most = max_over_ranks({"parts": len(parts)})["parts"]
    while len(parts) < most:  # another rank needs more passes: there are items enough to split
        parts.sort(key=len)
        largest = parts.pop()
        parts += [largest[: len(largest) // 2], largest[len(largest) // 2 :]]
    return [[items[index] for index in part] for part in parts]


class Alarms:
    """Says in words, each once, what goes wrong slowly in an RL run.

    Args:
        history: metrics of earlier steps, of a run that is resumed.
    """

    RECENT = 20  # steps
    SHORT, MOST_FLAT, MOST_KL = 1 / 3, 0.5, 1.0  # of the first lengths, share, nats per token

    def __init__(self, history: list[dict] = ()):
        self.first_lengths: list[float] = []
        self.recent: deque[dict] = deque(maxlen=self.RECENT)
        self.said: set[str] = set()
        for metrics in history:
            self.check(metrics)

    def check(self, metrics: dict) -> list[str]:
        """The warnings that a step's metrics, with those before it, give rise to."""
        self.recent.append(metrics)
        if len(self.first_lengths) < self.RECENT:
            self.first_lengths.append(metrics["completion_length"])
            return []  # nothing to compare with yet
        length, flat, kl = map(self._mean, ("completion_length", "zero_std", "kl"))
        first = sum(self.first_lengths) / len(self.first_lengths)
        where = f"over the last {self.RECENT} steps"
        texts = {
            "length": length < self.SHORT * first
            and f"responses have collapsed to {length:.0f} tokens {where}, from {first:.0f} at "
            "first: the model stops reasoning. See rollouts.jsonl; a larger --omega or --beta, or "
            "a smaller --learning_rate holds against it",
            "flat": flat > self.MOST_FLAT
            and f"{100 * flat:.0f}% of the groups had no spread of rewards {where}: they teach "
            "nothing. The questions are too easy or too hard for the model, see accuracy",
            "kl": kl > self.MOST_KL
            and f"the KL to the reference was {kl:.2g} nats per token {where}: the policy runs "
            "away. A smaller --learning_rate or a larger --beta holds it",
        }
        new = {name: text for name, text in texts.items() if text and name not in self.said}
        self.said |= new.keys()
        return [f"warning: {text}" for text in new.values()]

    def _mean(self, key: str) -> float:
        values = [metrics[key] for metrics in self.recent if metrics[key] is not None]
        return sum(values) / len(values) if values else math.nan  # nan compares as false
