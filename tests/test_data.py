"""data.py: rows, prompts, patches, orders of frames.

Patches are checked against transformers' image processor and against a slow loop written here.
"""

import itertools
import json
from dataclasses import replace

import numpy as np
import pytest
import torch
from PIL import Image
from transformers import AutoTokenizer

import data
from infra.errors import MediaError, UserError

SIDE = 56  # pixels: 4 x 4 patches, 2 x 2 after merging
ROW = {
    "problem_id": 7, "problem": "Which way does it go?", "data_type": "video",
    "problem_type": "multiple choice", "options": ["A. left", "B. right"],
    "process": "<think>It goes left.</think>", "solution": "<answer>A</answer>",
    "path": "./LLaVA/ytb_1.mp4", "data_source": "LLaVA",
}  # fmt: skip


def without(*keys, **changes):
    return {key: value for key, value in {**ROW, **changes}.items() if key not in keys}


def write_rows(folder, rows, layout="json"):
    file = folder / f"rows.{layout}"
    lines = "\n".join(json.dumps(row) for row in rows)
    file.write_text(json.dumps(rows, indent=1) if layout == "json" else lines, encoding="utf-8")
    return file


def make_sample(**changes):
    sample = data.Sample(7, "Which way does it go?", "video", "multiple choice",
                         ("A. left", "B. right"), "<answer>A</answer>", "clip.mp4", "toy",
                         "<think>It goes left.</think>", row=41)  # fmt: skip
    return replace(sample, **changes)


def make_image_sample(**changes):
    return make_sample(data_type="image", problem_type="OCR", options=(),
                       **{"path": "a.png"} | changes)  # fmt: skip


def noise(num_frames, height=SIDE, width=SIDE):
    shape = (num_frames, height, width, 3)
    return np.random.default_rng(0).integers(0, 256, shape, np.uint8)


def numbered(num_frames):
    """Frames that tell their number: frame k is grey of value 10 k."""
    grey = np.arange(num_frames, dtype=np.uint8) * 10
    return np.broadcast_to(grey[:, None, None, None], (num_frames, SIDE, SIDE, 3)).copy()


def seeded(seed):
    return torch.Generator().manual_seed(seed)


@pytest.fixture(scope="module")
def tokenizer(toy_folder):
    return AutoTokenizer.from_pretrained(toy_folder / "runs/toy/base")


# ------------------------------------------------------------------------------- rows that are good


@pytest.mark.parametrize("layout", ["json", "jsonl"])
def test_load_samples_reads_both_layouts(tmp_path, layout):
    rows = [ROW, {**ROW, "problem_id": 8, "problem": "它去哪里了? 😀", "path": "b/c.png",
                  "data_type": "image"}]  # fmt: skip
    first, second = data.load_samples(write_rows(tmp_path, rows, layout))
    assert first == data.Sample(
        7, ROW["problem"], "video", "multiple choice", ("A. left", "B. right"),
        "<answer>A</answer>", str(tmp_path / "LLaVA/ytb_1.mp4"), "LLaVA", ROW["process"], 0,
    )  # fmt: skip
    assert first.is_video
    assert (second.problem_id, second.row, second.problem) == (8, 1, "它去哪里了? 😀")
    assert second.path == str(tmp_path / "b/c.png")
    assert not second.is_video


def test_json_lines_may_have_blank_lines_dos_ends_and_separators_in_texts(tmp_path):
    file = tmp_path / "rows.jsonl"
    row = json.dumps({**ROW, "problem": "a\u2028b\x85c"}, ensure_ascii=False)
    file.write_bytes(f"\r\n{row}\r\n\r\n{row}\r\n".encode())
    samples = data.load_samples(file)
    assert [(sample.row, sample.problem) for sample in samples] == [
        (0, "a\u2028b\x85c"), (1, "a\u2028b\x85c")]  # fmt: skip


def test_a_video_in_another_container_is_found(tmp_path):
    named, there = str(tmp_path / "a.mp4"), tmp_path / "a.webm"
    assert data.video_path(named) == named
    there.touch()
    assert data.video_path(named) == str(there)
    (tmp_path / "a.mp4").touch()
    assert data.video_path(named) == named


