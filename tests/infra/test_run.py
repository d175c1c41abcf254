"""Checkpoints, resume and faults: what a run loses when it is killed, which is nothing.

Trainings run in this process where nothing has to die, else under torchrun (kills.py). Tests that
wait for time-outs or start many processes are marked slow.
"""

import json
import os
import random
import resource
import shutil
import signal
import subprocess
import sys
import time

import kills
import pytest
import torch
from conftest import ROOT
from safetensors.torch import load_file

import train_sft
from data import load_samples
from evaluation.answering import AnswerSettings, answer, score_item
from evaluation.validation import summary
from infra.checkpoint import Checkpoints, Stager, check_files, training_state
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


def flip(folder):
    file = folder / "__0_0.distcp"
    content = bytearray(file.read_bytes())
    content[len(content) // 2] ^= 1
    file.write_bytes(content)
    return "__0_0.distcp has crc32"


def truncate(folder):
    file = folder / "__0_0.distcp"
    file.write_bytes(file.read_bytes()[:1000])
    return "__0_0.distcp has bytes 1000"


def lose_shard(folder):
    (folder / "__0_0.distcp").unlink()
    return "__0_0.distcp: No such file"


def lose_manifest(folder):
    (folder / "manifest.json").unlink()
    return "manifest.json: No such file"


def tear_manifest(folder):
    file = folder / "manifest.json"
    file.write_text(file.read_text()[:40])
    return "manifest.json: "


def change_run(folder):
    file = folder / "run.json"
    file.write_text(file.read_text().replace('"step": 4', '"step": 5'))
    return "run.json has crc32"


DAMAGES = (truncate, lose_shard, lose_manifest, tear_manifest, change_run)


@pytest.mark.parametrize("damage", DAMAGES)
def test_damage_to_a_checkpoint_is_found(undisturbed, tmp_path, damage):
    folder = tmp_path / "step_000004"
    shutil.copytree(undisturbed / "checkpoints/step_000004", folder)
    assert check_files(folder) == ""
    assert damage(folder) in check_files(folder).replace(f"{folder}/", "")


@pytest.mark.parametrize("damage", [flip, lose_manifest])
def test_a_broken_checkpoint_is_named_and_passed_over(toy, undisturbed, tmp_path, damage, capsys):
    run_killed(toy, tmp_path / "run", 5)
    assert checkpoints_of(tmp_path / "run") == ["step_000002", "step_000004"]
    assert check_files(tmp_path / "run/checkpoints/step_000004") == ""
    reason = damage(tmp_path / "run/checkpoints/step_000004")
    capsys.readouterr()
    run(toy, tmp_path / "run")
    said = capsys.readouterr().out
    assert f"step_000004 is passed over: {reason}" in said.replace(f"{tmp_path}/run/checkpoints/"
                                                                   "step_000004/", "")  # fmt: skip
    assert "resumed from" in said
    assert "step_000002" in said
    assert kills.outcome(tmp_path / "run") == kills.outcome(undisturbed)
    assert checkpoints_of(tmp_path / "run") == ["step_000004", "step_000006"]
    assert check_files(tmp_path / "run/checkpoints/step_000004") == ""


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


def test_loading_gives_back_every_bit_of_weights_and_optimizer(toy, tmp_path):
    with process_group() as world:
        model = load_model(str(toy / "base"), torch.device("cpu"))
        optimizer = make_optimizer(model, 1e-3, 0.01)
        for number, parameter in enumerate(model.parameters()):
            parameter.grad = torch.full_like(parameter, 0.01 * number)
        optimizer.step()
        checkpoints = Checkpoints(tmp_path, world, keep_last=0)
        checkpoints.save({"step": 7, "value": None}, model, optimizer, lambda: None)
        saved = copied(training_state(model, optimizer))
        with torch.no_grad():  # the copy was made before the file was written
            for parameter in model.parameters():
                parameter.zero_()
        checkpoints.wait()
        path, info = checkpoints.find()
        assert (path.name, info["step"]) == ("step_000007", 7)
        fresh = load_model(str(toy / "base"), torch.device("cpu"))
        fresh_optimizer = make_optimizer(fresh, 1e-3, 0.01)
        checkpoints.load(path, fresh, fresh_optimizer)
        loaded = training_state(fresh, fresh_optimizer)
    for name, weight in saved["model"].items():
        assert torch.equal(loaded["model"][name], weight), name
        for key, value in saved["optimizer"][name].items():
            assert torch.equal(loaded["optimizer"][name][key], value), (name, key)
    assert float(saved["optimizer"]["lm_head.weight"]["step"]) == 1


def copied(state):
    if isinstance(state, dict):
        return {key: copied(value) for key, value in state.items()}
    return state.clone()


KEPT = {
    "newest": (2, "", [3, 4]),
    "all": (0, "", [1, 2, 3, 4]),
    "newest-and-best": (1, "accuracy", [2, 4]),
    "newest-and-lowest": (1, "kl", [3, 4]),
}


@pytest.mark.parametrize(("keep_last", "keep_best", "expected"), KEPT.values(), ids=KEPT)
def test_which_checkpoints_are_kept(tmp_path, keep_last, keep_best, expected):
    model = torch.nn.Linear(2, 2)
    optimizer = make_optimizer(model, 1e-3, 0.01)
    with process_group() as world:
        checkpoints = Checkpoints(tmp_path, world, keep_last, keep_best)
        for step, value in enumerate([0.5, 0.9, 0.1, None], start=1):
            checkpoints.save({"step": step, "value": value}, model, optimizer, lambda: None)
        checkpoints.wait()
    assert sorted(os.listdir(tmp_path)) == [f"step_00000{step}" for step in expected]


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


def test_a_full_disk_leaves_the_earlier_checkpoints_and_says_so(toy, undisturbed, tmp_path):
    """A limit on the size of files stands for the disk: the logs fit, a checkpoint does not."""
    folder = tmp_path / "run"
    run_killed(toy, folder, 3)
    assert checkpoints_of(folder) == ["step_000002"]
    flags = []
    for key, value in vars(config(toy, folder)).items():
        flags += [f"--{key}", *map(str, value if isinstance(value, list) else [value])]
    flags = [word for word in flags if word]  # no empty values

    def limit():
        resource.setrlimit(resource.RLIMIT_FSIZE, (2**20, 2**20))

    done = subprocess.run(
        [sys.executable, ROOT / "train_sft.py", *without_empty(flags)], preexec_fn=limit,
        capture_output=True, text=True, timeout=200,
    )  # fmt: skip
    assert done.returncode == 2, done.stderr[-3000:]
    (line,) = [line for line in done.stderr.splitlines() if line.startswith("error")]
    assert "the checkpoint of step 4 could not be written" in line
    assert "GiB left: " in line
    assert "the earlier ones are whole" in line
    assert checkpoints_of(folder) == ["step_000002"]
    run(toy, folder)
    assert kills.outcome(folder) == kills.outcome(undisturbed)


def without_empty(flags):
    """Drop flags that have no value: they are at their defaults."""
    return [
        word for word, after in zip(flags, [*flags[1:], "--end"], strict=True)
        if not (word.startswith("--") and after.startswith("--"))
    ]  # fmt: skip


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


@pytest.mark.parametrize("victim", ["rank", pytest.param("launcher", marks=pytest.mark.slow)])
def test_sigkill_to_a_rank_or_to_the_launcher(killed_base, victim):
    folder = killed_base / f"killed-{victim}"
    process = kills.start("sft", folder)
    kills.wait_until(lambda: len(logged(folder)) >= 4, 100, "four steps are done")
    kills.kill(process, victim, number=1)
    if victim == "rank":
        said = log_of(folder)
        assert "rank 1 no longer answers, it was at step" in said
    assert not (folder / "model").exists()
    kills.finish("sft", folder)
    assert kills.outcome(folder) == kills.outcome(killed_base / "undisturbed")


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


def test_the_second_signal_is_obeyed_at_once():
    code = (
        "import time\n"
        "from distributed import StopRequest\n"
        "with StopRequest() as request:\n"
        "    print('ready', flush=True)\n"
        "    while not request.name:\n"
        "        time.sleep(0.01)\n"
        "    print(request.name, flush=True)\n"
        "    time.sleep(60)\n"
    )
    process = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True,
                               env={**os.environ, "PYTHONPATH": str(ROOT)})  # fmt: skip
    assert process.stdout.readline() == "ready\n"
    process.send_signal(signal.SIGINT)
    process.send_signal(signal.SIGTERM)  # what torchrun passes on at once counts as the same
    assert process.stdout.readline() in ("SIGINT\n", "SIGTERM\n")
    time.sleep(1.2)
    assert process.poll() is None
    process.send_signal(signal.SIGINT)
    assert process.wait(10) == -signal.SIGINT


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


