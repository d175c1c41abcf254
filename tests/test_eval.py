"""eval.py: result files, frame orders, commands, several processes, evaluations that are killed."""

import json
import os
import shutil
import subprocess
import sys
from dataclasses import asdict, replace
from pathlib import Path

import eval_ranks
import pytest
import torch
import torch.distributed as dist
from conftest import ROOT
from safetensors.torch import load_file, save_file
from standin import rollout_of, run_script

import eval as evaluation
from eval import EvalConfig, evaluate, parse_command
from evaluation import answering
from infra.distributed import process_group
from infra.errors import UserError
from rewards import extract_answer

pytestmark = pytest.mark.usefixtures("one_process")

# ------------------------------------------------------------------- a benchmark of eight items

BROKEN = 2  # the row whose video is none
# What the model is made to say to each row.
ANSWERS = ["{right}", "Z", "{right}", "{right}", "28", "{right}", "{right}", ""]


@pytest.fixture
def benchmark(toy_folder, tmp_path):
    """A folder that holds Evaluation/eval_tiny.json in the official eval format, and its files."""
    media = tmp_path / "benchmark/Evaluation/Tiny"
    media.mkdir(parents=True)
    toys = toy_folder / "runs/toy/data"
    rows, taken = json.loads((toys / "test.json").read_text()), []
    kinds = ["direction", "direction", "direction", "count", "width", "word", "describe",
             "direction"]  # fmt: skip
    for number, kind in enumerate(kinds):
        row = next(row for row in rows if row["data_source"] == f"toy/{kind}")
        rows.remove(row)
        name = Path(row["path"]).name
        shutil.copy(toys / row["path"], media / name)
        row |= {"path": f"./Evaluation/Tiny/{name}", "problem_id": 100 + number, "process": "",
                "original_question_type": f"t{number}"}  # fmt: skip
        taken.append(row)
    taken[1]["data_type"] = "frame"  # as 200 clips of eval_mvbench call themselves
    taken[4]["solution"] = "<answer>25</answer>"
    broken = tmp_path / "benchmark" / taken[BROKEN]["path"]
    broken.write_bytes(b"?" * broken.stat().st_size)
    (media.parent / "eval_tiny.json").write_text(json.dumps(taken))
    return tmp_path / "benchmark"


@pytest.fixture
def settings(benchmark, base, tmp_path):
    return EvalConfig(
        model=base, data=[str(benchmark / "Evaluation/eval_tiny.json")], data_root=str(benchmark),
        output_dir=str(tmp_path / "results"), max_frames=8, batch_size=3, max_new_tokens=6,
        num_workers=1,
    )  # fmt: skip


@pytest.fixture
def asked(monkeypatch):
    """Makes the model answer `asked.answers`; a list of its batches' prompts."""

    class Asked(list):
        answers = ANSWERS

    def answer(model, tokenizer, prompts, *_):
        batches.append(prompts)
        rollouts = []
        for prompt in prompts:
            right = extract_answer(prompt.sample.solution)
            said = batches.answers[prompt.sample.row].replace("{right}", right)
            text = f"<think>So.</think><answer>{said}</answer>" if said else "I cannot say."
            rollouts.append(rollout_of(prompt, text))
        return rollouts

    batches = Asked()
    monkeypatch.setattr(answering, "sample_groups", answer)
    return batches


def evaluate_here(config):
    with process_group() as world:
        return evaluate(config, world, is_toy=False)


def below(folder, pattern="*.jsonl"):
    """The bytes of all files of a name below a folder."""
    return {path.name: path.read_bytes() for path in Path(folder).rglob(pattern)}


