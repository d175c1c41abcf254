"""plot.py: files to records, the running mean, what a figure holds, the command and its errors."""

import doctest
import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

import plot

ROOT = Path(__file__).parent.parent


def rl_step(step: int, **changes) -> dict:
    """One line of an RL run's metrics.jsonl, values that rise with the step."""
    record = {
        "step": step, "reward": 1.0 + step / 100, "accuracy": 0.5 + step / 100,
        "accuracy_shuffled": 0.25, "gap": 0.25 + step / 100, "format": 1.0, "temporal": 0.75,
        "temporal_earned": 0.5,
        "length_reward": 0.1, "completion_length": 300.0 + step, "clipped_length": 0.0,
        "zero_std": 0.25, "kl": 0.001 * step, "clip_fraction": 0.0, "loss": 0.01,
        "grad_norm": 1.5, "lr": 1e-6, "logp_gap": 1e-6, "seconds": 10.0, "seconds_data": 1.0,
        "seconds_rollout": 6.0, "seconds_update": 3.0, "tokens_per_second": 100.0,
        "peak_memory_gib": 2.5,
    }  # fmt: skip
    return record | changes


def sft_step(step: int, **changes) -> dict:
    record = {
        "step": step, "loss": 3.0 / step, "grad_norm": 1.5, "lr": 1e-6, "tokens": 640,
        "seconds": 2.0, "seconds_data": 0.5, "seconds_update": 1.5, "tokens_per_second": 320.0,
        "peak_memory_gib": 2.5,
    }  # fmt: skip
    return record | changes


def validation_record(step: int, accuracy: float, shuffled: float) -> dict:
    return {"step": step, "accuracy": accuracy, "accuracy_shuffled": shuffled,
            "gap": accuracy - shuffled, "by_type": {"numerical": {"n": 3, "score": 0.5}},
            "seconds": 77.0}  # fmt: skip


def as_lines(records: list[dict]) -> str:
    return "".join(json.dumps(record) + "\n" for record in records)


def write_run(folder: Path, records: list[dict], validation: list[dict] = ()) -> Path:
    folder.mkdir(parents=True)
    (folder / "metrics.jsonl").write_text(as_lines(records))
    if validation:
        (folder / "validation.jsonl").write_text(as_lines(validation))
    return folder


@pytest.fixture
def rl_run(tmp_path):
    return write_run(tmp_path / "rl", [rl_step(step) for step in range(1, 6)])


def test_the_docstring_examples_hold():
    result = doctest.testmod(plot)
    assert result.attempted >= 1
    assert result.failed == 0


# --------------------------------------------------------------------------------------- the files


def steps_and_losses(path: Path) -> list[tuple]:
    return [(record["step"], record["loss"]) for record in plot.read_records(path)]


@pytest.mark.parametrize(
    "text, expected",
    [
        pytest.param("", [], id="empty"),
        pytest.param('{"step": 1, "loss": 2.5}\n', [(1, 2.5)], id="one-line"),
        pytest.param('{"step": 1, "loss": 2}\r\n', [(1, 2)], id="windows-line-end"),
        pytest.param('{"step": 1, "loss": null}\n', [(1, None)], id="null"),
        pytest.param('{"step": 1, "loss": NaN}\n', [(1, None)], id="nan"),
        pytest.param('{"step": 1, "loss": -Infinity}\n', [(1, None)], id="infinity"),
        pytest.param('{"step": 1, "loss": 1e999}\n', [(1, None)], id="overflow"),
        pytest.param('{"step": 0, "loss": 1}\n', [(0, 1)], id="step-0"),
        pytest.param('{"step": 1, "loss": 2}\n{"st', [(1, 2)], id="torn-last-line"),
        pytest.param('{"step": 1, "loss": 2}\n{"step": 2, "loss": 3', [(1, 2)], id="torn-number"),
        pytest.param('{"step": 1, "lo', [], id="torn-only-line"),
        pytest.param(
            '{"step": 1, "loss": 2}\n{"step": 2, "loss": 3}', [(1, 2), (2, 3)],
            id="whole-last-line-without-its-end",
        ),
    ],
)  # fmt: skip
def test_read_records(tmp_path, text, expected):
    (tmp_path / "metrics.jsonl").write_bytes(text.encode())
    assert steps_and_losses(tmp_path / "metrics.jsonl") == expected


