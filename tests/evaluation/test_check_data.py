"""check_data.py: `python data.py FILE`, on small files whose counts are worked out by hand."""

import json
import re
import subprocess
import sys
from concurrent.futures import Future
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from transformers import AutoTokenizer

import data
import toy
from evaluation import check_data
from infra import video as media
from infra.distributed import run_main

ROOT = Path(__file__).parent.parent.parent
ROW = {
    "problem_id": 7, "problem": "How many squares are there?", "data_type": "image",
    "problem_type": "numerical", "options": None, "solution": "<answer>3</answer>",
    "path": "./Math/Multimath-300k/a.png", "data_source": "Multimath-300k",
}  # fmt: skip
VIDEO = {**ROW, "data_type": "video", "path": "./STAR/clip.mp4", "data_source": "STAR/x"}
CHOICE = {"problem_type": "multiple choice", "options": ["A. left", "B. right"]}
LEFT = {**CHOICE, "solution": "<answer>A</answer>"}
ROWS = [
    ROW,
    {**ROW, **LEFT, "mine": [1, {"k": None}]},
    {**VIDEO, **LEFT},
    {**VIDEO, "problem_type": "free-form", "solution": "a square moves"},
    {**VIDEO, **LEFT, "path": "./CLEVRER/gone.mp4", "data_source": "CLEVRER"},
    {**ROW, "path": "./Chart/ChartQA/garbage.png", "data_source": "ChartQA"},
    {key: value for key, value in ROW.items() if key != "solution"},
    {**ROW, "problem": "What is <|image_pad|>?"},
    {**ROW, **CHOICE, "solution": "<answer>left</answer>"},
    {**ROW, "problem_type": "OCR", "path": "./own/b.png", "data_source": "mine/b=1"},
    {**ROW, "path": "./Knowledge/ArxivQA/images/c.png", "data_source": ""},
]  # fmt: skip
CANNOT_BE_READ, WRONG, MISSING, UNDECODABLE = 6, (7, 8), 4, 5
LIMITS = check_data.CheckConfig().limits()


@pytest.fixture
def folder(tmp_path):
    """rows.json and its files: images of 56 x 84 pixels (6 tokens), a video of 4 frames of 56 x 56
    (8 tokens) in another container than the row says, an image that is none, one file missing."""
    image = Image.new("RGB", (84, 56), (200, 10, 10))
    for row in (ROWS[0], ROWS[9], ROWS[10]):
        (tmp_path / row["path"]).parent.mkdir(parents=True, exist_ok=True)
        image.save(tmp_path / row["path"])
    (tmp_path / "STAR").mkdir()
    frames = np.arange(4, dtype=np.uint8)[:, None, None, None] * np.full((4, 56, 56, 3), 50, "u1")
    toy.write_y4m(tmp_path / "STAR/clip.y4m", frames, fps=2)
    (tmp_path / "Chart/ChartQA").mkdir(parents=True)
    (tmp_path / "Chart/ChartQA/garbage.png").write_bytes(b"not an image")
    write(tmp_path / "rows.json", ROWS)
    return tmp_path


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    """A model folder without weights: the toy's tokenizer, and room for 250 positions."""
    path = tmp_path_factory.mktemp("model")
    ids = toy.make_tokenizer(path)
    settings = {
        "model_type": "qwen2_5_vl", "max_position_embeddings": 250,
        "vision_config": {"tokens_per_second": 2}, "eos_token_id": ids["<|im_end|>"],
        "pad_token_id": ids["<|endoftext|>"],
    }  # fmt: skip
    (path / "config.json").write_text(json.dumps(settings))
    return path


def write(path, rows):
    path.write_text(json.dumps(rows), encoding="utf-8")
    return path


def check(capsys, *argv):
    """(exit code, printed report, error lines) of `python data.py *argv`, in this process."""
    code = 0
    try:
        run_main(lambda: check_data.main([str(word) for word in argv]))
    except SystemExit as stopped:
        code = stopped.code
    printed = capsys.readouterr()
    errors = [line for line in printed.err.splitlines() if line.startswith("error: ")]
    return code, printed.out, errors


def table(report, title):
    """{name: (count, share)} of one of the report's tables."""
    lines = report.split(f"\n{title} ")[1].split("\n\n")[0].splitlines()[1:]
    cells = (re.fullmatch(r"  (.*?) +([\d,]+) +([\d.]+)%( .*)?", line) for line in lines)
    return {cell[1]: (int(cell[2]), float(cell[3])) for cell in cells}


