"""Scores of the paper's six video benchmarks, from the items that eval.py writes.

Each overall score is given twice: "benchmark" as the benchmark's own authors average, "paper" as
the paper's do (Tables 1-3). Every score is given over all items, where one with unusable media
counts 0, and over the decodable ones alone, with a 95% interval over videos (weighted_mean).

The paper's authors (tulerfeng/Video-R1, src/eval_bench.py and issue 121) count unreadable videos
as wrong too. Only how authors average is taken from them. What counts as correct is defined in
rewards.py; MMVU and TempCompass also ask a language model.

An item is a dict with at least row, problem_id, problem, problem_type, options, path, answer,
score (in [0, 1]; None: unusable media), score_paper, error and extra (the row's further keys).
"""

import math
import re
from collections import Counter, defaultdict
from collections.abc import Callable, Hashable, Sequence
from fractions import Fraction
from pathlib import PurePath
from typing import NamedTuple

import numpy as np

UNKNOWN = "unknown"  # the group of an item whose row does not name it
NUM_RESAMPLES, SEED = 2000, 0  # of the bootstrap

VSI_TASKS = (
    "object_counting", "object_abs_distance", "object_size_estimation", "room_size_estimation",
    "object_rel_distance", "object_rel_direction", "route_planning", "obj_appearance_order",
)  # fmt: skip
TRACKS = ("adaptation", "comprehension", "perception")
MVBENCH_TASKS = {  # in the order of eval_mvbench, each with the folder of its videos
    "action_antonym": "ssv2_video", "action_count": "perception", "action_localization": "sta",
    "action_prediction": "star", "action_sequence": "star", "character_order": "perception",
    "counterfactual_inference": "clevrer", "egocentric_navigation": "vlnqa",
    "episodic_reasoning": "tvqa", "fine_grained_action": "Moments_in_Time_Raw",
    "fine_grained_pose": "nturgbd", "moving_attribute": "clevrer", "moving_count": "clevrer",
    "moving_direction": "clevrer", "object_existence": "clevrer", "object_interaction": "star",
    "object_shuffle": "perception", "scene_transition": "scene_qa", "state_change": "perception",
    "unexpected_action": "FunQA_test",
}  # fmt: skip
TEMPCOMPASS_KINDS = ("multi-choice", "yes_no", "caption_matching", "captioning")
CAPTION_MATCHING = (  # how its questions begin: question_gen_caption_match.py of TempCompass
    "Which caption matches the video better", "Which sentence better captures the essence",
    "Which description is a more suitable match",
)  # fmt: skip
CAPTIONING = (  # question_gen_captioning.py
    "You will be presented with a video and several pieces of information",
    "A video and multiple pieces of information will be provided",
)


def mean_relative_accuracy(answer: float, reference: float, strict: bool = False) -> float:
    """VSI-Bench's MRA: the share of theta in {0.50, 0.55, .., 0.95} that the answer passes.

    It passes if |answer - reference| / |reference| <= 1 - theta; strict: <, as the paper's authors
    have it. A reference of 0 requires a 0. Both numbers are finite and compared as exact decimals
    of 15 digits, so that 9.5 for 10 is off by 5%, not by 5.000000000000004%.

    >>> mean_relative_accuracy(8.0, 10.0), mean_relative_accuracy(8.0, 10.0, strict=True)
    (0.7, 0.6)
    """
    exact_answer, exact_reference = (Fraction(f"{x:.15g}") for x in (answer, reference))
    if exact_reference == 0:
        return float(exact_answer == 0)
    twentieths = 20 * abs(exact_answer - exact_reference) / abs(exact_reference)
    edges = range(1, 11)  # 1 - theta, in twentieths
    return sum(twentieths < edge if strict else twentieths <= edge for edge in edges) / 10


# ---------------------------------------------------------------------------------------- groups
# A key names the groups of an item, outermost first; those of one level have equal weight.

Key = Callable[[dict], tuple]


def _everything(item: dict) -> tuple:
    return ()


