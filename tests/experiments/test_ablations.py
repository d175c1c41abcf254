"""experiments/ablations.py: the scripts that are launched, and what a stop or a fault leaves.

The quick tests launch stand-ins for the scripts, which note that they were called and leave the
files that the study reads. The slow one takes the real scripts.
"""

import json
import os
import re
import signal
import subprocess
import sys
import time
from types import SimpleNamespace

import pytest
from conftest import ROOT

from experiments import ablations
from experiments.ablations import ARMS
from experiments.records import CURVES, NUM_WINDOWS, by_kind, curves, read_lines

# Each takes --key=value. A run of alpha 0.1 fails after its second step, one with seed 7 before the
# first; one with seed 8 is asked to stop at once. A file named `slow` holds the next run until it
# is told to stop, or for as many seconds as it has steps.
HEAD = """
import json, pathlib, signal, sys, time
flags = dict(word[2:].split("=", 1) for word in sys.argv[1:])
name = pathlib.Path(sys.argv[0]).stem
with open("calls.txt", "a") as file:
    file.write(f"{name} {json.dumps(flags)}\\n")
"""
STAND_INS = {
    "train_rl.py": """
folder = pathlib.Path(flags["output_dir"])
if flags["seed"] == "7":
    sys.exit("error: no such data")
if flags["seed"] == "8":
    sys.exit(0)
folder.mkdir(parents=True, exist_ok=True)
if pathlib.Path("slow").exists():
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(0))
    pathlib.Path("slow").unlink()
    pathlib.Path("started").touch()
    time.sleep(float(flags.get("max_steps", 60)))
with (folder / "metrics.jsonl").open("a") as file:
    for step in (1, 2):
        line = dict.fromkeys(KEYS, step / 10) | {"step": step, "temporal": None}
        file.write(json.dumps(line) + "\\n")
if flags.get("alpha") == "0.1":
    (folder / "metrics.jsonl").open("a").write('{"step": 3, "lo')
    sys.exit("error: the loss is not finite")
(folder / "model").mkdir()
""",
    "eval.py": """
folder = pathlib.Path(flags["output_dir"]) / "m"
folder.mkdir(parents=True, exist_ok=True)
for order in flags["order"].split(","):
    score = 0.75 if order == "ordered" else 0.25
    items = [{"data_source": "bed/disagrees", "score": score, "length": 10}]
    file = folder / f"{pathlib.Path(flags['data']).stem}.{order}.jsonl"
    file.write_text("".join(json.dumps(item) + "\\n" for item in items))
""",
}
STAND_INS["train_sft.py"] = """
(pathlib.Path(flags["output_dir"]) / "model").mkdir(parents=True)
"""
STAND_INS["experiments/shortcut.py"] = """
folder = pathlib.Path(flags["folder"]) / "data"
folder.mkdir(parents=True)
rows = [{"data_type": "video"}] * 3 + [{"data_type": "image"}]
(folder / "rl_cue90.json").write_text(json.dumps(rows))
(folder / "test.json").write_text(json.dumps([{"problem_id": k // 4} for k in range(8)]))
"""
REAL = ["--model", "m", "--data", "d.json", "--val_data", "v.json"]


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """A working folder, and stand-ins in place of the scripts."""
    scripts = tmp_path / "scripts"
    (scripts / "experiments").mkdir(parents=True)
    for name, body in STAND_INS.items():
        (scripts / name).write_text(HEAD + f"KEYS = {CURVES}\n" + body)
    (tmp_path / "d.json").write_text(json.dumps([{"data_type": "video"}] * 3 +
                                                [{"data_type": "image"}]))  # fmt: skip
    monkeypatch.setattr(ablations, "ROOT", scripts)
    monkeypatch.chdir(tmp_path)
    yield tmp_path
    for number in (signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, signal.SIG_DFL)


def study(monkeypatch, *words):
    """Run the command in this process; its lock is free again afterwards."""
    monkeypatch.setattr(sys, "argv", ["ablations.py", *REAL, *map(str, words)])
    ablations.main()


def calls(folder):
    """The scripts launched since the last look, and their flags."""
    file = folder / "calls.txt"
    lines = [line.split(" ", 1) for line in file.read_text().splitlines()] if file.exists() else []
    file.write_text("")
    return [(name, json.loads(flags)) for name, flags in lines]


