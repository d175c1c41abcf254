"""The parts of an RL step on one process: scoring a group, what is sampled, updates, the record."""

import copy
import dataclasses
import json
from types import SimpleNamespace

import plain
import pytest
import torch

import train_rl
from config import RLConfig
from data import load_usable_samples, read_frames, require_solution
from infra.distributed import process_group
from infra.errors import UserError
from infra.optim import learning_rate_at, make_optimizer
from model import enable_packing, load_model, load_tokenizer
from sampling import Rollout
from tgrpo import group_advantages
from train_rl import (
    group_metrics,
    logprobs,
    make_prompts,
    record_step,
    rollout_record,
    sample_rollouts,
    score_group,
    show_first_step,
    update_policy,
    warn,
)

RIGHT = "<think>It goes.</think><answer>B</answer>"  # accuracy 1, format 1
WRONG = "<think>It goes.</think><answer>A</answer>"  # accuracy 0, format 1
BARE = "<answer>B</answer>"  # accuracy 1, format 0
NOTHING = "B"  # accuracy 0, format 0


def rollout(texts, lengths=None, problem_type="multiple choice", solution="<answer>B</answer>"):
    lengths = torch.tensor(lengths or [1] * len(texts))
    width = max(lengths.tolist(), default=0)
    mask = torch.arange(width) < lengths[:, None]
    sample = SimpleNamespace(
        problem_type=problem_type, solution=solution, problem="Which?", options=("A. a", "B. b"),
        row=3, identity={"row": 3, "problem_id": 7, "path": "video.mp4"},
    )  # fmt: skip
    ids = torch.zeros(len(texts), width, dtype=torch.long)
    prompt = SimpleNamespace(sample=sample)
    return Rollout(prompt, ids, mask, torch.ones(len(texts)).bool(), mask * 0.0, texts)


ORDERED = [RIGHT, WRONG, BARE, NOTHING]
# Lengths 319, 320, 512, 513: of the correct responses (the first and the third) the third is
# inside [320, 512].
LENGTHS = [319, 320, 512, 513]
REWARDS = {
    # p = 2/4, p~ = 1/2: p >= p~, so the two correct responses earn 0.3 (Eq. 2), and the third
    # 0.2 for its length (Eq. 5).
    "temporal-earned": ({}, [RIGHT, WRONG], [2 + 0.3, 1, 1 + 0.3 + 0.2, 0]),
    # p~ = 2/2 > p: no temporal reward.
    "temporal-not-earned": ({}, [RIGHT, BARE], [2, 1, 1 + 0.2, 0]),
    "an-image": ({}, None, [2, 1, 1 + 0.2, 0]),
    "no-length-reward": ({"length_reward": False}, [WRONG], [2.3, 1, 1.3, 0]),
    "other-weights": ({"alpha": 1.0, "omega": 2.0}, [WRONG], [3, 1, 4, 0]),
    "other-window": ({"l_min": 1, "l_max": 319}, None, [2.2, 1, 1, 0]),
    # p~ = 0: the placebo is earned with wrong ordered answers as well.
    "no-shuffled-group": ({"shuffled_group_size": 0}, [], [2.3, 1, 1.5, 0]),
    "to-the-advantage": ({"temporal_target": "advantage"}, [WRONG], [2, 1, 1.2, 0]),
}


@pytest.mark.parametrize(("flags", "shuffled", "expected"), REWARDS.values(), ids=REWARDS)
def test_rewards_of_a_group_by_hand(flags, shuffled, expected):
    shuffled = None if shuffled is None else rollout(shuffled)
    group = score_group(rollout(ORDERED, LENGTHS), shuffled, RLConfig(**flags))
    assert group.rewards.tolist() == pytest.approx(expected)
    assert group.parts["accuracy"].tolist() == [1, 0, 1, 0]
    assert group.parts["format"].tolist() == [1, 1, 0, 0]
    assert group.correct.tolist() == [True, False, True, False]
    advantages = group_advantages(torch.tensor(expected, dtype=torch.float64))
    if flags.get("temporal_target") == "advantage":
        advantages = advantages + torch.tensor([0.3, 0, 0.3, 0], dtype=torch.float64)
    torch.testing.assert_close(group.advantages, advantages)


