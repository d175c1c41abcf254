"""results.py: whatever instant a run is killed at, the next one resumes and ends with the same
file; records of two provenances are never mixed."""

import json
import os
import shutil

import pytest

from evaluation import results
from evaluation.results import Results, file_state, fingerprint
from infra.errors import UserError

PROVENANCE = {"model_fingerprint": "m1", "data_sha256": "d1", "max_frames": 16, "order": "ordered"}
# Later batches have earlier rows.
BATCHES = [[{"row": row} for row in rows] for rows in ([60, 61], [50], [40, 41], [30])]
NAME = "test.ordered"


class Killed(BaseException):
    """Nothing catches it, as nothing catches SIGKILL."""


def open_results(folder, world, overwrite=False, **changes):
    return Results(folder, NAME, PROVENANCE | changes, world, BATCHES, {"model_fingerprint"},
                   overwrite)  # fmt: skip


def run(folder, world, stop_after=None, record=lambda item: {"text": "0\n\u2028"}, **changes):
    """A run to its end, or one that is killed after some of its batches. What it computed."""
    computed = []

    def work(batches):
        for number, batch in batches:
            if len(computed) == stop_after:
                raise Killed
            computed.append(number)
            yield number, [item | record(item) for item in batch]

    found = open_results(folder, world, **changes)
    if not found.finished:
        try:
            found.run(work, lambda records: {"n": len(records)})
        except Killed:
            found.lock.close()
    return computed


def contents(folder):
    return {str(path.relative_to(folder)): path.read_bytes()
            for path in folder.rglob("*") if path.is_file()}  # fmt: skip


@pytest.fixture
def whole(tmp_path_factory, world):
    """The files of a run that nothing interrupted."""
    folder = tmp_path_factory.mktemp("whole")
    run(folder, world)
    return contents(folder)


def test_files_of_an_uninterrupted_run(whole):
    assert set(whole) == {f"{NAME}.jsonl", f"{NAME}.summary.json"}
    rows = [json.loads(line) for line in whole[f"{NAME}.jsonl"].splitlines()]
    assert [row["row"] for row in rows] == [30, 40, 41, 50, 60, 61]
    assert rows[-1]["text"] == "0\n\u2028"
    summary = json.loads(whole[f"{NAME}.summary.json"])
    assert {"torch", "transformers"} <= set(summary.pop("versions"))
    assert summary == {"n": 6, "provenance": PROVENANCE}


def test_killed_between_any_two_bytes(tmp_path, world, whole):
    """The torn line stays in the part while the batch is computed again, and does no harm."""
    killed, folder = tmp_path / "killed", tmp_path / "run"
    assert run(killed, world, stop_after=3) == [0, 1, 2]
    written = (killed / f"{NAME}.partial/rank0.jsonl").read_bytes()
    ends = [place for place, byte in enumerate(written) if byte == ord("\n")][1:]
    near_ends = {end + offset for end in ends for offset in (-1, 0, 1)}
    for size in sorted({*range(0, len(written), 11), *near_ends}):
        shutil.copytree(killed, folder)
        (folder / f"{NAME}.partial/rank0.jsonl").write_bytes(written[:size])
        num_kept = sum(end <= size for end in ends)  # the line break itself may be missing
        assert run(folder, world, stop_after=1) == [num_kept]
        assert run(folder, world) == list(range(num_kept + 1, 4))
        assert contents(folder) == whole
        shutil.rmtree(folder)


@pytest.mark.parametrize("num_steps", range(5))
def test_killed_between_the_steps_of_the_end(tmp_path, world, whole, monkeypatch, num_steps):
    """The steps: records written, renamed, summary written, renamed, partial folder deleted."""
    left = [num_steps]

    def counted(function):
        def step(*arguments, **named):
            if not left[0]:
                raise Killed
            left[0] -= 1
            return function(*arguments, **named)

        return step

    assert run(tmp_path, world, stop_after=3) == [0, 1, 2]
    with monkeypatch.context() as patched:
        patched.setattr(results.Path, "write_text", counted(results.Path.write_text))
        patched.setattr(results.os, "replace", counted(results.os.replace))
        patched.setattr(results.shutil, "rmtree", counted(results.shutil.rmtree))
        assert run(tmp_path, world) == [3]
    assert run(tmp_path, world) == [], "no batch is computed again"
    assert contents(tmp_path) == whole


@pytest.mark.parametrize("stop_after", [None, 2], ids=["finished", "unfinished"])
def test_results_of_other_settings_are_refused(tmp_path, world, stop_after):
    run(tmp_path, world, stop_after=stop_after)
    before = contents(tmp_path)
    for changes, words in [
        ({"max_frames": 32}, "max_frames 16 and not 32"),
        ({"data_sha256": "d2"}, "data_sha256 'd1' and not 'd2'"),
        ({"top_k": 5}, "top_k None and not 5"),
        ({"model_fingerprint": "m2", "max_frames": 32}, "max_frames 16"),
    ]:
        with pytest.raises(UserError, match=f"{NAME}.*{words}.*--overwrite"):
            open_results(tmp_path, world, **changes)
    assert contents(tmp_path) == before


