"""eval.py: result files, frame orders, commands, several processes, evaluations that are killed."""

import contextlib
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

import eval as evaluation
from data import ORDERS
from eval import EvalConfig, evaluate, parse_command
from evaluation import answering
from infra.distributed import process_group
from infra.errors import UserError
from rewards import extract_answer
from sampling import Rollout

# ------------------------------------------------------------------- a benchmark of eight items

MISSING = 2  # the row whose video is not there
# What the model is made to say to each row; None for the row that it never sees.
ANSWERS = ["{right}", "Z", None, "{right}", "28", "{right}", "{right}", ""]
EXPECTED_SCORES = [1.0, 0.0, None, 1.0, 0.8, 1.0, 1.0, 0.0]


@pytest.fixture(scope="module")
def benchmark(toy_folder, tmp_path_factory):
    """A folder that holds Evaluation/eval_tiny.json in the official eval format, and its files."""
    folder = tmp_path_factory.mktemp("benchmark")
    media = folder / "Evaluation/Tiny"
    media.mkdir(parents=True)
    toys = toy_folder / "runs/toy/data"
    rows, taken = json.loads((toys / "test.json").read_text()), []
    kinds = ["direction", "direction", "direction", "count", "width", "word", "describe",
             "direction"]  # fmt: skip
    for number, kind in enumerate(kinds):
        row = next(row for row in rows if row["data_source"] == f"toy/{kind}")
        rows.remove(row)
        source = toys / row["path"]
        if number != MISSING:
            shutil.copy(source, media / source.name)
        row["path"] = f"./Evaluation/Tiny/{source.name}"
        row |= {"problem_id": 100 + number, "process": "", "original_question_type": f"t{number}"}
        taken.append(row)
    taken[1]["data_type"] = "frame"  # as 200 clips of eval_mvbench call themselves
    taken[4]["solution"] = "<answer>25</answer>"
    (folder / "Evaluation/eval_tiny.json").write_text(json.dumps(taken))
    return folder


@pytest.fixture
def settings(benchmark, toy_folder, tmp_path):
    return EvalConfig(
        model=str(toy_folder / "runs/toy/base"),
        data=[str(benchmark / "Evaluation/eval_tiny.json")],
        data_root=str(benchmark),
        output_dir=str(tmp_path / "results"),
        max_frames=8,
        batch_size=3,
        max_new_tokens=6,
        num_workers=1,
    )


@pytest.fixture(autouse=True)
def one_process(monkeypatch):
    """A process of no group, which is left as it was: also after an error."""
    for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK"):
        monkeypatch.delenv(name, raising=False)
    yield
    if dist.is_initialized():
        dist.destroy_process_group()


@pytest.fixture
def asked(monkeypatch):
    """Makes the model answer ANSWERS; a list of (prompts, arguments), one for each batch."""
    batches = []

    def answer(model, tokenizer, prompts, keys, *arguments, **named):
        batches.append((prompts, keys, (*arguments, *named.values())))
        mask = torch.ones(1, 2, dtype=torch.bool)
        rollouts = []
        for prompt in prompts:
            said = ANSWERS[prompt.sample.row]
            text = said.replace("{right}", extract_answer(prompt.sample.solution))
            text = f"<think>So.</think><answer>{text}</answer>" if text else "I cannot say."
            ended = torch.tensor([True])
            rollouts.append(Rollout(prompt, mask.long(), mask, ended, mask.float(), [text]))
        return rollouts

    monkeypatch.setattr(answering, "sample_groups", answer)
    return batches


def evaluate_here(config: EvalConfig, is_toy: bool = False) -> list[dict]:
    if dist.is_initialized():  # left by an error
        dist.destroy_process_group()
    with process_group() as world:
        return evaluate(config, world, is_toy)


def read_results(folder: str | Path) -> tuple[dict[str, str], list[dict], dict]:
    """All files below a results folder by name, the items and the summary of the only benchmark."""
    files = {path.name: path.read_text() for path in Path(folder).rglob("*") if path.is_file()}
    items = next(text for name, text in files.items() if name.endswith("ed.jsonl"))
    summary = next(text for name, text in files.items() if name.endswith(".summary.json"))
    return files, [json.loads(line) for line in items.splitlines()], json.loads(summary)


