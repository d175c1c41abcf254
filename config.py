"""The flags of both training stages, and what all scripts share: one line says a flag's default,
its meaning and its range. Defaults are the paper's where the paper gives one (with its section).

`neutral` marks a flag that may differ in a resumed run: steps are computed the same way.
"""

import math
from dataclasses import dataclass

from infra.errors import UserError, require
from infra.flags import check_ranges, flag

PRECISIONS = ("", "fp32", "bf16")


@dataclass
class MediaConfig:
    """What the model gets to see, the same in every script."""

    max_frames: int = flag(16, "frames of a video at most (Sec. 4.1)", low=1)
    min_pixels: int = flag(4 * 28 * 28, "pixels of a frame or image at least", low=1)
    max_pixels: int = flag(128 * 28 * 28, "pixels of a video frame at most (Sec. 4.1)")
    image_max_pixels: int = flag(256 * 28 * 28, "pixels of an image at most")
    prompt_template: str = flag("", "text file with {question} and maybe {answer_format}")
    num_workers: int = flag(2, "processes that decode media, per rank", low=1, neutral=True)
    decode_timeout: float = flag(
        60.0, "seconds that one file may take to decode", above=0, high=86_400, neutral=True
    )

    def limits(self) -> dict[str, int]:
        """The limits of data.submit_decode."""
        keys = ("max_frames", "min_pixels", "max_pixels", "image_max_pixels")
        return {key: getattr(self, key) for key in keys}

    def check(self) -> None:
        """Raise UserError naming the first flag whose value makes no sense."""
        check_ranges(self)
        for name in ("max_pixels", "image_max_pixels"):
            require(getattr(self, name) >= self.min_pixels, f"--{name} is below --min_pixels")


@dataclass
class TrainConfig(MediaConfig):
    """Flags of both stages."""

    model: str = flag("", "model folder or Hub id; without --model and --data: the toy")
    data: str = flag("", "data file, JSON list or JSON lines in the official format")
    data_root: str = flag("", "what the rows' paths are relative to; default: the data's folder")
    data_types: list[str] = flag(
        ["image", "video"], "kinds of samples to train on", choices=("image", "video")
    )
    skip_bad_samples: bool = flag(
        False, "leave out, and count, rows that the stage cannot use", neutral=True
    )
    max_skipped: float = flag(
        0.01, "share of samples with unusable media that ends a run", low=0, high=1, neutral=True
    )
    output_dir: str = flag("", "the run's folder", neutral=True)
    seed: int = flag(0, "of the data's order, the shuffles and the rollouts", low=0)
    max_steps: int = flag(0, "optimizer steps; 0: by --num_epochs", low=0, neutral=True)
    num_epochs: float = flag(
        1.0, "passes over the data", above=0, neutral=True, instead_of="max_steps"
    )
    prompts_per_step: int = flag(8, "prompts of one optimizer step, over all ranks", low=1)
    prompts_per_rank: int = flag(1, "prompts in one pass of a rank at most", low=1, neutral=True)
    learning_rate: float = flag(1e-6, "peak learning rate of AdamW (App. D)", low=0)
    weight_decay: float = flag(0.01, "of matrices; not of biases and norms (App. D)", low=0)
    max_grad_norm: float = flag(5.0, "clip of the gradient's norm (App. D)", above=0)
    warmup_steps: int = flag(0, "steps of linear warm-up, before the cosine", low=0)
    freeze_vision: bool = flag(False, "train the language model alone")
    activation_checkpointing: bool = flag(
        True, "recompute each layer in the backward pass", neutral=True
    )
    precision: str = flag(
        "", "fp32 or bf16, what passes compute in; default: by device", choices=PRECISIONS
    )
    max_new_tokens: int = flag(768, "length of a sampled response at most, in tokens", low=1)
    val_data: str = flag("", "data file for validation during training", neutral=True)
    val_every: int = flag(50, "steps between validations", low=1, neutral=True)
    save_every: int = flag(
        100, "steps between checkpoints; 0: only at the end, or when stopped", low=0, neutral=True
    )
    keep_last: int = flag(2, "newest checkpoints to keep; 0: all", low=0, neutral=True)
    keep_best: str = flag("", "metric whose best checkpoint is kept as well", neutral=True)
    resume: str = flag(
        "auto",
        "auto: resume an unfinished run in --output_dir; never: refuse",
        choices=("auto", "never"),
        neutral=True,
    )
    allow_changed_config: bool = flag(False, "resume although settings differ", neutral=True)
    max_bad_steps: int = flag(
        5, "steps in a row with a loss or gradient that is not finite", low=0, neutral=True
    )
    tensorboard: bool = flag(False, "write the metrics as TensorBoard events too", neutral=True)
    timeout: float = flag(
        1800.0,
        "seconds that a rank may keep the others waiting",
        above=0,
        high=604_800,
        neutral=True,
    )
    replicas: int = flag(
        1, "copies of the sharded model (HSDP), as a rule one per node", low=1, neutral=True
    )

    def check(self) -> None:
        """Raise UserError naming the first flag whose value makes no sense."""
        super().check()
        require(self.data_types, "--data_types takes image, video or both")
        needs_validation = self.keep_best.startswith("val_") and not self.val_data
        require(not needs_validation, f"--keep_best {self.keep_best} needs --val_data")

    def rank_prompts(self, num_ranks: int) -> int:
        """Prompts of one rank in one optimizer step.

        Raises:
            UserError: the step's prompts cannot be dealt evenly to the ranks.
        """
        share, rest = divmod(self.prompts_per_step, num_ranks)
        if rest:
            prompts = [number for number in (share * num_ranks, (share + 1) * num_ranks) if number]
            divisors = [
                number for number in range(1, self.prompts_per_step + 1)
                if self.prompts_per_step % number == 0
            ]  # fmt: skip
            ranks = [number for number in divisors if number < num_ranks][-1:]
            ranks += [number for number in divisors if number > num_ranks][:1]
            raise UserError(
                f"--prompts_per_step {self.prompts_per_step} cannot be dealt evenly to {num_ranks} "
                f"ranks: take {_either(prompts)} prompts, or {_either(ranks)} ranks"
            )
        return share

    def num_steps(self, num_samples: int) -> int:
        """Optimizer steps of a run: --max_steps, or what --num_epochs take, rounded up."""
        epochs = math.ceil(self.num_epochs * num_samples / self.prompts_per_step)
        return self.max_steps or epochs


