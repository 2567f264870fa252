"""The weight that a model's forward pass sees: W in value, s B A in gradient.

A `LowRankWeight` holds the effective weight W (out, in) together with its factors B (out, r) and A (r, in) and the
scale s. An operation on it returns what the same operation on W returns, bitwise. Its gradient goes to the factors:

    dA = s B^T G,   dB = s G A^T,   G = dL/dW.

Products `x W^T`, however they are spelled, do not form G: dB = s g^T (x A^T), dA = s (g B)^T x, with g = dL/dy; unless
the rank is so large (about n / 4) that G = g^T x takes fewer operations, one weight at a time. Any
other operation goes through the universal function, which is W forward and projects the dense G backward. No operation
ever sees the bare tensor, because it would drop the factors' gradients in silence: the `LowRankWeight` is itself an
output of the universal function, for autograd functions and whatever else does not ask `__torch_function__`.

This file does not know optimizers, modules or schedules. Source: Lialin et al. 2023, arXiv 2307.05695, eq. (1).
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils import _pytree as pytree


class LowRankWeight(Tensor):
    """A view of W (out, in), or (batch, out, in), or n-D read as (out, rest), whose gradient reaches A and B."""

    W: Tensor
    dense: Tensor
    A: Tensor
    B: Tensor
    scale: float
    cast: Tensor | None

    @classmethod
    def wrap(cls, W: Tensor, A: Tensor, B: Tensor, scale: float, cast: Tensor | None = None) -> LowRankWeight:
        """Return W carrying its factors. W itself gets no gradient.

        Args:
            W: effective weight, (m, n), (batch, m, n) or n-D with A and B of its (m, rest) matrix.
            A: (r, n) or (batch, r, n).
            B: (m, r) or (batch, m, r).
            scale: s = alpha / r.
            cast: W in the dtype of an autocast, where somebody has made it for several uses.
        """
        weight = _projected(W.detach(), A, B, scale).as_subclass(cls)
        weight.W, weight.dense, weight.A, weight.B, weight.scale, weight.cast = W, W.detach(), A, B, scale, cast
        return weight

    @classmethod
    def __torch_function__(
        cls,
        func: Callable[..., Any],
        types: tuple[type, ...],
        args: tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> Any:
        kwargs = kwargs or {}
        if func in _METADATA:
            with torch._C.DisableTorchFunctionSubclass():
                return func(*args, **kwargs)
        if func in _TRANSPOSES and _is_matrix_transpose(func, args, kwargs):
            weight = args[0]
            cast = None if weight.cast is None else weight.cast.t()
            return cls.wrap(weight.dense.t(), weight.B.t(), weight.A.t(), weight.scale, cast)
        if func in _SETTERS and isinstance(args[0], cls):
            _set_data(args[0], args[1])
            return None
        if func in _DENSE_GRADIENTS:
            asked = args[0] if func is not torch.autograd.grad else args[1] if len(args) > 1 else kwargs["inputs"]
            if any(isinstance(tensor, cls) for tensor in pytree.tree_leaves(asked)):
                raise RuntimeError(
                    f"{func.__name__} asks for the dense gradient of a low-rank weight, which the functional path does "
                    "not form: use the dense path (loss.backward() through the model, then optimizer.step())"
                )
        product = _as_linear(func, args, kwargs)
        if product is not None:
            return _linear(*product)
        if torch.is_grad_enabled() and func in _IN_PLACE and isinstance(args[0], cls):
            raise RuntimeError(
                f"{func.__name__} changes a low-rank weight in place with gradients enabled, which would drop its "
                "factors' gradients: do it under torch.no_grad(), as torch asks of every parameter"
            )
        args, kwargs = pytree.tree_map_only(LowRankWeight, _universal, (args, kwargs))
        return func(*args, **kwargs)


def project(G: Tensor, A: Tensor, B: Tensor, scale: float) -> tuple[Tensor, Tensor]:
    """Return (dA, dB) = (s B^T G, s G A^T) for a dense gradient G of W, in the shapes of A and B.

    G has W's shape; it is read as a matrix (m, n), or as a batch of matrices where A and B are batches.
    """
    G = (G.to_dense() if G.is_sparse else G).to(A.dtype).reshape(*B.shape[:-1], A.shape[-1])
    with torch.autocast(G.device.type, enabled=False):
        return (B.mT @ G) * scale, (G @ A.mT) * scale


def is_dense_cheaper(num_tokens: int, m: int, n: int, rank: int) -> bool:
    """Say whether forming G = g^T x and projecting it takes fewer operations than the products that avoid it.

    2 T m n + 4 m n r against 4 T r (m + n): for a square weight, from about r = n / 4 on where T is large.
    """
    return 2 * m * n * (num_tokens + 2 * rank) < 4 * num_tokens * rank * (m + n)


class _Projected(torch.autograd.Function):
    """The universal function: W forward, the projection of the dense gradient backward."""

    @staticmethod
    def forward(ctx: Any, W: Tensor, A: Tensor, B: Tensor, scale: float) -> Tensor:
        ctx.save_for_backward(A, B)
        ctx.scale = scale
        # No view that autograd tracks: an embedding with max_norm changes its weight in place, outside autograd.
        return W.detach()

    @staticmethod
    def backward(ctx: Any, G: Tensor) -> tuple[None, Tensor, Tensor, None]:
        A, B = ctx.saved_tensors
        dA, dB = project(G, A, B, ctx.scale)
        return None, dA, dB, None


class _LowRankLinear(torch.autograd.Function):
    """y = x W^T + bias forward; backward gives dx, dA, dB and dbias, and never g^T x."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, W: Tensor, bias: Tensor | None, A: Tensor, B: Tensor, scale: float) -> Tensor:
        ctx.save_for_backward(x, W, A, B)
        ctx.scale = scale
        return F.linear(x, W, bias)

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> tuple[Tensor | None, ...]:
        x, W, A, B = ctx.saved_tensors
        dx = dbias = None
        rows, x_rows = g.reshape(-1, W.shape[0]), x.reshape(-1, W.shape[1])
        if ctx.needs_input_grad[0]:
            # A gradient of the gradient must reach the factors through W too.
            dx = g @ (_projected(W, A, B, ctx.scale) if torch.is_grad_enabled() else W)
        if ctx.needs_input_grad[2]:
            dbias = rows.sum(0)
        if is_dense_cheaper(len(rows), W.shape[0], W.shape[1], len(A)):
            dA, dB = project(rows.mT @ x_rows, A, B, ctx.scale)
        else:
            dA = ((rows @ B).mT @ x_rows) * ctx.scale
            dB = (rows.mT @ (x_rows @ A.mT)) * ctx.scale
        return dx, None, dbias, dA, dB, None


