"""Run by tests/test_setups.py in an environment with `adapters`: read our setups, run, write them.

Usage: python peer_setups.py MODEL_DIRECTORY EXCHANGE_DIRECTORY USE_SAFETENSORS
"""

import sys
from pathlib import Path

import torch
from adapters import AutoAdapterModel
from safetensors.torch import load_file, save_file

model_directory, exchange = map(Path, sys.argv[1:3])
use_safetensors = sys.argv[3] == "True"
input_ids = load_file(exchange / "inputs.safetensors")["input_ids"]
results = {}
for path in sorted((exchange / "ours").iterdir()):
    model = AutoAdapterModel.from_pretrained(model_directory, attn_implementation="eager").eval()
    setup, head_setup = model.load_adapter_setup(
        str(path), set_active=True, use_safetensors=use_safetensors
    )
    if path.name == "named":
        assert setup.name == "named" and list(model.adapters_config.fusions) == ["named"]
        continue
    model.active_head = head_setup
    tasks = {"task_ids": torch.tensor([0, 1, 1, 0])} if path.name == "multi" else {}
    with torch.no_grad():
        output = model.eval()(input_ids, **tasks)
    results[path.name] = output.last_hidden_state if head_setup is None else output.logits
    model.save_adapter_setup(
        str(exchange / "peer" / path.name), setup, head_setup, use_safetensors=use_safetensors
    )
save_file(results, exchange / "outputs.safetensors")
