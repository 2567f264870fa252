"""ReLoRA written out on dense gradients, with the variants of it that were tried: what lost can be run again.

    python -m bench.convergence run variants

The library has what won. Here W, its gradient G, its factors and Adam's moments are plain tensors, and a variant is a
few lines. Settings beside lr, rest_lr, rank and the clock:

    init        orthogonal, kaiming, gradient (right singular vectors of G); at the switch also: moment (of Adam's first
                moment), update (of Adam's update)
    scale       "matched" (sqrt(n / r) for orthonormal rows), or a number
    a_rate      multiplies A's rate
    balanced    rates of A and B such that the step of either moves W by lr in RMS, however large the other has become
    state       reset; keep; project: B's moments re-expressed in the new A's basis; carry: the same, and directions
                that the old A did not see start from the mean of the second moments; scale: the first moments are
                dropped, and the mean of a row's second moments kept
    kept        share of the directions of B A that outlast a restart: those of its singular directions along which the
                gradient still points most, |u^T G v|; the others are drawn anew, orthogonal to them, and forgotten
    staggered   every weight restarts at its own time, spread evenly over the cycle, with a ramp of its own
    adaptive    a weight restarts when the share of G in A's span falls below this share of what it was after its last
                restart, but not before `restart_every` updates of its cycle
    b_init      orthogonal: B starts as orthonormal columns instead of zero; W does not change by it
    leak        after every update B shrinks by this share (times the schedule's multiplier) while W stays
    precondition  B's gradient is taken in the metric of A, (A A^T)^-1 on its right, and A's in that of B (Zhang and
                Pilanci, "Riemannian Preconditioned LoRA", arXiv 2402.02347), before Adam
    whiten      the same by square roots, around the base: A moves by S f(S dA), S = (1 + B^T B)^(-1/2), and B by
                f(dB S) S, S = (A A^T)^(-1/2); Muon's then makes all directions of what it adds to W equal
    decay       decay of W itself, at the matrices' rate
    base        adam, or muon for the factors and the weights before the switch
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor, nn

from .methods import BETAS, MAX_NORM, Settings, Trainer, is_matrix, outer

EPS = 1e-8
MOMENTUM = 0.95


class Adam:
    """Adam's moments of one tensor."""

    def __init__(self, like: Tensor) -> None:
        self.m, self.v, self.count = torch.zeros_like(like), torch.zeros_like(like), 0

    def update(self, gradient: Tensor) -> Tensor:
        self.count += 1
        self.m.lerp_(gradient, 1 - BETAS[0])
        self.v.lerp_(gradient.square(), 1 - BETAS[1])
        return (self.m / (1 - BETAS[0] ** self.count)) / ((self.v / (1 - BETAS[1] ** self.count)).sqrt() + EPS)


class Muon(Adam):
    """Muon's momentum of one matrix: Nesterov's, orthogonalized, in updates of AdamW's size."""

    def update(self, gradient: Tensor) -> Tensor:
        self.m.lerp_(gradient, 1 - MOMENTUM)
        X = gradient.lerp(self.m, MOMENTUM)
        X = X / (X.norm() + 1e-7)
        X = X.mT if X.shape[0] > X.shape[1] else X
        for _ in range(5):
            Z = X @ X.mT
            X = 3.4445 * X + (-4.775 * Z + 2.0315 * Z @ Z) @ X
        return 0.2 * math.sqrt(max(gradient.shape)) * (X.mT if gradient.shape[0] > gradient.shape[1] else X)


