"""Packed log-probabilities against the plain pass, positions by hand, loading."""

import dataclasses
import json
import shutil
from functools import partial
from types import SimpleNamespace

import plain
import pytest
import torch
from safetensors.torch import load_file, save_file

from infra.distributed import process_group
from infra.errors import UnusableSample, UserError
from model import (
    enable_checkpointing,
    export_model,
    forbidden_tokens,
    group_logprobs,
    load_model,
    load_normalisation,
    load_tokenizer,
    pack_groups,
    require_possible,
    require_room,
    rope_positions,
    shard,
)

CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def base(toy_folder):
    return toy_folder / "runs/toy/base"


@pytest.fixture(scope="module")
def tokenizer(base):
    return load_tokenizer(str(base))


@pytest.fixture(scope="module")
def tied_base(base, tmp_path_factory):
    """The toy's model with tied embeddings, as the 3B model has them: no lm_head on disk."""
    folder = tmp_path_factory.mktemp("tied") / "base"
    shutil.copytree(base, folder)
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"tie_word_embeddings": True}))
    weights = load_file(folder / "model.safetensors")
    del weights["lm_head.weight"]
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    return folder


def responses(lengths, vocabulary=500, seed=0):
    """ids and mask (P, G, T) of random right-padded responses; padding is garbage, not zeros."""
    lengths = torch.tensor(lengths)
    width = int(lengths.max())
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(0, vocabulary, (*lengths.shape, width), generator=generator)
    return ids, torch.arange(width) < lengths[..., None]


CASES = {
    "one-video": (["video"], [[5, 5, 5, 5]]),
    "mixed-lengths": (["video"], [[9, 1, 4, 0, 7]]),
    "image-and-videos": (["image", "video", "video"], [[7, 3, 1], [2, 7, 5], [0, 1, 7]]),
    "one-response-each": (["video", "image"], [[8], [3]]),
}


@pytest.mark.parametrize(
    ("kinds", "lengths", "tied"),
    [*((*case, False) for case in CASES.values()), (*CASES["image-and-videos"], True)],
    ids=[*CASES, "tied"],
)
def test_group_logprobs_and_gradients_equal_the_plain_pass(
    toy_folder, base, tied_base, tokenizer, kinds, lengths, tied
):
    folder = tied_base if tied else base
    packed = plain.shake(load_model(str(folder), CPU))
    unpacked = plain.load_plain(folder)
    unpacked.load_state_dict(packed.state_dict())
    prompts = plain.toy_prompts(toy_folder, tokenizer, kinds)
    ids, mask = responses(lengths)
    weights = torch.randn(mask.shape, generator=torch.Generator().manual_seed(1))

    calls = []
    packed.model.visual.register_forward_hook(lambda *_: calls.append(1))
    logps = group_logprobs(packed, prompts, ids, mask)
    assert len(calls) == 1  # whatever the number of prompts
    (logps * weights).sum().backward()
    total = 0.0
    for p, prompt in enumerate(prompts):
        for g in range(mask.shape[1]):
            length = int(mask[p, g].sum())
            expected = plain.logprobs(unpacked, prompt, ids[p, g, :length])
            torch.testing.assert_close(logps[p, g, :length], expected, atol=1e-5, rtol=0)
            assert (logps[p, g, length:] == 0).all()
            total = total + (expected * weights[p, g, :length]).sum()
    total.backward()

    assert logps.dtype == torch.float32
    assert logps.shape == mask.shape
    expected_gradients = dict(unpacked.named_parameters())
    for name, parameter in packed.named_parameters():
        expected = expected_gradients[name].grad
        error = (parameter.grad - expected).norm() / expected.norm()
        assert error < 1e-4, (name, float(error))


def test_group_logprobs_takes_a_model_that_transformers_loaded(toy_folder, base, tokenizer):
    prompts = plain.toy_prompts(toy_folder, tokenizer, ["video"])
    ids, mask = responses([[4, 2]])
    theirs, ours = plain.load_plain(base), load_model(str(base), CPU)
    torch.testing.assert_close(
        group_logprobs(theirs, prompts, ids, mask), group_logprobs(ours, prompts, ids, mask)
    )


def test_activation_checkpointing_changes_no_gradient(toy_folder, base, tokenizer):
    prompts = plain.toy_prompts(toy_folder, tokenizer, ["video", "image"])
    ids, mask = responses([[5, 2], [3, 3]])
    gradients = []
    for with_checkpointing in (False, True):
        model = plain.shake(load_model(str(base), CPU)).train()
        if with_checkpointing:
            enable_checkpointing(model)
        group_logprobs(model, prompts, ids, mask).sum().backward()
        gradients.append([parameter.grad for parameter in model.parameters()])
    for without, with_ in zip(*gradients, strict=True):
        assert torch.equal(without, with_)


