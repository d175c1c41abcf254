"""From rows of JSON to prompts: samples, the template, frames, patches, shuffling.

    Sample   one row of a data file, checked
    Prompt   one sample in one frame order, ready for the model

Shapes: F frames, H x W pixels, N patches of 14 x 14 pixels and 2 frames, S prompt tokens.
"""

import functools
import gc
import json
import os
import re
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from infra import video
from infra.distributed import log
from infra.errors import MediaError as MediaError  # read_frames raises it
from infra.errors import UserError, require
from infra.video import DecoderPool
from rewards import check_solution

PROBLEM_TYPES = ("multiple choice", "numerical", "OCR", "free-form", "regression")  # Section 3.1
VIDEO_SUFFIXES = (".mp4", ".webm", ".mkv", ".avi", ".mov", ".m4v", ".y4m")
ORDERS = ("ordered", "shuffled", "reversed", "single")

# Qwen2.5-VL: what its preprocessing does to frames, and how it cuts them.
VISION_TOKENS = (
    "<|image_pad|>", "<|video_pad|>", "<|vision_pad|>", "<|vision_start|>", "<|vision_end|>",
)  # fmt: skip
PATCH, MERGE, TEMPORAL_PATCH = 14, 2, 2  # pixels, patches per side, frames
FACTOR, MAX_ASPECT = PATCH * MERGE, 200  # pixels a side is a multiple of; long over short side
SIZE_RULE = {"factor": FACTOR, "max_aspect": MAX_ASPECT}
VIDEO_RULE = {"fps": 2.0, "min_frames": 4, **SIZE_RULE}
MIN_PIXELS, MAX_PIXELS, IMAGE_MAX_PIXELS = 4 * 28 * 28, 128 * 28 * 28, 256 * 28 * 28  # Section 4.1
CLIP_MEAN = (0.48145466, 0.4578275, 0.40821073)
CLIP_STD = (0.26862954, 0.26130258, 0.27577711)

# One template for annotation, both training stages and evaluation (App. C.1; the wording is ours,
# the paper's is in a figure that its text does not hold). --prompt_template FILE replaces it.
TEMPLATE = (
    "{question}\nFirst reason step by step between <think> and </think>, then give the final "
    "answer between <answer> and </answer>. {answer_format}"
)
ANSWER_FORMATS = {
    "multiple choice": "Answer with the letter of one option.",
    "numerical": "Answer with one number.",
    "OCR": "Answer with the text as it is written.",
    "free-form": "Answer in a short text.",
    "regression": "Answer with one number.",
}


@dataclass(frozen=True)
class Sample:
    """One row of a data file. `path` is resolved against the data root; `row` counts from 0."""

    problem_id: int | str
    problem: str
    data_type: str  # "image" or "video"
    problem_type: str  # one of PROBLEM_TYPES
    options: tuple[str, ...]
    solution: str
    path: str
    data_source: str
    process: str  # the chain of thought of SFT rows, else ""
    row: int
    extra: dict = field(default_factory=dict, compare=False)  # the keys that only some files have

    @property
    def is_video(self) -> bool:
        return self.data_type == "video"

    @property
    def identity(self) -> dict:
        """What names the sample in a run's records."""
        return {"row": self.row, "problem_id": self.problem_id, "path": self.path}

    @property
    def name(self) -> str:
        """How messages name it."""
        return f"row {self.row} (problem {self.problem_id})"

    @property
    def texts(self) -> str:
        """All that a tokenizer may see."""
        return "\n".join((self.problem, *self.options, self.process, self.solution))


@dataclass(frozen=True)
class Prompt:
    """One sample in one frame order, ready for the model.

    input_ids: int64 (S,), the placeholder repeated once per merged patch.
    vision_start: index of the first placeholder; the others follow it without a gap.
    pixel_values: float32 (N, 1176). grid_thw: int64 (3,), patches in time, height and width.
    seconds_per_grid: seconds between temporal patches (two frames), fractional; 0 for an image.
    """

    input_ids: Tensor
    vision_start: int
    pixel_values: Tensor
    grid_thw: Tensor
    seconds_per_grid: float
    is_video: bool
    order: str
    sample: Sample
    epoch: int = 0  # the pass over the data, part of the key of its random numbers

    @property
    def num_vision_tokens(self) -> int:
        return int(self.grid_thw.prod()) // MERGE**2


