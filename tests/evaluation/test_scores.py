"""scores.py: each benchmark's averages worked out by hand, intervals, differences, Table 1."""

import doctest
import json
import math
import random

import pytest

from data import load_samples
from evaluation import scores
from evaluation.scores import (
    MVBENCH_TASKS,
    UNKNOWN,
    VSI_TASKS,
    Z,
    benchmark_of,
    gaps,
    markdown_table,
    mean_relative_accuracy,
    paired_difference,
    score_benchmark,
    weighted_mean,
)


def test_the_docstring_examples_hold():
    result = doctest.testmod(scores)
    assert result.attempted >= 1
    assert result.failed == 0


@pytest.mark.parametrize(
    "name, expected",
    [
        ("eval_mvbench", "mvbench"),
        ("eval_tempcompass", "tempcompass"),
        ("eval_videomme", "videomme"),
        ("eval_videommmu", "videommmu"),
        ("eval_vsibench", "vsibench"),
        ("eval_mmvu", "mmvu"),
        ("eval_mmvu_small", "generic"),
        ("mmvu", "generic"),
        ("eval_generic", "generic"),
        ("test", "generic"),
    ],
)
def test_benchmark_of_a_file(name, expected):
    assert benchmark_of(name) == expected


# ----------------------------------------------------------------------------------------- MRA


@pytest.mark.parametrize(
    "answer, reference, expected, strict",
    [
        pytest.param(10, 10, 1.0, 1.0, id="exact"),
        pytest.param(9.5, 10, 1.0, 0.9, id="5%-below"),
        pytest.param(10.5, 10, 1.0, 0.9, id="5%-above"),
        pytest.param(9.51, 10, 1.0, 1.0, id="4.9%"),
        pytest.param(9.49, 10, 0.9, 0.9, id="5.1%"),
        pytest.param(2.85, 3, 1.0, 0.9, id="5%-of-3"),
        pytest.param(8, 10, 0.7, 0.6, id="20%"),
        pytest.param(5, 10, 0.1, 0.0, id="50%"),
        pytest.param(15, 10, 0.1, 0.0, id="50%-above"),
        pytest.param(4.99, 10, 0.0, 0.0, id="50.1%"),
        pytest.param(-9.5, -10, 1.0, 0.9, id="negative"),
        pytest.param(-10, 10, 0.0, 0.0, id="wrong-sign"),
        pytest.param(0, 10, 0.0, 0.0, id="0-for-10"),
        pytest.param(0, 0, 1.0, 1.0, id="0-for-0"),
        pytest.param(0.001, 0, 0.0, 0.0, id="something-for-0"),
        pytest.param(1e308, -1e308, 0.0, 0.0, id="huge"),
        pytest.param(1.0, 5e-324, 0.0, 0.0, id="tiny-reference"),
    ],
)
def test_mean_relative_accuracy(answer, reference, expected, strict):
    assert mean_relative_accuracy(float(answer), float(reference)) == expected
    assert mean_relative_accuracy(float(answer), float(reference), strict=True) == strict


@pytest.mark.parametrize("reference", [100.0, 20.0, 10.0, 3.0, 1.0, 0.7, 0.1])
@pytest.mark.parametrize("percent_off", range(5, 55, 5))
@pytest.mark.parametrize("sign", [-1, 1], ids=["below", "above"])
def test_each_edge_counts_once_and_not_in_the_strict_one(reference, percent_off, sign):
    """5% off passes all ten thetas, 10% nine, .., 50% one; strictly, one fewer."""
    answer = reference * (100 + sign * percent_off) / 100
    passed = 11 - percent_off // 5
    assert mean_relative_accuracy(answer, reference) == passed / 10
    assert mean_relative_accuracy(answer, reference, strict=True) == (passed - 1) / 10


# ----------------------------------------------------------------------------------- benchmarks


def make_items(rows: list[dict]) -> list[dict]:
    """Items with the keys that a row does not give: one clip each, multiple choice, answer B."""
    items = []
    for number, row in enumerate(rows):
        item = {
            "row": number, "problem_id": number + 1, "problem": "What?", "answer": "B",
            "options": ["A. x", "B. y"], "problem_type": "multiple choice",
            "path": f"/data/{number}.mp4", "error": None, "extra": {},
        }  # fmt: skip
        item = {"score_paper": row["score"], **item, **row}
        if item["score"] is None:
            item |= {"answer": None, "error": f"{item['path']}: empty, zero bytes"}
        items.append(item)
    return items


