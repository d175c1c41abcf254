"""All that knows Qwen2.5-VL: positions, packed log-probabilities, tokens, sharding plan, loading.

A group is one prompt and its G responses. All groups of a call form one row of tokens,

    [prompt 1][response 1.1]..[response 1.G][prompt 2][response 2.1]..

in which a response token attends to its own prompt and its own response, and nothing else. A prompt
is thus computed once rather than G times, no layer but attention sees padding, and the vision tower
runs once per call, which also makes the number of sharded forward passes the same on every rank.

Shapes: P prompts, G responses each, T positions of a response (right-padded), S prompt tokens,
N tokens of the packed row, M response tokens among them, D hidden size, V vocabulary.
"""

import json
import warnings
from dataclasses import dataclass, replace
from pathlib import Path
from types import MethodType

import torch
import torch.distributed.checkpoint as dcp
from huggingface_hub import snapshot_download
from huggingface_hub.errors import HfHubHTTPError
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn
from torch.distributed.fsdp import (
    MixedPrecisionPolicy,
    fully_shard,
    register_fsdp_forward_method,
)
from torch.nn.functional import scaled_dot_product_attention
from transformers import (
    AttentionInterface,
    AttentionMaskInterface,
    AutoConfig,
    AutoTokenizer,
    DynamicCache,
    GenerationConfig,
    Qwen2_5_VLForConditionalGeneration,
)
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

from infra.checkpoint import export_weights
from infra.distributed import World
from infra.errors import UnusableSample, UserError, require
from infra.flags import neutral_flags
from infra.fused import suffix_attention, token_logprobs

HUB_FILES = ["*.json", "*.safetensors", "*.txt", "*.jinja"]  # no code, nothing pickled
PACKED = "packed"  # the name of our attention in transformers' registry


# ------------------------------------------------------------------------------------- positions


def rope_positions(prompt, tokens_per_second: int = 2, merge_size: int = 2) -> Tensor:
    """Qwen2.5-VL's multimodal rotary positions (time, height, width) of a prompt.

    Text counts up on all three axes. A vision token at (t, h, w) of the merged grid, after text
    that ended before position p, has p + (floor(t * seconds_per_grid * tokens_per_second), h, w);
    an image has t = 0. Text after a video starts at the largest position so far + 1, the rule that
    the published weights were trained with; transformers 5 starts it at p + max(H, W) instead.

    Args:
        prompt: a Prompt, or anything with its fields input_ids (S,), vision_start, grid_thw (3,),
            seconds_per_grid and is_video.
    Returns:
        int64 (3, S).

    Example: two text tokens, a merged grid of 4 x 2 x 2 at 1.5 seconds per grid, two tokens a
    second, then text: the grids are at times 2, 5, 8, 11 and the text starts at 12.
    """
    t, h, w = (int(x) for x in prompt.grid_thw)
    h, w = h // merge_size, w // merge_size
    seconds = prompt.seconds_per_grid if prompt.is_video else 0.0
    # The product is taken in float32 as in Qwen's code, then truncated.
    times = (torch.arange(t) * (seconds * tokens_per_second)).long()
    grid = torch.meshgrid(times, torch.arange(h), torch.arange(w), indexing="ij")
    vision = torch.stack(grid).flatten(1) + prompt.vision_start  # (3, t * h * w)
    before = torch.arange(prompt.vision_start).expand(3, -1)
    num_after = len(prompt.input_ids) - prompt.vision_start - vision.shape[1]
    last = int(vision.max()) if vision.numel() else prompt.vision_start - 1  # plain text has none
    after = (torch.arange(num_after) + last + 1).expand(3, -1)
    return torch.cat([before, vision, after], dim=1)  # (3, S)


def require_room(prompt, num_new_tokens: int, config) -> None:
    """Raise UnusableSample unless prompt and response fit into the model's positions.

    A prompt is never truncated: it holds vision tokens, whose features would have no place.
    """
    tokens_per_second = config.vision_config.tokens_per_second
    positions = int(rope_positions(prompt, tokens_per_second).max()) + 1
    needed = max(positions, len(prompt.input_ids)) + num_new_tokens
    limit = config.get_text_config().max_position_embeddings
    if needed > limit:
        raise UnusableSample(
            f"its prompt of {len(prompt.input_ids)} tokens and a response of {num_new_tokens} "
            f"take {needed} positions, the model has {limit}"
        )


