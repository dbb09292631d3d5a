"""AdapterTrainer on tiny random BERTs: what a step computes, and what a checkpoint carries."""

import json
import os
import subprocess
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from tiny import SIZES
from transformers import (
    BertConfig,
    BertForSequenceClassification,
    BertModel,
    Trainer,
    TrainerCallback,
    TrainingArguments,
    set_seed,
)

import fastfusion
from fastfusion import AdapterTrainer, AutoAdapterModel, Fuse
from fastfusion.composition import MultiTask, Parallel

NAMES = ("a", "b", "c")
SETUP = Fuse(*NAMES)
FUSION = ",".join(NAMES)


def tiny_config(dropout: float = 0.0) -> BertConfig:
    return BertConfig(**SIZES, hidden_dropout_prob=dropout, attention_probs_dropout_prob=dropout)


def tiny_model(dropout: float = 0.0, name: str | None = None, init_seed: int = 0):
    """A BERT with three adapters, their fusion and a head, the fusion ready to train.

    `init_seed` draws the adapters, the fusion and the head; the BERT is always the same one.
    """
    set_seed(0)
    model = AutoAdapterModel.from_config(tiny_config(dropout))
    set_seed(100 + init_seed)
    for adapter in NAMES:
        model.add_adapter(adapter, config="seq_bn")
    setup = Fuse(*NAMES, name=name) if name else SETUP
    model.add_adapter_fusion(setup, name=name)
    model.add_classification_head("head", num_labels=3)
    model.train_adapter_fusion(setup)
    return model


def make_rows(count: int = 16, length: int = 6) -> list[dict]:
    generator = torch.Generator().manual_seed(1)
    ids = torch.randint(5, 50, (count, length), generator=generator)
    labels = torch.randint(0, 3, (count,), generator=generator)
    return [{"input_ids": i, "labels": label} for i, label in zip(ids, labels, strict=True)]


def make_args(out: Path, **kwargs) -> TrainingArguments:
    defaults = {
        "per_device_train_batch_size": 4,
        "per_device_eval_batch_size": 8,
        "learning_rate": 1e-2,
        "report_to": "none",
        "disable_tqdm": True,
        "save_strategy": "no",
        "use_cpu": True,
    }
    return TrainingArguments(output_dir=str(out), **{**defaults, **kwargs})


def make_trainer(
    model, out: Path, trainer_class=AdapterTrainer, *, rows=None, trainer_kwargs=None, **args
):
    return trainer_class(
        model=model,
        args=make_args(out, **args),
        train_dataset=make_rows() if rows is None else rows,
        eval_dataset=make_rows(8),
        **(trainer_kwargs or {}),
    )


def make_batch(rows: list[dict]) -> dict[str, torch.Tensor]:
    return {key: torch.stack([row[key] for row in rows]) for key in rows[0]}


def trainable(model) -> dict[str, torch.nn.Parameter]:
    return {name: p for name, p in model.named_parameters() if p.requires_grad}


def values(model) -> dict[str, torch.Tensor]:
    return {key: value.clone() for key, value in model.state_dict().items()}


def assert_same(ours: dict[str, torch.Tensor], theirs: dict[str, torch.Tensor]) -> None:
    assert ours.keys() == theirs.keys()
    different = [key for key in ours if not torch.equal(ours[key], theirs[key])]
    assert not different


class GradientsOfFirstStep(TrainerCallback):
    """Keeps the gradients as the optimizer sees them, clipping apart (switch it off)."""

    def on_pre_optimizer_step(self, args, state, control, model=None, **kwargs):
        self.gradients = {name: p.grad.clone() for name, p in trainable(model).items()}


def first_gradients(model, out: Path, rows: list[dict], **args) -> dict[str, torch.Tensor]:
    callback = GradientsOfFirstStep()
    trainer = make_trainer(
        model,
        out,
        rows=rows,
        trainer_kwargs={"callbacks": [callback]},
        max_steps=1,
        max_grad_norm=0.0,
        **args,
    )
    trainer.train()
    return callback.gradients


# The loss