def test_scores_and_result_files(settings, asked, capsys):
    (summary,) = evaluate_here(settings)
    (folder,) = Path(settings.output_dir).iterdir()
    assert folder.name.endswith("runs--toy--base")
    files = below(folder, "*")
    assert set(files) == {"eval_tiny.ordered.jsonl", "eval_tiny.ordered.summary.json"}
    items = [json.loads(line) for line in files["eval_tiny.ordered.jsonl"].splitlines()]
    assert [item["row"] for item in items] == list(range(8))
    assert [item["problem_id"] for item in items] == list(range(100, 108))
    scores = [item["score"] for item in items]
    assert scores == [1.0, 0.0, None, 1.0, pytest.approx(0.8), 1.0, 1.0, 0.0]
    errors = [item["row"] for item in items if item["error"]]
    assert errors == [item["row"] for item in summary["unusable"]] == [BROKEN]
    assert (items[BROKEN]["response"], items[7]["response"]) == (None, "I cannot say.")
    assert (items[1]["answer"], items[7]["answer"]) == ("Z", None)

    assert summary == json.loads(files["eval_tiny.ordered.summary.json"])
    about = {key: summary[key] for key in ("model", "benchmark", "order", "settings")}
    assert about == {"model": settings.model, "benchmark": "eval_tiny", "order": "ordered",
                     "settings": asdict(settings)}  # fmt: skip
    made_by = {"model_fingerprint", "data_sha256", "template", "device"}
    assert made_by <= set(summary["provenance"])
    assert (summary["n"], summary["accuracy"]) == (4, 0.5)  # rows 0, 1, 3, 7
    assert {kind: part["n"] for kind, part in summary["by_type"].items()} == {
        "OCR": 1, "free-form": 1, "multiple choice": 3, "numerical": 1, "regression": 1,
    }  # fmt: skip
    everything, usable = (summary["scores"][f"{which}_items"]["overall"]
                          for which in ("all", "decodable"))  # fmt: skip
    assert everything["benchmark"]["score"] == pytest.approx(4.8 / 8)
    assert usable["benchmark"]["score"] == pytest.approx(4.8 / 7)
    # The mean of 4 of 7 others and of the strict MRA, 0.8: 28 for 25 is off by 12%.
    assert everything["paper"]["score"] == pytest.approx((4 / 7 + 0.8) / 2)

    # The same command again prints what is there.
    asked.clear()
    capsys.readouterr()
    assert evaluate_here(replace(settings, num_workers=2)) == [summary]
    assert asked == []
    assert "eval_tiny, ordered frames: accuracy 50.0 over 4 items" in capsys.readouterr().out


def test_several_orders_and_the_gap_between_them(settings, asked, capsys):
    """The model that is made to speak answers the same to every order: the gap is 0."""
    summaries = evaluate_here(replace(settings, order="reversed,ordered"))
    shown = [prompt.order for prompts in asked for prompt in prompts if prompt.is_video]
    assert shown == ["reversed"] * 4 + ["ordered"] * 4
    assert [summary["settings"]["order"] for summary in summaries] == ["reversed", "ordered"]
    ((name, content),) = below(settings.output_dir, "*.gap.*").items()
    gap = json.loads(content)
    assert name == "eval_tiny.gap.reversed.json"
    assert (gap["model"], gap["order"]) == (settings.model, "reversed")
    overall = gap["overall"]["benchmark"]
    assert (overall["n"], overall["difference"]) == (7, 0.0)
    assert overall["interval"][0] < 0 < overall["interval"][1]
    assert "eval_tiny: ordered minus reversed frames" in capsys.readouterr().out


def changed_model(source, folder):
    """The model with one other weight, in a folder."""
    shutil.copytree(source, folder, dirs_exist_ok=True)
    weights = load_file(folder / "model.safetensors")
    weights["lm_head.weight"][0, 0] += 1
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})


def test_a_retrained_model_is_evaluated_again(settings, asked, tmp_path, capsys):
    shutil.copytree(settings.model, tmp_path / "model")
    mine = replace(settings, model=str(tmp_path / "model"))
    evaluate_here(mine)
    changed_model(settings.model, tmp_path / "model")
    asked.clear()
    evaluate_here(mine)
    assert len(asked) == 3
    assert "replaced" in capsys.readouterr().out


