"""annotate.py: the rules by hand, the best try, the counts, annotations that are killed, and the
cold start on what is written."""

import contextlib
import dataclasses
import json
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from conftest import ROOT
from standin import run_script

import annotate
import eval as evaluation
import train_sft
from annotate import (
    AnnotateConfig,
    best_try,
    broken_rule,
    repeated_share,
    tries_record,
)
from data import Sample, load_samples, require_no_vision_tokens, response_ids
from evaluation import answering
from evaluation.answering import Answer
from infra.distributed import process_group
from infra.errors import UserError
from infra.video import DecoderPool
from model import load_model, load_tokenizer
from sampling import Rollout

CONFIG = AnnotateConfig(min_accuracy=0.6, min_length=10, max_length=50, max_repetition=0.3)
TOY_RUN = ROOT / "runs/toy"

pytestmark = pytest.mark.usefixtures("one_process")


# ---------------------------------------------------------------------------------------- rules


def test_repeated_share():
    assert repeated_share([1, 2, 3, 1, 2, 4], length=2) == pytest.approx(1 / 5)  # 12 23 31 12 24
    assert repeated_share([*range(8), *range(8)], length=8) == pytest.approx(1 / 9)


def made(text="<think>It goes up.</think>\n<answer>A</answer>", **changes):
    """A try that passes, at every limit of CONFIG, but for the changes."""
    attempt = {"text": text, "length": 50, "accuracy": 0.6, "repetition": 0.3}
    return attempt | changes


@pytest.mark.parametrize(
    "attempt, expected",
    [
        pytest.param(made(), None, id="at-the-limits"),
        pytest.param(made("<think>a</think><answer>A"), "format", id="cut"),
        pytest.param(made("<think> \n</think><answer>A</answer>"), "format", id="blank-thought"),
        pytest.param(
            made("<think>a<|im_start|>b</think><answer>A</answer>"), "format", id="control-token"
        ),
        pytest.param(made(accuracy=0.599), "accuracy", id="not-correct-enough"),
        pytest.param(made(length=9), "length", id="too-short"),
        pytest.param(made(length=51), "length", id="too-long"),
        pytest.param(made(repetition=0.301), "repetition", id="repeats-itself"),
    ],
)
def test_the_rule_that_a_try_breaks(attempt, expected):
    assert broken_rule(attempt, CONFIG) == expected


@pytest.mark.parametrize(
    "tries, place, broken",
    [
        pytest.param([made(), made(length=20), made()], 0, None, id="the-first-of-equals"),
        pytest.param(
            [made(), made(accuracy=0.9), made(accuracy=0.9, length=9)], 1, None, id="most-correct"
        ),
        pytest.param(
            [made(accuracy=1.0, length=9), made(accuracy=0.7)], 1, None,
            id="one-that-passes-before-one-more-correct",
        ),
        pytest.param(
            [made(length=9), made(repetition=0.9), made("", accuracy=1.0)], 1, "repetition",
            id="furthest-through-the-rules",
        ),
    ],
)  # fmt: skip
def test_the_best_try(tries, place, broken):
    best, rule = best_try(tries, CONFIG)
    assert best is tries[place]
    assert rule == broken


def test_a_record_by_hand():
    """Two tries, the second with four tokens of seven: the padding after them does not count."""
    sample = Sample(
        problem_id="p", problem="?", data_type="image", problem_type="regression", options=(),
        solution="<answer>10</answer>", path="x.png", data_source="", process="", row=4,
    )  # fmt: skip
    ids = torch.tensor([[5] * 20, [1, 2, 3, 4] + [0] * 16])
    mask = torch.arange(20) < torch.tensor([[20], [4]])
    texts = ["<think>a</think><answer>9</answer>", "<answer>7"]
    rollout = Rollout(None, ids, mask, torch.tensor([True, False]), mask.float(), texts)
    assert tries_record(Answer(sample, rollout)) == {
        "row": 4, "problem_id": "p", "problem_type": "regression", "error": None,
        "path": "x.png", "file_state": None, "tries": [
            # 13 runs of 8 tokens, all the same.
            {"text": texts[0], "length": 20, "accuracy": 0.9,
             "repetition": pytest.approx(12 / 13)},
            {"text": texts[1], "length": 4, "accuracy": 0.0, "repetition": 0.0},
        ],
    }  # fmt: skip
    lost = tries_record(Answer(sample, None, "gone", [7, 8]))
    assert (lost["error"], lost["file_state"], lost["tries"]) == ("gone", [7, 8], [])