@pytest.mark.parametrize("stop_after", [None, 2], ids=["finished", "unfinished"])
@pytest.mark.parametrize(
    "changes", [{"model_fingerprint": "m2"}, {"max_frames": 32, "overwrite": True}], ids=str
)
def test_what_may_be_replaced_is_replaced_after_a_line(
    tmp_path, world, stop_after, changes, capsys
):
    """Cut off itself, it resumes beside the old results, which stay until it is finished."""
    run(tmp_path, world, stop_after=stop_after)
    old = contents(tmp_path).get(f"{NAME}.summary.json")
    capsys.readouterr()
    assert run(tmp_path, world, stop_after=3, **changes) == [0, 1, 2]
    assert "other settings, replaced" in capsys.readouterr().out
    assert contents(tmp_path).get(f"{NAME}.summary.json") == old
    assert run(tmp_path, world, **changes) == [3]
    name = next(iter(changes))
    summary = json.loads((tmp_path / f"{NAME}.summary.json").read_text())
    assert summary["provenance"] == PROVENANCE | {name: changes[name]}
    assert len((tmp_path / f"{NAME}.jsonl").read_text().splitlines()) == 6


def test_a_place_that_cannot_be_written_is_named_before_any_work(tmp_path, world):
    (tmp_path / "file").touch()
    with pytest.raises(UserError, match=f"{NAME}.jsonl cannot be written: see .*/file$"):
        open_results(tmp_path / "file/folder", world)


@pytest.mark.parametrize("name", [f"{NAME}.summary.json", f"{NAME}.partial/settings.json"])
def test_a_damaged_file_is_named(tmp_path, world, name):
    (tmp_path / f"{NAME}.partial").mkdir()
    for text in ("{}", "{", "[1]", "\xff"):
        (tmp_path / name).write_bytes(text.encode("latin-1"))
        with pytest.raises(UserError, match=name):
            open_results(tmp_path, world)


def test_a_batch_is_computed_again_once_an_unusable_file_is_another_one(tmp_path, world):
    """Fault 13: a video that was missing or broken is tried again when it has come, grown, or been
    repaired at the same size; not because another run asks."""
    video, path = tmp_path / "late.webm", str(tmp_path / "late.mp4")  # the latter in its row

    def again():
        def record(item):
            bad = item["row"] == 40 and not (video.exists() and video.read_bytes() == b"whole")
            return {"path": path, "error": "cannot be used" if bad else None,
                    "file_state": file_state(path) if bad else None}  # fmt: skip

        return run(tmp_path / "run", world, record=record)

    assert again() == [0, 1, 2, 3]
    assert again() == [], "still missing"
    for content in (b"broke", b"broken"):
        video.write_bytes(content)
        assert (again(), again()) == ([2], [])
    video.write_bytes(b"brok!")
    os.utime(video, ns=(1, 1))
    assert again() == [2]
    video.write_bytes(b"whole")
    assert (again(), again()) == ([2], [])


def test_a_file_that_comes_while_its_run_ends_is_left_to_the_next_run(tmp_path, world):
    video = tmp_path / "late.mp4"

    def record(item):
        video.touch()
        return {"path": str(video), "error": "missing", "file_state": None}

    run(tmp_path / "run", world, record=record)
    assert (tmp_path / f"run/{NAME}.jsonl").exists()
    assert run(tmp_path / "run", world) == [0, 1, 2, 3]


@pytest.mark.parametrize("finished", [False, True], ids=["nothing-there", "finished-before"])
def test_two_runs_do_not_write_the_same_results(tmp_path, world, finished):
    changes = {"model_fingerprint": "m2"} if finished else {}
    if finished:
        run(tmp_path, world)

    def work(batches):
        with pytest.raises(UserError, match=f"another run is writing to .*{NAME}.jsonl"):
            run(tmp_path, world, **changes)
        return batches

    open_results(tmp_path, world, **changes).run(work, lambda records: {})
    assert run(tmp_path, world, **changes) == [], "nothing is locked when all is finished"


def test_batches_that_no_rank_wrote_here_are_missed(tmp_path, world):
    with pytest.raises(UserError, match="lacks batches of other ranks"):
        open_results(tmp_path, world).run(lambda batches: batches[:1], lambda records: {})
    assert not (tmp_path / f"{NAME}.jsonl").exists()


def test_a_fingerprint_is_of_every_byte_that_answers_depend_on(base, tmp_path):
    model = tmp_path / "model"
    shutil.copytree(base, model)
    before = fingerprint(base)
    (model / "README.md").write_text("a model")
    assert fingerprint(str(model)) == before
    for name in ("model.safetensors", "config.json", "tokenizer.json"):
        original = (model / name).read_bytes()
        last_weight = bytes([original[-4] ^ 1]) + original[-3:]  # its last bit
        changed = original + b" " if name.endswith("json") else original[:-4] + last_weight
        (model / name).write_bytes(changed)
        assert fingerprint(str(model)) != before
        (model / name).write_bytes(original)
    assert fingerprint(str(model)) == before
    (model / "tokenizer_config.json").rename(model / "special.json")
    assert fingerprint(str(model)) != before
