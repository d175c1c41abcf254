"""answering.py: fixed batches, shared frames and vision features, unusable samples, scores."""

import dataclasses
import os

import plain
import pytest
import torch
from standin import rollout_of

from data import Sample, load_samples, make_prompt
from evaluation import answering
from evaluation.answering import (
    Answer,
    AnswerSettings,
    _decode_ahead,
    answer,
    fixed_batches,
    item_record,
    score_item,
    summarise,
)
from infra.video import DecoderPool
from model import group_logprobs, load_model, load_tokenizer
from sampling import sample_groups

LIMITS = {"max_frames": 8, "min_pixels": 3136, "max_pixels": 200704, "image_max_pixels": 200704}
SETTINGS = AnswerSettings(LIMITS, {}, max_new_tokens=6)


@pytest.fixture(scope="module")
def tokenizer(base):
    return load_tokenizer(base)


@pytest.fixture(scope="module")
def model(base):
    return plain.shake(load_model(base, torch.device("cpu"))).eval()


def make_sample(row, path="x.mp4", **changes):
    fields = {
        "problem_id": row, "problem": "What?", "data_type": "video", "options": (),
        "problem_type": "free-form", "solution": "a square", "path": path, "data_source": "hand",
        "process": "", "row": row,
    }  # fmt: skip
    return Sample(**fields | changes)


# ----------------------------------------------------------------------------------------- batches


@pytest.mark.parametrize(
    "paths, batch_size, expected",
    [
        pytest.param("abcde", 2, [[0, 1], [2, 3], [4]], id="the-last-is-smaller"),
        pytest.param("abbaa", 3, [[0, 3, 4], [1, 2]], id="videos-by-first-appearance"),
        pytest.param("aaaaa", 2, [[0, 1], [2, 3], [4]], id="a-video-over-several-batches"),
    ],
)
def test_questions_on_a_video_share_a_batch(paths, batch_size, expected):
    samples = [make_sample(row, path) for row, path in enumerate(paths)]
    batches = fixed_batches(samples, batch_size)
    assert [[sample.row for sample in batch] for batch in batches] == expected


class Asked:
    """A decoder pool that notes what it is asked for, and never decodes."""

    def __init__(self):
        self.paths = []

    def submit(self, kind, path, **limits):
        self.paths.append(path)
        return object()


def test_videos_are_decoded_once_and_two_batches_ahead():
    samples = [make_sample(row, path) for row, path in enumerate("aabcccdeef")]
    batches = list(enumerate(fixed_batches(samples, 2)))  # aa bc cc de ef
    pool, seen = Asked(), []
    for number, _, frames in _decode_ahead(batches, pool, LIMITS):
        seen.append((number, "".join(pool.paths), "".join(path for _, path in frames)))
    assert seen == [
        (0, "abc", "abc"), (1, "abcde", "bcde"), (2, "abcdef", "cdef"), (3, "abcdef", "def"),
        (4, "abcdef", "ef"),
    ]  # fmt: skip


def test_shared_vision_gives_each_prompt_its_own_logits(model, tokenizer, toy_folder):
    """Three questions on one video, whose prompts hold one tensor, and one on an image: against
    the plain pass of each prompt by itself, and the gradients too."""
    samples = load_samples(toy_folder / "runs/toy/data/rl.json")
    video = next(sample for sample in samples if sample.is_video)
    image = next(sample for sample in samples if not sample.is_video)
    texts = ["What happens in the video?", "Which way does it go, and where does it stop?"]
    asked = [dataclasses.replace(video, problem=text, options=()) for text in texts]
    each = [make_prompt(sample, tokenizer) for sample in [*asked, image, video]]
    pixels = each[0].pixel_values
    shared = [dataclasses.replace(prompt, pixel_values=pixels) if prompt.is_video else prompt
              for prompt in each]  # fmt: skip
    ids = torch.randint(500, (4, 2, 5), generator=torch.Generator().manual_seed(0))
    mask = torch.ones_like(ids).bool()

    def passes(prompts):
        model.zero_grad()
        logps = group_logprobs(model, prompts, ids, mask)
        logps.sum().backward()
        return logps, [parameter.grad.clone() for parameter in model.parameters()]

    logps, gradients = passes(shared)
    for prompt, found, responses in zip(each, logps, ids, strict=True):
        for logp, response in zip(found, responses, strict=True):
            expected = plain.logprobs(model, prompt, response)
            torch.testing.assert_close(logp, expected, atol=2e-5, rtol=0)
    torch.testing.assert_close(gradients, passes(each)[1], atol=1e-4, rtol=1e-4)
    model.zero_grad(set_to_none=True)


