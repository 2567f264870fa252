"""A Llama whose parameters carry Hugging Face's names, so that its weights load there and theirs load here.

    x <- x + Attention(RMSNorm(x)),   x <- x + down(silu(gate(u)) * up(u)) with u = RMSNorm(x),   logits =
    head(RMSNorm(x))

Causal scaled-dot-product attention with rotary positions and grouped keys and values. The model holds parameters only:
rotary angles are computed from the configuration at every call, so that no cast or meta-device construction can damage
them. There is no key-value cache and no dropout. Shapes of the paper's presets: the configurations of its reference
implementation (github.com/Guitaricet/relora, configs/llama_60m.json and its neighbours).
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn

from .config import UserError


@dataclass(frozen=True)
class LinearRope:
    """Rotary scaling of type "linear": every frequency is divided by `factor`."""

    factor: float

    def __post_init__(self) -> None:
        _check_positive("factor", self.factor)

    def __call__(self, frequencies: Tensor) -> Tensor:
        return frequencies / self.factor


@dataclass(frozen=True)
class Llama3Rope:
    """Rotary scaling of type "llama3": long wavelengths are divided by `factor`, short ones kept, a ramp in between."""

    factor: float
    low_freq_factor: float
    high_freq_factor: float
    original_max_position_embeddings: int

    def __post_init__(self) -> None:
        for name, value in asdict(self).items():
            _check_positive(name, value)
        if self.high_freq_factor <= self.low_freq_factor:
            low, high = self.low_freq_factor, self.high_freq_factor
            raise UserError(f"high_freq_factor={high} must exceed low_freq_factor={low}: correct rope_scaling")

    def __call__(self, frequencies: Tensor) -> Tensor:
        turns = self.original_max_position_embeddings * frequencies / (2 * math.pi)
        kept = ((turns - self.low_freq_factor) / (self.high_freq_factor - self.low_freq_factor)).clamp(0, 1)
        return frequencies * (kept + (1 - kept) / self.factor)


def _check_positive(name: str, value: object) -> None:
    if type(value) not in (int, float) or not 0 < value < math.inf:  # type: ignore[operator]
        raise UserError(f"{name}={value!r} must be a positive finite number: correct the model's config")


_ROPE_TYPES: dict[str, type[LinearRope] | type[Llama3Rope]] = {"linear": LinearRope, "llama3": Llama3Rope}
_COUNTS = ("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads")


@dataclass(frozen=True)
class LlamaConfig:
    """The shape of a Llama, under Hugging Face's names. Checked at construction: UserError names the field.

    `num_key_value_heads` and `head_dim` follow from the other fields when None; `kv_heads` and `head_size` are
    resolved.
    """

    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_hidden_layers: int
    num_attention_heads: int
    num_key_value_heads: int | None = None
    head_dim: int | None = None
    max_position_embeddings: int = 2048
    rms_norm_eps: float = 1e-6
    rope_theta: float = 10_000.0
    rope_scaling: LinearRope | Llama3Rope | None = None
    tie_word_embeddings: bool = False
    attention_bias: bool = False
    mlp_bias: bool = False
    initializer_range: float = 0.02
    bos_token_id: int | None = None
    eos_token_id: int | tuple[int, ...] | None = None

    def __post_init__(self) -> None:
        for name in (*_COUNTS, "max_position_embeddings", "num_key_value_heads", "head_dim"):
            value = getattr(self, name)
            if type(value) is not int or value < 1:
                if value is None and name in ("num_key_value_heads", "head_dim"):
                    continue
                raise UserError(f"{name}={value!r} must be a whole number of at least 1: correct the model's config")
        for name in ("rms_norm_eps", "rope_theta", "initializer_range"):
            _check_positive(name, getattr(self, name))
        for name in ("tie_word_embeddings", "attention_bias", "mlp_bias"):
            if type(getattr(self, name)) is not bool:
                raise UserError(f"{name}={getattr(self, name)!r} must be true or false: correct the model's config")
        self._check_heads()
        self._check_token_ids()

    def _check_heads(self) -> None:
        heads = f"num_attention_heads={self.num_attention_heads}"
        if self.hidden_size % self.num_attention_heads:
            raise UserError(f"hidden_size={self.hidden_size} must be a multiple of {heads}: change either")
        if self.num_attention_heads % self.kv_heads:
            raise UserError(f"{heads} must be a multiple of num_key_value_heads={self.kv_heads}: change either")
        if self.head_size % 2:
            raise UserError(f"head_dim={self.head_size} must be even: rotary positions turn pairs of channels")

    def _check_token_ids(self) -> None:
        ends = self.eos_token_id if isinstance(self.eos_token_id, tuple) else (self.eos_token_id,)
        for name, value in (("bos_token_id", self.bos_token_id), *(("eos_token_id", end) for end in ends)):
            if value is not None and (type(value) is not int or not 0 <= value < self.vocab_size):
                raise UserError(
                    f"{name}={value!r} must be a whole number below vocab_size={self.vocab_size}: "
                    "use the tokenizer that belongs to this config"
                )

    @property
    def kv_heads(self) -> int:
        """Number of key and value heads."""
        return self.num_key_value_heads or self.num_attention_heads

    @property
    def head_size(self) -> int:
        """Channels of one head."""
        return self.head_dim or self.hidden_size // self.num_attention_heads

    def to_dict(self, dtype: str = "float32") -> dict[str, Any]:
        """Return the contents of a config.json that transformers loads as a LlamaForCausalLM stored in `dtype`."""
        own = asdict(self) | {"num_key_value_heads": self.kv_heads, "head_dim": self.head_size}
        if isinstance(self.rope_scaling, LinearRope | Llama3Rope):
            kind = next(name for name, rope in _ROPE_TYPES.items() if isinstance(self.rope_scaling, rope))
            own["rope_scaling"] = {"rope_type": kind, **asdict(self.rope_scaling)}
        if isinstance(self.eos_token_id, tuple):
            own["eos_token_id"] = list(self.eos_token_id)
        kind_of_model = {"architectures": ["LlamaForCausalLM"], "model_type": "llama", "hidden_act": "silu"}
        return {**kind_of_model, "dtype": dtype, **own}


class Attention(nn.Module):
    """Causal self-attention with rotary positions; several query heads share one key and value head."""

    def __init__(self, config: LlamaConfig) -> None:
        super().__init__()
        width, bias = config.hidden_size, config.attention_bias
        self.head_size = config.head_size
        self.is_grouped = config.kv_heads != config.num_attention_heads
        self.q_proj = nn.Linear(width, config.num_attention_heads * self.head_size, bias=bias)
        self.k_proj = nn.Linear(width, config.kv_heads * self.head_size, bias=bias)
        self.v_proj = nn.Linear(width, config.kv_heads * self.head_size, bias=bias)
        self.o_proj = nn.Linear(config.num_attention_heads * self.head_size, width, bias=bias)

    def forward(self, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        split = (*x.shape[:-1], -1, self.head_size)
        q, k, v = (proj(x).view(split).transpose(1, 2) for proj in (self.q_proj, self.k_proj, self.v_proj))
        q, k = _rotate(q, cos, sin), _rotate(k, cos, sin)
        y = F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=self.is_grouped)
        mixed: Tensor = self.o_proj(y.transpose(1, 2).flatten(2))
        return mixed


class MLP(nn.Module):
    """The gated feed-forward half of a layer: down(silu(gate(x)) * up(x))."""

    def __init__(self, config: LlamaConfig) -> None:
        super().__init__()
        width, inner, bias = config.hidden_size, config.intermediate_size, config.mlp_bias
        self.gate_proj = nn.Linear(width, inner, bias=bias)
        self.up_proj = nn.Linear(width, inner, bias=bias)
        self.down_proj = nn.Linear(inner, width, bias=bias)

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.down_proj(F.silu(self.gate_proj(x)) * self.up_proj(x))
        return y


class Layer(nn.Module):
    """Attention and MLP, each behind its norm and around a residual."""

    def __init__(self, config: LlamaConfig) -> None:
        super().__init__()
        self.self_attn = Attention(config)
        self.mlp = MLP(config)
        self.input_layernorm = nn.RMSNorm(config.hidden_size, eps=config.rms_norm_eps)
        self.post_attention_layernorm = nn.RMSNorm(config.hidden_size, eps=config.rms_norm_eps)

    def forward(self, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        x = x + self.self_attn(self.input_layernorm(x), cos, sin)
        y: Tensor = x + self.mlp(self.post_attention_layernorm(x))
        return y


class Trunk(nn.Module):
    """Embedding, layers and the last norm: token ids (b, t) to features (b, t, hidden_size)."""

    def __init__(self, config: LlamaConfig) -> None:
        super().__init__()
        self.config = config
        self.embed_tokens = nn.Embedding(config.vocab_size, config.hidden_size)
        self.layers = nn.ModuleList(Layer(config) for _ in range(config.num_hidden_layers))
        self.norm = nn.RMSNorm(config.hidden_size, eps=config.rms_norm_eps)

    def forward(self, input_ids: Tensor) -> Tensor:
        x = self.embed_tokens(input_ids)
        angles = _angles(self.config, input_ids.shape[1], device=x.device)
        cos, sin = angles.cos().to(x.dtype), angles.sin().to(x.dtype)
        for layer in self.layers:
            x = layer(x, cos, sin)
        y: Tensor = self.norm(x)
        return y


class Llama(nn.Module):
    """Llama for causal language modelling: `model(input_ids (b, t) int64) -> logits (b, t, vocab_size)`.

    Fresh parameters are torch's own; follow with `init_weights` or `load_weights`.
    """

    def __init__(self, config: LlamaConfig) -> None:
        super().__init__()
        self.config = config
        self.model = Trunk(config)
        self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        if config.tie_word_embeddings:
            self.lm_head.weight = self.model.embed_tokens.weight

    def forward(self, input_ids: Tensor) -> Tensor:
        logits: Tensor = self.lm_head(self.model(input_ids))
        return logits

    def get_output_embeddings(self) -> nn.Linear:
        """Return the output head, under the name by which transformers' models answer."""
        return self.lm_head

    def num_parameters(self) -> int:
        """Return the number of scalars in all parameters, tied ones counted once."""
        return sum(parameter.numel() for parameter in self.parameters())


