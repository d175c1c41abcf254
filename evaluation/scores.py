"""Scores of the paper's six video benchmarks, from the items that eval.py writes.

Each overall score is given twice: "benchmark" as the benchmark's own authors average, "paper" as
the paper's do (Tables 1-3). Every score is given over all items, where one with unusable media
counts 0, and over the decodable ones alone, with a 95% interval over clips.

    VSI-Bench    mean of 8 tasks          vision-x-nyu/thinking-in-space, lmms_eval/tasks/vsibench
    VideoMMMU    mean of 3 tracks         videommmu/VideoMMMU, README; lmms-eval, tasks/videommmu
    MMVU         accuracy                 yale-nlp/MMVU, utils/eval_utils.py
    MVBench      mean of 20 tasks         OpenGVLab/Ask-Anything, video_chat2/mvbench.ipynb
    TempCompass  accuracy of each kind    llyx97/TempCompass, utils/eval_utils.py, print_result
    Video-MME    accuracy where answered  BradyFU/Video-MME, evaluation/eval_your_results.py
    the paper    mean accuracy; VSI-Bench (mean accuracy + mean MRA) / 2; unreadable clips are wrong
                                          tulerfeng/Video-R1, src/eval_bench.py and issue 121

Only how they average is taken from there. What a right answer is, rewards.py says; MMVU and
TempCompass also ask a language model.

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

from infra.errors import UserError

# Of the normal distribution: a benchmark has hundreds of clips, and Student's t for 288 is 1.968.
# In a group of fewer than some 30 clips (each score says how many) intervals are too short.
Z = 1.96
UNKNOWN = "unknown"  # the group of an item whose row does not tell it

VSI_TASKS = (
    "object_counting", "object_abs_distance", "object_size_estimation", "room_size_estimation",
    "object_rel_distance", "object_rel_direction", "route_planning", "obj_appearance_order",
)  # fmt: skip
TRACKS = ("adaptation", "comprehension", "perception")  # the order of eval_videommmu
MVBENCH_TASKS = {  # the order of eval_mvbench, and the folder of the clips
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
    have it. A reference of 0 wants a 0. Both numbers are finite, and are compared as exact
    decimals of 15 digits, which is what a double holds of any decimal, so that 9.5 for 10 is off
    by 5% and not by 5.000000000000004%. (At such edges the authors' two scripts, in float64 and
    float32, pass or fail as the rounding falls.)

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
# groups of one level weigh the same, however many items they have.


def _everything(item: dict) -> tuple:
    return ()


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
    """The group of a row whose file holds one block of rows after the other, numbered from 1."""
    number = item["problem_id"]
    inside = isinstance(number, int) and 1 <= number <= block * len(names)
    return names[(number - 1) // block] if inside else UNKNOWN


def _track(item: dict) -> tuple:
    """Rows do not name their track. problem_id 1-300 are adaptation, 301-600 comprehension, 601-900
    perception, the 300 lectures in the same order each time. In some versions of the file the
    first block shows question_only/<id>_image.mp4 (issue 69 of Video-R1)."""
    if "question_only" in PurePath(item["path"]).parts:
        return ("adaptation",)
    return (_numbered(item, TRACKS, 300),)


def _mvbench_task(item: dict) -> tuple:
    """Rows do not name their task: they are numbered from 1, 200 for each task in alphabetical
    order. The clip's folder must agree, or the file is another one."""
    task = _numbered(item, tuple(MVBENCH_TASKS), 200)
    return (task if MVBENCH_TASKS.get(task) in PurePath(item["path"]).parts else UNKNOWN,)


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
    overall: Callable[[dict], tuple]  # the groups that its overall score weighs equally
    groups: Sequence[str]  # the outermost of them, all of which the whole benchmark has
    by: dict[str, Callable[[dict], tuple]]
    counts: Callable[[dict], bool] = lambda item: True  # in its overall score