# ---------------------------------------------------------------------------- a file of seven rows

MISSING = 2  # the row whose video is not there
GOOD, WRONG = "<think>It is {right}.</think>\n<answer>{right}</answer>", "<answer>?</answer>"
# Two tries of each row: what is said, and in how many tokens.
SAID = [
    [(WRONG, 20), (GOOD, 20)],
    [("<think>I guess.</think><answer>Z</answer>", 20), (WRONG, 20)],
    [(GOOD, 20), (GOOD, 20)],
    [(GOOD, 20), ("<think>Again.</think> <answer>{right}</answer>", 20)],
    [(GOOD, 51), (GOOD, 9)],
    [("<think>“é”\u2028</think><answer>{right}</answer>", 30), (GOOD, 20)],
    [(WRONG, 3), (WRONG, 60)],
]
KEPT = {0: "It is {right}.", 3: "It is {right}.", 5: "“é”\u2028"}


def right(row):
    return row["solution"].removeprefix("<answer>").removesuffix("</answer>")


@pytest.fixture(scope="module")
def rows_folder(toy_folder, tmp_path_factory):
    """A folder with rl.json and the files that its rows name; the first and the fourth ask about
    one video, so that they share a batch."""
    folder, rows = tmp_path_factory.mktemp("rows"), []
    toys = toy_folder / "runs/toy/data"
    left = json.loads((toys / "rl.json").read_text())
    for kind in ("direction", "colour", "describe", "direction", "count", "word", "width"):
        row = next(row for row in left if row["data_source"] == f"toy/{kind}")
        left.remove(row)
        rows.append(row)
    rows[3]["path"] = rows[0]["path"]
    rows[MISSING]["path"] = "./rl/none.y4m"
    rows[0] |= {"problem_id": "ü", "problem_type": "Multiple Choice", "difficulty": [1, None]}
    rows[4]["solution"] = right(rows[4])  # without tags
    del rows[5]["process"], rows[5]["options"]
    (folder / "rl").symlink_to(toys / "rl")
    (folder / "rl.json").write_text(json.dumps(rows))
    return folder


@pytest.fixture(scope="module")
def model(base):
    return load_model(base, torch.device("cpu"))


@pytest.fixture(scope="module")
def pool():
    with DecoderPool(1, 60) as pool:
        yield pool


class Killed(BaseException):
    """Nothing catches it, as nothing catches SIGKILL."""


@pytest.fixture
def teacher(model, pool, monkeypatch):
    """A teacher that says SAID; the rows that it was asked, batch by batch. `teacher.stop_after`
    batches it is killed."""

    class Asked(list):
        stop_after = None

    def say(model, tokenizer, prompts, keys, *_):
        if asked.stop_after is not None and len(asked) == asked.stop_after:
            raise Killed
        asked.append([prompt.sample.row for prompt in prompts])
        rollouts = []
        for prompt, those in zip(prompts, keys, strict=True):
            said = SAID[prompt.sample.row]
            assert len(those) == len(said)
            lengths = torch.tensor([length for _, length in said])
            ids = torch.arange(60).expand(len(said), -1)
            mask = ids < lengths[:, None]
            word = right({"solution": prompt.sample.solution})
            texts = [text.replace("{right}", word) for text, _ in said]
            rollouts.append(Rollout(prompt, ids, mask, lengths < 60, mask.float(), texts))
        return rollouts

    asked = Asked()
    monkeypatch.setattr(answering, "sample_groups", say)
    monkeypatch.setattr(answering, "load_for_answers", lambda *_: model)
    monkeypatch.setattr(answering, "DecoderPool", lambda *_: contextlib.nullcontext(pool))
    return asked


