"""The bound that bench.step draws is what torch counts: the products of matrices in a step, of every method."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from relora_opt_cli.model import Llama
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from bench import scaling
from bench.contenders import CONTENDERS, batches
from bench.costs import COSTS, Shape, bound, flops, kept
from bench.footprint import kept_bytes, state_bytes
from bench.products import KINDS, Products
from bench.scaling import Point
from bench.step import alternate
from bench.step_table import Row, table

SHAPE = Shape(width=64, inner=160, num_layers=2, vocab_size=96, batch_size=2, seq_len=24)
RANK = 4


def counted(step: Callable[..., Any]) -> int:
    """Return the operations that torch counts; an in-place product is counted here, torch 2.13 leaves it out."""

    def in_place(_: Any, left: tuple[int, ...], right: tuple[int, ...], **__: Any) -> int:
        return 2 * left[0] * left[1] * right[1]

    counter = FlopCounterMode(display=False, custom_mapping={torch.ops.aten.addmm_: in_place})
    with counter, sdpa_kernel(SDPBackend.MATH):
        step(next(batches(SHAPE)))
    return counter.get_total_flops()


@pytest.mark.parametrize("key", ["full-eager", "ours-eager", "dense"])
def test_the_costs_are_the_operations_that_torch_counts(key: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch, "compile", lambda function, **_: function)
    contender = CONTENDERS[key]
    trainer = contender.build(SHAPE, RANK, torch.float32)
    trainer.step(next(batches(SHAPE)))
    # The embedding and the rotary angles make products that the model of costs leaves out.
    assert counted(trainer.step) == pytest.approx(flops(contender.cost, SHAPE, RANK), rel=0.002)


@pytest.mark.parametrize("key", ["peft-eager"])
def test_peft_has_the_costs_of_modules(key: str) -> None:
    pytest.importorskip("peft", reason="PEFT is not installed: pip install 'peft>=0.21'")
    trainer = CONTENDERS[key].build(SHAPE, RANK, torch.float32)
    assert counted(trainer.step) == pytest.approx(flops("peft", SHAPE, RANK), rel=0.002)


@pytest.mark.parametrize("rank", [RANK, 40])  # at 40 of 64 projecting dense gradients is cheaper
@pytest.mark.parametrize("kind", KINDS)
def test_products_alone_are_those_of_a_step(kind: str, rank: int) -> None:
    products = Products(SHAPE, rank, torch.float32)

    def step(_: torch.Tensor) -> None:
        products.micro_batch(kind)
        products.micro_batch(kind)
        products.update(kind)

    assert counted(step) == flops(kind, SHAPE, rank, accumulate=2)


def test_low_rank_is_cheaper_the_lower_the_rank_and_costs_more_only_where_it_must() -> None:
    shape = Shape(768, 2048, 4, 4096, 8, 256)
    assert bound("functional", shape, 32) == pytest.approx(1.314, abs=1e-3)
    assert bound("functional", shape, 128) == pytest.approx(1.110, abs=1e-3)
    assert bound("functional", shape, 32) > bound("peft", shape, 32) > 1 > bound("galore", shape, 32)
    assert bound("functional", shape, 32, accumulate=8) > bound("functional", shape, 32)
    assert set(COSTS) == {contender.cost for contender in CONTENDERS.values()}


def test_every_method_takes_its_turn_on_the_same_batches() -> None:
    seen: dict[str, list[torch.Tensor]] = {"a": [], "b": []}
    times = alternate({key: batch_list.append for key, batch_list in seen.items()}, batches(SHAPE), 2)
    assert [len(values) for values in times.values()] == [2, 2]
    assert all(torch.equal(a, b) for a, b in zip(seen["a"], seen["b"], strict=True))
    assert not torch.equal(seen["a"][0], seen["a"][1])


def test_an_update_of_several_micro_batches_is_timed_as_one() -> None:
    seen: list[torch.Tensor] = []
    times = alternate({"a": seen.append}, batches(SHAPE), 2, accumulate=3)
    assert len(times["a"]) == 2
    assert len(seen) % 3 == 0
    assert not torch.equal(seen[0], seen[1])


@pytest.mark.parametrize("key", ["full-eager", "ours-eager", "dense"])
def test_micro_batches_are_accumulated_into_one_update(key: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch, "compile", lambda function, **_: function)
    trainer = CONTENDERS[key].build(SHAPE, RANK, torch.float32, accumulate=2)
    before = [p.detach().clone() for p in trainer.model.parameters()]
    source = batches(SHAPE)
    trainer.step(next(source))
    assert all(torch.equal(a, b) for a, b in zip(before, trainer.model.parameters(), strict=True))
    trainer.step(next(source))
    assert not any(torch.equal(a, b) for a, b in zip(before, trainer.model.parameters(), strict=True))


def test_state_is_counted_with_the_factors(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch, "compile", lambda function, **_: function)
    trainer = CONTENDERS["ours-eager"].build(SHAPE, RANK, torch.float32)
    model: Llama = trainer.model
    trainer.step(next(batches(SHAPE)))
    factors = RANK * sum(m + n for m, n in SHAPE.matrices)
    dense = model.num_parameters() - sum(m * n for m, n in SHAPE.matrices)
    assert state_bytes(trainer, model.num_parameters()) == pytest.approx(4 * (3 * factors + 2 * dense), rel=0.01)
    assert sum(p.numel() for p in trainer.trained()) == factors + dense


def test_the_table_has_the_fastest_first_and_a_row_for_each() -> None:
    rows = [Row(name, [s] * 3, 1 / s, 1.3, *[10**6] * 4, None, {}) for name, s in (("slow", 2.0), ("fast", 1.0))]
    lines = table(rows, 2048).splitlines()
    assert [line.split()[0] for line in lines[1:]] == ["fast", "slow"]


def test_what_weights_keep_is_counted_as_the_formula_has_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch, "compile", lambda function, **_: function)
    trainer = CONTENDERS["ours-eager"].build(SHAPE, RANK, torch.float32)
    num_parameters = trainer.model.num_parameters()
    trainer.step(next(batches(SHAPE)))
    assert kept_bytes(trainer, SHAPE, num_parameters) == pytest.approx(kept(SHAPE, RANK), rel=0.01)


def test_an_eighth_of_the_width_keeps_less_than_045_of_what_full_rank_keeps() -> None:
    shape = Shape(768, 2048, 4, 4096, 8, 256)
    assert kept(shape, 96) < 0.45 * sum(16 * m * n for m, n in shape.matrices)


def test_exponents_are_those_of_powers() -> None:
    points = [Point(x, 3e-3 * x, 1.0, 5 * x**2, 7 * x, 2 * x**2) for x in (1, 2, 4, 8)]
    found = scaling.exponents(points)
    assert found["time"] == pytest.approx(1)
    assert found["time, predicted"] == pytest.approx(1)
    assert found["full rank's time"] == pytest.approx(0)
    assert found["memory"] == pytest.approx(2)
    assert found["memory, predicted"] == pytest.approx(2)


def test_every_place_of_an_axis_varies_that_alone() -> None:
    for axis, values in scaling.AXES.items():
        places = [scaling.place(axis, value) for value in values]
        assert len(set(places)) == len(values)
        for shape, rank in places:
            others = {
                "rank": (rank, 32),
                "width": (shape.width, 512),
                "tokens": (shape.num_tokens, 1024),
                "layers": (shape.num_layers, 4),
            }
            assert all(value == base for name, (value, base) in others.items() if name != axis)
