"""Checkpoints, resume and faults: what a run loses when it is killed, which is nothing.

Trainings run in this process where nothing has to die, else under torchrun (kills.py). Tests that
wait for time-outs or start many processes are marked slow.
"""

import json
import os
import shutil
import signal
import subprocess
import sys

import kills
import pytest
import torch
from conftest import ROOT

import train_sft
from data import load_samples
from evaluation.answering import AnswerSettings, answer, score_item
from evaluation.validation import summary
from infra.checkpoint import Checkpoints
from infra.distributed import process_group
from infra.loader import Loader
from infra.optim import make_optimizer
from infra.run import RunFolder
from infra.video import DecoderPool
from model import load_model, load_normalisation, load_tokenizer
from train_sft import SFTConfig

STEPS = 6


@pytest.fixture(autouse=True)
def leave_the_group():
    """process_group stays after an error, for the message; here the next test needs it gone."""
    yield
    leave()


def leave():
    if torch.distributed.is_initialized():
        torch.distributed.destroy_process_group()


@pytest.fixture(scope="module")
def toy(toy_folder):
    return toy_folder / "runs/toy"


def config(toy, folder, **flags):
    settings = {
        "model": str(toy / "base"), "data": str(toy / "data/sft.json"), "output_dir": str(folder),
        "max_steps": STEPS, "max_frames": 8, "num_workers": 1, "learning_rate": 1e-3,
        "activation_checkpointing": False, "prompts_per_rank": 2, "save_every": 2,
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

    def take_or_die(self, number, step):
        if step == at_step:
            raise Killed
        return take(self, number, step)

    class Kept(RunFolder):
        def __init__(self, *rest):
            super().__init__(*rest)
            runs.append(self)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Loader, "take", take_or_die)
        patch.setattr(train_sft, "RunFolder", Kept)
        with pytest.raises(Killed), process_group() as world:
            train_sft.train(config(toy, folder, **flags), world)
    runs[0].checkpoints.wait()
    runs[0].lock.close()  # as the end of a process does
    leave()


def steps_of(folder):
    return [json.loads(line)["step"] for line in (folder / "metrics.jsonl").open()]


def checkpoints_of(folder):
    return sorted(path.name for path in (folder / "checkpoints").iterdir())


@pytest.fixture(scope="module")
def undisturbed(toy, tmp_path_factory):
    folder = tmp_path_factory.mktemp("runs") / "undisturbed"
    assert run(toy, folder) is True
    return folder


# ------------------------------------------------------------------------------------------ resume


@pytest.mark.parametrize("at_step", [1, 2, 3, 5])
def test_a_killed_run_goes_on_to_the_same_end(toy, undisturbed, tmp_path, at_step, capsys):
    run_killed(toy, tmp_path / "run", at_step)
    assert steps_of(tmp_path / "run") == [*range(1, at_step + 1)]
    capsys.readouterr()
    run(toy, tmp_path / "run")
    said = capsys.readouterr().out
    saved = at_step // 2 * 2
    assert (f"resumed from {tmp_path}/run/checkpoints/step_00000{saved}" in said) is (saved > 0)
    assert ("without a whole checkpoint: it begins again" in said) is (saved == 0)
    assert kills.outcome(tmp_path / "run") == kills.outcome(undisturbed)


def test_a_torn_last_line_is_repaired(toy, undisturbed, tmp_path):
    run_killed(toy, tmp_path / "run", 5)
    file = tmp_path / "run/metrics.jsonl"
    file.write_bytes(file.read_bytes()[:-30])
    (tmp_path / "run/bad_steps.jsonl").write_text('{"step": 5, "sam')
    run(toy, tmp_path / "run")
    assert kills.outcome(tmp_path / "run") == kills.outcome(undisturbed)
    assert (tmp_path / "run/bad_steps.jsonl").read_bytes() == b""


def test_a_finished_run_says_so_and_a_longer_one_goes_on(toy, undisturbed, tmp_path, capsys):
    folder = tmp_path / "run"
    shutil.copytree(undisturbed, folder)
    before = kills.outcome(folder)
    capsys.readouterr()
    assert run(toy, folder) is True
    assert "holds a finished run of 6 steps: nothing is done" in capsys.readouterr().out
    assert kills.outcome(folder) == before
    assert run(toy, folder, max_steps=9) is True
    said = capsys.readouterr().out
    assert "the schedule now spans 9 steps, it spanned 6: the learning rate of step 7 is" in said
    assert steps_of(folder) == [*range(1, 10)]
    after = kills.outcome(folder)
    assert after["metrics"][:6] == before["metrics"]
    assert after["weights"] != before["weights"]
    assert checkpoints_of(folder)[-1] == "step_000009"


