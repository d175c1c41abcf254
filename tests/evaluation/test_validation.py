"""validation.py: what is counted when some samples cannot be used."""

import dataclasses
import json

import pytest
import torch

from config import TrainConfig
from evaluation import validation
from evaluation.answering import Answer
from evaluation.validation import Validation, load_validation
from infra.distributed import process_group
from infra.errors import UserError
from sampling import Rollout


@pytest.fixture(autouse=True)
def world(monkeypatch):
    for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK"):
        monkeypatch.delenv(name, raising=False)
    with process_group() as world:
        yield world


@pytest.fixture
def config(toy_folder, tmp_path):
    """Rows 0 and 1 are videos, 2 an image; each problem type occurs once."""
    rows = json.loads((toy_folder / "runs/toy/data/test.json").read_text())
    kinds = ("direction", "width", "count")
    rows = [next(row for row in rows if row["data_source"] == f"toy/{kind}") for kind in kinds]
    assert [row["data_type"] for row in rows] == ["video", "image", "image"]
    rows[1]["data_type"] = "video"
    (tmp_path / "val.json").write_text(json.dumps(rows))
    return TrainConfig(val_data=str(tmp_path / "val.json"))


@pytest.fixture
def validate(config, world, monkeypatch):
    """Validates with given errors, by (row, order); every other response is right if ordered."""
    errors = {}

    def answer(model, tokenizer, batches, pool, settings):
        mask = torch.ones(1, 2, dtype=torch.bool)
        for number, samples in batches:
            answers = []
            for sample in samples:
                error = errors.get((sample.row, settings.order))
                text = sample.solution if settings.order == "ordered" else "no"
                rollout = Rollout(None, mask.long(), mask, mask[:, 0], mask.float(), [text])
                answers.append(Answer(sample, None if error else rollout, error))
            yield number, answers

    monkeypatch.setattr(validation, "answer", answer)
    run = Validation(config, world, None, None, {}, load_validation(config))

    def call(new_errors):
        errors.clear()
        errors.update(new_errors)
        return run(torch.nn.Linear(1, 1))

    return call


def test_all_samples_are_usable(validate):
    found = validate({})
    assert (found["n"], found["n_shuffled"], found["unusable"]) == (3, 2, [])
    assert (found["accuracy"], found["accuracy_shuffled"], found["gap"]) == (1.0, 0.0, 1.0)
    assert found["by_type"]["numerical"] == {
        "n": 1, "accuracy": 1.0, "n_shuffled": 0, "accuracy_shuffled": None, "gap": None,
    }  # fmt: skip


def test_a_sample_that_cannot_be_used_is_counted_with_its_reason(validate):
    found = validate({(0, "ordered"): "a.mp4: gone", (0, "shuffled"): "a.mp4: gone"})
    assert (found["n"], found["n_shuffled"], found["accuracy"]) == (2, 1, 1.0)
    assert found["by_type"]["multiple choice"]["n"] == 0
    assert [(record["row"], record["order"], record["error"]) for record in found["unusable"]] == [
        (0, "ordered", "a.mp4: gone"), (0, "shuffled", "a.mp4: gone"),
    ]  # fmt: skip


@pytest.mark.parametrize("order, n, n_shuffled", [("ordered", 0, 1), ("shuffled", 1, 0)])
def test_the_only_video_of_a_type_may_fail_in_one_order(validate, order, n, n_shuffled):
    part = validate({(1, order): "timed out"})["by_type"]["regression"]
    assert (part["n"], part["n_shuffled"], part["gap"]) == (n, n_shuffled, None)
    assert part["accuracy"] == (None if order == "ordered" else 1.0)


def test_nothing_usable_ends_the_run_at_the_first_validation_only(validate):
    everything = {(row, order): "media: gone" for row in range(3)
                  for order in ("ordered", "shuffled")}  # fmt: skip
    with pytest.raises(UserError, match="val.json: no sample can be used: media: gone"):
        validate(everything)
    validate({})
    found = validate(everything)
    assert (found["n"], found["accuracy"], len(found["unusable"])) == (0, None, 5)


def test_data_types_that_leave_no_row_are_an_error_at_the_start(config, tmp_path):
    assert len(load_validation(config)) == 3
    assert load_validation(dataclasses.replace(config, val_data="")) == []
    rows = json.loads((tmp_path / "val.json").read_text())
    (tmp_path / "val.json").write_text(json.dumps(rows[2:]))
    with pytest.raises(UserError, match="val.json has no row of --data_types video"):
        load_validation(dataclasses.replace(config, data_types=["video"]))
    with pytest.raises(UserError, match="none.json"):
        load_validation(dataclasses.replace(config, val_data="none.json"))
