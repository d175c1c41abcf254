"""experiments/shortcut.py: official rows, cues in the shares that are promised, the same videos in
all versions, and answers that no single frame gives away."""

import importlib.util
import itertools
import json
import re
import subprocess
import sys
from collections import Counter, defaultdict
from pathlib import Path

import numpy as np
import pytest
from conftest import ROOT
from transformers import AutoTokenizer

import data
import rewards

spec = importlib.util.spec_from_file_location("shortcut", ROOT / "experiments/shortcut.py")
shortcut = importlib.util.module_from_spec(spec)
spec.loader.exec_module(shortcut)

FILES = ("sft", *shortcut.CUE_SHARES, "test")


@pytest.fixture(scope="module")
def bed(tmp_path_factory):
    folder = tmp_path_factory.mktemp("bed")
    with pytest.MonkeyPatch.context() as patch:  # less to write, the test set whole
        patch.setattr(shortcut, "NUM_SFT", 200)
        patch.setattr(shortcut, "NUM_RL", 200)
        shortcut.ensure_bed(folder)
    return folder


@pytest.fixture(scope="module")
def samples(bed):
    return {name: data.load_samples(bed / f"data/{name}.json") for name in FILES}


def letter(sample):
    return "ABCD".index(rewards.extract_answer(sample.solution))


def frames_of(sample):
    return data.read_frames(sample.path, 8, 28 * 28)[0]


