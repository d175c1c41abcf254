"""Checkpoints on disk: every bit back, corrupt ones skipped, nothing lost, nothing foreign touched;
and exported weights."""

import copy
import json
import os
import resource
from contextlib import contextmanager

import pytest
import torch
from safetensors.torch import load_file
from torch import nn

from infra import checkpoint
from infra.checkpoint import Checkpoints, export_weights, training_state
from infra.distributed import process_group
from infra.errors import UserError
from infra.optim import make_optimizer


@pytest.fixture
def world():
    with process_group() as world:
        yield world


def trained(seed=0, freeze_first=False):
    """A small model and its optimizer after one step."""
    torch.manual_seed(seed)
    model = nn.Sequential(nn.Linear(4, 3), nn.Linear(3, 2))
    model[0].requires_grad_(not freeze_first)
    optimizer = make_optimizer(model, 1e-2, 0.01)
    model(torch.randn(5, 4)).square().sum().backward()
    optimizer.step()
    return model, optimizer


def save(folder, world, steps, values=None, **settings):
    """Save small models at these steps; the value of a step is looked up in `values`."""
    checkpoints = Checkpoints(folder, world, **{"keep_last": 0} | settings)
    found = checkpoints.find()
    for step in steps:
        run = {"step": step, "value": (values or {}).get(step)}
        checkpoints.save(run, *trained(step), lambda: None)
    checkpoints.wait()
    return checkpoints, found


def names(folder):
    return sorted(os.listdir(folder))


def test_loading_gives_back_every_bit_of_weights_and_optimizer(world, tmp_path):
    model, optimizer = trained()
    checkpoints = Checkpoints(tmp_path, world, keep_last=0)
    checkpoints.save({"step": 6, "value": None}, model, optimizer, lambda: None)
    optimizer.step()  # the second save reuses the first one's memory
    checkpoints.save({"step": 7, "value": None}, model, optimizer, lambda: None)
    saved = copy.deepcopy(training_state(model, optimizer))
    with torch.no_grad():  # the copy was made before the file was written
        for parameter in model.parameters():
            parameter.zero_()
    checkpoints.wait()
    path, run = checkpoints.find()
    assert (path.name, run["step"]) == ("step_000007", 7)
    fresh, fresh_optimizer = trained(seed=1)
    checkpoints.load(path, fresh, fresh_optimizer)
    loaded = training_state(fresh, fresh_optimizer)
    for name, weight in saved["model"].items():
        assert torch.equal(loaded["model"][name], weight), name
        for key, value in saved["optimizer"][name].items():
            assert torch.equal(loaded["optimizer"][name][key], value), (name, key)
    assert saved["optimizer"]["0.weight"]["exp_avg"].any()


def test_optimizer_state_of_parameters_that_were_frozen_starts_from_zero(world, tmp_path, capsys):
    model, optimizer = trained(freeze_first=True)
    checkpoints = Checkpoints(tmp_path, world, keep_last=0)
    checkpoints.save({"step": 1, "value": None}, model, optimizer, lambda: None)
    checkpoints.wait()
    fresh = nn.Sequential(nn.Linear(4, 3), nn.Linear(3, 2))
    fresh_optimizer = make_optimizer(fresh, 1e-2, 0.01)
    checkpoints.load(checkpoints.find()[0], fresh, fresh_optimizer)
    assert "no optimizer state of 2 parameters, 0.weight the first" in capsys.readouterr().out
    saved, loaded = training_state(model, optimizer), training_state(fresh, fresh_optimizer)
    for name, weight in saved["model"].items():
        assert torch.equal(loaded["model"][name], weight), name
        for key, value in loaded["optimizer"][name].items():
            expected = saved["optimizer"].get(name, {}).get(key, torch.zeros_like(value))
            assert torch.equal(value, expected), (name, key)


def test_a_missing_or_misshapen_weight_is_an_error(world, tmp_path):
    checkpoints, _ = save(tmp_path, world, [1])
    for model in (nn.Sequential(nn.Linear(4, 3), nn.Linear(3, 2), nn.Linear(2, 2)),
                  nn.Sequential(nn.Linear(4, 3), nn.Linear(3, 5))):  # fmt: skip
        with pytest.raises(UserError, match=r"step_000001 has no weight [12].weight of shape"):
            checkpoints.load(tmp_path / "step_000001", model, make_optimizer(model, 1e-2, 0.01))


