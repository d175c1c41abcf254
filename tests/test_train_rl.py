"""The parts of an RL step on one process: scoring a group, what is sampled, schedules, records."""

import copy
import json
from types import SimpleNamespace

import plain
import pytest
import torch

from config import TrainConfig
from data import Media, decode, require_solution
from infra.distributed import process_group
from infra.optim import learning_rate_at, make_optimizer, update
from infra.run import PhaseTimer, RunFolder
from model import enable_packing, group_logprobs, load_model, load_tokenizer
from sampling import Rollout
from tgrpo import group_advantages
from train_rl import (
    RLConfig,
    logprobs,
    make_prompts,
    rollout_record,
    sample_rollouts,
    score_group,
    show_first_step,
    update_policy,
)
from training import Alarms, load_inputs, micro_batches, num_steps

RIGHT = "<think>It goes.</think><answer>B</answer>"  # accuracy 1, format 1
WRONG = "<think>It goes.</think><answer>A</answer>"  # accuracy 0, format 1
BARE = "<answer>B</answer>"  # accuracy 1, format 0
NOTHING = "B"  # accuracy 0, format 0


def rollout(texts, lengths=None, problem_type="multiple choice", solution="<answer>B</answer>"):
    lengths = torch.tensor(lengths or [1] * len(texts))
    width = int(lengths.max())
    mask = torch.arange(width) < lengths[:, None]
    sample = SimpleNamespace(
        problem_type=problem_type, solution=solution, problem_id=7, row=3, path="clip.mp4",
        problem="Which?", options=("A. a", "B. b"),
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
    "to-the-advantage": ({"temporal_target": "advantage"}, [WRONG], [2, 1, 1.2, 0]),
}


@pytest.mark.parametrize(("flags", "shuffled", "expected"), REWARDS.values(), ids=REWARDS)
def test_rewards_of_a_group_by_hand(flags, shuffled, expected):
    group = score_group(
        rollout(ORDERED, LENGTHS), shuffled and rollout(shuffled), RLConfig(**flags)
    )
    assert group.rewards.tolist() == pytest.approx(expected)
    assert group.accuracy.tolist() == [1, 0, 1, 0]
    assert group.format.tolist() == [1, 1, 0, 0]
    assert group.correct.tolist() == [True, False, True, False]
    advantages = group_advantages(torch.tensor(expected, dtype=torch.float64))
    if flags.get("temporal_target") == "advantage":
        advantages = advantages + torch.tensor([0.3, 0, 0.3, 0], dtype=torch.float64)
    torch.testing.assert_close(group.advantages, advantages)


def test_a_continuous_reward_is_correct_from_the_threshold_on():
    # Regression: 1 - |p - 10| / 10 for 10, 5, 4.9 and 0.
    texts = [f"<answer>{number}</answer>" for number in ("10", "5", "4.9", "0")]
    ordered = rollout(texts, problem_type="regression", solution="10")
    group = score_group(ordered, None, RLConfig(length_reward=False))
    assert group.accuracy.tolist() == pytest.approx([1, 0.5, 0.49, 0])
    assert group.correct.tolist() == [True, True, False, False]
    strict = score_group(ordered, None, RLConfig(length_reward=False, correct_threshold=0.9))
    assert strict.correct.tolist() == [True, False, False, False]


def test_the_record_holds_each_part_of_a_reward():
    group = score_group(rollout(ORDERED, LENGTHS), rollout([WRONG]), RLConfig())
    record = json.loads(json.dumps(rollout_record(4, group)))
    assert (record["step"], record["row"], record["r_t"]) == (5, 3, 0.3)
    for response in record["responses"]:
        parts = ("accuracy", "format", "temporal", "length_reward")
        assert sum(response[part] for part in parts) == pytest.approx(response["reward"])
    assert record["shuffled_responses"] == [{"text": WRONG, "accuracy": 0.0}]


def test_a_solution_that_nothing_can_match_is_named():
    bad = SimpleNamespace(solution="about two", problem_type="numerical", row=12, problem_id=5)
    with pytest.raises(ValueError, match=r"row 12 \(problem 5\).*about two"):
        require_solution(bad)