class _Product(NamedTuple):
    """The operands of x W^T + bias."""

    x: Tensor
    weight: LowRankWeight
    bias: Tensor | None


def _linear(x: Tensor, weight: LowRankWeight, bias: Tensor | None) -> Tensor:
    x, bias = pytree.tree_map_only(LowRankWeight, _universal, (x, bias))
    dtype = _compute_dtype(weight.dense)
    x = x.to(dtype) if torch.is_autocast_enabled(weight.dense.device.type) else x
    bias = bias if bias is None else bias.to(dtype)
    A, B = weight.A.to(dtype), weight.B.to(dtype)
    W = weight.dense.to(dtype) if weight.cast is None or weight.cast.dtype != dtype else weight.cast

    def product(x: Tensor, bias: Tensor | None) -> Tensor:
        y: Tensor = _LowRankLinear.apply(x, W, bias, A, B, weight.scale)  # type: ignore[no-untyped-call]
        return y

    if x.dim() <= 2:
        return product(x, bias)
    # As torch does where W requires a gradient, which the W in here does not: one product of matrices. A batch of them
    # differs in the last bit, and is slower. The view is made out here, where the caller may change it in place.
    rows = x.reshape(-1, x.shape[-1])
    y = product(rows, bias) if bias is None or x.is_contiguous() else product(rows, None) + bias
    return y.view(*x.shape[:-1], W.shape[0])


def _set_data(weight: LowRankWeight, value: Tensor) -> None:
    """Set W's data, as `weight.data = value` on W itself would, and what the weight shows of it."""
    weight.W.data = value
    weight.dense, weight.cast = weight.W.detach(), None
    with torch._C.DisableTorchFunctionSubclass():
        weight.data = weight.dense


