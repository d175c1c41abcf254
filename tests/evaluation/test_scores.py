"""scores.py: each benchmark's averages worked out by hand, intervals, paired differences."""

import doctest
import random

import numpy as np
import pytest

from evaluation import scores
from evaluation.scores import (
    UNKNOWN,
    benchmark_of,
    gaps,
    mean_relative_accuracy,
    paired_difference,
    score_benchmark,
    weighted_mean,
)


def test_the_docstring_examples_hold():
    result = doctest.testmod(scores)
    assert result.attempted >= 1 and result.failed == 0


def test_a_file_of_another_name_is_no_benchmark():
    assert benchmark_of("eval_mvbench") == "mvbench"
    assert benchmark_of("eval_mmvu_small") == benchmark_of("mmvu") == "generic"


# ----------------------------------------------------------------------------------------- MRA


@pytest.mark.parametrize(
    "answer, reference, expected, strict",
    [
        pytest.param(9.5, 10, 1.0, 0.9, id="5%-below"),
        pytest.param(9.51, 10, 1.0, 1.0, id="4.9%"),
        pytest.param(2.85, 3, 1.0, 0.9, id="5%-of-3"),
        pytest.param(15, 10, 0.1, 0.0, id="50%-above"),
        pytest.param(4.99, 10, 0.0, 0.0, id="50.1%"),
        pytest.param(-9.5, -10, 1.0, 0.9, id="negative"),
        pytest.param(0, 0, 1.0, 1.0, id="0-for-0"),
        pytest.param(0.001, 0, 0.0, 0.0, id="something-for-0"),
        pytest.param(1e308, -1e308, 0.0, 0.0, id="huge"),
        pytest.param(1.0, 5e-324, 0.0, 0.0, id="tiny-reference"),
    ],
)
def test_mean_relative_accuracy(answer, reference, expected, strict):
    assert mean_relative_accuracy(float(answer), float(reference)) == expected
    assert mean_relative_accuracy(float(answer), float(reference), strict=True) == strict


# ----------------------------------------------------------------------------------- benchmarks


def make_items(rows: list[dict]) -> list[dict]:
    """Items with the keys that a row does not give: one video each, multiple choice, answer B."""
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


def vsi_row(kind: str, score: float, strict: float | None = None, video: str = "a") -> dict:
    numeric = strict is not None
    return {
        "problem_type": "regression" if numeric else "multiple choice", "score": score,
        "score_paper": strict if numeric else score, "path": f"/data/VSIBench/scannet/{video}.mp4",
        "extra": {"original_question_type": kind},
    }  # fmt: skip


