"""loader.py: the order of items, ranks in turns, replacement of what cannot be used."""

import itertools
import time
from concurrent.futures import Future

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from infra.errors import MediaError, UnusableSample, UserError
from infra.loader import Loader, Progress, item_order


def test_each_seed_and_epoch_has_an_order_of_its_own():
    orders = {tuple(item_order(50, seed, epoch)) for seed in range(4) for epoch in range(4)}
    assert len(orders) == 16
    assert all(sorted(order) == [*range(50)] for order in orders)


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


def test_progress_dealt_to_another_number_of_ranks():
    # The first of two took 0, 2, 4, the second took 1.
    assert Progress(counts=(3, 1)).dealt_to(1) == Progress(3, (4,), (0,))
    assert Progress(counts=(0, 2)).dealt_to(1) == Progress(0, (1, 3), (0,))
    progress = Progress(5, (7,), (2, 3), skipped=4)
    assert progress.dealt_to(2) is progress
    assert progress.dealt_to(3).tried == progress.tried == 5 + 1 + 5
    assert progress.dealt_to(3).skipped == 4


@settings(max_examples=50, deadline=None)
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


def decoded(value):
    future = Future()
    (future.set_exception if isinstance(value, Exception) else future.set_result)(value)
    return future


def make_loader(num_items=20, bad=(), prepare=None, **options):
    """Items are decoded to twice their index, but for those in `bad`; asked lists what was."""
    asked = []

    def submit(index):
        asked.append(index)
        return decoded(MediaError(f"{index}.mp4: broken") if index in bad else 2 * index)

    loader = Loader(
        num_items, submit, prepare or (lambda index, media, step, epoch: (index, media)),
        lambda index: {"row": index, "problem_id": 100 + index},
        **{"progress": Progress(), "rank": 0} | options,
    )  # fmt: skip
    loader.asked = asked
    return loader


@pytest.fixture
def one_process(monkeypatch):
    """all_gather_object of a group of one."""

    def gather(everyone, mine):
        everyone[:] = [mine]

    monkeypatch.setattr("torch.distributed.all_gather_object", gather)


