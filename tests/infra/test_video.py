"""infra/video.py against PyAV's frames, Pillow's pixels and transformers' resizing.

Every video and image is made here. Videos are 84 x 140 where nothing else is said: multiples of 28
within the limits, so that no resize hides a wrong frame.
"""

import doctest
import fractions
import functools
import importlib.metadata
import json
import os
import random
import signal
import struct
import subprocess
import sys
import time
from concurrent.futures import CancelledError
from pathlib import Path

import numpy as np
import pytest
from conftest import ROOT
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from infra import video
from infra.errors import MediaError

av = pytest.importorskip("av")

HEIGHT, WIDTH = 84, 140
SIZE = {"min_pixels": 4 * 28 * 28, "max_pixels": 256 * 28 * 28, "factor": 28, "max_aspect": 200}
LIMITS = {**SIZE, "max_frames": 16, "fps": 2.0, "min_frames": 4}
UNIT = 1 << 16  # one, in the fixed point of an mp4 display matrix
DECORD2 = any((d.metadata["Name"] or "").lower() == "decord2"
              for d in importlib.metadata.distributions())  # fmt: skip


def read_frames(path, **changes):
    return video.read_frames(path, **{**LIMITS, **changes})


def read_image(path, **changes):
    return video.read_image(path, **{**SIZE, **changes})


def submit(pool, path, **changes):
    return pool.submit("video", path, **{**LIMITS, **changes})


# ----------------------------------------------------------------------------------- making videos


