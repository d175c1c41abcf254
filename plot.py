"""Training curves of one or several runs in one figure: the paper's Figure 5, and what explains it.

    python plot.py runs/rl                                    writes runs/rl/curves.png
    python plot.py runs/rl runs/rl_plain --out both.png       one colour per run

A run is the folder that a training wrote, or its metrics.jsonl; the README explains the keys. It
may still be going on. Pale lines are the steps' values, strong ones a running mean, circles the
records of validation.jsonl where the run has them.
"""

import argparse
import json
import math
import os
import sys
from dataclasses import dataclass
from pathlib import Path
from statistics import median

from infra.errors import UserError

# Okabe and Ito's palette, which colour-blind readers can tell apart, without its yellow.
COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000")
DASHES = ("-", (0, (3.5, 1.2)), (0, (1, 1)))  # of a panel's first, second and third series
STYLE = {
    "font.size": 8, "axes.titlesize": 9.5, "axes.grid": True, "grid.alpha": 0.3,
    "axes.axisbelow": True, "axes.spines.top": False, "axes.spines.right": False,
    "legend.frameon": False, "lines.linewidth": 1.7,
    "text.parse_math": False,  # a folder's name may hold dollar signs
}  # fmt: skip


@dataclass(frozen=True)
class Panel:
    """One panel of the figure, over optimizer steps."""

    title: str
    unit: str  # of the y axis
    series: tuple[str, ...]  # keys of metrics.jsonl, some of validation.jsonl too
    is_share: bool = False  # between 0 and 1


PANELS = {
    "RL": (
        Panel("Accuracy reward (paper: Figure 5a)", "mean reward, 0 to 1",
              ("accuracy", "accuracy_shuffled"), True),
        Panel("Temporal reward, scaled to 0..1 (Figure 5b)", "r_t / α, 0 to 1",
              ("temporal", "temporal_earned"), True),
        Panel("Response length (Figure 5c)", "tokens per response", ("completion_length",)),
        Panel("Reward and parts of it", "mean reward", ("reward", "format", "length_reward")),
        Panel("KL to the reference", "nats per token", ("kl",)),
        Panel("Accuracy, ordered minus shuffled", "difference of mean rewards", ("gap",)),
        Panel("Shares of groups and of responses", "share",
              ("zero_std", "clipped_length", "format"), True),
    ),
    "SFT": (
        Panel("Loss", "nats per token", ("loss",)),
        Panel("Norm of the gradient, before the clip", "norm", ("grad_norm",)),
        Panel("Learning rate", "learning rate", ("lr",)),
        Panel("Accuracy in validation", "mean reward, 0 to 1", ("accuracy", "accuracy_shuffled"),
              True),
    ),
}  # fmt: skip
VALIDATED = ("step", "accuracy", "accuracy_shuffled", "gap")  # drawn from validation.jsonl
DRAWN = {key for panels in PANELS.values() for panel in panels for key in panel.series}


@dataclass(frozen=True)
class Run:
    """A run's records, each list in the order of steps."""

    folder: Path
    stage: str  # RL or SFT
    metrics: list[dict]
    validation: list[dict]


# --------------------------------------------------------------------------------------- the files


def parse_record(line: bytes) -> dict:
    """One line of metrics.jsonl or validation.jsonl; a drawn value that is not finite is None.

    Raises:
        ValueError: it is no JSON object with a step, or a drawn value is not a number.
    """
    record = json.loads(line)
    if not isinstance(record, dict) or type(record.get("step")) is not int or record["step"] < 0:
        raise UserError("no object with a step number")
    for key, value in record.items():
        if value is not None and (key in DRAWN or key.startswith("seconds")):
            if type(value) not in (int, float):
                raise UserError(f"{key} is not a number")
            record[key] = value if math.isfinite(value) else None
    return record


def read_records(path: Path) -> list[dict]:
    """The records of a file, with steps that rise.

    Where a step goes back, the run was resumed: what it had recorded from there on is left out,
    since the model that goes on never took those steps. A last line that is not complete is left
    out as well: the run is just writing it.

    Raises:
        UserError: naming the file, and the line that cannot be used.
    """
    try:
        *lines, unended = path.read_bytes().split(b"\n")
    except OSError as error:
        raise UserError(f"{path} cannot be read: {error.strerror}") from None
    records: list[dict] = []
    for number, line in enumerate([*lines, unended], start=1):
        try:
            record = parse_record(line)
        except ValueError as error:  # JSONDecodeError and UnicodeDecodeError too
            if number > len(lines):
                break
            raise UserError(f"{path}, line {number}: {error}") from None
        while records and records[-1]["step"] >= record["step"]:
            records.pop()
        records.append(record)
    return records


