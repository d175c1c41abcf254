"""A rank's stream of items, step by step: decoded ahead, and replaced where they cannot be used.

Places 0, 1, 2, .. run through the data epoch after epoch, each epoch in an order of its own. W
ranks take the places in turns: the stream of rank r is r, r + W, .. A step takes from each stream
the next items that can be used, so as long as none is unusable the items of a step do not depend on
the number of ranks.
"""

import functools
import itertools
from collections import deque
from collections.abc import Callable, Iterator
from concurrent.futures import Future, TimeoutError
from dataclasses import dataclass, replace

import numpy as np
import torch.distributed as dist

from infra.errors import MediaError, UnusableSample, UserError

STEPS_AHEAD = 2  # decoded in advance
ALWAYS_FORGIVEN = 10  # unusable items, whatever max_skipped says
NUM_LISTED = 20  # of them in the error that ends a run
POLL = 0.5  # seconds between two looks at whether the run shall stop


@functools.lru_cache(maxsize=2)
def item_order(num_items: int, seed: int, epoch: int) -> np.ndarray:
    """The order of one pass over the data: a permutation that depends on seed and epoch alone."""
    return np.random.default_rng([seed, epoch]).permutation(num_items)


@dataclass(frozen=True)
class Progress:
    """Which places all ranks together have taken.

    start, taken: every place below start, and these above it.
    counts: of the places that are left, dealt out in turns, how many each rank has taken since.
    skipped: how many of all these items could not be used.
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

    def dealt_to(self, num_ranks: int) -> "Progress":
        """The same progress, and what is left dealt out to another number of ranks.

        >>> Progress(counts=(3, 1)).dealt_to(1)  # taken are 0, 2, 4 and 1
        Progress(start=3, taken=(4,), counts=(0,), skipped=0)
        """
        if num_ranks == len(self.counts):
            return self
        size, most = len(self.counts), max(self.counts)
        done = set(self.taken)
        for turn, place in enumerate(itertools.islice(self._dealt(), size * most)):
            if turn // size < self.counts[turn % size]:
                done.add(place)
        start = next(place for place in itertools.count(self.start) if place not in done)
        taken = tuple(sorted(place for place in done if place > start))
        return Progress(start, taken, (0,) * num_ranks, self.skipped)


class Loader:
    """One rank's stream of items, each prepared for training.

    Args:
        num_items: of the data set.
        submit: from an item's index to a Future of its decoded media.
        prepare: from index, decoded media, step and epoch (the last two count from 0) to what a
            step works on. MediaError and UnusableSample, here as in the Future, make the loader
            take the next item instead.
        describe: from an item's index to what identifies it in a record of skipped items.
        progress: where the stream begins, with a count for each rank of this run.
        max_skipped: share of the tried items that may be unusable.
    """

    def __init__(
        self,
        num_items: int,
        submit: Callable[[int], Future],
        prepare: Callable[[int, object, int, int], object],
        describe: Callable[[int], dict],
        *,
        progress: Progress,
        rank: int,
        seed: int = 0,
        max_skipped: float = 0.01,
    ):
        self.num_items, self.submit, self.prepare = num_items, submit, prepare
        self.describe, self.seed, self.max_skipped = describe, seed, max_skipped
        self.progress, self.rank = progress, rank  # progress: of all ranks, at the last sync
        self.stream = progress.stream(rank)
        self.queue: deque[tuple[int, int, Future]] = deque()  # (epoch, index, Future)
        self.count = 0  # items taken from the stream since the last sync
        self.skipped: list[dict] = []  # records of the unusable ones among them
        self.skipped_before: list[dict] = []  # of all ranks
        self.num_skipped_in_a_row = 0

    def take(
        self, number: int, step: int, should_stop: Callable[[], bool] = lambda: False
    ) -> list | None:
        """The next `number` items of this rank that can be used, prepared.

        Returns:
            None if should_stop turned true while it waited for an item that can be used.
        Raises:
            UserError: too many items could not be used.
        """
        ready: list = []
        while len(ready) < number:
            self._decode_ahead((1 + STEPS_AHEAD) * number - len(ready))
            epoch, index, future = self.queue[0]
            if not _wait(future, should_stop):
                return None
            self.queue.popleft()
            self.count += 1
            try:
                ready.append(self.prepare(index, future.result(), step, epoch))
                self.num_skipped_in_a_row = 0
            except (MediaError, UnusableSample) as error:
                self._skip(index, step, error)
                if should_stop():  # else a signal would wait for an item that can be used
                    return None
        return ready

    def _skip(self, index: int, step: int, error: UserError) -> None:
        record = {"step": step + 1, "rank": self.rank, **self.describe(index)}
        self.skipped.append(record | {"reason": str(error)})
        self.num_skipped_in_a_row += 1
        # Now and not at the end of the step, which a rank without a usable item never reaches.
        self.check_skipped()
        # Two passes: each epoch has its own order, so a usable item may come first in one epoch and
        # last in the next.
        share = 2 * self.num_items / len(self.progress.counts)
        if self.num_skipped_in_a_row > max(share, ALWAYS_FORGIVEN):
            what = f"{self.num_skipped_in_a_row} samples in a row could not be used, more than a "
            raise UserError(self._list(what + "rank takes in two passes over the data"))

    def _decode_ahead(self, length: int) -> None:
        while len(self.queue) < length:
            epoch, position = divmod(next(self.stream), self.num_items)
            index = int(item_order(self.num_items, self.seed, epoch)[position])
            self.queue.append((epoch, index, self.submit(index)))

    def sync(self) -> list[dict]:
        """Tell all ranks what each has taken since the last sync: once a step, on every rank.

        Returns:
            the records of all ranks' unusable items since then.
        """
        everyone: list = [None] * len(self.progress.counts)
        dist.all_gather_object(everyone, (self.count, self.skipped))
        records = [record for _, skipped in everyone for record in skipped]
        counts = [old + new for old, (new, _) in zip(self.progress.counts, everyone, strict=True)]
        self.progress = replace(
            self.progress, counts=tuple(counts), skipped=self.progress.skipped + len(records)
        )
        self.skipped_before += records
        self.count, self.skipped = 0, []
        return records

    def check_skipped(self) -> None:
        """Raise UserError, with the list, if too many items could not be used."""
        skipped = self.progress.skipped + len(self.skipped)
        # Between two syncs a rank takes the others to have tried as many as itself.
        tried = self.progress.tried + self.count * len(self.progress.counts)
        if skipped > max(ALWAYS_FORGIVEN, self.max_skipped * tried):
            what = f"{skipped} of {tried} samples could not be used, which is more than "
            what += f"{ALWAYS_FORGIVEN} and more than --max_skipped {self.max_skipped:g} of them"
            raise UserError(self._list(what))

    def _list(self, what: str) -> str:
        """A message with the first of the skipped items."""
        records = self.skipped_before + self.skipped
        lines = [f"  row {r['row']} (problem {r['problem_id']}): {r['reason']}"
                 for r in records[:NUM_LISTED]]  # fmt: skip
        if len(records) > NUM_LISTED:
            lines.append(f"  and {len(records) - NUM_LISTED} more")
        return f"{what}:\n" + "\n".join(lines)


def _wait(future: Future, should_stop: Callable[[], bool]) -> bool:
    """Wait for a future's result or error; False if should_stop turned true before."""
    while True:
        try:
            future.exception(timeout=POLL)
            return True
        except TimeoutError:
            if should_stop():
                return False