def result(folder, arm, seed):
    return json.loads((folder / f"runs/ablations/results/{arm}.seed_{seed}.json").read_text())


def test_a_finished_run_is_not_repeated(folder, monkeypatch):
    study(monkeypatch, "--only", "grpo", "--seeds", 0, 1)
    assert [name for name, _ in calls(folder)] == ["train_rl", "eval"] * 2
    found = result(folder, "grpo", 1)
    kinds = {order: part["disagrees"]["score"] for order, part in found["accuracy"].items()}
    assert kinds == {"ordered": 0.75, "shuffled": 0.25} and found["error"] is None
    assert found["curves"]["kl"] == [0.1, 0.2] and found["curves"]["temporal"] == [None, None]
    study(monkeypatch, "--only", "grpo", "tgrpo", "--seeds", 0, 1, 2)
    trained = [flags["output_dir"] for name, flags in calls(folder) if name == "train_rl"]
    assert trained == [f"runs/ablations/{run}" for run in
                       ("tgrpo/seed_0", "tgrpo/seed_1", "grpo/seed_2", "tgrpo/seed_2")]  # fmt: skip


def test_a_trained_run_is_only_evaluated(folder, monkeypatch):
    study(monkeypatch, "--only", "grpo", "--seeds", 0)
    calls(folder)
    (folder / "runs/ablations/results/grpo.seed_0.json").unlink()
    study(monkeypatch, "--only", "grpo", "--seeds", 0)
    assert [name for name, _ in calls(folder)] == ["eval"]


def test_scripts_get_the_arms_flags_and_the_users(folder, monkeypatch):
    study(monkeypatch, "--only", "placebo_advantage", "tgrpo_no_images", "grpo_steps3", "--seeds",
          5, "--", "--max_steps", 40, "--max_frames", 8)  # fmt: skip
    found = {flags["output_dir"].split("/")[2]: flags for name, flags in calls(folder)
             if name == "train_rl"}  # fmt: skip
    common = {"model": "m", "data": "d.json", "seed": "5", "max_steps": "40", "max_frames": "8"}
    expected = {
        "placebo_advantage": {"temporal_target": "advantage", "shuffled_group_size": "0"},
        "tgrpo_no_images": {"data_types": "video", "prompts_per_step": "6"},
        "grpo_steps3": {"temporal": "false", "max_steps": "120"},
    }
    for arm, flags in expected.items():
        output = {"output_dir": f"runs/ablations/{arm}/seed_5"}
        assert found[arm] == common | flags | output


def test_evaluation_samples_at_temperature_1(folder, monkeypatch):
    study(monkeypatch, "--only", "grpo", "--seeds", 5, "--", "--max_frames", 8)
    (flags,) = [flags for name, flags in calls(folder) if name == "eval"]
    assert flags == {"model": "runs/ablations/grpo/seed_5/model", "data": "v.json", "seed": "5",
                     "order": "ordered,shuffled", "output_dir": "runs/ablations/grpo/seed_5_eval",
                     "max_frames": "8", "temperature": "1.0", "top_p": "1.0"}  # fmt: skip


