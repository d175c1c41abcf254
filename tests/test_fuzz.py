"""Whatever a policy emits or a data file holds: a defined reward, or an error naming the row."""

import json
import math
import random
from pathlib import Path

from data import load_samples, question_text
from rewards import accuracy_reward, check_solution, extract_answer, format_reward

SOLUTIONS = {
    "multiple choice": "<answer>B</answer>", "numerical": "<answer>1,234.5</answer>",
    "OCR": "<answer>No Entry after 9 pm</answer>",
    "free-form": "<answer>A rabbit stretches its arms and looks around.</answer>",
    "regression": "<answer>12.5</answer>",
}  # fmt: skip
PIECES = (
    "<think>", "</think>", "<answer>", "</answer>", "<answer>" * 50, "\n" * 768, " ", "B", "(b)",
    "A or B", "1,234.5", "-1e400", "1_000", "sNaN", "Infinity", "0x1F", "½", "１２", "12.5 metres",
    "\ud800", "\x00", "\ufffd\ufffd", "\u202e", "e\u0301" * 40, "😀" * 30, "的" * 200,
    "word " * 300,
    "9" * 500, "." * 400, "<|im_end|>", "<|video_pad|>", "</answer><answer>", "{question}",
    "y" * 900,
)  # fmt: skip


def random_response(generator: random.Random) -> str:
    """Up to 20,000 characters of tags, numbers, broken text and noise."""
    parts = []
    for _ in range(generator.randrange(1, 40)):
        if generator.random() < 0.2:
            length = generator.randrange(300)
            parts.append("".join(chr(generator.randrange(0x110000)) for _ in range(length)))
        else:
            parts.append(generator.choice(PIECES) * generator.choice((1, 1, 1, 3)))
    text = "".join(parts)
    if generator.random() < 0.5:
        text = f"<think>{text[:200]}</think>\n<answer>{text[200:]}</answer>"
    return text[:20_000]


def check_response(text: str) -> None:
    answer = extract_answer(text)
    assert answer is None or answer == answer.strip()
    assert format_reward(text) in (0.0, 1.0)
    for problem_type, solution in SOLUTIONS.items():
        reward = accuracy_reward(text, solution, problem_type)
        assert math.isfinite(reward) and 0 <= reward <= 1
        assert answer is not None or reward == 0
    line = json.dumps({"text": text})  # of rollouts.jsonl
    assert "\n" not in line and isinstance(json.loads(line)["text"], str)


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


def test_any_response_has_a_reward():
    generator = random.Random(1)
    for _ in range(1000):
        check_response(random_response(generator))


def test_any_row_is_a_sample_or_a_named_error(tmp_path):
    generator = random.Random(2)
    usable = sum(check_row(random_row(generator), tmp_path) for _ in range(1000))
    assert 100 < usable < 900  # both happen
