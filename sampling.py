"""Rollouts: one prefill of all prompts, then one batched Hugging Face `generate` for all groups.

A token is drawn by inverting the cumulative distribution at one uniform number per row and step.
The numbers come from a generator that is seeded for each row and depend neither on the batch nor
on the rank; nor does the response, up to the rounding of batched products.

Shapes: P prompts, R rows (all responses of all prompts), S prompt tokens of the longest prompt,
T tokens until every row has hit an end token, V vocabulary.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.tensor import DTensor
from torch.nn.functional import pad
from transformers import DynamicCache, GenerationConfig
from transformers.cache_utils import DynamicLayer

from infra.errors import UserError
from infra.fused import fast_linear, invert_cumulative
from model import Pack, enable_packing, end_tokens, forbidden_tokens, pack_groups


@dataclass(frozen=True)
class Rollout:
    """The responses to one prompt.

    completion_ids: int64 (G, T). completion_mask: bool (G, T), true up to and including the end
    token. ended: bool (G,), false where the response was cut at the limit. sampler_logps: float32
    (G, T), of the drawn tokens under the sampler's softmax, 0 where the mask is false. texts: G
    strings, without the end token.
    """

    prompt: object
    completion_ids: Tensor
    completion_mask: Tensor
    ended: Tensor
    sampler_logps: Tensor
    texts: list[str]

    @property
    def lengths(self) -> Tensor:
        """Tokens of each response, end token included: int64 (G,)."""
        return self.completion_mask.sum(-1)


def derive_seed(*key: int) -> int:
    """One number below 2^63 from a key of whole numbers, for a torch.Generator."""
    return int(np.random.SeedSequence(key).generate_state(1, np.uint64)[0] >> np.uint64(1))


def draw_tokens(
    logits: Tensor, uniforms: Tensor, temperature: float = 1.0, top_p: float = 1.0
) -> tuple[Tensor, Tensor]:
    """Draw one token per row by inverse transform sampling.

    Args:
        logits: float32 (R, V), -inf where a token is forbidden.
        uniforms: float64 (R,), in [0, 1).
        temperature: divides the logits. top_p: keep the most likely tokens, as few as have this
            probability together (the first one at least).
    Returns:
        the tokens, int64 (R,), and their log-probabilities before the cut at top_p, float32 (R,).
    """
    if temperature != 1:  # each pass over the vocabulary counts
        logits = logits / temperature
    softmax = probabilities = logits.softmax(-1)  # (R, V)
    if top_p < 1:
        # Evaluation's top_p leaves one token; sorting the vocabulary takes longer than the model.
        top, first = probabilities.max(-1)  # of equals the first, as in the stable sort below
        if bool((top >= top_p).all()):
            return first, top.log()
        ranked, order = probabilities.sort(dim=-1, descending=True, stable=True)
        before = ranked.cumsum(-1) - ranked  # probability of all likelier tokens
        ranked = torch.where(before < top_p, ranked, 0.0)
        probabilities = torch.zeros_like(ranked).scatter(-1, order, ranked)
    tokens = invert_cumulative(probabilities, uniforms[:, None])
    return tokens[:, 0], softmax.gather(-1, tokens)[:, 0].log()


@torch.no_grad()
def sample_groups(
    model,
    tokenizer,
    prompts: list,
    row_keys: list[list[Sequence[int]]],
    max_new_tokens: int,
    temperature: float = 1.0,
    top_p: float = 1.0,
) -> list[Rollout]:
    """Sample responses to several prompts in one batch.

    With the defaults the samples come from the policy itself: the softmax of the logits with
    forbidden tokens at -inf. Nothing is taken over from the checkpoint's generation_config but the
    end tokens. A sharded model is best inside `unsharded`: outside, every token gathers all
    weights, so every rank must call this at the same time, each with prompts of its own.

    Args:
        prompts: list of P Prompts.
        row_keys: for each prompt a list of keys, one for each response wanted, from which the
            row's random numbers are seeded: (seed, step, sample, group, row).
        max_new_tokens: length of a response at most, end token included.
    Returns:
        one Rollout per prompt, all of the same T.
    Raises:
        UserError: the model's logits are NaN.
    """
    if not hasattr(model, "packed_prefill"):
        enable_packing(model)
    device = model.lm_head.weight.device
    group_sizes = [len(keys) for keys in row_keys]
    ends = end_tokens(model)

    tokens_per_second = model.config.vision_config.tokens_per_second
    pack = pack_groups(prompts, [[] for _ in prompts], tokens_per_second)
    cache = expand_cache(model.packed_prefill(pack.to(device)), pack, group_sizes, max_new_tokens)
    inputs = batch_rows(pack, group_sizes, pad_token=ends[0])
    draws = [np.random.default_rng(key).random(max_new_tokens) for keys in row_keys for key in keys]
    uniforms = torch.from_numpy(np.stack(draws)).to(device)  # float64 (R, steps)
    forbidden = torch.tensor(forbidden_tokens(model.config), device=device)

    def draw(logits: Tensor, step: int) -> tuple[Tensor, Tensor]:
        logits.index_fill_(-1, forbidden, -torch.inf)
        return draw_tokens(logits, uniforms[:, step], temperature, top_p)

    settings = GenerationConfig(
        max_new_tokens=max_new_tokens, do_sample=False, eos_token_id=ends, pad_token_id=ends[0]
    )
    inputs = {name: value.to(device) for name, value in inputs.items()}
    with _ready_to_generate(model):
        ids, logps = model.generate(
            generation_config=settings,
            **inputs,
            past_key_values=cache,
            custom_generate=decode,
            draw=draw,
            together=is_sharded(model),
        )
    ids, logps = ids.cpu(), logps.cpu()  # (R, T)
    is_end = torch.isin(ids, torch.tensor(ends))
    mask = is_end.cumsum(-1) - is_end.long() == 0  # up to and including the first end token
    logps = torch.where(mask, logps, 0.0)
    if logps.isnan().any():
        raise UserError("the model's logits are NaN: its weights are, or overflow in its dtype")
    columns = (column.split(group_sizes) for column in (ids, mask, is_end.any(-1), logps))
    return [
        Rollout(prompt, *group, decode_texts(tokenizer, group[0], group[1], ends))
        for prompt, *group in zip(prompts, *columns, strict=True)
    ]


def is_sharded(model) -> bool:
    """Whether a rank holds only its part of the weights at this moment."""
    return isinstance(next(model.model.language_model.layers.parameters()), DTensor)


@contextmanager
def _ready_to_generate(model) -> Iterator[None]:
    """A model with the fast lm_head and without its checkpoint's generation_config.

    generate fills every field that is None from the latter, which for Qwen2.5-VL has a repetition
    penalty and a temperature near zero.
    """
    checkpoints_own = model.generation_config
    model.lm_head.forward, model.generation_config = fast_linear(model.lm_head), GenerationConfig()
    try:
        yield
    finally:
        model.generation_config = checkpoints_own
        del model.lm_head.forward  # uncovers the class's method


def decode(
    model,
    input_ids: Tensor,
    generation_config: GenerationConfig,
    draw: Callable[[Tensor, int], tuple[Tensor, Tensor]],
    together: bool,
    **inputs,
) -> tuple[Tensor, Tensor]:
    """Custom loop for `generate`: one token per row until every row has hit an end token.

    transformers' loop has neither a generator per row nor the log-probability of a draw.

    Args:
        input_ids: int64 (R, S), of which all but the last token are in the cache.
        draw: from float32 logits (R, V), which it may write to, and the step to tokens and their
            log-probabilities, both (R,).
        together: all ranks take the same number of steps, since each gathers their weights.
        inputs: as generate has prepared them; past_key_values, position_ids int64 (3, R, S),
            attention_mask int64 (R, S), or None if nothing is padded.
    Returns:
        the responses, int64 (R, T), padded after their end, and log-probabilities, float32 (R, T).
    """
    ends = torch.tensor(generation_config.eos_token_id, device=input_ids.device)
    unfinished = torch.ones(len(input_ids), dtype=torch.bool, device=input_ids.device)
    tokens, positions = input_ids[:, -1:], inputs["position_ids"][:, :, -1:]
    attention_mask = inputs["attention_mask"]
    if attention_mask is not None and bool(attention_mask.all()):
        attention_mask = None  # a mask of ones would cost a faster kernel, and a look at it a token
    responses, logps = [], []
    for step in range(generation_config.max_new_tokens):
        outputs = model(
            input_ids=tokens,
            position_ids=positions + step,
            attention_mask=attention_mask,
            past_key_values=inputs["past_key_values"],
            use_cache=True,
        )
        drawn, logp = draw(outputs.logits[:, -1].float(), step)
        tokens = torch.where(unfinished, drawn, generation_config.pad_token_id)[:, None]
        responses.append(tokens)
        logps.append(logp)
        unfinished &= ~torch.isin(drawn, ends)
        any_unfinished = unfinished.any()
        if together:
            any_unfinished = any_unfinished.int()
            dist.all_reduce(any_unfinished, op=dist.ReduceOp.MAX)
        if not any_unfinished:
            break
        if attention_mask is not None:
            attention_mask = pad(attention_mask, (0, 1), value=1)
    return torch.cat(responses, dim=1), torch.stack(logps, dim=1)


def batch_rows(pack: Pack, group_sizes: list[int], pad_token: int) -> dict[str, Tensor]:
    """Left-padded prompts, repeated for each response: what `generate` takes.

    Returns:
        input_ids, attention_mask: int64 (R, S). position_ids: int64 (3, R, S), from which `decode`
        counts on, on all three axes.
    """
    longest = max(segment.length for segment in pack.segments)
    ids, masks, positions = [], [], []
    for segment, size in zip(pack.segments, group_sizes, strict=True):
        left = (longest - segment.length, 0)
        here = slice(segment.start, segment.start + segment.length)
        ids.append(pad(pack.input_ids[here], left, value=pad_token).expand(size, -1))
        masks.append(pad(torch.ones(segment.length, dtype=torch.long), left).expand(size, -1))
        positions.append(pad(pack.positions[:, here], left)[:, None].expand(-1, size, -1))
    return {
        "input_ids": torch.cat(ids),
        "attention_mask": torch.cat(masks),
        "position_ids": torch.cat(positions, dim=1),
    }


class RoomyLayer(DynamicLayer):
    """A layer's keys and values with room for the tokens to come, each written into its place.

    DynamicLayer copies all it holds for every token.
    """

    def __init__(self, keys: Tensor, values: Tensor, length: int):
        """keys, values: (R, key-value heads, room, size), of which `length` tokens are filled."""
        super().__init__()
        self.lazy_initialization(keys, values)
        self.room = keys, values
        self._show(length)

    def _show(self, length: int) -> None:
        self.keys, self.values = (states[:, :, :length] for states in self.room)

    def update(self, key_states: Tensor, value_states: Tensor, *args, **kwargs):
        """Add tokens, (R, key-value heads, new tokens, size) both; returns all, old and new."""
        start = self.get_seq_length()
        end = start + key_states.shape[-2]
        assert end <= self.room[0].shape[-2], "more tokens than there is room for"
        for states, new in zip(self.room, (key_states, value_states), strict=True):
            states[:, :, start:end] = new
        self._show(end)
        return self.keys, self.values


def expand_cache(
    cache: DynamicCache, pack: Pack, group_sizes: list[int], max_new_tokens: int
) -> DynamicCache:
    """The packed prompts' cache as rows, each prompt repeated for its responses.

    The last prompt token is left out: `decode` runs it as its first step, which gives the logits of
    the first response token.
    """
    longest = max(segment.length for segment in pack.segments)

    def rows(states: Tensor) -> Tensor:  # (1, heads, N, size) -> (R, heads, room, size)
        _, heads, _, size = states.shape
        filled = states.new_zeros(sum(group_sizes), heads, longest - 1 + max_new_tokens, size)
        groups = filled.split(group_sizes)
        for segment, group in zip(pack.segments, groups, strict=True):
            left = longest - segment.length
            prompt = states[:, :, segment.start : segment.start + segment.length - 1]
            group[:, :, left : longest - 1] = prompt
        return filled

    expanded = DynamicCache()
    for layer in cache.layers:
        expanded.layers.append(RoomyLayer(rows(layer.keys), rows(layer.values), longest - 1))
    return expanded


def decode_texts(tokenizer, ids: Tensor, mask: Tensor, ends: list[int]) -> list[str]:
    """The responses as text, every token but the end token, special ones too: nothing hidden."""
    texts = []
    for row, row_mask in zip(ids, mask, strict=True):
        tokens = row[row_mask].tolist()
        if tokens and tokens[-1] in ends:
            tokens = tokens[:-1]
        texts.append(tokenizer.decode(tokens, skip_special_tokens=False))
    return texts
