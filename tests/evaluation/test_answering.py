"""answering.py: fixed batches, clips decoded and looked at once, and what cannot be used."""

import dataclasses
import json

import plain
import pytest
import torch

import data
from data import Sample, load_samples, make_prompt
from evaluation import answering
from evaluation.answering import (
    Answer,
    AnswerSettings,
    _blank_prompt,
    _decode_ahead,
    answer,
    fixed_batches,
    item_record,
    score_item,
)
from evaluation.scores import VSI_TASKS, score_benchmark
from infra.video import DecoderPool
from model import group_logprobs, load_model, load_tokenizer, pack_groups
from sampling import Rollout, draw_tokens, sample_groups

LIMITS = {"max_frames": 8, "min_pixels": 3136, "max_pixels": 200704, "image_max_pixels": 200704}
SETTINGS = AnswerSettings(LIMITS, {}, max_new_tokens=6)


@pytest.fixture(scope="module")
def base(toy_folder):
    return str(toy_folder / "runs/toy/base")


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
        pytest.param("abcd", 2, [[0, 1], [2, 3]], id="one-question-each"),
        pytest.param("abcde", 2, [[0, 1], [2, 3], [4]], id="the-last-is-smaller"),
        pytest.param("abab", 2, [[0, 2], [1, 3]], id="questions-of-a-clip-meet"),
        pytest.param("abbaa", 3, [[0, 3, 4], [1, 2]], id="clips-by-first-appearance"),
        pytest.param("aaaaa", 2, [[0, 1], [2, 3], [4]], id="a-clip-over-several-batches"),
        pytest.param("ab", 9, [[0, 1]], id="one-batch"),
    ],
)
def test_fixed_batches(paths, batch_size, expected):
    samples = [make_sample(row, path) for row, path in enumerate(paths)]
    batches = fixed_batches(samples, batch_size)
    assert [[sample.row for sample in batch] for batch in batches] == expected


def test_a_picture_and_a_clip_of_one_path_are_two():
    """A .gif may be asked for as either."""
    kinds = ["video", "image", "video"]
    batches = fixed_batches([make_sample(n, data_type=kind) for n, kind in enumerate(kinds)], 2)
    assert [[sample.row for sample in batch] for batch in batches] == [[0, 2], [1]]


class Asked:
    """A decoder pool that notes what it is asked for, and never decodes."""

    def __init__(self):
        self.paths = []

    def submit(self, kind, path, **limits):
        self.paths.append(path)
        return object()


def test_clips_are_decoded_once_and_two_batches_ahead():
    samples = [make_sample(row, path) for row, path in enumerate("aabcccdeef")]
    batches = list(enumerate(fixed_batches(samples, 2)))  # aa bc cc de ef
    pool, seen = Asked(), []
    for number, _, frames in _decode_ahead(batches, pool, LIMITS):
        seen.append((number, "".join(pool.paths), [path for _, path in frames]))
    assert seen == [
        (0, "abc", ["a"]), (1, "abcde", ["b", "c"]), (2, "abcdef", ["c"]),
        (3, "abcdef", ["d", "e"]), (4, "abcdef", ["e", "f"]),
    ]  # fmt: skip


def test_neighbouring_batches_share_the_frames_themselves():
    samples = [make_sample(row, path) for row, path in enumerate("abbbbb")]
    batches = list(enumerate(fixed_batches(samples, 2)))
    found = [frames["video", "b"] for _, _, frames in _decode_ahead(batches, Asked(), LIMITS)]
    assert len(set(map(id, found))) == 1


# ------------------------------------------------------------------------------ shared vision


@pytest.fixture(scope="module")
def questions(toy_folder, tokenizer):
    """Two questions on one clip, one on a picture, a third on the clip: four Prompts."""
    samples = load_samples(toy_folder / "runs/toy/data/rl.json")
    clip = next(sample for sample in samples if sample.is_video)
    picture = next(sample for sample in samples if not sample.is_video)
    texts = ["What happens in the video?", "Which way does it go, and where does it stop?"]
    asked = [dataclasses.replace(clip, problem=text, options=()) for text in texts]
    return [make_prompt(sample, tokenizer) for sample in [*asked, picture, clip]]


def shared(prompts):
    """The same prompts, those on the clip holding one tensor."""
    pixels = prompts[0].pixel_values
    return [
        dataclasses.replace(prompt, pixel_values=pixels) if prompt.is_video else prompt
        for prompt in prompts
    ]


def test_prompts_on_one_clip_are_looked_at_once(questions):
    pack = pack_groups(shared(questions), [[] for _ in questions])
    assert len(pack.grid_thw) == 2
    apart = pack_groups(questions, [[] for _ in questions])
    assert len(apart.grid_thw) == 4
    assert torch.equal(pack.vision_places, apart.vision_places)
    clip, picture = questions[0].pixel_values, questions[2].pixel_values
    assert torch.equal(pack.pixel_values, torch.cat([clip, picture]))


