"""The model that is trained, a Llama: its shape, its network, its weights.

shape.py      what a config.json says, and the presets
rope.py       rotary positions
attention.py  tokens that look back
cache.py      keys and values of what was read, for generation
network.py    the modules, under Hugging Face's names
weights.py    drawn from a seed, or read from safetensors
"""

from .cache import KeyValueCache
from .network import Llama
from .rope import LinearRope, Llama3Rope
from .shape import PRESETS, LlamaConfig, load_config
from .weights import check_finite, init_weights, load_weights, weight_files

__all__ = [
    "PRESETS",
    "KeyValueCache",
    "LinearRope",
    "Llama",
    "Llama3Rope",
    "LlamaConfig",
    "check_finite",
    "init_weights",
    "load_config",
    "load_weights",
    "weight_files",
]