# ---------------------------------------------------------------------------------------- rows


def load_samples(path: str | Path, data_root: str | Path | None = None) -> list[Sample]:
    """Read a JSON list, or JSON lines, of rows in the official format.

    data_root is what the rows' paths are relative to, by default the file's folder. Raises
    UserError, naming the file, and the row (counted from 0) if it is one row's fault.
    """
    samples, faults = check_rows(path, data_root)
    if faults:
        raise UserError(faults[0])
    return samples


def load_usable_samples(config, check: Callable[[Sample], None]) -> list[Sample]:
    """The rows of --data that a stage trains on: of --data_types, without what it cannot use.

    `check` raises UserError for a sample that the stage cannot use. Raises UserError, naming the
    file and the first unusable row, unless --skip_bad_samples; or if no row is left.
    """
    samples, faults = check_rows(config.data, config.data_root or None)
    num_rows = len(samples) + len(faults)
    usable = []
    for sample in samples:
        if sample.data_type in config.data_types:
            try:
                require_no_vision_tokens(sample)
                check(sample)
                usable.append(sample)
            except UserError as error:
                faults.append(f"{config.data}, {error}")
    if faults and not config.skip_bad_samples:
        raise UserError(faults[0])
    if faults:
        log(f"--skip_bad_samples: {len(faults)} of {num_rows} rows are left out, the first: "
            f"{faults[0]}")  # fmt: skip
    kinds = " ".join(config.data_types)
    require(usable, f"--data {config.data} holds no usable row of --data_types {kinds}")
    return usable


def check_rows(
    path: str | Path, data_root: str | Path | None = None
) -> tuple[list[Sample], list[str]]:
    """load_samples, but with the rows that can be read, and a message for each that cannot.

    The messages of lines that are not JSON come first. UserError: the whole file's fault.
    """
    path = Path(path)
    root = Path(data_root) if data_root else path.parent
    find_base = functools.cache(functools.partial(_find_base, root))  # one look per top folder
    samples = []
    gc.disable()  # it would walk all rows read so far again and again: a third of the time
    try:
        rows, faults = read_rows(path)
        require(root.is_dir(), f"data root {root} is not a folder")
        require(rows or faults, f"{path} holds no rows")
        for number, row in rows.items():
            try:
                samples.append(_check_row(row, number, find_base))
            except UserError as error:
                faults.append(f"{path}, row {number}: {error}")
    finally:
        gc.enable()
    return samples, faults


def read_rows(path: Path) -> tuple[dict[int, object], list[str]]:
    """The rows of a file by their number, as they are, and a message for each that is not JSON."""
    text = _read_text(path, "data file")
    if text.lstrip()[:1] == "[":
        return dict(enumerate(_parse_json(text, str(path)))), []
    # Not splitlines, which also cuts at characters that a JSON text may hold.
    lines = [line for line in text.split("\n") if line.strip()]
    rows, faults = {}, []
    for number, line in enumerate(lines):
        try:
            rows[number] = _parse_json(line, f"{path}, row {number}")
        except UserError as error:
            faults.append(str(error))
    return rows, faults


def _read_text(path: str | Path, what: str) -> str:
    require(Path(path).is_file(), f"{what} {path} does not exist or is no file")
    try:
        return Path(path).read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as error:
        raise UserError(f"{what} {path} is not UTF-8: {error}") from None
    except OSError as error:
        raise UserError(f"{what} {path} cannot be read: {error.strerror}") from None


def _parse_json(text: str, where: str):
    try:
        return json.loads(text)
    except (ValueError, RecursionError) as error:  # no JSON, a number too long, nested too deeply
        raise UserError(f"{where} is not JSON: {error}") from None