def test_training_loss_includes_the_regularizer(tmp_path):
    model = tiny_model()
    trainer = make_trainer(model, tmp_path)
    batch = make_batch(make_rows(4))
    regularization = model.get_fusion_regularization_loss()
    data_loss = model(**batch).loss
    loss, outputs = trainer.compute_loss(model, batch, return_outputs=True)
    torch.testing.assert_close(loss, data_loss + regularization)
    torch.testing.assert_close(outputs.loss, data_loss)
    torch.testing.assert_close(trainer.compute_loss(model, batch), loss)
    assert regularization > 0


def test_evaluation_loss_is_the_data_loss(tmp_path):
    model = tiny_model()
    metrics = make_trainer(model, tmp_path).evaluate()
    with torch.no_grad():
        expected = model.eval()(**make_batch(make_rows(8))).loss.item()
    assert metrics["eval_loss"] == pytest.approx(expected, rel=1e-5)


def test_no_regularizer_without_a_training_fusion(tmp_path):
    model = tiny_model()
    model.train_adapter("a")
    trainer = make_trainer(model, tmp_path)
    batch = make_batch(make_rows(4))
    assert model.get_fusion_regularization_loss() is None
    torch.testing.assert_close(trainer.compute_loss(model, batch), model(**batch).loss)


@pytest.mark.parametrize("accumulation", [1, 2])
def test_gradients_are_those_of_loss_plus_regularizer(tmp_path, accumulation):
    """Each micro-batch's mean loss counts 1/accumulation; the regulariser counts once."""
    rows = make_rows(8)
    # one batch, or two micro-batches of half its size: the same mean in any order
    gradients = first_gradients(
        tiny_model(),
        tmp_path,
        rows,
        per_device_train_batch_size=8 // accumulation,
        gradient_accumulation_steps=accumulation,
    )
    model = tiny_model()
    loss = model(**make_batch(rows)).loss + model.get_fusion_regularization_loss()
    loss.backward()
    expected = {name: p.grad for name, p in trainable(model).items()}
    assert gradients.keys() == expected.keys()
    for name in expected:
        torch.testing.assert_close(gradients[name], expected[name], rtol=1e-4, atol=1e-6)


def test_regularizer_counts_once_where_the_model_scales_its_loss(tmp_path, monkeypatch):
    """With models that scale their loss by `num_items_in_batch` no division follows."""

    def gradients(regularized: bool) -> dict[str, torch.Tensor]:
        model = tiny_model()
        monkeypatch.setattr(type(model), "accepts_loss_kwargs", True)
        if not regularized:
            model.get_fusion_regularization_loss = lambda: None
        forward = model.forward
        model.forward = lambda num_items_in_batch=None, **batch: forward(**batch)
        return first_gradients(
            model,
            tmp_path,
            make_rows(8),
            gradient_accumulation_steps=2,
            remove_unused_columns=False,
        )

    with_it, without = gradients(True), gradients(False)
    model = tiny_model()
    model.get_fusion_regularization_loss().backward()
    for name, parameter in trainable(model).items():
        expected = torch.zeros_like(parameter) if parameter.grad is None else parameter.grad
        torch.testing.assert_close(with_it[name] - without[name], expected, rtol=1e-4, atol=1e-6)


# The optimizer


def test_value_matrices_are_not_decayed(tmp_path):
    model = tiny_model()
    trainer = make_trainer(model, tmp_path, weight_decay=0.1)
    decayed = set(trainer.get_decay_parameter_names(model))
    fusion = {name for name in trainable(model) if "adapter_fusion_layer" in name}
    value = {name for name in fusion if name.endswith("value.weight")}
    weights = {name for name in fusion if name.endswith(("query.weight", "key.weight"))}
    assert len(value) == 2 and len(weights) == 4
    assert not value & decayed and weights <= decayed
    groups = trainer.create_optimizer().param_groups
    by_decay = {g["weight_decay"]: {id(p) for p in g["params"]} for g in groups}
    parameters = trainable(model)
    assert {id(parameters[name]) for name in value} <= by_decay[0.0]
    assert {id(parameters[name]) for name in weights} <= by_decay[0.1]
    assert sum(len(ids) for ids in by_decay.values()) == len(parameters)


