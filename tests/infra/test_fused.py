"""Each hand-made kernel against its plain definition: values and gradients."""

from functools import partial

import pytest
import torch
from torch.nn.attention.bias import causal_lower_right
from torch.nn.functional import scaled_dot_product_attention

from infra import fused
from infra.fused import (
    fast_linear,
    float32_product,
    invert_cumulative,
    plain_invert_cumulative,
    plain_token_logprobs,
    suffix_attention,
    token_logprobs,
)


def rng(seed=0):
    return torch.Generator().manual_seed(seed)


# ---------------------------------------------------------------------- token log-probabilities

TARGETS, FORBIDDEN = torch.tensor([1, 3, 3, 0, 10, 5, 9]), [2, 4]


def values_and_gradients(function, *arguments, **settings):
    """What a function of (hidden, weight) gives, and both gradients of a weighted sum of it."""
    hidden, weight = (torch.randn(rows, 6, generator=rng(rows)) for rows in (7, 11))
    leaves = [hidden.requires_grad_(), weight.requires_grad_()]
    logps = function(*leaves, *arguments, **settings)
    logps.backward(torch.randn(len(logps), generator=rng(1)))
    return [logps.detach(), *(leaf.grad for leaf in leaves)]


@pytest.mark.parametrize("width", [0, 1, 3, 11])
def test_token_logprobs_equal_the_plain_ones(width):
    expected = values_and_gradients(plain_token_logprobs, TARGETS, FORBIDDEN)
    found = values_and_gradients(token_logprobs, TARGETS, FORBIDDEN, width=width)
    for mine, plain in zip(found, expected, strict=True):
        torch.testing.assert_close(mine, plain, atol=1e-6, rtol=1e-5)


def test_logits_exist_in_blocks_only(monkeypatch):
    shapes, product = [], float32_product

    def counted(x, weight):
        shapes.append((len(x), len(weight)))
        return product(x, weight)

    monkeypatch.setattr(fused, "float32_product", counted)
    values_and_gradients(token_logprobs, TARGETS, FORBIDDEN, width=4)
    assert shapes == [(7, 4), (7, 4), (7, 3)] * 2  # once forward and once backward


@pytest.mark.parametrize("device", ["cpu", "cuda"])
def test_blocks_are_aligned(device):
    assert fused.block_width(6144, "cuda") == 5376  # 2**25 / 6144 = 5461.3
    assert all(fused.block_width(number, device) % 128 == 0 for number in (0, 1, 7, 1000, 10**6))


# ------------------------------------------------------------------------------------- products


def test_logits_of_bfloat16_are_not_rounded():
    """With top logits near 20 a product rounded to bfloat16 is wrong by up to 0.06."""
    x, weight = (torch.randn(rows, 64, generator=rng(rows)).bfloat16() * 2 for rows in (9, 500))
    exact = x.double() @ weight.double().T
    found = float32_product(x, weight)
    assert found.dtype == torch.float32
    torch.testing.assert_close(found.double(), exact, atol=1e-4, rtol=0)
    assert ((x @ weight.T).double() - exact).abs().max() > 0.01  # the test can fail


@pytest.mark.parametrize(
    ("vocabulary", "case"),  # the larger one in three parts
    [(501, "no operator"), (501, "bfloat16"), (501, "operator"), (400_000, "operator")],
)
def test_fast_linear_equals_the_product(vocabulary, case, monkeypatch):
    linear = torch.nn.Linear(24, vocabulary, bias=False)
    if case == "no operator":
        monkeypatch.setattr(torch.ops, "mkldnn", object())
    if case == "bfloat16":
        linear = linear.bfloat16()
    fast = fast_linear(linear)
    for rows in (1, 12):
        hidden = torch.randn(rows, 1, 24, generator=rng(), dtype=linear.weight.dtype)
        with torch.no_grad():
            found = fast(hidden)
            expected = hidden.double() @ linear.weight.double().T
        assert found.is_contiguous()
        assert found.shape == (rows, 1, vocabulary)
        assert found.dtype == torch.float32
        torch.testing.assert_close(found.double(), expected, atol=1e-6, rtol=0)


# ----------------------------------------------------------------------------------- attention


@pytest.mark.parametrize(("num_prompt", "num_new"), [(5, 3), (3, 5), (4, 1)])
def test_attention_with_and_without_a_mask(num_prompt, num_new):
    """What the CPU takes, what a GPU takes, and the sum by hand."""

    def leaves():
        shapes = [(2, 6, num_new, 8)] + [(2, 2, num_prompt + num_new, 8)] * 2
        return [torch.randn(shape, generator=rng(i)).requires_grad_()
                for i, shape in enumerate(shapes)]  # fmt: skip

    def by_hand(query, key, value):
        key, value = key.repeat_interleave(3, 1), value.repeat_interleave(3, 1)
        scores = query @ key.transpose(-1, -2) * 0.3
        place = num_prompt + torch.arange(num_new)
        hidden = torch.arange(num_prompt + num_new) > place[:, None]
        return scores.masked_fill(hidden, -torch.inf).softmax(-1) @ value

    def unmasked(query, key, value):
        bias = causal_lower_right(num_new, num_prompt + num_new)
        return scaled_dot_product_attention(
            query, key, value, attn_mask=bias, enable_gqa=True, scale=0.3
        )

    results = []
    ours = partial(suffix_attention, scale=0.3, enable_gqa=True)
    for function in (by_hand, unmasked, ours):
        states = leaves()
        output = function(*states)
        output.backward(torch.randn(output.shape, generator=rng(9)))
        results.append([output.detach(), *(state.grad for state in states)])
    for result in results[1:]:
        for mine, expected in zip(result, results[0], strict=True):
            torch.testing.assert_close(mine, expected, atol=1e-6, rtol=1e-5)


# ------------------------------------------------------------------------------------- drawing


@pytest.mark.parametrize("vocabulary", [1, 127, 128, 129, 151936])
@pytest.mark.parametrize("zeros", [0.0, 0.9])
def test_two_levels_draw_what_one_cumulative_sum_draws(vocabulary, zeros):
    generator = rng(vocabulary)
    weights = torch.randn(16, vocabulary, generator=generator).exp()
    weights[torch.rand(16, vocabulary, generator=generator) < zeros] = 0
    weights[:, vocabulary // 2] = 1  # one at least
    uniforms = torch.rand(16, 1, generator=generator, dtype=torch.float64)
    uniforms[0], uniforms[1] = 0.0, 1 - 2**-53
    found = invert_cumulative(weights, uniforms)
    assert torch.equal(found, plain_invert_cumulative(weights, uniforms))
    assert (weights.gather(-1, found) > 0).all()


@pytest.mark.parametrize("u", [0.0, 0.3, 0.7, 1 - 2**-53])
def test_a_block_of_rounded_mass_still_gives_a_token_of_weight(u):
    """float32 sums to 2 where the exact sum is 2 - 2^-24, or misses numbers that are tiny."""
    weights = torch.zeros(3, 200)
    weights[0, 5:7] = torch.tensor([1.0, 1 - 2**-24])
    weights[1, 130], weights[1, 140:] = 1.0, 1e-9
    weights[2, 199] = 1e-38
    found = invert_cumulative(weights, torch.full((3, 1), u, dtype=torch.float64))
    assert (weights.gather(-1, found) > 0).all()
    assert found[2] == 199
