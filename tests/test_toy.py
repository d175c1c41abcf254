"""toy.py: the same bytes from the same seed, right answers, a model folder as the Hub has it.

The toy is read back by the code of a real run: load_samples, read_frames, from_pretrained.
"""

import os
import subprocess
import sys
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import ROOT
from transformers import AutoTokenizer

import data
import rewards
import toy


@pytest.fixture(scope="module")
def folder(toy_folder):
    return toy_folder / "runs/toy"


@pytest.fixture(scope="module")
def splits(folder):
    return {name: data.load_samples(folder / f"data/{name}.json") for name in toy.SPLITS}


@pytest.fixture(scope="module")
def tokenizer(folder):
    return AutoTokenizer.from_pretrained(folder / "base")


def contents(folder):
    """Bytes of every file below a folder, by its name relative to it."""
    return {str(path.relative_to(folder)): path.read_bytes()
            for path in folder.rglob("*") if path.is_file()}  # fmt: skip


def answer_of(sample):
    return rewards.extract_answer(sample.solution)


# --------------------------------------------------------------------------------- made from a seed


def test_made_again_from_the_same_seed_gives_the_same_bytes(folder, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)  # the fixture's toy comes from a process of its own
    torch_state, numpy_state = torch.get_rng_state(), np.random.get_state()[1].copy()
    # A split has a generator of its own: an empty one changes no other.
    monkeypatch.setitem(toy.SPLITS, "sft", 0)
    monkeypatch.setitem(toy.SPLITS, "rl", 0)
    toy.ensure_toy(seed=0)
    assert torch.equal(torch.get_rng_state(), torch_state)  # the run's own draws do not move
    np.testing.assert_array_equal(np.random.get_state()[1], numpy_state)
    for name in ("base", "data/test"):
        first, second = contents(folder / name), contents(toy.FOLDER / name)
        assert first.keys() == second.keys()
        assert [file for file in first if first[file] != second[file]] == []
    assert toy.TEST_DATA.read_bytes() == (folder / "data/test.json").read_bytes()


def test_only_what_is_missing_is_made_and_only_whole(tmp_path, monkeypatch):
    def fail(folder, seed):
        (folder / "file").write_text("half")
        raise OSError("disk full")

    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(toy, "make_model", lambda folder, seed: (folder / f"seed {seed}").touch())
    monkeypatch.setattr(toy, "make_data", fail)
    with pytest.raises(OSError, match="disk full"):
        toy.ensure_toy(seed=3)
    assert [path.name for path in toy.FOLDER.iterdir()] == ["base"]  # no scratch folder is left
    monkeypatch.setattr(toy, "make_data", toy.make_model)
    toy.ensure_toy(seed=4)
    assert sorted(str(file.relative_to(toy.FOLDER)) for file in toy.FOLDER.glob("*/*")) == [
        "base/seed 3", "data/seed 4"]  # fmt: skip
    assert toy.BASE.stat().st_mode & 0o777 == 0o755  # others may read it


# ------------------------------------------------------------------------------------ the data sets


def test_the_test_set_has_200_video_choices_of_balanced_answers(splits):
    videos = of_kind(splits["test"], "direction")
    assert len(videos) >= 200
    answers = Counter(answer_of(sample) for sample in videos)
    assert max(answers.values()) < 0.35 * len(videos)  # no letter pays when it is always given
    for samples in splits.values():
        assert {sample.problem_type for sample in samples} == set(data.PROBLEM_TYPES)


def test_no_video_of_the_test_set_is_trained_on(splits):
    def videos(*names):
        return {Path(sample.path).read_bytes()
                for name in names for sample in splits[name] if sample.is_video}  # fmt: skip

    assert not videos("test") & videos("sft", "rl")


def test_sft_responses_survive_the_tokenizer_and_earn_all(splits, tokenizer):
    for sample in splits["sft"][:300]:
        ids = data.response_ids(sample, tokenizer)
        text = tokenizer.decode(ids, skip_special_tokens=True)  # the tags are not special
        assert text == f"{sample.process}\n{sample.solution}"
        assert rewards.format_reward(text) == 1
        assert rewards.accuracy_reward(text, sample.solution, sample.problem_type) == 1


