"""The modules that hold adapters and fusion layers: parameters, their names and their first values.

State-dict keys are those of `adapters`: `adapters.<name>.adapter_down.0.weight`,
`adapter_fusion_layer.<name>.query.weight`, ...
"""

import math
import threading
import weakref
from collections.abc import Callable
from numbers import Real
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils.parametrize import is_parametrized
from torch.optim.optimizer import register_optimizer_step_post_hook

from .absorb import Attention, Bottleneck
from .configuration import AdapterFusionConfig, BnConfig
from .ops.activations import activation_code


def _init_bert(linear: nn.Linear) -> None:
    nn.init.normal_(linear.weight, std=0.02)
    nn.init.zeros_(linear.bias)


def _init_mam_down(linear: nn.Linear) -> None:
    nn.init.kaiming_uniform_(linear.weight, a=math.sqrt(5))
    nn.init.zeros_(linear.bias)


def _init_zero(linear: nn.Linear) -> None:
    nn.init.zeros_(linear.weight)
    nn.init.zeros_(linear.bias)


def _init_houlsby(linear: nn.Linear) -> None:
    nn.init.trunc_normal_(linear.weight, std=0.01, a=-0.02, b=0.02)
    nn.init.zeros_(linear.bias)


_RESERVED = frozenset(dir(nn.ModuleDict()))

_INITIALIZERS: dict[str, tuple[Callable, Callable]] = {
    "bert": (_init_bert, _init_bert),
    "mam_adapter": (_init_mam_down, _init_zero),
    "houlsby": (_init_houlsby, _init_houlsby),
}
"""init_weights -> how down and up start (He et al. 2022; Houlsby et al. 2019)."""


def _weights(module: nn.Module, kind: type[nn.Module] = nn.Linear) -> tuple[Tensor, Tensor]:
    """The weight and bias of a projection or norm, without attribute lookup where possible."""
    parameters = module._parameters
    try:
        return parameters["weight"], parameters["bias"]
    except KeyError:
        # torch.nn.utils.parametrize keeps the class and computes the weight at every access; a
        # wrapper or a pre-hook would compute it in a forward that is never called here
        if isinstance(module, kind) and not module._forward_pre_hooks:
            return module.weight, module.bias
        raise TypeError(
            "adapters: expected every projection to be a torch.nn.Linear, and every norm a "
            "torch.nn.LayerNorm, without pre-hooks; got "
            f"{type(module).__module__}.{type(module).__qualname__}"
        ) from None


