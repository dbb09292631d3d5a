"""A configuration and its tensors as a pair of files: written whole or not at all.

The configuration decides: new weights wait in a hidden file, whose name holds a digest of the
configuration they belong to, until that configuration has replaced the older one in a single step.
"""

import contextlib
import hashlib
import io
import json
import logging
import os
import pickle
import re
import shutil
import uuid
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import safetensors.torch
import torch
from torch import Tensor

logger = logging.getLogger(__name__)


class FileNames(NamedTuple):
    """The files of an adapter, a fusion or a head."""

    config: str
    safetensors: str
    pickle: str


ADAPTER_FILES = FileNames("adapter_config.json", "adapter.safetensors", "pytorch_adapter.bin")
FUSION_FILES = FileNames(
    "adapter_fusion_config.json",
    "model_adapter_fusion.safetensors",
    "pytorch_model_adapter_fusion.bin",
)
HEAD_FILES = FileNames("head_config.json", "model_head.safetensors", "pytorch_model_head.bin")
SETUP_FILE = "adapter_setup.json"
"""Beside the directories of a setup's adapters, fusions and heads."""

_HUB_IDENTIFIER = re.compile(r"\w[\w.-]*/\w[\w.-]*")
"""owner/name on Hugging Face's hub; a path can look so too."""

_WRITE_ID = "fastfusion_write_id"
"""A key of the written configuration alone, with another value at every write."""


def write_files(
    directory: str | os.PathLike,
    files: FileNames,
    config: Mapping[str, Any],
    tensors: Mapping[str, Tensor],
    use_safetensors: bool = True,
    argument: str = "directory",
) -> None:
    """Write a configuration and its tensors into a directory, which is made if need be.

    The pair replaces an older one. Should an exception be raised or the process die on the way,
    `read_files` finds either the older pair or the new one, whole.

    Args:
        directory: where to.
        files: the names to write under.
        config: what json can write.
        tensors: by name. Those that share memory are written once for each name.
        use_safetensors: False for a pickle of tensors.
        argument: what the caller's user calls the directory, for errors.

    Raises:
        NotADirectoryError: `directory` is something else.
    """
    directory = checked_target(directory, argument)
    copies = {k: t.detach().to("cpu", copy=True).contiguous() for k, t in tensors.items()}
    if use_safetensors:
        payload = safetensors.torch.save(copies, metadata={"format": "pt"})
    else:
        buffer = io.BytesIO()
        torch.save(copies, buffer)
        payload = buffer.getvalue()
    text = _with_write_id(config)
    directory.mkdir(parents=True, exist_ok=True)
    config_path = directory / files.config
    weights_path = directory / (files.safetensors if use_safetensors else files.pickle)
    pending = _pending_path(weights_path, text)
    superseded = [path for name in files[1:] if (path := directory / name) != weights_path]
    if config_path.exists():  # an interrupted write may have left its weights pending
        old_text = config_path.read_bytes()
        superseded += [_pending_path(directory / name, old_text) for name in files[1:]]
    # each _sync: a power cut must not keep a later step without an earlier one
    with (
        _temporary(weights_path, payload) as weights_file,
        _temporary(config_path, text) as config_file,
    ):
        try:
            os.replace(weights_file, pending)
            _sync(directory)
            os.replace(config_file, config_path)  # from here on the new pair counts
        finally:
            if config_file.exists():  # not moved: the older pair counts, and is as it was
                pending.unlink(missing_ok=True)
            else:
                _sync(directory)
                for path in superseded:
                    path.unlink(missing_ok=True)
                _sync(directory)
                os.replace(pending, weights_path)
    _sync(directory)


