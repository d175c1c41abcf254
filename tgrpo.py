r"""The mathematics of T-GRPO: Sections 3.2 and 3.3 of the Video-R1 paper. Tensors in, tensors out.

    symbol      name here          default   source
    ----------  -----------------  --------  -------------------------------------------------------
    G           group_size         8         Sec. 4.1, responses to the frames in order
    G~          shuffled_group..   4 (G/2)   Sec. 4.1, responses to the same frames shuffled
    o_i, o~_i   completions        -         Sec. 3.2
    p, p~       correct, c.._shuf  -         Sec. 3.2, share of correct responses of each group
    alpha       alpha              0.3       Sec. 3.2, Eq. 1
    r_t         r_t                0/alpha   Eq. 1
    r_i         rewards            [0, 2]    Sec. 3.2, correctness + format
    R_i         rewards            -         Eq. 2, Eq. 5
    A_i         advantages         -         Eq. 3
    pi_theta    logp               -         Eq. 4, log-probabilities of the policy being trained
    pi_old      logp_old           -         Eq. 4, of the policy that sampled the responses
    pi_ref      logp_ref           -         Eq. 4, of the frozen reference
    epsilon     clip_eps           0.2       Eq. 4; the paper gives no value, this is GRPO's default
    beta        beta               0.04      Eq. 4, App. D
    omega       omega              0.2       Sec. 3.3, Eq. 5
    l_min/max   l_min, l_max       320, 512  Sec. 3.3, Eq. 5, tokens, both ends included

Shapes: G responses in a group, T token positions (right-padded). No function modifies its input.
Only the ordered responses have rewards and advantages; the shuffled ones serve p~ alone.
"""

import torch
from torch import Tensor

# Rewards closer than this are equal: eight equal float32 numbers have a standard deviation of 1e-7
# rather than 0, and dividing by it would turn rounding errors into advantages of size 1.
NO_SPREAD = 1e-6


def temporal_reward(correct: Tensor, correct_shuffled: Tensor, alpha: float = 0.3) -> float:
    """Eq. 1: r_t = alpha if p >= p~, else 0.

    The text above Eq. 1 says "exceeds"; the equation, which has >=, wins. With p = p~ = 0 the
    reward is alpha, but Eq. 2 gives it to correct responses only, and there are none.

    Args:
        correct: bool (G,), which ordered responses are correct.
        correct_shuffled: bool (G~,), which shuffled responses are correct.
    Raises:
        ValueError: a group is empty, so its proportion is undefined.

    >>> temporal_reward(torch.tensor([1, 1, 0, 0]).bool(), torch.tensor([1, 0]).bool())
    0.3
    """
    if correct.numel() == 0 or correct_shuffled.numel() == 0:
        raise ValueError("Eq. 1 needs at least one ordered and one shuffled response")
    # p >= p~ with the denominators multiplied out: integers compare exactly.
    right = int(correct.bool().sum()) * correct_shuffled.numel()
    right_shuffled = int(correct_shuffled.bool().sum()) * correct.numel()
    return float(alpha) if right >= right_shuffled else 0.0


def add_temporal_reward(rewards: Tensor, correct: Tensor, r_t: float) -> Tensor:
    """Eq. 2: R_i = r_i + r_t for the correct responses, r_i for the others.

    Section 3.2 ends with a second form, r_t added "to the advantages directly": the same call
    with the advantages of Eq. 3 in place of the rewards.

    Args:
        rewards: float (G,), correctness + format (or advantages).
        correct: bool (G,).
    Returns:
        float (G,).
    """
    return torch.where(correct.bool(), rewards + r_t, rewards)  # (G,)


def add_length_reward(
    rewards: Tensor,
    correct: Tensor,
    lengths: Tensor,
    omega: float = 0.2,
    l_min: int = 320,
    l_max: int = 512,
) -> Tensor:
    """Eq. 5: R_i + omega for correct responses with l_min <= len(o_i) <= l_max.

    Args:
        rewards: float (G,).
        correct: bool (G,).
        lengths: int (G,), tokens of each response, the end token included.
    Returns:
        float (G,).
    """
    earned = correct.bool() & (lengths >= l_min) & (lengths <= l_max)  # (G,)
    return torch.where(earned, rewards + omega, rewards)  # (G,)


def group_advantages(rewards: Tensor) -> Tensor:
    """Eq. 3: A_i = (R_i - mean) / std over each group; the last dimension is the group.

    std is the sample standard deviation (n - 1), as in the official code, but without its 1e-4
    in the denominator, which is not in the equation. A group without spread (max - min < 1e-6, a
    single response included) has advantages 0.

    Args:
        rewards: float (..., G).
    Returns:
        float64 (..., G).

    >>> group_advantages(torch.tensor([2.0, 1.0, 0.0]))
    tensor([ 1.,  0., -1.], dtype=torch.float64)
    """
    rewards = rewards.double()
    spread = rewards.amax(-1, keepdim=True) - rewards.amin(-1, keepdim=True)  # (..., 1)
    centred = rewards - rewards.mean(-1, keepdim=True)  # (..., G)
    variance = centred.square().sum(-1, keepdim=True) / max(rewards.shape[-1] - 1, 1)
    flat = spread < NO_SPREAD
    # The inner where keeps 0 / 0 out of the branch not taken.
    return torch.where(flat, 0.0, centred / torch.where(flat, 1.0, variance.sqrt()))


