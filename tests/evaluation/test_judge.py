"""judge.py: prompts of plain text, verdicts, the share of Figure 6 worked out by hand."""

import json
import shutil

import plain
import pytest
import torch
from standin import rollout_of

import evaluation.judge as judging
from evaluation.judge import judge, judge_prompts, parse_verdict, summarise_verdicts, text_prompt
from infra.distributed import process_group
from infra.errors import UserError
from model import end_tokens, load_model, load_tokenizer
from sampling import sample_groups


@pytest.fixture(scope="module")
def tokenizer(base):
    return load_tokenizer(base)


def test_text_prompts_equal_plain_decoding(base, tokenizer):
    """Without an image transformers' own forward agrees."""
    model = plain.shake(load_model(base, torch.device("cpu"))).eval()
    unpacked = plain.load_plain(base)
    unpacked.load_state_dict(model.state_dict())
    texts = ["Is it so?", "What happens in the video, and where does it go in the end?"]
    prompts = [text_prompt(text, tokenizer) for text in texts]
    rollouts = sample_groups(model, tokenizer, prompts, [[(0,)], [(0,)]], 8, 0.01, 0.001)
    for prompt, rollout in zip(prompts, rollouts, strict=True):
        ids = prompt.input_ids
        while len(ids) < len(prompt.input_ids) + 8:
            with torch.no_grad():
                ids = torch.cat([ids, unpacked(input_ids=ids[None]).logits[0, -1:].argmax(-1)])
            if int(ids[-1]) in end_tokens(model):
                break
        found = rollout.completion_ids[0][rollout.completion_mask[0]]
        assert torch.equal(found, ids[len(prompt.input_ids) :])


@pytest.mark.parametrize(
    "reply, verdict",
    [
        ("Yes.", True), (" **YES**, since", True), ("'no'", False), ("no\nyes", False),
        ("not at all", None), ("yesterday", None), ("The answer is yes", None), ("", None),
        ("1. yes", None), ("yes2", None),
    ],
)  # fmt: skip
def test_parse_verdict(reply, verdict):
    assert parse_verdict(reply) is verdict


ITEM = {
    "row": 3, "problem_id": 9, "problem": "Where to?", "options": ["A. {left}", "B. right"],
    "path": "/d/a.mp4", "data_type": "video", "response": "It goes {question} left.", "error": None,
}  # fmt: skip


def test_the_judge_reads_question_options_and_response():
    question, response = judge_prompts(ITEM)
    for text in (question, response):
        assert "Where to?\nA. {left}\nB. right" in text
        assert text.endswith("yes or no.")
    assert "It goes" not in question
    assert "Response:\nIt goes {question} left.\n" in response


def test_the_share_by_hand():
    """Of 5 temporal questions 4 have a verdict on the response, 3 of them yes."""
    pairs = [(True, True), (True, True), (True, False), (True, True), (True, None), (False, True),
             (False, None), (None, True)]  # fmt: skip
    summary = summarise_verdicts([{"question": question, "response": response, "path": str(row)}
                                  for row, (question, response) in enumerate(pairs)])  # fmt: skip
    low, high = summary.pop("interval")
    assert summary == {
        "n": 4, "grounded": 0.75, "num_items": 8, "temporal_questions": 5, "unparsed": 2,
    }  # fmt: skip
    assert low < 0.75 <= high


# ----------------------------------------------------------------------------------- whole files


@pytest.fixture
def file(tmp_path):
    """Results with five items that a judge can read, one of them only in part."""
    changes = [
        {"problem": "temporal one", "response": "before and after"}, {"data_type": "image"},
        {"problem": "still", "response": "a frame"}, {"response": None, "error": "gone"},
        {"problem": "temporal two", "response": "a frame"},
        {"problem": "temporal <|video_pad|>"}, {"problem": "temporal odd", "response": "odd"},
    ]  # fmt: skip
    items = [ITEM | {"row": row, "path": f"/d/{row}.mp4"} | c for row, c in enumerate(changes)]
    path = tmp_path / "test.ordered.jsonl"
    path.write_text("".join(json.dumps(item) + "\n" for item in items))
    return path


@pytest.fixture
def stand_in(monkeypatch, tokenizer, one_process):
    """A judge that says yes to what looks temporal; a list of its batches' sizes."""
    sizes = []

    def reply(model, tokenizer, prompts, keys, *_, **__):
        sizes.append(len(prompts))
        rollouts = []
        for prompt in prompts:
            asked = tokenizer.decode(prompt.input_ids)
            mark = "before and" if "Response:" in asked else "temporal"
            text = "hm" if "Response:\nodd" in asked else "yes." if mark in asked.split(
                "Question:")[1] else "No"  # fmt: skip
            rollouts.append(rollout_of(prompt, text))
        return rollouts

    monkeypatch.setattr(judging, "sample_groups", reply)
    return sizes


def judge_here(model, file, overwrite=False):
    with process_group() as world:
        judge(model, [str(file)], world, batch_size=2, sharded=False, overwrite=overwrite)
    records = file.with_suffix(".judge.jsonl").read_text().splitlines()
    summary = file.with_suffix(".judge.summary.json").read_text()
    return [json.loads(line) for line in records], json.loads(summary)


def test_a_file_is_judged_and_not_again_until_it_changes(base, file, stand_in, capsys):
    records, summary = judge_here(base, file)
    assert stand_in == [4, 2, 2]  # two prompts an item; one item cannot be asked about
    found = [(record["row"], record["question"], record["response"]) for record in records]
    assert found == [(0, True, True), (2, False, False), (4, True, False), (5, None, None),
                     (6, True, None)]  # fmt: skip
    assert "video_pad" in records[3]["error"]
    assert records[0]["replies"] == ["yes.", "yes."]
    assert (summary["n"], summary["grounded"], summary["unparsed"]) == (2, 0.5, 2)
    assert summary["judge"] == base
    printed = capsys.readouterr().out
    assert "temporally grounded responses 50.0 [" in printed
    assert "3 of 5 video questions need temporal reasoning" in printed

    stand_in.clear()
    assert judge_here(base, file) == (records, summary)
    assert stand_in == []
    assert "temporally grounded responses 50.0" in capsys.readouterr().out
    file.write_text(file.read_text().replace("temporal two", "still two"))
    _, summary = judge_here(base, file)
    assert len(stand_in) == 3
    assert "replaced" in capsys.readouterr().out
    assert summary["grounded"] == 1.0


def test_verdicts_of_another_judge_are_not_replaced(base, file, stand_in, tmp_path):
    judge_here(base, file)
    shutil.copytree(base, tmp_path / "judge")
    (tmp_path / "judge/extra.json").write_text("{}")
    with pytest.raises(UserError, match="model_fingerprint .* and not"):
        judge_here(str(tmp_path / "judge"), file)


@pytest.mark.parametrize(
    "text, words",
    [
        pytest.param("", "no response to a video question", id="empty"),
        pytest.param('{"row": 1}\n', "no response to a video question", id="other-records"),
        pytest.param("not json\n", "cannot be read", id="no-json"),
    ],
)
def test_what_is_no_results_file_is_named(world, tmp_path, text, words):
    (tmp_path / "x.ordered.jsonl").write_text(text)
    with pytest.raises(UserError, match=f"x.ordered.jsonl.* {words}"):
        judge("m", [tmp_path / "x.ordered.jsonl"], world, 2, False, False)
