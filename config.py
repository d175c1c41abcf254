"""Flags: the fields of the config dataclasses, and how a command line becomes one.

A script's config derives from those below. The default of a field is the paper's value where the
paper gives one (its place is in the help text). A run is the toy if neither --model nor --data is
given; the toy replaces some defaults, never a flag that the user gave.
"""

import argparse
import dataclasses
import difflib
import sys
from dataclasses import dataclass, field
from typing import Any, TypeVar

from transformers import HfArgumentParser

Config = TypeVar("Config")


def flag(default: Any, help: str) -> Any:
    """A field with the text that --help shows for it."""
    if isinstance(default, list):
        return field(default_factory=lambda: list(default), metadata={"help": help})
    return field(default=default, metadata={"help": help})


@dataclass
class MediaConfig:
    """What the model gets to see, the same in every script."""

    max_frames: int = flag(16, "frames of a video at most (Sec. 4.1)")
    min_pixels: int = flag(4 * 28 * 28, "pixels of a frame or image at least")
    max_pixels: int = flag(128 * 28 * 28, "pixels of a video frame at most (Sec. 4.1)")
    image_max_pixels: int = flag(256 * 28 * 28, "pixels of an image at most")
    prompt_template: str = flag("", "text file with {question} and maybe {answer_format}")
    num_workers: int = flag(2, "processes that decode media, per rank")
    decode_timeout: float = flag(60.0, "seconds that one file may take to decode")

    def limits(self) -> dict[str, int]:
        """The limits of data.decode and of the loader."""
        keys = ("max_frames", "min_pixels", "max_pixels", "image_max_pixels")
        return {key: getattr(self, key) for key in keys}

    def check_media(self) -> None:
        """Raises ValueError naming the first flag whose value makes no sense."""
        for name in ("max_frames", "num_workers", "min_pixels"):
            require(getattr(self, name) >= 1, f"--{name} must be at least 1")
        for name in ("max_pixels", "image_max_pixels"):
            require(getattr(self, name) >= self.min_pixels, f"--{name} is below --min_pixels")
        require(self.decode_timeout > 0, "--decode_timeout must be positive")


@dataclass
class TrainConfig(MediaConfig):
    """What both training stages share."""

    model: str = flag("", "model folder or Hub id; without --model and --data: the toy")
    data: str = flag("", "data file, JSON list or JSON lines in the official format")
    data_root: str = flag("", "what the rows' paths are relative to; default: the data's folder")
    data_types: list[str] = flag(["image", "video"], "kinds of samples to train on")
    skip_bad_samples: bool = flag(False, "leave out, and count, rows without what the stage needs")
    max_skipped: float = flag(0.01, "share of samples with unusable media that ends a run")
    freeze_vision: bool = flag(False, "train the language model alone")
    seed: int = flag(0, "of the data's order, the shuffles and the rollouts")
    num_epochs: float = flag(1.0, "passes over the data, where --max_steps is 0")
    max_steps: int = flag(0, "optimizer steps; 0: by --num_epochs")
    prompts_per_rank: int = flag(1, "prompts in one forward and backward pass of a rank")
    gradient_accumulation_steps: int = flag(1, "such passes in one optimizer step")
    tokens_per_micro_batch: int = flag(0, "tokens in one pass of the update instead; 0: as above")
    learning_rate: float = flag(1e-6, "peak learning rate of AdamW (App. D)")
    weight_decay: float = flag(0.01, "of matrices; not of biases and norms (App. D)")
    max_grad_norm: float = flag(5.0, "clip of the gradient's norm (App. D)")
    warmup_steps: int = flag(0, "steps over which the learning rate rises, before the cosine")
    activation_checkpointing: bool = flag(True, "recompute each layer in the backward pass")
    val_data: str = flag("", "data file for validation during training")
    val_every: int = flag(50, "steps between validations")
    max_new_tokens: int = flag(768, "length of a validated response at most, in tokens")
    save_every: int = flag(100, "steps between checkpoints; 0: only at the end, or when stopped")
    keep_last: int = flag(2, "checkpoints to keep, the newest; 0: all")
    keep_best: str = flag("", "a key of metrics.jsonl whose best checkpoint is kept as well")
    resume: str = flag("auto", "auto: go on with an unfinished run in --output_dir; never: refuse")
    allow_changed_config: bool = flag(False, "go on with a run although its settings differ")
    max_bad_steps: int = flag(5, "steps in a row with gradients that are not finite, at most")
    timeout: float = flag(1800.0, "seconds that a rank may keep the others waiting")
    replicas: int = flag(1, "copies of the sharded model (HSDP), as a rule one a node")

    def check(self) -> None:
        """Raises ValueError naming the first flag whose value makes no sense."""
        self.check_media()
        for name in ("prompts_per_rank", "gradient_accumulation_steps"):
            require(getattr(self, name) >= 1, f"--{name} must be at least 1")
        for name in ("seed", "max_steps", "warmup_steps", "learning_rate", "weight_decay"):
            require(getattr(self, name) >= 0, f"--{name} must not be negative")
        for name in ("val_every", "max_new_tokens"):
            require(getattr(self, name) >= 1, f"--{name} must be at least 1")
        for name in ("save_every", "keep_last", "max_bad_steps", "tokens_per_micro_batch"):
            require(getattr(self, name) >= 0, f"--{name} must not be negative")
        require(
            self.val_data or not self.keep_best.startswith("val_"),
            f"--keep_best {self.keep_best} needs --val_data",
        )
        require(self.resume in ("auto", "never"), "--resume takes auto or never")
        require(self.timeout > 0, "--timeout must be positive")
        require(self.replicas >= 1, "--replicas must be at least 1")
        require(self.max_grad_norm > 0, "--max_grad_norm must be positive")
        require(0 <= self.max_skipped <= 1, "--max_skipped must lie between 0 and 1")
        require(self.max_steps or self.num_epochs > 0, "--num_epochs must be positive")
        unknown = set(self.data_types) - {"image", "video"}
        require(not unknown and self.data_types, "--data_types takes image, video or both")

    @property
    def rank_batch_size(self) -> int:
        """Prompts of one rank in one optimizer step."""
        return self.prompts_per_rank * self.gradient_accumulation_steps

    def batch_size(self, world_size: int) -> int:
        """Prompts in one optimizer step, over all ranks."""
        return world_size * self.rank_batch_size


