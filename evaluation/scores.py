"""Scores of the paper's six video benchmarks, from the items that eval.py writes.

Each overall score is given twice: "benchmark" as the benchmark's own authors average, "paper" as
the paper's do (Tables 1-3). Every score is given over all items, where one with unusable media
counts 0, and over the decodable ones alone, with a 95% interval over videos (weighted_mean).

    VSI-Bench    mean of 8 tasks          vision-x-nyu/thinking-in-space, lmms_eval/tasks/vsibench
    VideoMMMU    mean of 3 tracks         videommmu/VideoMMMU, README; lmms-eval, tasks/videommmu
    MMVU         accuracy                 yale-nlp/MMVU, utils/eval_utils.py
    MVBench      mean of 20 tasks         OpenGVLab/Ask-Anything, video_chat2/mvbench.ipynb
    TempCompass  accuracy of each kind    llyx97/TempCompass, utils/eval_utils.py, print_result
    Video-MME    accuracy where answered  BradyFU/Video-MME, evaluation/eval_your_results.py
    the paper    mean accuracy; VSI-Bench (mean accuracy + mean MRA) / 2; unreadable videos are
                 wrong                    tulerfeng/Video-R1, src/eval_bench.py and issue 121

Only how they average is taken from there. What counts as correct is defined in rewards.py; MMVU
and TempCompass also ask a language model.

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
    of 15 digits, so that 9.5 for 10 is off by 5%, not by 5.000000000000004%. (At such edges the
    authors' two scripts, in float64 and float32, pass or fail by rounding.)

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
# A key function names the groups that an item is in, outermost first: ("task", "level"). The
# groups of one level have equal weight, however many items they have.


def _everything(item: dict) -> tuple:
    return ()


def _unknown(item: dict) -> tuple:
    return (UNKNOWN,)


def _metric(item: dict) -> tuple:
    return ("MRA" if item["problem_type"] == "regression" else "accuracy",)


def _extra(name: str) -> Callable[[dict], tuple]:
    return lambda item: (str(item["extra"].get(name) or UNKNOWN),)


def _vsi_task(item: dict) -> tuple:
    kind = str(item["extra"].get("original_question_type"))
    if kind.startswith("object_rel_direction"):  # _easy, _medium, _hard
        return "object_rel_direction", kind
    return (kind if kind in VSI_TASKS else UNKNOWN,)


def _numbered(item: dict, names: Sequence[str], block: int) -> str:
    """The group of a row in a file of equal blocks, by its problem_id, which counts from 1."""
    number = item["problem_id"]
    inside = isinstance(number, int) and 1 <= number <= block * len(names)
    return names[(number - 1) // block] if inside else UNKNOWN


def _track(item: dict) -> tuple:
    """Rows do not name their track: problem_id 1-300 are adaptation, 301-600 comprehension, 601-900
    perception, three passes over the same 300 lectures (_doubt_tracks checks that)."""
    return (_numbered(item, TRACKS, 300),)


def _doubt_tracks(items: list[dict]) -> str:
    """Some versions of the file show question_only/<lecture>_image.mp4 in the adaptation track
    (issue 69 of Video-R1)."""
    lectures, num_confirmed = {}, 0
    for item in items:
        path, track = PurePath(item["path"]), _track(item)[0]
        if track == UNKNOWN or ("question_only" in path.parts and track != TRACKS[0]):
            return f"row {item['row']} is not where its problem_id belongs"
        place = item["problem_id"] % 300
        num_confirmed += place in lectures
        lecture = path.stem.removesuffix("_image")
        if lectures.setdefault(place, lecture) != lecture:
            return f"row {item['row']} shows another lecture than the other tracks at its place"
    return "" if num_confirmed else "no lecture is there in two tracks to confirm the numbering"


def _mvbench_task(item: dict) -> tuple:
    """Rows do not name their task: problem_id counts 200 for each in alphabetical order."""
    return (_numbered(item, tuple(MVBENCH_TASKS), 200),)


def _doubt_tasks(items: list[dict]) -> str:
    """Several tasks share a folder, so it can contradict the numbers but not replace them."""
    for item in items:
        task = _mvbench_task(item)[0]
        if MVBENCH_TASKS.get(task) not in PurePath(item["path"]).parts:
            where = f"row {item['row']}, problem_id {item['problem_id']!r} ({task})"
            return f"{where}, is not in the folder of this task's videos: {item['path']}"
    return ""


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


def _mmvu_subject(item: dict) -> tuple:
    *_, videos, folder, _ = ("", "", *PurePath(item["path"]).parts)  # MMVU/videos/Chemistry/0.mp4
    return (folder if videos == "videos" else UNKNOWN,)


def _answered(item: dict) -> bool:
    """Video-MME's script leaves out a response in which it finds no letter A-D."""
    return item["error"] is not None or re.search("[ABCD]", item["answer"] or "") is not None


