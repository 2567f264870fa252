"""transformers' Trainer on the functional path, by a compute_loss of three lines:

python examples/hf_trainer_functional.py
"""

import tempfile
from typing import Any

import torch
from transformers import LlamaConfig, LlamaForCausalLM, Trainer, TrainingArguments

from relora_opt import JaggedSchedule, ReLoRAOptimizer

torch.manual_seed(0)
sizes = {"vocab_size": 64, "hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2}
model = LlamaForCausalLM(LlamaConfig(**sizes, num_attention_heads=4, max_position_embeddings=32))
starts = torch.randint(0, 64, (640, 1))
texts = [{"input_ids": row, "labels": row} for row in (starts + 5 * torch.arange(16)) % 64]

schedule = JaggedSchedule(restart_every=20, restart_warmup=4, warm_start=10)
optimizer = ReLoRAOptimizer(model, rank=8, schedule=schedule, max_grad_norm=1.0, lr=3e-3)
functional = optimizer.functional(model)


class LowRankTrainer(Trainer):
    def compute_loss(self, model: Any, inputs: Any, *args: Any, **kwargs: Any) -> Any:
        trained = functional if model.training else model
        return super().compute_loss(trained, inputs, *args, **kwargs)


arguments = TrainingArguments(
    tempfile.mkdtemp(), per_device_train_batch_size=8, max_grad_norm=0.0, logging_steps=20, report_to=[]
)
scheduler = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, 240)
LowRankTrainer(model, arguments, train_dataset=texts, optimizers=(optimizer, scheduler)).train()
print(f"{optimizer.num_restarts} restarts; dense gradient: {model.model.layers[0].mlp.up_proj.weight.grad}")