# ---------------------------------------------------------------------------------------- corrupt


def changed(content, name="__0_0.distcp"):
    """A damage: a file of a checkpoint has another content, by a function of bytes, or is gone."""

    def damage(folder):
        before = (folder / name).read_bytes()
        (folder / name).unlink()
        if content:
            (folder / name).write_bytes(content(before))

    return damage


flip = changed(lambda old: old[:999] + bytes([old[999] ^ 1]) + old[1000:])
lose_manifest = changed(None, "manifest.json")
lose_run = changed(None, "run.json")
tear_run = changed(lambda old: old[:16], "run.json")
DAMAGES = {
    "flip": (flip, "__0_0.distcp has {'bytes': "),
    "truncate": (changed(lambda old: old[:1000]), "__0_0.distcp has {'bytes': 1000, "),
    "lose_shard": (changed(None), "__0_0.distcp: No such file"),
    "lose_manifest": (lose_manifest, "manifest.json: No such file"),
    "tear_manifest": (changed(lambda old: old[:40], "manifest.json"), "manifest.json: "),
    "lose_run": (lose_run, "run.json: No such file"),
    "tear_run": (tear_run, "run.json has {'bytes': 16, "),
    "change_run": (changed(lambda old: old.replace(b'"step": 4', b'"step": 5'), "run.json"),
                   "run.json has {'bytes': "),
}  # fmt: skip


@pytest.mark.parametrize(("damage", "reason"), DAMAGES.values(), ids=DAMAGES)
def test_a_corrupt_checkpoint_is_reported_and_skipped(world, tmp_path, damage, reason, capsys):
    save(tmp_path, world, [2, 4])
    damage(tmp_path / "step_000004")
    checkpoints, (path, run) = save(tmp_path, world, [], keep_last=2)
    said = capsys.readouterr().out.replace(f"{tmp_path}/step_000004/", "")
    assert f"step_000004 is corrupt and skipped: {reason}" in said
    assert (path.name, run["step"]) == ("step_000002", 2)


@pytest.mark.parametrize(
    ("damage", "keep_last"), [(flip, 2), (lose_run, 1), (tear_run, 2), (lose_manifest, 2)]
)
def test_a_run_that_begins_again_keeps_what_it_saves(world, tmp_path, damage, keep_last):
    """Fault 2: the corrupt ones of steps 8 and 9 counted as the newest."""
    save(tmp_path, world, [8, 9])
    for name in names(tmp_path):
        damage(tmp_path / name)
    _, found = save(tmp_path, world, [1, 2, 3], keep_last=keep_last)
    assert found is None
    assert names(tmp_path) == ["step_000002", "step_000003"][-keep_last:]
    assert save(tmp_path, world, [])[1][0].name == "step_000003"


@pytest.mark.parametrize("damage", [lose_run, tear_run], ids=["lost", "torn"])
def test_pruning_survives_a_run_json_that_cannot_be_read(world, tmp_path, damage):
    """Fault 3: every later save failed."""
    values = {1: 0.9, 2: 0.1, 3: 0.5, 4: 0.2}
    save(tmp_path, world, [1, 2], values, keep_best="accuracy")
    damage(tmp_path / "step_000001")  # older than the newest: find does not look at it
    save(tmp_path, world, [3, 4], values, keep_last=1, keep_best="accuracy")
    assert names(tmp_path) == ["step_000003", "step_000004"]


# ------------------------------------------------------------------------------------------- kept

KEPT = {
    "newest": (2, "", [3, 4]),
    "newest-and-best": (1, "accuracy", [2, 4]),
    "newest-and-lowest": (1, "kl", [3, 4]),
}


@pytest.mark.parametrize(("keep_last", "keep_best", "expected"), KEPT.values(), ids=KEPT)
def test_which_checkpoints_are_kept(world, tmp_path, keep_last, keep_best, expected):
    values = {1: 0.5, 2: 0.9, 3: 0.1}
    save(tmp_path, world, [1, 2, 3, 4], values, keep_last=keep_last, keep_best=keep_best)
    assert names(tmp_path) == [f"step_00000{step}" for step in expected]