def vsi_row(kind: str, score: float, strict: float | None = None, clip: str = "a") -> dict:
    numeric = strict is not None
    return {
        "problem_type": "regression" if numeric else "multiple choice", "score": score,
        "score_paper": strict if numeric else score, "path": f"/data/VSIBench/scannet/{clip}.mp4",
        "extra": {"original_question_type": kind},
    }  # fmt: skip


VSI_ROWS = [
    vsi_row("object_counting", 1.0, 1.0), vsi_row("object_counting", 0.6, 0.5, "b"),
    vsi_row("object_abs_distance", 0.5, 0.4), vsi_row("object_size_estimation", 0.9, 0.8, "b"),
    vsi_row("room_size_estimation", 0.2, 0.1, "c"),
    vsi_row("object_rel_distance", 1.0), vsi_row("object_rel_distance", 0.0, clip="b"),
    vsi_row("object_rel_direction_easy", 1.0), vsi_row("object_rel_direction_easy", 1.0, clip="b"),
    vsi_row("object_rel_direction_medium", 0.0, clip="c"),
    vsi_row("object_rel_direction_hard", 1.0), vsi_row("object_rel_direction_hard", 0.0, clip="b"),
    vsi_row("route_planning", 0.0, clip="c"), vsi_row("obj_appearance_order", 1.0, clip="c"),
]  # fmt: skip
VSI_BY_TASK = {
    "object_counting": 0.8, "object_abs_distance": 0.5, "object_size_estimation": 0.9,
    "room_size_estimation": 0.2, "object_rel_distance": 0.5,
    "object_rel_direction": (1.0 + 0.0 + 0.5) / 3,  # not 3 right of 5
    "route_planning": 0.0, "obj_appearance_order": 1.0,
}  # fmt: skip


def values(part: dict) -> dict:
    return {name: score["score"] for name, score in part.items()}


def test_vsibench():
    result = score_benchmark("eval_vsibench", make_items(VSI_ROWS))
    part = result["decodable_items"]
    assert values(part["by"]["task"]) == pytest.approx(VSI_BY_TASK)
    assert part["by"]["task"]["object_rel_direction"]["n"] == 5
    assert part["by"]["question_type"]["object_rel_direction_hard"]["score"] == 0.5
    assert values(part["by"]["metric"]) == pytest.approx({"MRA": 3.2 / 5, "accuracy": 5 / 9})
    own, paper = part["overall"]["benchmark"], part["overall"]["paper"]
    assert own["score"] == pytest.approx(4.4 / 8)
    assert (own["n"], own["clips"], own["groups_missing"]) == (14, 3, [])
    assert values(paper["parts"]) == pytest.approx({"MRA": 2.8 / 5, "accuracy": 5 / 9})
    assert paper["score"] == pytest.approx((2.8 / 5 + 5 / 9) / 2)
    assert result["all_items"] == part
    assert result["unusable"] == {"n": 0, "reasons": {}, "items": []}


def all_scores(part) -> list[float]:
    if not isinstance(part, dict):
        return []
    own = [part["score"]] if "score" in part else []
    return own + [score for value in part.values() for score in all_scores(value)]


def test_gold_answers_score_one_everywhere_on_vsibench():
    rows = []
    for row in VSI_ROWS:
        gold = mean_relative_accuracy(3.7, 3.7), mean_relative_accuracy(3.7, 3.7, strict=True)
        rows.append({**row, "score": gold[0], "score_paper": gold[1]})
    result = score_benchmark("eval_vsibench", make_items(rows))
    found = all_scores(result)
    assert len(found) == 2 * (1 + 3 + 8 + 10 + 2)  # overall, the paper's parts, three groupings
    assert set(found) == {1.0}


def test_vsibench_without_a_task_says_so():
    rows = [row for row in VSI_ROWS if row["extra"]["original_question_type"] != "route_planning"]
    own = score_benchmark("eval_vsibench", make_items(rows))["all_items"]["overall"]["benchmark"]
    assert own["score"] == pytest.approx(4.4 / 7)
    assert own["groups_missing"] == ["route_planning"]


def lecture(number: int, score: float | None, folder: str = "VideoMMMU") -> dict:
    path = f"/data/Evaluation/{folder}/dev_Biology_{(number - 1) % 300}.mp4"
    return {"problem_id": number, "score": score, "path": path}


