"""FLOPs and bytes of one T-GRPO step, counted from shapes.

Counted is what a step has to compute: the matrix products, 2 m n k FLOPs for (m, k) @ (k, n).
Attention is 4 FLOPs per query, key and channel (scores and weighted sum), for the keys that a
query sees: half of the square where it is causal, a window where it is a window. Norms, rotary
embeddings, softmax, sampling and the optimizer are not counted.

Shapes: n tokens, S of a prompt, T of a response, G ordered and G~ shuffled responses, P prompts;
D hidden size, I of the MLP, V vocabulary. A clip is a grid (t, h, w) of patches.
"""

from dataclasses import dataclass


@dataclass(frozen=True)
class Load:
    """What one step works on: one grid and one number of tokens for each of P prompts.

    Every response has the same number of tokens. shuffled_group_size is 0 without T-GRPO.
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

    def tokens(self, merge_size: int = 2) -> dict[str, int]:
        """Tokens of the step: of the prompts, sampled ones, vision tokens among the prompts'."""
        patches = sum(t * h * w for t, h, w in self.grids)
        return {
            "prompt": sum(self.prompt_tokens),
            "sampled": self.num_rows * self.response_tokens,
            "vision": patches // merge_size**2,
        }


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


def language_flops(config, num_tokens: int, num_pairs: int) -> int:
    """Forward pass of the decoder layers on tokens of which `num_pairs` see each other."""
    text = config.get_text_config()
    width = text.hidden_size
    key_width = text.num_key_value_heads * width // text.num_attention_heads
    per_token = 2 * width * (2 * width + 2 * key_width + 3 * text.intermediate_size)
    return text.num_hidden_layers * (num_tokens * per_token + 4 * num_pairs * width)


def head_flops(config, num_tokens: int) -> int:
    """The vocabulary's logits of so many tokens."""
    text = config.get_text_config()
    return 2 * num_tokens * text.hidden_size * text.vocab_size


def causal_pairs(length: int) -> int:
    return length * (length + 1) // 2


def our_flops(
    config, load: Load, checkpointing: bool = True, freeze_vision: bool = False
) -> dict[str, int]:
    """FLOPs by phase of a step as this project takes it.

    "backward" is twice the forward pass; "recompute" is what it repeats of the forward pass, the
    logits always, layers and blocks with --activation_checkpointing.
    """
    lengths, group, steps = load.prompt_tokens, load.group_size, load.response_tokens
    orders = 2 if load.shuffled_group_size else 1
    vision_blocks, vision = vision_flops(config, load.grids)
    # Decoding: every row computes T tokens, the first of them the prompt's last token again.
    rows_of_one = group + load.shuffled_group_size
    decode_pairs = sum(rows_of_one * (steps * s + causal_pairs(steps - 1)) for s in lengths)
    decoded = load.num_rows * steps
    # The packed row: a response token sees its prompt and its own response.
    packed_tokens = sum(s + group * steps for s in lengths)
    packed_pairs = sum(causal_pairs(s) + group * (steps * s + causal_pairs(steps)) for s in lengths)
    layers = language_flops(config, packed_tokens, packed_pairs)
    head = head_flops(config, len(lengths) * group * steps)
    learning = layers + head + (0 if freeze_vision else vision)
    recomputed = layers + (0 if freeze_vision else vision_blocks)
    prefill = language_flops(config, sum(lengths), sum(map(causal_pairs, lengths)))
    return {
        "rollout.vision": orders * vision,
        "rollout.prefill": orders * prefill,
        "rollout.decode": language_flops(config, decoded, decode_pairs)
        + head_flops(config, decoded),
        "reference.vision": vision,
        "reference": layers + head,
        "forward.vision": vision,
        "forward": layers + head,
        "backward": 2 * learning,
        "recompute": head + (recomputed if checkpointing else 0),
    }


def plain_flops(
    config, load: Load, checkpointing: bool = True, freeze_vision: bool = False
) -> dict[str, int]:
    """The same for the plain recipe: every response behind its own copy of prompt and pixels, and
    the vocabulary's logits of all tokens."""
    lengths, group, steps = load.prompt_tokens, load.group_size, load.response_tokens
    rows_of_one = group + load.shuffled_group_size
    vision_blocks, vision = vision_flops(config, load.grids)
    prefill = language_flops(config, sum(lengths), sum(map(causal_pairs, lengths)))
    # The prefill gives the first token, so a token less is decoded; token i sees S + i keys.
    decoded = load.num_rows * (steps - 1)
    decode_pairs = sum(rows_of_one * ((steps - 1) * s + causal_pairs(steps - 1)) for s in lengths)
    tokens = group * sum(s + steps for s in lengths)
    layers = language_flops(config, tokens, group * sum(causal_pairs(s + steps) for s in lengths))
    head = head_flops(config, tokens)
    learning = layers + head + (0 if freeze_vision else group * vision)
    recomputed = layers + (0 if freeze_vision else group * vision_blocks)
    return {
        "rollout.vision": rows_of_one * vision,
        "rollout.prefill": rows_of_one * prefill + head_flops(config, load.num_rows),
        "rollout.decode": language_flops(config, decoded, decode_pairs)
        + head_flops(config, decoded),
        "reference.vision": group * vision,
        "reference": layers + head,
        "forward.vision": group * vision,
        "forward": layers + head,
        "backward": 2 * learning,
        "recompute": recomputed if checkpointing else 0,
    }


# ------------------------------------------------------------------------------------------- bytes


def cache_bytes_per_token(config, itemsize: int) -> int:
    """Keys and values of one token in all layers."""
    text = config.get_text_config()
    key_width = text.num_key_value_heads * text.hidden_size // text.num_attention_heads
    return 2 * text.num_hidden_layers * key_width * itemsize


def decode_bytes(config, load: Load, num_weights: int, itemsize: int) -> int:
    """Bytes that decoding has to read: for every token step the weights once, and every row's
    keys and values so far.

    Args:
        num_weights: parameters of the decoder layers, the final norm and lm_head.
        itemsize: bytes of a weight and of a cached number.
    """
    steps = load.response_tokens
    rows_of_one = load.group_size + load.shuffled_group_size
    cached = sum(rows_of_one * (steps * s + causal_pairs(steps - 1)) for s in load.prompt_tokens)
    return steps * num_weights * itemsize + cached * cache_bytes_per_token(config, itemsize)