@pytest.mark.parametrize("names", [("./m", "m"), ("a--b/c", "a/b--c")], ids=" and ".join)
def test_models_whose_names_make_one_folder_are_kept_apart(
    names, settings, asked, tmp_path, monkeypatch
):
    """Fault 5; of two working directories as well."""
    for number, name in enumerate(names):
        shutil.copytree(settings.model, tmp_path / str(number) / name)
    changed_model(settings.model, tmp_path / "1" / names[1])
    monkeypatch.chdir(tmp_path / "0")
    evaluate_here(replace(settings, model=names[0]))
    before = below(settings.output_dir, "*.*")
    monkeypatch.chdir(tmp_path / "1")
    with pytest.raises(UserError, match="model .* and not"):
        evaluate_here(replace(settings, model=names[1]))
    assert len(asked) == 3 and before == below(settings.output_dir, "*.*")


def test_a_video_that_was_repaired_is_tried_again(settings, asked, benchmark, tmp_path):
    """Fault 13, at the same size. The bytes are those of an evaluation that had all files, and
    other batches are not repeated."""
    rows = json.loads(Path(settings.data[0]).read_text())
    (before,) = evaluate_here(settings)
    asked.clear()
    evaluate_here(settings)
    assert asked == [], "it is still broken"
    shutil.copy(benchmark / rows[0]["path"], benchmark / rows[BROKEN]["path"])
    (after,) = evaluate_here(settings)
    (prompts,) = asked
    assert BROKEN in [prompt.sample.row for prompt in prompts] and len(prompts) == 3
    assert [len(found["unusable"]) for found in (before, after)] == [1, 0]
    evaluate_here(replace(settings, output_dir=str(tmp_path / "whole")))
    assert below(settings.output_dir) == below(tmp_path / "whole")


# --------------------------------------------------------------------------------------- commands


def test_benchmarks_are_found_below_the_root(tmp_path):
    """In the folder itself or, as in the official data set, in Evaluation."""
    files = [tmp_path / "Evaluation/eval_vsibench.json", tmp_path / "eval_mmvu.json"]
    files[0].parent.mkdir()
    for file in files:
        file.write_text("[]")
    flags = ["--model", "m", "--data_root", str(tmp_path), "--benchmarks"]
    config, is_toy = parse_command([*flags, "vsibench,mmvu"])
    assert not is_toy
    assert config.data == list(map(str, files))
    with pytest.raises(UserError, match="/eval_mvbench.json nor .*/Evaluation/eval_mvbench.json"):
        parse_command([*flags, "mmvu,mvbench"])


def test_a_preset_sets_the_frames():
    config, _ = parse_command(["--model", "m", "--data", "d", "--preset", "paper-32"])
    assert config.max_frames == 32


@pytest.mark.parametrize(
    "argv, words",
    [
        pytest.param("--benchmarks mmvu --data_root .", "--benchmarks needs --model", id="model"),
        pytest.param("--model m --benchmarks gqa --data_root .", "'gqa'", id="unknown"),
        pytest.param("--model m --benchmarks mmvu --data x", "exclude", id="data-and-benchmarks"),
        pytest.param("--table a --compare b c", "exclude", id="two-modes"),
        pytest.param("--video x --question q", "--video needs --model", id="video-without-model"),
        pytest.param("--model m --video none.mp4 --question q", "--video none.mp4", id="no-video"),
        pytest.param("--model m --image . --question q", "--image .", id="folder-as-image"),
        pytest.param("--model m --video README.md", "--question", id="no-question"),
        pytest.param("--compare a", "two", id="one-to-compare"),
        pytest.param("--compare tests README.md", "no <benchmark>", id="no-results"),
        pytest.param("--table tests", "no summary", id="no-summaries"),
        pytest.param("--judge m", "results files", id="judge-alone"),
        pytest.param("--judge m none.jsonl", "none.jsonl", id="judge-nothing"),
        pytest.param("--model m --data d --preset paper-16 --max_frames 8", "exclude",
                     id="preset-and-frames"),
        pytest.param("--model m --data a/d b/d", "two files of one name", id="same-name"),
        pytest.param("--model m --benchmarks= --data_root .", "--benchmarks is empty", id="e1"),
        pytest.param("--model m --video= --question q", "--video is empty", id="e2"),
        pytest.param("--table=", "--table is empty", id="e4"),
        pytest.param("--model m --data d --order ordered,ordered", "--order", id="order-twice"),
    ],
)
def test_a_wrong_command_is_one_line(argv, words, monkeypatch):
    monkeypatch.chdir(ROOT)
    with pytest.raises(UserError, match=words) as caught:
        run_script(evaluation, *argv.split())
    assert "\n" not in str(caught.value)