# --------------------------------------------------------------------------------------- packing


@dataclass(frozen=True)
class Segment:
    """One group's part of the packed row. Tensors are None where it has no responses."""

    start: int  # of its prompt in the row
    length: int  # of its prompt, in tokens
    slots: Tensor | None = None  # int64 (G, T), where each response token is; padding: anywhere
    places: Tensor | None = None  # int64 (real tokens,), where slots.flatten() has no padding


@dataclass(frozen=True)
class Pack:
    """The packed row of several groups. Prompts that hold the same pixel_values (the tensor itself,
    as several questions on one video do) share their vision features."""

    input_ids: Tensor  # int64 (N,)
    positions: Tensor  # int64 (3, N)
    segments: list[Segment]
    vision_places: Tensor  # int64 (placeholders,), where they are in the row
    vision_features: Tensor  # int64 (placeholders,), the feature of each
    pixel_values: Tensor  # float32 (patches, 1176)
    grid_thw: Tensor  # int64 (distinct pixel_values, 3)
    sources: Tensor  # int64 (M,), where the hidden state is that predicts a response token
    targets: Tensor  # int64 (M,), its id

    def to(self, device: torch.device) -> "Pack":
        segments = [_to(segment, device) for segment in self.segments]
        return replace(_to(self, device), segments=segments)


def _to(record, device: torch.device):
    """A copy of a dataclass with its tensors on a device."""
    tensors = {name: value for name, value in vars(record).items() if isinstance(value, Tensor)}
    return replace(record, **{name: value.to(device) for name, value in tensors.items()})


def pack_groups(prompts: list, responses: list[list[Tensor]], tokens_per_second: int = 2) -> Pack:
    """Lay P prompts and their responses (int64 ids, each without padding) out in one row.

    Raises:
        UserError: a prompt has not one placeholder per merged patch; names its sample.
    """
    ids, positions, segments, places, features, sources = [], [], [], [], [], []
    distinct = {id(prompt.pixel_values): prompt for prompt in prompts}  # each video once
    counts = torch.tensor([prompt.num_vision_tokens for prompt in distinct.values()])
    first_feature = dict(zip(distinct, (counts.cumsum(0) - counts).tolist(), strict=True))
    start = 0
    for prompt, group in zip(prompts, responses, strict=True):
        _check_placeholders(prompt)
        length = len(prompt.input_ids)
        prompt_positions = rope_positions(prompt, tokens_per_second)  # (3, S)
        ids += [prompt.input_ids, *group]
        positions.append(prompt_positions)
        for response in group:
            after = torch.arange(len(response)) + prompt_positions.max() + 1
            positions.append(after.expand(3, -1))
        tokens = torch.arange(prompt.num_vision_tokens)
        places.append(start + prompt.vision_start + tokens)
        features.append(first_feature[id(prompt.pixel_values)] + tokens)
        segments.append(_segment(start, length, [len(response) for response in group]))
        end = start + length
        for response in group:
            # The prompt's last token predicts the first one, each token the next.
            index = torch.arange(end - 1, end - 1 + len(response))
            index[:1] = start + length - 1
            sources.append(index)
            end += len(response)
        start = end
    none = torch.empty(0, dtype=torch.long)
    return Pack(
        input_ids=torch.cat(ids),
        positions=torch.cat(positions, dim=1),
        segments=segments,
        vision_places=torch.cat(places),
        vision_features=torch.cat(features),
        pixel_values=torch.cat([prompt.pixel_values for prompt in distinct.values()]),
        grid_thw=torch.stack([prompt.grid_thw for prompt in distinct.values()]),
        sources=torch.cat([none, *sources]),
        targets=torch.cat([none, *(response for group in responses for response in group)]),
    )


def _segment(start: int, length: int, response_lengths: list[int]) -> Segment:
    if not any(response_lengths):
        return Segment(start, length)
    lengths = torch.tensor(response_lengths)
    firsts = start + length + lengths.cumsum(0) - lengths  # (G,)
    steps = torch.arange(int(lengths.max()))
    real = steps < lengths[:, None]  # (G, T)
    # Padding is spread over the prompt: the backward pass adds its zeros up where it points, and
    # thousands of additions to one token would wait for each other.
    slots = torch.where(real, firsts[:, None] + steps, start + steps % length)
    return Segment(start, length, slots, real.flatten().nonzero()[:, 0])