def test_scores_and_result_files(settings, asked):
    (summary,) = evaluate_here(settings)
    files, items, written = read_results(settings.output_dir)
    assert set(files) == {"eval_tiny.ordered.jsonl", "eval_tiny.ordered.summary.json"}
    model_folders = [path.name for path in Path(settings.output_dir).iterdir()]
    assert len(model_folders) == 1
    assert model_folders[0].endswith("runs--toy--base")

    assert [item["row"] for item in items] == list(range(8))
    assert [item["problem_id"] for item in items] == list(range(100, 108))
    assert [item["score"] for item in items] == pytest.approx(EXPECTED_SCORES)
    missing = items.pop(MISSING)
    assert missing["response"] is None
    assert "Evaluation/Tiny" in missing["error"]
    assert all(item["error"] is None for item in items)
    assert all(item["order"] == "ordered" for item in items)
    assert (items[1]["answer"], items[-1]["answer"]) == ("Z", None)
    assert items[-1]["response"] == "I cannot say."
    assert all(item["length"] == 2 and item["ended"] is True for item in items)

    assert written == summary
    assert (written["model"], written["benchmark"]) == (settings.model, "eval_tiny")
    assert written["order"] == "ordered"
    assert written["settings"] == asdict(settings)
    assert {"model_fingerprint", "data_sha256", "template"} <= set(written["provenance"])
    assert {"torch", "transformers"} <= set(written["versions"])
    assert (written["n"], written["accuracy"]) == (4, 0.5)  # rows 0, 1, 3, 7
    assert {kind: part["n"] for kind, part in written["by_type"].items()} == {
        "OCR": 1, "free-form": 1, "multiple choice": 3, "numerical": 1, "regression": 1,
    }  # fmt: skip
    assert written["by_type"]["regression"]["score"] == pytest.approx(0.8)
    assert written["num_items"] == 8
    scores = written["scores"]
    assert scores["all_items"]["overall"]["benchmark"]["n"] == 8
    assert scores["all_items"]["overall"]["benchmark"]["score"] == pytest.approx(4.8 / 8)
    assert scores["decodable_items"]["overall"]["benchmark"]["score"] == pytest.approx(4.8 / 7)
    # The mean of 4 of 7 others and of the strict MRA, 0.8: 28 for 25 is off by 12%.
    assert scores["all_items"]["overall"]["paper"]["score"] == pytest.approx((4 / 7 + 0.8) / 2)
    assert [item["row"] for item in written["unusable"]] == [MISSING]


def pixels(config: EvalConfig, asked: list) -> dict[int, torch.Tensor]:
    """What the model is shown, by row: float32 (N, 1176)."""
    asked.clear()
    shutil.rmtree(config.output_dir, ignore_errors=True)
    evaluate_here(config)
    prompts = [prompt for prompts, _, _ in asked for prompt in prompts]
    assert all(prompt.order == config.order for prompt in prompts if prompt.is_video)
    return {prompt.sample.row: prompt.pixel_values for prompt in prompts}


def frames_of(patches: torch.Tensor) -> list[bytes]:
    """The 8 frames of 56 x 56 behind (64, 1176) patches, two to a patch, as things to compare."""
    patches = patches.view(4, 16, 3, 2, 14 * 14)
    return [patches[t, :, :, half].contiguous().numpy().tobytes()
            for t in range(4) for half in range(2)]  # fmt: skip


def test_each_order_shows_the_frames_in_that_order(settings, asked):
    shown = {
        order: pixels(replace(settings, order=order), asked)
        for order in ("ordered", "shuffled", "reversed", "single")
    }
    for row in (0, 1, 6, 7):
        frames = {order: frames_of(patches[row]) for order, patches in shown.items()}
        assert len(set(frames["ordered"])) == 8, "a video whose frames all differ"
        assert frames["reversed"] == frames["ordered"][::-1]
        assert frames["shuffled"] != frames["ordered"]
        assert sorted(frames["shuffled"]) == sorted(frames["ordered"])
        assert frames["single"] == [frames["ordered"][4]] * 8
    for row in (3, 4, 5):  # an image knows no order
        assert all(torch.equal(patches[row], shown["ordered"][row]) for patches in shown.values())


# --------------------------------------------------------------------------------------- orders


