"""Results files that an interrupted run goes on with, and what they depend on.

A run appends its batches as they are finished; any number of ranks may go on where it was.

    <name>.rank<r>.part.jsonl   of rank r: a line with the provenance, then one line for each batch
    <name>.jsonl                every record, sorted by row: there when all batches are done
    <name>.summary.json         the provenance and what was computed from the records
    .<name>.lock                held by the run that is writing these

The provenance is a flat dict of everything that the records depend on: hashes of the model and the
data, and the flags that change what is written. Records of two provenances are never mixed. The
folder must be one that all ranks see.
"""

import fcntl
import hashlib
import json
import os
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from importlib import metadata
from pathlib import Path
from typing import TextIO

import torch.distributed as dist

from infra.distributed import World, log, main_does, on_main
from infra.errors import UserError
from model import HUB_FILES, resolve_folder

# What a new training or evaluation changes although the user gives the same flags: results that
# differ from the present run in this alone are out of date, and no reason to stop.
OUTDATED_BY = {
    "model_fingerprint": "the model has changed since",
    "results_sha256": "the judged results have changed since",
}
VERSIONS = ("torch", "transformers", "tokenizers", "numpy", "pillow", "decord", "decord2")


def file_sha256(path: str | Path) -> str:
    """SHA-256 of a file's bytes."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def fingerprint(name: str) -> str:
    """SHA-256 over all files of a model folder that its answers depend on: weights, configs,
    tokenizer, chat template.

    Every byte counts, since a short training changes few of them in bfloat16. It costs 9 s for the
    16 GB of a 7B model at 1.8 GB/s (one core with SHA instructions), less where there are more
    cores than one, and the files are read for loading anyway.
    """
    folder = resolve_folder(name)
    files = sorted({file for pattern in HUB_FILES for file in folder.glob(pattern)})
    with ThreadPoolExecutor(8) as threads:  # hashlib lets go of the interpreter
        digests = list(threads.map(file_sha256, files))
    lines = [f"{file.name} {digest}\n" for file, digest in zip(files, digests, strict=True)]
    return hashlib.sha256("".join(lines).encode()).hexdigest()


def library_versions() -> dict[str, str]:
    """The versions of the libraries that the results may depend on; those that are installed."""
    installed = {}
    for name in VERSIONS:
        try:
            installed[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            continue  # decord or decord2: one of them
    return installed


def claim(lock: Path, what: str) -> TextIO:
    """Hold a lock file until what this returns is closed or the process ends.

    Who holds it may delete it.

    Raises:
        UserError: another process holds it, or there is no place for it; names `what`.
    """
    while True:
        try:
            lock.parent.mkdir(parents=True, exist_ok=True)
            file = lock.open("w")
        except OSError as error:
            raise UserError(f"{what}: {error.strerror}") from None
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise UserError(f"another run is writing to {what}") from None
        except OSError as error:  # a file system without locks
            raise UserError(f"{what} cannot be locked: {error.strerror}") from None
        if os.fstat(file.fileno()).st_nlink:
            return file
        file.close()  # deleted between open and flock by the one who held it


def differences(old: dict, new: dict) -> dict[str, tuple]:
    """Where two provenances differ: name to (old value, new value), None where one lacks it."""
    names = [*old, *(name for name in new if name not in old)]
    pairs = {name: (old.get(name), new.get(name)) for name in names}
    return {name: pair for name, pair in pairs.items() if pair[0] != pair[1]}


def describe(changed: dict[str, tuple]) -> str:
    """The differences in words: "max_frames 16 and not 32"."""
    return ", ".join(f"{name} {old!r:.60} and not {new!r:.60}" for name, (old, new) in
                     changed.items())  # fmt: skip


def write_whole(path: Path, text: str) -> None:
    """Write a file that is whole or not there, whenever the process is killed."""
    unfinished = path.with_name(f".{path.name}")
    unfinished.write_text(text, encoding="utf-8")
    os.replace(unfinished, path)


def write_json(path: Path, content: dict) -> None:
    """Write an object to a file that is whole or not there."""
    write_whole(path, json.dumps(content, indent=2) + "\n")


def read_records(path: Path) -> list[dict]:
    """The objects of a .jsonl file.

    Raises:
        UserError: it is not there, or no such file; names it.
    """
    try:
        lines = path.read_text(encoding="utf-8").split("\n")
        records = [json.loads(line) for line in lines if line]
    except (OSError, ValueError) as error:
        raise UserError(f"{path} cannot be read as results: {error}") from None
    if not all(isinstance(record, dict) for record in records):
        raise UserError(f"{path} holds lines that are no objects")
    return records


def read_summary(path: Path) -> dict | None:
    """The summary in a file; None if there is no file.

    Raises:
        UserError: the file holds no JSON object; names it.
    """
    if not path.is_file():
        return None
    try:
        summary = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise UserError(f"{path} is not JSON: {error}") from None
    if not isinstance(summary, dict):
        raise UserError(f"{path} holds no object")
    return summary


def read_part(path: Path) -> tuple[dict | None, dict[int, list[dict]]]:
    """The provenance and the batches of a part; (None, {}) if its first line is not whole.

    A kill tears the last line at most: what stands behind the last line break is no batch.
    """
    *lines, _ = path.read_bytes().split(b"\n")
    try:
        rows = [json.loads(line) for line in lines]
        batches = {row["batch"]: row["records"] for row in rows[1:]}
    except (ValueError, TypeError, KeyError) as error:
        raise UserError(f"{path} is damaged, delete it: {error}") from None
    return (rows[0], batches) if rows else (None, {})


class Results:
    """One results file, finished or in the making.

    results = Results(folder, "eval_mvbench.ordered", provenance, world)
    if not results.finished:
        results.begin()
        for number, batch in results.deal(batches):
            results.append(number, records_of(batch))
        results.finish(summarise)

    Results that are out of date (OUTDATED_BY) are replaced, after a line that says so.

    Args:
        overwrite: replace whatever is there.
    Raises:
        UserError, on rank 0: the folder holds results of another provenance, and names the
            difference; or they are finished and another run is writing them anew.
    """

    def __init__(
        self, folder: Path, name: str, provenance: dict, world: World, overwrite: bool = False
    ):
        self.folder, self.name, self.world = folder, name, world
        self.provenance = json.loads(json.dumps(provenance))  # as it will be read: no tuples
        self.records_file = folder / f"{name}.jsonl"
        self.summary_file = folder / f"{name}.summary.json"
        self.lock_file = folder / f".{name}.lock"
        self.stale: list[Path] = []  # parts to delete, on rank 0
        self.finished, self.done = on_main(world, lambda: self._look(overwrite))

    def _parts(self) -> list[Path]:
        parts = self.folder.glob("*.part.jsonl")
        return sorted(part for part in parts if part.name.startswith(f"{self.name}.rank"))

    def _files(self) -> dict[str, int]:
        """What is there, by its length: another run would change it."""
        files = (self.records_file, self.summary_file, *self._parts())
        return {file.name: file.stat().st_size for file in files if file.exists()}

    def _claim(self) -> None:
        self.lock = claim(self.lock_file, str(self.records_file))

    def _look(self, overwrite: bool) -> tuple[bool, set[int]]:
        """Whether the results are finished, and if not, which batches are done."""
        summary = read_summary(self.summary_file)
        finished = (
            not overwrite and summary is not None and self.records_file.is_file()
            and self._is_current(self.summary_file, summary.get("provenance", {}))
        )  # fmt: skip
        if finished:
            log(f"{self.records_file} is finished (--overwrite true computes it anew)")
            if self._parts() or self.lock_file.exists():  # left by a kill in the last moment
                self._claim()
                self._close()
            return True, set()
        self.seen = self._files()
        if overwrite:
            self.stale = self._parts()
            return False, set()
        done: set[int] = set()
        for part in self._parts():
            provenance, batches = read_part(part)
            if provenance is None or self._is_current(part, provenance):
                done |= batches.keys()
            else:
                self.stale.append(part)
        if done:
            log(f"{self.records_file}: goes on where it was, {len(done)} batches are done")
        return False, done

    def _is_current(self, file: Path, provenance: dict) -> bool:
        changed = differences(provenance, self.provenance)
        if not changed:
            return True
        if changed.keys() <= OUTDATED_BY.keys():
            reasons = ", ".join(OUTDATED_BY[name] for name in changed)
            log(f"{file} is replaced: {reasons}")
            return False
        what = f"with {describe(changed)}" if provenance else "that do not say what made them"
        raise UserError(
            f"{file} has results {what}: name another --output_dir, delete it, or replace it by "
            "--overwrite true"
        )

    def deal(self, batches: list, in_step: bool = False) -> list[tuple[int | None, list]]:
        """This rank's part of the batches that are not done: (number, batch), dealt out in turns.

        in_step: as many for every rank, those without work getting (None, []).
        """
        self.num_batches = len(batches)
        left = [(number, batch) for number, batch in enumerate(batches) if number not in self.done]
        if in_step:
            left += [(None, [])] * (-len(left) % self.world.size)
        return left[self.world.rank :: self.world.size]

    def begin(self) -> None:
        """Clear away what is out of date, and open this rank's part.

        Raises:
            UserError, on rank 0: another run is writing these results, or has since they were
                looked at.
        """
        main_does(self.world, self._clear)
        path = self.folder / f"{self.name}.rank{self.world.rank}.part.jsonl"
        whole = path.read_bytes().rpartition(b"\n")[0] if path.exists() else b""
        self.part = path.open("r+b" if path.exists() else "w+b")
        self.part.truncate(len(whole) + 1 if whole else 0)  # a torn line is dropped
        self.part.seek(0, os.SEEK_END)
        if not whole:
            self._write(self.provenance)

    def _clear(self) -> None:
        self._claim()
        if self._files() != self.seen:
            raise UserError(f"another run has written to {self.records_file} since: start anew")
        for path in self.stale:
            path.unlink()

    def _write(self, row: dict) -> None:
        self.part.write(json.dumps(row).encode() + b"\n")
        self.part.flush()

    def append(self, number: int, records: list[dict]) -> None:
        """Keep the records of a finished batch."""
        self._write({"batch": number, "records": records})

    def collect(self) -> list[dict]:
        """All records, sorted by row, on rank 0 once every rank has finished; else []."""
        self.part.close()
        dist.barrier()
        if not self.world.is_main:
            return []
        batches: dict[int, list[dict]] = {}
        for part in self._parts():
            batches |= read_part(part)[1]
        if len(batches) < self.num_batches:
            raise UserError(f"{self.folder} lacks batches of other ranks: do all see one folder?")
        records = [record for batch in batches.values() for record in batch]
        return sorted(records, key=lambda record: record["row"])

    def _close(self) -> None:
        """Delete the parts, once what was made of them is on disk, and let others write."""
        for path in (*self._parts(), self.lock_file):
            path.unlink()
        self.lock.close()

    def finish(self, summarise: Callable[[list[dict]], dict]) -> None:
        """Write the records and their summary when every rank has come here."""
        records = self.collect()

        def write() -> None:
            text = "".join(json.dumps(record) + "\n" for record in records)
            summary = {**summarise(records), "provenance": self.provenance}
            write_whole(self.records_file, text)
            write_json(self.summary_file, summary)
            self._close()
            log(f"results written to {self.folder / self.name}.*")

        main_does(self.world, write)