def test_other_settings_are_listed_and_refused(toy, undisturbed, tmp_path, capsys):
    folder = tmp_path / "run"
    shutil.copytree(undisturbed, folder)
    with pytest.raises(ValueError, match=r"learning_rate 0.001 is now 0.002; prompts of a") as e:
        run(toy, folder, learning_rate=2e-3, prompts_per_rank=4)
    leave()
    assert "--allow_changed_config true" in str(e.value)
    capsys.readouterr()
    run(toy, folder, learning_rate=2e-3, max_steps=8, allow_changed_config=True)
    assert "other settings: learning_rate 0.001 is now 0.002" in capsys.readouterr().out
    assert steps_of(folder) == [*range(1, 9)]
    # What does not change the result is nobody's business, nor how a batch is cut.
    run(toy, folder, learning_rate=2e-3, max_steps=8, prompts_per_rank=1, num_workers=2,
        gradient_accumulation_steps=2, save_every=1)  # fmt: skip


def test_resume_never_refuses_a_folder_that_holds_a_run(toy, undisturbed, tmp_path):
    for name in ("metrics.jsonl", "model"):
        folder = tmp_path / name
        folder.mkdir()
        source = undisturbed / name
        (shutil.copytree if source.is_dir() else shutil.copyfile)(source, folder / name)
        with pytest.raises(ValueError, match="holds a run already, and --resume is never"):
            run(toy, folder, resume="never")
        leave()


def test_a_model_without_a_checkpoint_is_not_overwritten(toy, undisturbed, tmp_path):
    shutil.copytree(undisturbed / "model", tmp_path / "run/model")
    with pytest.raises(ValueError, match="holds a model/ and no checkpoint"):
        run(toy, tmp_path / "run")


def test_two_runs_in_one_folder_the_second_is_refused(toy, tmp_path):
    folder = tmp_path / "run"
    first = kills.start("sft", folder_in(toy, folder), num_processes=1)
    try:
        kills.wait_until(lambda: (folder / "config.json").exists(), 100, "the first run begins")
        with pytest.raises(ValueError, match="another run is writing to --output_dir"):
            run(toy, folder)
    finally:
        first.kill()
        first.wait()


def folder_in(toy, folder):
    """kills.start wants the toy beside the run's folder."""
    (folder.parent / "runs").mkdir(exist_ok=True)
    os.symlink(toy, folder.parent / "runs/toy")
    return folder


# -------------------------------------------------------------------------------------- validation


@pytest.fixture(scope="module")
def val_data(toy, tmp_path_factory):
    """Eight rows of the toy's test set, videos and images."""
    rows = json.loads((toy / "data/test.json").read_text())
    kinds = [[row for row in rows if row["data_type"] == kind] for kind in ("video", "image")]
    file = tmp_path_factory.mktemp("validation") / "rows.json"
    file.write_text(json.dumps(kinds[0][:5] + kinds[1][:3]))
    return file


def validation_of(folder):
    records = [json.loads(line) for line in (folder / "validation.jsonl").open()]
    assert all(record.pop("seconds") > 0 for record in records)
    return records


def test_validation_during_training(toy, val_data, tmp_path):
    folder = tmp_path / "run"
    flags = {"val_data": str(val_data), "val_every": 2, "max_new_tokens": 8, "keep_last": 1}
    flags |= {"max_steps": 5, "data_root": str(toy / "data")}
    run(toy, folder, **flags, keep_best="val_accuracy")
    records = validation_of(folder)
    assert [record["step"] for record in records] == [0, 2, 4, 5]
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").open()]
    assert ["val_gap" in line for line in lines] == [False, True, False, True, True]
    for record in records:
        assert record["n"] == 8 == sum(kind["n"] for kind in record["by_type"].values())
    assert lines[4]["val_accuracy"] == records[3]["accuracy"]
    # The last validation is what the exported model does.
    model = load_model(str(folder / "model"), torch.device("cpu")).eval()
    tokenizer = load_tokenizer(str(folder / "model"))
    options = load_normalisation(str(folder / "model"))
    settings = AnswerSettings(config(toy, folder).limits(), options, max_new_tokens=8)
    samples = load_samples(val_data, toy / "data")
    with DecoderPool(1, 60) as pool:
        ((_, answers),) = answer(model, tokenizer, [(0, samples)], pool, settings)
    scores = [score_item(one.rollout.texts[0], one.sample) for one in answers]
    assert records[3]["accuracy"] == pytest.approx(sum(scores) / 8)