def test_videommmu_tells_the_track_by_the_number_of_the_row():
    rows = [lecture(1, 1.0), lecture(300, 0.0), lecture(301, 1.0), lecture(600, 1.0),
            lecture(601, 1.0), lecture(602, 1.0), lecture(900, 0.0)]  # fmt: skip
    part = score_benchmark("eval_videommmu", make_items(rows))["all_items"]
    tracks = {"adaptation": 0.5, "comprehension": 1.0, "perception": 2 / 3}
    assert values(part["by"]["track"]) == pytest.approx(tracks)
    assert part["overall"]["benchmark"]["score"] == pytest.approx((0.5 + 1 + 2 / 3) / 3)
    assert part["overall"]["paper"]["score"] == pytest.approx(5 / 7)
    assert part["overall"]["benchmark"]["clips"] == 3  # 1, 301 and 601 are of one lecture


@pytest.mark.parametrize(
    "row, expected",
    [
        pytest.param(lecture(1, 1.0, "VideoMMMU/question_only"), "adaptation", id="question-only"),
        pytest.param(lecture(901, 1.0), UNKNOWN, id="beyond-the-file"),
        pytest.param({**lecture(1, 1.0), "problem_id": "1"}, UNKNOWN, id="no-number"),
    ],
)
def test_videommmu_track(row, expected):
    part = score_benchmark("eval_videommmu", make_items([row]))["all_items"]
    assert list(part["by"]["track"]) == [expected]
    known = expected != UNKNOWN
    assert part["overall"]["benchmark"]["score"] == (1.0 if known else None)
    assert part["overall"]["paper"]["score"] == 1.0


def mvbench_row(number: int, folder: str, score: float | None) -> dict:
    path = f"/data/Evaluation/MVBench/{folder}/{number}.mp4"
    return {"problem_id": number, "score": score, "path": path}


def test_mvbench_is_a_macro_mean_and_the_paper_s_a_micro_mean():
    rows = [
        mvbench_row(200, "ssv2_video", 1.0),
        mvbench_row(201, "perception/videos", 0.0),
        mvbench_row(400, "perception/videos", 1.0),
        mvbench_row(601, "star/Charades_v1_480", 1.0),
    ]
    part = score_benchmark("eval_mvbench", make_items(rows))["all_items"]
    tasks = {"action_antonym": 1.0, "action_count": 0.5, "action_prediction": 1.0}
    assert values(part["by"]["task"]) == tasks
    assert part["overall"]["benchmark"]["score"] == pytest.approx(2.5 / 3)
    assert len(part["overall"]["benchmark"]["groups_missing"]) == 17
    assert part["overall"]["paper"]["score"] == 0.75


def test_mvbench_with_as_many_items_of_each_task_has_one_mean():
    rows = [
        mvbench_row(200 * place + offset, folder, float(offset == 1 or place % 3 == 0))
        for place, folder in enumerate(MVBENCH_TASKS.values())
        for offset in (1, 200)
    ]
    overall = score_benchmark("eval_mvbench", make_items(rows))["all_items"]["overall"]
    assert overall["benchmark"]["score"] == pytest.approx(27 / 40)
    assert overall["paper"]["score"] == pytest.approx(27 / 40)
    assert overall["benchmark"]["groups_missing"] == []


def test_mvbench_rows_of_another_file_belong_to_no_task():
    rows = [mvbench_row(1, "ssv2_video", 1.0), mvbench_row(2, "tvqa/frames_fps3_hq", 0.0)]
    part = score_benchmark("eval_mvbench", make_items(rows))["all_items"]
    assert values(part["by"]["task"]) == {"action_antonym": 1.0, UNKNOWN: 0.0}
    assert part["overall"]["benchmark"]["score"] is None
    assert part["overall"]["benchmark"]["interval"] is None
    assert part["overall"]["paper"]["score"] == 0.5


INFORMATION = "You will be presented with a video and several pieces of information. One .."


@pytest.mark.parametrize(
    "row, kind",
    [
        pytest.param({}, "multi-choice", id="multi-choice"),
        pytest.param({"options": ["A. yes", "B. no"]}, "yes_no", id="yes-no"),
        pytest.param({"options": ("(A) No.", "(B) Yes.")}, "yes_no", id="yes-no-brackets"),
        pytest.param(
            {"problem": "Which caption matches the video better?"}, "caption_matching", id="caption"
        ),
        pytest.param(
            {"problem": "Which description is a more suitable match for the video?"},
            "caption_matching", id="description",
        ),
        pytest.param({"problem": INFORMATION}, "captioning", id="captioning"),
        pytest.param({"extra": {"question": INFORMATION}}, "captioning", id="original-question"),
        pytest.param({"extra": {"mc_question": "What?"}}, "captioning", id="mc-question"),
        pytest.param({"extra": {"original_question_type": "yes_no"}}, "yes_no", id="named"),
    ],
)  # fmt: skip
def test_tempcompass_kind_of_a_question(row, kind):
    part = score_benchmark("eval_tempcompass", make_items([{"score": 1.0, **row}]))["all_items"]
    assert list(part["by"]["kind"]) == [kind]


