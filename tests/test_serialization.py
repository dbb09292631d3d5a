"""Files: those of `adapters` in both directions, exact names, whole writes, and what is refused."""

import contextlib
import inspect
import json
import os
import pickle
import re
import subprocess
import sys
import warnings
import zipfile
from pathlib import Path

import pytest
import safetensors.torch
import torch
from torch.nn.utils.parametrizations import weight_norm
from torch.nn.utils.parametrize import register_parametrization
from transformers import AutoModel, BertForMaskedLM, BertForSequenceClassification

import fastfusion.serialization as files
from fastfusion.composition import Fuse
from fastfusion.configuration import (
    AdapterConfig,
    AdapterFusionConfig,
    SeqBnConfig,
    get_adapter_config_hash,
)
from fastfusion.flexible import AutoAdapterModel
from fastfusion.model import ModelAdaptersMixin, init
from fastfusion.serialization import ADAPTER_FILES, FUSION_FILES, HEAD_FILES, read_files

GOLDEN = Path(__file__).parent / "golden"
GROUPS = {
    group["id"]: group for group in json.loads((GOLDEN / "manifest.json").read_text())["groups"]
}
OWN_GROUPS = sorted(path.name for path in (GOLDEN / "groups").iterdir())


def flexible(name="bert"):
    model = AutoAdapterModel.from_pretrained(GOLDEN / "models" / name, attn_implementation="eager")
    return model.eval()


def bare(name="bert"):
    model = AutoModel.from_pretrained(GOLDEN / "models" / name, attn_implementation="eager").eval()
    init(model)
    return model


def static(num_labels=3):
    model = BertForSequenceClassification.from_pretrained(
        GOLDEN / "models/bert", num_labels=num_labels
    ).eval()
    init(model)
    return model


