"""The T-GRPO step that benchmarks/rl_step.py compares with: the official trainer's way.

Every response has its own copy of the prompt, pixels included, in generation as in the
log-probabilities; the ordered and the shuffled group are generated one after the other, with top-p
0.95 and top-k 50 by transformers' own `generate`; the vocabulary's logits exist for every token of
prompt and response; the ratio is not clipped. Model, sharding, optimizer, prompts, rewards and
lengths are those of the other step. Departures from the official trainer: the rotary positions are
the project's (model.rope_positions), vision tokens are not sampled (the pass that follows would
break off), and several prompts a step are allowed, one after the other.
"""

from unittest import mock

import torch
from torch import Tensor
from transformers import GenerationConfig

import train_rl
from benchmarks.measure import Meter
from config import RLConfig
from data import Prompt
from infra.distributed import unsharded
from infra.optim import update
from model import forbidden_tokens, rope_positions
from sampling import Rollout, decode_texts


def plain_step(system, batch: list[list[Prompt]], config: RLConfig, meter: Meter) -> None:
    """One whole step after the prompts are made: rollouts, rewards, reference, update.

    Args:
        system: rl_step.System. batch: for each prompt the ordered and the shuffled form.
    """
    policy, sizes = system.policy, (config.group_size, config.shuffled_group_size)
    with meter("rollout"), unsharded(policy):
        rollouts = [
            [
                generate(policy, system.tokenizer, prompt, size, config.max_new_tokens)
                for prompt, size in zip(prompts, sizes, strict=True)
            ]
            for prompts in batch
        ]
    with meter("reward"):
        groups = [train_rl.score_group(*pair, config) for pair in rollouts]
    total = 0.0
    for group in groups:
        with meter("reference"), torch.no_grad():
            logp_ref = copies_logprobs(system.reference, group.ordered)
        with meter("forward"):
            logp = copies_logprobs(policy, group.ordered)
        with meter("backward"):
            part = loss(logp, logp_ref, group, config.beta) / len(groups)
            part.backward()
            total += float(part.detach())
    with meter("optimizer"):
        update(policy, system.optimizer, config.learning_rate, config.max_grad_norm, total)


def copies(prompt: Prompt, count: int, device: torch.device) -> dict[str, Tensor]:
    """Several copies of a prompt and its pixels, as transformers takes them."""
    kind = ("pixel_values_videos", "video_grid_thw")
    if not prompt.is_video:
        kind = ("pixel_values", "image_grid_thw")
    return {
        "input_ids": prompt.input_ids.expand(count, -1).to(device),  # (G, S)
        "position_ids": rope_positions(prompt)[:, None].expand(-1, count, -1).to(device),
        kind[0]: prompt.pixel_values.repeat(count, 1).to(device),
        kind[1]: prompt.grid_thw.expand(count, -1).to(device),
    }


def generate(policy, tokenizer, prompt: Prompt, count: int, max_new_tokens: int) -> Rollout:
    """Responses to copies of one prompt, all of the same length: nothing ends them."""
    device = policy.lm_head.weight.device
    settings = GenerationConfig(
        max_new_tokens=max_new_tokens, do_sample=True, temperature=1.0, top_p=0.95, top_k=50,
        suppress_tokens=forbidden_tokens(policy.config), eos_token_id=None, pad_token_id=0,
    )  # fmt: skip
    inputs = copies(prompt, count, device)
    mask = torch.ones_like(inputs["input_ids"])
    with mock.patch.object(policy, "generation_config", GenerationConfig()):
        ids = policy.generate(**inputs, attention_mask=mask, generation_config=settings)
    ids = ids[:, len(prompt.input_ids) :].cpu()  # (G, T)
    mask = torch.ones_like(ids).bool()
    texts = decode_texts(tokenizer, ids, mask, [])
    return Rollout(prompt, ids, mask, torch.zeros(count).bool(), torch.zeros(ids.shape), texts)


def copies_logprobs(model, rollout: Rollout, forbidden: list[int] | None = None) -> Tensor:
    """Log-probabilities (G, T) of responses, each after its own copy of the prompt.

    forbidden: ids at -inf in the softmax, which the official trainer does not have.
    """
    device = model.lm_head.weight.device
    count, num_tokens = rollout.completion_ids.shape
    inputs = copies(rollout.prompt, count, device)
    prompt_length = inputs["input_ids"].shape[1]
    ids = torch.cat([inputs["input_ids"], rollout.completion_ids.to(device)], dim=1)  # (G, S + T)
    first = inputs["position_ids"].max() + 1
    after = (torch.arange(num_tokens, device=device) + first).expand(3, count, -1)
    positions = torch.cat([inputs["position_ids"], after], dim=2)
    logits = model(
        **inputs | {"input_ids": ids, "position_ids": positions}, use_cache=False
    ).logits  # (G, S + T, V)
    rows = []
    for row, targets in zip(logits[:, :-1], ids[:, 1:], strict=True):
        row = row.float()
        if forbidden is not None:
            row = row.index_fill(1, torch.tensor(forbidden, device=device), -torch.inf)
        rows.append(row.log_softmax(-1).gather(1, targets[:, None])[:, 0])
    return torch.stack(rows)[:, prompt_length - 1 :]


def loss(logp: Tensor, logp_ref: Tensor, group: train_rl.Group, beta: float) -> Tensor:
    """The official trainer's loss: per token, a ratio that is 1, no clip; (G, T) to a scalar."""
    advantages = group.advantages.to(logp)[:, None]  # (G, 1)
    difference = (logp_ref - logp).clamp(-10, 10)
    kl = difference.exp() - difference - 1
    ratio = (logp - logp.detach()).exp()
    return -(ratio * advantages - beta * kl).mean(1).mean()
