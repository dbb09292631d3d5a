"""The bottleneck's non-linearities: one number per function, with its derivative.

The first eight are computed by every backend; the others by the `torch` backend alone. Names are
those of `transformers.activations.ACT2FN` plus the two that `adapters` adds (`leakyrelu`, None).
"""

import math
from collections.abc import Callable
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

aten = torch.ops.aten


class Activation(NamedTuple):
    """`forward(x)` is the function; `backward(dy, x)` is `dy * forward'(x)`."""

    name: str
    forward: Callable[[Tensor], Tensor]
    backward: Callable[[Tensor, Tensor], Tensor]


def _quick_gelu_backward(dy: Tensor, x: Tensor) -> Tensor:
    s = torch.sigmoid(1.702 * x)
    return dy * (s + 1.702 * x * s * (1 - s))


def _gelu_10_backward(dy: Tensor, x: Tensor) -> Tensor:
    # clip(gelu(x), -10, 10): gelu is never below -0.17, so only the upper bound acts
    return torch.where(F.gelu(x) <= 10, aten.gelu_backward(dy, x), torch.zeros_like(x))


# mu = sqrt(1/2) and sigma = sqrt(1/(4 pi)), rounded as transformers rounds them (Ma et al. 2022)
_LAPLACE_MU, _LAPLACE_SCALE = 0.707107, 0.282095 * math.sqrt(2.0)


def _laplace(x: Tensor) -> Tensor:
    return 0.5 * (1 + torch.erf((x - _LAPLACE_MU) / _LAPLACE_SCALE))


def _laplace_backward(dy: Tensor, x: Tensor) -> Tensor:
    u = (x - _LAPLACE_MU) / _LAPLACE_SCALE
    return dy * torch.exp(-u * u) / (math.sqrt(math.pi) * _LAPLACE_SCALE)


def _sqrtsoftplus(x: Tensor) -> Tensor:
    return torch.sqrt(F.softplus(x))


def _sqrtsoftplus_backward(dy: Tensor, x: Tensor) -> Tensor:
    return dy * torch.sigmoid(x) / (2 * _sqrtsoftplus(x))


ACTIVATIONS: tuple[Activation, ...] = (
    Activation("linear", lambda x: x, lambda dy, x: dy),
    Activation("relu", F.relu, lambda dy, x: aten.threshold_backward(dy, x, 0.0)),
    Activation("gelu", F.gelu, lambda dy, x: aten.gelu_backward(dy, x)),
    Activation(
        "gelu_new",
        lambda x: F.gelu(x, approximate="tanh"),
        lambda dy, x: aten.gelu_backward(dy, x, approximate="tanh"),
    ),
    Activation("silu", F.silu, lambda dy, x: aten.silu_backward(dy, x)),
    Activation("tanh", torch.tanh, lambda dy, x: aten.tanh_backward(dy, torch.tanh(x))),
    Activation("sigmoid", torch.sigmoid, lambda dy, x: aten.sigmoid_backward(dy, x.sigmoid())),
    Activation(
        "leaky_relu",
        F.leaky_relu,
        lambda dy, x: aten.leaky_relu_backward(dy, x, 0.01, False),
    ),
    # from here on: the torch backend only
    Activation("relu6", F.relu6, lambda dy, x: aten.hardtanh_backward(dy, x, 0.0, 6.0)),
    Activation("relu2", lambda x: F.relu(x).square(), lambda dy, x: dy * 2 * F.relu(x)),
    Activation("hardswish", F.hardswish, lambda dy, x: aten.hardswish_backward(dy, x)),
    Activation("mish", F.mish, lambda dy, x: aten.mish_backward(dy, x)),
    Activation("quick_gelu", lambda x: x * torch.sigmoid(1.702 * x), _quick_gelu_backward),
    Activation("gelu_10", lambda x: F.gelu(x).clamp(-10, 10), _gelu_10_backward),
    Activation("laplace", _laplace, _laplace_backward),
    Activation("sqrtsoftplus", _sqrtsoftplus, _sqrtsoftplus_backward),
)
NATIVE_ACTIVATIONS = 8
"""How many of `ACTIVATIONS` the C++ and Triton backends compute."""

_ALIASES = {
    "leakyrelu": "leaky_relu",
    "swish": "silu",
    "gelu_python": "gelu",
    # three spellings of one tanh formula; they differ in the last bits of their constants
    "gelu_fast": "gelu_new",
    "gelu_accurate": "gelu_new",
    "gelu_pytorch_tanh": "gelu_new",
    "gelu_python_tanh": "gelu_new",
}
_CODES = {activation.name: code for code, activation in enumerate(ACTIVATIONS)}


def activation_code(name: str | None) -> int:
    """The number of a non-linearity in `ACTIVATIONS`.

    Args:
        name: a name of transformers' `ACT2FN` in any case, "leakyrelu", or None for the identity.

    Raises:
        ValueError: the name is unknown, or the function has parameters of its own (prelu, xielu).
    """
    key = "linear" if name is None else str(name).lower()
    code = _CODES.get(_ALIASES.get(key, key))
    if code is None:
        known = ", ".join(sorted([*_CODES, *_ALIASES]))
        raise ValueError(f"non_linearity: expected None or one of {known}; got {name!r}")
    return code
