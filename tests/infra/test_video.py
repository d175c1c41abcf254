"""media.py against PyAV's frames, Pillow's pixels and transformers' own rules.

Every clip and picture is made here. Clips are 84 x 140 where nothing else is said: multiples of 28
within the limits, so that no resize hides a wrong frame.
"""

import ast
import doctest
import fractions
import importlib.metadata
import math
import os
import random
import signal
import struct
import subprocess
import sys
import time
import zlib
from concurrent.futures import CancelledError
from pathlib import Path

import numpy as np
import pytest
from conftest import ROOT
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from infra import video as media

av = pytest.importorskip("av")

HEIGHT, WIDTH = 84, 140
UNIT = 1 << 16  # one, in the fixed point of an mp4 display matrix
DECORD2 = any((d.metadata["Name"] or "").lower() == "decord2"
              for d in importlib.metadata.distributions())


# ------------------------------------------------------------------------------------ making clips


def pictures(num, height=HEIGHT, width=WIDTH):
    """num frames uint8 (H, W, 3), no two alike: a gradient of changing hue, a moving square."""
    y, x = np.mgrid[0:height, 0:width]
    frames = []
    for i in range(num):
        frame = np.stack([x * 255 // width, y * 255 // height, np.full_like(x, 37 * i % 256)], -1)
        left, top = 7 * i % (width - 20), 5 * i % (height - 20)
        frame[top:top + 20, left:left + 20] = 255
        frames.append(frame.astype(np.uint8))
    return frames


def write_clip(path, frames, codec="libx264", rate=30, pix_fmt="yuv420p", options=None, times=None,
               container=None):
    """Encode frames, at `times` in milliseconds if the rate varies; skips without the encoder."""
    try:
        av.Codec(codec, "w")
    except av.codec.codec.UnknownCodecError:
        pytest.skip(f"this PyAV has no encoder {codec}")
    with av.open(str(path), "w", options=container or {}) as file:
        stream = file.add_stream(codec, rate=rate, options=options or {})
        stream.height, stream.width = frames[0].shape[:2]
        stream.pix_fmt = pix_fmt
        stream.codec_context.thread_count = 1
        if times:
            stream.codec_context.time_base = fractions.Fraction(1, 1000)
        for i, picture in enumerate(frames):
            frame = av.VideoFrame.from_ndarray(picture, format="rgb24")
            if times:
                frame.pts, frame.time_base = times[i], fractions.Fraction(1, 1000)
            file.mux(stream.encode(frame))
        file.mux(stream.encode(None))
    return path


def pyav_frames(path):
    """Every frame that a player shows, as PyAV decodes it: list of uint8 (H, W, 3)."""
    with av.open(str(path)) as file:
        return [frame.to_ndarray(format="rgb24") for frame in file.decode(video=0)]


def patch(path, kind, offset, data):
    """Overwrite bytes of the first mp4 box of a kind, `offset` bytes after its name."""
    content = bytearray(path.read_bytes())
    at = content.index(kind) + 4 + offset
    content[at:at + len(data)] = data
    path.write_bytes(content)
    return path


def mean_difference(frame, other):
    return float(np.abs(frame.astype(int) - other).mean())


def formula(total, fps, max_frames=16):
    """The stated rule: 2 frames a second, 4 to max_frames, even, evenly spaced."""
    n = min(max(total / fps * 2, 4), max_frames // 2 * 2, total // 2 * 2)
    n = max(1, int(n // 2 * 2))
    return [math.floor(fractions.Fraction(k * total, n)) for k in range(n)]


def assert_frames(frames, reference, indices, tolerance):
    """frames are reference[indices]: nearest to that frame of all, mean difference bounded."""
    assert len(frames) == len(indices)
    for frame, index in zip(frames, indices, strict=True):
        distances = [mean_difference(frame, other) for other in reference]
        assert int(np.argmin(distances)) == index
        assert distances[index] <= tolerance


# ------------------------------------------------------------------------- clips: decoded rightly

X265 = "log-level=none:pools=none:frame-threads=1"
DECODED = {
    # name: (file, frames, arguments of write_clip)
    "h264-b-frames": ("a.mp4", 90, {"options": {"bf": "3", "g": "12"}}),
    "h264-one-gop": ("a.mp4", 90, {"options": {"bf": "3", "g": "300"}}),
    "h264-open-gop": ("a.mp4", 90, {"options": {
        "x264-params": "open-gop=1:keyint=20:bframes=3"}}),
    "h264-fragmented": ("a.mp4", 90, {"options": {"g": "30"}, "container": {
        "movflags": "frag_keyframe+empty_moov"}}),
    "h264-faststart": ("a.mp4", 90, {"options": {"g": "30"}, "container": {
        "movflags": "faststart"}}),
    "h264-mov": ("a.mov", 90, {"options": {"bf": "2", "g": "10"}}),
    "h264-mkv": ("a.mkv", 90, {"options": {"bf": "2", "g": "10"}}),
    "h264-444": ("a.mp4", 60, {"pix_fmt": "yuv444p"}),
    "h264-10-bit": ("a.mp4", 60, {"pix_fmt": "yuv420p10le"}),
    "h264-12-fps": ("a.mp4", 60, {"rate": 12}),
    "h264-29.97-fps": ("a.mp4", 90, {"rate": fractions.Fraction(30000, 1001)}),
    "hevc": ("a.mp4", 60, {"codec": "libx265", "options": {"x265-params": X265}}),
    "hevc-open-gop": ("a.mp4", 90, {"codec": "libx265", "options": {
        "x265-params": X265 + ":keyint=20"}}),
    "hevc-10-bit": ("a.mp4", 60, {"codec": "libx265", "pix_fmt": "yuv420p10le", "options": {
        "x265-params": X265}}),
    "vp9-webm": ("a.webm", 90, {"codec": "libvpx-vp9", "options": {
        "deadline": "realtime", "cpu-used": "8", "g": "20"}}),
    "vp8-webm": ("a.webm", 90, {"codec": "libvpx", "options": {
        "deadline": "realtime", "cpu-used": "8", "g": "20"}}),
    "mpeg4-avi": ("a.avi", 90, {"codec": "mpeg4", "options": {"g": "12"}}),
    "mpeg4-avi-b-frames": ("a.avi", 90, {"codec": "mpeg4", "options": {"g": "12", "bf": "2"}}),
    "mpeg2-mpg": ("a.mpg", 90, {"codec": "mpeg2video", "options": {"g": "12", "bf": "2"}}),
    "wmv": ("a.wmv", 90, {"codec": "wmv2", "options": {"g": "12"}}),
    "flv": ("a.flv", 90, {"codec": "flv1", "options": {"g": "12"}}),
    "y4m": ("a.y4m", 20, {"codec": "wrapped_avframe", "rate": 10, "pix_fmt": "yuv444p"}),
    "one-frame": ("a.mp4", 1, {}),
    "two-frames": ("a.mp4", 2, {}),
    "three-frames": ("a.mp4", 3, {}),
}


@pytest.mark.parametrize("max_frames", [16, 6])
@pytest.mark.parametrize("name", DECODED)
def test_frames_are_the_ones_that_pyav_decodes(tmp_path, name, max_frames):
    file, num, arguments = DECODED[name]
    path = write_clip(tmp_path / file, pictures(num), **arguments)
    frames, seconds = media.read_frames(path, max_frames=max_frames)
    fps = float(arguments.get("rate", 30))
    indices = formula(num, fps, max_frames)
    assert frames.dtype == np.uint8
    assert frames.shape == (len(indices), HEIGHT, WIDTH, 3)
    # 8 bits: the same pixels. 10 bits: decord 0.6.0 rounds on the way to RGB otherwise than PyAV.
    assert_frames(frames, pyav_frames(path), indices, 2.5 if "10-bit" in name else 0.01)
    assert seconds == pytest.approx(num / len(indices) / fps, rel=1e-9)


@pytest.mark.parametrize("gop", [2, 3, 7, 11])
@pytest.mark.parametrize("b_frames", [0, 1, 4])
@pytest.mark.parametrize("is_open", [0, 1], ids=["closed", "open"])
def test_any_h264_group_of_pictures(tmp_path, gop, b_frames, is_open):
    params = f"open-gop={is_open}:keyint={gop}:bframes={b_frames}:b-adapt=0:scenecut=0"
    path = write_clip(tmp_path / "a.mp4", pictures(64), options={
        "preset": "ultrafast", "x264-params": params})
    assert_frames(media.read_frames(path)[0], pyav_frames(path), formula(64, 30), 0.01)


def test_odd_size_is_resized_as_pillow_does(tmp_path):
    path = write_clip(tmp_path / "a.mp4", pictures(8, 97, 131), pix_fmt="yuv444p")
    frames, _ = media.read_frames(path)
    h, w = media.smart_resize(97, 131, 4 * 28 * 28, 128 * 28 * 28)
    reference = [np.array(Image.fromarray(f).resize((w, h), Image.Resampling.BICUBIC))
                 for f in pyav_frames(path)]
    assert_frames(frames, reference, [0, 2, 4, 6], 0.01)


def test_no_resize_where_the_size_is_right(tmp_path, monkeypatch):
    path = write_clip(tmp_path / "a.mp4", pictures(4))
    monkeypatch.setattr(Image.Image, "resize", lambda *_: pytest.fail("resized"))
    assert media.read_frames(path)[0].shape == (4, HEIGHT, WIDTH, 3)


def test_size_limits_are_kept(tmp_path):
    path = write_clip(tmp_path / "a.mp4", pictures(4, 240, 320))
    frames, _ = media.read_frames(path, min_pixels=28 * 28, max_pixels=16 * 28 * 28)
    assert frames.shape[1:3] == media.smart_resize(240, 320, 28 * 28, 16 * 28 * 28) == (84, 112)


def test_a_link_is_followed(tmp_path):
    path = write_clip(tmp_path / "a.mp4", pictures(4))
    (tmp_path / "link.mp4").symlink_to(path)
    assert media.read_frames(tmp_path / "link.mp4")[0].shape == (4, HEIGHT, WIDTH, 3)


@pytest.mark.parametrize("name", ["a:b.mp4", "http:x.mp4", "frame%03d.mp4", "ünï 漢.mp4", "-i"])
def test_a_name_is_only_a_name(tmp_path, monkeypatch, name):
    write_clip(tmp_path / "plain.mp4", pictures(4)).rename(tmp_path / name)
    monkeypatch.chdir(tmp_path)
    assert media.read_frames(name)[0].shape == (4, HEIGHT, WIDTH, 3)


def test_sound_before_the_picture(tmp_path):
    path = tmp_path / "a.mp4"
    with av.open(str(path), "w") as file:
        sound = file.add_stream("aac", rate=16000, layout="mono")
        video = file.add_stream("libx264", rate=30)
        video.height, video.width, video.pix_fmt = HEIGHT, WIDTH, "yuv420p"
        file.mux(encode_silence(sound, 20))
        for picture in pictures(30):
            file.mux(video.encode(av.VideoFrame.from_ndarray(picture, format="rgb24")))
        file.mux(video.encode(None))
    assert_frames(media.read_frames(path)[0], pyav_frames(path), formula(30, 30), 0.01)


def encode_silence(stream, num):
    packets = []
    for i in range(num):
        frame = av.AudioFrame.from_ndarray(np.zeros((1, 1024), np.float32), "fltp", "mono")
        frame.rate, frame.pts = 16000, 1024 * i
        packets += stream.encode(frame)
    return packets + stream.encode(None)


@pytest.mark.parametrize("name", ["av1-mp4", "gif"])
def test_what_only_decord2_reads(tmp_path, monkeypatch, name):
    monkeypatch.setenv("SVT_LOG", "0")
    file, codec, pix_fmt = {"av1-mp4": ("a.mp4", "av1", "yuv420p"),
                            "gif": ("a.gif", "gif", "rgb8")}[name]
    path = write_clip(tmp_path / file, pictures(20), codec=codec, pix_fmt=pix_fmt, rate=10)
    if not DECORD2:
        with pytest.raises(media.MediaError, match=file):
            media.read_frames(path)
        return
    assert_frames(media.read_frames(path)[0], pyav_frames(path), formula(20, 10), 0.01)


def test_av1_is_refused_with_the_reason(tmp_path, monkeypatch):
    if DECORD2:
        pytest.skip("decord2 reads AV1")
    monkeypatch.setenv("SVT_LOG", "0")
    path = write_clip(tmp_path / "a.mp4", pictures(8), codec="av1")
    with pytest.raises(media.MediaError, match="no decoder for its codec"):
        media.read_frames(path)


# ------------------------------------------------------------------------------- clips: when, how


def shown_at(times, end, max_frames=16):
    """Indices of the frames that a clip shows at k * duration / n; times in milliseconds from 0."""
    n = int(min(max(end / 500, 4), max_frames, len(times) // 2 * 2) // 2 * 2)
    return [max(i for i, t in enumerate(times) if t <= end * k / n + 0.5) for k in range(n)]


VARIABLE = {
    "fast-then-slow": [20 * min(i, 30) + 200 * max(i - 30, 0) for i in range(60)],
    "slow-then-fast": [400 * min(i, 8) + 40 * max(i - 8, 0) for i in range(48)],
    "still-then-motion": [0, 3000, *range(3040, 5000, 40)],
    "slides": [0, 5000, 5100, 9000, 9050, 9100],
}


@pytest.mark.parametrize("file", ["a.mp4", "a.mkv", "a.webm"])
@pytest.mark.parametrize("name", VARIABLE)
def test_variable_frame_rate_is_sampled_in_time(tmp_path, name, file):
    times = VARIABLE[name]
    codec = {"codec": "libvpx-vp9", "options": {"deadline": "realtime", "cpu-used": "8"}}
    path = write_clip(tmp_path / file, pictures(len(times)), times=times,
                      **(codec if file == "a.webm" else {}))
    frames, seconds = media.read_frames(path)
    # How long the last frame stays is the container's guess, and each guesses otherwise.
    end = 1000 * seconds * len(frames)
    assert 0 <= end - times[-1] <= 400
    assert_frames(frames, pyav_frames(path), shown_at(times, end), 0.01)


def test_constant_rate_with_whole_milliseconds_is_the_index_formula(tmp_path):
    times = [round(1000 * i / 30) for i in range(300)]  # 0, 33, 67, 100: what Matroska stores
    path = write_clip(tmp_path / "a.mkv", pictures(300), codec="mpeg4")
    frames, seconds = media.read_frames(path)
    assert times[:4] == [0, 33, 67, 100]
    assert_frames(frames, pyav_frames(path), formula(300, 30), 0.01)
    assert seconds == 300 / 16 / 30 == 0.625


@pytest.mark.parametrize(("starts", "fps", "rate"), [
    (np.arange(90) / 30, 30.0, 30.0),
    (np.arange(90) / 30, 29.0, 30.0),  # the container is wrong
    (np.arange(90) / 30, math.nan, 30.0),
    (np.round(np.arange(900) / 30, 3), 30.0, 30.0),
    (np.array([0.0]), 25.0, 25.0),
    (np.array([0.0, 0.1, 0.2, 1.2, 1.3]), 5 / 1.4, None),
    (np.zeros(5), 30.0, None),
], ids=["exact", "wrong-fps", "no-fps", "milliseconds", "one-frame", "a-gap", "no-time-passes"])
def test_constant_rate(starts, fps, rate):
    assert media.constant_rate(starts, fps) == (None if rate is None else pytest.approx(rate))


@pytest.mark.parametrize(("total", "fps", "expected"), [
    (90, 30.0, 0.5), (450, 30.0, 15 / 16), (7, 30.0, 7 / 4 / 30), (1, 25.0, 0.04),
])
def test_fractional_seconds_survive(total, fps, expected):
    indices, seconds = media.sample_indices(total, fps, 16)
    assert seconds == pytest.approx(expected, rel=1e-12)
    assert indices == formula(total, fps)


@pytest.mark.parametrize("name", ["starts-off-a-key-frame", "starts-on-a-key-frame", "ends-early",
                                  "both"])
def test_an_edit_list_hides_frames(tmp_path, name):
    path = write_clip(tmp_path / "a.mp4", pictures(90), options={"bf": "3", "g": "12"})
    skip = {"starts-off-a-key-frame": 7, "starts-on-a-key-frame": 12, "both": 31}.get(name, 0)
    end = 60 if name in ("ends-early", "both") else 90
    reference = pyav_frames(path)
    content = path.read_bytes()
    at = content.index(b"elst")
    _, media_time = struct.unpack_from(">Ii", content, at + 12)  # in 1/1000 s and in 1/15360 s
    patch(path, b"elst", 8, struct.pack(">Ii", (end - skip) * 1000 // 30, media_time + 512 * skip))
    assert len(pyav_frames(path)) == end - skip
    frames, _ = media.read_frames(path)
    indices = [skip + i for i in formula(end - skip, 30)]
    assert_frames(frames, reference, indices, 0.01)


# --------------------------------------------------------------------------------- clips: rotation

TURNS = {  # a, b, c, d: a pixel (x, y) is shown at (a x + c y, b x + d y)
    "90": (0, 1, -1, 0), "180": (-1, 0, 0, -1), "270": (0, -1, 1, 0), "0": (1, 0, 0, 1),
    "mirrored": (-1, 0, 0, 1), "upside-down-mirrored": (1, 0, 0, -1),
    "transposed": (0, 1, 1, 0), "anti-transposed": (0, -1, -1, 0),
}


def turned_clip(path, matrix, height=HEIGHT, width=WIDTH):
    write_clip(path, pictures(12, height, width), options={"bf": "2", "g": "5"})
    a, b, c, d = (round(UNIT * v) for v in matrix)
    return patch(path, b"tkhd", 40, struct.pack(">9i", a, b, 0, c, d, 0, 0, 0, 1 << 30))


def displayed(frame, matrix):
    """The frame as the matrix displays it, pixel by pixel as the standard defines it."""
    a, b, c, d = matrix
    y, x = np.mgrid[0:frame.shape[0], 0:frame.shape[1]]
    to_x, to_y = a * x + c * y, b * x + d * y
    to_x, to_y = to_x - to_x.min(), to_y - to_y.min()
    result = np.zeros((to_y.max() + 1, to_x.max() + 1, 3), np.uint8)
    result[to_y, to_x] = frame
    return result


@pytest.mark.parametrize("name", TURNS)
def test_a_turned_clip_is_shown_upright(tmp_path, name):
    path = turned_clip(tmp_path / "a.mp4", TURNS[name])
    frames, _ = media.read_frames(path)
    reference = [displayed(frame, TURNS[name]) for frame in pyav_frames(path)]
    assert_frames(frames, reference, [0, 3, 6, 9], 0.01)


@pytest.mark.parametrize("name", ["0", "90", "180", "270"])
def test_rotation_is_what_pyav_says(tmp_path, name):
    path = turned_clip(tmp_path / "a.mp4", TURNS[name])
    with av.open(str(path)) as file:
        decoded = list(file.decode(video=0))
    reference = [np.rot90(f.to_ndarray(format="rgb24"), f.rotation // 90) for f in decoded]
    assert_frames(media.read_frames(path)[0], reference, [0, 3, 6, 9], 0.01)


@pytest.mark.parametrize("size", [(86, 150), (64, 64), (90, 212)], ids=str)
def test_a_portrait_clip_of_any_size(tmp_path, size):
    path = turned_clip(tmp_path / "a.mp4", TURNS["90"], *size)
    frames, _ = media.read_frames(path)
    h, w = media.smart_resize(size[1], size[0], 4 * 28 * 28, 128 * 28 * 28)
    reference = [np.array(Image.fromarray(np.rot90(f, -1)).resize((w, h), Image.Resampling.BICUBIC))
                 for f in pyav_frames(path)]
    assert_frames(frames, reference, [0, 3, 6, 9], 0.01)


def test_a_matrix_of_zeros_is_no_rotation(tmp_path):
    path = turned_clip(tmp_path / "a.mp4", (0, 0, 0, 0))
    assert_frames(media.read_frames(path)[0], pyav_frames(path), [0, 3, 6, 9], 0.01)


# ---------------------------------------------------------------------------- what is not decoded


def refused_clips(folder):
    """{name: (path, reason)} of what read_frames must refuse."""
    clip = write_clip(folder / "good.mp4", pictures(90), options={"g": "15"}).read_bytes()

    def file(name, content):
        (folder / name).write_bytes(content)
        return folder / name

    def half(name, **arguments):
        content = write_clip(folder / f"whole-{name}", pictures(60), **arguments).read_bytes()
        return file(name, content[:len(content) // 2])

    faststart, fragments = {"movflags": "faststart"}, {"movflags": "frag_keyframe+empty_moov"}
    vp9 = {"codec": "libvpx-vp9", "options": {"deadline": "realtime", "cpu-used": "8"}}
    pieces = bytearray(clip)
    at = pieces.index(b"elst")
    pieces[at + 8:at + 12] = struct.pack(">I", 2)
    damaged = bytearray(write_clip(folder / "whole.mp4", pictures(60), container=faststart)
                        .read_bytes())
    middle = len(damaged) // 2
    damaged[middle:middle + 2000] = random.Random(0).randbytes(2000)

    (folder / "folder.mp4").mkdir()
    os.mkfifo(folder / "fifo.mp4")
    (folder / "dangling.mp4").symlink_to(folder / "nothing")
    (folder / "fifo-link.mp4").symlink_to(folder / "fifo.mp4")
    with av.open(str(folder / "sound.mp4"), "w") as sound:
        sound.mux(encode_silence(sound.add_stream("aac", rate=16000, layout="mono"), 20))
    write_clip(folder / "part.ts", pictures(60))
    return {
        "missing": (folder / "missing.mp4", "No such file"),
        "dangling-link": (folder / "dangling.mp4", "No such file"),
        "directory": (folder / "folder.mp4", "a directory"),
        "fifo": (folder / "fifo.mp4", "a FIFO"),
        "link-to-a-fifo": (folder / "fifo-link.mp4", "a FIFO"),
        "device": (Path("/dev/null"), "a device"),
        "zero-bytes": (file("zero.mp4", b""), "zero bytes"),
        "null-byte-in-the-name": ("a\0b.mp4", "null"),
        "sound-only": (folder / "sound.mp4", "no video stream"),
        "garbage": (file("garbage.mp4", random.Random(1).randbytes(9000)), "not a video"),
        "text": (file("text.mp4", b"<html>404 Not Found</html>"), "not a video"),
        "one-byte": (file("one.mp4", b"x"), "not a video"),
        "hls-playlist": (file("list.mp4", b"#EXTM3U\n#EXTINF:3,\npart.ts\n#EXT-X-ENDLIST\n"),
                         "not a video"),
        "concat-script": (file("cat.mp4", b"ffconcat version 1.0\nfile good.mp4\n"), "not a video"),
        "transport-stream": (folder / "part.ts", "not a video"),
        "half-mp4": (file("half.mp4", clip[:len(clip) // 2]), "truncated"),
        "half-mp4-faststart": (half("faststart.mp4", container=faststart), "truncated"),
        "half-mp4-fragmented": (half("fragmented.mp4", container=fragments), "truncated"),
        "half-mkv": (half("half.mkv"), "truncated"),
        "half-webm": (half("half.webm", **vp9), "truncated"),
        "half-avi": (half("half.avi", codec="mpeg4"), "truncated"),
        "mp4-headers-alone": (file("headers.mp4", clip[:40]), "truncated|damaged|decoded|no video"),
        "noise-in-the-middle": (file("noise.mp4", bytes(damaged)), "cannot be decoded"),
        "edit-list-of-pieces": (file("pieces.mp4", bytes(pieces)), "into 2 pieces"),
        "turned-by-45-degrees": (turned_clip(folder / "45.mp4", (0.7071, 0.7071, -0.7071, 0.7071)),
                                 "multiple of 90"),
        "long-and-thin": (write_clip(folder / "thin.mp4", pictures(4, 22, 22 * 201), "mpeg4"),
                          "200 times"),
    }


REFUSED = ["missing", "dangling-link", "directory", "fifo", "link-to-a-fifo", "device",
           "zero-bytes", "null-byte-in-the-name", "sound-only", "garbage", "text", "one-byte",
           "hls-playlist", "concat-script", "transport-stream", "half-mp4", "half-mp4-faststart",
           "half-mp4-fragmented", "half-mkv", "half-webm", "half-avi", "mp4-headers-alone",
           "noise-in-the-middle", "edit-list-of-pieces", "turned-by-45-degrees", "long-and-thin"]


@pytest.fixture(scope="module")
def refused(tmp_path_factory):
    return refused_clips(tmp_path_factory.mktemp("refused"))


@pytest.mark.parametrize("name", REFUSED)
def test_refused_with_file_and_reason(refused, name):
    path, reason = refused[name]
    with pytest.raises(media.MediaError, match=reason) as error:
        media.read_frames(path)
    assert str(error.value).startswith(f"{path}: ")


def test_every_refused_clip_has_its_case(refused):
    assert sorted(refused) == sorted(REFUSED)


def test_decord_is_not_confused_by_failures(refused, tmp_path):
    path = write_clip(tmp_path / "a.mp4", pictures(60), options={"bf": "3", "g": "10"})
    before, _ = media.read_frames(path)
    for bad, _ in refused.values():
        with pytest.raises(media.MediaError):
            media.read_frames(bad)
        after, _ = media.read_frames(path)
        assert (before == after).all()


def test_a_name_that_is_not_unicode_is_refused_or_read(tmp_path):
    path = os.fsencode(write_clip(tmp_path / "a.mp4", pictures(4)))
    strange = os.fsdecode(path[:-4] + b"\xff.mp4")
    os.rename(path, strange)
    with pytest.raises(media.MediaError, match="cannot be decoded"):
        media.read_frames(strange)


# ---------------------------------------------------------------------------------------- pictures


def scene(height=56, width=84):
    """A photograph's like: uint8 (H, W, 3), smooth, no two corners alike."""
    y, x = np.mgrid[0:height, 0:width]
    return np.stack([x * 255 // width, y * 255 // height, (x + y) * 255 // (height + width)],
                    -1).astype(np.uint8)


def png(width, height, depth, color, rows):
    """A PNG by hand, for what Pillow does not write: 16 bits a channel, forged sizes."""
    def chunk(kind, data):
        return (struct.pack(">I", len(data)) + kind + data
                + struct.pack(">I", zlib.crc32(kind + data)))
    header = struct.pack(">IIBBBBB", width, height, depth, color, 0, 0, 0)
    return (b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header)
            + chunk(b"IDAT", zlib.compress(rows)) + chunk(b"IEND", b""))


def over_white(colors, alpha):
    alpha = alpha[..., None].astype(float) / 255
    return colors * alpha + 255 * (1 - alpha)


def picture_cases(folder):
    """{name: (path, expected RGB (H, W, 3), largest difference)}."""
    rgb = scene()
    gray = rgb[..., 0]
    wide = np.arange(56 * 84, dtype=np.uint16).reshape(56, 84) * 13  # 16 bits, up to 61139
    alpha = np.tile(np.linspace(0, 255, 84).astype(np.uint8), (56, 1))
    image = Image.fromarray(rgb)
    palette = image.quantize(64)
    cases = {}

    def case(name, file, source, expected, difference=0, **options):
        source.save(folder / file, **options)
        cases[name] = (folder / file, np.broadcast_to(np.asarray(expected, float), rgb.shape),
                       difference)

    case("rgb-png", "rgb.png", image, rgb)
    case("rgb-jpeg", "rgb.jpg", image, rgb, 6, quality=95, subsampling=0)
    case("rgb-webp", "rgb.webp", image, rgb, 0, lossless=True)
    case("rgb-bmp", "rgb.bmp", image, rgb)
    case("rgb-tiff-lzw", "rgb.tif", image, rgb, compression="tiff_lzw")
    case("rgb-ppm", "rgb.ppm", image, rgb)
    case("gray", "gray.png", Image.fromarray(gray), gray[..., None])
    case("one-bit", "bit.png", Image.fromarray(gray > 127), np.where(gray > 127, 255, 0)[..., None])
    case("alpha", "alpha.png", Image.fromarray(np.dstack([rgb, alpha])), over_white(rgb, alpha), 1)
    case("alpha-webp", "alpha.webp", Image.fromarray(np.dstack([rgb, alpha])),
         over_white(rgb, alpha), 1, lossless=True, exact=True)
    case("gray-alpha", "la.png", Image.merge("LA", [Image.fromarray(gray), Image.fromarray(alpha)]),
         over_white(gray[..., None], alpha), 1)
    colors = np.array(palette.convert("RGB"))
    case("palette", "p.png", palette, colors)
    see_through = np.array(palette) == 5
    case("palette-transparent", "pt.png", palette,
         np.where(see_through[..., None], 255, colors), transparency=5)
    case("palette-partly-transparent", "pa.png", palette,
         over_white(colors, np.array(palette) * 3), 1, transparency=bytes(range(0, 192, 3)))
    case("gif-transparent", "pt.gif", palette, np.where(see_through[..., None], 255, colors),
         transparency=5)
    case("cmyk-jpeg", "cmyk.jpg", image.convert("CMYK"), rgb, 6, quality=98, subsampling=0)
    case("cmyk-tiff", "cmyk.tif", image.convert("CMYK"), rgb, 1)
    case("16-bit-png", "16.png", Image.fromarray(wide), (wide / 257)[..., None], 1)
    case("16-bit-tiff", "16.tif", Image.fromarray(wide), (wide / 257)[..., None], 1)
    case("16-bit-pgm", "16.pgm", Image.fromarray(wide.astype(np.int32)), (wide / 257)[..., None], 1)
    deep = np.stack([wide, wide[::-1], wide[:, ::-1]], -1)
    rows = b"".join(b"\0" + row.astype(">u2").tobytes() for row in deep)
    (folder / "48.png").write_bytes(png(84, 56, 16, 2, rows))
    cases["16-bit-rgb-png"] = (folder / "48.png", deep / 257, 1)
    others = [Image.fromarray(255 - rgb), Image.fromarray(rgb[::-1].copy())]
    animated = {"save_all": True, "append_images": others, "duration": 100}
    case("animated-webp", "ani.webp", image, rgb, lossless=True, **animated)
    case("animated-png", "ani.png", image, rgb, **animated)
    case("animated-gif", "ani.gif", palette, colors, save_all=True, duration=100,
         append_images=[Image.fromarray(255 - rgb).quantize(64)])
    case("multi-page-tiff", "pages.tif", image, rgb, save_all=True, append_images=others)
    return cases


PICTURES = ["rgb-png", "rgb-jpeg", "rgb-webp", "rgb-bmp", "rgb-tiff-lzw", "rgb-ppm", "gray",
            "one-bit", "alpha", "alpha-webp", "gray-alpha", "palette", "palette-transparent",
            "palette-partly-transparent", "gif-transparent", "cmyk-jpeg", "cmyk-tiff", "16-bit-png",
            "16-bit-tiff", "16-bit-pgm", "16-bit-rgb-png", "animated-webp", "animated-png",
            "animated-gif", "multi-page-tiff"]


@pytest.fixture(scope="module")
def made_pictures(tmp_path_factory):
    return picture_cases(tmp_path_factory.mktemp("pictures"))


@pytest.mark.parametrize("name", PICTURES)
def test_a_picture_in_rgb(made_pictures, name):
    path, expected, difference = made_pictures[name]
    frames = media.read_image(path)
    assert frames.dtype == np.uint8
    assert frames.shape == (1, 56, 84, 3)
    assert np.abs(frames[0] - expected).max() <= difference


def test_every_picture_has_its_case(made_pictures):
    assert sorted(made_pictures) == sorted(PICTURES)


EXIF = {1: lambda a: a, 2: lambda a: a[:, ::-1], 3: lambda a: a[::-1, ::-1], 4: lambda a: a[::-1],
        5: lambda a: a.swapaxes(0, 1), 6: lambda a: np.rot90(a, -1),
        7: lambda a: a[::-1, ::-1].swapaxes(0, 1), 8: lambda a: np.rot90(a)}


@pytest.mark.parametrize("file", ["a.jpg", "a.png", "a.webp", "a.tif"])
@pytest.mark.parametrize("orientation", EXIF)
def test_exif_orientation_is_applied(tmp_path, orientation, file):
    exif = Image.Exif()
    exif[0x0112] = orientation
    options = {"a.jpg": {"quality": 95, "subsampling": 0}, "a.webp": {"lossless": True}}
    Image.fromarray(scene()).save(tmp_path / file, exif=exif, **options.get(file, {}))
    expected = EXIF[orientation](scene())
    frames = media.read_image(tmp_path / file)
    assert frames.shape == (1, *expected.shape)
    assert np.abs(frames[0].astype(int) - expected).max() <= (6 if file == "a.jpg" else 0)


def test_16_bits_are_scaled_at_both_ends(tmp_path):
    levels = np.array([[0, 128, 129, 257, 32768, 65406, 65407, 65535]], np.uint16)
    Image.fromarray(levels).save(tmp_path / "a.png")
    with Image.open(tmp_path / "a.png") as image:
        rgb = np.array(media.to_rgb(image))
    assert rgb[0].tolist() == [[v] * 3 for v in (0, 0, 1, 1, 128, 254, 255, 255)]


def test_one_pixel(tmp_path):
    Image.new("RGB", (1, 1), (10, 200, 30)).save(tmp_path / "a.png")
    frames = media.read_image(tmp_path / "a.png")
    assert frames.shape == (1, 56, 56, 3)
    assert (frames == [10, 200, 30]).all()


def refused_pictures(folder):
    """{name: (path, reason)} of what read_image must refuse."""
    noise = Image.fromarray(np.random.default_rng(0).integers(0, 256, (90, 90, 3), np.uint8))
    cases = {}

    def half(name, **options):
        noise.save(folder / f"whole.{name}", **options)
        content = (folder / f"whole.{name}").read_bytes()
        (folder / f"half.{name}").write_bytes(content[:len(content) // 2])
        cases[f"half-{name}"] = (folder / f"half.{name}", "truncated|decod|broken")

    def file(name, content, reason):
        path = folder / f"{name}.png"
        path.write_bytes(content)
        cases[name] = (path, reason)

    for name in ("png", "gif", "bmp", "webp", "tif", "ppm", "jpg"):
        half(name)
    half("progressive.jpg", progressive=True)
    file("zero-bytes", b"", "zero bytes")
    file("text", b"<html>404 Not Found</html>", "cannot identify")
    file("postscript", b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n%%EOF\n",
         "cannot identify")
    file("bomb", png(20000, 20000, 8, 2, b""), "bomb")
    file("small-bomb", png(10000, 10000, 1, 0, bytes(10000 * 1251)), "bomb")
    file("bomb-in-width", png(2**31 - 1, 1, 8, 2, b""), "bomb")
    Image.new("RGB", (20000, 10)).save(folder / "thin.png")
    Image.fromarray(np.full((9, 9), 70000, np.int32)).save(folder / "int.tif")
    Image.fromarray(np.full((9, 9), 0.5, np.float32)).save(folder / "float.tif")
    (folder / "folder.png").mkdir()
    os.mkfifo(folder / "fifo.png")
    return cases | {
        "20000x10": (folder / "thin.png", "20000x10 has one side over 200 times"),
        "32-bit": (folder / "int.tif", "no fixed white"),
        "floating-point": (folder / "float.tif", "no fixed white"),
        "missing": (folder / "missing.png", "No such file"),
        "directory": (folder / "folder.png", "a directory"),
        "fifo": (folder / "fifo.png", "a FIFO"),
        "device": (Path("/dev/zero"), "a device"),
    }


REFUSED_PICTURES = ["half-png", "half-gif", "half-bmp", "half-webp", "half-tif", "half-ppm",
                    "half-jpg", "half-progressive.jpg", "zero-bytes", "text", "postscript", "bomb",
                    "small-bomb", "bomb-in-width", "20000x10", "32-bit", "floating-point",
                    "missing", "directory", "fifo", "device"]


@pytest.fixture(scope="module")
def bad_pictures(tmp_path_factory):
    return refused_pictures(tmp_path_factory.mktemp("bad-pictures"))


@pytest.mark.parametrize("name", REFUSED_PICTURES)
def test_a_refused_picture_says_why(bad_pictures, recwarn, name):
    path, reason = bad_pictures[name]
    with pytest.raises(media.MediaError, match=reason) as error:
        media.read_image(path)
    assert str(error.value).startswith(f"{path}: ")
    assert len(str(error.value)) > len(f"{path}: ")
    assert not recwarn.list


def test_every_refused_picture_has_its_case(bad_pictures):
    assert sorted(bad_pictures) == sorted(REFUSED_PICTURES)


# ------------------------------------------------------------------- agreement with transformers


@pytest.fixture(scope="module")
def pil_processor():
    """transformers' own Qwen2-VL image processor on Pillow, for the limits of an image."""
    module = pytest.importorskip("transformers.models.qwen2_vl.image_processing_pil_qwen2_vl")
    return module, module.Qwen2VLImageProcessorPil(min_pixels=4 * 28 * 28, max_pixels=256 * 28 * 28)


@settings(deadline=None)
@given(height=st.integers(1, 5000), width=st.integers(1, 5000), low=st.integers(1, 300),
       high=st.integers(1, 900))
def test_smart_resize_equals_transformers(pil_processor, height, width, low, high):
    if max(height, width) > 200 * min(height, width):
        return
    low, high = 784 * min(low, high), 784 * max(low, high)
    ours = media.smart_resize(height, width, low, high)
    assert ours == pil_processor[0].smart_resize(height, width, 28, low, high)


@pytest.mark.parametrize("size", [(480, 640), (33, 57), (1200, 900), (448, 448), (60, 900)],
                         ids=str)
def test_a_resized_picture_equals_the_image_processor(tmp_path, pil_processor, size):
    """The largest difference is 0."""
    pixels = np.random.default_rng(0).integers(0, 256, (*size, 3), np.uint8)
    Image.fromarray(pixels).save(tmp_path / "a.png")
    ours = media.read_image(tmp_path / "a.png")[0]
    out = pil_processor[1](Image.fromarray(pixels), do_rescale=False, do_normalize=False,
                           return_tensors="np")
    _, rows, columns = out["image_grid_thw"][0]
    # A row of pixel_values is one patch: (C, 2 equal frames, 14, 14), in blocks of 2 x 2 patches.
    patches = out["pixel_values"].reshape(rows // 2, columns // 2, 2, 2, 3, 2, 14, 14)
    patches = patches[..., 0, :, :]
    theirs = patches.transpose(0, 2, 5, 1, 3, 6, 4).reshape(rows * 14, columns * 14, 3)
    assert np.abs(ours.astype(int) - theirs).max() == 0


@pytest.fixture(scope="module")
def their_sample_frames():
    """transformers' sample_frames itself, cut out of a file that needs torchvision to import."""
    torch = pytest.importorskip("torch")
    folder = Path(pytest.importorskip("transformers").__file__).parent
    source = (folder / "models/qwen2_vl/video_processing_qwen2_vl.py").read_text()
    (function,) = [node for node in ast.walk(ast.parse(source))
                   if isinstance(node, ast.FunctionDef) and node.name == "sample_frames"]
    function.returns, function.decorator_list = None, []
    for argument in function.args.args:
        argument.annotation = None
    names = {"math": math, "torch": torch}
    exec(compile(ast.Module([function], []), "sample_frames", "exec"), names)  # noqa: S102

    class Metadata:
        def __init__(self, total, fps):
            self.total_num_frames, self.fps = total, fps

    class Processor:
        num_frames, fps, temporal_patch_size, min_frames = None, 2, 2, 4

    def sample(total, fps, max_frames):
        processor = Processor()
        processor.max_frames = max_frames
        return names["sample_frames"](processor, Metadata(total, fps)).tolist()
    return sample


@settings(deadline=None)
@given(total=st.integers(2, 20000), rate=st.sampled_from([1, 8, 10, 12.5, 15, 24, 25, 30, 60,
                                                          24000 / 1001, 30000 / 1001]),
       max_frames=st.sampled_from([2, 4, 6, 7, 8, 12, 16, 32, 64]))
def test_sampling_equals_transformers(their_sample_frames, total, rate, max_frames):
    """The same frames; theirs can have one more, an odd number, where float32 runs over the end."""
    ours, seconds = media.sample_indices(total, rate, max_frames)
    theirs = their_sample_frames(total, rate, max_frames)
    assert ours == theirs[:len(ours)] == formula(total, rate, max_frames)
    assert len(theirs) - len(ours) in (0, 1)
    assert seconds == total / rate / len(ours)


@settings(deadline=None)
@given(total=st.integers(1, 3000), rate=st.sampled_from([10.0, 24.0, 25.0, 30000 / 1001, 30.0]))
def test_equal_stamps_give_the_index_formula(total, rate):
    edges = np.arange(total + 1) / rate
    constant, seconds = media.sample_indices(total, rate, 16)
    timed, also_seconds = media.sample_indices(total, rate, 16, edges)
    assert also_seconds == pytest.approx(seconds)
    assert len(timed) == len(constant)
    # A moment within a millisecond of the next frame counts as that frame's.
    assert all(t - c in (0, 1) for t, c in zip(timed, constant, strict=True))


# -------------------------------------------------------------------------------------------- pool


@pytest.fixture(scope="module")
def clip(tmp_path_factory):
    return write_clip(tmp_path_factory.mktemp("pool") / "a.mp4", pictures(60))


@pytest.fixture
def pool():
    with media.DecoderPool(num_workers=1, timeout=20) as pool:
        yield pool


def pid_of(pool):
    (worker,) = pool.workers.values()
    return worker.process.pid


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
    with media.DecoderPool(num_workers=2, timeout=20) as pool:
        for i in range(12):
            if i % 3:
                path = write_clip(tmp_path / f"{i}.mp4", pictures(10 + i, 56, 84 + 28 * (i % 2)))
                futures.append(pool.submit("video", path, max_frames=4 + i % 5))
                expected.append(media.read_frames(path, max_frames=4 + i % 5))
            else:
                Image.new("RGB", (60, 60), (i, 2 * i, 3 * i)).save(tmp_path / f"{i}.png")
                futures.append(pool.submit("image", tmp_path / f"{i}.png", max_pixels=9 * 784))
                expected.append((media.read_image(tmp_path / f"{i}.png", max_pixels=9 * 784), 0.0))
        for i in random.Random(0).sample(range(12), 12):  # awaited in any order
            frames, seconds = futures[i].result(30)
            assert frames.dtype == np.uint8
            assert (frames == expected[i][0]).all()
            assert seconds == expected[i][1]


def test_a_refusal_arrives_word_for_word(pool, refused):
    path, _ = refused["half-mkv"]
    with pytest.raises(media.MediaError) as here:
        media.read_frames(path)
    with pytest.raises(media.MediaError) as there:
        pool.submit("video", path).result(30)
    assert str(there.value) == str(here.value)


def test_a_bug_arrives_with_its_traceback(pool, clip):
    with pytest.raises(RuntimeError, match="(?s)Traceback.*TypeError.*no_such_limit"):
        pool.submit("video", clip, no_such_limit=1).result(30)
    assert pool.submit("video", clip).result(30)[0].shape == (4, HEIGHT, WIDTH, 3)


def test_a_hung_decoder_is_killed_and_replaced(clip):
    with media.DecoderPool(num_workers=1, timeout=1.5) as pool:
        pool.submit("video", clip).result(30)
        pid = pid_of(pool)
        os.kill(pid, signal.SIGSTOP)
        with pytest.raises(media.MediaError, match=f"{clip}.*within 1.5 seconds"):
            pool.submit("video", clip).result(30)
        assert not is_alive(pid)
        assert pool.submit("video", clip).result(30)[0].shape == (4, HEIGHT, WIDTH, 3)
        assert pid_of(pool) != pid


def test_a_slow_job_exceeds_its_timeout(tmp_path):
    path = write_clip(tmp_path / "a.avi", pictures(3000, 56, 56), codec="mpeg4")
    with media.DecoderPool(num_workers=1, timeout=0.001) as pool, pytest.raises(
            media.MediaError, match="within 0.001 seconds"):
        pool.submit("video", path).result(30)


@pytest.mark.parametrize("number", [signal.SIGSEGV, signal.SIGABRT, signal.SIGKILL],
                         ids=lambda n: n.name)
def test_a_crash_of_the_decoder_is_survived(pool, clip, number):
    pool.submit("video", clip).result(30)
    pid = pid_of(pool)
    os.kill(pid, signal.SIGSTOP)  # so that it is certain to be in the middle of the job
    future = pool.submit("video", clip)
    while not future.running():
        time.sleep(0.01)
    time.sleep(0.2)
    os.kill(pid, number)
    os.kill(pid, signal.SIGCONT)
    with pytest.raises(media.MediaError, match=f"{clip}.*{number.name}"):
        future.result(30)
    assert pool.submit("video", clip).result(30)[1] == 0.5


def test_a_death_between_two_jobs_is_no_fault_of_the_next(pool, clip):
    pool.submit("video", clip).result(30)
    os.kill(pid_of(pool), signal.SIGKILL)
    assert wait_until_dead([pid_of(pool)])
    assert pool.submit("video", clip).result(30)[1] == 0.5


def test_damaged_files_never_break_the_pool(tmp_path, clip):
    """300 damaged headers: each is refused or decoded; a crash is a refusal."""
    generator = random.Random(0)
    sources = [clip.read_bytes()]
    for name, codec in (("a.webm", "libvpx"), ("a.avi", "mpeg4"), ("a.wmv", "wmv2")):
        sources.append(write_clip(tmp_path / name, pictures(8), codec=codec).read_bytes())
    for name in ("a.png", "a.jpg", "a.gif", "a.tif", "a.webp"):
        Image.fromarray(scene()).save(tmp_path / name)
        sources.append((tmp_path / name).read_bytes())
    with media.DecoderPool(num_workers=2, timeout=20) as pool:
        futures = []
        for i in range(300):
            content = bytearray(generator.choice(sources))
            for _ in range(generator.randint(1, 8)):
                at = generator.randrange(len(content))
                content[generator.choice([at, at % 300, -1 - at % 900])] = generator.randrange(256)
            (tmp_path / str(i)).write_bytes(content)
            is_image = content[:4] in (b"\x89PNG", b"GIF8", b"II*\0") or content[6:10] == b"JFIF"
            futures.append(pool.submit("image" if is_image else "video", tmp_path / str(i)))
        for i, future in enumerate(futures):
            try:
                assert future.result(60)[0].ndim == 4
            except media.MediaError as error:
                assert str(tmp_path / str(i)) in str(error)


def test_close_cancels_what_waits(clip):
    pool = media.DecoderPool(num_workers=1, timeout=60)
    pool.submit("video", clip).result(30)
    pid = pid_of(pool)
    os.kill(pid, signal.SIGSTOP)
    running, waiting = pool.submit("video", clip), pool.submit("video", clip)
    while not running.running():
        time.sleep(0.01)
    pool.close()
    assert wait_until_dead([pid])
    with pytest.raises(RuntimeError, match="closed"):
        running.result(5)
    with pytest.raises(CancelledError):
        waiting.result(5)
    with pytest.raises(RuntimeError, match="closed"):
        pool.submit("video", clip)
    pool.close()


def test_wrong_arguments_are_the_callers_error(pool, clip):
    with pytest.raises(ValueError, match="'sound'"):
        pool.submit("sound", clip)
    with pytest.raises(ValueError, match="0 workers"):
        media.DecoderPool(num_workers=0, timeout=1)


@pytest.mark.skipif(sys.platform != "linux", reason="PR_SET_PDEATHSIG is Linux's")
@pytest.mark.parametrize("state", ["idle", "busy"])
def test_no_worker_outlives_a_killed_parent(clip, state):
    program = (
        "import media, sys, time, os, signal\n"
        "pool = media.DecoderPool(num_workers=2, timeout=60)\n"
        "for job in [pool.submit('video', sys.argv[1]) for _ in range(20)]: job.result()\n"
        "pids = [w.process.pid for w in pool.workers.values()]\n"
        "if sys.argv[2] == 'busy':\n"
        "    for pid in pids: os.kill(pid, signal.SIGSTOP)\n"  # sees no end of its input
        "    for pid in pids: pool.submit('video', sys.argv[1])\n"
        "print(*pids, flush=True)\n"
        "time.sleep(60)\n")
    parent = subprocess.Popen([sys.executable, "-c", program, str(clip), state],
                              stdout=subprocess.PIPE, cwd=ROOT)
    pids = [int(pid) for pid in parent.stdout.readline().split()]
    assert pids
    assert all(is_alive(pid) for pid in pids)
    parent.kill()
    parent.wait()
    parent.stdout.close()
    assert wait_until_dead(pids)


def test_a_program_that_forgets_to_close_ends(clip):
    program = ("import media, sys\n"
               "pool = media.DecoderPool(num_workers=1, timeout=60)\n"
               "for _ in range(50): last = pool.submit('video', sys.argv[1])\n"
               "raise SystemExit(7)\n")
    done = subprocess.run([sys.executable, "-c", program, str(clip)], timeout=20, check=False,
                          cwd=ROOT, capture_output=True)
    assert done.returncode == 7


def test_noise_on_standard_output_does_not_reach_the_replies(tmp_path, monkeypatch):
    (tmp_path / "decord.py").write_text("import os; os.write(1, b'noise'); print('more noise')")
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    Image.new("RGB", (56, 56), "red").save(tmp_path / "a.png")
    with media.DecoderPool(num_workers=1, timeout=20) as pool:
        assert pool.submit("image", tmp_path / "a.png").result(30)[0].shape == (1, 56, 56, 3)


def test_a_worker_that_cannot_start_says_so(tmp_path, monkeypatch):
    (tmp_path / "decord.py").write_text("raise ImportError('no decoder here')")
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    with media.DecoderPool(num_workers=1, timeout=20) as pool, pytest.raises(
            RuntimeError, match="did not start"):
        pool.submit("image", tmp_path / "a.png").result(30)


def test_a_worker_imports_no_torch():
    program = "import media, sys; sys.exit('torch' in sys.modules or 'decord' in sys.modules)"
    subprocess.run([sys.executable, "-c", program], check=True, cwd=ROOT)


def test_the_examples_in_the_docstrings():
    assert doctest.testmod(media).attempted == 3
    assert doctest.testmod(media).failed == 0
