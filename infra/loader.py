"""A rank's samples, step by step: decoded ahead, and replaced where they cannot be used.

Places 0, 1, 2, .. run through the data epoch after epoch, every epoch in an order of its own. W
ranks take the places in turns: the stream of rank r is r, r + W, .. A step takes from each stream
the next samples that can be used, so as long as none is unusable the samples of a step do not
depend on the number of ranks.
"""

import functools
import itertools
from collections import deque
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace

import numpy as np
import torch.distributed as dist

from data import Media, Sample, submit_decode
from infra.errors import MediaError, UnusableSample, UserError
from infra.video import DecoderPool

STEPS_AHEAD = 2  # decoded in advance
ALWAYS_FORGIVEN = 10  # unusable samples, whatever --max_skipped says
NUM_LISTED = 20  # of them in the error that ends a run


@functools.lru_cache(maxsize=2)
def sample_order(num_samples: int, seed: int, epoch: int) -> np.ndarray:
    """The order of one pass over the data: a permutation that depends on seed and epoch alone."""
    return np.random.default_rng([seed, epoch]).permutation(num_samples)


def sample_at(place: int, num_samples: int, seed: int) -> int:
    """The index of the sample at a place of the endless row of epochs."""
    epoch, position = divmod(place, num_samples)
    return int(sample_order(num_samples, seed, epoch)[position])


@dataclass(frozen=True)
class Progress:
    """Which places all ranks together have taken.

    start, taken: every place below start, and these above it.
    counts: of the places that are left, dealt out in turns, how many each rank has taken since.
    skipped: how many of all these samples could not be used.
    """

    start: int = 0
    taken: tuple[int, ...] = ()
    counts: tuple[int, ...] = (0,)
    skipped: int = 0

    @property
    def tried(self) -> int:
        """The number of places taken."""
        return self.start + len(self.taken) + sum(self.counts)

    def _dealt(self) -> Iterator[int]:
        taken = set(self.taken)
        return (place for place in itertools.count(self.start) if place not in taken)

    def stream(self, rank: int) -> Iterator[int]:
        """The places that a rank takes from here on."""
        size = len(self.counts)
        return itertools.islice(self._dealt(), rank + size * self.counts[rank], None, size)

    def dealt_to(self, world_size: int) -> "Progress":
        """The same progress, and what is left dealt out to another number of ranks.

        >>> Progress(counts=(3, 1)).dealt_to(1)  # taken are 0, 2, 4 and 1
        Progress(start=3, taken=(4,), counts=(0,), skipped=0)
        """
        if world_size == len(self.counts):
            return self
        size, most = len(self.counts), max(self.counts)
        done = set(self.taken)
        for turn, place in enumerate(itertools.islice(self._dealt(), size * most)):
            if turn // size < self.counts[turn % size]:
                done.add(place)
        start = next(place for place in itertools.count(self.start) if place not in done)
        taken = tuple(sorted(place for place in done if place > start))
        return Progress(start, taken, (0,) * world_size, self.skipped)


class Loader:
    """One rank's stream of samples, each prepared for the stage that asks for it.

    Args:
        prepare: from Media and the number of the step to what the stage works on. UnusableSample
            makes the loader take the next sample instead, as an unusable file does.
        progress: where the stream begins, with a count for each rank of this run.
        max_skipped: share of the tried samples that may be unusable.
    """

    def __init__(
        self,
        samples: list[Sample],
        pool: DecoderPool,
        prepare: Callable[[Media, int], object],
        *,
        limits: dict[str, int],
        progress: Progress,
        rank: int,
        seed: int = 0,
        max_skipped: float = 0.01,
    ):
        self.samples, self.pool, self.prepare = samples, pool, prepare
        self.limits, self.seed, self.max_skipped = limits, seed, max_skipped
        self.progress, self.rank = progress, rank  # progress: of all ranks, at the last sync
        self.stream = progress.stream(rank)
        self.queue: deque = deque()  # (sample, Future), in the order of the stream
        self.count = 0  # samples taken from the stream since the last sync
        self.skipped: list[dict] = []  # records of the unusable ones among them
        self.known: list[dict] = []  # records of all ranks before that

    def take(self, number: int, step: int) -> list:
        """The next `number` samples of this rank that can be used, prepared.

        Raises:
            UserError: too many samples could not be used.
        """
        ready: list = []
        while len(ready) < number:
            self._decode_ahead((1 + STEPS_AHEAD) * number - len(ready))
            sample, future = self.queue.popleft()
            self.count += 1
            try:
                ready.append(self.prepare(Media(sample, *future.result()), step))
            except (MediaError, UnusableSample) as error:
                self.skipped.append({
                    "step": step + 1, "rank": self.rank, "row": sample.row,
                    "problem_id": sample.problem_id, "path": sample.path, "reason": str(error),
                })  # fmt: skip
                # Now and not at the end of the step, which a rank with bad files alone never sees.
                self.check_skipped()
        return ready

    def _decode_ahead(self, length: int) -> None:
        while len(self.queue) < length:
            index = sample_at(next(self.stream), len(self.samples), self.seed)
            sample = self.samples[index]
            self.queue.append((sample, submit_decode(self.pool, sample, self.limits)))

    def sync(self) -> list[dict]:
        """Tell all ranks what each has taken since the last sync: once a step, on every rank.

        Returns:
            the records of all ranks' unusable samples since then.
        """
        everyone: list = [None] * len(self.progress.counts)
        dist.all_gather_object(everyone, (self.count, self.skipped))
        records = [record for _, skipped in everyone for record in skipped]
        counts = [old + new for old, (new, _) in zip(self.progress.counts, everyone, strict=True)]
        self.progress = replace(
            self.progress, counts=tuple(counts), skipped=self.progress.skipped + len(records)
        )
        self.known += records
        self.count, self.skipped = 0, []
        return records

    def check_skipped(self) -> None:
        """Raise UserError, with the list, if too many samples could not be used."""
        skipped = self.progress.skipped + len(self.skipped)
        # Between two syncs a rank takes the others to have tried as many as itself.
        tried = self.progress.tried + self.count * len(self.progress.counts)
        if skipped <= max(ALWAYS_FORGIVEN, self.max_skipped * tried):
            return
        records = self.known + self.skipped
        lines = [
            f"  row {record['row']} (problem {record['problem_id']}): {record['reason']}"
            for record in records[:NUM_LISTED]
        ]
        if len(records) > NUM_LISTED:
            lines.append(f"  and {len(records) - NUM_LISTED} more")
        raise UserError(
            f"{skipped} of {tried} samples could not be used, which is more than "
            f"{ALWAYS_FORGIVEN} and more than --max_skipped {self.max_skipped:g} of them:\n"
            + "\n".join(lines)
        )
