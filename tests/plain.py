"""The slow plain computations that the fast paths must equal: one response at a time, behind its
own copy of the prompt, pixels included, full logits, no cache, through transformers' own forward.
"""

import dataclasses

import torch
from transformers import Qwen2_5_VLForConditionalGeneration

import data
import model as model_module


def load_plain(folder):
    """The model as transformers loads it, with transformers' own attention."""
    return Qwen2_5_VLForConditionalGeneration.from_pretrained(folder, dtype=torch.float32).eval()


def shake(model, scale=0.05, seed=0):
    """Add noise to every weight, so that biases and norms matter too."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn(parameter.shape, generator=generator) * scale)
    return model


def positions(prompt, num_response):
    """int64 (3, 1, S + T): the prompt's positions, then counting on on all axes."""
    prompt_positions = model_module.rope_positions(prompt)
    after = (torch.arange(num_response) + prompt_positions.max() + 1).expand(3, -1)
    return torch.cat([prompt_positions, after], dim=1)[:, None]


def logits(model, prompt, response):
    """float32 (S + T, V) of a prompt and one response, forbidden tokens at -inf."""
    pixels = {"pixel_values": prompt.pixel_values, "image_grid_thw": prompt.grid_thw[None]}
    if prompt.is_video:
        pixels = {
            "pixel_values_videos": prompt.pixel_values,
            "video_grid_thw": prompt.grid_thw[None],
        }
    ids = torch.cat([prompt.input_ids, response])[None]
    output = model(input_ids=ids, position_ids=positions(prompt, len(response)), **pixels)
    forbidden = model_module.forbidden_tokens(model.config)
    return output.logits[0].index_fill(1, torch.tensor(forbidden), -torch.inf)


def logprobs(model, prompt, response):
    """float32 (T,): log-probabilities of one response."""
    if not len(response):
        return torch.zeros(0)
    scores = logits(model, prompt, response)[len(prompt.input_ids) - 1 : -1].log_softmax(-1)
    return scores.gather(1, response[:, None])[:, 0]


def greedy(model, prompt, max_new_tokens, ends):
    """int64 (T,): the most likely token again and again, the whole sequence run for each."""
    response = torch.zeros(0, dtype=torch.long)
    while len(response) < max_new_tokens:
        with torch.no_grad():
            token = logits(model, prompt, response)[-1].argmax()
        response = torch.cat([response, token[None]])
        if int(token) in ends:
            break
    return response


def toy_prompts(folder, tokenizer, kinds, seconds=None):
    """Prompts of the toy's RL set: the n-th of each kind ("video" or "image") in `kinds`."""
    samples = data.load_samples(folder / "runs/toy/data/rl.json")
    prompts, used = [], {"video": 0, "image": 0}
    for kind in kinds:
        sample = [s for s in samples if s.data_type == kind][used[kind]]
        used[kind] += 1
        prompt = data.make_prompt(sample, tokenizer)
        if seconds is not None and prompt.is_video:
            prompt = dataclasses.replace(prompt, seconds_per_grid=seconds)
        prompts.append(prompt)
    return prompts
