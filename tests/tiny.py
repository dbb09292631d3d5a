"""Small random models with adapters, for tests of everything around the mathematics."""

import torch
from torch import nn
from transformers import (
    AutoModel,
    BertConfig,
    DistilBertConfig,
    ElectraConfig,
    RobertaConfig,
    XLMRobertaConfig,
)

import fastfusion
from fastfusion.composition import Fuse

SIZES = {
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "intermediate_size": 48,
    "vocab_size": 60,
    "max_position_embeddings": 40,
}
CONFIGS = {
    "bert": BertConfig(**SIZES),
    "roberta": RobertaConfig(**SIZES, pad_token_id=1),
    "xlm-roberta": XLMRobertaConfig(**SIZES, pad_token_id=1),
    "electra": ElectraConfig(**SIZES, embedding_size=32),
    "distilbert": DistilBertConfig(
        dim=32, n_layers=2, n_heads=2, hidden_dim=48, vocab_size=60, max_position_embeddings=40
    ),
}


def randomize(model: nn.Module) -> None:
    """Give adapters and fusions values of a size that matters."""
    for name, parameter in model.named_parameters():
        if "adapter" in name:
            nn.init.normal_(parameter, std=0.3)


def randomize_norms(model: nn.Module) -> None:
    """LayerNorms start as the identity, which would hide a wrong one."""
    for name, parameter in model.named_parameters():
        if "LayerNorm" in name or "layer_norm" in name:
            nn.init.normal_(parameter, mean=1.0, std=0.2)


def add_fusion(model: nn.Module, names: str = "abc", config: str = "double_seq_bn") -> Fuse:
    """Adapters of these names under one fusion, active and randomised."""
    for name in names:
        model.add_adapter(name, f"{config}[reduction_factor=4]")
    fuse = Fuse(*names)
    model.add_adapter_fusion(fuse, set_active=True)
    randomize(model)
    fastfusion.refresh(model)
    return fuse


def bert(names: str = "abc", config: str = "double_seq_bn", **kwargs) -> nn.Module:
    model = AutoModel.from_config(CONFIGS["bert"], **kwargs).eval()
    randomize_norms(model)
    fastfusion.init(model)
    add_fusion(model, names, config)
    return model.eval()


def ids(batch: int = 2, length: int = 7) -> torch.Tensor:
    return torch.randint(2, 60, (batch, length))


def optimizer_step() -> None:
    """What ends a training step: some optimizer of the process has changed something."""
    parameter = nn.Parameter(torch.zeros(1))
    parameter.grad = torch.ones(1)
    torch.optim.SGD([parameter], lr=0.1).step()