@pytest.mark.parametrize(
    "steps, expected",
    [
        pytest.param([1, 2, 3, 3], [(1, 0), (2, 1), (3, 3)], id="one-step-again"),
        pytest.param([1, 2, 3, 2, 3], [(1, 0), (2, 3), (3, 4)], id="two-steps-again"),
        # Step 4 of the first attempt is no part of the model that goes on at 2.
        pytest.param([1, 2, 3, 4, 2, 3], [(1, 0), (2, 4), (3, 5)], id="not-yet-so-far-again"),
        pytest.param([1, 2, 1], [(1, 2)], id="from-the-start"),
        pytest.param([1, 2, 3, 2, 3, 3], [(1, 0), (2, 3), (3, 5)], id="resumed-twice"),
        pytest.param([1, 2, 7], [(1, 0), (2, 1), (7, 2)], id="a-jump-ahead-stays"),
    ],
)
def test_a_resumed_run_replaces_the_steps_from_where_it_goes_on(tmp_path, steps, expected):
    records = [{"step": step, "loss": line} for line, step in enumerate(steps)]
    (tmp_path / "metrics.jsonl").write_text(as_lines(records))
    assert steps_and_losses(tmp_path / "metrics.jsonl") == expected


GOOD = '{"step": 1, "loss": 2}\n'


@pytest.mark.parametrize(
    "text, line, reason",
    [
        pytest.param('{"step": 1, "lo\n' + GOOD, 1, "", id="torn-in-the-middle"),
        pytest.param(GOOD + '{"step": 2, "lo\n', 2, "", id="torn-but-ended"),
        pytest.param(GOOD + "\n" + GOOD, 2, "", id="blank"),
        pytest.param(GOOD + "\xff\n", 2, "", id="not-utf-8"),
        pytest.param(GOOD + "[1, 2]\n", 2, "step", id="no-object"),
        pytest.param('{"loss": 2}\n', 1, "step", id="no-step"),
        pytest.param('{"step": "1"}\n', 1, "step", id="step-is-text"),
        pytest.param('{"step": true}\n', 1, "step", id="step-is-true"),
        pytest.param('{"step": 1.5}\n', 1, "step", id="step-is-a-fraction"),
        pytest.param('{"step": -1}\n', 1, "step", id="step-is-negative"),
        pytest.param(GOOD * 3 + '{"step": 2, "loss": "2"}\n', 4, "loss", id="value-is-text"),
        pytest.param('{"step": 1, "accuracy": true}\n', 1, "accuracy", id="value-is-true"),
        pytest.param('{"step": 1, "seconds_x": [1]}\n', 1, "seconds_x", id="time-is-a-list"),
    ],
)
def test_a_bad_line_is_named(tmp_path, text, line, reason):
    path = tmp_path / "metrics.jsonl"
    path.write_bytes(text.encode("latin-1"))
    with pytest.raises(ValueError, match=f"metrics.jsonl, line {line}: .*{reason}"):
        plot.read_records(path)


def test_a_key_that_is_not_drawn_may_hold_anything(tmp_path):
    (tmp_path / "metrics.jsonl").write_text('{"step": 1, "by_type": {"OCR": 1}, "note": "x"}\n')
    assert plot.read_records(tmp_path / "metrics.jsonl")[0]["by_type"] == {"OCR": 1}


@pytest.mark.parametrize("step, stage", [(rl_step, "RL"), (sft_step, "SFT")], ids=["rl", "sft"])
def test_a_folder_and_its_file_are_the_same_run(tmp_path, step, stage):
    folder = write_run(tmp_path / "run", [step(1), step(2)])
    run = plot.load_run(folder)
    assert run == plot.load_run(folder / "metrics.jsonl")
    assert (run.folder, run.stage, run.validation) == (folder, stage, [])


def test_validation_ends_where_the_run_does(tmp_path):
    """Records of steps that a resumed run has not taken again are of another model."""
    validation = [validation_record(0, 0.5, 0.25), validation_record(2, 0.75, 0.25),
                  validation_record(4, 1.0, 0.25)]  # fmt: skip
    run = plot.load_run(write_run(tmp_path / "rl", [rl_step(s) for s in (1, 2, 3)], validation))
    assert [(record["step"], record["gap"]) for record in run.validation] == [(0, 0.25), (2, 0.5)]


# ---------------------------------------------------------------------------------------- the mean


