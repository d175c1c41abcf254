"""Eq. 1-5 and the KL: values worked out by hand, a slow version, invariances, consequences.

Shapes as in tgrpo.py: G responses in a group, T token positions.
"""

import doctest
import math
from fractions import Fraction

import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st

import tgrpo

EXAMPLES = settings(max_examples=50, deadline=None, derandomize=True, database=None)
LEVELS = ["token", "sequence"]
NAN, INF = math.nan, math.inf


def f64(values):
    return torch.tensor(values, dtype=torch.float64)


def boolean(values):
    return torch.tensor(values, dtype=torch.bool)


def first(num_true, size):
    """bool (size,), the first num_true of them true."""
    return torch.arange(size) < num_true


def assert_close(actual, expected, tol=1e-12):
    """Values within tol, and the same shape and dtype."""
    torch.testing.assert_close(actual, expected, rtol=tol, atol=tol)


def loss_and_grad(logp, *args, **kwargs):
    logp = logp.detach().clone().requires_grad_()
    loss, metrics = tgrpo.tgrpo_loss(logp, *args, **kwargs)
    loss.backward()
    return loss.detach(), logp.grad, metrics


def test_docstring_examples():
    result = doctest.testmod(tgrpo)
    assert result.attempted > 0
    assert result.failed == 0


# ---- Eq. 1


@pytest.mark.parametrize(
    ("num_correct", "num_responses", "num_correct_shuffled", "num_shuffled", "earned"),
    [
        pytest.param(3, 8, 1, 4, True, id="3/8 above 1/4"),  # 3*4 = 12 >= 1*8 = 8
        pytest.param(2, 8, 1, 4, True, id="2/8 ties with 1/4"),  # 8 >= 8
        pytest.param(1, 8, 1, 4, False, id="1/8 below 1/4"),  # 4 < 8
        pytest.param(5, 8, 3, 4, False, id="5/8 below 3/4, though 5 > 3"),  # 20 < 24
        pytest.param(8, 8, 4, 4, True, id="all correct in both"),  # 32 >= 32
        pytest.param(0, 8, 0, 4, True, id="none correct in either"),  # 0 >= 0
        pytest.param(1, 3, 2, 6, True, id="1/3 ties with 2/6"),  # 6 >= 6
        # 49 * (1 / 49) is below 1 in floats.
        pytest.param(49, 49, 1, 1, True, id="49/49 ties with 1/1"),
        # 4140 * 4142 = 4141**2 - 1: smaller by 1 in 17 million, and equal in float32.
        pytest.param(4140, 4141, 4141, 4142, False, id="a difference below float32"),
        pytest.param(4141, 4142, 4140, 4141, True, id="the same, the other way round"),
    ],
)
def test_eq1_by_hand(num_correct, num_responses, num_correct_shuffled, num_shuffled, earned):
    correct = first(num_correct, num_responses)
    correct_shuffled = first(num_correct_shuffled, num_shuffled)
    by_default = tgrpo.temporal_reward(correct, correct_shuffled)
    with_alpha = tgrpo.temporal_reward(correct, correct_shuffled, alpha=1)
    assert (by_default, with_alpha) == ((0.3, 1.0) if earned else (0.0, 0.0))
    assert type(by_default) is type(with_alpha) is float


@pytest.mark.parametrize(("size", "size_shuffled"), [(0, 4), (8, 0)])
def test_eq1_refuses_an_empty_group(size, size_shuffled):
    with pytest.raises(ValueError, match="Eq. 1"):
        tgrpo.temporal_reward(first(0, size), first(0, size_shuffled))


# ---- Eq. 2


@pytest.mark.parametrize(
    ("rewards", "correct", "r_t", "expected"),
    [
        pytest.param([2.0, 1.0], [1, 0], 0.3, [2.3, 1.0], id="correct ones only"),
        pytest.param([2.0, 1.0], [1, 0], 0.0, [2.0, 1.0], id="r_t not earned"),
        pytest.param([1.0, 0.0], [0, 0], 0.3, [1.0, 0.0], id="none correct: nobody gets it"),
        pytest.param([2.0, 1.0], [1, 1], 0.3, [2.3, 1.3], id="correct without the format too"),
        pytest.param([1.49, 1.5], [0, 1], 0.3, [1.49, 1.8], id="partial credit"),
        pytest.param([0.7, -0.7], [1, 0], 0.3, [1.0, -0.7], id="advantages"),
    ],
)
def test_eq2_by_hand(rewards, correct, r_t, expected):
    assert_close(tgrpo.add_temporal_reward(f64(rewards), boolean(correct), r_t), f64(expected))


