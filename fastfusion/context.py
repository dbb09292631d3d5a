"""What holds for one thread and one call: the setup to use, and what a forward runs and reports."""

import threading
from collections.abc import Iterable, Mapping, Sequence
from types import MappingProxyType
from typing import Any

import torch
from torch import Tensor

from .composition import AdapterCompositionBlock, BatchSplit, Setup, parse_composition

_local = threading.local()


class AdapterSetup:
    """Use a setup for the calls inside a `with` block, in this thread alone.

    Semantics::

        with AdapterSetup(Stack("a", "b")):
            model(**inputs)             # as after model.set_active_adapters(Stack("a", "b"))

    Args:
        adapter_setup: as for `set_active_adapters`; None runs the model without adapters.
        head_setup: the head to use, or several, as `active_head` takes them; None: those that the
            setup brings along, as `set_active_adapters` chooses them.
        skip_layers: numbers of layers that run without adapters; None: those of
            `set_active_adapters`.

    Raises:
        ValueError: at the call of the model, for a name or a layer that the model does not have,
            and for a Parallel or BatchSplit some of whose children have heads of their names and
            some not.
    """

    def __init__(
        self,
        adapter_setup: Setup | None,
        head_setup: str | Sequence[str] | BatchSplit | None = None,
        skip_layers: Sequence[int] | None = None,
    ):
        self.adapter_setup: AdapterCompositionBlock | None = parse_composition(adapter_setup)
        self.head_setup = head_setup
        # what is no list, the model refuses; an iterator is read once
        self.skip_layers = list(skip_layers) if isinstance(skip_layers, Iterable) else skip_layers

    def __enter__(self) -> "AdapterSetup":
        # the thread's own list: one object may be entered in several threads at once
        _local.setups = [*getattr(_local, "setups", ()), self]
        return self

    def __exit__(self, *_: Any) -> None:
        _local.setups = _local.setups[:-1]

    @staticmethod
    def get_context() -> "AdapterSetup | None":
        """The innermost block that this thread is in, or None."""
        setups = getattr(_local, "setups", None)
        return setups[-1] if setups else None

    @classmethod
    def get_context_adapter_setup(cls) -> AdapterCompositionBlock | None:
        """The setup of this thread's innermost block, or None."""
        context = cls.get_context()
        return None if context is None else context.adapter_setup

    @classmethod
    def get_context_head_setup(cls) -> str | Sequence[str] | BatchSplit | None:
        """The head, or heads, that this thread's innermost block asks for, or None."""
        context = cls.get_context()
        return None if context is None else context.head_setup


class ForwardContext:
    """What one forward of a model runs at its places, and is to report beside its outputs.

    Args:
        plans: the plan of each place; a place that is not among them is another model's.
        output_adapter_fusion_attentions: collect `adapter_fusion_attentions`, a tensor [B, S, N]
            for each `[fusion][layer][location]`.
        output_adapter_gating_scores: collect `adapter_gating_scores`, a tensor [B] for each
            `[adapter][layer][location]`.
        setup: the one of all rows; None too where they have setups of their own.
        row_setups: distinct setups, one of which each row has.
        row_numbers: [B], integers: which of `row_setups`, or of a MultiTask's children, a row has.
        past: tokens before those of the forward, in its key-value cache.
        has_copies: whether the rows hold the batch once for each channel of a Parallel already.
    """

    ARGUMENTS = ("output_adapter_fusion_attentions", "output_adapter_gating_scores")
    """The keyword arguments that a patched model's forward takes for it."""

    def __init__(
        self,
        output_adapter_fusion_attentions: bool = False,
        output_adapter_gating_scores: bool = False,
        plans: Mapping[Any, Any] = MappingProxyType({}),
        setup: AdapterCompositionBlock | None = None,
        row_setups: tuple[AdapterCompositionBlock | None, ...] | None = None,
        row_numbers: Tensor | None = None,
        past: int = 0,
        has_copies: bool = False,
    ):
        self.output_adapter_fusion_attentions = output_adapter_fusion_attentions
        self.output_adapter_gating_scores = output_adapter_gating_scores
        self.plans = plans
        self.setup = setup
        self.row_setups = row_setups
        self.row_numbers = row_numbers
        self.past = past
        self.has_copies = has_copies
        self._moved_numbers = row_numbers
        self._records: dict[str, dict] = {}
        self._outer: ForwardContext | None = None

    def __enter__(self) -> "ForwardContext":
        self._outer = self.get_context()
        _local.forward = self
        return self

    def __exit__(self, *_: Any) -> None:
        _local.forward = self._outer

    @staticmethod
    def get_context() -> "ForwardContext | None":
        """The forward that this thread is in, or None."""
        return getattr(_local, "forward", None)

    def silent(self) -> "ForwardContext":
        """The same plans and rows, and nothing to report."""
        return ForwardContext(
            plans=self.plans,
            setup=self.setup,
            row_setups=self.row_setups,
            row_numbers=self.row_numbers,
            past=self.past,
            has_copies=self.has_copies,
        )

    def row_numbers_on(self, device: torch.device) -> Tensor:
        """The row numbers on a device, moved there once."""
        if self._moved_numbers.device != device:
            self._moved_numbers = self.row_numbers.to(device)
        return self._moved_numbers

    def record(
        self,
        output: str,
        name: str,
        layer_idx: int,
        location: str,
        value: Tensor,
        own: Tensor | None = None,
    ) -> None:
        """Note a value of one place, detached: no copy and no wait for the device.

        Rows and tokens that go other ways have zeros; what a place computes twice, as in
        `Stack(Fuse("a", "b"), "c", Fuse("a", "b"))`, counts as computed last.

        Args:
            output: which output it belongs to, such as "adapter_fusion_attentions".
            name: the fusion's or adapter's name.
            layer_idx, location: the place.
            value: attentions [B, S, N] or gates [B].
            own: [B, S] or [B], where the value holds; None: everywhere.
        """
        layers = self._records.setdefault(output, {}).setdefault(name, {})
        places, value = layers.setdefault(layer_idx, {}), value.detach()
        if own is not None:
            own = own.view(*own.shape, *[1] * (value.dim() - own.dim()))
            value = torch.where(own, value, places.get(location, torch.zeros_like(value)))
        places[location] = value

    def outputs(self) -> dict[str, dict[str, dict[int, dict[str, Tensor]]]]:
        """What was asked for, by output name: `[name][layer][location]`."""
        asked = [name.removeprefix("output_") for name in self.ARGUMENTS if getattr(self, name)]
        return {name: self._records.get(name, {}) for name in asked}
