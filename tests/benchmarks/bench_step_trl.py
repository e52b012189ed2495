"""TRL's side of bench_step.py: one GRPO step at a time, in an environment that has trl and not coderl.

Takes the work as JSON, then a step for each line on standard input; answers each with a line of JSON.
"""

from __future__ import annotations

import json
import resource
import sys
import tempfile
import time
from typing import Any

import torch
from datasets import Dataset
from peft import LoraConfig
from transformers import BitsAndBytesConfig, TrainerCallback
from trl import GRPOConfig, GRPOTrainer

MARK = "@@"
"""What an answer begins with: libraries print on standard output as well."""


class Turns(TrainerCallback):
    """Waits for its turn before each step, and reports after it."""

    def __init__(self) -> None:
        self.began = 0.0
        self.tokens = 0

    def on_step_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        if not sys.stdin.readline():
            control.should_training_stop = True
        self.tokens = 0
        self.began = time.perf_counter()

    def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        seconds = time.perf_counter() - self.began
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
        if torch.cuda.is_available():
            peak = torch.cuda.max_memory_allocated()
        print(MARK + json.dumps({"seconds": seconds, "tokens": self.tokens, "peak": peak}), flush=True)


def main() -> None:
    work = json.loads(sys.argv[1])
    options = {"dtype": "float32", "nf4": False, "rows": None, "checkpointing": False} | work.get("trl", {})
    turns = Turns()

    def reward(completion_ids: list[list[int]], **_: Any) -> list[float]:
        turns.tokens += sum(map(len, completion_ids))
        return [float(number % 2) for number, _ in enumerate(completion_ids)]

    with tempfile.TemporaryDirectory() as folder:
        samples = len(work["prompts"]) * work["group"]
        rows = options["rows"] or samples
        model: dict[str, Any] = {"dtype": options["dtype"]}
        if options["nf4"]:
            model["quantization_config"] = BitsAndBytesConfig(
                load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype=options["dtype"]
            )
        config = GRPOConfig(
            output_dir=folder,
            per_device_train_batch_size=rows,
            gradient_accumulation_steps=samples // rows,
            num_generations=work["group"],
            max_completion_length=work["tokens"],
            max_steps=work["steps"],
            beta=work["kl"],
            loss_type="dr_grpo",
            scale_rewards="none",
            learning_rate=work["learning_rate"],
            temperature=1.0,
            use_cpu=not torch.cuda.is_available(),
            bf16=options["dtype"] == "bfloat16",
            gradient_checkpointing=options["checkpointing"],
            save_strategy="no",
            report_to="none",
            disable_tqdm=True,
            model_init_kwargs=model,
        )
        trainer = GRPOTrainer(
            model=work["model"],
            reward_funcs=reward,
            args=config,
            train_dataset=Dataset.from_list([{"prompt": prompt} for prompt in work["prompts"]]),
            peft_config=LoraConfig(r=work["rank"], lora_alpha=work["rank"], target_modules="all-linear"),
            callbacks=[turns],
        )
        trainer.train()


if __name__ == "__main__":
    main()
