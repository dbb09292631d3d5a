"""Pairs of files: a write that is interrupted anywhere leaves the older pair or the new one."""

import contextlib
import itertools
import json
import logging
import os

import pytest
import torch

from fastfusion.files import ADAPTER_FILES, read_files, write_files

OLD = torch.zeros(3)
NEW = torch.ones(4)
NEWEST = torch.full((5,), 2.0)


def write(directory, tensor, same_config, use_safetensors=True):
    config = {"name": "same"} if same_config else {"name": str(tensor.tolist())}
    write_files(directory, ADAPTER_FILES, config, {"w": tensor}, use_safetensors)


def read(directory, same_config, use_safetensors=None):
    """The tensor, after a look at whether the configuration is its own."""
    config, tensors = read_files(directory, ADAPTER_FILES, use_safetensors)
    assert config == {"name": "same" if same_config else str(tensors["w"].tolist())}
    return tensors["w"]


def contents(directory):
    return {path.name: path.read_bytes() for path in directory.iterdir()}


def hidden(directory):
    return [name for name in contents(directory) if name.startswith(".")]


class Crash(BaseException):
    pass


def crash(patch, step, kind):
    """Let the `step`-th change on the disk raise.

    "before": in place of the change, once. "after": once it is made. "killed": in place of this
    change and all that follow, as if the process had died.
    """
    steps = itertools.count()

    def wrapped(function):
        def wrapper(*args, **kwargs):
            now = next(steps)
            if now == step and kind == "after":
                with contextlib.suppress(FileNotFoundError):
                    function(*args, **kwargs)
            if now == step or (now > step and kind == "killed"):
                raise Crash
            return function(*args, **kwargs)

        return wrapper

    for name in ("fsync", "replace", "unlink"):
        patch.setattr(os, name, wrapped(getattr(os, name)))


def interrupted_writes(monkeypatch, directory, kind, write_one):
    """Call `write_one(directory)` once for each step it can be interrupted at."""
    for step in itertools.count():
        path = directory / str(step)
        try:
            with monkeypatch.context() as patch:
                write_one(path, lambda patch=patch, step=step: crash(patch, step, kind))
        except Crash:
            yield path
        else:
            assert step > 8
            return


FORMATS = pytest.mark.parametrize(
    ("old_format", "new_format"), list(itertools.product([True, False], repeat=2))
)


@pytest.mark.parametrize("same_config", [True, False])
@pytest.mark.parametrize("kind", ["before", "after", "killed"])
@FORMATS
def test_interrupted_write(monkeypatch, tmp_path, kind, old_format, new_format, same_config):
    before = {}

    def write_one(path, start):
        write(path, OLD, same_config, old_format)
        before[path] = contents(path)
        start()
        write(path, NEW, same_config, new_format)

    found = []
    for path in interrupted_writes(monkeypatch, tmp_path, kind, write_one):
        tensor = read(path, same_config)
        found.append(tensor.tolist())
        assert found[-1] in (OLD.tolist(), NEW.tolist())
        if kind != "killed" and torch.equal(tensor, OLD):
            assert contents(path) == before[path]
        expected = old_format if torch.equal(tensor, OLD) else new_format
        assert torch.equal(read(path, same_config, expected), tensor)
        with contextlib.suppress(FileNotFoundError):
            # whoever asks for the other format gets no other pair
            assert torch.equal(read(path, same_config, not expected), tensor)
        write(path, NEWEST, same_config, new_format)
        assert torch.equal(read(path, same_config), NEWEST)
        if kind != "killed":
            weights = ADAPTER_FILES.safetensors if new_format else ADAPTER_FILES.pickle
            assert contents(path).keys() == {ADAPTER_FILES.config, weights}
    # the older pair up to some step, the new one from there on
    assert OLD.tolist() in found and NEW.tolist() in found
    assert found == sorted(found, key=len)


@pytest.mark.parametrize("kind", ["before", "after", "killed"])
@pytest.mark.parametrize("use_safetensors", [True, False])
def test_interrupted_first_write(monkeypatch, tmp_path, kind, use_safetensors):
    def write_one(path, start):
        path.mkdir()
        start()
        write(path, NEW, True, use_safetensors)

    found = []
    for path in interrupted_writes(monkeypatch, tmp_path, kind, write_one):
        try:
            found.append(torch.equal(read(path, True), NEW))
        except FileNotFoundError:
            found.append(False)
            assert kind == "killed" or not contents(path)
    assert found == sorted(found) and set(found) == {False, True}


@pytest.mark.parametrize("same_config", [True, False])
@FORMATS
def test_write_that_is_killed_after_one_that_was(
    monkeypatch, tmp_path, old_format, new_format, same_config
):
    def first(path, start):
        write(path, OLD, same_config, old_format)
        start()
        write(path, NEW, same_config, new_format)

    for path in interrupted_writes(monkeypatch, tmp_path, "killed", first):
        step = int(path.name)

        def second(path, start, step=step):
            write(path, OLD, same_config, old_format)
            with monkeypatch.context() as patch, pytest.raises(Crash):
                crash(patch, step, "killed")
                write(path, NEW, same_config, new_format)
            start()
            write(path, NEWEST, same_config, old_format)

        for twice in interrupted_writes(monkeypatch, path / "twice", "killed", second):
            tensor = read(twice, same_config)
            assert any(torch.equal(tensor, other) for other in (OLD, NEW, NEWEST))


