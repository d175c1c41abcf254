"""FLOPs and bytes of one T-GRPO step, counted from shapes.

FLOPs are those of the matrix products, 2 m n k for (m, k) @ (k, n). Attention takes 4 FLOPs per
query, key and channel (scores and weighted sum) for the keys that a query sees: half of the square
where it is causal, a window where it is windowed. Norms, rotary embeddings, softmax, sampling and
the optimizer are not counted.

Legend: n tokens, S of a prompt, T of a response, G ordered and G~ shuffled responses, P prompts;
D hidden size, I of the MLP, V vocabulary. A video is a grid (t, h, w) of patches.
"""

from dataclasses import dataclass


@dataclass(frozen=True)
class Load:
    """What one step works on: a grid and a number of tokens for each of P prompts.

    Every response has T tokens. shuffled_group_size is 0 without T-GRPO.
    """

    grids: tuple[tuple[int, int, int], ...]
    prompt_tokens: tuple[int, ...]
    group_size: int
    shuffled_group_size: int
    response_tokens: int

    @property
    def num_rows(self) -> int:
        """Responses of the step, ordered and shuffled."""
        return len(self.prompt_tokens) * (self.group_size + self.shuffled_group_size)

    @property
    def patches(self) -> int:
        return sum(t * h * w for t, h, w in self.grids)

    @property
    def scored(self) -> int:
        """Tokens of the ordered responses, which reach the loss."""
        return len(self.prompt_tokens) * self.group_size * self.response_tokens

    @property
    def packed(self) -> int:
        """Tokens of the packed rows: each prompt once, followed by its ordered responses."""
        return sum(self.prompt_tokens) + self.scored

    def tokens(self, merge_size: int = 2) -> dict[str, int]:
        """Tokens of the step: of the prompts, sampled ones, vision tokens among the prompts'."""
        sampled = self.num_rows * self.response_tokens
        vision = self.patches // merge_size**2
        return {"prompt": sum(self.prompt_tokens), "sampled": sampled, "vision": vision}


# ------------------------------------------------------------------------------------------- FLOPs


def window_pairs(vision, grid: tuple[int, int, int]) -> int:
    """Pairs of patches that see each other in a windowed block: windows of 8 x 8 patches in a
    frame (window_size pixels a side), cut off at its right and lower edge."""
    t, h, w = grid
    side = vision.window_size // vision.patch_size  # 8

    def squares(length: int) -> int:  # the sum over the windows of one axis
        whole, rest = divmod(length, side)
        return whole * side**2 + rest**2

    return t * squares(h) * squares(w)


def vision_flops(config, grids) -> tuple[int, int]:
    """Forward pass of the vision tower: FLOPs of its blocks, and of all of it."""
    vision, width = config.vision_config, config.vision_config.hidden_size
    patches = sum(t * h * w for t, h, w in grids)
    full = len(vision.fullatt_block_indexes)  # these see their whole frame
    pairs = sum(t * (h * w) ** 2 for t, h, w in grids) * full
    pairs += sum(window_pairs(vision, grid) for grid in grids) * (vision.depth - full)
    per_patch = 2 * width * (3 * width + width + 3 * vision.intermediate_size)  # qkv, out, MLP
    blocks = vision.depth * patches * per_patch + 4 * pairs * width
    pixels = vision.in_channels * vision.temporal_patch_size * vision.patch_size**2  # of a patch
    merged = vision.spatial_merge_size**2 * width
    merger = 2 * merged * (merged + vision.out_hidden_size)  # per merged patch
    around = 2 * patches * pixels * width + patches // vision.spatial_merge_size**2 * merger
    return blocks, blocks + around


def key_width(config) -> int:
    """Channels of a token's keys in one layer."""
    text = config.get_text_config()
    return text.num_key_value_heads * text.hidden_size // text.num_attention_heads


def language_flops(config, num_tokens: int, num_pairs: int) -> int:
    """Forward pass of the decoder layers on tokens of which `num_pairs` see each other."""
    text = config.get_text_config()
    width = text.hidden_size
    per_token = 2 * width * (2 * width + 2 * key_width(config) + 3 * text.intermediate_size)
    return text.num_hidden_layers * (num_tokens * per_token + 4 * num_pairs * width)


def head_flops(config, num_tokens: int) -> int:
    """The vocabulary's logits of so many tokens."""
    text = config.get_text_config()
    return 2 * num_tokens * text.hidden_size * text.vocab_size


def causal_pairs(length: int) -> int:
    return length * (length + 1) // 2