def test_validation_goes_on_after_a_kill(toy, val_data, tmp_path):
    flags = {"val_data": str(val_data), "val_every": 2, "max_new_tokens": 8, "max_steps": 5}
    flags["data_root"] = str(toy / "data")
    run(toy, tmp_path / "whole", **flags)
    run_killed(toy, tmp_path / "killed", 3, **flags)
    assert len(validation_of(tmp_path / "killed")) == 2
    run(toy, tmp_path / "killed", **flags)
    assert validation_of(tmp_path / "killed") == validation_of(tmp_path / "whole")
    assert kills.outcome(tmp_path / "killed") == kills.outcome(tmp_path / "whole")


def test_the_gap_is_of_the_samples_that_both_orders_have():
    scores = {"ordered": {0: 1.0, 1: 0.5, 2: 0.0}, "shuffled": {1: 0.25}}
    assert summary(scores, {0, 1, 2}) == {
        "accuracy": 0.5, "accuracy_shuffled": 0.25, "gap": 0.25,
    }  # fmt: skip
    assert summary(scores, {0}) == {"accuracy": 1.0, "accuracy_shuffled": None, "gap": None}


def test_an_unknown_metric_to_keep_the_best_by_is_named(toy, tmp_path):
    with pytest.raises(ValueError, match="--keep_best los: metrics have step, loss, "):
        run(toy, tmp_path / "run", keep_best="los")


# ------------------------------------------------------------------------------------------ faults


def test_a_step_that_is_not_finite_is_not_applied_but_counted(toy, tmp_path, monkeypatch):
    accumulate = train_sft.accumulate_gradients
    calls, weights = [], []

    def sometimes_infinite(model, *rest):
        calls.append(len(calls))
        weights.append([parameter.to_local().clone() for parameter in model.parameters()])
        loss = accumulate(model, *rest)
        if calls[-1] in (1, 3, 4):
            next(model.parameters()).grad.fill_(torch.inf)
        return loss

    monkeypatch.setattr(train_sft, "accumulate_gradients", sometimes_infinite)
    run(toy, tmp_path / "run", max_bad_steps=2)
    lines = [json.loads(line) for line in (tmp_path / "run/metrics.jsonl").open()]
    assert [line["bad_steps"] for line in lines] == [0, 1, 1, 2, 3, 3]
    assert [line["grad_norm"] is None for line in lines] == [False, True, False, True, True, False]
    bad = [json.loads(line) for line in (tmp_path / "run/bad_steps.jsonl").open()]
    assert [record["step"] for record in bad] == [2, 4, 5]
    assert all(len(record["samples"]) == 2 for record in bad)
    assert {"row", "problem_id"} == set(bad[0]["samples"][0])

    def moved(first, second):
        pairs = zip(weights[first], weights[second], strict=True)
        return any(not torch.equal(one, other) for one, other in pairs)

    assert [moved(step, step + 1) for step in range(5)] == [True, False, True, False, False]


def test_too_many_bad_steps_in_a_row_end_the_run_with_a_checkpoint(toy, tmp_path, monkeypatch):
    accumulate = train_sft.accumulate_gradients

    def infinite(model, *rest):
        loss = accumulate(model, *rest)
        next(model.parameters()).grad.fill_(torch.nan)
        return loss

    monkeypatch.setattr(train_sft, "accumulate_gradients", infinite)
    with pytest.raises(ValueError, match=r"gradients of 3 steps in a row .*--max_bad_steps 2"):
        run(toy, tmp_path / "run", max_bad_steps=2, save_every=0)
    leave()
    assert checkpoints_of(tmp_path / "run") == ["step_000003"]
    with process_group() as world:
        checkpoints = Checkpoints(tmp_path / "run/checkpoints", world, 0)
        model = load_model(str(toy / "base"), torch.device("cpu"))
        optimizer = make_optimizer(model, 1e-3, 0.01)
        checkpoints.load(checkpoints.find()[0], model, optimizer)
    base = load_model(str(toy / "base"), torch.device("cpu"))
    for mine, other in zip(model.parameters(), base.parameters(), strict=True):
        assert torch.equal(mine, other)