# -------------------------------------------------------------------------------------- the report


def test_a_file_with_every_fault(folder, capsys):
    file = folder / "rows.json"
    code, report, errors = check(capsys, file, "--decode", "all")
    assert (code, errors) == (1, [])
    assert report.startswith(f"{file}, --stage rl\n")
    assert table(report, "category") == {
        "Math (Image)": (4, 40.0), "General (Video)": (3, 30.0), "Chart (Image)": (1, 10.0),
        "other": (1, 10.0), "Knowledge (Image)": (1, 10.0),
    }  # fmt: skip
    assert table(report, "data_source") == {
        "Multimath-300k": (4, 40.0), "STAR/x": (2, 20.0), "CLEVRER": (1, 10.0),
        "ChartQA": (1, 10.0), "mine/b=1": (1, 10.0), "Knowledge/ArxivQA": (1, 10.0),
    }  # fmt: skip
    assert table(report, "data_type") == {"image": (7, 70.0), "video": (3, 30.0)}
    assert re.search(r"\n  Math \(Image\) .* 40.0%   paper: 37k\n", report)
    faults = report.split("\nNot readable, or of no use: 3 rows\n")[1].splitlines()[:3]
    for row, fault, words in zip(
        (CANNOT_BE_READ, *WRONG), faults,
        ("'solution' must be a text", "<|image_pad|> as text", "must be one option letter"),
        strict=True,
    ):  # fmt: skip
        assert f"row {row}" in fault and words in fault
    gone, garbage = folder / "CLEVRER/gone.mp4", folder / "Chart/ChartQA/garbage.png"
    assert (f"\nFiles missing: 1 rows\n  {gone}: No such file or directory"
            "\n\nNot decodable, or too long for the model: 1 rows\n"
            f"  {garbage}: ") in report  # fmt: skip
    assert report.endswith("\n\n6 of 11 rows would be used\n")


def test_as_a_process(folder):
    command = [sys.executable, str(ROOT / "data.py"), "rows.json"]
    done = subprocess.run(command, cwd=folder, capture_output=True, text=True)
    assert done.returncode == 1
    assert done.stdout.startswith("rows.json, --stage rl")
    assert done.stdout.endswith("\n7 of 11 rows would be used\n")  # not decoded: one more
    assert "Traceback" not in done.stderr


def test_a_long_list_of_faults_is_cut(folder, capsys):
    rows = [{**ROW, "solution": f"word {number}"} for number in range(25)]
    code, report, _ = check(capsys, write(folder / "bad.json", rows))
    assert code == 1
    assert report.count(" a numerical solution must be a number") == 20
    assert "row 19 (problem 7)" in report
    assert "\n  .. and 5 more\n" in report
    assert report.endswith("\n0 of 25 rows would be used\n")


# --------------------------------------------------------------------------------------- the stage

THOUGHT = {"process": "<think>So.</think>"}


@pytest.mark.parametrize(
    ("rows", "flags", "stage", "used"),
    [
        pytest.param([{**ROW, **THOUGHT}] * 2 + [ROW], [], "sft", 2, id="most"),
        pytest.param([{**ROW, "process": " "}], [], "rl", 1, id="blank"),
        pytest.param([{**ROW, **THOUGHT, "solution": "x"}], ["--stage", "rl"], "rl", 0, id="rl-x"),
    ],
)
def test_the_stage_decides_which_rows_are_of_use(folder, capsys, rows, flags, stage, used):
    code, report, _ = check(capsys, write(folder / "stage.json", rows), *flags)
    assert f", --stage {stage}\n" in report
    assert report.endswith(f"\n{used} of {len(rows)} rows would be used\n")
    assert code == (used < len(rows))


# ----------------------------------------------------------------------- sources and categories


@pytest.mark.parametrize(
    ("data_type", "path", "data_source", "category", "source"),
    [
        pytest.param("video", "./STAR/videos/a.mp4", "STAR/x", "General (Video)", "STAR/x",
                     id="official-video"),
        pytest.param("image", "./Knowledge/ArxivQA/images/a.jpg", "", "Knowledge (Image)",
                     "Knowledge/ArxivQA", id="official-without-source"),
        pytest.param("image", "OCR.jpg", "", "other", "(no source)", id="a-file"),
        pytest.param("video", "Math/b.mp4", "mine", "other", "mine", id="video-of-math"),
    ],
)  # fmt: skip
def test_category_and_source(tmp_path, data_type, path, data_source, category, source):
    row = {**ROW, "data_type": data_type, "path": path, "data_source": data_source}
    (sample,) = data.load_samples(write(tmp_path / "one.json", [row]))
    assert check_data.category_of(sample, tmp_path) == category
    assert check_data.source_of(sample, tmp_path) == source


