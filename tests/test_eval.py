"""eval.py: metrics worked out by hand, result files, orders of frames, one and two processes."""

import contextlib
import dataclasses
import doctest
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import torch.distributed as dist

import eval as evaluation
from data import Sample, load_samples
from distributed import process_group, run
from eval import EvalConfig, evaluate, mean_relative_accuracy, score_item, summarise
from rewards import extract_answer
from sampling import Rollout

ROOT = Path(__file__).parent.parent


def test_the_docstring_examples_hold():
    result = doctest.testmod(evaluation)
    assert result.attempted >= 1
    assert result.failed == 0


# --------------------------------------------------------------------------------------- metrics


@pytest.mark.parametrize(
    "answer, reference, expected",
    [
        pytest.param(10, 10, 1.0, id="exact"),
        pytest.param(10.4, 10, 1.0, id="4%-off"),
        pytest.param(11.2, 10, 0.8, id="12%-off"),  # passes 0.50, 0.55, .., 0.85: 8 of 10
        pytest.param(8.8, 10, 0.8, id="12%-below"),
        pytest.param(15.1, 10, 0.0, id="51%-off"),
        pytest.param(1000, 10, 0.0, id="far-off"),
        pytest.param(0, 10, 0.0, id="0-for-10"),
        pytest.param(-10, 10, 0.0, id="wrong-sign"),
        pytest.param(-9.2, -10, 0.9, id="negative-reference"),
        pytest.param(0, 0, 1.0, id="0-for-0"),
        pytest.param(0.001, 0, 0.0, id="something-for-0"),
        pytest.param(1e308, -1e308, 0.0, id="overflow"),
        pytest.param(1.0, 5e-324, 0.0, id="tiny-reference"),
    ],
)
def test_mean_relative_accuracy(answer, reference, expected):
    assert mean_relative_accuracy(float(answer), float(reference)) == pytest.approx(expected)


@pytest.mark.parametrize("reference", [100.0, 20.0, 10.0, 3.0, 1.0, 0.1])
@pytest.mark.parametrize("percent_off", range(5, 55, 5))
@pytest.mark.parametrize("sign", [-1, 1], ids=["below", "above"])
def test_mean_relative_accuracy_counts_each_theta_at_its_boundary(reference, percent_off, sign):
    """An error of exactly 1 - theta passes theta: 5% passes all ten, 10% nine, .., 50% one."""
    answer = reference * (100 + sign * percent_off) / 100
    num_passed = 11 - percent_off // 5
    assert mean_relative_accuracy(answer, reference) == pytest.approx(num_passed / 10)
    just_over = reference * (100 + sign * (percent_off + 0.01)) / 100
    assert mean_relative_accuracy(just_over, reference) == pytest.approx((num_passed - 1) / 10)


def make_sample(problem_type: str, solution: str, **changes) -> Sample:
    fields = {
        "problem_id": 1, "problem": "What?", "data_type": "video", "problem_type": problem_type,
        "options": (), "solution": solution, "path": "x.mp4", "data_source": "hand",
        "process": "", "row": 0,
    }  # fmt: skip
    return Sample(**{**fields, **changes})


@pytest.mark.parametrize(
    "problem_type, solution, response, expected",
    [
        pytest.param("multiple choice", "<answer>B</answer>", "<answer>B</answer>", 1.0, id="mc"),
        pytest.param("multiple choice", "B", "<answer>(b) left</answer>", 1.0, id="mc-brackets"),
        pytest.param("multiple choice", "B", "<answer>C</answer>", 0.0, id="mc-wrong"),
        pytest.param("multiple choice", "B", "B", 0.0, id="mc-without-tags"),
        pytest.param("numerical", "<answer>4</answer>", "<answer>4.0</answer>", 1.0, id="number"),
        pytest.param("numerical", "4", "<answer>4.01</answer>", 0.0, id="number-near"),
        pytest.param("OCR", "no entry here now", "<answer>no entry</answer>", 0.5, id="ocr"),
        pytest.param("free-form", "a red square", "<answer>a red square</answer>", 1.0, id="text"),
        pytest.param("free-form", "a red square", "<answer>birds</answer>", 0.0, id="text-wrong"),
        # Here the reward of Section 3.1 would be 0.88, 0.5 and 0.49.
        pytest.param("regression", "<answer>25</answer>", "<answer>28</answer>", 0.8, id="mra"),
        pytest.param("regression", "10", "<answer>15.1</answer>", 0.0, id="mra-51%"),
        pytest.param("regression", "1,000", "<answer>1,010</answer>", 1.0, id="mra-commas"),
        pytest.param("regression", "10", "10", 0.0, id="mra-without-tags"),
        pytest.param("regression", "10", "<answer>ten</answer>", 0.0, id="mra-no-number"),
        pytest.param("regression", "10", "<answer>1e999</answer>", 0.0, id="mra-infinite"),
        pytest.param("regression", "many", "<answer>10</answer>", 0.0, id="mra-no-reference"),
        pytest.param("regression", "10", "", 0.0, id="mra-nothing-said"),
    ],
)
def test_score_of_each_type(problem_type, solution, response, expected):
    assert score_item(response, make_sample(problem_type, solution)) == pytest.approx(expected)


