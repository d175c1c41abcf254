"""results.py: whatever instant a run is killed at, the next one resumes and ends with the same
file; records of two provenances are never mixed."""

import json
import shutil

import pytest
import torch.distributed as dist

from evaluation import results
from evaluation.results import Results, file_size, fingerprint
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


def open_results(folder, world, overwrite=False, batches=BATCHES, **changes):
    return Results(folder, NAME, PROVENANCE | changes, world, batches, {"model_fingerprint"},
                   overwrite)  # fmt: skip


def run(folder, world, stop_after=None, **changes):
    """A run to its end, or one that is killed after some of its batches. What it computed."""
    computed = []

    def work(batches):
        for number, batch in batches:
            if len(computed) == stop_after:
                raise Killed
            computed.append(number)
            yield number, [item | {"text": "0\n\u2028"} for item in batch]

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
    assert "other settings, replaced" in capsys.readouterr().out
    assert contents(tmp_path).get(f"{NAME}.summary.json") == old
    assert run(tmp_path, world, **changes) == [3]
    name = next(iter(changes))
    summary = json.loads((tmp_path / f"{NAME}.summary.json").read_text())
    assert summary["provenance"] == PROVENANCE | {name: changes[name]}
    assert len((tmp_path / f"{NAME}.jsonl").read_text().splitlines()) == 6


@pytest.mark.parametrize("name", [f"{NAME}.summary.json", f"{NAME}.partial/settings.json"])
@pytest.mark.parametrize("text", ["{}", "{", "[]", "\xff"])
def test_a_damaged_file_is_named(tmp_path, world, name, text):
    (tmp_path / f"{NAME}.partial").mkdir()
    (tmp_path / name).write_bytes(text.encode("latin-1"))
    with pytest.raises(UserError, match=name) as caught:
        open_results(tmp_path, world)
    assert "\n" not in str(caught.value)


# ------------------------------------------------------------------------------- unusable media


def test_a_batch_is_computed_again_once_its_missing_file_is_there(tmp_path, world):
    media = tmp_path / "late.mp4"

    def work(batches):
        for number, batch in batches:
            computed.append(number)
            yield number, [
                item | {"path": str(media), "file_size": file_size(media),
                        "error": None if item["row"] != 40 or media.exists() else "no such file"}
                for item in batch
            ]  # fmt: skip

    def again():
        computed.clear()
        found = open_results(tmp_path / "run", world)
        if not found.finished:
            found.run(work, lambda records: {})
        return list(computed)

    computed = []
    assert again() == [0, 1, 2, 3]
    assert again() == [], "the file is still missing"
    media.write_bytes(b"video")
    assert again() == [2]
    assert again() == []


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
