"""results.py: whatever instant a run is killed at, the next one goes on and ends with the same
file; records of two provenances are never mixed."""

import dataclasses
import errno
import json
import shutil

import pytest
import torch.distributed as dist

from evaluation import results
from evaluation.results import Results, differences, fingerprint
from infra.distributed import process_group

PROVENANCE = {"model_fingerprint": "m1", "data_sha256": "d1", "max_frames": 16, "order": "ordered"}
BATCHES = [["a", "b"], ["c"], ["d", "e"], ["f"]]
NAME = "test.ordered"


@pytest.fixture(autouse=True)
def world(monkeypatch):
    for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK"):
        monkeypatch.delenv(name, raising=False)
    with process_group() as world:
        yield world
    if dist.is_initialized():
        dist.destroy_process_group()


def records(number):
    """Two records to a batch: later batches have earlier rows, and a line may hold any text."""
    return [{"row": 10 * (9 - number) + k, "text": f"{text}\n\u2028"}
            for k, text in enumerate(BATCHES[number])]  # fmt: skip


def open_results(folder, world, overwrite=False, **changes):
    return Results(folder, NAME, PROVENANCE | changes, world, overwrite)


def run(folder, world, stop_after=None, **changes):
    """A run to its end, or one that is killed behind some of its batches. What it computed."""
    found = open_results(folder, world, **changes)
    computed = []
    if found.finished:
        return computed
    found.begin()
    for number, _ in found.deal(BATCHES):
        if len(computed) == stop_after:
            found.part.close()
            return computed
        found.append(number, records(number))
        computed.append(number)
    found.finish(lambda items: {"n": len(items)})
    return computed


def contents(folder):
    return {path.name: path.read_bytes() for path in folder.iterdir()}


@pytest.fixture
def whole(tmp_path_factory, world):
    """The files of a run that nothing interrupted."""
    folder = tmp_path_factory.mktemp("whole")
    run(folder, world)
    return contents(folder)


def test_files_of_a_whole_run(whole):
    assert set(whole) == {f"{NAME}.jsonl", f"{NAME}.summary.json"}
    rows = [json.loads(line) for line in whole[f"{NAME}.jsonl"].splitlines()]
    assert [row["row"] for row in rows] == [60, 70, 71, 80, 90, 91]
    assert rows[-1]["text"] == "b\n\u2028"
    summary = json.loads(whole[f"{NAME}.summary.json"])
    assert summary == {"n": 6, "provenance": PROVENANCE}


def test_killed_between_any_two_bytes(tmp_path, world, whole):
    folder = tmp_path / "killed"
    assert run(folder, world, stop_after=3) == [0, 1, 2]
    part = folder / f"{NAME}.rank0.part.jsonl"
    written = part.read_bytes()
    assert len(written.splitlines()) == 4
    for size in range(len(written) + 1):
        part.write_bytes(written[:size])
        num_kept = max(0, written[:size].count(b"\n") - 1)
        assert run(folder, world) == list(range(num_kept, 4))
        assert contents(folder) == whole
        for path in folder.iterdir():
            path.unlink()


def test_a_torn_line_is_dropped_before_more_is_written(tmp_path, world, whole):
    run(tmp_path, world, stop_after=2)
    part = tmp_path / f"{NAME}.rank0.part.jsonl"
    part.write_bytes(part.read_bytes()[:-5])
    assert run(tmp_path, world, stop_after=1) == [1]
    lines = [json.loads(line) for line in part.read_text().split("\n")[:-1]]
    assert lines[0] == PROVENANCE
    assert [line["batch"] for line in lines[1:]] == [0, 1]


def test_another_number_of_ranks_goes_on(tmp_path, world, whole):
    for rank in range(3):  # of three ranks, killed when each had done at most one batch
        of_three = dataclasses.replace(world, rank=rank, size=3)
        found = Results(tmp_path, NAME, PROVENANCE, world)
        found.world = of_three
        # Every rank looks before any writes: rank 0 tells the others what is done.
        found.done = set()
        found.begin()
        number, _ = found.deal(BATCHES)[0]
        if rank != 1:
            found.append(number, records(number))
        found.part.close()
        if rank == 0:
            found.lock.close()
    assert len(list(tmp_path.glob("*.part.jsonl"))) == 3
    assert run(tmp_path, world) == [1, 3]
    assert contents(tmp_path) == whole


@pytest.mark.parametrize("done", range(7))
def test_killed_between_the_steps_of_the_end(tmp_path, world, whole, monkeypatch, done):
    """The steps: records beside, records in place, summary beside, summary in place, part gone,
    lock gone."""

    class Killed(BaseException):
        pass

    left = [done]

    def counted(function):
        def step(*arguments, **named):
            if not left[0]:
                raise Killed
            left[0] -= 1
            return function(*arguments, **named)

        return step

    with monkeypatch.context() as patched:
        patched.setattr(results.Path, "write_text", counted(results.Path.write_text))
        patched.setattr(results.os, "replace", counted(results.os.replace))
        patched.setattr(results.Path, "unlink", counted(results.Path.unlink))
        if done < 6:
            with pytest.raises(Killed):
                run(tmp_path, world)
        else:
            run(tmp_path, world)
    assert run(tmp_path, world) == [], "no batch is computed again"
    assert contents(tmp_path) == whole


