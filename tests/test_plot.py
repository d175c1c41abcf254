"""plot.py: files to records, the running mean, what figures hold, the command and its errors."""

import doctest
import json
import math
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

import plot
from infra.errors import UserError

ROOT = Path(__file__).parent.parent
ACCURACY, GAP = "Accuracy reward (paper: Figure 5a)", "Accuracy, ordered minus shuffled"
TEMPORAL, EFFECT = "Temporal reward (Figure 5b)", "Effect of r_t; 0: T-GRPO is GRPO"
TIME = "Time of a step and of its phases"


def rl_step(step: int, **changes) -> dict:
    """One line of an RL run's metrics.jsonl."""
    record = {
        "step": step, "reward": 1.0 + step / 100, "accuracy": 0.5 + step / 100,
        "accuracy_shuffled": 0.25, "gap": 0.25 + step / 100, "format": 1.0, "temporal": 0.75,
        "temporal_earned": 0.5, "temporal_effect": 0.01, "length_reward": 0.1,
        "completion_length": 300.0 + step, "clipped_length": 0.0, "zero_std": 0.25,
        "kl": 0.001 * step, "loss": 0.01, "seconds": 10.0, "seconds_data": 1.0,
        "seconds_rollout": 6.0, "seconds_update": 3.0, "tokens_per_second": 100.0,
    }  # fmt: skip
    return record | changes


def sft_step(step: int) -> dict:
    return {"step": step, "loss": 3.0 / step, "grad_norm": 1.5, "lr": 1e-6, "seconds": 2.0,
            "seconds_data": 0.5, "seconds_update": 1.5}  # fmt: skip


def validation_record(step: int, accuracy: float) -> dict:
    return {"step": step, "accuracy": accuracy, "accuracy_shuffled": 0.25, "gap": accuracy - 0.25,
            "seconds": 77.0}  # fmt: skip


def write_run(folder: Path, records: list[dict], validation: list[dict] = ()) -> Path:
    folder.mkdir(parents=True)
    for name, lines in (("metrics.jsonl", records), ("validation.jsonl", validation)):
        if lines:
            (folder / name).write_text("".join(json.dumps(line) + "\n" for line in lines))
    return folder


def test_the_docstring_examples_hold():
    result = doctest.testmod(plot)
    assert result.attempted >= 1 and result.failed == 0


@pytest.mark.parametrize(
    "steps, expected",
    [
        pytest.param([1, 2, 3, 3], [(1, 0), (2, 1), (3, 3)], id="one-step-again"),
        # Step 4 of the first attempt is no part of the model that resumes at 2.
        pytest.param([1, 2, 3, 4, 2, 3], [(1, 0), (2, 4), (3, 5)], id="not-yet-so-far-again"),
        pytest.param([1, 2, 1], [(1, 2)], id="from-the-start"),
        pytest.param([1, 2, 3, 2, 3, 3], [(1, 0), (2, 3), (3, 5)], id="resumed-twice"),
    ],
)
def test_a_resumed_run_replaces_the_steps_that_it_takes_again(tmp_path, steps, expected):
    lines = "".join(f'{{"step": {step}, "loss": {n}}}\n' for n, step in enumerate(steps))
    (tmp_path / "metrics.jsonl").write_text(lines + '{"step": 9, "lo')  # torn: skipped
    records = plot.read_records(tmp_path / "metrics.jsonl")
    assert [(record["step"], record["loss"]) for record in records] == expected


def test_validation_ends_where_the_run_does(tmp_path):
    """Records of steps that a resumed run has not taken again are of another model."""
    validation = [validation_record(step, 0.5) for step in (0, 2, 4)]
    folder = write_run(tmp_path / "rl", [rl_step(s) for s in (1, 2, 3)], validation)
    run = plot.load_run(folder)
    assert [record["step"] for record in run.validation] == [0, 2]
    assert run == plot.load_run(folder / "metrics.jsonl")


@pytest.mark.parametrize(
    "values, window, expected",
    [
        pytest.param([], 3, [], id="nothing"),
        pytest.param([1.0, 5.0, 3.0, 7.0], 2, [1.0, 3.0, 4.0, 5.0], id="window-2"),
        pytest.param([3.0, 5.0, 10.0], 99, [3.0, 4.0, 6.0], id="window-is-longer"),
        pytest.param([math.nan, 4.0, 6.0], 2, [math.nan, 4.0, 5.0], id="gap-first"),
        pytest.param([4.0, math.nan, math.nan], 2, [4.0, 4.0, math.nan], id="gaps-last"),
        pytest.param([1e300, 1.0, 3.0], 2, [1e300, 5e299, 2.0], id="spike-leaves"),
    ],
)
def test_running_mean(values, window, expected):
    assert plot.running_mean(values, window) == pytest.approx(expected, nan_ok=True)


