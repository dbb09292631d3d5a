"""Setups as files: those of `adapters` in both directions, every block, and what is refused."""

import contextlib
import inspect
import json
import os
import shutil
import subprocess
import warnings
from pathlib import Path

import pytest
import tiny
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModel, BertForSequenceClassification

import fastfusion
from fastfusion import AutoAdapterModel, Fuse, Stack, composition
from fastfusion.composition import (
    AdapterCompositionBlock,
    Average,
    BatchSplit,
    MultiTask,
    Parallel,
    Split,
)
from fastfusion.files import SETUP_FILE
from fastfusion.model import ModelAdaptersMixin

GOLDEN = Path(__file__).parent / "golden"
PEER_SETUP = GOLDEN / "groups/bert-seq_bn/setups/stack_fuse"
NAMED = Fuse("b", "c", name="named")


def make(names="abc", seed=0):
    """A flexible BERT of fixed weights; adapters of these names, three fusions, three heads."""
    torch.manual_seed(0)
    model = AutoAdapterModel.from_pretrained(
        GOLDEN / "models/bert", attn_implementation="eager"
    ).eval()
    torch.manual_seed(seed)
    for name in names:
        model.add_adapter(name, "seq_bn[reduction_factor=8]")
    if names == "abc":
        model.add_adapter_fusion(Fuse("a", "b"))
        model.add_adapter_fusion(NAMED)
        model.add_adapter_fusion(Fuse("a", "a"))
        for name in ("a", "b", "task"):
            model.add_classification_head(name, num_labels=3)
    tiny.randomize(model)
    for name, parameter in model.named_parameters():
        if name.startswith("heads."):
            torch.nn.init.normal_(parameter, std=0.5)
    model.active_head = None
    return model


@pytest.fixture
def model():
    return make()


def fresh():
    return make("")


def values(model):
    """Everything that a model has of adapters, fusions and heads."""
    record = model.adapters_config
    heads = {n: head.config for n, head in model.heads.items()} if hasattr(model, "heads") else {}
    temperatures = [
        (name, fusion.temperature.item())
        for name in record.fusions
        for _, fusion in model.model_adapters.fusion_modules(name)
        if fusion.temperature is not None
    ]
    labels = dict(model.config.label2id)
    state = {key: tensor.clone() for key, tensor in model.state_dict().items()}
    active = record.active_setup, getattr(model, "active_head", None)
    return [record.to_dict(), heads, temperatures, labels, active], state


@contextlib.contextmanager
def unchanged(model):
    before, state = values(model)
    yield
    after, state_after = values(model)
    assert after == before and state_after.keys() == state.keys()
    for key, tensor in state.items():
        assert state_after[key].equal(tensor), key


INPUT_IDS = torch.randint(5, 60, (4, 6), generator=torch.Generator().manual_seed(0))


def states(model, setup):
    """The model's last states under a setup."""
    model.set_active_adapters(setup)
    tasks = {"task_ids": [0, 1, 1, 0]} if isinstance(setup, MultiTask) else {}
    # not every child has one of its own
    head = {"head": "a"} if isinstance(setup, (BatchSplit, MultiTask)) else {}
    with torch.no_grad():
        return model(INPUT_IDS, output_hidden_states=True, **tasks, **head).hidden_states[-1]


SETUPS = [
    "a",
    Stack("a", "b"),
    Fuse("a", "b"),
    NAMED,
    Stack("c", Fuse("a", "b"), NAMED),
    Stack("c", NAMED),
    Split("a", "b", splits=[2, 4]),
    Split("a", "b", split_index=2),
    BatchSplit("a", Stack("b", "c"), batch_sizes=[1, 3]),
    Parallel("a", Stack("c", "b")),
    MultiTask("a", NAMED),
    Average("a", "b", weights=[0.3, 0.1]),
    Average("a", "b", "c", weights=[0.3, 0.1, 2.0], normalize_weights=False),
    Average("a", "b", peer_scaling=True),
    Fuse("a", "a"),
    Split(Stack("a", "b"), Average("a", "c"), splits=3),
]