VSI_ROWS = [
    vsi_row("object_counting", 1.0, 1.0), vsi_row("object_counting", 0.6, 0.5, "b"),
    vsi_row("object_abs_distance", 0.5, 0.4), vsi_row("object_size_estimation", 0.9, 0.8, "b"),
    vsi_row("room_size_estimation", 0.2, 0.1, "c"),
    vsi_row("object_rel_distance", 1.0), vsi_row("object_rel_distance", 0.0, video="b"),
    vsi_row("object_rel_direction_easy", 1.0), vsi_row("object_rel_direction_easy", 1.0, video="b"),
    vsi_row("object_rel_direction_medium", 0.0, video="c"),
    vsi_row("object_rel_direction_hard", 1.0), vsi_row("object_rel_direction_hard", 0.0, video="b"),
    vsi_row("route_planning", 0.0, video="c"), vsi_row("obj_appearance_order", 1.0, video="c"),
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
    part = score_benchmark("eval_vsibench", make_items(VSI_ROWS))["decodable_items"]
    assert values(part["by"]["task"]) == pytest.approx(VSI_BY_TASK)
    assert values(part["by"]["metric"]) == pytest.approx({"MRA": 3.2 / 5, "accuracy": 5 / 9})
    own, paper = part["overall"]["benchmark"], part["overall"]["paper"]
    assert own["score"] == pytest.approx(4.4 / 8)
    assert (own["n"], own["videos"], own["note"]) == (14, 3, "")
    assert paper["score"] == pytest.approx((2.8 / 5 + 5 / 9) / 2)


def lecture(number: int, score: float | None = 1.0, folder: str = "VideoMMMU") -> dict:
    path = f"/data/Evaluation/{folder}/dev_Biology_{(number - 1) % 300}.mp4"
    return {"problem_id": number, "score": score, "path": path}


def test_videommmu_tells_the_track_by_problem_id():
    rows = [lecture(1), lecture(300, 0.0), lecture(301), lecture(600), lecture(601), lecture(602),
            lecture(900, 0.0)]  # fmt: skip
    part = score_benchmark("eval_videommmu", make_items(rows))["all_items"]
    tracks = {"adaptation": 0.5, "comprehension": 1.0, "perception": 2 / 3}
    assert values(part["by"]["track"]) == pytest.approx(tracks)
    own = part["overall"]["benchmark"]
    assert own["score"] == pytest.approx((0.5 + 1 + 2 / 3) / 3)
    assert (own["videos"], own["note"]) == (3, "")  # 1, 301 and 601 are of one lecture
    assert part["overall"]["paper"]["score"] == pytest.approx(5 / 7)


@pytest.mark.parametrize(
    "name, row",
    [
        pytest.param("eval_videommmu", lecture(301, folder="VideoMMMU/question_only"), id="path"),
        pytest.param("eval_videommmu", lecture(901), id="beyond-the-file"),
        pytest.param("eval_videommmu", {**lecture(1), "problem_id": "1"}, id="no-number"),
        pytest.param("eval_mvbench", {"problem_id": 1, "score": 1.0, "path": "tvqa/1.mp4"},
                     id="folder-of-another-task"),
    ],
)  # fmt: skip
def test_no_mean_of_groups_where_a_row_is_not_where_its_problem_id_belongs(name, row):
    items = make_items([row])
    overall = score_benchmark(name, items)["all_items"]["overall"]
    assert overall["benchmark"]["score"] is overall["benchmark"]["interval"] is None
    assert "of row 0 is unknown" in overall["benchmark"]["note"]
    assert overall["paper"]["score"] == 1.0
    gap = gaps(name, items, items)["overall"]
    assert (gap["benchmark"]["difference"], gap["paper"]["difference"]) == (None, 0.0)


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
    assert part["overall"]["paper"]["score"] == 0.75


INFORMATION = "You will be presented with a video and several pieces of information. One .."


@pytest.mark.parametrize(
    "row, kind",
    [
        ({"problem": "Which caption matches the video better?"}, "caption_matching"),
        ({"extra": {"question": INFORMATION}}, "captioning"),
        ({"extra": {"mc_question": "What?"}}, "captioning"),
        ({"extra": {"original_question_type": "yes_no"}}, "yes_no"),
    ],
)
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
    assert part["overall"]["benchmark"]["note"] == "no item of caption_matching"
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
    assert everything["overall"]["benchmark"]["score"] == pytest.approx(1 / 3)  # with the lost
    assert everything["overall"]["paper"]["score"] == 0.2


# ----------------------------------------------------------------------------------- intervals


def slow_interval(scores_, weights, videos, groups):
    """The bootstrap written out: videos drawn one by one, the mean of each group item by item."""
    draw = random.Random(1)
    names = sorted(set(videos))
    whole = {g: sum(w for w, h in zip(weights, groups, strict=True) if h == g) for g in groups}
    means = []
    for _ in range(2000):
        items = [i for _ in names for name in [draw.choice(names)]
                 for i in range(len(scores_)) if videos[i] == name]  # fmt: skip
        found = {}
        for group in {groups[i] for i in items}:
            own = [i for i in items if groups[i] == group]
            weight = sum(weights[i] for i in own)
            found[group] = sum(weights[i] * scores_[i] for i in own) / weight
        total = sum(whole[group] for group in found)
        means.append(sum(whole[group] * mean for group, mean in found.items()) / total)
    return [sorted(means)[50], sorted(means)[-51]]


def test_intervals_are_those_of_a_slow_bootstrap():
    lowest = -1.0  # of differences
    draw = random.Random(0)
    scores_ = [draw.choice([lowest, 0.0, 0.3, 1.0]) for _ in range(40)]
    weights = [draw.uniform(0.5, 2.0) for _ in range(40)]
    videos = [draw.randrange(12) for _ in range(40)]
    groups = ["alone", *(draw.choice("AAABBC") for _ in range(39))]  # one group of one video
    mean, interval = weighted_mean(scores_, weights, videos, groups, lowest)
    assert mean == pytest.approx(np.average(scores_, weights=weights))
    # 2,000 resamples fix a percentile to about 0.05 of this half-width of 0.2 to 0.4.
    slow = slow_interval(scores_, weights, videos, groups)
    assert interval == pytest.approx(slow, abs=0.03)


def test_95_of_100_intervals_hold_the_truth_though_items_share_videos():
    """60 videos of 4 items, which are correct together in 3 of 4 videos. Intervals for independent
    items would hold it 74 times in 100."""
    draw = random.Random(0)
    videos = [video for video in range(60) for _ in range(4)]
    held = naive = 0
    for _ in range(200):
        right = [float(draw.random() < 0.6) for _ in range(60)]
        scores_ = [right[v] if v % 4 else float(draw.random() < 0.6) for v in videos]
        mean, (low, high) = weighted_mean(scores_, [1.0] * 240, videos)
        held += low <= 0.6 <= high
        naive += abs(mean - 0.6) <= 1.96 * (mean * (1 - mean) / 240) ** 0.5
    assert 0.91 <= held / 200 <= 0.98
    assert naive / 200 < 0.8


SHARE_20, SHARE_1 = 1 - 0.025 ** (1 / 20), 0.975  # the first is the textbook's 0.1684


@pytest.mark.parametrize(
    "scores_, videos, expected",
    [
        pytest.param([0.0] * 20, range(20), [0.0, 0.1684], id="0-of-20"),
        pytest.param(
            [0.7] * 20, range(20), [0.7 - 0.7 * SHARE_20, 0.7 + 0.3 * SHARE_20], id="all-equal"
        ),
        pytest.param([1.0, 0.0], "aa", [0.5 - SHARE_1 / 2, 0.5 + SHARE_1 / 2], id="one-video"),
    ],
)
def test_no_spread_is_no_certainty(scores_, videos, expected):
    _, interval = weighted_mean(scores_, [1 / len(scores_)] * len(scores_), list(videos))
    assert interval == pytest.approx(expected, abs=5e-5)


# ---------------------------------------------------------------------------------- differences


def test_paired_difference_by_hand():
    """Differences 1, 0 (video x), 0 (y), 1 (z). One resample in 27 is y alone, one in 27 z alone:
    more than the 2.5% beyond each end."""

    def side(*found):
        return make_items([{"score": score, "path": video}
                           for score, video in zip(found, "xxyzzy", strict=True)])  # fmt: skip

    a = side(1.0, 1.0, 0.0, 1.0, 1.0, None)
    b = side(0.0, 1.0, 0.0, 0.0, None, 1.0)
    result = paired_difference(a, b[::-1])
    assert result == {
        "n": 4, "videos": 3, "difference": 0.5, "num_unpaired": 2, "interval": [0.0, 1.0],
    }  # fmt: skip
    turned = paired_difference(b, a)
    assert turned["difference"] == -0.5
    assert turned["interval"] == [-1.0, 0.0]


def test_gaps_by_task():
    shuffled = [{**row, "score": row["score"] / 2, "score_paper": row["score_paper"] / 4}
                for row in VSI_ROWS]  # fmt: skip
    shuffled[2] = {**shuffled[2], "score": None, "score_paper": None}  # object_abs_distance
    result = gaps("eval_vsibench", make_items(VSI_ROWS), make_items(shuffled))
    assert result["benchmark"] == "vsibench"
    found = {task: gap["difference"] for task, gap in result["by"]["task"].items()}
    expected = {task: pytest.approx(score / 2) for task, score in VSI_BY_TASK.items()}
    assert found == {**expected, "object_abs_distance": None}
    own, paper = result["overall"]["benchmark"], result["overall"]["paper"]
    assert own["difference"] == pytest.approx((4.4 - 0.5) / 7 / 2)
    assert (own["n"], own["num_unpaired"]) == (13, 1)
    assert paper["difference"] == pytest.approx((2.4 / 4 * 0.75 + 5 / 9 * 0.75) / 2)
