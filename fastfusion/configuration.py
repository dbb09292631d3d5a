"""Configurations of adapters and fusions, and the record of both that a model carries.

Field names, defaults, names and hashes are those of `adapters`, so that its files and ours are
interchangeable. A configuration is a frozen mapping, checked when it is made.
"""

import ast
import copy
import hashlib
import json
import math
import os
from collections.abc import Iterator, Mapping
from dataclasses import FrozenInstanceError, dataclass, field, fields
from typing import Any, TypeVar

from .ops.activations import activation_code

__all__ = [
    "ADAPTERFUSION_CONFIG_MAP",
    "ADAPTER_CONFIG_MAP",
    "AdapterConfig",
    "AdapterFusionConfig",
    "AdapterPlusConfig",
    "BnConfig",
    "CompacterConfig",
    "CompacterPlusPlusConfig",
    "DoubleSeqBnConfig",
    "DoubleSeqBnInvConfig",
    "DynamicAdapterFusionConfig",
    "HoulsbyConfig",
    "HoulsbyInvConfig",
    "ModelAdaptersConfig",
    "ParBnConfig",
    "ParallelConfig",
    "PfeifferConfig",
    "PfeifferInvConfig",
    "SeqBnConfig",
    "SeqBnInvConfig",
    "StaticAdapterFusionConfig",
    "get_adapter_config_hash",
]

LOCATIONS = ("mh_adapter", "cross_adapter", "output_adapter")
"""The places of a layer: after attention, after cross-attention, after the feed-forward block."""

_UNSUPPORTED_NAMES = frozenset(
    "prefix_tuning prefix_tuning_flat prompt_tuning lora mtl_lora ia3 vera dora dvora loreft "
    "noreft direft mam unipelt".split()
)


def _is_number(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)


def _is_int(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def _expect(condition: bool, name: str, expected: str, actual: Any) -> None:
    if not condition:
        raise ValueError(f"{name}: expected {expected}; got {actual!r}")


_Config = TypeVar("_Config", bound="AdapterConfig")


class AdapterConfig(Mapping):
    """Base of the configurations: a frozen mapping of its fields.

    A value that is set cannot be set again; attributes of other names can be added once. They are
    part of the mapping, not of `to_dict()`. Two configurations are equal when their `to_dict()` is.
    """

    def __init__(self) -> None:
        raise TypeError("AdapterConfig is abstract; use BnConfig or one of its named forms")

    def __setattr__(self, name: str, value: Any) -> None:
        if name in self.__dict__:
            raise FrozenInstanceError(f"cannot assign to field {name!r}; use replace({name}=...)")
        object.__setattr__(self, name, value)

    def __delattr__(self, name: str) -> None:
        raise FrozenInstanceError(f"cannot delete field {name!r}")

    def __getitem__(self, key: str) -> Any:
        return self.__dict__[key]

    def __iter__(self) -> Iterator[str]:
        return iter(self.__dict__)

    def __len__(self) -> int:
        return len(self.__dict__)

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, AdapterConfig):
            return NotImplemented
        return self.to_dict() == other.to_dict()

    __hash__ = None

    def to_dict(self) -> dict[str, Any]:
        """The fields as a new dictionary that json can write."""
        return {f.name: copy.copy(self[f.name]) for f in fields(self)}

    def replace(self: _Config, **changes: Any) -> _Config:
        """A new configuration of the same class with some values changed.

        Args:
            changes: field -> value; other names become extra attributes.

        Returns:
            The new one; this one stays as it is.

        Raises:
            ValueError: a value is not valid.
        """
        return type(self).from_dict({**self, **changes})

    @classmethod
    def from_dict(cls: type[_Config], config: Mapping[str, Any]) -> _Config:
        """The configuration that a mapping describes; unknown keys become extra attributes.

        Args:
            config: field -> value; fields with a default may be missing.

        Returns:
            A configuration of this class.

        Raises:
            ValueError: a required key is missing or a value is not valid.
        """
        known = {f.name for f in fields(cls)}
        try:
            instance = cls(**{k: v for k, v in config.items() if k in known})
        except TypeError as error:
            raise ValueError(f"config: not a {cls.__name__}: {error}") from error
        for key, value in config.items():
            if key not in known:
                _expect(not hasattr(cls, key), "config", f"keys that {cls.__name__} has free", key)
                setattr(instance, key, value)
        return instance

    @classmethod
    def load(
        cls, config: "Mapping[str, Any] | str | os.PathLike | None", **overrides: Any
    ) -> "BnConfig":
        """The adapter configuration that a specifier stands for.

        Args:
            config: a configuration or mapping, a name in `ADAPTER_CONFIG_MAP`, the path of a JSON
                file (such as adapter_config.json), a string `name[key=value, ...]`, or None for
                "seq_bn".
            overrides: values to change; None leaves a value as it is.

        Returns:
            The configuration; `config` itself where it is one and nothing changes.

        Raises:
            NotImplementedError: the method is not a bottleneck adapter, or several are joined.
            ValueError: nothing is known under this specifier, or a value is not valid.
        """
        resolved = _resolve("seq_bn" if config is None else config, ADAPTER_CONFIG_MAP)
        overrides = {k: v for k, v in overrides.items() if v is not None}
        if isinstance(resolved, BnConfig):
            return resolved.replace(**overrides) if overrides else resolved
        if isinstance(resolved, AdapterConfig):
            _expect(False, "config", "an adapter's configuration", resolved)
        architecture = resolved.get("architecture")
        if architecture is not None:
            raise NotImplementedError(
                f"config: architecture {architecture!r} is not supported yet; only bottleneck "
                "adapters are"
            )
        return BnConfig.from_dict({**resolved, **overrides})