def test_the_copy_of_the_state_keeps_its_memory_and_its_values():
    weight, count = torch.arange(6.0).reshape(2, 3), torch.tensor(1.0)
    state, stager = {"model": {"w": weight}, "optimizer": {"w": {"step": count}}}, Stager()
    first = stager.stage(state)
    place = first["model"]["w"].data_ptr()
    weight.mul_(2), count.add_(1)
    assert torch.equal(first["model"]["w"], torch.arange(6.0).reshape(2, 3))
    assert first["optimizer"]["w"]["step"] == 1
    second = stager.stage(state)
    assert second["model"]["w"].data_ptr() == place
    assert torch.equal(second["model"]["w"], weight) and second["optimizer"]["w"]["step"] == 2


# -------------------------------------------------------------------------------------------- slow


@pytest.mark.slow
def test_a_stopped_rank_ends_the_job_within_the_timeout(killed_base):
    folder = killed_base / "hangs"
    process = kills.start("sft", folder, "--timeout", "30", "--max_steps", "1000")
    kills.wait_until(lambda: len(logged(folder)) >= 20, 100, "steps are done over some seconds")
    rank = kills.children(process.pid)[1]
    os.kill(rank, signal.SIGSTOP)
    begun = time.monotonic()
    assert process.wait(90) != 0
    assert time.monotonic() - begun < 30 + 5  # and some seconds for torchrun itself
    said = log_of(folder)
    assert "no longer answers, it was at step" in said
    assert "nothing for 15 seconds" in said
    assert not kills.is_alive(rank)