def randomize(model, seed=0):
    """Adapters, fusions and heads far from where they start."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if any(part in name for part in ("adapters.", "adapter_fusion_layer.", "heads.")):
                parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.3)


@pytest.fixture
def model():
    torch.manual_seed(0)
    model = flexible()
    model.add_adapter("a", config="seq_bn[reduction_factor=8]")
    model.add_adapter("b", config="double_seq_bn")
    model.add_adapter("c", config="seq_bn[reduction_factor=4]")
    model.add_adapter_fusion(["a", "c"])
    model.add_classification_head("a", num_labels=3)
    randomize(model)
    return model


def snapshot(model):
    record = model.adapters_config
    state = {k: v.clone() for k, v in model.state_dict().items()}
    head = getattr(model, "active_head", None)
    labels = (dict(model.config.label2id), dict(model.config.id2label))
    return record.to_dict(), record.active_setup, head, labels, state


def assert_same(before, after):
    assert before[:-1] == after[:-1]
    assert before[-1].keys() == after[-1].keys()
    for key, tensor in before[-1].items():
        torch.testing.assert_close(after[-1][key], tensor, rtol=0, atol=0, equal_nan=True, msg=key)


@contextlib.contextmanager
def unchanged(model):
    """The model is the same afterwards, bit for bit."""
    before = snapshot(model)
    yield
    assert_same(before, snapshot(model))


@contextlib.contextmanager
def no_warnings():
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        yield


def assert_equal(left, right):
    assert left.keys() == right.keys()
    for key in left:
        assert torch.equal(left[key], right[key]), key


PEER_PARAMETERS = {
    "save_adapter": "save_directory adapter_name with_head meta_dict custom_weights_loaders "
    "use_safetensors",
    "save_all_adapters": "save_directory with_head meta_dict custom_weights_loaders "
    "use_safetensors",
    "load_adapter": "adapter_name_or_path config version model_name load_as with_head "
    "custom_weights_loaders leave_out id2label set_active use_safetensors",
    "save_adapter_fusion": "save_directory adapter_names meta_dict custom_weights_loaders "
    "with_head use_safetensors",
    "save_all_adapter_fusions": "save_directory meta_dict custom_weights_loaders use_safetensors",
    "load_adapter_fusion": "adapter_fusion_name_or_path load_as custom_weights_loaders set_active "
    "with_head use_safetensors",
    "save_head": "save_directory head_name use_safetensors",
    "load_head": "save_directory load_as id2label use_safetensors",
    "save_all_heads": "save_directory use_safetensors",
}
"""Parameters of the methods of `adapters` 1.3.0, on models with heads."""


@pytest.mark.parametrize("method", PEER_PARAMETERS)
def test_parameters_are_those_of_adapters(method):
    """A call that both libraries take means the same thing in both."""
    theirs = PEER_PARAMETERS[method].split()
    ours = list(inspect.signature(getattr(ModelAdaptersMixin, method)).parameters.values())[1:]
    positional = [p.name for p in ours if p.kind is p.POSITIONAL_OR_KEYWORD]
    assert positional and positional == theirs[: len(positional)]
    absent = {"custom_weights_loaders", "version", "model_name"}
    assert set(theirs) - {p.name for p in ours} == absent & set(theirs)


@pytest.mark.parametrize("use_safetensors", [True, False])
@pytest.mark.parametrize("group", OWN_GROUPS)
def test_golden_round_trip(group, use_safetensors, tmp_path):
    """What `adapters` wrote is loaded, and written again with the same keys, tensors and JSON."""
    directory = GOLDEN / "groups" / group
    model = (
        static() if GROUPS[group].get("loader") == "static" else flexible(GROUPS[group]["model"])
    )
    with no_warnings():
        for path in sorted(directory.glob("adapters/*")):
            assert files.load_adapter(model, path) == path.name
        for path in sorted(directory.glob("fusions/*")):
            assert files.load_adapter_fusion(model, path) == path.name
        heads = [
            path
            for path in sorted(directory.glob("heads/*"))
            if read_files(path, HEAD_FILES)[0]["config"]["head_type"] != "masked_lm"
        ]
        for path in heads:
            assert files.load_head(model, path) == path.name

    files.save_all_adapters(model, tmp_path, use_safetensors=use_safetensors)
    files.save_all_adapter_fusions(model, tmp_path, use_safetensors=use_safetensors)
    pairs = [(path, ADAPTER_FILES) for path in directory.glob("adapters/*")]
    pairs += [(path, FUSION_FILES) for path in directory.glob("fusions/*")]
    if hasattr(model, "heads"):
        files.save_all_heads(model, tmp_path, use_safetensors=use_safetensors)
        pairs += [(path, HEAD_FILES) for path in heads]
    else:
        pairs += [(path, HEAD_FILES) for path in directory.glob("adapters/*")]
    for path, names in pairs:
        config, tensors = read_files(path, names)
        written, written_tensors = read_files(tmp_path / path.name, names, use_safetensors)
        assert_equal(tensors, written_tensors)
        assert written.pop("fastfusion_version")
        has_temperature = names is FUSION_FILES and config["config"]["temperature"]
        assert ("temperature" in written) == has_temperature
        written.pop("temperature", None)
        # the name under which the model was loaded differs
        assert {**written, "model_name": config["model_name"]} == config
        weights = sorted(p.name for p in (tmp_path / path.name).iterdir() if p.suffix != ".json")
        assert (names.safetensors if use_safetensors else names.pickle) in weights
        assert len(weights) == len({p.stem for p in (tmp_path / path.name).glob("*.json")})


@pytest.mark.parametrize("name", ["bert", "roberta", "distilbert"])
def test_prefix_is_added_and_stripped(name, tmp_path):
    with_prefix, without = flexible(name), bare(name)
    with_prefix.add_adapter("a", config="double_seq_bn")
    with_prefix.add_adapter("b", config="double_seq_bn")
    with_prefix.add_adapter_fusion(["a", "b"])
    randomize(with_prefix)
    files.save_all_adapters(with_prefix, tmp_path / "1")
    files.save_all_adapter_fusions(with_prefix, tmp_path / "1")
    for model, source, target in ((without, "1", "2"), (flexible(name), "2", "3")):
        for adapter in ("a", "b"):
            files.load_adapter(model, tmp_path / source / adapter)
        files.load_adapter_fusion(model, tmp_path / source / "a,b")
        files.save_all_adapters(model, tmp_path / target)
        files.save_all_adapter_fusions(model, tmp_path / target)
    for directory, names in (("a", ADAPTER_FILES), ("b", ADAPTER_FILES), ("a,b", FUSION_FILES)):
        first, second, third = (read_files(tmp_path / i / directory, names)[1] for i in "123")
        assert all(key.startswith(f"{name}.") for key in first)
        assert not any(key.startswith(f"{name}.") for key in second)
        assert_equal(first, third)
        assert_equal(first, {f"{name}.{key}": tensor for key, tensor in second.items()})


def test_static_head_between_models(tmp_path):
    directory = GOLDEN / "groups/bert-static-head/adapters/a"
    model = static()
    model.config.id2label, model.config.label2id = (
        {0: "x", 1: "y", 2: "z"},
        {"x": 0, "y": 1, "z": 2},
    )
    assert files.load_head(model, directory) is None
    assert_equal(read_files(directory, HEAD_FILES)[1], {
        key: model.state_dict()[key] for key in ("classifier.weight", "classifier.bias")
    })  # fmt: skip
    assert model.config.label2id == {f"LABEL_{i}": i for i in range(3)}
    files.load_head(model, directory, id2label={0: "x", 1: "y", 2: "z"})
    assert model.config.id2label == {0: "x", 1: "y", 2: "z"}
    other = static(num_labels=2)
    with unchanged(other), pytest.raises(ValueError, match=r"classifier.*\[2, 32\].*\[3, 32\]"):
        files.load_head(other, directory)
    with unchanged(other), pytest.raises(ValueError, match="shapes differ"):
        files.load_adapter(other, directory)


def test_heads_of_other_classes(model, tmp_path):
    directory = GOLDEN / "groups/bert-static-head/adapters/a"
    with unchanged(model), pytest.raises(ValueError, match="BertForSequenceClassification"):
        files.load_head(model, directory)
    with pytest.warns(UserWarning, match="head is left out"):
        files.load_adapter(model, directory, load_as="new")
    assert "new" in model.adapters_config and "new" not in model.heads
    with no_warnings():
        files.load_adapter(bare(), directory)
        files.load_adapter(model, directory, load_as="newer", with_head=False)
    with pytest.raises(ValueError, match="no prediction head"):
        files.save_head(bare(), tmp_path)


def test_exact_names(tmp_path):
    """Names that contain each other, or look like parts of keys, stay apart."""
    model = flexible()
    names = ["a", "aa", "query", "adapters", "heads", "value", "adapter_down"]
    for name in names:
        model.add_adapter(name, config="seq_bn[reduction_factor=8]")
    fusions = [["a", "aa"], ["a", "aa", "query"], ["adapters", "value"]]
    for adapter_names in fusions:
        model.add_adapter_fusion(adapter_names)
    model.add_adapter_fusion(["a", "heads"], name="adapters")
    for head in ("x", "x2", "adapters"):
        model.add_classification_head(head)
    randomize(model)
    files.save_all_adapters(model, tmp_path)
    files.save_all_adapter_fusions(model, tmp_path)
    files.save_all_heads(model, tmp_path)
    for name in names:
        tensors = read_files(tmp_path / name, ADAPTER_FILES)[1]
        assert len(tensors) == 8 and all(f".adapters.{name}.adapter_" in key for key in tensors)
    for name in ["a,aa", "a,aa,query", "adapters,value", "adapters"]:
        tensors = read_files(tmp_path / name, FUSION_FILES)[1]
        assert len(tensors) == 10
        assert all(f".adapter_fusion_layer.{name}." in key for key in tensors)
    for name in ("x", "x2", "adapters"):
        tensors = read_files(tmp_path / name, HEAD_FILES)[1]
        assert {key.rsplit(".", 2)[0] for key in tensors} == {f"heads.{name}"}
    again = flexible()
    for name in names:
        files.load_adapter(again, tmp_path / name)
    for name in ["a,aa", "a,aa,query", "adapters,value", "adapters"]:
        files.load_adapter_fusion(again, tmp_path / name)
    for name in ("x", "x2", "adapters"):
        files.load_head(again, tmp_path / name)
    assert_equal(model.state_dict(), again.state_dict())
    assert again.adapters_config.fusion_names == model.adapters_config.fusion_names


def test_load_as(model, tmp_path):
    files.save_adapter(model, tmp_path / "a", "a")
    files.save_adapter_fusion(model, tmp_path / "f", ["a", "c"])
    assert files.load_adapter(model, tmp_path / "a", load_as="a2") == "a2"
    assert "a2" in model.heads and model.heads["a2"].name == "a2"
    assert files.load_adapter_fusion(model, tmp_path / "f", load_as="mine") == "mine"
    assert model.adapters_config.fusion_names["mine"] == ["a", "c"]
    state = model.state_dict()
    for kind, old, new in (("adapter", "a", "a2"), ("fusion", "a,c", "mine"), ("head", "a", "a2")):
        one, two = files.select(state, kind, old), files.select(state, kind, new)
        assert one and [k.replace(f".{old}.", f".{new}.") for k in one] == list(two)
        assert all(torch.equal(x, y) for x, y in zip(one.values(), two.values(), strict=True))
    for name in ("x.y", "", "keys"):
        for load, directory in (
            (model.load_adapter, "a"),
            (model.load_adapter_fusion, "f"),
            (model.load_head, "a"),
        ):
            with unchanged(model), pytest.raises(ValueError, match="^load_as: "):
                load(tmp_path / directory, load_as=name)


@pytest.mark.parametrize("name", ["../x", "a/b", "..", "a\\b", "/x"])
def test_names_that_leave_the_directory(model, name, tmp_path):
    directory = tmp_path / "all"
    with pytest.raises(ValueError, match="name"):
        files.subdirectory(directory, name)
    if "." in name:  # cannot be an adapter's name at all
        return
    model.add_adapter(name)
    with pytest.raises(ValueError, match="cannot be the name of a directory"):
        files.save_all_adapters(model, directory)
    assert not directory.exists() and list(tmp_path.iterdir()) == []
    files.save_adapter(model, directory, name)
    assert files.load_adapter(flexible(), directory) == name


def test_name_in_a_file_that_is_no_name(model, tmp_path):
    files.save_adapter(model, tmp_path, "a")
    path = tmp_path / ADAPTER_FILES.config
    for name in ("../x", "", 3, None):
        path.write_text(json.dumps({**json.loads(path.read_text()), "name": name}))
        with unchanged(model), pytest.raises(ValueError, match="name"):
            files.load_adapter(model, tmp_path)


def test_json_is_as_adapters_writes_it(model, tmp_path):
    files.save_adapter(model, tmp_path, "a", meta_dict={"note": "mine", "name": "not this"})
    text = (tmp_path / "adapter_config.json").read_text()
    config = json.loads(text)
    assert text == json.dumps(config, indent=2, sort_keys=True)
    assert config["config"] == SeqBnConfig(reduction_factor=8).to_dict()
    expected = {
        "name": "a",
        "note": "mine",
        "hidden_size": 32,
        "model_class": "BertAdapterModel",
        "model_type": "bert",
        "version": "adapters.1.3.0",
    }
    assert {key: config[key] for key in expected} == expected
    assert sorted(path.name for path in tmp_path.iterdir()) == [
        "adapter.safetensors",
        "adapter_config.json",
        "head_config.json",
        "model_head.safetensors",
    ]


def test_shared_tensors_of_ln_before(tmp_path):
    model = flexible()
    model.add_adapter("n", config="seq_bn[ln_before=True, ln_after=True]")
    randomize(model)
    for use_safetensors in (True, False):
        files.save_adapter(model, tmp_path, "n", use_safetensors=use_safetensors)
        tensors = read_files(tmp_path, ADAPTER_FILES)[1]
        assert len({t.data_ptr() for t in tensors.values()}) == len(tensors)
        again = flexible()
        files.load_adapter(again, tmp_path)
        assert_equal(again.state_dict(), model.state_dict())


def test_views_do_not_drag_their_storage_along(model, tmp_path):
    sizes = []
    for use_safetensors in (True, False):
        files.save_adapter(model, tmp_path, "a", with_head=False, use_safetensors=use_safetensors)
        weights = ADAPTER_FILES.safetensors if use_safetensors else ADAPTER_FILES.pickle
        sizes.append((tmp_path / weights).stat().st_size)
    flat = torch.randn(100_000)
    for parameter in files.select(dict(model.named_parameters()), "adapter", "a").values():
        parameter.data = flat[: parameter.numel()].view(parameter.shape)
    files.save_adapter(model, tmp_path, "a", with_head=False, use_safetensors=False)
    assert (tmp_path / ADAPTER_FILES.pickle).stat().st_size == sizes[1]


def test_unknown_things_are_named(model, tmp_path):
    with pytest.raises(ValueError, match=r"^adapter_name: .*'a', 'b', 'c'.*'z'"):
        files.save_adapter(model, tmp_path / "x", "z")
    with pytest.raises(ValueError, match=r"^adapter_names: .*'a,c'.*'a,b'"):
        files.save_adapter_fusion(model, tmp_path / "x", Fuse("a", "b"))
    with pytest.raises(ValueError, match=r"^head_name: .*'a'.*'z'"):
        files.save_head(model, tmp_path / "x", "z")
    with pytest.raises(ValueError, match="with_head.*'a,c'"):
        files.save_adapter_fusion(model, tmp_path / "x", "a,c", with_head=True)
    with pytest.raises(ValueError, match=r"^model: .* no prediction heads by name"):
        files.save_all_heads(static(), tmp_path / "x")
    assert not (tmp_path / "x").exists()


def test_a_file_in_place_of_the_directory(model, tmp_path):
    path = tmp_path / "file"
    path.write_text("")
    for save, *arguments in (
        (model.save_adapter, "a"),
        (model.save_adapter_fusion, "a,c"),
        (model.save_head, "a"),
        (static().save_head,),
    ):
        with pytest.raises(NotADirectoryError, match=r"^save_directory: .*file"):
            save(path, *arguments)


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
@pytest.mark.parametrize("move", [1, 2, 3])
def test_process_that_is_killed_while_it_saves(model, tmp_path, move):
    """The second move decides: it puts the new configuration in place of the older one."""
    files.save_adapter(model, tmp_path, "a", with_head=False, use_safetensors=False)
    older = files.select(model.state_dict(), "adapter", "a")
    older = {key: tensor.clone() for key, tensor in older.items()}
    randomize(model, seed=1)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)  # threads and fork
        child = os.fork()
    if child == 0:
        moves = 0
        replace = os.replace

        def killing(*args):
            nonlocal moves
            moves += 1
            if moves == move:
                os._exit(7)
            replace(*args)

        os.replace = killing
        try:
            files.save_adapter(model, tmp_path, "a", with_head=False)
        finally:
            os._exit(1)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 7
    newer = files.select(model.state_dict(), "adapter", "a")
    newer = {key: tensor.clone() for key, tensor in newer.items()}
    files.load_adapter(model, tmp_path)
    expected = older if move < 3 else newer
    assert_equal(files.select(model.state_dict(), "adapter", "a"), expected)


@pytest.mark.parametrize("use_safetensors", [True, False])
def test_truncated_files(model, tmp_path, use_safetensors):
    files.save_adapter(model, tmp_path, "a", with_head=False, use_safetensors=use_safetensors)
    name = ADAPTER_FILES.safetensors if use_safetensors else ADAPTER_FILES.pickle
    for path in (tmp_path / name, tmp_path / ADAPTER_FILES.config):
        whole = path.read_bytes()
        for length in (0, 1, 7, 9, 60, len(whole) // 2, len(whole) - 1):
            path.write_bytes(whole[:length])
            with unchanged(model), pytest.raises(ValueError, match=path.name):
                files.load_adapter(model, tmp_path, load_as="new")
        path.write_bytes(whole)
    files.load_adapter(model, tmp_path, load_as="new")


@pytest.mark.parametrize("name", [ADAPTER_FILES.safetensors, ADAPTER_FILES.pickle])
@pytest.mark.parametrize("content", [b"GIF89a" + bytes(100), b"{}", b"\x80\x04N."])
def test_foreign_files(model, tmp_path, name, content):
    files.save_adapter(model, tmp_path, "a", with_head=False, use_safetensors=".safe" in name)
    (tmp_path / name).write_bytes(content)
    with unchanged(model), pytest.raises(ValueError, match=name):
        files.load_adapter(model, tmp_path, load_as="new")


class Payload:
    def __init__(self, target):
        self.target = target

    def __reduce__(self):
        return os.mkdir, (self.target,)


@pytest.mark.parametrize("as_zip", [True, False])
def test_pickle_with_code_is_refused(model, tmp_path, as_zip):
    files.save_adapter(model, tmp_path, "a", with_head=False, use_safetensors=False)
    path, target = tmp_path / ADAPTER_FILES.pickle, tmp_path / "owned"
    if as_zip:
        torch.save({"w": torch.ones(1), "x": Payload(str(target))}, path)
    else:
        path.write_bytes(pickle.dumps(Payload(str(target)), protocol=2))
    with unchanged(model), pytest.raises(ValueError, match=r"refused.*mkdir"):
        files.load_adapter(model, tmp_path, load_as="new")
    assert not target.exists()


@pytest.mark.parametrize(
    "content", [[1, 2], {"w": 1.0}, {1: torch.ones(1)}, torch.ones(2), {"w": {"v": torch.ones(1)}}]
)
def test_pickle_of_something_else(model, tmp_path, content):
    files.save_adapter(model, tmp_path, "a", with_head=False, use_safetensors=False)
    torch.save(content, tmp_path / ADAPTER_FILES.pickle)
    with unchanged(model), pytest.raises(ValueError, match="dictionary of tensors"):
        files.load_adapter(model, tmp_path, load_as="new")


def test_json_of_something_else(model, tmp_path):
    files.save_adapter(model, tmp_path, "a", with_head=False)
    path = tmp_path / ADAPTER_FILES.config
    config = json.loads(path.read_text())
    for content, named in (
        ([config], "JSON object"),
        ({**config, "config": None}, "'config'"),
        ({**config, "config": {**config["config"], "scaling": "big"}}, "scaling"),
        ({key: value for key, value in config.items() if key != "name"}, "'name'"),
        ({**config, "hidden_size": 768}, "hidden_size 32.*768"),
    ):
        path.write_text(json.dumps(content))
        with unchanged(model), pytest.raises(ValueError, match=named):
            files.load_adapter(model, tmp_path, load_as="new")
    for values, named in (
        ({"architecture": "lora", "r": 8}, "lora"),
        ({**config["config"], "phm_layer": True}, "phm_layer"),
    ):
        path.write_text(json.dumps({**config, "config": values}))
        with unchanged(model), pytest.raises(NotImplementedError, match=f"{path.name}: .*{named}"):
            files.load_adapter(model, tmp_path, load_as="new")
    # from before files had a version
    values = {key: value for key, value in config["config"].items() if key != "non_linearity"}
    config = {key: value for key, value in config.items() if key != "version"}
    path.write_text(json.dumps({**config, "config": values}))
    with unchanged(model), pytest.raises(ValueError, match="non_linearity"):
        files.load_adapter(model, tmp_path, load_as="new")


@pytest.mark.parametrize(
    ("directory", "error", "named"),
    [
        ("does/not/exist", FileNotFoundError, "does/not/exist.*hub"),
        ("AdapterHub/bert-base-uncased-pf-sst2", NotImplementedError, "not a directory.*hub"),
        ("owner/name.v2", NotImplementedError, "not a directory.*hub"),
        ("../nowhere", FileNotFoundError, "nowhere.*hub"),
        ("/owner/name", FileNotFoundError, "name.*hub"),
        ("name", FileNotFoundError, "name.*hub"),
        ("sentiment/sst-2@ukp", NotImplementedError, "hub"),
        ("https://example.org/adapter.zip", NotImplementedError, "URL"),
        (__file__, NotADirectoryError, "is a file"),
        (str(GOLDEN), FileNotFoundError, "_config.json"),
    ],
)
def test_missing_directories(model, directory, error, named):
    for load, argument in (
        (model.load_adapter, "adapter_name_or_path"),
        (model.load_adapter_fusion, "adapter_fusion_name_or_path"),
        (model.load_head, "save_directory"),
    ):
        with unchanged(model), pytest.raises(error, match=f"^{argument}: .*{named}"):
            load(directory)


def edit(directory, change, names=ADAPTER_FILES):
    path = directory / names.safetensors
    tensors = safetensors.torch.load_file(path)
    change(tensors)
    safetensors.torch.save_file(tensors, path)


def first(tensors):
    return sorted(tensors)[0]


@pytest.mark.parametrize("load_as", [None, "new"])
def test_missing_and_unexpected_keys(model, tmp_path, load_as):
    files.save_adapter(model, tmp_path, "a", with_head=False)
    removed = []

    def change(tensors):
        removed.append(first(tensors))
        tensors["bert.encoder.layer.0.output.adapters.a.extra"] = torch.ones(1)
        del tensors[removed[0]]

    edit(tmp_path, change)
    name = load_as or "a"
    missing = removed[0].removeprefix("bert.").replace(".a.", f".{name}.")
    expected = rf"missing {missing}; unexpected encoder.*\.{name}\.extra"
    with unchanged(model), pytest.raises(ValueError, match=expected):
        files.load_adapter(model, tmp_path, load_as=load_as)
    with pytest.warns(UserWarning, match=expected):
        assert files.load_adapter(model, tmp_path, load_as=load_as, strict=False) == name
    tensors = read_files(tmp_path, ADAPTER_FILES)[1]
    state = model.state_dict()
    for key, tensor in tensors.items():
        if not key.endswith("extra"):
            assert torch.equal(state[key.replace(".a.", f".{name}.")], tensor)


def test_tensors_of_something_else_are_unexpected(model, tmp_path):
    """A file cannot reach weights beside its adapter's."""
    files.save_adapter(model, tmp_path, "a", with_head=False)
    for key in (
        "bert.embeddings.word_embeddings.weight",
        "bert.encoder.layer.0.output.adapters.c.adapter_up.bias",
        "heads.a.1.weight",
    ):
        value = torch.full_like(model.state_dict()[key], 7.0)
        edit(tmp_path, lambda tensors, key=key, value=value: tensors.update({key: value}))
        before = model.state_dict()[key].clone()
        with unchanged(model), pytest.raises(ValueError, match="unexpected"):
            files.load_adapter(model, tmp_path, load_as="new")
        with pytest.warns(UserWarning, match="unexpected"):
            files.load_adapter(model, tmp_path, strict=False)
        assert torch.equal(model.state_dict()[key], before)
        edit(tmp_path, lambda tensors, key=key: tensors.pop(key))