def test_only_what_trains_changes(tmp_path):
    model = tiny_model()
    before, training = values(model), set(trainable(model))
    make_trainer(model, tmp_path, max_steps=2).train()
    changed = {key for key, value in values(model).items() if not torch.equal(value, before[key])}
    assert changed <= training
    assert {name for name in changed if "adapter_fusion_layer" in name}
    assert {name for name in changed if name.startswith("heads.")}


def test_packed_weights_follow_a_fused_optimizer(tmp_path):
    """Fused AdamW writes parameters without moving their versions: evaluation must see it all the
    same."""
    model = tiny_model()
    trainer = make_trainer(model, tmp_path, optim="adamw_torch_fused", max_steps=2)
    losses = []
    for _ in range(3):
        ours = trainer.evaluate()["eval_loss"]
        model.set_backend("reference")
        assert ours == pytest.approx(trainer.evaluate()["eval_loss"], rel=1e-5)
        model.set_backend(None)
        losses.append(ours)
        trainer.train()
    assert len(set(losses)) == 3


# Checkpoints


def folders(folder: Path) -> list[Path]:
    """Where the heads of the second checkpoint lie."""
    return sorted((folder / "checkpoint-2").rglob("head_config.json"))


def checkpoint_files(folder: Path) -> set[str]:
    return {str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file()}


@pytest.mark.parametrize("name", [None, "named"])
def test_checkpoint_holds_adapters_fusions_and_heads_only(tmp_path, name):
    model = tiny_model(name=name)
    make_trainer(model, tmp_path, max_steps=1, save_strategy="steps", save_steps=1).train()
    files = checkpoint_files(tmp_path / "checkpoint-1")
    adapter = {"adapter_config.json", "adapter.safetensors"}
    fusion = {"adapter_fusion_config.json", "model_adapter_fusion.safetensors"}
    head = {"head_config.json", "model_head.safetensors"}
    expected = {f"{folder}/{file}" for folder in NAMES for file in adapter}
    expected |= {f"{name or FUSION}/{file}" for file in fusion}
    expected |= {f"head/{file}" for file in head}
    assert expected <= files
    trainers = {"optimizer.pt", "scheduler.pt", "rng_state.pth", "trainer_state.json"}
    assert files - expected == trainers | {"training_args.bin"}
    weights = {
        key
        for file in files
        if file.endswith(".safetensors")
        for key in load_file(tmp_path / "checkpoint-1" / file)
    }
    assert all(".adapters." in k or "adapter_fusion_layer" in k or "heads." in k for k in weights)


@pytest.mark.parametrize("name", [None, "named"])
def test_resumed_run_is_the_uninterrupted_one(tmp_path, name):
    args = {"max_steps": 6, "save_strategy": "steps", "save_steps": 3, "logging_steps": 1}
    model = tiny_model(dropout=0.1, name=name)
    trainer = make_trainer(model, tmp_path, **args)
    trainer.train()

    # the checkpoint has to bring everything but the base model: start from another draw
    resumed = tiny_model(dropout=0.1, name=name, init_seed=1)
    parameters, training = dict(resumed.named_parameters()), set(trainable(resumed))
    resumed_trainer = make_trainer(resumed, tmp_path / "resumed", **args)
    resumed_trainer.train(resume_from_checkpoint=str(tmp_path / "checkpoint-3"))

    assert_same(values(resumed), values(model))
    assert resumed_trainer.state.log_history[:-1] == trainer.state.log_history[:-1]
    # loaded into the parameters that were there, frozen as they were
    assert set(trainable(resumed)) == training
    assert all(p is parameters[name] for name, p in resumed.named_parameters())