def _check_placeholders(prompt) -> None:
    """One placeholder per merged patch, in one run."""
    start, count = prompt.vision_start, prompt.num_vision_tokens
    if not count:  # plain text, such as a judge's
        return
    is_placeholder = prompt.input_ids == prompt.input_ids[start]
    found = int(is_placeholder.sum())
    if found != count or not bool(is_placeholder[start : start + count].all()):
        raise UserError(
            f"problem {prompt.sample.problem_id} (row {prompt.sample.row}): {found} placeholders "
            f"in its prompt, {count} vision features"
        )


def packed_attention(
    module, query, key, value, attention_mask, segments=None, scaling=None, dropout=0.0, **kwargs
):
    """Attention of a packed row; without `segments` it is transformers' own SDPA attention.

    One call per prompt and one per group of responses: a mask over the whole row would pay for
    every pair of responses, (S + G T)^2 scores rather than S^2 + G T (S + T).

    Args:
        query: (1, heads, N, head size). key, value: (1, key-value heads, N, head size).
        segments: of the Pack.
    Returns:
        (1, N, heads, head size), and None in place of the attention weights.
    """
    settings = {"scaling": scaling, "dropout": dropout, **kwargs}
    if segments is None:
        return sdpa_attention_forward(module, query, key, value, attention_mask, **settings)
    settings = {"scale": scaling, "dropout_p": dropout, "enable_gqa": True}
    outputs = []  # each (tokens, heads, head size)
    for segment in segments:
        prompt = slice(segment.start, segment.start + segment.length)
        prompt_key, prompt_value = key[:, :, prompt], value[:, :, prompt]
        output = scaled_dot_product_attention(
            query[:, :, prompt], prompt_key, prompt_value, is_causal=True, **settings
        )
        outputs.append(output[0].transpose(0, 1))
        if segment.slots is None:
            continue
        group_size = len(segment.slots)
        keys = [prompt_key.expand(group_size, -1, -1, -1), _rows(key, segment.slots)]
        values = [prompt_value.expand(group_size, -1, -1, -1), _rows(value, segment.slots)]
        output = suffix_attention(
            _rows(query, segment.slots), torch.cat(keys, 2), torch.cat(values, 2), **settings
        )  # (G, heads, T, head size)
        output = output.transpose(1, 2).flatten(0, 1)
        outputs.append(output.index_select(0, segment.places))
    return torch.cat(outputs)[None], None


def _rows(states: Tensor, slots: Tensor) -> Tensor:
    """Response tokens of a packed row, (1, heads, N, size), as padded rows (G, heads, T, size)."""
    chosen = states[0].index_select(1, slots.flatten())  # (heads, G * T, size)
    return chosen.unflatten(1, slots.shape).transpose(0, 1)


AttentionInterface.register(PACKED, packed_attention)
# For generate, whose rows are left-padded: a name without a mask function would get no mask.
AttentionMaskInterface.register(PACKED, sdpa_mask)


def enable_packing(model: Qwen2_5_VLForConditionalGeneration) -> None:
    """Give a model our attention and our two forward passes. Idempotent.

    They are bound as methods because FSDP gathers the weights around methods of the sharded
    module (see shard), not around functions that take it as an argument.
    """
    model.model.language_model.config._attn_implementation = PACKED
    model.packed_prefill = MethodType(packed_prefill, model)
    model.packed_logprobs = MethodType(packed_logprobs, model)


def enable_checkpointing(model: Qwen2_5_VLForConditionalGeneration) -> None:
    """Recompute each decoder layer and vision block in the backward pass (in train mode only)."""
    renamed = "activation_checkpointing_enable"  # transformers 5.23; the old name in 5.17
    enable = getattr(model, renamed, None) or model.gradient_checkpointing_enable
    enable({"use_reentrant": False})