def step_flops(
    config, load: Load, plain: bool = False, checkpointing: bool = True, freeze_vision: bool = False
) -> dict[str, int]:
    """FLOPs by phase of a step.

    Args:
        plain: not as this project takes it but by the plain recipe: every response follows its own
            copy of prompt and pixels, and every token of prompt and response gets logits.
    Returns:
        by phase. "backward" is twice the forward pass; "recompute" is what it repeats of the
        forward pass: layers and blocks with checkpointing, and in our step always the logits.
    """
    lengths, group, steps = load.prompt_tokens, load.group_size, load.response_tokens
    rows = group + load.shuffled_group_size
    prompts_seen = rows if plain else 2 if load.shuffled_group_size else 1
    vision_copies = group if plain else 1
    blocks, vision = (vision_copies * flops for flops in vision_flops(config, load.grids))
    prefill = language_flops(config, sum(lengths), sum(map(causal_pairs, lengths)))
    # Token i sees S + i keys. Ours decodes the prompt's last token again; plain takes the first
    # response token from the prefill and decodes one token less.
    decoded = steps - 1 if plain else steps
    decode_pairs = sum(rows * (decoded * s + causal_pairs(steps - 1)) for s in lengths)
    if plain:
        tokens = group * sum(s + steps for s in lengths)
        pairs = group * sum(causal_pairs(s + steps) for s in lengths)
    else:  # the packed row: a response token sees its prompt and its own response
        tokens = load.packed
        pairs = sum(causal_pairs(s) + group * (steps * s + causal_pairs(steps)) for s in lengths)
    layers = language_flops(config, tokens, pairs)
    head = head_flops(config, tokens if plain else load.scored)
    learning = layers + head + (0 if freeze_vision else vision)
    recomputed = layers + (0 if freeze_vision else blocks)
    return {
        "rollout.vision": prompts_seen * vision // vision_copies,
        "rollout.prefill": prompts_seen * prefill
        + (head_flops(config, load.num_rows) if plain else 0),
        "rollout.decode": language_flops(config, load.num_rows * decoded, decode_pairs)
        + head_flops(config, load.num_rows * decoded),
        "reference.vision": vision,
        "reference": layers + head,
        "forward.vision": vision,
        "forward": layers + head,
        "backward": 2 * learning,
        "recompute": (0 if plain else head) + (recomputed if checkpointing else 0),
    }


# ------------------------------------------------------------------------------------------- bytes


def cache_bytes_per_token(config, itemsize: int) -> int:
    """Keys and values of one token in all layers."""
    return 2 * config.get_text_config().num_hidden_layers * key_width(config) * itemsize


def decode_bytes(config, load: Load, num_weights: int, itemsize: int) -> int:
    """Bytes that decoding has to read: for every token step the weights once, and every row's
    keys and values so far.

    Args:
        num_weights: parameters of the decoder layers, the final norm and lm_head.
        itemsize: bytes of a weight and of a cached number.
    """
    steps = load.response_tokens
    rows = load.group_size + load.shuffled_group_size
    cached = sum(rows * (steps * s + causal_pairs(steps - 1)) for s in load.prompt_tokens)
    return steps * num_weights * itemsize + cached * cache_bytes_per_token(config, itemsize)


def saved_by_layer(config, load: Load, itemsize: int) -> int:
    """Bytes that one decoder layer keeps for its backward pass, its input included."""
    text, c, keys = config.get_text_config(), itemsize, key_width(config)
    width = text.hidden_size
    per_token = (
        2 * 4 * width  # both norms' inputs in float32
        + 5 * c * width  # both norms before and after their weight, o_proj's input
        + c * width  # query
        + 2 * c * keys  # key, value
        + 4 * c * text.intermediate_size  # gate, its SiLU, up, their product
        + 2 * 4  # the norms' scales
        + 4 * text.num_attention_heads  # the attention's logsumexp
    )
    responses = load.scored * (2 * c * width + 2 * 8)  # query and output as rows, two indices
    seen = 2 * c * keys_seen(load) * keys  # key and value, gathered per response
    prompt_out = c * sum(load.prompt_tokens) * width  # the attention's output
    mask = c * load.response_tokens * sum(s + load.response_tokens for s in load.prompt_tokens)
    return load.packed * per_token + responses + seen + prompt_out + mask


def keys_seen(load: Load) -> int:
    """Keys that the attention of the responses holds: one copy of the prompt per response."""
    return load.group_size * sum(s + load.response_tokens for s in load.prompt_tokens)


def saved_by_block(config, load: Load, itemsize: int) -> int:
    """Bytes that one vision block keeps for its backward pass, its input included."""
    vision, c = config.vision_config, itemsize
    width = vision.hidden_size
    per_patch = (
        2 * 4 * width  # both norms' inputs in float32
        + 5 * c * width  # both norms before and after their weight, the output projection's input
        + 2 * c * width  # query, key
        + 3 * c * width  # value, a view of the projection to all three
        + c * width  # the attention's output
        + 4 * c * vision.intermediate_size
        + 2 * 4
        + 4 * vision.num_heads
    )
    return load.patches * per_patch
