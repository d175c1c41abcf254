"""From samples to responses and their records, for eval.py, validation and annotate.py.

Which items share a batch depends on the data and the batch size alone, neither on the number of
ranks nor on where an interrupted run resumes: either could change the last digit of a logit, and
with it a near-tie of greedy decoding.
"""

from collections.abc import Callable, Iterator
from concurrent.futures import Future
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from functools import partial

import torch

from config import MediaConfig
from data import (
    Prompt,
    Sample,
    make_prompt,
    require_no_vision_tokens,
    require_solution,
    submit_decode,
)
from evaluation.results import Batch, file_state, fingerprint, model_path
from evaluation.scores import mean_relative_accuracy
from infra.distributed import World, log, on_main
from infra.errors import UserError
from infra.video import DecoderPool
from model import load_model, load_normalisation, load_tokenizer, require_room, shard
from rewards import accuracy_reward, extract_answer, parse_float
from sampling import Rollout, derive_seed, is_sharded, sample_groups

BATCHES_AHEAD = 2  # decoded in advance
RESPONSE = 1  # the third part of a random number's key: (seed, row) alone is the shuffle's
EXACT_TYPES = ("multiple choice", "numerical")  # of which accuracy is the mean
PATIENCE = 6 * 3600  # seconds that a rank waits for the others, whose batches may take longer


