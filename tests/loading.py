"""What test_distributed.py launches with torchrun: how much memory loading a model takes a rank.

usage: loading.py MODEL; every rank prints its readings as one line of JSON
"""

import json
import sys
from functools import partial
from pathlib import Path

import torch.distributed as dist

from infra.distributed import process_group
from model import load_model, shard


def resident(kind):
    """Bytes of memory of this process now (VmRSS) or at most so far (VmHWM)."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return 1024 * next(int(line.split()[1]) for line in lines if line.startswith(kind))


with process_group(timeout=120) as world:
    before = resident("VmRSS")
    Path("/proc/self/clear_refs").write_text("5")  # the peak so far is forgotten
    model = load_model(
        sys.argv[1], world.device, shard=partial(shard, world=world)
    )
    own = sum(parameter.to_local().nbytes for parameter in model.parameters())
    whole = sum(parameter.nbytes for parameter in model.parameters())
    readings = {"shard": own, "model": whole, "peak": resident("VmHWM") - before}
    readings["largest"] = max(parameter.nbytes for parameter in model.parameters())
    everyone = [None] * world.size
    dist.all_gather_object(everyone, readings)
    if world.is_main:
        print(json.dumps(everyone))
