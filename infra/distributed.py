"""Processes: the group, the device mesh, FSDP2 sharding, whole weights for sampling, the log, and
what happens when a rank is lost or the run is asked to stop.

Gloo and float32 on CPU; NCCL, float32 master weights, bfloat16 compute and float32 reduction on
GPU. One process is a group of one and goes through the same code.
"""

import ctypes
import json
import os
import resource
import signal
import socket
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from datetime import timedelta

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import FSDPModule

from infra.errors import UserError


@dataclass(frozen=True)
class World:
    """This process among the others. The mesh is (copies, shards): see model.shard."""

    rank: int
    size: int
    device: torch.device
    dtype: torch.dtype  # that forward and backward passes compute in
    mesh: DeviceMesh
    watch: "Watch"

    @property
    def is_main(self) -> bool:
        return self.rank == 0


@contextmanager
def process_group(timeout: float = 1800, replicas: int = 1) -> Iterator[World]:
    """Join the group that torchrun describes; without torchrun, a group of one.

    Args:
        timeout: seconds that a rank may keep the others waiting.
        replicas: copies of the sharded model, each over size / replicas ranks (HSDP).
    Raises:
        UserError: the ranks do not divide into so many copies.
    """
    die_with_parent()
    keep_freed_memory()
    rank, size = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
    if size % replicas:
        raise UserError(f"--replicas {replicas} does not divide the number of processes, {size}")
    cuda = torch.cuda.is_available()
    if cuda:
        torch.cuda.set_device(int(os.environ.get("LOCAL_RANK", 0)))
    device = torch.device("cuda", torch.cuda.current_device()) if cuda else torch.device("cpu")
    dtype = torch.bfloat16 if cuda else torch.float32
    store: dist.Store = dist.HashStore()
    if "RANK" in os.environ:
        store, rank, size = next(dist.rendezvous("env://", timeout=timedelta(seconds=timeout)))
        # torchrun keeps its store over a restart, with the addresses of the ranks that are gone.
        attempt = os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")
        store = dist.PrefixStore(f"attempt_{attempt}", store)
    dist.init_process_group(
        "cpu:gloo,cuda:nccl" if cuda else "gloo", store=dist.PrefixStore("group", store),
        rank=rank, world_size=size, timeout=timedelta(seconds=timeout),
    )  # fmt: skip
    names = ("copies", "shards")
    mesh = init_device_mesh(device.type, (replicas, size // replicas), mesh_dim_names=names)
    with Watch(store, rank, size, timeout) as watch:
        yield World(rank, size, device, dtype, mesh, watch)
    # Not after an error: a rank that leaves breaks the others' collectives, and their complaint
    # about that would be the last word (see run).
    dist.destroy_process_group()


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


# --------------------------------------------------------------------------------------- sharding


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


def on_main(world: World, work: Callable[[], object]) -> object:
    """What a function returns on rank 0, on every rank."""
    values = [work() if world.is_main else None]
    dist.broadcast_object_list(values)
    return values[0]


# ------------------------------------------------------------------------- lost ranks and stopping


class Watch:
    """Says where every rank is, and ends this one when another no longer answers.

    A thread of each rank writes a beat into the store every second: where the rank is, and its
    process. It beats while the rank computes or waits, and stops when the process is dead or
    stopped. A rank whose beat stays the same for half of the timeout ends all the others; one that
    beats and never comes to a collective runs into the collective's own timeout.
    """

    BEAT = 1.0  # seconds
    current: "Watch | None" = None  # the one of this process, for the error that ends it

    def __init__(self, store: dist.Store, rank: int, size: int, timeout: float):
        # A connection of its own: on the other one the main thread may wait for long.
        self.store = store.clone() if size > 1 else store
        self.rank, self.size, self.patience = rank, size, timeout / 2
        self.place, self.number = "the start", 0
        self.beats: dict[int, tuple[float, dict]] = {}  # rank: (when it changed, the beat)
        self.stopped = threading.Event()
        self.thread = threading.Thread(target=self._beat, daemon=True, name="watch")

    def at(self, place: str) -> None:
        """Note where this rank is: "step 3, rollout"."""
        self.place = place

    def __enter__(self) -> "Watch":
        if self.size > 1:
            Watch.current = self
            # Every rank is known from here on: one that is lost within its first second is missed.
            self._tell(self.place)
            self.store.wait([f"beat/{rank}" for rank in range(self.size)])
            self._look()
            self.thread.start()
        return self

    def __exit__(self, *error: object) -> None:
        if not error[0]:  # after an error the beat goes on until run has said which rank is lost
            Watch.current = None
            self.stopped.set()
            if self.thread.is_alive():
                self.thread.join()
                self._tell("left")  # the others must not miss this rank

    def _beat(self) -> None:
        while not self.stopped.wait(self.BEAT):
            try:
                self._tell(self.place)
                self._look()
            except (RuntimeError, ValueError):  # the launcher is gone, and takes all ranks with it
                return
            lost = self.lost(self.patience)
            if lost:
                self._end(lost)

    def _tell(self, place: str) -> None:
        self.number += 1
        beat = {"number": self.number, "place": place, "pid": os.getpid(),
                "host": socket.gethostname()}  # fmt: skip
        self.store.set(f"beat/{self.rank}", json.dumps(beat))

    def _look(self) -> None:
        now = time.monotonic()
        for rank in range(self.size):
            key = f"beat/{rank}"
            if self.store.check([key]):
                beat = json.loads(self.store.get(key))
                if self.beats.get(rank, (0, {"number": 0}))[1]["number"] != beat["number"]:
                    self.beats[rank] = (now, beat)

    def lost(self, seconds: float) -> dict[int, dict]:
        """The last beats of the ranks that have not answered for so long, by rank."""
        now = time.monotonic()
        return {
            rank: beat
            for rank, (since, beat) in self.beats.items()
            if now - since > seconds and beat["place"] != "left"
        }

    def describe(self, lost: dict[int, dict]) -> str:
        """The lost ranks and where they were; where every rank is, if none is lost."""
        if lost:
            places = [f"rank {rank} no longer answers, it was at {beat['place']}"
                      for rank, beat in sorted(lost.items())]  # fmt: skip
            return f"{'; '.join(places)} (this rank: {self.place})"
        places = [
            f"rank {rank} at {beat['place']}" for rank, (_, beat) in sorted(self.beats.items())
        ]
        return f"every rank still answers: {', '.join(places)}"

    def _end(self, lost: dict[int, dict]) -> None:
        speaker = min(set(range(self.size)) - set(lost))
        if self.rank == speaker:
            complain(f"{self.describe(lost)}: nothing for {self.patience:g} seconds")
        for beat in lost.values():  # a stopped process would wait for the launcher's patience
            if beat["host"] == socket.gethostname():
                with suppress(ProcessLookupError):
                    os.kill(beat["pid"], signal.SIGKILL)
        os._exit(1)


class StopRequest:
    """SIGTERM and SIGINT as a wish: the step is ended and the run saved. The second one is obeyed
    at once.

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
        if not error[0]:  # else torchrun, ending the others, would cut short what run has to say
            for number, handler in self.before.items():
                signal.signal(number, handler)

    def _receive(self, number: int, frame: object) -> None:
        if self.name and time.monotonic() - self.since > self.SAME:
            signal.signal(number, signal.SIG_DFL)
            os.kill(os.getpid(), number)
        elif not self.name:
            self.name, self.since = signal.Signals(number).name, time.monotonic()


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

    UserError is a message to the user; any other exception is a bug and keeps its traceback.
    """
    try:
        main()
    except UserError as error:
        if int(os.environ.get("RANK", 0)):  # mostly all ranks see the same: rank 0 speaks, and
            time.sleep(3)  # torchrun ends the others
        complain(error)
        sys.exit(2)
    except RuntimeError as error:
        watch = Watch.current
        # A collective that broke, since another rank died, or that timed out.
        if watch is None or not (isinstance(error, dist.DistBackendError) or "gloo" in str(error)):
            raise
        time.sleep(3.5 * Watch.BEAT)  # a rank that has just died is known by its beats
        lost = watch.lost(2.5 * Watch.BEAT)
        if watch.rank == min(set(range(watch.size)) - set(lost)):
            complain(f"{watch.describe(lost)}: {str(error).splitlines()[0]}")
        os._exit(1)  # without waiting for threads: a checkpoint may be on its way with lost ranks


def complain(message: object) -> None:
    """The one line on what went wrong."""
    rank = int(os.environ.get("RANK", 0))
    where = f" on rank {rank}" if rank else ""
    print(f"error{where}: {message}", file=sys.stderr, flush=True)
