"""results.py: whatever instant a run is killed at, the next one resumes and ends with the same
file; records of two provenances are never mixed."""

import errno
import json
import shutil

import pytest
import torch.distributed as dist

from evaluation import results
from evaluation.results import Results, deal, fingerprint
from infra.distributed import process_group
from infra.errors import UserError

PROVENANCE = {"model_fingerprint": "m1", "data_sha256": "d1", "max_frames": 16, "order": "ordered"}
# Later batches have earlier rows.
BATCHES = [[{"row": row} for row in rows] for rows in ([60, 61], [50], [40, 41], [30])]
NAME = "test.ordered"


@pytest.fixture(autouse=True)
def world(monkeypatch):
    for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK"):
        monkeypatch.delenv(name, raising=False)
    with process_group() as world:
        yield world
    if dist.is_initialized():
        dist.destroy_process_group()


class Killed(BaseException):
    """Nothing catches it, as nothing catches SIGKILL."""


def open_results(folder, world, overwrite=False, retry=lambda rows: False, **changes):
    return Results(folder, NAME, PROVENANCE | changes, world, BATCHES, {"model_fingerprint"},
                   overwrite, retry)  # fmt: skip


def run(folder, world, stop_after=None, missing=(), **changes):
    """A run to its end, or one that is killed after some of its batches. What it computed.

    missing: rows whose media are not there.
    """
    computed = []

    def work(batches):
        for number, batch in batches:
            if len(computed) == stop_after:
                raise Killed
            computed.append(number)
            num_lost = sum(item["row"] in missing for item in batch)
            yield number, [
                item | {"is_media_error": item["row"] in missing, "text": f"{num_lost}\n\u2028"}
                for item in batch
            ]

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
    assert json.loads(whole[f"{NAME}.summary.json"]) == {"n": 6, "provenance": PROVENANCE}


def test_killed_between_any_two_bytes(tmp_path, world, whole):
    """The torn line stays in the part while the batch is computed again, and does no harm."""
    folder = tmp_path / "killed"
    assert run(folder, world, stop_after=3) == [0, 1, 2]
    killed = tmp_path / "copy"
    shutil.copytree(folder, killed)
    written = (folder / f"{NAME}.partial/rank0.jsonl").read_bytes()
    ends = [place for place, byte in enumerate(written) if byte == ord("\n")][1:]
    for size in range(0, len(written) + 1, 3):
        shutil.rmtree(folder)
        shutil.copytree(killed, folder)
        (folder / f"{NAME}.partial/rank0.jsonl").write_bytes(written[:size])
        num_kept = sum(end <= size for end in ends)  # the line break itself may be missing
        assert run(folder, world, stop_after=1) == [num_kept]
        assert run(folder, world) == list(range(num_kept + 1, 4))
        assert contents(folder) == whole


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


def test_another_number_of_ranks_resumes(tmp_path, world, whole):
    run(tmp_path, world, stop_after=0)
    folder = tmp_path / f"{NAME}.partial"
    for rank in range(3):  # of three ranks, each killed when it had done at most one batch
        lines = [{"batch": rank, "records": [item | {"is_media_error": False, "text": "0\n\u2028"}
                                             for item in BATCHES[rank]]}]  # fmt: skip
        text = "".join(json.dumps(line) + "\n" for line in lines if rank != 1)
        (folder / f"rank{rank}.jsonl").write_text("\n" + text)
    assert run(tmp_path, world) == [1, 3]
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
    with pytest.raises(UserError, match=words) as caught:
        open_results(tmp_path, world, **changes)
    assert NAME in str(caught.value)
    assert "--overwrite" in str(caught.value)
    assert "\n" not in str(caught.value)
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
    assert ": replaced" in capsys.readouterr().out
    assert contents(tmp_path).get(f"{NAME}.summary.json") == old
    assert run(tmp_path, world, **changes) == [3]
    name = next(iter(changes))
    summary = json.loads((tmp_path / f"{NAME}.summary.json").read_text())
    assert summary["provenance"] == PROVENANCE | {name: changes[name]}
    assert len((tmp_path / f"{NAME}.jsonl").read_text().splitlines()) == 6