def advantages_of_parts(
    parts: dict[str, Tensor], weights: dict[str, float], norm: str = "std"
) -> Tensor:
    """Eq. 3 of the parts' sum, or one of two departures from it, under which r_t cannot cancel.

    Args:
        parts: float (..., G) each, the parts of R_i by name.
        weights: of the parts in "separate"; 1 for those not named.
        norm: "std": Eq. 3. "none": the mean is subtracted and nothing divided, half of Dr. GRPO
            (arXiv 2503.20783), which drops the length normalisation too. "separate": the weighted
            sum of Eq. 3 of each part by itself, GDPO (arXiv 2601.05242) without its batch step.
    Returns:
        float64 (..., G).
    Raises:
        ValueError: an unknown norm.
    """
    rewards = sum(parts.values()).double()
    if norm == "std":
        return group_advantages(rewards)
    if norm == "none":
        return rewards - rewards.mean(-1, keepdim=True)
    if norm == "separate":
        return sum(weights.get(name, 1.0) * group_advantages(part) for name, part in parts.items())
    raise ValueError(f"norm must be 'std', 'none' or 'separate', not {norm!r}")


def temporal_effect(advantages: Tensor, advantages_without: Tensor) -> Tensor:
    """How far r_t moved each response's advantage: |A_i - A_i(without r_t)|.

    0 for all responses means that T-GRPO is plain GRPO here. It is so wherever r_t moves the upper
    one of only two reward values, since Eq. 3 divides by the spread: binary correctness, all with
    the format (Video-R1 issue 51). r_t acts where format, length or partial credit vary too.

    Args:
        advantages, advantages_without: float (..., G), Eq. 3 with r_t and without it.
    Returns:
        float (..., G).

    >>> without, with_r_t = torch.tensor([[2.0, 1.0], [2.3, 1.0]])
    >>> temporal_effect(group_advantages(with_r_t), group_advantages(without)).max() < 1e-6
    tensor(True)
    """
    return (advantages - advantages_without).abs()


def kl_divergence(logp: Tensor, logp_ref: Tensor) -> Tensor:
    """D_KL(pi_theta || pi_ref) of Eq. 4, per token: exp(d) - d - 1 with d = logp_ref - logp.

    DeepSeekMath's unbiased estimator ("k3"): never negative, 0 where the two agree. Official code:
    clamps d to +-10.

    Args:
        logp, logp_ref: float, any shape, the same for both.
    Returns:
        float, the same shape.
    """
    d = logp_ref - logp
    # expm1 keeps the digits that exp(d) - 1 loses near 0.
    return torch.expm1(d) - d


def tgrpo_loss(
    logp: Tensor,
    logp_old: Tensor,
    logp_ref: Tensor,
    advantages: Tensor,
    completion_mask: Tensor,
    clip_eps: float = 0.2,
    beta: float = 0.04,
    level: str = "token",
) -> tuple[Tensor, dict[str, Tensor]]:
    """Eq. 4: the loss is -J, the mean over the group of clipped objective - beta * KL.

    Args:
        logp, logp_old, logp_ref: float (..., G, T), of the sampled tokens. Only logp carries
            gradient. logp_old is logp.detach() where there is one update per rollout.
        advantages: float (..., G), Eq. 3.
        completion_mask: bool (..., G, T), true on the tokens of a response, end token included.
        clip_eps: epsilon. beta: weight of the KL.
        level: "token": ratio, min and clip per token, the mean over a response's tokens, then
            over the group (DeepSeekMath's reading, and the official code's).
            "sequence": Eq. 4 as printed, one ratio per response, exp of the summed log-ratio.
            The KL is the mean over a response's tokens in both.
    Returns:
        loss: scalar. A response without tokens adds 0 and still counts in G.
        metrics: detached scalars. kl: the mean over the group of each response's token-mean KL;
            clip_fraction: share of ratios whose gradient the clip removed.
    Raises:
        ValueError: an unknown level.
    """
    if level not in ("token", "sequence"):
        raise ValueError(f"level must be 'token' or 'sequence', not {level!r}")
    mask = completion_mask.bool()  # (G, T)
    lengths = mask.sum(-1).clamp(min=1)  # (G,), at least 1: an empty response is 0 / 1
    # Padding may hold any number. It is replaced before the arithmetic, since 0 * inf is nan, in
    # the gradient too.
    logp, logp_old, logp_ref = (
        torch.where(mask, x, 0.0) for x in (logp, logp_old.detach(), logp_ref.detach())
    )
    kl = kl_divergence(logp, logp_ref).sum(-1) / lengths  # (G,)
    log_ratio = logp - logp_old  # (G, T)

    if level == "sequence":
        log_ratio, mask = log_ratio.sum(-1, keepdim=True), mask.any(-1, keepdim=True)  # (G, 1)
        lengths = torch.ones_like(lengths)
    advantages = advantages.detach().to(logp.dtype).unsqueeze(-1)  # (G, 1)
    # exp overflows float32 at 88.7, far beyond any clip, and inf would make a gradient of 0 nan.
    ratio = log_ratio.clamp(max=80).exp()  # (G, T) or (G, 1)
    unclipped = ratio * advantages
    clipped = ratio.clamp(1 - clip_eps, 1 + clip_eps) * advantages
    objective = torch.where(mask, torch.minimum(unclipped, clipped), 0.0).sum(-1) / lengths  # (G,)

    loss = -(objective - beta * kl).mean()
    is_clipped = (clipped < unclipped) & mask
    metrics = {
        "kl": kl.detach().mean(),
        "clip_fraction": is_clipped.sum() / mask.sum().clamp(min=1),
    }
    return loss, metrics
