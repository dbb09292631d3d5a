"""The literal mathematics of bottleneck adapters and AdapterFusion: the truth of every test.

Plain PyTorch, one step after the other, gradients by autograd, no rewriting. Parameters map from
the names of adapter files to tensors; configs are mappings as in `fastfusion.configuration`.
Shapes: `B` batch, `S` sequence, `H` hidden size, `d` bottleneck size, `N` adapters.
"""

from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from .ops.activations import ACTIVATIONS, activation_code

Parameters = Mapping[str, Tensor]
Config = Mapping[str, Any]
LayerNorm = Callable[[Tensor], Tensor] | None


class PreState(NamedTuple):
    """What the step before an adapter gives: its input, the fusion's query, and the residual."""

    hidden: Tensor
    query: Tensor
    residual: Tensor


def adapter_pre(
    hidden: Tensor,
    input: Tensor | None,
    layer_norm: LayerNorm,
    config: Config,
    fusion_config: Config | None = None,
) -> PreState:
    """What an adapter reads at one place of a layer.

    Semantics, for a sequential adapter (a parallel one reads `input` for all three)::

        x = layer_norm(hidden + input) if original_ln_before else hidden
        residual = hidden | hidden + input | x      # residual_before_ln: True | "post_add" | False
        query = hidden if query_before_ln else x

    Args:
        hidden: [B, S, H], the output of the sub-layer.
        input: [B, S, H], the input of the sub-layer; None where the model adds no residual here.
        layer_norm: the model's own LayerNorm of this sub-layer, or None (pre-norm models).
        config: the adapter's config.
        fusion_config: the fusion's config, for a Fuse.

    Returns:
        Three tensors [B, S, H].

    Source: `adapters` 1.3.0, methods/modeling.py, Adapter.pre_forward.
    """
    if config["is_parallel"]:
        return PreState(input, input, input)
    summed = hidden if input is None else hidden + input
    x = hidden
    if config["original_ln_before"]:
        x = summed if layer_norm is None else layer_norm(summed)
    # adapters 1.3.0 raises for "post_add" without a LayerNorm before the adapter; the sum is meant
    residual = {True: hidden, "post_add": summed, False: x}[config["residual_before_ln"]]
    query = hidden if fusion_config is not None and fusion_config["query_before_ln"] else x
    return PreState(x, query, residual)


def adapter_post(
    output: Tensor, hidden: Tensor, input: Tensor | None, layer_norm: LayerNorm, config: Config
) -> Tensor:
    """What leaves the place after its last adapter.

    Semantics::

        output = output + hidden                           # parallel adapters only
        layer_norm(output + input) if original_ln_after else output

    Args:
        output: [B, S, H], what the adapters computed.
        hidden: [B, S, H], the state as it entered the place.
        input, layer_norm, config: as in `adapter_pre`; the config of the last adapter.

    Returns:
        [B, S, H].

    Source: `adapters` 1.3.0, methods/modeling.py, post_forward.
    """
    if config["is_parallel"]:
        output = output + hidden
    if config["original_ln_after"]:
        output = output if input is None else output + input
        output = output if layer_norm is None else layer_norm(output)
    return output


def drop_path(x: Tensor, probability: float) -> Tensor:
    """Stochastic depth by row: zero a row of the batch, or scale it up.

    Args:
        x: [B, ...].
        probability: of zeroing a row, from 0 to 1.

    Returns:
        As `x`.

    Source: Huang et al. 2016.
    """
    survival = 1.0 - probability
    noise = x.new_empty([x.shape[0]] + [1] * (x.dim() - 1)).bernoulli_(survival)
    return x * (noise / survival if survival > 0 else noise)


def adapter_up(
    x: Tensor, parameters: Parameters, config: Config, scaling: float, training: bool = False
) -> Tensor:
    """The scaled up-projection of a bottleneck.

    Semantics::

        z = act(norm_before(x) @ w_down.T + b_down)                       # [B, S, d]
        up = drop_path(z @ w_up.T + b_up) * scaling                       # [B, S, H]

    Args:
        x: [B, S, H], the adapter's input.
        parameters: `adapter_down.0.weight` (`.1.` with `ln_before`), `adapter_up.weight`, ...
        config: the adapter's config.
        scaling: the config's scaling where that is a number; a learned one is in `parameters`.
        training: whether stochastic depth acts.

    Returns:
        [B, S, H].

    Raises:
        NotImplementedError: a Compacter adapter.

    Source: Houlsby et al. 2019; He et al. 2022 (scaling).
    """
    if config["phm_layer"]:
        raise NotImplementedError("phm_layer=True (Compacter) is not supported yet")
    linear = "adapter_down.0"
    if config["ln_before"]:
        norm = parameters["adapter_norm_before.weight"], parameters["adapter_norm_before.bias"]
        x = F.layer_norm(x, x.shape[-1:], *norm)
        linear = "adapter_down.1"
    activation = ACTIVATIONS[activation_code(config["non_linearity"])].forward
    z = activation(F.linear(x, parameters[f"{linear}.weight"], parameters[f"{linear}.bias"]))
    up = F.linear(z, parameters["adapter_up.weight"], parameters["adapter_up.bias"])
    if training and config["stochastic_depth"] and not config["is_parallel"]:
        up = drop_path(up, config["stochastic_depth"])
    return up * parameters.get("scaling", scaling)