def test_items_come_epoch_by_epoch_each_in_its_order_and_with_its_own_media():
    loader = make_loader(19, seed=3, prepare=lambda *all_of_them: all_of_them)
    taken = [item for step in range(19) for item in loader.take(3, step)]
    expected = [index for epoch in range(3) for index in item_order(19, 3, epoch).tolist()]
    assert [index for index, _, _, _ in taken] == expected
    assert all(media == 2 * index for index, media, _, _ in taken)
    assert [step for _, _, step, _ in taken] == [place // 3 for place in range(57)]
    assert [epoch for _, _, _, epoch in taken] == [place // 19 for place in range(57)]


def test_two_steps_are_decoded_ahead():
    loader = make_loader(100)
    for step in range(4):
        loader.take(3, step)
        assert len(loader.asked) == 3 * (step + 1 + 2)


@pytest.mark.parametrize("num_ranks", [1, 2, 4])
def test_the_items_of_a_step_do_not_depend_on_the_number_of_ranks(num_ranks):
    progress = Progress(counts=(0,) * num_ranks)
    loaders = [make_loader(10, progress=progress, rank=rank) for rank in range(num_ranks)]
    for step in range(6):  # over two epochs
        taken = [index for loader in loaders for index, _ in loader.take(4 // num_ranks, step)]
        places = range(4 * step, 4 * step + 4)
        assert sorted(taken) == sorted(
            int(item_order(10, 0, place // 10)[place % 10]) for place in places
        )


def test_an_unusable_item_is_replaced_by_the_next_of_the_ranks_stream():
    order = item_order(20, 0, 0).tolist()
    progress = Progress(counts=(0, 0))
    bad = {order[3], order[5], order[0]}  # the second and third of rank 1, the first of rank 0
    first, second = (make_loader(20, bad, progress=progress, rank=rank) for rank in range(2))
    for loader, expected in (
        (first, [order[2], order[4], order[6], order[8]]),
        (second, [order[1], order[7], order[9], order[11]]),
    ):
        assert loader.take(2, 0) + loader.take(2, 1) == [(index, 2 * index) for index in expected]
    assert (first.count, second.count) == (5, 6)
    assert second.skipped == [
        {"step": 1, "rank": 1, "row": index, "problem_id": 100 + index,
         "reason": f"{index}.mp4: broken"}
        for index in (order[3], order[5])
    ]  # fmt: skip


def test_an_item_that_the_stage_cannot_use_is_replaced_too():
    def prepare(index, media, step, epoch):
        if index % 2:
            raise UnusableSample("too long")
        return index

    loader = make_loader(20, prepare=prepare)
    order = item_order(20, 0, 0).tolist()
    assert loader.take(5, step=7) == [index for index in order if index % 2 == 0][:5]
    assert {record["reason"] for record in loader.skipped} == {"too long"}
    assert {record["step"] for record in loader.skipped} == {8}


@pytest.mark.parametrize("error", [ValueError, UserError])
def test_another_error_is_not_taken_for_an_unusable_item(error):
    def prepare(*_):
        raise error("a bug, or the user's")

    with pytest.raises(error, match="a bug"):
        make_loader(prepare=prepare).take(1, 0)


def test_sync_adds_up_and_a_new_loader_continues_from_there(one_process):
    bad = (4, 9)
    loader, records, taken = make_loader(20, bad), [], []
    for step in range(3):
        taken += loader.take(3, step)
        records += loader.sync()
    again = make_loader(20, bad, progress=loader.progress)
    taken += again.take(9, 3)
    records += again.sync()
    assert sorted(index for index, _ in taken) == sorted(set(range(20)) - set(bad))
    assert sorted(record["row"] for record in records) == [4, 9]
    assert again.progress == Progress(counts=(20,), skipped=2)


# (items, unusable ones, --max_skipped, whether all of them may be tried)
LIMIT = {
    "ten": (100, 10, 0.01, True),
    "eleven": (100, 11, 0.01, False),
    "eleven-of-many": (1200, 11, 0.01, True),
    "more-than-one-percent": (1150, 12, 0.01, False),
    "a-fifth-allowed": (105, 20, 0.2, True),
    "none-allowed-but-ten": (30, 10, 0.0, True),
}


@pytest.mark.parametrize(("number", "bad", "max_skipped", "allowed"), LIMIT.values(), ids=LIMIT)
def test_too_many_unusable_items_end_the_run(one_process, number, bad, max_skipped, allowed):
    # The unusable ones come last, so that the share is largest at the end.
    order = item_order(number, 0, 0).tolist()
    loader = make_loader(number, order[number - bad - 1 : number - 1], max_skipped=max_skipped)

    def run():
        for step in range(number - bad):
            loader.take(1, step)
            loader.sync()
            loader.check_skipped()

    if allowed:
        run()
        assert loader.progress == Progress(counts=(number,), skipped=bad)
    else:
        with pytest.raises(UserError, match=rf"^{bad} of \d+ samples could not be used") as error:
            run()
        first, *lines = str(error.value).splitlines()
        assert f"--max_skipped {max_skipped:g}" in first
        index = order[number - bad - 1]
        assert lines[0] == f"  row {index} (problem {100 + index}): {index}.mp4: broken"
        assert len(lines) == bad


@pytest.mark.parametrize("num_ranks", [1, 2])
def test_a_whole_pass_without_a_usable_item_ends_whatever_max_skipped_says(num_ranks):
    """Fault 10: media that are not mounted were tried for ever, without a line."""
    loader = make_loader(40, range(40), progress=Progress(counts=(0,) * num_ranks), max_skipped=1.0)
    with pytest.raises(UserError, match="in two passes over the data:\n  row ") as caught:
        loader.take(1, 0)
    assert len(loader.skipped) == 80 // num_ranks + 1
    assert str(caught.value).startswith(f"{80 // num_ranks + 1} samples in a row could not be used")
    one_is_enough = make_loader(40, range(1, 40), max_skipped=1.0)
    assert one_is_enough.take(3, 0) == [(0, 0)] * 3


def test_a_stop_is_answered_while_an_item_is_awaited(monkeypatch):
    """Fault 10: the first signal waited for an item that could be used."""
    monkeypatch.setattr("infra.loader.POLL", 0.01)
    looks = iter([False, False, True])
    loader = make_loader()
    loader.submit = lambda index: Future()  # a file that takes long to decode
    begun = time.monotonic()
    assert loader.take(1, 0, lambda: next(looks)) is None
    assert time.monotonic() - begun < 5
    bad = make_loader(40, range(40), max_skipped=1.0)
    assert bad.take(1, 0, lambda: len(bad.skipped) == 3) is None


def test_a_long_list_is_cut():
    loader = make_loader(500, range(500), progress=Progress(counts=(3000,)))
    with pytest.raises(UserError, match="and 11 more$"):
        loader.take(1, 0)
