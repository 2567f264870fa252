"""Our Llama is Hugging Face's Llama: same names, same numbers, both ways; and what it cannot be, it refuses by name."""

import dataclasses
import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from relora_opt_cli.errors import UserError
from relora_opt_cli.model import (
    PRESETS,
    LinearRope,
    Llama,
    Llama3Rope,
    LlamaConfig,
    init_weights,
    load_config,
    load_weights,
)
from safetensors.torch import load_file, save_file

TINY = LlamaConfig(97, 24, 40, 2, 4, max_position_embeddings=64, initializer_range=0.3, bos_token_id=1, eos_token_id=2)
VARIANTS = {
    "plain": TINY,
    "grouped": dataclasses.replace(TINY, num_key_value_heads=2),
    "one key head": dataclasses.replace(TINY, num_key_value_heads=1),
    "tied": dataclasses.replace(TINY, tie_word_embeddings=True),
    "biases": dataclasses.replace(TINY, attention_bias=True, mlp_bias=True),
    "wide heads": dataclasses.replace(TINY, head_dim=10, num_key_value_heads=2),
    "large epsilon": dataclasses.replace(TINY, rms_norm_eps=0.5),
    "linear rope": dataclasses.replace(TINY, rope_scaling=LinearRope(4.0), rope_theta=500.0),
    # wavelengths 6, 41 and 292 against boundaries 16 / 4 and 64 / 1: short, in between and long ones all occur
    "llama3 rope": dataclasses.replace(
        TINY, rope_scaling=Llama3Rope(8.0, 1.0, 4.0, 64), rope_theta=100_000.0, eos_token_id=(2, 5), head_dim=12
    ),
}
TOLERANCE = 1e-5  # the issue's; float32 sums of 40 terms in another order differ by about 1e-6


@pytest.mark.parametrize("config", VARIANTS.values(), ids=VARIANTS.keys())
def test_a_shape_knows_how_many_parameters_its_model_has(config: LlamaConfig) -> None:
    assert config.num_parameters == Llama(config).num_parameters()


def test_a_model_that_the_machine_cannot_hold_is_refused_before_it_is_made() -> None:
    config = dataclasses.replace(TINY, hidden_size=2**30, head_dim=8)
    with pytest.raises(
        UserError, match=r"[\d,]{15,} parameters, which take 2,9\d\d GB, and this machine has \d+ GB of"
    ):
        Llama(config)
    with torch.device("meta"):
        Llama(config)


@pytest.fixture(params=VARIANTS.values(), ids=VARIANTS.keys())
def model(request: pytest.FixtureRequest) -> Llama:
    return drawn(request.param)


def drawn(config: LlamaConfig, *, seed: int = 3) -> Llama:
    """A model with every parameter away from its trivial value: norms not 1, biases not 0."""
    model = Llama(config)
    init_weights(model, seed=seed)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.1 * torch.randn(parameter.shape, generator=generator))
    return model


def ids(config: LlamaConfig = TINY, *, length: int = 48) -> torch.Tensor:
    return torch.randint(config.vocab_size, (3, length), generator=torch.Generator().manual_seed(0))


def write_config(folder: Path, config: LlamaConfig = TINY, **changes: Any) -> Path:
    contents = {**config.to_dict(), **changes}
    path = folder / "config.json"
    path.write_text(json.dumps({key: value for key, value in contents.items() if value is not ...}))
    return path


def theirs(folder: Path, config: LlamaConfig) -> transformers.LlamaForCausalLM:
    write_config(folder, config)
    return transformers.LlamaForCausalLM(transformers.AutoConfig.from_pretrained(folder)).eval()


def test_logits_equal_transformers_with_our_weights(model: Llama, tmp_path: Path) -> None:
    other = theirs(tmp_path, model.config)
    other.load_state_dict(model.state_dict(), strict=True)
    with torch.no_grad():
        torch.testing.assert_close(model(ids()), other(ids()).logits, rtol=0, atol=TOLERANCE)