# ------------------------------------------------------------------------------------- the figures


def draw(*folders: Path, window: int = 1):
    return plot.draw_runs([plot.load_run(folder) for folder in folders], window)


def panel(figure, title: str):
    return {axes.get_title(): axes for axes in figure.axes}[title]


def titles(figure) -> list[str]:
    return [axes.get_title() for axes in figure.axes]


def bars(axes) -> list[list[float]]:
    return [[bar.get_height() for bar in container] for container in axes.containers]


def test_one_rl_run_has_every_panel(tmp_path):
    figure = draw(write_run(tmp_path / "rl", [rl_step(1), rl_step(2, seconds=20.0)]))
    assert titles(figure) == [title for title, *_ in plot.PANELS["RL"]] + [TIME]
    assert all(axes.get_ylabel() for axes in figure.axes)
    assert bars(figure.axes[-1]) == [[15, 1, 6, 3]]  # medians of two steps
    labels = [label.get_text() for label in figure.axes[-1].get_xticklabels()]
    assert labels == ["step", "data", "rollout", "update"]
    assert figure.get_suptitle() == f"RL: {tmp_path.name}/rl"


def test_lines_are_the_values_with_gaps_and_their_mean(tmp_path):
    accuracies = [0.25, 0.75, None, 0.5]
    records = [rl_step(step, accuracy=value) for step, value in enumerate(accuracies, start=1)]
    validation = [validation_record(0, 0.5), validation_record(2, 0.75)]
    figure = draw(write_run(tmp_path / "rl", records, validation), window=2)
    raw, mean, circles, *_ = panel(figure, ACCURACY).get_lines()
    np.testing.assert_array_equal(raw.get_xdata(), [1, 2, 3, 4])
    np.testing.assert_array_equal(raw.get_ydata(), [0.25, 0.75, np.nan, 0.5])
    assert list(mean.get_ydata()) == [0.25, 0.5, 0.75, 0.5]
    assert (list(circles.get_xdata()), list(circles.get_ydata())) == ([0, 2], [0.5, 0.75])
    assert (circles.get_marker(), circles.get_linestyle()) == ("o", "None")
    assert len(panel(figure, TEMPORAL).get_lines()) == 4  # which validation does not have
    assert list(panel(figure, EFFECT).get_lines()[0].get_ydata()) == [0.01] * 4


def test_a_panel_without_values_is_left_out(tmp_path):
    nothing = {"accuracy_shuffled": None, "gap": None, "temporal": None, "temporal_earned": None}
    record = rl_step(1, **nothing)
    del record["temporal_effect"]  # as runs of earlier code, which did not log it
    shown = titles(draw(write_run(tmp_path / "rl", [record])))
    assert ACCURACY in shown
    assert not {GAP, TEMPORAL, EFFECT} & set(shown)
    sft = write_run(tmp_path / "sft", [sft_step(1)], [validation_record(1, 0.5)])
    assert titles(draw(sft))[-2:] == ["Accuracy in validation", TIME]


def test_several_runs_have_a_colour_each_and_their_names(tmp_path):
    folders = [write_run(tmp_path / name, [rl_step(1), rl_step(2)]) for name in ("rl", "old/$_rl")]
    figure = draw(*folders)
    (legend,) = figure.legends
    assert [text.get_text() for text in legend.get_texts()] == ["rl", "old/$_rl"]
    assert [line.get_color() for line in legend.get_lines()] == list(plot.COLOURS[:2])
    lines = panel(figure, ACCURACY).get_lines()  # raw and mean: accuracy, then accuracy_shuffled
    assert [line.get_color() for line in lines[:4]] == [plot.COLOURS[n] for n in (0, 0, 1, 1)]
    assert [line.get_linestyle() for line in lines[1::2]] == ["-", "-", "--", "--"]
    assert bars(figure.axes[-1]) == [[10, 1, 6, 3]] * 2