def test_resume_brings_the_fusion_temperature(tmp_path):
    """It falls once per optimizer step, whatever the number of micro-batches."""
    args = {
        "max_steps": 4,
        "save_strategy": "steps",
        "save_steps": 2,
        "per_device_train_batch_size": 2,
        "gradient_accumulation_steps": 2,
    }

    def model_with_temperature():
        model = tiny_model()
        model.delete_adapter_fusion(SETUP, force=True)
        set_seed(7)
        model.add_adapter_fusion(SETUP, config={"key": True, "query": True, "temperature": True})
        model.train_adapter_fusion(SETUP)
        return model

    model = model_with_temperature()
    make_trainer(model, tmp_path, **args).train()
    resumed = model_with_temperature()
    make_trainer(resumed, tmp_path / "resumed", **args).train(
        resume_from_checkpoint=str(tmp_path / "checkpoint-2")
    )
    assert_same(values(resumed), values(model))
    buffers = [{n: b for n, b in m.named_buffers() if "temperature" in n} for m in (model, resumed)]
    assert buffers[0] and all(abs(value - 49.8) < 1e-4 for value in buffers[0].values())
    assert_same(*buffers)


def test_resume_of_single_adapter_with_its_head(tmp_path):
    """Adapter and head of one name share a folder."""

    def single(init_seed: int):
        model = tiny_model(dropout=0.1, init_seed=init_seed)
        model.add_classification_head("a", num_labels=3)
        model.train_adapter("a")
        return model

    args = {"max_steps": 4, "save_strategy": "steps", "save_steps": 2}
    model, resumed = single(0), single(1)
    make_trainer(model, tmp_path, **args).train()
    assert model.active_head == "a"
    make_trainer(resumed, tmp_path / "resumed", **args).train(
        resume_from_checkpoint=str(tmp_path / "checkpoint-2")
    )
    assert_same(values(resumed), values(model))


def test_resume_from_a_folder_without_adapters(tmp_path):
    trainer = make_trainer(tiny_model(), tmp_path, max_steps=1)
    (tmp_path / "empty").mkdir()
    with pytest.raises(ValueError, match="checkpoint: expected folders of adapters in .*empty"):
        trainer.train(resume_from_checkpoint=str(tmp_path / "empty"))


@pytest.mark.parametrize("name", [None, "named"])
@pytest.mark.parametrize("embeddings", [False, True])
def test_best_model_is_loaded_at_the_end(tmp_path, name, embeddings):
    model = tiny_model(name=name)
    if embeddings:
        model.get_input_embeddings().weight.requires_grad = True
    scores = iter([0.2, 0.9, 0.1])
    history = []

    def compute_metrics(_):
        history.append(values(model))
        return {"score": next(scores)}

    trainer = make_trainer(
        model,
        tmp_path,
        trainer_kwargs={"compute_metrics": compute_metrics},
        num_train_epochs=3,
        eval_strategy="epoch",
        save_strategy="epoch",
        load_best_model_at_end=True,
        metric_for_best_model="score",
        greater_is_better=True,
    )
    training = set(trainable(model))
    trainer.train()
    assert_same(values(model), history[1])
    assert any(not torch.equal(history[1][key], history[2][key]) for key in history[1])
    assert set(trainable(model)) == training
    assert trainer.state.best_model_checkpoint.endswith("checkpoint-8")


def test_static_head_is_saved_and_resumed(tmp_path):
    def static(init_seed: int):
        set_seed(0)
        config = tiny_config(0.1)
        config.num_labels = 3
        model = BertForSequenceClassification(config)
        fastfusion.init(model)
        set_seed(100 + init_seed)
        model.classifier.reset_parameters()
        model.add_adapter("a", config="seq_bn")
        model.train_adapter("a")
        return model

    args = {"max_steps": 4, "save_strategy": "steps", "save_steps": 2}
    model, resumed = static(0), static(1)
    make_trainer(model, tmp_path, **args).train()
    make_trainer(resumed, tmp_path / "resumed", **args).train(
        resume_from_checkpoint=str(tmp_path / "checkpoint-2")
    )
    assert_same(values(resumed), values(model))
    # once, not in every adapter's folder
    assert {str(p.relative_to(tmp_path / "checkpoint-2").parent) for p in folders(tmp_path)} == {
        "."
    }


def test_checkpoint_of_adapters_with_a_static_head(tmp_path):
    """`adapters` leaves it in every adapter's folder."""
    config = tiny_config()
    config.num_labels = 3
    models = []
    for seed in (0, 1):
        set_seed(seed)
        model = BertForSequenceClassification(config)
        fastfusion.init(model)
        model.add_adapter("a", config="seq_bn")
        model.train_adapter("a")
        models.append(model)
    models[0].save_all_adapters(str(tmp_path), with_head=True)
    make_trainer(models[1], tmp_path / "out")._load_from_checkpoint(str(tmp_path))
    assert_same(*({k: v for k, v in values(m).items() if "classifier" in k} for m in models))