def test_a_folder_saved_by_transformers_gives_equal_logits(model: Llama, tmp_path: Path) -> None:
    other = theirs(tmp_path, model.config)
    other.load_state_dict(model.state_dict())
    other.save_pretrained(tmp_path / "saved")
    loaded = Llama(load_config(tmp_path / "saved"))
    load_weights(loaded, tmp_path / "saved")
    assert load_config(tmp_path / "saved").to_dict() == model.config.to_dict()
    with torch.no_grad():
        torch.testing.assert_close(loaded(ids()), other(ids()).logits, rtol=0, atol=TOLERANCE)


def test_shards_are_loaded_one_and_all(tmp_path: Path) -> None:
    model = drawn(VARIANTS["grouped"])
    other = theirs(tmp_path, model.config)
    other.load_state_dict(model.state_dict())
    other.save_pretrained(tmp_path, max_shard_size="10KB")
    assert len(list(tmp_path.glob("model-*.safetensors"))) > 2
    loaded = Llama(model.config)
    load_weights(loaded, tmp_path)
    assert all(torch.equal(value, loaded.state_dict()[name]) for name, value in model.state_dict().items())


def test_logits_at_a_position_do_not_depend_on_later_tokens() -> None:
    model, tokens = drawn(VARIANTS["grouped"]), ids()
    changed = tokens.clone()
    changed[:, 20:] = (changed[:, 20:] + 1) % TINY.vocab_size
    with torch.no_grad():
        torch.testing.assert_close(model(tokens)[:, :20], model(changed)[:, :20], rtol=0, atol=1e-6)
        assert not torch.allclose(model(tokens)[:, 20:], model(changed)[:, 20:], atol=1e-2)


def test_a_cast_to_bfloat16_leaves_the_angles_in_float32() -> None:
    model = drawn(dataclasses.replace(TINY, max_position_embeddings=512))
    assert not list(model.buffers())
    tokens = ids(length=512)
    with torch.no_grad():
        rounded = model(tokens)
        exact = model.bfloat16()(tokens).float()
    # Angles rounded to 8 bits would be off by a radian at position 500: the ends would agree far worse than the starts.
    errors = (rounded - exact).abs().mean(dim=(0, 2))
    assert errors[-64:].mean() < 2 * errors[:64].mean()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_logits_have_the_dtype_of_the_parameters(dtype: torch.dtype) -> None:
    model = drawn(VARIANTS["grouped"]).to(dtype)
    assert model(ids()).dtype == dtype


def test_bfloat16_autocast_trains_and_stays_near_float32() -> None:
    model = drawn(VARIANTS["grouped"])
    with torch.autocast("cpu", dtype=torch.bfloat16):
        logits = model(ids())
    logits.float().logsumexp(-1).mean().backward()
    assert all(parameter.grad is not None and parameter.grad.isfinite().all() for parameter in model.parameters())
    error = (logits.float() - model(ids())).norm() / logits.float().norm()
    assert error < 0.03  # a few roundings of 2^-8 in a row


def test_the_whole_model_is_one_graph() -> None:
    model = drawn(VARIANTS["llama3 rope"])
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(ids()), model(ids()), rtol=0, atol=TOLERANCE)


def test_init_is_a_function_of_the_seed_alone() -> None:
    first, again, other = Llama(TINY), Llama(TINY), Llama(TINY)
    before = torch.get_rng_state()
    for model, seed in ((first, 0), (again, 0), (other, 1)):
        init_weights(model, seed=seed)
    assert torch.equal(before, torch.get_rng_state())
    assert all(torch.equal(a, b) for a, b in zip(first.parameters(), again.parameters(), strict=True))
    assert not torch.equal(first.lm_head.weight, other.lm_head.weight)


def test_init_draws_in_the_order_of_the_names() -> None:
    model, generator = Llama(TINY), torch.Generator().manual_seed(5)
    init_weights(model, seed=5)
    for name in ("lm_head.weight", "model.embed_tokens.weight", "model.layers.0.mlp.down_proj.weight"):
        weight = model.get_parameter(name)
        drawn = torch.empty(weight.shape).normal_(0.0, TINY.initializer_range, generator=generator)
        assert torch.equal(weight, drawn)


