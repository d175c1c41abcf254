"""Video and image files to resized frames, in this process or in a pool of worker processes.

    read_frames   a video: uint8 (F, H, W, 3) and the seconds between its sampled frames
    read_image    an image: uint8 (1, H, W, 3)
    DecoderPool   both, in processes that may crash or hang without harm to this one

A file is decoded correctly or refused with a MediaError that names it and the reason. decord alone
silently returns wrong frames where it lost some or seeks badly, and of rotated mp4 files.
No torch is imported here: a worker process starts in 0.1 s.

Shapes: F frames, H and W pixels. Times are in seconds, sizes in pixels.
"""

import contextlib
import ctypes
import inspect
import json
import math
import mmap
import os
import re
import shutil
import signal
import stat
import struct
import subprocess
import sys
import tempfile
import threading
import warnings
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from multiprocessing.connection import Connection, Pipe

import numpy as np
from PIL import Image, ImageOps

from infra.errors import MediaError

# What Pillow, decord and the parsers below raise for a damaged file. TypeError and AttributeError
# would be mistakes of this file.
DAMAGE = (
    ArithmeticError, AssertionError, EOFError, LookupError, MemoryError, OSError, RuntimeError,
    StopIteration, SyntaxError, ValueError, struct.error, Image.DecompressionBombError,
    Image.DecompressionBombWarning,
)  # fmt: skip


def check_file(path):
    """Refuse all but a regular file that is not empty: to open a FIFO or a device can block."""
    try:
        info = os.stat(path)
    except (OSError, ValueError) as error:  # ValueError: a null byte in the name
        raise MediaError(f"{path}: {getattr(error, 'strerror', None) or error}") from error
    if not stat.S_ISREG(info.st_mode):
        kind = "a directory" if stat.S_ISDIR(info.st_mode) else "a FIFO, socket or device"
        raise MediaError(f"{path}: {kind}, not a regular file")
    if info.st_size == 0:
        raise MediaError(f"{path}: empty, zero bytes")


def media_error(path, error):
    """The MediaError for an exception of a decoder, without decord's time and stack trace."""
    text = re.sub(r"\[[\d:]+\] \S+:\d+: ", "", str(error)).strip().partition("\n")[0]
    if "-1128613112" in text:  # AVERROR_DECODER_NOT_FOUND
        text = "this decord has no decoder for its codec (AV1 needs decord2)"
    elif "-1381258232" in text:  # AVERROR_STREAM_NOT_FOUND
        text = "no video stream"
    elif type(error).__name__ in ("StopIteration", "DECORDLimitReachedError"):
        text = "fewer frames than decord counts: some are lost, or cut out by an edit list"
    return MediaError(f"{path}: cannot be decoded: {text or type(error).__name__}")


def smart_resize(height, width, min_pixels, max_pixels, factor):
    """The size (h, w) to which an image is resized: the rule of transformers' smart_resize.

    Both are multiples of `factor`, h * w is within [min_pixels, max_pixels] where possible.

    >>> smart_resize(480, 640, 4 * 28 * 28, 128 * 28 * 28, factor=28)
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
    # transformers returns a side of 0 for a thin image when min_pixels is 0.
    return max(h, factor), max(w, factor)


def resize(image, min_pixels, max_pixels, factor, max_aspect):
    """A Pillow RGB image to uint8 (H, W, 3) at smart_resize's size, bicubic."""
    width, height = image.size
    if max(height, width) > max_aspect * min(height, width):
        raise ValueError(f"{width}x{height} has one side over {max_aspect} times the other")
    h, w = smart_resize(height, width, min_pixels, max_pixels, factor)
    if (h, w) != (height, width):
        image = image.resize((w, h), Image.Resampling.BICUBIC)
    return np.array(image)  # (H, W, 3)


# ------------------------------------------------------------------------------------------ images

# EPS would start Ghostscript, and no data set holds the other thirty formats that Pillow knows.
IMAGE_FORMATS = ("JPEG", "PNG", "WEBP", "GIF", "BMP", "TIFF", "PPM", "ICO", "TGA", "JPEG2000")


def to_rgb(image):
    """A loaded Pillow image of any mode to RGB: alpha over white, 16 bits scaled to 8."""
    if image.mode in ("I", "F"):
        raise ValueError("32-bit pixels have no fixed white")
    if image.mode.startswith("I;16"):  # Pillow's own conversion clips at 255
        image = Image.fromarray(np.rint(np.asarray(image) / 257).astype(np.uint8))
    if image.has_transparency_data:
        image = image.convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
    return image.convert("RGB")


