"""What test_distributed.py launches with torchrun: how much memory loading a model takes a rank.

usage: loading.py MODEL; every rank prints its readings as one line of JSON
"""

import json
import sys
import threading
import time
from functools import partial
from pathlib import Path

import torch.distributed as dist

from infra.distributed import process_group
from model import load_model, shard


def allocated():
    """Bytes of memory that this process holds now, without pages of the files that it maps."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return 1024 * next(int(line.split()[1]) for line in lines if line.startswith("RssAnon"))


def watch(stop, readings):
    while not stop.is_set():
        readings.append(allocated())
        time.sleep(0.002)


with process_group(timeout=120) as world:
    stop, seen = threading.Event(), [allocated()]
    watcher = threading.Thread(target=watch, args=(stop, seen))
    watcher.start()
    model = load_model(sys.argv[1], world.device, shard=partial(shard, world=world))
    stop.set()
    watcher.join()
    own = sum(parameter.to_local().nbytes for parameter in model.parameters())
    whole = sum(parameter.nbytes for parameter in model.parameters())
    readings = {"shard": own, "model": whole, "peak": max(seen) - seen[0]}
    readings["largest"] = max(parameter.nbytes for parameter in model.parameters())
    everyone = [None] * world.size
    dist.all_gather_object(everyone, readings)
    if world.is_main:
        print(json.dumps(everyone))