def test_bfloat16_gradients_point_where_float32_ones_do(toy_folder, base, tokenizer):
    """What a GPU computes in, sharded, on the CPU: the packed passes forward and backward."""
    prompts = plain.toy_prompts(toy_folder, tokenizer, ["video", "image"])
    ids, mask = responses([[5, 2], [3, 3]])
    weights = torch.randn(mask.shape, generator=torch.Generator().manual_seed(1))
    found = []
    with process_group() as world:
        for dtype in (torch.float32, torch.bfloat16):
            computing = dataclasses.replace(world, dtype=dtype)
            model = load_model(str(base), CPU, shard=partial(shard, world=computing))
            logps = group_logprobs(model, prompts, ids, mask)
            (logps * weights).sum().backward()
            gradients = [parameter.grad.full_tensor() for parameter in model.parameters()]
            found.append((logps.detach(), torch.cat([grad.flatten() for grad in gradients])))
    (logps, gradient), (rounded_logps, rounded_gradient) = found
    assert rounded_logps.dtype == rounded_gradient.dtype == torch.float32
    difference = (logps - rounded_logps).abs().max()
    assert 0 < difference < 0.05  # rounded, and by no more than its 8 bits do
    assert torch.cosine_similarity(gradient, rounded_gradient, dim=0) > 0.999


def test_padding_points_at_different_tokens(toy_folder, tokenizer):
    (prompt,) = plain.toy_prompts(toy_folder, tokenizer, ["video"])
    (segment,) = pack_groups([prompt], [[torch.ones(50).long(), torch.ones(2).long()]]).segments
    padding = segment.slots[1, 2:]
    assert len(padding.unique()) == min(48, segment.length)
    assert padding.max() < segment.length  # the row's beginning, where its prompt is


def test_placeholders_that_do_not_fit_the_features_are_named(toy_folder, base, tokenizer):
    model = load_model(str(base), CPU)
    (prompt,) = plain.toy_prompts(toy_folder, tokenizer, ["video"])
    short = dataclasses.replace(prompt, input_ids=prompt.input_ids[: prompt.vision_start + 3])
    ids, mask = responses([[1]])
    with pytest.raises(UserError, match=rf"row {prompt.sample.row}\): \d+ placeholders"):
        group_logprobs(model, [short], ids, mask)


# ------------------------------------------------------------------------------------- positions


def fields(num_tokens, start, grid, seconds, is_video=True):
    return SimpleNamespace(
        input_ids=torch.zeros(num_tokens), vision_start=start, grid_thw=torch.tensor(grid),
        seconds_per_grid=seconds, is_video=is_video,
    )  # fmt: skip


POSITIONS = {
    # Two text tokens, a merged grid of 2 x 1 x 2 half-second grids (times 0 and int(0.5 * 2) = 1),
    # text from max(2 + 1, 2 + 0, 2 + 1) + 1 = 4.
    "half-a-second": (
        fields(8, 2, [2, 2, 4], 0.5),
        [[0, 1, 2, 2, 3, 3, 4, 5], [0, 1, 2, 2, 2, 2, 4, 5], [0, 1, 2, 3, 2, 3, 4, 5]],
    ),
    # 1.5 s per grid: times 0 and 3; text from 1 + 3 + 1 = 5.
    "one-and-a-half-seconds": (
        fields(6, 1, [2, 2, 4], 1.5),
        [[0, 1, 1, 4, 4, 5], [0, 1, 1, 1, 1, 5], [0, 1, 2, 1, 2, 5]],
    ),
    # 0.3 s per grid: times int(0), int(0.6), int(1.2) = 0, 0, 1. Truncation, not rounding.
    "truncated": (
        fields(4, 0, [3, 2, 2], 0.3),
        [[0, 0, 1, 2], [0, 0, 0, 2], [0, 0, 0, 2]],
    ),
    # An image has no time: text from max(0 + 0, 0 + 1, 0 + 2) + 1 = 3.
    "image": (
        fields(7, 0, [1, 4, 6], 0.0, is_video=False),
        [[0, 0, 0, 0, 0, 0, 3], [0, 0, 0, 1, 1, 1, 3], [0, 1, 2, 0, 1, 2, 3]],
    ),
}  # fmt: skip


@pytest.mark.parametrize(("prompt", "expected"), POSITIONS.values(), ids=POSITIONS)
def test_rope_positions_by_hand(prompt, expected):
    found = rope_positions(prompt)
    assert found.dtype == torch.int64
    assert found.tolist() == expected


