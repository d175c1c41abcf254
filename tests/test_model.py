"""Packed log-probabilities against the plain pass, positions by hand, loading."""

import dataclasses
import json
import shutil
from types import SimpleNamespace

import plain
import pytest
import torch
from safetensors.torch import load_file, save_file

import model as model_module
from model import (
    enable_checkpointing,
    forbidden_tokens,
    group_logprobs,
    load_model,
    load_tokenizer,
    rope_positions,
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
    "one-image": (["image"], [[6, 6]]),
    "mixed-lengths": (["video"], [[9, 1, 4, 0, 7]]),
    "image-and-videos": (["image", "video", "video"], [[7, 3, 1], [2, 7, 5], [0, 1, 7]]),
    "one-response-each": (["video", "image"], [[8], [3]]),
}


@pytest.mark.parametrize("tied", [False, True], ids=["untied", "tied"])
@pytest.mark.parametrize(("kinds", "lengths"), CASES.values(), ids=CASES)
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

    logps = group_logprobs(packed, prompts, ids, mask)
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


def test_each_prompt_of_a_batch_equals_the_prompt_alone(toy_folder, base, tokenizer):
    model = plain.shake(load_model(str(base), CPU))
    prompts = plain.toy_prompts(toy_folder, tokenizer, ["video", "image", "image", "video"])
    ids, mask = responses([[5, 2], [3, 3], [0, 6], [1, 4]])
    together = group_logprobs(model, prompts, ids, mask)
    for p, prompt in enumerate(prompts):
        alone = group_logprobs(model, [prompt], ids[p : p + 1], mask[p : p + 1])
        torch.testing.assert_close(together[p : p + 1], alone, atol=1e-5, rtol=0)


def test_vision_runs_once_whatever_the_number_of_prompts(toy_folder, base, tokenizer):
    model = load_model(str(base), CPU)
    calls = []
    model.model.visual.register_forward_hook(lambda *_: calls.append(1))
    prompts = plain.toy_prompts(toy_folder, tokenizer, ["video", "image", "video"])
    group_logprobs(model, prompts, *responses([[2, 3]] * 3))
    assert len(calls) == 1


def test_logits_exist_in_chunks_only(toy_folder, base, tokenizer, monkeypatch):
    model = plain.shake(load_model(str(base), CPU))
    prompts = plain.toy_prompts(toy_folder, tokenizer, ["video"])
    ids, mask = responses([[9, 8, 7]])
    whole = group_logprobs(model, prompts, ids, mask)
    rows = []
    model.lm_head.register_forward_hook(lambda _, __, output: rows.append(len(output)))
    monkeypatch.setattr(model_module, "LOGITS_PER_CHUNK", 5 * model.lm_head.weight.shape[0])
    chunked = group_logprobs(model, prompts, ids, mask)
    assert rows == [5, 5, 5, 5, 4]  # 24 response tokens; none for the prompt
    torch.testing.assert_close(chunked, whole, atol=1e-6, rtol=0)


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


def test_placeholders_that_do_not_fit_the_features_are_named(toy_folder, base, tokenizer):
    model = load_model(str(base), CPU)
    (prompt,) = plain.toy_prompts(toy_folder, tokenizer, ["video"])
    short = dataclasses.replace(prompt, input_ids=prompt.input_ids[: prompt.vision_start + 3])
    ids, mask = responses([[1]])
    with pytest.raises(ValueError, match=rf"row {prompt.sample.row}\): \d+ placeholders"):
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


def test_rope_positions_docstring_example():
    found = rope_positions(fields(20, 2, [4, 4, 4], 1.5))
    assert found[0, 2:18].tolist() == [2] * 4 + [5] * 4 + [8] * 4 + [11] * 4
    assert found[:, 18].tolist() == [12, 12, 12]


def test_a_minute_of_video_pushes_the_text_a_minute_on():
    # 8 grids of 7.5 s: the last at int(7 * 15) = 105, the text at 106; transformers 5 says 4.
    assert rope_positions(fields(33, 0, [8, 4, 4], 7.5))[:, 32].tolist() == [106] * 3


# ---------------------------------------------------------------------------------------- tokens


def config(text=None, **values):
    inner = SimpleNamespace(**(text or {}))
    return SimpleNamespace(get_text_config=lambda: inner, **values)


FORBIDDEN = {
    "vision-alone": (config(image_token_id=5, video_token_id=6, eos_token_id=1), [5, 6]),
    "all-vision": (
        config(image_token_id=5, video_token_id=6, vision_start_token_id=2,
               vision_end_token_id=3, vision_token_id=4), [2, 3, 4, 5, 6],
    ),
    "padding": (config(image_token_id=5, pad_token_id=0, eos_token_id=1), [0, 5]),
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
    for (name, mine), (_, other) in zip(
        ours.state_dict().items(), theirs.state_dict().items(), strict=True
    ):
        assert torch.equal(mine, other), name
    for (name, mine), (_, other) in zip(ours.named_buffers(), theirs.named_buffers(), strict=True):
        assert torch.equal(mine, other), name
    same = ours.lm_head.weight is ours.model.language_model.embed_tokens.weight
    assert same is tied


def broken(folder, change):
    """Apply `change` to the weights (a dict) of a copy of a model folder."""
    weights = load_file(folder / "model.safetensors")
    change(weights)
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})


def lose(weights):
    del weights["visual.merger.ln_q.weight"]


def reshape(weights):
    weights["model.norm.weight"] = torch.zeros(3)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        pytest.param(lose, "lacks the weight visual.merger.ln_q.weight", id="missing"),
        pytest.param(reshape, r"model.norm.weight is \(3,\)", id="wrong-shape"),
    ],
)
def test_weights_that_do_not_fit_are_named(base, tmp_path, change, words):
    shutil.copytree(base, tmp_path / "base")
    broken(tmp_path / "base", change)
    with pytest.raises(ValueError, match=words):
        load_model(str(tmp_path / "base"), CPU)