@dataclass(frozen=True)
class AnswerSettings:
    """How samples are shown and answered. The defaults decode as Section 4.1.

    limits: of data.submit_decode. prompt_options: template, mean and std of data.make_prompt.
    order: of the frames. num_samples: responses per sample.
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
    """The responses to a sample; or None, why it cannot be used, and which version of its file."""

    sample: Sample
    rollout: Rollout | None
    error: str | None = None
    file_state: list[int] | None = None  # results.file_state, from before it was decoded


# --------------------------------------------------------------------------------------- answering


def fixed_batches(samples: list[Sample], batch_size: int) -> list[list[Sample]]:
    """All samples in batches of `batch_size`, the last one perhaps smaller.

    Samples on one file stand next to each other, files in the order in which they first appear, so
    that most questions on a video share a batch, its decoded frames and its vision features.
    """
    files: dict[tuple, list[Sample]] = {}
    for sample in samples:
        files.setdefault(_file(sample), []).append(sample)
    ordered = [sample for those in files.values() for sample in those]
    return [ordered[start : start + batch_size] for start in range(0, len(ordered), batch_size)]


def _file(sample: Sample) -> tuple[str, str]:
    return sample.data_type, sample.path  # a .gif may be asked for as video and as image


def answer(
    model, tokenizer, batches: list[Batch], pool: DecoderPool, settings: AnswerSettings
) -> Iterator[tuple[int, list[Answer]]]:
    """Answer batches one after the other.

    With whole weights there is no collective inside. With sharded ones every rank must be given as
    many batches as the others, some perhaps empty: for those it generates from a dummy prompt.

    Args:
        batches: the numbers and samples of this rank's share of the fixed batches.
    Yields:
        the number of each batch that is not empty, and its Answers. A sample whose file or row
        cannot be used has an error instead of responses.
    """
    decoding = settings.max_new_tokens, settings.temperature, settings.top_p
    for number, samples, frames in _decode_ahead(batches, pool, settings.limits):
        prompts, answers, shown = [], [], {}
        for sample in samples:
            state, decoded = frames[_file(sample)]
            try:
                prompt = _prompt(sample, decoded, tokenizer, settings)
                require_room(prompt, settings.max_new_tokens, model.config)
            except UserError as error:
                answers.append(Answer(sample, None, str(error), state))
                continue
            if prompt.order != "shuffled":  # the same frames: the same tensor, encoded once
                pixels = shown.setdefault(_file(sample), prompt.pixel_values)
                prompt = replace(prompt, pixel_values=pixels)
            prompts.append(prompt)
        keys = [
            [(settings.seed, prompt.sample.row, RESPONSE, k) for k in range(settings.num_samples)]
            for prompt in prompts
        ]
        if prompts:
            rollouts = sample_groups(model, tokenizer, prompts, keys, *decoding)
            answers += [Answer(rollout.prompt.sample, rollout) for rollout in rollouts]
        elif is_sharded(model):
            dummy = _dummy_prompt(tokenizer, settings.prompt_options)
            sample_groups(model, tokenizer, [dummy], [[(0,)]], *decoding)
        if samples:
            yield number, answers


def _decode_ahead(
    batches: list[Batch], pool: DecoderPool, limits: dict[str, int]
) -> Iterator[tuple[int, list[Sample], dict[tuple, tuple]]]:
    """Each batch, and for its files and the next batches' their state and the Future of their
    frames. A file is decoded once for all of these batches."""
    frames: dict[tuple, tuple[list[int] | None, Future]] = {}
    for place, (number, samples) in enumerate(batches):
        window = [sample for _, batch in batches[place : place + 1 + BATCHES_AHEAD]
                  for sample in batch]  # fmt: skip
        for sample in window:
            if _file(sample) not in frames:
                state = file_state(sample.path)
                frames[_file(sample)] = state, submit_decode(pool, sample, limits)
        frames = {_file(sample): frames[_file(sample)] for sample in window}
        yield number, samples, frames


def _prompt(sample: Sample, frames: Future, tokenizer, settings: AnswerSettings) -> Prompt:
    require_solution(sample)
    require_no_vision_tokens(sample)
    generator = torch.Generator().manual_seed(derive_seed(settings.seed, sample.row))
    return make_prompt(
        sample, tokenizer, frames.result(), settings.order, generator, **settings.prompt_options
    )


def _dummy_prompt(tokenizer, prompt_options: dict) -> Prompt:
    """The smallest prompt with an image, so that a rank without work joins the collectives."""
    sample = Sample(
        problem_id=0, problem="-", data_type="image", problem_type="free-form", options=(),
        solution="", path="", data_source="", process="", row=0,
    )  # fmt: skip
    black = torch.zeros(1, 28, 28, 3, dtype=torch.uint8)
    return make_prompt(sample, tokenizer, black, **prompt_options)


def load_for_answers(name: str, world: World, sharded: bool = False):
    """A model to generate with: whole on every rank, or each rank with its shard of the weights."""
    sharding = None
    if sharded:
        log("--sharded_generation: each token gathers all weights from all ranks, which is slow")
        sharding = partial(shard, world=world, trainable=False)
    return load_model(name, world.device, world.dtype, sharding).eval()


@contextmanager
def responder(config, world: World, template: str) -> Iterator[Callable]:
    """Load the model of an EvalConfig or AnnotateConfig and start the decoders.

    Yields:
        answers(batches, order="ordered", num_samples=1): as answer().
    """
    tokenizer = load_tokenizer(config.model)
    prompt_options = {"template": template, **load_normalisation(config.model)}
    model = load_for_answers(config.model, world, config.sharded_generation)
    with DecoderPool(config.num_workers, config.decode_timeout) as pool:

        def answers(batches: list[Batch], order: str = "ordered", num_samples: int = 1):
            settings = AnswerSettings(
                config.limits(), prompt_options, order, num_samples, config.max_new_tokens,
                config.temperature, config.top_p, config.seed,
            )  # fmt: skip
            return answer(model, tokenizer, batches, pool, settings)

        yield answers


def provenance(
    config: MediaConfig, ignored: tuple[str, ...], world: World, template: str
) -> dict:  # fmt: skip
    """What records depend on besides the data: all flags but the ignored ones, the template, the
    device, and the fingerprint of the model."""
    flags = {name: value for name, value in asdict(config).items() if name not in ignored}
    return flags | {
        "template": template, "device": f"{world.device.type} {world.dtype}",
        "model": model_path(config.model),
        # One rank reads all weights.
        "model_fingerprint": on_main(world, lambda: fingerprint(config.model)),
    }  # fmt: skip


# ----------------------------------------------------------------------------------------- records


def score_item(response: str, sample: Sample, strict: bool = False) -> float:
    """The score of a response in [0, 1]: MRA for regression, else the reward of Section 3.1.

    strict: MRA with <, as the paper's authors compute it, instead of <=.
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
    names = ("row", "problem_id", "problem", "data_type", "problem_type", "options", "path",
             "data_source", "extra", "solution")  # fmt: skip
    record = {name: getattr(sample, name) for name in names} | {
        "order": order, "error": answer.error, "file_state": answer.file_state,
        **dict.fromkeys(("response", "answer", "length", "ended", "score", "score_paper")),
    }  # fmt: skip
    if rollout is None:
        return record
    text = rollout.texts[0]
    return record | {
        "response": text, "answer": extract_answer(text), "length": int(rollout.lengths[0]),
        "ended": bool(rollout.ended[0]), "score": score_item(text, sample),
        "score_paper": score_item(text, sample, strict=True),
    }  # fmt: skip


def summarise(items: list[dict], is_toy: bool = False) -> dict:
    """Accuracy over usable items, by type, and overall those of EXACT_TYPES.

    The toy's overall accuracy is over video multiple choice: images do not feel the order.
    """
    usable = [item for item in items if item["score"] is not None]
    by_type: dict[str, list[float]] = {}
    for item in usable:
        by_type.setdefault(item["problem_type"], []).append(item["score"])
    types = EXACT_TYPES[:1] if is_toy else EXACT_TYPES
    counted = [item["score"] for item in usable if item["problem_type"] in types
               and (item["data_type"] == "video" or not is_toy)]  # fmt: skip
    return {
        "n": len(counted),
        "accuracy": sum(counted) / len(counted) if counted else None,
        "by_type": {
            kind: {"n": len(scores), "score": sum(scores) / len(scores)}
            for kind, scores in sorted(by_type.items())
        },
        "num_items": len(items),
        "unusable": [{key: item[key] for key in ("row", "problem_id", "path", "error")}
                     for item in items if item["score"] is None],  # fmt: skip
    }
