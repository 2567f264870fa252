"""The scale of alpha "matched": an update of the factors moves W as far as the base's own update of W would.

    s^(1 + p) |U(G A^T) A| = |U(G)|        U(G): the base's update for gradient G;   |U| goes with |G|^p

This file knows the base optimizer alone; whoever needs a scale asks for it by the shape of a weight.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor, nn

from .inner import Base, step

Group = dict[str, Any]

_DIFFER = 0.01  # as a share; another processor or torch may round the last of four digits otherwise
_LARGEST = 2**22  # numbers in a matrix to try the base on; 16 MB, and the base's state of it, for a while


@torch.no_grad()
def matched_scale(base: Base, groups: list[Group], number: int, A: Tensor, *, num_rows: int) -> float:
    """Return the scale s with which the base's update of B moves W as far as its update of W itself would.

    As far in RMS, at the same rate, for gradients of the same norm that lie in A's span. Where the size of an update U
    goes with the p-th power of the gradient (p = 0: Adam; p = 1: SGD), s^(1 + p) |U(G A^T) A| = |U(G)|. For orthonormal
    rows of A that gives sqrt(n / r) for Adam and its kin, and 1 for SGD and for Muon (sqrt(n / r) under its
    "match_rms_adamw", and sqrt(m / n) for a wide W under "spectral_unclamped"). It is found by trying the base, at a
    rate of 1: the rates that a user or a scheduler sets, 0 among them, do not matter. Global random numbers are as they
    were afterwards. The scale has four digits: processes and devices, which round differently, agree on them.

    Args:
        groups: the base's options, group by group.
        number: the group that W is in.
        A: (r, n), as it is drawn.
        num_rows: m of W.

    Raises:
        ValueError: where the base cannot be tried, moves nothing in the trial, or not finitely, or goes with the size
            of what it trains (Adafactor).
    """
    m, n = num_rows, A.shape[1]
    size, A = math.sqrt(m * n), A.to(torch.float32)
    generator = torch.Generator().manual_seed(0)

    def drawn(columns: int) -> Tensor:
        return torch.randn(m, columns, generator=generator, dtype=torch.float32, device="cpu").to(A.device)

    def tried(gradient: Tensor, start: float = 0.0) -> Tensor:
        try:
            return _trial_update(base, groups, number, gradient, start)
        except torch.OutOfMemoryError:
            raise
        except Exception as error:
            raise _untried(base, f"cannot be tried on a matrix ({type(error).__name__}: {error})") from error

    devices = [] if A.device.type == "cpu" else [A.device]
    with torch.autocast(A.device.type, enabled=False), torch.random.fork_rng(devices, device_type=A.device.type):
        G, in_span = drawn(n), drawn(len(A)) @ A
        of_factor = in_span @ A.mT * (size / in_span.norm())
        of_dense = float(tried(G * (size / G.norm())).norm())
        once, twice = (tried(of_factor * factor) for factor in (1.0, 2.0))
        of_low_rank, ratio = float((once @ A).norm()), float(twice.norm() / once.norm())
        of_large = float(tried(of_factor, 1.0).norm() / once.norm())
    # At half the update for twice the gradient no scale matters.
    if not (all(0 < value < math.inf for value in (of_dense, of_low_rank)) and 0.5 < ratio < math.inf):
        raise _untried(
            base,
            f"moves a weight of shape {(m, n)} by {of_dense}, and by {of_low_rank} through factors ({ratio} times as "
            "far for gradients twice as large), in a trial of 8 updates",
        )
    if not 0.8 < of_large < 1.25:  # B starts at zero and grows: no one scale matches
        raise _untried(
            base,
            f"moves a matrix of ones {of_large:.3g} times as far as one of zeros: its updates go with the size of what "
            "it trains, and factors have another size than their weight",
        )
    scale = (of_dense / of_low_rank) ** (1 / (1 + math.log2(ratio)))
    return float(f"{scale:.4g}")


def check_scale(name: str, saved: float, own: float) -> None:
    """Refuse a matched scale that is not this optimizer's own, to which later draws and updates would not fit.

    Raises:
        ValueError: names the weight and both scales.
    """
    if abs(saved / own - 1) > _DIFFER:
        raise ValueError(
            f"the saved state has {name} at the matched scale {saved:.4g}, and this optimizer finds {own:.4g}: "
            "construct it with the same init and options of the base"
        )


def trial_shape(m: int, n: int, rank: int) -> tuple[int, int, int]:
    """Return (m, n, rank), divided by the smallest number that divides all three and makes the matrix small enough.

    The scale depends on their proportions alone.
    """
    common = math.gcd(m, n, rank)
    divisors = (k for k in range(1, common + 1) if common % k == 0 and m * n <= k * k * _LARGEST)
    k = next(divisors, common)
    return m // k, n // k, rank // k


def _untried(base: Base, why: str) -> ValueError:
    return ValueError(
        f'alpha="matched", the default, is found by trying the base, and {base.name} {why}: give alpha as a number; '
        "alpha=rank is the scale 1"
    )


def _trial_update(base: Base, groups: list[Group], number: int, gradient: Tensor, start: float) -> Tensor:
    """Return how a fresh base moves a constant matrix in its 8th update; RAdam's first ones are SGD's.

    Without weight decay, which goes with the size of the matrix. It is alone in its group; in each other one a number
    whose gradient is 0 stands for those that are there.
    """
    scratch, *others = (nn.Parameter(gradient.new_zeros(shape)) for shape in (gradient.shape, *[(1, 1)] * len(groups)))
    own = [{**group, "params": [other]} for group, other in zip(groups, others, strict=True)]
    own[number] = {**groups[number], "params": [scratch], "lr": 1.0}
    optimizer = base.build(own)
    lr = optimizer.param_groups[number]["lr"]
    optimizer.param_groups[number]["lr"] = torch.ones_like(lr) if isinstance(lr, Tensor) else 1.0  # a factory's, say
    if "weight_decay" in optimizer.param_groups[number]:
        optimizer.param_groups[number]["weight_decay"] = 0.0
    for other in others:
        other.grad = torch.zeros_like(other)
    for _ in range(8):
        scratch.fill_(start).grad = gradient.clone()
        step(optimizer)
    return scratch.detach() - start