@pytest.mark.parametrize("setup", SETUPS, ids=repr)
def test_round_trip(model, tmp_path, setup):
    assert model.save_adapter_setup(tmp_path, setup) is None
    other = fresh()
    loaded, heads = other.load_adapter_setup(tmp_path)
    assert loaded == composition.parse_composition(setup) and heads is None
    assert other.active_adapters is None and other.active_head is None
    assert set(other.adapters_config.adapters) == loaded.flatten()
    state, own = model.state_dict(), other.state_dict()
    for key in own:
        assert own[key].equal(state[key]), key
    assert states(other, loaded).equal(states(model, setup))
    # the heads of the adapters' names come along, as in adapters
    assert set(other.heads) == loaded.flatten() & {"a", "b"}
    with unchanged(other):
        assert other.load_adapter_setup(tmp_path) == (loaded, None)


@pytest.mark.parametrize(
    ("setup", "head_setup", "active"),
    [
        ("c", "task", "task"),
        (Fuse("a", "b"), "task", "task"),
        (Parallel("a", "b"), None, ["a", "b"]),
        (Parallel("a", "c"), ["task", "a"], ["task", "a"]),
        (Parallel("a", "c"), Parallel("task", "a"), ["task", "a"]),
        (Parallel("a", "c"), ("task", "task"), ["task", "task"]),
        (BatchSplit("a", "b", batch_sizes=2), None, BatchSplit("a", "b", batch_sizes=2)),
        (
            BatchSplit("a", "c", batch_sizes=[1, 3]),
            BatchSplit("a", "task", batch_sizes=[1, 3]),
            BatchSplit("a", "task", batch_sizes=[1, 3]),
        ),
        ("c", True, "b"),
        ("a", None, "a"),
        ("c", False, None),
    ],
    ids=repr,
)
@pytest.mark.parametrize("use_safetensors", [True, False])
def test_heads(model, tmp_path, setup, head_setup, active, use_safetensors):
    model.active_head = "b"
    with unchanged(model):
        model.save_adapter_setup(tmp_path, setup, head_setup, use_safetensors=use_safetensors)
    other = fresh()
    loaded, heads = other.load_adapter_setup(tmp_path, set_active=True)
    assert other.active_adapters == loaded and other.active_head == active
    assert heads == (active if head_setup else None)
    model.set_active_adapters(setup)
    model.active_head = active
    for name in other.heads:
        expected = model.heads[name].state_dict()
        assert all(t.equal(expected[key]) for key, t in other.heads[name].state_dict().items())
    if active is not None:
        with torch.no_grad():
            assert other(INPUT_IDS).logits.equal(model(INPUT_IDS).logits)


def test_a_head_from_before_is_left(model, tmp_path):
    model.save_adapter_setup(tmp_path, "a", "task")
    model.delete_head("a")
    model.save_adapter_setup(tmp_path, "a")
    assert (tmp_path / "a/head_config.json").exists()
    other = fresh()
    other.load_adapter_setup(tmp_path)
    assert len(other.heads) == 0


def test_temperatures(tmp_path):
    model = make()
    config = {"temperature": True}
    model.add_adapter_fusion(["a", "c"], config)
    for _, fusion in model.model_adapters.fusion_modules("a,c"):
        fusion.temperature = torch.tensor(31.0)
    model.save_adapter_setup(tmp_path, Fuse("a", "c"))
    other = fresh()
    other.load_adapter_setup(tmp_path)
    for _, fusion in other.model_adapters.fusion_modules("a,c"):
        assert fusion.temperature.item() == 31.0


def test_bare_and_static_models(model, tmp_path):
    setup = Stack("c", Fuse("a", "b"))
    model.save_adapter_setup(tmp_path / "flexible", setup, "task")
    model.active_head = None
    expected = states(model, setup)
    bare = AutoModel.from_pretrained(GOLDEN / "models/bert", attn_implementation="eager").eval()
    fastfusion.init(bare)
    with pytest.warns(UserWarning, match="BertModel cannot take the heads 'task'"):
        loaded, heads = bare.load_adapter_setup(tmp_path / "flexible", set_active=True)
    assert (loaded, heads) == (setup, "task") and bare.active_adapters == setup
    with torch.no_grad():
        torch.testing.assert_close(bare(INPUT_IDS).last_hidden_state, expected)
    with pytest.raises(ValueError, match="head_setup: BertModel has no heads; got 'task'"):
        bare.save_adapter_setup(tmp_path / "bare", setup, "task")
    bare.save_adapter_setup(tmp_path / "bare", setup)
    other = fresh()
    assert other.load_adapter_setup(tmp_path / "bare") == (setup, None)
    torch.testing.assert_close(states(other, setup), expected)

    def static():
        model = BertForSequenceClassification.from_pretrained(GOLDEN / "models/bert", num_labels=3)
        fastfusion.init(model)
        return model.eval()

    first, second = static(), static()
    first.add_adapter("a")
    with pytest.raises(ValueError, match="head_setup: expected True or None"):
        first.save_adapter_setup(tmp_path / "static", "a", "task")
    first.save_adapter_setup(tmp_path / "static", "a", True)
    assert not first.classifier.weight.equal(second.classifier.weight)
    assert second.load_adapter_setup(tmp_path / "static") == (Stack("a"), True)
    assert first.classifier.weight.equal(second.classifier.weight)