def _packed_hidden(model, pack: Pack, cache: DynamicCache | None = None) -> Tensor:
    """The last hidden states (N, D) of a packed row: one vision call, one language model call."""
    inner = model.model
    embeds = inner.get_input_embeddings()(pack.input_ids)  # (N, D)
    if len(pack.pixel_values):  # prompts of plain text have none; then no rank has any
        pixels = pack.pixel_values.to(inner.visual.dtype)
        learns = any(parameter.requires_grad for parameter in inner.visual.parameters())
        with torch.set_grad_enabled(learns and torch.is_grad_enabled()):  # --freeze_vision
            features = inner.visual(pixels, grid_thw=pack.grid_thw).pooler_output  # (tokens, D)
        features = features.index_select(0, pack.vision_features)
        embeds = embeds.index_copy(0, pack.vision_places, features.to(embeds.dtype))
    output = inner.language_model(
        inputs_embeds=embeds[None],
        position_ids=pack.positions[:, None],
        attention_mask={"full_attention": None},  # packed_attention makes its own
        past_key_values=cache,
        use_cache=cache is not None,
        segments=pack.segments,
    )
    return output.last_hidden_state[0]


def packed_prefill(model, pack: Pack) -> DynamicCache:
    """Run a packed row into a new key-value cache, each layer (1, key-value heads, N, size)."""
    cache = DynamicCache(config=model.config.get_text_config())
    _packed_hidden(model, pack, cache)
    return cache


def packed_logprobs(model, pack: Pack, forbidden: list[int]) -> Tensor:
    """Log-probabilities, float32 (M,), of the response tokens of a packed row."""
    hidden = _packed_hidden(model, pack)
    # The last prompt token predicts the first token of all G responses: the backward of
    # index_select adds up such repeats in a fixed order, that of hidden[sources] does not.
    hidden = hidden.index_select(0, pack.sources)  # (M, D)
    return token_logprobs(hidden, model.lm_head.weight, pack.targets, forbidden)


def group_logprobs(model, prompts: list, completion_ids: Tensor, completion_mask: Tensor) -> Tensor:
    """log pi(o_t | prompt, o_<t) of every token of every response: the pi of Eq. 4.

    Equal to running each response after its own copy of the prompt, pixels included (the tests do
    so), at the cost of one prompt per group.

    Args:
        model: a Qwen2.5-VL, sharded or not. prompts: list of P Prompts.
        completion_ids: int64 (P, G, T). completion_mask: bool (P, G, T), right-padded.
    Returns:
        float32 (P, G, T), 0 where the mask is false; with gradient if grad is enabled.
    """
    if not hasattr(model, "packed_logprobs"):
        enable_packing(model)
    mask = completion_mask.bool()
    lengths = mask.sum(-1)  # (P, G)
    steps = torch.arange(mask.shape[-1], device=mask.device)
    assert torch.equal(mask, steps < lengths[..., None]), "completion_mask must be right-padded"
    responses = [
        [ids[:length].cpu() for ids, length in zip(group_ids, group_lengths, strict=True)]
        for group_ids, group_lengths in zip(completion_ids, lengths.tolist(), strict=True)
    ]
    device = model.lm_head.weight.device
    tokens_per_second = model.config.vision_config.tokens_per_second
    pack = pack_groups(prompts, responses, tokens_per_second).to(device)
    # (M,), in the order of the mask's true places
    logps = model.packed_logprobs(pack, forbidden_tokens(model.config))
    padded = torch.zeros(mask.shape, dtype=logps.dtype, device=device)
    return padded.masked_scatter(mask.to(device), logps)


# ---------------------------------------------------------------------------------------- tokens


def forbidden_tokens(config) -> list[int]:
    """Ids at -inf in sampler, policy and reference alike: that softmax *is* the policy.

    The vision tokens, since a sampled <|video_pad|> asks the next pass for features that do not
    exist, and the config's padding token, unless the config calls it an end token too.
    """
    names = ("image_token_id", "video_token_id", "vision_start_token_id", "vision_end_token_id",
             "vision_token_id")  # fmt: skip
    tokens = {getattr(config, name, None) for name in names}
    padding = _token_ids(config, "pad_token_id")
    tokens |= padding - _token_ids(config, "eos_token_id")
    return sorted(tokens - {None})


def require_possible(response_ids: Tensor, config) -> None:
    """Raise UnusableSample if a response to learn holds a token whose probability is 0."""
    found = sorted(set(response_ids.tolist()) & set(forbidden_tokens(config)))
    if found:
        raise UnusableSample(f"its response holds the token ids {found}, which are never sampled")


