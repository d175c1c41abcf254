"""From samples to responses and their records, as eval.py, a training's validation and annotate.py
need them.

    fixed_batches   the samples, questions on one clip next to each other, cut into batches
    answer          batches to responses, the media decoded ahead
    item_record     a response as one line of a results file, scored
    summarise       accuracy by problem type

A whole batch is the unit of work: which items share a batch depends on the data and the batch size
alone, neither on the number of ranks nor on where an interrupted run goes on. So neither changes a
logit in its last digit, which could turn a near-tie of greedy decoding.
"""

from collections import deque
from collections.abc import Iterator
from concurrent.futures import Future
from dataclasses import dataclass, replace
from functools import partial

import torch

from data import (
    Prompt,
    Sample,
    make_prompt,
    require_no_vision_tokens,
    require_solution,
    submit_decode,
)
from evaluation.scores import mean_relative_accuracy
from infra.distributed import World, log
from infra.errors import UserError
from infra.video import DecoderPool
from model import load_model, require_room, shard
from rewards import accuracy_reward, extract_answer, parse_float
from sampling import Rollout, derive_seed, is_sharded, sample_groups

BATCHES_AHEAD = 2  # decoded in advance
RESPONSE = 1  # the third part of a random number's key: (seed, row) alone is the shuffle's

Batch = tuple[int | None, list[Sample]]  # its number among the fixed batches


@dataclass(frozen=True)
class AnswerSettings:
    """How samples are shown and answered.

    limits: of data.submit_decode. prompt_options: template, mean and std of data.make_prompt.
    order: of the frames. num_samples: responses to each sample. The defaults decode as Section 4.1.
    """

    limits: dict[str, int]
    prompt_options: dict
    order: str = "ordered"
    num_samples: int = 1
    max_new_tokens: int = 768
    temperature: float = 0.01
    top_p: float = 0.001
    seed: int = 0


@dataclass(frozen=True)
class Answer:
    """The responses to a sample; or None, and why it cannot be used."""

    sample: Sample
    rollout: Rollout | None
    error: str | None = None


# --------------------------------------------------------------------------------------- answering


def fixed_batches(samples: list[Sample], batch_size: int) -> list[list[Sample]]:
    """All samples in batches of `batch_size`, the last one maybe smaller.

    Samples on one clip lie next to each other, in the order of their rows; clips in the order in
    which they first appear. So most questions on a clip share a batch, and with it the decoded
    frames and the vision features.
    """
    clips: dict[tuple, list[Sample]] = {}
    for sample in samples:
        clips.setdefault(_clip(sample), []).append(sample)
    ordered = [sample for clip in clips.values() for sample in clip]
    return [ordered[cut : cut + batch_size] for cut in range(0, len(ordered), batch_size)]


def _clip(sample: Sample) -> tuple[str, str]:
    return sample.data_type, sample.path


def answer(
    model, tokenizer, batches: list[Batch], pool: DecoderPool, settings: AnswerSettings
) -> Iterator[tuple[int, list[Answer]]]:
    """Answer batches one after the other.

    With whole weights (`unsharded`, or a model that was never sharded) there is no collective
    inside. With sharded weights every rank must be given as many batches as the others, some of
    them maybe empty: it then takes part with a blank prompt whose response is dropped.

    Args:
        batches: the numbers and samples of this rank's part of the fixed batches.
    Yields:
        the number of each batch that is not empty, and its Answers. A sample whose file or row
        cannot be used (MediaError, UnusableSample, a vision token in its text, a solution that no
        answer can match) has an error in the place of responses.
    """
    for number, samples, frames in _decode_ahead(batches, pool, settings.limits):
        prompts, answers, shown = [], [], {}
        for sample in samples:
            try:
                prompt = _prompt(sample, frames[_clip(sample)], tokenizer, settings)
                require_room(prompt, settings.max_new_tokens, model.config)
            except UserError as error:  # MediaError and UnusableSample are such, too
                answers.append(Answer(sample, None, str(error)))
                continue
            if prompt.order != "shuffled":  # in the same order: the same tensor, looked at once
                pixels = shown.setdefault(_clip(sample), prompt.pixel_values)
                prompt = replace(prompt, pixel_values=pixels)
            prompts.append(prompt)
        keys = [
            [(settings.seed, prompt.sample.row, RESPONSE, k) for k in range(settings.num_samples)]
            for prompt in prompts
        ]
        decoding = settings.max_new_tokens, settings.temperature, settings.top_p
        if prompts:
            rollouts = sample_groups(model, tokenizer, prompts, keys, *decoding)
            answers += [Answer(rollout.prompt.sample, rollout) for rollout in rollouts]
        elif is_sharded(model):
            blank = _blank_prompt(tokenizer, settings.prompt_options)
            # As long as the others: this rank goes on for as long as one of them does.
            sample_groups(model, tokenizer, [blank], [[(0,)]], *decoding)
        if samples:
            yield number, answers