def _resolve(
    config: Mapping[str, Any] | str | os.PathLike, config_map: Mapping[str, AdapterConfig]
) -> Mapping[str, Any]:
    if isinstance(config, Mapping):
        return config
    _expect(isinstance(config, (str, os.PathLike)), "config", "a mapping, name or path", config)
    name = os.fspath(config)
    if name in config_map:
        return config_map[name]
    if os.path.isfile(name):
        with open(name, encoding="utf-8") as file:
            try:
                loaded = json.load(file)
            except (ValueError, RecursionError) as error:
                raise ValueError(f"config: {name!r} is not a JSON file: {error}") from error
        _expect(isinstance(loaded, dict), "config", "a JSON object in the file", loaded)
        return loaded.get("config", loaded)
    return _parse(name, config_map, "config", "the path of a file")


def _parse(
    text: str, config_map: Mapping[str, AdapterConfig], argument: str, alternative: str
) -> AdapterConfig:
    """Read `name` or `name[key=value, ...]`, the values being Python literals.

    The errors speak of an argument, and of what else than a name could have been given for it.
    """
    if "|" in text:
        raise NotImplementedError(f"{argument}: the union {text!r} is not supported yet")
    name, bracket, arguments = text.strip().partition("[")
    name = name.strip()
    if name in _UNSUPPORTED_NAMES:
        raise NotImplementedError(
            f"{argument}: {name!r} is not supported yet; only bottleneck adapters are"
        )
    if name not in config_map:
        known = ", ".join(sorted(config_map))
        raise ValueError(f"{argument}: expected one of {known}, or {alternative}; got {text!r}")
    if not bracket:
        return config_map[name]
    try:
        if not arguments.endswith("]"):
            raise SyntaxError("no closing bracket")
        call = ast.parse(f"_({arguments[:-1]})", mode="eval").body
        if not isinstance(call, ast.Call) or call.args:
            raise SyntaxError("a value without a name")
        changes = {keyword.arg: ast.literal_eval(keyword.value) for keyword in call.keywords}
    except (SyntaxError, ValueError) as error:
        raise ValueError(f"{argument}: expected name[key=value]; got {text!r} ({error})") from error
    unknown = sorted(map(str, set(changes) - {f.name for f in fields(config_map[name])}))
    _expect(not unknown, argument, f"fields of {name}", unknown)
    return config_map[name].replace(**changes)


def get_adapter_config_hash(config: Mapping[str, Any], length: int = 16) -> str:
    """The identifier of a configuration, as `adapters` computes it.

    Semantics: values that are false are dropped at every depth, then keys that stand at the
    defaults below; the SHA-1 of what is left as JSON with sorted keys, its first `length` digits.

    Args:
        config: the configuration, of an adapter or a fusion.
        length: hexadecimal digits, at most 40.

    Returns:
        The identifier, `length` characters.
    """

    def minimize(value: Any) -> Any:
        if isinstance(value, Mapping):
            return {k: minimize(v) for k, v in value.items() if v}
        return value

    minimized = minimize(config)
    for key, default in _HASH_DEFAULTS.items():
        if minimized.get(key) == default:
            del minimized[key]
    text = json.dumps(minimized, sort_keys=True)
    return hashlib.sha1(text.encode(), usedforsecurity=False).hexdigest()[:length]


