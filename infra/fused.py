"""The few kernels that are made by hand, each after its plain definition.

Read the `plain_` functions: they say what is computed, and the tests hold values and gradients of
the others against them. Whatever depends on the device within a pass is decided here.

Shapes: M tokens, D hidden size, V vocabulary, R rows of a decoding step.
"""

from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from torch.nn.attention.bias import causal_lower_right
from torch.nn.functional import pad, scaled_dot_product_attention

# So many logits exist at a time: 128 MiB in float32 keep a GPU busy, 4 MiB stay in a CPU's cache.
LOGITS_PER_BLOCK = {"cuda": 2**25, "cpu": 2**20}
MIN_BLOCK = 1024  # tokens of the vocabulary: a product with fewer columns is slow
ALIGNMENT = 128  # of a block: tensor cores want a leading dimension that is a multiple of 8
DRAW_BLOCK = 128  # tokens: near the square root of a large vocabulary, and cheap to sum


# ------------------------------------------------------------------------------------- products


def float32_product(x: Tensor, weight: Tensor) -> Tensor:
    """x @ weight.T, (M, D) and (V, D) to float32 (M, V), without gradient.

    bfloat16 factors are accumulated and kept in float32. A product rounded to bfloat16 would be off
    by up to 0.09 nats where logits are near 20.
    """
    if x.dtype != torch.bfloat16:
        return (x @ weight.T).float()
    if x.device.type == "cuda":
        return torch.mm(x, weight.T, out_dtype=torch.float32)  # GPU only: raises on a CPU
    return x.float() @ weight.float().T


