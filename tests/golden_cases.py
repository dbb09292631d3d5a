"""The golden cases of `adapters` that this library can run, loaded through the public interface."""

import json
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors.torch import load_file
from torch import Tensor, nn

import fastfusion
from fastfusion import composition
from fastfusion.heads import MultiHeadOutput

GOLDEN = Path(__file__).parent / "golden"
GROUPS = (
    "bert-seq_bn",
    "bert-double",
    "bert-par",
    "bert-variants",
    "bert-fusion-variants",
    "bert-grad",
    "distilbert-mix",
    "roberta-mix",
)


class Case(NamedTuple):
    group: str
    case: dict[str, Any]

    def __str__(self) -> str:
        return f"{self.group}-{self.case['id']}"


@cache
def manifest() -> dict[str, dict]:
    groups = json.loads((GOLDEN / "manifest.json").read_text())["groups"]
    return {group["id"]: group for group in groups}


@cache
def tensors(group: str) -> dict[str, Tensor]:
    return load_file(GOLDEN / "groups" / group / "io.safetensors")


def cases(peer_raises: bool = False) -> Iterator[Case]:
    """Every case that the peer runs, or raises on, with no head or classification heads."""
    for group in GROUPS:
        heads = manifest()[group].get("heads", {})
        for case in manifest()[group]["cases"]:
            head = case.get("head")
            names = head if isinstance(head, list) else [head]
            is_ours = all(n is None or heads[n]["type"] == "classification" for n in names)
            if is_ours and ("peer_raises" in case) == peer_raises:
                yield Case(group, case)


def setup_of(data: Any) -> Any:
    if data is None or isinstance(data, str):
        return data
    arguments = {k: v for k, v in data.items() if k not in ("type", "children")}
    if data["type"] == "Average":
        arguments["peer_scaling"] = True
    return getattr(composition, data["type"])(*map(setup_of, data["children"]), **arguments)


def load(group: str, **kwargs: Any) -> nn.Module:
    """The group's model with everything that `adapters` saved of it."""
    entry, folder = manifest()[group], GOLDEN / "groups" / group
    model = fastfusion.AutoAdapterModel.from_pretrained(
        GOLDEN / "models" / entry["model"], attn_implementation="eager", **kwargs
    )
    for name in entry["adapters"]:
        model.load_adapter(folder / "adapters" / name, with_head=False)
    for path in sorted((folder / "fusions").iterdir()):
        model.load_adapter_fusion(path)
    for name, head in entry.get("heads", {}).items():
        if head["type"] == "classification":
            model.load_head(folder / "heads" / name)
    model.active_head = None
    return model.eval()


def inputs_of(case: Case) -> dict[str, Tensor]:
    prefix = f"inputs/{case.case['inputs_id']}/"
    found = tensors(case.group)
    return {k.removeprefix(prefix): v for k, v in found.items() if k.startswith(prefix)}


def run(model: nn.Module, case: Case) -> dict[str, Tensor]:
    """What the case's outputs are here, under the names that the golden file has."""
    data = case.case
    setup, head = setup_of(data["setup"]), data.get("head")
    model.zero_grad()
    if data.get("grad") == "adapters":
        model.train_adapter(setup)
    elif data.get("grad"):
        model.train_adapter_fusion(setup, unfreeze_adapters=data["grad"] == "fusion+adapters")
    else:
        model.set_active_adapters(setup, skip_layers=data.get("skip_layers"))
    model.eval()
    model.active_head = head
    flags = {k: v for k, v in data.items() if k.startswith("output_")}
    with torch.set_grad_enabled("grad" in data):
        for _ in range(data.get("repeat", 1)):
            output = model(**inputs_of(case), **flags)
    found: dict[str, Tensor] = {}
    if "grad" in data:
        output.loss.backward()
        named = model.named_parameters(remove_duplicate=False)
        found |= {f"grad/{k}": p.grad for k, p in named if p.grad is not None}
        regularization = model.get_fusion_regularization_loss()
        if regularization is not None:
            found["fusion_reg_loss"] = regularization.detach().reshape(-1)
    for name in ("adapter_fusion_attentions", "adapter_gating_scores"):
        for key, layers in (getattr(output, name, None) or {}).items():
            for layer, places in layers.items():
                found |= {f"{name}/{key}/{layer}/{place}": t for place, t in places.items()}
    outputs = {"": output}
    if isinstance(output, MultiHeadOutput):
        outputs |= {f"head{i}.": own for i, own in enumerate(output)}
    for prefix, own in outputs.items():
        found |= {f"{prefix}{k}": v.detach() for k, v in own.items() if isinstance(v, Tensor)}
    return found
