"""Tiny random models of transformers, one an architecture, built from configurations without a network."""

from collections.abc import Callable, Iterable
from functools import partial
from typing import Any

import pytest
import torch
import transformers as hf
from torch import Tensor, nn
from zoo import Case, Inputs

SIZES: dict[str, Any] = {
    "vocab_size": 31,
    "hidden_size": 8,
    "intermediate_size": 12,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "initializer_range": 0.3,  # wide enough for every gradient to be of a size that 1e-9 of it means something
}
ENDS: dict[str, Any] = {"bos_token_id": 0, "eos_token_id": 0, "pad_token_id": 0}


def own_loss(call: Any, **inputs: Any) -> Tensor:
    """Return the loss that the model itself computes."""
    return call(**inputs).loss


def text(dtype: torch.dtype) -> Inputs:
    ids = torch.randint(1, 31, (2, 7), generator=torch.Generator().manual_seed(3))
    return {"input_ids": ids, "labels": ids}


def embedded(dtype: torch.dtype) -> Inputs:
    """Return text that is embedded already, so that it can have a gradient."""
    vectors = torch.randn(2, 7, 8, generator=torch.Generator().manual_seed(3), dtype=torch.float64)
    return {"inputs_embeds": vectors.to(dtype), "labels": text(dtype)["labels"]}


def image(dtype: torch.dtype) -> Inputs:
    pixels = torch.randn(2, 3, 8, 8, generator=torch.Generator().manual_seed(3), dtype=torch.float64)
    return {"pixel_values": pixels.to(dtype), "labels": torch.tensor([1, 3])}


def speech(dtype: torch.dtype) -> Inputs:
    sound = torch.randn(2, 6, 20, generator=torch.Generator().manual_seed(3), dtype=torch.float64)
    return {"input_features": sound.to(dtype), "labels": text(dtype)["input_ids"]}


def llama() -> nn.Module:
    return hf.LlamaForCausalLM(hf.LlamaConfig(**SIZES, num_key_value_heads=1))


def gpt2() -> nn.Module:
    sizes: dict[str, Any] = {"vocab_size": 31, "n_positions": 16, "n_embd": 8, "n_layer": 2, "n_head": 2, "n_inner": 12}
    model = hf.GPT2LMHeadModel(hf.GPT2Config(**sizes, initializer_range=0.3, bos_token_id=0, eos_token_id=0))
    model.loss_type = "ForCausalLM"  # which is not in the name of its class, so transformers would log that it guesses
    return model


def bert() -> nn.Module:
    return hf.BertForMaskedLM(hf.BertConfig(**SIZES, max_position_embeddings=16))


def t5() -> nn.Module:
    sizes: dict[str, Any] = {"vocab_size": 31, "d_model": 8, "d_kv": 3, "d_ff": 12, "num_layers": 2, "num_heads": 2}
    return hf.T5ForConditionalGeneration(hf.T5Config(**sizes, decoder_start_token_id=0))


def vit() -> nn.Module:
    sizes = {key: value for key, value in SIZES.items() if key != "vocab_size"}
    return hf.ViTForImageClassification(hf.ViTConfig(**sizes, image_size=8, patch_size=4, num_labels=5))


def mixtral(experts: str = "eager") -> nn.Module:
    """Return a Mixtral; the default of transformers, grouped experts, does not take float64."""
    sizes = {**SIZES, "intermediate_size": 16, "num_key_value_heads": 1, "num_local_experts": 3}  # rows of 16 bytes
    return hf.MixtralForCausalLM(hf.MixtralConfig(**sizes, experts_implementation=experts))


def mamba() -> nn.Module:
    sizes = {key: SIZES[key] for key in ("vocab_size", "hidden_size", "num_hidden_layers", "initializer_range")}
    return hf.MambaForCausalLM(hf.MambaConfig(**sizes, state_size=4, time_step_rank=3, **ENDS))