ROW = {"problem": "?", "data_type": "image", "problem_type": "OCR", "solution": "a"}
ROWS = [
    {**ROW, "path": "OCR/a.png"}, {**ROW, "path": "Math/b.png", "problem_type": "numerical"},
    {**ROW, "path": "Math/c.png"}, {**ROW, "path": "mine/d.png"}, {**ROW, "path": "own/e.png"},
    {**ROW, "path": "STAR/f.mp4", "data_type": "video"}, {"path": "no/row.png"},
]  # fmt: skip


def test_figure_2_of_a_data_file(tmp_path):
    (tmp_path / "rows.json").write_text(json.dumps(ROWS))
    figure = plot.draw_composition(tmp_path / "rows.json", "")
    shown = {}
    for axes in figure.axes:
        names = [label.get_text() for label in axes.get_yticklabels()]
        widths = [bar.get_width() for bar in axes.containers[0]]
        shown[axes.get_title()] = dict(zip(names, widths, strict=True))
    assert shown == {
        "category": {"Math (Image)": 2, "other": 2, "OCR (Image)": 1, "General (Video)": 1},
        "problem type": {"OCR": 5, "numerical": 1},
    }
    assert "2 (33.3%)" in [text.get_text() for text in figure.axes[0].texts]
    assert figure.get_suptitle() == "rows.json: 6 rows (paper: Figure 2)"
    assert figure.get_supxlabel() == "1 rows that cannot be read are left out"


# ------------------------------------------------------------------------------------ command line


def run_plot(cwd: Path, *argv: object, **environment: str) -> subprocess.CompletedProcess:
    return subprocess.run(
        [sys.executable, ROOT / "plot.py", *map(str, argv)], cwd=cwd, text=True,
        capture_output=True, env={**os.environ, **environment}, timeout=120,
    )  # fmt: skip


@pytest.mark.parametrize("path, out", [("rl", "rl/curves.png"), ("d.json", "composition.png")])
def test_the_command_writes_a_figure_beside_its_input(tmp_path, path, out):
    write_run(tmp_path / "rl", [rl_step(1), rl_step(2)])
    (tmp_path / "d.json").write_text(json.dumps(ROWS))
    done = run_plot(tmp_path, path, MPLBACKEND="TkAgg", DISPLAY="")  # no window is asked for
    assert (done.returncode, done.stderr, done.stdout) == (0, "", f"figure written to {out}\n")
    with Image.open(tmp_path / out) as image:
        assert image.format == "PNG"
        assert len(image.convert("RGB").quantize(8).getcolors()) > 2


@pytest.mark.parametrize(
    "argv, words",
    [
        pytest.param(["nowhere"], "nowhere is not a run", id="no-folder"),
        pytest.param(["rl", "bare"], "no file bare/metrics.jsonl", id="no-metrics"),
        pytest.param(["torn"], "torn/metrics.jsonl holds no complete step", id="torn-only-line"),
        pytest.param(["rl", "sft"], "different stages", id="two-stages"),
        pytest.param(["rl"] * 8, "7 colours", id="more-runs-than-colours"),
        pytest.param(["rl", "--window", "0"], "--window", id="window-0"),
        pytest.param(["rl", "--out", "no/x.png"], "no/x.png cannot be written", id="out"),
        pytest.param(["d.json", "rl"], "d.json is a data file", id="data-file-and-run"),
    ],
)
def test_what_cannot_be_drawn_is_one_clear_line(tmp_path, monkeypatch, argv, words):
    monkeypatch.chdir(tmp_path)
    write_run(tmp_path / "rl", [rl_step(1)])
    write_run(tmp_path / "sft", [sft_step(1)])
    (write_run(tmp_path / "torn", []) / "metrics.jsonl").write_text('{"step": 1')
    (tmp_path / "bare").mkdir()
    (tmp_path / "d.json").write_text(json.dumps(ROWS))
    monkeypatch.setattr(sys, "argv", ["plot.py", *argv])
    with pytest.raises(UserError, match=words):
        plot.main()


def test_without_matplotlib_it_says_what_to_install(tmp_path):
    write_run(tmp_path / "rl", [rl_step(1)])
    hidden = tmp_path / "hidden/matplotlib"
    hidden.mkdir(parents=True)
    message = 'raise ModuleNotFoundError("No module named matplotlib", name="matplotlib")\n'
    (hidden / "__init__.py").write_text(message)
    done = run_plot(tmp_path, "rl", PYTHONPATH=str(hidden.parent))
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr == "error: plot.py draws with matplotlib: pip install matplotlib\n"