def test_init_draws_matrices_with_the_initializer_range_and_nothing_else() -> None:
    model = Llama(dataclasses.replace(TINY, attention_bias=True, mlp_bias=True, vocab_size=5000))
    init_weights(model, seed=0)
    assert model.lm_head.weight.std().item() == pytest.approx(TINY.initializer_range, rel=0.02)
    for name, parameter in model.named_parameters():
        if parameter.ndim == 1:
            assert (parameter == (0 if name.endswith("bias") else 1)).all()


def test_tied_embeddings_are_one_parameter_counted_once() -> None:
    tied, plain = Llama(VARIANTS["tied"]), Llama(TINY)
    assert tied.get_output_embeddings().weight is tied.model.embed_tokens.weight
    assert plain.num_parameters() - tied.num_parameters() == TINY.vocab_size * TINY.hidden_size


@pytest.mark.parametrize("stored", ["model.embed_tokens.weight", "lm_head.weight", "both"])
def test_a_tied_weight_loads_under_either_name(stored: str, tmp_path: Path) -> None:
    model = drawn(VARIANTS["tied"])
    tied = {"model.embed_tokens.weight", "lm_head.weight"}
    dropped = tied - {stored} if stored in tied else set()
    weights = {name: value.clone() for name, value in model.state_dict().items() if name not in dropped}
    save_file(weights, tmp_path / "model.safetensors")
    loaded = Llama(model.config)
    load_weights(loaded, tmp_path)
    assert torch.equal(loaded.lm_head.weight, model.lm_head.weight)
    if stored == "both":
        weights["lm_head.weight"] += 1
        save_file(weights, tmp_path / "model.safetensors")
        with pytest.raises(UserError, match=r"two different values for .*: set tie_word_embeddings to false"):
            load_weights(loaded, tmp_path)


def test_rotary_frequencies_in_old_exports_are_ignored(tmp_path: Path) -> None:
    model = drawn(TINY)
    extra = {"model.layers.0.self_attn.rotary_emb.inv_freq": torch.ones(3)}
    save_file({**model.state_dict(), **extra}, tmp_path / "model.safetensors")
    load_weights(Llama(TINY), tmp_path)


@pytest.mark.parametrize(
    ("name", "millions"),
    [("5m", 5.26), ("60m", 58.2), ("130m", 134.3), ("250m", 247.5), ("350m", 368.2), ("1.3b", 1340.0)],
)
def test_presets_have_the_sizes_of_their_names(name: str, millions: float) -> None:
    with torch.device("meta"):
        assert Llama(PRESETS[name]).num_parameters() / 1e6 == pytest.approx(millions, rel=0.005)


def test_transformers_4_and_5_spell_rope_differently_and_mean_the_same(tmp_path: Path) -> None:
    config = VARIANTS["llama3 rope"]
    scaling = {"rope_type": "llama3", **dataclasses.asdict(config.rope_scaling)}
    new = {"rope_parameters": {**scaling, "rope_theta": config.rope_theta}, "rope_theta": ..., "rope_scaling": ...}
    old = {"rope_scaling": {"type": scaling["rope_type"], **scaling}, "rope_theta": config.rope_theta}
    for spelling in (new, old):
        assert load_config(write_config(tmp_path, config, **spelling)).to_dict() == config.to_dict()
    assert load_config(write_config(tmp_path, rope_scaling=None)).rope_scaling is None
    default = {"rope_type": "default", "rope_theta": 7.0}
    assert load_config(write_config(tmp_path, rope_parameters=default)).rope_theta == 7.0


