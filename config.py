"""The flags that the scripts share. The default of a field is the paper's value where the paper
gives one (its place is in the help text).
"""

from dataclasses import dataclass

from infra.errors import require
from infra.flags import check_ranges, flag


@dataclass
class MediaConfig:
    """What the model gets to see, the same in every script."""

    max_frames: int = flag(16, "frames of a video at most (Sec. 4.1)", low=1)
    min_pixels: int = flag(4 * 28 * 28, "pixels of a frame or image at least", low=1)
    max_pixels: int = flag(128 * 28 * 28, "pixels of a video frame at most (Sec. 4.1)")
    image_max_pixels: int = flag(256 * 28 * 28, "pixels of an image at most")
    prompt_template: str = flag("", "text file with {question} and maybe {answer_format}")
    num_workers: int = flag(2, "processes that decode media, per rank", low=1)
    decode_timeout: float = flag(60.0, "seconds that one file may take to decode", above=0)

    def limits(self) -> dict[str, int]:
        """The limits of data.decode and of the loader."""
        keys = ("max_frames", "min_pixels", "max_pixels", "image_max_pixels")
        return {key: getattr(self, key) for key in keys}

    def check(self) -> None:
        """Raise UserError naming the first flag whose value makes no sense."""
        check_ranges(self)
        for name in ("max_pixels", "image_max_pixels"):
            require(getattr(self, name) >= self.min_pixels, f"--{name} is below --min_pixels")


@dataclass
class TrainConfig(MediaConfig):
    """What both training stages share."""

    model: str = flag("", "model folder or Hub id; without --model and --data: the toy")
    data: str = flag("", "data file, JSON list or JSON lines in the official format")
    data_root: str = flag("", "what the rows' paths are relative to; default: the data's folder")
    data_types: list[str] = flag(
        ["image", "video"], "kinds of samples to train on", choices=("image", "video")
    )
    skip_bad_samples: bool = flag(False, "leave out, and count, rows without what the stage needs")
    max_skipped: float = flag(
        0.01, "share of samples with unusable media that ends a run", low=0, high=1
    )
    freeze_vision: bool = flag(False, "train the language model alone")
    seed: int = flag(0, "of the data's order, the shuffles and the rollouts", low=0)
    num_epochs: float = flag(1.0, "passes over the data, where --max_steps is 0")
    max_steps: int = flag(0, "optimizer steps; 0: by --num_epochs", low=0)
    prompts_per_rank: int = flag(1, "prompts in one forward and backward pass of a rank", low=1)
    gradient_accumulation_steps: int = flag(1, "such passes in one optimizer step", low=1)
    tokens_per_micro_batch: int = flag(
        0, "tokens in one pass of the update instead; 0: as above", low=0
    )
    learning_rate: float = flag(1e-6, "peak learning rate of AdamW (App. D)", low=0)
    weight_decay: float = flag(0.01, "of matrices; not of biases and norms (App. D)", low=0)
    max_grad_norm: float = flag(5.0, "clip of the gradient's norm (App. D)", above=0)
    warmup_steps: int = flag(
        0, "steps over which the learning rate rises, before the cosine", low=0
    )
    activation_checkpointing: bool = flag(True, "recompute each layer in the backward pass")
    val_data: str = flag("", "data file for validation during training")
    val_every: int = flag(50, "steps between validations", low=1)
    max_new_tokens: int = flag(768, "length of a validated response at most, in tokens", low=1)
    save_every: int = flag(
        100, "steps between checkpoints; 0: only at the end, or when stopped", low=0
    )
    keep_last: int = flag(2, "checkpoints to keep, the newest; 0: all", low=0)
    keep_best: str = flag("", "a key of metrics.jsonl whose best checkpoint is kept as well")
    resume: str = flag(
        "auto",
        "auto: resume an unfinished run in --output_dir; never: refuse",
        choices=("auto", "never"),
    )
    allow_changed_config: bool = flag(False, "go on with a run although its settings differ")
    max_bad_steps: int = flag(
        5, "steps in a row with gradients that are not finite, at most", low=0
    )
    timeout: float = flag(1800.0, "seconds that a rank may keep the others waiting", above=0)
    replicas: int = flag(1, "copies of the sharded model (HSDP), as a rule one a node", low=1)

    def check(self) -> None:
        """Raise UserError naming the first flag whose value makes no sense."""
        super().check()
        require(
            self.val_data or not self.keep_best.startswith("val_"),
            f"--keep_best {self.keep_best} needs --val_data",
        )
        require(self.max_steps or self.num_epochs > 0, "--num_epochs must be positive")
        require(self.data_types, "--data_types takes image, video or both")

    @property
    def rank_batch_size(self) -> int:
        """Prompts of one rank in one optimizer step."""
        return self.prompts_per_rank * self.gradient_accumulation_steps

    def batch_size(self, world_size: int) -> int:
        """Prompts in one optimizer step, over all ranks."""
        return world_size * self.rank_batch_size
