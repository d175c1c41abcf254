"""A run's folder and its loop: settings, logs, resume, saving, stop requests, timings.

    config.json       the resolved settings, and hashes of what the run reads
    metrics.jsonl     one line a step; beside it rollouts.jsonl, validation.jsonl and, where there
                      is something to report, skipped.jsonl and bad_steps.jsonl
    checkpoints/      what a resume needs (checkpoint.py)
    model/            the trained model, once the run has finished
    stop              a file that the user creates: the run ends after its step, saved
    .lock             held by the run that writes here

A checkpoint knows how long every log was when it was made. A resumed run cuts the logs back to
there, so that no line comes twice.
"""

import dataclasses
import fcntl
import importlib.util
import json
import math
import os
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TextIO

import torch.distributed as dist
from torch import nn
from torch.distributed.launcher.api import LaunchConfig
from torch.optim import AdamW
from tqdm import tqdm

from infra.checkpoint import Checkpoints
from infra.distributed import (
    StopRequest,
    World,
    gather_to_main,
    log,
    main_does,
    max_over_ranks,
    peak_memory_gib,
    synchronize,
)
from infra.errors import UserError, require
from infra.flags import neutral_flags
from infra.loader import Loader, Progress
from infra.optim import learning_rate_at

LOGS = (
    "metrics.jsonl", "rollouts.jsonl", "skipped.jsonl", "bad_steps.jsonl", "validation.jsonl",
)  # fmt: skip


def claim(lock: Path, what: str) -> TextIO:
    """Hold a lock file until what this returns is closed or the process ends.

    Raises:
        UserError: another process holds it, or it cannot be created; names `what`.
    """
    try:
        lock.parent.mkdir(parents=True, exist_ok=True)
        file = lock.open("w")
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        raise UserError(f"another run is writing to {what}") from None
    except OSError as error:
        raise UserError(f"{what}: {error.strerror}") from None
    # Whoever holds a lock may delete it: then this one is of a file that is gone.
    require(os.fstat(file.fileno()).st_nlink, f"another run has just finished {what}: start again")
    return file


