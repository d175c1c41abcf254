"""What test_run.py launches on two ranks: both stages, stopped by the file `stop` after two of
three steps. On given rollouts, so that the steps can be compared with those of one rank.

usage: stopped.py OUT, in a folder that holds runs/toy/base and runs/toy/data
"""

import sys
import time
from pathlib import Path

from ranks import COMMON, RL, written_rollouts

import toy
import train_rl
import train_sft
from config import RLConfig, SFTConfig
from infra.distributed import die_with_parent, process_group
from infra.run import Run

FLAGS = COMMON | {"max_steps": 3, "prompts_per_step": 4, "save_every": 0}


def config(stage, folder):
    if stage == "sft":
        return SFTConfig(**FLAGS | {"data": str(toy.SFT_DATA), "output_dir": str(folder)})
    return RLConfig(**FLAGS | RL | {"data": str(toy.RL_DATA), "output_dir": str(folder)})


def train(stage, folder, world):
    """One stage; in RL written rollouts take the place of sampled ones."""
    sample_rollouts, train_rl.sample_rollouts = train_rl.sample_rollouts, written_rollouts
    done = (train_sft if stage == "sft" else train_rl).train(config(stage, folder), world)
    train_rl.sample_rollouts = sample_rollouts
    return done


def stop_in_the_second_step(metrics_of_a_step):
    """A rank that is late, and a user who asks the run to stop."""

    def log(run, metrics, num_tokens):
        if metrics["step"] == 2:
            (run.folder / "stop").touch()
            time.sleep(2.5 * run.world.rank * (run.name == "sft"))
        metrics_of_a_step(run, metrics, num_tokens)

    return log


if __name__ == "__main__":
    die_with_parent()
    Run.log = stop_in_the_second_step(Run.log)
    with process_group(timeout=2) as world:  # raised, or the late rank would break the run
        for stage in ("sft", "rl"):
            folder = Path(sys.argv[1]) / stage
            if world.is_main:  # left there before: it is removed at the start
                folder.mkdir(parents=True)
                (folder / "stop").touch()
            assert train(stage, folder, world) is False
