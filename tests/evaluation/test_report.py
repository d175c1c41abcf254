"""report.py: the gap files of two orders, a benchmark on the console, Table 1. What --compare
prints is in test_eval.py."""

import json

import pytest

from evaluation.report import print_summary, print_table, write_gaps
from evaluation.scores import score_benchmark
from infra.errors import UserError


def make_items(scores) -> list[dict]:
    return [
        {
            "row": row, "problem_id": row + 1, "problem": "What?", "problem_type": "numerical",
            "options": [], "path": f"/data/{row}.mp4", "answer": "3", "score": score,
            "score_paper": score, "error": "missing" if score is None else None, "extra": {},
        }
        for row, score in enumerate(scores)
    ]  # fmt: skip


def summary(name, scores, model="runs/rl/model", frames=16, order="ordered") -> dict:
    items = make_items(scores)
    return {
        "model": model, "benchmark": name, "order": order, "settings": {"max_frames": frames},
        "n": len(scores), "accuracy": None, "scores": score_benchmark(name, items),
        "unusable": [item for item in items if item["score"] is None],
    }  # fmt: skip


def write_results(folder, order: str, fingerprint: str, scores) -> None:
    provenance = {"model_fingerprint": fingerprint, "max_frames": 16, "order": order}
    about = {**summary("eval_mmvu", scores, order=order), "provenance": provenance}
    (folder / f"eval_mmvu.{order}.summary.json").write_text(json.dumps(about))
    lines = [json.dumps(item) + "\n" for item in make_items(scores)]
    (folder / f"eval_mmvu.{order}.jsonl").write_text("".join(lines))


def test_a_gap_file_does_not_outlive_its_results(tmp_path, capsys):
    gap = tmp_path / "eval_mmvu.gap.shuffled.json"
    write_results(tmp_path, "ordered", "old", [1.0, 1.0])
    write_results(tmp_path, "shuffled", "old", [1.0, 0.0])
    write_gaps(tmp_path, "eval_mmvu", ["ordered", "shuffled"])
    assert json.loads(gap.read_text())["overall"]["benchmark"]["difference"] == 0.5
    assert "benchmark's score  +50.0 [+0.0, +100.0]" in capsys.readouterr().out

    write_results(tmp_path, "ordered", "new", [0.0, 1.0])  # one order alone, of the new model
    write_gaps(tmp_path, "eval_mmvu", ["ordered"], quiet=True)
    assert not gap.exists()
    assert "gap.shuffled.json is deleted" in capsys.readouterr().out

    write_results(tmp_path, "shuffled", "new", [0.0, 0.0])
    write_gaps(tmp_path, "eval_mmvu", ["shuffled"])
    assert json.loads(gap.read_text())["provenance"]["model_fingerprint"] == "new"


def test_the_console_shows_both_scores_their_groups_and_what_is_unusable(capsys):
    print_summary(summary("test", [1.0, 0.0, None]))
    printed = capsys.readouterr().out
    assert "benchmark's score  33.3 [0.0, 100.0]" in printed
    assert "paper's score      33.3 [" in printed
    assert "    problem_type   numerical                    33.3 [" in printed
    assert "1 items cannot be used and count 0; without them: benchmark 50.0 [" in printed
    assert "    row 2 (problem 3): missing\n" in printed
    print_summary(summary("eval_mvbench", [1.0]))
    assert "the task of row 0 is unknown" in capsys.readouterr().out


def test_table_1(tmp_path, capsys):
    def write(name, *summaries):
        (tmp_path / name).mkdir()
        for number, content in enumerate(summaries):
            (tmp_path / name / f"{number}.summary.json").write_text(json.dumps(content))
        return str(tmp_path / name)

    a = write(
        "a", summary("eval_mmvu", [1.0, 0.0, 1.0]),
        summary("eval_mvbench", [1.0, None, None], frames=32), {"judge": "of a judge"},
    )  # fmt: skip
    b = write("b", summary("eval_mmvu", [0.0], order="shuffled"), summary("test", [1.0]))
    expected = r"""
| Model | Frames | VSI-Bench | VideoMMMU | MMVU (mc) | MVBench | TempCompass | VideoMME (wo sub) |
| --- | ---: | ---: | ---: | ---: | ---: | ---: | ---: |
| runs/rl/model | 16 | - | - | 66.7 | - | - | - |
| runs/rl/model | 32 | - | - | - | 33.3\* | - | - |
| runs/rl/model (shuffled) | 16 | - | - | 0.0 | - | - | - |

\* with unusable items, which count 0
"""
    print_table([a, b])
    assert capsys.readouterr().out == expected.lstrip()
    again = write("again", summary("eval_mmvu", [1.0]))
    with pytest.raises(UserError, match="two summaries of mmvu for runs/rl/model with 16 frames"):
        print_table([a, again])
    with pytest.raises(UserError, match="below none is of one of vsibench, "):
        print_table(["none"])