def _either(numbers: list[int]) -> str:
    return " or ".join(map(str, numbers))


@dataclass
class SFTConfig(TrainConfig):
    """Flags of stage 1."""

    output_dir: str = flag("runs/sft", "the run's folder", neutral=True)
    keep_best: str = flag(
        "",
        "metric whose best checkpoint is kept as well",
        choices=("", "loss", "val_accuracy", "val_gap"),
        neutral=True,
    )


@dataclass
class RLConfig(TrainConfig):
    """Flags of stage 2."""

    output_dir: str = flag("runs/rl", "the run's folder", neutral=True)
    max_steps: int = flag(
        1000, "optimizer steps (Sec. 4.1); 0: by --num_epochs", low=0, neutral=True
    )
    group_size: int = flag(8, "G, responses to the ordered frames (Sec. 4.1)", low=2)
    shuffled_group_size: int = flag(
        4, "G~, responses to the shuffled frames (Sec. 4.1); 0: p~ = 0, a placebo", low=0
    )
    max_new_tokens: int = flag(768, "length of a response at most, in tokens (App. D)", low=1)
    correct_threshold: float = flag(0.5, "accuracy reward of a correct response (Sec. 3.2)")
    temporal: bool = flag(True, "the temporal reward, Eq. 1 and 2; false: plain GRPO")
    temporal_target: str = flag(
        "reward", "what r_t is added to (Sec. 3.2, Eq. 2)", choices=("reward", "advantage")
    )
    alpha: float = flag(0.3, "temporal reward (Eq. 1)", low=0)
    advantage_norm: str = flag(
        "std", "std: Eq. 3; none: not divided; separate: Eq. 3 of each part of the reward",
        choices=("std", "none", "separate"),
    )  # fmt: skip
    length_reward: bool = flag(True, "the length reward, Eq. 5")
    omega: float = flag(0.2, "length reward (Eq. 5)", low=0)
    l_min: int = flag(320, "shortest rewarded response, in tokens (Eq. 5)", low=0)
    l_max: int = flag(512, "longest rewarded response, in tokens (Eq. 5)", low=0)
    beta: float = flag(0.04, "weight of the KL (Eq. 4, App. D)", low=0)
    clip_eps: float = flag(0.2, "clip range of the ratio (Eq. 4; the paper gives none)", low=0)
    ratio_level: str = flag(
        "token", "ratio of Eq. 4 per token, or per sequence as printed",
        choices=("token", "sequence"),
    )  # fmt: skip
    num_iterations: int = flag(1, "updates on the same rollouts", low=1)
    keep_best: str = flag(
        "",
        "metric whose best checkpoint is kept as well",
        choices=("", "reward", "accuracy", "gap", "val_accuracy", "val_gap"),
        neutral=True,
    )

    def check(self) -> None:
        """Raise UserError naming the first flag whose value makes no sense."""
        super().check()
        require(self.l_max >= self.l_min, "--l_max is below --l_min")