def test_several_orders_and_the_gap_between_them(settings, asked, capsys):
    """The model that is made to speak answers the same to every order: the gap is 0."""
    both = replace(settings, order="reversed,ordered")
    summaries = evaluate_here(both)
    assert [summary["order"] for summary in summaries] == ["reversed", "ordered"]
    assert [summary["settings"]["order"] for summary in summaries] == ["reversed", "ordered"]
    (file,) = Path(settings.output_dir).glob("*/eval_tiny.gap.*.json")
    assert file.name == "eval_tiny.gap.reversed.json"
    gap = json.loads(file.read_text())
    assert (gap["model"], gap["order"]) == (settings.model, "reversed")
    overall = gap["overall"]["benchmark"]
    assert (overall["n"], overall["difference"]) == (7, 0.0)
    assert overall["interval"][0] < 0 < overall["interval"][1]
    assert set(gap["by"]["problem_type"]) == {"OCR", "free-form", "multiple choice", "numerical",
                                              "regression"}  # fmt: skip
    assert "eval_tiny: ordered minus reversed frames" in capsys.readouterr().out


# ------------------------------------------------------------------------------ finished results


def test_the_same_command_again_prints_what_is_there(settings, asked, capsys):
    (first,) = evaluate_here(settings)
    asked.clear()
    capsys.readouterr()
    (again,) = evaluate_here(replace(settings, num_workers=2))
    assert asked == []
    assert again == first
    printed = capsys.readouterr().out
    assert "is finished" in printed
    assert "eval_tiny, ordered frames: accuracy 50.0 over 4 items" in printed


def changed_model(source: str | Path, folder: Path) -> str:
    """The model with one other weight, in a folder."""
    shutil.copytree(source, folder, dirs_exist_ok=True)
    weights = load_file(folder / "model.safetensors")
    weights["lm_head.weight"][0, 0] += 1
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    return str(folder)


def test_a_retrained_model_is_evaluated_again(settings, asked, tmp_path, capsys):
    shutil.copytree(settings.model, tmp_path / "model")
    mine = replace(settings, model=str(tmp_path / "model"))
    evaluate_here(mine)
    changed_model(settings.model, tmp_path / "model")
    asked.clear()
    evaluate_here(mine)
    assert len(asked) == 3
    assert "replaced" in capsys.readouterr().out


@pytest.mark.parametrize(
    "names", [("m", "../m"), ("./m", "m"), ("a--b/c", "a/b--c")], ids=" and ".join
)
def test_models_whose_names_make_one_folder_are_kept_apart(
    names, settings, asked, tmp_path, monkeypatch
):
    """One relative --model from two working directories as well: the second, where it is "m"."""
    first, second = tmp_path / "1/1", tmp_path / ("1" if ".." in names[1] else "2/2")
    for here in (first, second):
        here.mkdir(parents=True, exist_ok=True)
    shutil.copytree(settings.model, first / names[0])
    monkeypatch.chdir(first)
    evaluate_here(replace(settings, model=names[0]))
    before = {path: path.read_bytes() for path in Path(settings.output_dir).rglob("*.*")}
    changed_model(settings.model, first / names[1] if ".." in names[1] else second / names[1])
    monkeypatch.chdir(first if ".." in names[1] else second)
    asked.clear()
    with pytest.raises(UserError, match="model .* and not"):
        evaluate_here(replace(settings, model=names[1]))
    assert asked == []
    assert before == {path: path.read_bytes() for path in Path(settings.output_dir).rglob("*.*")}


def test_items_are_tried_again_once_their_files_are_there(
    settings, asked, benchmark, tmp_path, monkeypatch
):
    """The bytes are those of an evaluation that had all files; other batches are not repeated."""
    root = tmp_path / "benchmark"
    shutil.copytree(benchmark, root)
    (name,) = Path(settings.data[0]).parent.glob("eval_tiny.json")
    mine = replace(settings, data=[str(root / "Evaluation/eval_tiny.json")], data_root=str(root))
    missing = json.loads(name.read_text())[MISSING]["path"]
    answers = [*ANSWERS[:MISSING], "{right}", *ANSWERS[MISSING + 1 :]]
    monkeypatch.setattr(sys.modules[__name__], "ANSWERS", answers)
    (before,) = evaluate_here(mine)
    asked.clear()
    evaluate_here(mine)
    assert asked == [], "the file is still missing"

    shutil.copy(next((benchmark / "Evaluation/Tiny").glob("*.y4m")), root / missing)
    (after,) = evaluate_here(mine)
    ((prompts, *_),) = asked
    assert MISSING in [prompt.sample.row for prompt in prompts] and len(prompts) == 3
    assert [len(found["unusable"]) for found in (before, after)] == [1, 0]
    (retried,) = Path(mine.output_dir).rglob("*.ordered.jsonl")
    evaluate_here(replace(mine, output_dir=str(tmp_path / "whole")))
    (whole,) = (tmp_path / "whole").rglob("*.ordered.jsonl")
    assert retried.read_bytes() == whole.read_bytes()