def test_tempcompass():
    yes_no = {"options": ["A. yes", "B. no"]}
    rows = [
        {"score": 1.0, "extra": {"dim": "action"}},
        {"score": 0.0, "extra": {"dim": "speed"}},
        {"score": 1.0, "extra": {"dim": "action"}, **yes_no},
        {"score": 1.0, "extra": {"dim": "order"}, **yes_no},
        {"score": 0.0, "extra": {"dim": "speed"}, **yes_no},
        {"score": 1.0, "extra": {}, "problem": INFORMATION},
    ]
    part = score_benchmark("eval_tempcompass", make_items(rows))["all_items"]
    dimensions = {"action": 1.0, "order": 1.0, "speed": 0.0, UNKNOWN: 1.0}
    assert values(part["by"]["dimension"]) == dimensions
    kinds = {"captioning": 1.0, "multi-choice": 0.5, "yes_no": 2 / 3}
    assert values(part["by"]["kind"]) == pytest.approx(kinds)
    assert part["overall"]["benchmark"]["score"] == pytest.approx((1 + 0.5 + 2 / 3) / 3)
    assert part["overall"]["benchmark"]["groups_missing"] == ["caption_matching"]
    assert part["overall"]["paper"]["score"] == pytest.approx(4 / 6)


def mme_row(score: float | None, duration: str, domain: str, task: str, **changes) -> dict:
    extra = {"duration": duration, "domain": domain, "task_type": task}
    return {"score": score, "extra": extra, **changes}


def test_videomme_leaves_unanswered_questions_out_of_its_own_score_alone():
    rows = [
        mme_row(1.0, "short", "Knowledge", "OCR Problems"),
        mme_row(0.0, "short", "Knowledge", "Counting Problem"),
        mme_row(0.0, "long", "Life Record", "Counting Problem", answer="none of them"),
        mme_row(0.0, "long", "Life Record", "Counting Problem", answer=None),
        mme_row(None, "medium", "Life Record", "OCR Problems"),
    ]
    result = score_benchmark("eval_videomme", make_items(rows))
    shown, everything = result["decodable_items"], result["all_items"]
    assert shown["overall"]["benchmark"]["score"] == 0.5
    assert shown["overall"]["benchmark"]["n"] == 2
    assert shown["overall"]["paper"]["score"] == 0.25
    assert values(shown["by"]["duration"]) == {"long": 0.0, "short": 0.5}
    assert values(shown["by"]["domain"]) == {"Knowledge": 0.5, "Life Record": 0.0}
    assert values(shown["by"]["task"]) == {"Counting Problem": 0.0, "OCR Problems": 1.0}
    assert everything["overall"]["benchmark"]["score"] == pytest.approx(1 / 3)  # 3: the clip's too
    assert everything["overall"]["paper"]["score"] == 0.2
    assert values(everything["by"]["duration"]) == {"long": 0.0, "medium": 0.0, "short": 0.5}


def test_mmvu_by_subject():
    names = ["Chemistry/0.mp4", "Chemistry/0.mp4", "Art/3.mp4"]
    rows = [{"score": score, "path": f"/data/MMVU/videos/{name}"}
            for name, score in zip(names, (1.0, 0.0, 1.0), strict=True)]  # fmt: skip
    part = score_benchmark("eval_mmvu", make_items([*rows, {"score": 0.0, "path": "0.mp4"}]))
    part = part["all_items"]
    assert values(part["by"]["subject"]) == {"Art": 1.0, "Chemistry": 0.5, UNKNOWN: 0.0}
    assert part["overall"]["benchmark"]["score"] == part["overall"]["paper"]["score"] == 0.5
    assert (part["overall"]["paper"]["n"], part["overall"]["paper"]["clips"]) == (4, 3)


def test_another_file_by_problem_type():
    rows = [{"score": 1.0}, {"score": 0.0}, {"score": 0.4, "problem_type": "OCR"},
            {"score": 0.7, "score_paper": 0.6, "problem_type": "regression"}]  # fmt: skip
    part = score_benchmark("val", make_items(rows))["all_items"]
    types = {"OCR": 0.4, "multiple choice": 0.5, "regression": 0.7}
    assert values(part["by"]["problem_type"]) == pytest.approx(types)
    assert part["overall"]["benchmark"]["score"] == pytest.approx(2.1 / 4)
    assert part["overall"]["paper"]["score"] == pytest.approx((1.4 / 3 + 0.6) / 2)


