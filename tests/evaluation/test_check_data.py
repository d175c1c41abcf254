"""check_data.py: `python data.py FILE`, on small files whose counts are worked out by hand."""

import dataclasses
import json
import os
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
import train_rl
from evaluation import check_data
from infra import video as media
from infra.distributed import run

ROOT = Path(__file__).parent.parent.parent
ROW = {
    "problem_id": 7, "problem": "How many squares are there?", "data_type": "image",
    "problem_type": "numerical", "options": None, "solution": "<answer>3</answer>",
    "path": "./Math/Multimath-300k/a.png", "data_source": "Multimath-300k",
}  # fmt: skip
CLIP = {**ROW, "data_type": "video", "path": "./STAR/clip.mp4", "data_source": "STAR/x"}
CHOICE = {"problem_type": "multiple choice", "options": ["A. left", "B. right"]}
LEFT = {**CHOICE, "solution": "<answer>A</answer>"}
ROWS = [
    ROW,
    {**ROW, **LEFT, "mine": [1, {"k": None}]},
    {**CLIP, **LEFT},
    {**CLIP, "problem_type": "free-form", "solution": "a square moves"},
    {**CLIP, **LEFT, "path": "./CLEVRER/gone.mp4", "data_source": "CLEVRER"},
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
    """rows.json and its files: pictures of 56 x 84 pixels (6 tokens), a clip of 4 frames of 56 x 56
    (8 tokens) in another container than the row says, a picture that is none, one file missing."""
    picture = Image.new("RGB", (84, 56), (200, 10, 10))
    for row in (ROWS[0], ROWS[9], ROWS[10]):
        (tmp_path / row["path"]).parent.mkdir(parents=True, exist_ok=True)
        picture.save(tmp_path / row["path"])
    (tmp_path / "STAR").mkdir()
    frames = np.arange(4, dtype=np.uint8)[:, None, None, None] * np.full((4, 56, 56, 3), 50, "u1")
    toy.write_y4m(tmp_path / "STAR/clip.y4m", frames, fps=2)
    (tmp_path / "Chart/ChartQA").mkdir(parents=True)
    (tmp_path / "Chart/ChartQA/garbage.png").write_bytes(b"no picture")
    write(tmp_path / "rows.json", ROWS)
    return tmp_path


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    """A model folder without weights: the toy's tokenizer, and room for 150 positions."""
    path = tmp_path_factory.mktemp("model")
    toy.make_tokenizer(path)
    settings = {"model_type": "qwen2_5_vl", "max_position_embeddings": 150}
    (path / "config.json").write_text(json.dumps(settings))
    return path


def write(path, rows):
    path.write_text(json.dumps(rows), encoding="utf-8")
    return path


def check(capsys, *argv):
    """(exit code, printed report, error lines) of `python data.py *argv`, in this process."""
    code = 0
    try:
        run(lambda: check_data.main([str(word) for word in argv]))
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
    assert report.startswith(f"{file}: 11 rows (--stage rl, assumed: 0 rows have a process)\n"
                             "Rows that cannot be used: 3\n")  # fmt: skip
    reasons = report.splitlines()[2:5]
    for row, reason, words in zip(
        (CANNOT_BE_READ, *WRONG), reasons,
        ("'solution' must be a text", "<|image_pad|> as text", "must be one option letter"),
        strict=True,
    ):  # fmt: skip
        assert reason.startswith(f"  {file}, row {row}")
        assert words in reason

    assert table(report, "category") == {
        "Math (Image)": (4, 40.0), "General (Video)": (3, 30.0), "Chart (Image)": (1, 10.0),
        "other: mine/b=1": (1, 10.0), "Knowledge (Image)": (1, 10.0),
    }  # fmt: skip
    assert table(report, "data_source") == {
        "Multimath-300k": (4, 40.0), "STAR/x": (2, 20.0), "CLEVRER": (1, 10.0),
        "ChartQA": (1, 10.0), "mine/b=1": (1, 10.0), "Knowledge/ArxivQA": (1, 10.0),
    }  # fmt: skip
    assert table(report, "data_type") == {"image": (7, 70.0), "video": (3, 30.0)}
    assert table(report, "problem_type") == {
        "multiple choice": (4, 40.0), "numerical": (4, 40.0), "free-form": (1, 10.0),
        "OCR": (1, 10.0),
    }  # fmt: skip
    assert re.search(r"\n  Math \(Image\) .* 40.0%   paper: 37k\n", report)

    gone, garbage = folder / "CLEVRER/gone.mp4", folder / "Chart/ChartQA/garbage.png"
    assert (f"\nFiles that are missing: 1 of 6\n  CLEVRER: 1\n    {gone}: No such file or directory"
            "\n\nFiles that cannot be decoded: 1 of 5 that were tried\n  ChartQA: 1\n    "
            f"{garbage}: ") in report  # fmt: skip
    assert report.endswith("\n\n6 of 11 rows would be used\n")


def test_without_faults_the_exit_code_is_0(folder, capsys):
    good = [row for number, row in enumerate(ROWS) if number in (0, 1, 2, 3, 9, 10)]
    code, report, errors = check(capsys, write(folder / "good.json", good), "--decode", "all")
    assert (code, errors) == (0, [])
    assert "Rows that cannot be used: 0\n" in report
    assert report.endswith("\n6 of 6 rows would be used\n")


def test_undecodable_files_are_not_known_without_decode(folder, capsys):
    code, report, _ = check(capsys, folder / "rows.json")
    assert code == 1
    assert "decoded" not in report
    assert report.endswith("\n7 of 11 rows would be used\n")


def test_as_a_process(folder):
    command = [sys.executable, str(ROOT / "data.py"), "rows.json"]
    done = subprocess.run(command, cwd=folder, capture_output=True, text=True)
    assert done.returncode == 1
    assert done.stdout.startswith("rows.json: 11 rows")
    assert done.stdout.endswith("\n7 of 11 rows would be used\n")
    assert "Traceback" not in done.stderr


def test_a_long_list_of_faults_is_cut(folder, capsys):
    rows = [{**ROW, "solution": f"word {number}"} for number in range(25)]
    code, report, _ = check(capsys, write(folder / "bad.json", rows))
    assert code == 1
    assert report.count(" a numerical solution must be a number") == 20
    assert "row 19 (problem 7)" in report
    assert "\n  .. and 5 more\n" in report
    assert report.endswith("\n0 of 25 rows would be used\n")


def test_no_row_can_be_read(folder, capsys):
    (folder / "rows.jsonl").write_text('{"a": 1}\n{"a": \n')
    code, report, errors = check(capsys, folder / "rows.jsonl", "--decode", "3")
    assert (code, errors) == (1, [])
    assert "row 1 is not JSON" in report
    assert "row 0: 'path' must be a text" in report
    assert report.endswith("\n0 of 2 rows would be used\n")


def test_check_rows_returns_what_load_samples_reads_and_names(folder):
    lines = [json.dumps(row) for row in ROWS]
    lines.insert(2, "{")
    file = folder / "rows.jsonl"
    file.write_text("\n".join(lines))
    samples, faults = data.check_rows(file)
    assert [sample.row for sample in samples] == [0, 1, 3, 4, 5, 6, 8, 9, 10, 11]
    assert [fault.split(":")[0].split(" is ")[0] for fault in faults] == [
        f"{file}, row 2", f"{file}, row 7"
    ]  # fmt: skip
    with pytest.raises(ValueError, match="row 2 is not JSON") as caught:
        data.load_samples(file)
    assert str(caught.value) == faults[0]
    good = write(folder / "good.json", ROWS[:6])
    assert data.check_rows(good) == (data.load_samples(good), [])


# --------------------------------------------------------------------------------------- the stage

THOUGHT = {"process": "<think>So.</think>"}


@pytest.mark.parametrize(
    ("rows", "flags", "header", "used"),
    [
        pytest.param([{**ROW, **THOUGHT}] * 2 + [ROW], [], "sft, assumed: 2 rows", 2, id="most"),
        pytest.param([{**ROW, **THOUGHT}, ROW], [], "rl, assumed: 1 rows", 2, id="half"),
        pytest.param([{**ROW, "process": " "}], [], "rl, assumed: 0 rows", 1, id="blank"),
        pytest.param([{**ROW, **THOUGHT}, ROW], ["--stage", "sft"], "sft)", 1, id="sft"),
        pytest.param([{**ROW, **THOUGHT, "solution": "x"}], [], "sft, assumed", 1, id="sft-x"),
        pytest.param([{**ROW, **THOUGHT, "solution": "x"}], ["--stage", "rl"], "rl)", 0, id="rl-x"),
    ],
)
def test_the_stage_decides_which_rows_are_of_use(folder, capsys, rows, flags, header, used):
    code, report, _ = check(capsys, write(folder / "stage.json", rows), *flags)
    assert f" rows (--stage {header}" in report
    assert report.endswith(f"\n{used} of {len(rows)} rows would be used\n")
    assert code == (used < len(rows))


@pytest.mark.parametrize(
    ("change", "flags", "training"),
    [
        pytest.param({"solution": "three"}, [], train_rl.require_solution, id="rl"),
        pytest.param({}, ["--stage", "sft"], data.require_process, id="sft"),
        pytest.param({"problem": "<|video_pad|>"}, [], data.require_no_vision_tokens, id="token"),
    ],
)
def test_a_row_is_refused_in_the_trainings_words(folder, capsys, change, flags, training):
    file = write(folder / "one.json", [{**ROW, **change}])
    (sample,) = data.load_samples(file)
    with pytest.raises(ValueError, match="row 0") as caught:
        training(sample)
    assert f"  {file}, {caught.value}\n" in check(capsys, file, *flags)[1]


# ----------------------------------------------------------------------- sources and categories


@pytest.mark.parametrize(
    ("data_type", "path", "data_source", "category", "source"),
    [
        pytest.param(
            "video", "./LLaVA-Video-178K/videos/a.mp4", "LLaVA-Video-178K/30_60_s_youtube_v0_1",
            "General (Video)", "LLaVA-Video-178K/30_60_s_youtube_v0_1", id="official-clip",
        ),
        pytest.param("image", "./Knowledge/ArxivQA/images/a.jpg", "", "Knowledge (Image)",
                     "Knowledge/ArxivQA", id="official-without-source"),
        pytest.param("image", "Spatial/x/a.jpg", "new", "Spatial (Image)", "new", id="new-source"),
        pytest.param("image", "images/a.jpg", "TQA", "Knowledge (Image)", "TQA", id="by-source"),
        pytest.param("image", "images/a.jpg", "EXAMS-V/History", "Knowledge (Image)",
                     "EXAMS-V/History", id="by-part-of-source"),
        pytest.param("image", "x/OCR/a.jpg", "", "OCR (Image)", "x/OCR", id="deeper-folder"),
        pytest.param("image", "OCR.jpg", "", "other: (no source)", "(no source)", id="a-file"),
        pytest.param("image", "a/b/c/d.jpg", "", "other: a/b", "a/b", id="two-folders"),
        pytest.param("image", "a/b.jpg", "mine", "other: mine", "mine", id="unknown"),
        pytest.param("video", "Math/b.mp4", "mine", "other: mine", "mine", id="clip-of-math"),
        pytest.param("image", "STAR/b.jpg", "mine", "other: mine", "mine", id="frame-of-star"),
    ],
)  # fmt: skip
def test_category_and_source(tmp_path, data_type, path, data_source, category, source):
    row = {**ROW, "data_type": data_type, "path": path, "data_source": data_source}
    (sample,) = data.load_samples(write(tmp_path / "one.json", [row]))
    assert check_data.category_of(sample, tmp_path) == category
    assert check_data.source_of(sample, tmp_path) == source


@pytest.mark.parametrize("root", [".", "Video-R1-data", "Video-R1-data/Math"])
def test_sources_where_the_root_holds_or_is_an_official_folder(tmp_path, root):
    place = tmp_path / "Video-R1-data/Math/Multimath-300k"
    place.mkdir(parents=True)
    (place / "a.png").touch()
    file = write(tmp_path / "one.json", [{**ROW, "data_source": ""}])
    (sample,) = data.load_samples(file, tmp_path / root)
    assert Path(sample.path) == place / "a.png"
    assert check_data.category_of(sample, tmp_path / root) == "Math (Image)"
    assert check_data.source_of(sample, tmp_path / root).endswith("Multimath-300k")


def test_the_categories_are_the_papers():
    sizes = {name: int(count.removesuffix("k")) for name, (_, count, _) in
             check_data.CATEGORIES.items()}  # fmt: skip
    assert sizes == {
        "General (Video)": 116, "General (Image)": 15, "Chart (Image)": 21, "OCR (Image)": 16,
        "Math (Image)": 37, "Knowledge (Image)": 37, "Spatial (Image)": 20,
    }  # fmt: skip
    names = sum(len(names) for _, _, names in check_data.CATEGORIES.values())
    assert names == len(check_data.CATEGORY_OF), "a name stands for two categories"


# ------------------------------------------------------------------------------------------- files


def test_empty_files_and_folders_are_missing(folder, capsys):
    (folder / "own/empty.png").touch()
    (folder / "own/folder.png").mkdir()
    paths = ["own/b.png", "own/empty.png", "own/folder.png", "own/empty.png"]
    rows = [{**ROW, "path": path, "data_source": "own"} for path in paths]
    code, report, _ = check(capsys, write(folder / "own.json", rows))
    assert code == 1
    assert "Files that are missing: 2 of 3\n  own: 2\n" in report
    assert "empty.png: empty, zero bytes" in report
    assert "folder.png: a directory" in report
    assert report.endswith("\n1 of 4 rows would be used\n")


def test_missing_files_of_many_jobs(folder, capsys, monkeypatch):
    monkeypatch.setattr(check_data, "FILES_PER_JOB", 2)
    code, report, _ = check(capsys, folder / "rows.json")
    assert code == 1
    assert "Files that are missing: 1 of 6\n" in report


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
                raise media.MediaError(f"{path}: no picture")
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
    assert (pool.most_open, pool.open) == (7, 0)  # 2 x 3, and the one that is put in
    assert code == 1
    assert "Files that cannot be decoded: 1 of 20 that were tried\n  own: 1\n" in report
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


@pytest.mark.parametrize(
    ("data_type", "shape"),
    [
        pytest.param("image", (1, 28, 28, 3), id="smallest"),
        pytest.param("image", (1, 84, 56, 3), id="picture"),
        pytest.param("video", (1, 56, 56, 3), id="one-frame"),
        pytest.param("video", (4, 56, 84, 3), id="clip"),
        pytest.param("video", (5, 56, 84, 3), id="odd"),
    ],
)
def test_a_length_is_that_of_make_prompt(tmp_path, model, data_type, shape):
    """The cheap count, text once with one vision token and the frames' shape, is the real one."""
    row = {**ROW, **CHOICE, "solution": "A", "data_type": data_type}
    (sample,) = data.load_samples(write(tmp_path / "one.json", [row]))
    tokenizer = AutoTokenizer.from_pretrained(model)
    prompt = data.make_prompt(sample, tokenizer, np.zeros(shape, np.uint8))
    vision = check_data.num_vision_tokens(shape)
    assert vision == prompt.num_vision_tokens
    text = check_data.num_text_tokens(sample, tokenizer, data.TEMPLATE)
    assert text + vision == len(prompt.input_ids)


@pytest.mark.parametrize(
    ("changes", "data_type", "most"),
    [
        # 200 to 1: floor(sqrt(16 x 200)) = 56 tokens in a row, one high.
        pytest.param({"image_max_pixels": 16 * 784}, "image", 56, id="thin"),
        pytest.param({"max_pixels": 16 * 784, "max_frames": 9}, "video", 4 * 56, id="thin-clip"),
        pytest.param({"max_pixels": 400 * 784, "max_frames": 1}, "video", 400, id="one-frame"),
        # Enlarged to 64 tokens at a shape of r to 1: ceil(8 / sqrt(r)) x ceil(8 sqrt(r)), which is
        # 1 x 114 at r = 200, 8 x 10 at 1.3, 4 x 17 at 4.1, and most a little below 64: 2 x 64.
        pytest.param({"min_pixels": 64 * 784, "image_max_pixels": 64 * 784}, "image", 128, id="up"),
    ],
)
def test_most_vision_tokens(changes, data_type, most):
    limits = {**LIMITS, **changes}
    assert check_data.most_vision_tokens(data_type, limits) == most
    pixels = limits["max_pixels" if data_type == "video" else "image_max_pixels"]
    sides = np.random.default_rng(0).integers(1, 3000, (3000, 2)).tolist()
    sizes = [media.smart_resize(h, w, limits["min_pixels"], pixels, 28) for h, w in sides
             if max(h, w) <= 200 * min(h, w)]  # fmt: skip
    frames = limits["max_frames"] if data_type == "video" else 1
    shapes = [(max(frames // 2 * 2, 1), h, w, 3) for h, w in sizes]
    assert max(map(check_data.num_vision_tokens, shapes)) <= most


def test_lengths_of_decoded_rows(folder, model, capsys):
    code, report, _ = check(capsys, folder / "rows.json", "--decode", "all", "--model", model)
    tokenizer = AutoTokenizer.from_pretrained(model)
    samples, _ = data.check_rows(folder / "rows.json")
    used = [s for s in samples if s.row not in (*WRONG, MISSING, UNDECODABLE)]
    lengths = sorted(len(data.make_prompt(s, tokenizer, **LIMITS).input_ids) for s in used)
    assert len(lengths) == 6
    assert (f"\nTokens of prompts, of the decoded files: 6 rows\n  min {lengths[0]}   "
            f"median {lengths[2]}   95th percentile {lengths[5]}   max {lengths[5]}\n"
            "  rows beyond the model's 150 positions: 0\n") in report  # fmt: skip
    assert (code, report.splitlines()[-1]) == (1, "6 of 11 rows would be used")


def test_rows_of_files_that_were_not_drawn_are_not_measured(many, model, capsys):
    report = check(capsys, many, "--decode", "5", "--model", model)[1]
    drawn = set(CountingPool.last.asked) - {"13"}
    assert f"of the decoded files: {2 * len(drawn)} rows" in report


def test_lengths_without_decoding(folder, model, capsys):
    code, report, _ = check(capsys, folder / "rows.json", "--model", model)
    assert "\nTokens of prompts, their text alone: 7 rows\n" in report
    most = {kind: check_data.most_vision_tokens(kind, LIMITS) for kind in ("image", "video")}
    assert (f"\n  image: at most {most['image']:,} vision tokens more, whatever its shape\n"
            f"  video: at most {most['video']:,} vision tokens more, whatever its shape\n"
            ) in report  # fmt: skip
    assert code == 1


def test_quantiles_and_prompts_that_are_too_long(many, model, capsys, monkeypatch):
    """Texts of 5, 10 .. 200 tokens; the model has 150 positions."""
    monkeypatch.setattr(check_data, "num_text_tokens", lambda sample, *_: 5 * (sample.row + 1))
    code, report, _ = check(capsys, many, "--model", model)
    assert "\n  min 5   median 100   95th percentile 190   max 200\n" in report
    assert "\n  rows beyond the model's 150 positions: 10\n    row 30: 155 tokens\n" in report
    assert (code, report.splitlines()[-1]) == (1, "30 of 40 rows would be used")


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


def test_a_subset_in_another_folder_is_used_with_the_printed_flags(folder, capsys, tmp_path):
    out = tmp_path / "elsewhere/small.json"
    out.parent.mkdir()
    _, _, report = take(capsys, folder, out, "Multimath-300k=2")
    assert f"relative to the data root, which is not {out.parent}" in report
    printed = re.search(r"--data (\S+) --data_root (\S+)", report)
    samples = data.load_samples(*printed.groups())
    assert [os.path.isfile(sample.path) for sample in samples] == [True, True]


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


def test_take_leaves_out_what_was_found_undecodable(folder, capsys):
    rows, _, _ = take(capsys, folder, folder / "one.json", "ChartQA=1")
    assert rows == [ROWS[UNDECODABLE]]
    code, _, (error,) = check(capsys, folder / "rows.json", "--decode", "all", "--take",
                              "ChartQA=1", "--out", folder / "two.json")  # fmt: skip
    assert code == 2
    assert error == "error: --take ChartQA=1: only 0 rows of ChartQA can be used"
    assert not (folder / "two.json").exists()


@pytest.mark.parametrize(
    ("words", "message"),
    [
        pytest.param(["Multimath-300k=3"], "only 2 rows of Multimath-300k can be used", id="few"),
        pytest.param(["CLEVRER=1"], "only 0 rows of CLEVRER can be used", id="missing"),
        pytest.param(["Stars=1"], "--take Stars: no such source; known are CLEVRER, ChartQA, "
                     "Knowledge/ArxivQA, Multimath-300k, STAR/x, mine/b=1", id="unknown"),
        pytest.param(["STAR/x"], "--take takes SOURCE=N", id="no-number"),
        pytest.param(["=3"], "--take takes SOURCE=N", id="no-source"),
        pytest.param(["STAR/x=0"], "--take takes SOURCE=N", id="zero"),
        pytest.param(["STAR/x=-1"], "--take takes SOURCE=N", id="negative"),
        pytest.param(["STAR/x=all"], "--take takes SOURCE=N", id="word"),
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


@pytest.mark.parametrize(
    ("out", "message"),
    [
        pytest.param("rows.json", "exists already", id="the-file-itself"),
        pytest.param("STAR", "exists already", id="folder"),
        pytest.param("nowhere/small.json", "nowhere is no folder", id="no-folder"),
        pytest.param("rows.json/small.json", "rows.json is no folder", id="file-as-folder"),
    ],
)
def test_out_is_refused_before_any_work(folder, capsys, out, message):
    before = (folder / "rows.json").read_bytes()
    argv = ["--take", "STAR/x=1", "--out", folder / out]
    code, report, errors = check(capsys, folder / "rows.json", *argv)
    assert (code, report, len(errors)) == (2, "", 1)
    assert message in errors[0]
    assert (folder / "rows.json").read_bytes() == before


# ------------------------------------------------------------------------------------------- flags


@pytest.mark.parametrize(
    ("argv", "words"),
    [
        pytest.param([], ["FILE"], id="no-file"),
        pytest.param(["nowhere.json"], ["nowhere.json does not exist"], id="missing-file"),
        pytest.param(["rows.json", "more.json"], ["'more.json'"], id="two-files"),
        pytest.param(["rows.json", "--decod", "3"], ["'--decod'"], id="abbreviated"),
        pytest.param(["rows.json", "--oops=1"], ["'--oops=1'"], id="unknown"),
        pytest.param(["rows.json", "--data-root", "x"], ["'--data-root'"], id="kebab-case"),
        pytest.param(["rows.json", "--data_root", "nowhere"], ["nowhere is not a"], id="root"),
        pytest.param(["rows.json", "--decode", "0"], ["--decode", "'0'"], id="decode-0"),
        pytest.param(["rows.json", "--decode", "-3"], ["--decode"], id="decode-negative"),
        pytest.param(["rows.json", "--decode", "some"], ["--decode", "'some'"], id="decode-word"),
        pytest.param(["rows.json", "--decode"], ["--decode"], id="decode-without-value"),
        pytest.param(["rows.json", "--stage", "eval"], ["--stage takes rl or sft"], id="stage"),
        pytest.param(["rows.json", "--seed", "-1"], ["--seed"], id="seed"),
        pytest.param(["rows.json", "--max_frames", "0"], ["--max_frames"], id="frames"),
        pytest.param(["rows.json", "--max_frames", "x"], ["--max_frames", "x"], id="no-number"),
        pytest.param(["rows.json", "--model", "nowhere"], ["--model nowhere"], id="model"),
        pytest.param(["rows.json", "--prompt_template", "t"], ["--prompt_template t"], id="text"),
        pytest.param(["rows.json", "--take", "STAR/x=1"], ["--out"], id="take-alone"),
        pytest.param(["rows.json", "--out", "small.json"], ["--take"], id="out-alone"),
    ],
)
def test_a_wrong_command_line_is_one_line(folder, capsys, monkeypatch, argv, words):
    monkeypatch.chdir(folder)
    code, report, errors = check(capsys, *argv)
    assert (code, report, len(errors)) == (2, "", 1)
    assert [word for word in words if word not in errors[0]] == []


def test_a_template_with_a_vision_token_is_one_line(folder, model, capsys):
    template = folder / "template.txt"
    template.write_text("<|image_pad|> {question}")
    argv = ["--model", model, "--prompt_template", template]
    code, _, errors = check(capsys, folder / "rows.json", *argv)
    assert (code, len(errors)) == (2, 1)
    assert "its prompt must hold one" in errors[0]


def test_help_names_every_flag(capsys):
    code, text, _ = check(capsys, "--help")
    assert code == 0
    listed = set(re.findall(r"^  --(\w+)", text, re.MULTILINE))
    assert listed == {item.name for item in dataclasses.fields(check_data.CheckConfig)}
    assert "FILE" in text
    assert "Exit code: 0 every row would be used" in " ".join(text.split())
