"""A run's folder: resume, stop requests, logs and refusals; what a kill loses, which is nothing.

Runs are made in this process where nothing has to die, else under torchrun (kills.py, stopped.py).
"""

import itertools
import json
import os
import shutil
import signal
import subprocess
import sys
from types import SimpleNamespace

import kills
import pytest
import stopped
import torch
from conftest import ROOT

import train_sft
from config import SFTConfig, TrainConfig
from data import load_samples
from evaluation.answering import AnswerSettings, answer, score_item
from infra.distributed import process_group
from infra.errors import UserError
from infra.loader import Loader
from infra.run import Run
from infra.video import DecoderPool
from model import load_model, load_normalisation, load_tokenizer

STEPS = 4


@pytest.fixture(autouse=True)
def leave_the_group():
    """process_group stays after an error, for the message; here the next test needs it gone."""
    yield
    leave()


def leave():
    if torch.distributed.is_initialized():
        torch.distributed.destroy_process_group()


@pytest.fixture(scope="module")
def toy(toy_folder, tmp_path_factory):
    """A folder with the toy's model `base`, 40 of its SFT rows and 4 for validation."""
    source, folder = toy_folder / "runs/toy", tmp_path_factory.mktemp("inputs")
    shutil.copytree(source / "base", folder / "base")
    rows = json.loads((source / "data/sft.json").read_text())[:40]
    (folder / "rows.json").write_text(json.dumps(rows))
    rows = json.loads((source / "data/test.json").read_text())
    kinds = [[row for row in rows if row["data_type"] == kind] for kind in ("video", "image")]
    (folder / "val.json").write_text(json.dumps(kinds[0][:3] + kinds[1][:1]))
    for name in ("sft", "test"):
        (folder / name).symlink_to(source / "data" / name)
    return folder


def config(toy, folder, **flags):
    settings = {
        "model": str(toy / "base"), "data": str(toy / "rows.json"), "output_dir": str(folder),
        "max_steps": STEPS, "max_frames": 8, "num_workers": 1, "learning_rate": 1e-3,
        "activation_checkpointing": False, "prompts_per_step": 2, "prompts_per_rank": 2,
        "save_every": 2,
    }  # fmt: skip
    return SFTConfig(**settings | flags)


def run(toy, folder, **flags):
    with process_group() as world:
        return train_sft.train(config(toy, folder, **flags), world)


class Killed(BaseException):
    """What a kill is to this process."""


def run_killed(toy, folder, at_step, **flags):
    """A run that dies in its data phase, after at_step steps and with its last save done."""
    take, runs = Loader.take, []

    def take_or_die(self, number, step, should_stop):
        if step == at_step:
            raise Killed
        return take(self, number, step, should_stop)

    class Kept(Run):
        def __init__(self, *rest):
            super().__init__(*rest)
            runs.append(self)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Loader, "take", take_or_die)
        patch.setattr(train_sft, "Run", Kept)
        with pytest.raises(Killed), process_group() as world:
            train_sft.train(config(toy, folder, **flags), world)
    runs[0].checkpoints.wait()
    runs[0]._lock.close()  # as the end of a process does
    leave()
    return folder


def records(file):
    return [json.loads(line) for line in file.open()]


def steps_of(folder):
    return [line["step"] for line in records(folder / "metrics.jsonl")]


def checkpoints_of(folder):
    return sorted(path.name for path in (folder / "checkpoints").iterdir())


@pytest.fixture(scope="module")
def undisturbed(toy, tmp_path_factory):
    folder = tmp_path_factory.mktemp("runs") / "undisturbed"
    assert run(toy, folder) is True
    return folder


@pytest.fixture(scope="module")
def killed(toy, tmp_path_factory):
    """A run that died after step 3, with a checkpoint of step 2."""
    return run_killed(toy, tmp_path_factory.mktemp("runs") / "killed", 3)


@pytest.fixture
def copy_of(tmp_path):
    """A function that copies a run's folder, to be resumed there."""
    return lambda folder: shutil.copytree(folder, tmp_path / "run")


# ------------------------------------------------------------------------------------------ resume


@pytest.mark.parametrize("at_step", [1, 2])
def test_a_killed_run_resumes_to_the_same_end(toy, undisturbed, tmp_path, at_step, capsys):
    folder = run_killed(toy, tmp_path / "run", at_step)
    assert steps_of(folder) == [*range(1, at_step + 1)]
    run(toy, folder)
    words = {1: "without a whole checkpoint: it starts again",
             2: f"resumed from {folder}/checkpoints/step_000002"}  # fmt: skip
    assert words[at_step] in capsys.readouterr().out
    assert kills.outcome(folder) == kills.outcome(undisturbed)