def test_two_tensors_for_one_place(model, tmp_path):
    files.save_adapter(model, tmp_path, "a", with_head=False)
    edit(tmp_path, lambda tensors: tensors.update({first(tensors)[5:]: torch.ones(4)}))
    with unchanged(model), pytest.raises(ValueError, match="several tensors for one place"):
        files.load_adapter(model, tmp_path, load_as="new")


def test_strict_holds_for_the_head_too(model, tmp_path):
    files.save_adapter(model, tmp_path, "a")
    edit(tmp_path, lambda tensors: tensors.pop("heads.a.1.weight"), HEAD_FILES)
    with unchanged(model), pytest.raises(ValueError, match="missing heads.new.1.weight"):
        files.load_adapter(model, tmp_path, load_as="new")
    with pytest.warns(UserWarning, match="missing heads.new.1.weight"):
        files.load_adapter(model, tmp_path, load_as="new", strict=False)


def test_shapes(model, tmp_path):
    files.save_adapter(model, tmp_path, "a", with_head=False)
    edit(tmp_path, lambda tensors: tensors.update({first(tensors): torch.ones(5)}))
    for strict in (True, False):
        with unchanged(model), pytest.raises(ValueError, match=r"adapter_down.*\[4\].*\[5\]"):
            files.load_adapter(model, tmp_path, load_as="new", strict=strict)


