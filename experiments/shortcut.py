"""The study's test bed: videos whose answer is the order of frames, beside a shortcut.

    python experiments/shortcut.py --folder runs/shortcut

writes, once, a tiny model and its data in the official formats:

    base                    random weights
    data/sft.json           the cold start, without the cue
    data/rl_cue90.json      RL: the cue agrees with the answer in 90% of the videos
    data/rl_cue25.json      the same videos with the cue at chance
    data/test.json          the same test videos three times, and images

A square changes its colour: which comes first? Played backwards, a video has the same frames and
another answer, so that shuffled frames tell the two colours and not which came first. The shortcut
is a white corner in every frame; each letter has one (A B over C D). The images, without a cue, ask
for the colour of a square.

Test rows are named by what their cue does: shortcut/agrees, shortcut/disagrees, shortcut/absent,
shortcut/image. Each item stands there NUM_SAMPLES times with one problem_id, so that one run of
eval.py with EVAL_FLAGS draws that many responses to it. PILOT.md says how the bed was chosen.
"""

import argparse
import json
import sys
from functools import partial
from pathlib import Path

import numpy as np

ROOT = Path(__file__).resolve().parents[1]

# The flags of each script on the bed, beside --model, --data, --output_dir and --seed. Frames are
# small and a prompt holds the question and its options alone: half of the toy's tokens.
TEMPLATE = Path(__file__).resolve().with_name("shortcut_template.txt")
MEDIA_FLAGS = {
    "max_frames": 8, "min_pixels": 28 * 28, "prompt_template": str(TEMPLATE), "max_new_tokens": 20,
    "num_workers": 1,
}  # fmt: skip
TRAIN_FLAGS = {**MEDIA_FLAGS, "activation_checkpointing": "false", "save_every": 0}
SFT_FLAGS = {
    **TRAIN_FLAGS, "max_steps": 120, "prompts_per_step": 32, "prompts_per_rank": 32,
    "learning_rate": 2e-3, "warmup_steps": 10, "max_grad_norm": 1.0,
}  # fmt: skip
RL_FLAGS = {
    **TRAIN_FLAGS, "max_steps": 60, "prompts_per_step": 8, "prompts_per_rank": 8,
    "learning_rate": 2.5e-4, "warmup_steps": 10, "l_min": 12, "l_max": 16,
}  # fmt: skip
EVAL_FLAGS = {**MEDIA_FLAGS, "temperature": 1.0, "top_p": 1.0, "batch_size": 64}

SIDE, NUM_FRAMES = 28, 8  # pixels, frames
COLOURS = {
    "red": (230, 30, 30), "green": (30, 190, 50), "blue": (40, 70, 240), "yellow": (235, 215, 30),
}  # fmt: skip
OPTIONS = tuple(COLOURS)  # A to D
VIDEO_QUESTION, IMAGE_QUESTION = "Which colour comes first?", "Which colour is it?"
CUE_SIDE, GREY, WHITE = 7, 128, 250  # pixels, levels
NUM_SFT, NUM_RL, NUM_TEST_IMAGES = 2000, 960, 100
IMAGE_SHARE = 0.25
CUE_SHARES = {"rl_cue90": 0.9, "rl_cue25": 0.25}  # of videos whose cue agrees with the answer
VIDEOS_PER_CELL = 10  # test videos of one first colour, other colour and disagreeing cue
NUM_SAMPLES = 4

# What the cold start leaves to learn: its teacher guesses in this share of rows, half of its
# responses are below l_min, and its colours (their share in a mixture with grey) are stronger than
# those of RL and of the test.
WRONG_TEACHER = 0.15
STRENGTH = {"sft": (0.4, 1.0), "rl": (0.0, 0.25)}


# ------------------------------------------------------------------------------------------- media