def load_image(path):
    """An image as Pillow reads it, upright."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        warnings.simplefilter("error", Image.DecompressionBombWarning)  # over 256 MiB in RGB
        try:
            with Image.open(path, formats=IMAGE_FORMATS) as image:
                return ImageOps.exif_transpose(image)  # which loads the pixels
        except TypeError as error:  # Pillow's, for some damaged headers
            raise ValueError(str(error)) from error


def read_image(path, *, min_pixels, max_pixels, factor, max_aspect):
    """Decode an image, upright and in RGB; the first frame of an animation: uint8 (1, H, W, 3).

    The limits are smart_resize's, and the long side over the short side at most. Raises MediaError.
    """
    check_file(path)
    try:
        image = to_rgb(load_image(path))
        return resize(image, min_pixels, max_pixels, factor, max_aspect)[None]
    except DAMAGE as error:
        raise media_error(path, error) from error


# ------------------------------------------------------------------------------------------ videos

# How a video file begins. ffmpeg would also open playlists (HLS, ffconcat): text that names other
# files, and so frames of a video that the row does not name.
CONTAINERS = {
    "mp4": rb"....(ftyp|moov|mdat|free|skip|wide|pnot)",
    "matroska": rb"\x1aE\xdf\xa3",
    "avi": rb"RIFF....AVI ",
    "y4m": rb"YUV4MPEG2",
}
# By the signs of a, b, c, d in an mp4 display matrix, which shows a pixel (x, y) at
# (a x + c y, b x + d y): the counterclockwise quarter turns that do the same.
TURNS = {
    (0, 0, 0, 0): 0, (1, 0, 0, 1): 0, (0, -1, 1, 0): 1, (-1, 0, 0, -1): 2, (0, 1, -1, 0): 3,
}  # fmt: skip
MAX_DELAY = 18  # frames that a decoder holds back at most: 16 in H.264 and HEVC
IDENTITY = struct.pack(">9i", 1 << 16, 0, 0, 0, 1 << 16, 0, 0, 0, 1 << 30)


@dataclass(frozen=True)
class Layout:
    """What a file's headers say and decord does not. A patch is (offset in the file, bytes)."""

    turns: int = 0  # counterclockwise quarter turns that show a stored frame upright
    upright: tuple = ()  # patches that take the rotation away
    unedited: tuple = ()  # patches that take the edit list away
    pts: np.ndarray | None = None  # int64 (total,), presentation times in decoding order
    in_order: bool = False  # frames are displayed in decoding order


def boxes(data, path, start, end):
    """(start, end) of the payload of each mp4 box (ISO 14496-12) at a path such as b"moov/trak".

    An end may lie beyond `end` where the file is truncated or damaged.
    """
    wanted, _, rest = path.partition(b"/")
    while start + 8 <= end:
        size, kind = struct.unpack_from(">I4s", data, start)
        header = 8
        if size == 1 and start + 16 <= end:
            size, header = struct.unpack_from(">Q", data, start + 8)[0], 16
        elif size == 0:  # to the end of the file
            size = end - start
        if size < header:
            break
        if kind == wanted and rest:
            yield from boxes(data, rest, start + header, min(start + size, end))
        elif kind == wanted:
            yield start + header, start + size
        start += size


def mp4_layout(data):
    """Layout of an mp4 or mov file; ValueError for one that is truncated or not shown correctly."""
    for kind in (b"moov", b"moof", b"mdat"):
        if any(end > len(data) for _, end in boxes(data, kind, 0, len(data))):
            raise ValueError(f"truncated at {len(data)} bytes")
    tracks = [track for track in boxes(data, b"moov/trak", 0, len(data))
              if any(data[s + 8:s + 12] == b"vide" for s, _ in boxes(data, b"mdia/hdlr", *track))]
    if not tracks:  # decord says so
        return Layout()
    if len(tracks) > 1:
        raise ValueError(f"{len(tracks)} video tracks")
    header, _ = next(boxes(data, b"tkhd", *tracks[0]))
    matrix_at = header + (52 if data[header] == 1 else 40)  # version 1 has 64-bit times
    a, b, _, c, d = struct.unpack_from(">5i", data, matrix_at)
    signs = tuple(int(np.sign(value)) for value in (a, b, c, d))
    if signs not in TURNS:
        raise ValueError("mirrored, or rotated by an angle that is no multiple of 90 degrees")
    upright = ((matrix_at, IDENTITY),) if TURNS[signs] else ()
    unedited = tuple((start - 4, b"free") for start, _ in boxes(data, b"edts", *tracks[0]))
    return Layout(TURNS[signs], upright, unedited, mp4_pts(data, tracks[0]))