def test_warnings_point_at_the_caller(model, tmp_path):
    model.save_adapter_setup(tmp_path, "a", "task")
    path = tmp_path / "a/adapter.safetensors"
    tensors = load_file(path)
    save_file(dict(list(tensors.items())[1:]), path)
    bare = AutoModel.from_pretrained(GOLDEN / "models/bert")
    fastfusion.init(bare)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        bare.load_adapter_setup(tmp_path, strict=False)
    line = inspect.currentframe().f_lineno - 1
    assert [(w.filename, w.lineno) for w in caught] == [(__file__, line)] * 2
    assert "cannot take the heads" in str(caught[0].message)
    assert "missing" in str(caught[1].message)


# -- files of adapters ----------------------------------------------------------------------------


def test_setup_of_adapters():
    other = fresh()
    loaded, heads = other.load_adapter_setup(PEER_SETUP, set_active=True)
    assert loaded == Stack("c", Fuse("a", "b")) and heads is None
    assert other.active_adapters == loaded
    assert list(other.adapters_config.fusions) == ["a,b"] and len(other.heads) == 0
    for name in "abc":
        tensors = torch.load(PEER_SETUP / name / "pytorch_adapter.bin", weights_only=True)
        state = other.state_dict()
        for key, tensor in tensors.items():
            assert state[f"bert.{key.removeprefix('bert.')}"].equal(tensor), key


def test_average_of_adapters(model, tmp_path):
    """It divides by the number of children twice; its weights are taken as they are."""
    model.save_adapter_setup(tmp_path, Average("a", "b", peer_scaling=True))
    path = tmp_path / SETUP_FILE
    config = json.loads(path.read_text())
    for weights in ([0.75, 0.25], [3.0, 2.0], [0.1, 0.2]):
        del config["adapter_setup"]["peer_scaling"]
        config["adapter_setup"]["kwargs"] = {"weights": weights}
        path.write_text(json.dumps(config))
        composition._note_peer_scaling.cache_clear()
        with pytest.warns(UserWarning, match="peer_scaling=True"):
            loaded, _ = fresh().load_adapter_setup(tmp_path)
        arguments = {"weights": weights, "normalize_weights": False}
        assert loaded == Average("a", "b", **arguments, peer_scaling=True)
        config["adapter_setup"] = loaded.to_dict()


PEER_PARAMETERS = {
    "save_adapter_setup": "save_directory adapter_setup head_setup meta_dict "
    "custom_weights_loaders use_safetensors",
    "load_adapter_setup": "adapter_setup_name_or_path version custom_weights_loaders set_active "
    "use_safetensors",
}


@pytest.mark.parametrize("method", PEER_PARAMETERS)
def test_parameters_are_those_of_adapters(method):
    theirs = PEER_PARAMETERS[method].split()
    ours = list(inspect.signature(getattr(ModelAdaptersMixin, method)).parameters.values())[1:]
    positional = [p.name for p in ours if p.kind is p.POSITIONAL_OR_KEYWORD]
    assert positional and positional == theirs[: len(positional)]
    absent = {"custom_weights_loaders", "version"}
    assert set(theirs) - {p.name for p in ours} == absent & set(theirs)


PEER_SETUPS = {
    "stack_fuse": (Stack("c", Fuse("a", "b")), "task"),
    "parallel": (Parallel("a", Stack("c", "b")), ["a", "task"]),
    "batch": (BatchSplit("a", "b", batch_sizes=[1, 3]), BatchSplit("a", "b", batch_sizes=[1, 3])),
    "split": (Split("a", "b", splits=[2, 4]), None),
    "multi": (Stack("c", MultiTask("a", "b")), "task"),
    "twice": (Fuse("a", "a"), "task"),
    "thrice": (Stack("c", Fuse("a", "b", "a")), "task"),
    "average": (
        Average("a", "b", weights=[0.5, 1.5], normalize_weights=False, peer_scaling=True),
        "task",
    ),
}
"""What both libraries write and read; tests/peer_setups.py has it too."""