def _token_ids(config, name: str) -> set[int]:
    """The ids that a config, or the text config in it, has under a name."""
    for owner in (config, config.get_text_config()):
        ids = getattr(owner, name, None)
        if ids is not None:
            return set(ids) if isinstance(ids, list) else {ids}
    return set()


def end_tokens(model) -> list[int]:
    """The ids that end a response, by the checkpoint's generation_config (or else its config)."""
    ends = model.generation_config.eos_token_id
    if ends is None:
        return sorted(_token_ids(model.config, "eos_token_id"))
    return ends if isinstance(ends, list) else [ends]


# -------------------------------------------------------------------------------------- sharding


def shard(
    model: nn.Module, world: World, trainable: bool = True, freeze_vision: bool = False
) -> None:
    """Shard a Qwen2.5-VL in place: a group per decoder layer, per vision block, and the rest.

    Embedding, final norm and lm_head stay in the root's group: tied weights must share a group,
    and a group of lm_head's own would be gathered once per block of the vocabulary.

    Args:
        trainable: False for a frozen reference.
        freeze_vision: the vision tower has neither gradients nor a part in the optimizer.
    """
    mixed = {"param_dtype": torch.bfloat16, "reduce_dtype": torch.float32}
    mixed = mixed if world.dtype == torch.bfloat16 else {}
    # The vision blocks' rotary cos and sin come in float32 and must stay so.
    vision_precision = MixedPrecisionPolicy(**mixed, cast_forward_inputs=False)
    precision = MixedPrecisionPolicy(**mixed)
    # A mesh of two dimensions means copies of the shards (HSDP), which one copy does not need.
    mesh = world.mesh if world.mesh.size(0) > 1 else world.mesh["shards"]
    for block in model.model.visual.blocks:
        fully_shard(block, mesh=mesh, mp_policy=vision_precision)
    for layer in model.model.language_model.layers:
        fully_shard(layer, mesh=mesh, mp_policy=precision)
    # The root's weights are needed again at once in the backward pass, but a reference has none.
    fully_shard(model, mesh=mesh, mp_policy=vision_precision, reshard_after_forward=not trainable)
    for name in ("packed_prefill", "packed_logprobs"):
        register_fsdp_forward_method(model, name)
    model.requires_grad_(trainable)
    if freeze_vision:
        model.model.visual.requires_grad_(False)
    model.train(trainable)


# --------------------------------------------------------------------------------------- loading


def resolve_folder(name: str) -> Path:
    """A local model folder as it is, a Hub id through the Hub's cache.

    Raises:
        UserError: neither, or no Qwen2.5-VL; names it.
    """
    folder = Path(name)
    if not folder.is_dir():
        is_hub_id = not folder.exists() and name.count("/") == 1 and name[0] not in "./"
        require(is_hub_id, f"--model {name} is neither a folder nor a Hub id")
        try:
            folder = Path(snapshot_download(name, allow_patterns=HUB_FILES))
        except (OSError, HfHubHTTPError) as error:
            reason = str(error).splitlines()[0]
            raise UserError(
                f"--model {name} is no folder here, and the Hub does not give it: {reason}"
            ) from None
    config_file = folder / "config.json"
    require(config_file.is_file(), f"--model {name} holds no config.json: not a model folder")
    kind = _read_json(config_file).get("model_type")
    require(kind == "qwen2_5_vl", f"--model {name} is no Qwen2.5-VL: its model_type is {kind!r}")
    return folder


def load_model(name: str, device: torch.device, dtype: torch.dtype = torch.float32, shard=None):
    """A Qwen2.5-VL with the weights of a folder or a Hub id.

    The module is built on the meta device, cut by `shard`, and only then filled: a rank allocates
    its own part of the weights and reads only its own rows of the files.

    Args:
        dtype: of the parameters as they are kept.
        shard: a function that shards the module in place (see shard); None: not sharded.
    Raises:
        UserError: no Qwen2.5-VL, or weights that do not fit its config; names the folder.
    """
    folder = resolve_folder(name)
    config = AutoConfig.from_pretrained(folder)
    if config.get_text_config().use_sliding_window:
        raise UserError(f"--model {name} uses sliding window attention, which is not supported")
    with torch.device("meta"):
        model = Qwen2_5_VLForConditionalGeneration(config).to(dtype)
    model.tie_weights()
    if (folder / "generation_config.json").is_file():
        model.generation_config = GenerationConfig.from_pretrained(folder)
    enable_packing(model)
    if shard is not None:
        shard(model)
    model.to_empty(device=device)
    if config.tie_word_embeddings:  # to_empty has made two parameters of the one
        model.lm_head.weight = model.get_input_embeddings().weight
    _rebuild_rotary_buffers(model, device)
    _fill(model, folder)
    return model


