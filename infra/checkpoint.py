"""What a run keeps: checkpoints to resume from, and the trained weights as a folder.

    checkpoints/step_000100/
        __0_0.distcp, ..   weights and optimizer, a file per rank (torch.distributed.checkpoint)
        .metadata          which tensor lies where in them
        run.json           step, what the loader has taken, lengths of the logs, settings
        manifest.json      size and CRC-32 of every file above

Nothing else needs to be kept: the learning rate follows from the step, and every random number is
drawn from a key (seed, step, sample, ..), never from a generator with a state of its own.

A checkpoint is written under a hidden name, synced, and renamed when it is complete, so that a kill
or a full disk at any moment leaves only complete ones visible.
"""

import json
import os
import re
import shutil
import time
import zlib
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.distributed.checkpoint import CheckpointException, FileSystemReader, FileSystemWriter
from torch.distributed.checkpoint.staging import BlockingAsyncStager
from torch.distributed.tensor import DTensor

from infra.distributed import World, log, main_does
from infra.errors import UserError, require

FILE_BYTES = 4 * 2**30  # of exported weights in one file, at most
LOWER_IS_BETTER = ("loss", "kl", "grad_norm", "logp_gap", "clipped_length", "zero_std", "skipped")


# ------------------------------------------------------------------------------------ checkpoints


def training_state(model: nn.Module, optimizer: torch.optim.AdamW) -> dict:
    """Every tensor that training changes, by parameter name: what is saved, and loaded into."""
    parameters = dict(model.named_parameters())
    weights = {name: parameter.detach() for name, parameter in parameters.items()}
    states = {name: optimizer.state.get(parameter) for name, parameter in parameters.items()}
    return {"model": weights, "optimizer": {name: found for name, found in states.items() if found}}


class Stager(BlockingAsyncStager):
    """Copies the state into host memory that it keeps for the next save: on CPU fresh memory costs
    ten times what the copying does. (The stager's own cache is pinned, which needs a GPU.)"""

    def stage(self, state_dict: dict) -> dict:
        self.state_dict_cache = super().stage(state_dict)
        self.cache_staged_state_dict = True
        return self.state_dict_cache


