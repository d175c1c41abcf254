"""A run's folder: resume, stop requests, logs and refusals; what a kill loses, which is nothing.

Runs are made in this process where nothing has to die, else under torchrun (kills.py, stopped.py).
"""

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
from infra.checkpoint import Checkpoints
from infra.distributed import process_group
from infra.errors import UserError
from infra.loader import Loader
from infra.optim import make_optimizer
from infra.run import Run
from infra.video import DecoderPool
from model import load_model, load_normalisation, load_tokenizer

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
def test_a_killed_run_resumes_to_the_same_end(toy, undisturbed, tmp_path, at_step, capsys):
    run_killed(toy, tmp_path / "run", at_step)
    assert steps_of(tmp_path / "run") == [*range(1, at_step + 1)]
    capsys.readouterr()
    run(toy, tmp_path / "run")
    said = capsys.readouterr().out
    saved = at_step // 2 * 2
    assert (f"resumed from {tmp_path}/run/checkpoints/step_00000{saved}" in said) is (saved > 0)
    assert ("without a whole checkpoint: it starts again" in said) is (saved == 0)
    assert kills.outcome(tmp_path / "run") == kills.outcome(undisturbed)


def test_the_model_has_a_card(toy, undisturbed):
    card = (undisturbed / "model/README.md").read_text()
    assert all(words in card for words in (str(toy / "base"), "sft.json", "6 of 2 prompts"))
    assert "`learning_rate` | 0.001" in card and "`loss` |" in card


def test_a_torn_last_line_is_repaired(toy, undisturbed, tmp_path):
    run_killed(toy, tmp_path / "run", 5)
    file = tmp_path / "run/metrics.jsonl"
    file.write_bytes(file.read_bytes()[:-30])
    (tmp_path / "run/bad_steps.jsonl").write_text('{"step": 5, "sam')
    run(toy, tmp_path / "run")
    assert kills.outcome(tmp_path / "run") == kills.outcome(undisturbed)
    assert (tmp_path / "run/bad_steps.jsonl").read_bytes() == b""


def test_metrics_shorter_than_their_checkpoint_says(toy, tmp_path, capsys):
    """Fault 15: announced, then a JSONDecodeError, or a torn line in the middle for ever."""
    folder = tmp_path / "run"
    run_killed(toy, folder, 4)
    file = folder / "metrics.jsonl"
    lines = file.read_bytes().splitlines(keepends=True)
    file.write_bytes(b"".join(lines[:2]) + lines[2][:30])
    run(toy, folder)
    lost = sum(map(len, lines[2:4]))
    said = capsys.readouterr().out
    assert f"shorter than its checkpoint says: {lost} bytes of it are lost" in said
    assert steps_of(folder) == [1, 2, 5, 6]


def test_a_finished_run_says_so_and_a_longer_one_continues(toy, undisturbed, tmp_path, capsys):
    folder = tmp_path / "run"
    shutil.copytree(undisturbed, folder)
    before = kills.outcome(folder)
    capsys.readouterr()
    assert run(toy, folder) is True
    assert "holds a finished run of 6 steps: nothing to do" in capsys.readouterr().out
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
    changed = {"learning_rate": 2e-3, "max_steps": 8}
    words = r"prompts_per_step 2 is now 4; learning_rate 0.001 is now 0.002. .*--allow_changed_con"
    with pytest.raises(UserError, match=words):
        run(toy, folder, **changed, prompts_per_step=4)
    leave()
    capsys.readouterr()
    run(toy, folder, **changed, allow_changed_config=True)
    assert "other settings: learning_rate 0.001 is now 0.002" in capsys.readouterr().out
    assert steps_of(folder) == [*range(1, 9)]
    # What does not change the result is nobody's business, nor how a step is cut.
    run(toy, folder, **changed, prompts_per_rank=1, num_workers=2, save_every=1)


@pytest.mark.parametrize("name", ["model", "data"])
def test_a_model_or_data_that_was_replaced_is_refused(toy, tmp_path, name, capsys):
    """Fault 6: the KL's reference was another model than the run had begun from."""
    shutil.copytree(toy / "base", tmp_path / "base")
    shutil.copyfile(toy / "data/sft.json", tmp_path / "rows.json")
    flags = {"model": str(tmp_path / "base"), "data": str(tmp_path / "rows.json")}
    flags |= {"data_root": str(toy / "data"), "max_steps": 4}
    run_killed(toy, tmp_path / "run", 3, **flags)
    if name == "model":
        file = tmp_path / "base/model.safetensors"
        content = bytearray(file.read_bytes())
        content[-1] ^= 1
        file.write_bytes(content)
    else:
        rows = json.loads((tmp_path / "rows.json").read_text())
        (tmp_path / "rows.json").write_text(json.dumps(rows[::-1]))
    with pytest.raises(UserError, match=f"other settings: contents of --{name} .* is now"):
        run(toy, tmp_path / "run", **flags)
    leave()
    assert steps_of(tmp_path / "run") == [1, 2, 3]
    run(toy, tmp_path / "run", **flags, allow_changed_config=True)
    assert f"other settings: contents of --{name}" in capsys.readouterr().out
    assert steps_of(tmp_path / "run") == [1, 2, 3, 4]