# ------------------------------------------------------------------------------------------- files


class CountingPool:
    """In DecoderPool's place: nothing is decoded before its result is asked for."""

    def __init__(self, num_workers, timeout):
        self.asked, self.open, self.most_open = [], 0, 0
        CountingPool.last = self

    def submit(self, kind, path, **limits):
        future, pool = Future(), self
        self.asked.append(Path(path).stem)
        self.open += 1
        self.most_open = max(self.most_open, self.open)

        def result():
            pool.open -= 1
            if path.endswith("13.png"):
                raise media.MediaError(f"{path}: not an image")
            return np.zeros((1, 28, 28, 3), np.uint8), 0.0

        future.result = result
        return future

    def __enter__(self):
        return self

    def __exit__(self, *_):
        pass


@pytest.fixture
def many(tmp_path, monkeypatch):
    """40 rows about 20 files, of which 13.png cannot be decoded."""
    monkeypatch.setattr(check_data, "DecoderPool", CountingPool)
    for number in range(20):
        (tmp_path / f"{number}.png").write_text("x")
    rows = [{**ROW, "path": f"{number % 20}.png", "data_source": "own"} for number in range(40)]
    return write(tmp_path / "rows.json", rows)


def test_few_files_wait_at_a_time_and_each_is_decoded_once(many, capsys):
    code, report, _ = check(capsys, many, "--decode", "all", "--num_workers", "3")
    pool = CountingPool.last
    assert pool.asked == [str(number) for number in range(20)]
    assert (pool.most_open, pool.open) == (6, 0)
    assert code == 1
    assert "Not decodable, or too long for the model: 2 rows\n" in report
    assert report.endswith("\n38 of 40 rows would be used\n"), "two rows ask about 13.png"


def test_decode_draws_files_by_the_seed(many, capsys):
    def asked(*argv):
        check(capsys, many, "--decode", *argv)
        return CountingPool.last.asked

    first = asked("5", "--seed", "1")
    assert len(set(first)) == 5
    assert asked("5", "--seed", "1") == first
    assert set(asked("5", "--seed", "2")) != set(first)
    assert len(asked("20")) == len(asked("99")) == 20


# ----------------------------------------------------------------------------------------- lengths


def expected_lengths(folder, model, rows, num_new_tokens):
    tokenizer = AutoTokenizer.from_pretrained(model)
    samples, _ = data.check_rows(folder / "rows.json")
    return sorted(num_new_tokens + len(data.make_prompt(s, tokenizer, **LIMITS).input_ids)
                  for s in samples if s.row in rows)  # fmt: skip


def test_lengths_of_decoded_rows(folder, model, capsys):
    argv = ["--decode", "all", "--model", model, "--max_new_tokens", "100"]
    code, report, _ = check(capsys, folder / "rows.json", *argv)
    lengths = expected_lengths(folder, model, (0, 1, 2, 3, 9, 10), 100)
    assert f"6 other rows: median {lengths[2]}, max {lengths[5]}\n" in report
    assert (code, report.splitlines()[-1]) == (1, "6 of 11 rows would be used")


def test_the_response_needs_room_too(folder, model, capsys):
    longest = expected_lengths(folder, model, (0, 1, 2, 3, 9, 10), 0)[-1]
    rows = [row for number, row in enumerate(ROWS) if number in (0, 1, 2, 3, 9, 10)]
    file = write(folder / "good.json", rows)
    for excess in (0, 1):
        flags = ["--model", model, "--max_new_tokens", 250 - longest + excess, "--decode", "all"]
        code, report, _ = check(capsys, file, *flags)
        assert code == excess
        assert ("take 251 positions, the model has 250\n" in report) == bool(excess)


LONG = {**ROW, "process": f"<think>{'3 ' * 300}</think>"}


@pytest.mark.parametrize(
    ("row", "reason"),
    [
        pytest.param({**ROW, "process": "<think>Three.</think>"}, None, id="fits"),
        pytest.param(LONG, "positions, the model has 250", id="long"),
        pytest.param({**ROW, "process": "<|endoftext|>"}, "which are never sampled", id="pad"),
    ],
)
def test_sft_counts_and_reads_the_response(folder, model, capsys, row, reason):
    file = write(folder / "one.json", [row])
    code, report, _ = check(capsys, file, "--stage", "sft", "--model", model)
    assert code == (reason is not None)
    if reason:
        assert "too long for the model: 1 rows\n  row 0 (problem 7): its " in report
        assert reason in report