def test_the_bed_has_a_cold_start_for_each_seed_and_four_samples_an_item(folder, monkeypatch):
    flags = {"SFT_FLAGS": {"max_steps": 9}, "RL_FLAGS": {"prompts_per_step": 8},
             "EVAL_FLAGS": {"batch_size": 3}}  # fmt: skip
    monkeypatch.setitem(sys.modules, "experiments.shortcut", SimpleNamespace(**flags))
    monkeypatch.setattr(ablations.os, "cpu_count", lambda: 1)
    only = ["grpo_cue25", "tgrpo_no_images", "tgrpo_zero", "cold_start"]
    argv = ["ablations.py", "--only", *only, "--seeds", "103"]  # of the pilot
    monkeypatch.setattr(sys, "argv", argv)
    ablations.main()
    bed, runs = "runs/ablations/bed", "runs/ablations"
    name, found = zip(*calls(folder), strict=True)
    assert name[:2] == ("shortcut", "train_sft") and found[0] == {"folder": bed}
    assert found[1] == {"model": f"{bed}/base", "data": f"{bed}/data/sft.json", "seed": "103",
                        "max_steps": "9", "output_dir": f"{runs}/sft/seed_103"}  # fmt: skip
    starts = {one["output_dir"].split("/")[2]: (one["model"], one["data"], one["prompts_per_step"])
              for script, one in zip(name, found, strict=True) if script == "train_rl"}  # fmt: skip
    sft = f"{runs}/sft/seed_103/model"
    assert starts == {
        "grpo_cue25": (sft, f"{bed}/data/rl_cue25.json", "8"),
        "tgrpo_no_images": (sft, f"{bed}/data/rl_cue90.json", "6"),
        "tgrpo_zero": (f"{bed}/base", f"{bed}/data/rl_cue90.json", "8"),
    }
    evaluated = [(one["model"], one["data"], one["order"], one["batch_size"])
                 for script, one in zip(name, found, strict=True) if script == "eval"]  # fmt: skip
    assert (sft, f"{bed}/data/test.json", "ordered", "3") == evaluated[0]
    assert (sft, f"{bed}/data/test_once.json", "shuffled", "3") == evaluated[1]
    assert len(evaluated) == 8
    rows = json.loads((folder / bed / "data/test_once.json").read_text())
    assert [row["problem_id"] for row in rows] == [0, 1]
    flags = json.loads((folder / runs / "results/cold_start.seed_103.json").read_text())["flags"]
    assert flags == {} and len(list((folder / runs / "results").iterdir())) == 4


def test_a_run_that_fails_is_recorded_and_the_others_go_on(folder, monkeypatch):
    study(monkeypatch, "--only", "tgrpo_alpha01", "tgrpo", "--seeds", 0)
    assert "the loss is not finite" in result(folder, "tgrpo_alpha01", 0)["error"]
    assert result(folder, "tgrpo", 0)["error"] is None
    calls(folder)
    study(monkeypatch, "--only", "tgrpo_alpha01", "tgrpo", "--seeds", 0)
    assert calls(folder) == []


def test_a_run_that_was_asked_to_stop_is_not_recorded(folder, monkeypatch, capsys):
    study(monkeypatch, "--only", "grpo", "--seeds", 8, 0)
    assert "asked to stop before its end" in capsys.readouterr().out
    files = (folder / "runs/ablations/results").iterdir()
    assert [file.name for file in files] == ["grpo.seed_0.json"]


def test_a_script_that_takes_no_step_ends_the_study(folder, monkeypatch):
    with pytest.raises(SystemExit, match="error: no such data"):
        study(monkeypatch, "--only", "grpo", "--seeds", 7)
    assert not (folder / "runs/ablations/results").exists()


def test_results_of_other_flags_are_refused(folder, monkeypatch):
    study(monkeypatch, "--only", "grpo", "--seeds", 0)
    with pytest.raises(SystemExit, match="grpo.seed_0.json is of other flags"):
        study(monkeypatch, "--only", "grpo", "--seeds", 0, "--", "--alpha", 0.9)


DRIVER = """
import pathlib, signal, sys
signal.signal(signal.SIGINT, signal.default_int_handler)  # a background job inherits SIG_IGN
sys.path.insert(0, {root!r})
from experiments import ablations
ablations.ROOT = pathlib.Path({scripts!r})
sys.argv = ["ablations.py", *{words!r}]
ablations.main()
"""


def start(folder, *words):
    """The command on the stand-ins in a process of its own, once its first training has begun."""
    (folder / "slow").touch()
    code = DRIVER.format(root=str(ROOT), scripts=str(folder / "scripts"),
                         words=[*REAL, *map(str, words)])  # fmt: skip
    process = subprocess.Popen([sys.executable, "-c", code], cwd=folder, stderr=subprocess.PIPE,
                               text=True)  # fmt: skip
    wait_for(folder / "started", process)
    return process


def wait_for(file, process, seconds=60):
    give_up = time.monotonic() + seconds
    while not file.exists():
        assert process.poll() is None and time.monotonic() < give_up, f"{file} does not appear"
        time.sleep(0.01)


