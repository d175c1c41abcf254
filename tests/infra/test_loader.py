"""loader.py: the order of samples, ranks in turns, replacement of what cannot be used."""

import itertools
from concurrent.futures import Future

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from test_data import LIMITS, make_sample

from infra.errors import MediaError, UnusableSample
from infra.loader import Loader, Progress, sample_at, sample_order


@pytest.mark.parametrize("num_samples", [1, 2, 10, 1000])
def test_sample_order_is_a_permutation_of_seed_and_epoch(num_samples):
    order = sample_order(num_samples, 3, 5)
    assert sorted(order.tolist()) == [*range(num_samples)]
    sample_order.cache_clear()
    assert order.tolist() == sample_order(num_samples, 3, 5).tolist()


def test_sample_order_differs_by_seed_and_epoch():
    orders = {tuple(sample_order(50, seed, epoch)) for seed in range(4) for epoch in range(4)}
    assert len(orders) == 16


def test_each_epoch_holds_every_sample_once():
    seen = [sample_at(place, 19, seed=1) for place in range(3 * 19)]
    assert all(type(index) is int for index in seen)
    for epoch in range(3):
        part = seen[19 * epoch : 19 * (epoch + 1)]
        assert part == sample_order(19, 1, epoch).tolist()
        assert sorted(part) == [*range(19)]


# -------------------------------------------------------------------------------------- progress


def streams(progress):
    return [progress.stream(rank) for rank in range(len(progress.counts))]


def taken_since(progress, counts):
    """The places that ranks take who take so many more each."""
    return [
        list(itertools.islice(stream, count))
        for stream, count in zip(streams(progress), counts, strict=True)
    ]


def test_ranks_take_turns():
    assert taken_since(Progress(counts=(0, 0)), (3, 2)) == [[0, 2, 4], [1, 3]]
    assert taken_since(Progress(counts=(2, 1)), (2, 2)) == [[4, 6], [3, 5]]
    # Places 7 and 9 are taken already: what is left from 6 on is 6, 8, 10, 11, 12, ..
    assert taken_since(Progress(6, (7, 9), (0, 0, 0)), (2, 1, 1)) == [[6, 11], [8], [10]]


@pytest.mark.parametrize(
    ("counts", "expected"),
    [
        # Two ranks: the first took 0, 2, 4, the second took 1.
        pytest.param((3, 1), Progress(3, (4,), (0,)), id="one ahead"),
        pytest.param((2, 2), Progress(4, (), (0,)), id="in step"),
        pytest.param((0, 0), Progress(0, (), (0,)), id="nothing taken"),
        pytest.param((0, 2), Progress(0, (1, 3), (0,)), id="the first took nothing"),
    ],
)
def test_progress_dealt_to_another_number_of_ranks(counts, expected):
    assert Progress(counts=counts).dealt_to(1) == expected


def test_progress_dealt_to_the_same_number_is_the_same():
    progress = Progress(5, (7,), (2, 3), skipped=4)
    assert progress.dealt_to(2) is progress
    assert progress.tried == 5 + 1 + 5
    assert progress.dealt_to(3).tried == progress.tried
    assert progress.dealt_to(3).skipped == 4


@settings(max_examples=100, deadline=None)
@given(rounds=st.lists(st.lists(st.integers(0, 6), min_size=1, max_size=4), max_size=4))
def test_no_place_is_taken_twice_or_lost_whatever_the_numbers_of_ranks(rounds):
    progress, seen = Progress(), []
    for counts in rounds:
        progress = progress.dealt_to(len(counts))
        seen += itertools.chain.from_iterable(taken_since(progress, counts))
        total = [old + new for old, new in zip(progress.counts, counts, strict=True)]
        progress = Progress(progress.start, progress.taken, tuple(total))
        assert progress.tried == len(seen)
    assert len(set(seen)) == len(seen)
    rest = taken_since(progress.dealt_to(1), [40 - len(seen)] if len(seen) < 40 else [0])[0]
    assert not set(rest) & set(seen)
    if len(seen) < 40:  # what is left begins where the first gap is
        assert sorted(seen + rest)[: min(rest)] == [*range(min(rest))]


# ---------------------------------------------------------------------------------------- loader


class FakePool:
    """Decodes a path to itself, but for those in `bad`."""

    def __init__(self, bad=()):
        self.bad, self.asked = set(bad), []

    def submit(self, kind, path, **limits):
        self.asked.append(path)
        future = Future()
        if path in self.bad:
            future.set_exception(MediaError(f"{path}: broken"))
        else:
            future.set_result((path, 0.5))
        return future


def make_loader(num_samples=20, bad=(), prepare=None, **options):
    samples = [make_sample(path=f"{n}.mp4", row=n, problem_id=n) for n in range(num_samples)]
    pool = FakePool(f"{n}.mp4" for n in bad)
    settings = {"limits": LIMITS, "progress": Progress(), "rank": 0} | options
    return Loader(samples, pool, prepare or (lambda media, step: media), **settings)


@pytest.fixture
def one_process(monkeypatch):
    """all_gather_object of a group of one."""

    def gather(everyone, mine):
        everyone[:] = [mine]

    monkeypatch.setattr("torch.distributed.all_gather_object", gather)