# --------------------------------------------------------------------------------------- answers


@pytest.fixture(scope="module")
def samples(toy_folder, tmp_path_factory):
    """Seven samples: a video with two questions, a broken file, and three rows that cannot be
    used."""
    rows = load_samples(toy_folder / "runs/toy/data/rl.json")
    video = next(sample for sample in rows if sample.is_video)
    image = next(sample for sample in rows if not sample.is_video)
    broken = tmp_path_factory.mktemp("broken") / "x.png"
    broken.write_bytes(b"no image")
    os.utime(broken, ns=(5, 5))
    choice = {"problem_type": "multiple choice", "options": ("A. left", "B. right")}
    rows = [
        video,
        dataclasses.replace(image, path=str(broken)),
        dataclasses.replace(video, problem="Where does it go?"),
        dataclasses.replace(video, **choice, solution="left"),
        dataclasses.replace(video, problem="What is <|video_pad|>?"),
        image,
        dataclasses.replace(video, problem="word " * 5000),
    ]
    return [dataclasses.replace(row, row=number) for number, row in enumerate(rows)]


def answers_to(model, tokenizer, batches, settings=SETTINGS):
    with DecoderPool(1, 60) as pool:
        return list(answer(model, tokenizer, batches, pool, settings))


def test_answers_and_what_cannot_be_used(model, tokenizer, samples, monkeypatch):
    seen = []

    def see(*arguments, **named):
        seen.append(arguments[2])
        return sample_groups(*arguments, **named)

    monkeypatch.setattr(answering, "sample_groups", see)
    ((number, answers),) = answers_to(model, tokenizer, [(4, samples)])
    assert number == 4
    found = {one.sample.row: one for one in answers}
    reasons = {1: "not", 3: "option letter", 4: "vision token", 6: "positions"}
    for row in range(7):
        if row in reasons:
            assert reasons[row] in found[row].error
            record = item_record(found[row], "ordered")
            assert (record["error"], record["score"]) == (found[row].error, None)
        else:
            assert found[row].rollout.prompt.sample is found[row].sample is samples[row]
    assert found[1].file_state == [8, 5] and found[0].file_state is None
    (prompts,) = seen
    assert [prompt.sample.row for prompt in prompts] == [0, 2, 5]
    assert prompts[0].pixel_values is prompts[1].pixel_values


@pytest.mark.parametrize("order, shares", [("reversed", True), ("shuffled", False)])
def test_frames_in_the_same_order_are_shared(model, tokenizer, samples, monkeypatch, order, shares):
    """A shuffle is drawn for each row, so that two questions see two orders."""
    seen = []
    monkeypatch.setattr(answering, "sample_groups", lambda m, t, prompts, *_: seen.extend(prompts)
                        or [])  # fmt: skip
    settings = dataclasses.replace(SETTINGS, order=order)
    answers_to(model, tokenizer, [(0, [samples[0], samples[2]])], settings)
    one, other = (prompt.pixel_values for prompt in seen)
    assert (one is other) == shares == torch.equal(one, other)


