"""Models of every spelling that torch has, each with a batch, a loss and the names of what is low-rank in it.

Every side of a low-rank weight exceeds the suite's rank of 2, and sides differ where the module allows it. The
architectures of transformers are in zoo_transformers.py.
"""

import re
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils import parametrize
from torch.nn.utils.parametrizations import orthogonal, spectral_norm, weight_norm

Inputs = dict[str, Any]


def mean_square(call: Any, **inputs: Any) -> Tensor:
    """Return the mean squared distance of the output, or of the first one, from fixed numbers of size one."""
    output = call(**inputs)
    output = output[0] if isinstance(output, tuple) else output
    return (output - torch.arange(output.numel(), dtype=output.dtype).cos().view(output.shape)).square().mean()


@dataclass(frozen=True)
class Case:
    """A model under test.

    Args:
        build: makes the model from torch's global random numbers, in float32.
        inputs: its batch, in a dtype.
        low_rank: searched for in parameter names: matches exactly the low-rank ones.
        is_default: whether that is the default selection; else it is passed as `targets`.
        loss: `loss(model, **inputs)`.
        eager_only: why torch.compile cannot trace it as one graph.
        full_precision_only: why it does not run in bfloat16.
    """

    build: Callable[[], nn.Module]
    inputs: Callable[[torch.dtype], Inputs]
    low_rank: str
    is_default: bool = False
    loss: Callable[..., Tensor] = mean_square
    eager_only: str = ""
    full_precision_only: str = ""

    @property
    def targets(self) -> str | None:
        return None if self.is_default else self.low_rank

    def model(self, dtype: torch.dtype = torch.float64) -> nn.Module:
        """Return the model in training mode, with the same numbers in every call."""
        torch.manual_seed(0)
        return self.build().to(dtype).train()

    def names(self, model: nn.Module) -> list[str]:
        """Return the names of what is to be low-rank."""
        return [name for name, _ in model.named_parameters() if re.search(self.low_rank, name)]

    def loss_fn(self, dtype: torch.dtype = torch.float64) -> Callable[[Any], Tensor]:
        """Return a loss of the model, or of what is called like it, that draws the same dropout in every call."""

        def loss_fn(call: Any) -> Tensor:
            torch.manual_seed(1)
            return self.loss(call, **self.inputs(dtype))

        return loss_fn


def numbers(*shape: int) -> Callable[[torch.dtype], Inputs]:
    """Return inputs: one tensor `x` of normal numbers."""
    x = torch.randn(*shape, generator=torch.Generator().manual_seed(8), dtype=torch.float64)
    return lambda dtype: {"x": x.to(dtype)}


def tokens(*shape: int, below: int = 11) -> Callable[[torch.dtype], Inputs]:
    """Return inputs: one tensor `x` of whole numbers, every one of them at least once where it is large enough."""
    x = torch.randperm(int(torch.tensor(shape).prod()), generator=torch.Generator().manual_seed(8)) % below
    return lambda dtype: {"x": x.view(shape)}


def parameter(*shape: int) -> nn.Parameter:
    return nn.Parameter(torch.randn(*shape) / 2)


class Spellings(nn.Module):
    """Bare parameters, multiplied in as many ways as there are; `outer` is out x in, `inner` in x out."""

    def __init__(self) -> None:
        super().__init__()
        self.outer = nn.ParameterList([parameter(6, 5), parameter(7, 6), parameter(5, 7), parameter(4, 5)])
        self.inner = nn.ParameterDict({"addmm": parameter(4, 6), "matmul": parameter(6, 5), "table": parameter(5, 9)})
        self.bias = nn.Parameter(torch.randn(6))

    def forward(self, x: Tensor) -> Tensor:
        x = F.linear(x, self.outer[0], self.bias).tanh()
        x = (x @ self.outer[1].t()).tanh()
        x = torch.einsum("bti,oi->bto", x, self.outer[2]).tanh()
        x = torch.matmul(x, self.outer[3].mT).tanh()
        x = torch.addmm(self.bias, x.flatten(0, 1), self.inner["addmm"]).tanh()
        x = torch.tensordot(x, self.inner["matmul"], dims=1)
        return x.mul(self.inner["table"][:, 3]) @ self.inner["table"]


class ConvNet(nn.Module):
    """Convolutions and transposed ones of one, two and three dimensions, with batch norm and dropout."""

    def __init__(self) -> None:
        super().__init__()
        self.image = nn.Sequential(nn.Conv2d(3, 6, 3, stride=2, padding=1), nn.BatchNorm2d(6), nn.GELU())
        self.grouped = nn.Conv2d(6, 8, 3, groups=2, padding="same", padding_mode="circular")
        self.up = nn.Sequential(nn.ConvTranspose2d(8, 5, 2), nn.BatchNorm2d(5), nn.Dropout2d(0.3))
        self.volume, self.volume_up = nn.Conv3d(1, 4, (3, 2, 2)), nn.ConvTranspose3d(4, 3, 2)
        self.line, self.line_up = nn.Conv1d(12, 7, 3), nn.ConvTranspose1d(7, 5, 3, groups=1)

    def forward(self, x: Tensor) -> Tensor:
        x = self.up(self.grouped(self.image(x)))
        x = self.volume_up(self.volume(x[:, None]).tanh())
        return self.line_up(self.line(x.flatten(1, 2)[:, :12].flatten(2)).tanh())


class Attention(nn.Module):
    """Packed self-attention and unpacked cross-attention."""

    def __init__(self) -> None:
        super().__init__()
        self.packed = nn.MultiheadAttention(6, 2, batch_first=True, dropout=0.2)
        self.unpacked = nn.MultiheadAttention(6, 3, kdim=5, vdim=4, batch_first=True, add_bias_kv=True)

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.packed(x, x, x, need_weights=False)[0]
        return self.unpacked(x, x[..., :5], x[..., :4])[0]


