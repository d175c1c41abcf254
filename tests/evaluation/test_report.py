"""report.py: the gap files of two orders, Table 1, what the console shows of doubtful groups."""

import json

import pytest

from evaluation.report import markdown_table, percent, print_summary, write_gaps
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
    return {
        "model": model, "benchmark": name, "order": order, "settings": {"max_frames": frames},
        "n": len(scores), "accuracy": None, "by_type": {},
        "scores": score_benchmark(name, make_items(scores)),
    }  # fmt: skip


# ------------------------------------------------------------------------------------ gap files


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
    assert "ordered minus shuffled frames" in capsys.readouterr().out

    write_results(tmp_path, "ordered", "new", [0.0, 1.0])  # one order alone, of the new model
    write_gaps(tmp_path, "eval_mmvu", ["ordered"], quiet=True)
    assert not gap.exists()
    assert "gap.shuffled.json is deleted" in capsys.readouterr().out

    write_results(tmp_path, "shuffled", "new", [0.0, 0.0])
    write_gaps(tmp_path, "eval_mmvu", ["reversed"])
    assert not gap.exists(), "of two orders that were not evaluated now"
    write_gaps(tmp_path, "eval_mmvu", ["shuffled"])
    assert json.loads(gap.read_text())["provenance"]["model_fingerprint"] == "new"


# ---------------------------------------------------------------------------------- the console


def test_percent_is_a_score_or_a_signed_difference_with_its_interval():
    assert percent({"score": 0.5, "interval": [0.25, 1.0]}) == "50.0 [25.0, 100.0]"
    part = {"difference": 0.125, "interval": [-0.25, 0.5]}
    assert percent(part, "difference") == "+12.5 [-25.0, +50.0]"
    assert percent({"score": None, "interval": None}) == "-"


def test_the_console_says_why_there_is_no_mean_of_groups(capsys):
    print_summary(summary("eval_mvbench", [1.0, 0.0, None]))
    lines = capsys.readouterr().out.splitlines()
    (own,) = [line for line in lines if line.startswith("  benchmark's score")]
    assert own.split()[2:5] == ["-", "over", "3"]
    assert lines[lines.index(own) + 1].startswith("    no mean of groups: row 0, problem_id 1 ")
    assert "    1 x missing" in lines


# -------------------------------------------------------------------------------------- Table 1


def test_table_1():
    summaries = [
        summary("eval_mmvu", [1.0, 0.0, 1.0]),
        summary("eval_videomme", [1.0, 0.0]),
        summary("eval_mvbench", [1.0, None, None], frames=32),
        summary("eval_mmvu", [None, None], frames=32),
        summary("eval_mmvu", [0.0], order="shuffled"),
        summary("test", [1.0]),
    ]
    expected = r"""
| Model | Frames | VSI-Bench | VideoMMMU | MMVU (mc) | MVBench | TempCompass | VideoMME (wo sub) |
| --- | ---: | ---: | ---: | ---: | ---: | ---: | ---: |
| runs/rl/model | 16 | - | - | 66.7 | - | - | 50.0 |
| runs/rl/model | 32 | - | - | 0.0\* | 33.3\* | - | - |
| runs/rl/model (shuffled) | 16 | - | - | 0.0 | - | - | - |

\* runs/rl/model, 32 frames, MVBench: 2 of 3 items are unusable and count 0

\* runs/rl/model, 32 frames, MMVU (mc): 2 of 2 items are unusable and count 0
"""
    assert markdown_table(summaries) == expected.lstrip()


def test_table_of_other_files_alone():
    with pytest.raises(UserError, match="one of vsibench, .* but of mine, yours$"):
        markdown_table([summary(name, [1.0]) for name in ("yours", "mine", "mine")])


def test_table_with_two_scores_for_a_cell():
    with pytest.raises(UserError, match="two summaries of mmvu for runs/rl/model with 16 frames"):
        markdown_table([summary("eval_mmvu", [1.0]), summary("eval_mmvu", [0.0])])