class Benchmark(NamedTuple):
    """One benchmark: its column in Table 1, and how its authors average."""

    column: str
    definition: str
    overall: Callable[[dict], tuple] = _everything  # the groups of its macro mean
    groups: Sequence[str] = ()  # the outermost of them, all of which the whole benchmark has
    by: dict[str, Callable[[dict], tuple]] = {}
    counts: Callable[[dict], bool] = lambda item: True  # in its overall score
    doubt: Callable[[list[dict]], str] = lambda items: ""  # why the groups cannot be trusted


BENCHMARKS = {  # in the order of Table 1
    "vsibench": Benchmark(
        "VSI-Bench",
        "unweighted mean of 8 tasks, MRA (<=) or accuracy; object_rel_direction is the mean of its "
        "levels easy, medium and hard",
        _vsi_task, VSI_TASKS,
        {"task": _vsi_task, "question_type": _extra("original_question_type"), "metric": _metric},
    ),
    "videommmu": Benchmark(
        "VideoMMMU",
        "unweighted mean of the accuracies of 3 tracks, told apart by problem_id in blocks of 300",
        _track, TRACKS, {"track": _track}, doubt=_doubt_tracks,
    ),
    "mmvu": Benchmark(
        "MMVU (mc)", "accuracy over questions, here the multiple-choice ones",
        by={"subject": _mmvu_subject},
    ),
    "mvbench": Benchmark(
        "MVBench",
        "unweighted mean of the accuracies of 20 tasks, told apart by problem_id in blocks of 200; "
        "the authors' notebook takes correct / total, which is the same for equal blocks",
        _mvbench_task, tuple(MVBENCH_TASKS), {"task": _mvbench_task}, doubt=_doubt_tasks,
    ),
    "tempcompass": Benchmark(
        "TempCompass",
        "unweighted mean of the accuracies of 4 kinds of question; the authors print one accuracy "
        "for each kind",
        _tempcompass_kind, TEMPCOMPASS_KINDS,
        {"kind": _tempcompass_kind, "dimension": _extra("dim")},
    ),
    "videomme": Benchmark(
        "VideoMME (wo sub)",
        "accuracy over answered questions: those whose answer holds a letter A-D",
        by={"duration": _extra("duration"), "domain": _extra("domain"),
            "task": _extra("task_type")},
        counts=_answered,
    ),
    "generic": Benchmark(
        "", "mean score over items", by={"problem_type": lambda item: (item["problem_type"],)}
    ),
}  # fmt: skip
PAPER = "mean accuracy; with regression items: (mean accuracy + mean MRA with <) / 2"


def benchmark_of(name: str) -> str:
    """The benchmark of a data file, by its stem: eval_mvbench is mvbench, another file generic."""
    short = name.removeprefix("eval_")
    return short if short != name and short in BENCHMARKS else "generic"


def _with_trusted_groups(name: str, items: list[dict]) -> tuple[Benchmark, str]:
    """The benchmark of a data file, and why its groups are unknown in these items ("": they are
    not)."""
    benchmark = BENCHMARKS[benchmark_of(name)]
    doubt = benchmark.doubt(items) if items else ""
    if doubt:
        by = dict.fromkeys(benchmark.by, _unknown)
        return benchmark._replace(overall=_unknown, by=by), doubt
    num_unknown = sum(benchmark.overall(item)[:1] == (UNKNOWN,) for item in items)
    return benchmark, f"{num_unknown} items name no known group" if num_unknown else ""


