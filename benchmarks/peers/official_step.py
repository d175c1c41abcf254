"""One step of the official Video-R1 trainer's operations, for comparison with rl_step.py.

    python -m venv official
    official/bin/pip install torch==2.13.0 transformers==4.51.3 decord pillow "numpy<2.4"
    official/bin/python benchmarks/peers/official_step.py MODEL_FOLDER VIDEO NEW_TOKENS STEPS

What its compute_loss does with T-GRPO, in its order and under a transformers of its time, written
anew: the processor twice, ordered and shuffled; `generate` with 8 and with 4 returned sequences,
top-p 0.95; 8 copies of the pixels; the vocabulary's logits of prompt and response, log_softmax row
by row; the reference likewise; backward and AdamW. Float32 on CPU, no checkpointing. A folder that
transformers 5 has written is read in its older form.
"""

import copy
import json
import sys
import tempfile
from pathlib import Path

import numpy as np
import torch
from torch import Tensor
from torch.nn.utils import clip_grad_norm_
from transformers import (
    AutoTokenizer,
    GenerationConfig,
    Qwen2_5_VLForConditionalGeneration,
    Qwen2_5_VLProcessor,
    Qwen2VLImageProcessor,
)
from watch import QUESTION, Watch, read_frames

SIZE, SHUFFLED_SIZE = 8, 4  # G and G~


def load(folder: str) -> Qwen2_5_VLForConditionalGeneration:
    """The model, from a config whose text part is not nested and has the rope's old names."""
    config = json.loads((Path(folder) / "config.json").read_text())
    text = config.pop("text_config", {})
    config = text | config | {"model_type": "qwen2_5_vl", "torch_dtype": "float32"}
    if rope := config.pop("rope_parameters", None):
        config["rope_theta"] = rope["rope_theta"]
        config["rope_scaling"] = {"type": "mrope", "mrope_section": rope["mrope_section"]}
    with tempfile.TemporaryDirectory() as older:
        for file in Path(folder).absolute().iterdir():
            (Path(older) / file.name).symlink_to(file)
        (Path(older) / "config.json").unlink()
        (Path(older) / "config.json").write_text(json.dumps(config))
        return Qwen2_5_VLForConditionalGeneration.from_pretrained(
            older, torch_dtype=torch.float32, attn_implementation="sdpa"
        )


def logprobs(model, ids: Tensor, prompt_length: int, **pixels) -> Tensor:
    """Log-probabilities (G, T) of the responses, from the logits of all tokens, (G, S + T, V)."""
    logits = model(ids, **pixels).logits
    rows = [
        row[:-1].log_softmax(-1).gather(1, targets[1:, None])[:, 0]
        for row, targets in zip(logits, ids, strict=True)
    ]
    return torch.stack(rows)[:, prompt_length - 1 :]


def step(model, reference, optimizer, processor, path: str, new_tokens: int) -> None:
    content = [{"type": "video"}, {"type": "text", "text": QUESTION}]
    text = processor.apply_chat_template(
        [{"role": "user", "content": content}], tokenize=False, add_generation_prompt=True
    )
    frames = read_frames(path, 16).transpose(0, 3, 1, 2)  # (frames, 3, height, width)
    ordered = processor(text=[text], videos=[frames], return_tensors="pt")
    mixed = np.random.default_rng(0).permutation(frames)
    shuffled = processor(text=[text], videos=[mixed], return_tensors="pt")

    def generate(inputs, count: int) -> Tensor:  # responses of new_tokens, never ended before
        config = GenerationConfig(
            do_sample=True, top_p=0.95, temperature=1.0, num_return_sequences=count,
            min_new_tokens=new_tokens, max_new_tokens=new_tokens,
            pad_token_id=processor.tokenizer.pad_token_id,
        )  # fmt: skip
        return model.generate(**inputs, generation_config=config)

    ids = generate(ordered, SIZE)
    shuffled_ids = generate(shuffled, SHUFFLED_SIZE)
    prompt_length = ordered["input_ids"].shape[1]
    assert ids.shape[1] == shuffled_ids.shape[1] == prompt_length + new_tokens
    pixels = {
        "pixel_values_videos": ordered["pixel_values_videos"].repeat(SIZE, 1),
        "video_grid_thw": ordered["video_grid_thw"].repeat(SIZE, 1),
    }
    logp = logprobs(model, ids, prompt_length, **pixels)
    with torch.inference_mode():
        logp_ref = logprobs(reference, ids, prompt_length, **pixels)
    texts = processor.batch_decode(ids[:, prompt_length:], skip_special_tokens=True)
    rewards = torch.tensor([float(len(text) % 7) for text in texts])
    advantages = (rewards - rewards.mean()) / (rewards.std() + 1e-4)
    difference = torch.clamp(logp_ref - logp, -10, 10)
    kl = difference.exp() - difference - 1
    gain = (logp - logp.detach()).exp() * advantages[:, None] - 0.04 * kl
    (-gain.mean(1).mean()).backward()
    clip_grad_norm_(model.parameters(), 5.0)
    optimizer.step()
    optimizer.zero_grad()


def main(folder: str, path: str, new_tokens: str, steps: str) -> None:
    tokenizer = AutoTokenizer.from_pretrained(folder, padding_side="left")
    processor = Qwen2_5_VLProcessor(
        Qwen2VLImageProcessor.from_pretrained(folder), tokenizer,
        chat_template=tokenizer.chat_template,
    )  # fmt: skip
    model = load(folder).train()
    model.generation_config = GenerationConfig()  # the checkpoint's repetition penalty
    reference = copy.deepcopy(model).eval()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-6)
    watch = Watch(int(new_tokens))
    for _ in range(int(steps)):
        watch.start()
        step(model, reference, optimizer, processor, path, int(new_tokens))
        watch.stop()
    watch.report()


if __name__ == "__main__":
    main(*sys.argv[1:])
