"""Adapters, fusions and heads as files, under the names and in the format of `adapters`.

Each is a directory with a JSON configuration and a file of tensors, safetensors or, for `adapters`'
default reader, a pickle of tensors. Keys are those of the model's state dict: with the base model's
prefix where the model has a head, without it for a bare base model; reading takes both.

A pair of files is written whole or not at all, and everything in it is checked before the model
changes.
"""

import contextlib
import logging
import math
import os
import re
import sys
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from importlib import metadata
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.utils.parametrize import is_parametrized

from .composition import Fuse, fusion_name
from .configuration import (
    AdapterConfig,
    AdapterFusionConfig,
    BnConfig,
    get_adapter_config_hash,
)
from .files import (
    ADAPTER_FILES,
    FUSION_FILES,
    HEAD_FILES,
    read_files,
    write_files,
)
from .heads import PredictionHead, checked_label2id, head_from_config
from .modules import AdapterFusion, check_module_name

logger = logging.getLogger(__name__)

FORMAT_VERSION = "adapters.1.3.0"
"""The key `version` of the JSON files: the release of `adapters` whose format they have."""
try:
    LIBRARY_VERSION = metadata.version("fastfusion")
except metadata.PackageNotFoundError:  # imported from a checkout
    LIBRARY_VERSION = "0+unknown"

_READERS = (__name__, f"{__package__}.saved_setups")
"""No warning points at a line of these modules, but at the one that called them."""


# ---- names in state dicts -----------------------------------------------------------------------

_KINDS = {
    "adapters": "adapter",
    "invertible_adapters": "adapter",
    "adapter_fusion_layer": "fusion",
    "heads": "head",
}
"""Part of a key -> of what kind the thing is whose name is the next part."""
_LEGACY_PARTS = {
    "attention_text_task_adapters": "adapters",
    "attention_text_lang_adapters": "adapters",
    "layer_text_task_adapters": "adapters",
    "layer_text_lang_adapters": "adapters",
    "invertible_lang_adapters": "invertible_adapters",
}
_LEGACY_ACTIVATIONS = {"gelu": "gelu_new", "gelu_orig": "gelu"}


def _name_index(parts: Sequence[str], kind: str) -> int | None:
    """Where the name stands in a key of a kind; None for keys of other kinds."""
    for i, part in enumerate(parts[:-1]):
        if part in _KINDS:
            return i + 1 if _KINDS[part] == kind else None
    return None


def select(state: Mapping[str, Any], kind: str, name: str) -> dict[str, Any]:
    """The entries of a state dict that belong to one "adapter", "fusion" or "head"."""
    selected = {}
    for key, tensor in state.items():
        parts = key.split(".")
        index = _name_index(parts, kind)
        if index is not None and parts[index] == name:
            selected[key] = tensor
    return selected


def rename(state: Mapping[str, Tensor], kind: str, old: str, new: str) -> dict[str, Tensor]:
    """The entries of a state dict, with another name in the keys of one adapter, fusion or head.

    The part names of the first library's files become today's.
    """
    renamed = {}
    for key, tensor in state.items():
        parts = [_LEGACY_PARTS.get(part, part) for part in key.split(".")]
        index = _name_index(parts, kind)
        if index is not None and parts[index] == old:
            parts[index] = new
        renamed[".".join(parts)] = tensor
    return renamed


def _bare(model: nn.Module, key: str) -> str:
    """A key without the base model's prefix, and without what compiling a submodule adds."""
    return key.replace("_orig_mod.", "").removeprefix(f"{model.base_model_prefix}.")


def _state(model: nn.Module) -> dict[str, Tensor]:
    """The state dict, with the keys that it has where nothing is compiled."""
    return {key.replace("_orig_mod.", ""): t for key, t in model.state_dict().items()}


def _parametrized(module: nn.Module) -> Iterator[tuple[str, nn.Module, str]]:
    """Path, module and attribute of every parameter that a parametrization of torch computes."""
    for path, part in module.named_modules(remove_duplicate=False):
        if is_parametrized(part):
            for name in part.parametrizations:
                yield path, part, name


