"""Prediction heads: the numbers of `adapters`, losses, and choosing among heads by name."""

import contextlib
import copy
import json
import pickle
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file
from torch import nn
from transformers import BertConfig, DistilBertConfig, ElectraConfig, RobertaConfig
from transformers.modeling_outputs import BaseModelOutput, SequenceClassifierOutput

from fastfusion.heads import (
    ClassificationHead,
    FlexibleHeadsMixin,
    MultiLabelClassificationHead,
    head_from_config,
)

GOLDEN = Path(__file__).parent / "golden"
CONFIGS = {"bert": BertConfig, "roberta": RobertaConfig, "distilbert": DistilBertConfig}


class Host(FlexibleHeadsMixin, nn.Module):
    """As much of a model as heads need."""

    device = torch.device("cpu")
    dtype = torch.float32

    def __init__(self, config):
        super().__init__()
        self.config = config
        self.init_heads()

    def _init_weights(self, module):
        if isinstance(module, nn.Linear):
            nn.init.normal_(module.weight, std=self.config.initializer_range)
            if module.bias is not None:
                nn.init.zeros_(module.bias)


@pytest.fixture
def host():
    torch.manual_seed(0)
    return Host(BertConfig(hidden_size=8, hidden_dropout_prob=0.2)).eval()


def _states(batch=3, length=5, hidden_size=8):
    generator = torch.Generator().manual_seed(1)
    return torch.randn(batch, length, hidden_size, generator=generator)


@contextlib.contextmanager
def unchanged(host):
    """No other head, active head or labels after the block."""

    def state():
        heads = {name: id(head) for name, head in host.heads.items()}
        return heads, host.active_head, host.config.to_dict()

    before = copy.deepcopy(state())
    yield
    assert state() == before


@pytest.mark.parametrize(
    ("group", "head", "states_case", "logits_case"),
    [
        ("roberta-mix", "h", "c01", "c10"),
        ("roberta-mix", "h", "c03", "c11"),
        ("distilbert-mix", "h", "c01", "c10"),
        ("distilbert-mix", "h", "c03", "c11"),
    ],
)
def test_golden_logits(group, head, states_case, logits_case):
    directory = GOLDEN / "groups" / group
    cases = load_file(directory / "io.safetensors")
    model_type = group.split("-")[0]
    config = CONFIGS[model_type].from_pretrained(GOLDEN / "models" / model_type)
    saved = json.loads((directory / "heads" / head / "head_config.json").read_text())
    weights = directory / "heads" / head / "model_head.safetensors"
    if weights.exists():
        state = load_file(weights)
    else:
        state = torch.load(weights.with_name("pytorch_model_head.bin"), weights_only=True)
    module = head_from_config(Host(config).eval(), head, saved["config"])
    module.load_state_dict({k.removeprefix(f"heads.{head}."): v for k, v in state.items()})
    assert module.config == saved["config"]

    states = cases[f"cases/{states_case}/last_hidden_state"]
    output = module(BaseModelOutput(states), return_dict=True)
    torch.testing.assert_close(
        output.logits, cases[f"cases/{logits_case}/logits"], rtol=1e-5, atol=1e-5
    )