def test_resume_brings_what_else_is_trained(tmp_path):
    """Embeddings, and any other weight of the base model that was unfrozen."""

    def trained(init_seed: int):
        model = tiny_model(dropout=0.1, init_seed=init_seed)
        model.train_adapter("a", train_embeddings=True)
        model.bert.encoder.layer[0].output.LayerNorm.bias.requires_grad = True
        return model

    args = {"max_steps": 6, "save_strategy": "steps", "save_steps": 3}
    model, resumed = trained(0), trained(1)
    embeddings = model.get_input_embeddings().weight.clone()
    make_trainer(model, tmp_path, **args).train()
    assert not torch.equal(model.get_input_embeddings().weight, embeddings)
    checkpoint = tmp_path / "checkpoint-3"
    file = checkpoint / "trained_base_weights.safetensors"
    assert set(load_file(file)) == {
        "embeddings.word_embeddings.weight",
        "encoder.layer.0.output.LayerNorm.bias",
    }
    training = set(trainable(resumed))
    make_trainer(resumed, tmp_path / "resumed", **args).train(resume_from_checkpoint=checkpoint)
    assert_same(values(resumed), values(model))
    assert set(trainable(resumed)) == training

    trainer = make_trainer(trained(2), tmp_path / "again", **args)
    before = values(trainer.model)
    save_file({"embeddings.word_embeddings.weight": torch.ones(2, 2)}, file)
    with pytest.raises(ValueError, match=r"expected weights.*got \['embeddings.word_embeddings"):
        trainer._load_from_checkpoint(str(checkpoint))
    assert_same(values(trainer.model), before)
    file.unlink()
    with pytest.warns(UserWarning, match=r"lacks \['embeddings.word_embeddings.weight', "):
        trainer._load_from_checkpoint(str(checkpoint))


# Prediction, errors, plain Trainer


def test_predict(tmp_path):
    model = tiny_model()
    trainer = make_trainer(
        model,
        tmp_path,
        trainer_kwargs={
            "compute_metrics": lambda p: {"acc": (p.predictions.argmax(1) == p.label_ids).mean()}
        },
    )
    assert trainer.label_names == ["labels"]
    result = trainer.predict(make_rows(8))
    with torch.no_grad():
        logits = model.eval()(**make_batch(make_rows(8))).logits
    np.testing.assert_allclose(result.predictions, logits.numpy(), rtol=1e-4, atol=1e-5)
    assert result.metrics["test_acc"] == (logits.argmax(1).numpy() == result.label_ids).mean()


@pytest.mark.parametrize("sizes", [(3, 3), (3, 5)], ids=["equal", "different"])
def test_predict_rows_with_heads_of_their_own(tmp_path, sizes):
    """Every row's logits, in the order of the data set, whatever heads a batch has."""
    model = tiny_model()
    for name, size in zip("ab", sizes, strict=True):
        model.add_classification_head(name, num_labels=size)
    model.train_adapter(MultiTask("a", "b"))
    rows, tasks = make_rows(9), [0, 0, 0, 0, 1, 0, 1, 1, 1]
    rows = [{**row, "task_ids": task} for row, task in zip(rows, tasks, strict=True)]
    found = []
    trainer = make_trainer(
        model,
        tmp_path,
        remove_unused_columns=False,
        per_device_eval_batch_size=4,
        trainer_kwargs={"compute_metrics": lambda p: found.append(p) or {}},
    )
    for is_labelled in (True, False):
        given = rows if is_labelled else [{k: r[k] for k in r if k != "labels"} for r in rows]
        predictions = trainer.predict(given).predictions
        assert predictions.shape == (9, max(sizes))
        for i, row in enumerate(rows):
            with torch.no_grad():
                (part,) = model.eval()(row["input_ids"][None], task_ids=torch.tensor([tasks[i]]))
            size = sizes[tasks[i]]
            np.testing.assert_allclose(
                predictions[i, :size], part.logits[0].numpy(), rtol=1e-4, atol=1e-5
            )
            assert (predictions[i, size:] == -100).all()
    assert [p.predictions.shape for p in found] == [(9, max(sizes))]
    np.testing.assert_array_equal(found[0].label_ids, [row["labels"].item() for row in rows])
    trainer.compute_metrics = None
    assert trainer.evaluate(rows)["eval_loss"] > 0


