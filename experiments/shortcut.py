"""The study's test bed: videos whose answer is the order of frames, beside a shortcut.

    python experiments/shortcut.py --folder runs/shortcut

writes, once, a tiny model and its data in the official formats:

    base                    random weights
    data/sft.json           the cold start, without the cue
    data/rl_cue90.json      RL: the cue agrees with the answer in 90% of the videos
    data/rl_cue25.json      the same videos with the cue at chance
    data/test.json          the same test videos three times, and images

A question is about a square that moves, changes its size or brightness, or its colour. Played
backwards, a video has the same frames and another answer. The shortcut is a coloured patch in a
corner of every frame: each letter has a colour (CUES). The images ask for what a video shows at one
end: where the square is, how it looks.

Test rows are named by what their cue does: shortcut/agrees, shortcut/disagrees, shortcut/absent,
shortcut/image/*. Each item stands there NUM_SAMPLES times with one problem_id, so that one run of
eval.py at temperature 1 (EVAL_FLAGS) draws that many responses to it.
"""

import argparse
import json
import sys
from functools import partial
from pathlib import Path

import numpy as np

ROOT = Path(__file__).resolve().parents[1]

# The flags of each script on the bed, beside --model, --data, --output_dir and --seed.
# Small frames, a prompt of the question and its options alone: a third of the tokens.
TEMPLATE = Path(__file__).resolve().with_name("shortcut_template.txt")
MEDIA_FLAGS = {
    "max_frames": 8, "min_pixels": 28 * 28, "prompt_template": str(TEMPLATE), "max_new_tokens": 20,
    "num_workers": 1,
}  # fmt: skip
TRAIN_FLAGS = {**MEDIA_FLAGS, "activation_checkpointing": "false", "save_every": 0}
SFT_FLAGS = {
    **TRAIN_FLAGS, "max_steps": 300, "prompts_per_step": 32, "prompts_per_rank": 32,
    "learning_rate": 1e-3, "warmup_steps": 10, "max_grad_norm": 1.0,
}  # fmt: skip
RL_FLAGS = {
    **TRAIN_FLAGS, "max_steps": 150, "prompts_per_step": 8, "prompts_per_rank": 8,
    "learning_rate": 4e-4, "warmup_steps": 10, "l_min": 12, "l_max": 16,
}  # fmt: skip
EVAL_FLAGS = {**MEDIA_FLAGS, "temperature": 1.0, "top_p": 1.0, "batch_size": 64}

SIDE, NUM_FRAMES = 28, 8  # pixels, frames
COLOURS = {
    "red": (220, 40, 40), "green": (40, 180, 60), "blue": (50, 80, 230), "yellow": (230, 210, 40),
}  # fmt: skip
# A kind of video: question, options A to D, and for each option the state that it is about. The
# states of A and B, and of C and D, are the two ends of one change; of colours any two are.
KINDS = {
    "direction": ("Which way does the square move?", ("left", "right", "up", "down"),
                  ("left", "right", "top", "bottom"), "Where is the square?"),
    "change": ("What happens to the square?", ("grows", "shrinks", "brightens", "darkens"),
               ("large", "small", "bright", "dark"), "How does the square look?"),
    "colour": ("Which colour comes first?", tuple(COLOURS),
               tuple(COLOURS), "Which colour is the square?"),
}  # fmt: skip
CUES = ((220, 60, 220), (60, 220, 220), (240, 140, 30), (245, 245, 245))  # of A, B, C, D
CUE_SIDE = 6  # pixels
NUM_SFT, NUM_RL, NUM_TEST_IMAGES = 2400, 1200, 120
IMAGE_SHARE = 0.25
CUE_SHARES = {"rl_cue90": 0.9, "rl_cue25": 0.25}  # of videos whose cue agrees with the answer
VIDEOS_PER_CELL = 10  # test videos of one kind, answer and disagreeing cue
NUM_SAMPLES = 4

# What the cold start leaves to learn: its teacher guesses in this share of rows, and half of its
# responses are below l_min.
WRONG_TEACHER = 0.3


# ------------------------------------------------------------------------------------------- media


def draw_video(rng: np.random.Generator, start: str, end: str, full: bool = False) -> np.ndarray:
    """A square that goes from one state to another: uint8 (F, H, W, 3).

    The same rng state with start and end exchanged gives the same frames backwards. full: all the
    way, else 40% to 100% of it.
    """
    states = [state for _, _, states, _ in KINDS.values() for state in states]
    low, high = sorted((start, end), key=states.index)
    shade, x, y, size = rng.integers(0, 60), *rng.random(2), rng.integers(7, 11)
    colour = COLOURS[str(rng.choice(list(COLOURS)))]
    way = 1.0 if full else rng.uniform(0.4, 1.0)
    first, switch = rng.uniform(0, 1 - way), rng.uniform(0.35, 0.65)
    along = np.linspace(first, first + way, NUM_FRAMES)
    frames = np.full((NUM_FRAMES, SIDE, SIDE, 3), shade, np.uint8)
    for frame, t in zip(frames, along, strict=True):
        if low == "left":
            x = t
        elif low == "top":
            y = t
        elif low == "large":
            size = round(18 - 14 * t)
        elif low == "bright":
            colour = (round(250 - 160 * t),) * 3
        else:
            colour = COLOURS[low if t < first + switch * way else high]
        left, top = round(x * (SIDE - size)), round(y * (SIDE - size))
        frame[top : top + size, left : left + size] = colour
    return frames if low == start else frames[::-1]