def test_shared_vision_gives_each_prompt_its_own_logits(model, questions):
    """Against the plain pass of each prompt by itself, and the gradients too."""
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(500, (4, 2, 5), generator=generator)
    mask = torch.ones_like(ids).bool()
    logps = group_logprobs(model, shared(questions), ids, mask)
    for prompt, found, responses in zip(questions, logps, ids, strict=True):
        for logp, response in zip(found, responses, strict=True):
            expected = plain.logprobs(model, prompt, response)
            torch.testing.assert_close(logp, expected, atol=2e-5, rtol=0)

    def gradient(prompts):
        model.zero_grad()
        group_logprobs(model, prompts, ids, mask).sum().backward()
        return {name: parameter.grad.clone() for name, parameter in model.named_parameters()}

    one, each = gradient(shared(questions)), gradient(questions)
    for name in one:
        torch.testing.assert_close(one[name], each[name], atol=1e-4, rtol=1e-4, msg=name)
    model.zero_grad(set_to_none=True)


def test_shared_vision_changes_no_response(model, tokenizer, questions):
    keys = [[(0, number)] for number in range(4)]
    greedy = (8, 0.01, 0.001)
    together = sample_groups(model, tokenizer, shared(questions), keys, *greedy)
    for prompt, key, rollout in zip(questions, keys, together, strict=True):
        (alone,) = sample_groups(model, tokenizer, [prompt], [key], *greedy)
        assert rollout.texts == alone.texts


# ------------------------------------------------------------------------------- greedy decoding


@pytest.mark.parametrize("top_p", [0.001, 0.3, 0.6])
@pytest.mark.parametrize("temperature", [0.01, 1.0])
def test_a_nucleus_of_one_token_is_drawn_without_sorting(temperature, top_p):
    """Against the definition, row by row; equal logits among them, where the first one counts."""
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(200, 12, generator=generator).mul(2).round()  # many ties
    uniforms = torch.rand(200, generator=generator, dtype=torch.float64)
    drawn, _ = draw_tokens(logits, uniforms, temperature, top_p)
    rows = torch.cat([  # a row alone may take the way without sorting, all together may not
        draw_tokens(row[None], u[None], temperature, top_p)[0]
        for row, u in zip(logits, uniforms, strict=True)
    ])  # fmt: skip
    assert torch.equal(drawn, rows)
    for row, token in zip(logits, drawn.tolist(), strict=True):
        ranked = sorted(range(12), key=lambda n: (-float(row[n]), n))
        if (row / temperature).softmax(-1).max() >= top_p:
            assert token == ranked[0]


# --------------------------------------------------------------------------------------- answers