def test_a_folder_that_cannot_be_made_is_one_clear_line(toy, tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(ValueError, match=r"--output_dir .*file/run: Not a directory"):
        run(toy, tmp_path / "file/run")


def test_a_log_that_cannot_be_written_is_one_clear_line(toy, tmp_path):
    (tmp_path / "run/metrics.jsonl").mkdir(parents=True)
    with pytest.raises(ValueError, match=r"run/metrics.jsonl: Is a directory"):
        run(toy, tmp_path / "run")


@pytest.fixture(scope="module")
def killed_base(toy_folder, tmp_path_factory):
    """A folder for kills.py: the toy, and a model that has learned the format."""
    folder = tmp_path_factory.mktemp("kills")
    (folder / "runs").mkdir()
    os.symlink(toy_folder / "runs/toy", folder / "runs/toy")
    kills.finish("sft", folder / "undisturbed")
    return folder


def log_of(folder):
    return (folder.parent / f"{folder.name}.log").read_text(errors="replace")


def logged(folder):
    file = folder / "metrics.jsonl"
    return file.read_text().splitlines() if file.exists() else []


@pytest.mark.parametrize("name", ["SIGTERM", pytest.param("SIGINT", marks=pytest.mark.slow)])
def test_a_signal_saves_within_a_step_and_exits(killed_base, name):
    folder = killed_base / name
    process = kills.start("sft", folder, "--save_every", "0")
    kills.wait_until(lambda: len(logged(folder)) >= 2, 100, "two steps are done")
    before = len(logged(folder))
    process.send_signal(getattr(signal, name))
    process.wait(60)
    done = len(logged(folder))
    assert before <= done <= before + 2
    assert checkpoints_of(folder) == [f"step_{done:06d}"]
    assert f"stopped by {name} after step {done} and saved" in log_of(folder)
    assert "Traceback" not in log_of(folder).partition("torch/distributed")[0]
    kills.finish("sft", folder, "--save_every", "0")
    assert kills.outcome(folder) == kills.outcome(killed_base / "undisturbed")


@pytest.mark.slow
def test_a_stopped_run_without_torchrun_exits_with_0(killed_base):
    folder = killed_base / "alone"
    toy = killed_base / "runs/toy"
    command = [sys.executable, ROOT / "train_sft.py", "--model", toy / "base", "--data",
               toy / "data/sft.json", "--output_dir", folder, "--max_steps", "500"]  # fmt: skip
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT)
    kills.wait_until(lambda: len(logged(folder)) >= 1, 100, "a step is done")
    process.send_signal(signal.SIGTERM)
    said = process.communicate(timeout=60)[0].decode()
    assert process.returncode == 0, said[-2000:]
    assert "the same command goes on from here" in said


@pytest.mark.slow
def test_another_number_of_processes_takes_no_sample_twice_and_loses_none(killed_base):
    """Two processes, stopped, go on as one: the losses are those of one process from the start."""
    folder = killed_base / "fewer"
    process = kills.start("sft", folder)
    kills.wait_until(lambda: len(logged(folder)) >= 5, 100, "five steps are done")
    process.send_signal(signal.SIGTERM)
    process.wait(60)
    done = len(logged(folder))
    for name, number in (("fewer", 1), ("one", 1)):
        code = kills.start("sft", killed_base / name, "--prompts_per_rank", "8",
                           num_processes=number).wait(200)  # fmt: skip
        assert code == 0, log_of(killed_base / name)[-3000:]
    assert "the run goes on with 1 processes, it had 2" in log_of(folder)
    found, expected = (kills.outcome(killed_base / name)["metrics"] for name in ("fewer", "one"))
    assert done < len(found) == len(expected) == 10
    for mine, other in zip(found, expected, strict=True):
        assert mine["loss"] == pytest.approx(other["loss"], abs=1e-5)
        assert mine["tokens"] == other["tokens"]  # the same samples
