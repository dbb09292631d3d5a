"""What users of `adapters` have at hand: the fusion notebook, and the site's quick start."""

import runpy
from pathlib import Path

import numpy as np
import pytest
import torch
from tiny import SIZES
from transformers import (
    BertConfig,
    BertTokenizer,
    Trainer,
    TrainerCallback,
    TrainingArguments,
    set_seed,
)

import fastfusion.composition as ac
from fastfusion import AdapterTrainer, AutoAdapterModel, BertAdapterModel, Fuse

EXAMPLES = Path(__file__).resolve().parents[1] / "examples"


class FewSteps(TrainingArguments):
    def __post_init__(self):
        self.max_steps = 6
        super().__post_init__()


def test_fusion_notebook(tmp_path, monkeypatch):
    """All cells in order, with fewer steps; then a fresh model from the files that the last one
    saved."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("transformers.TrainingArguments", FewSteps)
    cells = runpy.run_path(str(EXAMPLES / "fusion_notebook.py"))
    assert cells["training"].global_step == 6
    assert set(cells["metrics"]) >= {"eval_loss", "eval_acc", "eval_runtime"}
    assert cells["predict"]("a small dog", "an animal") in cells["names"]
    saved = {str(path.relative_to("saved")) for path in Path("saved").rglob("*") if path.is_file()}
    assert saved >= {"adapter_fusion_config.json", "model_adapter_fusion.safetensors"}
    for name in ("related", "supersense", "pos"):
        assert saved >= {f"{name}/adapter_config.json", f"{name}/adapter.safetensors"}

    model = cells["model"].eval()
    reloaded = BertAdapterModel.from_pretrained(cells["bert"], config=cells["config"])
    for name in ("related", "supersense", "pos"):
        reloaded.load_adapter(f"saved/{name}")
    reloaded.load_adapter_fusion("saved")
    reloaded.set_active_adapters(Fuse("related", "supersense", "pos"))
    inputs = BertTokenizer.from_pretrained(cells["bert"])("a dog", "an animal", return_tensors="pt")
    with torch.no_grad():
        states = [m.base_model(**inputs).last_hidden_state for m in (model, reloaded.eval())]
    assert torch.equal(*states)


def quick_start_model(**kwargs):
    set_seed(0)
    config = BertConfig(**{**SIZES, "num_hidden_layers": 4, **kwargs})
    return AutoAdapterModel.from_config(config)


def make_rows() -> list[dict]:
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(5, 50, (16, 6), generator=generator)
    return [{"input_ids": i, "labels": int(i[0] > 25)} for i in ids]


def quick_start_args(out: Path) -> TrainingArguments:
    return TrainingArguments(
        output_dir=str(out),
        max_steps=4,
        per_device_train_batch_size=4,
        report_to="none",
        save_strategy="no",
        use_cpu=True,
    )


@pytest.mark.parametrize("trainer_class", [AdapterTrainer, Trainer])
def test_train_an_adapter(tmp_path, trainer_class):
    model = quick_start_model()
    model.add_adapter("sst-2")
    model.train_adapter("sst-2")
    model.add_classification_head("sst-2", num_labels=2)
    model.set_active_adapters("sst-2")
    args = quick_start_args(tmp_path)
    trainer_class(model=model, args=args, train_dataset=make_rows()).train()
    model.save_all_adapters(str(tmp_path / "output-path"))

    # "Load an adapter for inference": the head comes with its adapter
    inference = quick_start_model()
    inference.load_adapter(str(tmp_path / "output-path" / "sst-2"))
    inference.set_active_adapters("sst-2")
    assert inference.active_head == "sst-2"
    input_tensor = torch.tensor([[7, 8, 9]])
    with torch.no_grad():
        logits = inference.eval()(input_tensor).logits
        assert torch.equal(logits, model.eval()(input_tensor).logits)
        assert torch.equal(logits, model(input_tensor)[0])


def test_adapter_drop_callback(tmp_path):
    """Layers to skip are drawn for every step, and none are skipped in evaluation."""
    skipped = []

    class AdapterDropTrainerCallback(TrainerCallback):
        def on_step_begin(self, args, state, control, **kwargs):
            skip_layers = list(range(np.random.randint(0, 4)))
            skipped.append(len(skip_layers))
            kwargs["model"].set_active_adapters("rotten_tomatoes", skip_layers=skip_layers)

        def on_evaluate(self, args, state, control, **kwargs):
            kwargs["model"].set_active_adapters("rotten_tomatoes", skip_layers=None)

    model = quick_start_model()
    model.add_adapter("rotten_tomatoes")
    model.add_classification_head("rotten_tomatoes", num_labels=2)
    model.train_adapter("rotten_tomatoes")
    trainer = AdapterTrainer(
        model=model,
        args=quick_start_args(tmp_path),
        train_dataset=make_rows(),
        eval_dataset=make_rows(),
        callbacks=[AdapterDropTrainerCallback()],
    )
    trainer.train()
    assert len(skipped) == 4
    batch = torch.stack([row["input_ids"] for row in make_rows()])
    with torch.no_grad():
        model.eval().set_active_adapters("rotten_tomatoes", skip_layers=[0, 1, 2, 3])
        without = model(batch).logits
        trainer.evaluate()
        assert not torch.equal(model(batch).logits, without)
        model.set_active_adapters(None)
        assert torch.equal(model(batch).logits, without)


def test_every_block_of_the_composition_page():
    """Each example computes what the literal formulas do."""
    model = quick_start_model(max_position_embeddings=80)
    for name in "abcdefghikl":
        model.add_adapter(name)
    model.add_adapter_fusion(["d", "e", "f"])
    for name, parameter in model.named_parameters():
        if "adapter" in name:
            torch.nn.init.normal_(parameter, std=0.3)
    model.double().eval()
    input_ids = torch.randint(5, 50, (5, 70))
    setups = [
        "a",
        ac.Stack("a", "b", "c"),
        ac.Fuse("d", "e", "f"),
        ac.Split("g", "h", split_index=64),
        ac.BatchSplit("i", "k", "l", batch_sizes=[2, 1, 2]),
        ac.Parallel("a", "b"),
        ac.Stack("a", ac.Split("b", "c", split_index=60)),
    ]
    outputs = []
    for setup in setups:
        model.active_adapters = setup
        with torch.no_grad():
            outputs.append(model(input_ids).last_hidden_state)
            model.set_backend("reference")
            expected = model(input_ids).last_hidden_state
            model.set_backend(None)
        torch.testing.assert_close(outputs[-1], expected, rtol=1e-9, atol=1e-9)
    for i, output in enumerate(outputs):
        assert not any(torch.equal(output, other) for other in outputs[:i])
    with pytest.warns(FutureWarning):
        model.active_adapters = ["a", "b", "c"]
    assert model.active_adapters == ac.Stack("a", "b", "c")
    with pytest.warns(FutureWarning):
        model.active_adapters = [["d", "e", "f"]]
    assert model.active_adapters == ac.Stack(ac.Fuse("d", "e", "f"))


def test_older_names_of_the_fusion_methods():
    model = quick_start_model()
    for name in ("multinli", "qqp", "qnli"):
        model.add_adapter(name)
    model.add_classification_head("cb")
    adapter_setup = Fuse("multinli", "qqp", "qnli")
    model.add_fusion(adapter_setup)
    model.set_active_adapters(adapter_setup)
    model.train_fusion(adapter_setup)
    trained = {name for name, p in model.base_model.named_parameters() if p.requires_grad}
    assert trained and all("adapter_fusion_layer.multinli,qqp,qnli." in name for name in trained)