@pytest.mark.parametrize(
    ("relative", "given", "found"),
    [
        ("Evaluation/a.mp4", "", "Evaluation/a.mp4"),
        ("Evaluation/a.mp4", "Evaluation", "Evaluation/a.mp4"),
        ("LLaVA/b.mp4", "", "Video-R1-data/LLaVA/b.mp4"),
        ("LLaVA/b.mp4", "Video-R1-data", "Video-R1-data/LLaVA/b.mp4"),
        ("none/c.mp4", "", "none/c.mp4"),
    ],
)
def test_the_root_is_or_holds_the_official_folders(tmp_path, relative, given, found):
    for folder in ("Evaluation", "Video-R1-data/LLaVA"):
        (tmp_path / folder).mkdir(parents=True)
    file = write_rows(tmp_path, [without(path=f"./{relative}")])
    (sample,) = data.load_samples(file, tmp_path / given)
    assert sample.path == str(tmp_path / found)


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({"options": None}, {"options": ()}),
        ({"options": ["A) no"]}, {"options": ("A) no",)}),
        ({"problem_type": "Multiple Choice"}, {"problem_type": "multiple choice"}),
        ({"problem_type": "ocr"}, {"problem_type": "OCR"}),
        ({"data_type": "Video", "path": "a.mp4"}, {"data_type": "video"}),
        ({"data_type": "frame", "path": "tvqa/a.WEBM"}, {"data_type": "video"}),  # MVBench
        ({"data_type": "frame", "path": "tvqa/a.jpg"}, {"data_type": "image"}),
        ({"start": 1.5, "row": 3}, {"extra": {"start": 1.5, "row": 3}, "row": 0}),
    ],
)
def test_irregularities_of_the_official_files(tmp_path, changes, expected):
    (sample,) = data.load_samples(write_rows(tmp_path, [ROW | changes]))
    assert {name: getattr(sample, name) for name in expected} == expected


def test_keys_that_may_be_missing(tmp_path):
    row = without("options", "process", "data_source", "problem_id")
    first, second = data.load_samples(write_rows(tmp_path, [row, row]))
    assert (first.options, first.process, first.data_source) == ((), "", "")
    assert (first.problem_id, second.problem_id) == (0, 1)  # the row's number


# ---------------------------------------------------------------------------- rows that are refused


@pytest.mark.parametrize(
    ("row", "reason"),
    [
        (without("solution"), "'solution' must be a text"),
        (without(solution=" \n"), "'solution' must be a text"),
        (without(solution=3), "'solution' must be a text"),
        (without("problem"), "'problem' must be a text"),
        (without(path=None), "'path' must be a text"),
        (without(data_type="audio"), "unknown data_type 'audio'"),
        (without("problem_type"), "'problem_type' must be"),
        (without(problem_type="essay"), "unknown problem_type 'essay'"),
        (without(options="A. left"), "'options' must be a list"),
        (without(options=["A", 2]), "'options' must be a list"),
        (without(options=["\ud800"]), "not valid Unicode"),
        (without(problem_id=1.5), "'problem_id' must be"),
        (without(process=5), "'process' must be"),
        (without(path="a/../../b.mp4"), "must stay inside the data root"),
        (without(path="/etc/passwd"), "must stay inside the data root"),
        (without(path="a\0.mp4"), "must stay inside the data root"),
        ([ROW], "expected an object, found list"),
    ],
)  # fmt: skip
def test_refused_row_is_named(tmp_path, row, reason):
    for layout in ("json", "jsonl"):
        file = write_rows(tmp_path, [ROW, ROW, row, ROW], layout)
        with pytest.raises(UserError) as error:
            data.load_samples(file)
        assert str(error.value).startswith(f"{file}, row 2: ")
        assert reason in str(error.value)


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        pytest.param(b" \n\n", "holds no rows", id="blank"),
        pytest.param(b"[]", "holds no rows", id="empty list"),
        pytest.param(b'[{"problem": "a"', "is not JSON", id="cut list"),
        pytest.param(b'{\n "problem": "a"\n}', "row 0 is not JSON", id="object over lines"),
        pytest.param(b'{}\n{"problem"', "row 1 is not JSON", id="cut line"),
        pytest.param(b'[{"problem": "\xff"}]', "is not UTF-8", id="bytes"),
        pytest.param(b"1\n2\n", "row 0: expected an object, found int", id="lines of numbers"),
        pytest.param(b"[" * 100_000, "is not JSON", id="endless nesting"),
        pytest.param(b'[{"problem_id": ' + b"1" * 5000 + b"}]", "is not JSON", id="5000 digits"),
    ],
)  # fmt: skip
def test_broken_file_is_named(tmp_path, content, reason):
    file = tmp_path / "rows.json"
    file.write_bytes(content)
    with pytest.raises(UserError) as error:
        data.load_samples(file)
    assert str(file) in str(error.value)
    assert reason in str(error.value)