@pytest.mark.parametrize("norm", ["none", "separate"])
def test_r_t_always_moves_the_advantages_of_the_other_norms(norm):
    """Binary rewards, all with the format: Eq. 3 cancels r_t (its effect is 0), these do not."""
    config = RLConfig(advantage_norm=norm, length_reward=False)
    group = score_group(rollout([RIGHT, WRONG]), rollout([WRONG]), config)
    # none: 2.3 and 1 less their mean. separate: z(accuracy) + 0.3 z(temporal), both +-1/sqrt(2).
    upper, without = {"none": (0.65, 0.5), "separate": (1.3 / 2**0.5, 1 / 2**0.5)}[norm]
    assert group.advantages.tolist() == pytest.approx([upper, -upper])
    assert group.advantages_without.tolist() == pytest.approx([without, -without])


def test_metrics_without_a_shuffled_group():
    group = score_group(rollout(ORDERED), rollout([]), RLConfig(shuffled_group_size=0))
    with process_group():
        means, num_tokens = group_metrics([group])
    assert (means["temporal"], means["temporal_earned"], num_tokens) == (1, 0.5, 4)
    assert means["accuracy_shuffled"] is means["gap"] is None
    assert rollout_record(0, group)["shuffled_responses"] == []


def test_a_continuous_reward_is_correct_from_the_threshold_on():
    # Regression: 1 - |p - 10| / 10 for 10, 5, 4.9 and 0.
    texts = [f"<answer>{number}</answer>" for number in ("10", "5", "4.9", "0")]
    ordered = rollout(texts, problem_type="regression", solution="10")
    group = score_group(ordered, None, RLConfig(length_reward=False))
    assert group.parts["accuracy"].tolist() == pytest.approx([1, 0.5, 0.49, 0])
    assert group.correct.tolist() == [True, True, False, False]
    strict = score_group(ordered, None, RLConfig(length_reward=False, correct_threshold=0.9))
    assert strict.correct.tolist() == [True, False, False, False]


def test_a_fifth_part_of_the_reward_is_trained_on_logged_and_recorded():
    """Rewards, metrics and records read `parts`: whoever adds a part adds one line."""
    group = score_group(rollout(ORDERED), None, RLConfig(length_reward=False))
    brevity = torch.tensor([0.0, 0.0, 0.0, 1.0], dtype=torch.float64)
    group = dataclasses.replace(group, parts=group.parts | {"brevity": brevity})
    assert group.rewards.tolist() == [2, 1, 1, 1]
    with process_group():
        means, _ = group_metrics([group])
    assert (means["reward"], means["brevity"], means["accuracy"]) == (1.25, 0.25, 0.5)
    responses = rollout_record(0, group)["responses"]
    assert [response["brevity"] for response in responses] == [0, 0, 0, 1]
    assert [response["reward"] for response in responses] == [2, 1, 1, 1]