@pytest.mark.parametrize(
    "steps, values, window, expected",
    [
        pytest.param([], [], 3, [], id="nothing"),
        pytest.param([1, 2, 3], [1.0, 5.0, 3.0], 1, [1.0, 5.0, 3.0], id="window-1"),
        pytest.param([1, 2, 3, 4], [1.0, 5.0, 3.0, 7.0], 2, [1.0, 3.0, 4.0, 5.0], id="window-2"),
        pytest.param([1, 2, 3], [3.0, 5.0, 10.0], 3, [3.0, 4.0, 6.0], id="window-is-the-run"),
        pytest.param([1, 2, 3], [3.0, 5.0, 10.0], 99, [3.0, 4.0, 6.0], id="window-is-longer"),
        pytest.param([1, 2, 3], [None, 4.0, 6.0], 2, [None, 4.0, 5.0], id="null-first"),
        pytest.param([1, 2, 3], [4.0, None, 8.0], 2, [4.0, 4.0, 8.0], id="null-inside"),
        pytest.param([1, 2, 3], [4.0, None, 8.0], 1, [4.0, None, 8.0], id="null-with-window-1"),
        pytest.param([1, 2, 3, 4], [4.0, None, None, 8.0], 2, [4.0, 4.0, None, 8.0], id="nulls"),
        pytest.param([1, 2], [None, None], 5, [None, None], id="null-alone"),
        pytest.param([1, 2, 9, 10], [1.0, 3.0, 5.0, 9.0], 3, [1.0, 2.0, 5.0, 7.0], id="jump"),
        pytest.param([1, 2, 3], [1e300, 1.0, 3.0], 2, [1e300, 5e299, 2.0], id="spike-leaves"),
    ],
)
def test_running_mean(steps, values, window, expected):
    assert plot.running_mean(steps, values, window) == expected


# -------------------------------------------------------------------------------------- the figure


def lines_of(figure, title: str) -> list:
    """The lines of a panel that hold data, without those for the legend."""
    axes = {axes.get_title(): axes for axes in figure.axes}[title]
    return [line for line in axes.get_lines() if np.isfinite(line.get_ydata().astype(float)).any()]


def titles(figure) -> list[str]:
    return [axes.get_title() for axes in figure.axes]


ACCURACY, GAP = "Accuracy reward (paper: Figure 5a)", "Accuracy, ordered minus shuffled"
TEMPORAL = "Temporal reward, scaled to 0..1 (Figure 5b)"
TIME = "Time of a step and of its phases"


def test_one_rl_run_has_every_panel(rl_run):
    figure = plot.draw(plot.load_runs([rl_run]), window=1)
    assert titles(figure) == [panel.title for panel in plot.PANELS["RL"]] + [TIME]
    for axes in figure.axes:
        assert axes.get_ylabel()
        assert axes.get_xlabel() == "optimizer step"
    for title in (ACCURACY, TEMPORAL, "Shares of groups and of responses"):
        low, high = figure.axes[titles(figure).index(title)].get_ylim()
        assert -0.1 < low < 0 and 1 < high < 1.1
    names = [text.get_text() for text in figure.axes[-1].get_legend().get_texts()]
    assert names == ["step", "data", "rollout", "update"]


def test_lines_are_the_values_and_their_mean(tmp_path):
    accuracies = [0.25, 0.75, None, 0.5]
    records = [rl_step(step, accuracy=value) for step, value in enumerate(accuracies, start=1)]
    figure = plot.draw(plot.load_runs([write_run(tmp_path / "rl", records)]), window=2)
    raw, mean, raw_shuffled, mean_shuffled = lines_of(figure, ACCURACY)
    np.testing.assert_array_equal(raw.get_xdata(), [1, 2, 3, 4])
    np.testing.assert_array_equal(raw.get_ydata().astype(float), [0.25, 0.75, np.nan, 0.5])
    assert mean.get_ydata().tolist() == [0.25, 0.5, 0.75, 0.5]
    assert mean_shuffled.get_ydata().tolist() == [0.25] * 4
    assert raw.get_alpha() < 1 and raw.get_linewidth() < mean.get_linewidth()
    assert raw.get_color() == mean.get_color() != mean_shuffled.get_color()
    assert mean.get_linestyle() == "-" != mean_shuffled.get_linestyle()
    assert raw.get_markevery() == [3]  # the value between two gaps, which no line would show
    assert raw_shuffled.get_markevery() == []


def test_the_title_names_stage_and_folder(rl_run, monkeypatch):
    monkeypatch.chdir(rl_run)
    figure = plot.draw(plot.load_runs([Path(".")]), window=1)
    assert figure.get_suptitle() == f"RL: {rl_run.parent.name}/rl"


def test_window_1_draws_each_line_once(rl_run):
    figure = plot.draw(plot.load_runs([rl_run]), window=1)
    assert len(lines_of(figure, ACCURACY)) == 2