def rewrite(directory, names, **changes):
    """Change values of the configuration inside a JSON file."""
    path = directory / names.config
    saved = json.loads(path.read_text())
    path.write_text(json.dumps({**saved, "config": {**saved["config"], **changes}}))


@pytest.mark.parametrize("strict", [True, False])
@pytest.mark.parametrize(
    ("factor", "named"),
    [
        (5e-324, "reduction_factor"),
        (1e-300, r"encoder.layer.0\S*up.weight: expected \[32, 3\d{301}\].*got \[32, 4\]"),
        (1e-9, r"encoder.layer.0\S*up.weight: expected \[32, 3\d{10}\].*got \[32, 4\]"),
        (1000, r"encoder.layer.0\S*up.weight: expected \[32, 1\].*got \[32, 4\]"),
        ({"0": 8, "default": 1e-9}, r"encoder.layer.1\S*up.weight: .*got \[32, 4\]"),
        ({"0": 8}, "no bottleneck size .*layer 1"),
    ],
)
def test_bottlenecks_are_compared_before_memory_is_taken(
    monkeypatch, model, tmp_path, factor, named, strict
):
    files.save_adapter(model, tmp_path, "a", with_head=False)
    rewrite(tmp_path, ADAPTER_FILES, reduction_factor=factor)
    monkeypatch.setattr(torch.nn, "Linear", None)
    with unchanged(model), pytest.raises(ValueError, match=rf"adapter_config.json: .*{named}"):
        files.load_adapter(model, tmp_path, load_as="new", strict=strict)


@pytest.mark.parametrize("strict", [True, False])
def test_bottlenecks_without_a_tensor(monkeypatch, model, tmp_path, strict):
    files.save_adapter(model, tmp_path, "a", with_head=False)
    edit(tmp_path, lambda tensors: [tensors.pop(k) for k in list(tensors) if "layer.1." in k])
    if not strict:
        with pytest.warns(UserWarning, match="missing"):
            files.load_adapter(model, tmp_path, load_as="sound", strict=False)
    rewrite(tmp_path, ADAPTER_FILES, reduction_factor={"0": 8, "default": 1e-9})
    monkeypatch.setattr(torch.nn, "Linear", None)
    with unchanged(model), pytest.raises(ValueError, match=r"missing encoder.layer.1\S*up.weight"):
        files.load_adapter(model, tmp_path, load_as="new", strict=strict)


@pytest.mark.parametrize("strict", [True, False])
def test_sizes_of_heads_are_compared_before_memory_is_taken(monkeypatch, model, tmp_path, strict):
    files.save_adapter(model, tmp_path, "a")
    for key, size, largest in (("layers", 10**9, 4), ("num_labels", 10**12, 32)):
        with monkeypatch.context() as patch:
            path = tmp_path / HEAD_FILES.config
            text = path.read_text()
            rewrite(tmp_path, HEAD_FILES, **{key: size})
            patch.setattr(torch.nn, "Linear", None)
            for load in (model.load_head, model.load_adapter):
                with (
                    unchanged(model),
                    pytest.raises(ValueError, match=f"head_config.*'{key}'.*{largest}.*{size}"),
                ):
                    load(tmp_path, load_as="new", strict=strict)
            path.write_text(text)


def test_a_bottleneck_of_one(model, tmp_path):
    """Where the hidden size is smaller than the factor, one is what `adapters` makes of it."""
    model.add_adapter("one", config="seq_bn[reduction_factor=1000]")
    files.save_adapter(model, tmp_path, "one")
    files.load_adapter(model, tmp_path, load_as="new")
    assert model.bert.encoder.layer[0].output.adapters["new"].adapter_up.weight.shape == (32, 1)


def test_dtypes(model, tmp_path):
    files.save_adapter(model, tmp_path, "a", with_head=False)
    edit(tmp_path, lambda tensors: tensors.update({first(tensors): torch.ones(4).int()}))
    with unchanged(model), pytest.raises(ValueError, match="floating-point.*int32"):
        files.load_adapter(model, tmp_path, load_as="new")
    for dtype in (torch.float16, torch.bfloat16, torch.float64):
        files.save_adapter(model, tmp_path, "a", with_head=False)
        edit(tmp_path, lambda t, d=dtype: t.update({k: v.to(d) for k, v in t.items()}))
        files.load_adapter(model, tmp_path, load_as=f"as_{str(dtype)[6:]}")
    assert {p.dtype for p in model.parameters()} == {torch.float32}


WITHOUT_VALUES = {
    "sparse": torch.ones(4).to_sparse(),
    "meta": torch.empty(4, device="meta"),
    "expanded": torch.zeros(1).expand(4),
    "overlapping": torch.zeros(5).unfold(0, 4, 1),
    "nested": torch.nested.as_nested_tensor([torch.ones(2), torch.ones(3)], layout=torch.jagged),
}


@pytest.mark.parametrize("tensor", WITHOUT_VALUES.values(), ids=WITHOUT_VALUES)
@pytest.mark.parametrize("is_extra", [True, False], ids=["extra", "own"])
def test_tensors_without_their_values(model, tmp_path, is_extra, tensor):
    files.save_adapter(model, tmp_path, "a", with_head=False, use_safetensors=False)
    path = tmp_path / ADAPTER_FILES.pickle
    tensors = torch.load(path)
    torch.save({**tensors, "extra" if is_extra else first(tensors): tensor}, path)
    expected = rf"{path.name}: expected dense tensors .*(extra|\.a\.)"
    with unchanged(model), pytest.raises(ValueError, match=expected):
        files.load_adapter(model, tmp_path, load_as="new", strict=False)


def test_small_files_of_large_tensors(monkeypatch, model, tmp_path):
    """Expanded, compressed or empty, they are refused before memory is taken for a head."""
    model.add_classification_head("h", layers=1)
    files.save_head(model, tmp_path, "h", use_safetensors=False)
    rewrite(tmp_path, HEAD_FILES, num_labels=10**6, label2id=None)
    path = tmp_path / HEAD_FILES.pickle
    sizes = {"heads.h.1.weight": (10**6, 32), "heads.h.1.bias": (10**6,)}
    monkeypatch.setattr(torch.nn, "Linear", None)

    torch.save({key: torch.zeros(1).expand(size) for key, size in sizes.items()}, path)
    with unchanged(model), pytest.raises(ValueError, match=f"{path.name}: expected dense tensors"):
        files.load_head(model, tmp_path)

    torch.save({key: torch.zeros(size, dtype=torch.bool) for key, size in sizes.items()}, path)
    with zipfile.ZipFile(path) as archive:
        members = {name: archive.read(name) for name in archive.namelist()}
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        for name, content in members.items():
            archive.writestr(name, content)
    assert path.stat().st_size < 10**5
    with unchanged(model), pytest.raises(ValueError, match=f"{path.name}: expected dense tensors"):
        files.load_head(model, tmp_path)

    torch.save({"heads.h.1.weight": torch.zeros(10**6, 0), "heads.h.1.bias": torch.ones(2)}, path)
    with unchanged(model), pytest.raises(ValueError, match="head_config.json: .*'num_labels'.* 2,"):
        files.load_head(model, tmp_path)


def test_values_beyond_half_precision(model, tmp_path):
    files.save_adapter(model, tmp_path, "a", with_head=False)
    edit(tmp_path, lambda tensors: tensors.update({first(tensors): torch.full([4], 1e6)}))
    files.load_adapter(model, tmp_path, load_as="new")
    half = flexible().half()
    with unchanged(half), pytest.raises(ValueError, match=r"range.*adapter_down.*float16"):
        files.load_adapter(half, tmp_path)


