"""The demo's functions, a few steps of them, and what `adapters` trained on the same data."""

import importlib.util
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoTokenizer

from fastfusion import AutoAdapterModel
from fastfusion.plots import mean_fusion_attention, plot_fusion_attention

EXAMPLES = Path(__file__).resolve().parents[1] / "examples"
TRAINED = EXAMPLES / "trained"
FUSION = "supersense,pos,relatedness,adjective"


@pytest.fixture(scope="module")
def demo():
    spec = importlib.util.spec_from_file_location("fuse_wordnet", EXAMPLES / "fuse_wordnet.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def tokenizer(demo):
    return AutoTokenizer.from_pretrained(demo.bert_folder())


@pytest.fixture(scope="module")
def expected():
    """64 rows of the test set, and what `adapters` 1.3.0 computed from them."""
    return load_file(TRAINED / "reference.safetensors")


def inputs_of(expected) -> dict[str, torch.Tensor]:
    return {key: expected[key] for key in ("input_ids", "attention_mask", "token_type_ids")}


CLOSE = {"rtol": 1e-5, "atol": 1e-5}


@pytest.fixture(scope="module")
def trained_by_adapters(demo):
    model = demo.load_model()
    model.load_adapter_fusion(str(TRAINED / "fusions" / demo.FUSION), set_active=True)
    model.load_head(str(TRAINED / "head"))
    assert model.active_head == "fused"
    return model.eval()


@pytest.mark.parametrize("backend", [None, "torch", "reference"])
@torch.no_grad()
def test_fusion_trained_by_adapters(expected, trained_by_adapters, backend):
    trained_by_adapters.set_backend(backend)
    outputs = trained_by_adapters(
        **inputs_of(expected), output_hidden_states=True, output_adapter_fusion_attentions=True
    )
    torch.testing.assert_close(outputs.logits, expected["logits"], **CLOSE)
    cls_per_layer = torch.stack([state[:, 0] for state in outputs.hidden_states])
    torch.testing.assert_close(cls_per_layer, expected["cls_per_layer"], **CLOSE)

    attentions = outputs.adapter_fusion_attentions
    first = torch.stack([places["output_adapter"][:4] for places in attentions[FUSION].values()])
    torch.testing.assert_close(first, expected["fusion_attention_first4"], **CLOSE)
    means = mean_fusion_attention(attentions, attention_mask=expected["attention_mask"])
    means = torch.stack(list(means.values()))
    torch.testing.assert_close(means, expected["fusion_attention_mean"], **CLOSE)
    torch.testing.assert_close(means.sum(-1), torch.ones(len(means)))


@pytest.mark.parametrize("name", FUSION.split(","))
@torch.no_grad()
def test_adapter_trained_by_adapters(demo, expected, name):
    model = AutoAdapterModel.from_pretrained(demo.bert_folder())
    model.load_adapter(str(TRAINED / "adapters" / name), set_active=True)
    logits = model.eval()(**inputs_of(expected)).logits
    torch.testing.assert_close(logits, expected[f"single.{name}.logits"], **CLOSE)


def test_rules_without_a_model(demo):
    rows = demo.load_rows("test")
    assert demo.majority_accuracy(rows) == pytest.approx(0.334)
    assert demo.word_overlap_accuracy(rows) == pytest.approx(0.475)


def test_demo_in_small(demo, tokenizer, tmp_path, monkeypatch):
    """One epoch over 32 rows: trains, predicts, times, draws, saves, reloads."""
    load_rows = demo.load_rows
    monkeypatch.setattr(demo, "load_rows", lambda split: load_rows(split)[:32])
    model, trainer = demo.train_fusion(tokenizer, tmp_path, seed=0, epochs=1)
    assert trainer.state.global_step == 2
    rows = demo.load_rows("test")
    accuracy = trainer.evaluate(demo.encode(rows, tokenizer))["eval_accuracy"]
    assert 0 <= accuracy <= 1
    label, probability = demo.predict(model, tokenizer, rows[0])
    assert label in demo.LABELS and 1 / 3 <= probability <= 1

    batch = demo.make_batch(tokenizer, rows)
    times = demo.time_backends(model, batch, ("reference", None), rounds=1)
    assert set(times) == {"reference", None} and all(t > 0 for t in times.values())

    with torch.no_grad():
        outputs = model(**batch, output_adapter_fusion_attentions=True)
    picture = tmp_path / "attention.png"
    plot_fusion_attention(outputs.adapter_fusion_attentions, picture)
    assert picture.read_bytes().startswith(b"\x89PNG")

    demo.save(model, tmp_path / "saved")
    with torch.no_grad():
        reloaded = demo.load_fused(tmp_path / "saved")(**batch).logits
    assert torch.equal(reloaded, outputs.logits)


def test_plot_names_its_columns(demo, tmp_path):
    attentions = {"f": {0: {"output_adapter": torch.full((2, 3, 4), 0.25)}}}
    plot_fusion_attention(attentions, tmp_path / "f.png", adapter_names=["a", "b", "c", "d"])
    with pytest.raises(ValueError, match="adapter_names: expected 4 names; got 2"):
        plot_fusion_attention(attentions, tmp_path / "f.png", adapter_names=["a", "b"])
    with pytest.raises(ValueError, match=r"fusion: expected one of \['f'\]; got 'g'"):
        plot_fusion_attention(attentions, tmp_path / "f.png", fusion="g")
