"""A run's folder: settings, logs and checkpoints. Found with an unfinished run, it goes on there.

    config.json       the resolved settings
    metrics.jsonl     one line a step; beside it rollouts.jsonl, validation.jsonl and, where there
                      is something to tell, skipped.jsonl and bad_steps.jsonl
    checkpoints/      what a resume needs (checkpoint.py)
    model/            the trained model, once the run is finished
    .lock             held by the run that writes here

A checkpoint knows how long every log was when it was made. A resumed run cuts the logs back to
there, also what a kill left of a last line, so that every line comes once.
"""

import dataclasses
import json
import math
import os
import time
from contextlib import contextmanager
from pathlib import Path

import torch
import torch.distributed as dist
from torch import nn
from torch.optim import AdamW
from tqdm import tqdm

from config import TrainConfig
from evaluation.results import claim
from infra.checkpoint import Checkpoints
from infra.distributed import (
    StopRequest,
    World,
    gather_to_main,
    log,
    main_does,
    max_over_ranks,
    peak_memory_gib,
)
from infra.errors import UserError, require
from infra.loader import Loader, Progress
from model import export_model

LOGS = (
    "metrics.jsonl", "rollouts.jsonl", "skipped.jsonl", "bad_steps.jsonl", "validation.jsonl",
)  # fmt: skip

# Settings that do not change what a run computes. --max_steps and --num_epochs change how long it
# goes on, and with it the schedule: it says so. The way a batch is cut is compared as its product.
NEUTRAL = {
    "output_dir", "num_workers", "decode_timeout", "skip_bad_samples", "max_skipped",
    "activation_checkpointing", "save_every", "keep_last", "keep_best", "resume",
    "allow_changed_config", "timeout", "max_bad_steps", "replicas", "val_data", "val_every",
    "val_data_root", "max_steps", "num_epochs", "prompts_per_rank", "gradient_accumulation_steps",
    "world_size",
}  # fmt: skip