# --------------------------------------------------------------------------------------- commands


def command(*argv: str) -> None:
    """What `python eval.py ARGV` does, in this process; an error is a UserError."""
    before = sys.argv
    sys.argv = ["eval.py", *map(str, argv)]
    try:
        evaluation.main()
    finally:
        sys.argv = before


@pytest.mark.parametrize("where", [".", "Evaluation"])
def test_benchmarks_are_found_below_the_root(tmp_path, where):
    folder = tmp_path / where
    folder.mkdir(exist_ok=True)
    for name in ("mmvu", "vsibench"):
        (folder / f"eval_{name}.json").write_text("[]")
    argv = ["--model", "m", "--benchmarks", "vsibench,mmvu", "--data_root", str(tmp_path)]
    config, is_toy = parse_command(argv)
    assert not is_toy
    assert [Path(path) for path in config.data] == [folder / "eval_vsibench.json",
                                                    folder / "eval_mmvu.json"]  # fmt: skip
    with pytest.raises(UserError, match="mvbench") as caught:
        parse_command([*argv[:3], "mmvu,mvbench", *argv[4:]])
    assert str(tmp_path / "eval_mvbench.json") in str(caught.value)
    assert str(tmp_path / "Evaluation/eval_mvbench.json") in str(caught.value)


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
        pytest.param("--model m --data d --preset paper-8", "--preset", id="preset"),
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
    with pytest.raises(UserError) as caught:  # noqa: PT011  the words follow
        command(*argv.split())
    assert words in str(caught.value)
    assert "\n" not in str(caught.value)


def test_precision_is_part_of_the_provenance(settings, asked):
    argv = ["--model", settings.model, "--data", settings.data[0], "--data_root",
            settings.data_root, "--output_dir", settings.output_dir]  # fmt: skip
    command(*argv, "--precision", "bf16")
    _, _, summary = read_results(settings.output_dir)
    assert summary["provenance"]["device"] == "cpu torch.bfloat16"
    with pytest.raises(UserError, match="bfloat16' and not 'cpu torch.float32'"):
        command(*argv, "--precision", "fp32")


# ----------------------------------------------------------------------- what results are used for


@pytest.fixture
def two_models(settings, asked, tmp_path, monkeypatch):
    """Result folders of two models: the second answers one more question right, and wants one."""
    folders = []
    for name in ("a", "b"):
        shutil.copytree(settings.model, tmp_path / name)
        (tmp_path / name / "extra.json").write_text(json.dumps(name))
        if name == "b":
            answers = ["{right}", "{right}", None, "{right}", "28", "Z", "{right}", "{right}"]
            monkeypatch.setattr(sys.modules[__name__], "ANSWERS", answers)
        evaluate_here(
            replace(settings, model=str(tmp_path / name), order="ordered,single")
        )
        folders += [path for path in Path(settings.output_dir).iterdir() if path not in folders]
    return folders


def test_compare_two_folders(two_models, capsys):
    command("--compare", *two_models)
    printed = capsys.readouterr().out
    blocks = [block for block in printed.split("\n\n") if "minus" in block]
    assert len(blocks) == 2  # ordered and single
    # Rows 1 and 7 are won by b, row 5 lost, of 7 that both could show: 1 - 2 = -1 of 7.
    assert "benchmark's score  -14.3 [" in printed
    assert "over 7 items" in printed
    assert "multiple choice              -66.7 [" in printed
    assert "OCR                          +100.0 [" in printed
    assert "they differ in" not in printed
    command("--compare", *(next(two_models[0].glob(f"*.{kind}.jsonl")) for kind in ORDERS[::3]))
    assert "they differ in order: 'ordered' and 'single'" in capsys.readouterr().out
    with pytest.raises(UserError, match="several models"):
        command("--compare", two_models[0].parent, two_models[0])


