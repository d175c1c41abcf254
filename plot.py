"""Figures: the paper's Figure 5 and what explains it, from runs; its Figure 2, from a data file.

    python plot.py runs/rl                                    writes runs/rl/curves.png
    python plot.py runs/rl runs/rl_plain --out both.png       one colour per run
    python plot.py Video-R1-data/Video-R1-260k.json           writes composition.png beside it

A run is the folder of a training run, finished or not; the README explains the keys. Pale lines are
the steps' values, strong ones a running mean over 1/50 of the run, circles validation.jsonl.
"""

import argparse
import json
import math
import sys
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean

try:
    import matplotlib
    from matplotlib.figure import Figure  # without pyplot: never a window
    from matplotlib.lines import Line2D
except ModuleNotFoundError as error:
    sys.exit(f"error: plot.py needs matplotlib ({error}): pip install matplotlib")

from data import check_rows
from evaluation.check_data import composition
from infra.distributed import run_main
from infra.errors import UserError, require

# Okabe and Ito's palette, which colour-blind readers can tell apart, without its yellow.
COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000")
DASHES = ("-", (0, (3.5, 1.2)), (0, (1, 1)))  # of a panel's first, second and third series
STYLE = {
    "font.size": 8, "axes.grid": True, "grid.alpha": 0.3, "axes.axisbelow": True,
    "axes.spines.top": False, "axes.spines.right": False, "legend.frameon": False,
    "text.parse_math": False,  # a folder's name may hold dollar signs
}  # fmt: skip
PHASES = ("data", "rollout", "reward", "reference", "update")
TIME = ("Time of a step and of its phases, seconds",
        ("seconds", *(f"seconds_{phase}" for phase in PHASES)))  # fmt: skip
PANELS = {  # stage: (title and unit, keys of metrics.jsonl, some of validation.jsonl too)
    "RL": (
        ("Accuracy reward (paper: Figure 5a)", ("accuracy", "accuracy_shuffled")),
        ("Temporal reward (Figure 5b), share", ("temporal", "temporal_earned")),
        ("Response length (Figure 5c), tokens", ("completion_length",)),
        ("Reward and parts of it", ("reward", "format", "length_reward")),
        ("Effect of r_t, mean change of |A_i|", ("temporal_effect",)),
        ("KL to the reference, nats per token", ("kl",)),
        ("Accuracy, ordered minus shuffled", ("gap",)),
        ("Groups without spread, cut responses, share", ("zero_std", "clipped_length")),
        TIME,
    ),
    "SFT": (
        ("Loss, nats per token", ("loss",)),
        ("Gradient norm before clipping", ("grad_norm",)),
        ("Learning rate", ("lr",)),
        ("Accuracy in validation", ("accuracy", "accuracy_shuffled")),
        TIME,
    ),
}
VALIDATED = ("accuracy", "accuracy_shuffled", "gap")  # drawn from validation.jsonl


@dataclass(frozen=True)
class Run:
    """A run's records, each list in the order of steps. stage: RL or SFT."""

    folder: Path
    stage: str
    metrics: list[dict]
    validation: list[dict]


def read_records(path: Path) -> list[dict]:
    """The records of a file, if it is there, without a last line that is being written."""
    *lines, _ = path.read_text(encoding="utf-8").split("\n") if path.exists() else [""]
    return [json.loads(line) for line in lines]


def load_run(folder: Path) -> Run:
    """The run of a folder. UserError: it has no step yet."""
    metrics, validation = (read_records(folder / f"{name}.jsonl")
                           for name in ("metrics", "validation"))  # fmt: skip
    require(metrics, f"{folder} is not a run, or has no step yet: see its metrics.jsonl")
    return Run(folder, "RL" if "reward" in metrics[0] else "SFT", metrics, validation)


def column(records: list[dict], key: str) -> list[float]:
    """A key's value in each record; nan, which is drawn as a gap, where it is null or missing."""
    values = (record.get(key) for record in records)
    return [math.nan if value is None else value for value in values]


def running_mean(values: list[float], window: int) -> list[float]:
    """For each place the mean of the last `window` values, without those that are nan.

    >>> running_mean([1.0, math.nan, 3.0, 8.0], window=2)
    [1.0, 1.0, 3.0, 5.5]
    """
    parts = (values[max(0, end - window) : end] for end in range(1, len(values) + 1))
    known = ([x for x in part if not math.isnan(x)] for part in parts)
    return [fmean(part) if part else math.nan for part in known]


# ------------------------------------------------------------------------------------ the figures


