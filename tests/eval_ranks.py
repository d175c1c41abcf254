"""What test_eval.py launches: evaluations in one process group, and evaluations that are killed.

usage: torchrun .. eval_ranks.py ranks OUT MODEL DATA     each way to evaluate, below OUT
       eval_ranks.py kill OUT MODEL DATA KILLS            one evaluation whole, below OUT/whole,
                                                          one killed so many times, OUT/killed
"""

import os
import random
import signal
import sys
import time
from dataclasses import replace
from pathlib import Path

import torch

import eval as evaluation
from eval import EvalConfig, evaluate
from evaluation.judge import judge
from infra.distributed import die_with_parent, process_group


def settings(out, model, data):
    return EvalConfig(
        model=model, data=[data], output_dir=out, max_frames=8, batch_size=3, max_new_tokens=24,
        num_workers=1,
    )  # fmt: skip


def ranks(out, model, data):
    """Whole weights; with two processes also sharded ones, in both orders, and a sharded judge."""
    with process_group() as world:
        config = settings(f"{out}/whole", model, data)
        evaluate(config, world, is_toy=False)
        if world.size == 2:
            sharded = replace(config, output_dir=f"{out}/sharded", sharded_generation=True)
            evaluate(sharded, world, is_toy=False)
            (file,) = Path(out, "whole").rglob("*.ordered.jsonl")
            for how in ("whole", "sharded"):
                copy = Path(out, f"{how}-judge.ordered.jsonl")
                if world.is_main:
                    copy.write_bytes(file.read_bytes())
                torch.distributed.barrier()
                judge(model, [str(copy)], world, 3, how == "sharded", overwrite=False)


def lines(out):
    """Lines of all parts: headers, and batches that are done."""
    return sum(part.read_bytes().count(b"\n") for part in Path(out).rglob("*.part.jsonl"))


def start(out, model, data):
    """An evaluation in a child process, which leads a process group of its own."""
    child = os.fork()
    if child == 0:
        os.setsid()
        with process_group() as world:
            evaluate(settings(out, model, data), world, is_toy=False)
        os._exit(0)
    return child


def kill(out, model, data, kills):
    """Kill a child as many times, at a random instant behind its next batches; then let one end."""
    assert os.waitpid(start(f"{out}/whole", model, data), 0)[1] == 0
    out, rng = f"{out}/killed", random.Random(0)
    for number in range(int(kills)):
        child, goal = start(out, model, data), lines(out) + rng.randrange(3) * (number > 0)
        while lines(out) < goal:
            time.sleep(0.002)
        time.sleep(rng.random() * 0.3)
        os.killpg(child, signal.SIGKILL)
        assert os.waitpid(child, 0)[1] == signal.SIGKILL, "it had come to its end"
        print(f"killed with {lines(out)} lines", flush=True)
    assert os.waitpid(start(out, model, data), 0)[1] == 0


if __name__ == "__main__":
    die_with_parent()
    torch.set_num_threads(1)  # sums of floats depend on the number of threads
    {"ranks": ranks, "kill": kill}[sys.argv[1]](*sys.argv[2:])
    assert evaluation  # imported before the fork, which then costs nothing