# ------------------------------------------------------------------------------- unusable, faults


def test_unusable_media_count_zero_or_not_at_all():
    rows = [vsi_row("object_counting", 0.8, 0.7), vsi_row("object_counting", 0.6, 0.6, "b"),
            vsi_row("route_planning", 1.0, clip="c")]  # fmt: skip
    lost = [{**vsi_row("object_counting", 0.0, 0.0, f"lost-{number}"), "score": None,
             "score_paper": None} for number in (1, 2)]  # fmt: skip
    items = make_items([*rows, *lost, {**rows[0], "score": None}])
    items[4]["error"] = f"{items[4]['path']}: truncated, 17 of 90 bytes"
    result = score_benchmark("eval_vsibench", items)
    shown, everything = result["decodable_items"], result["all_items"]
    assert shown["by"]["task"]["object_counting"]["n"] == 2
    assert shown["by"]["task"]["object_counting"]["score"] == pytest.approx(0.7)
    assert everything["by"]["task"]["object_counting"]["n"] == 5
    assert everything["by"]["task"]["object_counting"]["score"] == pytest.approx(1.4 / 5)
    assert shown["overall"]["paper"]["score"] == pytest.approx((0.65 + 1) / 2)
    assert everything["overall"]["paper"]["score"] == pytest.approx((1.3 / 5 + 1) / 2)
    assert everything["overall"]["benchmark"]["groups_missing"] == [
        task for task in VSI_TASKS if task not in ("object_counting", "route_planning")
    ]
    unusable = result["unusable"]
    assert unusable["n"] == 3
    assert unusable["reasons"] == {"empty, zero bytes": 2, "truncated, N of N bytes": 1}
    assert unusable["items"][1] == {
        "row": 4, "problem_id": 5, "path": "/data/VSIBench/scannet/lost-2.mp4",
        "error": "/data/VSIBench/scannet/lost-2.mp4: truncated, 17 of 90 bytes",
    }  # fmt: skip
    json.dumps(result, allow_nan=False)


@pytest.mark.parametrize("name", ["eval_vsibench", "eval_mvbench", "eval_videomme", "test"])
def test_nothing_to_average_is_no_score(name):
    nothing = {"n": 0, "clips": 0, "score": None, "interval": None}
    for items in ([], make_items([{"score": None}])):
        overall = score_benchmark(name, items)["decodable_items"]["overall"]
        assert {key: overall["benchmark"][key] for key in nothing} == nothing
        assert overall["paper"] == {**nothing, "parts": {}}


def test_items_that_cannot_be_scored_name_their_row():
    items = make_items([{"score": 1.0}, {"score": 0.0}])
    with pytest.raises(ValueError, match="row 1: an item lacks score_paper"):
        score_benchmark("eval_mmvu", [items[0], {k: v for k, v in items[1].items()
                                                 if k != "score_paper"}])  # fmt: skip
    with pytest.raises(ValueError, match="row 0: 2 items of one row"):
        score_benchmark("eval_mmvu", [items[0], items[0]])
    with pytest.raises(ValueError, match="row 1: 2 items of one row"):
        paired_difference(items, [items[1], items[1]])


# ----------------------------------------------------------------------------------- intervals


def test_the_interval_of_four_clips_by_hand():
    """Mean 0.5; the clips' residuals are 2, -2, 0, 0 halves of 1/8 each:
    variance 4/3 * (1/64 + 1/64) = 1/24."""
    scores_, clips = [1, 1, 0, 0, 1, 0, 1, 0], list("aabbccdd")
    mean, (low, high) = weighted_mean(scores_, [1 / 8] * 8, clips)
    assert mean == 0.5
    assert high - 0.5 == pytest.approx(Z / math.sqrt(24))
    assert 0.5 - low == pytest.approx(Z / math.sqrt(24))


def test_that_one_group_is_harder_adds_no_width():
    """Group A: 4 clips, all 1. Group B: 4 clips, 1 0 1 0. Weights are 1/8, only B's clips have
    residuals, 1/16 each: variance 8/7 * 4/256."""
    mean, (low, high) = weighted_mean(
        [1, 1, 1, 1, 1, 0, 1, 0], [1 / 8] * 8, list("abcdefgh"), list("AAAABBBB")
    )
    assert mean == 0.75
    assert 0.75 - low == pytest.approx(Z * math.sqrt(8 / 7 * 4 / 256))
    assert high == 1.0  # clipped: 0.75 + 0.26