def mp4_pts(data, track):
    """Presentation time of each frame in decoding order, int64 (total,); None if unknown."""
    for start, _ in boxes(data, b"edts/elst", *track):
        is_delay = data[start + 12:start + 16] == b"\xff\xff\xff\xff"
        if struct.unpack_from(">I", data, start + 4)[0] > 1 + is_delay:
            return None  # pieces, in another order perhaps

    def values(kind):  # of a table of rows (number of frames, value)
        for start, _ in boxes(data, b"mdia/minf/stbl/" + kind, *track):
            (num_rows,) = struct.unpack_from(">I", data, start + 4)
            rows = np.frombuffer(data, ">i4", 2 * num_rows, start + 8).reshape(-1, 2).astype(int)
            # A frame takes a byte at least: the count that a forged table claims costs no memory.
            if rows[:, 0].sum() > len(data):
                raise ValueError(f"damaged {kind.decode()} box")
            return np.repeat(rows[:, 1], rows[:, 0])

    durations, offsets = values(b"stts"), values(b"ctts")
    if durations is None or offsets is not None and len(offsets) != len(durations):
        return None
    return np.cumsum(durations) - durations + (0 if offsets is None else offsets)


def matroska_layout(data):
    """Layout of an mkv or webm file: truncation, and whether its codec reorders frames."""
    at = data.find(b"\x18\x53\x80\x67", 0, 4096) + 4  # the size of the segment
    length = 9 - data[at].bit_length()  # an EBML number: leading zeros say how long it is
    unknown = (1 << 7 * length) - 1  # all ones: a live recording
    size = int.from_bytes(data[at:at + length], "big") & unknown
    if size != unknown and at + length + size > len(data):
        raise ValueError(f"truncated at {len(data)} bytes")
    codecs = set(re.findall(rb"V_(VP8|VP9|AV1|[A-Z]{2})", data[:65536]))
    return Layout(in_order=bool(codecs) and codecs <= {b"VP8", b"VP9", b"AV1"})


