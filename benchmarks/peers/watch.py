"""What the peers' steps share: question, frames, seconds of steps, peak memory of the process."""

import json
import resource
import statistics
import time

import numpy as np
from decord import VideoReader

QUESTION = (
    "Which way does the animal in the video turn its head?\nA. left\nB. right\nPlease think about "
    "this question as if you were a human pondering deeply. Provide your answer between the "
    "<answer> </answer> tags."
)


def read_frames(path: str, num_frames: int) -> np.ndarray:
    """uint8 (frames, 112, 196, 3), evenly spaced."""
    video = VideoReader(path, width=196, height=112)
    return video.get_batch(np.linspace(0, len(video) - 1, num_frames).round().astype(int)).asnumpy()


class Watch:
    def __init__(self, new_tokens: int):
        self.new_tokens, self.seconds, self.began = new_tokens, [], 0.0

    def start(self) -> None:
        self.began = time.perf_counter()

    def stop(self) -> None:
        self.seconds.append(time.perf_counter() - self.began)
        print(f"step {len(self.seconds)}: {self.seconds[-1]:.2f} s", flush=True)

    def report(self) -> None:
        """One line: the median of all steps but the first, and the peak resident memory."""
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20  # Linux counts in KiB
        counted = self.seconds[1:]
        print(json.dumps({
            "new_tokens": self.new_tokens, "seconds": round(statistics.median(counted), 2),
            "from": round(min(counted), 2), "to": round(max(counted), 2),
            "peak_gib": round(peak, 2),
        }))  # fmt: skip
