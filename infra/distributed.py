"""Processes: the group and its devices, FSDP2's gathered weights, collectives, signals, exit codes.

Gloo and float32 on CPU; NCCL, float32 master weights, bfloat16 compute and float32 reduction on
GPU. One process is a group of one and takes the same code path.
"""

import ctypes
import os
import re
import resource
import signal
import socket
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import FSDPModule

from infra.errors import UserError, require

SHORTEST_TIMEOUT = 30.0  # seconds
START = timedelta(minutes=10)  # that a rank may need longer than another to import and to join
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}


@dataclass(frozen=True)
class World:
    """This process among the others.

    dtype: of forward and backward passes. mesh: (copies, shards). monitor: the group of
    name_missing_ranks, and its patience.
    """

    rank: int
    size: int
    device: torch.device
    dtype: torch.dtype
    mesh: DeviceMesh
    monitor: dist.ProcessGroup | None = None
    patience: timedelta = timedelta(0)

    @property
    def is_main(self) -> bool:
        return self.rank == 0


@contextmanager
def process_group(
    timeout: float = 1800, replicas: int = 1, precision: str = "", cpu_fallback: bool = False
) -> Iterator[World]:
    """Join the group that torchrun describes; without torchrun, a group of one.

    Args:
        timeout: seconds that a rank may keep the others waiting in a collective, and half of it in
            name_missing_ranks; less than SHORTEST_TIMEOUT is raised to that.
        replicas: copies of the sharded model, each over size / replicas ranks (HSDP).
        precision: "fp32" or "bf16"; "": bf16 on GPU, fp32 on CPU.
        cpu_fallback: run on CPU where this machine has fewer GPUs than ranks.
    Raises:
        UserError: fewer GPUs than ranks, or the ranks do not divide into so many copies.
    """
    die_with_parent()
    keep_freed_memory()
    size = int(os.environ.get("WORLD_SIZE", 1))
    require(size % replicas == 0, f"--replicas {replicas} does not divide the {size} processes")
    device = choose_device(cpu_fallback)
    dtype = DTYPES[precision or ("bf16" if device.type == "cuda" else "fp32")]
    if timeout < SHORTEST_TIMEOUT:
        log(f"--timeout {timeout:g} is raised to {SHORTEST_TIMEOUT:g} seconds: a healthy rank may "
            "be that late")  # fmt: skip
    limit = timedelta(seconds=max(timeout, SHORTEST_TIMEOUT))
    store, rank = meet()
    dist.init_process_group(
        "cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo",
        store=dist.PrefixStore("group", store), rank=rank, world_size=size, timeout=limit,
    )  # fmt: skip
    names = ("copies", "shards")
    mesh = init_device_mesh(device.type, (replicas, size // replicas), mesh_dim_names=names)
    monitor = dist.new_group(backend="gloo", timeout=limit)
    yield World(rank, size, device, dtype, mesh, monitor, limit / 2)
    # Not after an error: a rank that leaves breaks the others' collectives, and their complaint
    # about that would be the last word (see run_main).
    dist.destroy_process_group()


def choose_device(cpu_fallback: bool = False) -> torch.device:
    """This rank's GPU, or the CPU of a machine without one."""
    num_gpus, num_ranks = torch.cuda.device_count(), int(os.environ.get("LOCAL_WORLD_SIZE", 1))
    if not num_gpus:
        return torch.device("cpu")
    if num_gpus < num_ranks:
        found = f"{num_ranks} processes and {num_gpus} GPU{'s' if num_gpus > 1 else ''} here"
        require(cpu_fallback, f"{found}: start {num_gpus} at most (--nproc_per_node {num_gpus})")
        log(f"{found}: running on CPU")
        return torch.device("cpu")
    # Shapes change with every step, and segments of a fixed size fragment. torch reads this at its
    # first allocation, and the older PYTORCH_CUDA_ALLOC_CONF before it: a user's setting wins.
    os.environ.setdefault("PYTORCH_ALLOC_CONF", "expandable_segments:True")
    # On H100 it is the default from torch 2.11 on. With a mask it can give NaN gradients (pytorch
    # issue 196678), and it compiles a plan for each new length: seconds in every rollout.
    torch.backends.cuda.enable_cudnn_sdp(False)
    torch.backends.cudnn.allow_tf32 = False  # which convolutions in float32 would use by default
    device = torch.device("cuda", int(os.environ.get("LOCAL_RANK", 0)))
    torch.cuda.set_device(device)
    return device


def meet() -> tuple[dist.Store, int]:
    """The store that the ranks share, once all of them are there, and this process's rank."""
    if "RANK" not in os.environ:
        return dist.HashStore(), 0
    store, rank, size = next(dist.rendezvous("env://", timeout=START))
    # torchrun keeps its store over a restart, with the addresses of the ranks that are gone.
    attempt = os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")
    store = dist.PrefixStore(f"attempt_{attempt}", store)
    store.set(f"rank_{rank}", "here")
    store.wait([f"rank_{other}" for other in range(size)], START)
    return store, rank


def die_with_parent() -> None:
    """Ask Linux to end this rank when torchrun dies: by SIGKILL it could not tell its ranks."""
    if sys.platform == "linux" and "RANK" in os.environ:
        pr_set_pdeathsig = 1
        ctypes.CDLL(None).prctl(pr_set_pdeathsig, signal.SIGKILL)
    if os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True":
        # It may have died while this rank imported torch; then nobody listens any more, and the
        # rendezvous would try again and again until its timeout.
        address = os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])
        try:
            socket.create_connection(address, timeout=60).close()
        except OSError as error:
            sys.exit(f"error: torchrun no longer listens on {address[0]}:{address[1]}: {error}")