def test_nan_is_named(model, tmp_path):
    with torch.no_grad():
        model.bert.encoder.layer[1].output.adapters["a"].adapter_up.bias[3] = float("nan")
        model.heads["a"][1].weight[0, 0] = float("inf")
    files.save_adapter(model, tmp_path, "a")
    with pytest.warns(UserWarning, match="NaN or infinity") as caught:
        files.load_adapter(model, tmp_path, load_as="new")
    text = " ".join(str(w.message) for w in caught)
    assert "encoder.layer.1.output.adapters.new.adapter_up.bias" in text
    assert "heads.new.1.weight" in text
    assert "layer.0" not in text
    for load_as in (None, "newer"):
        with unchanged(model), no_warnings(), pytest.raises(UserWarning, match="NaN"):
            files.load_adapter(model, tmp_path, load_as=load_as)


def test_warnings_point_at_the_line_that_called(model, tmp_path):
    with torch.no_grad():
        for parameter in (*model.bert.parameters(), *model.heads.parameters()):
            parameter.view(-1)[0] = float("nan")
    files.save_adapter(model, tmp_path / "nan", "a")
    files.save_adapter_fusion(model, tmp_path / "nan", "a,c", with_head="a")
    for name, names in (("a", ADAPTER_FILES), ("f", FUSION_FILES), ("h", HEAD_FILES)):
        files.save_adapter(model, tmp_path / name, "b")
        files.save_adapter_fusion(model, tmp_path / name, "a,c", with_head="a")
        edit(tmp_path / name, lambda tensors: tensors.pop(first(tensors)), names)
    other = GOLDEN / "groups/bert-static-head/adapters/a"
    files.save_adapter_fusion(model, tmp_path / "other", "a,c")
    for name in (HEAD_FILES.config, HEAD_FILES.pickle):
        (tmp_path / "other" / name).write_bytes((other / name).read_bytes())
    calls = {
        "NaN.*adapters": lambda: model.load_adapter(tmp_path / "nan"),
        "NaN.*fusion": lambda: model.load_adapter_fusion(tmp_path / "nan"),
        "NaN.*heads": lambda: model.load_head(tmp_path / "nan"),
        "missing.*adapters": lambda: model.load_adapter(tmp_path / "a", strict=False),
        "missing.*fusion": lambda: model.load_adapter_fusion(tmp_path / "f", strict=False),
        "missing.*heads": lambda: model.load_head(tmp_path / "h", strict=False),
        "config: ignored": lambda: model.load_adapter(tmp_path / "nan", config="par_bn"),
        "left out.*a/head": lambda: model.load_adapter(other, load_as="left"),
        "left out.*other/head": lambda: model.load_adapter_fusion(tmp_path / "other"),
    }
    for text, call in calls.items():
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            call()
        assert any(re.search(text, str(warning.message)) for warning in caught), text
        line = call.__code__.co_firstlineno
        assert {(w.filename, w.lineno) for w in caught} == {(__file__, line)}, text


def test_an_adapter_of_that_name(model, tmp_path):
    files.save_adapter(model, tmp_path / "a", "a", with_head=False)
    saved = files.select(model.state_dict(), "adapter", "a")
    saved = {key: tensor.clone() for key, tensor in saved.items()}
    randomize(model, seed=1)
    assert files.load_adapter(model, tmp_path / "a") == "a"
    assert_equal(files.select(model.state_dict(), "adapter", "a"), saved)
    with unchanged(model), pytest.raises(ValueError, match="'c' has another configuration"):
        files.load_adapter(model, tmp_path / "a", load_as="c")


def test_a_model_of_another_type(tmp_path):
    model = flexible("roberta")
    directory = GOLDEN / "groups/distilbert-mix/adapters/a"
    with unchanged(model), pytest.raises(ValueError, match="hidden_size 32.*16"):
        files.load_adapter(model, directory)
    path = tmp_path / "a"
    other = bare("distilbert")
    other.config.dim = 32
    other.add_adapter("a")
    files.save_adapter(other, path, "a")
    with unchanged(model), pytest.raises(ValueError, match="'distilbert', the model is 'roberta'"):
        files.load_adapter(model, path)


def test_leave_out(model, tmp_path):
    files.save_adapter(model, tmp_path, "b")
    with no_warnings():
        files.load_adapter(model, tmp_path, load_as="new", leave_out=[0])
    assert model.adapters_config.adapters["new"].leave_out == [0]
    keys = files.select(model.state_dict(), "adapter", "new")
    assert keys and all("layer.1." in key for key in keys)
    edit(tmp_path, lambda t: t.update({"bert.encoder.layer.9.output.adapters.b.w": torch.ones(1)}))
    with (
        unchanged(model),
        pytest.raises(ValueError, match=r"unexpected encoder.layer.9\S*$|layer.9"),
    ):
        files.load_adapter(model, tmp_path, load_as="newer", leave_out=[0])
    files.save_adapter(model, tmp_path, "new")
    files.load_adapter(model, tmp_path, load_as="neither", leave_out=[1])
    assert model.adapters_config.adapters["neither"].leave_out == [0, 1]
    assert not files.select(model.state_dict(), "adapter", "neither")


def test_config_argument_and_set_active(model, tmp_path):
    files.save_adapter(model, tmp_path, "a")
    model.active_head = None
    with no_warnings():
        files.load_adapter(model, tmp_path, load_as="x", config="seq_bn[reduction_factor=8]")
    assert model.active_adapters is None and model.active_head is None
    with pytest.warns(UserWarning, match="config: ignored"):
        files.load_adapter(model, tmp_path, load_as="y", config="seq_bn", set_active=True)
    assert model.active_adapters.flatten() == {"y"} and model.active_head == "y"


class Doubled(torch.nn.Module):
    def forward(self, weight):
        return 2 * weight


@pytest.mark.parametrize("is_fresh", [True, False], ids=["fresh", "same"])
def test_parametrized_weights(model, tmp_path, is_fresh):
    """Files have what is computed; a model with the same parametrizations takes it too."""
    model.add_adapter("a", "seq_bn[ln_before=True, scaling='learned']", overwrite_ok=True)
    randomize(model, seed=2)
    parts = [*model.model_adapters.modules("a"), *model.model_adapters.fusion_modules("a,c")]
    for _, part in parts[:2]:
        weight_norm(part.adapter_up)
        weight_norm(part.adapter_norm_before, dim=None)
    weight_norm(parts[2][1].query)
    weight_norm(model.heads["a"][1])
    model.set_active_adapters(Fuse("a", "c"))
    tokens = torch.arange(12).view(2, 6) + 5
    with torch.no_grad():
        expected = model(input_ids=tokens).logits
    files.save_adapter(model, tmp_path / "a", "a")
    files.save_adapter(model, tmp_path / "c", "c")
    files.save_adapter_fusion(model, tmp_path, "a,c")
    for names, directory in ((ADAPTER_FILES, tmp_path / "a"), (FUSION_FILES, tmp_path)):
        assert not any("parametrizations" in key for key in read_files(directory, names)[1])
    model.active_head = "a"
    model.save_pretrained(tmp_path / "model")
    whole = AutoAdapterModel.from_pretrained(tmp_path / "model")
    whole.set_active_adapters(Fuse("a", "c"))
    whole.active_head = "a"
    with torch.no_grad():
        torch.testing.assert_close(whole(input_ids=tokens).logits, expected)
    head = model.heads["a"]
    randomize(model, seed=1)
    other = flexible() if is_fresh else model
    for name in "ac":
        files.load_adapter(other, tmp_path / name)
    files.load_adapter_fusion(other, tmp_path, set_active=True)
    other.active_head = "a"
    with torch.no_grad():
        torch.testing.assert_close(other(input_ids=tokens).logits, expected)
    assert is_fresh or model.heads["a"] is head


def test_parametrizations_that_cannot_be_set(model, tmp_path):
    files.save_adapter(model, tmp_path, "a")
    modules = [module for _, module in model.model_adapters.modules("a")]
    for part, key in ((modules[1].adapter_up, "adapter_up"), (model.heads["a"][1], r"1\.weight")):
        register_parametrization(part, "weight", Doubled())
        with unchanged(model), pytest.raises(ValueError, match=f"{key}.* without right_inverse"):
            files.load_adapter(model, tmp_path)


