"""Models with flexible heads: `AutoAdapterModel` and one class per architecture.

The classes are made from the architecture table when they are first asked for, so that importing
fastfusion imports no model code of transformers.
"""

import copy
import functools
import os
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from transformers import AutoConfig, PretrainedConfig
from transformers.utils import ModelOutput

from .composition import BatchSplit, MultiTask, Parallel, Setup, Stack
from .configuration import ModelAdaptersConfig
from .context import AdapterSetup, ForwardContext
from .heads import FlexibleHeadsMixin, HeadRows, Heads, consecutive_rows, head_names
from .model import ModelAdaptersMixin, init, with_adapter_arguments
from .patching import ARCHITECTURES, architecture_of
from .rows import BASE, can_look_at, input_shape


class _FlexibleModel(FlexibleHeadsMixin, ModelAdaptersMixin):
    """What the classes of all architectures share; transformers' base class comes behind it."""

    _base_class: type

    def __init__(self, config: PretrainedConfig):
        # what the model carries is written into it
        super().__init__(copy.deepcopy(config))
        config = self.config
        setattr(self, self.base_model_prefix, self._base_class(config))
        init(self)
        self.post_init()
        carried = ModelAdaptersConfig.from_dict(getattr(config, "adapters", None) or {})
        for name, adapter_config in carried.adapters.items():
            self.add_adapter(name, adapter_config)
        for name, fusion_config in carried.fusions.items():
            self.add_adapter_fusion(carried.fusion_names[name], fusion_config, name=name)
        self.init_heads()

    @with_adapter_arguments
    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        token_type_ids: Tensor | None = None,
        position_ids: Tensor | None = None,
        inputs_embeds: Tensor | None = None,
        head: Heads | None = None,
        labels: Tensor | None = None,
        return_dict: bool | None = None,
        **kwargs: Any,
    ) -> ModelOutput | tuple:
        """The base model's output through a head, or through several.

        Semantics of several heads, with B rows in the batch::

            outputs = [heads[i](hidden[rows[i]], labels[rows[i]]) for i in range(len(heads))]
            loss = sum(output.loss for output in outputs)

        Under a Parallel of C channels head i has the i-th B of the C * B rows that come out, and
        all labels; under a BatchSplit it has the rows of its child, behind a Parallel in one
        channel after the other. Where no child of a BatchSplit has a head of its name, the active
        one serves all rows. With `adapter_names`,
        `adapter_ids` or the `task_ids` of a MultiTask, each row goes through the head of its
        setup's last adapter; a setup without a head of its own, such as a Fuse or "__base__", has
        the active one. Without a Parallel, each of a list of active heads reads all rows; there is
        no common loss then.

        Args:
            input_ids: [B, S], integers; or `inputs_embeds` [B, S, H].
            attention_mask: [B, S], 1 for tokens and 0 for padding.
            token_type_ids, position_ids: [B, S], where the architecture has them.
            head: a head's name, for all rows of all channels, or several as `active_head` takes
                them; None for those of an `AdapterSetup`, else of the rows, else the active ones.
            labels: [B]; the output then has a loss.
            return_dict: an output object, or a tuple; of several heads, a tuple for each.
            kwargs: further arguments of the base model; `output_adapter_fusion_attentions`,
                `output_adapter_gating_scores`: what `fastfusion.context.ForwardContext` lists; one
                of `adapter_names`, `adapter_ids`, `task_ids`: each row's setup;
                `adapter_input_parallelized=True`: inputs, mask and labels hold the batch once for
                each channel of a Parallel already, [C * B, ...].

        Returns:
            The head's output, or the base model's where no head is active. Of several heads a
            `MultiHeadOutput`. So too where rows have setups of their own, even if all end in one
            head: an entry for each head, in the order of its first row; with `adapter_ids` for each
            head that a setup in `routing`'s table has, in that order, with rows or without. A
            MultiTask whose children have no heads goes through the active one, like other blocks.

        Raises:
            ValueError: there is no such head, a channel or row has none, the batch has not the size
                that a BatchSplit needs, or an `AdapterSetup` or a row names an adapter or fusion
                that the model does not have; before the base model runs.
        """
        inputs = {
            "input_ids": input_ids,
            "attention_mask": attention_mask,
            "token_type_ids": token_type_ids,
            "position_ids": position_ids,
            "inputs_embeds": inputs_embeds,
        }
        inputs = {name: value for name, value in inputs.items() if value is not None}
        if return_dict is None:
            return_dict = self.config.return_dict
        batch_size, _ = input_shape(inputs) or (0, 0)
        has_table = kwargs.get("adapter_ids") is not None

        def run(**base_inputs: Any) -> ModelOutput | tuple:
            heads, size = self._heads_and_rows(head, batch_size, has_table)
            if isinstance(heads, list):
                _check_labels(labels, batch_size)
            outputs = self.base_model(return_dict=True, **base_inputs)
            if heads is None:
                return outputs if return_dict else outputs.to_tuple()
            arguments = {
                "attention_mask": attention_mask,
                "return_dict": return_dict,
                "pooled_output": outputs.get("pooler_output"),
            }
            if labels is not None:
                arguments["labels"] = labels
            if isinstance(heads, str):
                return self.forward_head(outputs, heads, **arguments)
            return self.forward_head_rows(outputs, heads, size, **arguments)

        return self._forward_with_adapters(run, (), inputs | kwargs)

    def _heads_and_rows(
        self, head: Heads | None, batch_size: int, has_table: bool
    ) -> tuple[str | list[HeadRows] | None, int]:
        """This forward's head, or its heads and their rows; and how many rows all channels have.

        A head that is asked for comes first, then those of rows with setups of their own, then
        those of the setup that runs.
        """
        forward, context = ForwardContext.get_context(), AdapterSetup.get_context()
        argument = "head"
        if head is None and context is not None:
            head, argument = context.head_setup, "head_setup"
        heads = self.check_heads(head, argument)
        setup, setups, numbers = forward.setup, forward.row_setups, forward.row_numbers
        channels = 1 if setup is None else setup.parallel_channels
        if forward.has_copies:
            batch_size //= channels
        size = channels * batch_size

        if heads is None:
            last = _last(setup)
            if isinstance(last, MultiTask) and any(map(self._own_head, last)):
                setups, numbers = list(last), numbers.repeat(channels)
            if setups is not None:
                return self._heads_of_rows(setups, numbers, has_table), size
            heads, argument = self._heads_of_setup(setup, context is not None), "active_head"
        elif isinstance(heads, str) and channels > 1:
            heads = [heads] * channels

        if isinstance(heads, BatchSplit):
            return consecutive_rows(heads, batch_size, channels, argument), size
        if heads is not None and channels > 1:
            if isinstance(heads, str) or len(heads) != channels:
                raise ValueError(
                    f"{argument}: expected a list of {channels} heads, one for each channel of "
                    f"{setup!r}; got {heads!r}"
                )
            rows = [slice(i * batch_size, (i + 1) * batch_size) for i in range(channels)]
            return list(map(HeadRows, heads, rows)), size
        if isinstance(heads, list):
            return [HeadRows(name, None) for name in heads], size
        return heads, size

    def _heads_of_setup(self, setup: Setup | None, is_context: bool) -> Heads | None:
        """The heads that go with the setup of a forward: a context's own, else the active ones.

        Args:
            setup: of an `AdapterSetup`, or the active one, whose own heads `set_active_adapters`
                has made the active ones.
            is_context: which of the two.

        Raises:
            ValueError: some children of a Parallel or BatchSplit have heads of their names and some
                not, and no others were chosen for each child; or none has, and the active ones came
                along with another setup, one for each of its children.
        """
        own, active = _heads_of(setup), self.active_head
        names = head_names(own)
        missing = [name for name in names if name not in self.heads]
        # heads that came along are for the children of the setup that brought them
        is_others = is_context or (self._head_came_along and len(names) > 1)
        if is_others and names and not missing:
            return self.check_heads(own, "head_setup")
        is_partial = 0 < len(missing) < len(names)
        if is_others:
            is_wrong = is_partial or (len(names) > 1 and isinstance(active, (list, BatchSplit)))
        elif isinstance(own, BatchSplit):
            # another head may be there from before; a BatchSplit of them was chosen
            is_wrong = is_partial and not isinstance(active, BatchSplit)
        else:
            is_wrong = is_partial and active is None
        if is_wrong:
            argument = "head_setup" if is_context else "active_head"
            raise ValueError(
                f"{argument}: expected a head for each child of {setup!r}; the model has none for "
                f"{missing}"
            )
        return active

    def _own_head(self, setup: Setup | None) -> str | None:
        """The head of a row's or task's last adapter, if there is one."""
        name = _heads_of(setup)
        return name if name in self.heads else None

    def _heads_of_rows(
        self, setups: Sequence[Setup | None], numbers: Tensor, has_table: bool = False
    ) -> list[HeadRows] | None:
        """The heads of rows with setups of their own, in the order of their first rows.

        Args:
            setups: of which each row has one.
            numbers: [rows], which one.
            has_table: take the heads of all setups, in their order, so that they do not depend on
                the numbers.

        Raises:
            ValueError: a row has no head, while others have.
        """
        active = self.active_head
        heads = [self._own_head(setup) or active for setup in setups]
        if not any(heads):
            return None
        order = range(len(setups))
        # on a GPU nobody waits for the numbers, unless the order asks for them
        used = order
        if not has_table or can_look_at(numbers):
            used = list(dict.fromkeys(numbers.tolist()))
        for i in used:
            if not isinstance(heads[i], str):
                raise ValueError(
                    f"active_head: expected one head, for rows with {setups[i] or BASE!r}; "
                    f"got {heads[i]!r}"
                )
        names = dict.fromkeys(heads[i] for i in (order if has_table else used))
        names = [name for name in names if isinstance(name, str)]
        if set(heads) == set(names) and len(names) == 1:
            # all rows, whatever the numbers: a compiled graph may have no size that depends on them
            return [HeadRows(names[0], torch.arange(len(numbers), device=numbers.device))]
        places = [names.index(name) if name in names else -1 for name in heads]
        place_of_row = torch.tensor(places, device=numbers.device)[numbers.long()]
        return [
            HeadRows(name, (place_of_row == i).nonzero(as_tuple=True)[0])
            for i, name in enumerate(names)
        ]

    def set_active_adapters(self, adapter_setup: Any, skip_layers: list[int] | None = None) -> None:
        """Choose the adapters that every forward runs; the heads of their names come along.

        A name brings its head, a Stack what its last element brings, a Parallel a list of its
        children's heads, a BatchSplit a BatchSplit of them. Where the model lacks one, and for
        other blocks, the active head stays; one that came along serves no Parallel or BatchSplit
        some of whose children have heads, nor do several that came along: a forward then raises.

        Args:
            adapter_setup, skip_layers: as in `ModelAdaptersMixin.set_active_adapters`.

        Raises:
            ValueError: an adapter, fusion or layer that the model does not have, or a forbidden
                nesting.
        """
        super().set_active_adapters(adapter_setup, skip_layers)
        heads = _heads_of(self.active_adapters)
        if heads is not None and all(name in self.heads for name in head_names(heads)):
            self.active_head = heads
            self._head_came_along = True

    @classmethod
    def from_pretrained(cls, *args: Any, **kwargs: Any) -> Any:
        """transformers' `from_pretrained`, with the fusions' temperatures.

        Args:
            args, kwargs: as transformers takes them.

        Returns:
            The model, in evaluation mode; with `output_loading_info=True` what transformers
            reports too.
        """
        loaded = super().from_pretrained(*args, **kwargs)
        model = loaded[0] if isinstance(loaded, tuple) else loaded
        temperatures = (getattr(model.config, "adapters", None) or {}).get(
            "fusion_temperatures", {}
        )
        # no parameters, so transformers leaves them as its empty model had them
        for name in model.adapters_config.fusions:
            for _, fusion in model.model_adapters.fusion_modules(name):
                fusion.reset_temperature(temperatures.get(name))
        return loaded