@pytest.mark.parametrize("content", ["{}", "[]", '{"inputs": 3}', '{"model', "null"])
def test_a_config_json_that_cannot_be_used_is_one_line(toy, tmp_path, content):
    """Fault 23: a traceback."""
    folder = tmp_path / "run"
    folder.mkdir()
    (folder / "metrics.jsonl").write_text('{"step": 1}\n')
    (folder / "config.json").write_text(content)
    with pytest.raises(UserError, match="holds a run whose config.json cannot be used") as caught:
        run(toy, folder)
    assert "\n" not in str(caught.value)


def test_resume_never_refuses_a_folder_that_holds_a_run(toy, undisturbed, tmp_path):
    for name in ("metrics.jsonl", "model"):
        folder = tmp_path / name
        folder.mkdir()
        source = undisturbed / name
        (shutil.copytree if source.is_dir() else shutil.copyfile)(source, folder / name)
        with pytest.raises(UserError, match="holds a run already, and --resume is never"):
            run(toy, folder, resume="never")
        leave()


def test_a_model_without_a_checkpoint_is_not_overwritten(toy, undisturbed, tmp_path):
    shutil.copytree(undisturbed / "model", tmp_path / "run/model")
    with pytest.raises(UserError, match="holds a model/ and no checkpoint"):
        run(toy, tmp_path / "run")


def test_two_runs_in_one_folder_the_second_is_refused(toy, tmp_path):
    folder = tmp_path / "run"
    first = kills.start("sft", folder_in(toy, folder), num_processes=1)
    try:
        kills.wait_until(lambda: (folder / "config.json").exists(), 100, "the first run begins")
        with pytest.raises(UserError, match="another run is writing to --output_dir"):
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


def test_validation_continues_after_a_kill(toy, val_data, tmp_path):
    flags = {"val_data": str(val_data), "val_every": 2, "max_new_tokens": 8, "max_steps": 5}
    flags["data_root"] = str(toy / "data")
    run(toy, tmp_path / "whole", **flags)
    run_killed(toy, tmp_path / "killed", 3, **flags)
    assert len(validation_of(tmp_path / "killed")) == 2
    run(toy, tmp_path / "killed", **flags)
    assert validation_of(tmp_path / "killed") == validation_of(tmp_path / "whole")
    assert kills.outcome(tmp_path / "killed") == kills.outcome(tmp_path / "whole")


# ------------------------------------------------------------------------------------------ faults


def test_a_step_that_is_not_finite_is_not_applied_but_counted(toy, tmp_path, monkeypatch):
    """Fault 12: an infinite loss with a finite gradient (step 4 here) was applied."""
    accumulate = train_sft.accumulate_gradients
    weights = []

    def sometimes_infinite(model, *rest):
        weights.append([parameter.to_local().clone() for parameter in model.parameters()])
        loss = accumulate(model, *rest)
        if len(weights) in (2, 5):
            next(model.parameters()).grad.fill_(torch.inf)
        return torch.inf if len(weights) == 4 else loss

    monkeypatch.setattr(train_sft, "accumulate_gradients", sometimes_infinite)
    run(toy, tmp_path / "run", max_bad_steps=2)
    lines = [json.loads(line) for line in (tmp_path / "run/metrics.jsonl").open()]
    assert [line["bad_steps"] for line in lines] == [0, 1, 1, 2, 3, 3]
    assert [line["grad_norm"] is None for line in lines] == [False, True, False, True, True, False]
    assert [line["loss"] is None for line in lines] == [False, False, False, True, False, False]
    bad = [json.loads(line) for line in (tmp_path / "run/bad_steps.jsonl").open()]
    assert [record["step"] for record in bad] == [2, 4, 5]
    assert all(len(record["samples"]) == 2 for record in bad)
    assert {"row", "problem_id"} <= set(bad[0]["samples"][0])

    def moved(first, second):
        pairs = zip(weights[first], weights[second], strict=True)
        return any(not torch.equal(one, other) for one, other in pairs)

    assert [moved(step, step + 1) for step in range(5)] == [True, False, True, False, False]