def load_run(path: Path) -> Run:
    """The run of a folder, or of the metrics.jsonl in it.

    Raises:
        UserError: there is none, it has no step yet, or one of its files cannot be used.
    """
    file = path / "metrics.jsonl" if path.is_dir() else path
    if not file.is_file():
        raise UserError(f"{path} is no run: there is no file {file}")
    metrics = read_records(file)
    if not metrics:
        raise UserError(f"{file} holds no complete step yet")
    if "loss" not in metrics[0]:
        raise UserError(f"{file} is of no training: its first step has no loss")
    beside = file.parent / "validation.jsonl"
    validation = read_records(beside) if beside.exists() else []
    validation = [
        {key: record.get(key) for key in VALIDATED}
        for record in validation
        if record["step"] <= metrics[-1]["step"]  # later: steps that a resumed run takes again
    ]
    return Run(file.parent, "RL" if "reward" in metrics[0] else "SFT", metrics, validation)


def load_runs(paths: list[Path]) -> list[Run]:
    """The runs of one figure.

    Raises:
        UserError: one cannot be used, two are of different stages, or there are too many.
    """
    if len(paths) > len(COLOURS):
        raise UserError(f"{len(paths)} runs are too many: a figure has {len(COLOURS)} colours")
    runs = [load_run(path) for path in paths]
    for run in runs:
        if run.stage != runs[0].stage:
            raise UserError(f"runs of different stages share no figure: {runs[0].folder} is "
                             f"{runs[0].stage}, {run.folder} is {run.stage}")  # fmt: skip
    return runs


def column(records: list[dict], key: str) -> list[float | None]:
    """A key's value in each record, None where it is null or not there."""
    return [record.get(key) for record in records]


def running_mean(steps: list[int], values: list[float | None], window: int) -> list[float | None]:
    """For each step the mean of the values at it and at the window - 1 steps before it.

    Args:
        steps: rising; a step that is missing has its place in the window, as a null has.
        values: None does not count, and a window that holds nothing else has the mean None.
        window: in steps, at least 1; near the start of the run it holds what there is.

    >>> running_mean([1, 2, 3, 4], [1.0, None, 3.0, 8.0], window=2)
    [1.0, 1.0, 3.0, 5.5]
    """
    means, known_steps, known, first = [], [], [], 0
    for step, value in zip(steps, values, strict=True):
        if value is not None:
            known_steps.append(step)
            known.append(value)
        while first < len(known) and known_steps[first] <= step - window:
            first += 1
        inside = known[first:]
        means.append(sum(inside) / len(inside) if inside else None)
    return means


# -------------------------------------------------------------------------------------- the figure


def draw(runs: list[Run], window: int):
    """A matplotlib Figure: the panels of the runs' stage that have something to show, and the time.

    Args:
        window: of the running mean, in steps.
    """
    import matplotlib  # here, so that --help and errors need no matplotlib
    from matplotlib.figure import Figure  # without pyplot: Agg, and never a window

    records = [record for run in runs for record in run.metrics + run.validation]
    known = dict.fromkeys(key for record in records for key in record if record[key] is not None)
    panels = [panel for panel in PANELS[runs[0].stage] if known.keys() & panel.series]
    timings = Panel("Time of a step and of its phases", "seconds",
                    tuple(key for key in known if key.startswith("seconds")))  # fmt: skip
    num_columns = min(4, math.ceil((len(panels) + 1) / 2))
    num_rows = math.ceil((len(panels) + 1) / num_columns)
    with matplotlib.rc_context(STYLE):
        figure = Figure((4.3 * num_columns, 3.1 * num_rows + 0.7), layout="constrained")
        grid = figure.add_gridspec(num_rows, num_columns)
        for number, panel in enumerate(panels):
            axes = figure.add_subplot(grid[divmod(number, num_columns)])
            draw_panel(axes, panel, runs, window)
        row, start = divmod(len(panels), num_columns)
        axes = figure.add_subplot(grid[row, start:])  # what is left of the last row
        # Not stacked: each phase is its slowest rank's, so that they may exceed the step.
        if len(runs) == 1:
            draw_panel(axes, timings, runs, window)
        else:
            draw_bars(axes, timings, runs)
        add_texts(figure, runs, window)
    return figure


def draw_panel(axes, panel: Panel, runs: list[Run], window: int) -> None:
    """Lines, and circles for validation. One run has a colour per series; several have a colour
    each, and a dash pattern per series."""
    from matplotlib.ticker import MaxNLocator

    for number, key in enumerate(panel.series):
        series_colour, dashes = COLOURS[number % len(COLOURS)], DASHES[number % len(DASHES)]
        has_circles = any(record.get(key) is not None for run in runs for record in run.validation)
        circles = {"marker": "o", "markersize": 5 if number else 6.5} if has_circles else {}
        for run, run_colour in zip(runs, COLOURS, strict=False):
            colour = series_colour if len(runs) == 1 else run_colour
            steps, values = column(run.metrics, "step"), column(run.metrics, key)
            if window > 1:
                alpha = 0.3 if len(runs) == 1 else 0.2
                draw_line(axes, steps, values, color=colour, linewidth=0.5, alpha=alpha)
            means = running_mean(steps, values, window)
            draw_line(axes, steps, means, color=colour, linestyle=dashes)
            face, edge = ("white", colour) if number else (colour, "white")
            axes.plot(column(run.validation, "step"), column(run.validation, key), color=face,
                      markeredgecolor=edge, linestyle="", zorder=3, **circles)  # fmt: skip
        colour = series_colour if len(runs) == 1 else "0.3"
        axes.plot([], [], color=colour, linestyle=dashes, label=short(key), **circles,
                  markerfacecolor="white" if number else colour)  # fmt: skip
    # The legend goes between title and panel, where no line is.
    num_rows = math.ceil(len(panel.series) / 6)
    axes.legend(loc="lower center", bbox_to_anchor=(0.5, 0.98), ncols=6, fontsize=7,
                handlelength=2 if len(panel.series) > 3 else 3.2, columnspacing=1)  # fmt: skip
    axes.set_title(panel.title, pad=6 + 11 * num_rows)
    axes.set_ylabel(panel.unit)
    axes.set_xlabel("optimizer step")
    last = max(1, *(run.metrics[-1]["step"] for run in runs))
    axes.set_xlim(-0.03 * last, 1.03 * last)
    axes.xaxis.set_major_locator(MaxNLocator("auto", integer=True))
    axes.yaxis.set_major_formatter(lambda y, _: f"{y:.4g}")
    if panel.is_share:
        axes.set_ylim(-0.03, 1.03)  # a line at 0 or at 1 stays visible


