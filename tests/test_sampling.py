"""Rollouts: the shared prefill against plain decoding, samples against the policy's softmax."""

import dataclasses
from functools import partial
from types import SimpleNamespace

import plain
import pytest
import torch
from transformers import GenerationConfig

import sampling
from infra.distributed import process_group, unsharded
from model import end_tokens, group_logprobs, load_model, load_tokenizer, shard
from sampling import decode, derive_seed, draw_tokens, sample_groups

CPU = torch.device("cpu")
NEARLY_GREEDY = {"temperature": 1e-4, "top_p": 1e-3}


@pytest.fixture(scope="module")
def base(toy_folder):
    return str(toy_folder / "runs/toy/base")


@pytest.fixture(scope="module")
def tokenizer(base):
    return load_tokenizer(base)


@pytest.fixture(scope="module")
def model(base):
    return plain.shake(load_model(base, CPU)).eval()


def keys(num_prompts, num_rows):
    return [[(0, p, g) for g in range(num_rows)] for p in range(num_prompts)]


@pytest.mark.parametrize("seconds", [0.5, 1.5, 7.5])
def test_greedy_with_shared_prefill_equals_plain_decoding(
    toy_folder, base, model, tokenizer, seconds
):
    unpacked = plain.load_plain(base)
    unpacked.load_state_dict(model.state_dict())
    # An image among the videos: prompts of different lengths are padded on the left.
    prompts = plain.toy_prompts(toy_folder, tokenizer, ["video", "image", "video"], seconds)
    rollouts = sample_groups(model, tokenizer, prompts, keys(3, 2), 16, **NEARLY_GREEDY)
    for prompt, rollout in zip(prompts, rollouts, strict=True):
        expected = plain.greedy(unpacked, prompt, 16, end_tokens(model))
        for ids, mask in zip(rollout.completion_ids, rollout.completion_mask, strict=True):
            assert torch.equal(ids[mask], expected)


def test_greedy_equals_plain_generate(toy_folder, base, model, tokenizer):
    """The same through transformers' generate, which runs the prompt with its pixels per row."""
    unpacked = plain.load_plain(base)
    unpacked.load_state_dict(model.state_dict())
    unpacked.generation_config = GenerationConfig()
    (prompt,) = plain.toy_prompts(toy_folder, tokenizer, ["video"])
    (rollout,) = sample_groups(model, tokenizer, [prompt], keys(1, 1), 16, **NEARLY_GREEDY)
    output = unpacked.generate(
        input_ids=prompt.input_ids[None], attention_mask=torch.ones_like(prompt.input_ids)[None],
        position_ids=plain.positions(prompt, 0), pixel_values_videos=prompt.pixel_values,
        video_grid_thw=prompt.grid_thw[None], max_new_tokens=16, do_sample=False,
        eos_token_id=end_tokens(model), pad_token_id=end_tokens(model)[0],
    )  # fmt: skip
    expected = output[0, len(prompt.input_ids) :]
    assert torch.equal(rollout.completion_ids[0][rollout.completion_mask[0]], expected)


def fit(counts, probabilities):
    """p-value of Pearson's chi-squared test; rare tokens pooled until 5 are expected in a bin."""
    expected = probabilities.double() * counts.sum()
    bins, pooled = [], [0.0, 0]
    for token in expected.argsort().tolist():
        pooled = [pooled[0] + float(expected[token]), pooled[1] + int(counts[token])]
        if pooled[0] >= 5:
            bins.append(pooled)
            pooled = [0.0, 0]
    bins[-1] = [bins[-1][0] + pooled[0], bins[-1][1] + pooled[1]]
    assert len(bins) > 20
    statistic = torch.tensor(sum((seen - mean) ** 2 / mean for mean, seen in bins))
    freedom = torch.tensor(float(len(bins) - 1))
    return float(torch.special.gammaincc(freedom / 2, statistic / 2))


def test_first_tokens_fit_the_policys_softmax(toy_folder, base, tokenizer):
    """20,000 samples. The checkpoint's generation_config carries repetition_penalty 1.05 and
    temperature 1e-6, which must not leak in."""
    model = load_model(base, CPU)
    assert model.generation_config.repetition_penalty == 1.05
    assert model.generation_config.temperature == 1e-6
    with torch.no_grad():  # sharpen, so that some tokens are likely and many are not
        model.lm_head.weight.mul_(3)
    (prompt,) = plain.toy_prompts(toy_folder, tokenizer, ["video"])
    counts = torch.zeros(model.lm_head.weight.shape[0], dtype=torch.long)
    for part in range(10):
        rows = [[(7, part, row) for row in range(2000)]]
        (rollout,) = sample_groups(model, tokenizer, [prompt], rows, 1)
        counts += torch.bincount(rollout.completion_ids[:, 0], minlength=len(counts))
    with torch.no_grad():
        logits = plain.logits(model, prompt, torch.zeros(0, dtype=torch.long))[-1].double()
    assert fit(counts, logits.softmax(-1)) > 0.001
    # The test can fail: a temperature of 1.2 in the place of 1 is seen.
    assert fit(counts, (logits / 1.2).softmax(-1)) < 0.001