def _computed(module: nn.Module, state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Entries of a state dict, with what parametrizations compute in place of what they keep."""
    state = dict(state)
    for path, part, name in _parametrized(module):
        prefix = f"{path}.parametrizations.{name}.".replace("_orig_mod.", "")
        kept = [key for key in state if key.replace("_orig_mod.", "").startswith(prefix)]
        if kept:
            state[kept[0].partition(".parametrizations.")[0] + f".{name}"] = getattr(part, name)
        for key in kept:
            del state[key]
    return state


def whole_state(model: nn.Module, state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """A model's state dict with what parametrizations of adapters, fusions and heads compute."""
    config = model.adapters_config
    carried = [("adapter", config.adapters), ("fusion", config.fusions)]
    carried.append(("head", getattr(model, "heads", ())))
    whole = dict(state)
    for kind, names in carried:
        for name in names:
            selected = select(whole, kind, name)
            computed = _computed(model, selected)
            for key in selected.keys() - computed.keys():
                del whole[key]
            whole |= computed
    return whole


def _assign(module: nn.Module, tensors: Mapping[str, Tensor]) -> None:
    """Copy tensors into a module; a parameter that is computed is set by its parametrization."""
    tensors = dict(tensors)
    for path, part, name in _parametrized(module):
        if (value := tensors.pop(f"{path}.{name}", None)) is not None:
            setattr(part, name, value.to(getattr(part, name)))
    module.load_state_dict(tensors, strict=False)


def _check_assignable(module: nn.Module, keys: Iterable[str], source: str) -> None:
    """Raise a ValueError where a parametrization cannot be set to what a file has."""
    for path, part, name in _parametrized(module):
        if f"{path}.{name}" in keys and not all(
            hasattr(step, "right_inverse") for step in part.parametrizations[name]
        ):
            raise ValueError(
                f"{source}: {path}.{name} has a parametrization without right_inverse; expected "
                "one that can be set"
            )


def has_static_head(model: nn.Module) -> bool:
    """Whether a model has the one head of its class, and no heads by name."""
    return not hasattr(model, "heads") and hasattr(model, model.base_model_prefix)


def static_head(model: nn.Module) -> dict[str, Tensor]:
    """The entries of a transformers model with a head of its own that are not the base model's."""
    prefix = f"{model.base_model_prefix}."
    return {key: t for key, t in _state(model).items() if not key.startswith(prefix)}


def _listing(names: Iterable[str]) -> str:
    names = sorted(names)
    more = f" and {len(names) - 20} more" if len(names) > 20 else ""
    return ", ".join(names[:20]) + more


def warn(text: str) -> None:
    """Warn at the line that called these modules, however deep in them the reason was found.

    Args:
        text: the warning.
    """
    level, frame = 1, sys._getframe()
    while frame is not None and frame.f_globals.get("__name__") in _READERS:
        level, frame = level + 1, frame.f_back
    warnings.warn(text, stacklevel=level)


def _is_finite(tensor: Tensor) -> Tensor:
    # torch has no isfinite for 8-bit floats
    return torch.isfinite(tensor.float() if tensor.element_size() == 1 else tensor)


def _prepared(
    model: nn.Module, tensors: Mapping[str, Tensor], kind: str, old: str, new: str, source: str
) -> dict[str, Tensor]:
    """An adapter's or fusion's tensors from a file, by bare keys with its new name."""
    prepared = {_bare(model, k): t for k, t in rename(tensors, kind, old, new).items()}
    if len(prepared) < len(tensors):
        raise ValueError(f"{source}: several tensors for one place; got {_listing(tensors)}")
    return prepared


def _match(
    tensors: Mapping[str, Tensor], expected: Mapping[str, Tensor], strict: bool, source: str
) -> dict[str, Tensor]:
    """The tensors that have a place, checked against what stands there; warns of NaN and infinity.

    Raises:
        ValueError: a shape differs, a tensor is no weight, a value leaves the dtype's range, or,
            with `strict`, a tensor is missing or has no place.
    """
    problems = []
    if missing := expected.keys() - tensors.keys():
        problems.append(f"missing {_listing(missing)}")
    if unexpected := tensors.keys() - expected.keys():
        problems.append(f"unexpected {_listing(unexpected)}")
    if problems:
        text = f"{source}: {'; '.join(problems)}"
        if strict:
            raise ValueError(f"{text} (strict=False takes what fits)")
        warn(text)

    fitting = {key: tensor for key, tensor in tensors.items() if key in expected}
    shapes = [
        f"{key}: expected {list(expected[key].shape)}, got {list(tensor.shape)}"
        for key, tensor in fitting.items()
        if tensor.shape != expected[key].shape
    ]
    if shapes:
        raise ValueError(f"{source}: shapes differ: {'; '.join(sorted(shapes)[:20])}")
    wrong = [
        f"{key} ({tensor.dtype})"
        for key, tensor in fitting.items()
        if not tensor.is_floating_point()
    ]
    if wrong:
        raise ValueError(f"{source}: expected floating-point tensors; got {_listing(wrong)}")
    overflowing = [
        f"{key} ({expected[key].dtype})"
        for key, tensor in fitting.items()
        if (_is_finite(tensor) & ~_is_finite(tensor.to(expected[key].dtype))).any()
    ]
    if overflowing:
        raise ValueError(f"{source}: values leave the range of {_listing(overflowing)}")
    strange = [key for key, tensor in fitting.items() if not _is_finite(tensor).all()]
    if strange:
        warn(f"{source}: NaN or infinity in {_listing(strange)}")
    return fitting


def checked_field(config: Mapping[str, Any], key: str, types: tuple[type, ...], source: str) -> Any:
    """A value of a configuration, which `source` has.

    Raises:
        ValueError: it is missing or of none of the types.
    """
    value = config.get(key)
    if not isinstance(value, types):
        expected = " or ".join("null" if t is type(None) else t.__name__ for t in types)
        raise ValueError(f"{source}: expected {key!r} to be of type {expected}; got {value!r}")
    return value


def _check_hidden_size(model: nn.Module, config: Mapping[str, Any], source: str) -> None:
    saved, own = config.get("hidden_size"), getattr(model.config, "hidden_size", None)
    if saved is not None and own is not None and saved != own:
        raise ValueError(f"{source}: expected hidden_size {own}, the model's; got {saved}")


def subdirectory(directory: str | os.PathLike, name: str) -> Path:
    """The directory for a name inside another.

    Raises:
        ValueError: the name is not the name of a directory, such as "../x", "a/b" or "..", or too
            long for file systems.
    """
    is_path = name in ("", ".", "..") or re.search(r"[/\\\0]", name)
    if is_path or len(os.fsencode(name)) > 255:
        raise ValueError(
            f"name: {name!r} cannot be the name of a directory in {os.fspath(directory)!r}; save "
            "it by itself, with a directory of your choice"
        )
    return Path(directory) / name


def _full_config(model: nn.Module, meta_dict: Mapping[str, Any] | None, **keys: Any) -> dict:
    return {
        **(meta_dict or {}),
        "model_type": model.config.model_type,
        # some encoder-decoder models have no hidden size that holds for the whole model
        "hidden_size": getattr(model.config, "hidden_size", None),
        "model_name": getattr(model.config, "name_or_path", None),
        "model_class": type(model).__name__,
        "version": FORMAT_VERSION,
        "fastfusion_version": LIBRARY_VERSION,
        **keys,
    }


def actual_config(model: nn.Module, adapter_name: str) -> BnConfig:
    """An adapter's configuration, with the scaling that its modules were given since.

    Args:
        model: a patched model.
        adapter_name: the adapter.

    Raises:
        ValueError: not all of its modules have the same.
    """
    config = model.adapters_config.adapters[adapter_name]
    modules = [module for _, module in model.model_adapters.modules(adapter_name)]
    scalings = {float(module.scaling) for module in modules if "scaling" in module.__dict__}
    if len(scalings) > 1:
        raise ValueError(
            f"scaling: expected one number for all places of adapter {adapter_name!r}, as its "
            f"configuration has one; got {sorted(scalings)}"
        )
    return config.replace(scaling=scalings.pop()) if scalings - {config["scaling"]} else config


def save_adapter(
    model: nn.Module,
    save_directory: str | os.PathLike,
    adapter_name: str,
    with_head: bool = True,
    meta_dict: Mapping[str, Any] | None = None,
    *,
    use_safetensors: bool = True,
) -> None:
    """Write one adapter and, where there is one, the head that belongs to it.

    Args:
        model: a patched model.
        save_directory: made if need be.
        adapter_name: the adapter.
        with_head: also write the head of the adapter's name, or the only head of a model whose
            class has one.
        meta_dict: further keys of the JSON file.
        use_safetensors: False writes the pickle that `adapters` reads by default.

    Raises:
        NotADirectoryError: `save_directory` is something else.
        ValueError: the model has no adapter of this name, or its scaling was set to another number
            at some places.
    """
    configs = model.adapters_config.adapters
    if adapter_name not in configs:
        raise ValueError(
            f"adapter_name: expected one of the model's adapters {list(configs)}; "
            f"got {adapter_name!r}"
        )
    values = actual_config(model, adapter_name).to_dict()
    config = _full_config(model, meta_dict, name=adapter_name, config=values)
    tensors = _computed(model, select(_state(model), "adapter", adapter_name))
    write_files(save_directory, ADAPTER_FILES, config, tensors, use_safetensors, "save_directory")
    if with_head and (has_static_head(model) or adapter_name in getattr(model, "heads", ())):
        save_head(model, save_directory, adapter_name, use_safetensors=use_safetensors)


def save_all_adapters(
    model: nn.Module,
    save_directory: str | os.PathLike,
    with_head: bool = True,
    meta_dict: Mapping[str, Any] | None = None,
    *,
    use_safetensors: bool = True,
) -> None:
    """Write every adapter into a directory of its name; arguments as `save_adapter`.

    Raises:
        NotADirectoryError: a name's directory is something else.
        ValueError: a name cannot be that of a directory, or an adapter's scaling was set to another
            number at some places; nothing is written then.
    """
    configs = {name: actual_config(model, name) for name in model.adapters_config.adapters}
    targets = {name: subdirectory(save_directory, name) for name in configs}
    for name, target in targets.items():
        meta = {**(meta_dict or {}), "config_id": get_adapter_config_hash(configs[name])}
        save_adapter(model, target, name, with_head, meta, use_safetensors=use_safetensors)


def load_adapter(
    model: nn.Module,
    adapter_name_or_path: str | os.PathLike,
    config: Mapping[str, Any] | str | None = None,
    *,
    load_as: str | None = None,
    with_head: bool = True,
    leave_out: Sequence[int] | None = None,
    id2label: Mapping[int, str] | None = None,
    set_active: bool = False,
    strict: bool = True,
    use_safetensors: bool | None = None,
) -> str:
    """Add the adapter in a directory to the model and, where there is one, its head.

    An adapter of the same name and configuration gets the weights of the files. Everything is
    checked before the model changes.

    Args:
        model: a patched model.
        adapter_name_or_path: a directory, as `save_adapter` or `adapters` wrote it.
        config: the configuration it should have; another one in the files is loaded with a warning.
        load_as: its new name, and that of its head.
        with_head: also load the head in the directory. One that the model cannot take is left, with
            a warning.
        leave_out: layers that get no adapter, beside those that the files name.
        id2label: other labels for the head than the files have.
        set_active: activate it, and its head.
        strict: raise where tensors are missing or have no place; False warns.
        use_safetensors: as in `read_files`.

    Returns:
        The adapter's name in the model.

    Raises:
        FileNotFoundError: the directory or a file is missing.
        NotADirectoryError: `adapter_name_or_path` is something else.
        NotImplementedError: a hub's identifier, or a method or head that is not supported yet.
        ValueError: the files are damaged or do not fit the model.
    """
    argument = "adapter_name_or_path"
    saved, tensors = read_files(adapter_name_or_path, ADAPTER_FILES, use_safetensors, argument)
    source = str(Path(adapter_name_or_path) / ADAPTER_FILES.config)
    saved_name = checked_field(saved, "name", (str,), source)
    name = saved_name if load_as is None else load_as
    check_module_name(name, f"{source}: name" if load_as is None else "load_as")
    _check_hidden_size(model, saved, source)
    tensors = _prepared(model, tensors, "adapter", saved_name, name, source)
    adapter_config = _adapter_config(saved, tensors, source)
    if config is not None and AdapterConfig.load(config) != adapter_config:
        warn(f"config: ignored, {source} has another one")
    left_out = sorted({*adapter_config.leave_out, *(leave_out or ())})
    if left_out != sorted(adapter_config.leave_out):
        adapter_config = adapter_config.replace(leave_out=left_out)
    _check_bottlenecks(model, name, adapter_config, tensors, source)
    head = None
    if with_head:
        head = _read_head_beside(
            model, adapter_name_or_path, load_as, use_safetensors, id2label, strict, argument
        )

    existing = actual_config(model, name) if name in model.adapters_config.adapters else None
    is_new = _add_or_compare(
        name, adapter_config, existing, source,
        lambda: model.add_adapter(name, config=adapter_config),
    )  # fmt: skip
    try:
        if leave_out:
            tensors = _without_left_out(model, tensors, name)
        _load(model, "adapter", name, tensors, strict, source, saved.get("model_type"))
    except BaseException:
        if is_new:
            model.delete_adapter(name)
        raise
    if head is not None:
        head.apply(set_active)
    if set_active:
        model.set_active_adapters(name)
    return name


def _adapter_config(
    saved: Mapping[str, Any], tensors: Mapping[str, Tensor], source: str
) -> BnConfig:
    """The adapter's configuration, brought up to date where an early library wrote it."""
    values = dict(checked_field(saved, "config", (dict,), source))
    activation = values.get("non_linearity")
    if "version" not in saved and isinstance(activation, str):
        values["non_linearity"] = _LEGACY_ACTIVATIONS.get(activation, activation)
    # task adapters of the first library name an invertible adapter that they do not have
    has_inverse = any("invertible_adapters." in key for key in tensors)
    try:
        config = AdapterConfig.load(values)
        if saved.get("type") == "text_task" and not has_inverse:
            config = config.replace(inv_adapter=None, inv_adapter_reduction_factor=None)
        config.check_supported()
    except NotImplementedError as error:
        raise NotImplementedError(f"{source}: {error}") from error
    except ValueError as error:
        raise ValueError(f"{source}: {error}") from error
    return config


def _check_bottlenecks(
    model: nn.Module, name: str, config: BnConfig, tensors: Mapping[str, Tensor], source: str
) -> None:
    """Compare the bottlenecks of a configuration with the tensors: before memory is taken for them.

    Raises:
        ValueError: another size than the tensors have or, where they are missing, one beyond them.
    """
    paths = {module: _bare(model, path) for path, module in model.named_modules()}
    filled = [tensor for tensor in tensors.values() if tensor.numel()]
    largest = max((size for tensor in filled for size in tensor.shape), default=0)
    hidden_size = model.config.hidden_size
    for layer in model.model_adapters.layers:
        if not config.match(layer.layer_idx, layer.location):
            continue
        try:
            size = config.bottleneck_size(hidden_size, layer.layer_idx)
        except (OverflowError, ValueError) as error:
            raise ValueError(
                f"{source}: no bottleneck size from 'reduction_factor': {error}"
            ) from error
        key = f"{paths[layer.adapters]}.{name}.adapter_up.weight"
        up = tensors.get(key)
        if up is not None and list(up.shape) != [hidden_size, size]:
            raise ValueError(
                f"{source}: shapes differ: {key}: expected [{hidden_size}, {size}], from the "
                f"model's hidden_size and the file's reduction_factor; got {list(up.shape)}"
            )
        if up is None and size > largest:
            raise ValueError(
                f"{source}: missing {key}, and no tensor is as large as the bottleneck of {size} "
                "that the file's reduction_factor gives"
            )


def _add_or_compare(
    name: str, config: Any, existing: Any, source: str, add: Callable[[], None]
) -> bool:
    """Call `add` for a new name; for one with a configuration, see that it is the same."""
    if existing is None:
        add()
        return True
    if existing != config:
        raise ValueError(
            f"{source}: the model's {name!r} has another configuration; pass load_as or delete it"
        )
    logger.info("%s: new weights for %r, which the model has", source, name)
    return False


def _without_left_out(
    model: nn.Module, tensors: Mapping[str, Tensor], name: str
) -> dict[str, Tensor]:
    """Drop the tensors whose place the model has and which `leave_out` leaves empty."""
    base = getattr(model, model.base_model_prefix, model)
    kept = {}
    for key, tensor in tensors.items():
        parts = key.split(".")
        index = _name_index(parts, "adapter")
        if index is not None and parts[index] == name:
            with contextlib.suppress(AttributeError):
                if name not in base.get_submodule(".".join(parts[:index])):
                    continue
        kept[key] = tensor
    return kept


def _load(
    model: nn.Module,
    kind: str,
    name: str,
    tensors: Mapping[str, Tensor],
    strict: bool,
    source: str,
    saved_type: str | None,
) -> None:
    """Check tensors, with bare keys, against an adapter or fusion in the model; copy them there."""
    if saved_type not in (None, model.config.model_type):
        source = f"{source} (written for {saved_type!r}, the model is {model.config.model_type!r})"
    state = model.state_dict()
    selected = select({_bare(model, key): key for key in state}, kind, name)
    state = _computed(model, {key: state[key] for key in selected.values()})
    own_keys = {_bare(model, key): key for key in state}
    expected = {bare: state[key] for bare, key in own_keys.items()}
    fitting = _match(tensors, expected, strict, source)
    fitting = {own_keys[key]: tensor for key, tensor in fitting.items()}
    _check_assignable(model, fitting, source)
    _assign(model, fitting)


def _fusion_paths(model: nn.Module, name: str) -> dict[str, AdapterFusion]:
    """A fusion's module at every place, by its key without the base model's prefix."""
    paths = {module: _bare(model, path) for path, module in model.named_modules()}
    return {paths[module]: module for _, module in model.model_adapters.fusion_modules(name)}


def save_adapter_fusion(
    model: nn.Module,
    save_directory: str | os.PathLike,
    adapter_names: Fuse | Sequence[str] | str,
    meta_dict: Mapping[str, Any] | None = None,
    *,
    with_head: bool | str = False,
    use_safetensors: bool = True,
) -> None:
    """Write one fusion layer, without its adapters.

    Args:
        model: a patched model.
        save_directory: made if need be.
        adapter_names: the fusion: its name, the Fuse, or the names of its adapters.
        meta_dict: further keys of the JSON file.
        with_head: also write the head of this name; True is the fusion's own.
        use_safetensors: False writes the pickle that `adapters` reads by default.

    Raises:
        NotADirectoryError: `save_directory` is something else.
        ValueError: the model has no such fusion, or no such head.
    """
    name = fusion_name(adapter_names)
    record = model.adapters_config
    if name not in record.fusions:
        known = list(record.fusions)
        raise ValueError(
            f"adapter_names: expected one of the model's fusions {known}; got {name!r}"
        )
    head_name = name if with_head is True else with_head
    if head_name and head_name not in getattr(model, "heads", ()):
        raise ValueError(f"with_head: the model has no head {head_name!r}")
    config = _full_config(
        model,
        meta_dict,
        name=name,
        config=record.fusions[name].to_dict(),
        adapter_names=list(record.fusion_names[name]),
    )
    temperatures = {}
    for path, module in _fusion_paths(model, name).items():
        if module.temperature is not None:
            module.settle_temperature()
            temperatures[path] = module.temperature.item()
    if temperatures:
        config["temperature"] = temperatures
    tensors = _computed(model, select(_state(model), "fusion", name))
    write_files(save_directory, FUSION_FILES, config, tensors, use_safetensors, "save_directory")
    if head_name:
        save_head(model, save_directory, head_name, use_safetensors=use_safetensors)


def save_all_adapter_fusions(
    model: nn.Module,
    save_directory: str | os.PathLike,
    meta_dict: Mapping[str, Any] | None = None,
    *,
    use_safetensors: bool = True,
) -> None:
    """Write every fusion into a directory of its name; arguments as `save_adapter_fusion`.

    Raises:
        NotADirectoryError: a name's directory is something else.
        ValueError: a name cannot be that of a directory; nothing is written then.
    """
    configs = model.adapters_config.fusions
    targets = {name: subdirectory(save_directory, name) for name in configs}
    for name, target in targets.items():
        meta = {**(meta_dict or {}), "config_id": get_adapter_config_hash(configs[name])}
        save_adapter_fusion(model, target, name, meta, use_safetensors=use_safetensors)


def load_adapter_fusion(
    model: nn.Module,
    adapter_fusion_name_or_path: str | os.PathLike,
    load_as: str | None = None,
    *,
    set_active: bool = False,
    with_head: bool = True,
    strict: bool = True,
    use_safetensors: bool | None = None,
) -> str:
    """Add the fusion layer in a directory to the model, which has its adapters already.

    A fusion of the same name, configuration and adapters gets the weights of the files. Everything
    is checked before the model changes. The fusion finds its adapters by the names that the file
    lists under "adapter_names": one that was loaded with another `load_as` has to be loaded again
    under the name that it had when the fusion was saved.

    Args:
        model: a patched model.
        adapter_fusion_name_or_path: a directory, as `save_adapter_fusion` or `adapters` wrote it.
        load_as: its new name, and that of the head; the names of its adapters stay.
        set_active: activate the fusion over its adapters, and the head.
        with_head: also load the head in the directory, where there is one. One that the model
            cannot take is left, with a warning.
        strict, use_safetensors: as in `load_adapter`.

    Returns:
        The fusion's name in the model.

    Raises:
        FileNotFoundError: the directory or a file is missing.
        NotADirectoryError: `adapter_fusion_name_or_path` is something else.
        NotImplementedError: a hub's identifier, or a head that is not supported yet.
        ValueError: the files are damaged or do not fit the model, or an adapter is missing.
    """
    argument = "adapter_fusion_name_or_path"
    saved, tensors = read_files(
        adapter_fusion_name_or_path, FUSION_FILES, use_safetensors, argument
    )
    source = str(Path(adapter_fusion_name_or_path) / FUSION_FILES.config)
    saved_name = checked_field(saved, "name", (str,), source)
    name = saved_name if load_as is None else load_as
    check_module_name(name, f"{source}: name" if load_as is None else "load_as")
    _check_hidden_size(model, saved, source)
    record = model.adapters_config
    # files from before fusions had names list the adapters in the name alone
    saved.setdefault("adapter_names", saved_name.split(","))
    adapter_names = checked_field(saved, "adapter_names", (list,), source)
    if not adapter_names or not all(isinstance(n, str) for n in adapter_names):
        raise ValueError(
            f"{source}: expected names of adapters under 'adapter_names'; got {adapter_names!r}"
        )
    if missing := [n for n in adapter_names if n not in record.adapters]:
        raise ValueError(f"{source}: the model lacks the adapters {missing} of fusion {name!r}")
    try:
        config = AdapterFusionConfig.load(checked_field(saved, "config", (dict,), source))
    except ValueError as error:
        raise ValueError(f"{source}: {error}") from error
    if record.fusion_names.get(name, adapter_names) != adapter_names:
        raise ValueError(
            f"{source}: expected adapters {record.fusion_names[name]}, those of the model's fusion "
            f"{name!r}; got {adapter_names}"
        )
    temperatures = _temperatures(saved, saved_name, name, source)
    tensors = _prepared(model, tensors, "fusion", saved_name, name, source)
    head = None
    if with_head:
        head = _read_head_beside(
            model, adapter_fusion_name_or_path, load_as, use_safetensors, None, strict, argument
        )

    own_name = None if name == ",".join(adapter_names) else name
    is_new = _add_or_compare(
        name, config, record.fusions.get(name), source,
        lambda: model.add_adapter_fusion(adapter_names, config=config, name=own_name),
    )  # fmt: skip
    try:
        _load(model, "fusion", name, tensors, strict, source, saved.get("model_type"))
    except BaseException:
        if is_new:
            model.delete_adapter_fusion(name)
        raise
    for path, module in _fusion_paths(model, name).items():
        # the buffer is in no checkpoint and may have been left on the meta device
        module.reset_temperature(temperatures.get(path))
    if head is not None:
        head.apply(set_active)
    if set_active:
        model.set_active_adapters(Fuse(*adapter_names, name=own_name))
    return name


def _temperatures(
    saved: Mapping[str, Any], saved_name: str, name: str, source: str
) -> dict[str, float]:
    """Path of a fusion module, without the base model's prefix, -> its temperature."""
    temperatures = saved.get("temperature", {})
    is_valid = isinstance(temperatures, dict) and all(
        isinstance(value, (int, float)) and 1 <= value < math.inf for value in temperatures.values()
    )
    if not is_valid:
        raise ValueError(
            f"{source}: expected place -> number from 1 under 'temperature'; got {temperatures!r}"
        )
    return {
        f"{path.removesuffix(f'.{saved_name}')}.{name}": float(value)
        for path, value in temperatures.items()
    }


def save_head(
    model: nn.Module,
    save_directory: str | os.PathLike,
    head_name: str | None = None,
    *,
    use_safetensors: bool = True,
) -> None:
    """Write one prediction head.

    Args:
        model: a model with heads by name, or a transformers model whose class has a head.
        save_directory: made if need be.
        head_name: the head; None is the active one. The only head of a class has no name.
        use_safetensors: False writes the pickle that `adapters` reads by default.

    Raises:
        NotADirectoryError: `save_directory` is something else.
        ValueError: the model has no head, or none of this name.
    """
    if has_static_head(model):
        config = _full_config(
            model,
            None,
            name=None,
            config=None,
            label2id=model.config.label2id,
            num_labels=model.config.num_labels,
        )
        tensors = static_head(model)
        write_files(save_directory, HEAD_FILES, config, tensors, use_safetensors, "save_directory")
        return
    if not hasattr(model, "heads"):
        raise ValueError(f"model: {type(model).__name__} has no prediction head")
    name = model.active_head if head_name is None else head_name
    if not isinstance(name, str) or name not in model.heads:
        known = list(model.heads)
        raise ValueError(f"head_name: expected one of the model's heads {known}; got {name!r}")
    config = _full_config(model, None, name=name, config=model.heads[name].config)
    tensors = _computed(model, select(_state(model), "head", name))
    write_files(save_directory, HEAD_FILES, config, tensors, use_safetensors, "save_directory")


def save_all_heads(
    model: nn.Module, save_directory: str | os.PathLike, *, use_safetensors: bool = True
) -> None:
    """Write every head of a model with heads by name into a directory of its name.

    Args:
        model, save_directory, use_safetensors: as in `save_head`.

    Raises:
        NotADirectoryError: a name's directory is something else.
        ValueError: the model has no heads by name, or a name cannot be that of a directory; nothing
            is written then.
    """
    if not hasattr(model, "heads"):
        raise ValueError(f"model: {type(model).__name__} has no prediction heads by name")
    targets = {name: subdirectory(save_directory, name) for name in model.heads}
    for name, target in targets.items():
        save_head(model, target, name, use_safetensors=use_safetensors)


def load_head(
    model: nn.Module,
    save_directory: str | os.PathLike,
    load_as: str | None = None,
    id2label: Mapping[int, str] | None = None,
    *,
    set_active: bool = True,
    strict: bool = True,
    use_safetensors: bool | None = None,
) -> str | None:
    """Load the prediction head in a directory, in place of one of the same name.

    Args:
        model: a model with heads by name, or a transformers model of the class that wrote the head.
        save_directory: as `save_head` or `adapters` wrote it.
        load_as: its new name.
        id2label: other labels than the files have.
        set_active: make it the active head.
        strict, use_safetensors: as in `load_adapter`.

    Returns:
        The head's name; None for the only head of a class.

    Raises:
        FileNotFoundError: the directory or a file is missing.
        NotADirectoryError: `save_directory` is something else.
        NotImplementedError: a hub's identifier, or a head type that is not supported yet.
        ValueError: the files are damaged or do not fit the model.
    """
    head = _read_head(
        model, save_directory, load_as, use_safetensors, id2label, strict, "save_directory"
    )
    return head.apply(set_active)


class _ReadHead(NamedTuple):
    """A head that was read and checked, and how to give it to the model."""

    model: nn.Module
    head: PredictionHead | None
    """None for the only head of a class."""
    tensors: dict[str, Tensor]
    label2id: dict[str, int] | None

    def apply(self, set_active: bool) -> str | None:
        """Change the model; returns the head's name."""
        model = self.model
        if self.head is None:
            if self.label2id is not None:
                model.config.label2id = self.label2id
                model.config.id2label = {i: label for label, i in self.label2id.items()}
            model.load_state_dict(self.tensors, strict=False)
            return None
        name = self.head.name
        if name in model.heads and model.heads[name].config == self.head.config:
            # in place: an optimizer may hold the head's parameters
            _assign(model.heads[name], self.tensors)
            if set_active:
                model.active_head = name
            return name
        self.head.load_state_dict(self.tensors, strict=False)
        if name in model.heads:
            logger.info("head %r is replaced", name)
        model.add_prediction_head(self.head, overwrite_ok=True, set_active=set_active)
        return name


def _read_head_beside(
    model: nn.Module,
    directory: str | os.PathLike,
    load_as: str | None,
    use_safetensors: bool | None,
    id2label: Mapping[int, str] | None,
    strict: bool,
    argument: str,
) -> _ReadHead | None:
    """The head beside an adapter or fusion, if there is one that the model can take."""
    takes_heads = hasattr(model, "heads") or has_static_head(model)
    if not takes_heads or not (Path(directory) / HEAD_FILES.config).is_file():
        return None
    try:
        return _read_head(model, directory, load_as, use_safetensors, id2label, strict, argument)
    except _OtherHead as error:
        warn(f"with_head: the head is left out: {error}")
    return None


class _OtherHead(ValueError):
    """A sound head that this model cannot take."""


def _read_head(
    model: nn.Module,
    directory: str | os.PathLike,
    load_as: str | None,
    use_safetensors: bool | None,
    id2label: Mapping[int, str] | None,
    strict: bool,
    argument: str,
) -> _ReadHead:
    """Read a head and check it against the model, which is not changed."""
    saved, tensors = read_files(directory, HEAD_FILES, use_safetensors, argument)
    source = str(Path(directory) / HEAD_FILES.config)
    saved_class = checked_field(saved, "model_class", (str,), source)
    own_class = type(model).__name__
    # the first library's name for classes with heads by name
    if saved_class.replace("ModelWithHeads", "AdapterModel") != own_class:
        raise _OtherHead(f"{source}: expected a head of {own_class}; got one of {saved_class}")
    _check_hidden_size(model, saved, source)

    if not hasattr(model, "heads"):
        tensors = _match(tensors, static_head(model), strict, source)
        label2id = _static_label2id(model, saved, id2label, source)
        return _ReadHead(model, None, tensors, label2id)

    saved_name = checked_field(saved, "name", (str,), source)
    name = saved_name if load_as is None else load_as
    check_module_name(name, f"{source}: name" if load_as is None else "load_as")
    config = dict(checked_field(saved, "config", (dict,), source))
    if id2label is not None:
        config |= {"id2label": id2label, "label2id": None}
    checked_field(config, "head_type", (str,), source)
    tensors = rename(tensors, "head", saved_name, name)
    _check_head_size(config, tensors, source)
    try:
        head = head_from_config(model, name, config)
    except NotImplementedError as error:
        raise NotImplementedError(f"{source}: {error}") from error
    except ValueError as error:
        raise ValueError(f"{source}: {error}") from error
    expected = {f"heads.{name}.{key}": tensor for key, tensor in head.state_dict().items()}
    tensors = _match(tensors, expected, strict, source)
    own = {key.removeprefix(f"heads.{name}."): tensor for key, tensor in tensors.items()}
    if name in model.heads:
        _check_assignable(model.heads[name], own, source)
    return _ReadHead(model, head, own, None)


def _static_label2id(
    model: nn.Module, saved: Mapping[str, Any], id2label: Mapping[int, str] | None, source: str
) -> dict[str, int] | None:
    """Label -> number for a class with one head: the user's, or those of the file, or None."""
    argument, labels = ("id2label", id2label) if id2label else ("label2id", saved.get("label2id"))
    if not labels:
        return None
    try:
        label2id = checked_label2id(argument, labels)
    except ValueError as error:
        raise ValueError(f"{source}: {error}") from error
    # not every class has one output for each label
    num_labels = getattr(model, "num_labels", len(label2id))
    if len(label2id) != num_labels:
        raise ValueError(
            f"{source}: {argument}: expected {num_labels} labels, as many as the head has outputs; "
            f"got {list(label2id)}"
        )
    return label2id


def _check_head_size(config: Mapping[str, Any], tensors: Mapping[str, Tensor], source: str) -> None:
    """Refuse a head that is larger than its tensors: before memory is taken for it."""
    filled = [t for t in tensors.values() if t.dim() and t.numel()]
    rows = max((t.shape[0] for t in filled), default=0)
    for key, largest in (("layers", len(filled)), ("num_labels", rows)):
        size = config.get(key)
        if isinstance(size, int) and size > largest:
            raise ValueError(
                f"{source}: expected {key!r} to be at most {largest}, by the tensors; got {size}"
            )