def test_bad_rows_stop_a_run_or_are_left_out_and_counted(toy_folder, tmp_path, capsys):
    rows = json.loads((toy_folder / "runs/toy/data/rl.json").read_text())[:4]
    rows[1] |= {"problem_type": "numerical", "solution": "about two"}
    file = tmp_path / "rows.json"
    file.write_text(json.dumps(rows))
    config = RLConfig(model=str(toy_folder / "runs/toy/base"), data=str(file))
    with pytest.raises(ValueError, match=r"rows.json, row 1 \(problem .*about two"):
        load_inputs(config, require_solution)
    config.skip_bad_samples = True
    samples, _, _ = load_inputs(config, require_solution)
    assert [sample.row for sample in samples] == [0, 2, 3]
    assert "1 of 4 rows are left out, the first: " in capsys.readouterr().out


# -------------------------------------------------------------------------------------- sampling


@pytest.fixture(scope="module")
def policy(toy_folder):
    return load_model(str(toy_folder / "runs/toy/base"), torch.device("cpu")).eval()


def media(toy_folder, tokenizer, kinds):
    prompts = plain.toy_prompts(toy_folder, tokenizer, kinds)
    return [Media(prompt.sample, *decode(prompt.sample, max_frames=8)) for prompt in prompts]


def sample(policy, toy_folder, step=0, **flags):
    tokenizer = load_tokenizer(str(toy_folder / "runs/toy/base"))
    config = RLConfig(**{"max_new_tokens": 5, "group_size": 3, "shuffled_group_size": 2} | flags)
    batch = [
        make_prompts(one, step, tokenizer, config, {})
        for one in media(toy_folder, tokenizer, ["video", "image"])
    ]
    return sample_rollouts(policy, tokenizer, batch, config, step)


def test_videos_get_a_shuffled_group_and_images_none(policy, toy_folder):
    (ordered, shuffled), (image, none) = sample(policy, toy_folder)
    assert none is None
    assert (len(ordered.texts), len(shuffled.texts), len(image.texts)) == (3, 2, 3)
    assert (ordered.prompt.order, shuffled.prompt.order) == ("ordered", "shuffled")
    assert torch.equal(ordered.prompt.input_ids, shuffled.prompt.input_ids)
    assert not torch.equal(ordered.prompt.pixel_values, shuffled.prompt.pixel_values)


def test_plain_grpo_samples_no_shuffled_group(policy, toy_folder):
    assert [shuffled for _, shuffled in sample(policy, toy_folder, temporal=False)] == [None, None]


def test_random_numbers_follow_seed_and_step(policy, toy_folder):
    texts = [
        [rollout.texts for rollout, _ in sample(policy, toy_folder, step, seed=seed)]
        for step, seed in ((0, 0), (0, 0), (1, 0), (0, 1))
    ]
    assert texts[0] == texts[1]
    assert texts[0] != texts[2]
    assert texts[0] != texts[3]


# -------------------------------------------------------------------------------------- training

RATES = {
    "no-warmup-start": ((0, 10, 1.0, 0), 1.0),
    "half-way": ((5, 10, 1.0, 0), 0.5),  # (1 + cos(pi / 2)) / 2
    "warmup-first": ((0, 10, 1.0, 4), 0.25),
    "warmup-last": ((3, 10, 1.0, 4), 1.0),
    "after-warmup": ((4, 10, 1.0, 4), 1.0),
    "a-third-left": ((8, 10, 1.0, 4), 0.25),  # (1 + cos(2 pi / 3)) / 2
    "peak": ((5, 10, 2e-6, 0), 1e-6),
}


@pytest.mark.parametrize(("arguments", "rate"), RATES.values(), ids=RATES)
def test_learning_rate_by_hand(arguments, rate):
    assert learning_rate_at(*arguments) == pytest.approx(rate)


STEPS = {
    # 10 samples, batches of 2 ranks x 2 prompts x 1: 2.5 steps an epoch, rounded up.
    "epoch": ({"prompts_per_rank": 2}, 3),
    "two-epochs": ({"prompts_per_rank": 2, "num_epochs": 2.0}, 5),
    "accumulated": ({"prompts_per_rank": 1, "gradient_accumulation_steps": 5}, 1),
    "max-steps-wins": ({"max_steps": 7, "num_epochs": 9.0}, 7),
}


@pytest.mark.parametrize(("flags", "expected"), STEPS.values(), ids=STEPS)
def test_number_of_steps(flags, expected):
    assert num_steps(TrainConfig(**flags), 10, SimpleNamespace(size=2)) == expected