def test_the_papers_name_for_the_number_of_positions_is_understood(tmp_path: Path) -> None:
    path = write_config(tmp_path, max_position_embeddings=..., max_sequence_length=77)
    assert load_config(path).max_position_embeddings == 77


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"model_type": "gpt2"}, r"config.json has model_type='gpt2', but this Llama only knows 'llama'"),
        ({"model_type": ...}, r"model_type=None, but this Llama only knows 'llama'"),
        ({"hidden_act": "gelu"}, r"hidden_act='gelu', but this Llama only knows 'silu'"),
        ({"pretraining_tp": 2}, r"pretraining_tp=2, but this Llama only knows 1"),
        ({"attention_dropout": 0.1}, r"attention_dropout=0.1, but this Llama only knows 0"),
        ({"quantization_config": {"bits": 4}}, r"quantization_config=\{'bits': 4\}, but this Llama only knows None"),
        (
            {"rope_scaling": {"rope_type": "yarn", "factor": 2.0}},
            r"rope type 'yarn', but this Llama only knows 'linear'",
        ),
        ({"rope_scaling": {"type": "linear"}}, r"rope keys \[\] where type 'linear' takes \['factor'\]"),
        ({"rope_parameters": {"partial_rotary_factor": 0.5}}, r"rope type 'default', but"),
        ({"rope_scaling": [1]}, r"config.json has rope scaling \[1\] where an object is wanted: correct it"),
        ({"rope_scaling": "abc"}, r"rope scaling 'abc' where an object is wanted"),
        ({"rope_scaling": 5}, r"rope scaling 5 where an object is wanted"),
        ({"rope_parameters": {"rope_type": []}}, r"rope type \[\], but this Llama only knows 'linear'"),
        ({"rope_scaling": {"type": "linear", "factor": 0}}, r"factor=0 must be a positive finite number"),
        ({"hidden_size": ...}, r"config.json lacks 'hidden_size': add it"),
        ({"vocab_size": "97"}, r"config.json: vocab_size='97' must be a whole number of at least 1"),
        ({"attention_bias": 1}, r"attention_bias=1 must be true or false"),
    ],
)
def test_a_config_we_cannot_build_is_refused_by_name(changes: dict[str, Any], message: str, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=message):
        load_config(write_config(tmp_path, **changes))


@pytest.mark.parametrize(
    ("contents", "message"),
    [
        (None, "does not exist: give an existing file"),
        ("{", "not a readable JSON"),
        ("[1]", "holds a JSON list"),
        ("[" * 100_000, "not a readable JSON"),
    ],
)
def test_a_config_file_that_is_none_is_refused(contents: str | None, message: str, tmp_path: Path) -> None:
    if contents is not None:
        (tmp_path / "config.json").write_text(contents)
    with pytest.raises(UserError, match=message):
        load_config(tmp_path / "config.json")


def test_a_config_file_of_any_size_is_not_read_whole(tmp_path: Path) -> None:
    with (tmp_path / "config.json").open("wb") as file:
        file.truncate(1 << 40)  # a hole, which takes no room
    with pytest.raises(UserError, match=r"config.json has more than 64 MB, which no such file has: give the right one"):
        load_config(tmp_path / "config.json")


anything = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=8), inner, max_size=3),
    max_leaves=6,
)
FIELDS = [*TINY.to_dict(), "rope_parameters", "max_sequence_length", "quantization_config", "pretraining_tp"]
ROPE = {"rope_type": "llama3", **dataclasses.asdict(Llama3Rope(8.0, 1.0, 4.0, 64))}
rope = st.dictionaries(st.sampled_from([*ROPE, "type", "rope_theta"]), anything, max_size=2).map(lambda new: ROPE | new)
own_folder = settings(deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])


def check_sentence(said: str) -> None:
    assert "\n" not in said
    assert ": " in said
    assert len(said) < 600


@given(st.dictionaries(st.sampled_from(FIELDS), anything | rope, max_size=3))
@own_folder
def test_a_config_with_anything_in_it_gives_a_shape_or_one_sentence(tmp_path: Path, changes: dict[str, Any]) -> None:
    path = write_config(tmp_path, **changes)
    try:
        shape = load_config(path)
    except UserError as error:
        check_sentence(str(error))
    else:
        assert load_config(write_config(tmp_path, shape)).to_dict() == shape.to_dict()