def test_validation_is_drawn_as_circles(tmp_path):
    validation = [validation_record(0, 0.5, 0.25), validation_record(2, 0.75, 0.25)]
    folder = write_run(tmp_path / "rl", [rl_step(1), rl_step(2)], validation)
    figure = plot.draw(plot.load_runs([folder]), window=1)

    def circles(title: str) -> list[tuple]:
        return [(line.get_xdata().tolist(), line.get_ydata().tolist())
                for line in lines_of(figure, title) if line.get_marker() == "o"]  # fmt: skip

    assert circles(ACCURACY) == [([0, 2], [0.5, 0.75]), ([0, 2], [0.25, 0.25])]
    assert circles(GAP) == [([0, 2], [0.25, 0.5])]
    assert circles(TEMPORAL) == circles(TIME) == []


@pytest.mark.parametrize("with_validation", [False, True])
def test_panels_of_an_sft_run(tmp_path, with_validation):
    validation = [validation_record(1, 0.5, 0.25)] * with_validation
    folder = write_run(tmp_path / "sft", [sft_step(1), sft_step(2)], validation)
    expected = ["Loss", "Norm of the gradient, before the clip", "Learning rate",
                "Accuracy in validation", TIME]  # fmt: skip
    if not with_validation:
        expected.remove("Accuracy in validation")
    assert titles(plot.draw(plot.load_runs([folder]), window=1)) == expected


def test_a_run_without_shuffled_groups_has_no_panel_that_would_be_empty(tmp_path):
    nothing = {"accuracy_shuffled": None, "gap": None, "temporal": None, "temporal_earned": None}
    folder = write_run(tmp_path / "rl", [rl_step(step, **nothing) for step in (1, 2)])
    shown = titles(plot.draw(plot.load_runs([folder]), window=1))
    assert ACCURACY in shown
    assert GAP not in shown and TEMPORAL not in shown


def test_several_runs_have_a_colour_each_and_their_names(tmp_path):
    folders = [write_run(tmp_path / name, [rl_step(1, **changes), rl_step(2)])
               for name, changes in (("rl", {"seconds_rollout": 8.0}), ("old/$_rl", {}),
                                     ("_last", {"seconds_rollout": 20.0}))]  # fmt: skip
    figure = plot.draw(plot.load_runs(folders), window=1)
    (legend,) = figure.legends
    assert [text.get_text() for text in legend.get_texts()] == ["rl", "old/$_rl", "_last"]
    assert [line.get_color() for line in legend.get_lines()] == list(plot.COLOURS[:3])
    lines = lines_of(figure, ACCURACY)  # accuracy of the three runs, then accuracy_shuffled
    assert [line.get_color() for line in lines] == list(plot.COLOURS[:3]) * 2
    assert [line.get_linestyle() for line in lines] == ["-"] * 3 + ["--"] * 3
    bars = [[bar.get_height() for bar in container] for container in figure.axes[-1].containers]
    assert bars == [[10, 1, 7, 3], [10, 1, 6, 3], [10, 1, 13, 3]]  # the median of two steps
    labels = [label.get_text() for label in figure.axes[-1].get_xticklabels()]
    assert labels == ["step", "data", "rollout", "update"]


# ------------------------------------------------------------------------------------ command line


def run_plot(cwd: Path, *argv: object, **environment: str) -> subprocess.CompletedProcess:
    return subprocess.run(
        [sys.executable, ROOT / "plot.py", *map(str, argv)], cwd=cwd, text=True,
        capture_output=True, env={**os.environ, **environment}, timeout=120,
    )  # fmt: skip


def assert_is_a_figure(path: Path, num_columns: int) -> None:
    """A PNG with something in each of the columns of its two rows of panels."""
    with Image.open(path) as image:
        assert image.format == "PNG"
        pixels = np.asarray(image.convert("RGB")).astype(int)
    assert pixels.shape[1] > 400 * num_columns
    coloured = pixels.max(axis=2) - pixels.min(axis=2) > 60  # neither white nor grey nor black
    for row in np.array_split(coloured, 2):
        for panel in np.array_split(row, num_columns, axis=1):
            assert panel.sum() > 100


def test_the_command_on_one_run_writes_into_its_folder(rl_run):
    done = run_plot(rl_run.parent, "rl", MPLBACKEND="TkAgg", DISPLAY="")  # none is asked for
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout == f"curves written to {Path('rl/curves.png')}\n"
    assert_is_a_figure(rl_run / "curves.png", num_columns=4)


def test_the_command_on_two_runs_with_all_flags(tmp_path):
    write_run(tmp_path / "a", [sft_step(step) for step in (1, 2, 3)])
    write_run(tmp_path / "b", [sft_step(step, lr=2e-6) for step in (1, 2, 3, 4)])
    done = run_plot(tmp_path, "a", "b/metrics.jsonl", "--out", "both.png", "--window", 10)
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout == "curves written to both.png\n"
    assert_is_a_figure(tmp_path / "both.png", num_columns=2)
    assert not (tmp_path / "a/curves.png").exists()