class Weight:
    """A low-rank weight: W, A, B, their moments, and the update of its last restart."""

    def __init__(self, W: Tensor, settings: Settings, generator: torch.Generator, offset: float) -> None:
        self.W, self.settings, self.generator, self.offset = W, settings, generator, offset
        self.new_moments = Muon if settings.get("base") == "muon" else Adam
        self.dense, self.A, self.B = self.new_moments(W), None, None
        self.last, self.share = 0, 0.0

    def restart(self, update: int) -> None:
        """Draw A, zero B, and deal with the moments."""
        m, old = self.W.shape[0], self.A
        kept = self._earning() if old is not None and self.settings.get("kept") else None
        self.A, scale = self._draw(first=old is None)
        given = self.settings.get("scale", "matched")
        self.scale = scale if given == "matched" else float(given)
        self.B = torch.zeros(m, self.settings["rank"], device=self.W.device)
        if self.settings.get("b_init") == "orthogonal":  # its step and A's move W equally far
            Q = torch.linalg.qr(torch.randn(m, self.settings["rank"], generator=self.generator))[0]
            self.B = (Q * math.sqrt(m / self.W.shape[1])).to(self.W.device)
        if kept is not None:
            left, right = kept
            rest = self.A - self.A @ right.T @ right
            self.A = torch.cat((right, torch.linalg.qr(rest[len(right) :].T)[0].T))
            self.B[:, : len(right)] = left
        state = self.settings.get("state", "reset")
        if old is None or state == "reset":
            self.of_a, self.of_b = self.new_moments(self.A), self.new_moments(self.B)
        elif state in ("carry", "project"):
            # The gradient as the old factor saw it, G ~ m (A A^T)^-1 A, seen by the new one.
            rotation = torch.linalg.lstsq(old.T, self.A.T).solution
            seen = rotation.square()
            unseen = (1 - seen.sum(0)).clamp(min=0.0) if state == "carry" else seen.new_zeros(len(old))
            moments, self.of_a = self.of_b, self.new_moments(self.A)
            moments.m, moments.v = moments.m @ rotation, moments.v @ seen + moments.v.mean(1, keepdim=True) * unseen
        elif state == "scale":
            moments, self.of_a = self.of_b, self.new_moments(self.A)
            moments.m, moments.v = moments.m.zero_(), moments.v.mean(1, keepdim=True).expand_as(moments.v).clone()
        self.last, self.share = update, self._captured()

    def _earning(self) -> tuple[Tensor, Tensor]:
        """Return (u s, v) of the singular directions of B A that are kept: (m, k) and (k, n)."""
        assert self.W.grad is not None
        of_b, of_a = torch.linalg.qr(self.B), torch.linalg.qr(self.A.T)
        U, S, V = torch.linalg.svd(of_b[1] @ of_a[1].T)
        U, V = of_b[0] @ U, V @ of_a[0].T
        earned = ((U.T @ self.W.grad) * V).sum(1).abs()
        best = earned.topk(round(self.settings["kept"] * len(S))).indices
        return U[:, best] * S[best], V[best]

    def _draw(self, *, first: bool) -> tuple[Tensor, float]:
        n, rank, init = self.W.shape[1], self.settings["rank"], self.settings.get("init", "orthogonal")
        matched = math.sqrt(n / rank)
        G = self.W.grad
        assert G is not None
        if init == "kaiming":
            A = (torch.rand(rank, n, generator=self.generator) * 2 - 1) / math.sqrt(n)
            return A.to(G.device), matched * math.sqrt(3)
        if init == "orthogonal":
            Q = torch.linalg.qr(torch.randn(n, rank, generator=self.generator))[0]
            return Q.T.contiguous().to(G.device), matched
        if init == "moment" and first:
            G = self.dense.m
        if init == "update" and first:
            G = self.dense.m / (self.dense.v.sqrt() + EPS)
        return torch.linalg.svd(G, full_matrices=False).Vh[:rank].contiguous(), matched

    def _captured(self) -> float:
        """The share of the gradient's energy in A's span."""
        assert self.W.grad is not None
        Q = torch.linalg.qr(self.A.T)[0]
        return float((self.W.grad @ Q).square().sum() / self.W.grad.square().sum().clamp(min=1e-30))

    def is_due(self, update: int, start: int) -> bool:
        every, since = self.settings.get("restart_every", 0), update - start
        if not every or since <= 0:
            return False
        if self.settings.get("adaptive"):
            is_old = update - self.last >= every
            return is_old and self._captured() < self.settings["adaptive"] * self.share
        if self.settings.get("staggered"):
            return since >= every and (since - int(self.offset * every)) % every == 0
        return since % every == 0

    def gradients(self) -> tuple[Tensor, Tensor]:
        G = self.W.grad
        assert G is not None
        of_a, of_b = self.scale * self.B.T @ G, self.scale * G @ self.A.T
        if self.settings.get("precondition"):
            of_a = torch.linalg.solve(_damped(self.B.T @ self.B), of_a)
            of_b = torch.linalg.solve(_damped(self.A @ self.A.T), of_b.T).T
        return of_a, of_b

    def move(self, gradients: tuple[Tensor, Tensor], lr: float) -> None:
        """Step the factors, and W by what they moved."""
        a_rate, b_rate = self.settings.get("a_rate", 1.0), 1.0
        if self.settings.get("balanced"):
            a_rate *= min(1.0, math.sqrt(len(self.B)) / (self.scale * float(self.B.norm()) + EPS))
            b_rate = math.sqrt(len(self.A)) / float(self.A.norm())
        if self.settings.get("whiten"):
            one = torch.eye(len(self.A), device=self.A.device)
            of_a, of_b = _inverse_root(one + self.B.T @ self.B), _inverse_root(self.A @ self.A.T)
            A = self.A - lr * a_rate * of_a @ self.of_a.update(of_a @ gradients[0])
            B = self.B - lr * b_rate * self.of_b.update(gradients[1] @ of_b) @ of_b
        else:
            A = self.A - lr * a_rate * self.of_a.update(gradients[0])
            B = self.B - lr * b_rate * self.of_b.update(gradients[1])
        self.W.mul_(1 - lr * self.settings.get("decay", 0.0)).add_(B @ A - self.B @ self.A, alpha=self.scale)
        # What B forgets stays in W: a restart spread over all updates.
        self.A, self.B = A, B * (1 - self.settings.get("leak", 0.0) * lr / self.settings["lr"])