def test_steps_after_the_checkpoint_and_torn_lines_are_taken_again(
    toy, undisturbed, killed, copy_of
):
    folder = copy_of(killed)
    assert steps_of(folder) == [1, 2, 3]
    file = folder / "metrics.jsonl"
    file.write_bytes(file.read_bytes()[:-30])
    (folder / "bad_steps.jsonl").write_text('{"step": 3, "sam')
    run(toy, folder)
    assert kills.outcome(folder) == kills.outcome(undisturbed)
    assert (folder / "bad_steps.jsonl").read_bytes() == b""


def test_metrics_shorter_than_their_checkpoint_says(toy, killed, copy_of, capsys):
    """Fault 15: announced, then a JSONDecodeError, or a torn line in the middle for ever."""
    folder = copy_of(killed)
    first, second, _ = (folder / "metrics.jsonl").read_bytes().splitlines(keepends=True)
    (folder / "metrics.jsonl").write_bytes(first + second[:30])
    run(toy, folder)
    words = f"shorter than its checkpoint says: {len(second)} bytes of it are lost"
    assert words in capsys.readouterr().out
    assert steps_of(folder) == [1, 3, 4]


def test_the_model_has_a_card(toy, undisturbed):
    card = (undisturbed / "model/README.md").read_text()
    assert all(words in card for words in (str(toy / "base"), "rows.json", "4 of 2 prompts"))
    assert "`learning_rate` | 0.001" in card and "`loss` |" in card


def test_a_finished_run_says_so_and_a_longer_one_continues(toy, undisturbed, copy_of, capsys):
    folder = copy_of(undisturbed)
    before = kills.outcome(folder)
    # What does not change the result is nobody's business, nor how a step is cut.
    assert run(toy, folder, prompts_per_rank=1, num_workers=2, save_every=1) is True
    assert "holds a finished run of 4 steps: nothing to do" in capsys.readouterr().out
    assert kills.outcome(folder) == before
    longer = {"max_steps": 5, "learning_rate": 2e-3}
    words = r"prompts_per_step 2 is now 4; learning_rate 0.001 is now 0.002. .*--allow_changed_con"
    with pytest.raises(UserError, match=words):
        run(toy, folder, **longer, prompts_per_step=4)
    leave()
    assert run(toy, folder, **longer, allow_changed_config=True) is True
    said = capsys.readouterr().out
    assert "other settings: learning_rate 0.001 is now 0.002" in said
    assert "the schedule now spans 5 steps, it spanned 4: the learning rate of step 5 is" in said
    assert steps_of(folder) == [1, 2, 3, 4, 5]
    after = kills.outcome(folder)
    assert after["metrics"][:4] == before["metrics"]
    assert after["weights"] != before["weights"]
    assert checkpoints_of(folder)[-1] == "step_000005"


def test_a_model_or_data_that_was_replaced_is_refused(toy, killed, copy_of, capsys):
    """Fault 6: the KL's reference was another model than the run had begun from."""
    folder = copy_of(killed)
    model, data = toy / "base/model.safetensors", toy / "rows.json"
    before = model.read_bytes(), data.read_bytes()
    other = before[0][:-1] + bytes([before[0][-1] ^ 1]), json.dumps(json.loads(before[1])[::-1])
    try:
        model.write_bytes(other[0])
        with pytest.raises(UserError, match="other settings: contents of --model .* is now"):
            run(toy, folder)
        leave()
        model.write_bytes(before[0])
        data.write_text(other[1])
        with pytest.raises(UserError, match="other settings: contents of --data .* is now"):
            run(toy, folder)
        leave()
        assert steps_of(folder) == [1, 2, 3]
        run(toy, folder, allow_changed_config=True)
    finally:
        model.write_bytes(before[0])
        data.write_bytes(before[1])
    assert "other settings: contents of --data" in capsys.readouterr().out
    assert steps_of(folder) == [1, 2, 3, 4]


# -------------------------------------------------------------------------------------- validation


def validation_of(folder):
    validations = records(folder / "validation.jsonl")
    assert all(record.pop("seconds") > 0 for record in validations)
    return validations