def fast_linear(linear: nn.Linear) -> Callable[[Tensor], Tensor]:
    """float32_product as the forward of the last layer in decoding: (R, 1, D) to float32 (R, 1, V).

    Reading its weight is most of a small model's step. For 12 rows of 256 features and a vocabulary
    of 151,936 (float32, two CPU cores) F.linear takes 40 ms, a weight prepared by
    torch.utils.mkldnn.to_mkldnn 23 ms, and one laid out by the private operator 12 ms, which is
    over a tenth of an RL step. The layout is a copy of the weight, made once per rollout; where the
    operator is missing, or the weight is sharded, the plain product serves.
    """
    assert linear.bias is None, "a bias would be left out"
    weight = linear.weight
    on_cpu = weight.dtype == torch.float32 and weight.device.type == "cpu"
    reorder = getattr(torch.ops.mkldnn, "_reorder_linear_weight", None)
    product = getattr(torch.ops.mkldnn, "_linear_pointwise", None)
    if not on_cpu or isinstance(weight, DTensor) or reorder is None or product is None:
        # linear.weight is looked up in each call: FSDP puts the gathered weight there.
        return lambda x: float32_product(x.flatten(0, 1), linear.weight).unflatten(0, x.shape[:2])
    # In parts small enough to reuse freed memory (distributed.keep_freed_memory): in fresh pages
    # the copy takes ten times as long.
    parts = weight.split(max(1, 2**24 // (weight.shape[1] * weight.element_size())))
    packed = [reorder(part) for part in parts]
    no_pointwise = ("none", [], "")  # the product could end with a function: name, scalars, variant
    return lambda x: torch.cat([product(x, part, None, *no_pointwise) for part in packed], -1)


# ---------------------------------------------------------------------- token log-probabilities


def plain_token_logprobs(
    hidden: Tensor, weight: Tensor, targets: Tensor, forbidden: list[int]
) -> Tensor:
    """log softmax(hidden @ weight.T)[targets], forbidden tokens at -inf.

    Args:
        hidden: (M, D). weight: (V, D). targets: int64 (M,). forbidden: ids.
    Returns:
        float32 (M,).
    """
    logits = (hidden @ weight.T).float()  # (M, V)
    logits = logits.index_fill(1, torch.tensor(forbidden, device=hidden.device), -torch.inf)
    return logits.log_softmax(1).gather(1, targets[:, None])[:, 0]


def token_logprobs(
    hidden: Tensor, weight: Tensor, targets: Tensor, forbidden: list[int], width: int = 0
) -> Tensor:
    """plain_token_logprobs with the logits of `width` tokens of the vocabulary at a time.

    width: 0 chooses it by the device and M.
    """
    width = width or block_width(len(hidden), hidden.device.type)
    return TokenLogprobs.apply(hidden, weight, targets, forbidden, width)


def block_width(num_tokens: int, device_type: str) -> int:
    """Tokens of the vocabulary whose logits, for num_tokens positions, exist at a time."""
    width = LOGITS_PER_BLOCK[device_type] // max(1, num_tokens)
    return max(MIN_BLOCK, width // ALIGNMENT * ALIGNMENT)


class TokenLogprobs(torch.autograd.Function):
    """Logits are recomputed in the backward pass. With p the softmax and y the one-hot target,
    d logp / d logits = y - p. Each block of weight.grad is written once, where a loop over blocks
    of tokens would add to all of it again and again.
    """

    @staticmethod
    def forward(ctx, hidden, weight, targets, forbidden, width):
        chosen = torch.zeros(len(hidden), device=hidden.device)
        normalisers = []
        for block in _blocks(len(weight), width):
            logits = _logits(hidden, weight, block, forbidden)  # (M, width)
            inside, columns = _targets_in(block, targets)
            chosen = torch.where(inside, logits.gather(1, columns[:, None])[:, 0], chosen)
            normalisers.append(logits.logsumexp(1))
        normaliser = torch.stack(normalisers, 1).logsumexp(1)  # (M,)
        ctx.save_for_backward(hidden, weight, targets, normaliser)
        ctx.forbidden, ctx.width = forbidden, width
        return chosen - normaliser

    @staticmethod
    def backward(ctx, grad):
        hidden, weight, targets, normaliser = ctx.saved_tensors
        grad_hidden = torch.zeros_like(hidden, dtype=torch.float32)  # a sum over the blocks
        grad_weight = torch.empty_like(weight) if ctx.needs_input_grad[1] else None
        # -grad, the sign of p - y, is applied on the (M, D) side of both products: it is smaller.
        scaled = (hidden * -grad[:, None]).to(hidden.dtype)
        for block in _blocks(len(weight), ctx.width):
            logits = _logits(hidden, weight, block, ctx.forbidden)
            probabilities = logits.sub_(normaliser[:, None]).exp_()
            inside, columns = _targets_in(block, targets)
            probabilities.scatter_add_(1, columns[:, None], -inside.float()[:, None])  # p - y
            difference = probabilities.to(hidden.dtype)
            grad_hidden += difference @ weight[block]
            if grad_weight is not None:
                torch.mm(difference.T, scaled, out=grad_weight[block])
        grad_hidden = grad_hidden.mul_(-grad[:, None]).to(hidden.dtype)
        return grad_hidden, grad_weight, None, None, None


def _blocks(vocabulary: int, width: int) -> list[slice]:
    return [slice(start, start + width) for start in range(0, vocabulary, width)]


def _logits(hidden: Tensor, weight: Tensor, block: slice, forbidden: list[int]) -> Tensor:
    logits = float32_product(hidden, weight[block])
    for token in forbidden:
        if block.start <= token < block.stop:
            logits[:, token - block.start] = -torch.inf
    return logits


def _targets_in(block: slice, targets: Tensor) -> tuple[Tensor, Tensor]:
    """Which targets lie in a block, bool (M,), and their columns in it, int64 (M,), else 0."""
    inside = (targets >= block.start) & (targets < block.stop)
    return inside, torch.where(inside, targets - block.start, 0)


# ----------------------------------------------------------------------------------- attention


def suffix_attention(query: Tensor, key: Tensor, value: Tensor, **settings) -> Tensor:
    """Causal attention of the last T of S + T tokens to all of them.

    The mask is the plain definition, and what the CPU takes. On a GPU the same is said by
    causal_lower_right, which leaves room for a flash kernel, where a mask would not.

    Args:
        query: (G, heads, T, size). key, value: (G, key-value heads, S + T, size).
        settings: further arguments of scaled_dot_product_attention: scale, enable_gqa, ..
    Returns:
        (G, heads, T, size).
    """
    num_new, num_all = query.shape[-2], key.shape[-2]
    if query.device.type == "cuda":
        mask = causal_lower_right(num_new, num_all)
    else:
        mask = query.new_ones(num_new, num_all, dtype=torch.bool).tril(num_all - num_new)
    return scaled_dot_product_attention(query, key, value, attn_mask=mask, **settings)


# ------------------------------------------------------------------------------------- drawing


def plain_invert_cumulative(weights: Tensor, uniforms: Tensor) -> Tensor:
    """The first token of each row at which the cumulative sum exceeds u times the row's sum.

    Args:
        weights: float32 (R, V), not negative; some positive in each row.
        uniforms: float64 (R, 1), in [0, 1).
    Returns:
        int64 (R, 1), tokens of positive weight.
    """
    cumulative = weights.cumsum(-1, dtype=torch.float64)
    return torch.searchsorted(cumulative, uniforms * cumulative[:, -1:], right=True)


def invert_cumulative(weights: Tensor, uniforms: Tensor) -> Tensor:
    """plain_invert_cumulative in two levels; any token for a row with NaN.

    First the block of the vocabulary, by the blocks' sums in float32, then the token in it. With a
    vocabulary of 151,936 one float64 sum takes twice as long for 12 rows and nine times for 48,
    when it no longer fits into the cache; torch.multinomial takes 26 times as long for 12.
    """
    vocabulary = weights.shape[-1]
    whole = vocabulary - vocabulary % DRAW_BLOCK
    sums = weights[:, :whole].unflatten(-1, (-1, DRAW_BLOCK)).sum(-1)
    masses = torch.cat([sums, weights[:, whole:].sum(-1, keepdim=True)], -1).double()
    cumulative = pad(masses.cumsum(-1), (1, 0))  # (R, blocks + 1): before each block, and the total
    # In float64 u * total stays below total, and right=True steps over blocks of no weight.
    goal = uniforms * cumulative[:, -1:]
    block = torch.searchsorted(cumulative, goal, right=True) - 1
    goal = goal - cumulative.gather(-1, block)  # what is left inside the block

    tokens = block * DRAW_BLOCK + torch.arange(DRAW_BLOCK, device=weights.device)
    inside = weights.gather(-1, tokens.clamp(max=vocabulary - 1)).double()
    cumulative = torch.where(tokens < vocabulary, inside, 0.0).cumsum(-1)  # (R, DRAW_BLOCK)
    # The block's mass is a float32 sum: it may exceed the exact one by a rounding.
    total = cumulative[:, -1:]
    goal = torch.minimum(goal, torch.nextafter(total, torch.zeros_like(total)))
    found = block * DRAW_BLOCK + torch.searchsorted(cumulative, goal, right=True)
    return found.clamp(max=vocabulary - 1)  # NaN compares above everything
