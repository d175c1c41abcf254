"""Figures: the paper's Figure 5 and what explains it, from runs; its Figure 2, from a data file.

    python plot.py runs/rl                                    writes runs/rl/curves.png
    python plot.py runs/rl runs/rl_plain --out both.png       one colour per run
    python plot.py Video-R1-data/Video-R1-260k.json           writes composition.png beside it

A run is the folder of a training run, finished or not, or its metrics.jsonl; the README explains
the keys. Pale lines are the steps' values, strong ones a running mean, circles validation.jsonl.
"""

import argparse
import json
import math
import os
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from statistics import median

from data import check_rows
from evaluation.check_data import composition
from infra import distributed
from infra.errors import UserError, require

# Okabe and Ito's palette, which colour-blind readers can tell apart, without its yellow.
COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000")
DASHES = ("-", (0, (3.5, 1.2)), (0, (1, 1)))  # of a panel's first, second and third series
STYLE = {
    "font.size": 8, "axes.titlesize": 9.5, "axes.grid": True, "grid.alpha": 0.3,
    "axes.axisbelow": True, "axes.spines.top": False, "axes.spines.right": False,
    "legend.frameon": False, "lines.linewidth": 1.7,
    "text.parse_math": False,  # a folder's name may hold dollar signs
}  # fmt: skip
PANELS = {  # stage: (title, y axis, keys of metrics.jsonl, some of validation.jsonl too)
    "RL": (
        ("Accuracy reward (paper: Figure 5a)", "mean reward, 0 to 1",
         ("accuracy", "accuracy_shuffled")),
        ("Temporal reward (Figure 5b)", "share of groups, of responses",
         ("temporal", "temporal_earned")),
        ("Response length (Figure 5c)", "tokens per response", ("completion_length",)),
        ("Reward and parts of it", "mean reward", ("reward", "format", "length_reward")),
        ("Effect of r_t; 0: T-GRPO is GRPO", "mean change of |A_i|", ("temporal_effect",)),
        ("KL to the reference", "nats per token", ("kl",)),
        ("Accuracy, ordered minus shuffled", "difference of mean rewards", ("gap",)),
        ("Groups without spread, cut responses", "share", ("zero_std", "clipped_length")),
    ),
    "SFT": (
        ("Loss", "nats per token", ("loss",)),
        ("Gradient norm before clipping", "norm", ("grad_norm",)),
        ("Learning rate", "learning rate", ("lr",)),
        ("Accuracy in validation", "mean reward, 0 to 1", ("accuracy", "accuracy_shuffled")),
    ),
}  # fmt: skip
SHARES = {"accuracy", "temporal", "zero_std"}  # first keys of panels whose values are in [0, 1]
VALIDATED = ("accuracy", "accuracy_shuffled", "gap")  # drawn from validation.jsonl


@dataclass(frozen=True)
class Run:
    """A run's records, each list in the order of steps. stage: RL or SFT."""

    folder: Path
    stage: str
    metrics: list[dict]
    validation: list[dict]


def read_records(path: Path) -> list[dict]:
    """The records of a file, with steps that rise.

    Where a step goes back, the run was resumed, and what it had recorded from there on is left
    out: the resumed model never took those steps. A torn last line, of a run that was killed or is
    writing it, is skipped.
    """
    *lines, torn = path.read_text(encoding="utf-8").split("\n")
    records: list[dict] = []
    for line in lines:
        record = json.loads(line)
        while records and records[-1]["step"] >= record["step"]:
            records.pop()
        records.append(record)
    return records


def load_run(path: Path) -> Run:
    """The run of a folder, or of the metrics.jsonl in it.

    Raises:
        UserError: there is none, or it has no step yet.
    """
    file = path / "metrics.jsonl" if path.is_dir() else path
    require(file.is_file(), f"{path} is not a run: there is no file {file}")
    metrics = read_records(file)
    require(metrics, f"{file} holds no complete step yet")
    beside = file.parent / "validation.jsonl"
    validation = read_records(beside) if beside.exists() else []
    # Later ones are of steps that a resumed run has not taken again.
    validation = [record for record in validation if record["step"] <= metrics[-1]["step"]]
    return Run(file.parent, "RL" if "reward" in metrics[0] else "SFT", metrics, validation)


def column(records: list[dict], key: str) -> list[float]:
    """A key's value in each record; nan, which is drawn as a gap, where it is null or missing."""
    values = (record.get(key) for record in records)
    return [math.nan if value is None else value for value in values]


def running_mean(values: list[float], window: int) -> list[float]:
    """For each place the mean of the last `window` values, without those that are nan.

    >>> running_mean([1.0, math.nan, 3.0, 8.0], window=2)
    [1.0, 1.0, 3.0, 5.5]
    """
    means = []
    for end in range(1, len(values) + 1):
        known = [x for x in values[max(0, end - window) : end] if not math.isnan(x)]
        means.append(sum(known) / len(known) if known else math.nan)
    return means


# ------------------------------------------------------------------------------------ the figures


