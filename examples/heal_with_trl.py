"""Heal with plain TRL instead of `depthprune heal`: distillation of an exported folder, then the adapter back.

    depthprune export pruned.safetensors --to hf -o pruned-hf
    depthprune export DENSE --to hf -o dense-hf
    python examples/heal_with_trl.py pruned-hf --teacher dense-hf --data text.txt -o adapter
    depthprune import pruned-hf --adapter adapter -o healed.safetensors

The loss is the forward KL from the dense parent, on every token of the text. TRL's own DistillationTrainer trains on
what the student generates, which takes a GPU. A folder that no stock class expresses brings Python files with it:
`--trust-remote-code` lets Transformers run them. Needs: pip install 'depthprune_runtime[heal]'
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset
from peft import LoraConfig
from torch.nn.functional import kl_div, log_softmax
from transformers import AutoModelForCausalLM, AutoTokenizer
from trl import SFTConfig, SFTTrainer


class Distillation(SFTTrainer):
    """SFTTrainer whose loss compares the student's distribution with the teacher's."""

    def __init__(self, *args: Any, teacher: torch.nn.Module, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.teacher = teacher.to(self.args.device).eval().requires_grad_(False)

    def compute_loss(
        self, model: Any, inputs: Any, return_outputs: bool = False, num_items_in_batch: Any = None
    ) -> Any:
        given = {name: inputs[name] for name in ("input_ids", "attention_mask", "position_ids") if name in inputs}
        outputs = model(**given)
        with torch.no_grad():
            wanted = self.teacher(**given).logits
        ours, theirs = (log_softmax(logits.float(), -1).flatten(0, 1) for logits in (outputs.logits, wanted))
        # of all the batches that one step gathers
        tokens = ours.shape[0] if num_items_in_batch is None else num_items_in_batch
        loss = kl_div(ours, theirs, log_target=True, reduction="sum") / tokens
        return (loss, outputs) if return_outputs else loss


def paragraphs(path: Path) -> Dataset:
    """Paragraphs of a text; the trainer packs them."""
    found = [part.strip() for part in path.read_text(encoding="utf-8").split("\n\n")]
    return Dataset.from_dict({"text": [part for part in found if part]})


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("student", help="exported folder of the pruned model")
    parser.add_argument("--teacher", required=True, help="folder or hub id of its dense parent")
    parser.add_argument("--data", required=True, type=Path, help="UTF-8 text")
    parser.add_argument("-o", "--output", required=True, help="folder of the adapter")
    parser.add_argument("--steps", type=int, default=-1, help="steps, instead of two epochs")
    parser.add_argument("--seq-len", type=int, default=512)
    parser.add_argument("--trust-remote-code", action="store_true")
    args = parser.parse_args()
    student, teacher = (
        AutoModelForCausalLM.from_pretrained(name, trust_remote_code=args.trust_remote_code)
        for name in (args.student, args.teacher)
    )
    config = SFTConfig(
        args.output,
        max_length=args.seq_len,
        packing=True,
        packing_strategy="wrapped",
        per_device_train_batch_size=1,
        gradient_accumulation_steps=8,
        gradient_checkpointing=False,
        learning_rate=1e-4,
        lr_scheduler_type="cosine",
        warmup_steps=0.03,
        num_train_epochs=2,
        max_steps=args.steps,
        bf16=student.dtype == torch.bfloat16,
        save_strategy="no",
        report_to="none",
        logging_steps=1,
    )
    trainer = Distillation(
        student,
        config,
        train_dataset=paragraphs(args.data),
        processing_class=AutoTokenizer.from_pretrained(args.student),
        peft_config=LoraConfig(r=8, lora_alpha=16, target_modules="all-linear", task_type="CAUSAL_LM"),
        teacher=teacher,
    )
    trainer.train()
    trainer.save_model(args.output)


if __name__ == "__main__":
    main()
