"""Models with adapters of all kinds and setups for their rows, for tests on whole models."""

import copy

import tiny
import torch
from torch import nn
from transformers import AutoModel

import fastfusion
from fastfusion import AdapterSetup
from fastfusion.composition import Average, Fuse, Split, Stack

BASE = "__base__"
LENGTH = 7
# fp64: far above rounding and far below any mistake; the others: a few units of rounding of
# numbers around 1, through two layers
TOLERANCE = {
    torch.float64: {"rtol": 1e-9, "atol": 1e-9},
    torch.float32: {"rtol": 1e-4, "atol": 2e-5},
}
ENTRIES = [
    "a",
    BASE,
    "c",
    Stack("a", "b"),
    Fuse("a", "b"),
    Split("a", "b", splits=[3, 4]),
    Average("a", "b", "d", weights=[1, 2, 3]),
    Stack("b", Fuse("a", "b")),
    Split("b", "d", split_index=2),
    Fuse(Stack("d", "a"), "b"),
    "g",
    "missing in layer 0",
]
# those whose lanes go through one call of the op per stage
GROUPED = ["a", BASE, "b", Stack("a", "b"), Fuse("a", "b"), Split("a", "b", splits=[3, 4])]


def make(architecture="bert", dtype=torch.float32, backend=None, **overrides):
    """A model with adapters of all kinds, nothing active and no dropout."""
    torch.manual_seed(1)
    config = copy.deepcopy(tiny.CONFIGS[architecture])
    dropouts = ("hidden_dropout_prob", "attention_probs_dropout_prob", "dropout")
    for name, value in {
        **dict.fromkeys(dropouts, 0.0),
        "attention_dropout": 0.0,
        **overrides,
    }.items():
        setattr(config, name, value)
    model = AutoModel.from_config(config).eval()
    tiny.randomize_norms(model)
    fastfusion.init(model, backend=backend)
    add_adapters(model)
    return model.to(dtype).eval()


def add_adapters(model: nn.Module) -> None:
    for name, adapter in {
        "a": "double_seq_bn[reduction_factor=4]",
        "b": "double_seq_bn[reduction_factor=8, non_linearity='gelu', original_ln_before=True]",
        "c": "par_bn[reduction_factor=8]",
        "d": "double_seq_bn[reduction_factor=2, scaling=2.0, non_linearity='tanh']",
        "g": "double_seq_bn[reduction_factor=8, use_gating=True, ln_before=True]",
        "missing in layer 0": "double_seq_bn[reduction_factor=8, leave_out=[0]]",
        "missing in layer 1": "double_seq_bn[reduction_factor=8, leave_out=[1]]",
    }.items():
        model.add_adapter(name, adapter)
    model.add_adapter_fusion(["a", "b"])
    tiny.randomize(model)
    fastfusion.refresh(model)


def setup_of(entry):
    return None if entry == BASE else entry


def alone(model, entries, ids, **kwargs):
    """Each row by itself under its own setup."""
    outputs = []
    for i, entry in enumerate(entries):
        own = {name: value[i : i + 1] for name, value in kwargs.items()}
        with AdapterSetup(setup_of(entry)):
            outputs.append(model(ids[i : i + 1], **own)[0])
    return torch.cat(outputs)


def close(actual, expected):
    torch.testing.assert_close(actual, expected, **TOLERANCE[expected.dtype])