@pytest.fixture(scope="module")
def samples(toy_folder):
    """Seven samples: a clip with three questions, a file that is not there, and three rows that
    cannot be used."""
    rows = load_samples(toy_folder / "runs/toy/data/rl.json")
    clip = next(sample for sample in rows if sample.is_video)
    picture = next(sample for sample in rows if not sample.is_video)
    choice = {"problem_type": "multiple choice", "options": ("A. left", "B. right")}
    rows = [
        clip,
        dataclasses.replace(picture, path="/none.png"),
        dataclasses.replace(clip, problem="Where does it go?"),
        dataclasses.replace(clip, **choice, solution="left"),
        dataclasses.replace(clip, problem="What is <|video_pad|>?"),
        picture,
        dataclasses.replace(clip, problem="word " * 5000),
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
    assert sorted(found) == list(range(7))
    reasons = {1: "No such file", 3: "option letter", 4: "vision token", 6: "positions"}
    for row, one in found.items():
        if row in reasons:
            assert one.rollout is None
            assert reasons[row] in one.error
        else:
            assert one.error is None
            assert len(one.rollout.texts) == 1
            assert one.rollout.prompt.sample is one.sample
    (prompts,) = seen
    assert [prompt.sample.row for prompt in prompts] == [0, 2, 5]
    assert prompts[0].pixel_values is prompts[1].pixel_values


@pytest.mark.parametrize("order, shares", [("reversed", True), ("single", True),
                                           ("shuffled", False)])  # fmt: skip
def test_frames_in_the_same_order_are_shared(model, tokenizer, samples, monkeypatch, order, shares):
    """A shuffle is drawn for each row, so that two questions see two orders."""
    seen = []

    def see(model, tokenizer, prompts, *_):
        seen.extend(prompts)
        return []

    monkeypatch.setattr(answering, "sample_groups", see)
    settings = dataclasses.replace(SETTINGS, order=order)
    answers_to(model, tokenizer, [(0, [samples[0], samples[2]])], settings)
    one, other = (prompt.pixel_values for prompt in seen)
    assert (one is other) == shares
    assert torch.equal(one, other) == shares


def test_several_responses_differ_and_do_not_depend_on_the_batch(model, tokenizer, samples):
    settings = dataclasses.replace(SETTINGS, num_samples=4, temperature=1.0, top_p=1.0)
    both = [samples[0], samples[5]]
    ((_, together),) = answers_to(model, tokenizer, [(0, both)], settings)
    alone = answers_to(model, tokenizer, [(0, both[:1]), (1, both[1:])], settings)
    assert [one.rollout.texts for one in together] == [one.rollout.texts for _, (one,) in alone]
    for one in together:
        assert len(set(one.rollout.texts)) == 4


def test_a_batch_of_nothing_usable_and_an_empty_one_ask_nothing(
    tokenizer, model, samples, monkeypatch
):
    monkeypatch.setattr(answering, "sample_groups", None)
    batches = [(0, [samples[1]]), (None, []), (2, [samples[3], samples[4]])]
    found = answers_to(model, tokenizer, batches)
    assert [(number, len(answers)) for number, answers in found] == [(0, 1), (2, 2)]
    assert all(one.error for _, answers in found for one in answers)


def test_the_blank_prompt_runs(model, tokenizer):
    prompt = _blank_prompt(tokenizer, {})
    assert prompt.num_vision_tokens == 1
    (rollout,) = sample_groups(model, tokenizer, [prompt], [[(0,)]], 2)
    assert rollout.completion_ids.shape[1] <= 2


# ---------------------------------------------------------------------------------------- records


def rollout_of(text):
    mask = torch.ones(1, 3, dtype=torch.bool)
    return Rollout(None, mask.long(), mask, torch.tensor([True]), mask.float(), [text])


def test_a_record_by_hand():
    sample = make_sample(
        7, "/d/x.mp4", problem_type="regression", solution="<answer>10</answer>",
        extra={"original_question_type": "object_counting"},
    )  # fmt: skip
    text = "<think>So.</think><answer>9.5</answer>"
    assert item_record(Answer(sample, rollout_of(text)), "reversed") == {
        "row": 7, "problem_id": 7, "problem": "What?", "data_type": "video",
        "problem_type": "regression", "options": [], "path": "/d/x.mp4", "data_source": "hand",
        "extra": {"original_question_type": "object_counting"}, "order": "reversed",
        "solution": "<answer>10</answer>", "error": None, "response": text, "answer": "9.5",
        "length": 3, "ended": True, "score": 1.0, "score_paper": 0.9,
    }  # fmt: skip
    lost = item_record(Answer(sample, None, "gone"), "reversed")
    assert lost["error"] == "gone"
    for key in ("response", "answer", "length", "ended", "score", "score_paper"):
        assert lost[key] is None


@pytest.mark.parametrize(
    "answer_text, score, strict",
    [("9.5", 1.0, 0.9), ("8", 0.7, 0.6), ("10", 1.0, 1.0), ("1", 0.0, 0.0)],
)
def test_both_forms_of_the_mra(answer_text, score, strict):
    sample = make_sample(0, problem_type="regression", solution="10")
    text = f"<answer>{answer_text}</answer>"
    assert score_item(text, sample) == score
    assert score_item(text, sample, strict=True) == strict


def vsi_rows():
    """A row of each task of VSI-Bench, the three levels of direction included, two clips each."""
    kinds = [kind for kind in VSI_TASKS if kind != "object_rel_direction"]
    kinds += [f"object_rel_direction_{level}" for level in ("easy", "medium", "hard")]
    for number, kind in enumerate(kinds * 2):
        numeric = kind in VSI_TASKS[:4]
        yield {
            "problem_id": number, "problem": "?", "data_type": "video", "process": "",
            "problem_type": "regression" if numeric else "multiple choice",
            "original_question_type": kind, "options": [] if numeric else ["A. x", "B. y"],
            "solution": f"<answer>{number + 1.5 if numeric else 'AB'[number % 2]}</answer>",
            "path": f"./Evaluation/VSIBench/scannet/{number}.mp4", "data_source": "",
        }  # fmt: skip


def test_gold_answers_score_100_everywhere_on_vsibench(tmp_path):
    file = tmp_path / "eval_vsibench.json"
    file.write_text(json.dumps(list(vsi_rows())))
    items = [
        item_record(Answer(sample, rollout_of(f"<think>.</think>{sample.solution}")), "ordered")
        for sample in load_samples(file)
    ]
    assert len(items) == 20
    scores = score_benchmark("eval_vsibench", json.loads(json.dumps(items)))

    def all_scores(part):
        if "score" in part:
            yield part["score"]
        for value in part.values():
            if isinstance(value, dict):
                yield from all_scores(value)

    found = list(all_scores(scores["all_items"]))
    assert len(found) == 2 + 2 + 8 + 10 + 2  # overall, the paper's parts, tasks, types, metrics
    assert set(found) == {1.0}
    summary = answering.summarise(items)
    assert (summary["n"], summary["accuracy"]) == (12, 1.0)
    assert summary["by_type"]["regression"] == {"n": 8, "score": 1.0}


def test_one_decoder_reads_a_file_for_all_its_questions(model, tokenizer, samples, monkeypatch):
    submitted = []

    def submit(pool, sample, limits):
        submitted.append(sample.path)
        return data.submit_decode(pool, sample, limits)

    monkeypatch.setattr(answering, "submit_decode", submit)
    batches = fixed_batches(samples, 2)
    answers_to(model, tokenizer, list(enumerate(batches)))
    assert len(submitted) == len(set(submitted)) == 3