def slow_interval(scores_, weights, clips, groups, lowest):
    """The sandwich with its double sum over pairs of items written out."""
    count = range(len(scores_))
    total = sum(weights)
    mean = sum(w * s for w, s in zip(weights, scores_, strict=True)) / total
    errors = []
    for i in count:
        same = [j for j in count if groups[j] == groups[i]]
        centre = sum(weights[j] * scores_[j] for j in same) / sum(weights[j] for j in same)
        errors.append(scores_[i] - (mean if len({clips[j] for j in same}) == 1 else centre))
    variance = sum(weights[i] * weights[j] * errors[i] * errors[j] / total**2
                   for i in count for j in count if clips[i] == clips[j])  # fmt: skip
    num_clips = len(set(clips))
    half = 1.96 * (variance * num_clips / (num_clips - 1)) ** 0.5
    return mean, [max(lowest, mean - half), min(1.0, mean + half)]


@pytest.mark.parametrize("seed", range(6))
@pytest.mark.parametrize("lowest", [0.0, -1.0], ids=["scores", "differences"])
def test_intervals_are_those_of_a_slow_computation(seed, lowest):
    draw = random.Random(seed)
    count = 40
    scores_ = [draw.choice([lowest, 0.0, 0.3, 1.0]) for _ in range(count)]
    weights = [draw.uniform(0.5, 2.0) for _ in range(count)]
    clips = [draw.randrange(12) for _ in range(count)]
    groups = [draw.choice("AAABBC") for _ in range(count)]
    groups[0] = "alone"  # a group of one clip
    mean, interval = weighted_mean(scores_, weights, clips, groups, lowest)
    slow_mean, slow = slow_interval(scores_, weights, clips, groups, lowest)
    assert mean == pytest.approx(slow_mean)
    assert interval == pytest.approx(slow)


def test_95_of_100_intervals_hold_the_truth_though_items_share_clips():
    """60 clips of 4 items, which are right together in 3 of 4 clips. Intervals for independent
    items would hold it 74 times in 100."""
    draw = random.Random(0)
    clips = [clip for clip in range(60) for _ in range(4)]
    held = naive = 0
    for _ in range(400):
        right = [float(draw.random() < 0.6) for _ in range(60)]
        scores_ = [right[c] if c % 4 else float(draw.random() < 0.6) for c in clips]
        mean, (low, high) = weighted_mean(scores_, [1.0] * 240, clips)
        held += low <= 0.6 <= high
        naive += abs(mean - 0.6) <= Z * math.sqrt(mean * (1 - mean) / 240)
    assert 0.91 <= held / 400 <= 0.98
    assert naive / 400 < 0.8


SHARE_20 = Z**2 / (20 + Z**2)  # 0.161
SHARE_1 = Z**2 / (1 + Z**2)  # 0.793


@pytest.mark.parametrize(
    "scores_, clips, expected",
    [
        pytest.param([0.0] * 20, range(20), [0.0, SHARE_20], id="0-of-20"),
        pytest.param([1.0] * 20, range(20), [1 - SHARE_20, 1.0], id="20-of-20"),
        pytest.param([0.0] * 40, [*range(20)] * 2, [0.0, SHARE_20], id="0-of-40-in-20-clips"),
        pytest.param(
            [0.7] * 20, range(20), [0.7 - 0.7 * SHARE_20, 0.7 + 0.3 * SHARE_20], id="all-equal"
        ),
        pytest.param([1.0, 0.0], "aa", [0.5 - SHARE_1 / 2, 0.5 + SHARE_1 / 2], id="one-clip"),
        pytest.param([1.0], "a", [1 - SHARE_1, 1.0], id="one-item"),
    ],
)
def test_no_spread_to_see_is_no_certainty(scores_, clips, expected):
    _, interval = weighted_mean(scores_, [1 / len(scores_)] * len(scores_), list(clips))
    assert interval == pytest.approx(expected)


def test_wilson_s_upper_end_for_0_of_20_is_the_textbook_s():
    assert pytest.approx(0.1611, abs=5e-5) == SHARE_20