@pytest.mark.parametrize("name", ["nowhere.json", "", "folder\0"])
def test_missing_file_is_named(tmp_path, name):
    path = tmp_path / name  # "": a folder
    with pytest.raises(UserError, match="does not exist") as error:
        data.load_samples(path)
    assert str(path) in str(error.value)


# ----------------------------------------------------------------------------------- the template


def test_the_template_asks_for_the_tags_and_has_a_line_per_type():
    for problem_type, line in data.ANSWER_FORMATS.items():
        text = data.question_text(make_sample(problem_type=problem_type))
        assert text.startswith("Which way does it go?\nOptions:\nA. left\nB. right\n")
        assert all(tag in text for tag in ("<think>", "</think>", "<answer>", "</answer>"))
        assert text.endswith(line) and "{" not in text


def test_braces_in_a_question_are_left_as_they_are(tmp_path):
    """Fault 27: a second {question} of a template stayed as it is."""
    file = tmp_path / "template.txt"
    file.write_text("问 {answer_format} | {question} | {answer_format} {other} {question}\n\n",
                    encoding="utf-8")  # fmt: skip
    template, line = data.load_template(str(file)), data.ANSWER_FORMATS["multiple choice"]
    for problem in ("What is {question} {answer_format}?", "f({x}) = {{y}} {0} {", r"\1 \g<0> %s"):
        assert data.question_text(make_sample(problem=problem, options=()), template) == (
            f"问 {line} | {problem} | {line} {{other}} {problem}")  # fmt: skip


@pytest.mark.parametrize(
    ("content", "reason"),
    [(b"Question: ", "does not hold {question}"), (None, "does not exist"),
     (b"{question}\xff", "template.txt")],
)  # fmt: skip
def test_refused_template_file_is_named(tmp_path, content, reason):
    file = tmp_path / "template.txt"
    if content is not None:
        file.write_bytes(content)
    with pytest.raises(UserError) as error:
        data.load_template(str(file))
    assert reason in str(error.value)
    assert f"--prompt_template {file}" in str(error.value)


# --------------------------------------------------------------------------------------- prompts


@pytest.mark.parametrize(
    ("kind", "num_frames", "height", "width", "grid", "count"),
    [
        ("video", 4, 56, 56, (2, 4, 4), 8),
        ("video", 5, 28, 84, (3, 2, 6), 9),  # an odd number of frames
        ("image", 1, 28, 84, (1, 2, 6), 3),
    ],
)
def test_placeholders(tokenizer, kind, num_frames, height, width, grid, count):
    sample = make_sample(data_type=kind)
    prompt = data.make_prompt(sample, tokenizer, noise(num_frames, height, width))
    assert prompt.grid_thw.tolist() == list(grid)
    assert prompt.grid_thw.dtype == prompt.input_ids.dtype == torch.int64
    assert prompt.pixel_values.shape == (np.prod(grid), 1176)
    assert prompt.pixel_values.dtype == torch.float32
    assert prompt.num_vision_tokens == count
    assert prompt.is_video == (kind == "video")

    pad, ids = tokenizer.convert_tokens_to_ids(f"<|{kind}_pad|>"), prompt.input_ids.tolist()
    first = prompt.vision_start
    assert [i for i, token in enumerate(ids) if token == pad] == [*range(first, first + count)]
    once = ids[:first] + ids[first + count - 1 :]  # one placeholder: what the chat template wrote
    assert tokenizer.decode(once) == (
        "<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n"
        f"<|im_start|>user\n<|vision_start|><|{kind}_pad|><|vision_end|>"
        f"{data.question_text(sample)}<|im_end|>\n<|im_start|>assistant\n"
    )


def test_frames_as_array_tensor_and_pair_give_the_same_prompt(tokenizer):
    frames = noise(4)
    before = frames.copy()
    forms = (frames, torch.from_numpy(frames), (frames, 0.5), (torch.from_numpy(frames), 0.5))
    prompts = [data.make_prompt(make_sample(), tokenizer, form) for form in forms]
    for prompt in prompts[1:]:
        assert torch.equal(prompt.input_ids, prompts[0].input_ids)
        assert torch.equal(prompt.pixel_values, prompts[0].pixel_values)
        assert prompt.seconds_per_grid == prompts[0].seconds_per_grid == 1.0
    np.testing.assert_array_equal(frames, before)
    thirds = data.make_prompt(make_sample(), tokenizer, (frames, 1 / 3))
    assert thirds.seconds_per_grid == 2 / 3  # not rounded
    image = data.make_prompt(make_image_sample(), tokenizer, (frames[:1], 1 / 3))
    assert image.seconds_per_grid == 0