@pytest.mark.slow
def test_torchrun_restarts_a_run_whose_rank_is_killed(killed_base):
    folder = killed_base / "restarted"
    toy = killed_base / "runs/toy"
    flags = [
        "--model",
        toy / "base",
        "--data",
        toy / "data/sft.json",
        "--output_dir",
        folder,
        "--num_workers",
        "1",
        "--max_frames",
        "8",
        "--activation_checkpointing",
        "false",
    ]
    process = subprocess.Popen(
        [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2",
         "--max-restarts", "3", ROOT / "train_sft.py", *flags, *kills.FLAGS["sft"]],
        stdout=(killed_base / "restarted.log").open("wb"), stderr=subprocess.STDOUT,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )  # fmt: skip
    kills.wait_until(lambda: len(logged(folder)) >= 4, 100, "four steps are done")
    os.kill(kills.children(process.pid)[1], signal.SIGKILL)
    assert process.wait(200) == 0, log_of(folder)[-3000:]
    assert "resumed from" in log_of(folder)
    assert kills.outcome(folder) == kills.outcome(killed_base / "undisturbed")


@pytest.mark.slow
def test_two_nodes_of_two_processes_with_a_copy_of_the_model_each(killed_base):
    """HSDP: two launchers that find each other as two nodes would, --replicas 2."""
    toy = killed_base / "runs/toy"
    for name, replicas in (("copies", 2), ("shards", 1)):
        folder = killed_base / name
        flags = ["--model", toy / "base", "--data", toy / "data/sft.json", "--output_dir", folder,
                 "--num_workers", "1", "--max_frames", "8", "--activation_checkpointing", "false",
                 "--replicas", replicas, *kills.FLAGS["sft"], "--prompts_per_rank", "2",
                 "--max_steps", "4"]  # fmt: skip
        port = 20000 + random.Random().randrange(20000)
        nodes = [
            subprocess.Popen(
                [sys.executable, "-m", "torch.distributed.run", "--nnodes", "2", "--node_rank",
                 str(node), "--nproc_per_node", "2", "--master_addr", "127.0.0.1", "--master_port",
                 str(port), ROOT / "train_sft.py", *map(str, flags)],
                stdout=(killed_base / f"{name}-{node}.log").open("wb"), stderr=subprocess.STDOUT,
                env={**os.environ, "OMP_NUM_THREADS": "1"},
            )
            for node in range(2)
        ]  # fmt: skip
        for node, process in enumerate(nodes):
            said = killed_base / f"{name}-{node}.log"
            assert process.wait(300) == 0, said.read_text()[-3000:]
    found, expected = (kills.outcome(killed_base / name) for name in ("copies", "shards"))
    for mine, other in zip(found["metrics"], expected["metrics"], strict=True):
        assert mine["loss"] == pytest.approx(other["loss"], abs=1e-5)
        assert mine["grad_norm"] == pytest.approx(other["grad_norm"], rel=1e-5)
    weights, others = (load_file(killed_base / name / "model/model.safetensors")
                       for name in ("copies", "shards"))  # fmt: skip
    for key, weight in weights.items():
        torch.testing.assert_close(weight, others[key], rtol=0, atol=1e-4)


@pytest.mark.slow
def test_kills_at_random_instants(tmp_path):
    done = subprocess.run(
        [sys.executable, ROOT / "tests/kills.py", "--number", "4", "--seed", "1"], timeout=900,
        capture_output=True, text=True, cwd=tmp_path,
    )  # fmt: skip
    assert "4 kills, 4 runs equal, 0 not" in done.stdout, done.stdout + done.stderr[-3000:]