@pytest.fixture
def config(base, rows_folder, tmp_path):
    return AnnotateConfig(
        model=base, data=str(rows_folder / "rl.json"), out=str(tmp_path / "new/cot.json"),
        num_samples=2, batch_size=2, max_new_tokens=60, max_frames=8, min_length=10, max_length=50,
    )  # fmt: skip


def annotate_here(config):
    if dist.is_initialized():  # left by one that was killed
        dist.destroy_process_group()
    with process_group() as world:
        annotate.annotate(config, world)


def contents(config):
    """All files beside --out, without the name of their folder."""
    folder = Path(config.out).parent
    return {path.name: path.read_text().replace(str(folder), "")
            for path in folder.rglob("*") if path.is_file()}  # fmt: skip


def test_what_is_written_is_what_the_cold_start_learns(config, teacher, rows_folder, capsys):
    annotate_here(config)
    assert sorted(sum(teacher, [])) == [0, 1, 3, 4, 5, 6]
    assert teacher[0] == [0, 3], "they share a video"
    rows = json.loads(Path(config.data).read_text())
    thoughts = {n: thought.replace("{right}", right(rows[n])) for n, thought in KEPT.items()}
    expected = [
        rows[number] | {"process": f"<think>{thought}</think>"}
        for number, thought in thoughts.items()
    ]
    written = json.loads(Path(config.out).read_text())
    assert written == expected
    assert [list(row) for row in written] == [list(row) for row in expected], "keys in their order"
    assert set(contents(config)) == {
        "cot.json", "cot.json.report.json", "cot.json.tries.jsonl", "cot.json.tries.summary.json",
    }  # fmt: skip
    report = json.loads(Path(f"{config.out}.report.json").read_text())
    assert report["rows"]["all"] == {"rows": 7, "kept": 3, "format": 1, "accuracy": 1, "length": 1,
                                     "repetition": 0, "unusable": 1}  # fmt: skip
    assert report["settings"] == dataclasses.asdict(config)
    tries = json.loads(Path(f"{config.out}.tries.summary.json").read_text())
    assert {"model_fingerprint", "num_samples", "template"} <= set(tries["provenance"])
    printed = capsys.readouterr().out
    table = [line.split() for line in printed.splitlines()]
    assert ["multiple", "choice", "3", "2", "0", "1", "0", "0", "0"] in table
    assert ["all", "7", "3", "1", "1", "1", "0", "1"] in table
    assert f"train_sft.py --data {config.out} --data_root {rows_folder}" in printed

    samples, tokenizer = load_samples(config.out, rows_folder), load_tokenizer(config.model)
    for sample, (number, thought) in zip(samples, thoughts.items(), strict=True):
        assert Path(sample.path).is_file()
        require_no_vision_tokens(sample)
        ids = response_ids(sample, tokenizer)
        target = f"<think>{thought}</think>\n<answer>{right(rows[number])}</answer>"
        assert tokenizer.decode(ids[:-1]) == target
        assert ids[-1] == tokenizer.eos_token_id


# ------------------------------------------------------------------ kills, and what is there before


def test_an_annotation_that_is_killed_resumes(config, teacher, tmp_path):
    elsewhere = dataclasses.replace(config, out=str(tmp_path / "whole/cot.json"))
    annotate_here(elsewhere)
    teacher.clear()
    teacher.stop_after = 2
    with pytest.raises(Killed):
        annotate_here(config)
    assert not Path(config.out).exists()
    teacher.stop_after = None
    annotate_here(config)
    assert sorted(sum(teacher, [])) == [0, 1, 3, 4, 5, 6], "no row is asked twice"
    assert contents(config) == contents(elsewhere)


def test_what_is_there_is_replaced_on_request_only(config, teacher):
    """A finished annotation, a file of somebody else; tries of other settings likewise."""
    out = Path(config.out)
    out.parent.mkdir()
    out.write_text("[]")
    with pytest.raises(UserError, match="cot.json is there: .*--overwrite true"):
        config.check()
    out.unlink()
    annotate_here(config)
    before = contents(config)
    with pytest.raises(UserError, match="cot.json.* seed 0 and not 1: .*--overwrite true"):
        annotate_here(dataclasses.replace(config, seed=1))
    assert contents(config) == before


