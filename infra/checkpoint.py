"""What a run keeps: checkpoints to go on from, and the trained model as a folder.

    checkpoints/step_000100/
        __0_0.distcp, ..   weights and optimizer, a file per rank (torch.distributed.checkpoint)
        .metadata          which tensor lies where in them
        run.json           step, what the loader has taken, lengths of the logs, settings
        manifest.json      size and checksum of every file above

Nothing else needs to be kept: the learning rate follows from the step, and every random number from
(seed, step, sample, ..), never from a generator that runs on.

A checkpoint is written under a hidden name, synced, and renamed when it is whole, so that a kill or
a full disk at any moment leaves only whole ones to be seen. The model's folder has the names, files
and config of the folder that training started from: what transformers 5 would write itself
(rope_parameters in config.json) does not open in transformers 4.
"""

import json
import os
import shutil
import time
import zlib
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import nn
from torch.distributed.checkpoint import CheckpointException, FileSystemReader, FileSystemWriter
from torch.distributed.checkpoint.staging import BlockingAsyncStager
from torch.distributed.tensor import DTensor

from infra.distributed import World, log, main_does
from infra.errors import UserError
from model import hub_name, resolve_folder, weight_files

SHARD_BYTES = 4 * 2**30
# What makes a model folder besides its weights.
SIDE_FILES = ("*.json", "*.jinja", "merges.txt", "vocab.txt")
LOWER_IS_BETTER = ("loss", "kl", "grad_norm", "logp_gap", "clipped_length", "zero_std", "skipped")


# ------------------------------------------------------------------------------------ checkpoints


def training_state(model: nn.Module, optimizer: torch.optim.AdamW) -> dict:
    """Every tensor that training changes, by parameter name: what is saved, and loaded into."""
    parameters = dict(model.named_parameters())
    return {
        "model": {name: parameter.detach() for name, parameter in parameters.items()},
        "optimizer": {
            name: optimizer.state[parameter]
            for name, parameter in parameters.items()
            if parameter in optimizer.state
        },
    }


class Stager(BlockingAsyncStager):
    """Copies the state into host memory that it keeps for the next save: on CPU fresh memory costs
    ten times what the copying does. (The stager's own cache is pinned, which needs a GPU.)"""

    def stage(self, state_dict: dict) -> dict:
        self.state_dict_cache = super().stage(state_dict)
        self.cache_staged_state_dict = True
        return self.state_dict_cache