def test_validation_during_training_and_after_a_kill(toy, tmp_path):
    """Due at 0 and 3, and at the end; that of step 3, after the checkpoint, is made again."""
    folder, other = tmp_path / "whole", tmp_path / "killed"
    flags = {"val_data": str(toy / "val.json"), "val_every": 3, "max_new_tokens": 8}
    flags |= {"data_root": str(toy), "keep_best": "val_accuracy"}
    run(toy, folder, **flags)
    validations = validation_of(folder)
    assert [record["step"] for record in validations] == [0, 3, 4]
    lines = records(folder / "metrics.jsonl")
    assert ["val_gap" in line for line in lines] == [False, False, True, True]
    for record in validations:
        assert record["n"] == 4 == sum(kind["n"] for kind in record["by_type"].values())
    assert lines[3]["val_accuracy"] == validations[2]["accuracy"]
    run_killed(toy, other, 3, **flags)
    assert len(validation_of(other)) == 2
    run(toy, other, **flags)
    assert validation_of(other) == validations
    assert kills.outcome(other) == kills.outcome(folder)

    # The last validation is what the exported model does.
    model = load_model(str(folder / "model"), torch.device("cpu")).eval()
    tokenizer = load_tokenizer(str(folder / "model"))
    options = load_normalisation(str(folder / "model"))
    settings = AnswerSettings(config(toy, folder).limits(), options, max_new_tokens=8)
    samples = load_samples(toy / "val.json", toy)
    with DecoderPool(1, 60) as pool:
        ((_, answers),) = answer(model, tokenizer, [(0, samples)], pool, settings)
    scores = [score_item(one.rollout.texts[0], one.sample) for one in answers]
    assert validations[2]["accuracy"] == pytest.approx(sum(scores) / 4)


# ------------------------------------------------------------------------------------------ faults


def test_a_step_that_is_not_finite_is_not_applied_but_counted(toy, tmp_path, monkeypatch):
    """Fault 12: an infinite loss with a finite gradient (step 3 here) was applied."""
    accumulate = train_sft.accumulate_gradients
    weights = []

    def sometimes_infinite(model, *rest):
        weights.append([parameter.to_local().clone() for parameter in model.parameters()])
        loss = accumulate(model, *rest)
        if len(weights) == 2:
            next(model.parameters()).grad.fill_(torch.inf)
        return torch.inf if len(weights) == 3 else loss

    monkeypatch.setattr(train_sft, "accumulate_gradients", sometimes_infinite)
    run(toy, tmp_path / "run", max_bad_steps=2, max_steps=5, save_every=0)
    lines = records(tmp_path / "run/metrics.jsonl")
    assert [line["bad_steps"] for line in lines] == [0, 1, 2, 2, 2]
    assert [line["grad_norm"] is None for line in lines] == [False, True, True, False, False]
    assert [line["loss"] is None for line in lines] == [False, False, True, False, False]
    bad = records(tmp_path / "run/bad_steps.jsonl")
    assert [record["step"] for record in bad] == [2, 3]
    assert all(len(record["samples"]) == 2 for record in bad)
    assert {"row", "problem_id"} <= set(bad[0]["samples"][0])
    moved = [any(not torch.equal(*pair) for pair in zip(one, other, strict=True))
             for one, other in itertools.pairwise(weights)]  # fmt: skip
    assert moved == [True, False, False, True]


def test_a_row_that_spells_the_pad_token_is_skipped(toy, tmp_path):
    """Fault 12: its loss was infinite."""
    shutil.copytree(toy / "base", tmp_path / "base")
    file = tmp_path / "base/config.json"
    settings = json.loads(file.read_text())
    file.write_text(json.dumps(settings | {"pad_token_id": settings["bos_token_id"]}))
    rows = json.loads((toy / "rows.json").read_text())[:4]
    rows[2]["process"] = "<|endoftext|>"
    (tmp_path / "rows.json").write_text(json.dumps(rows))
    run(toy, tmp_path / "run", model=str(tmp_path / "base"), data=str(tmp_path / "rows.json"),
        data_root=str(toy), max_steps=2)  # fmt: skip
    (skipped,) = map(json.loads, (tmp_path / "run/skipped.jsonl").open())
    assert skipped["row"] == 2 and "never sampled" in skipped["reason"]
    lines = [json.loads(line) for line in (tmp_path / "run/metrics.jsonl").open()]
    assert [line["loss"] is None for line in lines] == [False, False]


def test_too_many_bad_steps_in_a_row_end_the_run_with_a_checkpoint(toy, tmp_path, monkeypatch):
    accumulate = train_sft.accumulate_gradients

    def infinite(model, *rest):
        loss = accumulate(model, *rest)
        next(model.parameters()).grad.fill_(torch.nan)
        return loss

    monkeypatch.setattr(train_sft, "accumulate_gradients", infinite)
    with pytest.raises(UserError, match=r"gradient of 2 steps in a row .*--max_bad_steps 1"):
        run(toy, tmp_path / "run", max_bad_steps=1, save_every=0)
    assert checkpoints_of(tmp_path / "run") == ["step_000002"]