def _last(setup: Setup | None) -> Setup | None:
    """The last element of a Stack, or the block itself."""
    return setup.children[-1] if isinstance(setup, Stack) else setup


def _heads_of(setup: Setup | None) -> Heads | None:
    """The names of the heads that a setup's last element would have."""
    last = _last(setup)
    if not isinstance(last, (Parallel, BatchSplit)):
        return last if isinstance(last, str) else None
    names = [child if isinstance(child, str) else child.last() for child in last]
    return names if isinstance(last, Parallel) else BatchSplit(*names, batch_sizes=last.batch_sizes)


def _check_labels(labels: Tensor | None, batch_size: int) -> None:
    if labels is not None and (labels.dim() == 0 or len(labels) != batch_size):
        raise ValueError(f"labels: expected [{batch_size}, ...]; got {list(labels.shape)}")


@functools.cache
def adapter_model_class(model_type: str) -> type:
    """The class with flexible heads of a model type.

    Args:
        model_type: a transformers configuration's `model_type`, such as "bert".

    Raises:
        ValueError: an architecture that is not supported.
    """
    architecture = architecture_of(model_type)
    name = f"{architecture.class_prefix}AdapterModel"
    members = {
        "__module__": __name__,
        "__doc__": f"{architecture.class_prefix} with adapters and flexible heads.",
        "_base_class": architecture.base_class(),
        "base_model_prefix": architecture.base_attribute,
    }
    return type(name, (_FlexibleModel, architecture.pretrained_class()), members)