def make_item(
    problem_type: str, score: float | None, data_type: str = "video", problem_id: int = 0
) -> dict:
    error = None if score is not None else "clip.mp4: cannot be read"
    return {
        "problem_id": problem_id, "row": problem_id, "problem_type": problem_type, "score": score,
        "data_type": data_type, "error": error,
    }  # fmt: skip


ITEMS = [
    make_item("multiple choice", 1.0, problem_id=1),
    make_item("multiple choice", 0.0, problem_id=2),
    make_item("multiple choice", 1.0, "image", problem_id=3),
    make_item("numerical", 1.0, "image", problem_id=4),
    make_item("regression", 0.7, problem_id=5),
    make_item("regression", 0.2, problem_id=6),
    make_item("OCR", 0.25, "image", problem_id=7),
    make_item("free-form", 0.5, problem_id=8),
    make_item("multiple choice", None, problem_id=9),
    make_item("regression", None, problem_id=10),
]
BY_TYPE = {
    "OCR": {"n": 1, "score": 0.25},
    "free-form": {"n": 1, "score": 0.5},
    "multiple choice": {"n": 3, "score": 2 / 3},
    "numerical": {"n": 1, "score": 1.0},
    "regression": {"n": 2, "score": 0.45},
}


@pytest.mark.parametrize(
    "is_toy, num_counted, accuracy",
    [
        pytest.param(False, 4, 0.75, id="choices-and-numbers"),
        pytest.param(True, 2, 0.5, id="toy-video-choices"),
    ],
)
def test_summary(is_toy, num_counted, accuracy):
    summary = summarise(ITEMS, is_toy)
    assert summary["n"] == num_counted
    assert summary["accuracy"] == accuracy
    assert summary["by_type"] == {
        kind: {"n": part["n"], "score": pytest.approx(part["score"])}
        for kind, part in BY_TYPE.items()
    }
    assert summary["num_items"] == 10
    assert len(summary["unusable"]) == 2
    assert "clip.mp4" in json.dumps(summary["unusable"])


def test_unusable_items_of_one_problem_id_are_all_listed():
    items = [make_item("numerical", None, problem_id=7) | {"row": row} for row in range(3)]
    assert len(summarise(items, is_toy=False)["unusable"]) == 3


@pytest.mark.parametrize(
    "items, num_items",
    [
        pytest.param([], 0, id="no-items"),
        pytest.param(ITEMS[-2:], 2, id="all-unusable"),
        pytest.param([make_item("OCR", 0.5)], 1, id="none-that-count"),
    ],
)
def test_summary_without_anything_to_count_has_no_accuracy(items, num_items):
    summary = summarise(items, is_toy=False)
    assert (summary["n"], summary["accuracy"]) == (0, None)
    assert summary["num_items"] == num_items


# ------------------------------------------------------------------- a benchmark of eight items

MISSING = 2  # the row whose clip is not there
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
    """Puts ANSWERS in the model's mouth; a list of (prompts, arguments), one for each batch."""
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

    monkeypatch.setattr(evaluation, "sample_groups", answer)
    return batches


def evaluate_here(config: EvalConfig, is_toy: bool = False) -> list[dict]:
    with process_group() as world:
        return evaluate(config, world, is_toy)