def test_results_of_two_data_files_are_not_compared(two_models):
    file = next(two_models[1].glob("*.ordered.summary.json"))
    file.write_text(file.read_text().replace('"data_sha256": "', '"data_sha256": "0'))
    with pytest.raises(UserError, match="two versions of the data file eval_tiny"):
        command("--compare", *two_models)


def test_table_1_from_summaries(settings, asked, tmp_path, capsys):
    data = tmp_path / "eval_mmvu.json"
    shutil.copy(settings.data[0], data)
    rows = json.loads(data.read_text())
    data.write_text(json.dumps([row for row in rows if row["problem_type"] == "multiple choice"]))
    evaluate_here(replace(settings, data=[str(data), settings.data[0]]))
    capsys.readouterr()
    command("--table", settings.output_dir)
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].startswith("| Model | Frames | VSI-Bench |")
    # Of the four questions the first and the last are right, the third cannot be shown.
    assert lines[2] == f"| {settings.model} | 8 | - | - | 50.0\\* | - | - | - |"
    assert "unusable items" in lines[4]


def test_one_video_and_one_image(settings, benchmark, asked, capsys, monkeypatch):
    rows = json.loads(Path(settings.data[0]).read_text())
    video_file, image_file = (str(benchmark / rows[number]["path"]) for number in (0, 3))

    def reply(model, tokenizer, prompts, keys, *arguments):
        asked.append(prompts[0])
        text = "<think>I see.</think> <answer>A</answer>" if prompts[0].is_video else "Four."
        mask = torch.ones(1, 2, dtype=torch.bool)
        return [Rollout(prompts[0], mask.long(), mask, ~mask[:, 0], mask.float(), [text])]

    monkeypatch.setattr(answering, "sample_groups", reply)
    shared = ("--model", settings.model, "--max_frames", "4", "--question")
    command(*shared, "Which way?", "--video", video_file, "--options", "A. left", "B. right")
    assert capsys.readouterr().out.endswith("\n\nAnswer: A\n")
    dist.is_initialized() and dist.destroy_process_group()
    command(*shared, "How many?", "--image", image_file)
    assert "Four. (cut at --max_new_tokens 768)" in capsys.readouterr().out
    video, image = asked
    assert video.sample.problem_type == "multiple choice"
    assert video.grid_thw.tolist() == [2, 4, 4]
    assert image.sample.problem_type == "free-form"
    assert not image.is_video


# ----------------------------------------------------------------------------------- real processes


@contextlib.contextmanager
def one_thread():
    """Sums of floats depend on the number of threads; torchrun gives each of its ranks one."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="module")
def brief_model(toy_folder, tmp_path_factory):
    """The toy's random model, made to end its responses after 1 to 24 tokens."""
    folder = tmp_path_factory.mktemp("brief") / "model"
    shutil.copytree(toy_folder / "runs/toy/base", folder)
    weights = load_file(folder / "model.safetensors")
    end = json.loads((folder / "config.json").read_text())["eos_token_id"]
    weights["lm_head.weight"][end] *= 2
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    return str(folder)


@pytest.fixture(scope="module")
def rows_file(toy_folder, tmp_path_factory):
    """A function from a number to a data file of so many rows: questions that share clips, a video
    that is not there, pictures."""

    def make(count):
        folder = tmp_path_factory.mktemp("rows")
        rows = json.loads((toy_folder / "runs/toy/data/test.json").read_text())[:count]
        clips = [row for row in rows if row["data_type"] == "video"]
        clips[4]["path"] = clips[9]["path"] = clips[0]["path"]
        clips[1]["path"] = "./test/none.y4m"
        (folder / "test").symlink_to(toy_folder / "runs/toy/data/test")
        (folder / "rows.json").write_text(json.dumps(rows))
        return str(folder / "rows.json")

    return make


def results_below(folder):
    return {path.name: path.read_bytes() for path in Path(folder).rglob("*.jsonl")}