# --------------------------------------------------------------------------------------- the subset


def take(capsys, folder, out, *argv):
    code, report, errors = check(capsys, folder / "rows.json", "--out", out, "--take", *argv)
    assert errors == []
    return json.loads(Path(out).read_text()), code, report


def test_take_writes_usable_rows_as_they_are_in_the_files_order(folder, capsys):
    out = folder / "small.json"
    rows, code, report = take(capsys, folder, out, "STAR/x=1", "mine/b=1=1", "Multimath-300k=2")
    assert rows[:2] == [ROWS[0], ROWS[1]]
    assert rows[2] in (ROWS[2], ROWS[3])
    assert rows[3:] == [ROWS[9]]
    assert code == 1, "of the whole file, of which some rows cannot be used"
    assert f"\n4 rows written; to train on them: --data {out} --data_root {folder}\n" in report
    assert report.endswith("\n7 of 11 rows would be used\n")
    assert sorted(path.name for path in folder.iterdir() if path.is_file()) == [
        "rows.json", "small.json"
    ]  # fmt: skip


def test_take_is_drawn_by_the_seed_and_by_source(many, capsys):
    def drawn(*argv):
        out = many.parent / "out.json"
        rows, _, _ = take(capsys, many.parent, out, *argv)
        out.unlink()
        return [row["problem_id"] for row in rows]

    rows = [{**ROW, "problem_id": number, "path": f"{number % 20}.png",
             "data_source": "ab"[number % 2]} for number in range(40)]  # fmt: skip
    write(many, rows)
    first = drawn("a=8", "--seed", "1")
    assert len(set(first)) == 8, "without replacement"
    assert first == sorted(first)
    assert drawn("a=8", "--seed", "1") == first
    assert drawn("a=8", "--seed", "2") != first
    both = drawn("b=3", "a=8", "--seed", "1")
    assert [number for number in both if number % 2 == 0] == first
    assert len(both) == 11
    assert drawn("a=20") == list(range(0, 40, 2))


@pytest.mark.parametrize(
    ("words", "message"),
    [
        pytest.param(["Multimath-300k=3"], "only 2 rows of Multimath-300k can be used", id="few"),
        pytest.param(["Stars=1"], "--take Stars: no such source; known are CLEVRER, ChartQA, "
                     "Knowledge/ArxivQA, Multimath-300k, STAR/x, mine/b=1", id="unknown"),
        pytest.param(["STAR/x=0"], "--take takes SOURCE=N", id="zero"),
        pytest.param(["STAR/x=1", "STAR/x=1"], "--take names STAR/x twice", id="twice"),
    ],
)  # fmt: skip
def test_what_cannot_be_taken(folder, capsys, words, message):
    out = folder / "small.json"
    code, _, errors = check(capsys, folder / "rows.json", "--out", out, "--take", *words)
    assert code == 2
    assert len(errors) == 1
    assert message in errors[0]
    assert not out.exists()


def test_out_is_refused_before_any_work(folder, capsys):
    argv = ["--take", "STAR/x=1", "--out", folder / "rows.json"]
    code, report, errors = check(capsys, folder / "rows.json", *argv)
    assert (code, report, len(errors)) == (2, "", 1)
    assert "exists already" in errors[0]


# ------------------------------------------------------------------------------------------- flags


@pytest.mark.parametrize(
    ("argv", "words"),
    [
        pytest.param([], ["FILE"], id="no-file"),
        pytest.param(["nowhere.json"], ["nowhere.json does not exist"], id="missing-file"),
        pytest.param(["rows.json", "--oops=1"], ["'--oops=1'"], id="unknown"),
        pytest.param(["rows.json", "--data_root", "nowhere"], ["nowhere is not a"], id="root"),
        pytest.param(["rows.json", "--decode", "0"], ["--decode", "'0'"], id="decode-0"),
        pytest.param(["rows.json", "--model", "nowhere"], ["--model nowhere"], id="model"),
        pytest.param(["rows.json", "--take", "STAR/x=1"], ["--out"], id="take-alone"),
    ],
)
def test_a_wrong_command_line_is_one_line(folder, capsys, monkeypatch, argv, words):
    monkeypatch.chdir(folder)
    code, report, errors = check(capsys, *argv)
    assert (code, report, len(errors)) == (2, "", 1)
    assert [word for word in words if word not in errors[0]] == []