# Fields that came after the hash was first published; phm_layer stands here with True, not with its
# default, and that is part of the published hashes.
_HASH_DEFAULTS = {
    "phm_layer": True,
    "phm_dim": 4,
    "factorized_phm_W": True,
    "shared_phm_rule": True,
    "phm_c_init": "normal",
    "phm_init_range": 0.0001,
    "learn_phm": True,
    "hypercomplex_nonlinearity": "glorot-uniform",
    "phm_rank": 1,
    "phm_bias": True,
    "init_weights": "bert",
    "scaling": 1.0,
}


@dataclass(eq=False)
class BnConfig(AdapterConfig):
    """A bottleneck adapter: `scaling * up(non_linearity(down(h)))`, plus a residual.

    Raises:
        ValueError: a value is of the wrong type, out of range or unknown.
    """

    mh_adapter: bool
    """An adapter after the attention of each layer."""
    output_adapter: bool
    """An adapter after the feed-forward block of each layer."""
    reduction_factor: float | Mapping[str, float]
    """Hidden size over bottleneck size: one number, or layer number -> number with "default"."""
    non_linearity: str | None
    """The function in the bottleneck, a name of transformers' ACT2FN; None is the identity."""
    original_ln_before: bool = False
    """Add the sub-layer's input and apply the model's LayerNorm before the adapter."""
    original_ln_after: bool = True
    """The same after the adapter."""
    ln_before: bool = False
    """A LayerNorm of the adapter's own in front of the down-projection."""
    ln_after: bool = False
    """A LayerNorm of the adapter's own behind the up-projection."""
    init_weights: str = "bert"
    """"bert", "mam_adapter" or "houlsby"."""
    init_weights_seed: int | None = None
    """Seed set before every module's initialisation; None leaves the generator alone."""
    is_parallel: bool = False
    """The adapter reads the sub-layer's input in place of its output."""
    scaling: float | str = 1.0
    """A number, "learned" (one parameter) or "channel" (one parameter per hidden unit)."""
    use_gating: bool = False
    """Multiply by a learned gate, one value per sequence."""
    residual_before_ln: bool | str = True
    """What is added back: the state before the LayerNorm (True), after it (False), or the sum in
    front of it ("post_add")."""
    adapter_residual_before_ln: bool = False
    """Add the residual in front of the adapter's own `ln_after`."""
    inv_adapter: str | None = None
    """An invertible adapter behind the embeddings: None, "nice" or "glow"."""
    inv_adapter_reduction_factor: float | None = None
    cross_adapter: bool = False
    """An adapter after the cross-attention of each decoder layer."""
    leave_out: list[int] = field(default_factory=list)
    """Numbers of the layers that get no adapter."""
    dropout: float = 0.0
    phm_layer: bool = False
    """Compacter: projections as sums of Kronecker products; the phm_ fields belong to it."""
    phm_dim: int = 4
    factorized_phm_W: bool | None = True
    shared_W_phm: bool | None = False
    shared_phm_rule: bool | None = True
    factorized_phm_rule: bool | None = False
    phm_c_init: str | None = "normal"
    phm_init_range: float | None = 0.0001
    learn_phm: bool | None = True
    hypercomplex_nonlinearity: str | None = "glorot-uniform"
    phm_rank: int | None = 1
    phm_bias: bool | None = True
    stochastic_depth: float | None = 0.0
    """Probability of dropping a sequence's adapter output in training."""

    def __post_init__(self) -> None:
        for name in _BN_BOOLS:
            _expect(isinstance(self[name], bool), name, "True or False", self[name])
        activation_code(self.non_linearity)
        for name, choices in _BN_CHOICES.items():
            is_choice = any(type(self[name]) is type(c) and self[name] == c for c in choices)
            _expect(is_choice, name, f"one of {choices}", self[name])
        for name in ("init_weights_seed", "phm_rank"):
            _expect(self[name] is None or _is_int(self[name]), name, "None or an int", self[name])
        # what torch.manual_seed takes
        seed = self.init_weights_seed or 0
        _expect(-(2**63) <= seed < 2**64, "init_weights_seed", "a number of 64 bits", seed)
        for name in ("dropout", "stochastic_depth"):
            value = 0.0 if self[name] is None else self[name]
            _expect(_is_number(value) and 0 <= value <= 1, name, "a number from 0 to 1", value)
        factor = self.inv_adapter_reduction_factor
        is_valid = factor is None or (_is_number(factor) and factor > 0)
        _expect(is_valid, "inv_adapter_reduction_factor", "None or a number above 0", factor)
        is_valid = _is_int(self.phm_dim) and self.phm_dim > 0
        _expect(is_valid, "phm_dim", "an int above 0", self.phm_dim)
        self._normalize("reduction_factor", self._checked_reduction_factor())
        self._normalize("leave_out", self._checked_leave_out())
        if self.scaling not in ("learned", "channel"):
            expected = '"learned", "channel" or a number'
            _expect(_is_number(self.scaling), "scaling", expected, self.scaling)
            # `adapters` refuses an int and hashes 4 and 4.0 differently
            self._normalize("scaling", float(self.scaling))

    def _normalize(self, name: str, value: Any) -> None:
        object.__setattr__(self, name, value)

    def _checked_reduction_factor(self) -> float | dict[str, float]:
        factor = self.reduction_factor
        if not isinstance(factor, Mapping):
            is_valid = _is_number(factor) and factor > 0
            _expect(is_valid, "reduction_factor", "a number above 0 or a mapping", factor)
            return factor
        for key, value in factor.items():
            is_layer = (_is_int(key) and key >= 0) or (isinstance(key, str) and key.isdecimal())
            _expect(is_layer or key == "default", "reduction_factor", "layer numbers as keys", key)
            is_valid = _is_number(value) and value > 0
            _expect(is_valid, f"reduction_factor[{key!r}]", "a number above 0", value)
        # str keys: what JSON makes of them, and what `adapters` looks up
        return {str(key): value for key, value in factor.items()}

    def _checked_leave_out(self) -> list[int]:
        leave_out = [] if self.leave_out is None else self.leave_out
        expected = "a list of layer numbers"
        is_valid = not isinstance(leave_out, (str, Mapping)) and hasattr(leave_out, "__iter__")
        _expect(is_valid, "leave_out", expected, leave_out)
        leave_out = list(leave_out)
        _expect(all(_is_int(i) and i >= 0 for i in leave_out), "leave_out", expected, leave_out)
        return leave_out

    @classmethod
    def from_dict(cls: type[_Config], config: Mapping[str, Any]) -> _Config:
        """As `AdapterConfig.from_dict`; the first library's nested `invertible_adapter` is read."""
        config = dict(config)
        inverse = config.pop("invertible_adapter", None)
        if inverse:
            config["inv_adapter"] = inverse["block_type"]
            config["inv_adapter_reduction_factor"] = inverse["reduction_factor"]
        return super().from_dict(config)

    def bottleneck_size(self, hidden_size: int, layer_idx: int) -> int:
        """The bottleneck size `d` at one layer.

        Args:
            hidden_size: the model's `H`.
            layer_idx: the layer's number.

        Returns:
            `hidden_size // factor` with the layer's factor, at least 1.

        Raises:
            ValueError: `reduction_factor` is a mapping with neither this layer nor "default".
        """
        factor = self.reduction_factor
        if isinstance(factor, Mapping):
            if str(layer_idx) not in factor and "default" not in factor:
                raise ValueError(
                    f"reduction_factor: expected layer {layer_idx} or 'default' among the keys; "
                    f"got {sorted(factor)}"
                )
            factor = factor.get(str(layer_idx), factor.get("default"))
        return max(1, int(hidden_size // factor))

    def match(self, layer_idx: int, location: str) -> bool:
        """Whether this adapter is present at a place.

        Args:
            layer_idx: the layer's number.
            location: one of `LOCATIONS`.

        Returns:
            True where its locations have it and `leave_out` does not name the layer.

        Raises:
            ValueError: another location.
        """
        _expect(location in LOCATIONS, "location", f"one of {LOCATIONS}", location)
        return layer_idx not in self.leave_out and self[location]

    def check_supported(self) -> None:
        """Raise a NotImplementedError that names the field this library cannot compute yet."""
        if self.phm_layer:
            raise NotImplementedError("phm_layer=True (Compacter) is not supported yet")
        if self.inv_adapter is not None:
            raise NotImplementedError(
                f"inv_adapter={self.inv_adapter!r} (invertible adapters) is not supported yet"
            )


_BN_BOOLS = tuple(f.name for f in fields(BnConfig) if f.type is bool)
_BN_CHOICES = {
    "init_weights": ("bert", "mam_adapter", "houlsby"),
    "residual_before_ln": (True, False, "post_add"),
    "inv_adapter": (None, "nice", "glow"),
}


@dataclass(eq=False)
class SeqBnConfig(BnConfig):
    """Pfeiffer et al. 2020, https://arxiv.org/abs/2005.00247: one adapter behind the FFN."""

    mh_adapter: bool = False
    output_adapter: bool = True
    reduction_factor: float | Mapping[str, float] = 16
    non_linearity: str | None = "relu"
    original_ln_before: bool = True


@dataclass(eq=False)
class SeqBnInvConfig(SeqBnConfig):
    """`SeqBnConfig` with a NICE adapter behind the embeddings (MAD-X)."""

    inv_adapter: str | None = "nice"
    inv_adapter_reduction_factor: float | None = 2


@dataclass(eq=False)
class DoubleSeqBnConfig(BnConfig):
    """Houlsby et al. 2019, https://arxiv.org/abs/1902.00751: adapters behind attention and FFN."""

    mh_adapter: bool = True
    output_adapter: bool = True
    reduction_factor: float | Mapping[str, float] = 16
    non_linearity: str | None = "swish"


@dataclass(eq=False)
class DoubleSeqBnInvConfig(DoubleSeqBnConfig):
    """`DoubleSeqBnConfig` with a NICE adapter behind the embeddings."""

    inv_adapter: str | None = "nice"
    inv_adapter_reduction_factor: float | None = 2


@dataclass(eq=False)
class ParBnConfig(BnConfig):
    """He et al. 2021, https://arxiv.org/abs/2110.04366: an adapter beside the FFN."""

    mh_adapter: bool = False
    output_adapter: bool = True
    reduction_factor: float | Mapping[str, float] = 2
    non_linearity: str | None = "relu"
    init_weights: str = "mam_adapter"
    is_parallel: bool = True
    scaling: float | str = 4.0


@dataclass(eq=False)
class CompacterPlusPlusConfig(SeqBnConfig):
    """Mahabadi et al. 2021, https://arxiv.org/abs/2106.04647: one PHM adapter per layer."""

    reduction_factor: float | Mapping[str, float] = 32
    non_linearity: str | None = "gelu"
    phm_layer: bool = True


@dataclass(eq=False)
class CompacterConfig(DoubleSeqBnConfig):
    """Mahabadi et al. 2021, https://arxiv.org/abs/2106.04647: two PHM adapters per layer."""

    reduction_factor: float | Mapping[str, float] = 32
    non_linearity: str | None = "gelu"
    phm_layer: bool = True


@dataclass(eq=False)
class AdapterPlusConfig(BnConfig):
    """Steitz and Roth 2024, https://arxiv.org/abs/2406.06820."""

    mh_adapter: bool = False
    output_adapter: bool = True
    reduction_factor: float | Mapping[str, float] = 96
    non_linearity: str | None = "gelu"
    original_ln_before: bool = True
    original_ln_after: bool = False
    residual_before_ln: bool | str = False
    init_weights: str = "houlsby"
    scaling: float | str = "channel"
    stochastic_depth: float | None = 0.1


PfeifferConfig = SeqBnConfig
PfeifferInvConfig = SeqBnInvConfig
HoulsbyConfig = DoubleSeqBnConfig
HoulsbyInvConfig = DoubleSeqBnInvConfig
ParallelConfig = ParBnConfig

ADAPTER_CONFIG_MAP: dict[str, BnConfig] = {
    "seq_bn": SeqBnConfig(),
    "double_seq_bn": DoubleSeqBnConfig(),
    "par_bn": ParBnConfig(),
    "scaled_par_bn": ParBnConfig(scaling="learned"),
    "seq_bn_inv": SeqBnInvConfig(),
    "double_seq_bn_inv": DoubleSeqBnInvConfig(),
    "compacter++": CompacterPlusPlusConfig(),
    "compacter": CompacterConfig(),
}
"""The configurations that can be asked for by name."""
for _old, _new in {
    "pfeiffer": "seq_bn",
    "houlsby": "double_seq_bn",
    "parallel": "par_bn",
    "scaled_parallel": "scaled_par_bn",
    "pfeiffer+inv": "seq_bn_inv",
    "houlsby+inv": "double_seq_bn_inv",
}.items():
    ADAPTER_CONFIG_MAP[_old] = ADAPTER_CONFIG_MAP[_new]


@dataclass(eq=False)
class AdapterFusionConfig(AdapterConfig):
    """An AdapterFusion layer (Pfeiffer et al. 2021); the defaults are those of "dynamic".

    Raises:
        ValueError: a value is of the wrong type or out of range.
    """

    key: bool = True
    """Project the adapters' outputs to keys; without it they are the keys."""
    query: bool = True
    value: bool = True
    query_before_ln: bool = False
    """The query is the sub-layer's output before the LayerNorm that precedes the adapters."""
    regularization: bool = True
    """Kept for `adapters`, which stores it and never reads it."""
    residual_before: bool = False
    """Add the residual to every adapter's output, in place of adding it to the result."""
    temperature: bool = False
    """Divide the scores by a temperature that falls from 50 to 1 over training."""
    value_before_softmax: bool = True
    """Project to values before the weighted sum, or after it."""
    value_initialized: bool = True
    """Start the value projection near the identity."""
    dropout_prob: float | None = None
    """Dropout on the scores; None is the model's attention dropout."""
    peer_temperature: bool = False
    """Let the temperature fall in every forward, in evaluation too, as `adapters` does."""

    def __post_init__(self) -> None:
        for name in _FUSION_BOOLS:
            _expect(isinstance(self[name], bool), name, "True or False", self[name])
        dropout = self.dropout_prob
        is_valid = dropout is None or (_is_number(dropout) and 0 <= dropout <= 1)
        _expect(is_valid, "dropout_prob", "None or a number from 0 to 1", dropout)

    def to_dict(self) -> dict[str, Any]:
        """The fields; `peer_temperature`, which `adapters` does not know, only where it is set."""
        values = super().to_dict()
        if not self.peer_temperature:
            del values["peer_temperature"]
        return values

    @classmethod
    def load(
        cls, config: "Mapping[str, Any] | str | os.PathLike | None", **overrides: Any
    ) -> "AdapterFusionConfig":
        """The fusion configuration that a specifier stands for.

        Args:
            config: a configuration or mapping, "static", "dynamic", the path of a JSON file (such
                as adapter_fusion_config.json), a string `name[key=value, ...]`, or None for
                "dynamic".
            overrides: values to change.

        Returns:
            The configuration; `config` itself where it is one and nothing changes.

        Raises:
            ValueError: nothing is known under this specifier, or a value is not valid.
        """
        resolved = _resolve("dynamic" if config is None else config, ADAPTERFUSION_CONFIG_MAP)
        if isinstance(resolved, AdapterFusionConfig):
            return resolved.replace(**overrides) if overrides else resolved
        if isinstance(resolved, AdapterConfig):
            _expect(False, "config", "a fusion's configuration", resolved)
        return AdapterFusionConfig.from_dict({**resolved, **overrides})


_FUSION_BOOLS = tuple(f.name for f in fields(AdapterFusionConfig) if f.type is bool)


@dataclass(eq=False)
class StaticAdapterFusionConfig(AdapterFusionConfig):
    """AdapterFusion without a value projection."""

    value: bool = False
    regularization: bool = False
    value_initialized: bool = False


@dataclass(eq=False)
class DynamicAdapterFusionConfig(AdapterFusionConfig):
    """AdapterFusion with a value projection."""


ADAPTERFUSION_CONFIG_MAP: dict[str, AdapterFusionConfig] = {
    "static": StaticAdapterFusionConfig(),
    "dynamic": DynamicAdapterFusionConfig(),
}
"""The fusion configurations that can be asked for by name."""


def _identified(
    configs: Mapping[str, AdapterConfig], named: Mapping[str, AdapterConfig]
) -> tuple[dict[str, str], dict[str, dict]]:
    """Name -> identifier, and identifier -> dictionary where the identifier is no name in a map."""
    identifiers: dict[str, str] = {}
    config_map: dict[str, dict] = {}
    for name, config in configs.items():
        # by name where there is one: `adapters` cannot read a fusion's dictionary back
        identifier = next((key for key, known in named.items() if known == config), None)
        if identifier is None:
            identifier, values = get_adapter_config_hash(config), config.to_dict()
            # the hash takes scaling 0.0 and 1.0 for the same
            while config_map.setdefault(identifier, values) != values:
                identifier += "_"
        identifiers[name] = identifier
    return identifiers, config_map


class ModelAdaptersConfig:
    """What a model carries: its adapters, its fusions and the setup that is active."""

    def __init__(self) -> None:
        self.adapters: dict[str, BnConfig] = {}
        """Name -> configuration."""
        self.fusions: dict[str, AdapterFusionConfig] = {}
        """Name -> configuration; a fusion without a name of its own is called "a,b,c"."""
        self.fusion_names: dict[str, list[str]] = {}
        """Name of a fusion -> names of its adapters, in order."""
        self.active_setup = None
        """The composition that runs in every forward, or None."""
        self.skip_layers: list[int] = []
        """Numbers of the layers where no adapter runs."""

    def __contains__(self, name: str) -> bool:
        return name in self.adapters

    def __iter__(self) -> Iterator[str]:
        return iter(self.adapters)

    def __len__(self) -> int:
        return len(self.adapters)

    def get(self, name: str) -> BnConfig | None:
        """The configuration of an adapter, or None."""
        return self.adapters.get(name)

    def match(self, name: str, layer_idx: int, location: str) -> BnConfig | None:
        """The configuration of an adapter if it is present at a place, or None.

        Args:
            name: the adapter.
            layer_idx, location: as in `BnConfig.match`.

        Raises:
            ValueError: no such location.
        """
        config = self.adapters.get(name)
        return config if config is not None and config.match(layer_idx, location) else None

    def to_dict(self) -> dict[str, dict]:
        """The key `adapters` of config.json, as `adapters` writes and reads it."""
        adapters, config_map = _identified(self.adapters, ADAPTER_CONFIG_MAP)
        fusions, fusion_config_map = _identified(self.fusions, ADAPTERFUSION_CONFIG_MAP)
        return {
            "adapters": adapters,
            "config_map": config_map,
            "fusions": fusions,
            "fusion_config_map": fusion_config_map,
            "fusion_name_map": {
                name: list(names)
                for name, names in self.fusion_names.items()
                if name != ",".join(names)
            },
        }

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> "ModelAdaptersConfig":
        """The record that `to_dict` or `adapters` wrote.

        Args:
            values: the key `adapters` of config.json.

        Raises:
            NotImplementedError: an adapter is of a method that is not supported.
            ValueError: a configuration is missing or not valid, or not given by a name.
        """

        def look_up(
            argument: str, specifier: Any, map_name: str, named: Mapping[str, AdapterConfig]
        ) -> Mapping[str, Any]:
            # never the path of a file: the record may come with somebody else's config.json
            _expect(isinstance(specifier, str), argument, "a name", specifier)
            config = values.get(map_name, {}).get(specifier)
            if config is None:
                return _parse(specifier, named, argument, f"a key of {map_name}")
            _expect(isinstance(config, Mapping), f"{map_name}[{specifier!r}]", "a mapping", config)
            return config

        record = cls()
        for name, specifier in values.get("adapters", {}).items():
            argument = f"adapters[{name!r}]"
            config = look_up(argument, specifier, "config_map", ADAPTER_CONFIG_MAP)
            record.adapters[name] = AdapterConfig.load(config)
        for name, specifier in values.get("fusions", {}).items():
            argument = f"fusions[{name!r}]"
            config = look_up(argument, specifier, "fusion_config_map", ADAPTERFUSION_CONFIG_MAP)
            record.fusions[name] = AdapterFusionConfig.load(config)
            names = values.get("fusion_name_map", {}).get(name)
            record.fusion_names[name] = list(names) if names is not None else name.split(",")
        return record