@pytest.mark.slow
def test_any_number_of_ranks_and_sharded_weights_give_the_same(brief_model, rows_file, tmp_path):
    """Seven batches on 1, 2 and 4 processes; on 2 also with sharded weights, and a judge."""
    data = rows_file(19)
    with one_thread():
        evaluate_here(eval_ranks.settings(str(tmp_path / "1"), brief_model, data))
    expected = results_below(tmp_path / "1")
    items = [json.loads(line) for line in expected["rows.ordered.jsonl"].splitlines()]
    assert len(items) == 19
    assert sum(item["error"] is not None for item in items) == 1
    lengths = {item["length"] for item in items}
    assert len(lengths) > 5, "ranks stop at different lengths"
    for count in (2, 4):
        out = str(tmp_path / str(count))
        launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node",
                  str(count), eval_ranks.__file__, "ranks", out, brief_model, data]  # fmt: skip
        environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
        done = subprocess.run(launch, env=environment, capture_output=True, text=True, timeout=300)
        assert done.returncode == 0, done.stderr
        printed = done.stdout.count("ordered frames: accuracy")
        assert printed == (2 if count == 2 else 1), "rank 0 alone prints"
        assert results_below(tmp_path / str(count) / "whole") == expected
    assert results_below(tmp_path / "2/sharded") == expected
    judged = [tmp_path / f"2/{how}-judge.ordered.judge.jsonl" for how in ("whole", "sharded")]
    assert judged[0].read_bytes() == judged[1].read_bytes()
    assert len(judged[0].read_text().splitlines()) > 10


@pytest.mark.slow
def test_an_evaluation_killed_at_random_instants_ends_with_the_same(
    brief_model, rows_file, tmp_path
):
    launch = [sys.executable, eval_ranks.__file__, "kill", str(tmp_path), brief_model,
              rows_file(60)]  # fmt: skip
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    done = subprocess.run(launch, env=environment, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    assert "killed 2 ranks" in done.stdout and "killed 1 ranks" in done.stdout
    assert done.stdout.count(" resumes, ") == 2
    assert_same_results(tmp_path / "killed", tmp_path / "whole")


def assert_same_results(found: Path, expected: Path) -> None:
    """The same files byte for byte, but for the folder's own name in the settings."""
    found_files, expected_files = (
        {path.name: path.read_text().replace(str(folder), "") for path in folder.rglob("*.*")}
        for folder in (found, expected)
    )
    assert len(expected_files) == 2
    assert found_files == expected_files


# --------------------------------------------------------------------------------------------- toy


def link_toy(folder: Path, toy_folder: Path, *stages: str) -> None:
    """A working folder with the toy's base and data, and models of some stages."""
    (folder / "runs/toy").mkdir(parents=True)
    for name in ("base", "data"):
        (folder / "runs/toy" / name).symlink_to(toy_folder / "runs/toy" / name)
    for stage in stages:
        (folder / "runs/toy" / stage).mkdir()
        (folder / "runs/toy" / stage / "model").symlink_to(toy_folder / "runs/toy/base")


@pytest.mark.parametrize(
    "stages, to_run",
    [
        pytest.param([], "train_sft.py", id="nothing-trained"),
        pytest.param(["sft"], "train_rl.py", id="only-sft"),
    ],
)
def test_without_models_one_line_says_what_to_run(
    stages, to_run, toy_folder, tmp_path, capsys, monkeypatch
):
    link_toy(tmp_path, toy_folder, *stages)
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UserError, match=to_run):
        command()
    first_line = capsys.readouterr().out.splitlines()[0]
    assert "toy" in first_line
    assert evaluation.REAL_COMMAND in first_line
    assert not (tmp_path / "runs/toy/eval").exists()


def test_the_toys_table_sets_both_models_in_both_orders(toy_folder, tmp_path, capsys, monkeypatch):
    accuracies = {("sft", "ordered"): 0.625, ("sft", "shuffled"): 0.5,
                  ("rl", "ordered"): 0.875, ("rl", "shuffled"): 0.25}  # fmt: skip

    def stand_in(config, world, is_toy):
        assert is_toy
        stage = Path(config.model).parent.name
        return [{"accuracy": accuracies[stage, order], "n": 224, "order": order}
                for order in config.order.split(",")]  # fmt: skip

    link_toy(tmp_path, toy_folder, "sft", "rl")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(evaluation, "evaluate", stand_in)
    command()
    rows = [line.split() for line in capsys.readouterr().out.splitlines()]
    assert ["SFT", "62.5", "50.0", "+12.5"] in rows
    assert ["RL", "87.5", "25.0", "+62.5"] in rows
    assert any("224" in row for row in rows)