def main_fails(monkeypatch, capsys, *argv: object) -> str:
    """The line that main prints before it ends with exit code 2."""
    monkeypatch.setattr(sys, "argv", ["plot.py", *map(str, argv)])
    with pytest.raises(SystemExit) as end:
        plot.main()
    output = capsys.readouterr()
    assert end.value.code == 2
    assert output.out == ""
    assert output.err.startswith("error: ") and output.err.count("\n") == 1
    return output.err


@pytest.mark.parametrize(
    "argv, words",
    [
        pytest.param([], ["RUN"], id="no-run"),
        pytest.param(["nowhere"], ["nowhere", "no run"], id="no-folder"),
        pytest.param(["rl", "bare"], ["bare/metrics.jsonl", "no run"], id="no-metrics"),
        pytest.param(["empty"], ["empty/metrics.jsonl", "no complete step"], id="empty-file"),
        pytest.param(["torn"], ["torn/metrics.jsonl", "no complete step"], id="torn-only-line"),
        pytest.param(["bad"], ["bad/metrics.jsonl, line 2:"], id="bad-line"),
        pytest.param(["checked"], ["checked/validation.jsonl, line 1:"], id="bad-validation"),
        pytest.param(["checked/validation.jsonl"], ["line 1"], id="another-bad-file"),
        pytest.param(["other"], ["other/metrics.jsonl", "no loss"], id="no-training"),
        pytest.param(["rl", "sft"], ["rl is RL", "sft is SFT"], id="two-stages"),
        pytest.param(["rl"] * 8, ["8 runs"], id="more-runs-than-colours"),
        pytest.param(["rl", "--window", "0"], ["--window"], id="window-0"),
        pytest.param(["rl", "--window", "2.5"], ["--window", "2.5"], id="window-is-a-fraction"),
        pytest.param(["rl", "--windo", "2"], ["--windo"], id="abbreviated-flag"),
        pytest.param(["rl", "--out", "x.pdf"], ["--out", "x.pdf", ".png"], id="not-png"),
        pytest.param(["rl", "--out", "no/x.png"], ["no/x.png"], id="no-folder-for-it"),
        pytest.param(["rl", "--out", "dir.png"], ["dir.png"], id="out-is-a-folder"),
    ],
)
def test_errors_are_one_line(tmp_path, monkeypatch, capsys, argv, words):
    monkeypatch.chdir(tmp_path)
    write_run(tmp_path / "rl", [rl_step(1)])
    write_run(tmp_path / "sft", [sft_step(1)])
    write_run(tmp_path / "other", [{"step": 1, "score": 0.5}])
    write_run(tmp_path / "checked", [rl_step(1)], [{"accuracy": 0.5}])
    for name, text in {"empty": "", "torn": '{"step": 1', "bad": GOOD + "oops\n"}.items():
        (write_run(tmp_path / name, []) / "metrics.jsonl").write_text(text)
    (tmp_path / "bare").mkdir()
    (tmp_path / "dir.png").mkdir()
    line = main_fails(monkeypatch, capsys, *argv)
    for word in words:
        assert word in line


def test_the_command_ends_with_exit_code_2(tmp_path):
    done = run_plot(tmp_path, "nowhere")
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr.startswith("error: nowhere is no run")


def test_without_matplotlib_it_says_what_to_install(rl_run, tmp_path):
    hidden = tmp_path / "hidden/matplotlib"
    hidden.mkdir(parents=True)
    message = 'raise ModuleNotFoundError("No module named matplotlib", name="matplotlib")\n'
    (hidden / "__init__.py").write_text(message)
    done = run_plot(tmp_path, rl_run, PYTHONPATH=str(hidden.parent))
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr.startswith("error: ") and done.stderr.count("\n") == 1
    assert "pip install matplotlib" in done.stderr


def test_nothing_heavy_is_imported(rl_run):
    code = (
        "import sys, plot\n"
        "early = set(sys.modules)\n"
        f"sys.argv = ['plot.py', {str(rl_run)!r}]\n"
        "plot.main()\n"
        "print(sorted({'numpy', 'matplotlib'} & early), "
        "sorted({'torch', 'transformers', 'matplotlib.pyplot'} & set(sys.modules)))"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, text=True, capture_output=True,
                          check=True)  # fmt: skip
    assert done.stdout.splitlines()[-1] == "[] []"