# ---- Eq. 3


@pytest.mark.parametrize(
    ("rewards", "expected"),
    [
        # mean 1, squares 1 + 0 + 1 = 2, over n - 1 = 2: std 1
        pytest.param([2.0, 1.0, 0.0], [1.0, 0.0, -1.0], id="three values"),
        # mean 1/4, squares 3/16 + 9/16 = 3/4, over 3: 1/4, std 1/2
        pytest.param([0.0, 0.0, 0.0, 1.0], [-0.5, -0.5, -0.5, 1.5], id="one of four"),
        # mean 1/4, squares 6/16 + 18/16 = 3/2, over 7: std sqrt(3/14)
        pytest.param(
            [1.0] * 2 + [0.0] * 6,
            [0.75 / math.sqrt(3 / 14)] * 2 + [-0.25 / math.sqrt(3 / 14)] * 6,
            id="two of eight",
        ),
        # deviations +-d/2, squares d**2/2, over 1: std d/sqrt(2), so +-1/sqrt(2) for every d
        pytest.param([0.3, 1.3], [-math.sqrt(0.5), math.sqrt(0.5)], id="two values"),
        pytest.param([1.0, 1.0, 1.0, 1.0], [0.0, 0.0, 0.0, 0.0], id="no spread"),
        pytest.param([1.7], [0.0], id="one response"),
        pytest.param([0.0, 0.99e-6], [0.0, 0.0], id="spread below 1e-6"),
        pytest.param([0.0, 1.01e-6], [-math.sqrt(0.5), math.sqrt(0.5)], id="spread above 1e-6"),
        # mean 0.9e-6, deviations -0.9e-6, 0, 0.9e-6: the spread is max - min, not the std
        pytest.param([0.0, 0.9e-6, 1.8e-6], [-1.0, 0.0, 1.0], id="std below 1e-6, spread above"),
    ],
)
def test_eq3_by_hand(rewards, expected):
    assert_close(tgrpo.group_advantages(f64(rewards)), f64(expected))


def slow_advantages(rewards):
    """Eq. 3 for one group, exact up to the square root."""
    rewards = [Fraction(r) for r in rewards]
    if max(rewards) - min(rewards) < Fraction(1, 10**6):
        return [0.0] * len(rewards)
    mean = sum(rewards) / len(rewards)
    variance = sum((r - mean) ** 2 for r in rewards) / (len(rewards) - 1)
    return [float(r - mean) / math.sqrt(variance) for r in rewards]


# Every value is exact in float32.
reward_values = st.sampled_from([0.0, 0.5, 1.0, 1.25, 2.0, 2.5]) | st.floats(0, 3, width=32)


@EXAMPLES
@given(st.integers(1, 8), st.integers(1, 3), st.data())
def test_eq3_agrees_with_the_slow_version(group_size, num_groups, data):
    group = st.lists(reward_values, min_size=group_size, max_size=group_size)
    groups = data.draw(st.lists(group, min_size=num_groups, max_size=num_groups))
    for group in groups:
        assume(abs(max(group) - min(group) - 1e-6) > 1e-12)
    expected = f64([slow_advantages(group) for group in groups])
    assert_close(tgrpo.group_advantages(f64(groups)), expected, 1e-8)
    assert_close(tgrpo.group_advantages(f64(groups).float()), expected, 1e-8)
    assert_close(tgrpo.group_advantages(f64(groups[0])), expected[0], 1e-8)


# ---- Eq. 5


@pytest.mark.parametrize(
    ("length", "correct", "earned"),
    [
        pytest.param(319, True, False, id="one token short"),
        pytest.param(320, True, True, id="l_min"),
        pytest.param(400, True, True, id="inside"),
        pytest.param(512, True, True, id="l_max"),
        pytest.param(513, True, False, id="one token long"),
        pytest.param(320, False, False, id="l_min, wrong"),
    ],
)
def test_eq5_by_hand(length, correct, earned):
    rewards = tgrpo.add_length_reward(f64([2.0]), boolean([correct]), torch.tensor([length]))
    assert_close(rewards, f64([2.2 if earned else 2.0]))


def test_eq5_of_a_group_with_other_settings():
    args = f64([2.3, 2.3, 1.0, 1.8]), boolean([1, 1, 0, 1]), torch.tensor([400, 100, 400, 320])
    assert_close(tgrpo.add_length_reward(*args), f64([2.5, 2.3, 1.0, 2.0]))
    own = tgrpo.add_length_reward(*args, omega=0.7, l_min=100, l_max=100)
    assert_close(own, f64([2.3, 3.0, 1.0, 1.8]))