def stacked(rollouts):
    """Completion ids, mask and sampler_logps of several prompts, each (P, G, T)."""
    names = ("completion_ids", "completion_mask", "sampler_logps")
    return [torch.stack([getattr(rollout, name) for rollout in rollouts]) for name in names]


def test_sampler_logps_equal_the_training_pass(toy_folder, model, tokenizer):
    prompts = plain.toy_prompts(toy_folder, tokenizer, ["video", "image"])
    rollouts = sample_groups(model, tokenizer, prompts, keys(2, 5), 12)
    ids, mask, sampled = stacked(rollouts)
    logps = group_logprobs(model, prompts, ids, mask)
    torch.testing.assert_close(logps, sampled, atol=1e-5, rtol=0)


def test_sampler_logps_equal_the_training_pass_in_bfloat16(toy_folder, base, tokenizer):
    prompts = plain.toy_prompts(toy_folder, tokenizer, ["video", "image"])
    with process_group() as world:
        world = dataclasses.replace(world, dtype=torch.bfloat16)
        model = load_model(base, CPU, shard=partial(shard, world=world))
        with unsharded(model):
            rollouts = sample_groups(model, tokenizer, prompts, keys(2, 5), 12)
        ids, mask, sampled = stacked(rollouts)
        logps = group_logprobs(model, prompts, ids, mask)
    torch.testing.assert_close(logps, sampled, atol=0.05, rtol=0)


@pytest.mark.parametrize("padded", [True, False])
def test_decoding_has_no_mask_where_nothing_is_padded(padded):
    masks = []

    def model(attention_mask, **_):
        masks.append(attention_mask)
        return SimpleNamespace(logits=torch.zeros(2, 1, 5))

    mask = torch.ones(2, 4)
    mask[0, 0] = not padded
    decode(
        model, torch.zeros(2, 4),
        GenerationConfig(max_new_tokens=3, eos_token_id=[4], pad_token_id=4),
        draw=lambda logits, step: (torch.zeros(2), torch.zeros(2)), together=False,
        position_ids=torch.zeros(3, 2, 4), attention_mask=mask, past_key_values=None,
    )  # fmt: skip
    widths = [mask is not None and mask.shape[1] for mask in masks]
    assert widths == ([4, 5, 6] if padded else [False, False, False])


def test_a_row_depends_on_its_own_key_alone(toy_folder, model, tokenizer):
    prompts = plain.toy_prompts(toy_folder, tokenizer, ["video", "image"])
    both = sample_groups(model, tokenizer, prompts, keys(2, 4), 12)
    alone = sample_groups(model, tokenizer, prompts[1:], [keys(2, 4)[1][2:3]], 12)[0]
    row = both[1].completion_ids[2][both[1].completion_mask[2]]
    assert torch.equal(row, alone.completion_ids[0][alone.completion_mask[0]])
    texts = {text for rollout in both for text in rollout.texts}
    assert len(texts) == 8  # eight keys, eight responses
    none, alone = sample_groups(model, tokenizer, prompts, [[], keys(2, 4)[1][2:3]], 12)
    assert none.texts == [] and none.completion_ids.shape[0] == 0  # --shuffled_group_size 0
    assert torch.equal(row, alone.completion_ids[0][alone.completion_mask[0]])