@pytest.fixture
def two_models(settings, asked, tmp_path):
    """Result folders of two models: the second answers one more question right, and one wrong."""
    folders = []
    for name in ("a", "b"):
        shutil.copytree(settings.model, tmp_path / name)
        (tmp_path / name / "extra.json").write_text(json.dumps(name))
        mine = replace(settings, model=str(tmp_path / name), order="ordered,single",
                       output_dir=str(tmp_path / "results" / name))  # fmt: skip
        evaluate_here(mine)
        folders += Path(mine.output_dir).iterdir()
        asked.answers = [*ANSWERS]
        asked.answers[1] = asked.answers[7] = "{right}"
        asked.answers[5] = "Z"
    return folders


def test_compare_two_models(two_models, capsys, tmp_path):
    run_script(evaluation, "--compare", *two_models)
    printed = capsys.readouterr().out
    assert printed.count(" minus ") == 2  # ordered and single
    # Rows 1 and 7 are won by b, row 5 lost, of 7 that both could show: 1 - 2 = -1 of 7.
    assert "benchmark's score  -14.3 [" in printed
    assert "over 7 items" in printed
    assert "multiple choice              -66.7 [" in printed
    assert "OCR                          +100.0 [" in printed
    assert "they differ in" not in printed
    a = two_models[0]
    run_script(evaluation, "--compare", *(a / f"eval_tiny.{order}.jsonl"
                                          for order in ("ordered", "single")))  # fmt: skip
    assert "they differ in order: 'ordered' and 'single'" in capsys.readouterr().out
    with pytest.raises(UserError, match="several models"):
        run_script(evaluation, "--compare", tmp_path / "results", a)
    file = a / "eval_tiny.ordered.summary.json"
    file.write_text(file.read_text().replace('"data_sha256": "', '"data_sha256": "0'))
    with pytest.raises(UserError, match="two versions of the data file eval_tiny"):
        run_script(evaluation, "--compare", *two_models)


def test_one_video_and_one_image(settings, benchmark, capsys, monkeypatch):
    rows, shown = json.loads(Path(settings.data[0]).read_text()), []

    def reply(model, tokenizer, prompts, *_):
        assert model.dtype == torch.bfloat16, "--precision"
        shown.append(prompts[0])
        text = "<think>I see.</think> <answer>A</answer>" if prompts[0].is_video else "Four."
        return [rollout_of(prompts[0], text, ended=False)]

    monkeypatch.setattr(answering, "sample_groups", reply)
    shared = ("--model", settings.model, "--max_frames", "4", "--precision", "bf16", "--question")
    options = ("--options", "A. left", "B. right")
    run_script(evaluation, *shared, "Which?", "--video", benchmark / rows[0]["path"], *options)
    assert capsys.readouterr().out.endswith("\n\nAnswer: A\n")
    run_script(evaluation, *shared, "How many?", "--image", benchmark / rows[3]["path"])
    assert "Four. (cut at --max_new_tokens 768)" in capsys.readouterr().out
    video, image = shown
    assert video.sample.options == ("A. left", "B. right")
    assert video.grid_thw.tolist() == [2, 4, 4]
    assert not image.is_video


# ----------------------------------------------------------------------------------- real processes


