"""Video and image files to resized frames, in this process or in a pool of worker processes.

    read_frames   a clip: uint8 (F, H, W, 3) and the seconds between its sampled frames
    read_image    a picture: uint8 (1, H, W, 3)
    DecoderPool   both, in processes that may crash or hang without harm to this one

A file is decoded rightly or refused by MediaError, which names the file and the reason. Nothing of
torch is imported here: a worker process starts in 0.1 s.

decord returns wrong frames, without a word, in the cases below; each is met where it is named.

    case                                                    met in
    lost frames replaced by their neighbours                read_frames (fault_tol)
    seeking where display order is not decoding order,      exact_seek, decode_frames
        or in AVI, WMV, MPEG (off by seconds)
    frames that an mp4 edit list hides are counted          read_timeline
    rotated mp4: decord2 gives garbage; mirrored: both      mp4_layout, upright

Shapes: F frames, H and W pixels. Times are in seconds, sizes in pixels.
"""

import contextlib
import ctypes
import json
import math
import mmap
import os
import queue
import re
import select
import shutil
import signal
import stat
import struct
import subprocess
import sys
import tempfile
import threading
import time
import traceback
import warnings
from concurrent.futures import Future
from dataclasses import dataclass

import numpy as np
from PIL import Image, ImageOps

from infra.errors import MediaError

FACTOR = 28  # pixels: 14 a patch, 2 patches merged into one token
MAX_ASPECT = 200  # long side over short side, Qwen's limit
MAX_SOURCE_PIXELS = 89_478_485  # 256 MiB in RGB, where Pillow begins to warn of a bomb


def smart_resize(height, width, min_pixels, max_pixels, factor=FACTOR):
    """The size (h, w) in pixels at which Qwen2-VL sees a picture: transformers' smart_resize.

    Both sides are multiples of `factor`, h * w lies within [min_pixels, max_pixels] where that is
    possible, and the aspect ratio is kept as nearly as possible.

    >>> smart_resize(480, 640, 4 * 28 * 28, 128 * 28 * 28)
    (252, 364)
    """
    h, w = round(height / factor) * factor, round(width / factor) * factor
    if h * w > max_pixels:
        scale = math.sqrt(height * width / max_pixels)
        h = max(factor, math.floor(height / scale / factor) * factor)
        w = max(factor, math.floor(width / scale / factor) * factor)
    elif h * w < min_pixels:
        scale = math.sqrt(min_pixels / (height * width))
        h = math.ceil(height * scale / factor) * factor
        w = math.ceil(width * scale / factor) * factor
    # transformers returns a side of 0 for a thin picture when min_pixels is 0.
    return max(h, factor), max(w, factor)