@pytest.mark.parametrize("same_config", [True, False])
def test_files_that_an_exception_leaves(monkeypatch, tmp_path, same_config, caplog):
    """No hidden one once the new pair counts: weights that are copied over it are read."""

    weights = ADAPTER_FILES.safetensors
    write(tmp_path / "copied", NEWEST, same_config)
    replace = os.replace
    for call in (1, 2):  # the configuration is moved by the second
        path = tmp_path / str(call)
        write(path, OLD, same_config)
        calls = itertools.count(1)

        def interrupted(*args, calls=calls, call=call):
            replace(*args)
            if next(calls) == call:
                raise KeyboardInterrupt

        with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
            patch.setattr(os, "replace", interrupted)
            write(path, NEW, same_config)
        assert hidden(path) == []
        assert torch.equal(read(path, same_config), (OLD, NEW)[call - 1])
        (path / weights).write_bytes((tmp_path / "copied" / weights).read_bytes())
        assert torch.equal(read_files(path, ADAPTER_FILES)[1]["w"], NEWEST)
    assert not caplog.records


def test_warning_about_an_interrupted_write(monkeypatch, tmp_path, caplog):
    write(tmp_path, OLD, True)
    replace = os.replace

    def killed(source, target):
        if target == tmp_path / ADAPTER_FILES.safetensors:
            raise Crash
        replace(source, target)

    with monkeypatch.context() as patch, pytest.raises(Crash):
        patch.setattr(os, "replace", killed)
        write(tmp_path, NEW, True)
    (name,) = hidden(tmp_path)
    with caplog.at_level(logging.WARNING):
        assert torch.equal(read(tmp_path, True), NEW)
    assert [record.levelname for record in caplog.records] == ["WARNING"]
    assert "interrupted" in caplog.text and name in caplog.text
    with pytest.raises(FileNotFoundError, match=ADAPTER_FILES.pickle):
        read(tmp_path, True, use_safetensors=False)
    write(tmp_path, NEWEST, True)
    assert hidden(tmp_path) == [] and torch.equal(read(tmp_path, True), NEWEST)


def test_choice_of_format(tmp_path):
    both, one = tmp_path / "both", tmp_path / "one"
    write(both, OLD, True, use_safetensors=False)
    pickled = (both / ADAPTER_FILES.pickle).read_bytes()
    write(both, NEW, True)
    (both / ADAPTER_FILES.pickle).write_bytes(pickled)
    for choice, expected in ((None, NEW), (True, NEW), (False, OLD)):
        assert torch.equal(read(both, True, choice), expected)
    write(one, OLD, True, use_safetensors=False)
    for choice in (None, False):
        assert torch.equal(read(one, True, choice), OLD)
    with pytest.raises(FileNotFoundError, match="no adapter.safetensors in"):
        read(one, True, use_safetensors=True)
    (one / ADAPTER_FILES.pickle).unlink()
    with pytest.raises(FileNotFoundError, match="no adapter.safetensors or pytorch_adapter.bin in"):
        read(one, True)


def test_errors_name_the_argument_of_the_caller(tmp_path):
    (tmp_path / "file").write_text("")
    (tmp_path / "config").mkdir()
    (tmp_path / "config" / ADAPTER_FILES.config).write_text("{}")
    for arguments, name in (({}, "directory"), ({"argument": "mine"}, "mine")):
        for directory, error in (
            ("file", NotADirectoryError),
            ("missing", FileNotFoundError),
            (".", FileNotFoundError),
            ("config", FileNotFoundError),
            ("name@hub", NotImplementedError),
        ):
            with pytest.raises(error, match=f"^{name}: "):
                read_files(tmp_path / directory, ADAPTER_FILES, **arguments)
        with pytest.raises(NotADirectoryError, match=f"^{name}: "):
            write_files(tmp_path / "file", ADAPTER_FILES, {}, {}, **arguments)


def test_every_write_has_a_configuration_of_its_own(tmp_path):
    texts = set()
    for _ in range(2):
        write(tmp_path, OLD, True)
        texts.add((tmp_path / ADAPTER_FILES.config).read_text())
    assert len(texts) == 2
    assert all(json.loads(text)["name"] == "same" for text in texts)
    assert read_files(tmp_path, ADAPTER_FILES)[0] == {"name": "same"}


def test_deeply_nested_configuration(tmp_path):
    write(tmp_path, OLD, True)
    for text in ("[" * 200_000, '{"a":' * 200_000):
        (tmp_path / ADAPTER_FILES.config).write_text(text)
        with pytest.raises(ValueError, match="not a JSON file"):
            read_files(tmp_path, ADAPTER_FILES)
