"""What the study keeps of a run: a small JSON file, made from metrics.jsonl and eval.py's results.

Imports nothing of the root, and neither matplotlib nor torch.
"""

import hashlib
import json
import os
import subprocess
from importlib import metadata
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
PROTOCOL = ROOT / "experiments/PROTOCOL.md"
CURVES = ("reward", "accuracy", "accuracy_shuffled", "temporal", "temporal_earned",
          "temporal_effect", "completion_length", "zero_std", "kl")  # fmt: skip
NUM_WINDOWS = 20  # of a curve: each of its points is the mean over a window of steps


def by_kind(items: list[dict]) -> dict[str, dict]:
    """n, mean score and mean response length of the usable items by kind, and of all: "disagrees"
    of the source shortcut/disagrees, "image" of shortcut/image/colour; elsewhere the source."""
    kinds: dict[str, list[dict]] = {"all": []}
    for item in items:
        if item["score"] is not None:
            kind = (item["data_source"].split("/") + [""])[1] or item["data_source"] or "unnamed"
            kinds.setdefault(kind, []).append(item)
            kinds["all"].append(item)
    return {kind: {"n": len(those), "score": mean([item["score"] for item in those]),
                   "length": mean([item["length"] for item in those])}
            for kind, those in kinds.items() if those}  # fmt: skip


def curves(metrics: list[dict]) -> dict[str, list]:
    """Each of CURVES, a mean over each of NUM_WINDOWS windows of steps; None where it is null in
    all of a window. step: the last of each window."""
    ends = sorted({round(len(metrics) * k / NUM_WINDOWS) for k in range(1, NUM_WINDOWS + 1)} - {0})
    windows = [metrics[start:end] for start, end in zip([0, *ends], ends, strict=False)]
    found = {"step": [window[-1]["step"] for window in windows]}
    for key in CURVES:
        values = [[line[key] for line in window if line[key] is not None] for window in windows]
        found[key] = [mean(those) if those else None for those in values]
    return found


def mean(values: list[float]) -> float:
    return round(sum(values) / len(values), 5)


def about() -> dict:
    """What a result depends on beside its flags."""
    git = subprocess.run(["git", "-C", str(ROOT), "describe", "--always", "--dirty", "--abbrev=40"],
                         capture_output=True, text=True)  # fmt: skip
    names = ("torch", "transformers", "numpy")
    return {
        "protocol_sha256": hashlib.sha256(PROTOCOL.read_bytes()).hexdigest(),
        "commit": git.stdout.strip() or "unknown",
        "versions": {name: metadata.version(name) for name in names},
    }


def read_lines(file: Path) -> list[dict]:
    """The objects of a .jsonl file, without a last line that a kill has torn."""
    return [json.loads(line) for line in file.read_text(encoding="utf-8").split("\n")[:-1]]


def write_json(file: Path, content: object) -> None:
    """Write a file that is whole or not there."""
    file.parent.mkdir(parents=True, exist_ok=True)
    unfinished = file.with_name(f".{file.name}")
    unfinished.write_text(json.dumps(content) + "\n", encoding="utf-8")
    os.replace(unfinished, file)


def once(folder: Path) -> None:
    """test_once.json beside the bed's test.json: each item once, not several times in a row."""
    rows = json.loads((folder / "test.json").read_text(encoding="utf-8"))
    write_json(folder / "test_once.json", list({row["problem_id"]: row for row in rows}.values()))
