"""check_data.py: `python data.py FILE`, on small files whose counts are worked out by hand."""

import json
import re
from concurrent.futures import Future
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from transformers import AutoTokenizer

import data
import toy
from evaluation import check_data
from infra.distributed import run_main
from infra.errors import MediaError

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


def test_a_long_list_of_faults_is_cut(folder, capsys):
    rows = [{**ROW, "solution": f"word {number}"} for number in range(25)]
    code, report, _ = check(capsys, write(folder / "bad.json", rows))
    assert code == 1
    assert report.count(" a numerical solution must be a number") == 20
    assert "row 19 (problem 7)" in report
    assert "\n  .. and 5 more\n" in report
    assert report.endswith("\n0 of 25 rows would be used\n")


THOUGHT = {"process": "<think>So.</think>"}


@pytest.mark.parametrize(
    ("rows", "flags", "stage", "used"),
    [
        pytest.param([{**ROW, **THOUGHT}] * 2 + [{**ROW, "process": " "}], [], "sft", 2, id="most"),
        pytest.param([{**ROW, **THOUGHT, "solution": "x"}], ["--stage", "rl"], "rl", 0, id="rl-x"),
    ],
)
def test_the_stage_decides_which_rows_are_of_use(folder, capsys, rows, flags, stage, used):
    code, report, _ = check(capsys, write(folder / "stage.json", rows), *flags)
    assert f", --stage {stage}\n" in report
    assert report.endswith(f"\n{used} of {len(rows)} rows would be used\n")
    assert code == (used < len(rows))


# ------------------------------------------------------------------------------------------- files


class CountingPool:
    """In DecoderPool's place: nothing is decoded before its result is asked for."""

    def __init__(self, num_workers, timeout):
        self.asked, self.open, self.most_open = [], 0, 0
        CountingPool.last = self

    def submit(self, kind, path, **limits):
        def result():
            self.open -= 1
            if path.endswith("13.png"):
                raise MediaError(f"{path}: not an image")
            return np.zeros((1, 28, 28, 3), np.uint8), 0.0

        self.asked.append(Path(path).stem)
        self.open += 1
        self.most_open = max(self.most_open, self.open)
        future = Future()
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


def test_the_lengths_of_decoded_prompts_and_room_for_the_response(folder, model, capsys):
    tokenizer = AutoTokenizer.from_pretrained(model)
    rows = [ROWS[number] for number in (0, 1, 2, 3, 9, 10)]
    file = write(folder / "good.json", rows)
    lengths = sorted(len(data.make_prompt(sample, tokenizer, **LIMITS).input_ids)
                     for sample in data.load_samples(file))  # fmt: skip
    for excess in (0, 1):
        room = 250 - lengths[-1] + excess
        flags = ["--model", model, "--max_new_tokens", room, "--decode", "all"]
        code, report, _ = check(capsys, file, *flags)
        assert code == excess
        assert ("take 251 positions, the model has 250\n" in report) == bool(excess)
        if not excess:
            assert f"6 other rows: median {lengths[2] + room}, max 250\n" in report


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

    write(many, [{**ROW, "problem_id": number, "path": f"{number % 20}.png",
                  "data_source": "ab"[number % 2]} for number in range(40)])  # fmt: skip
    first = drawn("a=8", "--seed", "1")
    assert len(set(first)) == 8, "without replacement"
    assert first == sorted(first)
    assert drawn("a=8", "--seed", "1") == first
    assert drawn("a=8", "--seed", "2") != first
    both = drawn("b=3", "a=8", "--seed", "1")
    assert [number for number in both if number % 2 == 0] == first
    assert len(both) == 11
    assert drawn("a=20") == list(range(0, 40, 2))


# ------------------------------------------------------------------------------------------- flags


WRONG_COMMANDS = {
    "": "FILE",
    "nowhere.json": "nowhere.json does not exist",
    "rows.json --oops=1": "'--oops=1'",
    "rows.json --decode 0": "--decode takes .* '0'",
    "rows.json --model nowhere": "--model nowhere",
    "rows.json --take STAR/x=1": "--out",
    "rows.json --out o --take STAR/x=0": "--take takes SOURCE=N",
    "rows.json --out o --take STAR/x=1 STAR/x=1": "--take names STAR/x twice",
    "rows.json --out rows.json --take STAR/x=1": "rows.json exists already",
    "rows.json --out o --take Stars=1": "no such source; known are CLEVRER, ChartQA, Knowledge",
    "rows.json --out o --take Multimath-300k=3": "only 2 rows of Multimath-300k can be used",
}


@pytest.mark.parametrize("command", WRONG_COMMANDS)
def test_a_wrong_command_is_one_line_and_writes_nothing(folder, capsys, monkeypatch, command):
    monkeypatch.chdir(folder)
    code, _, errors = check(capsys, *command.split())
    assert (code, len(errors)) == (2, 1)
    assert re.search(WRONG_COMMANDS[command], errors[0])
    assert not Path("o").exists()
