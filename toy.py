"""The embedded default: a tiny Qwen2.5-VL, its tokenizer, videos, images and data sets.

Everything is written to disk in the official formats and read back by the code path of a real run.
The videos show a square that moves left, right, up or down. A shuffled video still shows along
which line it moves but not which way, so a model that ignores the order of frames cannot pass 50%.
"""

import json
import tempfile
from collections.abc import Callable
from functools import partial
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageDraw, ImageFont
from safetensors.torch import save_file
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import AutoConfig, Qwen2_5_VLForConditionalGeneration

import data
from model import hub_name

FOLDER = Path("runs/toy")
BASE, SFT, RL = FOLDER / "base", FOLDER / "sft", FOLDER / "rl"
SFT_DATA, RL_DATA, TEST_DATA = (FOLDER / f"data/{name}.json" for name in ("sft", "rl", "test"))

SIDE, NUM_FRAMES, FPS = 56, 8, 2  # pixels, frames, frames per second
COLOURS = {
    "red": (220, 40, 40), "green": (40, 180, 60), "blue": (50, 80, 230), "yellow": (230, 210, 40),
}  # fmt: skip
DIRECTIONS = {"left": (-1, 0), "right": (1, 0), "up": (0, -1), "down": (0, 1)}
OPPOSITE = {"left": "right", "right": "left", "up": "bottom", "down": "top"}
ENDS = {"left": "left", "right": "right", "up": "top", "down": "bottom"}
WORDS = ("stop", "exit", "open", "wait")
SPLITS = {"sft": 1600, "rl": 800, "test": 320}  # rows, about: each kind is rounded
# Share of each kind of question; the largest is the one that depends on the order of frames.
KINDS = {"direction": 0.80, "colour": 0.05, "count": 0.05, "describe": 0.04, "word": 0.03,
         "width": 0.03}  # fmt: skip

# The teacher of the cold start guesses the direction in this share of videos, so that the SFT model
# stays uncertain and RL has something to improve.
WRONG_TEACHER = 0.1


def ensure_toy(seed: int = 0) -> None:
    """Write runs/toy/base and runs/toy/data unless they exist. Deterministic given the seed."""
    for folder, make in ((BASE, make_model), (FOLDER / "data", make_data)):
        write_once(folder, partial(make, seed=seed))


def write_once(folder: Path, make: Callable[[Path], None]) -> None:
    """Have make(scratch) write a folder unless it exists.

    Safe when several processes call it: each writes to a scratch folder of its own, the first to
    finish renames it into place, and the others, whose bytes are the same, drop theirs.
    """
    if folder.is_dir():
        return
    folder.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=f".{folder.name}-", dir=folder.parent) as scratch:
        complete = Path(scratch) / folder.name
        complete.mkdir()
        make(complete)
        try:
            complete.rename(folder)
        except OSError:
            if not folder.is_dir():
                raise


# ----------------------------------------------------------------------------------------- media