# ---- the KL


@pytest.mark.parametrize(
    ("d", "expected"),
    [
        pytest.param(0.0, 0.0, id="equal"),
        # x - ln(x) - 1 with x = pi_ref / pi_theta = exp(d)
        pytest.param(math.log(2), 1 - math.log(2), id="reference twice as likely"),
        pytest.param(-math.log(2), math.log(2) - 0.5, id="reference half as likely"),
        pytest.param(20.0, math.exp(20) - 21, id="20, not clamped"),
        pytest.param(-20.0, math.exp(-20) + 19, id="-20, not clamped"),
        # d**2 / 2 + d**3 / 6
        pytest.param(1e-5, 5e-11 + 1e-15 / 6, id="digits near 0"),
        pytest.param(-1e-5, 5e-11 - 1e-15 / 6, id="digits near 0, below"),
    ],
)
def test_kl_by_hand(d, expected):
    logp = f64([[-1.5, -3.0]])
    kl = tgrpo.kl_divergence(f64(0.0), f64(d))
    assert kl.shape == ()
    assert kl.item() == pytest.approx(expected, rel=1e-5, abs=0)
    assert_close(tgrpo.kl_divergence(logp, logp + d), f64([[expected] * 2]), 1e-9)


def test_kl_is_the_divergence_of_policy_from_reference():
    policy, reference = f64([0.5, 0.3, 0.2]), f64([0.1, 0.3, 0.6])
    # sum of p ln(p / q): 0.5 ln 5 + 0.3 ln 1 + 0.2 ln(1/3)
    exact = 0.5 * math.log(5) - 0.2 * math.log(3)
    estimates = tgrpo.kl_divergence(policy.log(), reference.log())
    assert_close((policy * estimates).sum(), f64(exact))


# ---- Eq. 4 by hand


@pytest.mark.parametrize("level", LEVELS)
@pytest.mark.parametrize(
    ("ratio", "advantage", "clip_eps", "loss", "grad", "is_clipped"),
    [
        # loss = -min(ratio A, clip(ratio) A); its gradient is -ratio A, or 0 where the clip wins
        pytest.param(1.0, 2.0, 0.2, -2.0, -2.0, 0.0, id="ratio 1"),
        pytest.param(1.5, 2.0, 0.2, -2.4, 0.0, 1.0, id="A > 0, above: clipped"),
        pytest.param(1.1, 2.0, 0.2, -2.2, -2.2, 0.0, id="A > 0, within"),
        pytest.param(0.5, 2.0, 0.2, -1.0, -1.0, 0.0, id="A > 0, below: not clipped"),
        pytest.param(1.5, -2.0, 0.2, 3.0, 3.0, 0.0, id="A < 0, above: not clipped"),
        pytest.param(0.9, -2.0, 0.2, 1.8, 1.8, 0.0, id="A < 0, within"),
        pytest.param(0.5, -2.0, 0.2, 1.6, 0.0, 1.0, id="A < 0, below: clipped"),
        pytest.param(1.5, 2.0, 0.1, -2.2, 0.0, 1.0, id="A > 0, narrow clip"),
        pytest.param(0.5, -2.0, 0.1, 1.8, 0.0, 1.0, id="A < 0, narrow clip"),
    ],
)
def test_eq4_clip_on_one_token(level, ratio, advantage, clip_eps, loss, grad, is_clipped):
    logp = f64([[-1.0]])
    args = logp - math.log(ratio), logp, f64([advantage]), boolean([[1]])
    got, got_grad, metrics = loss_and_grad(logp, *args, clip_eps=clip_eps, level=level)
    assert_close(got, f64(loss))
    assert_close(got_grad, f64([[grad]]))
    assert metrics["clip_fraction"] == is_clipped


def two_by_three():
    """Two responses of 3 and 2 tokens, one padding column."""
    ratio = f64([[1.5, 1.0, 0.5], [1.5, 0.5, 1.0]])  # pi_theta / pi_old
    ref_ratio = f64([[2.0, 1.0, 0.5], [2.0, 0.5, 1.0]])  # pi_ref / pi_theta
    logp = f64([[-1.0, -2.0, -3.0], [-0.5, -0.25, 0.0]])
    mask = boolean([[1, 1, 1], [1, 1, 0]])
    return logp, logp - ratio.log(), logp + ref_ratio.log(), f64([2.0, -1.0]), mask