def draw_runs(runs: list[Run], window: int):
    """A matplotlib Figure: the panels of the runs' stage that have something to show, and the time.

    Args:
        window: of the running mean, in recorded steps.
    """
    from matplotlib.figure import Figure  # without pyplot: never a window
    from matplotlib.lines import Line2D

    records = [record for run in runs for record in run.metrics + run.validation]
    known = dict.fromkeys(key for record in records for key in record if record[key] is not None)
    panels = [panel for panel in PANELS[runs[0].stage] if known.keys() & panel[2]]
    timings = [key for key in known if key.startswith("seconds")]
    num_columns = min(4, math.ceil((len(panels) + 1) / 2))
    num_rows = math.ceil((len(panels) + 1) / num_columns)
    figure = Figure((4.3 * num_columns, 3.1 * num_rows + 0.7), layout="constrained")
    grid = figure.add_gridspec(num_rows, num_columns)
    for number, (title, unit, keys) in enumerate(panels):
        axes = figure.add_subplot(grid[divmod(number, num_columns)])
        draw_panel(axes, keys, runs, window)
        axes.set_title(title, pad=18)
        axes.set_ylabel(unit)
        if keys[0] in SHARES:
            axes.set_ylim(-0.03, 1.03)  # a line at 0 or at 1 stays visible
    row, start = divmod(len(panels), num_columns)
    draw_timings(figure.add_subplot(grid[row, start:]), timings, runs)

    folders = [run.folder.resolve() for run in runs]
    parent = os.path.commonpath([folder.parent for folder in folders])
    names = [os.path.relpath(folder, parent) for folder in folders]
    if len(runs) == 1:
        figure.suptitle(f"{runs[0].stage}: {Path(*folders[0].parts[-2:])}")
    else:
        handles = [Line2D([], [], color=colour, linewidth=3) for colour in COLOURS[: len(runs)]]
        figure.legend(handles, names, loc="outside upper center", ncols=4, fontsize=9)
    figure.supxlabel(f"pale: each step; strong: mean of the last {window}; circles: validation",
                     fontsize=8, color="0.3")  # fmt: skip
    return figure


def draw_panel(axes, keys: tuple[str, ...], runs: list[Run], window: int) -> None:
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
    # Between title and panel, where no line is.
    axes.legend(loc="lower center", bbox_to_anchor=(0.5, 0.98), ncols=3, fontsize=7)


def draw_timings(axes, keys: list[str], runs: list[Run]) -> None:
    """Bars of the median step and of its phases, a colour per run. Not stacked: each phase is its
    slowest rank's, so that they may exceed the step."""
    width = 0.8 / len(runs)
    for number, run in enumerate(runs):
        known = [[x for x in column(run.metrics, key) if not math.isnan(x)] for key in keys]
        left = [place - 0.4 + number * width for place in range(len(keys))]
        heights = [median(values) if values else 0.0 for values in known]
        axes.bar(left, heights, width, align="edge", color=COLOURS[number])
    names = ["step" if key == "seconds" else key.removeprefix("seconds_") for key in keys]
    axes.set_xticks(range(len(keys)), names)
    axes.grid(False, axis="x")
    axes.set(title="Time of a step and of its phases", ylabel="seconds, median over steps")


def draw_composition(path: Path, data_root: str):
    """Figure 2 from a data file: rows by category and by problem type, the largest first."""
    from matplotlib.figure import Figure

    samples, faults = check_rows(path, data_root or None)
    require(samples, f"{path} holds no row that can be read: {faults[:1]}")
    counts = composition(samples, Path(data_root or path.parent).absolute())
    categories: Counter[str] = Counter()
    for name, count in counts["category"].items():
        categories["other" if name.startswith("other: ") else name] += count
    figure = Figure((8, 0.3 * len(categories) + 3.4), layout="constrained")
    panels = figure.subplots(2, height_ratios=[max(3, len(categories)), 5])
    figure.suptitle(f"{path.name}: {len(samples):,} rows (paper: Figure 2)")
    for axes, title, bars, colour in (
        (panels[0], "category", categories, COLOURS[0]),
        (panels[1], "problem type", counts["problem_type"], COLOURS[2]),
    ):
        names, values = zip(*reversed(bars.most_common()), strict=True)
        labels = [f"{value:,} ({value / len(samples):.1%})" for value in values]
        axes.bar_label(axes.barh(names, values, color=colour), labels, padding=3)
        axes.set(title=title, xlabel="rows")
        axes.margins(x=0.18)
        axes.grid(False, axis="y")
    if faults:
        figure.supxlabel(f"{len(faults):,} rows that cannot be read are left out", fontsize=8)
    return figure


def main() -> None:
    """Draw what the command line names."""
    parser = argparse.ArgumentParser(description="Draw runs, or a data file.", allow_abbrev=False)
    add = parser.add_argument
    add("paths", nargs="+", type=Path, metavar="PATH", help="runs, or one data file")
    add("--out", type=Path, help="PNG file; default: curves.png or composition.png beside the path")
    add("--window", type=int, help="of the running mean, in steps; default: 1/50 of the run")
    add("--data_root", default="", help="of a data file; default: its folder")
    options = parser.parse_args()
    require(options.window is None or options.window >= 1, "--window must be at least 1")
    try:
        import matplotlib
    except ModuleNotFoundError:
        raise UserError("plot.py draws with matplotlib: pip install matplotlib") from None
    first = options.paths[0]
    with matplotlib.rc_context(STYLE):
        if first.is_file() and first.name != "metrics.jsonl":
            require(len(options.paths) == 1, f"{first} is a data file: name it alone")
            figure, out = draw_composition(first, options.data_root), first.parent
            out /= "composition.png"
        else:
            require(len(options.paths) <= len(COLOURS), f"a figure has {len(COLOURS)} colours")
            runs = [load_run(path) for path in options.paths]
            stages = {run.stage for run in runs}
            require(len(stages) == 1, "runs of different stages share no figure")
            window = options.window or max(1, max(len(run.metrics) for run in runs) // 50)
            figure, out = draw_runs(runs, window), runs[0].folder / "curves.png"
        out = options.out or out
        try:
            figure.savefig(out, dpi=120, format="png")
        except OSError as error:
            raise UserError(f"--out {out} cannot be written: {error.strerror}") from None
    print(f"figure written to {out}")


if __name__ == "__main__":
    distributed.run(main)