class Recurrent(nn.Module):
    """Layers that keep their weights in a list of their own, and cells."""

    def __init__(self) -> None:
        super().__init__()
        self.lstm = nn.LSTM(5, 4, num_layers=2, bidirectional=True, dropout=0.2, batch_first=True)
        self.gru = nn.GRU(8, 4, bias=False, batch_first=True)
        self.rnn = nn.RNN(4, 5, batch_first=True)
        self.cell, self.gru_cell = nn.LSTMCell(5, 4), nn.GRUCell(4, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = self.rnn(self.gru(self.lstm(x)[0])[0])[0]
        state, hidden = None, None
        for column in x.unbind(1):
            state = self.cell(column, state)
            hidden = self.gru_cell(state[0], hidden)
        return hidden


class Words(nn.Module):
    """Tables of every kind, one of them tied to the output."""

    def __init__(self) -> None:
        super().__init__()
        self.tied = nn.Embedding(11, 5, padding_idx=0)
        self.bag = nn.EmbeddingBag(11, 5, mode="mean")
        self.counted = nn.Embedding(11, 5, scale_grad_by_freq=True)
        self.body = nn.Linear(5, 5)
        self.unembed = nn.Linear(5, 11, bias=False)
        self.unembed.weight = self.tied.weight

    def forward(self, x: Tensor) -> Tensor:
        h = self.tied(x) + self.bag(x)[:, None] + self.counted(x)
        return self.unembed(torch.tanh(self.body(h)))


class Shared(nn.Module):
    """One layer under two names, called three times, and its weight once more by itself."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Linear(5, 6)
        self.first = nn.Linear(6, 6)
        self.second = self.first
        self.weight = self.first.weight

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        for layer in (self.first, self.second, self.first):
            x = torch.tanh(layer(x)) + x
        return x @ self.weight


class Antisymmetric(nn.Module):
    def forward(self, X: Tensor) -> Tensor:
        return X.triu() - X.triu().mT


def parametrized() -> nn.Module:
    """Return layers whose weight is made of another parameter: selected is what is trained, `original`."""
    skew = nn.Linear(6, 6)
    parametrize.register_parametrization(skew, "weight", Antisymmetric())
    layers = [
        weight_norm(nn.Linear(5, 6)),
        nn.Tanh(),
        orthogonal(nn.Linear(6, 6)),
        skew,
        spectral_norm(nn.Linear(6, 4)),
    ]
    return nn.Sequential(*layers)


class Called(nn.Module):
    """A model whose input is called x."""

    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner = inner

    def forward(self, x: Tensor) -> Tensor:
        return self.inner(x)


class Experts(nn.Module):
    """Three stacked experts in the three ways of reaching them: batched, one by one, and by einsum; and a router."""

    def __init__(self) -> None:
        super().__init__()
        self.up, self.gate, self.down = parameter(3, 7, 5), parameter(3, 7, 5), parameter(3, 5, 7)
        self.router = nn.Linear(5, 3)

    def forward(self, x: Tensor) -> Tensor:
        gate = torch.stack([F.linear(x, self.gate[i]) for i in range(3)])
        h = torch.bmm(x.expand(3, -1, -1), self.up.mT) * F.silu(gate)
        return torch.einsum("te,eti,eoi->to", self.router(x).softmax(-1), h, self.down)


class Encoder(nn.Module):
    """torch's own transformer, dropout and all."""

    def __init__(self) -> None:
        super().__init__()
        sizes: dict[str, Any] = {"num_encoder_layers": 1, "num_decoder_layers": 1, "dim_feedforward": 12}
        self.inner = nn.Transformer(6, 2, **sizes, dropout=0.1, batch_first=True)

    def forward(self, x: Tensor) -> Tensor:
        return self.inner(x, x.flip(1)[:, 1:])


class Partial(nn.Module):
    """A frozen stem, a trained body, a bilinear form, and a head that is known by its name."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Linear(5, 7).requires_grad_(False)
        self.body = nn.Sequential(nn.Linear(7, 6), nn.Dropout(0.4), nn.LayerNorm(6))
        self.pair = nn.Bilinear(6, 5, 4)
        self.head = nn.Linear(4, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.pair(self.body(self.stem(x)), x))


NO_RNN = "torch.compile does not trace torch's recurrent layers"
TORCH = {
    "spellings": Case(Spellings, numbers(3, 4, 5), r"outer|inner"),
    "convolutions": Case(ConvNet, numbers(2, 3, 8, 8), r"weight$(?<!\.1\.weight)"),
    "attention": Case(Attention, numbers(2, 5, 6), r"weight$"),
    "recurrent": Case(Recurrent, numbers(3, 4, 5), r"weight", eager_only=NO_RNN),
    "words": Case(Words, tokens(4, 6), r"tied|bag|counted|body\.weight"),
    "shared": Case(Shared, numbers(7, 5), r"stem\.weight|^weight$"),
    "parametrized": Case(
        lambda: Called(parametrized()),
        numbers(7, 5),
        r"original1?$",
        full_precision_only="torch has no orthogonalisation of 16-bit matrices",
    ),
    "experts": Case(Experts, numbers(6, 5), r"up|gate|down"),
    "transformer": Case(Encoder, numbers(2, 4, 6), r"out_proj\.weight|linear\d\.weight", is_default=True),
    "partial": Case(Partial, numbers(7, 5), r"body\.0\.weight", is_default=True),
    "bilinear": Case(Partial, numbers(7, 5), r"body\.0\.weight|pair\.weight|head\.weight"),
}