def test_adapter_names_activates_a_setup(tmp_path):
    model = tiny_model()
    model.train_adapter("a")
    trainer = make_trainer(model, tmp_path, trainer_kwargs={"adapter_names": Fuse("a", "b", "c")})
    assert trainer.model.active_adapters == SETUP


def test_needs_active_adapters(tmp_path):
    model = tiny_model()
    model.set_active_adapters(None)
    with pytest.raises(ValueError, match=r"expected active adapters.*train_adapter_fusion"):
        make_trainer(model, tmp_path)


def test_needs_a_patched_model(tmp_path):
    model = BertForSequenceClassification(tiny_config())
    with pytest.raises(ValueError, match=r"fastfusion\.init\(model\)"):
        make_trainer(model, tmp_path)
    with pytest.raises(ValueError, match=r"fastfusion\.init\(model\)"):
        make_trainer(model, tmp_path, trainer_kwargs={"adapter_names": "a"})


@pytest.mark.parametrize("name", ["glue/sst2", "x" * 300])
def test_names_must_fit_a_checkpoint(tmp_path, name):
    model = tiny_model()
    model.add_adapter(name)
    model.train_adapter(name)
    before = values(model)
    trainer = make_trainer(model, tmp_path / "out", max_steps=1, save_strategy="steps")
    with pytest.raises(ValueError, match=f"no checkpoint can be written: name: '{name}' cannot"):
        trainer.train()
    assert_same(values(model), before)
    make_trainer(model, tmp_path / "out", max_steps=1, save_strategy="no").train()


def test_needs_a_frozen_model(tmp_path):
    model = tiny_model()
    model.freeze_model(False)
    trainer = make_trainer(model, tmp_path, max_steps=1)
    with pytest.raises(ValueError, match=r"expected frozen base weights.*train_adapter\(name\)"):
        trainer.train()


def test_plain_trainer(tmp_path):
    """Trains and evaluates; no regulariser; its checkpoint is the whole model."""
    model = tiny_model()
    trainer = make_trainer(
        model, tmp_path, Trainer, max_steps=2, save_strategy="steps", save_steps=2
    )
    before = values(model)
    batch = make_batch(make_rows(4))
    torch.testing.assert_close(trainer.compute_loss(model, dict(batch)), model(**batch).loss)
    first = trainer.evaluate()["eval_loss"]
    trainer.train()
    assert trainer.evaluate()["eval_loss"] != first
    changed = {key for key, value in values(model).items() if not torch.equal(value, before[key])}
    assert changed and all("adapter_fusion_layer" in key or "heads." in key for key in changed)
    reloaded = AutoAdapterModel.from_pretrained(str(tmp_path / "checkpoint-2"))
    assert_same(values(reloaded), values(model))


@pytest.mark.parametrize("trainer_class", [AdapterTrainer, Trainer])
@pytest.mark.parametrize(
    ("setup", "column"),
    [(Parallel(*NAMES), "adapter_ids"), (MultiTask(*NAMES), "task_ids")],
    ids=["adapter_ids", "task_ids"],
)
def test_rows_with_setups_of_their_own(tmp_path, trainer_class, setup, column):
    """The data say which row has which adapter and head: those alone move."""
    set_seed(0)
    model = AutoAdapterModel.from_config(tiny_config())
    for name in NAMES:
        model.add_adapter(name)
        model.add_classification_head(name, num_labels=3)
    model.train_adapter(setup)
    model.routing(NAMES)
    rows = [{**row, column: torch.tensor(1 + i % 2)} for i, row in enumerate(make_rows())]
    before = values(model)
    trainer = make_trainer(model, tmp_path, trainer_class, rows=rows, max_steps=2)
    trainer.train()
    changed = {key for key, value in values(model).items() if not torch.equal(value, before[key])}
    assert {key.split(".adapters.")[1][0] for key in changed if ".adapters." in key} == {"b", "c"}
    assert {key.split(".")[1] for key in changed if key.startswith("heads.")} == {"b", "c"}
    assert all(".adapters." in key or key.startswith("heads.") for key in changed)
    evaluated = trainer.evaluate(rows)
    with torch.no_grad():
        losses = [model(**make_batch(rows[i : i + 8])).loss for i in (0, 8)]
    assert evaluated["eval_loss"] == pytest.approx(torch.stack(losses).mean().item(), rel=1e-4)