class Adapter(nn.Module):
    """The parameters of one bottleneck adapter at one place.

    Args:
        config: its config.
        hidden_size: H.
        bottleneck_size: d.
    """

    def __init__(self, config: BnConfig, hidden_size: int, bottleneck_size: int):
        super().__init__()
        self.config = config
        self.bottleneck_size = bottleneck_size
        self.activation = activation_code(config["non_linearity"])
        if config["init_weights_seed"]:
            torch.manual_seed(config["init_weights_seed"])
        down = nn.Linear(hidden_size, bottleneck_size)
        if config["ln_before"]:
            # adapters keeps the norm under two names: its own and the first of adapter_down
            self.adapter_norm_before = nn.LayerNorm(hidden_size)
            self.adapter_down = nn.Sequential(self.adapter_norm_before, down)
        else:
            self.adapter_down = nn.Sequential(down)
        self.adapter_up = nn.Linear(bottleneck_size, hidden_size)
        if config["scaling"] in ("learned", "channel"):
            self.scaling = nn.Parameter(
                torch.ones(1 if config["scaling"] == "learned" else hidden_size)
            )
        else:
            self.scaling = float(config["scaling"])
        if config["ln_after"]:
            self.adapter_norm_after = nn.LayerNorm(hidden_size)
        init_down, init_up = _INITIALIZERS[config["init_weights"]]
        init_down(down)
        init_up(self.adapter_up)
        if config["use_gating"]:
            self.gate = nn.Linear(hidden_size, 1)
            _init_bert(self.gate)

    def __setattr__(self, name: str, value: Any) -> None:
        # packed weights and files take a scaling for a number where the config has one
        if name == "scaling" and self.config["scaling"] not in ("learned", "channel"):
            if not isinstance(value, Real) or isinstance(value, bool):
                raise TypeError(
                    f"scaling: expected a number, as the config has one; got {value!r} (a config "
                    'with scaling="learned" or "channel" has a parameter)'
                )
            if not math.isfinite(value):
                raise ValueError(f"scaling: expected a finite number; got {value!r}")
        super().__setattr__(name, value)

    def bottleneck(self) -> Bottleneck:
        """The parameters that make the scaled up-projection."""
        down, up = self.adapter_down[-1], self.adapter_up
        norm = self.adapter_down[0] if self.config["ln_before"] else None
        return Bottleneck(
            down.weight,
            down.bias,
            up.weight,
            up.bias,
            self.scaling,
            None if norm is None else norm.weight,
            None if norm is None else norm.bias,
            self.activation,
        )

    def tensors(self) -> list[Tensor]:
        """The tensors of `bottleneck()`, in its order: what a forward looks at every time.

        Raises:
            TypeError: a projection was replaced by something that is not a `torch.nn.Linear`, or a
                norm by something that is not a `torch.nn.LayerNorm`.
        """
        modules = self._modules
        down, up = modules["adapter_down"]._modules, modules["adapter_up"]
        has_norm = len(down) == 2
        tensors = [*_weights(down["1" if has_norm else "0"]), *_weights(up)]
        if "scaling" not in self.__dict__:
            tensors.append(self.scaling)
        if has_norm:
            tensors += _weights(down["0"], nn.LayerNorm)
        return tensors

    def is_plain(self) -> bool:
        """Whether the output is the scaled up-projection plus the residual and nothing else."""
        config = self.config
        return not (
            config["use_gating"]
            or config["ln_after"]
            or (self.training and (config["dropout"] or config["stochastic_depth"]))
        )


_cooling: "weakref.WeakSet[AdapterFusion]" = weakref.WeakSet()
"""The fusions of the process that have a temperature."""
_cooling_lock = threading.Lock()


def _add_cooling(fusion: "AdapterFusion") -> None:
    with _cooling_lock:
        _cooling.add(fusion)


def _count_optimizer_step(*_: Any) -> None:
    with _cooling_lock:
        fusions = list(_cooling)
    for fusion in fusions:
        fusion.count_optimizer_step()


# adds to no optimizer: torch calls it after every step of every optimizer of the process
register_optimizer_step_post_hook(_count_optimizer_step)


