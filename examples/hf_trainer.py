"""transformers' Trainer, by the factory that it calls once the model is placed:  python examples/hf_trainer.py [FOLDER]

A second run with the same folder goes on from the last checkpoint in it.

Trainer(..., optimizers=(ReLoRAOptimizer(model, ...), scheduler)) does as well, where the model is not sharded later.
"""

import sys
import tempfile

import torch
from transformers import LlamaConfig, LlamaForCausalLM, Trainer, TrainingArguments
from transformers.trainer_utils import get_last_checkpoint

from relora_opt import JaggedSchedule, trainer_factory

torch.manual_seed(0)
sizes = {"vocab_size": 64, "hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2}
model = LlamaForCausalLM(LlamaConfig(**sizes, num_attention_heads=4, max_position_embeddings=32))
starts = torch.randint(0, 64, (640, 1))
texts = [{"input_ids": row, "labels": row} for row in (starts + 5 * torch.arange(16)) % 64]

folder = sys.argv[1] if len(sys.argv) > 1 else tempfile.mkdtemp()
arguments = TrainingArguments(
    folder,
    per_device_train_batch_size=8,
    learning_rate=3e-3,
    lr_scheduler_type="cosine",
    max_grad_norm=0.0,  # ours clips the factors
    logging_steps=20,
    save_steps=40,
    report_to=[],
)
schedule = JaggedSchedule(restart_every=20, restart_warmup=4, warm_start=10)
options = {"rank": 8, "schedule": schedule, "max_grad_norm": 1.0}
options["lr"] = arguments.learning_rate  # the Trainer does not hand it over
trainer = Trainer(model, arguments, train_dataset=texts, optimizer_cls_and_kwargs=(trainer_factory, options))
trainer.train(resume_from_checkpoint=get_last_checkpoint(folder))