def test_values_of_another_metric_are_not_compared(world, tmp_path):
    """Fault 29: a length of 300 looked like the best accuracy."""
    save(tmp_path, world, [1, 2], {1: 300.0, 2: 200.0}, keep_best="completion_length")
    values = {3: 0.9, 4: 0.5}
    _, (path, run) = save(tmp_path, world, [3, 4], values, keep_last=1, keep_best="accuracy")
    assert (path.name, run["value"]) == ("step_000002", None)
    assert names(tmp_path) == ["step_000003", "step_000004"]
    assert save(tmp_path, world, [], keep_best="accuracy")[1][1]["value"] == 0.5


def test_only_step_and_digits_is_ours(world, tmp_path):
    """Fault 14: a user's copies were picked, pruned, and removed by the cleaning."""
    save(tmp_path, world, [2, 4])
    foreign = ["step_000002_mine", "step_000004_mine", "step_x", ".step_000004_mine", ".a_step_1"]
    for name in foreign:
        (tmp_path / name).mkdir()
    (tmp_path / "step_000009").write_text("a file")
    os.symlink(tmp_path / "step_x", tmp_path / "step_000010")
    for name in (".step_000006", ".deleted-step_000001"):  # of a run that was killed
        (tmp_path / name).mkdir()
    checkpoints, (path, _) = save(tmp_path, world, [999_999, 1_000_000], keep_last=1)
    assert path.name == "step_000004"
    checkpoints.clean()
    ours = ["step_1000000"]
    assert names(tmp_path) == sorted([*ours, *foreign, "step_000009", "step_000010"])


# ------------------------------------------------------------------------------------------- disk


@contextmanager
def full_disk(num_bytes):
    """A limit on the size of files stands for the disk."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (num_bytes, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


def test_a_full_disk_leaves_the_earlier_checkpoints_and_says_so(world, tmp_path):
    save(tmp_path, world, [2], keep_last=1)
    checkpoints = Checkpoints(tmp_path, world, keep_last=1)
    model = nn.Linear(1024, 1024)
    with full_disk(2**20):
        checkpoints.save({"step": 4}, model, make_optimizer(model, 1e-3, 0.01), lambda: None)
        words = r"checkpoint of step 4 could not be written .* GiB left: .*; the earlier ones are"
        with pytest.raises(UserError, match=words):
            checkpoints.wait()
    assert names(tmp_path) == ["step_000002"]
    assert checkpoints.find()[1]["step"] == 2


# ----------------------------------------------------------------------------------------- export


def test_exported_weights_in_several_files_with_an_index(world, tmp_path, monkeypatch):
    """Sharded models are exported by ranks.py, whole folders opened by transformers there."""
    weights = {name: torch.randn(4, 8) for name in "edcba"}
    dtypes = dict.fromkeys(weights, torch.float32) | {"d": torch.bfloat16, "c": torch.bfloat16}
    sides = {"config.json": b"{}", "README.md": b"a card\n"}
    folder = tmp_path / "model"
    for place in (folder, tmp_path / ".model-unfinished"):  # an older one, and what a kill left
        place.mkdir()
        (place / "old.safetensors").touch()
    monkeypatch.setattr(checkpoint, "FILE_BYTES", 256)  # float32: 128 bytes each
    export_weights(weights, dtypes, folder, world, sides)
    assert names(tmp_path) == ["model"]
    index = json.loads((folder / "model.safetensors.index.json").read_text())
    files = [f"model-0000{number}-of-00002.safetensors" for number in (1, 2)]
    assert index["weight_map"] == dict.fromkeys("edc", files[0]) | dict.fromkeys("ba", files[1])
    assert index["metadata"]["total_size"] == 512
    assert names(folder) == sorted([*files, *sides, "model.safetensors.index.json"])
    for name, file in index["weight_map"].items():
        assert torch.equal(load_file(folder / file)[name], weights[name].to(dtypes[name]))
    assert all((folder / name).read_bytes() == content for name, content in sides.items())


def test_an_export_on_a_full_disk_leaves_the_older_folder(world, tmp_path):
    weights, dtypes = {"w": torch.zeros(1024, 1024)}, {"w": torch.float32}
    export_weights(weights, dtypes, tmp_path / "model", world, {"config.json": b"older"})
    before = (tmp_path / "model/model.safetensors").read_bytes()
    with full_disk(2**20), pytest.raises(UserError, match="model could not be written to a disk"):
        export_weights({"w": weights["w"] + 1}, dtypes, tmp_path / "model", world, {})
    assert (tmp_path / "model/model.safetensors").read_bytes() == before
    assert (tmp_path / "model/config.json").read_bytes() == b"older"