def logged(folder):
    file = folder / "metrics.jsonl"
    return file.read_text().splitlines() if file.exists() else []


@pytest.mark.slow
def test_a_signal_saves_within_a_step_and_exits(killed_base):
    folder = killed_base / "stopped"
    process = kills.start("sft", folder, "--save_every", "0")
    kills.wait_until(lambda: len(logged(folder)) >= 2, 100, "two steps are done")
    before = len(logged(folder))
    process.send_signal(signal.SIGTERM)
    process.wait(60)
    done = len(logged(folder))
    assert before <= done <= before + 2
    assert checkpoints_of(folder) == [f"step_{done:06d}"]
    said = (killed_base / "stopped.log").read_text(errors="replace")
    assert f"stopped by SIGTERM after step {done}, saved" in said
    assert "Traceback" not in said.partition("torch/distributed")[0]
    kills.finish("sft", folder, "--save_every", "0")
    assert kills.outcome(folder) == kills.outcome(killed_base / "undisturbed")


# -------------------------------------------------------- a stop by a file, two ranks and then one


@pytest.fixture(scope="module")
def stopped_on_two(toy_folder):
    """Where two ranks have left both stages, stopped after step 2, and what they printed."""
    out = toy_folder / "stopped"
    done = subprocess.run(
        [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2",
         ROOT / "tests/stopped.py", out],
        cwd=toy_folder, timeout=400, text=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
        env={**os.environ, "PYTHONPATH": f"{ROOT}:{ROOT}/tests", "OMP_NUM_THREADS": "1",
             "TORCH_ELASTIC_SHUTDOWN_TIMEOUT": "0"},
    )  # fmt: skip
    assert done.returncode == 0, done.stdout[-3000:]
    return out, done.stdout


def test_a_file_named_stop_ends_a_run_after_its_step_saved(stopped_on_two):
    """Fault 1: torchrun kills its ranks 30 s after a signal, less than many steps and saves take.
    Fault 20: --timeout 2 broke a run with a rank that was later than that."""
    out, said = stopped_on_two
    assert "--timeout 2 is raised to 30 seconds" in said
    for stage in ("sft", "rl"):
        assert steps_of(out / stage) == [1, 2]
        assert checkpoints_of(out / stage) == ["step_000002"]
        assert f"stopped by the file {out / stage / 'stop'} after step 2, saved" in said
    warnings = [line for line in said.splitlines() if "torchrun kills its ranks 0 seconds" in line]
    assert [f"{out / stage / 'stop'}," in line
            for stage, line in zip(("sft", "rl"), warnings, strict=True)] == [True] * 2  # fmt: skip


COMPARED = {
    "sft": ("loss", "grad_norm", "tokens"),
    "rl": ("loss", "kl", "reward", "accuracy", "temporal", "temporal_effect", "zero_std"),
}


@pytest.mark.parametrize("stage", COMPARED)
def test_two_ranks_then_one_give_the_losses_of_one(stopped_on_two, toy_folder, stage, monkeypatch):
    """The batch is --prompts_per_step whatever the machine, also across a resume."""
    out, _ = stopped_on_two
    monkeypatch.chdir(toy_folder)
    for folder in (out / stage, out / f"{stage}-one"):
        with process_group() as world:
            assert stopped.train(stage, folder, world) is True
    assert not (out / stage / "stop").exists()
    found, expected = (records(out / name / "metrics.jsonl") for name in (stage, f"{stage}-one"))
    assert [line["step"] for line in found] == [line["step"] for line in expected] == [1, 2, 3]
    for mine, other in zip(found, expected, strict=True):
        assert {key: mine[key] for key in COMPARED[stage]} == pytest.approx(
            {key: other[key] for key in COMPARED[stage]}, abs=1e-5
        )
    assert found[2]["loss"] != pytest.approx(found[0]["loss"], abs=1e-4)


# --------------------------------------------------------------------------------- the loop itself


class FakeLoader:
    """Gives the step's number; from `wait_at` on it waits until the run shall stop."""

    progress = SimpleNamespace()

    def __init__(self, wait_at=None):
        self.wait_at = wait_at

    def take(self, number, step, should_stop):
        if step == self.wait_at:
            signal.raise_signal(signal.SIGTERM)
            assert should_stop()
            return None
        return [step] * number

    def check_skipped(self):
        pass


