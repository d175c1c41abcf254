"""Fixtures: the toy's model folder and data, written once per test session into a temp folder."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent


@pytest.fixture(scope="session")
def toy_folder(tmp_path_factory):
    """A working folder that holds runs/toy/base and runs/toy/data."""
    folder = tmp_path_factory.mktemp("toy")
    code = "import toy; toy.ensure_toy()"
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    subprocess.run([sys.executable, "-c", code], cwd=folder, env=environment, check=True)
    return folder