@given(st.data())
@own_folder
def test_a_mangled_model_is_loaded_as_it_is_or_refused_by_one_sentence(tmp_path: Path, data: st.DataObject) -> None:
    part = "model-1.safetensors"
    save_file(drawn(TINY).state_dict(), tmp_path / part)
    index = {"metadata": {}, "weight_map": dict.fromkeys(drawn(TINY).state_dict(), part)}
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps(index))
    damaged = tmp_path / data.draw(st.sampled_from([part, "model.safetensors.index.json"]))
    raw = bytearray(damaged.read_bytes())
    for _ in range(data.draw(st.integers(1, 4))):
        raw[data.draw(st.integers(0, min(len(raw), 3000) - 1))] = data.draw(st.integers(0, 255))
    damaged.write_bytes(raw[: data.draw(st.integers(0, len(raw)) | st.just(len(raw)))])
    try:
        load_weights(Llama(TINY), tmp_path)
    except UserError as error:
        check_sentence(str(error))


@given(anything | st.dictionaries(st.just("weight_map"), anything | st.dictionaries(st.text(max_size=3), st.text())))
@own_folder
def test_an_index_with_anything_in_it_is_refused_by_one_sentence(tmp_path: Path, index: Any) -> None:
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps(index))
    with pytest.raises(UserError) as raised:
        load_weights(Llama(TINY), tmp_path)
    check_sentence(str(raised.value))


@pytest.mark.parametrize("name", ["../w.safetensors", "/w.safetensors", "a/w.safetensors", "..", ".", "", "w\0"])
def test_an_index_names_files_of_its_own_folder_alone(name: str, tmp_path: Path) -> None:
    (tmp_path / "a").mkdir()
    for folder in (tmp_path, tmp_path / "a"):
        save_file(drawn(TINY).state_dict(), folder / "w.safetensors")
    (tmp_path / "a" / "model.safetensors.index.json").write_text(json.dumps({"weight_map": {"lm_head.weight": name}}))
    with pytest.raises(UserError, match=r"index\.json names '.*', which is no file of its folder: correct it"):
        load_weights(Llama(TINY), tmp_path / "a")


@pytest.mark.parametrize("dtype", [torch.int8, torch.uint8, torch.int64, torch.bool, torch.float8_e4m3fn])
def test_quantized_weights_are_refused_by_name(dtype: torch.dtype, tmp_path: Path) -> None:
    model, key = drawn(TINY), "model.layers.1.mlp.up_proj.weight"
    save_file({**model.state_dict(), key: model.state_dict()[key].to(dtype)}, tmp_path / "model.safetensors")
    with pytest.raises(
        UserError, match=rf"model\.safetensors holds '{key}' as \w+, and weights are F64, .*: export the"
    ):
        load_weights(Llama(TINY), tmp_path)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float16, torch.bfloat16])
def test_weights_of_every_floating_kind_are_converted(dtype: torch.dtype, tmp_path: Path) -> None:
    stored = {name: value.to(dtype) for name, value in drawn(TINY).state_dict().items()}
    save_file(stored, tmp_path / "model.safetensors")
    load_weights(loaded := Llama(TINY), tmp_path)
    assert all(torch.equal(value, stored[name].float()) for name, value in loaded.state_dict().items())


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"num_hidden_layers": 0}, "num_hidden_layers=0 must be a whole number of at least 1"),
        ({"num_hidden_layers": 10**9}, r"num_hidden_layers=1000000000 must be .* less than 2\^13: correct"),
        (
            {"hidden_size": 10**20},
            r"hidden_size=1000\d*\.*\d* must be a whole number of at least 1, and less than 2\^31",
        ),
        ({"rope_theta": 10**400}, r"rope_theta=1000\d*\.\.\.\d* must be a positive finite number"),
        ({"num_attention_heads": True}, "num_attention_heads=True must be a whole number"),
        ({"hidden_size": 26}, "hidden_size=26 must be a multiple of num_attention_heads=4"),
        ({"num_key_value_heads": 3}, "num_attention_heads=4 must be a multiple of num_key_value_heads=3"),
        ({"head_dim": 5}, "head_dim=5 must be even"),
        ({"rms_norm_eps": math.nan}, "rms_norm_eps=nan must be a positive finite number"),
        ({"eos_token_id": 97}, "eos_token_id=97 must be a whole number below vocab_size=97"),
        ({"eos_token_id": (2, -1)}, "eos_token_id=-1 must be a whole number below vocab_size=97"),
    ],
)
def test_a_config_is_checked_at_construction(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message):
        dataclasses.replace(TINY, **changes)