def test_frames_are_read_from_the_path_within_the_limits(tokenizer, toy_folder, tmp_path):
    samples = data.load_samples(toy_folder / "runs/toy/data/test.json")
    clip = next(sample for sample in samples if sample.is_video)
    expected, seconds = data.read_frames(clip.path, max_frames=4)
    plain = (0, 0, 0), (1, 1, 1)  # mean and standard deviation
    prompt = data.make_prompt(clip, tokenizer, max_frames=4, mean=plain[0], std=plain[1])
    assert torch.equal(prompt.pixel_values, data.patchify(expected, *plain)[0])
    assert prompt.grid_thw[0] == 2
    assert prompt.seconds_per_grid == 2 * seconds == 2.0  # 4 seconds, 4 frames

    Image.fromarray(noise(1, 300, 300)[0]).save(tmp_path / "a.png")
    picture = make_image_sample(path=str(tmp_path / "a.png"))
    small = data.make_prompt(picture, tokenizer, max_pixels=1, image_max_pixels=17 * 28 * 28)
    assert small.grid_thw.tolist() == [1, 8, 8]  # image_max_pixels, not the clips' limit
    assert data.make_prompt(picture, tokenizer).grid_thw.tolist() == [1, 22, 22]

    with pytest.raises(MediaError, match=r"nowhere\.mp4"):
        data.make_prompt(make_sample(path=str(tmp_path / "nowhere.mp4")), tokenizer)


@pytest.mark.parametrize("token", ["<|video_pad|>", "<|image_pad|>"])
@pytest.mark.parametrize(
    ("problem", "template"), [("What is {}?", "{question}"), ("What?", "{question} {}")]
)
def test_vision_token_in_the_text_is_refused(tokenizer, token, problem, template):
    sample = make_sample(problem=problem.replace("{}", token))
    with pytest.raises(UserError, match=r"row 41.*vision token"):
        data.make_prompt(sample, tokenizer, noise(1), template=template.replace("{}", token))


# ------------------------------------------------------------------------------------- responses


@pytest.mark.parametrize(
    ("process", "solution", "expected"),
    [
        ("<think>左 😀</think>", "<answer>A</answer>", "<think>左 😀</think>\n<answer>A</answer>"),
        (" <think>left</think>\n\n", " A\n", "<think>left</think>\n<answer>A</answer>"),
    ],
)
def test_response_is_the_assistants_turn_alone(tokenizer, process, solution, expected):
    ids = data.response_ids(make_sample(process=process, solution=solution), tokenizer)
    assert ids.dtype == torch.int64
    expected = tokenizer(expected, add_special_tokens=False)["input_ids"]
    assert ids.tolist() == [*expected, tokenizer.eos_token_id]


@pytest.mark.parametrize(
    ("changes", "reason"),
    [({"process": " \n"}, "has no 'process'"), ({"process": "<|video_pad|>"}, "vision token"),
     ({"solution": "<|image_pad|>"}, "vision token")],
)  # fmt: skip
def test_an_unusable_response_is_named(tokenizer, changes, reason):
    with pytest.raises(UserError, match=f"row 41.*{reason}"):
        data.response_ids(make_sample(**changes), tokenizer)


# ------------------------------------------------------------------------------- orders of frames


def shuffled(count, generator):
    frames = torch.arange(count).view(count, 1, 1, 1)
    return tuple(data.reorder_frames(frames, "shuffled", generator).flatten().tolist())


def test_shuffle_is_uniform_over_the_permutations_but_the_identity():
    generator, draws = seeded(0), 3000
    counts = dict.fromkeys(itertools.permutations(range(3)), 0)
    for _ in range(draws):
        counts[shuffled(3, generator)] += 1
    assert counts.pop((0, 1, 2)) == 0
    expected = draws / len(counts)
    chi_squared = sum((count - expected) ** 2 / expected for count in counts.values())
    assert chi_squared < 18.47  # p > 0.001 at 4 degrees of freedom


def test_shuffle_is_decided_by_the_generator_alone():
    torch.manual_seed(1)
    first = shuffled(8, seeded(3))
    torch.manual_seed(2)
    assert shuffled(8, seeded(3)) == first
    assert len({shuffled(8, seeded(seed)) for seed in range(20)}) > 15


def test_unknown_order_is_named():
    with pytest.raises(ValueError, match=r"ordered, shuffled, reversed, single.*'sideways'"):
        data.reorder_frames(torch.zeros(2, 1, 1, 3), "sideways")


