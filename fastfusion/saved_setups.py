"""Setups as files, in the format of `adapters`: a block, and a directory for each part it names.

Beside `adapter_setup.json` the adapters, fusions and heads of a setup have directories of their
names, as `serialization.py` writes them. A setup is written whole or not at all, and read so too.
"""

import contextlib
import os
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from torch import nn

from .composition import (
    AdapterCompositionBlock,
    BatchSplit,
    Fuse,
    Parallel,
    Setup,
    parse_composition,
)
from .files import SETUP_FILE, checked_target, read_with_parts, write_with_parts
from .serialization import (
    FORMAT_VERSION,
    LIBRARY_VERSION,
    checked_field,
    has_static_head,
    load_adapter,
    load_adapter_fusion,
    load_head,
    save_adapter,
    save_adapter_fusion,
    save_head,
    select,
    static_head,
    subdirectory,
    warn,
)

HeadSetup = bool | str | list[str] | AdapterCompositionBlock | None


def save_adapter_setup(
    model: nn.Module,
    save_directory: str | os.PathLike,
    adapter_setup: Setup | Sequence,
    head_setup: HeadSetup = None,
    meta_dict: Mapping[str, Any] | None = None,
    *,
    use_safetensors: bool = True,
) -> None:
    """Write a setup with its adapters and fusions and their heads, each in a directory of its name.

    It replaces an older one; should the write be interrupted, `load_adapter_setup` finds the older
    one or the new one, whole.

    Args:
        model: a patched model.
        save_directory: made if need be.
        adapter_setup: a name or a block, as for `set_active_adapters`.
        head_setup: the heads that the setup is to run with: a name, a list, or a BatchSplit or
            Parallel of names; True is what is active, or the only head of a class. They are
            written beside those that `save_adapter` writes with the adapters.
        meta_dict: further keys of the JSON files.
        use_safetensors: False writes the pickles that `adapters` reads by default.

    Raises:
        NotADirectoryError: `save_directory`, or the directory of a name in it, is something else.
        ValueError: the model lacks a part of the setup or of the heads, or a name cannot be that of
            a directory; nothing is written then.
    """
    setup = parse_composition(adapter_setup)
    if setup is None:
        raise ValueError(f"adapter_setup: expected adapters; got {adapter_setup!r}")
    model.model_adapters.check_setup(setup)
    heads = _checked_head_setup(model, head_setup)
    directory = checked_target(save_directory, "save_directory")
    adapters, fusions, head_names = _setup_names(setup, heads)
    for name in (*adapters, *fusions, *head_names):
        checked_target(subdirectory(directory, name), "save_directory")

    def write_parts(directory: Path) -> None:
        for name in adapters:
            save_adapter(
                model, directory / name, name, True, meta_dict, use_safetensors=use_safetensors
            )
        for name in fusions:
            save_adapter_fusion(
                model, directory / name, name, meta_dict, use_safetensors=use_safetensors
            )
        for name in head_names:
            save_head(model, directory / name, name, use_safetensors=use_safetensors)
        if heads is True:
            save_head(model, directory, use_safetensors=use_safetensors)

    with_adapters = adapters if has_static_head(model) else getattr(model, "heads", ())
    config = {
        "adapter_setup": setup.to_dict(),
        "head_setup": heads.to_dict() if isinstance(heads, AdapterCompositionBlock) else heads,
        # a directory may hold another head from before
        "heads": sorted({*head_names, *(name for name in adapters if name in with_adapters)}),
        "version": FORMAT_VERSION,
        "fastfusion_version": LIBRARY_VERSION,
    }
    write_with_parts(directory, SETUP_FILE, config, write_parts, "save_directory")


def load_adapter_setup(
    model: nn.Module,
    adapter_setup_name_or_path: str | os.PathLike,
    *,
    set_active: bool = False,
    strict: bool = True,
    use_safetensors: bool | None = None,
) -> tuple[AdapterCompositionBlock, HeadSetup]:
    """Add the adapters, fusions and heads of the setup in a directory to the model.

    Those that the model has already, with the same configuration, get the weights of the files. The
    model is as it was if anything does not fit.

    Args:
        model: a patched model.
        adapter_setup_name_or_path: a directory, as `save_adapter_setup` or `adapters` wrote it.
        set_active: activate the setup and its heads: those it was saved with, else those that
            `set_active_adapters` finds.
        strict, use_safetensors: as in `load_adapter`.

    Returns:
        The setup, and the heads that it was saved with: a name, a list, a block, True for the only
        head of a class, or None.

    Raises:
        FileNotFoundError: the directory, or a file or directory in it, is missing.
        NotADirectoryError: `adapter_setup_name_or_path` is something else.
        NotImplementedError: a hub's identifier, or a method or head that is not supported yet.
        ValueError: the files are damaged or do not fit the model or each other.
    """
    argument = "adapter_setup_name_or_path"
    saved, directory = read_with_parts(adapter_setup_name_or_path, SETUP_FILE, argument)
    source = str(Path(adapter_setup_name_or_path) / SETUP_FILE)
    setup = _read_setup(saved, "adapter_setup", source)
    head_setup = saved.get("head_setup")
    if isinstance(head_setup, dict):
        head_setup = _read_setup(saved, "head_setup", source)
    heads = _head_setup_of_file(model, head_setup, source)
    adapters, fusions, head_names = _setup_names(setup, heads)
    for name in (*adapters, *fusions, *head_names):
        if not subdirectory(directory, name).is_dir():
            raise FileNotFoundError(
                f"{argument}: no directory {name!r} in {str(directory)!r}, which {SETUP_FILE} names"
            )
    # adapters does not list them
    listed = checked_field(saved, "heads", (list,), source) if "heads" in saved else adapters

    arguments = {"strict": strict, "use_safetensors": use_safetensors}
    with _all_or_nothing(model, adapters, fusions, head_names):
        for name in adapters:
            path, with_head = directory / name, name in listed and name not in head_names
            load_adapter(model, path, load_as=name, with_head=with_head, **arguments)
        for name in fusions:
            load_adapter_fusion(model, directory / name, name, with_head=False, **arguments)
        for name in head_names:
            load_head(model, directory / name, name, set_active=False, **arguments)
        own_head = (
            load_head(model, directory, set_active=False, **arguments) if heads is True else None
        )
        model.model_adapters.check_setup(setup)
        if set_active:
            model.set_active_adapters(setup)
            if own_head or head_names:
                model.active_head = own_head or heads
    return setup, head_setup or None


