"""Seconds of steps, and the peak memory of the process."""

import json
import resource
import statistics
import time


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