def test_matrices_decay_and_vectors_do_not(policy):
    decayed, rest = make_optimizer(policy, 1e-3, 0.01).param_groups
    assert (decayed["weight_decay"], rest["weight_decay"]) == (0.01, 0.0)
    assert all(parameter.ndim >= 2 for parameter in decayed["params"])
    assert all(parameter.ndim == 1 for parameter in rest["params"])
    assert len(decayed["params"]) + len(rest["params"]) == len(list(policy.parameters()))


def test_a_step_calls_the_vision_tower_three_times(policy, toy_folder):
    """Rollout, reference, update: once each, for all ordered and shuffled videos and images."""
    policy, reference = copy.deepcopy(policy), copy.deepcopy(policy)
    calls = []
    for name, model in {"policy": policy, "reference": reference}.items():
        enable_packing(model)  # the copy's methods are bound to the first
        model.model.visual.register_forward_hook(
            lambda *_, name=name: calls.append((name, torch.is_grad_enabled()))
        )
    tokenizer = load_tokenizer(str(toy_folder / "runs/toy/base"))
    config = RLConfig(max_new_tokens=4, group_size=4, shuffled_group_size=2, prompts_per_rank=3)
    # The toy's prompts stand for an ordered and a shuffled video twice, and an image.
    prompts = plain.toy_prompts(toy_folder, tokenizer, ["video"] * 4 + ["image"])
    batch = [prompts[:2], prompts[2:4], prompts[4:]]
    rollouts = sample_rollouts(policy, tokenizer, batch, config, 0)
    groups = [score_group(ordered, shuffled, config) for ordered, shuffled in rollouts]
    with torch.no_grad():
        logps_ref = logprobs(reference, groups)
    optimizer = make_optimizer(policy, 1e-3, 0.0)
    with process_group() as world:
        update_policy(policy, optimizer, [groups], [logps_ref], config, world, 1e-3)
    assert calls == [("policy", False), ("reference", False), ("policy", True)]


def test_a_frozen_vision_tower_has_neither_gradients_nor_optimizer_state(policy, toy_folder):
    model = copy.deepcopy(policy)
    enable_packing(model)  # the copy's methods are bound to the first
    model.model.visual.requires_grad_(False)
    optimizer = make_optimizer(model, 1e-3, 0.01)
    tokenizer = load_tokenizer(str(toy_folder / "runs/toy/base"))
    prompts = plain.toy_prompts(toy_folder, tokenizer, ["video"])
    ids = torch.tensor([[[5, 6, 7]]])
    group_logprobs(model, prompts, ids, torch.ones_like(ids).bool()).sum().backward()
    assert all(parameter.grad is None for parameter in model.model.visual.parameters())
    optimizer.step()
    learning = {id(parameter) for parameter in model.parameters() if parameter.requires_grad}
    assert {id(parameter) for parameter in optimizer.state} == learning
    assert len(learning) == len([*model.parameters()]) - len([*model.model.visual.parameters()])
    update(model, optimizer, 1e-3, 1.0)  # the clip and the step take it as it is


def test_metrics_are_valid_json_whatever_the_numbers(tmp_path, capsys):
    config = TrainConfig()
    config.output_dir = str(tmp_path / "run")
    with process_group() as world, RunFolder(config, world, "test").open(2) as this_run:
        this_run.metrics(
            {"step": 1, "loss": float("nan"), "norm": float("inf"), "shuffled": None, "x": 0.5}
        )

    def refuse(constant):
        raise AssertionError(f"{constant} is not JSON")

    line = json.loads((tmp_path / "run/metrics.jsonl").read_text(), parse_constant=refuse)
    assert line == {
        "step": 1, "loss": None, "norm": None, "shuffled": None, "x": 0.5, "seconds_save": 0.0
    }  # fmt: skip
    shown = capsys.readouterr().out
    assert all(key in shown for key in line)


def test_phases_of_one_name_add_up_and_are_told_to_the_watch():
    places = []
    world = SimpleNamespace(watch=SimpleNamespace(at=places.append))
    timer = PhaseTimer(world, 4)
    for phase in ("data", "update", "data"):
        with timer(phase):
            pass
    assert list(timer.seconds) == ["data", "update"]
    assert all(value >= 0 for value in timer.seconds.values())
    assert places == ["step 5, data", "step 5, update", "step 5, data"]