def add_cue(frames: np.ndarray, look: int) -> np.ndarray:
    """The frames with the cue that stands for option number `look`."""
    frames = frames.copy()
    frames[:, :CUE_SIDE, :CUE_SIDE] = CUES[look]
    return frames


# --------------------------------------------------------------------------------------- questions


def draw_item(
    rng: np.random.Generator, kind: str, is_video: bool, answer: int
) -> tuple[np.ndarray, list[str]]:
    """Frames, or the one frame of an image, whose right option is number `answer`; and the states
    that they show, in their order."""
    states = KINDS[kind][2]
    other = answer ^ 1  # the other end
    if kind == "colour":
        other = int(rng.choice([k for k in range(4) if k != answer]))
    if not is_video:
        return draw_video(rng, states[other], states[answer], full=True)[-1:], [states[answer]]
    ends = [states[other], states[answer]]
    if kind == "colour":
        ends.reverse()
    return draw_video(rng, *ends), ends


def make_row(kind: str, is_video: bool, answer: int, path: str, source: str) -> dict:
    """One row, without problem_id and process."""
    video_question, video_options, states, image_question = KINDS[kind]
    options = video_options if is_video else states
    return {
        "problem": video_question if is_video else image_question,
        "data_type": "video" if is_video else "image", "problem_type": "multiple choice",
        "options": [f"{letter}. {option}" for letter, option in zip("ABCD", options, strict=True)],
        "process": "", "solution": f"<answer>{'ABCD'[answer]}</answer>", "path": f"./{path}",
        "data_source": f"shortcut/{source}",
    }  # fmt: skip


def rationale(states: list[str], is_long: bool) -> str:
    return f"<think>{'I look and see' if is_long else 'See'} {' '.join(states)}</think>"


def draw_rows(rng: np.random.Generator, num_rows: int) -> list[tuple[str, bool, int]]:
    """Kind, whether it is a video, and number of the right option for each row."""
    kinds = [list(KINDS)[k % len(KINDS)] for k in range(num_rows)]
    images = rng.permutation(num_rows) < round(IMAGE_SHARE * num_rows)
    return [(kind, not image, int(rng.integers(4)))
            for kind, image in zip(kinds, images, strict=True)]  # fmt: skip


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
    for place, (kind, is_video, answer) in enumerate(draw_rows(rng, NUM_SFT)):
        frames, ends = draw_item(rng, kind, is_video, answer)
        path = save(folder, f"sft/{place:05d}", frames)
        taught = answer
        if rng.random() < WRONG_TEACHER:
            taught = int(rng.integers(4))
            _, ends = draw_item(rng, kind, is_video, taught)
        row = make_row(kind, is_video, taught, path, kind if is_video else f"image/{kind}")
        row["process"] = rationale(ends, is_long=bool(rng.random() < 0.5))
        rows.append(row)
    return rows


def make_rl(folder: Path, rng: np.random.Generator) -> dict[str, list[dict]]:
    """The rows of each RL file: the same videos and images, the cue apart."""
    questions = draw_rows(rng, NUM_RL)
    answers = [answer for _, is_video, answer in questions if is_video]
    looks = {name: iter(draw_looks(rng, answers, share)) for name, share in CUE_SHARES.items()}
    rows = {name: [] for name in CUE_SHARES}
    for place, (kind, is_video, answer) in enumerate(questions):
        frames, _ = draw_item(rng, kind, is_video, answer)
        for name in CUE_SHARES:
            shown = add_cue(frames, next(looks[name])) if is_video else frames
            path = save(folder, f"{name}/{place:05d}", shown)
            source = kind if is_video else f"image/{kind}"
            rows[name].append(make_row(kind, is_video, answer, path, source))
    return rows


def make_test(folder: Path, rng: np.random.Generator) -> list[dict]:
    """Each video with the cue agreeing, disagreeing and absent. Every kind and answer has as many
    videos, and meets each of the three looks that disagree as often."""
    rows, place = [], 0
    for kind in KINDS:
        for cell in range(4 * 3 * VIDEOS_PER_CELL):
            answer, wrong = cell % 4, cell // 4 % 3 + 1
            frames, _ = draw_item(rng, kind, True, answer)
            versions = {
                "agrees": add_cue(frames, answer), "absent": frames,
                "disagrees": add_cue(frames, (answer + wrong) % 4),
            }  # fmt: skip
            for source, shown in versions.items():
                path = save(folder, f"test/{place:04d}_{source}", shown)
                rows.append(make_row(kind, True, answer, path, source))
            place += 1
        for cell in range(NUM_TEST_IMAGES // len(KINDS)):
            frames, _ = draw_item(rng, kind, False, cell % 4)
            path = save(folder, f"test/{place:04d}", frames)
            rows.append(make_row(kind, False, cell % 4, path, f"image/{kind}"))
            place += 1
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
    for kind, (_, _, states, _) in KINDS.items():
        for is_video in (True, False):
            row = make_row(kind, is_video, 0, "-", "-")
            found += [row["problem"], *row["options"], rationale(list(states), is_long=True)]
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
