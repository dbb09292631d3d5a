"""One table entry per architecture: its places, its forwards and its classes.

To add an architecture, write a generator of its places (and a forward in `forwards.py` where no
existing one fits) and add an entry to `ARCHITECTURES`.
"""

import importlib
from collections.abc import Callable, Iterable, Iterator
from typing import NamedTuple

from torch import nn

from . import forwards


class Place(NamedTuple):
    """A place in a layer where adapters may sit."""

    layer_idx: int
    location: str
    """"mh_adapter" (behind attention) or "output_adapter" (behind the feed-forward)."""
    host: nn.Module
    """The module whose state-dict keys the adapters' keys start with."""
    container: str | None
    """The name of a child of `host` that holds the adapters; None: `host` itself does."""


class Architecture(NamedTuple):
    """What the library knows of a model type."""

    class_prefix: str
    """transformers' classes are `<prefix>Model` and `<prefix>PreTrainedModel`."""
    module: str
    """The module of transformers that has them."""
    base_attribute: str
    """`base_model_prefix`: the name of the base model inside models with heads."""
    places: Callable[[nn.Module], Iterator[Place]]
    """The places of a base model, first layer first."""
    forwards: Callable[[nn.Module], Iterator[tuple[nn.Module, Callable]]]
    """The modules of a base model whose forward is replaced, with the replacement."""
    masked: Callable[[nn.Module], Iterable[nn.Module]]
    """What has a forward from hidden states and tensors beside them, such as masks: layers."""
    attention_dropout: str
    """The config's field for the dropout of attention probabilities."""

    def base_class(self) -> type:
        """transformers' class of the model without a head."""
        return getattr(importlib.import_module(self.module), f"{self.class_prefix}Model")

    def pretrained_class(self) -> type:
        """transformers' class that the models of this type derive from."""
        return getattr(importlib.import_module(self.module), f"{self.class_prefix}PreTrainedModel")


def _bert_places(base_model: nn.Module) -> Iterator[Place]:
    for i, layer in enumerate(base_model.encoder.layer):
        yield Place(i, "mh_adapter", layer.attention.output, None)
        yield Place(i, "output_adapter", layer.output, None)


def _bert_forwards(base_model: nn.Module) -> Iterator[tuple[nn.Module, Callable]]:
    for place in _bert_places(base_model):
        yield place.host, forwards.bert_output


def _bert_masked(base_model: nn.Module) -> Iterator[nn.Module]:
    for layer in base_model.encoder.layer:
        yield layer
        if hasattr(layer, "crossattention"):
            # behind the first place of its layer
            yield layer.crossattention


def _distilbert_places(base_model: nn.Module) -> Iterator[Place]:
    for i, layer in enumerate(base_model.transformer.layer):
        yield Place(i, "mh_adapter", layer, "attention_adapters")
        yield Place(i, "output_adapter", layer, "output_adapters")


def _distilbert_forwards(base_model: nn.Module) -> Iterator[tuple[nn.Module, Callable]]:
    for layer in base_model.transformer.layer:
        yield layer, forwards.distilbert_block(layer)


def _bert_like(class_prefix: str, module: str, base_attribute: str) -> Architecture:
    return Architecture(
        class_prefix,
        f"transformers.models.{module}.modeling_{module}",
        base_attribute,
        _bert_places,
        _bert_forwards,
        _bert_masked,
        "attention_probs_dropout_prob",
    )


ARCHITECTURES: dict[str, Architecture] = {
    "bert": _bert_like("Bert", "bert", "bert"),
    "roberta": _bert_like("Roberta", "roberta", "roberta"),
    "xlm-roberta": _bert_like("XLMRoberta", "xlm_roberta", "roberta"),
    "electra": _bert_like("Electra", "electra", "electra"),
    "distilbert": Architecture(
        "DistilBert",
        "transformers.models.distilbert.modeling_distilbert",
        "distilbert",
        _distilbert_places,
        _distilbert_forwards,
        lambda base_model: base_model.transformer.layer,
        "attention_dropout",
    ),
}


def architecture_of(model_type: str) -> Architecture:
    """The table entry of a model type.

    Raises:
        ValueError: an architecture that is not in the table.
    """
    if model_type not in ARCHITECTURES:
        known = ", ".join(ARCHITECTURES)
        raise ValueError(f"model: expected a model of type {known}; got {model_type!r}")
    return ARCHITECTURES[model_type]