_MODEL_TYPES = {f"{entry.class_prefix}AdapterModel": key for key, entry in ARCHITECTURES.items()}
CLASS_NAMES = tuple(_MODEL_TYPES)
"""The names of the classes with flexible heads."""


def __getattr__(name: str) -> type:
    if name in _MODEL_TYPES:
        return adapter_model_class(_MODEL_TYPES[name])
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


class AutoAdapterModel:
    """The class with flexible heads that fits a config or a saved model."""

    def __init__(self) -> None:
        raise TypeError("AutoAdapterModel: use from_pretrained(path) or from_config(config)")

    @classmethod
    def from_pretrained(
        cls, pretrained_model_name_or_path: str | os.PathLike, *args: Any, **kwargs: Any
    ) -> torch.nn.Module:
        """Load a saved model as `transformers.AutoModel.from_pretrained` does.

        Args:
            pretrained_model_name_or_path, args, kwargs: as transformers takes them.

        Returns:
            A model with flexible heads, in evaluation mode, with the adapters, fusions and heads
            that were saved with it.

        Raises:
            ValueError: an architecture that is not supported.
        """
        config = kwargs.get("config")
        if config is None:
            config = AutoConfig.from_pretrained(pretrained_model_name_or_path, **kwargs)
        model_class = adapter_model_class(config.model_type)
        return model_class.from_pretrained(pretrained_model_name_or_path, *args, **kwargs)

    @classmethod
    def from_config(cls, config: PretrainedConfig, **kwargs: Any) -> torch.nn.Module:
        """Make a model with fresh weights.

        Args:
            config: the model's configuration, which is copied.
            kwargs: as `transformers.AutoModel.from_config` takes them.

        Returns:
            A model with flexible heads, with the adapters, fusions and heads that `config` lists.

        Raises:
            ValueError: an architecture that is not supported.
        """
        return adapter_model_class(config.model_type)._from_config(config, **kwargs)