@pytest.mark.peer
@pytest.mark.parametrize("use_safetensors", [True, False])
def test_exchange_with_adapters(model, tmp_path, use_safetensors):
    python = os.environ.get("FASTFUSION_PEER_PYTHON")
    if not python:
        pytest.fail("FASTFUSION_PEER_PYTHON: the interpreter with adapters 1.3.0")
    model.add_adapter_fusion(Fuse("a", "b", "a"))
    tiny.randomize(model)
    expected = {}
    for name, (setup, head_setup) in PEER_SETUPS.items():
        model.save_adapter_setup(
            tmp_path / "ours" / name, setup, head_setup, use_safetensors=use_safetensors
        )
        model.set_active_adapters(setup)
        model.active_head = head_setup
        tasks = {"task_ids": torch.tensor([0, 1, 1, 0])} if name == "multi" else {}
        with torch.no_grad():
            output = model(INPUT_IDS, **tasks, head="task" if name == "multi" else None)
        expected[name] = output.last_hidden_state if head_setup is None else output.logits
    model.save_adapter_setup(tmp_path / "ours/named", NAMED, use_safetensors=use_safetensors)
    save_file({"input_ids": INPUT_IDS}, tmp_path / "inputs.safetensors")
    script = Path(__file__).parent / "peer_setups.py"
    command = [python, script, GOLDEN / "models/bert", tmp_path, str(use_safetensors)]
    subprocess.run(command, check=True, cwd=tmp_path)
    found = load_file(tmp_path / "outputs.safetensors")
    for name, (setup, head_setup) in PEER_SETUPS.items():
        torch.testing.assert_close(found[name], expected[name], rtol=1e-5, atol=1e-5, msg=name)
        other = fresh()
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            loaded = other.load_adapter_setup(tmp_path / "peer" / name)
        assert loaded == (setup, head_setup)
        state = model.state_dict()
        for key, tensor in other.state_dict().items():
            assert tensor.equal(state[key]), key


# -- whole or not at all --------------------------------------------------------------------------


class Interrupted(Exception):
    pass


@pytest.mark.parametrize("use_safetensors", [True, False])
def test_an_interrupted_write(tmp_path, monkeypatch, use_safetensors):
    """Whichever step fails, the older setup or the new one is there, whole."""
    setup = Stack("c", Fuse("a", "b"))
    old, new = make(seed=1), make(seed=2)
    replace, outcomes = os.replace, []
    for step in range(1000):
        directory = tmp_path / str(step)
        old.save_adapter_setup(directory, setup, "task")
        calls = iter(range(10000))

        def interrupted(*args, calls=calls, step=step):
            if next(calls) == step:
                raise Interrupted
            return replace(*args)

        monkeypatch.setattr(os, "replace", interrupted)
        try:
            new.save_adapter_setup(directory, setup, "task", use_safetensors=use_safetensors)
            finished = True
        except Interrupted:
            finished = False
        monkeypatch.setattr(os, "replace", replace)
        other = fresh()
        other.load_adapter_setup(directory)
        matches = [
            all(tensor.equal(whole[key]) for key, tensor in other.state_dict().items())
            for whole in (old.state_dict(), new.state_dict())
        ]
        assert sum(matches) == 1
        outcomes.append(matches[1])
        if finished:
            assert not list(directory.glob(".*"))
            break
        # what is left does not trouble the next write
        new.save_adapter_setup(directory, setup, "task")
        assert not [path for path in directory.glob(".*") if path.suffix == ".new"]
        shutil.rmtree(directory)
    assert finished and outcomes[0] is False and outcomes[-1] is True
    assert outcomes == sorted(outcomes)


def spoil_adapter(directory):
    (directory / "b/adapter.safetensors").write_bytes(b"no tensors")


def spoil_fusion(directory):
    shutil.rmtree(directory / "a,b")


def spoil_head(directory):
    (directory / "task/head_config.json").unlink()


def spoil_order(directory):
    path = directory / "a,b/adapter_fusion_config.json"
    config = json.loads(path.read_text())
    path.write_text(json.dumps(config | {"adapter_names": ["b", "a"]}))