def test_samples_come_in_their_order_with_their_own_frames():
    loader = make_loader(seed=3)
    batches = [loader.take(4, step) for step in range(5)]
    rows = [media.sample.row for batch in batches for media in batch]
    assert rows == sample_order(20, 3, 0).tolist()
    assert all(media.frames == f"{media.sample.row}.mp4" for batch in batches for media in batch)


def test_two_steps_are_decoded_ahead():
    loader = make_loader(100)
    for step in range(4):
        loader.take(3, step)
        assert len(loader.pool.asked) == 3 * (step + 1 + 2)


def test_an_unusable_sample_is_replaced_by_the_next_of_the_ranks_stream(one_process):
    order = sample_order(20, 0, 0).tolist()
    progress = Progress(counts=(0, 0))
    bad = {order[3], order[5], order[0]}  # the second and third of rank 1, the first of rank 0
    first, second = (make_loader(20, bad, progress=progress, rank=rank) for rank in range(2))
    for loader, rows in (
        (first, [order[2], order[4], order[6], order[8]]),
        (second, [order[1], order[7], order[9], order[11]]),
    ):
        media = loader.take(2, 0) + loader.take(2, 1)
        assert [one.sample.row for one in media] == rows
        assert [one.frames for one in media] == [f"{row}.mp4" for row in rows]
    assert (first.count, second.count) == (5, 6)
    assert second.skipped == [
        {"step": 1, "rank": 1, "row": row, "problem_id": row, "path": f"{row}.mp4",
         "reason": f"{row}.mp4: broken"}
        for row in (order[3], order[5])
    ]  # fmt: skip


def test_a_sample_that_the_stage_cannot_use_is_replaced_too():
    def prepare(media, step):
        if media.sample.row % 2:
            raise UnusableSample("too long")
        return media.sample.row, step

    loader = make_loader(20, prepare=prepare)
    order = sample_order(20, 0, 0).tolist()
    assert loader.take(5, step=7) == [(row, 7) for row in order if row % 2 == 0][:5]
    assert {record["reason"] for record in loader.skipped} == {"too long"}
    assert {record["step"] for record in loader.skipped} == {8}


def test_another_error_is_not_taken_for_an_unusable_sample():
    def prepare(media, step):
        raise ValueError("a bug")

    with pytest.raises(ValueError, match="a bug"):
        make_loader(prepare=prepare).take(1, 0)


def test_sync_adds_up_and_a_new_loader_goes_on_from_there(one_process):
    bad = (4, 9)
    loader, records = make_loader(20, bad), []
    rows = []
    for step in range(3):
        rows += [media.sample.row for media in loader.take(3, step)]
        records += loader.sync()
    again = make_loader(20, bad, progress=loader.progress)
    rows += [media.sample.row for media in again.take(9, 3)]
    records += again.sync()
    assert sorted(rows) == sorted(set(range(20)) - set(bad))
    assert sorted(record["row"] for record in records) == [4, 9]
    assert again.progress == Progress(counts=(20,), skipped=2)


# (samples, unusable ones, --max_skipped, whether the run goes on over all of them)
LIMIT = {
    "ten": (100, 10, 0.01, True),
    "eleven": (100, 11, 0.01, False),
    "eleven-of-many": (2000, 11, 0.01, True),
    "more-than-one-percent": (1150, 12, 0.01, False),
    "a-fifth-allowed": (105, 20, 0.2, True),
    "none-allowed-but-ten": (30, 10, 0.0, True),
}


@pytest.mark.parametrize(("number", "bad", "max_skipped", "goes_on"), LIMIT.values(), ids=LIMIT)
def test_too_many_unusable_samples_end_the_run(one_process, number, bad, max_skipped, goes_on):
    # The unusable ones come last, so that the share is largest at the end.
    order = sample_order(number, 0, 0).tolist()
    loader = make_loader(number, order[number - bad - 1 : number - 1], max_skipped=max_skipped)

    def run():
        for step in range(number - bad):
            loader.take(1, step)
            loader.sync()
            loader.check_skipped()

    if goes_on:
        run()
        assert loader.progress == Progress(counts=(number,), skipped=bad)
    else:
        with pytest.raises(ValueError, match=rf"^{bad} of \d+ samples could not be used") as error:
            run()
        lines = str(error.value).splitlines()
        assert len(lines) == 1 + bad
        assert all(f"--max_skipped {max_skipped:g}" in line for line in lines[:1])
        assert lines[1].endswith(".mp4: broken")
        assert lines[1].startswith(f"  row {order[number - bad - 1]} (problem ")


def test_nothing_but_unusable_samples_ends_at_once():
    with pytest.raises(ValueError, match=r"^11 of 22 samples could not be used"):
        make_loader(50, range(50), progress=Progress(counts=(0, 0))).take(2, 0)


def test_a_long_list_is_cut(one_process):
    loader = make_loader(500, range(500), max_skipped=0.01)
    loader.progress = Progress(counts=(3000,))
    with pytest.raises(ValueError, match="and 11 more$"):
        loader.take(1, 0)