def draw_runs(runs: list[Run]) -> Figure:
    """The panels of the runs' stage that have something to show."""
    window = max(1, max(len(run.metrics) for run in runs) // 50)
    records = [record for run in runs for record in run.metrics + run.validation]
    known = {key for record in records for key in record if record[key] is not None}
    panels = [panel for panel in PANELS[runs[0].stage] if known.intersection(panel[1])]
    num_columns = min(4, math.ceil(len(panels) / 2))
    num_rows = math.ceil(len(panels) / num_columns)
    figure = Figure((4.3 * num_columns, 3.1 * num_rows + 0.7), layout="constrained")
    for place, (title, keys) in enumerate(panels, start=1):
        axes = figure.add_subplot(num_rows, num_columns, place)
        draw_lines(axes, keys, runs, window)
        axes.set_title(title, pad=7 + 11 * math.ceil(len(keys) / 3))  # above the legend's rows
    names = [str(run.folder) for run in runs]
    figure.suptitle(f"{runs[0].stage}: {names[0]}" if len(runs) == 1 else runs[0].stage)
    if len(runs) > 1:
        handles = [Line2D([], [], color=colour) for colour in COLOURS[: len(runs)]]
        figure.legend(handles, names, loc="outside upper center", ncols=4)
    pale = f"pale: each step; strong: mean of the last {window}; " if window > 1 else ""
    figure.supxlabel(f"{pale}circles: validation")
    return figure


def draw_lines(axes, keys: tuple[str, ...], runs: list[Run], window: int) -> None:
    """Lines, and circles for validation. One run has a colour per key; several have a colour each,
    and a dash pattern per key."""
    for number, key in enumerate(keys):
        for run, run_colour in zip(runs, COLOURS, strict=False):
            colour = COLOURS[number] if len(runs) == 1 else run_colour
            steps, values = column(run.metrics, "step"), column(run.metrics, key)
            # Points too, since no line shows a value between two gaps.
            axes.plot(steps, values, ".-", color=colour, linewidth=0.5, markersize=2, alpha=0.3)
            label = key if run is runs[0] else None
            axes.plot(steps, running_mean(values, window), color=colour, label=label,
                      linestyle=DASHES[number % len(DASHES)])  # fmt: skip
            if key in VALIDATED and run.validation:
                axes.plot(column(run.validation, "step"), column(run.validation, key), "o",
                          color=colour, markerfacecolor="white" if number else colour)  # fmt: skip
    axes.set_xlabel("optimizer step")
    axes.xaxis.get_major_locator().set_params(integer=True)
    # Between title and panel, where no line is.
    axes.legend(loc="lower center", bbox_to_anchor=(0.5, 0.98), ncols=3, fontsize=7)


def draw_composition(path: Path, data_root: str) -> Figure:
    """Figure 2 from a data file: rows by category and by problem type, the largest first."""
    samples, faults = check_rows(path, data_root or None)
    require(samples, f"{path} holds no row that can be read: {faults[:1]}")
    counts = composition(samples, Path(data_root or path.parent).absolute())
    figure = Figure((8, 6), layout="constrained")
    figure.suptitle(f"{path.name}: {len(samples):,} rows (paper: Figure 2)")
    for axes, kind in zip(figure.subplots(2), ("category", "problem_type"), strict=True):
        names, values = zip(*reversed(counts[kind].most_common()), strict=True)
        labels = [f"{value:,} ({value / len(samples):.1%})" for value in values]
        axes.bar_label(axes.barh(names, values, color=COLOURS[0]), labels, padding=3)
        axes.set_title(kind)
        axes.set_xlabel("rows")
        axes.margins(x=0.18)
    return figure


def main() -> None:
    """Draw what the command line names."""
    parser = argparse.ArgumentParser(description="Draw runs, or a data file.", allow_abbrev=False)
    add = parser.add_argument
    add("paths", nargs="+", type=Path, metavar="PATH", help="runs, or one data file")
    add("--out", type=Path, help="PNG file; default: curves.png or composition.png beside the path")
    add("--data_root", default="", help="of a data file; default: its folder")
    options = parser.parse_args()
    first, num_runs = options.paths[0], len(options.paths)
    require(num_runs <= len(COLOURS), f"a figure has {len(COLOURS)} colours")
    with matplotlib.rc_context(STYLE):
        if first.is_file():
            require(num_runs == 1, f"{first} is a data file: name it alone")
            figure = draw_composition(first, options.data_root)
            out = options.out or first.parent / "composition.png"
        else:
            runs = [load_run(path) for path in options.paths]
            same = len({run.stage for run in runs}) == 1
            require(same, "runs of different stages share no figure")
            figure, out = draw_runs(runs), options.out or first / "curves.png"
        try:
            figure.savefig(out, dpi=120, format="png")
        except OSError as error:
            raise UserError(f"--out {out}: {error.strerror}") from None
    print(f"figure written to {out}")


if __name__ == "__main__":
    run_main(main)
