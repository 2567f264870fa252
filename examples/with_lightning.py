"""Lightning:  python examples/with_lightning.py"""

import tempfile

import lightning
import torch
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from relora_opt import JaggedSchedule, ReLoRAOptimizer


class Student(lightning.LightningModule):
    def __init__(self) -> None:
        super().__init__()
        self.net = nn.Sequential(nn.Linear(32, 128), nn.GELU(), nn.Linear(128, 32))

    def training_step(self, batch: list[torch.Tensor], index: int) -> torch.Tensor:
        loss = nn.functional.mse_loss(self.net(batch[0]), batch[1])
        self.log("loss", loss)
        return loss

    def configure_optimizers(self) -> dict[str, object]:
        schedule = JaggedSchedule(restart_every=20, restart_warmup=4, warm_start=10)
        optimizer = ReLoRAOptimizer(self.net, rank=8, targets=["0", "2"], schedule=schedule, lr=3e-3)
        scheduler = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, 60)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": scheduler, "interval": "step"}}


torch.manual_seed(0)
x = torch.randn(3840, 32)
loader = DataLoader(TensorDataset(x, nn.Linear(32, 32)(x).detach()), batch_size=32, shuffle=True)
student = Student()
trainer = lightning.Trainer(
    max_steps=60, accumulate_grad_batches=2, gradient_clip_val=1.0, accelerator="cpu", logger=False,
    default_root_dir=tempfile.mkdtemp(),
)  # fmt: skip
trainer.fit(student, loader)
optimizer, loss = trainer.optimizers[0], trainer.callback_metrics["loss"]
print(f"{optimizer.num_updates} updates, {optimizer.num_restarts} restarts, loss {loss:.4f}")