def _rebuild_rotary_buffers(model: nn.Module, device: torch.device) -> None:
    """Rotary frequencies are in no checkpoint, and `to_empty` left them uninitialised."""
    for parent in list(model.modules()):
        for name, child in list(parent.named_children()):
            if hasattr(child, "inv_freq"):
                setattr(parent, name, type(child)(child.config).to(device))
    left = {name for name, _ in model.named_buffers() if not name.endswith("inv_freq")}
    assert not left, f"buffers that nothing fills: {left}"


def hub_name(name: str) -> str:
    """The name that a parameter has in the official folders (transformers 4.5x, vLLM)."""
    if name.startswith("model.language_model."):
        return "model." + name.removeprefix("model.language_model.")
    return name.removeprefix("model.")  # model.visual.* is visual.*, lm_head.weight stays


def weight_files(folder: Path) -> dict[str, Path]:
    """The file of every tensor of a folder, by the tensor's name in it."""
    index = folder / "model.safetensors.index.json"
    if index.is_file():
        weight_map = _read_json(index).get("weight_map")
        require(isinstance(weight_map, dict), f"--model: {index} holds no weight_map")
        return {name: folder / file for name, file in weight_map.items()}
    single = folder / "model.safetensors"
    require(
        single.is_file(), f"--model {folder} holds neither model.safetensors nor an index of shards"
    )
    with open_weights(single) as file:
        return dict.fromkeys(file.keys(), single)


def open_weights(path: Path):
    """safe_open with an error that names the file."""
    try:
        return safe_open(path, framework="pt")
    except (OSError, SafetensorError) as error:
        raise UserError(f"--model: the weights in {path} cannot be read: {error}") from None


def _fill(model: nn.Module, folder: Path) -> None:
    """Read a folder's weights into a model, in place, each rank its own rows."""
    files = weight_files(folder)
    weights = {}
    for name, parameter in model.named_parameters():  # a tied weight comes once
        stored = name if name in files else hub_name(name)  # transformers 5 may have saved it
        require(stored in files, f"--model {folder} lacks the weight {stored}")
        weights[stored] = parameter.detach()
    _check_weights(weights, files, folder)
    with warnings.catch_warnings():  # it warns that no_dist was asked for
        warnings.simplefilter("ignore")
        dcp.load(weights, storage_reader=dcp.HuggingFaceStorageReader(str(folder)), no_dist=True)


def _check_weights(weights: dict[str, Tensor], files: dict[str, Path], folder: Path) -> None:
    """Raise UserError unless each weight is in its file, in no other, and has its shape.

    HuggingFaceStorageReader reads every *.safetensors of a folder and does not look at the index.
    """
    for path in sorted({*files.values(), *folder.glob("*.safetensors")}):
        with open_weights(path) as file:
            found = weights.keys() & set(file.keys())
            for name in found:
                require(files[name] == path, f"--model: {name} is in {path} and in {files[name]}")
                shape = tuple(file.get_slice(name).get_shape())
                expected = tuple(weights[name].shape)
                require(
                    shape == expected,
                    f"--model {folder}: {name} is {shape}, its config.json says {expected}",
                )
        for name in weights.keys() - found:
            require(files[name] != path, f"--model: {path} lacks {name}, which the index names")