# Against adapters

PEER = os.environ.get("FASTFUSION_PEER_PYTHON")
PEER_TRAINING = """
import json, sys
import torch
from adapters import AdapterTrainer, AutoAdapterModel, Fuse
from safetensors.torch import load_file, save_file
from transformers import TrainingArguments

folder, setup, steps = sys.argv[1], json.loads(sys.argv[2]), int(sys.argv[3])
model = AutoAdapterModel.from_pretrained(folder + "/base")
for name in ("a", "b", "c"):
    model.load_adapter(folder + "/start/" + name, use_safetensors=True, with_head=False)
if len(setup) > 1:
    model.load_adapter_fusion(folder + "/start/" + ",".join(setup), use_safetensors=True)
model.load_head(folder + "/start/head", use_safetensors=True)
model.train_adapter_fusion(Fuse(*setup)) if len(setup) > 1 else model.train_adapter(setup[0])
model.active_head = "head"
data = load_file(folder + "/data.safetensors")
rows = [{"input_ids": i, "labels": l} for i, l in zip(data["input_ids"], data["labels"])]
args = TrainingArguments(
    output_dir=folder + "/peer", max_steps=steps, per_device_train_batch_size=len(rows),
    learning_rate=1e-2, weight_decay=0.1, report_to="none", disable_tqdm=True, use_cpu=True,
    save_strategy="no",
)
AdapterTrainer(model=model, args=args, train_dataset=rows).train()
trained = {n: p.detach().contiguous() for n, p in model.named_parameters() if p.requires_grad}
save_file(trained, folder + "/trained.safetensors")
"""


@pytest.mark.peer
@pytest.mark.parametrize("setup", [["a"], list(NAMES)], ids=["adapter", "fusion"])
def test_same_training_as_adapters(tmp_path, setup):
    """Three steps of AdamW from the same files.

    The fusion is the static one: `adapters` regularises a value matrix late, and decays it.
    """
    if not PEER:
        pytest.skip("FASTFUSION_PEER_PYTHON is not set")
    set_seed(0)
    BertModel(tiny_config()).save_pretrained(tmp_path / "base")
    model = AutoAdapterModel.from_pretrained(str(tmp_path / "base"))
    for name in NAMES:
        model.add_adapter(name, config="seq_bn")
    model.add_adapter_fusion(SETUP, config="static")
    model.add_classification_head("head", num_labels=3)
    start = tmp_path / "start"
    model.save_all_adapters(str(start), with_head=False)
    model.save_all_adapter_fusions(str(start))
    model.save_all_heads(str(start))
    rows = make_rows(8)
    save_file(make_batch(rows), tmp_path / "data.safetensors")

    if len(setup) > 1:
        model.train_adapter_fusion(Fuse(*setup))
    else:
        model.train_adapter(setup[0])
    model.active_head = "head"
    make_trainer(
        model,
        tmp_path / "ours",
        rows=rows,
        max_steps=3,
        per_device_train_batch_size=len(rows),
        weight_decay=0.1,
    ).train()

    arguments = [str(tmp_path), json.dumps(setup), "3"]
    subprocess.run([PEER, "-c", PEER_TRAINING, *arguments], check=True)
    peer = load_file(tmp_path / "trained.safetensors")
    ours = trainable(model)
    assert ours.keys() == peer.keys()
    for name, parameter in ours.items():
        # AdamW divides by the gradient's root mean square: rounding in tiny gradients shows
        torch.testing.assert_close(parameter.detach(), peer[name], rtol=1e-4, atol=1e-4)
