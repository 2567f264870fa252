"""The shape of a Llama: what a config.json says, and the presets.

Names and meanings are Hugging Face's, in the spelling of transformers 4 or 5. Shapes of the paper's presets: the
configurations of its reference implementation (github.com/Guitaricet/relora, configs/llama_60m.json and its
neighbours).
"""

from __future__ import annotations

import json
import reprlib
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

from ..errors import UserError
from .rope import LinearRope, Llama3Rope, check_positive

_ROPE_TYPES: dict[str, type[LinearRope] | type[Llama3Rope]] = {"linear": LinearRope, "llama3": Llama3Rope}
MOST_BYTES = 1 << 26  # the index of the largest models has a few megabytes
_BITS, _BITS_OF_LAYERS = 31, 13  # torch's sizes end at 2^31 or later, and every layer is made; no model is near
_COUNTS = ("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads")


@dataclass(frozen=True)
class LlamaConfig:
    """The shape of a Llama, under Hugging Face's names. Checked at construction: UserError names the field.

    `num_key_value_heads` and `head_dim` follow from the other fields when None; `kv_heads` and `head_size` are
    resolved. `pad_token_id` is for exports alone: nothing is padded here.
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
    pad_token_id: int | None = None

    def __post_init__(self) -> None:
        for name in (*_COUNTS, "max_position_embeddings", "num_key_value_heads", "head_dim"):
            value = getattr(self, name)
            bits = _BITS_OF_LAYERS if name == "num_hidden_layers" else _BITS
            if type(value) is not int or not 1 <= value < 1 << bits:
                if value is None and name in ("num_key_value_heads", "head_dim"):
                    continue
                raise UserError(
                    f"{name}={reprlib.repr(value)} must be a whole number of at least 1, and less than 2^{bits}: "
                    "correct the model's config"
                )
        for name in ("rms_norm_eps", "rope_theta", "initializer_range"):
            check_positive(name, getattr(self, name))
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
        for name, value in (("bos_token_id", self.bos_token_id), *(("eos_token_id", end) for end in self.ends)):
            if value is not None and (type(value) is not int or not 0 <= value < self.vocab_size):
                raise UserError(
                    f"{name}={value!r} must be a whole number below vocab_size={self.vocab_size}: "
                    "use the tokenizer that belongs to this config"
                )

        if self.pad_token_id is not None and type(self.pad_token_id) is not int:
            raise UserError(f"pad_token_id={self.pad_token_id!r} must be a whole number: correct the model's config")

    @property
    def ends(self) -> tuple[int, ...]:
        """Tokens that end a text."""
        end = self.eos_token_id
        return end if isinstance(end, tuple) else () if end is None else (end,)

    @property
    def kv_heads(self) -> int:
        """Number of key and value heads."""
        return self.num_key_value_heads or self.num_attention_heads

    @property
    def head_size(self) -> int:
        """Channels of one head."""
        return self.head_dim or self.hidden_size // self.num_attention_heads

    @property
    def num_parameters(self) -> int:
        """Scalars in all parameters, tied ones counted once, of the model that has this shape."""
        width, inner, queries = self.hidden_size, self.intermediate_size, self.num_attention_heads * self.head_size
        pairs = self.kv_heads * self.head_size
        layer = 2 * width * (queries + pairs) + 3 * width * inner + 2 * width
        layer += self.attention_bias * (queries + 2 * pairs + width) + self.mlp_bias * (2 * inner + width)
        tables = 1 if self.tie_word_embeddings else 2
        return tables * self.vocab_size * width + self.num_hidden_layers * layer + width

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


def load_config(path: Path | str) -> LlamaConfig:
    """Read a config.json, or the one in a folder, in the spelling of transformers 4 or 5.

    Raises UserError, naming the key, for another kind of model and for features that this Llama lacks.
    """
    path = Path(path) / "config.json" if Path(path).is_dir() else Path(path)
    raw = read_json(path)
    plain = {"hidden_act": "silu", "attention_dropout": 0, "pretraining_tp": 1, "quantization_config": None}
    for key, value in {"model_type": "llama", **plain}.items():
        if raw.get(key, plain.get(key)) != value:
            raise UserError(
                f"{path} has {key}={reprlib.repr(raw.get(key))}, but this Llama only knows {value!r}: "
                "use another config"
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
    given = raw.get("rope_parameters") or raw.get("rope_scaling") or {}
    if not isinstance(given, dict):
        raise UserError(f"{path} has rope scaling {reprlib.repr(given)} where an object is wanted: correct it")
    rope = dict(given)
    theta = rope.pop("rope_theta", raw.get("rope_theta", LlamaConfig.rope_theta))
    old_kind = rope.pop("type", "default")
    kind = rope.pop("rope_type", old_kind)
    if kind == "default" and not rope:
        return {"rope_theta": theta, "rope_scaling": None}
    if not isinstance(kind, str) or kind not in _ROPE_TYPES:
        raise UserError(
            f"{path} has rope type {reprlib.repr(kind)}, but this Llama only knows 'linear' and 'llama3': use another"
        )
    wanted = {field.name for field in fields(_ROPE_TYPES[kind])}
    if wanted != set(rope):
        raise UserError(
            f"{path} has rope keys {reprlib.repr(sorted(rope))} where type {kind!r} takes {sorted(wanted)}: correct it"
        )
    return {"rope_theta": theta, "rope_scaling": _ROPE_TYPES[kind](**rope)}


def read_json(path: Path) -> dict[str, Any]:
    """Read a JSON object. Raises UserError for anything else, and for a file of more than MOST_BYTES."""
    try:
        with path.open("rb") as file:
            content = file.read(MOST_BYTES + 1)
        if len(content) > MOST_BYTES:
            raise UserError(f"{path} has more than {MOST_BYTES >> 20} MB, which no such file has: give the right one")
        value = json.loads(content.decode())
    except UserError:
        raise
    except FileNotFoundError as error:
        raise UserError(f"{path} does not exist: give an existing file") from error
    except (OSError, ValueError, RecursionError) as error:
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