def read_results(folder: str | Path) -> tuple[dict[str, str], list[dict], dict]:
    """All files below a results folder by name, the items and the summary of the only benchmark."""
    files = {path.name: path.read_text() for path in Path(folder).rglob("*") if path.is_file()}
    items = next(text for name, text in files.items() if name.endswith(".jsonl"))
    summary = next(text for name, text in files.items() if name.endswith(".summary.json"))
    return files, [json.loads(line) for line in items.splitlines()], json.loads(summary)


@pytest.mark.parametrize("where", [".", "Evaluation"], ids=["holds-Evaluation", "is-Evaluation"])
def test_rows_are_found_where_the_root_is_or_holds_evaluation(benchmark, where):
    samples = load_samples(benchmark / "Evaluation/eval_tiny.json", benchmark / where)
    assert [Path(sample.path).is_file() for sample in samples] == [
        number != MISSING for number in range(len(samples))
    ]


def test_rows_are_found_without_a_data_root(benchmark):
    """`--data Evaluation/eval_tiny.json`, whose rows say ./Evaluation/..."""
    samples = load_samples(benchmark / "Evaluation/eval_tiny.json")
    assert sum(Path(sample.path).is_file() for sample in samples) == len(samples) - 1
    assert [sample.extra["original_question_type"] for sample in samples[:2]] == ["t0", "t1"]


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
    assert written["settings"] == dataclasses.asdict(settings)
    assert (written["n"], written["accuracy"]) == (4, 0.5)  # rows 0, 1, 3, 7
    assert {kind: part["n"] for kind, part in written["by_type"].items()} == {
        "OCR": 1, "free-form": 1, "multiple choice": 3, "numerical": 1, "regression": 1,
    }  # fmt: skip
    assert written["by_type"]["regression"]["score"] == pytest.approx(0.8)
    assert written["num_items"] == 8
    assert len(written["unusable"]) == 1
    assert "Evaluation/Tiny" in json.dumps(written["unusable"])


def test_decoding_is_what_the_flags_say(settings, asked):
    evaluate_here(settings)
    assert [len(prompts) for prompts, _, _ in asked] == [2, 3, 2]  # of 3, 3, 2, one clip missing
    assert all(arguments == (6, 0.01, 0.001) for _, _, arguments in asked)
    assert all(len(row_keys) == 1 for _, keys, _ in asked for row_keys in keys)
    everything = [key for _, keys, _ in asked for (key,) in keys]
    assert len(set(everything)) == 7, "each item has random numbers of its own"


def pixels(config: EvalConfig, asked: list) -> dict[int, torch.Tensor]:
    """What the model is shown, by row: float32 (N, 1176)."""
    asked.clear()
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
        order: pixels(dataclasses.replace(settings, order=order), asked)
        for order in ("ordered", "shuffled", "reversed", "single")
    }
    for row in (0, 1, 6, 7):
        frames = {order: frames_of(patches[row]) for order, patches in shown.items()}
        assert len(set(frames["ordered"])) == 8, "a clip whose frames all differ"
        assert frames["reversed"] == frames["ordered"][::-1]
        assert frames["shuffled"] != frames["ordered"]
        assert sorted(frames["shuffled"]) == sorted(frames["ordered"])
        assert frames["single"] == [frames["ordered"][4]] * 8
    for row in (3, 4, 5):  # an image knows no order
        assert all(torch.equal(patches[row], shown["ordered"][row]) for patches in shown.values())
    files, _, _ = read_results(settings.output_dir)
    assert len(files) == 8, "two files for each order"


def test_a_shuffle_depends_on_the_seed_and_the_row_alone(settings, asked):
    shuffled = dataclasses.replace(settings, order="shuffled")
    first = pixels(shuffled, asked)
    again = pixels(dataclasses.replace(shuffled, batch_size=8), asked)
    assert all(torch.equal(first[row], again[row]) for row in first)
    other = pixels(dataclasses.replace(shuffled, seed=1), asked)
    assert any(not torch.equal(first[row], other[row]) for row in (0, 1, 6, 7))