@pytest.mark.parametrize("case", ["c00", "c01", "c02"])
def test_golden_loss(case):
    cases = load_file(GOLDEN / "groups/bert-grad/io.safetensors")
    config = BertConfig.from_pretrained(GOLDEN / "models/bert")
    head = ClassificationHead(Host(config), "cls", num_labels=3)
    loss = head.loss(cases[f"cases/{case}/logits"], cases["inputs/in0/labels"])
    torch.testing.assert_close(loss, cases[f"cases/{case}/loss"], rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(
    ("arguments", "keys"),
    [
        ({}, ["1.weight", "1.bias", "4.weight", "4.bias"]),
        ({"layers": 1}, ["1.weight", "1.bias"]),
        ({"activation_function": None}, ["1.weight", "1.bias", "3.weight", "3.bias"]),
        ({"layers": 1, "bias": False}, ["1.weight"]),
        ({"layers": 3}, [f"{i}.{p}" for i in (1, 4, 7) for p in ("weight", "bias")]),
    ],
)
def test_state_dict_keys(host, arguments, keys):
    host.add_classification_head("x", **arguments)
    assert list(host.heads.state_dict()) == [f"x.{key}" for key in keys]


def test_forward_is_the_formula(host):
    host.add_classification_head("x", num_labels=3)
    first, last = host.heads["x"][1], host.heads["x"][4]
    states = _states()
    expected = last(torch.tanh(first(states[:, 0])))
    torch.testing.assert_close(host.forward_head((states,))[0], expected)
    given = host.forward_head((states,), cls_output=states[:, 2])[0]
    torch.testing.assert_close(given, last(torch.tanh(first(states[:, 2]))))


def test_losses(host):
    states, labels = _states(), torch.tensor([2, 0, 1])
    host.add_classification_head("classes", num_labels=3)
    loss, logits = host.forward_head((states,), labels=labels)
    torch.testing.assert_close(loss, F.cross_entropy(logits, labels))

    host.add_classification_head("regression", num_labels=1)
    for values in (torch.tensor([0.5, -1.0, 2.0]), torch.tensor([[1], [0], [2]])):
        loss, logits = host.forward_head((states,), labels=values)
        torch.testing.assert_close(loss, ((logits[:, 0] - values.view(-1)) ** 2).mean())

    host.add_classification_head("tags", num_labels=3, multilabel=True)
    assert isinstance(host.heads["tags"], MultiLabelClassificationHead)
    for values in (torch.tensor([[1, 0, 1]] * 3), torch.tensor([[1.0, 0.0, 0.2]] * 3)):
        loss, logits = host.forward_head((states,), labels=values)
        expected = F.binary_cross_entropy_with_logits(logits, values.float())
        torch.testing.assert_close(loss, expected)


def test_output_classes(host):
    host.add_classification_head("x")
    states = _states()
    outputs = BaseModelOutput(states, hidden_states=(states, states), attentions=(states,))
    output = host.forward_head(outputs, return_dict=True)
    assert isinstance(output, SequenceClassifierOutput)
    assert output.loss is None and output.logits.shape == (3, 2)
    assert output.hidden_states is outputs.hidden_states
    assert output.attentions is outputs.attentions
    plain = host.forward_head((states, "pooled", "hidden"), labels=torch.tensor([0, 1, 0]))
    assert len(plain) == 4 and plain[2:] == ("pooled", "hidden")


def test_pooler(host):
    host.add_classification_head("x", use_pooler=True, layers=1)
    states, pooled = _states(), torch.randn(3, 8)
    logits = host.forward_head((states,), pooled_output=pooled)[0]
    torch.testing.assert_close(logits, host.heads["x"][1](pooled))
    with pytest.raises(ValueError, match="pooler"):
        host.forward_head((states,))


@pytest.mark.parametrize("config_class", [BertConfig, RobertaConfig, ElectraConfig])
@pytest.mark.parametrize(
    ("settings", "expected"),
    [
        ({}, 0.1),
        ({"hidden_dropout_prob": 0.2}, 0.2),
        ({"hidden_dropout_prob": 0.2, "classifier_dropout": 0.3}, 0.3),
        ({"hidden_dropout_prob": 0.2, "classifier_dropout": 0.0}, 0.0),
    ],
)
def test_dropout_probability(config_class, settings, expected):
    host = Host(config_class(hidden_size=8, **settings))
    assert [m.p for m in ClassificationHead(host, "x") if isinstance(m, nn.Dropout)] == [
        expected,
        expected,
    ]
    assert ClassificationHead(host, "x", dropout_prob=0.4)[0].p == 0.4


@pytest.mark.parametrize(
    ("settings", "expected"),
    [
        ({}, 0.2),
        ({"dropout": 0.3}, 0.2),
        ({"dropout": 0.3, "seq_classif_dropout": 0.4}, 0.4),
        ({"dropout": 0.3, "seq_classif_dropout": 0.0}, 0.0),
        ({"dropout": 0.3, "seq_classif_dropout": None}, 0.3),
        ({"dropout": None, "seq_classif_dropout": None}, 0.0),
    ],
)
def test_dropout_probability_of_distilbert(settings, expected):
    """Its configuration has names of its own; the numbers are those of `adapters`."""
    host = Host(DistilBertConfig(dim=8, n_heads=2))
    vars(host.config).update(settings)  # transformers 5 refuses None, earlier ones keep it
    assert ClassificationHead(host, "x")[0].p == expected
    assert ClassificationHead(host, "x", dropout_prob=0.4)[0].p == 0.4


def test_head_takes_mode_dtype_and_initialisation(host):
    host.dtype = torch.bfloat16
    host.add_classification_head("x")
    assert not host.heads["x"].training
    assert {p.dtype for p in host.heads["x"].parameters()} == {torch.bfloat16}
    assert host.heads["x"][1].bias.abs().sum() == 0
    host.train()
    host.add_classification_head("y")
    assert host.heads["y"].training


def test_choosing_a_head(host):
    assert host.active_head is None
    states = _states()
    outputs = (states,)
    assert host.forward_head(outputs) is outputs
    host.add_classification_head("a", num_labels=2)
    host.add_classification_head("b", id2label={0: "no", 1: "yes", 2: "maybe"}, num_labels=3)
    assert host.active_head == "b" and host.head_type() == "classification"
    assert host.get_labels() == ["no", "yes", "maybe"]
    assert host.get_labels_dict("a") == {0: "LABEL_0", 1: "LABEL_1"}
    assert host.config.label2id == {"no": 0, "yes": 1, "maybe": 2}
    assert host.forward_head(outputs)[0].shape == (3, 3)
    assert host.forward_head(outputs, head_name="a")[0].shape == (3, 2)
    host.active_head = "a"
    assert host.config.num_labels == 2
    host.active_head = None
    with pytest.raises(ValueError, match="no head is active"):
        host.get_labels()
    with pytest.raises(ValueError, match=r"\['a', 'b'\].*'c'"):
        host.active_head = "c"
    with pytest.raises(ValueError, match="'c'"):
        host.forward_head(outputs, head_name="c")


def test_adding_and_deleting(host):
    host.add_classification_head("a")
    with pytest.raises(ValueError, match="overwrite_ok"):
        host.add_classification_head("a", num_labels=4)
    host.add_classification_head("a", num_labels=4, overwrite_ok=True)
    assert host.heads["a"].config["num_labels"] == 4
    assert host.config.prediction_heads["a"]["num_labels"] == 4
    host.delete_head("a")
    assert host.active_head is None and len(host.heads) == 0
    assert host.config.prediction_heads == {}
    with pytest.raises(ValueError, match="'a'"):
        host.delete_head("a")


@pytest.mark.parametrize(
    ("arguments", "named"),
    [
        *(({"num_labels": n}, "num_labels: expected an int") for n in (0, True, 2.0, "2", None)),
        ({"layers": 0}, "layers"),
        ({"layers": True}, "layers"),
        ({"activation_function": "tanhh"}, "tanhh"),
        ({"dropout_prob": 2.0}, "dropout"),
        ({"head_name": "a.b"}, "head_name"),
    ],
)
def test_invalid_arguments(host, arguments, named):
    with unchanged(host), pytest.raises(ValueError, match=named):
        host.add_classification_head(**{"head_name": "x", **arguments})


LABELS = {
    "missing": {0: "a", 2: "c"},
    "not from 0": {1: "a", 2: "b"},
    "equal labels": {0: "a", 1: "a"},
    "equal numbers": {0: "a", "0": "b"},
    "no number": {0: "a", "one": "b"},
    "half": {0: "a", 0.5: "b"},
    "no number at all": {0: "a", None: "b"},
    "unhashable label": {0: "a", 1: ["b"]},
    "list": ["a", "b"],
}


@pytest.mark.parametrize("labels", LABELS.values(), ids=LABELS)
@pytest.mark.parametrize("multilabel", [False, True])
def test_wrong_id2label(host, labels, multilabel):
    host.add_classification_head("x")
    with unchanged(host), pytest.raises(ValueError, match=r"^id2label: expected .*; got "):
        host.add_classification_head("x", id2label=labels, multilabel=multilabel, overwrite_ok=True)
    config = {"head_type": "classification", "id2label": labels}
    with unchanged(host), pytest.raises(ValueError, match=r"^id2label: expected .*; got "):
        host.add_prediction_head_from_config("x", config, overwrite_ok=True)


@pytest.mark.parametrize(
    "labels",
    [
        {"a": 0, "b": 2},
        {"a": 0, "b": 0},
        {"a": 0, "b": "one"},
        {"a": 0, "b": None},
        {"a": 0, "b": [1]},
        {"a": 0, "b": float("inf")},
        {"a": 0, None: 1},
        {"a": 0, 0.5: 1},
        {"a": 0, True: 1},
        {"a": 0, ("b", "c"): 1},
        {"1": 0, 1: 1},
        ["a", "b"],
        "ab",
    ],
)
def test_wrong_label2id(host, labels):
    host.add_classification_head("x")
    config = {"head_type": "classification", "label2id": labels}
    with unchanged(host), pytest.raises(ValueError, match=r"^label2id: expected .*; got "):
        host.add_prediction_head_from_config("x", config, overwrite_ok=True)


@pytest.mark.parametrize("num_labels", [1, 3])
def test_number_of_labels(host, num_labels):
    host.add_classification_head("x")
    expected = rf"^num_labels: expected 2, .*\['a', 'b'\]; got {num_labels}$"
    with unchanged(host), pytest.raises(ValueError, match=expected):
        host.add_classification_head("x", num_labels, id2label={0: "a", 1: "b"}, overwrite_ok=True)


def test_number_of_labels_in_a_config(host):
    """adapters writes two labels for a regression that it converts from transformers' head."""
    config = {"head_type": "classification", "num_labels": 1, "label2id": {"b": 1, "a": 0}}
    host.add_prediction_head_from_config("x", config)
    assert host.heads["x"].config["label2id"] == {"a": 0}
    for labels, num_labels in (("ab", 3), ("abc", 2)):
        label2id = {label: i for i, label in enumerate(labels)}
        expected = rf"^num_labels: expected {len(labels)}, .*; got {num_labels}$"
        with unchanged(host), pytest.raises(ValueError, match=expected):
            host.add_prediction_head_from_config(
                "y", {**config, "num_labels": num_labels, "label2id": label2id}
            )


@pytest.mark.parametrize(
    ("labels", "label2id"),
    [
        ({"0": "a", "1": "b"}, {"a": 0, "b": 1}),
        ({1: "b", 0: "a"}, {"b": 1, "a": 0}),
        ({np.int64(0): "a", np.int64(1): "b"}, {"a": 0, "b": 1}),
        ({False: "no", True: "yes"}, {"no": 0, "yes": 1}),
        ({0: 1, 1: np.int64(0)}, {"1": 0, "0": 1}),
        ({}, {"LABEL_0": 0, "LABEL_1": 1}),
        (None, {"LABEL_0": 0, "LABEL_1": 1}),
    ],
)
def test_labels_that_adapters_takes(host, labels, label2id):
    host.add_classification_head("x", num_labels=np.int64(2), id2label=labels)
    expected = {"num_labels": 2, "label2id": label2id}
    assert host.heads["x"].config.items() >= expected.items()
    assert host.get_labels() == list(label2id)
    json.dumps(host.heads["x"].config)
    inverse = None if labels is None else {label: i for i, label in labels.items()}
    for config in ({"id2label": labels}, {"label2id": inverse}):
        head = head_from_config(host, "y", {"head_type": "classification", **config})
        assert head.config["label2id"] == label2id


def test_heads_come_back_from_the_config(host):
    host.add_classification_head("a", num_labels=3, id2label={0: "x", 1: "y", 2: "z"})
    host.add_classification_head("b", multilabel=True, layers=1)
    again = Host(BertConfig.from_dict(json.loads(host.config.to_json_string())))
    again.load_state_dict(host.state_dict())
    assert {name: head.config for name, head in again.heads.items()} == {
        name: head.config for name, head in host.heads.items()
    }
    assert again.active_head == "b"
    assert isinstance(again.heads["b"], MultiLabelClassificationHead)


def test_head_from_config_refuses(host):
    with pytest.raises(NotImplementedError, match="masked_lm"):
        head_from_config(host, "x", {"head_type": "masked_lm", "layers": 2})
    with pytest.raises(ValueError, match="expected a mapping; got None"):
        head_from_config(host, "x", None)
    with pytest.raises(ValueError, match="no_such_key"):
        head_from_config(host, "x", {"head_type": "classification", "no_such_key": 1})
    # of both, id2label counts
    both = {"id2label": {0: "a", 1: "b"}, "label2id": {"c": 0}}
    head = head_from_config(host, "x", {"head_type": "classification", **both})
    assert head.config["label2id"] == {"a": 0, "b": 1}
    # files of early libraries lack some keys
    head = head_from_config(host, "x", {"head_type": "classification", "label2id": None})
    assert head.config["label2id"] == {"LABEL_0": 0, "LABEL_1": 1}


def test_copies(host):
    host.add_classification_head("a")
    states = (_states(),)
    expected = host.forward_head(states)[0]
    for head in (copy.deepcopy(host.heads["a"]), pickle.loads(pickle.dumps(host.heads["a"]))):
        torch.testing.assert_close(head(states)[0], expected)
