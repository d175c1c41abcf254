"""What test_eval.py launches: rows.json evaluated with model/, in the working folder, by ranks that
are children of one process, which has imported everything once.

    one         one rank, then a judge of what it wrote
    killed      two ranks, killed; one rank, killed; two ranks to the end
    sharded     two ranks with shards of the weights, then a judge with shards
"""

import os
import random
import signal
import socket
import time
from pathlib import Path

import torch

from eval import EvalConfig, evaluate
from evaluation.judge import judge
from infra.distributed import die_with_parent, process_group


def work(out, sharded, judges):
    config = EvalConfig(
        model="model", data=["rows.json"], output_dir=out, max_frames=8, batch_size=3,
        max_new_tokens=24, num_workers=1, sharded_generation=sharded,
    )  # fmt: skip
    with process_group() as world:
        evaluate(config, world, is_toy=False)
        if judges:
            judge("model", [f"{out}/model/rows.ordered.jsonl"], world, 8, sharded, overwrite=False)


def start(num_ranks, out, sharded=False, judges=False):
    """Ranks in child processes."""
    with socket.socket() as free:
        free.bind(("localhost", 0))
        port = free.getsockname()[1]
    children = []
    for rank in range(num_ranks):
        children.append(os.fork())
        if children[-1] == 0:
            os.environ |= {"RANK": str(rank), "WORLD_SIZE": str(num_ranks),
                           "MASTER_ADDR": "localhost", "MASTER_PORT": str(port)}  # fmt: skip
            work(out, sharded, judges)
            os._exit(0)
    return children


def finish(children):
    assert [os.waitpid(child, 0)[1] for child in children] == [0] * len(children)


def num_batches(out):
    parts = Path(out).rglob("rank*.jsonl")
    return sum(part.read_bytes().count(b'"batch"') for part in parts)


def main():
    finish(start(1, "one", judges=True))
    rng = random.Random(0)
    for num_ranks in (2, 1):
        children, goal = start(num_ranks, "killed"), num_batches("killed") + rng.randrange(1, 4)
        while num_batches("killed") < goal:
            time.sleep(0.002)
        time.sleep(rng.random() * 0.05)
        for child in children:
            os.kill(child, signal.SIGKILL)
        ends = {os.waitpid(child, 0)[1] for child in children}
        assert ends == {signal.SIGKILL}, "it had come to its end"
        print(f"killed {num_ranks} ranks after {num_batches('killed')} batches", flush=True)
    finish(start(2, "killed"))
    finish(start(2, "sharded", sharded=True, judges=True))


if __name__ == "__main__":
    die_with_parent()
    torch.set_num_threads(1)  # sums of floats depend on the number of threads
    main()
