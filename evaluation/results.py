"""Results files that survive kills, and the fingerprints that say what they depend on.

    <name>.jsonl           one record per item, sorted by row; there once all batches are done
    <name>.summary.json    what was computed from the records, and their provenance
    <name>.partial/        while they are computed: settings.json with the provenance, rank<r>.jsonl
                           with one line per finished batch, and the lock of the run that writes

The provenance is a flat dict of everything that the records depend on: hashes of the model and the
data, and the flags that change what is written. Records of two provenances are never mixed. A run
that was interrupted resumes on any number of ranks, which must all see the folder. A batch in which
an item's file was missing or broken is computed again once that file is another one.
"""

import hashlib
import json
import os
import shutil
from collections.abc import Callable, Iterable, Set
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from importlib import metadata
from pathlib import Path

import torch.distributed as dist
from tqdm import tqdm

from data import video_path
from infra.distributed import World, log, main_does, on_main
from infra.errors import UserError, require
from infra.run import claim
from model import HUB_FILES, resolve_folder

Batch = tuple[int | None, list]  # its number, None where a rank has no work, and its items
LIBRARIES = ("torch", "transformers", "tokenizers", "numpy", "pillow")  # named in each summary


def file_sha256(path: str | Path) -> str:
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def fingerprint(name: str) -> str:
    """SHA-256 over all files of a model folder that its answers depend on: weights, configs,
    tokenizer, chat template. Every byte counts, since a short run changes few of them in bfloat16.
    """
    folder = resolve_folder(name)
    files = sorted({file for pattern in HUB_FILES for file in folder.glob(pattern)})
    with ThreadPoolExecutor(8) as threads:  # hashlib releases the interpreter lock
        digests = list(threads.map(file_sha256, files))
    lines = [f"{file.name} {digest}\n" for file, digest in zip(files, digests, strict=True)]
    return hashlib.sha256("".join(lines).encode()).hexdigest()


def input_hashes(config) -> dict[str, str]:
    """What a resumed training run must find unchanged."""
    return {"model": fingerprint(config.model), "data": file_sha256(config.data)}


def model_path(name: str) -> str:
    """The resolved path of a local model folder; a Hub id as it is."""
    return str(Path(name).resolve()) if Path(name).is_dir() else name


def file_state(path: str) -> list[int] | None:
    """[bytes, time of modification in ns] of a row's file, which tell its versions apart; None if
    it is absent."""
    try:
        status = os.stat(video_path(path))
    except OSError:
        return None
    return [status.st_size, status.st_mtime_ns]


def differences(old: dict, new: dict) -> dict[str, tuple]:
    """Where two provenances differ: name to (old value, new value), None where one lacks it."""
    pairs = {name: (old.get(name), new.get(name)) for name in {**old, **new}}
    return {name: pair for name, pair in pairs.items() if pair[0] != pair[1]}


def write_whole(path: Path, text: str) -> None:
    """Write a file that is whole or not there, whenever the process is killed."""
    unfinished = path.with_name(f".{path.name}")
    unfinished.write_text(text, encoding="utf-8")
    os.replace(unfinished, path)


def write_json(path: Path, content: dict) -> None:
    write_whole(path, json.dumps(content, indent=2) + "\n")


def read_records(path: Path) -> list[dict]:
    """The objects of a .jsonl file, one a line; UserError, naming it, if it is not such a file."""
    return _read_objects(path, lambda text: filter(None, text.split("\n")))


def read_summary(path: Path) -> dict | None:
    """The object in a .json file; None if there is no file."""
    return _read_objects(path, lambda text: [text])[0] if path.is_file() else None


def _read_objects(path: Path, split: Callable[[str], Iterable[str]]) -> list[dict]:
    try:
        return [dict(json.loads(part)) for part in split(path.read_text("utf-8"))]
    except (OSError, ValueError, TypeError) as error:
        raise UserError(f"{path} cannot be read as results: {error}") from None


