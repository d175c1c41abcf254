"""Validation during training: accuracy on ordered and on shuffled frames, and the gap between them.

The same samples, shuffles and greedy decoding (Section 4.1) every time, so that two steps of a run,
and two runs, can be compared.
"""

from collections.abc import Collection

from config import TrainConfig
from data import Sample, load_samples
from evaluation.answering import AnswerSettings, answer, fixed_batches, score_item
from infra.distributed import World, gather_to_main, unsharded
from infra.errors import require
from infra.video import DecoderPool

BATCH_SIZE = 16  # samples that are generated together, per rank


def load_validation(config: TrainConfig) -> list[Sample]:
    """The samples of --val_data; none without it.

    Raises:
        UserError: the file cannot be used, or has no sample of --data_types.
    """
    if not config.val_data:
        return []
    samples = load_samples(config.val_data, config.data_root or None)
    samples = [sample for sample in samples if sample.data_type in config.data_types]
    kinds = " ".join(config.data_types)
    require(samples, f"--val_data {config.val_data} has no row of --data_types {kinds}")
    return samples


class Validation:
    """The validation of one run. Without --val_data it is never due."""

    def __init__(
        self, config: TrainConfig, world: World, pool: DecoderPool, tokenizer, prompt_options: dict,
        samples: list[Sample],
    ):
        self.config, self.world, self.pool, self.tokenizer = config, world, pool, tokenizer
        self.prompt_options, self.samples = prompt_options, samples
        self.is_first = True

    def is_due(self, step: int, total_steps: int) -> bool:
        """Whether to validate after so many steps: every --val_every, at the start, at the end."""
        return bool(self.samples) and (step % self.config.val_every == 0 or step == total_steps)

    def __call__(self, policy) -> dict | None:
        """Validate.

        Returns:
            on rank 0, None elsewhere: summary of all rows, by_type with the same, and unusable:
            row, problem_id, order and error of each sample that could not be used.
        Raises:
            UserError, on rank 0: the first validation finds no sample that can be used.
        """
        scores, unusable = {}, []
        for order in ("ordered", "shuffled"):
            scores[order], errors = self._scores(policy, order)
            unusable += errors
        if not self.world.is_main:
            return None
        reasons = "; ".join(sorted({record["error"] for record in unusable})[:3])
        require(scores["ordered"] or not self.is_first,
                f"--val_data {self.config.val_data}: no sample can be used: {reasons}")  # fmt: skip
        self.is_first = False
        rows: dict[str, set[int]] = {}
        for sample in self.samples:
            rows.setdefault(sample.problem_type, set()).add(sample.row)
        by_type = {kind: summary(scores, rows[kind]) for kind in sorted(rows)}
        everything = summary(scores, set().union(*rows.values()))
        return {**everything, "by_type": by_type, "unusable": unusable}

    def _scores(self, policy, order: str) -> tuple[dict[int, float], list[dict]]:
        """Rank 0: the score of each usable sample by row, and the others; elsewhere nothing."""
        samples = [sample for sample in self.samples if order == "ordered" or sample.is_video]
        settings = AnswerSettings(
            self.config.limits(), self.prompt_options, order,
            max_new_tokens=self.config.max_new_tokens,
        )  # fmt: skip
        batches = list(enumerate(fixed_batches(samples, BATCH_SIZE)))
        mine = batches[self.world.rank :: self.world.size]
        scores, unusable = {}, []
        with unsharded(policy):
            for _, answers in answer(policy, self.tokenizer, mine, self.pool, settings):
                for found in answers:
                    sample = found.sample
                    if found.error is None:
                        scores[sample.row] = score_item(found.rollout.texts[0], sample)
                    else:
                        unusable.append({"row": sample.row, "problem_id": sample.problem_id,
                                         "order": order, "error": found.error})  # fmt: skip
        ranks = gather_to_main((scores, unusable), self.world) or []
        scores = dict(sorted(pair for part, _ in ranks for pair in part.items()))
        unusable = [record for _, part in ranks for record in part]
        return scores, sorted(unusable, key=lambda record: record["row"])


def summary(scores: dict[str, dict[int, float]], rows: set[int]) -> dict[str, float | None]:
    """Means over some rows, from the scores in each order by row; None where no row could be used.

    gap: the difference over the rows that could be used in both orders.
    """
    ordered, shuffled = (
        {row: score for row, score in scores[order].items() if row in rows}
        for order in ("ordered", "shuffled")
    )
    gaps = [ordered[row] - shuffled[row] for row in ordered if row in shuffled]
    return {
        "n": len(ordered), "accuracy": mean(ordered.values()), "n_shuffled": len(shuffled),
        "accuracy_shuffled": mean(shuffled.values()), "gap": mean(gaps),
    }  # fmt: skip


def mean(values: Collection[float]) -> float | None:
    return sum(values) / len(values) if values else None
