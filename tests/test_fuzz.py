"""Whatever a data file holds: a sample, or an error that names the row."""

import json
import random
from pathlib import Path

from data import load_samples, question_text
from rewards import check_solution

VALUES = (
    None, "", " ", "x", 0, -1, 1.5, True, [], ["A. a", "B. b"], [1], [None], {}, {"a": [1]},
    "video",
    "Video", "frame", "multiple choice", "OCR", "./a/b.mp4", "../x.mp4", "/etc/passwd", "a\x00b",
    "\ud800", "<|video_pad|>", "<answer>D</answer>", "1e400", "9" * 5000, "x" * 20_000, 10**400,
)  # fmt: skip
GOOD = {
    "problem_id": 1, "problem": "Which way?", "data_type": "video", "options": ["A. a", "B. b"],
    "problem_type": "multiple choice", "solution": "<answer>A</answer>", "path": "./a.mp4",
    "data_source": "x", "process": "<think>So.</think>",
}  # fmt: skip


def random_row(generator: random.Random) -> object:
    if generator.random() < 0.05:
        return generator.choice(VALUES)
    row = dict(GOOD)
    for _ in range(generator.randrange(1, 4)):
        key = generator.choice([*GOOD, "new key"])
        if generator.random() < 0.2:
            row.pop(key, None)
        else:
            row[key] = generator.choice(VALUES)
    return row


def check_row(row: object, folder: Path) -> bool:
    """Whether the row is usable; an error must name the file and the row."""
    file = folder / "rows.json"
    file.write_text(json.dumps([GOOD, row]))
    try:
        samples = load_samples(file)
    except ValueError as error:
        assert str(file) in str(error) and "row 1" in str(error), error
        return False
    try:
        check_solution(samples[1].solution, samples[1].problem_type)
    except ValueError as error:
        assert str(error)
    assert question_text(samples[1])
    return True


def test_any_row_is_a_sample_or_a_named_error(tmp_path):
    generator = random.Random(2)
    usable = sum(check_row(random_row(generator), tmp_path) for _ in range(1000))
    assert 100 < usable < 900  # both happen
