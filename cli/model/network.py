"""A Llama whose parameters carry Hugging Face's names, so that its weights load there and theirs load here.

    x <- x + Attention(RMSNorm(x)),   x <- x + down(silu(gate(u)) * up(u)) with u = RMSNorm(x),   logits =
    head(RMSNorm(x))

Causal scaled-dot-product attention with rotary positions and grouped keys and values. The model holds parameters only:
rotary angles are computed from the configuration at every call, so that no cast or meta-device construction can damage
them, and what a text that is read in pieces leaves behind is the caller's, in a KeyValueCache. There is no dropout.
"""

from __future__ import annotations

import os

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from ..errors import UserError
from .attention import attend, once
from .cache import KeyValueCache, LayerCache
from .rope import angles, rotate
from .shape import LlamaConfig


class Attention(nn.Module):
    """Causal self-attention with rotary positions; several query heads share one key and value head."""

    def __init__(self, config: LlamaConfig) -> None:
        super().__init__()
        width, bias = config.hidden_size, config.attention_bias
        self.head_size = config.head_size
        self.q_proj = nn.Linear(width, config.num_attention_heads * self.head_size, bias=bias)
        self.k_proj = nn.Linear(width, config.kv_heads * self.head_size, bias=bias)
        self.v_proj = nn.Linear(width, config.kv_heads * self.head_size, bias=bias)
        self.o_proj = nn.Linear(config.num_attention_heads * self.head_size, width, bias=bias)

    def forward(self, x: Tensor, cos: Tensor, sin: Tensor, cache: LayerCache | None = None) -> Tensor:
        split = (*x.shape[:-1], -1, self.head_size)
        q, k, v = (proj(x).view(split).transpose(1, 2) for proj in (self.q_proj, self.k_proj, self.v_proj))
        q, k = rotate(q, cos, sin), rotate(k, cos, sin)
        if cache is not None:
            k, v = cache.extend(k, v)
        y = attend(q, k, v)
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

    def forward(self, x: Tensor, cos: Tensor, sin: Tensor, cache: LayerCache | None = None) -> Tensor:
        x = x + self.self_attn(self.input_layernorm(x), cos, sin, cache)
        y: Tensor = x + self.mlp(self.post_attention_layernorm(x))
        return y


class Trunk(nn.Module):
    """Embedding, layers and the last norm: token ids (b, t) to features (b, t, hidden_size).

    While it trains, `checkpoints_activations` keeps only every layer's input for the backward pass, which computes the
    rest of the layer again.
    """

    def __init__(self, config: LlamaConfig) -> None:
        super().__init__()
        self.config = config
        self.checkpoints_activations = False
        self.embed_tokens = nn.Embedding(config.vocab_size, config.hidden_size)
        self.layers = nn.ModuleList(Layer(config) for _ in range(config.num_hidden_layers))
        self.norm = nn.RMSNorm(config.hidden_size, eps=config.rms_norm_eps)

    def forward(self, input_ids: Tensor, cache: KeyValueCache | None = None) -> Tensor:
        x = self.embed_tokens(input_ids)
        start = 0 if cache is None else cache.advance(input_ids.shape[1])
        turns = self._angles(start, start + input_ids.shape[1], device=x.device)
        cos, sin = once(turns.cos().to(x.dtype)), once(turns.sin().to(x.dtype))
        for i, layer in enumerate(self.layers):
            if self.checkpoints_activations and self.training:
                x = checkpoint(layer, x, cos, sin, use_reentrant=False)
            else:
                x = layer(x, cos, sin, None if cache is None else cache.layers[i])
        y: Tensor = self.norm(x)
        return y

    def _angles(self, start: int, end: int, *, device: torch.device) -> Tensor:
        config, positions = self.config, torch.arange(start, end, device=device, dtype=torch.float32)
        return angles(positions, head_size=config.head_size, theta=config.rope_theta, scaling=config.rope_scaling)


class Llama(nn.Module):
    """Llama for causal language modelling: `model(input_ids (b, t) int64) -> logits (b, t, vocab_size)`.

    With a `KeyValueCache` the tokens are those that follow what it holds, and it then holds them too.
    Fresh parameters are torch's own; follow with `init_weights` or `load_weights`.

    Raises:
        UserError: for a shape whose weights this machine cannot hold.
    """

    def __init__(self, config: LlamaConfig) -> None:
        super().__init__()
        if torch.get_default_device().type != "meta":
            _check_memory(config)
        self.config = config
        self.model = Trunk(config)
        self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        if config.tie_word_embeddings:
            self.lm_head.weight = self.model.embed_tokens.weight

    def forward(self, input_ids: Tensor, cache: KeyValueCache | None = None) -> Tensor:
        logits: Tensor = self.lm_head(self.model(input_ids, cache))
        return logits

    def next_token_logits(self, input_ids: Tensor, cache: KeyValueCache | None = None) -> Tensor:
        """Return the last tokens' logits (b, vocab_size) alone: those of a long prompt take gigabytes together."""
        logits: Tensor = self.lm_head(self.model(input_ids, cache)[:, -1])
        return logits

    def get_output_embeddings(self) -> nn.Linear:
        """Return the output head, under the name by which transformers' models answer."""
        return self.lm_head

    def num_parameters(self) -> int:
        """Return the number of scalars in all parameters, tied ones counted once."""
        return sum(parameter.numel() for parameter in self.parameters())


def _check_memory(config: LlamaConfig) -> None:
    """Refuse what would be killed in the middle, or raise from within torch."""
    needed = config.num_parameters * torch.get_default_dtype().itemsize
    there = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    if needed > there:
        raise UserError(
            f"the model's config says {config.num_parameters:,} parameters, which take {needed / 1e9:,.0f} GB, and "
            f"this machine has {there / 1e9:,.0f} GB of memory: correct it, or give a smaller model"
        )