def test_text_continues_after_the_time_of_a_video():
    found = rope_positions(fields(20, 2, [4, 4, 4], 1.5))  # the example of its docstring
    assert found[0, 2:18].tolist() == [2] * 4 + [5] * 4 + [8] * 4 + [11] * 4
    assert found[:, 18].tolist() == [12, 12, 12]
    # 8 grids of 7.5 s: the last at int(7 * 15) = 105, the text at 106; transformers 5 says 4.
    assert rope_positions(fields(33, 0, [8, 4, 4], 7.5))[:, 32].tolist() == [106] * 3


# ---------------------------------------------------------------------------------------- tokens


def config(text=None, **values):
    inner = SimpleNamespace(**(text or {}))
    return SimpleNamespace(get_text_config=lambda: inner, **values)


FORBIDDEN = {
    "all-vision": (
        config(image_token_id=5, video_token_id=6, vision_start_token_id=2,
               vision_end_token_id=3, vision_token_id=4, eos_token_id=1), [2, 3, 4, 5, 6],
    ),
    "padding-that-ends": (config(image_token_id=5, pad_token_id=1, eos_token_id=[1, 2]), [5]),
    "padding-in-the-text-config": (
        config({"pad_token_id": 0, "eos_token_id": 1}, image_token_id=5), [0, 5],
    ),
}  # fmt: skip


@pytest.mark.parametrize(("settings", "expected"), FORBIDDEN.values(), ids=FORBIDDEN)
def test_forbidden_tokens(settings, expected):
    assert forbidden_tokens(settings) == expected


def test_forbidden_tokens_have_no_probability(toy_folder, base, tokenizer):
    model = load_model(str(base), CPU)
    prompts = plain.toy_prompts(toy_folder, tokenizer, ["video"])
    vocabulary = model.lm_head.weight.shape[0]
    ids = torch.arange(vocabulary)[None, :, None]  # each token as a response of its own
    logps = group_logprobs(model, prompts, ids, torch.ones_like(ids, dtype=torch.bool)).flatten()
    forbidden = forbidden_tokens(model.config)
    assert (logps[forbidden] == -torch.inf).all()
    torch.testing.assert_close(logps.exp().sum(), torch.tensor(1.0))


# --------------------------------------------------------------------------------------- loading


@pytest.mark.parametrize("tied", [False, True], ids=["untied", "tied"])
def test_loaded_weights_equal_transformers(base, tied_base, tied):
    folder = tied_base if tied else base
    ours, theirs = load_model(str(folder), CPU), plain.load_plain(folder)
    for kind in ("state_dict", "named_buffers"):
        mine, others = (dict(getattr(model, kind)()) for model in (ours, theirs))
        assert mine.keys() == others.keys()
        assert [name for name in mine if not torch.equal(mine[name], others[name])] == []
    assert (ours.lm_head.weight is ours.model.language_model.embed_tokens.weight) is tied


def test_a_half_precision_model_in_shards_loads_and_exports_as_it_was(
    toy_folder, tied_base, tmp_path
):
    """As the 3B model lies on disk: tied, bfloat16, an index, the template in a file beside."""
    source = tmp_path / "source"
    shutil.copytree(tied_base, source)
    weights = load_file(source / "model.safetensors")
    (source / "model.safetensors").unlink()
    weights = {name: weight.bfloat16() for name, weight in weights.items()}
    names, weight_map = sorted(weights), {}
    for number in range(2):
        file = f"model-0000{number + 1}-of-00002.safetensors"
        half = {name: weights[name] for name in names[number::2]}
        save_file(half, source / file, metadata={"format": "pt"})
        weight_map |= dict.fromkeys(half, file)
    index = {"metadata": {"total_size": 1}, "weight_map": weight_map}
    (source / "model.safetensors.index.json").write_text(json.dumps(index))

    model = load_model(str(source), CPU)
    assert {parameter.dtype for parameter in model.parameters()} == {torch.float32}
    plain.shake(model)
    with process_group() as world:
        export_model(model, str(source), tmp_path / "model", world, card="# A card\n")
    assert (tmp_path / "model/README.md").read_text() == "# A card\n"
    exported = load_file(tmp_path / "model/model.safetensors")
    assert exported.keys() == weights.keys()
    assert {weight.dtype for weight in exported.values()} == {torch.bfloat16}
    for name in ("config.json", "tokenizer.json", "tokenizer_config.json",
                 "preprocessor_config.json", "generation_config.json"):  # fmt: skip
        assert (tmp_path / "model" / name).read_bytes() == (source / name).read_bytes()

    # from_pretrained gives the log-probabilities of the rounded model.
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(parameter.bfloat16())
    opened = plain.load_plain(tmp_path / "model")
    prompts = plain.toy_prompts(toy_folder, load_tokenizer(str(source)), ["video"])
    ids, mask = responses([[6, 4]])
    found = group_logprobs(model, prompts, ids, mask)[0]
    for row, row_ids in enumerate(ids[0]):
        response = row_ids[mask[0, row]]
        expected = plain.logprobs(opened, prompts[0], response)
        torch.testing.assert_close(found[row, : len(response)], expected, rtol=0, atol=1e-5)