def _universal(weight: LowRankWeight) -> Tensor:
    return _projected(weight.dense, weight.A, weight.B, weight.scale)


def _projected(W: Tensor, A: Tensor, B: Tensor, scale: float) -> Tensor:
    value: Tensor = _Projected.apply(W, A, B, scale)  # type: ignore[no-untyped-call]
    return value


def _compute_dtype(W: Tensor) -> torch.dtype:
    """The dtype in which autocast would run a product with W; W's own outside autocast."""
    device = W.device.type
    if torch.is_autocast_enabled(device) and W.dtype != torch.float64:  # autocast leaves float64 alone
        return torch.get_autocast_dtype(device)
    return W.dtype


def _as_linear(func: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> _Product | None:
    """Read a call as x W^T + bias with a low-rank matrix W, or return None."""
    x: Any = None
    weight: Any = None
    bias: Any = None
    if func is F.linear:
        x, weight, bias = _positional(args, kwargs, ("input", "weight", "bias"))
    elif func in _MATMULS:
        x, weight = _positional(args, kwargs, ("input", "mat2" if func in _MMS else "other"))
        weight = _transposed(weight)
    elif func in _ADDMMS and not kwargs:
        bias, x, weight = args if len(args) == 3 else (None, None, None)
        weight = _transposed(weight)
        if not isinstance(bias, Tensor) or bias.dim() != 1:
            return None
    if not (isinstance(weight, LowRankWeight) and isinstance(x, Tensor)) or weight.dense.dim() != 2 or x.dim() < 1:
        return None
    if x.layout in _SPARSE:
        return None
    return _Product(x, weight, bias)


def _positional(args: tuple[Any, ...], kwargs: dict[str, Any], names: tuple[str, ...]) -> tuple[Any, ...]:
    """Return the named arguments in order; nothing at all where the call has others (an `out=`, say)."""
    if len(args) > len(names) or not set(kwargs) <= set(names):
        return (None,) * len(names)
    return (*args, *(kwargs.get(name) for name in names[len(args) :]))


def _transposed(weight: Any) -> Any:
    return weight.t() if isinstance(weight, LowRankWeight) and weight.dense.dim() == 2 else None


def _is_matrix_transpose(func: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> bool:
    weight = args[0]
    if not isinstance(weight, LowRankWeight) or weight.dense.dim() != 2 or kwargs:
        return False
    return len(args) == 1 or tuple(sorted(dim % 2 for dim in args[1:])) == (0, 1)


def _getters(*names: str) -> list[Any]:
    return [getattr(Tensor, name).__get__ for name in names]


_MMS = (torch.mm, Tensor.mm)
_MATMULS = (*_MMS, torch.matmul, Tensor.matmul, Tensor.__matmul__)
_ADDMMS = (torch.addmm, Tensor.addmm)
_SPARSE = (torch.sparse_coo, torch.sparse_csr, torch.sparse_csc, torch.sparse_bsr, torch.sparse_bsc)
_TRANSPOSES = (torch.t, Tensor.t, torch.transpose, Tensor.transpose, *_getters("T", "mT"))
_SETTERS = (Tensor.data.__set__,)  # type: ignore[attr-defined]
_DENSE_GRADIENTS = (
    torch.autograd.grad,
    Tensor.register_hook,
    Tensor.register_post_accumulate_grad_hook,
    Tensor.retain_grad,
)
# What writes to its first argument, by torch's convention for the names of such methods and operators.
_IN_PLACE = frozenset(
    getattr(Tensor, name)
    for name in dir(Tensor)
    if (name.endswith("_") and not name.endswith("__") and name not in ("requires_grad_", "share_memory_"))
    or (name.startswith("__i") and hasattr(Tensor, f"__{name[3:]}"))
    or name == "__setitem__"
)
_METADATA = (
    *_getters("shape", "dtype", "device", "layout", "ndim", "is_cuda", "requires_grad"),
    Tensor.size,
    Tensor.dim,
    Tensor.stride,
    Tensor.numel,
    Tensor.is_floating_point,
    Tensor.is_contiguous,
    Tensor.__len__,
)