class RunFolder:
    """One run in its folder, new or resumed.

    Construction claims the folder and finds where to go on; `with` opens logs and signals.

    Attributes:
        start: optimizer steps done before. progress: what the loader has taken by then.
        stop: SIGTERM or SIGINT, a StopRequest.
    Raises:
        UserError: another run writes there, or a run with other settings is there.
    """

    def __init__(self, config: TrainConfig, world: World, name: str):
        self.config, self.world, self.name = config, world, name
        self.folder = Path(config.output_dir)
        self.files: dict = {}  # name: open file
        self.bar = None
        self.stop = StopRequest()
        self.start, self.progress = 0, Progress(counts=(0,) * world.size)
        self.found: tuple[Path, dict] | None = None
        self.num_bad_steps = self.bad_in_a_row = 0
        self.value: float | None = None  # of the metric --keep_best
        self.validated: dict = {}  # val_.. keys of the present step's metrics
        self.seconds_save = 0.0  # that the step before spent on saving
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
        """Rank 0: hold the lock for as long as this process lives."""
        self.lock = claim(self.folder / ".lock", f"--output_dir {self.folder}")

    def _release(self) -> None:
        if self.world.is_main:
            self.lock.close()

    # ------------------------------------------------------------------------------------ resume

    def _find(self) -> None:
        """Where to go on: from the newest whole checkpoint, or from the beginning."""
        has_model = (self.folder / "model").exists()
        metrics = self.folder / "metrics.jsonl"
        has_metrics = metrics.is_file() and metrics.stat().st_size > 0
        if self.config.resume == "never":
            holds = has_model or has_metrics or bool(self.checkpoints.paths())
            require(
                not holds,
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
                f"--output_dir {self.folder} holds a model/ and no checkpoint to go on from: name "
                "another folder",
            )
            if has_metrics:
                log(f"{self.folder} holds a run without a whole checkpoint: it begins again")
            return
        run = self.found[1]
        self.start, self.num_bad_steps = run["step"], run["num_bad_steps"]
        self.bad_in_a_row, self.value = run["bad_in_a_row"], run["value"]
        progress = run["progress"]
        progress = Progress(
            progress["start"], tuple(progress["taken"]), tuple(progress["counts"]),
            progress["skipped"],
        )  # fmt: skip
        before = len(progress.counts)
        self.progress = progress.dealt_to(self.world.size)
        if before != self.world.size:
            log(f"the run goes on with {self.world.size} processes, it had {before}")

    def settings(self) -> dict:
        """What config.json holds."""
        return dataclasses.asdict(self.config) | {"world_size": self.world.size}

    def _compare_settings(self) -> None:
        """Raise UserError where a setting that matters is not the one that the run had."""
        file = self.folder / "config.json"
        try:
            before = json.loads(file.read_text(encoding="utf-8"))
        except (OSError, ValueError) as error:
            raise UserError(
                f"--output_dir {self.folder} holds a run whose config.json cannot be read: {error}"
            ) from None
        now = json.loads(json.dumps(self.settings()))
        for settings in (before, now):
            parts = ("world_size", "prompts_per_rank", "gradient_accumulation_steps")
            settings["prompts of a step"] = math.prod(settings[part] for part in parts)
        changed = {
            key: (before.get(key), value)
            for key, value in now.items()
            if key not in NEUTRAL and before.get(key) != value
        }
        if not changed:
            return
        words = "; ".join(f"{key} {old!r} is now {new!r}" for key, (old, new) in changed.items())
        require(
            self.config.allow_changed_config,
            f"--output_dir {self.folder} holds a run with other settings: {words}. Name another "
            "folder, or go on with it by --allow_changed_config true",
        )
        log(f"the run goes on with other settings: {words}")

    def is_finished(self, total_steps: int) -> bool:
        """Whether the folder's run has all its steps and its model; says so."""
        if self.found is None or self.start < total_steps or not (self.folder / "model").is_dir():
            return False
        log(
            f"{self.folder} holds a finished run of {self.start} steps: nothing is done. A larger "
            "--max_steps goes on with it, another --output_dir begins a new one"
        )
        self._release()
        return True

    def restore(self, model: nn.Module, optimizer: AdamW, total_steps: int, rate_at) -> None:
        """Load the checkpoint that was found, if any, into model and optimizer.

        Args:
            rate_at: the learning rate from (step, number of steps), to say how a longer run's
                schedule differs.
        """
        if self.found is None:
            return
        path, run = self.found
        self.checkpoints.load(path, model, optimizer)
        log(f"resumed from {path}")
        if run["total_steps"] != total_steps and self.start < total_steps:
            old, new = (rate_at(self.start, steps) for steps in (run["total_steps"], total_steps))
            log(
                f"the schedule now spans {total_steps} steps, it spanned {run['total_steps']}: the "
                f"learning rate of step {self.start + 1} is {new:.3g}, it would have been {old:.3g}"
            )

    # --------------------------------------------------------------------------------------- logs

    def open(self, total_steps: int) -> "RunFolder":
        """Cut the logs back to the checkpoint, write config.json, show the progress bar."""
        self.total_steps = total_steps
        if self.world.is_main:
            try:
                self._prepare_files()
            except OSError as error:
                raise UserError(f"{error.filename}: {error.strerror}") from None
            self.bar = tqdm(
                total=total_steps, initial=self.start, desc=self.name, unit="step",
                dynamic_ncols=True,
            )  # fmt: skip
        return self

    def _prepare_files(self) -> None:
        self.checkpoints.folder.mkdir(exist_ok=True)
        self.checkpoints.clean()
        lengths = self.found[1]["log_bytes"] if self.found else {}
        for name in LOGS:
            self._cut_back(self.folder / name, lengths.get(name, 0))
        unfinished = self.folder / ".config.json"
        unfinished.write_text(json.dumps(self.settings(), indent=2) + "\n", encoding="utf-8")
        os.replace(unfinished, self.folder / "config.json")

    def _cut_back(self, file: Path, length: int) -> None:
        size = file.stat().st_size if file.exists() else 0
        if size < length:
            log(f"{file} is shorter than its checkpoint says: {length - size} bytes are lost")
        elif size > length:
            os.truncate(file, length)

    def history(self) -> list[dict]:
        """Rank 0: the metrics of the steps before this process began; elsewhere nothing."""
        file = self.folder / "metrics.jsonl"
        if not self.world.is_main or not file.exists():
            return []
        return [json.loads(line) for line in file.read_text(encoding="utf-8").splitlines()]

    def metrics(self, metrics: dict[str, float | int | None]) -> None:
        """One object into metrics.jsonl, the same on the console.

        null stands for what is not defined in a step, or is not finite.
        """
        metrics = metrics | self.validated | {"seconds_save": self.seconds_save}
        self.validated = {}
        metrics = {key: value if _is_number(value) else None for key, value in metrics.items()}
        best = self.config.keep_best
        if best and not best.startswith("val_"):  # those come with validations alone
            require(best in metrics, f"--keep_best {best}: metrics have {', '.join(metrics)}")
        if metrics.get(best) is not None:
            self.value = metrics[best]
        if self.world.is_main:
            self.records("metrics.jsonl", [metrics])
            self.bar.write("  ".join(f"{key} {_short(value)}" for key, value in metrics.items()))
            self.bar.update()

    def records(self, name: str, records: list[dict]) -> None:
        """One line per record into a file of this name, which is there once it has a line."""
        if not self.world.is_main or not records:
            return
        assert name in LOGS, name
        try:
            if name not in self.files:
                self.files[name] = (self.folder / name).open("a", encoding="utf-8")
            self.files[name].writelines(json.dumps(record) + "\n" for record in records)
            self.files[name].flush()
        except OSError as error:
            raise UserError(f"{self.folder / name} cannot be written: {error.strerror}") from None

    def validate(self, validation, model: nn.Module, step: int) -> None:
        """Validate after so many steps, where that is due: a line of validation.jsonl, and val_..
        keys in the step's metrics."""
        if not validation.is_due(step, self.total_steps):
            return
        self.world.watch.at(f"step {step}, validation")
        begun = time.perf_counter()
        found = validation(model)
        if found is None:
            return
        seconds = time.perf_counter() - begun
        self.records("validation.jsonl", [{"step": step, **found, "seconds": seconds}])
        keys = ("accuracy", "accuracy_shuffled", "gap")
        self.validated = {f"val_{key}": found[key] for key in keys}
        words = [f"{key} {_short(value)}" for key, value in self.validated.items()]
        self.say(f"validation after step {step}: {'  '.join(words)}")

    def validate_at_start(self, validation, model: nn.Module) -> None:
        """Validate before the first step of a new run: what the others are compared with."""
        if self.start == 0:
            self.validate(validation, model, 0)
            self.validated = {}

    def say(self, text: str) -> None:
        """A line on the console, above the progress bar."""
        if self.world.is_main:
            self.bar.write(text)

    def __enter__(self) -> "RunFolder":
        self.stop.__enter__()
        return self

    def __exit__(self, *error: object) -> None:
        self.stop.__exit__(*error)
        if self.bar is not None:
            self.bar.close()  # leaves the bar's line, so that an error starts on its own
        if not error[0]:  # else a checkpoint may still be on its way, which syncs them
            for file in self.files.values():
                file.close()
            self._release()

    # --------------------------------------------------------------------------------- every step

    def count_bad_step(self, step: int, num_bad_updates: int, samples: list) -> None:
        """Note a step of which an update was not applied, since its gradient was not finite.

        Args:
            num_bad_updates: the same on every rank. samples: this rank's of the step.
        """
        self.num_bad_steps += num_bad_updates > 0
        self.bad_in_a_row = self.bad_in_a_row + 1 if num_bad_updates else 0
        if num_bad_updates:
            mine = [{"row": sample.row, "problem_id": sample.problem_id} for sample in samples]
            everyone = gather_to_main(mine, self.world)
            record = {"step": step + 1, "num_bad_updates": num_bad_updates}
            record["samples"] = [sample for rank in everyone or [] for sample in rank]
            self.records("bad_steps.jsonl", [record])

    def end_step(self, step: int, loader: Loader, model: nn.Module, optimizer: AdamW) -> bool:
        """Save where that is due; returns whether the run shall stop now.

        Raises:
            UserError: too many bad steps in a row, or unusable samples; a save has failed.
        """
        self.world.watch.at(f"step {step + 1}, save")
        begun = time.perf_counter()
        too_many_bad = self.bad_in_a_row > self.config.max_bad_steps
        stop = self._any_rank(bool(self.stop.name))
        every = self.config.save_every
        due = (every and (step + 1) % every == 0) or step + 1 == self.total_steps
        self.checkpoints.check()
        if due or stop or too_many_bad:
            self._save(step + 1, loader.progress, model, optimizer)
        if too_many_bad:
            self.checkpoints.wait()
            raise UserError(
                f"the gradients of {self.bad_in_a_row} steps in a row were not finite and none was "
                f"applied (--max_bad_steps {self.config.max_bad_steps}); bad_steps.jsonl names "
                f"their samples, the last checkpoint has the weights from before"
            )
        loader.check_skipped()
        self.seconds_save = time.perf_counter() - begun
        if stop:
            self.checkpoints.wait()
            log(f"stopped by {self.stop.name or 'a signal to another rank'} after step {step + 1} "
                "and saved: the same command goes on from here")  # fmt: skip
        return stop

    def _any_rank(self, wish: bool) -> bool:
        wishes: list = [None] * self.world.size
        dist.all_gather_object(wishes, wish)
        return any(wishes)

    def _save(self, step: int, progress: Progress, model: nn.Module, optimizer: AdamW) -> None:
        lengths = {}
        if self.world.is_main:
            files = {name: self.folder / name for name in LOGS}
            lengths = {name: file.stat().st_size for name, file in files.items() if file.exists()}
        run = {
            "step": step, "total_steps": self.total_steps, "progress": dataclasses.asdict(progress),
            "log_bytes": lengths, "num_bad_steps": self.num_bad_steps,
            "bad_in_a_row": self.bad_in_a_row, "value": self.value,
        }  # fmt: skip
        self.checkpoints.save(run, model, optimizer, before_visible=self._sync_logs)

    def _sync_logs(self) -> None:
        for file in list(self.files.values()):
            os.fsync(file.fileno())

    def finish(self, model: nn.Module) -> None:
        """Write model/, after the last checkpoint is whole."""
        self.checkpoints.wait()
        export_model(model, self.config.model, self.folder / "model", self.world)
        self.say(f"model written to {self.folder / 'model'}")


