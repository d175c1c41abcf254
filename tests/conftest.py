"""Fixtures: the toy's model folder and data, written once per test session into a temp folder.

The tests run on the CPU, where their tolerances hold, also on a machine with a GPU: only `-m gpu`
lets them see it.
"""

import os
import subprocess
import sys
from pathlib import Path

import kills
import pytest

ROOT = Path(__file__).parent.parent


def pytest_configure(config):
    if config.getoption("markexpr") != "gpu":
        os.environ["CUDA_VISIBLE_DEVICES"] = ""  # before any test imports torch


@pytest.fixture(scope="session")
def toy_folder(tmp_path_factory):
    """A working folder that holds runs/toy/base and runs/toy/data."""
    folder = tmp_path_factory.mktemp("toy")
    code = "import toy; toy.ensure_toy()"
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    subprocess.run([sys.executable, "-c", code], cwd=folder, env=environment, check=True)
    return folder


@pytest.fixture(scope="session")
def base(toy_folder):
    """The toy's model folder, untrained."""
    return str(toy_folder / "runs/toy/base")


@pytest.fixture
def one_process(monkeypatch):
    """A process of no group, which is left as it was, also after an error."""
    import torch.distributed as dist  # not before pytest_configure has hidden the GPUs

    for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK"):
        monkeypatch.delenv(name, raising=False)
    yield
    if dist.is_initialized():
        dist.destroy_process_group()


@pytest.fixture
def world(one_process):
    """The World of this process alone."""
    from infra.distributed import process_group

    with process_group() as world:
        yield world


@pytest.fixture(scope="session")
def killed_base(toy_folder, tmp_path_factory):
    """A folder for kills.py: the toy, and an undisturbed run."""
    folder = tmp_path_factory.mktemp("kills")
    (folder / "runs").mkdir()
    (folder / "runs/toy").symlink_to(toy_folder / "runs/toy")
    kills.finish("sft", folder / "undisturbed")
    return folder