def test_scaling_that_was_set(model, tmp_path):
    """Files have the number that the modules have; it is one for all places."""
    model.add_adapter("b", "double_seq_bn[scaling=3.0]", overwrite_ok=True)
    modules = [module for _, module in model.model_adapters.modules("b")]
    for module in modules:
        module.scaling = 2
    tokens = torch.arange(6).view(1, 6) + 5
    model.set_active_adapters("b")
    with torch.no_grad():
        expected = model(input_ids=tokens).logits
    files.save_all_adapters(model, tmp_path)
    files.save_head(model, tmp_path / "head")
    model.save_pretrained(tmp_path / "model")
    saved = json.loads((tmp_path / "b" / ADAPTER_FILES.config).read_text())
    scaled = model.adapters_config.adapters["b"].replace(scaling=2.0)
    assert saved["config"] == scaled.to_dict()
    assert saved["config_id"] == get_adapter_config_hash(scaled)
    other = flexible()
    files.load_adapter(other, tmp_path / "b", set_active=True)
    files.load_head(other, tmp_path / "head")
    whole = AutoAdapterModel.from_pretrained(tmp_path / "model", attn_implementation="eager")
    whole.set_active_adapters("b")
    for loaded in (other, whole.eval()):
        with torch.no_grad():
            assert torch.equal(loaded(input_ids=tokens).logits, expected)
    files.load_adapter(model, tmp_path / "b")
    modules[1].scaling = 1.5
    for save in (files.save_adapter, files.save_all_adapters, type(model).save_pretrained):
        with pytest.raises(ValueError, match=r"^scaling: .*'b'.*\[1.5, 2.0\]"):
            save(model, tmp_path / "x", *(["b"] if save is files.save_adapter else []))
    with unchanged(model), pytest.raises(ValueError, match=r"^scaling: "):
        files.load_adapter(model, tmp_path / "b")
    assert not (tmp_path / "x").exists()


def test_compiled_submodule_has_the_same_keys(model, tmp_path):
    files.save_all_adapters(model, tmp_path / "plain")
    files.save_adapter_fusion(model, tmp_path / "plain/a,c", "a,c")
    model.bert.encoder.layer[0] = torch.compile(model.bert.encoder.layer[0])
    files.save_all_adapters(model, tmp_path / "compiled")
    for name in "abc":
        plain, compiled = (
            read_files(tmp_path / kind / name, ADAPTER_FILES)[1] for kind in ("plain", "compiled")
        )
        assert_equal(plain, compiled)
    files.load_adapter(model, tmp_path / "plain/a", load_as="new")
    files.load_adapter_fusion(model, tmp_path / "plain/a,c", load_as="mine")


def test_fusion_needs_its_adapters(model, tmp_path):
    files.save_adapter_fusion(model, tmp_path, Fuse("a", "c"))
    other = flexible()
    other.add_adapter("a", config="seq_bn[reduction_factor=8]")
    with unchanged(other), pytest.raises(ValueError, match=r"lacks the adapters \['c'\]"):
        files.load_adapter_fusion(other, tmp_path)
    other.add_adapter("c", config="double_seq_bn")
    with unchanged(other), pytest.raises(ValueError, match="mh_adapter"):
        files.load_adapter_fusion(other, tmp_path)


@pytest.mark.parametrize("names", [[], [1, "a"], [["a"], "c"], "a,c", None])
def test_adapters_of_a_fusion_that_are_no_names(model, tmp_path, names):
    files.save_adapter_fusion(model, tmp_path, "a,c")
    path = tmp_path / FUSION_FILES.config
    path.write_text(json.dumps({**json.loads(path.read_text()), "adapter_names": names}))
    with unchanged(model), pytest.raises(ValueError, match=r"fusion_config.json: .*adapter_names"):
        files.load_adapter_fusion(model, tmp_path, load_as="new")


def test_fusion_that_exists(model, tmp_path):
    files.save_adapter_fusion(model, tmp_path, "a,c")
    saved = read_files(tmp_path, FUSION_FILES)[1]
    randomize(model, seed=1)
    assert files.load_adapter_fusion(model, tmp_path) == "a,c"
    assert_equal(files.select(model.state_dict(), "fusion", "a,c"), saved)
    model.add_adapter_fusion(["a", "c"], config="static", name="s")
    with unchanged(model), pytest.raises(ValueError, match="'s' has another configuration"):
        files.load_adapter_fusion(model, tmp_path, load_as="s")
    model.add_adapter_fusion(["c", "a"], name="r")
    with unchanged(model), pytest.raises(ValueError, match="expected adapters"):
        files.load_adapter_fusion(model, tmp_path, load_as="r")


def test_fusion_set_active_and_head(model, tmp_path):
    model.add_classification_head("task")
    model.active_head = "a"
    files.save_adapter_fusion(model, tmp_path, ["a", "c"], with_head="task")
    model.delete_head("task")
    with unchanged(model):
        files.load_adapter_fusion(model, tmp_path, with_head=False)
    files.load_adapter_fusion(model, tmp_path)
    assert "task" in model.heads and model.active_head == "a"
    task = {key: tensor.clone() for key, tensor in model.heads["task"].state_dict().items()}
    model.delete_head("task")
    files.load_adapter_fusion(model, tmp_path, load_as="mine", set_active=True)
    assert model.active_adapters == Fuse("a", "c", name="mine")
    # the head takes the fusion's new name, as in adapters
    assert list(model.heads) == ["a", "mine"] and model.active_head == "mine"
    assert_equal(model.heads["mine"].state_dict(), task)


def test_head_beside_a_fusion(model, tmp_path):
    files.save_adapter_fusion(model, tmp_path / "alone", "a,c")
    with unchanged(model), no_warnings():
        files.load_adapter_fusion(model, tmp_path / "alone", with_head=True)
    files.save_adapter_fusion(model, tmp_path, "a,c", with_head="a")
    path = tmp_path / HEAD_FILES.config
    path.write_text(json.dumps({**json.loads(path.read_text()), "model_class": "OtherModel"}))
    with pytest.warns(UserWarning, match="head is left out.*OtherModel"):
        files.load_adapter_fusion(model, tmp_path, load_as="new")
    assert "new" in model.adapters_config.fusions
    path.write_text("{")
    with unchanged(model), pytest.raises(ValueError, match="head_config"):
        files.load_adapter_fusion(model, tmp_path, load_as="newer")


def test_labels_of_the_head_of_an_adapter(model, tmp_path):
    files.save_adapter(model, tmp_path, "a")
    labels = {0: "x", 1: "y", 2: "z"}
    files.load_adapter(model, tmp_path, load_as="new", id2label=labels)
    assert model.get_labels_dict("new") == labels
    assert model.get_labels_dict("a") == {i: f"LABEL_{i}" for i in range(3)}
    one_class = static()
    directory = GOLDEN / "groups/bert-static-head/adapters/a"
    files.load_adapter(one_class, directory, id2label=labels)
    assert one_class.config.id2label == labels


def test_incomplete_fusion_is_taken_back(model, tmp_path):
    files.save_adapter_fusion(model, tmp_path, "a,c")
    edit(tmp_path, lambda tensors: tensors.pop(first(tensors)), FUSION_FILES)
    with unchanged(model), pytest.raises(ValueError, match="missing"):
        files.load_adapter_fusion(model, tmp_path, load_as="new")


def test_temperature(model, tmp_path):
    model.add_adapter_fusion(["a", "c"], config="dynamic[temperature=True]", name="t")

    def modules(name):
        return [layer.output.adapter_fusion_layer[name] for layer in model.bert.encoder.layer]

    for i, module in enumerate(modules("t")):
        for _ in range(3 + i):
            module.count_forward(in_training=True)
            module.count_optimizer_step()
            module.settle_temperature()
    files.save_adapter_fusion(model, tmp_path, "t")
    config = read_files(tmp_path, FUSION_FILES)[0]
    assert config["config"] == AdapterFusionConfig(temperature=True).to_dict()
    files.load_adapter_fusion(model, tmp_path, load_as="u")
    for old, new in zip(modules("t"), modules("u"), strict=True):
        assert torch.equal(old.temperature, new.temperature) and old.temperature < 50
    golden = GOLDEN / "groups/bert-fusion-variants"
    other = flexible()
    for name in "ab":
        files.load_adapter(other, golden / "adapters" / name)
    files.load_adapter_fusion(other, golden / "fusions/f2")
    fusion = other.bert.encoder.layer[0].output.adapter_fusion_layer["f2"]
    assert fusion.temperature == 50
    files.save_adapter_fusion(model, tmp_path, "a,c")
    assert "temperature" not in read_files(tmp_path, FUSION_FILES)[0]
    path = tmp_path / FUSION_FILES.config
    for wrong in (20, {"x": "hot"}, {"x": 0.5}, {"x": float("inf")}):
        path.write_text(json.dumps({**json.loads(path.read_text()), "temperature": wrong}))
        with unchanged(model), pytest.raises(ValueError, match="temperature"):
            files.load_adapter_fusion(model, tmp_path, load_as="v")


@pytest.mark.parametrize("config", ["dynamic", "dynamic[key=False, query=False, value=False]"])
def test_temperature_is_loaded_to_where_the_fusion_is(config, model, tmp_path):
    """Over a buffer without values or of another dtype, and over one that is about to fall."""
    loaded = AdapterFusionConfig.load(config, temperature=True)
    model.add_adapter_fusion(["a", "c"], config=loaded, name="t")
    modules = [layer.output.adapter_fusion_layer["t"] for layer in model.bert.encoder.layer]
    for module in modules:
        module.temperature = torch.tensor(42.95)
    files.save_adapter_fusion(model, tmp_path, "t")
    for stale in (torch.empty((), device="meta"), torch.tensor(7.0, dtype=torch.bfloat16)):
        for module in modules:
            module.temperature = stale
            module.count_forward(in_training=True)
            module.count_optimizer_step()
        files.load_adapter_fusion(model, tmp_path, set_active=True)
        for module in modules:
            module.settle_temperature()
            assert module.temperature.dtype == torch.float32
            assert torch.equal(module.temperature, torch.tensor(42.95))
            assert "temperature" in dict(module.named_buffers())
        with torch.no_grad():
            assert model(input_ids=torch.arange(6).view(1, 6) + 5).logits.isfinite().all()


