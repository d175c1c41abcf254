"""One step of TRL's GRPOTrainer, for comparison with benchmarks/rl_step.py on the same machine.

    python -m venv trl
    trl/bin/pip install torch==2.13.0 transformers==5.23.0 trl==1.16.0 decord pillow
    trl/bin/python benchmarks/peers/trl_step.py MODEL_FOLDER VIDEO NEW_TOKENS STEPS

TRL has no shuffled group: it samples two thirds of our responses at G = 8. It takes no video
either, so that 8 images of 196 x 112 pixels, read once, stand for the 8 grids of 16 such frames:
the vision tokens are as many. Plain GRPO, beta 0.04 (a reference model runs), no activation
checkpointing, float32 on CPU. Prints a line for each step, the first of which is not counted.
"""

import sys
import tempfile

import torch
from datasets import Dataset, Features, Image, List, Value
from transformers import (
    AutoImageProcessor,
    AutoTokenizer,
    Qwen2_5_VLForConditionalGeneration,
    Qwen2_5_VLProcessor,
    TrainerCallback,
)
from trl import GRPOConfig, GRPOTrainer
from watch import QUESTION, Watch, read_frames


class ImagesAlone(Qwen2_5_VLProcessor):
    """A processor without one for videos, which would need torchvision."""

    def check_argument_for_proper_class(self, argument_name, argument):
        if argument_name != "video_processor":
            return super().check_argument_for_proper_class(argument_name, argument)


class Timer(TrainerCallback):
    def __init__(self, watch: Watch):
        self.watch = watch

    def on_step_begin(self, *args, **kwargs):
        self.watch.start()

    def on_step_end(self, *args, **kwargs):
        self.watch.stop()


def main(folder: str, path: str, new_tokens: str, steps: str) -> None:
    watch = Watch(int(new_tokens))

    def reward(completions, completion_ids, **_) -> list[float]:
        """Anything that differs within a group: with equal rewards there is nothing to learn."""
        assert {len(ids) for ids in completion_ids} == {watch.new_tokens}
        return [float(len(completion[0]["content"]) % 7) for completion in completions]

    tokenizer = AutoTokenizer.from_pretrained(folder, padding_side="left")
    processor = ImagesAlone(
        AutoImageProcessor.from_pretrained(folder), tokenizer, chat_template=tokenizer.chat_template
    )
    rows = {
        "prompt": [[{"role": "user", "content": QUESTION}]] * 64,
        "images": [list(read_frames(path, 8))] * 64,
    }
    prompt = List({"role": Value("string"), "content": Value("string")})
    features = Features({"prompt": prompt, "images": List(Image())})
    with tempfile.TemporaryDirectory() as output:
        config = GRPOConfig(
            output_dir=output, max_steps=int(steps), save_strategy="no", report_to="none",
            logging_strategy="no", disable_tqdm=True, use_cpu=True, bf16=False,
            per_device_train_batch_size=8, num_generations=8, beta=0.04, temperature=1.0,
            max_completion_length=watch.new_tokens, learning_rate=1e-6,
            generation_kwargs={"min_new_tokens": watch.new_tokens}, gradient_checkpointing=False,
        )  # fmt: skip
        GRPOTrainer(
            model=Qwen2_5_VLForConditionalGeneration.from_pretrained(folder, dtype=torch.float32),
            reward_funcs=reward, args=config, processing_class=processor,
            callbacks=[Timer(watch)], train_dataset=Dataset.from_dict(rows, features=features),
        ).train()  # fmt: skip
    watch.report()


if __name__ == "__main__":
    main(*sys.argv[1:])
