"""plot.py: files to records, what figures hold, the command and its errors."""

import doctest
import json
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from standin import run_script

import plot
from infra.errors import UserError


def rl_step(step: int, **changes) -> dict:
    """One line of an RL run's metrics.jsonl."""
    record = {
        "step": step, "reward": 1.0 + step / 100, "accuracy": 0.5 + step / 100,
        "accuracy_shuffled": 0.25, "gap": 0.25 + step / 100, "format": 1.0, "temporal": 0.75,
        "temporal_earned": 0.5, "temporal_effect": 0.01, "length_reward": 0.1,
        "completion_length": 300.0 + step, "clipped_length": 0.0, "zero_std": 0.25,
        "kl": 0.001 * step, "seconds": 10.0, "seconds_data": 1.0, "seconds_update": 3.0,
    }  # fmt: skip
    return record | changes


def sft_step(step: int) -> dict:
    return {"step": step, "loss": 3.0 / step, "grad_norm": 1.5, "lr": 1e-6, "seconds": 2.0}


def validation_record(step: int, accuracy: float) -> dict:
    return {"step": step, "accuracy": accuracy, "accuracy_shuffled": 0.25, "gap": accuracy - 0.25}


def write_run(folder: Path, records: list[dict], validation: list[dict] = ()) -> Path:
    folder.mkdir(parents=True)
    for name, lines in (("metrics.jsonl", records), ("validation.jsonl", validation)):
        if lines:
            (folder / name).write_text("".join(json.dumps(line) + "\n" for line in lines))
    return folder


def test_the_docstring_examples_hold():
    result = doctest.testmod(plot)
    assert result.attempted >= 1 and result.failed == 0


def test_lines_are_the_values_with_gaps_and_their_mean(tmp_path):
    accuracies = [0.25, 0.75, None, 0.5]
    records = [rl_step(step, accuracy=value) for step, value in enumerate(accuracies, start=1)]
    records += [rl_step(step, accuracy=0.5) for step in range(5, 101)]  # a mean of two steps
    validation = [validation_record(0, 0.5), validation_record(2, 0.75)]
    folder = write_run(tmp_path / "rl", records, validation)
    with (folder / "metrics.jsonl").open("a") as file:
        file.write('{"step": 101, "accu')  # is being written
    figure = plot.draw_runs([plot.load_run(folder)])
    assert [axes.get_title() for axes in figure.axes] == [title for title, _ in plot.PANELS["RL"]]
    raw, mean, circles, *_ = figure.axes[0].get_lines()
    np.testing.assert_array_equal(raw.get_xdata(), range(1, 101))
    np.testing.assert_array_equal(raw.get_ydata()[:4], [0.25, 0.75, np.nan, 0.5])
    assert list(mean.get_ydata()[:4]) == [0.25, 0.5, 0.75, 0.5]
    assert (list(circles.get_xdata()), list(circles.get_ydata())) == ([0, 2], [0.5, 0.75])


def test_a_panel_without_values_is_left_out(tmp_path):
    run = plot.load_run(write_run(tmp_path / "sft", [sft_step(1)]))
    shown = [axes.get_title() for axes in plot.draw_runs([run]).axes]
    assert shown == [title for title, _ in plot.PANELS["SFT"] if title != "Accuracy in validation"]


def test_several_runs_have_a_colour_each_and_their_names(tmp_path):
    folders = [write_run(tmp_path / name, [rl_step(1), rl_step(2)]) for name in ("rl", "old/$_rl")]
    figure = plot.draw_runs([plot.load_run(folder) for folder in folders])
    (legend,) = figure.legends
    assert [text.get_text() for text in legend.get_texts()] == list(map(str, folders))
    assert [line.get_color() for line in legend.get_lines()] == list(plot.COLOURS[:2])
    lines = figure.axes[0].get_lines()  # raw and mean: accuracy, then accuracy_shuffled
    assert [line.get_color() for line in lines[:4]] == [plot.COLOURS[n] for n in (0, 0, 1, 1)]
    assert [line.get_linestyle() for line in lines[1::2]] == ["-", "-", "--", "--"]


ROW = {"problem": "?", "data_type": "image", "problem_type": "OCR", "solution": "a"}
ROWS = [
    {**ROW, "path": "OCR/a.png"}, {**ROW, "path": "Math/b.png", "problem_type": "numerical"},
    {**ROW, "path": "Math/c.png"}, {**ROW, "path": "mine/d.png"}, {"path": "no/row.png"},
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
        "category": {"Math (Image)": 2, "OCR (Image)": 1, "other": 1},
        "problem_type": {"OCR": 3, "numerical": 1},
    }
    assert "2 (50.0%)" in [text.get_text() for text in figure.axes[0].texts]


@pytest.mark.parametrize("path, out", [("rl", "rl/curves.png"), ("d.json", "composition.png")])
def test_the_command_writes_a_figure_beside_its_input(tmp_path, monkeypatch, capsys, path, out):
    monkeypatch.chdir(tmp_path)
    write_run(tmp_path / "rl", [rl_step(1), rl_step(2)])
    (tmp_path / "d.json").write_text(json.dumps(ROWS))
    run_script(plot, path)
    assert capsys.readouterr() == (f"figure written to {out}\n", "")
    with Image.open(out) as image:
        assert image.format == "PNG"


@pytest.mark.parametrize(
    "argv, words",
    [
        pytest.param(["nowhere"], "nowhere is not a run", id="no-folder"),
        pytest.param(["torn"], "torn .*has no step yet", id="torn-only-line"),
        pytest.param(["rl", "sft"], "different stages", id="two-stages"),
        pytest.param(["rl"] * 8, "7 colours", id="more-runs-than-colours"),
        pytest.param(["d.json", "rl"], "d.json is a data file", id="data-file-and-run"),
    ],
)
def test_what_cannot_be_drawn_is_one_clear_line(tmp_path, monkeypatch, argv, words):
    monkeypatch.chdir(tmp_path)
    write_run(tmp_path / "rl", [rl_step(1)])
    write_run(tmp_path / "sft", [sft_step(1)])
    (write_run(tmp_path / "torn", []) / "metrics.jsonl").write_text('{"step": 1')
    (tmp_path / "d.json").write_text(json.dumps(ROWS))
    with pytest.raises(UserError, match=words):
        run_script(plot, *argv)