def _setup_names(
    setup: AdapterCompositionBlock, heads: HeadSetup
) -> tuple[list[str], list[str], list[str]]:
    """The adapters, fusions and heads that belong to a setup."""
    fusions = {block.name for block in (setup, *setup) if isinstance(block, Fuse)}
    names = [heads] if isinstance(heads, str) else [] if heads in (None, True) else heads
    return sorted(setup.flatten()), sorted(fusions), sorted(set(names))


def _checked_head_setup(model: nn.Module, head_setup: HeadSetup) -> HeadSetup:
    """The heads to save with a setup, as `check_heads` gives them; True for those of a class."""
    if head_setup is None or head_setup is False:
        return None
    if has_static_head(model) and head_setup is not True:
        raise ValueError(
            f"head_setup: expected True or None for a class's head; got {head_setup!r}"
        )
    if not has_static_head(model) and not hasattr(model, "heads"):
        raise ValueError(f"head_setup: {type(model).__name__} has no heads; got {head_setup!r}")
    if has_static_head(model):
        return True
    if head_setup is True:
        head_setup = model.active_head
        if head_setup is None:
            raise ValueError("head_setup: expected an active head, to be saved with True; got none")
    return model.check_heads(head_setup, "head_setup")


def _head_setup_of_file(model: nn.Module, head_setup: Any, source: str) -> HeadSetup:
    """The heads that the model is to load; None, with a warning, where it cannot take any."""
    names = [head_setup] if isinstance(head_setup, str) else head_setup
    if isinstance(names, (list, BatchSplit, Parallel)):
        is_valid = all(isinstance(name, str) for name in names)
    else:
        is_valid = names is None or isinstance(names, bool)
    if not is_valid:
        raise ValueError(
            f"{source}: expected true, null, a name, a list, or a BatchSplit or Parallel of names "
            f"under 'head_setup'; got {head_setup!r}"
        )
    if not head_setup:
        return None
    if hasattr(model, "heads") or (head_setup is True and has_static_head(model)):
        return head_setup
    warn(f"{source}: {type(model).__name__} cannot take the heads {head_setup!r}")
    return None


def _read_setup(saved: Mapping[str, Any], key: str, source: str) -> AdapterCompositionBlock:
    try:
        setup = parse_composition(AdapterCompositionBlock.from_dict(saved.get(key)))
        names = [block.name for block in (setup, *setup) if isinstance(block, Fuse)]
        if all(isinstance(name, str) for name in names):
            return setup
        reason = "a Fuse whose name is no text"
    except (RecursionError, ValueError) as error:
        reason = str(error)[:200]
    raise ValueError(
        f"{source}: expected a setup under {key!r}, in the form of `to_dict` ({reason}); "
        f"got {str(saved.get(key))[:200]}"
    )


@contextlib.contextmanager
def _all_or_nothing(
    model: nn.Module, adapters: list[str], fusions: list[str], heads: list[str]
) -> Iterator[None]:
    """On an error the model has the adapters, fusions, heads and weights from before."""
    record = model.adapters_config
    old_adapters, old_fusions = set(record.adapters), set(record.fusions)
    old_heads = dict(getattr(model, "heads", {}))
    state = model.state_dict()
    kept = static_head(model) if has_static_head(model) else {}
    for kind, names in (("adapter", adapters), ("fusion", fusions), ("head", old_heads)):
        for name in names:
            kept |= select(state, kind, name)
    kept = {key: tensor.clone() for key, tensor in kept.items()}
    temperatures = {}
    for name in fusions:
        for _, module in model.model_adapters.fusion_modules(name):
            module.settle_temperature()
            temperatures[module] = module.temperature
    labels = model.config.label2id, model.config.id2label
    try:
        yield
    except BaseException:
        for name in set(record.fusions) - old_fusions:
            model.delete_adapter_fusion(name)
        for name in set(record.adapters) - old_adapters:
            model.delete_adapter(name)
        for name in list(getattr(model, "heads", ())):
            if name not in old_heads:
                model.delete_head(name)
            elif model.heads[name] is not old_heads[name]:
                model.add_prediction_head(old_heads[name], overwrite_ok=True, set_active=False)
        model.load_state_dict(kept, strict=False)
        for module, temperature in temperatures.items():
            module.temperature = temperature
        model.config.label2id, model.config.id2label = labels
        raise