def keep_freed_memory() -> None:
    """Let glibc keep what is freed for the next allocation, as PyTorch does on a GPU.

    It would give every large block back to the system and take a page fault for each of its 4 KiB
    when the next step asks for the same again: a tenth of a step on CPU.
    """
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None) if sys.platform == "linux" else None
    if mallopt is not None:  # other C libraries have none
        m_trim_threshold, m_mmap_threshold, m_arena_max = -1, -3, -8
        mallopt(m_mmap_threshold, 2**25)  # the largest that it takes; blocks above it come and go
        mallopt(m_trim_threshold, 2**30)
        mallopt(m_arena_max, 1)  # what the backward pass frees in its thread serves the main one


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
    return _reduce(values, dist.ReduceOp.SUM)


def max_over_ranks(values: dict[str, float]) -> dict[str, float]:
    """Maxima over the ranks, in float64, the same keys on every rank."""
    return _reduce(values, dist.ReduceOp.MAX)


def _reduce(values: dict[str, float], operation: dist.ReduceOp) -> dict[str, float]:
    total = torch.tensor(list(values.values()), dtype=torch.float64)
    dist.all_reduce(total, op=operation)  # gloo also where there are GPUs: a handful of numbers
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


def on_main(world: World, work: Callable[[], object]) -> object:
    """What a function returns on rank 0, on every rank."""
    values = [work() if world.is_main else None]
    dist.broadcast_object_list(values)
    return values[0]


def name_missing_ranks(world: World) -> None:
    """Wait for every rank, before collectives whose own timeout names nobody.

    Rank 0 waits half of process_group's timeout and then ends the job with a line that names the
    ranks that did not come (see run_main).
    """
    if world.size > 1:
        dist.monitored_barrier(world.monitor, world.patience, wait_all_ranks=True)


# -------------------------------------------------------------------------- signals, log and exit


class StopRequest:
    """SIGTERM and SIGINT: a first one is noted, for the caller to finish the step and save; a
    second one ends the process at once.

    with StopRequest() as request:
        ... if request.name: ...
    """

    SAME = 1.0  # seconds: torchrun passes on the Ctrl-C that the terminal has sent here as well

    def __init__(self) -> None:
        self.name = ""  # of the signal
        self.since = 0.0
        self.before: dict = {}

    def __enter__(self) -> "StopRequest":
        for number in (signal.SIGTERM, signal.SIGINT):
            self.before[number] = signal.signal(number, self._receive)
        return self

    def __exit__(self, *error: object) -> None:
        # After an error torchrun, ending the others, would cut short what run_main has to say.
        if not error[0]:
            for number, handler in self.before.items():
                signal.signal(number, handler)

    def _receive(self, number: int, frame: object) -> None:
        if self.name and time.monotonic() - self.since > self.SAME:
            signal.signal(number, signal.SIG_DFL)
            os.kill(os.getpid(), number)
        elif not self.name:
            self.name, self.since = signal.Signals(number).name, time.monotonic()


def log(*words: object) -> None:
    """Print on rank 0 alone."""
    if int(os.environ.get("RANK", 0)) == 0:
        print(*words, flush=True)


def synchronize(device: torch.device) -> None:
    """Wait until a GPU has done what was queued, so that timings are those of the work."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def peak_memory_gib(device: torch.device) -> float:
    """The most memory used so far: allocated on the GPU, or resident in this process on CPU."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 2**30
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20  # Linux counts in KiB


def run_main(main: Callable[[], None]) -> None:
    """Run a script's main, and end it with one line where no traceback would help.

    UserError: exit code 2. Ctrl-C: 130. A collective that broke, since another rank died, or timed
    out: 1. Any other exception is a bug and keeps its traceback.
    """
    try:
        main()
    except UserError as error:
        complain(error)
        sys.exit(2)
    except KeyboardInterrupt:
        signal.signal(signal.SIGINT, signal.SIG_IGN)  # torchrun sends it once more
        if int(os.environ.get("RANK", 0)) == 0:
            print("interrupted", file=sys.stderr, flush=True)
        sys.exit(130)
    except RuntimeError as error:
        reason = str(error).partition("\n")[0]
        is_collective = isinstance(error, dist.DistError) or re.search("gloo|monitoredB", reason)
        if "RANK" not in os.environ or not is_collective:
            raise
        complain(f"a rank has died (torchrun's report below names it) or hangs: {reason}")
        os._exit(1)  # without waiting for threads: a checkpoint may be on its way with lost ranks


def complain(message: object) -> None:
    """The one line on what went wrong. Mostly all ranks see the same: rank 0 speaks, and torchrun
    ends the others."""
    rank = int(os.environ.get("RANK", 0))
    if rank:
        signal.signal(signal.SIGTERM, signal.SIG_DFL)  # it may be a StopRequest's
        time.sleep(3)
    where = f" on rank {rank}" if rank else ""
    print(f"error{where}: {message}", file=sys.stderr, flush=True)
