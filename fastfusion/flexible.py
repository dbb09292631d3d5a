"""Models with flexible heads: `AutoAdapterModel` and one class per architecture.

The classes are made from the architecture table when they are first asked for, so that importing
fastfusion imports no model code of transformers.
"""

import copy
import functools
import os
from typing import Any

import torch
from torch import Tensor
from transformers import AutoConfig, PretrainedConfig
from transformers.utils import ModelOutput

from .composition import AdapterCompositionBlock, Stack
from .configuration import ModelAdaptersConfig
from .context import AdapterSetup
from .heads import FlexibleHeadsMixin
from .model import ModelAdaptersMixin, init
from .patching import ARCHITECTURES, architecture_of


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

    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        token_type_ids: Tensor | None = None,
        position_ids: Tensor | None = None,
        inputs_embeds: Tensor | None = None,
        head: str | None = None,
        labels: Tensor | None = None,
        return_dict: bool | None = None,
        **kwargs: Any,
    ) -> ModelOutput | tuple:
        """The base model's output through a head.

        Args:
            input_ids: [B, S], integers; or `inputs_embeds` [B, S, H].
            attention_mask: [B, S], 1 for tokens and 0 for padding.
            token_type_ids, position_ids: [B, S], where the architecture has them.
            head: a head's name; None for that of an `AdapterSetup`, else the active one.
            labels: [B]; the output then has a loss.
            return_dict: an output object, or a tuple.
            kwargs: further arguments of the base model, and `output_adapter_fusion_attentions`,
                `output_adapter_gating_scores`: what `fastfusion.context.ForwardContext` lists.

        Returns:
            The head's output, or the base model's where no head is active.

        Raises:
            ValueError: there is no such head, or an `AdapterSetup` names an adapter or fusion that
                the model does not have.
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
        head = head or self._context_head()
        arguments = {} if labels is None else {"labels": labels}

        def run(**kwargs: Any) -> ModelOutput | tuple:
            outputs = self.base_model(**inputs, return_dict=True, **kwargs)
            if head is None and self.active_head is None:
                return outputs if return_dict else outputs.to_tuple()
            return self.forward_head(
                outputs,
                head_name=head,
                attention_mask=attention_mask,
                return_dict=return_dict,
                pooled_output=outputs.get("pooler_output"),
                **arguments,
            )

        return self._forward_with_adapters(run, (), kwargs)

    def _context_head(self) -> str | None:
        """The head that an `AdapterSetup` asks for, or that its setup brings along."""
        named = AdapterSetup.get_context_head_setup()
        last = _last_name(AdapterSetup.get_context_adapter_setup())
        return named or (last if last in self.heads else None)

    def set_active_adapters(self, adapter_setup: Any, skip_layers: list[int] | None = None) -> None:
        """Choose the adapters that every forward runs; a head of the last one's name comes along.

        Args:
            adapter_setup, skip_layers: as in `ModelAdaptersMixin.set_active_adapters`.

        Raises:
            ValueError: an adapter or fusion that the model does not have, or a forbidden nesting.
        """
        super().set_active_adapters(adapter_setup, skip_layers)
        last = _last_name(self.active_adapters)
        if last in self.heads:
            self.active_head = last

    def save_pretrained(self, save_directory: str | os.PathLike, **kwargs: Any) -> None:
        """transformers' `save_pretrained`; config.json also lists adapters, fusions and heads.

        Args:
            save_directory: where to write.
            kwargs: further arguments of transformers' method.
        """
        self.config.adapters = self.adapters_config.to_dict()
        # our own key, which adapters ignores: one value, the fusion's modules cool down together
        self.config.adapters["fusion_temperatures"] = temperatures = {}
        for name in self.adapters_config.fusions:
            for _, fusion in self.model_adapters.fusion_modules(name):
                if fusion.temperature is not None:
                    fusion.settle_temperature()
                    temperatures[name] = fusion.temperature.item()
        super().save_pretrained(save_directory, **kwargs)

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


def _last_name(setup: AdapterCompositionBlock | None) -> str | None:
    """The adapter that ends a Stack: a head of its name becomes the active one."""
    last = setup.children[-1] if isinstance(setup, Stack) else None
    return last if isinstance(last, str) else None


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