class Checkpoints:
    """A run's checkpoints/: saves in the background, finds the newest that is whole, deletes.

    Args:
        keep_last: so many of the newest are kept; 0: all.
        keep_best: the one with the best value of this metric is kept as well; "": none.
    """

    def __init__(self, folder: Path, world: World, keep_last: int, keep_best: str = ""):
        self.folder, self.world = folder, world
        self.keep_last, self.keep_best = keep_last, keep_best
        # A group of its own: its collectives run beside those of the training.
        self.group = dist.new_group(backend="gloo")
        self.stager = Stager()
        # torch.save would hold the interpreter, and with it the training, for checksums of its own;
        # the manifest has one of every file.
        torch.serialization.set_crc32_options(False)
        self.finisher = ThreadPoolExecutor(1, "checkpoint")
        self.pending: Future | None = None
        self.pending_step = 0
        self.saved_step = 0  # of the last one that save was called for
        self.seconds = 0.0  # on rank 0: from the call of save until the checkpoint was visible

    def paths(self) -> list[Path]:
        """The visible checkpoints, the newest first."""
        return sorted(self.folder.glob("step_*"), reverse=True)

    def save(
        self, run: dict, model: nn.Module, optimizer: torch.optim.AdamW,
        before_visible: Callable[[], None],
    ) -> None:  # fmt: skip
        """Copy the state, and write it while the training goes on.

        Args:
            run: what run.json shall hold: "step", and for --keep_best "value".
            before_visible: rank 0 calls it before the checkpoint appears (it syncs the logs).
        Raises:
            UserError: the save before this one has failed.
        """
        self.wait()
        begun = time.monotonic()
        step = run["step"]
        hidden = self.folder / f".step_{step:06d}"

        def prepare() -> None:
            shutil.rmtree(hidden, ignore_errors=True)  # of a run that was killed
            try:
                hidden.mkdir(parents=True)
            except OSError as error:
                raise UserError(f"checkpoint {hidden}: {error.strerror}") from None

        main_does(self.world, prepare)
        written = dcp.async_save(
            training_state(model, optimizer),
            storage_writer=FileSystemWriter(hidden),
            process_group=self.group,
            async_stager=self.stager,
        )
        self.pending, self.pending_step = written, step
        if self.world.is_main:
            self.pending = self.finisher.submit(
                self._finish, written, run, before_visible, begun
            )
        self.saved_step = step

    def _finish(
        self, written: Future, run: dict, before_visible: Callable[[], None], begun: float
    ) -> None:
        """Rank 0, in the background: make visible what all ranks have written."""
        name = f"step_{run['step']:06d}"
        hidden = self.folder / f".{name}"
        try:
            written.result()
            before_visible()
            write_synced(hidden / "run.json", json.dumps(run, indent=2))
            files = sorted(file.name for file in hidden.iterdir())
            manifest = {file: fingerprint(hidden / file) for file in files}
            write_synced(hidden / "manifest.json", json.dumps(manifest, indent=2))
            sync_folder(hidden)
            if (self.folder / name).exists():  # broken, or of a run that was taken back to before
                self._delete(self.folder / name)
            os.replace(hidden, self.folder / name)
            sync_folder(self.folder)
            self.seconds = time.monotonic() - begun
            self._prune()
        except (OSError, CheckpointException):
            shutil.rmtree(hidden, ignore_errors=True)  # gives a full disk its room back
            raise

    def check(self) -> None:
        """Raise UserError if a save in the background has failed."""
        if self.pending is not None and self.pending.done():
            self.wait()

    def wait(self) -> None:
        """Wait until the last save is whole. Raises UserError if it has failed."""
        pending, self.pending = self.pending, None
        if pending is None:
            return
        try:
            pending.result()
        except (OSError, CheckpointException) as error:
            raise UserError(
                f"the checkpoint of step {self.pending_step} could not be written to "
                f"{self.folder}, which has {_free_gib(self.folder):.1f} GiB left: "
                f"{_reason(error)}; the earlier ones are whole"
            ) from None

    def _prune(self) -> None:
        paths = self.paths()
        keep = set(paths[: self.keep_last] if self.keep_last else paths)
        values = {path: json.loads((path / "run.json").read_text())["value"] for path in paths}
        values = {path: value for path, value in values.items() if value is not None}
        if self.keep_best and values:
            better = min if self.keep_best.removeprefix("val_") in LOWER_IS_BETTER else max
            keep.add(better(values, key=values.get))
        for path in set(paths) - keep:
            self._delete(path)

    def _delete(self, path: Path) -> None:
        """Out of sight first: half a checkpoint is never seen."""
        hidden = path.with_name(f".deleted-{path.name}")
        shutil.rmtree(hidden, ignore_errors=True)
        os.replace(path, hidden)
        shutil.rmtree(hidden)

    def find(self) -> tuple[Path, dict] | None:
        """The newest whole checkpoint and its run.json; broken ones are named and passed over.

        Every rank reads its share of the files, so that a checksum of 100 GB takes seconds.
        """
        for path in self.paths():
            reasons: list = [None] * self.world.size
            mine = check_files(path, self.world.rank, self.world.size)
            dist.all_gather_object(reasons, mine)
            reasons = [reason for reason in reasons if reason]
            if not reasons:
                return path, json.loads((path / "run.json").read_text())
            log(f"checkpoint {path} is passed over: {reasons[0]}")
        return None

    def load(self, path: Path, model: nn.Module, optimizer: torch.optim.AdamW) -> None:
        """Read weights and optimizer state in place, whatever the number of ranks that wrote it."""
        reader = FileSystemReader(path)
        dcp.load(training_state(model, optimizer), storage_reader=reader, process_group=self.group)
        self.saved_step = int(path.name.removeprefix("step_"))

    def clean(self) -> None:
        """Rank 0: remove what killed runs left half written or half deleted."""
        for path in self.folder.glob(".*step_*"):
            shutil.rmtree(path)


def _reason(error: Exception) -> str:
    """One line for a failed save; DCP's error holds one exception per failed rank."""
    if isinstance(error, CheckpointException):
        rank, failure = next(iter(error.failures.items()))
        return f"rank {rank}: {_reason(failure[0])}"
    cause: BaseException | None = error
    while cause is not None:  # torch.save covers the system's error by one of its own
        if isinstance(cause, OSError) and cause.strerror:
            return cause.strerror
        cause = cause.__context__
    return str(error).splitlines()[0]


def _free_gib(folder: Path) -> float:
    return shutil.disk_usage(folder).free / 2**30


def fingerprint(file: Path) -> dict[str, int]:
    """Size and CRC-32 of a file, read in pieces."""
    checksum = 0
    with file.open("rb") as stream:
        while piece := stream.read(2**24):
            checksum = zlib.crc32(piece, checksum)
        return {"bytes": stream.tell(), "crc32": checksum}