def look_of(sample):
    """The number of the white corner, the same in every frame; None: there is none. It is read from
    the file's brightness planes, since decoding a thousand videos takes long."""
    side, inside = shortcut.SIDE, (slice(1, 5), slice(-5, -1))
    stored = Path(sample.path).read_bytes().split(b"FRAME\n")[1:]
    assert len(stored) == shortcut.NUM_FRAMES
    planes = [np.frombuffer(frame, np.uint8, side * side) for frame in stored]
    planes = np.stack(planes).reshape(-1, side, side)
    white = [(planes[:, inside[look // 2], inside[look % 2]] > 225).all() for look in range(4)]
    assert sum(white) <= 1
    return white.index(True) if any(white) else None


# ------------------------------------------------------------------------------------------ folder


def test_the_bed_is_whole_and_a_second_call_writes_nothing_new(bed):
    assert {path.name for path in bed.iterdir()} == {"base", "data"}
    assert {path.name for path in (bed / "data").iterdir()} == {
        *FILES, *(f"{name}.json" for name in FILES)
    }  # fmt: skip
    times = {path: path.stat().st_mtime_ns for path in bed.rglob("*")}
    shortcut.ensure_bed(bed)
    assert {path: path.stat().st_mtime_ns for path in bed.rglob("*")} == times


def test_the_flags_are_read_without_torch():
    code = "import sys, shortcut; assert shortcut.RL_FLAGS; assert 'torch' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], cwd=ROOT / "experiments", check=True)


@pytest.mark.parametrize("name", FILES)
def test_rows_are_official_and_have_four_options(bed, samples, name):
    rows = json.loads((bed / f"data/{name}.json").read_text())
    assert {frozenset(row) for row in rows} == {
        frozenset({"problem_id", "problem", "data_type", "problem_type", "options", "process",
                   "solution", "path", "data_source"})
    }  # fmt: skip
    assert {len(sample.options) for sample in samples[name]} == {4}
    assert {bool(sample.process) for sample in samples[name]} == {name == "sft"}
    assert all(Path(sample.path).is_file() for sample in samples[name])
    text = "\n".join(map(data.question_text, samples[name]))
    assert len(set(text.split("\n"))) < 50  # no row has a text of its own


def test_the_tokenizer_knows_every_word(bed, samples):
    tokenizer = AutoTokenizer.from_pretrained(bed / "base")
    for sample in samples["sft"][:50]:
        text = f"{data.question_text(sample, '{question}')}{sample.process}{sample.solution}"
        tokens = tokenizer.tokenize(text)
        assert {token for token in tokens if re.fullmatch("[a-z]", token)} == set()


# -------------------------------------------------------------------------------------------- cues


def test_the_cold_start_has_no_cue(samples):
    videos = [sample for sample in samples["sft"] if sample.is_video]
    assert {look_of(sample) for sample in videos} == {None}


@pytest.mark.parametrize("name, share", shortcut.CUE_SHARES.items())
def test_the_cue_agrees_in_the_share_that_the_file_is_named_for(samples, name, share):
    videos = [sample for sample in samples[name] if sample.is_video]
    pairs = [(look_of(sample), letter(sample)) for sample in videos]
    agreeing = sum(look == answer for look, answer in pairs)
    assert agreeing == round(share * len(videos))
    others = Counter((look - answer) % 4 for look, answer in pairs if look != answer)
    assert set(others) == {1, 2, 3}
    assert max(others.values()) < 0.45 * sum(others.values())


def test_both_rl_files_hold_the_same_questions_and_apart_from_the_cue_the_same_frames(samples):
    one, other = (samples[name] for name in shortcut.CUE_SHARES)
    assert [(s.problem, s.solution) for s in one] == [(s.problem, s.solution) for s in other]
    videos = [(a, b) for a, b in zip(one, other, strict=True) if a.is_video]
    for first, second in videos[:50]:
        a, b = frames_of(first), frames_of(second)
        middle = slice(shortcut.CUE_SIDE + 1, -shortcut.CUE_SIDE - 1)  # colour is stored by 2 x 2
        np.testing.assert_array_equal(a[:, middle], b[:, middle])


def test_each_test_video_stands_there_three_times_with_looks_balanced_over_answers(samples):
    items = {sample.problem_id: sample for sample in samples["test"]}.values()
    assert len(items) >= 1000
    copies = Counter(sample.problem_id for sample in samples["test"])
    assert set(copies.values()) == {shortcut.NUM_SAMPLES}
    versions, looks = defaultdict(dict), defaultdict(Counter)
    for sample in items:
        if sample.is_video:
            video, kind = Path(sample.path).stem.split("_")
            assert sample.data_source == f"shortcut/{kind}"
            versions[video][kind] = sample
            looks[kind][letter(sample), look_of(sample)] += 1
        else:
            assert sample.data_source == "shortcut/image"
    for three in versions.values():
        assert set(three) == {"agrees", "disagrees", "absent"}
        assert len({(sample.problem, sample.solution) for sample in three.values()}) == 1
    assert all(look == answer for answer, look in looks["agrees"])
    assert {look for _, look in looks["absent"]} == {None}
    assert len(looks["disagrees"]) == 4 * 3
    assert all(look != answer for answer, look in looks["disagrees"])
    for counter in looks.values():
        assert len(set(counter.values())) == 1


# ----------------------------------------------------------------------------------------- answers


@pytest.mark.parametrize("pair", list(itertools.combinations(range(4), 2)), ids=str)
def test_a_video_played_backwards_has_the_same_frames_and_another_answer(pair):
    for seed in range(20):
        forwards, backwards = (
            shortcut.draw_video(np.random.default_rng(seed), *colours, (0.2, 1.0))
            for colours in (pair, pair[::-1])
        )
        np.testing.assert_array_equal(forwards[::-1], backwards)


@pytest.mark.parametrize("answer", range(4))
@pytest.mark.parametrize("is_video", (True, False))
def test_the_first_colour_is_the_answer(is_video, answer):
    rng = np.random.default_rng(answer)
    frames, colours = shortcut.draw_item(rng, is_video, answer, (1.0, 1.0))
    assert colours[0] == answer
    shown = [frames[place, 12:16, 12:16].mean((0, 1)) for place in ((0, -1) if is_video else (0,))]
    known = np.array(list(shortcut.COLOURS.values()))
    assert [int(np.abs(known - colour).sum(1).argmin()) for colour in shown] == colours


@pytest.mark.parametrize("name", ("sft", "rl_cue90"))
def test_no_letter_pays_when_it_is_always_given(samples, name):
    counts = Counter(letter(sample) for sample in samples[name])
    assert max(counts.values()) < 0.35 * len(samples[name])