@pytest.mark.slow
def test_ranks_kills_and_sharded_weights_change_no_result(toy_folder, base, tmp_path):
    """The toy's random model, made to end its responses after 1 to 24 tokens: what one rank writes
    comes from two ranks that are killed, then from one that is killed, then from two to the end,
    and from two with shards of the weights; a judge likewise."""
    shutil.copytree(base, tmp_path / "model")
    weights = load_file(tmp_path / "model/model.safetensors")
    end = json.loads((tmp_path / "model/config.json").read_text())["eos_token_id"]
    weights["lm_head.weight"][end] *= 2
    save_file(weights, tmp_path / "model/model.safetensors", metadata={"format": "pt"})
    rows = json.loads((toy_folder / "runs/toy/data/test.json").read_text())[:40]
    videos = [row for row in rows if row["data_type"] == "video"]
    videos[4]["path"] = videos[9]["path"] = videos[0]["path"]
    videos[1]["path"] = "./test/none.y4m"
    (tmp_path / "test").symlink_to(toy_folder / "runs/toy/data/test")
    (tmp_path / "rows.json").write_text(json.dumps(rows))

    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    launch = [sys.executable, eval_ranks.__file__]
    done = subprocess.run(launch, cwd=tmp_path, env=environment, capture_output=True, text=True,
                          timeout=300)  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert "killed 2 ranks" in done.stdout and "killed 1 ranks" in done.stdout
    assert done.stdout.count(" resumes, ") == 2
    assert done.stdout.count("ordered frames: accuracy") == 3, "rank 0 alone prints"
    expected = below(tmp_path / "one", "rows.ordered.jsonl")
    items = [json.loads(line) for line in expected["rows.ordered.jsonl"].splitlines()]
    assert len(items) == 40
    assert sum(item["error"] is not None for item in items) == 1
    assert len({item["length"] for item in items}) > 5, "ranks stop at different lengths"
    assert below(tmp_path / "killed") == below(tmp_path / "sharded", "rows.ordered.jsonl")
    assert below(tmp_path / "killed") == expected
    judged = [below(tmp_path / folder, "*.judge.jsonl") for folder in ("one", "sharded")]
    assert judged[0] == judged[1] and len(judged[0]) == 1


# --------------------------------------------------------------------------------------------- toy


@pytest.fixture
def toy_models(toy_folder, tmp_path, monkeypatch):
    """A working folder with the toy's base and data; a function that makes models of a stage."""
    (tmp_path / "runs/toy").mkdir(parents=True)
    for name in ("base", "data"):
        (tmp_path / "runs/toy" / name).symlink_to(toy_folder / "runs/toy" / name)

    def make(stage):
        (tmp_path / "runs/toy" / stage).mkdir()
        (tmp_path / "runs/toy" / stage / "model").symlink_to(toy_folder / "runs/toy/base")

    monkeypatch.chdir(tmp_path)
    return make


def test_without_models_one_line_says_what_to_run(toy_models, capsys):
    with pytest.raises(UserError, match="train_sft.py"):
        run_script(evaluation)
    assert evaluation.REAL_COMMAND in capsys.readouterr().out.splitlines()[0]
    toy_models("sft")
    dist.destroy_process_group()
    with pytest.raises(UserError, match="train_rl.py"):
        run_script(evaluation)
    assert not Path("runs/toy/eval").exists()


def test_the_toys_table_sets_both_models_in_both_orders(toy_models, capsys, monkeypatch):
    accuracies = {("sft", "ordered"): 0.625, ("sft", "shuffled"): 0.5,
                  ("rl", "ordered"): 0.875, ("rl", "shuffled"): 0.25}  # fmt: skip

    def stand_in(config, world, is_toy):
        assert is_toy
        stage = Path(config.model).parent.name
        return [{"accuracy": accuracies[stage, order], "n": 224, "order": order}
                for order in config.order.split(",")]  # fmt: skip

    toy_models("sft")
    toy_models("rl")
    monkeypatch.setattr(evaluation, "evaluate", stand_in)
    run_script(evaluation)
    rows = [line.split() for line in capsys.readouterr().out.splitlines()]
    assert ["SFT", "62.5", "50.0", "+12.5"] in rows
    assert ["RL", "87.5", "25.0", "+62.5"] in rows
    assert any("224" in row for row in rows)
