"""Seconds and peak memory by phase, what the machine can do, and the benchmarks' flags."""

import ctypes
import functools
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TypeVar
from unittest import mock

import torch

from infra.errors import require
from infra.flags import FlagParser

Config = TypeVar("Config")
GIB = 2**30


def parse_flags(cls: type[Config], description: str, argv: list[str] | None = None) -> Config:
    """The checked config of a command line; a UserError names an unknown flag or a wrong value."""
    parser = FlagParser(cls, allow_abbrev=False, description=description)
    config, rest = parser.parse_args_into_dataclasses(argv, return_remaining_strings=True)
    require(not rest, f"unknown argument {rest[0]!r}; --help lists the flags" if rest else "")
    config.check()
    return config


# ---------------------------------------------------------------------------------- seconds, memory


class Meter:
    """Seconds and peak bytes by phase: `with meter("rollout"): ...`.

    Phases nest. A phase's seconds and peak are its own, without those of the phases inside it;
    together the seconds are the whole time spent in phases. A phase that is entered several times
    has the sum of its seconds and the largest of its peaks.
    """

    def __init__(self, device: torch.device):
        self.device = device
        self.seconds: dict[str, float] = {}
        self.peaks: dict[str, int] = {}  # bytes
        self.open: list[str] = []
        self.start = 0.0

    @contextmanager
    def __call__(self, phase: str) -> Iterator[None]:
        self._lap()
        self.open.append(phase)
        try:
            yield
        finally:
            self._lap()
            self.open.pop()

    def _lap(self) -> None:
        """Bill the time since the last change of phase to the phase that was open."""
        if self.device.type == "cuda":  # its kernels may still be running
            torch.cuda.synchronize(self.device)
        now = time.perf_counter()
        if self.open:
            phase = self.open[-1]
            self.seconds[phase] = self.seconds.get(phase, 0.0) + now - self.start
            self.peaks[phase] = max(self.peaks.get(phase, 0), peak_bytes(self.device))
        reset_peak(self.device)
        self.start = time.perf_counter()


@contextmanager
def metered(
    meter: Meter, owner: object, name: str, phase_of: Callable[..., str | None]
) -> Iterator[None]:
    """For the block, bill every call of owner.name to a phase of its own.

    phase_of: called with the arguments of the call; None: the call stays in the phase around it.
    """
    call = getattr(owner, name)

    @functools.wraps(call)
    def with_phase(*args, **kwargs):
        phase = phase_of(*args, **kwargs)
        if phase is None:
            return call(*args, **kwargs)
        with meter(phase):
            return call(*args, **kwargs)

    with mock.patch.object(owner, name, with_phase):
        yield


def used_bytes(device: torch.device) -> int:
    """Memory in use now: allocated on the GPU, or resident in this process."""
    return torch.cuda.memory_allocated(device) if device.type == "cuda" else _status("VmRSS")


def peak_bytes(device: torch.device) -> int:
    """The most memory used since reset_peak."""
    return torch.cuda.max_memory_allocated(device) if device.type == "cuda" else _status("VmHWM")


def reset_peak(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
    else:
        Path("/proc/self/clear_refs").write_text("5")  # Linux: VmHWM starts again from VmRSS


def release_memory() -> None:
    """Return what was freed to the system, so that no phase is billed for it."""
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
    ctypes.CDLL(None).malloc_trim(0)


def _status(kind: str) -> int:
    """Bytes of one line of /proc/self/status."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return 1024 * next(int(line.split()[1]) for line in lines if line.startswith(kind))


# ----------------------------------------------------------------------------------------- machine


def fastest(run: Callable[[], object], device: torch.device, repeats: int = 3) -> float:
    """Seconds of the fastest of several runs, after one that is not counted."""
    best = float("inf")
    for attempt in range(repeats + 1):
        start = time.perf_counter()
        run()
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        if attempt:
            best = min(best, time.perf_counter() - start)
    return best


def matmul_peak(device: torch.device, dtype: torch.dtype) -> float:
    """FLOP/s of a square matrix product, large enough to reach what the machine can do."""
    size = 8192 if device.type == "cuda" else 2048
    a, b = (torch.randn(size, size, device=device, dtype=dtype) for _ in range(2))
    return 2 * size**3 / fastest(lambda: a @ b, device)


def copy_bandwidth(device: torch.device) -> float:
    """Bytes/s of a large copy, in which each byte counts twice: it is read and it is written."""
    size = 2**30 if device.type == "cuda" else 2**28
    source = torch.ones(size, device=device, dtype=torch.uint8)
    target = torch.zeros_like(source)
    return 2 * size / fastest(lambda: target.copy_(source), device)
