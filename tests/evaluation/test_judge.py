"""judge.py: prompts of plain text, verdicts, the share of Figure 6 worked out by hand."""

import json
import shutil

import plain
import pytest
import torch
import torch.distributed as dist

import evaluation.judge as judging
from evaluation.judge import judge, judge_prompts, parse_verdict, summarise_verdicts, text_prompt
from infra.distributed import process_group
from infra.errors import UserError
from model import end_tokens, load_model, load_tokenizer, rope_positions
from sampling import Rollout, sample_groups


@pytest.fixture(scope="module")
def base(toy_folder):
    return str(toy_folder / "runs/toy/base")


@pytest.fixture(scope="module")
def tokenizer(base):
    return load_tokenizer(base)


@pytest.fixture(autouse=True)
def one_process(monkeypatch):
    for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK"):
        monkeypatch.delenv(name, raising=False)
    yield
    if dist.is_initialized():
        dist.destroy_process_group()


# -------------------------------------------------------------------------------------- plain text


def test_text_prompts_equal_plain_decoding(base, tokenizer):
    """Without an image the positions count on, and transformers' own forward agrees."""
    model = plain.shake(load_model(base, torch.device("cpu"))).eval()
    unpacked = plain.load_plain(base)
    unpacked.load_state_dict(model.state_dict())
    texts = ["Is it so?", "What happens in the video, and where does it go in the end?"]
    prompts = [text_prompt(text, tokenizer) for text in texts]
    for prompt in prompts:
        length = len(prompt.input_ids)
        assert torch.equal(rope_positions(prompt), torch.arange(length).expand(3, -1))
    greedy = (8, 0.01, 0.001)
    rollouts = sample_groups(model, tokenizer, prompts, [[(0,)], [(0,)]], *greedy)
    for prompt, rollout in zip(prompts, rollouts, strict=True):
        ids = prompt.input_ids
        while len(ids) < len(prompt.input_ids) + 8:
            with torch.no_grad():
                ids = torch.cat([ids, unpacked(input_ids=ids[None]).logits[0, -1:].argmax(-1)])
            if int(ids[-1]) in end_tokens(model):
                break
        found = rollout.completion_ids[0][rollout.completion_mask[0]]
        assert torch.equal(found, ids[len(prompt.input_ids) :])


# ---------------------------------------------------------------------------------------- verdicts


@pytest.mark.parametrize(
    "reply, verdict",
    [
        ("Yes.", True), ("YES\n", True), (" **Yes**, since", True), ("'no'", False),
        ("no\nyes", False), ("not at all", None), ("yesterday", None), ("The answer is yes", None),
        ("", None), ("1. yes", None), ("yes2", None),
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


def verdicts(*pairs):
    """One record for each (question, response, clip)."""
    return [
        {"row": row, "question": question, "response": response, "path": clip}
        for row, (question, response, clip) in enumerate(pairs)
    ]


def test_the_share_by_hand():
    summary = summarise_verdicts(
        verdicts(
            (True, True, "a"), (True, True, "b"), (True, False, "c"), (True, True, "d"),
            (True, None, "e"), (False, True, "f"), (False, None, "g"), (None, True, "h"),
        )
    )  # fmt: skip
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
def stand_in(monkeypatch, tokenizer):
    """A judge that says yes to what looks temporal; a list of its batches' sizes."""
    sizes = []

    def reply(model, tokenizer, prompts, keys, *arguments, **named):
        sizes.append(len(prompts))
        rollouts = []
        for prompt in prompts:
            asked = tokenizer.decode(prompt.input_ids)
            mark = "before and" if "Response:" in asked else "temporal t"
            text = "yes." if mark in asked or "temporal one" in asked else "No"
            if "Response:\nodd" in asked:
                text = "hm"
            elif "temporal odd" in asked:
                text = "yes"
            mask = torch.ones(1, 1).bool()
            rollouts.append(Rollout(prompt, mask.long(), mask, mask[0], mask.float(), [text]))
        return rollouts

    monkeypatch.setattr(judging, "sample_groups", reply)
    return sizes


def judge_here(base, file, batch_size=2, overwrite=False):
    with process_group() as world:
        judge(base, [str(file)], world, batch_size, sharded=False, overwrite=overwrite)
    records = [json.loads(line) for line in
               file.with_suffix(".judge.jsonl").read_text().splitlines()]  # fmt: skip
    return records, json.loads(file.with_suffix(".judge.summary.json").read_text())


def test_a_file_is_judged(base, file, stand_in, capsys):
    records, summary = judge_here(base, file)
    assert stand_in == [4, 2, 2]  # two prompts an item; one item cannot be asked about
    found = {record["row"]: (record["question"], record["response"]) for record in records}
    assert found == {0: (True, True), 2: (False, False), 4: (True, False), 5: (None, None),
                     6: (True, None)}  # fmt: skip
    assert [record["row"] for record in records] == [0, 2, 4, 5, 6]
    assert "video_pad" in records[3]["error"]
    assert records[0]["replies"] == ["yes.", "yes."]
    assert (summary["n"], summary["grounded"]) == (2, 0.5)
    assert summary["unparsed"] == 2
    assert summary["judge"] == base
    printed = capsys.readouterr().out
    assert "temporally grounded responses 50.0 [" in printed
    assert "3 of 5 video questions need temporal reasoning" in printed


def test_a_judged_file_is_not_judged_again_until_it_changes(base, file, stand_in, capsys):
    judge_here(base, file)
    stand_in.clear()
    judge_here(base, file)
    assert stand_in == []
    assert "temporally grounded responses 50.0" in capsys.readouterr().out
    file.write_text(file.read_text().replace("temporal two", "still two"))
    _, summary = judge_here(base, file)
    assert len(stand_in) == 3
    assert "replaced" in capsys.readouterr().out
    assert summary["grounded"] == 1.0


def test_another_judge_replaces_verdicts_on_request_only(base, file, stand_in, tmp_path):
    judge_here(base, file)
    shutil.copytree(base, tmp_path / "judge")
    (tmp_path / "judge/extra.json").write_text("{}")
    with pytest.raises(UserError, match="model_fingerprint .* and not"):
        judge_here(str(tmp_path / "judge"), file)
    dist.destroy_process_group()
    _, summary = judge_here(str(tmp_path / "judge"), file, overwrite=True)
    assert summary["judge"] == str(tmp_path / "judge")


@pytest.mark.parametrize(
    "text, words",
    [
        pytest.param("", "no response to a video question", id="empty"),
        pytest.param('{"row": 1}\n', "an item lacks", id="other-records"),
        pytest.param("not json\n", "cannot be read", id="no-json"),
        pytest.param("[1]\n", "not objects", id="no-objects"),
        pytest.param(json.dumps(ITEM | {"response": None}) + "\n", "no response", id="no-response"),
    ],
)
def test_what_is_no_results_file_is_named(base, tmp_path, text, words):
    file = tmp_path / "x.ordered.jsonl"
    file.write_text(text)
    with pytest.raises(ValueError, match=words) as caught:
        judge_here(base, file)
    assert "x.ordered.jsonl" in str(caught.value)