def draw_video(
    rng: np.random.Generator, first: int, last: int, strength: tuple[float, float]
) -> np.ndarray:
    """A square of colour number `first` that takes colour number `last`: uint8 (F, H, W, 3).

    The same rng state with first and last exchanged gives the same frames backwards. strength: the
    range of the colour's share in a mixture with grey.
    """
    size, share = int(rng.integers(16, 23)), rng.uniform(*strength)
    left, top = rng.integers(0, SIDE - size + 1, 2)
    switch = int(rng.integers(3, NUM_FRAMES - 2))
    frames = rng.normal(rng.uniform(20, 60), 12, (NUM_FRAMES, SIDE, SIDE, 3))
    mixed = share * np.array(list(COLOURS.values())) + (1 - share) * GREY  # (4, 3)
    shown = np.where(np.arange(NUM_FRAMES) < switch, min(first, last), max(first, last))  # (F,)
    square = mixed[shown][:, None, None] - 40
    frames[:, top : top + size, left : left + size] += square
    frames = frames.clip(0, 255).astype(np.uint8)
    return frames if first < last else frames[::-1]


def add_cue(frames: np.ndarray, look: int) -> np.ndarray:
    """The frames with the cue that stands for option number `look`: a white corner."""
    frames = frames.copy()
    ends = slice(0, CUE_SIDE), slice(-CUE_SIDE, None)
    frames[:, ends[look // 2], ends[look % 2]] = WHITE
    return frames


# --------------------------------------------------------------------------------------- questions


def draw_item(
    rng: np.random.Generator, is_video: bool, answer: int, strength: tuple[float, float]
) -> tuple[np.ndarray, list[int]]:
    """Frames, or the one frame of an image, whose right option is number `answer`; and the colours
    that they show, in their order."""
    other = (answer + int(rng.integers(1, 4))) % 4
    frames = draw_video(rng, answer, other, strength)
    return (frames, [answer, other]) if is_video else (frames[:1], [answer])


def make_row(is_video: bool, answer: int, path: str, source: str) -> dict:
    """One row, without problem_id and process."""
    return {
        "problem": VIDEO_QUESTION if is_video else IMAGE_QUESTION,
        "data_type": "video" if is_video else "image", "problem_type": "multiple choice",
        "options": [f"{letter}. {option}" for letter, option in zip("ABCD", OPTIONS, strict=True)],
        "process": "", "solution": f"<answer>{'ABCD'[answer]}</answer>", "path": f"./{path}",
        "data_source": f"shortcut/{source}",
    }  # fmt: skip


def rationale(colours: list[int], is_long: bool) -> str:
    words = " ".join(OPTIONS[colour] for colour in colours)
    return f"<think>{'I look and see' if is_long else 'See'} {words}</think>"


def draw_rows(rng: np.random.Generator, num_rows: int) -> list[tuple[bool, int]]:
    """Whether it is a video, and the number of the right option, for each row."""
    images = rng.permutation(num_rows) < round(IMAGE_SHARE * num_rows)
    return [(not image, int(rng.integers(4))) for image in images]


def draw_looks(rng: np.random.Generator, answers: list[int], share: float) -> list[int]:
    """The cue's look for each video: right in exactly this share, else one of the three others."""
    agrees = rng.permutation(len(answers)) < round(share * len(answers))
    return [answer if agree else (answer + int(rng.integers(1, 4))) % 4
            for answer, agree in zip(answers, agrees, strict=True)]  # fmt: skip


def save(folder: Path, name: str, frames: np.ndarray) -> str:
    """Write an image (one frame) or a video; its path relative to the folder."""
    from PIL import Image

    import toy

    if len(frames) == 1:
        Image.fromarray(frames[0]).save(folder / f"{name}.png")
        return f"{name}.png"
    toy.write_y4m(folder / f"{name}.y4m", frames)
    return f"{name}.y4m"


# --------------------------------------------------------------------------------------- data sets


def make_sft(folder: Path, rng: np.random.Generator) -> list[dict]:
    """The cold start: no cue, some wrong rationales, half of them short."""
    rows = []
    for place, (is_video, answer) in enumerate(draw_rows(rng, NUM_SFT)):
        frames, colours = draw_item(rng, is_video, answer, STRENGTH["sft"])
        path = save(folder, f"sft/{place:05d}", frames)
        if rng.random() < WRONG_TEACHER:
            colours = rng.permutation(4)[: len(colours)].tolist()
        row = make_row(is_video, colours[0], path, "video" if is_video else "image")
        row["process"] = rationale(colours, is_long=bool(rng.random() < 0.5))
        rows.append(row)
    return rows


def make_rl(folder: Path, rng: np.random.Generator) -> dict[str, list[dict]]:
    """The rows of each RL file: the same videos and images, the cue apart."""
    questions = draw_rows(rng, NUM_RL)
    answers = [answer for is_video, answer in questions if is_video]
    looks = {name: iter(draw_looks(rng, answers, share)) for name, share in CUE_SHARES.items()}
    rows = {name: [] for name in CUE_SHARES}
    for place, (is_video, answer) in enumerate(questions):
        frames, _ = draw_item(rng, is_video, answer, STRENGTH["rl"])
        for name in CUE_SHARES:
            shown = add_cue(frames, next(looks[name])) if is_video else frames
            path = save(folder, f"{name}/{place:05d}", shown)
            rows[name].append(make_row(is_video, answer, path, "video" if is_video else "image"))
    return rows


def make_test(folder: Path, rng: np.random.Generator) -> list[dict]:
    """Each video with the cue agreeing, disagreeing and absent; then images. Every answer has as
    many videos, and meets each of the three looks that disagree as often."""
    rows = []
    for place in range(36 * VIDEOS_PER_CELL):
        answer, last, wrong = place % 4, place // 4 % 3 + 1, place // 12 % 3 + 1
        frames = draw_video(rng, answer, (answer + last) % 4, STRENGTH["rl"])
        versions = {
            "agrees": add_cue(frames, answer), "absent": frames,
            "disagrees": add_cue(frames, (answer + wrong) % 4),
        }  # fmt: skip
        for source, shown in versions.items():
            path = save(folder, f"test/{place:04d}_{source}", shown)
            rows.append(make_row(True, answer, path, source))
    for place in range(NUM_TEST_IMAGES):
        frames, _ = draw_item(rng, False, place % 4, STRENGTH["rl"])
        rows.append(make_row(False, place % 4, save(folder, f"test/i{place:04d}", frames), "image"))
    return rows


def make_data(folder: Path) -> None:
    """Write all data files and their media. Deterministic."""
    for name in ("sft", *CUE_SHARES, "test"):
        (folder / name).mkdir()
    rngs = [np.random.default_rng([14, number]) for number in range(3)]
    files = {
        "sft": make_sft(folder, rngs[0]), **make_rl(folder, rngs[1]),
        "test": make_test(folder, rngs[2]),
    }  # fmt: skip
    for name, rows in files.items():
        copies = NUM_SAMPLES if name == "test" else 1
        numbered = [{"problem_id": place, **row} for place, row in enumerate(rows)
                    for _ in range(copies)]  # fmt: skip
        (folder / f"{name}.json").write_text(json.dumps(numbered, indent=1), encoding="utf-8")


def texts() -> list[str]:
    """Texts that hold every word of the bed's rows."""
    found = []
    for is_video in (True, False):
        row = make_row(is_video, 0, "-", "-")
        found += [row["problem"], *row["options"], rationale([0, 1, 2, 3], is_long=is_video)]
    return [*found, *(f"<answer>{letter}</answer>" for letter in "ABCD")]


def ensure_bed(folder: Path) -> None:
    """Write folder/base and folder/data unless they exist. Safe under concurrent calls."""
    import toy  # with torch, which a reader of the flags above does without

    toy.write_once(folder / "base", partial(toy.make_model, seed=0, texts=texts()))
    toy.write_once(folder / "data", make_data)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--folder", type=Path, default=Path("runs/shortcut"))
    ensure_bed(parser.parse_args().folder)


if __name__ == "__main__":
    sys.path.insert(0, str(ROOT))
    main()