def draw_line(axes, steps: list[int], values: list[float | None], **style) -> None:
    """A line that is cut where values are None; a value between two of them becomes a dot."""
    padded = [None, *values, None]
    alone = [place for place in range(len(values)) if padded[place] is padded[place + 2] is None]
    axes.plot(steps, values, marker=".", markersize=5, markevery=alone, **style)


def draw_bars(axes, panel: Panel, runs: list[Run]) -> None:
    """The median step, a colour per run: lines of every run and phase would be too many."""
    width = 0.8 / len(runs)
    for number, run in enumerate(runs):
        values = [[value for value in column(run.metrics, key) if value is not None] or [0.0]
                  for key in panel.series]  # fmt: skip
        left = [place - 0.4 + number * width for place in range(len(values))]
        axes.bar(left, list(map(median, values)), width, align="edge", color=COLOURS[number])
    axes.set_xticks(range(len(panel.series)), list(map(short, panel.series)))
    axes.grid(False, axis="x")
    axes.set_title(panel.title, pad=17)
    axes.set_ylabel(f"{panel.unit}, median over steps")


def add_texts(figure, runs: list[Run], window: int) -> None:
    """The runs' names above the panels, how to read the lines below them."""
    folders = [run.folder.resolve() for run in runs]
    if len(runs) == 1:
        figure.suptitle(f"{runs[0].stage}: {Path(*folders[0].parts[-2:])}")
    else:
        parent = os.path.commonpath([folder.parent for folder in folders])
        handles = []
        for folder, colour in zip(folders, COLOURS, strict=False):
            name = os.path.relpath(folder, parent)
            handles += figure.axes[0].plot([], [], color=colour, linewidth=3, label=name)
        figure.legend(handles=handles, loc="outside upper center", ncols=4, fontsize=9)
    parts = [f"pale: each step; strong: mean over the last {window} steps"] if window > 1 else []
    parts += ["circles: validation"] if any(run.validation for run in runs) else []
    figure.supxlabel("; ".join(parts), fontsize=8, color="0.3")


def short(key: str) -> str:
    """A key as the legend has it; seconds_rollout stands under the title as rollout."""
    return "step" if key == "seconds" else key.removeprefix("seconds_")


# ------------------------------------------------------------------------------------ command line


class Parser(argparse.ArgumentParser):
    """ArgumentParser with UserError for an exit."""

    def error(self, message: str) -> None:
        raise UserError(message.removeprefix("argument "))


def parse_options() -> argparse.Namespace:
    """The command line: runs, out, window.

    Raises:
        UserError: naming the flag whose value makes no sense.
    """
    parser = Parser(description="Draw the training curves of runs.", allow_abbrev=False)
    add = parser.add_argument
    add("runs", nargs="+", type=Path, metavar="RUN", help="a run's folder, or its metrics.jsonl")
    add("--out", type=Path, help="PNG file; default: curves.png in the first run's folder")
    add("--window", type=int, help="of the running mean, in steps; default: 1/50 of the run")
    options = parser.parse_args()
    if options.window is not None and options.window < 1:
        raise UserError("--window must be at least 1")
    if options.out is not None and options.out.suffix.lower() != ".png":
        raise UserError(f"--out {options.out} must end with .png")
    return options


def stop(message: object) -> None:
    """End with one line for the user."""
    print(f"error: {message}", file=sys.stderr)
    sys.exit(2)


def main() -> None:
    try:
        options = parse_options()
        runs = load_runs(options.runs)
    except UserError as error:
        stop(error)
    window = options.window or max(1, max(len(run.metrics) for run in runs) // 50)
    out = options.out or runs[0].folder / "curves.png"
    try:
        draw(runs, window).savefig(out, dpi=120)
    except ModuleNotFoundError as error:
        if error.name != "matplotlib":
            raise
        stop("plot.py draws with matplotlib: pip install matplotlib")
    except OSError as error:
        stop(f"--out {out} cannot be written: {error.strerror}")
    print(f"curves written to {out}")


if __name__ == "__main__":
    main()
