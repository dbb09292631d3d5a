"""Whole BERTs with adapters under a fusion, for the benchmarks: bare, ours, and `adapters`' own."""

import copy
from collections.abc import Callable

import torch
from torch import nn
from transformers import BertConfig, BertModel

import fastfusion
from fastfusion.composition import Fuse

try:
    import adapters
    from adapters.composition import Fuse as PeerFuse
except ImportError:
    adapters = None


def bare_model(layers: int, **config) -> nn.Module:
    torch.manual_seed(0)
    return BertModel(BertConfig(num_hidden_layers=layers, **config)).eval()


def ours(bare: nn.Module, count: int, backend: str | None = None) -> nn.Module:
    """The model with `count` random adapters under an active fusion."""
    model = copy.deepcopy(bare)
    fastfusion.init(model, backend=backend)
    names = [f"a{i}" for i in range(count)]
    for name in names:
        model.add_adapter(name, "seq_bn")
    model.add_adapter_fusion(names)
    model.set_active_adapters(Fuse(*names))
    return model.eval()


def on_backend(model: nn.Module, backend: str) -> nn.Module:
    """A copy of one of our models, computed by a backend."""
    model = copy.deepcopy(model)
    model.set_backend(backend)
    return model


def peer(bare: nn.Module, model: nn.Module) -> nn.Module:
    """The same in `adapters`; its state-dict keys are ours."""
    other = copy.deepcopy(bare)
    adapters.init(other)
    names = list(model.adapters_config.adapters)
    for name in names:
        other.add_adapter(name, config="seq_bn")
    other.add_adapter_fusion(names)
    other.set_active_adapters(PeerFuse(*names))
    # adapters lists the word embeddings a second time, under prompt_tuning
    other.load_state_dict(model.state_dict(), strict=False)
    return other.eval()


def with_adapters(bare: nn.Module, count: int) -> nn.Module:
    """The model with `count` random adapters, the first one active."""
    model = copy.deepcopy(bare)
    fastfusion.init(model)
    torch.manual_seed(0)  # the first adapters are the same, however many there are
    for i in range(count):
        model.add_adapter(f"a{i}", "seq_bn")
    model.set_active_adapters("a0")
    return model.eval()


def forward(model: nn.Module, ids: torch.Tensor) -> Callable[[], torch.Tensor]:
    def call() -> torch.Tensor:
        with torch.no_grad():
            return model(ids)[0]

    return call


def train_fusion(model: nn.Module) -> None:
    """Freeze everything but the fusion, where the model has one."""
    if hasattr(model, "adapters_config"):
        fuse = Fuse if hasattr(model, "model_adapters") else PeerFuse
        model.train_adapter_fusion(fuse(*model.adapters_config.adapters))


def step(
    model: Callable, trained: list[nn.Parameter], ids: torch.Tensor, lr: float = 1e-5
) -> Callable[[], torch.Tensor]:
    """One step of AdamW on `trained`; the loss stands in for a head's.

    A mean of squares would be constant behind the last LayerNorm, and its gradients rounding.
    """
    optimizer = torch.optim.AdamW(trained, lr=lr)

    def call() -> torch.Tensor:
        optimizer.zero_grad()
        loss = model(ids)[0].float().relu().square().mean()
        loss.backward()
        optimizer.step()
        return loss.detach()

    return call


def token_ids(shape: tuple[int, int], vocabulary: int = 30000) -> torch.Tensor:
    return torch.randint(0, vocabulary, shape, generator=torch.Generator().manual_seed(1))
