"""Results files that survive kills, and the fingerprints that say what they depend on.

    <name>.jsonl           one record per item, sorted by row; there once all batches are done
    <name>.summary.json    what was computed from the records, and their provenance
    <name>.partial/        while they are computed: settings.json with the provenance, rank<r>.jsonl
                           with one line per finished batch, and the lock of the run that writes

The provenance is a flat dict of everything that the records depend on: hashes of the model and the
data, and the flags that change what is written. Records of two provenances are never mixed. A run
that was interrupted resumes on any number of ranks, which must all see the folder.
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

from infra.distributed import World, log, main_does, on_main
from infra.errors import UserError, require
from infra.run import claim
from model import HUB_FILES, resolve_folder

Batch = tuple[int | None, list]  # its number, None where a rank has no work, and its items


def file_sha256(path: str | Path) -> str:
    """SHA-256 of a file's bytes."""
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
    """What a resumed run must find unchanged: the weights that it started from, and its rows."""
    return {"model": fingerprint(config.model), "data": file_sha256(config.data)}


def model_path(name: str) -> str:
    """The resolved path of a local model folder; a Hub id as it is."""
    return str(Path(name).resolve()) if Path(name).is_dir() else name


def library_versions() -> dict[str, str]:
    """The versions of the libraries that the results may depend on; those that are installed."""
    names = ("torch", "transformers", "tokenizers", "numpy", "pillow", "decord", "decord2")
    installed = {}
    for name in names:
        with suppress(metadata.PackageNotFoundError):  # decord or decord2
            installed[name] = metadata.version(name)
    return installed


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
    """Write an object to a file that is whole or not there."""
    write_whole(path, json.dumps(content, indent=2) + "\n")


def read_records(path: Path) -> list[dict]:
    """The objects of a .jsonl file.

    Raises:
        UserError: it is not there, or not such a file; names it.
    """
    try:
        records = [json.loads(line) for line in path.read_text("utf-8").split("\n") if line]
    except (OSError, ValueError) as error:
        raise UserError(f"{path} cannot be read as results: {error}") from None
    require(all(isinstance(record, dict) for record in records),
            f"{path} holds lines that are not objects")  # fmt: skip
    return records


def read_summary(path: Path) -> dict | None:
    """The object in a .json file; None if there is no file.

    Raises:
        UserError: the file does not hold a JSON object; names it.
    """
    if not path.is_file():
        return None
    try:
        summary = json.loads(path.read_text("utf-8"))
    except ValueError as error:
        raise UserError(f"{path} is not JSON: {error}") from None
    require(isinstance(summary, dict), f"{path} does not hold an object")
    return summary


def is_made_by(
    file: Path, provenance: dict, replaceable: Set[str] = frozenset(), overwrite: bool = False,
    log: Callable[[str], None] = log,
) -> bool:
    """Whether a summary or settings file is there and has this provenance.

    Raises:
        UserError: it has another one, which differs in more than what is replaceable, and is not
            to be overwritten; names the differences.
    """
    content = read_summary(file)
    if content is None or content.get("provenance") == provenance:
        return content is not None
    old = content.get("provenance") or {}
    changed = differences(old, provenance)
    words = ", ".join(f"{name} {before!r:.60} and not {now!r:.60}"
                      for name, (before, now) in changed.items())  # fmt: skip
    what = f"{file} has results of {words if old else 'unknown settings'}"
    require(overwrite or (old and changed.keys() <= replaceable),
            f"{what}: write elsewhere, or replace it by --overwrite true")  # fmt: skip
    log(f"{what}: replaced")
    return False


