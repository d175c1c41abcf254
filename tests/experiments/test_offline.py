"""experiments/offline.py: against hand-made groups, train_rl.score_group and single gradients."""

import json
import math
import sys

import pytest
import torch
from torch.nn.functional import cosine_similarity

import model as model_module
import train_rl
from config import RLConfig
from data import Sample, load_samples, make_prompt
from experiments import offline
from experiments.offline import VARIANTS, Variant, measure, read_group, spread_of
from infra.errors import UserError
from sampling import Rollout
from tgrpo import group_advantages


def group(accuracy, shuffled, length_reward=None, format_=None, texts=None, **record):
    """A recorded group with these parts of the reward."""
    zeros, ones = [0.0] * len(accuracy), [1.0] * len(accuracy)
    columns = {
        "text": texts or ["-"] * len(accuracy), "length": [1] * len(accuracy),
        "accuracy": accuracy, "format": format_ or ones, "temporal": zeros,
        "length_reward": length_reward or zeros, "reward": zeros, "advantage": zeros,
    }  # fmt: skip
    rows = zip(*columns.values(), strict=True)
    responses = [dict(zip(columns, row, strict=True)) for row in rows]
    record["shuffled_responses"] = [{"text": "-", "accuracy": one} for one in shuffled]
    return read_group({"responses": responses, "r_t": 0.0, "row": 0, "step": 1, **record}, 0.5)


CANCELS = group([1, 1, 0, 0], [1, 0])  # p = p~: r_t is earned; two values: it cancels
ACTS = group([1, 1, 0, 0], [0, 0], length_reward=[0.2, 0, 0, 0])  # three values
SHORTCUT = group([1, 0, 0, 0], [1, 1])  # p < p~: no r_t
RIGHT = group([1, 1, 1, 1], [1, 1])  # one value


def test_a_group_of_two_values_moves_under_every_norm_but_std():
    assert measure([CANCELS], Variant()) == pytest.approx(
        {"earned": 1, "moved": 0, "effect": 0, "size": math.sqrt(3) / 2})  # fmt: skip
    # 2.3, 2.3, 1, 1 around their mean instead of 2, 2, 1, 1: 0.65 instead of 0.5
    assert measure([CANCELS], VARIANTS["norm none"])["effect"] == pytest.approx(0.15)
    # + 0.3 z(temporal), z = +- sqrt(3) / 2
    effect = measure([CANCELS], VARIANTS["norm separate"])["effect"]
    assert effect == pytest.approx(0.3 * math.sqrt(3) / 2)
    assert measure([CANCELS], VARIANTS["on advantages"])["effect"] == pytest.approx(0.15)


def test_the_rules_differ_where_they_should():
    fair = group([1, 0, 0, 0], [0.6, 0])  # p = 0.25 < p~ = 0.5; mean 0.25 >= 0.8 * 0.3
    earned = {name: [measure([one], VARIANTS[name])["earned"] for one in (CANCELS, ACTS, fair)]
              for name in ("as printed", "p > p~", "official 0.8")}  # fmt: skip
    assert earned == {"as printed": [1, 1, 0], "p > p~": [0, 1, 0], "official 0.8": [1, 1, 1]}
    assert measure([SHORTCUT], VARIANTS["official 0.8"])["earned"] == 0


def test_where_a_part_varies_among_the_correct_r_t_acts():
    with_r_t, without = torch.tensor([[2.5, 2.3, 1, 1], [2.2, 2, 1, 1]], dtype=torch.float64)
    by_hand = (group_advantages(with_r_t) - group_advantages(without)).abs().mean()
    found = measure([CANCELS, ACTS, SHORTCUT, RIGHT], Variant())
    assert found["effect"] == pytest.approx(float(by_hand) / 4)
    assert (found["earned"], found["moved"]) == (0.75, 0.25)


def test_kinds_of_spread_say_where_r_t_cancels():
    wrong = group([0, 0, 0, 0], [0, 0])
    mixed = group([1, 0, 0, 0], [0, 0], format_=[0, 1, 1, 1])  # correct and wrong both have 1
    kinds = [spread_of(one) for one in (RIGHT, wrong, CANCELS, SHORTCUT, ACTS, mixed)]
    assert kinds == ["one value"] * 2 + ["two values"] * 2 + ["more"] * 2
    assert measure([mixed], Variant())["moved"] == 1


# ------------------------------------------------------------------------- as train_rl.py has them

TEXTS = {text: f"<think>t</think><answer>{text}</answer>" for text in "AB"}
SAMPLE = Sample(
    problem_id=3, problem="Which?", data_type="video", problem_type="multiple choice",
    options=("A. a", "B. b"), solution="<answer>A</answer>", path="x.y4m", data_source="",
    process="", row=5,
)  # fmt: skip


def rollout(texts, lengths):
    mask = torch.arange(max(lengths)) < torch.tensor(lengths)[:, None]
    ids = torch.zeros(mask.shape, dtype=torch.long)
    prompt = type("Prompt", (), {"sample": SAMPLE})()
    return Rollout(prompt, ids, mask, mask.any(-1), torch.zeros(mask.shape), texts)