def require(condition: object, message: str) -> None:
    """Raise ValueError with a message for the user unless the condition holds."""
    if not condition:
        raise ValueError(message)


class FlagParser(HfArgumentParser):
    """HfArgumentParser with one name per flag, the field's, and with ValueError for an exit."""

    def add_argument(self, *names: str, **settings: Any) -> argparse.Action | None:
        """Leave out the spellings with hyphens, and --no_x beside --x false."""
        names = tuple(name for name in names if name == "--help" or "-" not in name[2:])
        if names[0].startswith("--no_"):
            return None
        return super().add_argument(*names, **settings)

    def error(self, message: str) -> None:
        raise ValueError(message.removeprefix("argument "))


def parse_config(
    cls: type[Config],
    toy_defaults: dict[str, Any],
    real_command: str,
    argv: list[str] | None = None,
) -> tuple[Config, bool]:
    """The config of a command line, and whether it is the toy's.

    Raises:
        ValueError: an unknown or abbreviated flag, a value of the wrong type, --model without
            --data or the other way round.
    """
    argv = sys.argv[1:] if argv is None else argv
    names = [item.name for item in dataclasses.fields(cls)]
    given = [word[2:].split("=")[0] for word in argv if word.startswith("--")]
    for name in given:
        if name not in [*names, "help"]:
            near = difflib.get_close_matches(name, names, n=1)
            hint = f"; did you mean --{near[0]}?" if near else "; --help lists them"
            raise ValueError(f"unknown flag --{name}{hint}")
    is_toy = "model" not in given and "data" not in given
    for one, other in (("model", "data"), ("data", "model")):
        require(
            one not in given or other in given,
            f"--{one} is given without --{other}: give both, or neither for the embedded toy",
        )
    parser = FlagParser(cls, allow_abbrev=False, epilog=f"A real run: {real_command}")
    wants_help = "help" in given or "-h" in argv  # which shows the paper's values
    if is_toy and not wants_help:
        parser.set_defaults(**toy_defaults)
    config, rest = parser.parse_args_into_dataclasses(argv, return_remaining_strings=True)
    require(not rest, f"unknown argument {rest[0]!r}" if rest else "")
    return config, is_toy