def test_generate_leaves_the_model_as_it_was(toy_folder, model, tokenizer, monkeypatch):
    prompts = plain.toy_prompts(toy_folder, tokenizer, ["video"])
    settings = model.generation_config
    sample_groups(model, tokenizer, prompts, keys(1, 2), 3)
    for owner, name in ((model, "generate"), (sampling, "fast_linear")):
        monkeypatch.setattr(owner, name, lambda *_, **__: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            sample_groups(model, tokenizer, prompts, keys(1, 2), 3)
    assert model.generation_config is settings
    assert "forward" not in vars(model.lm_head)


def test_vision_and_prefill_run_once(toy_folder, model, tokenizer):
    calls = {"vision": 0, "language": []}

    def see(*_):
        calls["vision"] += 1

    def read(module, args, kwargs):
        calls["language"].append(kwargs["inputs_embeds"].shape[:2])

    hooks = [
        model.model.visual.register_forward_hook(see),
        model.model.language_model.register_forward_pre_hook(read, with_kwargs=True),
    ]
    prompts = plain.toy_prompts(toy_folder, tokenizer, ["video", "image"])
    sample_groups(model, tokenizer, prompts, keys(2, 3), 4)
    for hook in hooks:
        hook.remove()
    assert calls["vision"] == 1
    prefill, *decode = calls["language"]
    assert prefill == (1, sum(len(prompt.input_ids) for prompt in prompts))
    assert set(decode) == {(6, 1)}


@pytest.mark.parametrize("which", [0, 1])
def test_masks_end_with_the_end_token(toy_folder, base, tokenizer, which):
    model = load_model(base, CPU)
    model.generation_config.eos_token_id = [*end_tokens(model)[:1], 7]
    end = end_tokens(model)[which]
    with torch.no_grad():  # make the end token likely
        model.lm_head.weight[end] = 0
        model.lm_head.weight.mul_(0.1)
        bias = torch.zeros(model.lm_head.weight.shape[0])
        bias[end] = 5.0
    model.lm_head.register_forward_hook(lambda _, __, output: output + bias)
    (prompt,) = plain.toy_prompts(toy_folder, tokenizer, ["video"])
    (rollout,) = sample_groups(model, tokenizer, [prompt], keys(1, 40), 6)
    assert set(rollout.lengths.tolist()) >= {1, 2, 6}
    for ids, mask, ended, text in zip(
        rollout.completion_ids, rollout.completion_mask, rollout.ended, rollout.texts, strict=True
    ):
        tokens = ids[mask].tolist()
        assert mask.tolist() == sorted(mask.tolist(), reverse=True)
        assert ended == (tokens[-1] in end_tokens(model))
        assert not set(tokens[:-1]) & set(end_tokens(model))
        assert text == tokenizer.decode(tokens[:-1] if ended else tokens)
    assert (rollout.lengths[~rollout.ended] == 6).all()


def test_logits_that_are_nan_are_an_error(toy_folder, base, tokenizer):
    model = load_model(base, CPU)
    with torch.no_grad():
        model.lm_head.weight[3, 3] = torch.nan
    prompts = plain.toy_prompts(toy_folder, tokenizer, ["video"])
    with pytest.raises(ValueError, match="logits are NaN"):
        sample_groups(model, tokenizer, prompts, keys(1, 2), 3)


# ------------------------------------------------------------------------------------ draw_tokens

LOGITS = torch.tensor([[0.5, 0.3, 0.2, 0.0]]).log()  # the last token is forbidden
DRAWS = {
    # Cumulative 0.5, 0.8, 1.0: u picks the first token whose cumulative is above it.
    "first": (0.0, {}, 0),
    "below-the-step": (0.4999, {}, 0),
    "above-the-step": (0.5001, {}, 1),
    "last": (0.8001, {}, 2),
    "never-a-forbidden-one": (1 - 2**-53, {}, 2),
    # Temperature 0.5 squares: 25, 9, 4 of 38; cumulative 0.658, 0.895.
    "cold-first": (0.65, {"temperature": 0.5}, 0),
    "cold-second": (0.67, {"temperature": 0.5}, 1),
    # top_p 0.5 keeps one token, 0.6 two of them (5/8, 3/8).
    "top-p-one": (0.99, {"top_p": 0.5}, 0),
    "top-p-two": (0.63, {"top_p": 0.6}, 1),
    "top-p-tiny-keeps-one": (0.99, {"top_p": 1e-9}, 0),
    "paper": (0.99, {"temperature": 0.01, "top_p": 0.001}, 0),
}


@pytest.mark.parametrize(("u", "settings", "token"), DRAWS.values(), ids=DRAWS)
def test_draw_tokens_by_hand(u, settings, token):
    uniforms = torch.tensor([u], dtype=torch.float64)
    tokens, logps = draw_tokens(LOGITS, uniforms, **settings)
    assert tokens.tolist() == [token]
    expected = (LOGITS / settings.get("temperature", 1.0)).log_softmax(-1)[0, token]
    torch.testing.assert_close(logps[0], expected)


def test_derive_seed_tells_keys_apart():
    seeds = {derive_seed(a, b, c) for a in range(5) for b in range(5) for c in range(5)}
    assert len(seeds) == 125
    assert all(0 <= seed < 2**63 for seed in seeds)
    assert sampling.derive_seed(1, 2) == sampling.derive_seed(1, 2)