def test_a_clip_that_serves_two_tasks_is_one_clip():
    """Task A: clips x y, B: x y, and x is right in both. Residuals of x: 2 * 1/4 * 1/2 = 1/4,
    of y -1/4: variance 2/1 * 2/16 = 1/4."""
    rows = [mvbench_row(number, folder, score) for number, folder, score in (
        (201, "perception", 1.0), (202, "perception", 0.0),
        (1001, "perception", 1.0), (1002, "perception", 0.0))]  # fmt: skip
    for row, clip in zip(rows, "xyxy", strict=True):
        row["path"] = f"/data/MVBench/perception/{clip}.mp4"
    overall = score_benchmark("eval_mvbench", make_items(rows))["all_items"]["overall"]
    assert overall["benchmark"]["clips"] == 2
    assert overall["benchmark"]["interval"] == [0.0, 1.0]  # 0.5 +- 1.96 * 0.5, clipped


# ---------------------------------------------------------------------------------- differences


def test_paired_difference_by_hand():
    """Differences 1, 0 (clip x), 0 (y), 1 (z): mean 0.5, residuals 0, -1/8, 1/8,
    variance 3/2 * 2/64."""

    def side(*found):
        return make_items([{"score": score, "path": clip}
                           for score, clip in zip(found, "xxyzzy", strict=True)])  # fmt: skip

    a = side(1.0, 1.0, 0.0, 1.0, 1.0, None)
    b = side(0.0, 1.0, 0.0, 0.0, None, 1.0)
    result = paired_difference(a, b[::-1])
    half = Z * math.sqrt(3 / 64)
    assert result == {
        "n": 4, "clips": 3, "difference": 0.5, "only_a": 1, "only_b": 1,
        "interval": pytest.approx([0.5 - half, 0.5 + half]),
    }  # fmt: skip
    turned = paired_difference(b, a)
    assert turned["difference"] == -0.5
    assert turned["interval"] == pytest.approx([-0.5 - half, -0.5 + half])


def test_two_runs_with_the_same_scores_differ_by_no_more_than_few_unseen_clips():
    items = make_items([{"score": float(number % 2)} for number in range(20)])
    result = paired_difference(items, items)
    assert result["difference"] == 0.0
    assert result["interval"] == pytest.approx([-SHARE_20, SHARE_20])


def test_runs_of_different_rows_have_no_difference():
    a, b = make_items([{"score": 1.0}]), make_items([{"score": 1.0, "problem_id": 9}])
    expected = {"n": 0, "clips": 0, "difference": None, "interval": None, "only_a": 1, "only_b": 1}
    assert paired_difference(a, b) == expected


def test_gaps_by_task():
    shuffled = [{**row, "score": row["score"] / 2, "score_paper": row["score_paper"] / 4}
                for row in VSI_ROWS]  # fmt: skip
    shuffled[2] = {**shuffled[2], "score": None, "score_paper": None}  # object_abs_distance
    result = gaps("eval_vsibench", make_items(VSI_ROWS), make_items(shuffled))
    assert result["benchmark"] == "vsibench"
    found = {task: gap["difference"] for task, gap in result["by"]["task"].items()}
    expected = {task: pytest.approx(score / 2) for task, score in VSI_BY_TASK.items()}
    assert found == {**expected, "object_abs_distance": None}
    assert result["by"]["task"]["object_abs_distance"]["only_a"] == 1
    own, paper = result["overall"]["benchmark"], result["overall"]["paper"]
    assert own["difference"] == pytest.approx((4.4 - 0.5) / 7 / 2)
    assert (own["n"], own["only_a"], own["only_b"]) == (13, 1, 0)
    assert paper["difference"] == pytest.approx((2.4 / 4 * 0.75 + 5 / 9 * 0.75) / 2)
    json.dumps(result, allow_nan=False)


# ----------------------------------------------------------------------------------------- table


def summary(name, scores_, model="runs/rl/model", frames=16, order="ordered") -> dict:
    items = make_items([{"score": score} for score in scores_])
    return {
        "model": model, "benchmark": name, "order": order, "settings": {"max_frames": frames},
        "scores": score_benchmark(name, items),
    }  # fmt: skip


def test_table_1():
    summaries = [
        summary("eval_mmvu", [1.0, 0.0, 1.0]),
        summary("eval_videomme", [1.0, 0.0]),
        summary("eval_mvbench", [1.0, None, None], frames=32),
        summary("eval_mmvu", [None, None], frames=32),
        summary("eval_mmvu", [0.0], order="shuffled"),
        summary("test", [1.0]),
    ]
    expected = r"""
| Model | Frames | VSI-Bench | VideoMMMU | MMVU (mc) | MVBench | TempCompass | VideoMME (wo sub) |
| --- | ---: | ---: | ---: | ---: | ---: | ---: | ---: |
| runs/rl/model | 16 | - | - | 66.7 | - | - | 50.0 |
| runs/rl/model | 32 | - | - | 0.0\* | 33.3\* | - | - |
| runs/rl/model (shuffled) | 16 | - | - | 0.0 | - | - | - |

\* runs/rl/model, 32 frames, MVBench: 2 of 3 items are unusable and count 0

\* runs/rl/model, 32 frames, MMVU (mc): 2 of 2 items are unusable and count 0
"""
    assert markdown_table(summaries) == expected.lstrip()


