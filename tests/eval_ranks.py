"""What test_eval.py launches: evaluations in one process group, and an evaluation that is killed.

usage: torchrun .. eval_ranks.py ranks OUT MODEL DATA     each way to evaluate, below OUT
       eval_ranks.py kill OUT MODEL DATA     uninterrupted, below OUT/whole; below OUT/killed killed
                                             on two ranks, again on one, and resumed to its end
"""

import os
import random
import signal
import socket
import sys
import time
from dataclasses import replace
from pathlib import Path

import torch

from eval import EvalConfig, evaluate
from evaluation.judge import judge
from infra.distributed import die_with_parent, process_group


def settings(out, model, data):
    return EvalConfig(
        model=model, data=[data], output_dir=out, max_frames=8, batch_size=3, max_new_tokens=24,
        num_workers=1,
    )  # fmt: skip


def ranks(out, model, data):
    """Whole weights; with two processes also sharded ones, and a judge with both."""
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


def start(num_ranks, *arguments):
    """An evaluation in child processes."""
    with socket.socket() as free:
        free.bind(("localhost", 0))
        port = free.getsockname()[1]
    children = []
    for rank in range(num_ranks):
        children.append(os.fork())
        if children[-1] == 0:
            os.environ |= {"RANK": str(rank), "WORLD_SIZE": str(num_ranks),
                           "MASTER_ADDR": "localhost", "MASTER_PORT": str(port)}  # fmt: skip
            with process_group() as world:
                evaluate(settings(*arguments), world, is_toy=False)
            os._exit(0)
    return children


def num_batches(out):
    parts = Path(out).rglob("rank*.jsonl")
    return sum(part.read_bytes().count(b'"batch"') for part in parts)


def kill(out, model, data):
    rng = random.Random(0)
    arguments = f"{out}/killed", model, data
    for num_ranks in (2, 1):
        children, goal = start(num_ranks, *arguments), num_batches(out) + rng.randrange(1, 4)
        while num_batches(out) < goal:
            time.sleep(0.002)
        time.sleep(rng.random() * 0.3)
        for child in children:
            os.kill(child, signal.SIGKILL)
        ends = {os.waitpid(child, 0)[1] for child in children}
        assert ends == {signal.SIGKILL}, "it had come to its end"
        print(f"killed {num_ranks} ranks after {num_batches(out)} batches", flush=True)
    for folder in ("killed", "whole"):
        (child,) = start(1, f"{out}/{folder}", model, data)
        assert os.waitpid(child, 0)[1] == 0


if __name__ == "__main__":
    die_with_parent()
    torch.set_num_threads(1)  # sums of floats depend on the number of threads
    {"ranks": ranks, "kill": kill}[sys.argv[1]](*sys.argv[2:])