# ------------------------------------------------------------------------------ means, intervals


def weighted_mean(
    scores: Sequence[float], weights: Sequence[float], videos: Sequence[Hashable],
    groups: Sequence[Hashable] | None = None, lowest: float = 0.0,
) -> tuple[float, list[float]]:  # fmt: skip
    """A weighted mean and its 95% interval, a percentile bootstrap over videos.

    Items of one video are not independent. So each of NUM_RESAMPLES resamples draws as many videos
    as there are (C) with replacement, all their items with them, and takes the mean again: in each
    group, then over the groups that were drawn, by the groups' weights. The interval runs from the
    2.5th to the 97.5th percentile of these means; SEED fixes it. Below some 30 videos it is too
    short.

    One video, or no spread between videos: every resample is the same. Then the interval is the
    exact binomial bound for "0 of C": up to the share 1 - 0.025^(1/C) of all videos may score
    otherwise, all of them at either end of the scale. 0 correct in 20 videos gives [0, 0.168], one
    video nearly the whole scale.

    Args:
        scores: in [lowest, 1], at least one. weights: positive. videos: the cluster of each item.
        groups: of each item, as the tasks of a macro mean; default: one group.
        lowest: 0, or -1 for differences of scores.
    """
    score, weight = np.asarray(scores, float), np.asarray(weights, float)  # (N,)
    mean = float((weight * score).sum() / weight.sum())
    video = _numbers(videos)  # (N,), in 0 .. C - 1
    group = _numbers([()] * len(score) if groups is None else groups)  # (N,), in 0 .. K - 1
    num_videos, num_groups = max(video) + 1, max(group) + 1
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


def _numbers(names: Sequence[Hashable]) -> list[int]:
    """Each name as its place among the different ones."""
    places: dict[Hashable, int] = {}
    return [places.setdefault(name, len(places)) for name in names]


def _equal_weights(keys: Sequence[tuple]) -> list[float]:
    """Weights under which the groups of each level count the same: 1 / (K n_k) for K groups of n_k
    items. They sum to 1."""
    children = defaultdict(set)
    for key in set(keys):
        for depth, name in enumerate(key):
            children[key[:depth]].add(name)
    sizes = Counter(keys)
    return [
        1 / sizes[key] / math.prod(len(children[key[:depth]]) for depth in range(len(key)))
        for key in keys
    ]


def _mean(scores: list[float], items: list[dict], key: Callable, lowest: float = 0.0) -> tuple:
    """weighted_mean over equal groups; (None, None) if there is no item or a group is not known."""
    keys = [key(item) for item in items]
    if not scores or any(key[:1] == (UNKNOWN,) for key in keys):
        return None, None
    videos = [item["path"] for item in items]
    return weighted_mean(scores, _equal_weights(keys), videos, keys, lowest)


def _score(items: list[dict], key: Callable = _everything, field: str = "score") -> dict:
    score, interval = _mean([item[field] for item in items], items, key)
    num_videos = len({item["path"] for item in items})
    return {"n": len(items), "videos": num_videos, "score": score, "interval": interval}


def _split(items: list[dict], key: Callable) -> dict[str, list[dict]]:
    """The items of each outermost group, the groups in alphabetical order."""
    groups = defaultdict(list)
    for item in items:
        groups[key(item)[0]].append(item)
    return dict(sorted(groups.items()))


def _inner(key: Callable) -> Callable:
    return lambda item: key(item)[1:]


