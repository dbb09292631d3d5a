"""Run by tests/test_serialization.py in an environment with `adapters`: read our files, run, write.

Usage: python peer_files.py MODEL_DIRECTORY EXCHANGE_DIRECTORY
"""

import json
import sys
from pathlib import Path

import adapters
import torch
from adapters import AutoAdapterModel
from adapters.composition import Fuse
from safetensors.torch import save_file
from transformers import BertForSequenceClassification, BertModel

model_directory, exchange = map(Path, sys.argv[1:])
ADAPTERS = ("a", "b", "c", "p", "n")
INPUT_IDS = torch.randint(5, 60, (2, 6), generator=torch.Generator().manual_seed(0))


def complete(info: dict) -> None:
    assert not info.get("missing_keys") and not info.get("unexpected_keys"), info


def run(model, target: Path) -> None:
    results = {"input_ids": INPUT_IDS}
    for name, setup in [*((name, name) for name in model.adapters_config), ("a,b", Fuse("a", "b"))]:
        model.set_active_adapters(setup)
        for head in ("a", "task"):
            model.active_head = head
            with torch.no_grad():
                results[f"{name}/{head}"] = model(input_ids=INPUT_IDS).logits
    save_file(results, target)


for kind, use_safetensors in (("safetensors", True), ("bin", False)):
    ours, theirs = exchange / "ours" / kind, exchange / "peer" / kind
    model = AutoAdapterModel.from_pretrained(model_directory, attn_implementation="eager").eval()
    for name in ADAPTERS:
        info = {}
        path = str(ours / "adapters" / name)
        loaded = model.load_adapter(
            path, with_head=False, loading_info=info, use_safetensors=use_safetensors
        )
        assert loaded == name
        complete(info)
    for path in sorted((ours / "fusions").iterdir()):
        model.load_adapter_fusion(str(path), with_head=False, use_safetensors=use_safetensors)
        assert path.name in model.adapters_config.fusions
    for path in sorted((ours / "heads").iterdir()):
        model.load_head(str(path), use_safetensors=use_safetensors)
    model.eval()
    run(model, exchange / f"{kind}.safetensors")

    for part in ("adapters", "fusions", "heads", "with head"):
        (theirs / part).mkdir(parents=True)
    for name in ADAPTERS:
        if name == "n" and use_safetensors:
            continue  # two names of one tensor, which its safetensors writer refuses
        target = str(theirs / "adapters" / name)
        model.save_adapter(target, name, with_head=False, use_safetensors=use_safetensors)
    for name in model.adapters_config.fusions:
        target = str(theirs / "fusions" / name)
        model.save_adapter_fusion(target, name, use_safetensors=use_safetensors)
    for name in model.heads:
        model.save_head(str(theirs / "heads" / name), name, use_safetensors=use_safetensors)

    static = BertForSequenceClassification.from_pretrained(model_directory, num_labels=3)
    adapters.init(static)
    static.load_adapter(str(ours / "static"), use_safetensors=use_safetensors)
    static.save_adapter(str(theirs / "static"), "a", use_safetensors=use_safetensors)

    heads = {}
    for load_as in (None, "mine"):
        model = AutoAdapterModel.from_pretrained(model_directory, attn_implementation="eager")
        for name in "ab":
            path = str(ours / "adapters" / name)
            model.load_adapter(path, with_head=False, use_safetensors=use_safetensors)
        path = str(ours / "with head")
        model.load_adapter_fusion(
            path, load_as=load_as, set_active=True, use_safetensors=use_safetensors
        )
        (name,) = model.adapters_config.fusions
        heads[load_as or ""] = [name, list(model.heads), model.active_head]
        model.save_adapter_fusion(
            str(theirs / "with head" / name),
            name,
            with_head=model.active_head,
            use_safetensors=use_safetensors,
        )
    (exchange / f"{kind}_heads.json").write_text(json.dumps(heads))

model = AutoAdapterModel.from_pretrained(exchange / "ours/model", attn_implementation="eager")
run(model.eval(), exchange / "model.safetensors")

for name, kind in (("bare", BertModel), ("static", BertForSequenceClassification)):
    ours, theirs = exchange / "ours/patched" / name, exchange / "peer/patched" / name
    for model in (AutoAdapterModel.from_pretrained(ours), adapters.load_model(ours, kind)):
        model.set_active_adapters(Fuse("a", "b"))
        model.eval()
        with torch.no_grad():
            outputs = model.base_model(input_ids=INPUT_IDS, output_hidden_states=True)
        hidden_states = dict(zip("012", outputs.hidden_states, strict=False))
        save_file(hidden_states, exchange / f"{name} {type(model).__name__}.safetensors")
    model.save_pretrained(theirs)