def test_table_of_other_files_alone():
    with pytest.raises(ValueError, match="one of vsibench, .* but of mine, yours$"):
        markdown_table([summary(name, [1.0]) for name in ("yours", "mine", "mine")])


def test_table_with_two_scores_for_a_cell():
    with pytest.raises(ValueError, match="two summaries of mmvu for runs/rl/model with 16 frames"):
        markdown_table([summary("eval_mmvu", [1.0]), summary("eval_mmvu", [0.0])])


# ------------------------------------------------------------------------- files as they are given

OFFICIAL = {
    "eval_vsibench": (
        {
            "problem_id": 6, "problem": "How many chairs?", "data_type": "video", "process": "",
            "problem_type": "regression", "original_question_type": "object_counting",
            "options": None, "solution": "<answer>4</answer>", "data_source": "",
            "path": "./Evaluation/VSIBench/scannet/scene0011_00.mp4",
        },
        {"task": ["object_counting"], "question_type": ["object_counting"], "metric": ["MRA"]},
    ),
    "eval_videommmu": (
        {
            "problem_id": 604, "problem": "Which word comes first?", "data_type": "video",
            "problem_type": "multiple choice", "original_question_type": "multiple-choice",
            "options": ["A. this", "B. that"], "process": "", "solution": "<answer>A</answer>",
            "path": "./Evaluation/VideoMMMU/test_Geography_14.mp4", "data_source": "a link",
        },
        {"track": ["perception"]},
    ),
    "eval_mvbench": (
        {
            "video": "s01", "question": "Why?", "options": ["A. a", "B. b"], "answer": "a",
            "subtitle": "", "show_name": "a show", "start": 1.0, "end": 9.5, "fps": 3,
            "problem": "Why?", "data_type": "frame", "problem_type": "multiple choice",
            "original_question_type": "", "solution": "<answer>A</answer>", "problem_id": 1771,
            "path": "./Evaluation/MVBench/tvqa/frames_fps3_hq/s01.mp4",
        },
        {"task": ["episodic_reasoning"]},
    ),
    "eval_videomme": (
        {
            "video_id": "001", "duration": "short", "domain": "Knowledge", "answer": "C",
            "sub_category": "Technology", "url": "a link", "videoID": "x", "question_id": "001-1",
            "task_type": "Counting Problem", "question": "How many?", "options": ["A. 1", "B. 2"],
            "problem_id": 1, "problem": "How many?", "data_type": "video", "subtitle": "",
            "problem_type": "multiple choice", "original_question_type": "Counting Problem",
            "solution": "<answer>B</answer>", "path": "./Evaluation/VideoMME/x.mp4",
        },
        {"duration": ["short"], "domain": ["Knowledge"], "task": ["Counting Problem"]},
    ),
    "eval_mmvu": (
        {
            "problem_id": 1, "problem": "How much?", "data_type": "video", "process": "",
            "problem_type": "multiple choice", "original_question_type": "multiple-choice",
            "options": ["A. 1", "B. 2"], "solution": "<answer>A</answer>", "data_source": "a link",
            "path": "./Evaluation/MMVU/videos/Chemistry/0.mp4",
        },
        {"subject": ["Chemistry"]},
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", OFFICIAL)
def test_rows_of_the_official_files_tell_their_groups(tmp_path, name):
    row, groups = OFFICIAL[name]
    file = tmp_path / f"{name}.json"
    file.write_text(json.dumps([row]))
    (sample,) = load_samples(file)
    items = make_items([{
        "score": 1.0, "row": sample.row, "problem_id": sample.problem_id, "path": sample.path,
        "problem": sample.problem, "problem_type": sample.problem_type,
        "options": list(sample.options), "extra": sample.extra,
    }])  # fmt: skip
    result = score_benchmark(file.stem, items)
    assert result["benchmark"] == name.removeprefix("eval_")
    assert {key: list(part) for key, part in result["all_items"]["by"].items()} == groups
    assert result["all_items"]["overall"]["benchmark"]["score"] == 1.0