@pytest.mark.parametrize("name", [f"{NAME}.summary.json", f"{NAME}.partial/settings.json"])
@pytest.mark.parametrize("text", ["{}", "{", "[]", '{"provenance": {}}', "\xff"])
def test_a_damaged_file_is_named(tmp_path, world, name, text):
    (tmp_path / f"{NAME}.partial").mkdir()
    (tmp_path / name).write_bytes(text.encode("latin-1"))
    with pytest.raises(UserError, match=name) as caught:
        open_results(tmp_path, world)
    assert "\n" not in str(caught.value)


# ------------------------------------------------------------------------------- unusable media


@pytest.mark.parametrize("stop_after", [None, 3], ids=["finished", "unfinished"])
def test_items_without_media_are_tried_again(tmp_path, world, whole, stop_after):
    """In whole batches, so that the bytes are those of a run that had all files."""
    folder, asked = tmp_path / "run", []

    def retry(answer):
        def is_usable(rows):
            asked.append(rows)
            return answer

        return is_usable

    run(folder, world, stop_after, missing=[61, 40])
    left = [3] if stop_after else []
    assert run(folder, world, stop_after=0, retry=retry(False)) == []
    assert run(folder, world, stop_after=1, retry=retry(True)) == [0]
    assert run(folder, world, retry=retry(True)) == [2, *left]
    assert asked == [{61, 40}, {61, 40}, {40}]
    assert contents(folder) == whole
    assert run(folder, world, retry=retry(True)) == []


# ----------------------------------------------------------------------------------- several runs


@pytest.mark.parametrize("finished", [False, True], ids=["nothing-there", "finished-before"])
def test_two_runs_do_not_write_the_same_results(tmp_path, world, whole, finished):
    changes = {"model_fingerprint": "m2"} if finished else {}
    if finished:
        run(tmp_path, world)

    def work(batches):
        with pytest.raises(UserError, match=f"another run is writing to .*{NAME}.jsonl"):
            run(tmp_path, world, **changes)
        return [(number, batch) for number, batch in batches]

    open_results(tmp_path, world, **changes).run(work, lambda records: {})
    assert run(tmp_path, world, **changes) == [], "nothing is locked when all is finished"


def test_what_another_run_finished_since_the_first_look_is_taken_over(tmp_path, world, whole):
    late = open_results(tmp_path, world)
    run(tmp_path, world)
    late.run(lambda batches: iter(batches), lambda records: {"n": len(records)})
    assert contents(tmp_path) == whole


def test_a_folder_that_cannot_be_locked_is_named(tmp_path, world, monkeypatch):
    def refuse(*_):
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr(results.fcntl, "flock", refuse)
    with pytest.raises(UserError, match=f"{NAME}.jsonl cannot be locked: No locks available"):
        run(tmp_path, world)


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
def test_batches_are_dealt_out_in_turns(done, in_step, expected):
    dealt = [deal(BATCHES, done, rank, 3, in_step) for rank in range(3)]
    assert [[number for number, _ in share] for share in dealt] == expected
    for number, batch in (pair for share in dealt for pair in share):
        assert batch == ([] if number is None else BATCHES[number])


def test_batches_that_no_rank_wrote_here_are_missed(tmp_path, world):
    with pytest.raises(UserError, match="lacks batches of other ranks"):
        open_results(tmp_path, world).run(lambda batches: batches[:1], lambda records: {})
    assert not (tmp_path / f"{NAME}.jsonl").exists()


# ------------------------------------------------------------------------------------ fingerprints


@pytest.fixture
def base(toy_folder, tmp_path):
    shutil.copytree(toy_folder / "runs/toy/base", tmp_path / "model")
    return tmp_path / "model"


@pytest.mark.parametrize("file", ["model.safetensors", "config.json", "tokenizer.json"])
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
