"""validation.py: what is counted when some samples cannot be used."""

import dataclasses
import json

import pytest
import torch
from standin import rollout_of

from config import TrainConfig
from evaluation import validation
from evaluation.answering import Answer
from evaluation.validation import Validation, load_validation
from infra.errors import UserError


@pytest.fixture
def config(toy_folder, tmp_path):
    """Rows 0 and 1 are videos, 2 an image; each problem type occurs once."""
    rows = json.loads((toy_folder / "runs/toy/data/test.json").read_text())
    kinds = ("direction", "width", "count")
    rows = [next(row for row in rows if row["data_source"] == f"toy/{kind}") for kind in kinds]
    rows[1]["data_type"] = "video"
    (tmp_path / "val.json").write_text(json.dumps(rows))
    return TrainConfig(val_data=str(tmp_path / "val.json"))


@pytest.fixture
def validate(config, world, monkeypatch):
    """Validates with given errors, by (row, order); every other response is right if ordered."""
    errors = {}

    def answer(model, tokenizer, batches, pool, settings):
        for number, samples in batches:
            answers = []
            for sample in samples:
                error = errors.get((sample.row, settings.order))
                text = sample.solution if settings.order == "ordered" else "no"
                answers.append(Answer(sample, None if error else rollout_of(None, text), error))
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
    """The video of row 0 in both orders, the only one of its type, row 1, in one."""
    found = validate({(0, "ordered"): "gone", (0, "shuffled"): "gone", (1, "shuffled"): "late"})
    assert (found["n"], found["n_shuffled"], found["accuracy"]) == (2, 0, 1.0)
    assert found["by_type"]["multiple choice"]["n"] == 0
    part = found["by_type"]["regression"]
    assert (part["n"], part["accuracy"], part["n_shuffled"], part["gap"]) == (1, 1.0, 0, None)
    assert [(record["row"], record["order"], record["error"]) for record in found["unusable"]] == [
        (0, "ordered", "gone"), (0, "shuffled", "gone"), (1, "shuffled", "late"),
    ]  # fmt: skip


def test_nothing_usable_ends_the_run_at_the_first_validation_only(validate):
    everything = {(row, order): "media: gone" for row in range(3)
                  for order in ("ordered", "shuffled")}  # fmt: skip
    with pytest.raises(UserError, match="val.json: no sample can be used: media: gone"):
        validate(everything)
    validate({})
    found = validate(everything)
    assert (found["n"], found["accuracy"], len(found["unusable"])) == (0, None, 5)


def test_data_types_that_leave_no_row_are_an_error_at_the_start(config, tmp_path):
    rows = json.loads((tmp_path / "val.json").read_text())
    (tmp_path / "val.json").write_text(json.dumps(rows[2:]))
    with pytest.raises(UserError, match="val.json has no row of --data_types video"):
        load_validation(dataclasses.replace(config, data_types=["video"]))