class Run:
    """One run in its folder, new or resumed.

    run = Run(config, world, "rl", total_steps, inputs)    # claims the folder, finds a checkpoint
    if run.is_finished: return
    run.restore(model, optimizer)
    with run:
        loader = run.loader(num_items, submit, prepare, describe)
        for step, items in run.steps(loader, number):      # resumes, stops, saves
            with run.phase("update"): ...
            run.log(metrics, num_tokens)
        if run.is_complete: run.finish(export)

    Args:
        config: the script's flags. name: of the progress bar.
        inputs: hashes of what the run reads, by name: a resumed run must read the same.
    Attributes:
        start: optimizer steps done before. progress: what the loader has taken by then.
        history: on rank 0 the metrics of every step so far.
    Raises:
        UserError: another run writes there, or a run with other settings or inputs is there.
    """

    def __init__(
        self, config, world: World, name: str, total_steps: int, inputs: dict[str, str]
    ):  # fmt: skip
        self.config, self.world, self.name = config, world, name
        self.total_steps, self.inputs = total_steps, inputs
        self.folder = Path(config.output_dir)
        self.start, self.progress = 0, Progress(counts=(0,) * world.size)
        self.found: tuple[Path, dict] | None = None
        self.num_bad_steps = self.bad_in_a_row = 0
        self.history: list[dict] = []
        self.stop = StopRequest()
        self._files: dict[str, TextIO] = {}
        self._bar = self._events = None
        self._seconds: dict[str, float] = {}  # of this step, by phase
        self._seconds_save = 0.0  # of the step before
        self._extra: dict = {}  # for the metrics of this step
        self._warned: set[str] = set()
        if config.tensorboard:
            needed = "--tensorboard true needs it: pip install tensorboard"
            require(importlib.util.find_spec("tensorboard"), needed)
        main_does(world, self._claim)
        self.checkpoints = Checkpoints(
            self.folder / "checkpoints", world, config.keep_last, config.keep_best
        )
        try:
            self._find()
        except UserError:
            self._release()
            raise

    def _claim(self) -> None:
        self._lock = claim(self.folder / ".lock", f"--output_dir {self.folder}")

    def _release(self) -> None:
        if self.world.is_main:
            self._lock.close()

    # ------------------------------------------------------------------------------------ resume

    def _find(self) -> None:
        """Where to resume: at the newest whole checkpoint, or at the beginning."""
        has_model = (self.folder / "model").exists()
        metrics = self.folder / "metrics.jsonl"
        has_metrics = metrics.is_file() and metrics.stat().st_size > 0
        if self.config.resume == "never":
            require(
                not (has_model or has_metrics or self.checkpoints.paths()),
                f"--output_dir {self.folder} holds a run already, and --resume is never: name "
                "another folder, or delete it",
            )
            return
        if has_metrics:
            self._compare_settings()
        self.found = self.checkpoints.find()
        if self.found is None:
            require(
                not has_model,
                f"--output_dir {self.folder} holds a model/ and no checkpoint to resume from: name "
                "another folder",
            )
            if has_metrics:
                log(f"{self.folder} holds a run without a whole checkpoint: it starts again")
            return
        saved = self.found[1]
        self.start, self.num_bad_steps = saved["step"], saved["num_bad_steps"]
        self.bad_in_a_row = saved["bad_in_a_row"]
        progress = saved["progress"]
        progress["taken"], progress["counts"] = tuple(progress["taken"]), tuple(progress["counts"])
        before = len(progress["counts"])
        self.progress = Progress(**progress).dealt_to(self.world.size)
        if before != self.world.size:
            log(f"the run resumes on {self.world.size} ranks, it had {before}")

    def settings(self) -> dict:
        """What config.json holds."""
        config = json.loads(json.dumps(dataclasses.asdict(self.config)))  # as it will be read
        return config | {"num_ranks": self.world.size, "inputs": self.inputs}

    def _compare_settings(self) -> None:
        """Raise UserError where a setting or an input that matters is not the one the run had."""
        file = self.folder / "config.json"
        try:
            before = json.loads(file.read_text(encoding="utf-8"))
            before |= {f"contents of --{name}": value for name, value in before["inputs"].items()}
        except (OSError, ValueError, TypeError, KeyError, AttributeError) as error:
            raise UserError(
                f"--output_dir {self.folder} holds a run whose config.json cannot be used: "
                f"{error!r}"
            ) from None
        now = self.settings()
        now |= {f"contents of --{name}": value for name, value in now["inputs"].items()}
        ignored = neutral_flags(self.config) | {"num_ranks", "inputs"}
        changed = [key for key in now if key not in ignored and before.get(key) != now[key]]
        if not changed:
            return
        words = "; ".join(f"{key} {before.get(key)!r:.60} is now {now[key]!r:.60}"
                          for key in changed)  # fmt: skip
        require(
            self.config.allow_changed_config,
            f"--output_dir {self.folder} holds a run with other settings: {words}. Name another "
            "folder, or resume with --allow_changed_config true",
        )
        log(f"the run resumes with other settings: {words}")

    @property
    def is_finished(self) -> bool:
        """Whether the folder's run has all its steps and its model; says so."""
        has_model = (self.folder / "model").is_dir()
        if self.found is None or self.start < self.total_steps or not has_model:
            return False
        log(
            f"{self.folder} holds a finished run of {self.start} steps: nothing to do. A larger "
            "--max_steps continues it, another --output_dir starts a new one"
        )
        self._release()
        return True

    def learning_rate(self, step: int, total_steps: int = 0) -> float:
        """Of a step counted from 0, in this run or in one of another length."""
        peak, warmup_steps = self.config.learning_rate, self.config.warmup_steps
        return learning_rate_at(step, total_steps or self.total_steps, peak, warmup_steps)

    def restore(self, model: nn.Module, optimizer: AdamW) -> None:
        """Load the checkpoint that was found, if any; these two are saved from now on."""
        self.model, self.optimizer = model, optimizer
        if self.found is None:
            return
        path, saved = self.found
        self.checkpoints.load(path, model, optimizer)
        log(f"resumed from {path}")
        before = saved["total_steps"]
        if before != self.total_steps and self.start < self.total_steps:
            old, new = self.learning_rate(self.start, before), self.learning_rate(self.start)
            log(
                f"the schedule now spans {self.total_steps} steps, it spanned {before}: the "
                f"learning rate of step {self.start + 1} is {new:.3g}, it would have been {old:.3g}"
            )

    # --------------------------------------------------------------------------------- the folder

    def __enter__(self) -> "Run":
        """Cut the logs back to the checkpoint, write config.json, show the progress bar."""
        if self.world.is_main:
            try:
                self._prepare_files()
            except OSError as error:
                raise UserError(f"{error.filename}: {error.strerror}") from None
            self._bar = tqdm(
                total=self.total_steps, initial=self.start, desc=self.name, unit="step",
                dynamic_ncols=True,
            )  # fmt: skip
        self.stop.__enter__()
        return self

    def _prepare_files(self) -> None:
        self.checkpoints.folder.mkdir(exist_ok=True)
        self.checkpoints.clean()
        (self.folder / "stop").unlink(missing_ok=True)
        lengths = self.found[1]["log_bytes"] if self.found else {}
        for name in LOGS:
            cut_back(self.folder / name, lengths.get(name, 0))
        unfinished = self.folder / ".config.json"
        unfinished.write_text(json.dumps(self.settings(), indent=2) + "\n", encoding="utf-8")
        os.replace(unfinished, self.folder / "config.json")
        metrics = self.folder / "metrics.jsonl"
        if metrics.exists():
            lines = metrics.read_text(encoding="utf-8").splitlines()
            self.history = [json.loads(line) for line in lines]
        if self.config.tensorboard:
            from torch.utils.tensorboard import SummaryWriter  # not among the run-time packages

            # Events of steps that are taken again are dropped.
            self._events = SummaryWriter(str(self.folder), purge_step=self.start + 1)

    def __exit__(self, *error: object) -> None:
        self.stop.__exit__(*error)
        if self._bar is not None:
            self._bar.close()  # leaves the bar's line, so that an error starts on its own
        if not error[0]:  # else a checkpoint may still be on its way, which syncs them
            for file in self._files.values():
                file.close()
            self._release()
        if self._events is not None:
            self._events.close()

    def say(self, text: str) -> None:
        """A line on the console, above the progress bar."""
        if self.world.is_main:
            self._bar.write(text)

    def warn(self, holds: bool, text: str) -> None:
        """A warning on the console where it holds, once for each text."""
        if holds and text not in self._warned:
            self._warned.add(text)
            self.say(f"warning: {text}")

    # --------------------------------------------------------------------------------------- steps

    def loader(
        self, num_items: int, submit: Callable, prepare: Callable, describe: Callable
    ) -> Loader:  # fmt: skip
        """This rank's stream of items, from where the run has come to; see Loader."""
        return Loader(
            num_items, submit, prepare, describe, progress=self.progress, rank=self.world.rank,
            seed=self.config.seed, max_skipped=self.config.max_skipped,
        )  # fmt: skip

    def steps(self, loader: Loader, number: int) -> Iterator[tuple[int, list]]:
        """Each step that is left, counted from 0, and this rank's items: `number` from the loader.

        After each step it saves where that is due, and ends where the run was asked to stop:
        is_complete tells the two ends apart.

        Raises:
            UserError: too many bad steps in a row, or unusable samples; a save has failed.
        """
        self.is_complete = self.start >= self.total_steps
        for step in range(self.start, self.total_steps):
            self._seconds = {}
            with self.phase("data"):
                items = loader.take(number, step, lambda: bool(self.stop.name))
            if any(self._everyone(items is None)):  # no item can be had, and the run shall stop
                self._stop(step, loader.progress)
                return
            yield step, items
            loader.check_skipped()
            if self._end_step(step, loader.progress):
                return
        self.is_complete = True

    @contextmanager
    def phase(self, name: str) -> Iterator[None]:
        """Time a part of a step: `with run.phase("rollout"): ..`; parts of one name add up."""
        begun = time.perf_counter()
        yield
        synchronize(self.world.device)  # else the next phase would be billed for this one's kernels
        self._seconds[name] = self._seconds.get(name, 0.0) + time.perf_counter() - begun

    def _everyone(self, value: object) -> list:
        values: list = [None] * self.world.size
        dist.all_gather_object(values, value)
        return values

    def _stop_reason(self) -> str:
        """What asked the run to stop, on any rank; "" if nothing did."""
        reason = self.stop.name
        if not reason and self.world.is_main and (self.folder / "stop").exists():
            reason = f"the file {self.folder / 'stop'}"
        return next(filter(None, self._everyone(reason)), "")

    def _end_step(self, step: int, progress: Progress) -> bool:
        """Save where that is due; returns whether the run stops now."""
        begun = time.perf_counter()
        too_many_bad = self.bad_in_a_row > self.config.max_bad_steps
        reason = self._stop_reason()
        every = self.config.save_every
        due = (every and (step + 1) % every == 0) or step + 1 == self.total_steps
        self.checkpoints.check()
        if reason:
            self._stop(step + 1, progress, reason)
        elif due or too_many_bad:
            self._save(step + 1, progress)
        if too_many_bad:
            self.checkpoints.wait()
            raise UserError(
                f"the loss or the gradient of {self.bad_in_a_row} steps in a row was not finite, "
                f"and none was applied (--max_bad_steps {self.config.max_bad_steps}); "
                "bad_steps.jsonl names their samples, the last checkpoint has the weights from "
                "before"
            )
        self._seconds_save = time.perf_counter() - begun
        return bool(reason)

    def _stop(self, step: int, progress: Progress, reason: str = "") -> None:
        reason = reason or self._stop_reason()
        if step > max(self.start, self.checkpoints.pending_step):  # else it is saved already
            self._save(step, progress)
        self.checkpoints.wait()
        saved = ", saved" if step else ""
        log(f"stopped by {reason} after step {step}{saved}: the same command resumes from here")

    def _save(self, step: int, progress: Progress) -> None:
        lengths = {}
        if self.world.is_main:
            files = {name: self.folder / name for name in LOGS}
            lengths = {name: file.stat().st_size for name, file in files.items() if file.exists()}
        saved = {
            "step": step, "total_steps": self.total_steps, "progress": dataclasses.asdict(progress),
            "log_bytes": lengths, "num_bad_steps": self.num_bad_steps,
            "bad_in_a_row": self.bad_in_a_row, "value": self._last_value(self.config.keep_best),
        }  # fmt: skip
        self.checkpoints.save(saved, self.model, self.optimizer, before_visible=self._sync_logs)

    def _last_value(self, key: str) -> float | None:
        """The newest value of a metric: those of a validation are not in every step."""
        values = (metrics.get(key) for metrics in reversed(self.history))
        return next((value for value in values if value is not None), None)

    def _sync_logs(self) -> None:
        for file in list(self._files.values()):
            os.fsync(file.fileno())

    def finish(self, export: Callable[[Path], None]) -> None:
        """Write model/, after the last checkpoint is whole."""
        self.checkpoints.wait()
        export(self.folder / "model")
        log(f"model written to {self.folder / 'model'}")

    # ---------------------------------------------------------------------------------------- logs

    def log(self, metrics: dict[str, float | int | None], num_tokens: float) -> None:
        """One object into metrics.jsonl, the same on the console: once a step, on every rank.

        null stands for what is not defined in a step, or is not finite. Added are the timings, the
        step and each of its phases at the slowest rank: a rank that waits for another in a
        collective waits inside the phase that holds it, so the phases can exceed the step.

        Args:
            num_tokens: of the step, over all ranks.
        """
        own = {"memory": peak_memory_gib(self.world.device), "step": sum(self._seconds.values())}
        slowest = max_over_ranks(own | self._seconds)
        memory, seconds = slowest.pop("memory"), slowest.pop("step")
        metrics = metrics | {
            "bad_steps": self.num_bad_steps, "seconds": seconds,
            **{f"seconds_{phase}": value for phase, value in slowest.items()},
            "tokens_per_second": num_tokens / seconds, "peak_memory_gib": round(memory, 2),
            **self._extra, "seconds_save": self._seconds_save,
        }  # fmt: skip
        self._extra = {}
        metrics = {key: value if is_finite(value) else None for key, value in metrics.items()}
        if not self.world.is_main:
            return
        self.history.append(metrics)
        self.records("metrics.jsonl", [metrics])
        if self._events is not None:
            for key, value in metrics.items():
                if value is not None:
                    self._events.add_scalar(key, value, metrics["step"])
        self.say("  ".join(f"{key} {short(value)}" for key, value in metrics.items()))
        self._bar.update()
        limit = shutdown_limit()
        self.warn(seconds + self.checkpoints.seconds > limit, (
            f"torchrun kills its ranks {limit:g} seconds after a signal, and the last step and "
            f"save took longer: to stop, create the file {self.folder / 'stop'}, or raise it by "
            "TORCH_ELASTIC_SHUTDOWN_TIMEOUT (from torch 2.13 on)"
        ))  # fmt: skip

    def records(self, name: str, records: list[dict]) -> None:
        """Rank 0: one line per record into a file, which exists once it has a line."""
        if not self.world.is_main or not records:
            return
        assert name in LOGS, name
        try:
            if name not in self._files:
                self._files[name] = (self.folder / name).open("a", encoding="utf-8")
            self._files[name].writelines(json.dumps(record) + "\n" for record in records)
            self._files[name].flush()
        except OSError as error:
            raise UserError(f"{self.folder / name} cannot be written: {error.strerror}") from None

    def gather_records(self, name: str, mine: list[dict]) -> None:
        """The records of all ranks into one file: once a step, on every rank."""
        everyone = gather_to_main(mine, self.world)
        self.records(name, [record for rank in everyone or [] for record in rank])

    def count_bad_step(self, step: int, num_bad_updates: int, samples: list[dict]) -> None:
        """Note a step of which an update was not applied: its loss or gradient was not finite.

        Args:
            num_bad_updates: the same on every rank. samples: what identifies this rank's.
        """
        self.num_bad_steps += num_bad_updates > 0
        self.bad_in_a_row = self.bad_in_a_row + 1 if num_bad_updates else 0
        if num_bad_updates:
            everyone = gather_to_main(samples, self.world)
            record = {"step": step + 1, "num_bad_updates": num_bad_updates}
            record["samples"] = [sample for rank in everyone or [] for sample in rank]
            self.records("bad_steps.jsonl", [record])

    def validate(self, validation, model: nn.Module, step: int) -> None:
        """Validate after so many steps (0: before the first of a new run), where that is due: a
        line of validation.jsonl, and val_.. keys in the metrics of the step."""
        if not validation.is_due(step, self.total_steps) or (step == 0 and self.start):
            return
        begun = time.perf_counter()
        found = validation(model)
        if found is None:
            return
        seconds = time.perf_counter() - begun
        self.records("validation.jsonl", [{"step": step, **found, "seconds": seconds}])
        means = {f"val_{key}": found[key] for key in ("accuracy", "accuracy_shuffled", "gap")}
        self._extra = means if step else {}  # before the first step there is no line for it
        words = [f"{key} {short(value)}" for key, value in means.items()]
        self.say(f"validation after step {step}: {'  '.join(words)}")


def shutdown_limit() -> float:
    """Seconds between a signal that torchrun passes on and its SIGKILL; infinite without it."""
    if "TORCHELASTIC_RUN_ID" not in os.environ:
        return math.inf
    if not hasattr(LaunchConfig, "shutdown_timeout"):  # torch 2.11: fixed
        return 30.0
    return float(os.environ.get("TORCH_ELASTIC_SHUTDOWN_TIMEOUT", 30))


def cut_back(file: Path, length: int) -> None:
    """Cut a log back to a length in bytes; a shorter one to its last whole line, and say so."""
    size = file.stat().st_size if file.exists() else 0
    if size < length:
        content = file.read_bytes() if size else b""
        kept = content.rfind(b"\n") + 1
        log(f"{file} is shorter than its checkpoint says: {length - kept} bytes of it are lost")
        length = kept
    if size > length:
        os.truncate(file, length)


def is_finite(value: float | int | None) -> bool:
    """Whether a metric has a value that JSON can hold."""
    return value is not None and math.isfinite(value)


def short(value: float | int | None) -> str:
    """A metric on the console."""
    return str(value) if value is None or isinstance(value, int) else f"{value:.4g}"
