"""The numbers of an RL run stay what they were: 20 updates and 3 sampled steps of the toy.

data/replay.npz holds the rollouts of the first 20 RL steps, sampled from the toy's SFT model by the
code of commit 894ab5c (one process, all 16 prompts of a step in one pass). data/replay.json holds
the metrics which that code computed from the toy's *base* model, which toy.ensure_toy makes from
its seed: of 20 updates on these rollouts, and of 3 steps that it sampled itself. Cutting the step
into 4 passes instead of one moved no number by more than 7e-7.
"""

import json
from pathlib import Path

import numpy as np
import pytest
import torch

import toy
import train_rl
from infra.distributed import process_group
from sampling import Rollout
from train_rl import RLConfig

DATA = Path(__file__).parent / "data"
TOY = {
    "model": str(toy.BASE), "data": str(toy.RL_DATA), "max_steps": 300, "learning_rate": 4e-4,
    "warmup_steps": 20, "max_frames": 8, "max_new_tokens": 40, "l_min": 12, "l_max": 24,
    "num_workers": 1, "activation_checkpointing": False, "prompts_per_rank": 16,
    "prompts_per_step": 16,
}  # fmt: skip
# Replayed rollouts say that the sampler's log-probabilities were 0, so that logp_gap is the mean
# absolute log-probability of the recorded tokens under the policy.
COMPARED = (
    "reward", "accuracy", "accuracy_shuffled", "format", "temporal", "temporal_earned",
    "length_reward", "zero_std", "completion_length", "loss", "kl", "logp_gap", "grad_norm", "lr",
)  # fmt: skip


class Enough(Exception):
    """Ends a run after the steps that are compared; its schedule is that of all 300."""


def read_rollouts(path):
    """{(step, row of the data): [responses to the ordered frames, to the shuffled ones]}."""
    with np.load(path) as file:
        tokens, lengths, rows, sizes = (file[key] for key in ("tokens", "lengths", "rows", "sizes"))
    responses = iter(np.split(tokens.astype(int), np.cumsum(lengths)[:-1]))
    return {
        (step, int(row)): [[next(responses).tolist() for _ in range(size)] for size in pair]
        for step in range(len(rows))
        for row, pair in zip(rows[step], sizes[step], strict=True)  # rows (20, 16), sizes (.., 2)
    }


def replay(rollouts):
    """A sample_rollouts that returns what was recorded for the step and the sample."""

    def rollout(tokenizer, prompt, responses):
        width = max(map(len, responses))
        mask = torch.tensor([[place < len(ids) for place in range(width)] for ids in responses])
        padded = torch.tensor([ids + [0] * (width - len(ids)) for ids in responses])
        ended = [ids[-1] == tokenizer.eos_token_id for ids in responses]
        texts = [tokenizer.decode(ids[: len(ids) - end])
                 for ids, end in zip(responses, ended, strict=True)]  # fmt: skip
        return Rollout(prompt, padded, mask, torch.tensor(ended), mask * 0.0, texts)

    def sample_rollouts(policy, tokenizer, batch, config, step):
        groups = [rollouts[step, prompts[0].sample.row] for prompts in batch]
        assert [2 if shuffled else 1 for _, shuffled in groups] == [*map(len, batch)]
        return [
            tuple(rollout(tokenizer, prompts[order], group[order]) if group[order] else None
                  for order in (0, 1))
            for prompts, group in zip(batch, groups, strict=True)
        ]  # fmt: skip

    return sample_rollouts


def run(num_steps, sample_rollouts, monkeypatch, **flags):
    """The metrics of a run's first steps."""

    def sample_or_stop(policy, tokenizer, batch, config, step):
        if step == num_steps:
            raise Enough
        return sample_rollouts(policy, tokenizer, batch, config, step)

    monkeypatch.setattr(train_rl, "sample_rollouts", sample_or_stop)
    config = RLConfig(**TOY | flags)
    with process_group() as world, pytest.raises(Enough):
        train_rl.train(config, world)
    lines = (Path(config.output_dir) / "metrics.jsonl").read_text().splitlines()
    return [{key: json.loads(line)[key] for key in COMPARED} for line in lines]


def checksum(text, *_):
    """In place of the accuracy: the base model never answers, and no other text has this value."""
    return sum(map(ord, text)) % 101 / 100


def require_equal(found, name):
    expected = json.loads((DATA / "replay.json").read_text())[name]
    for step, (mine, theirs) in enumerate(zip(found, expected, strict=True)):
        for key in COMPARED:
            assert mine[key] == pytest.approx(theirs[key], abs=1e-5, rel=1e-4), (step, key)


@pytest.mark.slow
def test_twenty_recorded_steps_give_the_same_updates(toy_folder, tmp_path, monkeypatch):
    monkeypatch.chdir(toy_folder)
    recorded = replay(read_rollouts(DATA / "replay.npz"))
    require_equal(run(20, recorded, monkeypatch, output_dir=str(tmp_path)), "replayed")


def test_three_steps_draw_the_same_responses(toy_folder, tmp_path, monkeypatch):
    monkeypatch.chdir(toy_folder)
    monkeypatch.setattr(train_rl, "accuracy_reward", checksum)
    sample = train_rl.sample_rollouts
    found = run(3, sample, monkeypatch, l_max=40, output_dir=str(tmp_path))
    require_equal(found, "sampled")