def test_finished_results_are_not_computed_again(tmp_path, world, whole, capsys):
    run(tmp_path, world)
    capsys.readouterr()
    assert run(tmp_path, world) == []
    assert "is finished" in capsys.readouterr().out
    assert contents(tmp_path) == whole


@pytest.mark.parametrize("stop_after", [None, 2], ids=["finished", "unfinished"])
@pytest.mark.parametrize(
    "changes, words",
    [
        pytest.param({"max_frames": 32}, "max_frames 16 and not 32", id="flag"),
        pytest.param({"data_sha256": "d2"}, "data_sha256 'd1' and not 'd2'", id="data"),
        pytest.param({"top_k": 5}, "top_k None and not 5", id="new-flag"),
        pytest.param(
            {"model_fingerprint": "m2", "max_frames": 32}, "max_frames 16", id="model-and-flag"
        ),
    ],
)
def test_results_of_other_settings_are_refused(tmp_path, world, stop_after, changes, words):
    run(tmp_path, world, stop_after=stop_after)
    before = contents(tmp_path)
    with pytest.raises(ValueError, match=words) as caught:
        open_results(tmp_path, world, **changes)
    assert NAME in str(caught.value)
    assert "--output_dir" in str(caught.value)
    assert "--overwrite" in str(caught.value)
    assert "\n" not in str(caught.value)
    assert contents(tmp_path) == before


@pytest.mark.parametrize("stop_after", [None, 2], ids=["finished", "unfinished"])
def test_results_of_the_model_before_its_next_training_are_replaced(
    tmp_path, world, stop_after, capsys
):
    run(tmp_path, world, stop_after=stop_after)
    capsys.readouterr()
    assert run(tmp_path, world, model_fingerprint="m2") == [0, 1, 2, 3]
    assert "is replaced: the model has changed since" in capsys.readouterr().out
    summary = json.loads((tmp_path / f"{NAME}.summary.json").read_text())
    assert summary["provenance"]["model_fingerprint"] == "m2"


def test_new_results_that_were_cut_off_go_on_beside_the_old_ones(tmp_path, world):
    run(tmp_path, world)
    old = (tmp_path / f"{NAME}.summary.json").read_bytes()
    assert run(tmp_path, world, stop_after=3, model_fingerprint="m2") == [0, 1, 2]
    assert (tmp_path / f"{NAME}.summary.json").read_bytes() == old
    assert run(tmp_path, world, model_fingerprint="m2") == [3]


@pytest.mark.parametrize("stop_after", [None, 2], ids=["finished", "unfinished"])
def test_overwrite_computes_everything_anew(tmp_path, world, whole, stop_after):
    run(tmp_path, world, stop_after=stop_after, max_frames=32)
    assert run(tmp_path, world, overwrite=True) == [0, 1, 2, 3]
    assert contents(tmp_path) == whole


def test_results_without_a_provenance_are_refused(tmp_path, world):
    run(tmp_path, world)
    (tmp_path / f"{NAME}.summary.json").write_text("{}")
    with pytest.raises(ValueError, match="do not say what made them"):
        open_results(tmp_path, world)


@pytest.mark.parametrize(
    "name, text",
    [
        (f"{NAME}.summary.json", "{"),
        (f"{NAME}.summary.json", "[]"),
        (f"{NAME}.rank0.part.jsonl", '{"max_frames": 16}\nhalf a line\n'),
        (f"{NAME}.rank0.part.jsonl", '{"max_frames": 16}\n[1]\n'),
    ],
)
def test_a_damaged_file_is_named(tmp_path, world, name, text):
    (tmp_path / name).write_text(text)
    with pytest.raises(ValueError, match=name):
        open_results(tmp_path, world)


@pytest.mark.parametrize("finished", [False, True], ids=["nothing-there", "finished-before"])
@pytest.mark.parametrize("overwrite", [False, True])
def test_two_runs_do_not_write_the_same_results(tmp_path, world, whole, finished, overwrite):
    def start():
        open_results(tmp_path, world, overwrite).begin()

    if finished:
        run(tmp_path, world)
    first = open_results(tmp_path, world, overwrite=True)
    first.begin()
    dealt = first.deal(BATCHES)
    first.append(0, records(0))
    with pytest.raises(ValueError, match=f"another run is writing to .*{NAME}.jsonl"):
        start()
    for number, _ in dealt[1:]:
        first.append(number, records(number))
    first.finish(lambda items: {"n": len(items)})
    assert contents(tmp_path) == whole
    assert run(tmp_path, world) == [], "nothing is held when all is finished"