def test_two_data_files_of_one_name_do_not_overwrite_each_other(
    settings, asked, tmp_path, capsys, monkeypatch
):
    """Both would be written to eval_tiny.ordered.jsonl."""
    twin = tmp_path / "other/eval_tiny.json"
    twin.parent.mkdir()
    shutil.copy(settings.data[0], twin)
    monkeypatch.setattr(sys, "argv", ["eval.py", *command_line(settings), str(twin)])
    with pytest.raises(SystemExit):
        run(evaluation.main)
    error = capsys.readouterr().err
    assert error.startswith("error: ")
    assert "--data" in error
    assert asked == []
    assert not Path(settings.output_dir).exists()


def test_several_data_files_give_a_summary_each(settings, asked, tmp_path):
    twin = tmp_path / "twin.json"
    shutil.copy(settings.data[0], twin)
    summaries = evaluate_here(dataclasses.replace(settings, data=[settings.data[0], str(twin)]))
    assert [summary["benchmark"] for summary in summaries] == ["eval_tiny", "twin"]
    assert summaries[0]["accuracy"] == summaries[1]["accuracy"] == 0.5
    files, _, _ = read_results(settings.output_dir)
    assert len(files) == 4


# --------------------------------------------------------------------------------------- commands


def command_line(config: EvalConfig, **changes: str) -> list[str]:
    names = ("model", "data_root", "output_dir", "max_frames", "batch_size", "max_new_tokens")
    values = {name: str(getattr(config, name)) for name in names} | {"data": config.data[0]}
    return [word for name, value in (values | changes).items() for word in (f"--{name}", value)]


@contextlib.contextmanager
def one_thread():
    """Sums of floats depend on the number of threads; torchrun gives each of its ranks one."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def test_one_and_two_processes_write_the_same(settings, tmp_path, capsys, monkeypatch):
    """The random model answers; the missing clip and the printed table come along."""
    monkeypatch.setattr(sys, "argv", ["eval.py", *command_line(settings)])
    with one_thread():
        run(evaluation.main)
    table = capsys.readouterr().out
    assert "eval_tiny, ordered frames: accuracy" in table
    assert "over 4 items" in table
    assert "1 items cannot be used" in table
    one, items, summary = read_results(settings.output_dir)
    assert [item["score"] is None for item in items] == [row == MISSING for row in range(8)]
    assert all(item["response"] for item in items if item["row"] != MISSING)
    assert all(1 <= item["length"] <= 6 for item in items if item["row"] != MISSING)

    there = str(tmp_path / "of_two")
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone",
               "--nproc_per_node", "2", str(ROOT / "eval.py"),
               *command_line(settings, output_dir=there)]  # fmt: skip
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("accuracy") == 1, "rank 0 alone prints the table"
    two, _, summary_of_two = read_results(there)
    assert two["eval_tiny.ordered.jsonl"] == one["eval_tiny.ordered.jsonl"]
    summary["settings"]["output_dir"] = there
    assert summary_of_two == summary


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
    monkeypatch.setattr(sys, "argv", ["eval.py"])
    with pytest.raises(SystemExit) as stopped:
        run(evaluation.main)
    assert stopped.value.code == 2
    output = capsys.readouterr()
    assert len(output.err.splitlines()) == 1
    assert output.err.startswith("error: ")
    assert to_run in output.err
    first_line = output.out.splitlines()[0]
    assert "toy" in first_line
    assert evaluation.REAL_COMMAND in first_line
    assert not (tmp_path / "runs/toy/eval").exists()


def test_the_toys_table_sets_both_models_in_both_orders(toy_folder, tmp_path, capsys, monkeypatch):
    accuracies = {("sft", "ordered"): 0.625, ("sft", "shuffled"): 0.5,
                  ("rl", "ordered"): 0.875, ("rl", "shuffled"): 0.25}  # fmt: skip

    def stand_in(config, world, is_toy):
        assert is_toy
        stage = Path(config.model).parent.name
        return [{"accuracy": accuracies[stage, config.order], "n": 224}]

    link_toy(tmp_path, toy_folder, "sft", "rl")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", ["eval.py"])
    monkeypatch.setattr(evaluation, "evaluate", stand_in)
    run(evaluation.main)
    rows = [line.split() for line in capsys.readouterr().out.splitlines()]
    assert ["SFT", "62.5", "50.0", "+12.5"] in rows
    assert ["RL", "87.5", "25.0", "+62.5"] in rows
    assert any("224" in row for row in rows)