# ---------------------------------------------------------------------------- the answers are right


def bright(frames, threshold=75):
    """Where the square is: bool, the shape of the frames without colour. Grounds stay below 60."""
    return np.asarray(frames, np.float32).mean(-1) > threshold


def direction_of(frames):
    """Which way the square's centre moves; it must do so in one line and never turn back."""
    centres = np.array([np.argwhere(mask).mean(0) for mask in bright(frames)])  # (F, 2) as (y, x)
    dy, dx = centres[-1] - centres[0]
    along = centres[:, 0] if abs(dy) > abs(dx) else centres[:, 1]
    assert min(abs(dx), abs(dy)) < 0.5
    assert (np.diff(along) >= -0.5).all() or (np.diff(along) <= 0.5).all()
    if abs(dy) > abs(dx):
        return "down" if dy > 0 else "up"
    return "right" if dx > 0 else "left"


def of_kind(samples, kind, most=10**6):
    return [sample for sample in samples if sample.data_source == f"toy/{kind}"][:most]


def chosen_text(sample):
    return sample.options["ABCD".index(answer_of(sample))].split(". ")[1]


def test_the_teacher_of_the_cold_start_is_mostly_right(splits):
    choices = of_kind(splits["sft"], "direction", most=100)
    frames = [data.read_frames(sample.path)[0] for sample in choices]
    right = [direction_of(f) == chosen_text(s) for f, s in zip(frames, choices, strict=True)]
    # Three quarters of the guesses are wrong; four deviations around that.
    expected = 0.75 * toy.WRONG_TEACHER
    deviation = (expected * (1 - expected) / len(right)) ** 0.5
    assert 0 < 1 - sum(right) / len(right) < expected + 4 * deviation


def test_videos_move_as_the_answer_says(splits):
    choices = of_kind(splits["test"], "direction", most=20)
    assert {chosen_text(sample) for sample in choices} == set(toy.DIRECTIONS)
    for sample in choices:
        frames, seconds = data.read_frames(sample.path)
        assert frames.shape == (toy.NUM_FRAMES, toy.SIDE, toy.SIDE, 3)
        assert seconds == 1 / toy.FPS
        assert direction_of(frames) == chosen_text(sample)
        assert direction_of(frames[::-1]) != chosen_text(sample)
    for sample in of_kind(splits["test"], "describe", most=10):
        frames, _ = data.read_frames(sample.path)
        assert answer_of(sample).endswith(f"square moves {direction_of(frames)}")


def test_images_show_what_the_answer_says(splits):
    for sample in of_kind(splits["test"], "count"):  # squares of 16 pixels, not over each other
        assert bright(data.read_image(sample.path)).sum() == int(answer_of(sample)) * 16**2
    for sample in of_kind(splits["test"], "width"):
        assert bright(data.read_image(sample.path)).sum() == int(answer_of(sample)) ** 2


# --------------------------------------------------------------------------------- two at a time

TOGETHER = """
import sys, time
from pathlib import Path
import toy

def make_when_both(what):
    def make(folder, seed):
        (folder / "file").write_text("whole")
        Path(f"{what}.{sys.argv[1]}").touch()
        while len(list(Path().glob(f"{what}.[ab]"))) < 2:
            time.sleep(0.01)
    return make

toy.make_model, toy.make_data = make_when_both("model"), make_when_both("data")
toy.ensure_toy()
"""


@pytest.mark.slow
def test_two_commands_that_start_together_make_one_toy(tmp_path):
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    command = [sys.executable, "-c", TOGETHER]
    processes = [subprocess.Popen([*command, name], cwd=tmp_path, env=environment,
                                  stderr=subprocess.PIPE, text=True) for name in "ab"]  # fmt: skip
    ends = [(process.communicate(timeout=120)[1], process.returncode) for process in processes]
    assert ends == [("", 0)] * 2
    folder = tmp_path / "runs/toy"
    assert {path.name for path in folder.iterdir()} == {"base", "data"}
    for name in ("base", "data"):
        assert [path.name for path in (folder / name).iterdir()] == ["file"]