def test_load_head(model, tmp_path):
    files.save_head(model, tmp_path)
    labels = {0: "x", 1: "y", 2: "z"}
    assert files.load_head(model, tmp_path, load_as="b", id2label=labels) == "b"
    assert model.active_head == "b" and model.get_labels() == ["x", "y", "z"]
    assert_equal(model.heads["a"].state_dict(), model.heads["b"].state_dict())
    randomize(model, seed=1)
    files.load_head(model, tmp_path, set_active=False)
    assert model.active_head == "b"
    assert_equal(files.select(model.state_dict(), "head", "a"), read_files(tmp_path, HEAD_FILES)[1])
    edit(tmp_path, lambda tensors: tensors.pop("heads.a.1.weight"), HEAD_FILES)
    with unchanged(model), pytest.raises(ValueError, match="missing heads.c.1.weight"):
        files.load_head(model, tmp_path, load_as="c")
    with pytest.warns(UserWarning, match="missing heads.c.1.weight"):
        files.load_head(model, tmp_path, load_as="c", strict=False)


@pytest.mark.parametrize(
    ("key", "value"),
    [("head_type", ["classification"]), ("label2id", [1]), ("label2id", {"x": "y"}), ("layers", 0)],
)
def test_head_configuration_of_something_else(model, tmp_path, key, value):
    files.save_head(model, tmp_path)
    rewrite(tmp_path, HEAD_FILES, **{key: value})
    with unchanged(model), pytest.raises(ValueError, match=f"head_config.json: .*{key}"):
        files.load_head(model, tmp_path, load_as="new")


def test_labels_of_something_else_in_a_class_with_a_head(tmp_path):
    model = static()
    files.save_head(model, tmp_path)
    path = tmp_path / HEAD_FILES.config
    text = path.read_text()
    for labels in (
        [1],
        {"x": "y"},
        {"a": 0, "b": 1},
        {"a": 0, "b": 1, "c": 2, "d": 3},
        {"a": 0, "b": 1, "c": 3},
        {"a": 0, "b": 1, "c": 1},
    ):
        path.write_text(json.dumps({**json.loads(text), "label2id": labels}))
        with unchanged(model), pytest.raises(ValueError, match="head_config.json: .*label2id"):
            files.load_head(model, tmp_path)
    path.write_text(text)
    for labels in (["a", "b", "c"], {0: "a", 1: "b"}, {0: "a", 1: "b", 2: "a"}, {0: "a", 2: "b"}):
        with unchanged(model), pytest.raises(ValueError, match="id2label"):
            files.load_head(model, tmp_path, id2label=labels)
    files.load_head(model, tmp_path, id2label={0: "a", 1: 1, "2": "b"})
    assert model.config.label2id == {"a": 0, "1": 1, "b": 2}
    assert model.config.num_labels == 3


def test_labels_in_a_class_without_an_output_for_each(tmp_path):
    """transformers' configurations have two labels where nothing says how many."""
    model = BertForMaskedLM.from_pretrained(GOLDEN / "models/bert")
    init(model)
    files.save_head(model, tmp_path)
    files.load_head(model, tmp_path, id2label={0: "a", 1: "b", 2: "c"})
    assert model.config.id2label == {0: "a", 1: "b", 2: "c"}


def test_labels_that_are_numbers(model, tmp_path):
    """JSON has them as strings; reading them must not look like another head."""
    model.add_classification_head("n", num_labels=3, id2label={0: 3, 1: 2, 2: 1})
    assert model.config.id2label == {0: "3", 1: "2", 2: "1"}
    files.save_head(model, tmp_path, "n")
    head = model.heads["n"]
    files.load_head(model, tmp_path)
    assert model.heads["n"] is head


def test_head_types_that_come_later():
    model = flexible("roberta")
    with unchanged(model), pytest.raises(NotImplementedError, match="masked_lm"):
        files.load_head(model, GOLDEN / "groups/roberta-mix/heads/lm")


def test_damaged_head_beside_a_sound_adapter(model, tmp_path):
    files.save_adapter(model, tmp_path, "a")
    (tmp_path / HEAD_FILES.safetensors).write_bytes(b"no")
    with unchanged(model), pytest.raises(ValueError, match="model_head"):
        files.load_adapter(model, tmp_path, load_as="new")
    (tmp_path / HEAD_FILES.safetensors).unlink()
    with (
        unchanged(model),
        pytest.raises(FileNotFoundError, match=r"^adapter_name_or_path: no model_head"),
    ):
        files.load_adapter(model, tmp_path, load_as="new")
    files.load_adapter(model, tmp_path, load_as="new", with_head=False)


def test_legacy_files(model, tmp_path):
    parts = {
        "attention.output.adapters.b.": "attention.output.attention_text_task_adapters.b.",
        "output.adapters.b.": "output.layer_text_task_adapters.b.",
    }
    legacy = {}
    for key, tensor in files.select(model.state_dict(), "adapter", "b").items():
        for new, old in parts.items():
            if new in key:
                key = key.replace(new, old)
                break
        legacy[key] = tensor
    config = AdapterConfig.load("double_seq_bn").to_dict()
    del config["inv_adapter"], config["inv_adapter_reduction_factor"]
    config["invertible_adapter"] = {"block_type": "nice", "reduction_factor": 2}
    saved = {"type": "text_task", "name": "b", "hidden_size": 32, "model_type": "bert"}
    for name, activation in (("gelu", "gelu_new"), ("gelu_orig", "gelu"), ("relu", "relu")):
        values = {**saved, "config": {**config, "non_linearity": name}}
        files.write_files(tmp_path, ADAPTER_FILES, values, legacy, use_safetensors=False)
        loaded = files.load_adapter(model, tmp_path, load_as=name)
        assert model.adapters_config.adapters[loaded] == AdapterConfig.load(
            "double_seq_bn", non_linearity=activation
        )
        tensors = files.select(model.state_dict(), "adapter", name)
        expected = files.select(model.state_dict(), "adapter", "b")
        assert list(tensors) == [key.replace(".b.", f".{name}.") for key in expected]
        assert all(
            torch.equal(x, y) for x, y in zip(tensors.values(), expected.values(), strict=True)
        )
    values["type"] = "text_lang"
    files.write_files(tmp_path, ADAPTER_FILES, values, legacy, use_safetensors=False)
    with unchanged(model), pytest.raises(NotImplementedError, match="invertible"):
        files.load_adapter(model, tmp_path, load_as="lang")


def test_head_of_a_class_with_heads(model, tmp_path):
    files.save_head(model, tmp_path, "a")
    path = tmp_path / HEAD_FILES.config
    saved = json.loads(path.read_text())
    del saved["config"]["bias"], saved["config"]["dropout_prob"]
    path.write_text(json.dumps({**saved, "model_class": "BertModelWithHeads"}))
    files.load_head(model, tmp_path, load_as="old")
    assert_equal(model.heads["old"].state_dict(), model.heads["a"].state_dict())


def test_reloaded_model_computes_the_same_bits(model, tmp_path):
    """In a fresh model, and in one that ran before with other weights."""
    tokens = torch.arange(12).view(2, 6) + 5
    setup = Fuse("a", "c")
    model.set_active_adapters(setup)
    with torch.no_grad():
        expected = model(input_ids=tokens).logits
    for name in ("a", "c"):
        files.save_adapter(model, tmp_path / name, name)
    files.save_adapter_fusion(model, tmp_path / "f", setup)
    randomize(model, seed=1)
    with torch.no_grad():
        assert not torch.equal(model(input_ids=tokens).logits, expected)
    for other in (model, flexible()):
        for name in ("a", "c"):
            files.load_adapter(other, tmp_path / name)
        files.load_adapter_fusion(other, tmp_path / "f", set_active=True)
        other.active_head = "a"
        with torch.no_grad():
            assert torch.equal(other(input_ids=tokens).logits, expected)


RELOAD = """
import sys
from pathlib import Path
import safetensors.torch
import torch
from fastfusion import AutoAdapterModel

source, directory = sys.argv[1], Path(sys.argv[2])
model = AutoAdapterModel.from_pretrained(source, attn_implementation="eager").eval()
for name in ("a", "c"):
    model.load_adapter(directory / name)
model.load_adapter_fusion(directory / "fusion", set_active=True)
model.active_head = "a"
saved = safetensors.torch.load_file(directory / "run.safetensors")
with torch.no_grad():
    assert torch.equal(model(input_ids=saved["tokens"]).logits, saved["logits"])
print("the same bits")
"""