def write_with_parts(
    directory: str | os.PathLike,
    name: str,
    config: Mapping[str, Any],
    write_parts: Callable[[Path], None],
    argument: str = "directory",
) -> None:
    """Write a configuration and the files that belong to it, at any depth, into a directory.

    All of it replaces what was there, as in `write_files`: should it be interrupted,
    `read_with_parts` finds the older files or the new ones, whole.

    Args:
        directory: where to.
        name: the configuration's file.
        config: what json can write.
        write_parts: writes the other files into a directory, twice: into a hidden one, which counts
            from the moment that the configuration is there, and then into their places.
        argument: as in `write_files`.

    Raises:
        NotADirectoryError: `directory` is something else.
    """
    directory = checked_target(directory, argument)
    text = _with_write_id(config)
    directory.mkdir(parents=True, exist_ok=True)
    path = directory / name
    pending = _pending_path(path, text)
    superseded = _pending_path(path, path.read_bytes()) if path.exists() else None
    with _temporary(path, text) as file:
        try:
            write_parts(pending)
            _sync(pending)
            _sync(directory)
            os.replace(file, path)  # from here on the new files count
        finally:
            if file.exists():
                shutil.rmtree(pending, ignore_errors=True)
    _sync(directory)
    if superseded is not None:
        shutil.rmtree(superseded, ignore_errors=True)
    write_parts(directory)
    _sync(directory)
    # gone in one step: half of it would count for the whole
    done = pending.with_name(f"{pending.name}.tmp")
    os.replace(pending, done)
    shutil.rmtree(done, ignore_errors=True)


def read_with_parts(
    directory: str | os.PathLike, name: str, argument: str = "directory"
) -> tuple[dict[str, Any], Path]:
    """Read the configuration that `write_with_parts` wrote.

    Args:
        directory, name, argument: as there.

    Returns:
        The configuration, and the directory where the other files are.

    Raises:
        FileNotFoundError, NotADirectoryError, NotImplementedError, ValueError: as in `read_files`.
    """
    directory = _existing_directory(directory, argument)
    config, data = _read_config(directory, name, argument)
    pending = _pending_path(directory / name, data)
    if not pending.is_dir():
        return config, directory
    logger.warning("%s: a write was interrupted; reading %s", directory, pending.name)
    return config, pending


def checked_target(directory: str | os.PathLike, argument: str) -> Path:
    """A directory to write into; raises a NotADirectoryError where there is something else."""
    directory = Path(directory)
    if directory.exists() and not directory.is_dir():
        raise NotADirectoryError(f"{argument}: expected a directory; {str(directory)!r} is a file")
    return directory


def _with_write_id(config: Mapping[str, Any]) -> bytes:
    # what waits for this file must not count for an older one that says the same
    return json.dumps({**config, _WRITE_ID: uuid.uuid4().hex}, indent=2, sort_keys=True).encode()