class Results:
    """One results file, finished or in progress.

    results = Results(folder, "eval_mvbench.ordered", provenance, world, batches)
    if not results.finished:
        results.run(work, summarise)

    Args:
        batches: all items (each with its `row`), the same on every rank. Records depend neither on
            the number of ranks nor on interruptions.
        replaceable: names of the provenance. Results that differ in these alone are out of date
            and replaced, after a line that says so; with overwrite, all of another provenance.
    Raises:
        UserError, on rank 0: results of another provenance are there; names the difference.
    """

    def __init__(
        self, folder: Path, name: str, provenance: dict, world: World, batches: list[list],
        replaceable: Set[str] = frozenset(), overwrite: bool = False,
    ):  # fmt: skip
        self.name, self.world, self.batches = name, world, batches
        self.provenance = json.loads(json.dumps(provenance))  # as it will be read: no tuples
        self.replaceable, self.overwrite = replaceable, overwrite
        self.records_file = folder / f"{name}.jsonl"
        self.summary_file = folder / f"{name}.summary.json"
        self.partial = folder / f"{name}.partial"
        self.settings_file = self.partial / "settings.json"
        self.finished = on_main(world, self._is_finished)

    def _is_finished(self) -> bool:
        finished = len(self._found()) == len(self.batches) and not self.partial.exists()
        if finished:
            log(f"{self.records_file} is finished")
        else:  # before the model is loaded
            folder = self.records_file.parent
            there = next(path for path in (folder, *folder.parents) if path.exists())
            require(there.is_dir() and os.access(there, os.W_OK),
                    f"{self.records_file} cannot be written: see {there}")  # fmt: skip
        return finished

    def _is_ours(self, file: Path) -> bool:
        """Whether a summary or settings file is there and has this provenance. Only the model's
        path may be another one: the same model in another place."""
        content = read_summary(file)
        if content is None:
            return False
        changed = differences(content.get("provenance", {}), self.provenance)
        words = ", ".join(f"{name} {before!r:.60} and not {now!r:.60}"
                          for name, (before, now) in changed.items())  # fmt: skip
        is_ours = changed.keys() <= {"model"}
        allowed = is_ours or self.overwrite or changed.keys() <= self.replaceable
        require(allowed, f"{file} has results of {words}: write elsewhere, or replace it by "
                "--overwrite true")  # fmt: skip
        return is_ours

    def _found(self, also_stale: bool = False) -> dict[int, list[dict]]:
        """The records on disk that these settings made, by batch."""
        found = []
        if self._is_ours(self.summary_file) and self.records_file.is_file():
            records = {record["row"]: record for record in read_records(self.records_file)}
            for number, batch in enumerate(self.batches):
                found.append((number, [records[_row(item)] for item in batch]))
        parts = sorted(self.partial.glob("rank*.jsonl"))
        for part in parts if self._is_ours(self.settings_file) else []:
            for line in part.read_text("utf-8").split("\n"):
                with suppress(ValueError):  # empty, or torn by a kill
                    row = json.loads(line)
                    found.append((row["batch"], row["records"]))
        return {number: batch for number, batch in found
                if also_stale or not _is_stale(batch)}  # fmt: skip

    def run(
        self, work: Callable[[list[Batch]], Iterable[tuple[int, list[dict]]]],
        summarise: Callable[[list[dict]], dict], in_step: bool = False,
    ) -> None:  # fmt: skip
        """Compute the batches that are not done, each rank its share, and write the results.

        Args:
            work: from this rank's share to the number and the records of each batch.
            summarise: from all records, sorted, to what the summary holds.
            in_step: as many batches for every rank, those without work getting (None, []).
        """
        done, rank = on_main(self.world, self._begin), self.world.rank
        mine = deal(self.batches, done, rank, self.world.size, in_step)
        bar = tqdm(work(mine), total=len(mine), desc=self.name, unit="batch", disable=rank > 0,
                   dynamic_ncols=True)  # fmt: skip
        with (self.partial / f"rank{rank}.jsonl").open("a") as part:
            part.write("\n")  # a kill may have torn the last line
            for number, records in bar:
                part.write(json.dumps({"batch": number, "records": records}) + "\n")
                part.flush()
        dist.barrier()
        main_does(self.world, lambda: self._finish(summarise))

    def _begin(self) -> set[int]:
        """Lock the results and drop what other settings left; the batches that are done."""
        self.lock = claim(self.partial / "lock", str(self.records_file))
        for file in (self.summary_file, self.settings_file):
            if file.exists() and not self._is_ours(file):
                log(f"{file}: made by other settings, replaced")
        if not self._is_ours(self.settings_file):
            for part in self.partial.glob("rank*.jsonl"):
                part.unlink()
            write_json(self.settings_file, {"provenance": self.provenance})
        done = set(self._found())
        if done:
            log(f"{self.records_file}: resumes, {len(done)} of {len(self.batches)} batches done")
        return done

    def _finish(self, summarise: Callable[[list[dict]], dict]) -> None:
        # A file that changed in the meantime makes no batch of this run stale: the next run's are.
        found = self._found(also_stale=True) | self._found()
        require(len(found) == len(self.batches),
                f"{self.partial} lacks batches of other ranks: do all see one folder?")  # fmt: skip
        records = sorted((record for batch in found.values() for record in batch), key=_row)
        about = {"versions": {name: metadata.version(name) for name in LIBRARIES},
                 "provenance": self.provenance}  # fmt: skip
        write_whole(self.records_file, "".join(json.dumps(record) + "\n" for record in records))
        write_json(self.summary_file, summarise(records) | about)
        self.lock.close()
        shutil.rmtree(self.partial)
        log(f"results written to {self.records_file}")


def deal(batches: list[list], done: set[int], rank: int, size: int, in_step: bool) -> list[Batch]:
    """The share of a rank in the batches that are not done."""
    left: list[Batch] = [pair for pair in enumerate(batches) if pair[0] not in done]
    if in_step:
        left += [(None, [])] * (-len(left) % size)
    return left[rank::size]


def _is_stale(records: list[dict]) -> bool:
    """Whether a file that could not be used has come, gone or changed since."""
    return any(record["error"] and file_state(record["path"]) != record["file_state"]
               for record in records if "file_state" in record)  # fmt: skip


def _row(item) -> int:
    return item["row"] if isinstance(item, dict) else item.row