def _decode_ahead(
    batches: list[Batch], pool: DecoderPool, limits: dict[str, int]
) -> Iterator[tuple[int, list[Sample], dict[tuple, Future]]]:
    """Each batch with the frames of its clips, which may still be in the making.

    A clip is decoded once for a batch, and once for batches that follow each other.
    """
    waiting: deque[dict[tuple, Future]] = deque()  # of the present batch and those to come
    for place, (number, samples) in enumerate(batches):
        for _, later in batches[place + len(waiting) : place + 1 + BATCHES_AHEAD]:
            known = {clip: future for frames in waiting for clip, future in frames.items()}
            frames: dict[tuple, Future] = {}
            for sample in later:
                clip = _clip(sample)
                if clip not in frames:
                    frames[clip] = known.get(clip) or submit_decode(pool, sample, limits)
            waiting.append(frames)
        yield number, samples, waiting.popleft()


def _prompt(sample: Sample, frames: Future, tokenizer, settings: AnswerSettings) -> Prompt:
    """A sample ready for the model; UserError if it cannot be used."""
    require_solution(sample)
    require_no_vision_tokens(sample)
    generator = torch.Generator().manual_seed(derive_seed(settings.seed, sample.row))
    return make_prompt(
        sample, tokenizer, frames.result(), settings.order, generator, **settings.prompt_options
    )


def _blank_prompt(tokenizer, prompt_options: dict) -> Prompt:
    """The smallest prompt with a picture, for a rank that only keeps the others company."""
    sample = Sample(
        problem_id=0, problem="-", data_type="image", problem_type="free-form", options=(),
        solution="", path="", data_source="", process="", row=0,
    )  # fmt: skip
    black = torch.zeros(1, 28, 28, 3, dtype=torch.uint8)
    return make_prompt(sample, tokenizer, black, **prompt_options)


def load_for_answers(name: str, world: World, sharded: bool = False):
    """A model to generate with: whole on every rank, or each rank with its part of the weights."""
    sharding = None
    if sharded:
        log("--sharded_generation: each token gathers all weights from all ranks, which is slow")
        sharding = partial(shard, world=world, trainable=False)
    return load_model(name, world.device, world.dtype, sharding).eval()


# ----------------------------------------------------------------------------------------- records


def score_item(response: str, sample: Sample, strict: bool = False) -> float:
    """The score of a response in [0, 1]: MRA for regression, else the reward of Section 3.1.

    strict: MRA with <, as the paper's authors compute it, in the place of <=.
    """
    if sample.problem_type != "regression":
        return accuracy_reward(response, sample.solution, sample.problem_type)
    found = parse_float(extract_answer(response) or "")
    reference = parse_float(extract_answer(sample.solution) or sample.solution)
    if found is None or reference is None:
        return 0.0
    return mean_relative_accuracy(found, reference, strict)


def item_record(answer: Answer, order: str) -> dict:
    """One line of the results: an item, its (first) response and its scores, None if unusable.

    score is as the benchmarks define it, score_paper as the paper's authors do (scores.py).
    """
    sample, rollout = answer.sample, answer.rollout
    record = {
        "row": sample.row, "problem_id": sample.problem_id, "problem": sample.problem,
        "data_type": sample.data_type, "problem_type": sample.problem_type,
        "options": list(sample.options), "path": sample.path, "data_source": sample.data_source,
        "extra": sample.extra, "order": order, "solution": sample.solution, "error": answer.error,
        "response": None, "answer": None, "length": None, "ended": None, "score": None,
        "score_paper": None,
    }  # fmt: skip
    if rollout is not None:
        text = rollout.texts[0]
        record |= {
            "response": text, "answer": extract_answer(text), "length": int(rollout.lengths[0]),
            "ended": bool(rollout.ended[0]), "score": score_item(text, sample),
            "score_paper": score_item(text, sample, strict=True),
        }  # fmt: skip
    return record


def summarise(items: list[dict], is_toy: bool = False) -> dict:
    """Accuracy, by type and overall. Items that cannot be used have no score and are listed.

    accuracy: over multiple choice and numerical items that could be shown to the model. The toy's
    is over video multiple choice, since images do not feel the order of frames.
    """

    def in_accuracy(item: dict) -> bool:
        if is_toy:
            return item["problem_type"] == "multiple choice" and item["data_type"] == "video"
        return item["problem_type"] in ("multiple choice", "numerical")

    def mean(chosen: list[dict]) -> float | None:
        scores = [item["score"] for item in chosen]
        return sum(scores) / len(scores) if scores else None

    usable = [item for item in items if item["score"] is not None]
    types = sorted({item["problem_type"] for item in usable})
    by_type = {kind: [item for item in usable if item["problem_type"] == kind] for kind in types}
    counted = [item for item in usable if in_accuracy(item)]
    return {
        "n": len(counted),
        "accuracy": mean(counted),
        "by_type": {
            kind: {"n": len(those), "score": mean(those)} for kind, those in by_type.items()
        },
        "num_items": len(items),
        "unusable": [
            {key: item[key] for key in ("row", "problem_id", "error")}
            for item in items
            if item["score"] is None
        ],
    }