def test_other_rules_filter_the_same_tries(config, teacher):
    annotate_here(config)
    before = contents(config)
    teacher.clear()
    again = dataclasses.replace(config, overwrite=True)
    again.check()
    annotate_here(dataclasses.replace(again, min_length=5))
    assert len(json.loads(Path(config.out).read_text())) == 4  # and the try of 9 tokens
    annotate_here(again)
    del before["cot.json.report.json"]
    assert contents(config).items() >= before.items()
    assert teacher == [], "the model is not asked"


# ---------------------------------------------------------------------------------------- commands


@pytest.mark.parametrize(
    "argv, words",
    [
        pytest.param("--model m", "--data", id="no-data"),
        pytest.param("--model m --data d", "--out", id="no-out"),
        pytest.param("--model m --data d --out tests", "--out tests is there", id="folder"),
        pytest.param("--model m --data d --out x/../d", "the same file", id="onto-the-data"),
        pytest.param("--model m --data none.json --out o", "none.json", id="no-data-file"),
        pytest.param("--model m --data d --out o --min_length 999", "--min_length", id="window"),
    ],
)
def test_a_wrong_command_is_one_line(argv, words, monkeypatch):
    monkeypatch.chdir(ROOT)
    with pytest.raises(UserError, match=words) as caught:
        run_script(annotate, *argv.split())
    assert "\n" not in str(caught.value)


def test_the_toy_without_a_trained_model(toy_folder, tmp_path, monkeypatch, capsys):
    (tmp_path / "runs").mkdir()
    (tmp_path / "runs/toy").symlink_to(toy_folder / "runs/toy")
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UserError, match="run train_rl.py"):
        run_script(annotate)
    assert annotate.REAL_COMMAND in capsys.readouterr().out.splitlines()[0]


@pytest.mark.slow
@pytest.mark.skipif(
    not (TOY_RUN / "eval").is_dir(), reason="the README's first command has not been run"
)
def test_the_chain_annotate_learn_evaluate(tmp_path, monkeypatch):
    """The RL model annotates rows of the RL set; the SFT model, which has seen neither that set nor
    a reward, learns from the annotation alone, and is better for it. All in this process.

    Not the untrained model: the clips of the RL set are the hard ones (toy.draw_clip), and in as
    few steps as this it learns from them what to say and not what to look at.
    """
    monkeypatch.chdir(tmp_path)
    rows = json.loads((TOY_RUN / "data/rl.json").read_text())[:320]
    Path("rl.json").write_text(json.dumps(rows))
    media = ["--data_root", TOY_RUN / "data", "--max_frames", "8", "--num_workers", "1"]
    said = ["--max_new_tokens", "40", "--batch_size", "64"]
    run_script(annotate, "--model", TOY_RUN / "rl/model", "--data", "rl.json", "--out", "cot.json",
               *media, *said, "--min_length", "8", "--num_samples", "2")  # fmt: skip
    counts = json.loads(Path("cot.json.report.json").read_text())["rows"]["all"]
    assert counts["kept"] > 0.75 * counts["rows"]
    assert counts["unusable"] == 0
    run_script(train_sft, "--model", TOY_RUN / "sft/model", "--data", "cot.json", *media,
               "--output_dir", "learnt", "--max_steps", "24", "--learning_rate", "3e-4",
               "--warmup_steps", "5", "--max_grad_norm", "1", "--prompts_per_step", "32",
               "--prompts_per_rank", "32", "--activation_checkpointing", "false")  # fmt: skip
    run_script(evaluation, "--model", "learnt/model", "--data", TOY_RUN / "data/test.json", *media,
               *said, "--order", "ordered,shuffled")  # fmt: skip

    def score(folder, order):
        (file,) = folder.glob(f"test.{order}.summary.json")
        return json.loads(file.read_text())["by_type"]["multiple choice"]["score"]

    before, after = TOY_RUN / "eval/runs--toy--sft--model", tmp_path / "runs/eval/learnt--model"
    gain = {order: score(after, order) - score(before, order)
            for order in ("ordered", "shuffled")}  # fmt: skip
    assert gain["ordered"] > 0.05
    assert gain["ordered"] - gain["shuffled"] > 0.05, "it has learned what to look at"
