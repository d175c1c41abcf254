"""Validation during training: accuracy on ordered and on shuffled frames, and the gap between them.

The same samples, shuffles and greedy decoding (Section 4.1) every time, so that two steps of a run,
and two runs, can be compared.
"""

from config import TrainConfig
from data import Sample, load_samples
from evaluation.answering import Answer, AnswerSettings, answer, fixed_batches, score_item
from infra.distributed import World, gather_to_main, unsharded
from infra.video import DecoderPool

BATCH_SIZE = 16  # samples that are generated together, per rank


class Validation:
    """The validation of one run. Without --val_data it is never due.

    Raises:
        UserError: --val_data cannot be used; names the file or its row.
    """

    def __init__(
        self, config: TrainConfig, world: World, pool: DecoderPool, tokenizer, prompt_options: dict,
        samples: list[Sample],
    ):
        self.config, self.world, self.pool, self.tokenizer = config, world, pool, tokenizer
        self.prompt_options = prompt_options
        self.samples = samples

    def is_due(self, step: int, total_steps: int) -> bool:
        """Whether to validate after so many steps: every --val_every, at the start, at the end."""
        return bool(self.samples) and (step % self.config.val_every == 0 or step == total_steps)

    def __call__(self, policy) -> dict | None:
        """Rank 0: accuracy, accuracy_shuffled and gap, also by_type; None elsewhere.

        accuracy: mean score over all samples. accuracy_shuffled, gap: over the videos alone.
        """
        scores = {order: self._scores(policy, order) for order in ("ordered", "shuffled")}
        if not self.world.is_main:
            return None
        kinds = sorted({sample.problem_type for sample in self.samples})
        by_type = {}
        for kind in kinds:
            rows = {sample.row for sample in self.samples if sample.problem_type == kind}
            by_type[kind] = {"n": len(rows), **summary(scores, rows)}
        rows = {sample.row for sample in self.samples}
        return {"n": len(rows), **summary(scores, rows), "by_type": by_type}

    def _scores(self, policy, order: str) -> dict[int, float]:
        """Rank 0: the score of every sample that can be used, by row; elsewhere nothing."""
        samples = [sample for sample in self.samples if order == "ordered" or sample.is_video]
        settings = AnswerSettings(
            self.config.limits(), self.prompt_options, order,
            max_new_tokens=self.config.max_new_tokens,
        )  # fmt: skip
        batches = list(enumerate(fixed_batches(samples, BATCH_SIZE)))
        mine = batches[self.world.rank :: self.world.size]
        answers: list[Answer] = []
        with unsharded(policy):
            for _, batch in answer(policy, self.tokenizer, mine, self.pool, settings):
                answers += batch
        scores = {
            answer.sample.row: score_item(answer.rollout.texts[0], answer.sample)
            for answer in answers
            if answer.rollout is not None
        }
        everyone = gather_to_main(scores, self.world)
        return {row: score for rank in everyone or [] for row, score in rank.items()}


def load_validation(config: TrainConfig) -> list[Sample]:
    """The samples of --val_data; none without it."""
    if not config.val_data:
        return []
    samples = load_samples(config.val_data, config.data_root or None)
    return [sample for sample in samples if sample.data_type in config.data_types]


def summary(scores: dict[str, dict[int, float]], rows: set[int]) -> dict[str, float | None]:
    """accuracy, accuracy_shuffled and gap over some rows, from the scores in each order by row."""

    def mean(order: str, chosen: set[int]) -> float | None:
        values = [score for row, score in scores[order].items() if row in chosen]
        return sum(values) / len(values) if values else None

    shuffled = mean("shuffled", rows)
    gap = None
    if shuffled is not None:
        gap = mean("ordered", rows & scores["shuffled"].keys()) - shuffled
    return {"accuracy": mean("ordered", rows), "accuracy_shuffled": shuffled, "gap": gap}
