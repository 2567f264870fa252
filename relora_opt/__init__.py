"""ReLoRA at the level of the optimizer: high-rank training through low-rank updates, for any model.

Source: Lialin et al. 2023, "Stack More Layers Differently", arXiv 2307.05695.
"""

from . import prune
from .bases import muon_beside_adamw
from .export import save_merged
from .functional import FunctionalModel
from .guard import Guard
from .metrics import Memory, Metrics, WeightMetrics, memory
from .optimizer import ReLoRAOptimizer
from .schedule import JaggedSchedule, constant, cosine, linear, wsd
from .select import default_targets, target_names
from .step import Step
from .trainer import trainer_factory
from .weight import LowRankWeight

__version__ = "0.1.0"

__all__ = [
    "FunctionalModel",
    "Guard",
    "JaggedSchedule",
    "LowRankWeight",
    "Memory",
    "Metrics",
    "ReLoRAOptimizer",
    "Step",
    "WeightMetrics",
    "constant",
    "cosine",
    "default_targets",
    "linear",
    "memory",
    "muon_beside_adamw",
    "prune",
    "save_merged",
    "target_names",
    "trainer_factory",
    "wsd",
]
