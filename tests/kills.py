"""Kill training runs at random instants, resume each, and compare with the undisturbed run.

    python tests/kills.py --number 50

Half of the runs are SFT, half RL, each on two processes. The victim is one rank, the launcher or,
while a checkpoint is being written, either. A run counts as equal if its weights, its metrics
without the timings, and its rollouts are those of the undisturbed run, byte for byte.
infra/test_distributed.py and test_commands.py do one each.
"""

import argparse
import contextlib
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

ROOT = Path(__file__).parent.parent
TIMINGS = ("seconds", "tokens_per_second", "peak_memory_gib")
FLAGS = {
    "sft": ["--max_steps", "10", "--save_every", "3", "--prompts_per_rank", "4",
            "--learning_rate", "1e-3"],
    "rl": ["--max_steps", "8", "--save_every", "2", "--prompts_per_step", "4",
           "--learning_rate", "1e-4", "--max_new_tokens", "40", "--group_size", "4",
           "--shuffled_group_size", "2", "--l_min", "5", "--l_max", "40"],
}  # fmt: skip


def start(
    stage: str, folder: Path, *more: str, num_processes: int = 2,
    launcher: tuple[str, ...] = ("--standalone",),
) -> subprocess.Popen:  # fmt: skip
    """Launch a training run in the toy's working folder `folder`.parent."""
    toy = folder.parent / "runs/toy"
    model = toy / "base" if stage == "sft" else folder.parent / "warm/model"
    flags = ["--model", str(model), "--data", str(toy / f"data/{stage}.json"), "--num_workers", "1",
             "--max_frames", "8", "--activation_checkpointing", "false"]  # fmt: skip
    with (folder.parent / f"{folder.name}.log").open("ab") as log_file:
        return subprocess.Popen(
            [sys.executable, "-m", "torch.distributed.run", *launcher, "--nproc_per_node",
             str(num_processes), ROOT / f"train_{stage}.py", *flags, *FLAGS[stage],
             "--output_dir", folder, *more],
            cwd=folder.parent, stdout=log_file, stderr=subprocess.STDOUT,
            env={**os.environ, "OMP_NUM_THREADS": "1"}, start_new_session=True,
        )  # fmt: skip


def children(pid: int) -> list[int]:
    """The processes that a process has started: the ranks of a launcher."""
    found = []
    for status in Path("/proc").glob("[0-9]*/stat"):
        try:
            fields = status.read_text().rpartition(")")[2].split()
        except OSError:  # it has just ended
            continue
        if int(fields[1]) == pid:
            found.append(int(status.parent.name))
    return sorted(found)


def is_alive(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


def wait_until(condition, seconds: float, what: str) -> None:
    end = time.monotonic() + seconds
    while not condition():
        if time.monotonic() > end:
            raise TimeoutError(f"not within {seconds} seconds: {what}")
        time.sleep(0.01)


def kill(process: subprocess.Popen, victim: str, number: int = 0) -> None:
    """SIGKILL to the launcher or to one of its ranks; returns when all of them are gone."""
    ranks = children(process.pid)
    pid = process.pid if victim == "launcher" or not ranks else ranks[number % len(ranks)]
    with contextlib.suppress(ProcessLookupError):  # it has just ended
        os.kill(pid, signal.SIGKILL)
    process.wait(120)
    wait_until(lambda: not any(map(is_alive, ranks)), 60, "ranks of a killed launcher are gone")


def outcome(folder: Path) -> dict:
    """What a finished run left, without timings."""
    lines = (folder / "metrics.jsonl").read_text().splitlines()
    metrics = [
        {key: value for key, value in json.loads(line).items() if not key.startswith(TIMINGS)}
        for line in lines
    ]
    rollouts = folder / "rollouts.jsonl"
    return {
        "metrics": metrics,
        "weights": (folder / "model/model.safetensors").read_bytes(),
        "rollouts": rollouts.read_bytes() if rollouts.exists() else b"",
    }


def prepare(folder: Path) -> None:
    """The toy's data and base model, and a model that has learned the format, for RL."""
    subprocess.run(
        [sys.executable, "-c", "import toy; toy.ensure_toy()"], cwd=folder, check=True,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
    )  # fmt: skip
    warm = start("sft", folder / "warm", "--max_steps", "60", "--prompts_per_step", "32",
                 "--save_every", "0")  # fmt: skip
    assert warm.wait(600) == 0, (folder / "warm.log").read_text()[-3000:]


def finish(stage: str, folder: Path, *more: str) -> None:
    """Run the same command again, to its end."""
    code = start(stage, folder, *more).wait(400)
    log_text = (folder.parent / f"{folder.name}.log").read_text(errors="replace")
    assert code == 0, f"resuming {folder} ended with {code}: {log_text[-3000:]}"


def one_kill(stage: str, folder: Path, generator: random.Random, duration: float) -> str:
    """Start, kill and resume a run; returns what was done to it."""
    process = start(stage, folder)
    victim = generator.choice(["rank", "launcher"])
    if generator.random() < 0.4:
        number = generator.randrange(3)
        moment = f"while checkpoint {number + 1} is written"
        hidden = folder / "checkpoints"

        def is_saving() -> bool:
            seen = len(list(hidden.glob("step_*")))
            return (seen >= number and any(hidden.glob(".step_*"))) or process.poll() is not None

        wait_until(is_saving, 200, moment)
        time.sleep(generator.uniform(0, 0.05))
    else:
        seconds = generator.uniform(0, duration)
        moment = f"after {seconds:.2f} s"
        time.sleep(seconds)
    kill(process, victim, generator.randrange(2))
    steps = folder / "metrics.jsonl"
    done = len(steps.read_text().splitlines()) if steps.exists() else 0
    finish(stage, folder)
    return f"{stage}: {victim} killed {moment}, {done} steps logged"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--number", type=int, default=50)
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    generator = random.Random(options.seed)
    base = Path(tempfile.mkdtemp(prefix="kills-"))
    prepare(base)
    expected, durations = {}, {}
    for stage in FLAGS:
        begun = time.monotonic()
        finish(stage, base / f"{stage}-undisturbed")
        durations[stage] = time.monotonic() - begun
        expected[stage] = outcome(base / f"{stage}-undisturbed")
    unequal = 0
    for number in range(options.number):
        stage = ("sft", "rl")[number % 2]
        folder = base / f"{stage}-{number}"
        what = one_kill(stage, folder, generator, durations[stage])
        found = outcome(folder)
        differ = [key for key, value in expected[stage].items() if found[key] != value]
        unequal += bool(differ)
        print(f"{number + 1:3} {what}: {'differs in ' + ', '.join(differ) if differ else 'equal'}",
              flush=True)  # fmt: skip
        shutil.rmtree(folder)
    print(f"{options.number} kills, {options.number - unequal} runs equal, {unequal} not")
    shutil.rmtree(base)
    sys.exit(bool(unequal))


if __name__ == "__main__":
    main()