def check_files(folder: Path, rank: int = 0, world_size: int = 1) -> str:
    """Why a checkpoint is not whole, "" if it is; a rank looks at its share of the files."""
    try:
        manifest = json.loads((folder / "manifest.json").read_text())
        for name in sorted(manifest)[rank::world_size]:
            found = fingerprint(folder / name)
            for key in ("bytes", "crc32"):
                if found[key] != manifest[name][key]:
                    return f"{name} has {key} {found[key]}, the manifest says {manifest[name][key]}"
    except OSError as error:
        return f"{error.filename}: {error.strerror}"
    except (ValueError, TypeError, KeyError) as error:  # the manifest itself is damaged
        return f"manifest.json: {error}"
    return ""


def write_synced(file: Path, text: str) -> None:
    """Write a file and wait until the disk has it."""
    with file.open("w", encoding="utf-8") as stream:
        stream.write(text + "\n")
        stream.flush()
        os.fsync(stream.fileno())


def sync_folder(folder: Path) -> None:
    """Wait until the disk has the names of a folder."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


# ----------------------------------------------------------------------------------- the model


def export_model(model: nn.Module, source: str, folder: Path, world: World) -> None:
    """Write `folder`: the weights in the types that the source has on disk, and its other files.

    Sharded weights are gathered one at a time; rank 0 writes. The folder appears when it is whole,
    in the place of what a shorter run left there.

    Raises:
        UserError: it cannot be written.
    """
    source_folder = resolve_folder(source)
    stored = weight_files(source_folder)
    unfinished = folder.with_name(f".{folder.name}-unfinished")
    try:
        writer = _ShardWriter(unfinished, stored) if world.is_main else None
        for name, parameter in model.named_parameters():
            whole = parameter.detach()
            if isinstance(whole, DTensor):
                whole = whole.full_tensor()  # all ranks take part
            if writer:
                writer.add(name, whole)
        if writer:
            writer.finish()
            _copy_side_files(source_folder, unfinished)
            _put_in_place(unfinished, folder)
    except (OSError, SafetensorError) as error:
        raise UserError(
            f"{folder} could not be written to a disk with {_free_gib(folder.parent):.1f} GiB "
            f"left: {_reason(error)}"
        ) from None
    dist.barrier()


def _put_in_place(new: Path, folder: Path) -> None:
    os.sync()
    old = folder.with_name(f".{folder.name}-old")
    shutil.rmtree(old, ignore_errors=True)  # of a run that was killed here
    if folder.exists():
        os.replace(folder, old)
    os.replace(new, folder)
    shutil.rmtree(old, ignore_errors=True)


class _ShardWriter:
    """Collects tensors and writes them out in files of up to SHARD_BYTES, with an index."""

    def __init__(self, folder: Path, stored: dict[str, Path]):
        shutil.rmtree(folder, ignore_errors=True)  # left over from a run that was killed
        folder.mkdir(parents=True)
        self.folder, self.stored = folder, stored
        self.shards: list[list[str]] = []
        self.pending: dict[str, torch.Tensor] = {}
        self.pending_bytes = self.total_bytes = 0

    def add(self, name: str, tensor: torch.Tensor) -> None:
        stored_name = hub_name(name) if hub_name(name) in self.stored else name
        with safe_open(self.stored[stored_name], framework="pt") as file:
            dtype = file.get_slice(stored_name)[:0].dtype  # its rows are not read
        size = tensor.numel() * dtype.itemsize
        if self.pending and self.pending_bytes + size > SHARD_BYTES:
            self.flush()
        self.pending[hub_name(name)] = tensor.to("cpu", dtype).contiguous().clone()
        self.pending_bytes += size
        self.total_bytes += size

    def flush(self) -> None:
        file = self.folder / f"shard-{len(self.shards)}.safetensors"
        save_file(self.pending, file, metadata={"format": "pt"})
        file.chmod(0o644)
        self.shards.append(list(self.pending))
        self.pending, self.pending_bytes = {}, 0

    def finish(self) -> None:
        """Give the shards the Hub's names; one alone needs no index."""
        self.flush()
        count = len(self.shards)
        weight_map = {}
        for number, names in enumerate(self.shards):
            final = "model.safetensors"
            if count > 1:
                final = f"model-{number + 1:05d}-of-{count:05d}.safetensors"
            os.replace(self.folder / f"shard-{number}.safetensors", self.folder / final)
            weight_map |= dict.fromkeys(names, final)
        if count > 1:
            index = {"metadata": {"total_size": self.total_bytes}, "weight_map": weight_map}
            text = json.dumps(index, indent=2, sort_keys=True)
            (self.folder / "model.safetensors.index.json").write_text(text + "\n")


def _copy_side_files(source: Path, folder: Path) -> None:
    for pattern in SIDE_FILES:
        for file in source.glob(pattern):
            if file.name != "model.safetensors.index.json":
                shutil.copyfile(file, folder / file.name)