@contextlib.contextmanager
def _temporary(target: Path, data: bytes) -> Iterator[Path]:
    """A file beside `target`, on the disk, which is gone afterwards unless it was moved."""
    path = target.with_name(f".{target.name}.{os.getpid()}.tmp")
    try:
        with open(path, "wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        yield path
    finally:
        path.unlink(missing_ok=True)


def _pending_path(weights: Path, config: bytes) -> Path:
    """Where the weights that belong to a configuration wait for their place."""
    return weights.with_name(f".{weights.name}.{hashlib.sha256(config).hexdigest()[:16]}.new")


def _sync(directory: Path) -> None:
    if os.name == "posix":  # elsewhere a directory cannot be opened
        descriptor = os.open(directory, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)


def read_files(
    directory: str | os.PathLike,
    files: FileNames,
    use_safetensors: bool | None = None,
    argument: str = "directory",
) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """Read a configuration and its tensors, on the CPU.

    The files of a write that was interrupted are read as well, with a warning in the log.

    Args:
        directory: where from.
        files: the names to look for.
        use_safetensors: True or False for one format alone; None for the one that is there, and
            safetensors where both are.
        argument: what the caller's user calls the directory, for errors.

    Returns:
        The configuration, and the tensors by name.

    Raises:
        FileNotFoundError: the directory or one of the two files is missing.
        NotADirectoryError: `directory` is something else.
        NotImplementedError: `directory` does not exist and is a URL or looks like owner/name, a
            hub's identifier.
        ValueError: a file is damaged, of another kind, a pickle of more than tensors, or one of
            tensors without their values.
    """
    directory = _existing_directory(directory, argument)
    config, data = _read_config(directory, files.config, argument)
    weights = {name: directory / name for name in files[1:]}
    pending = {name: _pending_path(path, data) for name, path in weights.items()}
    for name, path in pending.items():
        if path.is_file():
            logger.warning(
                "%s: a write was interrupted; reading %s, which belongs to %s, in place of %s",
                directory, path.name, files.config, name,
            )  # fmt: skip
            weights = pending
    formats = {None: files[1:], True: (files.safetensors,), False: (files.pickle,)}
    names = formats[use_safetensors]
    for name in names:
        if weights[name].is_file():
            return config, _read_tensors(weights[name], name == files.pickle)
    raise FileNotFoundError(f"{argument}: no {' or '.join(names)} in {str(directory)!r}")


def _read_config(directory: Path, name: str, argument: str) -> tuple[dict[str, Any], bytes]:
    """A configuration and the bytes that it was read from."""
    path = directory / name
    if not path.is_file():
        raise FileNotFoundError(f"{argument}: no {name} in {str(directory)!r}")
    data = path.read_bytes()
    try:
        config = json.loads(data)
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path}: not a JSON file: {error}") from error
    if not isinstance(config, dict):
        raise ValueError(f"{path}: expected a JSON object; got {type(config).__name__}")
    config.pop(_WRITE_ID, None)
    return config, data


def _existing_directory(directory: str | os.PathLike, argument: str) -> Path:
    path = Path(directory)
    if path.is_dir():
        return path
    if path.exists():
        raise NotADirectoryError(f"{argument}: expected a directory; {str(path)!r} is a file")
    text = os.fspath(directory)
    if "://" in text or "@" in text or _HUB_IDENTIFIER.fullmatch(text):
        raise NotImplementedError(
            f"{argument}: {text!r} is not a directory here, and loading from URLs and hubs is not "
            "supported yet; download it and give the directory"
        )
    raise FileNotFoundError(
        f"{argument}: {text!r} does not exist (loading from a hub by identifier is not supported "
        "yet; download it and give the directory)"
    )


def _read_tensors(path: Path, is_pickle: bool) -> dict[str, Tensor]:
    data = path.read_bytes()
    try:
        if is_pickle:
            tensors = torch.load(io.BytesIO(data), map_location="cpu", weights_only=True)
        else:
            tensors = safetensors.torch.load(data)
    except pickle.UnpicklingError as error:
        name = re.search(r"GLOBAL (\S+)", str(error))
        reason = f"it asks for {name[1]}" if name else str(error).splitlines()[0]
        raise ValueError(
            f"{path}: refused, the pickle is damaged or holds more than tensors: {reason}"
        ) from error
    except Exception as error:  # the two readers raise a dozen types on damaged files
        reason = (str(error) or type(error).__name__).splitlines()[0]
        raise ValueError(f"{path}: damaged, or not a file of tensors: {reason}") from error
    if not isinstance(tensors, dict) or not all(
        isinstance(k, str) and isinstance(t, Tensor) for k, t in tensors.items()
    ):
        raise ValueError(f"{path}: expected a dictionary of tensors; got {type(tensors).__name__}")
    for key, tensor in tensors.items():
        # a pickle may name shapes without the values: they would take memory in whoever copies them
        if tensor.layout != torch.strided or tensor.is_nested or tensor.is_meta:
            kind = f"{tensor.layout}, {tensor.device}"
        elif tensor.nbytes > min(tensor.untyped_storage().nbytes(), len(data)):
            kind = f"{tensor.nbytes} bytes, of which the file has fewer"
        else:
            continue
        raise ValueError(
            f"{path}: expected dense tensors with all their values; got {key} ({kind})"
        )
    return tensors