def sample_indices(total, fps, max_frames, edges=None, target_fps=2.0, min_frames=4):
    """Which frames of a clip are looked at: transformers' Qwen2VLVideoProcessor.sample_frames.

    Two frames a second, at least min_frames, at most max_frames, an even number, uniformly spaced
    from the first on; fewer for a shorter clip, the one frame of a clip of one frame.

    Args:
        total: frames in the clip.
        fps: frames per second, None with edges.
        edges: None for a constant rate: frame floor(k * total / n), in integers (transformers
            computes it in float32, and one frame too many in 1 of 14,000 cases). Else float
            (total + 1,), the seconds at which each frame appears and, last, the end: the frame
            shown at k * duration / n.

    Returns:
        (list of n ascending indices, seconds between two of them).

    >>> sample_indices(total=90, fps=30.0, max_frames=16)
    ([0, 15, 30, 45, 60, 75], 0.5)
    """
    duration = total / fps if edges is None else float(edges[-1] - edges[0])
    most = min(max_frames, total) // 2 * 2
    n = max(1, int(min(max(duration * target_fps, min_frames), most) // 2 * 2))
    if edges is None:
        return [k * total // n for k in range(n)], duration / n
    moments = edges[0] + duration / n * np.arange(n)
    # A millisecond late, because stamps are float32, and whole milliseconds in Matroska.
    return (np.searchsorted(edges[:-1], moments + 1e-3, "right") - 1).tolist(), duration / n


def check_file(path):
    """Refuse, before it is opened, whatever is not a regular file with something in it.

    Opening a FIFO or a device can block for ever. Links are followed.
    """
    try:
        info = os.stat(path)
    except (OSError, ValueError) as error:  # ValueError: a null byte in the name
        raise MediaError(f"{path}: {getattr(error, 'strerror', None) or error}") from error
    kind = stat.S_IFMT(info.st_mode)
    if kind != stat.S_IFREG:
        names = {stat.S_IFDIR: "a directory", stat.S_IFIFO: "a FIFO", stat.S_IFSOCK: "a socket"}
        raise MediaError(f"{path}: {names.get(kind, 'a device')}, not a regular file")
    if info.st_size == 0:
        raise MediaError(f"{path}: empty, zero bytes")


def resize(image, min_pixels, max_pixels, path):
    """A Pillow RGB image to uint8 (H, W, 3) at smart_resize's size, bicubic."""
    width, height = image.size
    if max(height, width) > MAX_ASPECT * min(height, width):
        raise MediaError(f"{path}: {width}x{height} has one side over {MAX_ASPECT} times the other")
    h, w = smart_resize(height, width, min_pixels, max_pixels)
    if (h, w) != (height, width):
        image = image.resize((w, h), Image.Resampling.BICUBIC)
    return np.array(image)  # (H, W, 3)


# ---------------------------------------------------------------------------------------- pictures

# EPS would start Ghostscript, and nobody's data set holds the other thirty that Pillow knows.
IMAGE_FORMATS = ("JPEG", "PNG", "WEBP", "GIF", "BMP", "TIFF", "PPM", "ICO", "TGA", "JPEG2000")


def to_rgb(image):
    """A loaded Pillow image of any mode to RGB: alpha on white, 16 bits scaled to 8.

    Raises ValueError for numbers whose white is unknown (32-bit and float TIFF).
    """
    if image.mode == "F":
        raise ValueError("floating-point pixels have no fixed white")
    if image.mode.startswith("I"):  # Pillow's own conversion clips at 255
        levels = np.asarray(image).astype(np.int64)
        if levels.min() < 0 or levels.max() > 65535:
            raise ValueError("32-bit pixels have no fixed white")
        image = Image.fromarray(((levels * 255 + 32767) // 65535).astype(np.uint8))
    if image.has_transparency_data:
        image = image.convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
    return image.convert("RGB")


def read_image(path, min_pixels=4 * 28 * 28, max_pixels=256 * 28 * 28):
    """Decode a picture, upright and in RGB; of an animation the first frame.

    Returns:
        uint8 (1, H, W, 3), H and W by smart_resize.
    Raises:
        MediaError: no regular file, no picture, truncated, too long and thin, or a bomb.
    """
    check_file(path)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of bombs: the limit below refuses them
            with Image.open(path, formats=IMAGE_FORMATS) as image:
                width, height = image.size
                if width * height > MAX_SOURCE_PIXELS:
                    raise ValueError(f"{width}x{height} is over {MAX_SOURCE_PIXELS} pixels, a bomb")
                image = to_rgb(ImageOps.exif_transpose(image))
    except (OSError, ValueError, SyntaxError, EOFError, struct.error,
            Image.DecompressionBombError) as error:
        raise MediaError(f"{path}: {error}") from error
    return resize(image, min_pixels, max_pixels, path)[None]  # (1, H, W, 3)


# ------------------------------------------------------------------------------------------- clips

# What a clip begins with. ffmpeg would also open playlists (HLS, ffconcat), which are text that
# names other files: frames of a clip that the row does not name. Of an MPEG transport stream decord
# loses the first second.
CONTAINERS = {
    "mp4": rb"....(ftyp|moov|mdat|free|skip|wide|pnot)",
    "matroska": rb"\x1aE\xdf\xa3",
    "riff": rb"RIFF....AVI ",
    "other": rb"FLV|\x30\x26\xb2\x75|\0\0\x01[\xba\xb3]|OggS|GIF8|YUV4MPEG2|DKIF",
}


@dataclass(frozen=True)
class Layout:
    """What decord does not say about a file.

    matrix_at: where the mp4 display matrix starts, in bytes, None without one.
    matrix: its a, b, c, d: a pixel (x, y) is shown at (a x + c y, b x + d y).
    shown: seconds that the mp4 edit list shows, None without an edit list.
    pts: int64 (total,), the mp4 table's presentation times in decoding order, None without one.
    in_order: frames are known to be displayed in decoding order.
    """

    matrix_at: int | None = None
    matrix: tuple = (1, 0, 0, 1)
    shown: float | None = None
    pts: np.ndarray | None = None
    in_order: bool = False


def boxes(data, start, end):
    """Yield (kind, start, end) of the payload of each mp4 box (ISO 14496-12) in data[start:end]."""
    while start + 8 <= end:
        size, kind = struct.unpack_from(">I4s", data, start)
        header = 8
        if size == 1 and start + 16 <= end:
            size, header = struct.unpack_from(">Q", data, start + 8)[0], 16
        elif size == 0:  # to the end of the file
            size = end - start
        if size < header:
            return
        yield kind, start + header, start + size
        start += size


def find(data, path, start, end):
    """The (start, end) of every mp4 box at a path of kinds such as b"moov/trak" in data."""
    kind, _, rest = path.partition(b"/")
    found = [(s, min(e, end)) for k, s, e in boxes(data, start, end) if k == kind]
    return found if not rest else [deep for s, e in found for deep in find(data, rest, s, e)]


def mp4_layout(path, data):
    """Layout of an mp4 or mov file: truncation, rotation, edit list, order of the frames."""
    for kind, _, end in boxes(data, 0, len(data)):
        if end > len(data) and kind in (b"moov", b"moof", b"mdat"):
            raise MediaError(f"{path}: truncated, {len(data)} of at least {end} bytes")
    tracks = find(data, b"moov/trak", 0, len(data))
    tracks = [t for t in tracks if any(data[s + 8:s + 12] == b"vide"
                                       for s, _ in find(data, b"mdia/hdlr", *t))]
    if not tracks:
        return Layout()
    track, (movie, _) = tracks[0], find(data, b"moov/mvhd", 0, len(data))[0]
    header = find(data, b"tkhd", *track)[0][0]
    matrix_at = header + (52 if data[header] == 1 else 40)  # version 1 has 64-bit times
    a, b, _, c, d = struct.unpack_from(">5i", data, matrix_at)
    timescale = struct.unpack_from(">I", data, movie + (20 if data[movie] == 1 else 12))[0]

    shown = None
    for start, _ in find(data, b"edts/elst", *track):
        entry = ">QqI" if data[start] == 1 else ">IiI"
        count = struct.unpack_from(">I", data, start + 4)[0]
        edits = [struct.unpack_from(entry, data, start + 8 + i * struct.calcsize(entry))
                 for i in range(min(count, 100))]
        edits = [length for length, media_time, _ in edits if media_time != -1]  # -1: a delay
        if len(edits) > 1:
            raise MediaError(f"{path}: its edit list cuts the clip into {len(edits)} pieces")
        if edits:
            shown = edits[0] / timescale if edits[0] else math.inf
    return Layout(matrix_at, (a, b, c, d), shown, mp4_pts(data, track))


def mp4_pts(data, track):
    """Presentation time of each frame in decoding order, int64 (total,); None without a table."""
    def table(kind, dtype):
        for start, end in find(data, b"mdia/minf/stbl/" + kind, *track):
            count = struct.unpack_from(">I", data, start + 4)[0]
            count = min(count, (end - start - 8) // 8)
            return np.frombuffer(data, dtype, 2 * count, start + 8).reshape(-1, 2).astype(np.int64)

    steps, offsets = table(b"stts", ">i4"), table(b"ctts", ">i4")  # rows: how many frames, value
    # A frame takes a byte at least: a count that a forged table claims asks for no memory.
    if steps is None or not 0 < steps[:, 0].sum() <= len(data) or (steps[:, 0] < 0).any():
        return None
    pts = np.cumsum(np.repeat(steps[:, 1], steps[:, 0]))
    if offsets is not None:
        if offsets[:, 0].sum() != len(pts) or (offsets[:, 0] < 0).any():
            return None
        pts = pts + np.repeat(offsets[:, 1], offsets[:, 0])
    return pts


def matroska_layout(path, data):
    """Layout of an mkv or webm file: truncation, and whether its codec reorders frames."""
    def number(at):  # an EBML number: the leading zeros of its first byte say how long it is
        length = 9 - data[at].bit_length()
        bits = 7 * length
        return int.from_bytes(data[at:at + length], "big") & ((1 << bits) - 1), bits, at + length

    size, _, at = number(4)
    segment = at + size
    if data[segment:segment + 4] == b"\x18\x53\x80\x67":
        size, bits, at = number(segment + 4)
        if size != (1 << bits) - 1 and at + size > len(data):  # all ones: a live recording
            raise MediaError(f"{path}: truncated, {len(data)} of {at + size} bytes")
    return Layout(in_order=re.search(rb"V_VP[89]|V_AV1", data[:65536]) is not None)


def read_layout(path):
    """What the container's own headers say, and a refusal of what is cut short."""
    with open(path, "rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as data:
        kinds = [kind for kind, start in CONTAINERS.items() if re.match(start, data, re.DOTALL)]
        if not kinds:
            raise MediaError(f"{path}: not a video (mp4, mov, mkv, webm, avi, wmv, flv, mpg, ogv, "
                             "gif, y4m)")
        if kinds == ["riff"] and struct.unpack_from("<I", data, 4)[0] > len(data):
            raise MediaError(f"{path}: truncated, {len(data)} bytes")
        try:
            if kinds == ["mp4"]:
                return mp4_layout(path, data)
            return matroska_layout(path, data) if kinds == ["matroska"] else Layout()
        except (struct.error, IndexError, ZeroDivisionError) as error:
            raise MediaError(f"{path}: damaged {kinds[0]} headers") from error


def upright(frame, matrix):
    """Show a frame (H, W, 3) as the mp4 display matrix (a, b, c, d) says: (H, W, 3) or (W, H, 3).

    >>> upright(np.array([[1, 2], [3, 4]])[..., None], (0, 1, -1, 0))[..., 0].tolist()
    [[3, 1], [4, 2]]
    """
    a, b, c, d = matrix
    if a == 0:
        frame, a, d = frame.swapaxes(0, 1), c, b
    return frame[::-1 if d < 0 else 1, ::-1 if a < 0 else 1]


def open_video(path, layout):
    """A decord reader of the frames as they are stored, and the matrix that turns them upright."""
    import decord

    decord.logging.set_level(decord.logging.QUIET)
    a, b, c, d = layout.matrix
    if (a and d and (b or c)) or (b and c and (a or d)):
        raise MediaError(f"{path}: turned by an angle that is no multiple of 90 degrees")
    # fault_tol: decord fills a frame that it lost with its neighbour; one is too many.
    options = {"ctx": decord.cpu(0), "num_threads": 1, "fault_tol": 1e-9}
    if (a > 0 and d > 0) or not any(layout.matrix):
        # ffmpeg takes a bare "a:b" for a protocol, not so "/a:b".
        return decord.VideoReader(os.path.abspath(path), **options), (1, 0, 0, 1)
    # decord 0.6.0 turns the frame itself but not a mirrored one, decord2 3.4.0 returns garbage of
    # four channels: they get a copy that says nothing of it. Not from memory: decord crashes there.
    with open(path, "rb") as file, tempfile.TemporaryFile() as copy:
        shutil.copyfileobj(file, copy)
        copy.seek(layout.matrix_at)
        copy.write(struct.pack(">9i", 1 << 16, 0, 0, 0, 1 << 16, 0, 0, 0, 1 << 30))
        copy.seek(0)
        return decord.VideoReader(f"/dev/fd/{copy.fileno()}", **options), layout.matrix


def read_timeline(reader, layout, path):
    """When each frame appears: (float (total + 1,) seconds, the end last; frames hidden before).

    An mp4 edit list hides frames at the start, which the decoder needs but does not return, and at
    the end. decord counts both.
    """
    total, fps = len(reader), reader.get_avg_fps()
    try:
        stamps = np.asarray(reader.get_frame_timestamp(range(total)), np.float64)  # (total, 2)
    except IndexError:  # the headers count frames, the file has none
        raise MediaError(f"{path}: holds none of its {total} frames") from None
    starts, length = stamps[:, 0], stamps[-1, 1] - stamps[-1, 0]
    rated = 0 < fps < math.inf
    if not np.isfinite(stamps).all() or np.abs(stamps).max() > 1e7:  # AVI and MPEG often have none
        if not rated:
            raise MediaError(f"{path}: says neither a frame rate nor when its frames appear")
        return np.arange(total + 1) / fps, 0
    if length <= 0:
        length = 1 / fps if rated else starts[-1] - starts[-2:][0]
    edges = np.append(starts, starts[-1] + length)
    if layout.shown is None:
        return edges, 0
    first, last = np.searchsorted(starts, [-5e-4, layout.shown - 5e-4])  # half a tick of 1/1000 s
    if first == last:
        raise MediaError(f"{path}: its edit list shows no frame")
    return np.append(starts[first:last], min(edges[last], layout.shown)), int(first)


def constant_rate(starts, fps):
    """The rate at which no frame of starts (total,) is half a frame off its place, or None.

    The container's own fps before the stamps' mean: stamps are rounded, in Matroska to 1/1000 s.
    """
    span = starts[-1] - starts[0]
    for rate in (fps, (len(starts) - 1) / span if span > 0 else math.nan):
        if 0 < rate < math.inf:
            drift = np.abs(starts - starts[0] - np.arange(len(starts)) / rate).max()
            if drift < 0.5 / rate:
                return rate
    return None


def exact_seek(reader, layout, hidden):
    """Whether decord's seeking finds the frame it is asked for.

    It takes the place of a key frame in decoding order for its place in display order, which holds
    where nothing that follows a key frame is displayed before it.
    """
    if layout.in_order:
        return True
    if hidden or layout.pts is None or len(layout.pts) != len(reader):
        return False
    place = np.argsort(np.argsort(layout.pts, kind="stable"))
    keys = np.array(reader.get_key_indices(), np.int64)
    return len(keys) > 0 and bool((place[keys] == keys).all())


def decode_frames(reader, indices, exact):
    """Yield uint8 (H, W, 3) for each index of an ascending list without repeats.

    Where seeking is not exact every frame up to the last of them is decoded.
    """
    if exact:
        for index in indices:
            yield reader.get_batch([index]).asnumpy()[0]
    else:
        wanted = set(indices)
        for index in range(indices[-1] + 1):
            frame = reader.next()
            if index in wanted:
                yield frame.asnumpy()


def decoder_reason(error):
    """decord's message without time, place and stack, or what it means."""
    text = re.sub(r"\[[\d:]+\] \S+:\d+: ", "", str(error)).strip().partition("\n")[0]
    if "-1128613112" in text:  # AVERROR_DECODER_NOT_FOUND
        return "this decord has no decoder for its codec (AV1 needs decord2)"
    if "-1381258232" in text:  # AVERROR_STREAM_NOT_FOUND
        return "no video stream"
    return f"cannot be decoded: {text}"


def read_frames(path, max_frames=16, min_pixels=4 * 28 * 28, max_pixels=128 * 28 * 28):
    """Decode uniformly spaced frames of a clip, upright and in RGB.

    Args:
        max_frames: 1 or more; see sample_indices for how many are taken.
        min_pixels, max_pixels: of one resized frame.
    Returns:
        (uint8 (F, H, W, 3), seconds between two sampled frames; of one frame how long it is shown)
    Raises:
        MediaError: no regular file, no clip, truncated, a codec or rotation that cannot be decoded,
            or a frame that is lost.
    """
    import decord

    check_file(path)
    failures = (RuntimeError, AssertionError, UnicodeEncodeError, OSError,
                decord.DECORDError, decord.DECORDLimitReachedError)
    try:
        layout = read_layout(path)
        reader, matrix = open_video(path, layout)
        edges, hidden = read_timeline(reader, layout, path)
        rate = constant_rate(edges[:-1], reader.get_avg_fps())
        indices, seconds = sample_indices(len(edges) - 1, rate, max_frames,
                                          edges if rate is None else None)
        wanted, back = np.unique(indices, return_inverse=True)
        frames = []
        exact = exact_seek(reader, layout, hidden)
        for frame in decode_frames(reader, wanted.tolist(), exact):
            if frame.shape[-1] != 3:
                raise MediaError(f"{path}: decord returns frames of shape {frame.shape}")
            image = Image.fromarray(np.ascontiguousarray(upright(frame, matrix)))
            frames.append(resize(image, min_pixels, max_pixels, path))
    except failures as error:
        raise MediaError(f"{path}: {decoder_reason(error)}") from error
    return np.stack(frames)[back], seconds  # (F, H, W, 3)


# -------------------------------------------------------------------------------------------- pool


def decode(kind, path, **limits):
    """One job of a worker: (uint8 (F, H, W, 3), seconds between frames, 0.0 for an image)."""
    return read_frames(path, **limits) if kind == "video" else (read_image(path, **limits), 0.0)


def worker_main(parent):
    """The worker process: a line of JSON in, a reply out, until standard input ends.

    A reply is the length of a header (4 bytes), the header (JSON) and the pixels.
    """
    if sys.platform == "linux":
        # A worker inside a long decoder call would outlive a killed parent until the call returns.
        ctypes.CDLL(None).prctl(1, signal.SIGKILL)  # PR_SET_PDEATHSIG
    if os.getppid() != parent:
        return
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the parent ends this process
    # ffmpeg prints to standard output: the replies keep the pipe, everything else goes to stderr.
    replies = os.fdopen(os.dup(1), "wb")
    os.dup2(2, 1)
    import decord  # noqa: F401  the first job shall not pay for it

    def reply(header, pixels=b""):
        text = json.dumps(header).encode()
        replies.write(struct.pack(">I", len(text)) + text)
        replies.write(pixels)
        replies.flush()

    reply({"status": "ready"})
    for line in sys.stdin.buffer:
        try:
            frames, seconds = decode(**json.loads(line))
        except MediaError as error:
            reply({"status": "media", "text": str(error)})
        except Exception:  # the process boundary: the parent raises it, with this traceback
            reply({"status": "bug", "text": traceback.format_exc()})
        else:
            reply({"status": "ok", "seconds": seconds, "shape": frames.shape}, frames.data)


class Worker:
    """A worker process, seen from the thread that owns it."""

    def __init__(self):
        command = [sys.executable, "-m", "infra.video", "--worker", str(os.getpid())]
        root = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
        path = os.pathsep.join(filter(None, [root, os.environ.get("PYTHONPATH")]))
        environment = os.environ | {"OPENBLAS_NUM_THREADS": "1", "PYTHONPATH": path}
        # Unbuffered, so that poll sees what there is to read. numpy's threads have nothing to do.
        self.process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE,
                                        bufsize=0, env=environment)
        self.ready = False

    def read(self, size, deadline):
        """Exactly `size` bytes. TimeoutError past the deadline, EOFError if the worker is gone."""
        buffer = bytearray(size)
        view = memoryview(buffer)
        poll = select.poll()
        poll.register(self.process.stdout, select.POLLIN)
        while view:
            if not poll.poll(max(0.0, deadline - time.monotonic()) * 1000):
                raise TimeoutError
            count = self.process.stdout.readinto(view)
            if not count:
                raise EOFError
            view = view[count:]
        return buffer

    def receive(self, timeout):
        """The next reply: (header, frames or None)."""
        deadline = time.monotonic() + timeout
        (length,) = struct.unpack(">I", self.read(4, deadline))
        header = json.loads(self.read(length, deadline))
        if header["status"] != "ok":
            return header, None
        pixels = self.read(math.prod(header["shape"]), deadline)
        return header, np.frombuffer(pixels, np.uint8).reshape(header["shape"])

    def run(self, path, request, timeout):
        """(frames, seconds) of one job; MediaError, or RuntimeError for a bug in the worker."""
        if not self.ready:
            self.start()
        try:
            self.process.stdin.write(request)
            header, frames = self.receive(timeout)
        except TimeoutError:
            self.process.kill()
            self.end()
            raise MediaError(f"{path}: not decoded within {timeout:g} seconds") from None
        except (EOFError, BrokenPipeError):
            code = self.end()
            cause = f"killed by {signal.Signals(-code).name}" if code < 0 else f"ended with {code}"
            raise MediaError(f"{path}: the decoder process was {cause}") from None
        if header["status"] == "media":
            raise MediaError(header["text"])
        if header["status"] == "bug":
            raise RuntimeError(f"a bug in the decoder process, at {path}:\n{header['text']}")
        return frames, header["seconds"]

    def start(self):
        """Wait until the process has imported what it needs, which no job's timeout pays for."""
        try:
            self.receive(timeout=120)
        except (EOFError, TimeoutError):
            code = self.end()
            raise RuntimeError(f"the decoder process did not start (exit code {code})") from None
        self.ready = True

    def end(self):
        """Wait for a process that has hung up; its exit code, -N where signal N ended it."""
        try:
            code = self.process.wait(5)
        except subprocess.TimeoutExpired:
            self.process.kill()
            code = self.process.wait()
        self.process.stdin.close()
        self.process.stdout.close()
        return code


class DecoderPool:
    """Decodes files in worker processes, so that no file stops, hangs or kills this process.

    with DecoderPool(num_workers=2, timeout=60) as pool:
        future = pool.submit("video", "clip.mp4", max_frames=16)
        frames, seconds = future.result()

    Each of num_workers threads owns one process, and replaces it when it crashed or exceeded
    `timeout` seconds in one job. The processes end with this one, even if it is killed.
    """

    def __init__(self, num_workers, timeout):
        if num_workers < 1 or timeout <= 0:
            raise ValueError(f"a pool of {num_workers} workers with a timeout of {timeout} seconds")
        self.timeout = timeout
        self.jobs = queue.SimpleQueue()
        self.workers = {}
        self.lock = threading.Lock()
        self.closed = False
        self.threads = [threading.Thread(target=self.serve, args=(slot,), daemon=True)
                        for slot in range(num_workers)]
        for thread in self.threads:
            thread.start()

    def submit(self, kind, path, **limits):
        """Decode one file: a Future of (uint8 (F, H, W, 3), seconds between frames).

        Args:
            kind: "video" or "image".
            limits: of read_frames or read_image: max_frames, min_pixels, max_pixels.
        The Future raises MediaError for a file that is refused, that crashed its process or took
        too long, and RuntimeError for a bug.
        """
        if kind not in {"video", "image"}:
            raise ValueError(f"kind is 'video' or 'image', not {kind!r}")
        request = json.dumps({"kind": kind, "path": os.fspath(path), **limits})
        future = Future()
        with self.lock:
            if self.closed:
                raise RuntimeError("the decoder pool is closed")
            self.jobs.put((future, path, request.encode() + b"\n"))
        return future

    def serve(self, slot):
        """One thread: runs jobs on its process, one at a time."""
        while (job := self.jobs.get()) is not None:
            future, path, request = job
            if not future.set_running_or_notify_cancel():
                continue
            try:
                result = self.worker(slot).run(path, request, self.timeout)
            except BaseException as error:  # raised where the future is read, as an executor does
                closed = RuntimeError(f"{path}: the decoder pool was closed")
                future.set_exception(closed if self.closed else error)
            else:
                future.set_result(result)

    def worker(self, slot):
        """The process of a thread, a new one if it is gone.

        Only that thread may start it: the kernel ends a worker together with the thread that
        started it (PR_SET_PDEATHSIG), not with the whole process.
        """
        with self.lock:
            gone = slot not in self.workers or self.workers[slot].process.poll() is not None
            if gone and not self.closed:
                self.workers[slot] = Worker()
            return self.workers[slot]

    def close(self):
        """End the processes; jobs that wait are cancelled, those that run fail."""
        with self.lock:
            self.closed = True
        with contextlib.suppress(queue.Empty):
            while True:
                self.jobs.get_nowait()[0].cancel()
        for worker in list(self.workers.values()):
            worker.process.kill()
        for _ in self.threads:
            self.jobs.put(None)
        for thread in self.threads:
            thread.join()
        for worker in self.workers.values():
            worker.end()

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self.close()


if __name__ == "__main__":
    if sys.argv[1:2] != ["--worker"]:
        sys.exit("infra/video.py is a module; DecoderPool starts it with --worker")
    worker_main(parent=int(sys.argv[2]))