def write_y4m(path: Path, frames: np.ndarray, fps: int = FPS) -> None:
    """Write uint8 RGB frames (F, H, W, 3), even sides, as YUV4MPEG2 with 4:2:0 colour (BT.601)."""
    rgb = frames.astype(np.float32)
    r, g, b = rgb[..., 0], rgb[..., 1], rgb[..., 2]
    y = 16 + (65.481 * r + 128.553 * g + 24.966 * b) / 255
    cb = 128 + (-37.797 * r - 74.203 * g + 112.0 * b) / 255
    cr = 128 + (112.0 * r - 93.786 * g - 18.214 * b) / 255
    num_frames, height, width = y.shape

    def half(plane: np.ndarray) -> np.ndarray:
        return plane.reshape(num_frames, height // 2, 2, width // 2, 2).mean((2, 4))

    planes = [np.rint(plane).astype(np.uint8) for plane in (y, half(cb), half(cr))]
    with path.open("wb") as file:
        file.write(f"YUV4MPEG2 W{width} H{height} F{fps}:1 Ip A1:1 C420jpeg\n".encode())
        for frame in zip(*planes, strict=True):
            file.write(b"FRAME\n" + b"".join(plane.tobytes() for plane in frame))


def draw_video(
    rng: np.random.Generator, direction: str, colour: str, cold_start: bool
) -> np.ndarray:
    """A moving square: uint8 (F, H, W, 3).

    The cold start's videos go the whole way, near the middle, so that the first frames alone give
    the answer away. Those of RL and of the test set start anywhere, may go part of the way, and
    further from the middle: what is left to learn from rewards.
    """
    size = int(rng.integers(12, 19))
    room = SIDE - size  # where the square's corner may be
    off_middle = 5 if cold_start else 11
    if cold_start:
        first, last = int(rng.integers(0, 6)), room - int(rng.integers(0, 6))
    else:
        way = int(rng.integers(16, room + 1))
        first = int(rng.integers(0, room - way + 1))
        last = first + way
    along = np.linspace(first, last, NUM_FRAMES).round().astype(int)
    across = room // 2 + int(rng.integers(-off_middle, off_middle + 1))
    dx, dy = DIRECTIONS[direction]
    if dx + dy < 0:
        along = along[::-1]
    frames = np.full((NUM_FRAMES, SIDE, SIDE, 3), rng.integers(0, 60), np.uint8)
    for frame, place in zip(frames, along, strict=True):
        x, y = (place, across) if dx else (across, place)
        frame[y : y + size, x : x + size] = COLOURS[colour]
    return frames


def draw_squares(rng: np.random.Generator, count: int, size: int, colour: str) -> Image.Image:
    """Up to four squares, one per quarter of the image (one alone: anywhere)."""
    image = np.full((SIDE, SIDE, 3), rng.integers(0, 60), np.uint8)
    half = SIDE // 2
    for quarter in rng.permutation(4)[:count]:
        room = (SIDE if count == 1 else half) - size
        x, y = (int(v) for v in rng.integers(0, room + 1, 2))
        if count > 1:
            x, y = x + half * (quarter % 2), y + half * (quarter // 2)
        image[y : y + size, x : x + size] = COLOURS[colour]
    return Image.fromarray(image)


def draw_word(rng: np.random.Generator, word: str) -> Image.Image:
    image = Image.new("RGB", (SIDE, SIDE), (20, 20, 20))
    place = (int(rng.integers(2, 8)), int(rng.integers(2, 34)))
    ImageDraw.Draw(image).text(place, word, fill=(240, 240, 240), font=ImageFont.load_default(18))
    return image


# ------------------------------------------------------------------------------------- questions


def make_row(
    rng: np.random.Generator, kind: str, media: Path, name: str, cold_start: bool = True
) -> dict:
    """Draw one video or image into the folder `media`; returns the row of JSON about it."""
    direction, colour = str(rng.choice(list(DIRECTIONS))), str(rng.choice(list(COLOURS)))
    taught = direction
    if cold_start and rng.random() < WRONG_TEACHER:
        taught = str(rng.choice(list(DIRECTIONS)))
    size, count = int(rng.integers(8, 41)), int(rng.integers(1, 5))
    word = str(rng.choice(WORDS))
    letter = "ABCD"[list(DIRECTIONS).index(taught)]
    came_from, went_to = OPPOSITE[taught], ENDS[taught]
    moves = f"It goes from {came_from} to {went_to}."
    # kind: data_type, problem_type, question, options, reasoning, answer
    forms = {
        "direction": ("video", "multiple choice", "Which way does the square move?",
                      [f"{a}. {d}" for a, d in zip("ABCD", DIRECTIONS, strict=True)],
                      moves, letter),
        "describe": ("video", "free-form", "What happens in the video?", [],
                     moves, f"A {colour} square moves {taught}"),
        "colour": ("image", "multiple choice", "What is the colour of the square?",
                   [f"{a}. {c}" for a, c in zip("ABCD", COLOURS, strict=True)],
                   f"The square is {colour}.", "ABCD"[list(COLOURS).index(colour)]),
        "count": ("image", "numerical", "How many squares are there?", [],
                  f"I count {count} squares.", str(count)),
        "word": ("image", "OCR", "What word is written in the image?", [],
                 f"I read {word}.", word),
        "width": ("image", "regression", "How many pixels wide is the square?", [],
                  "I look at the two sides of the square.", str(size)),
    }  # fmt: skip
    data_type, problem_type, problem, options, reasoning, answer = forms[kind]
    if data_type == "video":
        file = media / f"{name}.y4m"
        write_y4m(file, draw_video(rng, direction, colour, cold_start))
    else:
        images = {
            "colour": lambda: draw_squares(rng, 1, 20, colour),
            "count": lambda: draw_squares(rng, count, 16, colour),
            "word": lambda: draw_word(rng, word),
            "width": lambda: draw_squares(rng, 1, size, colour),
        }
        file = media / f"{name}.png"
        images[kind]().save(file)
    return {
        "problem": problem, "data_type": data_type, "problem_type": problem_type,
        "options": options, "process": f"<think>{reasoning}</think>",
        "solution": f"<answer>{answer}</answer>", "path": f"./{media.name}/{file.name}",
        "data_source": f"toy/{kind}",
    }  # fmt: skip


def make_data(folder: Path, seed: int) -> None:
    """Write sft.json, rl.json, test.json and their videos and images."""
    for number, (split, num_rows) in enumerate(SPLITS.items()):
        rng = np.random.default_rng([seed, number])
        media = folder / split
        media.mkdir()
        kinds = [kind for kind, share in KINDS.items() for _ in range(round(share * num_rows))]
        rows = []
        for place, kind in enumerate(rng.permutation(kinds)):
            row = make_row(rng, str(kind), media, f"{place:05d}", cold_start=split == "sft")
            if split != "sft":
                row["process"] = ""
            rows.append({"problem_id": place, **row})
        (folder / f"{split}.json").write_text(json.dumps(rows, indent=1), encoding="utf-8")


# ----------------------------------------------------------------------------------------- model

SPECIAL = ("<|endoftext|>", "<|im_start|>", "<|im_end|>", "<|vision_start|>", "<|vision_end|>",
           "<|vision_pad|>", "<|image_pad|>", "<|video_pad|>")  # fmt: skip
TAGS = ("<think>", "</think>", "<answer>", "</answer>")
# Qwen2.5-VL's, for one user turn with one image or video.
CHAT_TEMPLATE = (
    "{% for message in messages %}{% if loop.first and message['role'] != 'system' %}"
    "<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n{% endif %}"
    "<|im_start|>{{ message['role'] }}\n{% if message['content'] is string %}"
    "{{ message['content'] }}{% else %}{% for part in message['content'] %}"
    "{% if part['type'] in ('image', 'video') %}"
    "<|vision_start|><|{{ part['type'] }}_pad|><|vision_end|>"
    "{% else %}{{ part['text'] }}{% endif %}{% endfor %}{% endif %}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


def toy_texts() -> list[str]:
    """Texts that hold every word of the toy's rows."""
    rng, texts = np.random.default_rng(0), []
    with tempfile.TemporaryDirectory() as scratch:
        for kind in [kind for kind in KINDS for _ in range(30)]:
            row = make_row(rng, kind, Path(scratch), "x")
            texts += [row["problem"], row["process"], row["solution"], *row["options"]]
    return texts


def make_tokenizer(folder: Path, texts: list[str] | None = None) -> dict[str, int]:
    """Write a byte-level BPE tokenizer that knows the words of `texts`, by default the toy's, and
    of the prompt; any other text is bytes. Returns the ids of SPECIAL and the vocabulary's size."""
    words = toy_texts() if texts is None else list(texts)
    words += ["system\nYou are a helpful assistant.\nuser\nassistant\nOptions:", data.TEMPLATE]
    words += [*data.ANSWER_FORMATS.values(), *map(str, range(64))]
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=1000, min_frequency=1, show_progress=False,
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
    )  # fmt: skip
    tokenizer.train_from_iterator(words, trainer)
    tokenizer.add_special_tokens([AddedToken(token, special=True) for token in SPECIAL])
    tokenizer.add_tokens([AddedToken(token, special=False) for token in TAGS])
    tokenizer.save(str(folder / "tokenizer.json"))
    settings = {
        "tokenizer_class": "PreTrainedTokenizerFast", "eos_token": "<|im_end|>",
        "pad_token": "<|endoftext|>", "model_max_length": 4096,
        "clean_up_tokenization_spaces": False, "chat_template": CHAT_TEMPLATE,
    }  # fmt: skip
    (folder / "tokenizer_config.json").write_text(json.dumps(settings, indent=2))
    return {token: tokenizer.token_to_id(token) for token in SPECIAL} | {
        "size": tokenizer.get_vocab_size()
    }


def make_model(folder: Path, seed: int, texts: list[str] | None = None) -> None:
    """Write a model folder as the Hub has it, with random weights. texts: of make_tokenizer."""
    ids = make_tokenizer(folder, texts)
    config = {
        "architectures": ["Qwen2_5_VLForConditionalGeneration"], "model_type": "qwen2_5_vl",
        "torch_dtype": "float32", "vocab_size": ids["size"], "hidden_size": 128,
        "intermediate_size": 256, "num_hidden_layers": 3, "num_attention_heads": 4,
        "num_key_value_heads": 2, "hidden_act": "silu", "max_position_embeddings": 4096,
        "rms_norm_eps": 1e-6, "rope_theta": 10000.0, "attention_dropout": 0.0,
        "initializer_range": 0.05, "use_sliding_window": False, "tie_word_embeddings": False,
        "rope_scaling": {"type": "mrope", "mrope_section": [4, 6, 6]},
        "bos_token_id": ids["<|endoftext|>"], "eos_token_id": ids["<|im_end|>"],
        "vision_start_token_id": ids["<|vision_start|>"],
        "vision_end_token_id": ids["<|vision_end|>"], "vision_token_id": ids["<|vision_pad|>"],
        "image_token_id": ids["<|image_pad|>"], "video_token_id": ids["<|video_pad|>"],
        "vision_config": {
            "model_type": "qwen2_5_vl", "depth": 2, "hidden_size": 64, "intermediate_size": 128,
            "initializer_range": 0.05, "num_heads": 4, "out_hidden_size": 128, "in_chans": 3,
            "patch_size": 14,
            "spatial_patch_size": 14, "spatial_merge_size": 2, "temporal_patch_size": 2,
            "window_size": 112, "fullatt_block_indexes": [1], "tokens_per_second": 2,
        },
    }  # fmt: skip
    (folder / "config.json").write_text(json.dumps(config, indent=2))
    end = [ids["<|im_end|>"], ids["<|endoftext|>"]]
    generation = {"bos_token_id": ids["<|endoftext|>"], "pad_token_id": ids["<|endoftext|>"],
                  "eos_token_id": end, "do_sample": True, "repetition_penalty": 1.05,
                  "temperature": 1e-6}  # fmt: skip
    (folder / "generation_config.json").write_text(json.dumps(generation, indent=2))
    preprocessor = {
        "min_pixels": 3136, "max_pixels": 12845056, "patch_size": 14, "temporal_patch_size": 2,
        "merge_size": 2, "image_mean": data.CLIP_MEAN, "image_std": data.CLIP_STD,
        "image_processor_type": "Qwen2VLImageProcessor", "processor_class": "Qwen2_5_VLProcessor",
    }  # fmt: skip
    (folder / "preprocessor_config.json").write_text(json.dumps(preprocessor, indent=2))
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        model = Qwen2_5_VLForConditionalGeneration(AutoConfig.from_pretrained(folder))
    weights = {hub_name(name): weight.detach() for name, weight in model.named_parameters()}
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