@pytest.mark.parametrize("known", ["", "abc"])
@pytest.mark.parametrize("spoil", [spoil_adapter, spoil_fusion, spoil_head, spoil_order])
def test_a_failed_load_changes_nothing(model, tmp_path, spoil, known):
    model.save_adapter_setup(tmp_path, Stack("c", Fuse("a", "b")), "task")
    spoil(tmp_path)
    other = make(known, seed=3)
    if known:
        # a head that is replaced before the error
        other.add_classification_head("a", num_labels=5, overwrite_ok=True)
        other.set_active_adapters(NAMED)
        other.active_head = "b"
    with unchanged(other), pytest.raises((ValueError, FileNotFoundError)):
        other.load_adapter_setup(tmp_path, set_active=True)


# -- what is refused ------------------------------------------------------------------------------

BAD_SAVES = {
    "unknown adapter": (("a", "zzz"), {}, "setup: expected adapters of the model.*'zzz'"),
    "unknown fusion": (Fuse("a", "c"), {}, "setup: expected a fusion of the model"),
    "no adapters": (None, {}, "adapter_setup: expected adapters; got None"),
    "unknown head": ("a", {"head_setup": "zzz"}, r"head_setup: expected one of \['a', .*'zzz'"),
    "Stack of heads": ("a", {"head_setup": Stack("a")}, "head_setup: expected a head's name"),
    "no active head": ("a", {"head_setup": True}, "head_setup: expected an active head"),
}


@pytest.mark.parametrize("case", BAD_SAVES)
def test_bad_saves_write_nothing(model, tmp_path, case):
    setup, arguments, message = BAD_SAVES[case]
    setup = Stack(*setup) if isinstance(setup, tuple) else setup
    with pytest.raises(ValueError, match=message):
        model.save_adapter_setup(tmp_path / "x", setup, **arguments)
    assert not (tmp_path / "x").exists()