class PhaseTimer:
    """Seconds of a step by phase: `with timer("rollout"): ...`; phases of one name add up.

    Also tells the other ranks where this one is (distributed.Watch).
    """

    def __init__(self, world: World, step: int):
        self.world, self.step = world, step
        self.seconds: dict[str, float] = {}

    @contextmanager
    def __call__(self, phase: str):
        self.world.watch.at(f"step {self.step + 1}, {phase}")
        start = time.perf_counter()
        yield
        if torch.cuda.is_available():  # else the next phase would be billed for this one's kernels
            torch.cuda.synchronize()
        elapsed = time.perf_counter() - start
        self.seconds[phase] = self.seconds.get(phase, 0.0) + elapsed

    def metrics(self, num_tokens: float) -> dict[str, float]:
        """The step and each of its phases at the slowest rank, tokens per second, peak memory.

        A rank that waits for another in a collective waits inside the phase that holds it, so the
        phases can add up to more than the step.
        """
        own = {"memory": peak_memory_gib(self.world.device), "step": sum(self.seconds.values())}
        slowest = max_over_ranks(own | self.seconds)
        memory, seconds = slowest.pop("memory"), slowest.pop("step")
        return {
            "seconds": seconds,
            **{f"seconds_{phase}": value for phase, value in slowest.items()},
            "tokens_per_second": num_tokens / seconds,
            "peak_memory_gib": round(memory, 2),
        }


def _is_number(value: float | int | None) -> bool:
    return value is not None and math.isfinite(value)


def _short(value: float | int | None) -> str:
    return str(value) if value is None or isinstance(value, int) else f"{value:.4g}"
