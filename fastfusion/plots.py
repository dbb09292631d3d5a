"""Pictures of what a fusion attends to."""

import os
from collections.abc import Mapping, Sequence

from torch import Tensor

FusionAttentions = Mapping[str, Mapping[int, Mapping[str, Tensor]]]


def mean_fusion_attention(
    attentions: FusionAttentions, fusion: str | None = None, attention_mask: Tensor | None = None
) -> dict[tuple[int, str], Tensor]:
    """The fusion's attention averaged over tokens, one row of `N` weights per place.

    Semantics::

        mean[layer, location] = attentions[fusion][layer][location][attention_mask].mean(0)   # [N]

    Args:
        attentions: `adapter_fusion_attentions` of a forward with
            `output_adapter_fusion_attentions=True`: `[fusion][layer][location] -> [B, S, N]`.
        fusion: which fusion; may be left out if there is one only.
        attention_mask: `[B, S]`, the tokens that count; None for all.

    Returns:
        By layer and location, in the order of the layers, a tensor `[N]` that sums to 1.

    Raises:
        ValueError: `fusion` is unknown, or left out where there are several.
    """
    if fusion is None and len(attentions) == 1:
        (fusion,) = attentions
    if fusion not in attentions:
        raise ValueError(f"fusion: expected one of {sorted(attentions)}; got {fusion!r}")
    means = {}
    for layer, places in sorted(attentions[fusion].items()):
        for location, p in places.items():
            rows = p.flatten(0, -2) if attention_mask is None else p[attention_mask.bool()]
            means[layer, location] = rows.float().mean(0)
    return means


def plot_fusion_attention(
    attentions: FusionAttentions,
    path: str | os.PathLike,
    *,
    fusion: str | None = None,
    attention_mask: Tensor | None = None,
    adapter_names: Sequence[str] | None = None,
) -> None:
    """Writes a PNG: how much each layer attends to each adapter, averaged over tokens.

    Args:
        attentions, fusion, attention_mask: as in `mean_fusion_attention`.
        path: the file to write.
        adapter_names: names of the columns; None: taken from the fusion's name ("a,b,c").

    Raises:
        ImportError: matplotlib is missing.
        ValueError: `fusion` is unknown, or `adapter_names` does not fit.
    """
    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        raise ImportError(
            "plot_fusion_attention needs matplotlib: pip install matplotlib"
        ) from error

    means = mean_fusion_attention(attentions, fusion, attention_mask)
    num_adapters = len(next(iter(means.values())))
    if adapter_names is None:
        adapter_names = (next(iter(attentions)) if fusion is None else fusion).split(",")
        if len(adapter_names) != num_adapters:  # the fusion has a name of its own
            adapter_names = [str(i) for i in range(num_adapters)]
    elif len(adapter_names) != num_adapters:
        raise ValueError(f"adapter_names: expected {num_adapters} names; got {len(adapter_names)}")

    several = len({location for _, location in means}) > 1
    rows = [f"{layer} {location}" if several else str(layer) for layer, location in means]
    figure = Figure(
        figsize=(1.6 + 1.1 * num_adapters, 1.2 + 0.45 * len(rows)), layout="constrained"
    )
    axes = figure.add_subplot()
    weights = [row.tolist() for row in means.values()]
    image = axes.imshow(weights, vmin=0, vmax=1, cmap="Blues", aspect="auto")
    for y, row in enumerate(weights):
        for x, weight in enumerate(row):
            color = "white" if weight > 0.6 else "black"
            axes.text(x, y, f"{weight:.2f}", ha="center", va="center", color=color)
    axes.set_xticks(range(num_adapters), adapter_names, rotation=20, ha="right")
    axes.set_yticks(range(len(rows)), rows)
    axes.set_ylabel("layer")
    figure.colorbar(image, label="mean attention")
    figure.savefig(path, format="png", dpi=150)