@pytest.fixture
def small_run(tmp_path, monkeypatch):
    """A function that makes a Run without a model, and the steps that it saved."""
    saved = []
    monkeypatch.setattr(Run, "_save", lambda self, step, progress: saved.append(step))

    def make(world, folder=tmp_path / "run", **flags):
        config = TrainConfig(output_dir=str(folder), **flags)
        return Run(config, world, "test", 3, {}), saved

    return make


def refused(small_run, words, folder, **flags):
    with (
        process_group() as world,
        pytest.raises(UserError, match=words) as caught,
        small_run(world, folder, **flags)[0],
    ):
        pass
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("content", ["{}", "[]", '{"inputs": 3}', '{"model', "null"])
def test_a_config_json_that_cannot_be_used_is_one_line(small_run, tmp_path, content):
    """Fault 23: a traceback."""
    (tmp_path / "metrics.jsonl").write_text('{"step": 1}\n')
    (tmp_path / "config.json").write_text(content)
    refused(small_run, "holds a run whose config.json cannot be used", tmp_path)


def test_what_a_folder_holds_already_is_not_overwritten(small_run, tmp_path):
    (tmp_path / "a/model").mkdir(parents=True)
    (tmp_path / "b").mkdir()
    (tmp_path / "b/metrics.jsonl").write_text('{"step": 1}\n')
    for name in "ab":
        refused(small_run, "holds a run already, and --resume is never", tmp_path / name,
                resume="never")  # fmt: skip
    refused(small_run, "holds a model/ and no checkpoint", tmp_path / "a")


def test_a_folder_or_log_that_cannot_be_written_is_one_clear_line(small_run, tmp_path):
    (tmp_path / "file").touch()
    refused(small_run, r"--output_dir .*file/run: Not a directory", tmp_path / "file/run")
    (tmp_path / "run/metrics.jsonl").mkdir(parents=True)
    refused(small_run, r"run/metrics.jsonl: Is a directory", tmp_path / "run")


def test_two_runs_in_one_folder_the_second_is_refused(small_run, tmp_path):
    with process_group() as world:
        first, _ = small_run(world)
        with pytest.raises(UserError, match="another run is writing to --output_dir"):
            small_run(world)
        with first:
            pass
        small_run(world)  # when the first has ended it is free


def test_a_stop_while_data_is_awaited_saves_the_step_before(small_run, capsys):
    """Fault 10: a first signal was answered after the step, which never came."""
    with process_group() as world:
        run, saved = small_run(world)
        with run:
            steps = [step for step, _ in run.steps(FakeLoader(wait_at=2), 1)]
    assert (steps, saved, run.is_complete) == ([0, 1], [2], False)
    assert "stopped by SIGTERM after step 2, saved" in capsys.readouterr().out


def test_a_warning_is_said_once_and_metrics_are_json_whatever_the_numbers(
    small_run, tmp_path, capsys
):
    with process_group() as world:
        run, _ = small_run(world)
        with run:
            for step, _ in run.steps(FakeLoader(), 1):
                for name in ("update", "update"):
                    with run.phase(name):
                        pass
                run.warn(step == 0, "a"), run.warn(True, "b")
                run.log({"step": step + 1, "loss": float("nan"), "gap": None, "x": 0.5}, 10)

    def refuse(constant):
        raise AssertionError(f"{constant} is not JSON")

    lines = (tmp_path / "run/metrics.jsonl").read_text().splitlines()
    (first, *_) = (json.loads(line, parse_constant=refuse) for line in lines)
    assert (first["step"], first["loss"], first["gap"], first["x"]) == (1, None, None, 0.5)
    phases = {key for key in first if key.startswith("seconds_")}
    assert phases == {"seconds_data", "seconds_update", "seconds_save"}
    said = "".join(capsys.readouterr())
    assert "loss None  gap None  x 0.5" in said
    assert said.count("warning: a") == said.count("warning: b") == 1


def test_tensorboard_events_hold_the_metrics_of_each_step(small_run, tmp_path):
    pytest.importorskip("tensorboard", reason="tensorboard (requirements-dev.txt) is missing")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    with process_group() as world:
        run, _ = small_run(world, tensorboard=True)
        with run:
            for step, _ in run.steps(FakeLoader(), 1):
                run.log({"step": step + 1, "loss": step / 2, "gap": None}, 10)
    events = EventAccumulator(str(tmp_path / "run"))
    events.Reload()
    losses = [(event.step, event.value) for event in events.Scalars("loss")]
    assert losses == [(1, 0.0), (2, 0.5), (3, 1.0)]
    assert "gap" not in events.Tags()["scalars"]