def adapter_output(
    up: Tensor,
    x: Tensor,
    residual: Tensor,
    parameters: Parameters,
    config: Config,
    training: bool = False,
) -> tuple[Tensor, Tensor | None]:
    """What one adapter makes of its scaled up-projection.

    Semantics::

        out = dropout(up) * sigmoid(x @ w_gate.T + b_gate).mean(S)      # gate: use_gating only
        out = norm_after(out + residual) | norm_after(out) + residual   # adapter_residual_before_ln

    A parallel adapter adds no residual here.

    Args:
        up: [B, S, H], from `adapter_up`.
        x: [B, S, H], the adapter's input.
        residual: [B, S, H], from `adapter_pre`.
        parameters: `gate.weight`, `adapter_norm_after.weight`, ... where the config has them.
        config: the adapter's config.
        training: whether dropout acts.

    Returns:
        out [B, S, H], and the gate [B] or None.

    Source: `adapters` 1.3.0, methods/modeling.py; gating: Mao et al. 2022 (UniPELT).
    """
    out, gate = F.dropout(up, config["dropout"], training), None
    if config["use_gating"]:
        gate = F.linear(x, parameters["gate.weight"], parameters["gate.bias"]).sigmoid().mean(1)
        out = out * gate.unsqueeze(-1)
        gate = gate.squeeze(-1)
    adds_residual = not config["is_parallel"]
    if adds_residual and config["adapter_residual_before_ln"]:
        out = out + residual
    if config["ln_after"]:
        norm = parameters["adapter_norm_after.weight"], parameters["adapter_norm_after.bias"]
        out = F.layer_norm(out, out.shape[-1:], *norm)
    if adds_residual and not config["adapter_residual_before_ln"]:
        out = out + residual
    return out, gate


def adapter_fusion(
    query: Tensor,
    up: Tensor,
    residual: Tensor,
    parameters: Parameters,
    config: Config,
    temperature: Tensor | float = 1.0,
    mask: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Attention of each token over the outputs of N adapters.

    Semantics (each of query, key and value is the identity where the config switches it off)::

        a = up + residual if residual_before else up                     # [B, S, N, H]
        s = ((w_query @ query + b_query) . (w_key @ a_i + b_key)) * mask # [B, S, N]
        p = softmax(s / temperature)
        out = sum_i p_i * (w_value @ a_i) + (0 if residual_before else residual)

    Args:
        query: [B, S, H].
        up: [B, S, N, H], the adapters' scaled up-projections, before dropout, gate and residual.
        residual: [B, S, H].
        parameters: `query.weight`, `query.bias`, `key.weight`, `key.bias`, `value.weight`.
        config: the fusion's config.
        temperature: what the scores are divided by.
        mask: dropout on the scores before the softmax, [B, S, N].

    Returns:
        out [B, S, H] and p [B, S, N].

    Source: Pfeiffer et al. 2021, section 3.2; the order of the steps is that of `adapters` 1.3.0.
    """
    keys = up + residual.unsqueeze(-2) if config["residual_before"] else up
    values = keys
    if config["query"]:
        query = F.linear(query, parameters["query.weight"], parameters["query.bias"])
    if config["key"]:
        keys = F.linear(keys, parameters["key.weight"], parameters["key.bias"])
    value_first = config["value"] and config["value_before_softmax"]
    if value_first:
        values = F.linear(values, parameters["value.weight"])
    scores = (query.unsqueeze(-2) @ keys.transpose(-1, -2)).squeeze(-2)
    if mask is not None:
        scores = scores * mask
    p = torch.softmax(scores / temperature, dim=-1)
    out = (p.unsqueeze(-2) @ values).squeeze(-2)
    if config["value"] and not value_first:
        out = F.linear(out, parameters["value.weight"])
    return (out if config["residual_before"] else out + residual), p


def fusion_regularization(values: Sequence[Tensor]) -> Tensor:
    """`0.01 * sum ||I - w_value||^2` over the fusion layers' value matrices.

    Args:
        values: one or more matrices [H, H].

    Returns:
        A scalar.

    Source: `adapters` 1.3.0, model_mixin.py; Pfeiffer et al. 2021, section 3.2 (value near I).
    """
    identity = torch.eye(values[0].shape[0], dtype=values[0].dtype, device=values[0].device)
    return 0.01 * torch.stack([(identity - value).square().sum() for value in values]).sum()