def frames_of(prompt):
    """The number of the frame that each half of each temporal patch shows, of numbered frames."""
    mean, std = torch.tensor(data.CLIP_MEAN[0]), torch.tensor(data.CLIP_STD[0])
    t, h, w = prompt.grid_thw.tolist()
    pixels = prompt.pixel_values.view(t, h * w, 3, 2, 14 * 14)[:, :, 0]  # (t, N, 2, pixels)
    pixels = ((pixels * std + mean) * 25.5).round()
    numbers = pixels[:, 0, :, 0]  # (t, 2)
    assert (pixels == numbers[:, None, :, None]).all()  # the same over the whole frame
    return numbers.flatten().int().tolist()


@pytest.mark.parametrize(
    ("order", "count", "expected"),
    [
        ("ordered", 3, [0, 1, 2, 2]), ("reversed", 6, [5, 4, 3, 2, 1, 0]),
        ("reversed", 3, [2, 1, 0, 0]), ("single", 4, [2, 2, 2, 2]), ("single", 5, [2] * 6),
        ("shuffled", 1, [0, 0]), ("shuffled", 2, [1, 0]),
    ],
)  # fmt: skip
def test_frames_are_reordered_before_they_are_paired(tokenizer, order, count, expected):
    frames = numbered(count)
    prompt = data.make_prompt(make_sample(), tokenizer, frames, order, seeded(0))
    assert frames_of(prompt) == expected
    assert prompt.order == order
    np.testing.assert_array_equal(frames, numbered(count))
    image = data.make_prompt(make_image_sample(), tokenizer, frames[:1], order, seeded(0))
    assert image.order == "ordered"  # an image knows none


def test_frames_are_shuffled_before_they_are_paired(tokenizer):
    split = 0
    for seed in range(20):
        prompt = data.make_prompt(make_sample(), tokenizer, numbered(8), "shuffled", seeded(seed))
        expected = shuffled(8, seeded(seed))
        assert frames_of(prompt) == list(expected)
        assert sorted(expected) == [*range(8)]
        pairs = {frozenset(expected[place : place + 2]) for place in range(0, 8, 2)}
        split += pairs != {frozenset({k, k + 1}) for k in range(0, 8, 2)}
    assert split > 15  # a shuffle of ready pairs would keep them together


# --------------------------------------------------------------------------------------- patches


def slow_patchify(frames, mean, std):
    """Patch by patch and pixel row by pixel row, in float64."""
    frames = list(np.asarray(frames, np.float64))
    if len(frames) % 2:
        frames.append(frames[-1])
    height, width, _ = frames[0].shape
    patches = []
    for t in range(0, len(frames), 2):
        for block_y, block_x in itertools.product(range(0, height, 28), range(0, width, 28)):
            for y, x in itertools.product((block_y, block_y + 14), (block_x, block_x + 14)):
                patch = []
                for colour in range(3):
                    for frame in frames[t : t + 2]:
                        for row in frame[y : y + 14, x : x + 14, colour]:
                            patch += [(value / 255 - mean[colour]) / std[colour] for value in row]
                patches.append(patch)
    return np.array(patches), [len(frames) // 2, height // 14, width // 14]


@pytest.mark.parametrize(
    ("num_frames", "height", "width"), [(1, 28, 28), (2, 28, 56), (3, 56, 84)]
)
def test_patchify_is_the_slow_loop(num_frames, height, width):
    frames = noise(num_frames, height, width)
    mean, std = (0.5, 0.4, 0.3), (0.2, 0.25, 0.3)
    pixel_values, grid = data.patchify(frames, mean, std)
    expected, expected_grid = slow_patchify(frames, mean, std)
    assert grid.tolist() == expected_grid
    assert pixel_values.dtype == torch.float32
    np.testing.assert_allclose(pixel_values.numpy(), expected, rtol=0, atol=2e-6)


@pytest.mark.parametrize(("height", "width"), [(84, 140), (252, 112)])
def test_patchify_is_transformers_image_processor(height, width):
    from transformers.models.qwen2_vl import image_processing_pil_qwen2_vl as reference

    processor = reference.Qwen2VLImageProcessorPil()
    picture = noise(1, height, width)
    theirs = processor(images=[Image.fromarray(picture[0])], return_tensors="pt")
    pixel_values, grid = data.patchify(picture)
    assert grid.tolist() == theirs["image_grid_thw"][0].tolist()
    # Largest difference measured: 2.4e-7, one unit in the last place of values in [1, 2).
    np.testing.assert_allclose(pixel_values, theirs["pixel_values"], rtol=0, atol=4e-7)
