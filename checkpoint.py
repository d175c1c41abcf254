"""The trained model as a folder that transformers and vLLM open.

Names, files and config are the source folder's: what transformers 5 would write itself
(rope_parameters in config.json) does not open in transformers 4.
"""

import json
import os
import shutil
from pathlib import Path

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import nn
from torch.distributed.tensor import DTensor

from distributed import World, main_does
from model import hub_name, resolve_folder, weight_files

SHARD_BYTES = 4 * 2**30
# What makes a model folder besides its weights.
SIDE_FILES = ("*.json", "*.jinja", "merges.txt", "vocab.txt")


def export_model(model: nn.Module, source: str, folder: Path, world: World) -> None:
    """Write `folder`: the weights in the types that the source has on disk, and its other files.

    Sharded weights are gathered one at a time; rank 0 writes. The folder appears when it is whole.
    """
    source_folder = resolve_folder(source)
    stored = weight_files(source_folder)
    unfinished = folder.with_name(f".{folder.name}-unfinished")
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
    main_does(world, lambda: os.replace(unfinished, folder))


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
