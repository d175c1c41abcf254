"""Processes: the group, the device mesh, FSDP2 sharding, whole weights for sampling, the log.

Gloo and float32 on CPU; NCCL, float32 master weights, bfloat16 compute and float32 reduction on
GPU. One process is a group of one and goes through the same code.
"""

import ctypes
import os
import resource
import signal
import sys
import time
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import (
    FSDPModule,
    MixedPrecisionPolicy,
    fully_shard,
    register_fsdp_forward_method,
)


@dataclass(frozen=True)
class World:
    """This process among the others."""

    rank: int
    size: int
    device: torch.device
    mesh: DeviceMesh

    @property
    def is_main(self) -> bool:
        return self.rank == 0


@contextmanager
def process_group(timeout_seconds: int = 1800) -> Iterator[World]:
    """Join the group that torchrun describes; without torchrun, a group of one."""
    die_with_parent()
    rank, size = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
    cuda = torch.cuda.is_available()
    if cuda:
        torch.cuda.set_device(int(os.environ.get("LOCAL_RANK", 0)))
    device = torch.device("cuda", torch.cuda.current_device()) if cuda else torch.device("cpu")
    store = None if "RANK" in os.environ else dist.HashStore()
    dist.init_process_group(
        "cpu:gloo,cuda:nccl" if cuda else "gloo",
        store=store, rank=rank, world_size=size, timeout=timedelta(seconds=timeout_seconds),
    )  # fmt: skip
    yield World(rank, size, device, init_device_mesh(device.type, (size,)))
    # Not after an error: a rank that leaves breaks the others' collectives, and rank 0's complaint
    # about that would be the last word (see run).
    dist.destroy_process_group()


def die_with_parent() -> None:
    """Ask Linux to end this rank when torchrun dies: by SIGKILL it could not tell its ranks."""
    if sys.platform == "linux" and "RANK" in os.environ:
        pr_set_pdeathsig = 1
        ctypes.CDLL(None).prctl(pr_set_pdeathsig, signal.SIGKILL)


# --------------------------------------------------------------------------------------- sharding


def shard(
    model: nn.Module,
    world: World,
    forward_methods: tuple[str, ...] = (),
    trainable: bool = True,
    freeze_vision: bool = False,
) -> None:
    """Shard a Qwen2.5-VL in place: a group per decoder layer, per vision block, and the rest.

    Embedding, final norm and lm_head stay in the root's group: tied weights must share a group,
    and a group of lm_head's own would be gathered once per chunk of the vocabulary.

    Args:
        forward_methods: methods of `model` that FSDP gathers the weights around, as for forward.
        trainable: False for a frozen reference. freeze_vision: the vision tower learns nothing,
            and has neither gradients nor a part in the optimizer.
    """
    precision, vision_precision = MixedPrecisionPolicy(), MixedPrecisionPolicy()
    if world.device.type == "cuda":
        kinds = dict(param_dtype=torch.bfloat16, reduce_dtype=torch.float32)
        precision = MixedPrecisionPolicy(**kinds)
        # The vision blocks' rotary cos and sin come in float32 and must stay so.
        vision_precision = MixedPrecisionPolicy(**kinds, cast_forward_inputs=False)
    for block in model.model.visual.blocks:
        fully_shard(block, mesh=world.mesh, mp_policy=vision_precision)
    for layer in model.model.language_model.layers:
        fully_shard(layer, mesh=world.mesh, mp_policy=precision)
    # The root's weights are needed again at once in the backward pass, but a reference has none.
    fully_shard(
        model, mesh=world.mesh, mp_policy=vision_precision, reshard_after_forward=not trainable
    )
    for name in forward_methods:
        register_fsdp_forward_method(model, name)
    model.requires_grad_(trainable)
    if freeze_vision:
        model.model.visual.requires_grad_(False)
    model.train(trainable)


@contextmanager
def unsharded(model: nn.Module) -> Iterator[None]:
    """Gather all weights once and keep them for the block, without gradient.

    Inside there is no collective, so ranks may generate to different lengths.
    """
    parts = [part for part in model.modules() if isinstance(part, FSDPModule)]
    was_training = model.training
    model.eval()
    for part in parts:
        part.unshard()
        part.set_reshard_after_forward(False, recurse=False)
    try:
        with torch.no_grad():  # inference_mode would break the next training pass
            yield
    finally:
        for part in parts:
            part.set_reshard_after_forward(part is not model, recurse=False)
            part.reshard()
        model.train(was_training)


# ------------------------------------------------------------------------------------ collectives


def sum_over_ranks(values: dict[str, float]) -> dict[str, float]:
    """Sums over the ranks, in float64, the same keys on every rank."""
    total = torch.tensor(list(values.values()), dtype=torch.float64)
    dist.all_reduce(total)  # gloo also where there are GPUs: a handful of numbers
    return dict(zip(values, total.tolist(), strict=True))


def max_over_ranks(values: dict[str, float]) -> dict[str, float]:
    """Maxima over the ranks, in float64, the same keys on every rank."""
    total = torch.tensor(list(values.values()), dtype=torch.float64)
    dist.all_reduce(total, op=dist.ReduceOp.MAX)
    return dict(zip(values, total.tolist(), strict=True))


def gather_to_main(value: object, world: World) -> list | None:
    """A list of every rank's value on rank 0, None elsewhere."""
    values = [None] * world.size if world.is_main else None
    dist.gather_object(value, values)
    return values


def main_does(world: World, work: Callable[[], None]) -> None:
    """Rank 0 does a piece of work that the others wait for."""
    if world.is_main:
        work()
    dist.barrier()


# ------------------------------------------------------------------------------- log and errors


def log(*words: object) -> None:
    """Print on rank 0 alone."""
    if int(os.environ.get("RANK", 0)) == 0:
        print(*words, flush=True)


def peak_memory_gib(device: torch.device) -> float:
    """The most memory used so far: allocated on the GPU, or resident in this process on CPU."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 2**30
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20  # Linux counts in KiB


def run(main: Callable[[], None]) -> None:
    """Run a script's main; what the user did wrong ends it with one line and exit code 2.

    A ValueError that a line of this project raised is a message to the user; any other exception,
    one out of a library included, is a bug and keeps its traceback.
    """
    try:
        main()
    except ValueError as error:
        here = Path(__file__).parent
        raised_in = Path(traceback.extract_tb(error.__traceback__)[-1].filename)
        if raised_in.parent != here:
            raise
        rank = int(os.environ.get("RANK", 0))
        if rank:  # mostly all ranks see the same: rank 0 speaks, and torchrun ends the others
            time.sleep(3)
        print(f"error: {error}" if rank == 0 else f"error on rank {rank}: {error}",
              file=sys.stderr, flush=True)  # fmt: skip
        sys.exit(2)