class AdapterFusion(nn.Module):
    """The parameters of one fusion layer at one place.

    With `temperature`, the scores' temperature falls by one thousandth of its start in every
    training step: a step of any `torch.optim` optimizer after one or more forwards in training
    mode. With `peer_temperature` it falls in every forward.

    Args:
        config: its config.
        hidden_size: H.
        dropout: of the scores, where the config does not say (the model's attention dropout).
    """

    INITIAL_TEMPERATURE = 50.0

    def __init__(self, config: AdapterFusionConfig, hidden_size: int, dropout: float):
        super().__init__()
        self.config = config
        self.dropout = dropout if config["dropout_prob"] is None else config["dropout_prob"]
        if not (config["query"] or config["key"] or config["value"]):
            # saved and loaded as adapters does, and as there used by nothing
            self.dense = nn.Linear(hidden_size, 1)
        for name in ("query", "key"):
            if config[name]:
                self.add_module(name, nn.Linear(hidden_size, hidden_size))
                _init_bert(getattr(self, name))
        if config["value"]:
            self.value = nn.Linear(hidden_size, hidden_size, bias=False)
            nn.init.normal_(self.value.weight, std=0.02)
            if config["value_initialized"]:
                with torch.no_grad():
                    self.value.weight.fill_(1e-6).fill_diagonal_(1.0)
        self._is_in_training_step = False
        self._step_is_due = False
        if config["temperature"]:
            start = torch.tensor(self.INITIAL_TEMPERATURE)
            self.register_buffer("temperature", start, persistent=False)
            _add_cooling(self)
        else:
            self.temperature = None

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        if self.temperature is not None:  # copies cool down too
            _add_cooling(self)

    def _apply(self, fn, recurse=True):
        # half precision cannot hold 50 - 0.05: the temperature moves along, its dtype stays
        precise = self.temperature
        super()._apply(fn, recurse)
        if precise is not None and precise.is_meta:
            self.reset_temperature()
        elif precise is not None:
            self.temperature = precise.to(self.temperature.device)
        return self

    def attention(self) -> Attention:
        """The parameters that weigh and transform the adapters' outputs."""
        query, key, value = (self._modules.get(name) for name in ("query", "key", "value"))
        return Attention(
            None if query is None else query.weight,
            None if query is None else query.bias,
            None if key is None else key.weight,
            None if key is None else key.bias,
            None if value is None else value.weight,
        )

    def tensors(self) -> list[Tensor]:
        """The tensors of `attention()`, in its order."""
        modules = self._modules
        tensors: list[Tensor] = []
        for name in ("query", "key"):
            if name in modules:
                tensors += _weights(modules[name])
        if "value" in modules:
            tensors.append(_weights(modules["value"])[0])
        return tensors

    def count_forward(self, in_training: bool) -> None:
        """A forward took place, with gradients of training or without."""
        if self.config.peer_temperature:
            self._step_is_due = True
        elif in_training:
            self._is_in_training_step = True

    def count_optimizer_step(self) -> None:
        """An optimizer has made a step: the temperature falls once for the forwards before it."""
        self._step_is_due |= self._is_in_training_step
        self._is_in_training_step = False

    def settle_temperature(self) -> None:
        """Take the step down that is due, between 50 and 1.

        At the next forward, not at the end of the last: gradient checkpointing computes the last
        one again in its backward. In a new tensor: a recorded forward may still hold the old one.
        """
        if self._step_is_due:
            step = self.INITIAL_TEMPERATURE / 1000.0
            self.temperature = (self.temperature - step).clamp(min=1.0)
            self._step_is_due = False

    def reset_temperature(self, value: float | None = None) -> None:
        """Start at a value, by default at 50, on the device of the parameters."""
        if self.temperature is not None:
            device = next(self.parameters()).device
            start = self.INITIAL_TEMPERATURE if value is None else value
            self.temperature = torch.tensor(start, dtype=torch.float32, device=device)
            self._is_in_training_step = self._step_is_due = False

    def is_absorbable(self) -> bool:
        """Whether the absorbed form exists: not with the residual in key and value."""
        return not self.config["residual_before"]


class NamedModules(nn.ModuleDict):
    """Modules by name that report when their parameters may have changed.

    Args:
        on_change: called by `train()`, `eval()`, `to()` and its kin, and by loading a state dict.
    """

    def __init__(self, on_change: Callable[[], None]):
        super().__init__()
        self._on_change = on_change

    def train(self, mode: bool = True):
        """torch's `train`, reported.

        Args:
            mode: training, or evaluation.

        Returns:
            The modules themselves.
        """
        self._on_change()
        return super().train(mode)

    def _apply(self, fn, recurse=True):
        self._on_change()
        return super()._apply(fn, recurse)

    def _load_from_state_dict(self, *args, **kwargs):
        self._on_change()
        return super()._load_from_state_dict(*args, **kwargs)


def check_module_name(name: str, argument: str = "name") -> None:
    """Raise a ValueError for a name that cannot be a key of a state dict."""
    if not isinstance(name, str) or not name or "." in name or name in _RESERVED:
        raise ValueError(
            f"{argument}: expected a name without dots that is no attribute of "
            f"torch.nn.ModuleDict; got {name!r}"
        )


def parameters_by_name(module: nn.Module) -> dict[str, Tensor]:
    """The module's parameters under the names that files use, as the reference takes them."""
    parameters = dict(module.named_parameters(remove_duplicate=False))
    for path, part in module.named_modules():
        if is_parametrized(part):
            parameters |= {f"{path}.{name}": getattr(part, name) for name in part.parametrizations}
    return parameters