@pytest.mark.parametrize("signal_number", [signal.SIGTERM, signal.SIGINT])
def test_a_stopped_study_asks_its_scripts_and_resumes(folder, monkeypatch, signal_number):
    process = start(folder, "--only", "grpo", "--seeds", 0, 1)
    process.send_signal(signal_number)
    _, error = process.communicate(timeout=30)
    assert process.returncode == 130 and "the same command resumes" in error
    assert not (folder / "runs/ablations/results").exists()
    assert [name for name, _ in calls(folder)] == ["train_rl"]  # seed 1 has not been started
    study(monkeypatch, "--only", "grpo", "--seeds", 0, 1)
    assert [name for name, _ in calls(folder)] == ["train_rl", "eval"] * 2


def is_locked(folder):
    try:
        ablations.claim(folder).close()
    except SystemExit:
        return True
    return False


def test_nobody_writes_beside_a_script_of_a_killed_study(folder, monkeypatch):
    process = start(folder, "--only", "grpo", "--seeds", 0, "--", "--max_steps", 2)
    process.kill()
    process.communicate()
    with pytest.raises(SystemExit, match="still writes to"):
        study(monkeypatch, "--only", "grpo", "--seeds", 0)
    give_up = time.monotonic() + 60
    while is_locked(folder / "runs/ablations"):
        assert time.monotonic() < give_up
        time.sleep(0.05)
    calls(folder)
    study(monkeypatch, "--only", "grpo", "--seeds", 0, "--", "--max_steps", 2)
    assert [name for name, _ in calls(folder)] == ["eval"]  # the script has trained to its end
    assert result(folder, "grpo", 0)["error"] is None


@pytest.mark.parametrize("words", [["--model", "m"], ["--nproc_per_node", "2"],
                                   [*REAL, "--", "--alpha"], [*REAL, "--", "alpha", "1"],
                                   ["--only", "nothing"]])  # fmt: skip
def test_a_wrong_command_says_so(words, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["ablations.py", *words])
    with pytest.raises(SystemExit) as stop:
        ablations.main()
    assert stop.value.code == 2 and "error: " in capsys.readouterr().err


# ------------------------------------------------------------------------------------- the protocol


def test_the_protocol_has_the_runners_arms():
    found = {}
    for line in (ROOT / "experiments/PROTOCOL.md").read_text().splitlines():
        cells = [cell.strip() for cell in line.split("|")[1:-1]]
        if len(cells) == 3 and cells[2].isdigit():
            words = " ".join(re.findall(r"`([^`]*)`", cells[1])).split()
            flags = dict(zip(words[::2], words[1::2], strict=True))
            found[re.search(r"`(\w+)`", cells[0])[1]] = flags, int(cells[2])
    assert found == {name: ({f"--{key}": str(value) for key, value in arm.flags.items()},
                            arm.num_seeds) for name, arm in ARMS.items()}  # fmt: skip


# -------------------------------------------------------------------------------------- the records


def test_items_are_counted_by_kind():
    sources = ["shortcut/agrees", "shortcut/image/colour", "shortcut/image/place", "MVBench", ""]
    items = [{"data_source": source, "score": place / 4, "length": place}
             for place, source in enumerate(sources)]  # fmt: skip
    items.append({"data_source": "MVBench", "score": None, "length": None})  # unusable
    found = by_kind(items)
    assert found["image"] == {"n": 2, "score": 0.375, "length": 1.5}
    assert {kind: part["n"] for kind, part in found.items()} == {
        "all": 5, "agrees": 1, "image": 2, "MVBench": 1, "unnamed": 1}  # fmt: skip


@pytest.mark.parametrize("num_steps", [1, 7, 20, 150])
def test_a_curve_is_the_means_of_windows(num_steps):
    metrics = [dict.fromkeys(CURVES, float(step)) | {"step": step, "temporal": None}
               for step in range(1, num_steps + 1)]  # fmt: skip
    found = curves(metrics)
    assert len(found["step"]) == min(num_steps, NUM_WINDOWS) and found["step"][-1] == num_steps
    widths = [end - start for start, end in zip([0, *found["step"]], found["step"], strict=False)]
    assert sum(widths) == num_steps and max(widths) - min(widths) <= 1
    total = sum(value * width for value, width in zip(found["kl"], widths, strict=True))
    assert total == pytest.approx(num_steps * (num_steps + 1) / 2)
    assert set(found["temporal"]) == {None}