# Token level, clip 0.2, beta 0:
#   row 0, A = 2:  min(3, 2.4) = 2.4 clipped, 2, min(1, 1.6) = 1: mean 5.4 / 3 = 1.8
#   row 1, A = -1: min(-1.5, -1.2) = -1.5, min(-0.5, -0.8) = -0.8 clipped: mean -1.15
#   J = (1.8 - 1.15) / 2 = 0.325; 2 of 5 ratios clipped
#   gradient -ratio A / (len G): row 0: 0, -2/6, -1/6; row 1: 1.5/4, 0; padding 0
# Sequence level, beta 0:
#   row 0: ratio 1.5 * 1 * 0.5 = 0.75, min(1.5, 1.6) = 1.5
#   row 1: ratio 1.5 * 0.5 = 0.75, min(-0.75, -0.8) = -0.8 clipped
#   J = (1.5 - 0.8) / 2 = 0.35; 1 of 2 ratios clipped
#   gradient -ratio A / G on each token: row 0: -0.75; row 1: 0
# KL of both levels, x - ln(x) - 1 for x = 2, 1, 0.5 and for x = 2, 0.5; the logarithms cancel:
#   row 0: (1 + 0 - 0.5) / 3 = 1/6; row 1: (1 - 0.5) / 2 = 1/4; mean 5/24; times 0.04: 1/120
#   gradient beta (1 - x) / (len G): row 0: -1/6, 0, 0.5/6; row 1: -1/4, 0.5/4
OBJECTIVE_GRAD = {
    "token": f64([[0.0, -1 / 3, -1 / 6], [0.375, 0.0, 0.0]]),
    "sequence": f64([[-0.75, -0.75, -0.75], [0.0, 0.0, 0.0]]),
}
KL_GRAD = f64([[-1 / 6, 0.0, 1 / 12], [-1 / 4, 1 / 8, 0.0]])


@pytest.mark.parametrize(
    ("level", "beta", "loss", "clip_fraction"),
    [
        pytest.param("token", 0.0, -0.325, 2 / 5, id="token, no KL"),
        pytest.param("token", 0.04, -0.325 + 1 / 120, 2 / 5, id="token"),
        pytest.param("token", 1.0, -0.325 + 5 / 24, 2 / 5, id="token, beta 1"),
        pytest.param("sequence", 0.0, -0.35, 1 / 2, id="sequence, no KL"),
        pytest.param("sequence", 0.04, -0.35 + 1 / 120, 1 / 2, id="sequence"),
        pytest.param("sequence", 1.0, -0.35 + 5 / 24, 1 / 2, id="sequence, beta 1"),
    ],
)
def test_eq4_two_by_three(level, beta, loss, clip_fraction):
    got, grad, metrics = loss_and_grad(*two_by_three(), beta=beta, level=level)
    assert_close(got, f64(loss))
    assert_close(grad, OBJECTIVE_GRAD[level] + beta * KL_GRAD)
    assert_close(metrics["kl"], f64(5 / 24))
    assert metrics["clip_fraction"].item() == pytest.approx(clip_fraction)


@pytest.mark.parametrize(
    ("level", "expected"),
    [
        # -A / (len G): 1.5 / (3 * 2), -0.5 / (2 * 2)
        pytest.param("token", [[-0.25, -0.25, -0.25], [0.125, 0.125, 0.0]], id="token"),
        # -A / G
        pytest.param("sequence", [[-0.75, -0.75, -0.75], [0.25, 0.25, 0.0]], id="sequence"),
    ],
)
def test_eq4_one_update_per_rollout(level, expected):
    logp, _, logp_ref, _, mask = two_by_three()
    advantages = f64([1.5, -0.5])
    args = logp_ref, advantages, mask
    loss, grad, metrics = loss_and_grad(logp, logp.clone(), *args, beta=0.0, level=level)
    assert_close(loss, -advantages.mean())
    assert_close(grad, f64(expected))
    assert metrics["clip_fraction"] == 0

    # logp itself as logp_old: its gradient does not flow through the denominator.
    leaf = logp.clone().requires_grad_()
    tgrpo.tgrpo_loss(leaf, leaf, *args, beta=0.0, level=level)[0].backward()
    assert_close(leaf.grad, f64(expected))


def test_eq4_refuses_an_unknown_level():
    with pytest.raises(ValueError, match="not 'tokens'"):
        tgrpo.tgrpo_loss(*two_by_three(), level="tokens")