@pytest.mark.parametrize("norm", ["std", "none", "separate"])
@pytest.mark.parametrize("target", ["reward", "advantage"])
def test_recorded_advantages_are_reproduced(norm, target, tmp_path):
    config = RLConfig(advantage_norm=norm, temporal_target=target, l_min=3, l_max=4, alpha=0.4)
    ordered = rollout([TEXTS["A"], TEXTS["A"], TEXTS["B"], "A"], [3, 2, 2, 5])
    shuffled = rollout([TEXTS["A"], TEXTS["B"]], [1, 1])
    scored = train_rl.score_group(ordered, shuffled, config)
    record = json.loads(json.dumps(train_rl.rollout_record(0, scored)))
    found = read_group(record, config.correct_threshold)
    offline.check_recorded(tmp_path, [found], vars(config))
    other = {"advantage_norm": "std" if norm == "none" else "none"}
    with pytest.raises(UserError, match="row 5 of step 1"):
        offline.check_recorded(tmp_path, [found], vars(config) | other)


# -------------------------------------------------------------------------------------- gradients


@pytest.fixture(scope="module")
def toy(toy_folder):
    return toy_folder / "runs/toy"


@pytest.fixture(scope="module")
def tokenizer(toy):
    return model_module.load_tokenizer(str(toy / "base"))


def test_a_response_is_tokenised_to_its_length_or_its_group_left_out(tokenizer):
    text = "<think>It goes from left to right.</think>\n<answer>B</answer>"
    ids = tokenizer(text, add_special_tokens=False)["input_ids"]

    def tokens_of(lengths, max_new_tokens=40):
        one = group([1.0] * len(lengths), [], texts=[text] * len(lengths))
        for response, length in zip(one.record["responses"], lengths, strict=True):
            response["length"] = length
        return offline.tokenise(one, tokenizer, max_new_tokens)

    found, mask = tokens_of([len(ids) + 1] * 2)
    assert found.tolist() == [[[*ids, tokenizer.eos_token_id]] * 2] and mask.all()
    assert tokens_of([len(ids) + 2, len(ids) + 1]) is None  # other pieces, a longer response
    assert tokens_of([len(ids)]) is None  # without an end token, and not cut
    found, mask = tokens_of([len(ids)], max_new_tokens=len(ids))  # cut at the limit
    assert found.tolist() == [[ids]] and mask.all()


def test_cosines_are_those_of_single_gradients(toy, tokenizer):
    """A group's gradient is -1/G sum_i A_i grad(mean log-prob of i), taken one by one."""
    config = {"data": str(toy / "data/rl.json"), "data_root": "", "prompt_template": "",
              "max_new_tokens": 40, "max_frames": 4, "min_pixels": 3136, "max_pixels": 100352,
              "image_max_pixels": 100352}  # fmt: skip
    samples = load_samples(config["data"])
    sample = next(one for one in samples if one.is_video)
    texts = ["<answer>A</answer>", "<answer>B</answer>", "left", "It goes"]
    about = {"row": sample.row, "problem": sample.problem, "solution": sample.solution}
    acts = group([1, 1, 0, 0], [0, 0], length_reward=[0.2, 0, 0, 0], texts=texts, **about)
    odd = group([1, 0, 0, 0], [0, 0], texts=texts, **about)  # keeps length 1: left out
    for response in acts.record["responses"]:
        response["length"] = len(tokenizer(response["text"])["input_ids"]) + 1
    found = offline.gradient_cosines(config, [acts, odd], str(toy / "base"))
    assert found["groups"] == {"used": 1, "left_out": 1}

    model = model_module.load_model(str(toy / "base"), torch.device("cpu"))
    prompt = make_prompt(sample, tokenizer, max_frames=4, max_pixels=100352)
    ids, mask = offline.tokenise(acts, tokenizer, 40)
    gradients = []
    for row in range(4):
        length = int(mask[0, row].sum())
        logp = model_module.group_logprobs(
            model, [prompt], ids[:, row : row + 1, :length], mask[:, row : row + 1, :length]
        )
        grads = torch.autograd.grad(-logp.mean() / 4, list(model.parameters()),
                                    materialize_grads=True)  # fmt: skip
        gradients.append(torch.cat([grad.flatten() for grad in grads]).double())
    rewards = torch.tensor([[2.5, 2.3, 1, 1], [2.2, 2, 1, 1]])
    ours, plain = (group_advantages(one) @ torch.stack(gradients) for one in rewards)
    expected = cosine_similarity(ours, plain, dim=0)
    assert 0.9 < expected < 1 - 1e-5
    assert found["as printed"]["cosine"] == pytest.approx(float(expected), abs=1e-6)
    change = float((ours - plain).norm() / plain.norm())
    assert found["as printed"]["change"] == pytest.approx(change, rel=1e-3)


def test_a_row_of_other_data_is_named(toy, tokenizer):
    config = {"data": str(toy / "data/rl.json"), "data_root": "", "prompt_template": "",
              "max_frames": 4, "min_pixels": 3136, "max_pixels": 100352,
              "image_max_pixels": 100352}  # fmt: skip
    other = group([1.0], [], row=0, problem="another question", solution="<answer>A</answer>")
    with pytest.raises(UserError, match="row 0 of .* is not the one that was answered"):
        offline.prompts_of([other], config, tokenizer, str(toy / "base"))


def test_plain_grpo_is_one_clear_line(tmp_path, monkeypatch):
    plain = group([1.0, 0.0], []).record
    for response, advantage in zip(plain["responses"], (0.5**0.5, -(0.5**0.5)), strict=True):
        response["advantage"] = advantage
    (tmp_path / "rollouts.jsonl").write_text(json.dumps(plain) + "\n")
    (tmp_path / "config.json").write_text(json.dumps(vars(RLConfig())))
    monkeypatch.setattr(sys, "argv", ["offline.py", str(tmp_path)])
    with pytest.raises(UserError, match="no group has responses to shuffled frames"):
        offline.main()