def _check_row(row: object, number: int, find_base) -> Sample:
    if not isinstance(row, dict):
        raise UserError(f"expected an object, found {type(row).__name__}")
    row = dict(row)

    def text(key: str, required: bool = True) -> str:
        value = row.pop(key, None)
        if value is None and not required:
            return ""
        if not isinstance(value, str) or (required and not value.strip()):
            raise UserError(f"'{key}' must be a text that is not empty, found {value!r}")
        return value

    def one_of(key: str, allowed: tuple[str, ...]) -> str:
        value = text(key)
        for name in allowed:
            if value.strip().lower() == name.lower():
                return name
        raise UserError(f"unknown {key} {value!r}; known are {', '.join(allowed)}")

    relative = text("path")
    data_type = one_of("data_type", ("image", "video", "frame"))
    if data_type == "frame":  # of 200 rows of eval_mvbench that are videos
        data_type = "video" if relative.lower().endswith(VIDEO_SUFFIXES) else "image"
    options = row.pop("options", None)
    options = [] if options is None else options
    if not isinstance(options, list) or not all(isinstance(option, str) for option in options):
        raise UserError(f"'options' must be a list of texts, found {options!r}")
    problem_id = row.pop("problem_id", number)
    if not isinstance(problem_id, int | str):
        raise UserError(f"'problem_id' must be a number or a text, found {problem_id!r}")
    sample = Sample(
        problem_id=problem_id,
        problem=text("problem"),
        data_type=data_type,
        problem_type=one_of("problem_type", PROBLEM_TYPES),
        options=tuple(options),
        solution=text("solution"),
        path=_resolve(relative, find_base),
        data_source=text("data_source", required=False),
        process=text("process", required=False),
        row=number,
        extra=row,
    )
    try:  # JSON may hold half a surrogate pair, which is no character and no tokenizer takes
        f"{sample.texts}\n{relative}\n{sample.data_source}".encode()
    except UnicodeEncodeError as error:
        raise UserError(f"a text is not valid Unicode: {error}") from None
    return sample


def _resolve(relative: str, find_base) -> str:
    """The path of a row's file, which stays below the data root. (Without pathlib, which would take
    half of the time that a file of 263,071 rows takes.)"""
    parts = [part for part in relative.split("/") if part not in ("", ".")]
    if relative.startswith("/") or ".." in parts or "\0" in relative:
        raise UserError(f"'path' must stay inside the data root, found {relative!r}")
    return "/".join([find_base(parts[0] if parts else ""), *parts])


def _find_base(root: Path, top: str) -> str:
    """The folder that paths which begin with `top` are relative to: the root, or where that holds
    no `top`, its parent for a root `top` (Evaluation/), or Video-R1-data/ in it."""
    root = root.absolute()
    if not os.path.exists(root / top):  # False too for a name that is too long
        if root.name == top:
            root = root.parent
        elif os.path.exists(root / "Video-R1-data" / top):
            root = root / "Video-R1-data"
    return str(root)


# -------------------------------------------------------------------------------------- prompts


def load_template(path: str | None) -> str:
    """The prompt template: our own, or a text file with {question} and maybe {answer_format}."""
    if not path:
        return TEMPLATE
    template = _read_text(path, "--prompt_template").rstrip("\n")
    require("{question}" in template, f"--prompt_template {path} does not hold {{question}}")
    return template


def question_text(sample: Sample, template: str = TEMPLATE) -> str:
    """The user's turn without the video or image: the template, filled in a single pass."""
    question = sample.problem
    if sample.options:
        question = "\n".join([question, "Options:", *sample.options])
    texts = {"{question}": question, "{answer_format}": ANSWER_FORMATS[sample.problem_type]}
    return re.sub(r"{(question|answer_format)}", lambda match: texts[match[0]], template)


