"""The forward ops on Triton's kernels: `adapter_fusion`, `adapter_fusion_norm` and
`adapter_fusion_grouped`, each in one launch or in two.

The schedule depends on sizes alone (`schedules.py`): one launch (`one_launch.py`) where the columns
and scores of a row block fit one program and row blocks are enough programs, two
(`two_launches.py`) otherwise. The inputs of one input per adapter are stacked to [N, T, H] (one
copy), and each is multiplied with all down-projections of a tile, all but its own read as zero.
"""

from collections.abc import Sequence

from torch import Tensor

from . import one_launch, two_launches
from .groups import grouped_layout, plain_layout
from .mixtures import Mixture, Norm, Outputs
from .schedules import fits_one_launch, target_of


def _run(mixture: Mixture) -> Outputs:
    x = mixture.x[0]
    target = target_of(x.device)
    widths = mixture.layout.columns, mixture.layout.adapters
    if fits_one_launch(one_launch.schedule_of(mixture), *widths, x.dtype, target, len(x)):
        return one_launch.run(mixture, target)
    return two_launches.run(mixture, target)


def adapter_fusion(
    x: Sequence[Tensor],
    query: Tensor | None,
    residual: Tensor | None,
    w_down: Tensor,
    b_down: Tensor,
    w_score: Tensor | None,
    b_score: Tensor | None,
    w_out: Tensor,
    temperature: Tensor | None,
    mask: Tensor | None,
    score_offset: Tensor | None,
    sizes: Sequence[int],
    activations: Sequence[int],
) -> tuple[Tensor, Tensor]:
    """See `fastfusion.ops.adapter_fusion`."""
    mixture = Mixture(
        x, query, residual, None, w_down, b_down, w_score, b_score, w_out, temperature, mask,
        score_offset, plain_layout(sizes, activations, w_score is not None),
    )  # fmt: skip
    outputs = _run(mixture)
    return outputs.out, outputs.p


def adapter_fusion_norm(
    hidden: Tensor,
    input: Tensor,
    ln_weight: Tensor,
    ln_bias: Tensor,
    ln_eps: float,
    ln_before: bool,
    w_down: Tensor,
    b_down: Tensor,
    w_score: Tensor | None,
    b_score: Tensor | None,
    w_out: Tensor,
    temperature: Tensor | None,
    mask: Tensor | None,
    sizes: Sequence[int],
    activations: Sequence[int],
    save: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """See `fastfusion.ops.adapter_fusion_norm`."""
    norm = Norm(ln_weight.contiguous(), ln_bias.contiguous(), ln_eps, ln_before, save)
    mixture = Mixture(
        [hidden], None, input, None, w_down, b_down, w_score, b_score, w_out, temperature, mask,
        None, plain_layout(sizes, activations, w_score is not None), norm,
    )  # fmt: skip
    return tuple(_run(mixture))


def adapter_fusion_grouped(
    x: Tensor,
    residual: Tensor | None,
    groups: Tensor,
    w_in: Tensor,
    b_in: Tensor,
    w_out: Tensor,
    mask: Tensor | None,
    sizes: Sequence[int],
    activations: Sequence[int],
    counts: Sequence[int],
    scored: Sequence[int],
) -> tuple[Tensor, Tensor]:
    """See `fastfusion.ops.adapter_fusion_grouped`."""
    mixture = Mixture(
        [x], None, residual, groups, w_in, b_in, w_in, b_in, w_out, None, mask, None,
        grouped_layout(sizes, activations, counts, scored),
    )  # fmt: skip
    outputs = _run(mixture)
    return outputs.out, outputs.p