def read_layout(path):
    """Layout of a file; ValueError for one that is no video or truncated."""
    with open(path, "rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as data:
        kind = next((kind for kind, start in CONTAINERS.items()
                     if re.match(start, data, re.DOTALL)), None)
        if kind is None:
            raise ValueError("not a video (mp4, mov, mkv, webm, avi, y4m)")
        if kind == "avi" and struct.unpack_from("<I", data, 4)[0] > len(data):
            raise ValueError(f"truncated at {len(data)} bytes")
        if kind == "mp4":
            return mp4_layout(data)
        return matroska_layout(data) if kind == "matroska" else Layout()


def open_video(path, patches):
    """A decord reader of a file, or of a temporary copy with patches."""
    import decord

    decord.logging.set_level(decord.logging.QUIET)
    # fault_tol: decord replaces a frame that it lost by its neighbour; one is too many.
    options = {"ctx": decord.cpu(0), "num_threads": 1, "fault_tol": 1e-9}
    if not patches:
        # ffmpeg takes a bare "a:b" for a protocol, not so "/a:b".
        return decord.VideoReader(os.path.abspath(path), **options)
    # decord crashes where it reads from memory instead of a file.
    with open(path, "rb") as file, tempfile.TemporaryFile() as copy:
        shutil.copyfileobj(file, copy)
        for offset, content in patches:
            copy.seek(offset)
            copy.write(content)
        copy.flush()
        return decord.VideoReader(f"/dev/fd/{copy.fileno()}", **options)


def exact_seek(reader, layout):
    """Whether decord's seeking finds the frame that it is asked for.

    It takes the place of a key frame in decoding order for its place in display order, which holds
    where nothing that follows a key frame is displayed before it.
    """
    if layout.in_order:
        return True
    if layout.pts is None or len(layout.pts) != len(reader):
        return False
    if reader.get_frame_timestamp([0])[0, 0] < 0:
        return False
    place = np.argsort(np.argsort(layout.pts, kind="stable"))
    keys = np.array(reader.get_key_indices(), np.int64)
    return len(keys) > 0 and bool((place[keys] == keys).all())


def sample_indices(total, frame_rate, max_frames, fps, min_frames):
    """Which frames of a video are looked at: by index, whatever the frame rate does.

    n is the even number nearest below min(max(total / frame_rate * fps, min_frames), max_frames,
    total), or 1; the indices are round(linspace(0, total - 1, n)).

    Returns:
        (list of n ascending indices, seconds between two of them)

    >>> sample_indices(total=90, frame_rate=30.0, max_frames=16, fps=2.0, min_frames=4)
    ([0, 18, 36, 53, 71, 89], 0.5)
    """
    if not 0 < frame_rate < math.inf:
        raise ValueError("no frame rate in its headers")
    n = int(min(max(total / frame_rate * fps, min_frames), max_frames, total) // 2 * 2)
    if n < 2:
        return [0], total / frame_rate
    indices = [(2 * k * (total - 1) + n - 1) // (2 * (n - 1)) for k in range(n)]
    return indices, total / (n * frame_rate)


def decode_frames(reader, layout, max_frames, fps, min_frames, size):
    """read_frames of an open file. size: the arguments of resize after the image."""
    rate = reader.get_avg_fps()
    indices, seconds = sample_indices(len(reader), rate, max_frames, fps, min_frames)
    exact = exact_seek(reader, layout)
    # Where seeking is not exact, everything up to the last sampled frame is decoded. Nor does
    # decord skip frames exactly while it empties its decoder at the end of the file.
    start = max(len(reader) - MAX_DELAY, 0) if exact else 0
    frames = []
    for index in sorted({*indices, *range(start, indices[-1] + 1)}):
        frame = reader.get_batch([index]) if exact else reader.next()
        if index in indices:
            if frame.shape[-1] != 3:
                raise ValueError(f"decord returns frames of shape {frame.shape}")
            image = np.rot90(frame.asnumpy().reshape(frame.shape[-3:]), layout.turns)
            frames.append(resize(Image.fromarray(np.ascontiguousarray(image)), *size))
    return np.stack(frames), seconds  # (F, H, W, 3)


def read_frames(path, *, max_frames, min_pixels, max_pixels, fps, min_frames, factor, max_aspect):
    """Decode uniformly spaced frames of a video, upright and in RGB; see sample_indices.

    Frames that an mp4's edit list hides are counted, and decoded, where decord counts them.

    Args:
        max_frames: 1 or more. fps: sampled frames per second, where the bounds allow.
        min_pixels, max_pixels, factor, max_aspect: of one frame, see read_image.
    Returns:
        (uint8 (F, H, W, 3), seconds between two sampled frames)
    Raises:
        MediaError: not decoded as a player shows it, or not at all.
    """
    import decord

    check_file(path)
    limits = max_frames, fps, min_frames, (min_pixels, max_pixels, factor, max_aspect)
    try:
        layout = read_layout(path)
        reader = open_video(path, layout.upright)
        try:
            if layout.unedited and reader.get_frame_timestamp([0])[0, 0] < 0:
                raise StopIteration  # the first frame is hidden
            return decode_frames(reader, layout, *limits)
        except (StopIteration, decord.DECORDLimitReachedError):
            total, reader = len(reader), open_video(path, layout.upright + layout.unedited)
            if not layout.unedited or len(reader) != total:
                raise
            return decode_frames(reader, layout, *limits)
    except (*DAMAGE, decord.DECORDError, decord.DECORDLimitReachedError) as error:
        raise media_error(path, error) from error


# -------------------------------------------------------------------------------------------- pool


def read_media(kind, path, **limits):
    """read_frames of a "video"; (read_image, 0.0) of an "image"."""
    return read_frames(path, **limits) if kind == "video" else (read_image(path, **limits), 0.0)


def worker_main(handle, parent):
    """A worker process: answers requests until its parent closes the connection.

    A request is [kind, path, limits] as JSON. A reply is JSON, {"fault"} or {"shape", "seconds"},
    and after the second the pixels.
    """
    if sys.platform == "linux":
        # A worker inside a long decoder call would outlive a killed parent until the call returns.
        ctypes.CDLL(None).prctl(1, signal.SIGKILL)  # PR_SET_PDEATHSIG
    if os.getppid() != parent:
        return
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the parent ends this process
    import decord  # noqa: F401  no job's timeout pays for it

    connection = Connection(handle)
    connection.send_bytes(b"ready")
    while True:
        try:
            kind, path, limits = json.loads(connection.recv_bytes())
        except (EOFError, OSError):
            return
        try:
            frames, seconds = read_media(kind, path, **limits)
            reply = {"shape": frames.shape, "seconds": seconds}
        except MediaError as error:
            reply = {"fault": str(error)}
        except Exception as error:  # whatever one file causes is that file's fault
            reply = {"fault": f"{path}: {type(error).__name__}: {error}"}
        connection.send_bytes(json.dumps(reply).encode())
        if "shape" in reply:
            connection.send_bytes(frames.reshape(-1))


def start_worker():
    """(process, connection) of a new worker. Its standard output goes to standard error."""
    root = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
    path = os.pathsep.join(filter(None, [root, os.environ.get("PYTHONPATH")]))
    # numpy's threads have nothing to do in a worker.
    environment = os.environ | {"OPENBLAS_NUM_THREADS": "1", "PYTHONPATH": path}
    connection, theirs = Pipe()
    with theirs:
        handle = theirs.fileno()
        command = [sys.executable, "-P", "-m", "infra.video", str(handle), str(os.getpid())]
        process = subprocess.Popen(command, pass_fds=[handle], stdin=subprocess.DEVNULL, stdout=2,
                                   env=environment)
    return process, connection


class DecoderPool(contextlib.AbstractContextManager):
    """Decodes files in worker processes, so that no file stops, hangs or kills this process.

    with DecoderPool(num_workers=2, timeout=60) as pool:
        frames, seconds = pool.submit("video", "a.mp4", max_frames=16, ..).result()

    Each of num_workers threads owns one process, and replaces it when it crashed or exceeded
    `timeout` seconds in one job. The processes end with this one, even if it is killed.
    """

    def __init__(self, num_workers, timeout):
        self.timeout = timeout
        self.threads = ThreadPoolExecutor(num_workers, "decoder")
        self.workers = {}  # (process, connection) of each thread

    def submit(self, kind, path, **limits):
        """Decode one file: a Future of read_media(kind, path, **limits).

        It raises MediaError for a file that is refused, crashed its process or took too long, and
        RuntimeError if no process starts.
        """
        reader = {"video": read_frames, "image": read_image}[kind]
        inspect.signature(reader).bind(path, **limits)  # a caller's mistake is no file's fault
        request = json.dumps([kind, os.fspath(path), limits]).encode()
        return self.threads.submit(self._run, path, request)

    def _run(self, path, request):
        process, connection = self._worker()
        try:
            connection.send_bytes(request)
            if not connection.poll(self.timeout):
                process.kill()
                process.wait()
                raise MediaError(f"{path}: not decoded within {self.timeout:g} seconds")
            reply = json.loads(connection.recv_bytes())
            if "fault" in reply:
                raise MediaError(reply["fault"])
            pixels = bytearray(connection.recv_bytes())
            return np.frombuffer(pixels, np.uint8).reshape(reply["shape"]), reply["seconds"]
        except (EOFError, OSError):
            process.kill()
            code = process.wait()  # -N: ended by signal N
            raise MediaError(f"{path}: the decoder crashed with exit code {code}") from None

    def _worker(self):
        """(process, connection) of this thread, new ones if the process is gone.

        Only that thread may start it: the kernel ends a worker together with the thread that
        started it (PR_SET_PDEATHSIG), not with the whole process.
        """
        thread = threading.get_ident()
        if thread not in self.workers or self.workers[thread][0].poll() is not None:
            process, connection = self.workers[thread] = start_worker()
            with contextlib.suppress(EOFError, OSError):
                if connection.poll(120) and connection.recv_bytes() == b"ready":
                    return process, connection
            process.kill()
            raise RuntimeError(f"no decoder process starts (exit code {process.wait()})")
        return self.workers[thread]

    def close(self):
        """End the processes; jobs that wait are cancelled, those that run fail."""
        self.threads.shutdown(wait=False, cancel_futures=True)
        for process, _ in list(self.workers.values()):
            process.kill()
        self.threads.shutdown()
        for process, connection in self.workers.values():
            process.kill()
            process.wait()
            connection.close()

    def __exit__(self, *_):
        self.close()


if __name__ == "__main__":
    worker_main(handle=int(sys.argv[1]), parent=int(sys.argv[2]))