def test_several_responses_differ_and_do_not_depend_on_the_batch(model, tokenizer, samples):
    settings = dataclasses.replace(SETTINGS, num_samples=4, temperature=1.0, top_p=1.0)
    both = [samples[0], samples[5]]
    ((_, together),) = answers_to(model, tokenizer, [(0, both)], settings)
    alone = answers_to(model, tokenizer, [(0, both[:1]), (1, both[1:])], settings)
    assert [one.rollout.texts for one in together] == [one.rollout.texts for _, (one,) in alone]
    for one in together:
        assert len(set(one.rollout.texts)) == 4


# ---------------------------------------------------------------------------------------- records


def test_a_record_by_hand():
    sample = make_sample(
        7, "/d/x.mp4", problem_type="regression", solution="<answer>10</answer>",
        extra={"original_question_type": "object_counting"},
    )  # fmt: skip
    text = "<think>So.</think><answer>9.5</answer>"
    assert item_record(Answer(sample, rollout_of(None, text, length=3)), "reversed") == {
        "row": 7, "problem_id": 7, "problem": "What?", "data_type": "video",
        "problem_type": "regression", "options": (), "path": "/d/x.mp4", "data_source": "hand",
        "extra": {"original_question_type": "object_counting"}, "order": "reversed",
        "solution": "<answer>10</answer>", "error": None, "file_state": None,
        "response": text, "answer": "9.5",
        "length": 3, "ended": True, "score": 1.0, "score_paper": 0.9,
    }  # fmt: skip


@pytest.mark.parametrize(
    "problem_type, solution, response, expected",
    [
        pytest.param("multiple choice", "B", "<answer>(b) left</answer>", 1.0, id="choice"),
        # Here the reward of Section 3.1 would be 0.88.
        pytest.param("regression", "<answer>25</answer>", "<answer>28</answer>", 0.8, id="mra"),
        pytest.param("regression", "1,000", "<answer>1,010</answer>", 1.0, id="mra-commas"),
        pytest.param("regression", "10", "10", 0.0, id="mra-without-tags"),
        pytest.param("regression", "10", "<answer>1e999</answer>", 0.0, id="mra-infinite"),
        pytest.param("regression", "many", "<answer>10</answer>", 0.0, id="mra-no-reference"),
    ],
)
def test_score_of_each_type(problem_type, solution, response, expected):
    sample = make_sample(0, problem_type=problem_type, solution=solution)
    assert score_item(response, sample) == pytest.approx(expected)


def make_item(problem_type, score, data_type="video", row=0):
    error = None if score is not None else "gone"
    return {"problem_id": 7, "row": row, "problem_type": problem_type, "score": score,
            "data_type": data_type, "path": "x.mp4", "error": error}  # fmt: skip


ITEMS = [
    make_item("multiple choice", 1.0), make_item("multiple choice", 0.0),
    make_item("multiple choice", 1.0, "image"), make_item("numerical", 1.0, "image"),
    make_item("regression", 0.75), make_item("regression", 0.25), make_item("OCR", 0.25, "image"),
    make_item("multiple choice", None, row=8),
]  # fmt: skip


@pytest.mark.parametrize(
    "is_toy, num_counted, accuracy",
    [
        pytest.param(False, 4, 0.75, id="choices-and-numbers"),
        pytest.param(True, 2, 0.5, id="toy-video-choices"),
    ],
)
def test_a_summary_by_hand(is_toy, num_counted, accuracy):
    assert summarise(ITEMS, is_toy) == {
        "n": num_counted, "accuracy": accuracy, "num_items": 8,
        "by_type": {
            "OCR": {"n": 1, "score": 0.25}, "multiple choice": {"n": 3, "score": 2 / 3},
            "numerical": {"n": 1, "score": 1.0}, "regression": {"n": 2, "score": 0.5},
        },
        "unusable": [{"row": 8, "problem_id": 7, "path": "x.mp4", "error": "gone"}],
    }  # fmt: skip