# ------------------------------------------------------------------------------ the real scripts

FLAGS = {"max_frames": 8, "num_workers": 1, "max_new_tokens": 30,
         "activation_checkpointing": "false"}  # fmt: skip
SFT = {"model": "runs/toy/base", "data": "sft.json", "output_dir": "sft", "learning_rate": 2e-3,
       "max_steps": 40, "prompts_per_step": 4, "prompts_per_rank": 4, "save_every": 0}  # fmt: skip
RL = {"max_steps": 3, "prompts_per_step": 2, "prompts_per_rank": 2, "group_size": 4,
      "shuffled_group_size": 2, "learning_rate": 4e-4, "l_min": 12, "l_max": 24,
      "save_every": 1}  # fmt: skip
TIMINGS = re.compile("seconds|tokens_per_second|peak_memory")


def metrics_of(run):
    return [{key: value for key, value in line.items() if not TIMINGS.match(key)}
            for line in read_lines(run / "metrics.jsonl")]  # fmt: skip


@pytest.mark.slow
def test_two_arms_end_to_end_killed_resumed_and_repeated(toy_folder, tmp_path):
    """On a few of the toy's rows, after a cold start that is just long enough for rewards that
    differ. The runner is killed within its first run; that run gives the same bits undisturbed, by
    the recorded flags."""
    (tmp_path / "runs").mkdir()
    (tmp_path / "runs/toy").symlink_to(toy_folder / "runs/toy")
    for name, number in (("sft", 8), ("rl", 8), ("test", 4)):
        rows = json.loads((tmp_path / f"runs/toy/data/{name}.json").read_text())
        rows = [row for row in rows if row["data_source"] == "toy/direction"][:number]
        rows = [row | {"path": f"./runs/toy/data/{row['path']}"} for row in rows]
        (tmp_path / f"{name}.json").write_text(json.dumps(rows))
    environment = os.environ | {"OMP_NUM_THREADS": "1"}

    def command(script, *words):
        return subprocess.Popen([sys.executable, ROOT / script, *map(str, words)], cwd=tmp_path,
                                env=environment, stderr=subprocess.PIPE, text=True)  # fmt: skip

    def end(process):
        error = process.communicate(timeout=300)[1]
        assert process.returncode == 0, error

    end(command("train_sft.py", *(f"--{key}={value}" for key, value in (FLAGS | SFT).items())))
    extra = [word for key, value in (FLAGS | RL).items() for word in (f"--{key}", value)]
    study = ["--model", "sft/model", "--data", "rl.json", "--val_data", "test.json", "--seeds", 1]
    both = [*study, "--only", "tgrpo", "grpo", "--", *extra]
    runs = tmp_path / "runs/ablations"

    process = command("experiments/ablations.py", *both)
    wait_for(runs / "tgrpo/seed_1/checkpoints/step_000001", process, seconds=120)
    process.send_signal(signal.SIGTERM)
    process.communicate(timeout=120)
    assert process.returncode == 130
    assert not (runs / "tgrpo/seed_1/model").exists() and not (runs / "results").exists()

    end(command("experiments/ablations.py", *both))
    assert "resumed from" in (runs / "tgrpo/seed_1.log").read_text()
    records = {file.stem: json.loads(file.read_text()) for file in (runs / "results").iterdir()}
    assert set(records) == {"tgrpo.seed_1", "grpo.seed_1"}
    for record in records.values():
        assert record["error"] is None and len(record["curves"]["step"]) == 3
        assert {order: part["all"]["n"] for order, part in record["accuracy"].items()} == {
            "ordered": 4, "shuffled": 4}  # fmt: skip
    assert records["tgrpo.seed_1"]["curves"]["temporal_effect"][0] is not None
    assert records["grpo.seed_1"]["curves"]["temporal_effect"] == [None] * 3

    again = records["tgrpo.seed_1"]["flags"] | {"output_dir": "again"}
    end(command("train_rl.py", *(f"--{key}={value}" for key, value in again.items())))
    first, second = (metrics_of(run) for run in (runs / "tgrpo/seed_1", tmp_path / "again"))
    assert first == second and any(line["grad_norm"] > 0 for line in first)