def test_metrics_of_a_step_by_hand():
    config = RLConfig(l_min=2, l_max=3, omega=0.2)
    # p = 1/2 >= p~ = 0: earned. Without r_t rewards are 2 and 1, with it 2.3 and 1: Eq. 3 gives
    # +-1/sqrt(2) for both, so r_t has no effect there.
    binary = score_group(rollout([RIGHT, WRONG], [5, 6]), rollout([WRONG, NOTHING], [3, 4]), config)
    # p = 3/4 >= p~ = 1/2. Rewards 2, 1 + 0.2, 2, 1; with r_t 2.3, 1.5, 2.3, 1.
    mixed = score_group(
        rollout([RIGHT, BARE, RIGHT, WRONG], [1, 2, 5, 5]), rollout([RIGHT, WRONG], [2, 2]), config
    )
    flat = score_group(rollout([RIGHT, RIGHT], [1, 1]), None, config)  # an image, no spread
    with process_group():
        means, num_tokens = group_metrics([binary, mixed, flat])

    def advantages(*rewards):
        mean = sum(rewards) / 4
        deviation = (sum((reward - mean) ** 2 for reward in rewards) / 3) ** 0.5
        return [(reward - mean) / deviation for reward in rewards]

    with_it, without = advantages(2.3, 1.5, 2.3, 1), advantages(2, 1.2, 2, 1)
    effect = sum(abs(one - other) for one, other in zip(with_it, without, strict=True)) / 6
    expected = {
        "reward": (2.3 + 1 + 2.3 + 1.5 + 2.3 + 1 + 2 + 2) / 8, "accuracy": 6 / 8, "format": 7 / 8,
        "accuracy_shuffled": 1 / 4, "gap": 4 / 6 - 1 / 4, "temporal": 1.0,
        "temporal_earned": 4 / 6, "temporal_effect": effect, "length_reward": 0.2 / 8,
        "completion_length": 26 / 8, "clipped_length": 0.0, "zero_std": 1 / 3,
    }  # fmt: skip
    assert means == pytest.approx(expected)
    assert num_tokens == 26 + 7 + 4
    with process_group():
        means, _ = group_metrics([flat])
    assert means["gap"] is means["temporal"] is means["temporal_effect"] is None


def test_unusable_rows_stop_a_run_or_are_left_out_and_counted(toy_folder, tmp_path, capsys):
    """Fault 9: --skip_bad_samples did not skip what reading refuses, row 2 here."""
    rows = json.loads((toy_folder / "runs/toy/data/rl.json").read_text())[:5]
    rows[1] |= {"problem_type": "numerical", "solution": "about two"}
    file = tmp_path / "rows.json"
    config = RLConfig(data=str(file))
    for change, reason in (({}, r"row 1 \(problem .*about two"), ({"solution": ""}, "row 2: 'sol")):
        rows[2] |= change
        file.write_text(json.dumps(rows))
        with pytest.raises(UserError, match=rf"rows.json, {reason}"):
            load_usable_samples(config, require_solution)
    config.skip_bad_samples = True
    assert [sample.row for sample in load_usable_samples(config, require_solution)] == [0, 3, 4]
    assert "2 of 5 rows are left out, the first: " in capsys.readouterr().out


# -------------------------------------------------------------------------------------- sampling


@pytest.fixture(scope="module")
def policy(toy_folder):
    return load_model(str(toy_folder / "runs/toy/base"), torch.device("cpu")).eval()


@pytest.fixture(scope="module")
def tokenizer(toy_folder):
    return load_tokenizer(str(toy_folder / "runs/toy/base"))


@pytest.fixture(scope="module")
def video(toy_folder, tokenizer):
    return plain.toy_prompts(toy_folder, tokenizer, ["video"])[0].sample


def prompts_of(video, tokenizer, step=0, epoch=0, max_frames=8, **flags):
    decoded = read_frames(video.path, max_frames)
    return make_prompts(video, decoded, step, epoch, tokenizer, RLConfig(**flags), {})


def sampled(policy, tokenizer, batch, step=0, seed=0):
    """Three ordered and two shuffled responses of five tokens for each sample of a batch."""
    config = RLConfig(max_new_tokens=5, group_size=3, shuffled_group_size=2, seed=seed)
    return sample_rollouts(policy, tokenizer, batch, config, step)


def test_plain_grpo_and_a_single_frame_have_no_shuffled_prompt(tokenizer, video):
    """Fault 28: shuffled and ordered prompt of a single frame are the same, so r_t is noise."""
    assert len(prompts_of(video, tokenizer)) == 2
    assert len(prompts_of(video, tokenizer, temporal=False)) == 1
    assert len(prompts_of(video, tokenizer, max_frames=1)) == 1
    assert len(prompts_of(video, tokenizer, max_frames=2)) == 2


