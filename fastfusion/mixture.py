"""One mixture at one place, ready to run: which form, which weights, and the call of the op."""

import functools
from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from . import absorb
from .modules import AdapterFusion
from .ops import PackedWeights, adapter_fusion, adapter_fusion_norm
from .packing import PackCache


def _build(parameters: absorb.Parameters, absorbed: bool, tensors: Sequence[Tensor]):
    return absorb.pack(parameters.with_tensors(tensors), absorbed)


class Mixture:
    """A mixture's parameters with everything that decides how it is computed.

    Args:
        parameters: of the adapters and, for a Fuse, of the attention over them.
        fusion: the fusion layer, or None for a single adapter.
        packs: the place's packed weights.
        key: what the mixture is called there.
        like: [..., H]: the number of rows, the device and the dtype of what it will be run on.
        backend: as for `fastfusion.ops.adapter_fusion`.

    Raises:
        ValueError: the adapters' dtype or device is not that of `like`.
    """

    def __init__(
        self,
        parameters: absorb.Parameters,
        fusion: AdapterFusion | None,
        packs: PackCache,
        key: Any,
        like: Tensor,
        backend: str | None,
    ):
        self._parameters = parameters
        self._tensors = parameters.tensors()
        self._fusion = fusion
        self._packs = packs
        self._backend = backend
        self._dtype = self._compute_dtype(like)
        self._recorded = torch.is_grad_enabled() and any(t.requires_grad for t in self._tensors)
        hidden_size = like.shape[-1]
        columns = sum(adapter.w_down.shape[0] for adapter in parameters.adapters)
        self.absorbed = fusion is None or (
            fusion.is_absorbable()
            and absorb.prefers_absorbed(
                like.numel() // hidden_size, hidden_size, columns, self._recorded
            )
        )
        """Whether the op computes the whole mixture; otherwise the fusion's matrices stay outside."""
        self._key = (key, self.absorbed)

    def _compute_dtype(self, like: Tensor) -> torch.dtype:
        device = like.device.type
        if torch.is_autocast_enabled(device):
            return torch.get_autocast_dtype(device)
        for tensor in self._tensors:
            if tensor.dtype != like.dtype or tensor.device != like.device:
                raise ValueError(
                    f"adapters: expected {like.dtype} on {like.device} as the hidden states; got "
                    f"{tensor.dtype} on {tensor.device} (use adapter_to / adapter_fusion_to)"
                )
        return like.dtype

    def run(
        self,
        inputs: list[Tensor],
        query: Tensor | None,
        residual: Tensor | None,
        mask: Tensor | None,
    ) -> tuple[Tensor, Tensor]:
        """The mixture and its attention.

        Args:
            inputs: [..., H], one for all adapters or one for each.
            query: [..., H], or None for `inputs[0]`.
            residual: [..., H], or None.
            mask: dropout on the scores, [..., N].

        Returns:
            [..., H] and [..., N] (empty for a single adapter).
        """
        *batch, hidden_size = inputs[0].shape
        x = [self._rows(t) for t in inputs]
        query = None if query is None else self._rows(query)
        residual = None if residual is None else self._rows(residual)
        mask = None if mask is None else self._rows(mask)
        if self.absorbed:
            out, p = self._call(x, query, residual, mask, None)
        else:
            out, p = self._run_factored(x, query, residual, mask)
        return out.view(*batch, hidden_size), self._attention(p, batch, inputs[0].dtype)

    def run_norm(
        self,
        hidden: Tensor,
        input: Tensor,
        layer_norm: nn.LayerNorm,
        ln_before: bool,
        mask: Tensor | None,
    ) -> tuple[Tensor, Tensor]:
        """The mixture with the model's residual and LayerNorm around it (absorbed form only)."""
        *batch, hidden_size = hidden.shape
        norm = (layer_norm.weight, layer_norm.bias, layer_norm.eps, ln_before)
        rows = (self._rows(hidden), self._rows(input))
        mask = None if mask is None else self._rows(mask)
        if self._looks_up_in_graph(mask):
            out, p = torch.ops.fastfusion.adapter_fusion_norm_packed(*rows, *norm, *self._packed())
        else:
            out, p = adapter_fusion_norm(
                *rows, *norm, self._weights(mask), mask=mask, backend=self._backend
            )
        return out.view(*batch, hidden_size), self._attention(p, batch, hidden.dtype)

    def _rows(self, tensor: Tensor) -> Tensor:
        return tensor.reshape(-1, tensor.shape[-1]).to(self._dtype)

    @staticmethod
    def _attention(p: Tensor, batch: list[int], dtype: torch.dtype) -> Tensor:
        return p.view(*batch, -1).to(dtype) if p.dim() == 2 else p

    def _run_factored(self, x, query, residual, mask) -> tuple[Tensor, Tensor]:
        """The fusion's matrices on the rows: query' = Wk^T (Wq h + bq) in front, Wv behind."""
        attention, config = self._parameters.attention, self._fusion.config
        query = x[0] if query is None else query
        if attention.w_query is not None:
            query = F.linear(query, attention.w_query, attention.b_query)
        offset = None
        if attention.w_key is not None:
            # the same for every adapter, so it matters under dropout alone; but a recorded bias
            # must get a gradient of zeros, not none
            if mask is not None or self._recorded:
                offset = query @ attention.b_key
            query = query @ attention.w_key
        first = residual if config["residual_before"] else None
        if first is not None and mask is not None:
            shared = (query * first).sum(-1)
            offset = shared if offset is None else offset + shared
        out, p = self._call(x, query, first, mask, offset)
        if attention.w_value is not None:
            out = F.linear(out, attention.w_value)
        return (out if first is not None else out + residual), p

    def _call(self, x, query, residual, mask, offset) -> tuple[Tensor, Tensor]:
        if self._looks_up_in_graph(mask):
            return torch.ops.fastfusion.adapter_fusion_packed(x, query, residual, *self._packed())
        return adapter_fusion(
            x, query, residual, self._weights(mask),
            mask=mask, score_offset=offset, backend=self._backend,
        )  # fmt: skip

    def _weights(self, mask: Tensor | None) -> PackedWeights:
        temperature = None if self._fusion is None else self._fusion.temperature
        # traced code cannot look into the cache; a mask is there in training alone
        if self._recorded or mask is not None or torch.compiler.is_compiling():
            self._packs.drop()
            with torch.autocast(self._tensors[0].device.type, enabled=False):
                weights = absorb.pack(self._parameters, self.absorbed)
            tensors = [t if t is None else t.to(self._dtype) for t in weights[:5]]
            return PackedWeights(*tensors, temperature, *weights[6:])
        return self._pack().weights(self._tensors, temperature)

    def _pack(self):
        build = functools.partial(_build, self._parameters, self.absorbed)
        return self._packs.pack(self._key, build, self._dtype)

    def _looks_up_in_graph(self, mask: Tensor | None) -> bool:
        return mask is None and torch.compiler.is_compiling() and not torch.is_grad_enabled()

    def _packed(self) -> tuple:
        temperature = None if self._fusion is None else self._fusion.temperature
        count = 0 if self._fusion is None else len(self._parameters.adapters)
        return self._tensors, temperature, count, self._pack().handle, self._backend
