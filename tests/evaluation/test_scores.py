"""scores.py: each benchmark's averages worked out by hand, intervals, paired differences."""

import doctest
import json
import random

import numpy as np
import pytest

from data import load_samples
from evaluation import scores
from evaluation.scores import (
    MVBENCH_TASKS,
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


def test_benchmark_of_a_file():
    assert benchmark_of("eval_mvbench") == "mvbench"
    for name in ("eval_mmvu_small", "mmvu", "eval_generic", "test"):
        assert benchmark_of(name) == "generic"


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
    result = score_benchmark("eval_vsibench", make_items(VSI_ROWS))
    part = result["decodable_items"]
    assert values(part["by"]["task"]) == pytest.approx(VSI_BY_TASK)
    assert part["by"]["task"]["object_rel_direction"]["n"] == 5
    assert part["by"]["question_type"]["object_rel_direction_hard"]["score"] == 0.5
    assert values(part["by"]["metric"]) == pytest.approx({"MRA": 3.2 / 5, "accuracy": 5 / 9})
    own, paper = part["overall"]["benchmark"], part["overall"]["paper"]
    assert own["score"] == pytest.approx(4.4 / 8)
    assert (own["n"], own["videos"], own["groups_missing"]) == (14, 3, [])
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
    assert (own["videos"], own["groups_unknown"]) == (3, "")  # 1, 301 and 601 are of one lecture
    assert part["overall"]["paper"]["score"] == pytest.approx(5 / 7)


QUESTION_ONLY = "VideoMMMU/question_only"
IMAGE = {**lecture(1), "path": "/data/VideoMMMU/question_only/dev_Biology_0_image.mp4"}


@pytest.mark.parametrize(
    "rows, reason",
    [
        pytest.param([IMAGE, lecture(301)], "", id="question-only"),
        pytest.param([lecture(1), lecture(301)], "", id="confirmed"),
        pytest.param([lecture(1)], "no lecture is there in two tracks", id="nothing-confirms"),
        pytest.param([lecture(1), {**lecture(302), "problem_id": 301}],
                     "row 1 shows another lecture", id="another-order"),
        pytest.param([lecture(1), lecture(301, folder=QUESTION_ONLY)], "row 1 is not where",
                     id="question-only-in-another-track"),
        pytest.param([lecture(1), lecture(901)], "row 1 is not where", id="beyond-the-file"),
        pytest.param([{**lecture(1), "problem_id": "1"}], "row 0 is not where", id="no-number"),
    ],
)  # fmt: skip
def test_videommmu_tracks_are_unknown_unless_the_lectures_confirm_them(rows, reason):
    part = score_benchmark("eval_videommmu", make_items(rows))["all_items"]
    own = part["overall"]["benchmark"]
    assert own["groups_unknown"].startswith(reason) and bool(reason) == bool(own["groups_unknown"])
    assert own["score"] == (None if reason else 1.0)
    assert list(part["by"]["track"]) == ([UNKNOWN] if reason else ["adaptation", "comprehension"])
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


def test_mvbench_tasks_are_unknown_where_a_folder_contradicts_problem_id():
    """Several tasks share a folder, so that one contradiction puts every row in doubt."""
    rows = [mvbench_row(201, "perception", 1.0), mvbench_row(1, "tvqa/frames_fps3_hq", 0.0)]
    part = score_benchmark("eval_mvbench", make_items(rows))["all_items"]
    assert values(part["by"]["task"]) == {UNKNOWN: 0.5}
    own = part["overall"]["benchmark"]
    assert own["score"] is own["interval"] is None
    assert own["groups_unknown"].startswith("row 1, problem_id 1 (action_antonym), is not in the")
    assert part["overall"]["paper"]["score"] == 0.5
    gap = gaps("eval_mvbench", make_items(rows), make_items(rows))
    assert gap["overall"]["benchmark"]["difference"] is None
    assert list(gap["by"]["task"]) == [UNKNOWN]


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
    assert everything["overall"]["benchmark"]["score"] == pytest.approx(1 / 3)  # with the lost
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
    assert (part["overall"]["paper"]["n"], part["overall"]["paper"]["videos"]) == (4, 3)


def test_another_file_by_problem_type():
    rows = [{"score": 1.0}, {"score": 0.0}, {"score": 0.4, "problem_type": "OCR"},
            {"score": 0.7, "score_paper": 0.6, "problem_type": "regression"}]  # fmt: skip
    part = score_benchmark("val", make_items(rows))["all_items"]
    types = {"OCR": 0.4, "multiple choice": 0.5, "regression": 0.7}
    assert values(part["by"]["problem_type"]) == pytest.approx(types)
    assert part["overall"]["benchmark"]["score"] == pytest.approx(2.1 / 4)
    assert part["overall"]["paper"]["score"] == pytest.approx((1.4 / 3 + 0.6) / 2)


# ------------------------------------------------------------------------------- -------- unusable


def test_unusable_media_count_zero_or_not_at_all():
    rows = [vsi_row("object_counting", 0.8, 0.7), vsi_row("object_counting", 0.6, 0.6, "b"),
            vsi_row("route_planning", 1.0, video="c")]  # fmt: skip
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
    nothing = {"n": 0, "videos": 0, "score": None, "interval": None}
    for items in ([], make_items([{"score": None}])):
        overall = score_benchmark(name, items)["decodable_items"]["overall"]
        assert {key: overall["benchmark"][key] for key in nothing} == nothing
        assert overall["paper"] == {**nothing, "parts": {}}


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


@pytest.mark.parametrize("lowest", [0.0, -1.0], ids=["scores", "differences"])
def test_intervals_are_those_of_a_slow_bootstrap(lowest):
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


def test_many_videos_give_the_textbook_standard_error():
    """2,000 videos of one item each: 1.96 * sqrt(p (1 - p) / n)."""
    scores_ = [float(number % 4 == 0) for number in range(2000)]
    mean, (low, high) = weighted_mean(scores_, [1.0] * 2000, range(2000))
    half = 1.96 * (0.25 * 0.75 / 2000) ** 0.5
    assert mean == 0.25
    assert [mean - low, high - mean] == pytest.approx([half, half], rel=0.08)


def test_that_one_group_is_harder_adds_no_width():
    """Groups A (all 1) and B (all 0) on the same videos: the macro mean is 0.5 in any resample."""
    scores_, videos = [1.0] * 20 + [0.0] * 20, [*range(20)] * 2
    _, interval = weighted_mean(scores_, [1 / 40] * 40, videos, ["A"] * 20 + ["B"] * 20)
    assert interval == pytest.approx([0.5 - SHARE_20 / 2, 0.5 + SHARE_20 / 2])
    varied = [*scores_[:39], 1.0]
    _, (low, high) = weighted_mean(varied, [1 / 40] * 40, videos, ["A"] * 20 + ["B"] * 20)
    assert 0.49 < low < high < 0.61


def test_95_of_100_intervals_hold_the_truth_though_items_share_videos():
    """60 videos of 4 items, which are correct together in 3 of 4 videos. Intervals for independent
    items would hold it 74 times in 100."""
    draw = random.Random(0)
    videos = [video for video in range(60) for _ in range(4)]
    held = naive = 0
    for _ in range(400):
        right = [float(draw.random() < 0.6) for _ in range(60)]
        scores_ = [right[v] if v % 4 else float(draw.random() < 0.6) for v in videos]
        mean, (low, high) = weighted_mean(scores_, [1.0] * 240, videos)
        held += low <= 0.6 <= high
        naive += abs(mean - 0.6) <= 1.96 * (mean * (1 - mean) / 240) ** 0.5
    assert 0.91 <= held / 400 <= 0.98
    assert naive / 400 < 0.8


SHARE_20, SHARE_1 = 1 - 0.025 ** (1 / 20), 0.975  # the first is the textbook's 0.1684


@pytest.mark.parametrize(
    "scores_, videos, expected",
    [
        pytest.param([0.0] * 20, range(20), [0.0, 0.1684], id="0-of-20"),
        pytest.param([1.0] * 20, range(20), [1 - 0.1684, 1.0], id="20-of-20"),
        pytest.param([0.0] * 40, [*range(20)] * 2, [0.0, 0.1684], id="0-of-40-in-20-videos"),
        pytest.param(
            [0.7] * 20, range(20), [0.7 - 0.7 * SHARE_20, 0.7 + 0.3 * SHARE_20], id="all-equal"
        ),
        pytest.param([1.0, 0.0], "aa", [0.5 - SHARE_1 / 2, 0.5 + SHARE_1 / 2], id="one-video"),
        pytest.param([1.0], "a", [1 - SHARE_1, 1.0], id="one-item"),
    ],
)
def test_no_spread_is_no_certainty(scores_, videos, expected):
    _, interval = weighted_mean(scores_, [1 / len(scores_)] * len(scores_), list(videos))
    assert interval == pytest.approx(expected, abs=5e-5)


def test_a_video_that_serves_two_tasks_is_one_video():
    """Tasks A and B show the videos x and y, and x is right in both: a resample is all x, all y or
    one of each. Were they four videos, hardly any resample would be all right."""
    rows = [mvbench_row(number, folder, score) for number, folder, score in (
        (201, "perception", 1.0), (202, "perception", 0.0),
        (1001, "perception", 1.0), (1002, "perception", 0.0))]  # fmt: skip
    for row, video in zip(rows, "xyxy", strict=True):
        row["path"] = f"/data/MVBench/perception/{video}.mp4"
    overall = score_benchmark("eval_mvbench", make_items(rows))["all_items"]["overall"]
    assert overall["benchmark"]["videos"] == 2
    assert overall["benchmark"]["interval"] == [0.0, 1.0]


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
        "n": 4, "videos": 3, "difference": 0.5, "only_a": 1, "only_b": 1, "interval": [0.0, 1.0],
    }  # fmt: skip
    turned = paired_difference(b, a)
    assert turned["difference"] == -0.5
    assert turned["interval"] == [-1.0, 0.0]


def test_the_same_scores_twice_differ_by_no_more_than_few_unseen_videos():
    items = make_items([{"score": float(number % 2)} for number in range(20)])
    result = paired_difference(items, items)
    assert result["difference"] == 0.0
    assert result["interval"] == pytest.approx([-SHARE_20, SHARE_20])


def test_runs_of_different_rows_have_no_difference():
    a, b = make_items([{"score": 1.0}]), make_items([{"score": 1.0, "problem_id": 9}])
    expected = {"n": 0, "videos": 0, "difference": None, "interval": None, "only_a": 1, "only_b": 1}
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
        {"track": [UNKNOWN]}  # no second row of this lecture confirms it,
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
    known = UNKNOWN not in groups.get("track", ())
    assert result["all_items"]["overall"]["benchmark"]["score"] == (1.0 if known else None)