def score_benchmark(name: str, items: list[dict]) -> dict:
    """All scores of one benchmark, ready for JSON.

    Args:
        name: the data file's stem. items: score and score_paper are None where the media is
            unusable, and `error` says why.
    Returns:
        benchmark, definitions (of the two overall scores), all_items and decodable_items (see
        _scores), unusable. Each score is {"n", "videos", "score", "interval"}, in [0, 1], None
        where there is nothing to average, or a macro mean whose groups are not known.
    """
    benchmark, doubt = _with_trusted_groups(name, items)
    usable = [item for item in items if item["score"] is not None]
    unusable = [item for item in items if item["score"] is None]
    as_zero = [{**item, "score": 0.0, "score_paper": 0.0} for item in unusable]
    # Without file names and numbers, so that 900 missing videos are one reason.
    texts = [str(item["error"]).removeprefix(f"{item['path']}: ") for item in unusable]
    keys = ("row", "problem_id", "path", "error")
    return {
        "benchmark": benchmark_of(name),
        "definitions": {"benchmark": benchmark.definition, "paper": PAPER},
        "all_items": _scores(benchmark, doubt, usable + as_zero),
        "decodable_items": _scores(benchmark, doubt, usable),
        "unusable": {
            "n": len(unusable),
            "reasons": dict(Counter(re.sub(r"\d+", "N", text) for text in texts).most_common()),
            "items": [{key: item[key] for key in keys} for item in unusable],
        },
    }


def _scores(benchmark: Benchmark, doubt: str, items: list[dict]) -> dict:
    """overall: benchmark (groups_missing: those without an item; groups_unknown: why there is no
    macro mean) and paper (parts: the means that it is the mean of); by: each grouping, with the
    benchmark's own score."""
    own = _score([item for item in items if benchmark.counts(item)], benchmark.overall)
    if benchmark.groups:
        present = {benchmark.overall(item)[0] for item in items}
        missing = [name for name in benchmark.groups if name not in present]
        own["groups_missing"] = [] if doubt else missing
        own["groups_unknown"] = doubt
    paper = _score(items, _metric, "score_paper")
    paper["parts"] = {
        name: _score(part, field="score_paper") for name, part in _split(items, _metric).items()
    }
    by = {
        grouping: {name: _score(part, _inner(key)) for name, part in _split(items, key).items()}
        for grouping, key in benchmark.by.items()
    }
    return {"overall": {"benchmark": own, "paper": paper}, "by": by}


def paired_difference(
    items_a: list[dict], items_b: list[dict], key: Callable = _everything, field: str = "score"
) -> dict:
    """The mean of score(a) - score(b) over the items that are usable on both sides.

    Args:
        key: the groups of an item that have equal weight. field: score, or score_paper.
    Returns:
        n, videos, difference in [-1, 1], its 95% interval, and only_a and only_b: how many items
        the other side lacks or could not use. Items are matched by row and problem_id.
    """
    a, b = ({(item["row"], item["problem_id"]): item for item in items if item[field] is not None}
            for items in (items_a, items_b))  # fmt: skip
    both = [a[name] for name in a if name in b]
    differences = [a[name][field] - b[name][field] for name in a if name in b]
    mean, interval = _mean(differences, both, key, lowest=-1.0)
    return {
        "n": len(both), "videos": len({item["path"] for item in both}), "difference": mean,
        "interval": interval, "only_a": len(a) - len(both), "only_b": len(b) - len(both),
    }  # fmt: skip


def gaps(name: str, items_a: list[dict], items_b: list[dict]) -> dict:
    """Paired differences a - b of a benchmark: of two models, or of two orders of the frames.

    Overall under both definitions (Video-MME's over unanswered questions too: they are not the
    same on both sides), and by each grouping of the benchmark.
    """
    benchmark, _ = _with_trusted_groups(name, items_a)
    by = {}
    for grouping, key in benchmark.by.items():
        a, b = _split(items_a, key), _split(items_b, key)
        by[grouping] = {
            group: paired_difference(a.get(group, []), b.get(group, []), _inner(key))
            for group in sorted(a.keys() | b.keys())
        }
    return {
        "benchmark": benchmark_of(name),
        "overall": {
            "benchmark": paired_difference(items_a, items_b, benchmark.overall),
            "paper": paired_difference(items_a, items_b, _metric, "score_paper"),
        },
        "by": by,
    }