# ---- Eq. 4 against a slow version


def slow_loss(logp, logp_old, logp_ref, advantages, mask, clip_eps, beta, level):
    """Eq. 4 one response and one ratio at a time, of tensors (G, T) and (G,).

    Returns loss, with a gradient in logp, kl and clip_fraction.
    """
    objective = kl_total = logp.new_zeros(())
    clipped = []  # whether the clip wins, for each ratio
    for i, advantage in enumerate(advantages):
        tokens = [t for t, is_token in enumerate(mask[i]) if is_token]
        if not tokens:
            continue
        log_ratios = [logp[i, t] - logp_old[i, t] for t in tokens]
        if level == "sequence":
            log_ratios = [sum(log_ratios)]
        terms = []
        for log_ratio in log_ratios:
            ratio = log_ratio.exp()
            above, below = advantage > 0 and ratio > 1 + clip_eps, ratio < 1 - clip_eps
            clipped.append(bool(above or advantage < 0 and below))
            if clipped[-1]:
                ratio = 1 + clip_eps if advantage > 0 else 1 - clip_eps
            terms.append(ratio * advantage)
        differences = [logp_ref[i, t] - logp[i, t] for t in tokens]
        kl = sum(d.exp() - d - 1 for d in differences) / len(tokens)
        kl_total = kl_total + kl
        objective = objective + sum(terms) / len(terms) - beta * kl
    num_rows = len(advantages)
    return -objective / num_rows, kl_total / num_rows, sum(clipped) / max(len(clipped), 1)


@st.composite
def problems(draw, level):
    """Arguments of tgrpo_loss in float64; padding holds one of several numbers that bite."""
    lead = draw(st.sampled_from([(), (1,), (2,), (2, 1)]))
    group_size, num_tokens = draw(st.integers(1, 8)), draw(st.integers(0, 6))
    num_rows = math.prod(lead) * group_size
    lengths = draw(st.lists(st.integers(0, num_tokens), min_size=num_rows, max_size=num_rows))
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**32 - 1)))

    def normal(*shape):
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    shape = (*lead, group_size, num_tokens)
    mask = (torch.arange(num_tokens) < torch.tensor(lengths)[:, None]).reshape(shape)
    logp = -normal(*shape).abs()
    logp_old = logp + draw(st.sampled_from([0.5, 0.2, 0.0])) * normal(*shape)
    logp_ref = logp + draw(st.sampled_from([0.3, 0.0])) * normal(*shape)
    advantages = normal(*lead, group_size)
    advantages[..., : draw(st.integers(0, group_size))] = 0.0
    padding = draw(st.lists(st.sampled_from([0.0, 1e30, NAN, INF, -INF]), min_size=3, max_size=3))
    logps = (
        torch.where(mask, x, number)
        for x, number in zip((logp, logp_old, logp_ref), padding, strict=True)
    )
    return {
        **dict(zip(("logp", "logp_old", "logp_ref"), logps, strict=True)),
        "advantages": advantages,
        "completion_mask": mask,
        "clip_eps": draw(st.sampled_from([0.1, 0.2, 0.4])),
        "beta": draw(st.sampled_from([0.04, 1.0, 0.0])),
        "level": level,
    }


def assert_agrees_with_slow(problem):
    loss, grad, metrics = loss_and_grad(**problem)
    shape = problem["advantages"].numel(), grad.shape[-1]
    flat = {name: problem[name].reshape(shape)
            for name in ("logp", "logp_old", "logp_ref", "completion_mask")}  # fmt: skip
    logp = flat["logp"].requires_grad_()
    others = flat["logp_old"], flat["logp_ref"], problem["advantages"].flatten()
    options = flat["completion_mask"], problem["clip_eps"], problem["beta"], problem["level"]
    slow, kl, clip_fraction = slow_loss(logp, *others, *options)
    assert_close(loss, slow.detach())
    assert_close(metrics["kl"], kl.detach())
    assert metrics["clip_fraction"].item() == pytest.approx(clip_fraction)
    slow_grad = torch.zeros_like(logp)
    if slow.requires_grad:  # else no response has a token
        (slow_grad,) = torch.autograd.grad(slow, logp)
    assert_close(grad, slow_grad.reshape(grad.shape), 1e-9)


@pytest.mark.parametrize("level", LEVELS)
def test_eq4_agrees_with_the_slow_version(level):
    EXAMPLES(given(problems(level))(assert_agrees_with_slow))()