def test_a_row_that_comes_twice_in_a_step_draws_other_numbers(policy, tokenizer, video):
    """Fault 19: where data is smaller than a step the second group was a copy of the first."""
    first, again = (prompts_of(video, tokenizer, epoch=epoch) for epoch in (0, 1))
    assert not torch.equal(first[1].pixel_values, again[1].pixel_values), "the same permutation"
    (ordered, shuffled), (other, other_shuffled) = sampled(policy, tokenizer, [first, again])
    assert (len(ordered.texts), len(shuffled.texts)) == (3, 2)
    assert torch.equal(ordered.prompt.input_ids, shuffled.prompt.input_ids)
    assert ordered.texts != other.texts
    assert shuffled.texts != other_shuffled.texts
    alone = sampled(policy, tokenizer, [first])[0]
    assert [alone[0].texts, alone[1].texts] == [ordered.texts, shuffled.texts]


def test_keys_of_the_first_epoch(monkeypatch, tokenizer, video):
    """(seed, step, row, group, place in the group), by which recorded runs are replayed."""
    keys = []
    monkeypatch.setattr(
        train_rl, "sample_groups", lambda _, __, prompts, found, ___: [keys.append(found)] * 9
    )
    batch = [prompts_of(video, tokenizer, step=4, seed=7)]
    sampled(None, tokenizer, batch, step=4, seed=7)
    row = video.row
    assert keys == [[
        [(7, 4, row, 0, number) for number in range(3)],
        [(7, 4, row, 1, number) for number in range(2)],
    ]]  # fmt: skip


# -------------------------------------------------------------------------------------- training

RATES = {
    "no-warmup-start": ((0, 10, 1.0, 0), 1.0),
    "half-way": ((5, 10, 1.0, 0), 0.5),  # (1 + cos(pi / 2)) / 2
    "warmup-first": ((0, 10, 1.0, 4), 0.25),
    "after-warmup": ((4, 10, 1.0, 4), 1.0),
    "a-third-left": ((8, 10, 1.0, 4), 0.25),  # (1 + cos(2 pi / 3)) / 2
    "peak": ((5, 10, 2e-6, 0), 1e-6),
}


@pytest.mark.parametrize(("arguments", "rate"), RATES.values(), ids=RATES)
def test_learning_rate_by_hand(arguments, rate):
    assert learning_rate_at(*arguments) == pytest.approx(rate)


def test_matrices_decay_and_vectors_do_not(policy):
    decayed, rest = make_optimizer(policy, 1e-3, 0.01).param_groups
    assert (decayed["weight_decay"], rest["weight_decay"]) == (0.01, 0.0)
    assert all(parameter.ndim >= 2 for parameter in decayed["params"])
    assert all(parameter.ndim == 1 for parameter in rest["params"])


@pytest.fixture
def learner(policy):
    model = copy.deepcopy(policy)
    enable_packing(model)  # the copy's methods are bound to the first
    return model


def test_an_infinite_loss_with_a_finite_gradient_is_not_applied(
    learner, toy_folder, tokenizer, monkeypatch
):
    """Fault 12, in RL: the metrics said null, and the weights had moved."""
    group = score_group(rollout([RIGHT, WRONG], [3, 3]), None, RLConfig())
    (prompt,) = plain.toy_prompts(toy_folder, tokenizer, ["image"])
    group = dataclasses.replace(group, ordered=dataclasses.replace(group.ordered, prompt=prompt))
    with torch.no_grad():
        logps_ref = [logprobs(learner, [group])]
    whole = train_rl.tgrpo_loss

    def infinite(*arguments):
        loss, parts = whole(*arguments)
        return loss + torch.inf, parts  # the gradient stays

    monkeypatch.setattr(train_rl, "tgrpo_loss", infinite)
    before = copy.deepcopy(list(learner.parameters()))
    optimizer = make_optimizer(learner, 1e-3, 0.0)
    config = RLConfig(num_iterations=2, prompts_per_step=1)
    with process_group() as world:
        updated = update_policy(learner, optimizer, [[group]], logps_ref, config, world, 1e-3)
    assert updated["num_bad_updates"] == 2
    assert all(torch.equal(*pair) for pair in zip(before, learner.parameters(), strict=True))


# -------------------------------------------------------------------------------------- warnings