class Checkpoints:
    """A run's checkpoints/: saves in the background, finds the newest sound one, prunes.

    Only folders named step_ and digits are touched.

    Args:
        keep_last: so many of the newest are kept; 0: all.
        keep_best: the one with the best value of this metric is kept as well; "": none.
    """

    def __init__(self, folder: Path, world: World, keep_last: int, keep_best: str = ""):
        self.folder, self.world = folder, world
        self.keep_last, self.keep_best = keep_last, keep_best
        # A group of its own: its collectives run beside those of training.
        self.group = dist.new_group(backend="gloo")
        self.stager = Stager()
        # torch.save would hold the interpreter, and with it training, for checksums of its own;
        # the manifest has one of every file.
        torch.serialization.set_crc32_options(False)
        self.finisher = ThreadPoolExecutor(1, "checkpoint")
        self.pending: Future | None = None
        self.pending_step = 0
        self.corrupt: set[Path] = set()  # that find has skipped
        self.seconds = 0.0  # on rank 0: from the last call of save until it was visible

    def paths(self) -> list[Path]:
        """The visible checkpoints, the newest first."""
        found = [path for path in self.folder.glob("step_*") if _is_ours(path)]
        return sorted(found, key=lambda path: int(path.name.removeprefix("step_")), reverse=True)

    def find(self) -> tuple[Path, dict] | None:
        """The newest sound checkpoint and its run.json; corrupt ones are reported and skipped.

        Every rank reads its share of the files, so that a checksum of 100 GB takes seconds. The
        "value" is None if it is that of another metric than keep_best.
        """
        for path in self.paths():
            reasons = [""] * self.world.size
            dist.all_gather_object(reasons, check_files(path, self.world.rank, self.world.size))
            reason = next(filter(None, reasons), "")
            if not reason:
                run = json.loads((path / "run.json").read_text())
                return path, run | {"value": self._value(path)}
            log(f"checkpoint {path} is corrupt and skipped: {reason}")
            self.corrupt.add(path)
        return None

    def load(self, path: Path, model: nn.Module, optimizer: torch.optim.AdamW) -> None:
        """Read weights and optimizer state in place, whatever the number of ranks that wrote them.

        Parameters that were frozen then have no optimizer state: theirs stays as it is, zero.

        Raises:
            UserError: a weight is missing, or has another shape.
        """
        reader = FileSystemReader(path)
        saved = reader.read_metadata().state_dict_metadata
        state = training_state(model, optimizer)
        for name, weight in state["model"].items():
            found = saved.get(f"model.{name}")
            require(
                found and found.size == weight.shape,
                f"checkpoint {path} has no weight {name} of shape {tuple(weight.shape)}",
            )
        fresh = [name for name in state["optimizer"] if f"optimizer.{name}.step" not in saved]
        for name in fresh:
            del state["optimizer"][name]
        if fresh:
            log(f"{path} has no optimizer state of {len(fresh)} parameters, {fresh[0]} the first: "
                "they start from zero")  # fmt: skip
        dcp.load(state, storage_reader=reader, process_group=self.group)

    def save(
        self, run: dict, model: nn.Module, optimizer: torch.optim.AdamW,
        before_visible: Callable[[], None],
    ) -> None:  # fmt: skip
        """Copy the state, and write it while training continues.

        Args:
            run: what run.json shall hold: "step", and for keep_best "value", a number or None.
            before_visible: rank 0 calls it before the checkpoint appears (it syncs the logs).
        Raises:
            UserError: the save before this one has failed.
        """
        self.wait()
        begun = time.monotonic()
        hidden = self.folder / f".step_{run['step']:06d}"

        def prepare() -> None:
            shutil.rmtree(hidden, ignore_errors=True)  # of a run that was killed
            try:
                hidden.mkdir(parents=True)
            except OSError as error:
                raise UserError(f"checkpoint {hidden}: {error.strerror}") from None

        main_does(self.world, prepare)
        written = dcp.async_save(
            training_state(model, optimizer),
            # Nothing is copied ahead: on GPUs the thread that does would open a context on the
            # first GPU from every rank.
            storage_writer=FileSystemWriter(hidden, per_thread_copy_ahead=0),
            process_group=self.group,
            async_stager=self.stager,
        )
        self.pending, self.pending_step = written, run["step"]
        if self.world.is_main:
            run = run | {"metric": self.keep_best}
            self.pending = self.finisher.submit(
                self._finish, written, hidden, run, before_visible, begun
            )

    def _finish(
        self, written: Future, hidden: Path, run: dict, before_visible: Callable, begun: float
    ) -> None:  # fmt: skip
        """Rank 0, in the background: make visible what all ranks have written."""
        path = hidden.with_name(hidden.name.removeprefix("."))
        try:
            written.result()
            before_visible()
            (hidden / "run.json").write_text(json.dumps(run, indent=2) + "\n")
            manifest = {file.name: fingerprint(file) for file in sorted(hidden.iterdir())}
            (hidden / "manifest.json").write_text(json.dumps(manifest, indent=2) + "\n")
            for place in (hidden / "run.json", hidden / "manifest.json", hidden):
                sync(place)
            if path.exists():  # corrupt
                _delete(path)
            os.replace(hidden, path)
            sync(self.folder)
            self.seconds = time.monotonic() - begun
            self.corrupt.discard(path)
            self._prune()
        except (OSError, CheckpointException):
            shutil.rmtree(hidden, ignore_errors=True)  # frees the space on a full disk
            raise

    def check(self) -> None:
        """Raise UserError if a save in the background has failed."""
        if self.pending is not None and self.pending.done():
            self.wait()

    def wait(self) -> None:
        """Wait until the last save is complete. Raises UserError if it has failed."""
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
        """Delete what need not be kept, corrupt ones too: the logs were cut back to before them."""
        paths = [path for path in self.paths() if path not in self.corrupt]
        keep = set(paths[: self.keep_last] if self.keep_last else paths)
        values = {path: value for path in paths if (value := self._value(path)) is not None}
        if values:
            better = min if self.keep_best.removeprefix("val_") in LOWER_IS_BETTER else max
            keep.add(better(values, key=values.get))
        for path in set(self.paths()) - keep:
            _delete(path)

    def _value(self, path: Path) -> float | None:
        """A checkpoint's value of the metric keep_best, if it has one that can be read."""
        try:
            run = json.loads((path / "run.json").read_text())
            return run["value"] if self.keep_best and run["metric"] == self.keep_best else None
        except (OSError, ValueError, KeyError, TypeError):
            return None

    def clean(self) -> None:
        """Rank 0: remove what killed runs left half written or half deleted."""
        for path in self.folder.glob(".*step_*"):
            if _is_ours(path):
                shutil.rmtree(path)


