"""Which row of a batch has which setup: what a forward's arguments say, checked before it runs."""

import math
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from .composition import (
    AdapterCompositionBlock,
    BatchSplit,
    MultiTask,
    Parallel,
    blocks,
    parse_composition,
)
from .lowering import OneOrRows, Plan, lower

BASE = "__base__"
"""In place of an adapter's name: a row without adapters."""

Shape = tuple[int, int]
"""Rows and tokens of a batch."""


def input_shape(inputs: Mapping[str, Any]) -> Shape | None:
    """The rows and tokens of a forward's inputs by name, or None where they cannot be found."""
    ids = inputs.get("input_ids")
    if isinstance(ids, Tensor) and ids.dim() >= 2:
        return math.prod(ids.shape[:-1]), ids.shape[-1]
    embeddings = inputs.get("inputs_embeds")
    if isinstance(embeddings, Tensor) and embeddings.dim() >= 3:
        return math.prod(embeddings.shape[:-2]), embeddings.shape[-2]
    return None


def channel_shape(shape: Shape, channels: int, argument: str) -> Shape:
    """The shape of one channel where a batch holds a copy for each of them.

    Raises:
        ValueError: the rows cannot be shared out.
    """
    size, length = shape
    if size % channels:
        raise ValueError(
            f"{argument}: expected a batch of {channels} copies, one for each channel of the "
            f"Parallel; got {size} rows"
        )
    return size // channels, length


def parse_row(entry: Any, argument: str) -> AdapterCompositionBlock | None:
    """One row's setup: a name, a block, or "__base__".

    Raises:
        ValueError: none of these, or a block over rows.
    """
    if not isinstance(entry, (str, AdapterCompositionBlock)) or entry == "":
        raise ValueError(
            f"{argument}: expected names, blocks or {BASE!r}, one for each row; got {entry!r}"
        )
    setup = None if entry == BASE else parse_composition(entry)
    for block in blocks(setup):
        if isinstance(block, (BatchSplit, Parallel, MultiTask)):
            raise ValueError(
                f"{argument}: expected blocks over one row; got {type(block).__name__} in {entry!r}"
            )
    return setup


def row_numbers(
    names: Sequence[Any], shape: Shape | None
) -> tuple[tuple[AdapterCompositionBlock | None, ...], Tensor]:
    """The distinct setups of a batch's rows, in an order of their own, and each row's number.

    Args:
        names: one entry for each row, or a single one for all.
        shape: of the batch.

    Raises:
        ValueError: a wrong number of entries, or an entry that is no setup of one row.
    """
    if isinstance(names, str) or not isinstance(names, Sequence):
        raise ValueError(f"adapter_names: expected a list with one entry a row; got {names!r}")
    setups = [parse_row(name, "adapter_names") for name in names]
    if shape is not None and len(setups) == 1:
        setups = setups * shape[0]
    if not setups or (shape is not None and len(setups) != shape[0]):
        expected = "one or more" if shape is None else f"{shape[0]}, one for each row, or 1"
        raise ValueError(f"adapter_names: expected {expected}; got {len(setups)} entries")
    # batches with the same setups share a plan, whichever comes first
    distinct = tuple(sorted(set(setups), key=repr))
    number = {setup: i for i, setup in enumerate(distinct)}
    return distinct, torch.tensor([number[setup] for setup in setups])


def can_look_at(numbers: Tensor) -> bool:
    """Whether a value can be read without a wait for a GPU or a break in a compiled graph."""
    return numbers.device.type == "cpu" and not torch.compiler.is_compiling()


def checked_numbers(numbers: Any, count: int, argument: str, shape: Shape | None) -> Tensor:
    """Row numbers as a tensor [B].

    Args:
        numbers: integers from 0 to `count - 1`. On a GPU and in compiled code the values are not
            looked at, and those outside count as the nearest.

    Raises:
        ValueError: not one integer for each row, or one out of range.
    """
    rows = "B" if shape is None else shape[0]
    try:
        tensor = torch.as_tensor(numbers)
    except (TypeError, ValueError, RuntimeError):
        raise ValueError(f"{argument}: expected integers [{rows}]; got {numbers!r}") from None
    is_integer = tensor.dtype in (torch.int64, torch.int32)
    if tensor.dim() != 1 or not is_integer or (shape is not None and len(tensor) != shape[0]):
        raise ValueError(
            f"{argument}: expected integers [{rows}]; got {tensor.dtype} {list(tensor.shape)}"
        )
    if not can_look_at(tensor):
        # where the values cannot be looked at, none may reach beyond the table
        return tensor.clamp(0, count - 1)
    if tensor.numel():
        low, high = int(tensor.min()), int(tensor.max())
        if low < 0 or high >= count:
            wrong = low if low < 0 else high
            raise ValueError(f"{argument}: expected numbers from 0 to {count - 1}; got {wrong}")
    return tensor


def task_numbers(
    setup: AdapterCompositionBlock | None, tasks: Any, shape: Shape | None
) -> Tensor | None:
    """The children of a setup's MultiTask that the rows have.

    Args:
        setup: the forward's.
        tasks: the children's numbers or names, one for each row, or None.

    Raises:
        ValueError: `task_ids` without a MultiTask, a MultiTask without them, or wrong ones.
    """
    found = [block for block in blocks(setup) if isinstance(block, MultiTask)]
    if not found and tasks is None:
        return None
    if not found or tasks is None:
        raise ValueError(
            "task_ids: expected together with a MultiTask; got "
            + (f"none for {setup!r}" if found else f"some for {setup!r}")
        )
    children = list(found[0])
    if isinstance(tasks, (list, tuple)) and any(isinstance(task, str) for task in tasks):
        for task in tasks:
            if task not in children:
                raise ValueError(f"task_ids: expected children of {found[0]!r}; got {task!r}")
        tasks = [children.index(task) for task in tasks]
    return checked_numbers(tasks, len(children), "task_ids", shape)


def needed(setup: OneOrRows) -> Plan:
    """The plan of a setup where every adapter is present: it has the sizes that a batch must have.

    Raises:
        ValueError: parts of the setup, or setups of the rows, that ask for different sizes.
    """
    return lower(setup, lambda name: True)


def check_sizes(plan: Plan, shape: Shape | None, past: int = 0) -> None:
    """Raise a ValueError unless a batch has the sizes that a plan asks for.

    Args:
        plan: the plan.
        shape: of the batch.
        past: tokens before it in its key-value cache.
    """
    if shape is not None:
        batch_size, length = shape
        plan.check(batch_size, past + length)