FIRST_STEPS = {
    "fine": ([RIGHT, WRONG], {"format": 1.0, "clipped_length": 0.0}, []),
    "no-format": ([NOTHING, BARE], {"format": 0.0, "clipped_length": 0.5}, ["has the format"]),
    "cut": ([RIGHT, WRONG], {"format": 0.5, "clipped_length": 0.95}, ["95% of the first step's"]),
    "nine-tenths": ([RIGHT, WRONG], {"format": 0.5, "clipped_length": 0.9}, []),
}


@pytest.mark.parametrize(("texts", "metrics", "warned"), FIRST_STEPS.values(), ids=FIRST_STEPS)
def test_the_first_step_is_shown_and_what_makes_a_run_hopeless_is_said(texts, metrics, warned):
    said = []
    this_run = SimpleNamespace(say=said.append, config=RLConfig())
    groups = [score_group(rollout(texts + [RIGHT] * 2), None, RLConfig())]
    show_first_step(groups, metrics, this_run)
    shown = [line for line in said if line.startswith("  reward")]
    assert len(shown) == 3
    assert all(repr(text) in line for text, line in zip([*texts, RIGHT], shown, strict=True))
    assert "reward 2 (accuracy 1, format 1), 1 tokens" in shown[2]
    warnings = [line for line in said if line.startswith("warning")]
    assert len(warnings) == len(warned)
    assert all(words in line for words, line in zip(warned, warnings, strict=True))


def metrics_of(length=100.0, zero_std=0.1, kl=0.01):
    return {"completion_length": length, "zero_std": zero_std, "kl": kl}


ALARMS = {
    "nothing": ([metrics_of()] * 60, []),
    "length": ([metrics_of()] * 20 + [metrics_of(length=30.0)] * 40, ["collapsed to 30"]),
    "a-third-is-enough": ([metrics_of()] * 20 + [metrics_of(length=34.0)] * 40, []),
    "no-spread": ([metrics_of(zero_std=0.6)] * 21, ["60% of the groups"]),
    "no-spread-at-first": ([metrics_of(zero_std=1.0)] * 8 + [metrics_of()] * 30, []),
    "kl": ([metrics_of()] * 20 + [metrics_of(kl=3.0)] * 30, ["KL to the reference was 1"]),
    "undefined": ([metrics_of(kl=None)] * 40, []),
}


@pytest.mark.parametrize(("history", "expected"), ALARMS.values(), ids=ALARMS)
def test_what_goes_wrong_slowly_is_said_once(history, expected):
    alarms = Alarms()
    said = [text for metrics in history for text in alarms.check(metrics)]
    assert len(said) == len(expected)
    assert all(text.startswith("warning: ") for text in said)
    assert all(words in text for words, text in zip(expected, said, strict=True))
    resumed = Alarms(history)
    assert resumed.check(history[-1]) == []


# (lengths, most parts on another rank, expected parts by index), for a budget of 100 tokens
BUDGETS = {
    "longest-first": ([30, 90, 40, 20], 0, [[1], [2, 0, 3]]),
    "one-alone-may-exceed-it": ([150, 20], 0, [[0], [1]]),
    "all-fit": ([10, 20, 30], 0, [[2, 1, 0]]),
    "another-rank-needs-more": ([10, 20, 30], 2, [[2], [1, 0]]),
    "as-many-as-items": ([10, 20, 30], 3, [[2], [1], [0]]),
}


@pytest.mark.parametrize(("lengths", "most", "expected"), BUDGETS.values(), ids=BUDGETS)
def test_micro_batches_by_tokens(monkeypatch, lengths, most, expected):
    def other_rank(values):
        return {name: max(value, most) for name, value in values.items()}

    monkeypatch.setattr("training.max_over_ranks", other_rank)
    config = TrainConfig(tokens_per_micro_batch=100)
    parts = micro_batches([*range(len(lengths))], lengths, config)
    assert sorted(parts) == sorted(expected)


def test_micro_batches_by_number():
    config = TrainConfig(prompts_per_rank=2)
    assert micro_batches([1, 2, 3, 4], [9, 9, 9, 9], config) == [[1, 2], [3, 4]]