BENCHMARKS = {
    "vsibench": Benchmark(
        "VSI-Bench",
        "unweighted mean of 8 tasks, MRA (<=) or accuracy; object_rel_direction is the mean of its "
        "levels easy, medium and hard",
        _vsi_task, VSI_TASKS,
        {"task": _vsi_task, "question_type": _extra("original_question_type"), "metric": _metric},
    ),
    "videommmu": Benchmark(
        "VideoMMMU", "unweighted mean of the accuracies of 3 tracks", _track, TRACKS,
        {"track": _track},
    ),
    "mmvu": Benchmark(
        "MMVU (mc)", "accuracy over questions, here the multiple-choice ones", _everything, (),
        {"subject": _mmvu_subject},
    ),
    "mvbench": Benchmark(
        "MVBench",
        "unweighted mean of the accuracies of 20 tasks; the authors' notebook takes correct / "
        "total, which is the same where each task has its 200 items",
        _mvbench_task, tuple(MVBENCH_TASKS), {"task": _mvbench_task},
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
        _everything, (),
        {"duration": _extra("duration"), "domain": _extra("domain"), "task": _extra("task_type")},
        _answered,
    ),
    "generic": Benchmark(
        "", "mean score over items", _everything, (),
        {"problem_type": lambda item: (item["problem_type"],)},
    ),
}  # fmt: skip
PAPER = "mean accuracy; with regression items: (mean accuracy + mean MRA with <) / 2"


def benchmark_of(name: str) -> str:
    """The benchmark of a data file, by its stem: eval_mvbench is mvbench, another file generic."""
    short = name.removeprefix("eval_")
    return short if short != name and short in BENCHMARKS else "generic"


# ---------------------------------------------------------------------------------------- scores


def weighted_mean(
    scores: Sequence[float], weights: Sequence[float], clips: Sequence[Hashable],
    groups: Sequence[Hashable] | None = None, lowest: float = 0.0,
) -> tuple[float, list[float]]:  # fmt: skip
    """A weighted mean and its 95% interval, which allows for items that share a clip.

    The standard error is the cluster-robust one: sqrt(C / (C - 1) * sum over clips of r^2), where
    r is the clip's sum of weight * (score - its group's mean) and C the number of clips. Groups
    (one, if not given) are what the weights are made equal for, as the tasks of a macro mean: they
    are fixed, so that one task is harder than another makes no mean less certain. A group with a
    single clip shows no spread of its own and is compared with the overall mean.

    Where there is no spread to see (one clip, all scores equal), the interval is Wilson's: 0 of C
    clips differed, so up to the share Z^2 / (C + Z^2) of clips may, and these may all lie at
    either end of the scale: 0 right of 20 clips gives [0, 0.161].

    Args:
        scores: in [lowest, 1], at least one. weights: positive. clips: what is drawn at random.
        lowest: 0, or -1 for differences of scores.
    """
    groups = [()] * len(scores) if groups is None else groups
    total = math.fsum(weights)
    mean = math.fsum(w * s for w, s in zip(weights, scores, strict=True)) / total
    members = defaultdict(list)
    for index, group in enumerate(groups):
        members[group].append(index)
    residuals = defaultdict(float)  # of each clip
    for indices in members.values():
        weight = math.fsum(weights[i] for i in indices)
        centre = math.fsum(weights[i] * scores[i] for i in indices) / weight
        if len({clips[i] for i in indices}) == 1:
            centre = mean
        for i in indices:
            residuals[clips[i]] += weights[i] * (scores[i] - centre) / total
    count = len(residuals)
    squares = math.fsum(residual**2 for residual in residuals.values())
    if count == 1 or squares < 1e-24:  # rounding leaves up to 1e-16 of a residual that is 0
        share = Z**2 / (count + Z**2)
        return mean, [mean - share * (mean - lowest), mean + share * (1 - mean)]
    half = Z * math.sqrt(count / (count - 1) * squares)
    # The normal distribution does not know that scores end at 0 and 1; no score lies beyond.
    return mean, [max(lowest, mean - half), min(1.0, mean + half)]


def _equal_weights(keys: Sequence[tuple]) -> list[float]:
    """Weights under which the groups of each level count the same: 1 / (K n_k) for K groups of n_k
    items. They sum to 1."""
    children = defaultdict(set)
    for key in set(keys):
        for depth, name in enumerate(key):
            children[key[:depth]].add(name)
    sizes = Counter(keys)
    weight = {
        key: 1 / size / math.prod(len(children[key[:depth]]) for depth in range(len(key)))
        for key, size in sizes.items()
    }
    return [weight[key] for key in keys]