def test_files_in_the_way(model, tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(NotADirectoryError, match="save_directory"):
        model.save_adapter_setup(tmp_path / "file", "a")
    (tmp_path / "x").mkdir()
    (tmp_path / "x/a").write_text("")
    with pytest.raises(NotADirectoryError, match="save_directory"):
        model.save_adapter_setup(tmp_path / "x", "a")
    assert [path.name for path in (tmp_path / "x").iterdir()] == ["a"]
    model.add_adapter("a/b")
    with pytest.raises(ValueError, match="'a/b' cannot be the name of a directory"):
        model.save_adapter_setup(tmp_path / "y", "a/b")


BAD_LAYERS = {
    "behind the last": ([99], r"\[99\]"),
    "one of them": ([0, 2], r"\[0, 2\]"),
    "negative": ([-1], r"\[-1\]"),
    "a bool": ([True], r"\[True\]"),
    "bools for numbers": ((False, 1), r"\[False, 1\]"),
    "a float": ([1.0], r"\[1\.0\]"),
    "text": ("01", r"\['0', '1'\]"),
    "None in a list": ([None], r"\[None\]"),
    "no list": (1, "1"),
}
LAYERS = "^skip_layers: expected a list of the model's layer numbers, 0 to 1; got "


@pytest.mark.parametrize("case", BAD_LAYERS)
def test_bad_layers(model, case):
    """At the call that sets them; of a context, at the model's call, before it computes."""
    skip_layers, got = BAD_LAYERS[case]
    model.set_active_adapters("b", skip_layers=[1])
    model.active_head = "task"
    with unchanged(model), pytest.raises(ValueError, match=f"{LAYERS}{got}$"):
        model.set_active_adapters("a", skip_layers=skip_layers)
    assert model.adapters_config.skip_layers == [1]
    with torch.no_grad():
        expected = model(INPUT_IDS).logits
    started = []
    hook = model.get_input_embeddings().register_forward_hook(lambda *_: started.append(1))
    rows = ["a", "b", "c", "__base__"]
    for arguments in ({}, {"adapter_names": rows}, {"adapter_ids": model.routing(rows)}):
        for setup in ("a", None):
            with fastfusion.AdapterSetup(setup, skip_layers=skip_layers):
                with pytest.raises(ValueError, match=f"{LAYERS}{got}$"):
                    model(INPUT_IDS, **arguments)
                with pytest.raises(ValueError, match=LAYERS):
                    model.adapter_plan()
    assert not started
    hook.remove()
    with torch.no_grad():
        assert model(INPUT_IDS).logits.equal(expected)


@pytest.mark.parametrize("skip_layers", [[], [0], (1, 1), range(2), {1, 0}])
def test_layers_of_the_model(model, skip_layers):
    def states():
        with torch.no_grad():
            return model(INPUT_IDS).last_hidden_state

    model.set_active_adapters("c", skip_layers=skip_layers)
    assert model.adapters_config.skip_layers == list(skip_layers)
    expected = states()
    model.set_active_adapters("c", skip_layers=iter(skip_layers))
    assert states().equal(expected)
    model.set_active_adapters(None)
    assert states().equal(expected) == ({*skip_layers} == {0, 1})
    with fastfusion.AdapterSetup("c", skip_layers=skip_layers):
        assert states().equal(expected)


def single(name):
    return {"type": "single", "children": [name]}


def stack(*children, **kwargs):
    return {"adapter_setup": {"type": "Stack", "children": list(children), **kwargs}}


BAD_FILES = {
    "no object": ("[]", "expected a JSON object; got list"),
    "no JSON": ("{", "not a JSON file"),
    "no setup": ({}, "expected a setup under 'adapter_setup'.*data: expected"),
    "null": ({"adapter_setup": None}, "under 'adapter_setup'.*data: expected"),
    "a string": ({"adapter_setup": "a"}, "under 'adapter_setup'"),
    "an unknown block": ({"adapter_setup": {"type": "Maze", "children": []}}, "Maze"),
    "no children": (stack(), "Stack: expected one or more"),
    "a child of a wrong type": (stack(3), "under 'adapter_setup'"),
    "a name of a wrong type": (stack(single(3)), "under 'adapter_setup'.*one name.*3"),
    "a forbidden nesting": (stack(stack(single("a"))["adapter_setup"]), "Stack: expected children"),
    "unknown arguments": (stack(single("a"), kwargs={"x": 1}), "kwargs: .*'x'"),
    "arguments of a wrong type": (stack(single("a"), kwargs=[1]), "under 'adapter_setup'"),
    "another directory": (stack(single("../a")), r"'\.\./a' cannot be the name of a directory"),
    "a Fuse's name": (
        {"adapter_setup": {"type": "Fuse", "children": [single("a")], "kwargs": {"name": 3}}},
        "a Fuse whose name is no text",
    ),
    "heads": (stack(single("a")) | {"head_setup": 3}, "under 'head_setup'; got 3"),
    "heads of a wrong type": (stack(single("a")) | {"head_setup": ["a", 3]}, "under 'head_setup'"),
    "a Stack of heads": (stack(single("a")) | {"head_setup": single("a")}, "under 'head_setup'"),
    "a list of heads": (stack(single("a")) | {"heads": 3}, "expected 'heads' to be of type list"),
}


@pytest.mark.parametrize("case", BAD_FILES)
def test_bad_files(model, tmp_path, case):
    text, message = BAD_FILES[case]
    model.save_adapter_setup(tmp_path, "a")
    (tmp_path / SETUP_FILE).write_text(text if isinstance(text, str) else json.dumps(text))
    other = fresh()
    with unchanged(other), pytest.raises(ValueError, match=message) as info:
        other.load_adapter_setup(tmp_path, set_active=True)
    if "cannot be" not in message:
        assert str(tmp_path / SETUP_FILE) in str(info.value)


def test_missing_files(model, tmp_path):
    argument = "^adapter_setup_name_or_path: "
    with pytest.raises(FileNotFoundError, match=argument):
        model.load_adapter_setup(tmp_path / "nothing")
    with pytest.raises(NotImplementedError, match=argument):
        model.load_adapter_setup("owner/name@hub")
    model.save_adapter(tmp_path / "adapter", "a")
    with pytest.raises(FileNotFoundError, match=f"{argument}no adapter_setup.json"):
        model.load_adapter_setup(tmp_path / "adapter")
    model.save_adapter_setup(tmp_path / "setup", Stack("a", "b"), "task")
    for name in ("b", "task"):
        shutil.move(tmp_path / "setup" / name, tmp_path / name)
        with unchanged(model), pytest.raises(FileNotFoundError, match=f"no directory '{name}'"):
            model.load_adapter_setup(tmp_path / "setup")
        shutil.move(tmp_path / name, tmp_path / "setup" / name)
    model.load_adapter_setup(tmp_path / "setup")


def test_plain_data_of_blocks():
    for setup in SETUPS:
        block = composition.parse_composition(setup)
        data = json.loads(json.dumps(block.to_dict()))
        assert AdapterCompositionBlock.from_dict(data) == block