def _is_ours(path: Path) -> bool:
    name = re.fullmatch(r"(\.|\.deleted-)?step_[0-9]+", path.name)
    return bool(name) and path.is_dir() and not path.is_symlink()


def _delete(path: Path) -> None:
    """Out of sight first: half a checkpoint is never seen."""
    hidden = path.with_name(f".deleted-{path.name}")
    shutil.rmtree(hidden, ignore_errors=True)
    os.replace(path, hidden)
    shutil.rmtree(hidden)


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
    """Why a checkpoint is corrupt, "" if it is sound; a rank looks at its share of the files."""
    try:
        manifest = json.loads((folder / "manifest.json").read_text())
        for name in sorted(manifest)[rank::world_size]:
            found = fingerprint(folder / name)
            if found != manifest[name]:
                return f"{name} has {found}, the manifest says {manifest[name]}"
    except OSError as error:
        return f"{error.filename}: {error.strerror}"
    except (ValueError, TypeError) as error:  # the manifest itself is damaged
        return f"manifest.json: {error}"
    return ""


def sync(path: Path) -> None:
    """Wait until the disk has a file, or the names in a folder."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


# --------------------------------------------------------------------------------------- weights


def export_weights(
    weights: dict[str, Tensor], dtypes: dict[str, torch.dtype], folder: Path, world: World,
    side_files: dict[str, bytes],
) -> None:  # fmt: skip
    """Write a model folder: safetensors of at most FILE_BYTES, their index, and `side_files`.

    Sharded weights are gathered one at a time; rank 0 writes. The folder appears when it is
    complete, in the place of an older one.

    Args:
        weights: parameters by the name that they are stored under, in one order on all ranks.
        dtypes: of each on disk. side_files: contents by name.
    Raises:
        UserError: it cannot be written.
    """
    sizes = {name: weight.numel() * dtypes[name].itemsize for name, weight in weights.items()}
    parts = split_by_size(sizes)
    unfinished = folder.with_name(f".{folder.name}-unfinished")
    weight_map: dict[str, str] = {}
    try:
        if world.is_main:
            shutil.rmtree(unfinished, ignore_errors=True)  # of a run that was killed
            unfinished.mkdir(parents=True)
        for number, names in enumerate(parts, start=1):
            tensors = {}
            for name in names:
                whole = weights[name].detach()
                if isinstance(whole, DTensor):
                    whole = whole.full_tensor()  # all ranks take part
                if world.is_main:
                    tensors[name] = whole.to("cpu", dtypes[name]).contiguous()
            if world.is_main:
                file = f"model-{number:05d}-of-{len(parts):05d}.safetensors"
                file = file if len(parts) > 1 else "model.safetensors"
                save_file(tensors, unfinished / file, metadata={"format": "pt"})
                (unfinished / file).chmod(0o644)  # it comes as 0600
                weight_map |= dict.fromkeys(names, file)
        if world.is_main:
            if len(parts) > 1:
                index = {"metadata": {"total_size": sum(sizes.values())}, "weight_map": weight_map}
                text = json.dumps(index, indent=2, sort_keys=True)
                side_files = side_files | {"model.safetensors.index.json": text.encode()}
            for name, content in side_files.items():
                (unfinished / name).write_bytes(content)
            _put_in_place(unfinished, folder)
    except (OSError, SafetensorError) as error:
        raise UserError(
            f"{folder} could not be written to a disk with {_free_gib(folder.parent):.1f} GiB "
            f"left: {_reason(error)}"
        ) from None
    dist.barrier()


def split_by_size(sizes: dict[str, int]) -> list[list[str]]:
    """Names in their order, in parts of at most FILE_BYTES together; a larger one alone."""
    parts, used = [], 0
    for name, size in sizes.items():
        if not parts or used + size > FILE_BYTES:
            parts.append([])
            used = 0
        parts[-1].append(name)
        used += size
    return parts


def _put_in_place(new: Path, folder: Path) -> None:
    os.sync()
    old = folder.with_name(f".{folder.name}-old")
    shutil.rmtree(old, ignore_errors=True)  # of a run that was killed here
    if folder.exists():
        os.replace(folder, old)
    os.replace(new, folder)
    shutil.rmtree(old, ignore_errors=True)