def load_tokenizer(name: str):
    """The tokenizer of a model folder or Hub id, chat template included.

    Raises:
        UserError: there is no tokenizer, or no chat template.
    """
    folder = resolve_folder(name)
    if not (folder / "tokenizer.json").is_file() and not (folder / "vocab.json").is_file():
        raise UserError(f"--model {name} holds no tokenizer.json and no vocab.json")
    tokenizer = AutoTokenizer.from_pretrained(folder)
    beside = folder / "chat_template.json"  # the official folders have one, for the processor
    if not tokenizer.chat_template and beside.is_file():
        tokenizer.chat_template = _read_json(beside).get("chat_template")
    if not tokenizer.chat_template:
        raise UserError(f"--model {name}: its tokenizer has no chat template")
    return tokenizer


def load_normalisation(name: str) -> dict[str, tuple[float, ...]]:
    """mean and std per colour channel, from preprocessor_config.json, for make_prompt."""
    file = resolve_folder(name) / "preprocessor_config.json"
    if not file.is_file():
        raise UserError(f"--model {name} holds no preprocessor_config.json")
    settings = _read_json(file)
    found = {}
    for key in ("mean", "std"):
        values = settings.get(f"image_{key}")
        if not isinstance(values, list) or len(values) != 3:
            raise UserError(f"--model {name}: {file} needs three numbers as image_{key}")
        found[key] = tuple(values)
    return found


def _read_json(file: Path) -> dict:
    """The object in a file of a model folder."""
    try:
        content = json.loads(file.read_text(encoding="utf-8"))
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise UserError(f"--model: {file} is not JSON: {error}") from None
    if not isinstance(content, dict):
        raise UserError(f"--model: {file} holds no object")
    return content


def model_card(config, stage: str, num_steps: int, history: list[dict]) -> str:
    """model/README.md, what the Hub shows: where the model comes from and how to load it.

    Args:
        config: the run's TrainConfig. history: metrics of its steps.
    """
    elsewhere = neutral_flags(config) | {"model", "data", "data_root", "prompts_per_step"}
    rows = [f"| `{name}` | {value} |" for name, value in vars(config).items()
            if name not in elsewhere]  # fmt: skip
    last = history[-1] if history else {}  # only rank 0 has one, and writes the card
    metrics = [f"| `{name}` | {value:.4g} |" for name, value in last.items()
               if value is not None and not name.startswith("seconds")]  # fmt: skip
    return "\n".join([
        "---", "library_name: transformers", "pipeline_tag: video-text-to-text", "---", "",
        f"# Qwen2.5-VL after {stage}", "",
        "Trained as in Video-R1 (arXiv 2503.21776).", "",
        f"- Base model: `{config.model}`", f"- Data: `{Path(config.data).name}`",
        f"- Optimizer steps: {num_steps} of {config.prompts_per_step} prompts", "",
        "## Use", "",
        "```python",
        "from transformers import AutoTokenizer, Qwen2_5_VLForConditionalGeneration",
        'model = Qwen2_5_VLForConditionalGeneration.from_pretrained("FOLDER", dtype="auto")',
        'tokenizer = AutoTokenizer.from_pretrained("FOLDER")',
        "```", "",
        "```bash", "vllm serve FOLDER", "```", "",
        "## Flags", "", "| flag | value |", "|---|---|", *rows, "",
        "## Metrics of the last step", "", "| metric | value |", "|---|---|", *metrics, "",
    ])  # fmt: skip


def export_model(
    model: nn.Module, source: str, folder: Path, world: World, card: str = ""
) -> None:  # fmt: skip
    """Write the trained model with the names, dtypes, config and tokenizer that `source` has.

    What transformers 5 would write itself (rope_parameters in config.json) does not open in
    transformers 4.

    Args:
        card: the text of its README.md; "": none.
    Raises:
        UserError: it cannot be written.
    """
    source_folder = resolve_folder(source)
    files = weight_files(source_folder)
    weights, dtypes = {}, {}
    for name, parameter in model.named_parameters():
        stored = hub_name(name) if hub_name(name) in files else name
        with open_weights(files[stored]) as file:
            dtypes[hub_name(name)] = file.get_slice(stored)[:0].dtype  # its rows are not read
        weights[hub_name(name)] = parameter
    side_files = {
        file.name: file.read_bytes()
        for pattern in ("*.json", "*.jinja", "merges.txt", "vocab.txt")
        for file in source_folder.glob(pattern)
        if file.name != "model.safetensors.index.json"
    }
    if card:
        side_files["README.md"] = card.encode()
    export_weights(weights, dtypes, folder, world, side_files)