class FakeRun:
    """Keeps what a step records and says, and says each warning, not only the first time."""

    def __init__(self, history=()):
        self.config, self.history, self.lines, self.warnings = RLConfig(), [*history], [], []
        self.say = self.lines.append

    def warn(self, holds, text):
        if holds:
            self.warnings.append(text)

    def gather_records(self, name, records):
        self.rollouts = records

    def records(self, name, records):
        pass

    def count_bad_step(self, step, num_bad_updates, samples):
        self.bad = num_bad_updates, samples

    def log(self, metrics, num_tokens):
        self.history.append(metrics)


def test_the_first_step_shows_three_responses_and_the_parts_of_their_rewards():
    run = FakeRun()
    show_first_step(score_group(rollout(ORDERED), None, RLConfig()), run)
    shown = [line for line in run.lines if line.startswith("  reward")]
    assert all(repr(text) in line for text, line in zip(ORDERED[:3], shown, strict=True))
    assert "reward 2 (accuracy 1, format 1, temporal 0, length_reward 0), 1 tokens" in shown[0]


def test_what_a_step_records():
    run, group = FakeRun(), score_group(rollout(ORDERED), rollout([WRONG]), RLConfig())
    updated = {"loss": 0.5, "kl": 0.1, "num_bad_updates": 1}
    with process_group():
        record_step(0, [group], updated, 1e-6, [{"row": 9}], run)
    (metrics,) = run.history
    expected = {"step": 1, "loss": 0.5, "kl": 0.1, "lr": 1e-6, "skipped": 1, "reward": 1.15}
    assert {key: metrics[key] for key in expected} == pytest.approx(expected)
    assert "num_bad_updates" not in metrics
    assert run.bad == (1, [{"row": 3, "problem_id": 7, "path": "video.mp4"}])
    (record,) = json.loads(json.dumps(run.rollouts))
    assert (record["step"], record["row"], record["r_t"]) == (1, 3, 0.3)
    for response in record["responses"]:
        parts = ("accuracy", "format", "temporal", "length_reward")
        assert sum(response[part] for part in parts) == pytest.approx(response["reward"])
    assert record["shuffled_responses"] == [{"text": WRONG, "accuracy": 0.0}]


def step_of(step=30, format=0.5, clipped_length=0.0, length=100.0, zero_std=0.1, kl=0.01, effect=1):
    return {"step": step, "format": format, "clipped_length": clipped_length, "zero_std": zero_std,
            "completion_length": length, "kl": kl, "temporal_effect": effect}  # fmt: skip


WARNINGS = {
    "nothing": ([step_of()] * 60, []),
    "no-format": ([step_of(1, format=0.0)], ["no response of the first step has the format"]),
    "no-format-later": ([step_of(2, format=0.0)], []),
    "cut": ([step_of(1, clipped_length=0.95)], ["more than 90% of the first step's responses"]),
    "nine-tenths": ([step_of(1, clipped_length=0.9)], []),
    "length": ([step_of()] * 20 + [step_of(length=30.0)] * 20, ["less than a third of the tokens"]),
    "a-third-is-enough": ([step_of()] * 20 + [step_of(length=34.0)] * 20, []),
    "no-spread": ([step_of(zero_std=0.6)] * 21, ["more than half of the groups had no spread"]),
    "no-spread-at-first": ([step_of(zero_std=1.0)] * 8 + [step_of()] * 30, []),
    "kl": ([step_of()] * 20 + [step_of(kl=3.0)] * 20, ["the KL to the reference was above 1"]),
    "undefined": ([step_of(kl=None, effect=None)] * 60, []),
    "no-effect": ([step_of(effect=0.001)] * 50, ["moved the advantages by less than 0.01"]),
    "no-effect-of-few": ([step_of(effect=0.001)] * 49, []),
}


@pytest.mark.parametrize(("history", "expected"), WARNINGS.values(), ids=WARNINGS)
def test_warnings(history, expected):
    run = FakeRun(history)
    warn(run)
    assert len(run.warnings) == len(expected)
    assert all(words in text for words, text in zip(expected, run.warnings, strict=True))