@pytest.mark.parametrize("use_safetensors", [True, False], ids=["safetensors", "bin"])
def test_trained_fusion_in_a_new_process(model, tmp_path, use_safetensors):
    setup = Fuse("a", "c")
    model.train_adapter_fusion(setup)
    model.active_head = "a"
    tokens = torch.arange(12).view(2, 6) + 5
    trained = [p for p in model.parameters() if p.requires_grad]
    before = [p.detach().clone() for p in trained]
    optimizer = torch.optim.AdamW(trained, lr=1e-2)
    for _ in range(3):
        model(input_ids=tokens, labels=torch.tensor([0, 2])).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    fusions = [m for _, m in model.model_adapters.fusion_modules("a,c")]
    assert all(any(p is q for q in trained) for m in fusions for p in m.parameters())
    assert not any(torch.equal(p, q) for p, q in zip(trained, before, strict=True))
    model.eval()
    with torch.no_grad():
        logits = model(input_ids=tokens).logits
    for name in ("a", "c"):
        files.save_adapter(model, tmp_path / name, name, use_safetensors=use_safetensors)
    files.save_adapter_fusion(model, tmp_path / "fusion", setup, use_safetensors=use_safetensors)
    run = {"tokens": tokens, "logits": logits}
    safetensors.torch.save_file(run, tmp_path / "run.safetensors")
    done = subprocess.run(
        [sys.executable, "-c", RELOAD, GOLDEN / "models/bert", tmp_path],
        capture_output=True,
        text=True,
    )
    assert done.stdout == "the same bits\n", done.stderr


PEER = os.environ.get("FASTFUSION_PEER_PYTHON")
PEER_SCRIPT = Path(__file__).parent / "peer_files.py"
PEER_ADAPTERS = {
    "a": "seq_bn[reduction_factor=8]",
    "b": "seq_bn[reduction_factor=4, scaling='learned', use_gating=True]",
    "c": "double_seq_bn[reduction_factor={'0': 4, 'default': 16}, leave_out=[1]]",
    "p": "scaled_par_bn[dropout=0.1]",
    "n": "seq_bn[ln_before=True, ln_after=True, residual_before_ln=False]",
}


@pytest.fixture(scope="module")
def exchange(tmp_path_factory):
    """Ours written, read by `adapters`, run there and written again."""
    if PEER is None:
        pytest.skip("FASTFUSION_PEER_PYTHON is not set")
    directory = tmp_path_factory.mktemp("exchange")
    torch.manual_seed(0)
    model = flexible()
    for name, config in PEER_ADAPTERS.items():
        model.add_adapter(name, config=config)
    model.add_adapter_fusion(["a", "b"])
    model.add_adapter_fusion(["b", "a"], config="static[temperature=True]", name="named")
    decaying = AdapterFusionConfig(temperature=True, peer_temperature=True)
    model.add_adapter_fusion(["a", "b"], config=decaying, name="decaying")
    model.add_classification_head("a", num_labels=3, id2label={0: "x", 1: "y", 2: "z"})
    model.add_classification_head("task", num_labels=2, layers=1, multilabel=True)
    randomize(model)
    one_class = static()
    one_class.add_adapter("a", config="seq_bn")
    randomize(one_class)
    for kind, use_safetensors in (("safetensors", True), ("bin", False)):
        target = directory / "ours" / kind
        files.save_all_adapters(model, target / "adapters", use_safetensors=use_safetensors)
        files.save_all_adapter_fusions(model, target / "fusions", use_safetensors=use_safetensors)
        files.save_all_heads(model, target / "heads", use_safetensors=use_safetensors)
        files.save_adapter(one_class, target / "static", "a", use_safetensors=use_safetensors)
        files.save_adapter_fusion(
            model, target / "with head", "a,b", with_head="task", use_safetensors=use_safetensors
        )
    whole = flexible()
    for name in ("a", "b", "c", "p"):
        files.load_adapter(whole, directory / "ours/safetensors/adapters" / name, with_head=False)
    # of the fusions in a config.json `adapters` reads those by name of a configuration alone
    files.load_adapter_fusion(whole, directory / "ours/safetensors/fusions/a,b")
    for path in (directory / "ours/safetensors/heads").iterdir():
        files.load_head(whole, path)
    whole.save_pretrained(directory / "ours/model")
    for name, patched in (("bare", bare()), ("static", static())):
        for adapter in ("a", "b"):
            patched.add_adapter(adapter, config="double_seq_bn")
        patched.add_adapter_fusion(["a", "b"], config="static")
        randomize(patched)
        patched.save_pretrained(directory / "ours/patched" / name)
    result = subprocess.run(
        [PEER, PEER_SCRIPT, GOLDEN / "models/bert", directory],
        capture_output=True,
        text=True,
        env={**os.environ, "CUDA_VISIBLE_DEVICES": ""},
        timeout=540,
    )
    assert result.returncode == 0, result.stdout[-3000:] + result.stderr[-3000:]
    return model, one_class, directory


@pytest.mark.peer
@pytest.mark.parametrize("kind", ["safetensors", "bin"])
def test_adapters_reads_ours_and_we_read_theirs(exchange, kind):
    model, one_class, directory = exchange
    again = flexible()
    with no_warnings():
        for path in sorted((directory / "peer" / kind / "adapters").iterdir()):
            files.load_adapter(again, path)
        for path in sorted((directory / "peer" / kind / "fusions").iterdir()):
            files.load_adapter_fusion(again, path)
        for path in sorted((directory / "peer" / kind / "heads").iterdir()):
            files.load_head(again, path)
    # adapters cannot write ln_before as safetensors
    left = {"n"} if kind == "safetensors" else set()
    assert again.adapters_config.adapters == {
        name: config for name, config in model.adapters_config.adapters.items() if name not in left
    }
    assert again.adapters_config.fusion_names == model.adapters_config.fusion_names
    assert {n: h.config for n, h in again.heads.items()} == {
        n: h.config for n, h in model.heads.items()
    }
    expected = {k: v for k, v in model.state_dict().items() if ".adapters.n." not in k or not left}
    assert_equal(again.state_dict(), expected)

    other = static()
    files.load_adapter(other, directory / "peer" / kind / "static")
    assert_equal(other.state_dict(), one_class.state_dict())


@pytest.mark.peer
@pytest.mark.parametrize("kind", ["safetensors", "bin"])
@pytest.mark.parametrize("load_as", [None, "mine"])
def test_head_beside_a_fusion_is_named_as_adapters_names_it(exchange, kind, load_as):
    model, _, directory = exchange
    heads = json.loads((directory / f"{kind}_heads.json").read_text())
    again = flexible()
    for name in "ab":
        path = directory / "ours" / kind / "adapters" / name
        files.load_adapter(again, path, with_head=False)
    path = directory / "ours" / kind / "with head"
    name = files.load_adapter_fusion(again, path, load_as=load_as, set_active=True)
    assert [name, list(again.heads), again.active_head] == heads[load_as or ""]
    theirs = directory / "peer" / kind / "with head" / name
    for part, kind_of_part, names in (
        (name, "fusion", FUSION_FILES),
        (again.active_head, "head", HEAD_FILES),
    ):
        tensors = files.select(again.state_dict(), kind_of_part, part)
        assert_equal(tensors, read_files(theirs, names)[1])


@pytest.mark.peer
@pytest.mark.parametrize("kind", ["safetensors", "bin", "model"])
def test_adapters_computes_the_same_from_our_files(exchange, kind):
    model, _, directory = exchange
    results = safetensors.torch.load_file(directory / f"{kind}.safetensors")
    tokens = results["input_ids"]
    for name, setup in [*((n, n) for n in PEER_ADAPTERS), ("a,b", Fuse("a", "b"))]:
        if kind == "model" and name == "n":
            continue
        model.set_active_adapters(setup)
        for head in ("a", "task"):
            model.active_head = head
            with torch.no_grad():
                logits = model(input_ids=tokens).logits
            torch.testing.assert_close(logits, results[f"{name}/{head}"], rtol=1e-5, atol=1e-5)


@pytest.mark.peer
@pytest.mark.parametrize(
    "name, kind", [("bare", "BertModel"), ("static", "BertForSequenceClassification")]
)
def test_patched_models_are_exchanged(exchange, name, kind):
    _, _, directory = exchange
    tokens = safetensors.torch.load_file(directory / "model.safetensors")["input_ids"]
    for path in (directory / "ours/patched" / name, directory / "peer/patched" / name):
        again = AutoAdapterModel.from_pretrained(path).eval()
        again.set_active_adapters(Fuse("a", "b"))
        with torch.no_grad():
            outputs = again.base_model(input_ids=tokens, output_hidden_states=True)
        for theirs in ("BertAdapterModel", kind):
            expected = safetensors.torch.load_file(directory / f"{name} {theirs}.safetensors")
            assert len(expected) > 1
            for i, hidden_states in expected.items():
                torch.testing.assert_close(
                    outputs.hidden_states[int(i)], hidden_states, rtol=1e-5, atol=1e-5
                )


def test_python_of_the_tests_is_not_the_peers():
    assert PEER is None or Path(PEER).absolute() != Path(sys.executable).absolute()