@functools.cache
def drawings(num, height=HEIGHT, width=WIDTH):
    """num frames uint8 (H, W, 3), no two alike: a gradient of changing hue, a moving square."""
    y, x = np.mgrid[0:height, 0:width]
    frames = []
    for i in range(num):
        frame = np.stack([x * 255 // width, y * 255 // height, np.full_like(x, 37 * i % 256)], -1)
        left, top = 7 * i % (width - 20), 5 * i % (height - 20)
        frame[top:top + 20, left:left + 20] = 255
        frames.append(frame.astype(np.uint8))
    return frames


def write_video(path, frames, codec="libx264", rate=30, pix_fmt="yuv420p", options=None, times=None,
                container=None, sound=0):
    """Encode frames, at `times` in milliseconds if the rate varies, after some packets of sound;
    skips without the encoder."""
    try:
        av.Codec(codec, "w")
    except av.codec.codec.UnknownCodecError:
        pytest.skip(f"this PyAV has no encoder {codec}")
    with av.open(str(path), "w", options=container or {}) as file:
        audio = file.add_stream("aac", rate=16000, layout="mono") if sound else None
        stream = file.add_stream(codec, rate=rate, options=options or {}) if frames else None
        if frames:
            stream.height, stream.width = frames[0].shape[:2]
            stream.pix_fmt = pix_fmt
            stream.codec_context.thread_count = 1
            if times:
                stream.codec_context.time_base = fractions.Fraction(1, 1000)
        for i in range(sound):
            frame = av.AudioFrame.from_ndarray(np.zeros((1, 1024), np.float32), "fltp", "mono")
            frame.rate, frame.pts = 16000, 1024 * i
            file.mux(audio.encode(frame))
        for i, drawing in enumerate(frames):
            frame = av.VideoFrame.from_ndarray(drawing, format="rgb24")
            if times:
                frame.pts, frame.time_base = times[i], fractions.Fraction(1, 1000)
            file.mux(stream.encode(frame))
        for last in filter(None, (stream, audio)):
            file.mux(last.encode(None))
    return path


def pyav_frames(path):
    """Every frame that a player shows, as PyAV decodes it: list of uint8 (H, W, 3)."""
    with av.open(str(path)) as file:
        return [frame.to_ndarray(format="rgb24") for frame in file.decode(video=0)]


def patch(path, kind, offset, content):
    """Overwrite bytes of the first mp4 box of a kind, `offset` bytes after its name."""
    whole = bytearray(path.read_bytes())
    at = whole.index(kind) + 4 + offset
    whole[at:at + len(content)] = content
    path.write_bytes(whole)
    return path


def with_edits(path, *pieces):
    """Give an mp4 of 30 frames a second, its moov last, an edit list of (first, end) frames;
    first of None: a delay."""
    content = bytearray(path.read_bytes())
    media_time = struct.unpack_from(">i", content, content.index(b"elst") + 16)[0]  # in 1/15360 s
    edits = b"".join(
        struct.pack(">IiI", 100, -1, UNIT) if first is None else
        struct.pack(">IiI", (end - first) * 1000 // 30, media_time + 512 * first, UNIT)
        for first, end in pieces)  # fmt: skip
    edits = struct.pack(">I4sI4sII", 24 + len(edits), b"edts", 16 + len(edits), b"elst", 0,
                        len(pieces)) + edits  # fmt: skip
    at = content.index(b"edts") - 4
    (size,) = struct.unpack_from(">I", content, at)
    content[at:at + size] = edits
    for kind in (b"trak", b"moov"):
        place = content.index(kind) - 4
        (old,) = struct.unpack_from(">I", content, place)
        struct.pack_into(">I", content, place, old + len(edits) - size)
    path.write_bytes(content)
    return path


def official_indices(total, fps, max_frames=16):
    """The stated rule, in exact arithmetic."""
    n = int(min(max(total / fps * 2, 4), max_frames, total) // 2 * 2)
    if n < 2:
        return [0]
    return [round(fractions.Fraction(k * (total - 1), n - 1)) for k in range(n)]


def assert_frames(frames, reference, indices, tolerance=0.01):
    """frames are reference[indices]: nearest to that frame of all, mean difference bounded."""
    assert len(frames) == len(indices)
    for frame, index in zip(frames, indices, strict=True):
        distances = [float(np.abs(frame.astype(int) - other).mean()) for other in reference]
        assert int(np.argmin(distances)) == index
        assert distances[index] <= tolerance


# ---------------------------------------------------------------------- which frames, by hand


@pytest.mark.parametrize(
    ("total", "rate", "max_frames", "indices", "seconds"),
    [
        (90, 30.0, 16, [0, 18, 36, 53, 71, 89], 0.5),  # steps of 17.8
        (1800, 30.0, 16, [0, 120, 240, 360, 480, 600, 720, 840, 959, 1079, 1199, 1319, 1439, 1559,
                          1679, 1799], 3.75),  # 119.93
        (1800, 30.0, 4, [0, 600, 1199, 1799], 15.0),  # 599.67
        (1800, 30.0, 7, [0, 360, 720, 1079, 1439, 1799], 10.0),  # an even number; 359.8
        (29, 10.0, 16, [0, 9, 19, 28], 0.725),  # 5.8 frames are 4; 9.33
        (10, 1.0, 16, [0, 1, 2, 3, 4, 5, 6, 7, 8, 9], 1.0),  # no more than there are
        (7, 30.0, 16, [0, 2, 4, 6], 7 / 120),  # at least 4
        (5, 25.0, 16, [0, 1, 3, 4], 0.05),  # 1.33
        (3, 30.0, 16, [0, 2], 0.05),
        (2, 30.0, 16, [0, 1], 1 / 30),
        (1, 25.0, 16, [0], 0.04),
        (90, 30.0, 1, [0], 3.0),
    ],
)  # fmt: skip
def test_indices_worked_by_hand(total, rate, max_frames, indices, seconds):
    found, between = video.sample_indices(total, rate, max_frames, fps=2.0, min_frames=4)
    assert found == indices == official_indices(total, rate, max_frames)
    assert between == pytest.approx(seconds, rel=1e-12)


@settings(deadline=None)
@given(total=st.integers(2, 20000), max_frames=st.sampled_from([2, 4, 6, 16, 32, 64]),
       rate=st.sampled_from([1, 8, 12.5, 24, 25, 30, 60, 24000 / 1001, 30000 / 1001]))  # fmt: skip
def test_indices_are_qwens(total, max_frames, rate):
    torch = pytest.importorskip("torch")
    indices, _ = video.sample_indices(total, rate, max_frames, fps=2.0, min_frames=4)
    assert indices == torch.linspace(0, total - 1, len(indices)).round().long().tolist()
    assert indices == official_indices(total, rate, max_frames)


FAST_THEN_SLOW = [20 * min(i, 30) + 200 * max(i - 30, 0) for i in range(60)]
SLIDES = [0, 5000, 5100, 9000]


@pytest.mark.parametrize(
    ("file", "times"),
    [("a.mp4", FAST_THEN_SLOW), ("a.mkv", FAST_THEN_SLOW), ("a.webm", FAST_THEN_SLOW),
     ("a.mp4", SLIDES)], ids=["mp4", "mkv", "webm", "slides"],
)  # fmt: skip
def test_a_variable_rate_is_sampled_by_index(tmp_path, file, times):
    codec, options = ("libvpx-vp9", VPX) if file == "a.webm" else ("libx264", {"bf": "2"})
    path = write_video(tmp_path / file, drawings(len(times)), codec, times=times, options=options)
    with av.open(str(path)) as opened:
        rate = float(opened.streams.video[0].average_rate)
    frames, seconds = read_frames(path)
    assert_frames(frames, pyav_frames(path), official_indices(len(times), rate))
    assert seconds == pytest.approx(len(times) / rate / len(frames))


# ------------------------------------------------------------------------------- decoded correctly

X265 = "log-level=none:pools=none:frame-threads=1"
VPX = {"deadline": "realtime", "cpu-used": "8", "g": "20"}
DECODED = {
    # name: (file, frames, arguments of write_video)
    "h264-b-frames": ("a.mp4", 90, {"options": {"bf": "3", "g": "12"}}),
    "h264-open-gop": ("a.mp4", 90, {"options": {
        "x264-params": "open-gop=1:keyint=20:bframes=3"}}),
    "h264-fragmented": ("a.mp4", 90, {"options": {"g": "30", "bf": "2"}, "container": {
        "movflags": "frag_keyframe+empty_moov"}}),
    "h264-negative-offsets": ("a.mp4", 90, {"options": {"bf": "3", "g": "12"}, "container": {
        "movflags": "negative_cts_offsets"}}),
    "h264-after-sound": ("a.mp4", 30, {"sound": 20}),
    "h264-mov": ("a.mov", 90, {"options": {"bf": "2", "g": "10"}}),
    "h264-mkv": ("a.mkv", 90, {"options": {"bf": "2", "g": "10"}}),
    "h264-10-bit": ("a.mp4", 60, {"pix_fmt": "yuv420p10le"}),
    "h264-29.97-fps": ("a.mp4", 90, {"rate": fractions.Fraction(30000, 1001)}),
    "hevc-open-gop": ("a.mp4", 90, {"codec": "libx265", "options": {
        "x265-params": X265 + ":keyint=20"}}),
    "vp9-webm": ("a.webm", 90, {"codec": "libvpx-vp9", "options": VPX}),
    "vp8-webm": ("a.webm", 90, {"codec": "libvpx", "options": VPX}),
    "mpeg4-avi-b-frames": ("a.avi", 90, {"codec": "mpeg4", "options": {"g": "12", "bf": "2"}}),
    "y4m": ("a.y4m", 20, {"codec": "wrapped_avframe", "rate": 10, "pix_fmt": "yuv444p"}),
    "one-frame": ("a.mp4", 1, {}),
}  # fmt: skip


@pytest.mark.parametrize("name", DECODED)
def test_frames_are_the_ones_that_pyav_decodes(tmp_path, name):
    file, num, arguments = DECODED[name]
    path = write_video(tmp_path / file, drawings(num), **arguments)
    rate, reference = float(arguments.get("rate", 30)), pyav_frames(path)
    for max_frames in (16, 6):
        frames, seconds = read_frames(path, max_frames=max_frames)
        indices = official_indices(num, rate, max_frames)
        assert frames.dtype == np.uint8
        assert frames.shape == (len(indices), HEIGHT, WIDTH, 3)
        # 8 bits: the same pixels. 10 bits: decord 0.6.0 rounds to RGB otherwise than PyAV.
        assert_frames(frames, reference, indices, 2.5 if "10-bit" in name else 0.01)
        assert seconds == pytest.approx(num / len(indices) / rate, rel=1e-9)


@pytest.mark.parametrize("gop", [2, 7, 300])
@pytest.mark.parametrize("b_frames", [0, 1, 4])
def test_any_h264_group_of_pictures(tmp_path, gop, b_frames):
    for is_open in (0, 1):
        params = f"open-gop={is_open}:keyint={gop}:bframes={b_frames}:b-adapt=0:scenecut=0"
        path = write_video(tmp_path / "a.mp4", drawings(64), options={
            "preset": "ultrafast", "x264-params": params})  # fmt: skip
        assert_frames(read_frames(path)[0], pyav_frames(path), official_indices(64, 30))


def resized(frame, height, width):
    return np.array(Image.fromarray(frame).resize((width, height), Image.Resampling.BICUBIC))


def test_a_frame_is_resized_as_pillow_does_within_the_limits(tmp_path):
    path = write_video(tmp_path / "a.mp4", drawings(8, 97, 131), pix_fmt="yuv444p")
    frames, _ = read_frames(path, min_pixels=28 * 28, max_pixels=9 * 28 * 28)
    assert_frames(frames, [resized(f, 56, 84) for f in pyav_frames(path)], [0, 2, 5, 7])


@pytest.mark.parametrize("name", ["a:b.mp4", "frame%03d.mp4", "ünï 漢.mp4", "-i"])
def test_a_name_is_only_a_name_and_a_link_is_followed(tmp_path, monkeypatch, name):
    write_video(tmp_path / "plain.mp4", drawings(4))
    (tmp_path / name).symlink_to(tmp_path / "plain.mp4")
    monkeypatch.chdir(tmp_path)
    assert read_frames(name)[0].shape == (4, HEIGHT, WIDTH, 3)


def test_av1_needs_decord2(tmp_path, monkeypatch):
    monkeypatch.setenv("SVT_LOG", "0")
    path = write_video(tmp_path / "a.mp4", drawings(20), codec="av1", rate=10)
    if DECORD2:
        assert_frames(read_frames(path)[0], pyav_frames(path), official_indices(20, 10))
        return
    with pytest.raises(MediaError, match="no decoder for its codec"):
        read_frames(path)


@pytest.mark.parametrize("b_frames", ["0", "3"])
@pytest.mark.parametrize(
    ("pieces", "counted"),  # counted by decord
    [
        pytest.param([(None, 0), (0, 90)], range(90), id="delay"),
        pytest.param([(7, 90)], range(90), id="starts off a key frame"),
        pytest.param([(12, 90)], range(12, 90), id="starts on a key frame"),
        pytest.param([(0, 89)], range(90), id="ends one frame early"),
        pytest.param([(0, 60)], None, id="ends early"),
        pytest.param([(0, 24), (48, 90)], None, id="gap"),
        pytest.param([(48, 90), (0, 48)], None, id="swapped"),
    ],
)
def test_an_edit_list(tmp_path, pieces, counted, b_frames):
    """Hidden frames are read where decord counts them; a file that lacks others is refused."""
    options = {"bf": b_frames, "g": "12", "sc_threshold": "0"}
    path = write_video(tmp_path / "a.mp4", drawings(90), options=options)
    reference = pyav_frames(path)  # every frame in display order
    with_edits(path, *pieces)
    if counted is None:
        with pytest.raises(MediaError, match="edit list"):
            read_frames(path)
        return
    for max_frames in (16, 1):
        indices = official_indices(len(counted), 30, max_frames)
        frames, _ = read_frames(path, max_frames=max_frames)
        assert_frames(frames, reference, [counted[i] for i in indices])


def test_a_cut_without_encoding_is_read_whole(tmp_path):
    """ffmpeg -ss -c copy: packets from the key frame on, an edit list that hides the first."""
    whole = write_video(tmp_path / "whole.mp4", drawings(90), options={
        "x264-params": "open-gop=1:keyint=20:bframes=3:scenecut=0"})  # fmt: skip
    path = tmp_path / "a.mp4"
    with av.open(str(whole)) as source, av.open(str(path), "w") as target:
        stream = target.add_stream_from_template(source.streams.video[0])
        shift = 7 * 512  # frames of 1/15360 s
        for packet in source.demux(video=0):
            if packet.dts is not None:
                packet.pts, packet.dts, packet.stream = (
                    packet.pts - shift, packet.dts - shift, stream)  # fmt: skip
                target.mux(packet)
    assert len(pyav_frames(path)) == 83
    frames, seconds = read_frames(path)
    assert_frames(frames, pyav_frames(whole), official_indices(90, 30))
    assert seconds == 0.5


# ---------------------------------------------------------------------------------------- rotation

TURNS = {  # a, b, c, d: a pixel (x, y) is shown at (a x + c y, b x + d y)
    "90": (0, 1, -1, 0), "180": (-1, 0, 0, -1), "270": (0, -1, 1, 0),
}  # fmt: skip


def turned_video(path, matrix, height=HEIGHT, width=WIDTH):
    write_video(path, drawings(12, height, width), options={"bf": "2", "g": "5"})
    a, b, c, d = (round(UNIT * v) for v in matrix)
    return patch(path, b"tkhd", 40, struct.pack(">9i", a, b, 0, c, d, 0, 0, 0, 1 << 30))


@pytest.mark.parametrize("name", TURNS)
def test_a_rotated_video_is_shown_upright(tmp_path, name):
    path = turned_video(tmp_path / "a.mp4", TURNS[name], 86, 150)
    with av.open(str(path)) as file:
        decoded = list(file.decode(video=0))
    upright = [np.rot90(f.to_ndarray(format="rgb24"), f.rotation // 90) for f in decoded]
    size = (84, 140) if name == "180" else (140, 84)
    assert_frames(read_frames(path)[0], [resized(f, *size) for f in upright], [0, 4, 7, 11])


def test_a_matrix_of_zeros_is_no_rotation(tmp_path):
    path = turned_video(tmp_path / "a.mp4", (0, 0, 0, 0))
    assert_frames(read_frames(path)[0], pyav_frames(path), [0, 4, 7, 11])


@pytest.mark.parametrize("matrix", [(-1, 0, 0, 1), (0.7, 0.7, -0.7, 0.7)])
def test_a_mirrored_or_oblique_video_is_refused(tmp_path, matrix):
    path = turned_video(tmp_path / "a.mp4", matrix)
    with pytest.raises(MediaError, match="mirrored, or rotated by an angle"):
        read_frames(path)


# ----------------------------------------------------------------------------------------- refused


def file(path, content):
    path.write_bytes(content)
    return path


def made(function, *arguments):
    function(*arguments)
    return arguments[-1]


def half(path, **arguments):
    content = write_video(path.with_stem("whole"), drawings(60), **arguments).read_bytes()
    return file(path, content[:len(content) // 2])


def noisy(path):
    write_video(path, drawings(60), container={"movflags": "faststart"})
    content = bytearray(path.read_bytes())
    content[len(content) // 2:len(content) // 2 + 2000] = random.Random(0).randbytes(2000)
    return file(path, content)


def two_tracks(path):
    """A second video track, and a box that skips what is left of the first one's name."""
    content = write_video(path, drawings(4)).read_bytes()
    at = content.index(b"trak") - 4
    (size,) = struct.unpack_from(">I", content, at)
    content = bytearray(content[:at + size] + content[at:])
    place = content.index(b"moov") - 4
    struct.pack_into(">I", content, place, struct.unpack_from(">I", content, place)[0] + size)
    return file(path, content)


def short_table(path):
    """An mp4 whose timing table claims more rows than the file holds (its moov comes last)."""
    write_video(path, drawings(60), options={"bf": "3"})
    content = bytearray(path.read_bytes())
    at = content.index(b"ctts")
    struct.pack_into(">I", content, at + 8, 1 << 30)
    return file(path, content)


REFUSED = {  # name: (what makes it from a path, the reason)
    "missing": (lambda path: path, "No such file"),
    "fifo": (lambda path: made(os.mkfifo, path), "not a regular file"),
    "zero-bytes": (lambda path: file(path, b""), "empty"),
    "null-byte-in-the-name": (lambda path: "a\0b.mp4", "null"),
    "sound-only": (lambda path: write_video(path, [], sound=20), "no video stream"),
    "garbage": (lambda path: file(path, random.Random(1).randbytes(9000)), "not a video"),
    "hls-playlist": (lambda path: file(path, b"#EXTM3U\n#EXTINF:3,\npart.ts\n"), "not a video"),
    "half-mp4": (half, "truncated"),
    "half-mkv": (lambda path: half(path.with_suffix(".mkv")), "truncated"),
    "half-avi": (lambda path: half(path.with_suffix(".avi"), codec="mpeg4"), "truncated"),
    "noise-in-the-middle": (noisy, "cannot be decoded"),
    "table-too-short": (short_table, "buffer is smaller"),
    "two-video-tracks": (two_tracks, "2 video tracks"),
    "long-and-thin": (lambda path: write_video(path, drawings(4, 22, 22 * 201), "mpeg4"),
                      "200 times"),
}  # fmt: skip


@pytest.fixture(scope="module")
def clip(tmp_path_factory):
    return write_video(tmp_path_factory.mktemp("pool") / "a.mp4", drawings(60))


@pytest.mark.parametrize("name", REFUSED)
def test_refused_with_file_and_reason(tmp_path, clip, name):
    make, reason = REFUSED[name]
    path = make(tmp_path / "a.mp4")
    before, _ = read_frames(clip)
    with pytest.raises(MediaError, match=reason) as error:
        read_frames(path)
    assert str(error.value).startswith(f"{path}: ")
    assert (read_frames(clip)[0] == before).all()  # a failure leaves nothing behind


# ------------------------------------------------------------------------------------------ images


def scene(height=56, width=84):
    """Like a photograph: uint8 (H, W, 3), smooth, no two corners alike."""
    y, x = np.mgrid[0:height, 0:width]
    return np.stack([x * 255 // width, y * 255 // height, (x + y) * 255 // (height + width)],
                    -1).astype(np.uint8)  # fmt: skip


def over_white(colors, alpha):
    alpha = alpha[..., None].astype(float) / 255
    return colors * alpha + 255 * (1 - alpha)


RGB, IMAGE = scene(), Image.fromarray(scene())
ALPHA = np.tile(np.linspace(0, 255, 84).astype(np.uint8), (56, 1))
WIDE = np.arange(56 * 84, dtype=np.uint16).reshape(56, 84) * 13  # 16 bits, up to 61139
PALETTE = IMAGE.quantize(64)
COLORS = np.array(PALETTE.convert("RGB"))
HOLES = np.where((np.array(PALETTE) == 5)[..., None], 255, COLORS)
OTHERS = {"save_all": True, "duration": 100, "append_images": [Image.fromarray(255 - RGB)]}
IMAGES = {
    # name: (file, Pillow image, options of save, expected RGB, largest difference)
    "png": ("a.png", IMAGE, {}, RGB, 0),
    "jpeg": ("a.jpg", IMAGE, {"quality": 95, "subsampling": 0}, RGB, 6),
    "webp": ("a.webp", IMAGE, {"lossless": True}, RGB, 0),
    "tiff": ("a.tif", IMAGE, {"compression": "tiff_lzw"}, RGB, 0),
    "gray": ("a.png", Image.fromarray(RGB[..., 0]), {}, RGB[..., :1], 0),
    "alpha": ("a.png", Image.fromarray(np.dstack([RGB, ALPHA])), {}, over_white(RGB, ALPHA), 1),
    "palette": ("a.png", PALETTE, {}, COLORS, 0),
    "palette-transparent": ("a.png", PALETTE, {"transparency": 5}, HOLES, 0),
    "gif-transparent": ("a.gif", PALETTE, {"transparency": 5}, HOLES, 0),
    "cmyk-jpeg": ("a.jpg", IMAGE.convert("CMYK"), {"quality": 98, "subsampling": 0}, RGB, 6),
    "16-bit": ("a.png", Image.fromarray(WIDE), {}, np.rint(WIDE / 257)[..., None], 0),
    "animated": ("a.webp", IMAGE, OTHERS | {"lossless": True}, RGB, 0),
}  # fmt: skip


@pytest.mark.parametrize("name", IMAGES)
def test_an_image_in_rgb(tmp_path, name):
    file_name, image, options, expected, difference = IMAGES[name]
    image.save(tmp_path / file_name, **options)
    frames = read_image(tmp_path / file_name)
    assert frames.dtype == np.uint8
    assert frames.shape == (1, 56, 84, 3)
    expected = np.broadcast_to(np.asarray(expected, float), RGB.shape)
    assert np.abs(frames[0] - expected).max() <= difference


def test_exif_orientation_is_applied(tmp_path):
    exif = Image.Exif()
    exif[0x0112] = 6
    IMAGE.save(tmp_path / "a.jpg", exif=exif, quality=95, subsampling=0)
    frames = read_image(tmp_path / "a.jpg")
    assert np.abs(frames[0].astype(int) - np.rot90(RGB, -1)).max() <= 6


def half_image(path, **options):
    noise = np.random.default_rng(0).integers(0, 256, (90, 90, 3), np.uint8)
    Image.fromarray(noise).save(path, **options)
    return file(path, path.read_bytes()[:path.stat().st_size // 2])


def saved(path, image):
    image.save(path)
    return path


REFUSED_IMAGES = {
    "half-png": (half_image, "truncated|decod|broken"),
    "half-jpg": (lambda path: half_image(path.with_suffix(".jpg"), progressive=True), "truncated"),
    "text": (lambda path: file(path, b"<html>404 Not Found</html>"), "cannot identify"),
    "postscript": (lambda path: file(path, b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n"),
                   "cannot identify"),
    "bomb": (lambda path: saved(path, Image.new("1", (9500, 9500))), "bomb"),
    "20000x10": (lambda path: saved(path, Image.new("RGB", (20000, 10))), "over 200 times"),
    "32-bit": (lambda path: saved(path.with_suffix(".tif"), Image.fromarray(
        np.full((9, 9), 70000, np.int32))), "no fixed white"),
    "floating-point": (lambda path: saved(path.with_suffix(".tif"), Image.fromarray(
        np.full((9, 9), 0.5, np.float32))), "no fixed white"),
    "directory": (lambda path: made(os.mkdir, path), "not a regular file"),
}  # fmt: skip


@pytest.mark.parametrize("name", REFUSED_IMAGES)
def test_a_refused_image_says_why(tmp_path, recwarn, name):
    make, reason = REFUSED_IMAGES[name]
    path = make(tmp_path / "a.png")
    with pytest.raises(MediaError, match=reason) as error:
        read_image(path)
    assert str(error.value).startswith(f"{path}: ")
    assert not recwarn.list


# ------------------------------------------------------------------- agreement with transformers


@pytest.fixture(scope="module")
def pil_processor():
    """transformers' own Qwen2-VL image processor on Pillow."""
    module = pytest.importorskip("transformers.models.qwen2_vl.image_processing_pil_qwen2_vl")
    return module, module.Qwen2VLImageProcessorPil(min_pixels=4 * 28 * 28, max_pixels=256 * 28 * 28)


@settings(deadline=None)
@given(height=st.integers(1, 5000), width=st.integers(1, 5000), low=st.integers(1, 300),
       high=st.integers(1, 900))  # fmt: skip
def test_smart_resize_equals_transformers(pil_processor, height, width, low, high):
    if max(height, width) > 200 * min(height, width):
        return
    low, high = 784 * min(low, high), 784 * max(low, high)
    ours = video.smart_resize(height, width, low, high, 28)
    assert ours == pil_processor[0].smart_resize(height, width, 28, low, high)


@pytest.mark.parametrize("size", [(480, 640), (33, 57), (60, 900)], ids=str)
def test_a_resized_image_equals_the_image_processor(tmp_path, pil_processor, size):
    pixels = np.random.default_rng(0).integers(0, 256, (*size, 3), np.uint8)
    ours = read_image(saved(tmp_path / "a.png", Image.fromarray(pixels)))[0]
    out = pil_processor[1](Image.fromarray(pixels), do_rescale=False, do_normalize=False,
                           return_tensors="np")  # fmt: skip
    _, rows, columns = out["image_grid_thw"][0]
    # A row of pixel_values is one patch: (C, 2 equal frames, 14, 14), in blocks of 2 x 2 patches.
    patches = out["pixel_values"].reshape(rows // 2, columns // 2, 2, 2, 3, 2, 14, 14)
    theirs = patches[..., 0, :, :].transpose(0, 2, 5, 1, 3, 6, 4)
    assert (ours == theirs.reshape(rows * 14, columns * 14, 3)).all()


# -------------------------------------------------------------------------------------------- pool


@pytest.fixture
def pool():
    with video.DecoderPool(num_workers=1, timeout=20) as pool:
        yield pool


def pid_of(pool):
    ((process, _),) = pool.workers.values()
    return process.pid


def is_alive(pid):
    try:
        state = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
    except FileNotFoundError:
        return False
    return state not in "ZX"


def wait_until_dead(pids, seconds=10):
    deadline = time.monotonic() + seconds
    while any(is_alive(pid) for pid in pids) and time.monotonic() < deadline:
        time.sleep(0.02)
    return not any(is_alive(pid) for pid in pids)


def test_results_belong_to_their_files(tmp_path):
    expected, futures = [], []
    with video.DecoderPool(num_workers=2, timeout=20) as pool:
        for i in range(8):
            if i % 2:
                path = write_video(tmp_path / f"{i}.mp4", drawings(10 + i, 56, 84))
                futures.append(submit(pool, path, max_frames=4 + i))
                expected.append(read_frames(path, max_frames=4 + i))
            else:
                path = saved(tmp_path / f"{i}.png", Image.new("RGB", (60, 60), (i, 2 * i, 3 * i)))
                futures.append(pool.submit("image", path, **SIZE))
                expected.append((read_image(path), 0.0))
        for i in random.Random(0).sample(range(8), 8):  # awaited in any order
            frames, seconds = futures[i].result(30)
            assert frames.flags.writeable
            assert (frames == expected[i][0]).all()
            assert seconds == expected[i][1]


def test_a_refusal_arrives_word_for_word(pool, tmp_path):
    path = half(tmp_path / "a.mkv")
    with pytest.raises(MediaError) as here:
        read_frames(path)
    with pytest.raises(MediaError) as there:
        submit(pool, path).result(30)
    assert str(there.value) == str(here.value)


def test_any_exception_in_a_worker_is_the_files_fault(tmp_path, monkeypatch):
    (tmp_path / "decord.py").write_text("class Strange(Exception): pass\n"
                                        "DECORDError = DECORDLimitReachedError = KeyError\n"
                                        "class logging: QUIET, set_level = 0, print\n"
                                        "def cpu(number): raise Strange('as never before')\n")
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    path = write_video(tmp_path / "a.mp4", drawings(4))
    with video.DecoderPool(num_workers=1, timeout=20) as pool:
        for _ in range(2):
            with pytest.raises(MediaError, match="a.mp4: Strange: as never before"):
                submit(pool, path).result(30)


def test_a_hung_decoder_is_killed_and_replaced(clip):
    with video.DecoderPool(num_workers=1, timeout=1.5) as pool:
        submit(pool, clip).result(30)
        pid = pid_of(pool)
        os.kill(pid, signal.SIGSTOP)
        with pytest.raises(MediaError, match=f"{clip}.*within 1.5 seconds"):
            submit(pool, clip).result(30)
        assert not is_alive(pid)
        assert submit(pool, clip).result(30)[0].shape == (4, HEIGHT, WIDTH, 3)
        assert pid_of(pool) != pid


def test_a_crash_of_the_decoder_is_survived(pool, clip):
    submit(pool, clip).result(30)
    pid = pid_of(pool)
    os.kill(pid, signal.SIGSTOP)  # so that it is certain to be in the middle of the job
    future = submit(pool, clip)
    while not future.running():
        time.sleep(0.01)
    time.sleep(0.2)
    os.kill(pid, signal.SIGSEGV)
    os.kill(pid, signal.SIGCONT)
    with pytest.raises(MediaError, match=f"{clip}.*exit code -11"):
        future.result(30)
    assert submit(pool, clip).result(30)[1] == 0.5
    # A death between two jobs is no fault of the next.
    os.kill(pid_of(pool), signal.SIGKILL)
    assert wait_until_dead([pid_of(pool)])
    assert submit(pool, clip).result(30)[1] == 0.5


def test_damaged_files_never_break_the_pool(tmp_path, clip):
    """300 damaged headers: each is refused or decoded; a crash is a refusal."""
    generator = random.Random(0)
    sources = [(clip.read_bytes(), "video")]
    for name, codec in (("a.webm", "libvpx"), ("a.avi", "mpeg4")):
        path = write_video(tmp_path / name, drawings(8), codec=codec)
        sources.append((path.read_bytes(), "video"))
    for name in ("a.png", "a.jpg", "a.gif", "a.tif", "a.webp", "a.jp2"):
        sources.append((saved(tmp_path / name, IMAGE).read_bytes(), "image"))
    with video.DecoderPool(num_workers=2, timeout=20) as pool:
        futures = []
        for i in range(300):
            content, kind = generator.choice(sources)
            content = bytearray(content)
            for _ in range(generator.randint(1, 8)):
                at = generator.randrange(len(content))
                content[generator.choice([at, at % 300, -1 - at % 900])] = generator.randrange(256)
            path = file(tmp_path / str(i), content)
            futures.append(pool.submit(kind, path, **(LIMITS if kind == "video" else SIZE)))
        for i, future in enumerate(futures):
            try:
                assert future.result(60)[0].ndim == 4
            except MediaError as error:
                assert str(tmp_path / str(i)) in str(error)


def test_close_cancels_what_waits(clip):
    pool = video.DecoderPool(num_workers=1, timeout=60)
    submit(pool, clip).result(30)
    pid = pid_of(pool)
    os.kill(pid, signal.SIGSTOP)
    running, waiting = submit(pool, clip), submit(pool, clip)
    while not running.running():
        time.sleep(0.01)
    pool.close()
    assert not is_alive(pid)
    with pytest.raises(MediaError, match="exit code -9"):
        running.result(5)
    with pytest.raises(CancelledError):
        waiting.result(5)
    with pytest.raises(RuntimeError, match="shutdown"):
        submit(pool, clip)
    pool.close()


PARENT = (
    "from infra import video\n"
    "import json, os, signal, sys, time\n"
    "pool = video.DecoderPool(num_workers=2, timeout=60)\n"
    "limits = json.loads(sys.argv[2])\n"
    "jobs = [pool.submit('video', sys.argv[1], **limits) for _ in range(20)]\n"
)


@pytest.mark.skipif(sys.platform != "linux", reason="PR_SET_PDEATHSIG is Linux's")
def test_no_worker_outlives_a_killed_parent(clip):
    program = PARENT + (
        "for job in jobs: job.result()\n"
        "pids = [process.pid for process, _ in pool.workers.values()]\n"
        "for pid in pids: os.kill(pid, signal.SIGSTOP)\n"  # sees no end of its input
        "for pid in pids: pool.submit('video', sys.argv[1], **limits)\n"
        "print(*pids, flush=True)\n"
        "time.sleep(60)\n")  # fmt: skip
    parent = subprocess.Popen([sys.executable, "-c", program, str(clip), json.dumps(LIMITS)],
                              stdout=subprocess.PIPE, cwd=ROOT)  # fmt: skip
    pids = [int(pid) for pid in parent.stdout.readline().split()]
    assert pids
    assert all(is_alive(pid) for pid in pids)
    parent.kill()
    parent.wait()
    parent.stdout.close()
    assert wait_until_dead(pids)


def test_a_program_that_forgets_to_close_ends_from_any_folder(clip, tmp_path):
    (tmp_path / "decord.py").write_text("raise ImportError('the folder of a stranger')")
    program = PARENT + (
        "print(jobs[0].result()[0].shape)\n"
        "raise SystemExit('torch' if 'torch' in sys.modules else 7)\n")  # fmt: skip
    done = subprocess.run(
        [sys.executable, "-P", "-c", program, str(clip), json.dumps(LIMITS)], timeout=30,
        cwd=tmp_path, env={**os.environ, "PYTHONPATH": str(ROOT)}, stdout=subprocess.PIPE,
    )  # fmt: skip
    assert (done.returncode, done.stdout) == (7, b"(4, 84, 140, 3)\n")


def test_a_worker_that_cannot_start_says_so(tmp_path, monkeypatch):
    (tmp_path / "decord.py").write_text("raise ImportError('no decoder here')")
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    path = saved(tmp_path / "a.png", IMAGE)
    with video.DecoderPool(num_workers=1, timeout=20) as pool, pytest.raises(
            RuntimeError, match="no decoder process starts"):  # fmt: skip
        pool.submit("image", path, **SIZE).result(30)


def test_the_examples_in_the_docstrings():
    assert doctest.testmod(video).attempted == 2
    assert doctest.testmod(video).failed == 0
