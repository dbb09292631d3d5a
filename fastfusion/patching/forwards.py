"""Forwards in place of those of transformers' modules, with the places of adapters in them."""

import functools
import inspect
from collections.abc import Callable
from typing import Any

from torch import Tensor, nn
from transformers.modeling_layers import GradientCheckpointingLayer


def copy_masks(_: nn.Module, args: tuple, kwargs: dict[str, Any]) -> tuple[tuple, dict] | None:
    """Before a layer: behind the first place of a Parallel all else is still of one channel."""
    hidden = kwargs["hidden_states"] if "hidden_states" in kwargs else args[0]

    def copied(value: Any) -> Any:
        if not isinstance(value, Tensor) or value.dim() < 2 or len(value) in (0, 1):
            return value
        if len(hidden) == len(value) or len(hidden) % len(value):
            return value
        return value.repeat(len(hidden) // len(value), *[1] * (value.dim() - 1))

    if all(copied(value) is value for value in (*args, *kwargs.values())):
        return None
    return tuple(map(copied, args)), {name: copied(value) for name, value in kwargs.items()}


def bert_output(module: nn.Module, hidden_states: Tensor, input_tensor: Tensor) -> Tensor:
    """SelfOutput and Output of BERT and its kin: dense, dropout, adapters and LayerNorm."""
    hidden_states = module.dropout(module.dense(hidden_states))
    layer = module.adapter_layers[0]
    return layer.forward(hidden_states, input_tensor, module.LayerNorm)


def distilbert_block(block: nn.Module) -> Callable:
    """The replacement for a DistilBERT block of the installed version of transformers."""
    takes_query = "query" in inspect.signature(block.attention.forward).parameters
    forward = _distilbert_block_v4 if takes_query else _distilbert_block_v5
    if "__call__" in vars(GradientCheckpointingLayer):
        return forward
    # else transformers checkpoints in the forward that this one replaces
    return _checkpointed(forward)


def _checkpointed(forward: Callable) -> Callable:
    @functools.wraps(forward)
    def checkpointed(block: nn.Module, *args: Any, **kwargs: Any) -> Any:
        if not (block.gradient_checkpointing and block.training):
            return forward(block, *args, **kwargs)
        function = functools.partial(forward, block, **kwargs)
        return block._gradient_checkpointing_func(function, *args)

    return checkpointed


def _distilbert_tail(block: nn.Module, attention_output: Tensor, hidden_states: Tensor) -> Tensor:
    attention_layer, output_layer = block.adapter_layers
    attention_output = attention_layer.forward(attention_output, hidden_states, block.sa_layer_norm)
    ffn_output = block.ffn(attention_output)
    return output_layer.forward(ffn_output, attention_output, block.output_layer_norm)


def _distilbert_block_v4(
    block: nn.Module,
    x: Tensor,
    attn_mask: Tensor | None = None,
    head_mask: Tensor | None = None,
    output_attentions: bool = False,
) -> tuple[Tensor, ...]:
    """transformers 4: returns a tuple, attention weights first where asked for."""
    attention_output, *weights = block.attention(
        query=x,
        key=x,
        value=x,
        mask=attn_mask,
        head_mask=head_mask,
        output_attentions=output_attentions,
    )
    # without output_attentions the attention still returns a tuple, of one
    return *weights, _distilbert_tail(block, attention_output, x)


def _distilbert_block_v5(
    block: nn.Module, hidden_states: Tensor, attention_mask: Tensor | None = None, **kwargs
) -> Tensor:
    """transformers 5: returns the hidden states."""
    attention_output, _ = block.attention(hidden_states, attention_mask=attention_mask, **kwargs)
    return _distilbert_tail(block, attention_output, hidden_states)