# ---- what the equations imply

# Section 3.2 ends: "The temporal reward r_t could also be added to the advantages directly."


@pytest.mark.parametrize("num_correct", range(9))
def test_r_t_in_binary_rewards_changes_no_advantage(num_correct):
    """All have the format, so r_i is 2 or 1: 2.3 and 1 normalise to the same numbers."""
    correct = first(num_correct, 8)
    rewards = 1.0 + correct.double()
    r_t = tgrpo.temporal_reward(correct, boolean([0, 0, 0, 0]))
    assert r_t == 0.3
    without = tgrpo.group_advantages(rewards)
    shaped = tgrpo.add_temporal_reward(rewards, correct, r_t)
    assert torch.equal(shaped, rewards) == (num_correct == 0)
    effect = tgrpo.temporal_effect(tgrpo.group_advantages(shaped), without)
    assert_close(effect, torch.zeros(8).double())


def test_r_t_in_varied_rewards_changes_advantages():
    # Right with and without the format, wrong with and without it.
    rewards, correct = f64([2.0, 1.0, 1.0, 0.0]), boolean([1, 1, 0, 0])
    # mean 1, squares 1 + 0 + 0 + 1 = 2, over 3: std sqrt(2/3)
    before = f64([1.0, 0.0, 0.0, -1.0]) / math.sqrt(2 / 3)
    # [2.3, 1.3, 1, 0]: mean 1.15, squares 2 * (1.3225 + 0.0225) = 2.69, over 3
    after = f64([1.15, 0.15, -0.15, -1.15]) / math.sqrt(2.69 / 3)
    assert_close(tgrpo.group_advantages(rewards), before)
    shaped = tgrpo.add_temporal_reward(rewards, correct, 0.3)
    assert_close(tgrpo.group_advantages(shaped), after)
    effect = tgrpo.temporal_effect(tgrpo.group_advantages(shaped), before)
    outer, inner = math.sqrt(1.5) - 1.15 * math.sqrt(3 / 2.69), 0.15 * math.sqrt(3 / 2.69)
    assert_close(effect, f64([outer, inner, inner, outer]))


def test_length_reward_gives_r_t_something_to_act_on():
    # Two right, one of them in the window, one wrong: [2.2, 2, 1] without r_t, [2.5, 2.3, 1] with.
    correct, lengths = boolean([1, 1, 0]), torch.tensor([400, 600, 400])
    rewards = 1.0 + correct.double()
    without = tgrpo.add_length_reward(rewards, correct, lengths)
    shaped = tgrpo.add_temporal_reward(rewards, correct, 0.3)
    with_r_t = tgrpo.add_length_reward(shaped, correct, lengths)
    assert_close(with_r_t, f64([2.5, 2.3, 1.0]))
    # The place of the middle one between the ends: 1 / 1.2 against 1.3 / 1.5.
    for rewards, place in ((without, 1 / 1.2), (with_r_t, 1.3 / 1.5)):
        high, middle, low = tgrpo.group_advantages(rewards)
        assert_close((middle - low) / (high - low), f64(place))


PARTS = {"accuracy": [1, 1, 0, 0], "format": [1, 1, 1, 0], "temporal": [0.3, 0.3, 0, 0]}
Z = 1.3 * 3**0.5 / 2  # z of (1, 1, 0, 0) is +-sqrt(3)/2, that of (1, 1, 1, 0) is 1/2 and -3/2
NORMS = {
    "none": [0.9, 0.9, -0.4, -1.4],  # 2.3, 2.3, 1, 0 less their mean 1.4
    "separate": [Z + 0.5, Z + 0.5, -Z + 0.5, -Z - 1.5],
}


@pytest.mark.parametrize("norm", NORMS)
def test_the_other_norms_by_hand(norm):
    parts = {name: f64(values) for name, values in PARTS.items()}
    advantages = tgrpo.advantages_of_parts(parts, {"temporal": 0.3}, norm)
    assert_close(advantages, f64(NORMS[norm]))


def test_std_is_eq_3_of_the_sum_and_another_norm_an_error():
    parts = {name: f64(values) for name, values in PARTS.items()}
    expected = tgrpo.group_advantages(f64([2.3, 2.3, 1, 0]))
    assert_close(tgrpo.advantages_of_parts(parts, {}), expected)
    with pytest.raises(ValueError, match="'std', 'none' or 'separate', not 'mean'"):
        tgrpo.advantages_of_parts(parts, {}, "mean")