@pytest.mark.parametrize("place", ["chat_template.json", "chat_template.jinja"])
def test_the_chat_template_may_lie_beside_the_tokenizer(base, tmp_path, place):
    shutil.copytree(base, tmp_path / "base")
    file = tmp_path / "base/tokenizer_config.json"
    settings = json.loads(file.read_text())
    template = settings.pop("chat_template")
    file.write_text(json.dumps(settings))
    with pytest.raises(UserError, match="has no chat template"):
        load_tokenizer(str(tmp_path / "base"))
    content = template if "jinja" in place else json.dumps({"chat_template": template})
    (tmp_path / "base" / place).write_text(content)
    assert load_tokenizer(str(tmp_path / "base")).chat_template == template


def test_a_prompt_must_fit_into_the_models_positions(toy_folder, tokenizer):
    (prompt,) = plain.toy_prompts(toy_folder, tokenizer, ["video"], seconds=0.5)
    length = len(prompt.input_ids)
    # An hour of video takes more positions than tokens: its last frames stand 3,600 s away.
    hour = dataclasses.replace(prompt, seconds_per_grid=1200.0)
    vision = SimpleNamespace(tokens_per_second=2)
    for one, room in ((prompt, length + 10), (hour, 7200 + length)):
        require_room(one, 10, config({"max_position_embeddings": room}, vision_config=vision))
    for one, room in ((prompt, length + 9), (hour, 7200)):
        with pytest.raises(UnusableSample, match=f"{length} tokens and a response of 10 take"):
            require_room(one, 10, config({"max_position_embeddings": room}, vision_config=vision))


def change_weights(folder, **changes):
    """Replace weights of a model folder by others; None takes one away."""
    weights = load_file(folder / "model.safetensors") | changes
    weights = {name: weight for name, weight in weights.items() if weight is not None}
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})


def lose(folder):
    change_weights(folder, **{"visual.merger.ln_q.weight": None})


def reshape(folder):
    change_weights(folder, **{"model.norm.weight": torch.zeros(3)})


def truncate(folder):
    file = folder / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-100])


def hold_twice(folder):
    save_file({"visual.merger.ln_q.weight": torch.zeros(3)}, folder / "other.safetensors")


def lie_in_the_index(folder):
    names = load_file(folder / "model.safetensors").keys()
    lose(folder)
    index = {"weight_map": dict.fromkeys(names, "model.safetensors")}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))


DAMAGES = [
    (lose, "lacks the weight visual.merger.ln_q.weight"),
    (reshape, r"model.norm.weight is \(3,\), its config.json says \(128,\)"),
    (truncate, "the weights in .*base/model.safetensors cannot be read"),
    (hold_twice, "visual.merger.ln_q.weight is in .*other.safetensors and in"),
    (lie_in_the_index, "lacks visual.merger.ln_q.weight, which the index names"),
]


@pytest.mark.parametrize(("damage", "words"), DAMAGES, ids=lambda value: value.__name__
                         if callable(value) else "")  # fmt: skip
def test_weights_that_do_not_fit_are_named(base, tmp_path, damage, words):
    shutil.copytree(base, tmp_path / "base")
    damage(tmp_path / "base")
    with pytest.raises(UserError, match=words):
        load_model(str(tmp_path / "base"), CPU)


@pytest.mark.parametrize(
    ("content", "words"),
    [("{}", "needs three numbers as image_mean"), ("[1]", "holds no object"), ("{", "is not JSON")],
)
def test_a_bad_preprocessor_config_is_named(base, tmp_path, content, words):
    shutil.copytree(base, tmp_path / "base")
    (tmp_path / "base/preprocessor_config.json").write_text(content)
    with pytest.raises(UserError, match=words):
        load_normalisation(str(tmp_path / "base"))


def test_a_response_that_spells_a_token_of_probability_0_is_refused(toy_folder):
    """Fault 12: the pad token, spelt in an SFT row, made the loss infinite."""
    config = load_model(str(toy_folder / "runs/toy/base"), torch.device("cpu")).config
    bad = forbidden_tokens(config)[0]
    require_possible(torch.tensor([5, 6]), config)
    with pytest.raises(UnusableSample, match=str(bad)):
        require_possible(torch.tensor([5, bad]), config)