@pytest.mark.parametrize("high", [1.0, 4.0])
def test_llama3_scaling_needs_its_boundaries_in_order(high: float) -> None:
    with pytest.raises(UserError, match=rf"high_freq_factor={high} must exceed low_freq_factor=4.0"):
        Llama3Rope(8.0, 4.0, high, 64)


def test_weights_that_do_not_fit_are_refused_before_anything_is_copied(tmp_path: Path) -> None:
    other, file = drawn(TINY), tmp_path / "model.safetensors"
    model = drawn(TINY, seed=4)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    key = "model.layers.1.mlp.up_proj.weight"
    bad: list[tuple[dict[str, torch.Tensor], str]] = [
        ({**other.state_dict(), key: torch.ones(41, 24)}, rf"'{key}' has shape \(41, 24\) in .* but \(40, 24\) in the"),
        (
            {**other.state_dict(), "score.weight": torch.ones(2, 3)},
            r"holds 'score.weight' of shape \(2, 3\), which the",
        ),
        ({n: v for n, v in other.state_dict().items() if n != key}, rf"lacks '{key}' of shape \(40, 24\): use the"),
        ({n: v for n, v in other.state_dict().items() if n != "lm_head.weight"}, r"lacks 'lm_head.weight'"),
    ]
    for weights, message in bad:
        save_file(weights, file)
        with pytest.raises(UserError, match=message):
            load_weights(model, tmp_path)
    assert all(torch.equal(before[name], value) for name, value in model.state_dict().items())


def test_weight_files_that_cannot_be_read_are_named(tmp_path: Path) -> None:
    model, index = Llama(TINY), tmp_path / "model.safetensors.index.json"
    with pytest.raises(UserError, match=r"holds neither model.safetensors nor model.safetensors.index.json"):
        load_weights(model, tmp_path)
    index.write_text("{}")
    with pytest.raises(UserError, match="has no 'weight_map'"):
        load_weights(model, tmp_path)
    index.write_text(json.dumps({"weight_map": {"lm_head.weight": "gone.safetensors"}}))
    with pytest.raises(UserError, match=r"gone.safetensors does not exist although the index lists it"):
        load_weights(model, tmp_path)
    save_file(model.state_dict(), tmp_path / "model.safetensors")
    whole = (tmp_path / "model.safetensors").read_bytes()
    (tmp_path / "model.safetensors").write_bytes(whole[:-100])
    with pytest.raises(UserError, match=r"model.safetensors is not a readable safetensors file .*download or export"):
        load_weights(model, tmp_path)


def test_to_dict_says_the_dtype_that_is_stored(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps(TINY.to_dict("bfloat16")))
    other = transformers.AutoConfig.from_pretrained(tmp_path)
    assert other.dtype == torch.bfloat16
    assert other.architectures == ["LlamaForCausalLM"]
    save_file(
        {n: v.bfloat16() for n, v in drawn(TINY).state_dict().items()}, tmp_path / "model.safetensors", {"format": "pt"}
    )
    assert load_file(tmp_path / "model.safetensors")["lm_head.weight"].dtype == torch.bfloat16
    loaded = Llama(TINY)
    load_weights(loaded, tmp_path)
    assert loaded.lm_head.weight.dtype == torch.float32