def make_prompt(
    sample: Sample,
    tokenizer,
    frames=None,
    order: str = "ordered",
    generator: torch.Generator | None = None,
    *,
    template: str = TEMPLATE,
    mean: tuple[float, ...] = CLIP_MEAN,
    std: tuple[float, ...] = CLIP_STD,
    **limits: int,
) -> Prompt:
    """Put one sample, with its frames in one order, through the chat template.

    Args:
        frames: the pair that read_frames returns, or uint8 (F, H, W, 3) alone, two a second; None:
            sample.path is read, within the limits of submit_decode.
        order: "ordered"; "shuffled", one permutation drawn from `generator`; "reversed";
            "single", the middle frame in place of every frame. An image has no order.
    Raises:
        MediaError: the file cannot be used. UserError: the question or the template holds a vision
            token of its own.
    """
    if frames is None:
        frames = video.read_media(**_decode_job(sample, **limits))
    frames, seconds = frames if isinstance(frames, tuple) else (frames, 0.5)
    frames = torch.as_tensor(frames)
    if sample.is_video:
        frames = reorder_frames(frames, order, generator)
    pixel_values, grid_thw = patchify(frames, mean, std)

    question = {"type": "text", "text": question_text(sample, template)}
    content = [{"type": sample.data_type}, question]
    text = tokenizer.apply_chat_template(
        [{"role": "user", "content": content}], tokenize=False, add_generation_prompt=True
    )
    ids = tokenizer(text, add_special_tokens=False)["input_ids"]
    vision_ids = [tokenizer.convert_tokens_to_ids(f"<|{kind}_pad|>") for kind in ("image", "video")]
    places = [place for place, token in enumerate(ids) if token in vision_ids]
    if len(places) != 1 or ids[places[0]] != vision_ids[sample.is_video]:
        raise UserError(
            f"{sample.name}: its prompt must hold one <|{sample.data_type}_pad|>, put there by the "
            f"chat template, but holds {len(places)} vision tokens: does the question or the "
            "template name one?"
        )
    start, count = places[0], int(grid_thw.prod()) // MERGE**2
    ids = ids[:start] + [ids[start]] * count + ids[start + 1 :]
    return Prompt(
        input_ids=torch.tensor(ids),
        vision_start=start,
        pixel_values=pixel_values,
        grid_thw=grid_thw,
        seconds_per_grid=TEMPORAL_PATCH * float(seconds) if sample.is_video else 0.0,
        is_video=sample.is_video,
        order=order if sample.is_video else "ordered",
        sample=sample,
    )


def response_ids(sample: Sample, tokenizer) -> Tensor:
    """The assistant's turn of an SFT row: process, line break, solution, end token. int64 (T,).

    Raises UserError: the row has no `process`, or spells a vision token.
    """
    require_process(sample)
    require_no_vision_tokens(sample)
    solution = sample.solution.strip()
    if "<answer>" not in solution:
        solution = f"<answer>{solution}</answer>"
    ids = tokenizer(f"{sample.process.strip()}\n{solution}", add_special_tokens=False)["input_ids"]
    return torch.tensor([*ids, tokenizer.eos_token_id])


def require_no_vision_tokens(sample: Sample) -> None:
    """Raise UserError, naming the row, if a text spells a vision token, which would become one."""
    texts = sample.texts
    for token in VISION_TOKENS:
        require(token not in texts, f"{sample.name} holds the vision token {token} as text")


def require_process(sample: Sample) -> None:
    """Raise UserError, naming the row, unless a sample has a chain of thought to learn."""
    require(sample.process.strip(), f"{sample.name} has no 'process' to learn from")


def require_solution(sample: Sample) -> None:
    """Raise UserError, naming the row, if no answer can ever match the solution: always reward 0,
    which looks like a model that fails."""
    try:
        check_solution(sample.solution, sample.problem_type)
    except ValueError as error:
        raise UserError(f"{sample.name}: {error}") from None


# --------------------------------------------------------------------------------------- frames


def read_frames(path, max_frames=16, min_pixels=MIN_PIXELS, max_pixels=MAX_PIXELS):
    """Decode a video as Qwen2.5-VL sees it: (uint8 (F, H, W, 3), seconds between two frames).

    F is even, two frames a second within 4 to max_frames; frame k is round(linspace(0, total - 1,
    F))[k]; H and W are multiples of 28, H * W in [min_pixels, max_pixels] where possible.
    Raises MediaError.
    """
    limits = {"max_frames": max_frames, "min_pixels": min_pixels, "max_pixels": max_pixels}
    return video.read_frames(path, **limits, **VIDEO_RULE)