def _angles(config: LlamaConfig, length: int, *, device: torch.device) -> Tensor:
    """Rotary angles (length, head_size / 2) in float32, whatever the model's dtype: positions do not fit 16 bits."""
    exponents = torch.arange(0, config.head_size, 2, device=device, dtype=torch.float32) / config.head_size
    frequencies = 1.0 / config.rope_theta**exponents
    if config.rope_scaling is not None:
        frequencies = config.rope_scaling(frequencies)
    return torch.outer(torch.arange(length, device=device, dtype=torch.float32), frequencies)


def _rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Turn channel i together with channel i + head_size / 2 (Hugging Face's layout); the dtype stays x's."""
    first, second = x.chunk(2, dim=-1)
    return torch.cat((first * cos - second * sin, second * cos + first * sin), dim=-1).to(x.dtype)


@torch.no_grad()
def init_weights(model: Llama, *, seed: int) -> None:
    """Draw every matrix from normal(0, initializer_range), set norms to 1 and biases to 0.

    One generator on the CPU, in the order of the parameters' names: the same on every device, no global randomness.
    """
    generator = torch.Generator().manual_seed(seed)
    for name, parameter in sorted(model.named_parameters()):
        if parameter.ndim == 2:
            drawn = torch.empty(parameter.shape, dtype=torch.float32)
            parameter.copy_(drawn.normal_(0.0, model.config.initializer_range, generator=generator))
        else:
            parameter.fill_(0.0 if name.endswith("bias") else 1.0)


def load_config(path: Path | str) -> LlamaConfig:
    """Read a config.json, or the one in a folder, in the spelling of transformers 4 or 5.

    Raises UserError, naming the key, for another kind of model and for features that this Llama lacks.
    """
    path = Path(path) / "config.json" if Path(path).is_dir() else Path(path)
    raw = _read_json(path)
    plain = {"hidden_act": "silu", "attention_dropout": 0, "pretraining_tp": 1, "quantization_config": None}
    for key, value in {"model_type": "llama", **plain}.items():
        if raw.get(key, plain.get(key)) != value:
            raise UserError(
                f"{path} has {key}={raw.get(key)!r}, but this Llama only knows {value!r}: use another config"
            )
    for key in _COUNTS:
        if key not in raw:
            raise UserError(f"{path} lacks {key!r}: add it, a model's shape cannot be guessed")
    if "max_sequence_length" in raw:  # the name in the paper's own configurations
        raw.setdefault("max_position_embeddings", raw["max_sequence_length"])
    known = {field.name for field in fields(LlamaConfig)}
    values = {key: value for key, value in raw.items() if key in known} | _read_rope(raw, path)
    if isinstance(raw.get("eos_token_id"), list):
        values["eos_token_id"] = tuple(raw["eos_token_id"])
    try:
        return LlamaConfig(**values)
    except UserError as error:
        raise UserError(f"{path}: {error}") from error


def _read_rope(raw: dict[str, Any], path: Path) -> dict[str, Any]:
    """Read rope_theta and rope_scaling from transformers 4's two keys or from transformers 5's `rope_parameters`."""
    rope = dict(raw.get("rope_parameters") or raw.get("rope_scaling") or {})
    theta = rope.pop("rope_theta", raw.get("rope_theta", LlamaConfig.rope_theta))
    old_kind = rope.pop("type", "default")
    kind = rope.pop("rope_type", old_kind)
    if kind == "default" and not rope:
        return {"rope_theta": theta, "rope_scaling": None}
    if kind not in _ROPE_TYPES:
        raise UserError(f"{path} has rope type {kind!r}, but this Llama only knows 'linear' and 'llama3': use another")
    wanted = {field.name for field in fields(_ROPE_TYPES[kind])}
    if wanted != set(rope):
        raise UserError(f"{path} has rope keys {sorted(rope)} where type {kind!r} takes {sorted(wanted)}: correct it")
    return {"rope_theta": theta, "rope_scaling": _ROPE_TYPES[kind](**rope)}


@torch.no_grad()
def load_weights(model: Llama, folder: Path | str) -> None:
    """Copy model.safetensors, or the shards of its index, into `model` in place, one file at a time.

    Keys must match exactly and shapes too; dtypes are converted. A tied weight may be stored under either name or both.
    Raises UserError for missing or unreadable files, missing or unexpected keys and different shapes, all before
    anything is copied, and for tied names with different values.
    """
    folder = Path(folder)
    parameters = dict(model.named_parameters(remove_duplicate=False))
    files = _weight_files(folder)
    shapes: dict[str, tuple[int, ...]] = {}
    for file in files:
        with _opened(file) as weights:
            shapes.update({key: tuple(weights.get_slice(key).get_shape()) for key in weights.keys()})  # noqa: SIM118
    _check_keys(parameters, shapes, folder)
    copied: set[int] = set()
    for file in files:
        with _opened(file) as weights:
            for key in sorted(parameters.keys() & set(weights.keys())):
                parameter, value = parameters[key], weights.get_tensor(key)
                if id(parameter) in copied and not torch.equal(parameter, value.to(parameter)):
                    raise UserError(
                        f"{folder} holds two different values for {key!r}: set tie_word_embeddings to false"
                    )
                parameter.copy_(value)
                copied.add(id(parameter))


def _check_keys(parameters: dict[str, nn.Parameter], shapes: dict[str, tuple[int, ...]], folder: Path) -> None:
    remedy = "use the config.json and the tokenizer that belong to these weights"
    # Llama exports of 2023 also hold the rotary frequencies, which are computed here.
    stored = {key: shape for key, shape in shapes.items() if not key.endswith("rotary_emb.inv_freq")}
    for key in sorted(stored.keys() - parameters.keys()):
        raise UserError(f"{folder} holds {key!r} of shape {stored[key]}, which the model does not have: {remedy}")
    for key in sorted(stored):
        shape = tuple(parameters[key].shape)
        if stored[key] != shape:
            raise UserError(f"{key!r} has shape {stored[key]} in {folder} but {shape} in the model: {remedy}")
    given = {id(parameters[key]) for key in stored}
    for key, parameter in parameters.items():
        if id(parameter) not in given:
            raise UserError(f"{folder} lacks {key!r} of shape {tuple(parameter.shape)}: {remedy}")


def _weight_files(folder: Path) -> list[Path]:
    single, index = folder / "model.safetensors", folder / "model.safetensors.index.json"
    if single.is_file():
        return [single]
    if not index.is_file():
        raise UserError(f"{folder} holds neither {single.name} nor {index.name}: give a folder of safetensors weights")
    names = _read_json(index).get("weight_map")
    if not isinstance(names, dict) or not all(isinstance(name, str) for name in names.values()):
        raise UserError(f"{index} has no 'weight_map' from keys to file names: download or export it again")
    return [folder / name for name in sorted(set(names.values()))]


@contextmanager
def _opened(file: Path) -> Iterator[Any]:
    try:
        with safe_open(str(file), framework="pt") as weights:
            yield weights
    except FileNotFoundError as error:
        raise UserError(f"{file} does not exist although the index lists it: download or export it again") from error
    except (SafetensorError, OSError) as error:
        raise UserError(f"{file} is not a readable safetensors file ({error}): download or export it again") from error


def _read_json(path: Path) -> dict[str, Any]:
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise UserError(f"{path} does not exist: give an existing file") from error
    except (OSError, ValueError) as error:
        raise UserError(f"{path} is not a readable JSON file ({error}): correct it") from error
    if not isinstance(value, dict):
        raise UserError(f"{path} holds a JSON {type(value).__name__} where an object is wanted: correct it")
    return value


def _paper(width: int, inner: int, layers: int, heads: int) -> LlamaConfig:
    """A model of the paper: the T5 vocabulary of 32,100 and 1,024 positions, as in the reference implementation."""
    return LlamaConfig(32_100, width, inner, layers, heads, max_position_embeddings=1024)


PRESETS: dict[str, LlamaConfig] = {
    "5m": LlamaConfig(4096, 256, 688, 4, 4, max_position_embeddings=256),  # learns in two minutes on two CPU cores
    "60m": _paper(512, 1376, 8, 8),
    "130m": _paper(768, 2048, 12, 12),
    "250m": _paper(768, 2560, 24, 16),
    "350m": _paper(1024, 2736, 24, 16),
    "1.3b": _paper(2048, 5461, 24, 32),
}