class Results:
    """One results file, finished or in progress.

    results = Results(folder, "eval_mvbench.ordered", provenance, world, batches)
    if not results.finished:
        results.run(work, summarise)

    A batch is the unit of work: records depend neither on the number of ranks nor on interruptions.

    Args:
        batches: all items (each with its `row`), the same on every rank.
        replaceable: names of the provenance. Results that differ in these alone are out of date
            and replaced, after a line that says so; with overwrite, all of another provenance.
        retry: from the rows whose media could not be used to whether to try them again.
    Raises:
        UserError, on rank 0: results of another provenance are there; names the difference.
    """

    def __init__(
        self, folder: Path, name: str, provenance: dict, world: World, batches: list[list],
        replaceable: Set[str] = frozenset(), overwrite: bool = False,
        retry: Callable[[set[int]], bool] = lambda rows: False,
    ):  # fmt: skip
        self.name, self.world, self.batches = name, world, batches
        self.provenance = json.loads(json.dumps(provenance))  # as it will be read: no tuples
        self.replaceable, self.overwrite, self.retries = replaceable, overwrite, False
        self.records_file = folder / f"{name}.jsonl"
        self.summary_file = folder / f"{name}.summary.json"
        self.partial = folder / f"{name}.partial"
        self.settings_file = self.partial / "settings.json"
        self.finished = on_main(world, lambda: self._look(retry))

    def _look(self, retry: Callable[[set[int]], bool]) -> bool:
        """Whether nothing is left to do."""
        failed = [record["row"] for batch in self._found(log).values() for record in lost(batch)]
        self.retries = bool(failed) and retry(set(failed))
        if self.retries:
            log(f"{self.records_file}: {len(failed)} items without usable media are tried again")
        finished = len(self._done()) == len(self.batches) and not self.partial.exists()
        if finished:
            log(f"{self.records_file} is finished")
        return finished

    def _is_ours(self, file: Path, log: Callable[[str], None]) -> bool:
        return is_made_by(file, self.provenance, self.replaceable, self.overwrite, log)

    def _found(self, log: Callable[[str], None] = lambda line: None) -> dict[int, list[dict]]:
        """The records on disk that these settings made, by batch."""
        found: dict[int, list[dict]] = {}
        if self._is_ours(self.summary_file, log) and self.records_file.is_file():
            records = {record["row"]: record for record in read_records(self.records_file)}
            for number, batch in enumerate(self.batches):
                rows = [_row(item) for item in batch]
                if records.keys() >= set(rows):
                    found[number] = [records[row] for row in rows]
        parts = sorted(self.partial.glob("rank*.jsonl"))
        for part in parts if self._is_ours(self.settings_file, log) else []:
            for line in part.read_text("utf-8").split("\n"):
                try:
                    row = json.loads(line)
                except ValueError:  # empty, or torn by a kill
                    continue
                number, batch = row["batch"], row["records"]
                if number not in found or len(lost(batch)) <= len(lost(found[number])):
                    found[number] = batch  # the better of two tries
        return found

    def _done(self) -> set[int]:
        """The numbers of the batches that are not to be computed."""
        found = self._found().items()
        return {number for number, batch in found if not (self.retries and lost(batch))}

    def run(
        self, work: Callable[[list[Batch]], Iterable[tuple[int, list[dict]]]],
        summarise: Callable[[list[dict]], dict], in_step: bool = False, unit: str = "item",
    ) -> None:  # fmt: skip
        """Compute the batches that are not done, each rank its share, and write the results.

        Args:
            work: from this rank's share to the number and the records of each batch.
            summarise: from all records, sorted, to what the summary holds.
            in_step: as many batches for every rank, those without work getting (None, []).
        """
        done, rank, size = on_main(self.world, self._begin), self.world.rank, self.world.size
        num_items = sum(map(len, self.batches))
        num_done = sum(len(self.batches[number]) for number in done)
        with (
            (self.partial / f"rank{rank}.jsonl").open("a") as part,
            tqdm(total=num_items, initial=num_done, desc=self.name, unit=unit, disable=rank > 0,
                 dynamic_ncols=True) as bar,
        ):  # fmt: skip
            part.write("\n")  # a kill may have torn the last line
            for number, records in work(deal(self.batches, done, rank, size, in_step)):
                part.write(json.dumps({"batch": number, "records": records}) + "\n")
                part.flush()
                bar.update(min(len(records) * size, bar.total - bar.n))  # of all ranks, about
        dist.barrier()
        main_does(self.world, lambda: self._finish(summarise))

    def _begin(self) -> set[int]:
        """Lock the results and drop what other settings left; the batches that are done."""
        self.lock = claim(self.partial / "lock", str(self.records_file))
        if not self._is_ours(self.settings_file, lambda line: None):
            for part in self.partial.glob("rank*.jsonl"):
                part.unlink()
            write_json(self.settings_file, {"provenance": self.provenance})
        done = self._done()
        if done:
            log(f"{self.records_file}: resumes, {len(done)} of {len(self.batches)} batches done")
        return done

    def _finish(self, summarise: Callable[[list[dict]], dict]) -> None:
        found = self._found()
        require(len(found) == len(self.batches),
                f"{self.partial} lacks batches of other ranks: do all see one folder?")  # fmt: skip
        records = sorted((record for batch in found.values() for record in batch), key=_row)
        write_whole(self.records_file, "".join(json.dumps(record) + "\n" for record in records))
        write_json(self.summary_file, {**summarise(records), "provenance": self.provenance})
        self.lock.close()
        shutil.rmtree(self.partial)
        log(f"results written to {self.records_file}")


def deal(batches: list[list], done: set[int], rank: int, size: int, in_step: bool) -> list[Batch]:
    """The share of a rank in the batches that are not done, dealt out in turns."""
    left: list[Batch] = [pair for pair in enumerate(batches) if pair[0] not in done]
    if in_step:
        left += [(None, [])] * (-len(left) % size)
    return left[rank::size]


def lost(records: list[dict]) -> list[dict]:
    """The records of items whose media could not be used, which may be there the next time."""
    return [record for record in records if record.get("is_media_error")]


def _row(item) -> int:
    return item["row"] if isinstance(item, dict) else item.row