def _inverse_root(metric: Tensor) -> Tensor:
    """Return the inverse square root of a symmetric positive matrix."""
    values, vectors = torch.linalg.eigh(metric)
    return (vectors * values.clamp(min=1e-12).rsqrt()) @ vectors.T


def _damped(metric: Tensor) -> Tensor:
    """Return a metric that can be inverted, also while B is zero."""
    damping = 1e-2 * metric.diagonal().mean() + EPS
    return metric + damping * torch.eye(len(metric), device=metric.device)


class Variant(Trainer):
    """The trainer of `methods` over these weights."""

    def __init__(self, model: nn.Module, settings: Settings, steps: int, seed: int) -> None:
        super().__init__(model, settings)
        self.settings, self.outer = settings, outer(steps)
        self.steps, self.num_updates, self.num_restarts = steps, 0, 0
        named = list(model.named_parameters())
        matrices = [p for name, p in named if is_matrix(name)]
        generator = torch.Generator().manual_seed(seed)
        self.weights = [Weight(p, settings, generator, i / len(matrices)) for i, p in enumerate(matrices)]
        self.rest = [(p, Adam(p)) for name, p in named if not is_matrix(name)]
        self.num_trainable = sum(p.numel() for p, _ in self.rest)
        self.num_trainable += sum(settings["rank"] * sum(w.W.shape) for w in self.weights)

    def step(self, tokens: Tensor) -> Tensor:
        loss = self.loss(tokens)
        loss.backward()  # type: ignore[no-untyped-call]
        with torch.no_grad():
            self._update()
        self.model.zero_grad()
        return loss.detach()

    def _update(self) -> None:
        self.num_updates += 1
        start = self.settings.get("warm_start", 0)
        is_low_rank = self.num_updates > start
        if self.num_updates == start + 1:
            for weight in self.weights:
                weight.restart(start)
        moved: list[tuple[Tensor, ...]] = [w.gradients() if is_low_rank else (w.W.grad,) for w in self.weights]
        dense = [p.grad for p, _ in self.rest if p.grad is not None]
        clip = min(
            1.0, MAX_NORM / (float(nn.utils.get_total_norm([*(g for pair in moved for g in pair), *dense])) + EPS)
        )
        for weight, gradients in zip(self.weights, moved, strict=True):
            if is_low_rank:
                first, second = gradients
                weight.move((first * clip, second * clip), self.settings["lr"] * self._multiplier(weight.last))
            else:
                rate = self.settings["lr"] * self.outer(self.num_updates)
                weight.W.add_(weight.dense.update(gradients[0] * clip), alpha=-rate)
        local = self.settings.get("staggered") or self.settings.get("adaptive")
        rate = self.settings["rest_lr"] * (
            self.outer(self.num_updates) if local or not is_low_rank else self._multiplier(self.weights[0].last)
        )
        for p, moments in self.rest:
            assert p.grad is not None
            p.add_(moments.update(p.grad * clip), alpha=-rate)
        if is_low_rank and self.num_updates < self.steps:
            for weight in self.weights:
                if weight.is_due(self.num_updates, start):
                    weight.restart(self.num_updates)
                    self.num_restarts += 1

    def _multiplier(self, last: int) -> float:
        ramp, since = self.settings.get("restart_warmup", 0), self.num_updates - last
        if last > 0 and since < ramp:
            return since / ramp * self.outer(last + ramp)
        return self.outer(self.num_updates)


METHODS: dict[str, Any] = {"variant": Variant}