def _metric(item: dict) -> tuple:
    return ("MRA" if item["problem_type"] == "regression" else "accuracy",)


def _extra(name: str) -> Key:
    return lambda item: (str(item["extra"].get(name) or UNKNOWN),)


def _block(item: dict, names: Sequence[str], size: int) -> str:
    """The group of a row in a file of equal blocks, by its problem_id, which counts from 1."""
    number = item["problem_id"]
    inside = isinstance(number, int) and 1 <= number <= size * len(names)
    return names[(number - 1) // size] if inside else UNKNOWN


def _track(item: dict) -> tuple:
    """Unknown if the path contradicts it: question_only holds videos of the adaptation track."""
    track = _block(item, TRACKS, 300)
    other = track != "adaptation" and "question_only" in item["path"]
    return (UNKNOWN if other else track,)


def _mvbench_task(item: dict) -> tuple:
    """Unknown if the path contradicts it: several tasks share a folder."""
    task = _block(item, tuple(MVBENCH_TASKS), 200)
    return (task if MVBENCH_TASKS.get(task) in PurePath(item["path"]).parts else UNKNOWN,)


def _vsi_task(item: dict) -> tuple:
    kind = str(item["extra"].get("original_question_type"))
    if kind.startswith("object_rel_direction"):  # _easy, _medium, _hard
        return "object_rel_direction", kind
    return (kind if kind in VSI_TASKS else UNKNOWN,)


def _tempcompass_kind(item: dict) -> tuple:
    """All rows are multiple choice here; their texts tell which of the four files they are from."""
    kind = item["extra"].get("original_question_type")
    if kind in TEMPCOMPASS_KINDS:
        return (kind,)
    texts = (str(item["extra"].get("question")), item["problem"])
    if "mc_question" in item["extra"] or any(text.startswith(CAPTIONING) for text in texts):
        return ("captioning",)
    if any(text.startswith(CAPTION_MATCHING) for text in texts):
        return ("caption_matching",)
    options = {re.sub(r"^\(?[A-Za-z][.:)]\s*", "", o).strip(" .").lower() for o in item["options"]}
    return ("yes_no" if options == {"yes", "no"} else "multi-choice",)


def _answered(item: dict) -> bool:
    """Video-MME's script leaves out a response in which it finds no letter A-D."""
    return item["error"] is not None or re.search("[ABCD]", item["answer"] or "") is not None


class Benchmark(NamedTuple):
    """One benchmark: its column in Table 1, and how its authors average."""

    column: str
    definition: str
    by: dict[str, Key]  # groupings
    macro: str = ""  # the one whose groups have equal weight overall; "": one mean over items
    groups: Sequence[str] = ()  # those of it that the whole benchmark has
    counts: Callable[[dict], bool] = lambda item: True  # in its overall score


BENCHMARKS = {  # in the order of Table 1
    # vision-x-nyu/thinking-in-space, lmms_eval/tasks/vsibench: the mean of a task is the mean of
    # its levels, which object_rel_direction has
    "vsibench": Benchmark(
        "VSI-Bench", "mean of 8 tasks, MRA (<=) or accuracy",
        {"task": _vsi_task, "metric": _metric}, "task", VSI_TASKS,
    ),
    # videommmu/VideoMMMU, README; lmms-eval, tasks/videommmu
    "videommmu": Benchmark(
        "VideoMMMU", "mean of 3 tracks, by problem_id in blocks of 300",
        {"track": _track}, "track", TRACKS,
    ),
    # yale-nlp/MMVU, utils/eval_utils.py
    "mmvu": Benchmark("MMVU (mc)", "accuracy, multiple choice only", {}),
    # OpenGVLab/Ask-Anything, video_chat2/mvbench.ipynb
    "mvbench": Benchmark(
        "MVBench", "mean of 20 tasks, by problem_id in blocks of 200",
        {"task": _mvbench_task}, "task", tuple(MVBENCH_TASKS),
    ),
    # llyx97/TempCompass, utils/eval_utils.py, print_result: one accuracy for each kind
    "tempcompass": Benchmark(
        "TempCompass", "mean of 4 kinds of question",
        {"kind": _tempcompass_kind, "dimension": _extra("dim")}, "kind", TEMPCOMPASS_KINDS,
    ),
    # BradyFU/Video-MME, evaluation/eval_your_results.py
    "videomme": Benchmark(
        "VideoMME (wo sub)", "accuracy where the answer holds a letter A-D",
        {key: _extra(key) for key in ("duration", "domain", "task_type")}, counts=_answered,
    ),
    "generic": Benchmark("", "mean score", {"problem_type": lambda item: (item["problem_type"],)}),
}  # fmt: skip
PAPER = "mean accuracy; with regression items: (mean accuracy + mean MRA with <) / 2"


def benchmark_of(name: str) -> str:
    """The benchmark of a data file, by its stem: eval_mvbench is mvbench, another file generic."""
    short = name.removeprefix("eval_")
    return short if short != name and short in BENCHMARKS else "generic"


# ------------------------------------------------------------------------------ means, intervals


def weighted_mean(
    scores: Sequence[float], weights: Sequence[float], videos: Sequence[Hashable],
    groups: Sequence[Hashable] | None = None, lowest: float = 0.0,
) -> tuple[float, list[float]]:  # fmt: skip
    """A weighted mean and its 95% interval, a percentile bootstrap over videos.

    Items of one video are not independent, so each of NUM_RESAMPLES resamples draws as many videos
    as there are (C) with replacement, all their items with them, and takes the mean in each group,
    then over the drawn groups by their weights. Below some 30 videos the interval is too short.
    Where no resample differs, it is the exact binomial bound for "0 of C": up to the share
    1 - 0.025^(1/C) of all videos may score otherwise. 0 correct in 20 videos gives [0, 0.168].

    Args:
        scores: in [lowest, 1], at least one. weights: positive. videos: the cluster of each item.
        groups: of each item, as the tasks of a macro mean; default: one group.
        lowest: 0, or -1 for differences of scores.
    """
    score, weight = np.asarray(scores, float), np.asarray(weights, float)  # (N,)
    mean = float(np.average(score, weights=weight))
    groups = [""] * len(score) if groups is None else groups
    # (N,) in 0 .. C - 1 and 0 .. K - 1
    video, group = (np.unique([str(x) for x in names], return_inverse=True)[1]
                    for names in (videos, groups))  # fmt: skip
    num_videos, num_groups = video.max() + 1, group.max() + 1
    sums = np.zeros((2, num_videos, num_groups))
    np.add.at(sums, (0, video, group), weight * score)
    np.add.at(sums, (1, video, group), weight)

    draws = np.random.default_rng(SEED).integers(num_videos, size=(NUM_RESAMPLES, num_videos))
    flat = draws + num_videos * np.arange(NUM_RESAMPLES)[:, None]
    counts = np.bincount(flat.ravel(), minlength=flat.size).reshape(flat.shape).astype(float)
    scored, weighed = counts @ sums  # (resamples, K) each
    drawn = weighed > 0
    group_means = np.divide(scored, weighed, out=np.zeros_like(scored), where=drawn)
    group_weights = drawn * sums[1].sum(0)
    means = (group_weights * group_means).sum(1) / group_weights.sum(1)  # (resamples,)
    if np.ptp(means) < 1e-9:
        unseen = 1 - 0.025 ** (1 / num_videos)
        return mean, [mean - unseen * (mean - lowest), mean + unseen * (1 - mean)]
    return mean, np.quantile(means, (0.025, 0.975)).tolist()


def _equal_weights(keys: Sequence[tuple]) -> list[float]:
    """Weights under which the groups of each level count the same: 1 / (K n_k) for K groups of n_k
    items. They sum to 1."""
    sizes, prefixes = Counter(keys), {key[:end] for key in keys for end in range(1, len(key) + 1)}
    siblings = Counter(prefix[:-1] for prefix in prefixes)
    return [1 / sizes[key] / math.prod(siblings[key[:depth]] for depth in range(len(key)))
            for key in keys]  # fmt: skip


def _mean(values: list[float], items: list[dict], key: Key | None, name: str, lowest=0.0) -> dict:
    """n, videos, the mean under its name and its interval: None where there is none."""
    videos = [item["path"] for item in items]
    mean = interval = None
    if values and key is not None:
        keys = [key(item) for item in items]
        mean, interval = weighted_mean(values, _equal_weights(keys), videos, keys, lowest)
    return {"n": len(items), "videos": len(set(videos)), name: mean, "interval": interval}


def _score(items: list[dict], key: Key | None, field: str = "score") -> dict:
    return _mean([item[field] for item in items], items, key, "score")


def paired_difference(
    items_a: list[dict], items_b: list[dict], key: Key | None = _everything, field: str = "score"
) -> dict:
    """The mean of score(a) - score(b) over the items that are usable on both sides.

    By default over items, else over the equal groups of `key`. num_unpaired counts the items that
    only one side has or could use. Items are matched by row and problem_id.
    """
    a, b = ({(item["row"], item["problem_id"]): item for item in items if item[field] is not None}
            for items in (items_a, items_b))  # fmt: skip
    both = [name for name in a if name in b]
    values = [a[name][field] - b[name][field] for name in both]
    found = _mean(values, [a[name] for name in both], key, "difference", lowest=-1.0)
    return found | {"num_unpaired": len(a.keys() ^ b.keys())}


def _split(items: list[dict], key: Key) -> dict[str, list[dict]]:
    """The items of each outermost group; none of a group that is not there."""
    groups = defaultdict(list)
    for item in items:
        groups[key(item)[0]].append(item)
    return groups


def _report(benchmark: Benchmark, measure: Callable[..., dict], *sides: list[dict]) -> dict:
    """A measure (_score, paired_difference) under both definitions, and by group. The benchmark's
    own has a note if groups of its macro mean are missing or not known: then there is no mean."""
    note, overall = "", _everything
    if benchmark.macro:
        overall = benchmark.by[benchmark.macro]
        rows = {overall(item)[0]: item["row"] for item in sides[0]}
        missing = [name for name in benchmark.groups if name not in rows]
        note = f"no item of {', '.join(missing)}" if missing else ""
        if UNKNOWN in rows:
            note = f"no mean of groups: the {benchmark.macro} of row {rows[UNKNOWN]} is unknown"
            overall = None
    groups = {}
    for grouping, key in benchmark.by.items():
        parts = [_split(side, key) for side in sides]
        names = sorted(set().union(*parts))
        groups[grouping] = {name: measure(*(part[name] for part in parts), key) for name in names}
    counted = [[item for item in side if benchmark.counts(item)] for side in sides]
    return {
        "overall": {
            "benchmark": measure(*counted, overall) | {"note": note},
            "paper": measure(*sides, _metric, "score_paper"),
        },
        "by": groups,
    }


def score_benchmark(name: str, items: list[dict]) -> dict:
    """All scores of one benchmark, ready for JSON.

    Items with unusable media have score and score_paper None. A score is {"n", "videos", "score" in
    [0, 1], "interval"}; overall and by hold those of all_items and of decodable_items.
    """
    benchmark = BENCHMARKS[benchmark_of(name)]
    usable = [item for item in items if item["score"] is not None]
    lost = [{**item, "score": 0.0, "score_paper": 0.0} for item in items if item["score"] is None]
    return {
        "benchmark": benchmark_of(name),
        "definitions": {"benchmark": benchmark.definition, "paper": PAPER},
        "all_items": _report(benchmark, _score, usable + lost),
        "decodable_items": _report(benchmark, _score, usable),
    }


def gaps(name: str, items_a: list[dict], items_b: list[dict]) -> dict:
    """Paired differences a - b of a benchmark: of two models, or of two orders of the frames."""
    benchmark = benchmark_of(name)
    return {"benchmark": benchmark,
            **_report(BENCHMARKS[benchmark], paired_difference, items_a, items_b)}  # fmt: skip