def mamba2() -> nn.Module:
    sizes = {key: SIZES[key] for key in ("vocab_size", "hidden_size", "num_hidden_layers", "initializer_range")}
    heads: dict[str, Any] = {"state_size": 4, "num_heads": 4, "head_dim": 4, "n_groups": 1, "chunk_size": 4}
    return hf.Mamba2ForCausalLM(hf.Mamba2Config(**sizes, **heads, **ENDS))


def whisper() -> nn.Module:
    sides = {
        f"{side}_{what}": number
        for side in ("encoder", "decoder")
        for what, number in (("layers", 2), ("attention_heads", 2), ("ffn_dim", 12))
    }
    sizes: dict[str, Any] = {"vocab_size": 31, "num_mel_bins": 6, "d_model": 8, "init_std": 0.3, **sides}
    lengths = {"max_source_positions": 10, "max_target_positions": 16}
    config = hf.WhisperConfig(**sizes, **lengths, decoder_start_token_id=0, **ENDS)
    return hf.WhisperForConditionalGeneration(config)


def case(
    build: Callable[[], nn.Module], inputs: Callable[[torch.dtype], Inputs], low_rank: str, **changes: Any
) -> Case:
    return Case(build, inputs, low_rank, loss=own_loss, **changes)


EAGER_EXPERTS = "transformers' eager experts loop over those that were hit"
TRANSFORMERS = {
    "Llama": case(llama, text, r"_proj\.weight", is_default=True),
    "GPT-2": case(gpt2, text, r"\.c_\w+\.weight", is_default=True),
    "BERT": case(bert, text, r"(query|key|value|dense)\.weight", is_default=True),
    "T5": case(t5, text, r"\.(q|k|v|o|wi|wo)\.weight", is_default=True),
    "ViT": case(vit, image, r"(_proj|fc\d)\.weight", is_default=True),
    "Mixtral": case(mixtral, text, r"self_attn\.\w_proj\.weight", is_default=True, eager_only=EAGER_EXPERTS),
    "Mamba": case(mamba, text, r"_proj\.weight", is_default=True),
    "Mamba2": case(mamba2, text, r"_proj\.weight", is_default=True),
    "Whisper": case(whisper, speech, r"(_proj|fc\d)\.weight", is_default=True),
    # Beyond the default: tables, convolutions, stacked experts, routers, state matrices, heads.
    "Llama, all": case(llama, text, r"_proj\.weight|embed|lm_head"),
    "GPT-2, all": case(gpt2, text, r"c_\w+\.weight|wte|wpe"),
    "BERT, all": case(bert, text, r"(query|key|value|dense|(word|position)_embeddings)\.weight"),
    "T5, all": case(t5, text, r"\.(q|k|v|o|wi|wo)\.weight|shared"),
    "ViT, all": case(vit, image, r"(_proj|fc\d|projection|classifier)\.weight"),
    "Mixtral, all": case(mixtral, text, r"_proj|mlp\.gate\.weight|lm_head", eager_only=EAGER_EXPERTS),
    "Mixtral, batched": case(partial(mixtral, "batched_mm"), text, r"_proj"),
    "Mamba, all": case(mamba, text, r"_proj\.weight|A_log|conv1d\.weight|embeddings"),
    "Mamba2, all": case(mamba2, text, r"_proj\.weight|conv1d\.weight|embeddings|lm_head"),
    "Whisper, all": case(whisper, speech, r"(_proj|fc\d|conv\d|embed_tokens|decoder\.embed_positions)\.weight"),
}
# Gradients are compared for every model; what a run of updates adds depends little on it.
RUN_FAST = ("Llama", "GPT-2, all", "Mixtral, all", "Mamba2, all")


def for_runs(names: Iterable[str]) -> list[Any]:
    """Return names of cases as parameters, with those of transformers slow but for a few."""
    slow = TRANSFORMERS.keys() - RUN_FAST
    return [pytest.param(name, marks=pytest.mark.slow if name in slow else ()) for name in names]


# transformers' default experts, which take no float64: the eager ones are their oracle.
GROUPED = case(partial(mixtral, "grouped_mm"), text, r"_proj")