def test_a_row_that_spells_the_pad_token_is_skipped(toy, tmp_path):
    """Fault 12: its loss was infinite."""
    shutil.copytree(toy / "base", tmp_path / "base")
    file = tmp_path / "base/config.json"
    settings = json.loads(file.read_text())
    file.write_text(json.dumps(settings | {"pad_token_id": settings["bos_token_id"]}))
    rows = json.loads((toy / "data/sft.json").read_text())[:4]
    rows[2]["process"] = "<|endoftext|>"
    (tmp_path / "rows.json").write_text(json.dumps(rows))
    run(toy, tmp_path / "run", model=str(tmp_path / "base"), data=str(tmp_path / "rows.json"),
        data_root=str(toy / "data"), max_steps=2)  # fmt: skip
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
    with pytest.raises(UserError, match=r"gradient of 3 steps in a row .*--max_bad_steps 2"):
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
    with pytest.raises(UserError, match=r"--output_dir .*file/run: Not a directory"):
        run(toy, tmp_path / "file/run")


def test_a_log_that_cannot_be_written_is_one_clear_line(toy, tmp_path):
    (tmp_path / "run/metrics.jsonl").mkdir(parents=True)
    with pytest.raises(UserError, match=r"run/metrics.jsonl: Is a directory"):
        run(toy, tmp_path / "run")


def log_of(folder):
    return (folder.parent / f"{folder.name}.log").read_text(errors="replace")


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
    assert f"stopped by SIGTERM after step {done}, saved" in log_of(folder)
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
    assert "the same command resumes from here" in said


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
    found, expected = (
        [json.loads(line) for line in (folder / "metrics.jsonl").open()]
        for folder in (out / stage, out / f"{stage}-one")
    )
    assert [line["step"] for line in found] == [line["step"] for line in expected] == [1, 2, 3, 4]
    for mine, other in zip(found, expected, strict=True):
        assert {key: mine[key] for key in COMPARED[stage]} == pytest.approx(
            {key: other[key] for key in COMPARED[stage]}, abs=1e-5
        )
    assert found[3]["loss"] != pytest.approx(found[0]["loss"], abs=1e-4)


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
    monkeypatch.setattr(
        Run, "_save", lambda self, step, progress: saved.append(step)
    )

    def make(world, **flags):
        config = TrainConfig(output_dir=str(tmp_path / "run"), **flags)
        return Run(config, world, "test", 3, {}), saved

    return make


def test_a_stop_while_data_is_awaited_saves_the_step_before(small_run, capsys):
    """Fault 10: a first signal was answered after the step, which never came."""
    with process_group() as world:
        run, saved = small_run(world)
        with run:
            steps = [step for step, _ in run.steps(FakeLoader(wait_at=2), 1)]
    assert (steps, saved, run.is_complete) == ([0, 1], [2], False)
    assert "stopped by SIGTERM after step 2, saved" in capsys.readouterr().out


def test_metrics_are_valid_json_whatever_the_numbers_and_phases_add_up(small_run, tmp_path, capsys):
    with process_group() as world:
        run, _ = small_run(world)
        with run:
            for step, _ in run.steps(FakeLoader(), 1):
                for name in ("update", "update"):
                    with run.phase(name):
                        pass
                run.log({"step": step + 1, "loss": float("nan"), "gap": None, "x": 0.5}, 10)

    def refuse(constant):
        raise AssertionError(f"{constant} is not JSON")

    lines = (tmp_path / "run/metrics.jsonl").read_text().splitlines()
    (first, *_) = (json.loads(line, parse_constant=refuse) for line in lines)
    assert (first["step"], first["loss"], first["gap"], first["x"]) == (1, None, None, 0.5)
    phases = {key for key in first if key.startswith("seconds_")}
    assert phases == {"seconds_data", "seconds_update", "seconds_save"}
    assert first["seconds"] >= first["seconds_update"]
    assert "loss None  gap None  x 0.5" in capsys.readouterr().out


def test_a_warning_is_said_once(small_run, capsys):
    with process_group() as world:
        run, _ = small_run(world)
        with run:
            for holds, text in ((False, "a"), (True, "a"), (True, "b"), (True, "a")):
                run.warn(holds, text)
    said = capsys.readouterr()
    assert (said.out + said.err).count("warning: a") == 1
    assert (said.out + said.err).count("warning: b") == 1


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