def _mean(scores: list[float], clips: list[str], keys: list[tuple], lowest: float = 0.0) -> tuple:
    """weighted_mean over equal groups; (None, None) if there is no item or a group is not known."""
    if not scores or any(key[:1] == (UNKNOWN,) for key in keys):
        return None, None
    return weighted_mean(scores, _equal_weights(keys), clips, keys, lowest)


def _score(items: list[dict], key: Callable = _everything, field: str = "score") -> dict:
    clips = [item["path"] for item in items]
    score, interval = _mean([item[field] for item in items], clips, [key(item) for item in items])
    return {"n": len(items), "clips": len(set(clips)), "score": score, "interval": interval}


def _split(items: list[dict], key: Callable) -> dict[str, list[dict]]:
    """The items of each outermost group, the groups in alphabetical order."""
    groups = defaultdict(list)
    for item in items:
        groups[key(item)[0]].append(item)
    return dict(sorted(groups.items()))


def _inner(key: Callable) -> Callable:
    return lambda item: key(item)[1:]


def _check(items: list[dict]) -> None:
    """Raise UserError, naming the row, where an item lacks a key or two items are of one row."""
    keys = ("row", "problem_id", "problem", "problem_type", "options", "path", "answer", "score",
            "score_paper", "error", "extra")  # fmt: skip
    for item in items:
        missing = [key for key in keys if key not in item]
        if missing:
            raise UserError(f"results, row {item.get('row')}: an item lacks {', '.join(missing)}")
    for row, count in Counter(item["row"] for item in items).items():
        if count > 1:
            raise UserError(f"results, row {row}: {count} items of one row")


def score_benchmark(name: str, items: list[dict]) -> dict:
    """All scores of one benchmark, ready for JSON.

    Args:
        name: the data file's stem. items: in any order; score and score_paper are None where the
            media is unusable, and `error` says why.
    Returns:
        benchmark, definitions (of the two overall scores), all_items and decodable_items (see
        _scores), unusable. Each score is {"n", "clips", "score", "interval"}, in [0, 1], None
        where there is nothing to average.
    Raises:
        UserError: an item lacks a key, or two items are of one row.
    """
    _check(items)
    kind = benchmark_of(name)
    shown = [item for item in items if item["score"] is not None]
    lost = [item for item in items if item["score"] is None]
    counted = shown + [{**item, "score": 0.0, "score_paper": 0.0} for item in lost]
    # Without file names and numbers, so that 900 clips that are not there are one reason.
    texts = [str(item["error"]).removeprefix(f"{item['path']}: ") for item in lost]
    keys = ("row", "problem_id", "path", "error")
    return {
        "benchmark": kind,
        "definitions": {"benchmark": BENCHMARKS[kind].definition, "paper": PAPER},
        "all_items": _scores(BENCHMARKS[kind], counted),
        "decodable_items": _scores(BENCHMARKS[kind], shown),
        "unusable": {
            "n": len(lost),
            "reasons": dict(Counter(re.sub(r"\d+", "N", text) for text in texts).most_common()),
            "items": [{key: item[key] for key in keys} for item in lost],
        },
    }


def _scores(benchmark: Benchmark, items: list[dict]) -> dict:
    """overall: benchmark (groups_missing: what its mean had to do without) and paper (parts: the
    means that it is the mean of); by: each grouping, with the benchmark's own score."""
    own = _score([item for item in items if benchmark.counts(item)], benchmark.overall)
    if benchmark.groups:
        present = {benchmark.overall(item)[0] for item in items}
        own["groups_missing"] = [name for name in benchmark.groups if name not in present]
    paper = _score(items, _metric, "score_paper")
    paper["parts"] = {
        name: _score(part, field="score_paper") for name, part in _split(items, _metric).items()
    }
    by = {
        grouping: {name: _score(part, _inner(key)) for name, part in _split(items, key).items()}
        for grouping, key in benchmark.by.items()
    }
    return {"overall": {"benchmark": own, "paper": paper}, "by": by}


# ----------------------------------------------------------------------------------- differences