@pytest.mark.parametrize("stop_after", [None, 2], ids=["finished", "unfinished"])
def test_what_another_run_wrote_since_the_first_look_is_no_state_to_go_on_from(
    tmp_path, world, stop_after
):
    late = open_results(tmp_path, world)
    run(tmp_path, world, stop_after)
    before = contents(tmp_path)
    with pytest.raises(ValueError, match=f"written to .*{NAME}.jsonl since: start anew"):
        late.begin()
    late.lock.close()
    assert {**contents(tmp_path), f".{NAME}.lock": b""} == {**before, f".{NAME}.lock": b""}


def test_a_lock_that_was_deleted_before_it_was_held_is_taken_anew(tmp_path, monkeypatch):
    lock, flock = tmp_path / "lock", results.fcntl.flock
    calls = []

    def delete_first(file, kind):
        flock(file, kind)
        calls.append(kind)
        if len(calls) == 1:
            lock.unlink()

    monkeypatch.setattr(results.fcntl, "flock", delete_first)
    held = results.claim(lock, "it")
    assert len(calls) == 2 and lock.exists()
    monkeypatch.undo()
    with pytest.raises(ValueError, match="another run is writing to it"):
        results.claim(lock, "it")
    held.close()
    results.claim(lock, "it").close()


def test_a_place_that_cannot_be_locked_is_named(tmp_path, world, monkeypatch):
    def refuse(*_):
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr(results.fcntl, "flock", refuse)
    with pytest.raises(ValueError, match=f"{NAME}.jsonl cannot be locked: No locks available"):
        open_results(tmp_path, world).begin()


def test_results_of_names_that_begin_alike_are_apart(tmp_path, world):
    run(tmp_path, world, stop_after=2)
    other = Results(tmp_path, "test", PROVENANCE, world)
    assert (other.finished, other.done) == (False, set())
    other.begin()
    other.deal(BATCHES[:1])
    other.append(0, records(0))
    other.finish(lambda items: {})
    assert open_results(tmp_path, world).done == {0, 1}


@pytest.mark.parametrize(
    "done, in_step, expected",
    [
        pytest.param(set(), False, [[0, 3], [1], [2]], id="turns"),
        pytest.param({0, 2}, False, [[1], [3], []], id="what-is-left"),
        pytest.param(set(), True, [[0, 3], [1, None], [2, None]], id="in-step"),
        pytest.param({1}, True, [[0], [2], [3]], id="in-step-even"),
        pytest.param({0, 1, 2, 3}, True, [[], [], []], id="nothing-left"),
    ],
)
def test_batches_are_dealt_out_in_turns(tmp_path, world, done, in_step, expected):
    found = open_results(tmp_path, world)
    found.done = done
    dealt = []
    for rank in range(3):
        found.world = dataclasses.replace(world, rank=rank, size=3)
        dealt.append(found.deal(BATCHES, in_step))
    assert [[number for number, _ in rank] for rank in dealt] == expected
    for number, batch in (pair for rank in dealt for pair in rank):
        assert batch == ([] if number is None else BATCHES[number])


def test_batches_that_no_rank_wrote_here_are_missed(tmp_path, world):
    found = open_results(tmp_path, world)
    found.begin()
    found.deal(BATCHES)
    found.append(0, records(0))
    with pytest.raises(ValueError, match="lacks batches of other ranks"):
        found.finish(lambda items: {})
    assert not (tmp_path / f"{NAME}.jsonl").exists()


def test_differences():
    old, new = {"a": 1, "b": 2, "c": 3}, {"a": 1, "b": 5, "d": 4}
    assert differences(old, new) == {"b": (2, 5), "c": (3, None), "d": (None, 4)}


# ------------------------------------------------------------------------------------ fingerprints


@pytest.fixture
def base(toy_folder, tmp_path):
    shutil.copytree(toy_folder / "runs/toy/base", tmp_path / "model")
    return tmp_path / "model"


@pytest.mark.parametrize(
    "file", ["model.safetensors", "config.json", "tokenizer.json", "generation_config.json"]
)
def test_a_fingerprint_feels_every_byte(base, file):
    before = fingerprint(str(base))
    content = bytearray((base / file).read_bytes())
    if file.endswith(".json"):
        content += b" "
    else:  # the last bit of the last weight
        content[-4] ^= 1
    (base / file).write_bytes(content)
    assert fingerprint(str(base)) != before


def test_a_fingerprint_is_of_the_contents(base, tmp_path):
    before = fingerprint(str(base))
    shutil.copytree(base, tmp_path / "copy")
    (tmp_path / "copy/README.md").write_text("a model")
    assert fingerprint(str(tmp_path / "copy")) == before
    (tmp_path / "copy/tokenizer_config.json").rename(tmp_path / "copy/special.json")
    assert fingerprint(str(tmp_path / "copy")) != before