def read_image(path, min_pixels=MIN_PIXELS, max_pixels=IMAGE_MAX_PIXELS) -> np.ndarray:
    """Decode an image as read_frames does a frame: uint8 (1, H, W, 3). Raises MediaError."""
    return video.read_image(path, min_pixels=min_pixels, max_pixels=max_pixels, **SIZE_RULE)


def submit_decode(pool: DecoderPool, sample: Sample, limits: dict[str, int]):
    """Start decoding a sample's file in a worker; a Future of (frames, seconds between frames)."""
    return pool.submit(**_decode_job(sample, **limits))


def _decode_job(
    sample: Sample, max_frames=16, min_pixels=MIN_PIXELS, max_pixels=MAX_PIXELS,
    image_max_pixels=IMAGE_MAX_PIXELS,
) -> dict:  # fmt: skip
    """The arguments of infra.video.read_media for a sample's file."""
    if sample.is_video:
        job = {"kind": "video", "path": video_path(sample.path), "max_frames": max_frames}
        return job | {"min_pixels": min_pixels, "max_pixels": max_pixels, **VIDEO_RULE}
    job = {"kind": "image", "path": sample.path}
    return job | {"min_pixels": min_pixels, "max_pixels": image_max_pixels, **SIZE_RULE}


def video_path(path: str) -> str:
    """The video, or the same one in another container: the data sets hold .webm for some .mp4."""
    paths = [path, *(str(Path(path).with_suffix(suffix)) for suffix in VIDEO_SUFFIXES)]
    return next((found for found in paths if os.path.exists(found)), path)


def reorder_frames(frames: Tensor, order: str, generator: torch.Generator | None = None) -> Tensor:
    """The frames (F, H, W, 3) in another order; before they are paired into temporal patches.

    A shuffle is never the identity where there is more than one frame: the shuffled group exists
    to be without the order.
    """
    count = len(frames)
    if order == "ordered":
        return frames
    if order == "reversed":
        return frames.flip(0)
    if order == "single":
        return frames[count // 2 : count // 2 + 1].expand(count, -1, -1, -1)
    require(order == "shuffled", f"order must be one of {', '.join(ORDERS)}, not {order!r}")
    places = torch.arange(count)
    while count > 1 and torch.equal(places, torch.arange(count)):
        places = torch.randperm(count, generator=generator)
    return frames[places]


def patchify(frames, mean=CLIP_MEAN, std=CLIP_STD) -> tuple[Tensor, Tensor]:
    """Cut frames into Qwen2.5-VL's patches.

    Args:
        frames: uint8 (F, H, W, 3), H and W multiples of 28. An odd F repeats the last frame.
        mean, std: of each colour channel, for values in [0, 1].
    Returns:
        pixel_values: float32 (N, 1176 = 3 colours x 2 frames x 14 x 14), the four patches that the
            model merges next to each other; grid_thw: int64 (3,), (F / 2, H / 14, W / 14).
    """
    frames = torch.as_tensor(frames)
    if len(frames) % TEMPORAL_PATCH:
        frames = torch.cat([frames, frames[-1:]])
    count, height, width, channels = frames.shape
    assert height % (PATCH * MERGE) == width % (PATCH * MERGE) == 0, "sides must be multiples of 28"
    t, h, w = count // TEMPORAL_PATCH, height // PATCH, width // PATCH
    scale = 255 * torch.tensor(std, dtype=torch.float32)
    shift = 255 * torch.tensor(mean, dtype=torch.float32)
    pixels = (frames.float() - shift) / scale  # (F, H, W, 3)
    pixels = pixels.view(
        t, TEMPORAL_PATCH, h // MERGE, MERGE, PATCH, w // MERGE, MERGE, PATCH, channels
    )
    pixels = pixels.permute(0, 2, 5, 3, 6, 8, 1, 4, 7)  # (t, h/2, w/2, 2, 2, 3, 2, 14, 14)
    return pixels.reshape(t * h * w, -1), torch.tensor([t, h, w])


if __name__ == "__main__":
    from evaluation.check_data import main
    from infra.distributed import run_main

    run_main(main)