def paired_difference(
    items_a: list[dict], items_b: list[dict], key: Callable = _everything, field: str = "score"
) -> dict:
    """The mean of score(a) - score(b) over the items that both sides could show.

    Args:
        key: the groups of an item that weigh the same; default: all items do.
        field: score, or score_paper.
    Returns:
        n, clips, difference in [-1, 1], its 95% interval over clips, and only_a and only_b: how
        many items the other side lacks or could not show. Items are matched by row and problem_id.
    """
    _check(items_a)
    _check(items_b)
    a, b = ({(item["row"], item["problem_id"]): item for item in items if item[field] is not None}
            for items in (items_a, items_b))  # fmt: skip
    both = [name for name in a if name in b]
    clips = [a[name]["path"] for name in both]
    differences = [a[name][field] - b[name][field] for name in both]
    mean, interval = _mean(differences, clips, [key(a[name]) for name in both], lowest=-1.0)
    return {
        "n": len(both), "clips": len(set(clips)), "difference": mean, "interval": interval,
        "only_a": len(a) - len(both), "only_b": len(b) - len(both),
    }  # fmt: skip


def gaps(name: str, items_ordered: list[dict], items_other: list[dict]) -> dict:
    """What the order of frames is worth: ordered minus shuffled, reversed or single.

    Overall under both definitions (Video-MME's over unanswered questions too: they are not the
    same on both sides), and by each grouping of the benchmark.
    """
    benchmark = BENCHMARKS[benchmark_of(name)]
    by = {}
    for grouping, key in benchmark.by.items():
        ordered, other = _split(items_ordered, key), _split(items_other, key)
        by[grouping] = {
            group: paired_difference(ordered.get(group, []), other.get(group, []), _inner(key))
            for group in sorted(ordered.keys() | other.keys())
        }
    return {
        "benchmark": benchmark_of(name),
        "overall": {
            "benchmark": paired_difference(items_ordered, items_other, benchmark.overall),
            "paper": paired_difference(items_ordered, items_other, _metric, "score_paper"),
        },
        "by": by,
    }


# ----------------------------------------------------------------------------------------- table


def markdown_table(summaries: list[dict]) -> str:
    """The paper's Table 1 from summaries of eval.py: its scores over all items, in percent.

    A row is a model, a number of frames and, if it is not "ordered", their order. A star marks a
    score with unusable items in it, and a line below counts them. Other files than those of the
    six benchmarks are left out.

    Raises:
        UserError: two summaries are of one cell, or none is of one of the six benchmarks.
    """
    names = ("vsibench", "videommmu", "mmvu", "mvbench", "tempcompass", "videomme")
    rows: dict[tuple, dict[str, str]] = {}
    notes = []
    for summary in summaries:
        name, scores = benchmark_of(summary["benchmark"]), summary["scores"]
        if name == "generic":
            continue
        frames, order = summary["settings"]["max_frames"], summary["order"]
        label = summary["model"] + ("" if order == "ordered" else f" ({order})")
        cells = rows.setdefault((label, frames), {})
        if name in cells:
            raise UserError(f"two summaries of {name} for {label} with {frames} frames")
        paper = scores["all_items"]["overall"]["paper"]
        cells[name] = "-" if paper["score"] is None else f"{100 * paper['score']:.1f}"
        if scores["unusable"]["n"]:
            cells[name] += "\\*"
            notes.append(f"\\* {label}, {frames} frames, {BENCHMARKS[name].column}: "
                         f"{scores['unusable']['n']} of {paper['n']} items are unusable "
                         "and count 0")  # fmt: skip
    if not rows:
        found = ", ".join(sorted({summary["benchmark"] for summary in summaries}))
        raise UserError(f"no summary is of one of {', '.join(names)}, but of {found}")
    header = ["Model", "Frames", *(BENCHMARKS[name].column for name in names)]
    lines = [header, ["---", *["---:"] * (len(header) - 1)]]
    for (label, frames), cells in rows.items():
        lines.append([label, str(frames), *(cells.get(name, "-") for name in names)])
    table = "\n".join(f"| {' | '.join(line)} |" for line in lines)
    return "\n\n".join([table, *notes]) + "\n"
