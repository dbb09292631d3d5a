"""Setups and key-value caches: token by token, and in `generate`."""

import inspect

import pytest
import tiny
import torch
from row_models import BASE, LENGTH, add_adapters, close, setup_of
from transformers import BertConfig, BertLMHeadModel

import fastfusion
from fastfusion import AdapterSetup
from fastfusion.composition import Average, Parallel, Split, Stack

DECODED = {
    "Split": Split("a", "b", split_index=5),
    "Split in a Stack": Stack("d", Split("a", "b", split_index=2)),
    "calls of their own": Split("g", "d", split_index=4),
    "nested": Split("a", Split("b", "d", split_index=3), split_index=2),
    "inside an Average": Average(Split("a", "b", split_index=5), "d"),
    "Average behind a cut": Split("a", Average(Stack("a", "b"), "d"), split_index=3),
}


@pytest.fixture(autouse=True)
def one_thread(set_threads):
    """The models are so small that threads cost more than they bring."""
    set_threads(1)


def decoder():
    torch.manual_seed(1)
    config = BertConfig(**tiny.SIZES, is_decoder=True)
    model = BertLMHeadModel(config).eval()
    tiny.randomize_norms(model)
    fastfusion.init(model)
    add_adapters(model)
    return model.eval()


def decoded(model, ids, steps, **arguments):
    """The logits of a sequence that comes piece by piece."""
    cache, outputs, start = None, [], 0
    for count in steps:
        piece = ids[:, start : start + count]
        output = model(piece, past_key_values=cache, use_cache=True, **arguments)
        cache, start = output.past_key_values, start + count
        outputs.append(output.logits)
    return torch.cat(outputs, dim=1)


@pytest.mark.parametrize("kind", ["setup", "adapter_names", "adapter_ids"])
@pytest.mark.parametrize("name", DECODED)
def test_tokens_are_counted_from_the_start_of_the_cache(name, kind):
    """A gate is the mean over the tokens of one forward, so a literal walk by positions it is."""
    model, ids = decoder(), tiny.ids(3, 9)
    setup, arguments = DECODED[name], {}
    if kind == "setup":
        model.set_active_adapters(setup)
    else:
        arguments = {"adapter_names": [setup, "a", BASE]}
    if kind == "adapter_ids":
        arguments = {"adapter_ids": model.routing(arguments["adapter_names"])}
    steps = [3, 1, 2, 1, 1, 1]
    with torch.no_grad():
        if name == "calls of their own":
            # the gate sees the tokens of its own forward: positions 0-2, and 3
            model.set_backend("reference")
            expected = decoded(model, ids, steps, **arguments)
            model.set_backend(None)
            first = model(ids[:, :3], **arguments).logits
            close(expected[:, :3], first)
        else:
            expected = model(ids, **arguments).logits
        close(decoded(model, ids, steps, **arguments), expected)


def test_generation_with_a_cache():
    model, ids = decoder(), tiny.ids(2, 4)
    model.set_active_adapters(Split("a", "b", split_index=6))
    options = {"max_new_tokens": 6, "do_sample": False, "pad_token_id": 0}
    with torch.no_grad():
        found = model.generate(ids, use_cache=True, **options)
        assert torch.equal(found, model.generate(ids, use_cache=False, **options))
        # the second part matters
        logits = model(found).logits
        model.set_active_adapters("a")
        assert not torch.allclose(model(found).logits[:, 6:], logits[:, 6:])


def test_generation_with_a_setup_for_each_row():
    """generate() takes the arguments, and repeats numbers for its beams."""
    model, ids = decoder(), tiny.ids(3, 4)
    entries = ["a", Split("a", "b", split_index=6), BASE]
    options = {"max_new_tokens": 5, "do_sample": False, "pad_token_id": 0}
    with torch.no_grad():
        for beams in (1, 3):
            expected = []
            for row, entry in enumerate(entries):
                with AdapterSetup(setup_of(entry)):
                    own = ids[row : row + 1]
                    expected.append(model.generate(own, num_beams=beams, **options))
            numbers = model.routing(entries)
            actual = model.generate(ids, adapter_ids=numbers, num_beams=beams, **options)
            assert torch.equal(actual, torch.cat(expected))
            if beams == 1:
                actual = model.generate(ids, adapter_names=entries, **options)
                assert torch.equal(actual, torch.cat(expected))


@pytest.mark.parametrize("beams", [1, 3])
def test_generation_with_a_parallel(beams):
    """Channel after channel, as the forward returns them."""
    model, ids = decoder(), tiny.ids(2, 4)
    mask = torch.tensor([[0, 1, 1, 1], [1, 1, 1, 1]])
    options = {"max_new_tokens": 4, "do_sample": False, "pad_token_id": 0, "num_beams": beams}
    children = ["a", Stack("d", "a"), "d"]
    with torch.no_grad():
        expected = []
        for child in children:
            model.set_active_adapters(child)
            expected.append(model.generate(ids, attention_mask=mask, **options))
        model.set_active_adapters(Parallel(*children))
        actual = model.generate(ids, attention_mask=mask, **options)
        assert torch.equal(actual, torch.cat(expected))
        # greedy words of random weights may agree
        assert len({tuple(words.flatten().tolist()) for words in expected}) > 1
        with AdapterSetup("a"):
            assert torch.equal(model.generate(ids, attention_mask=mask, **options), expected[0])
        names = model.generate(
            ids, attention_mask=mask, adapter_ids=model.routing(["d", "a"]), **options
        )
        assert len(names) == 2


def test_copies_that_the_rows_hold_already():
    model, ids = decoder(), tiny.ids(2, 5)
    model.set_active_adapters(Parallel("a", "b"))
    with torch.no_grad():
        expected = model(ids).logits
        actual = model(ids.repeat(2, 1), adapter_input_parallelized=True).logits
        close(actual, expected)
    with pytest.raises(
        ValueError, match="adapter_input_parallelized: expected a batch of 2 copies"
    ):
        model(tiny.ids(3, 5), adapter_input_parallelized=True)


def test_a_cache_by_position():
    model, ids = decoder(), tiny.ids(2, 7)
    names = list(inspect.signature(type(model).forward).parameters)[1:]
    with torch.no_grad(), AdapterSetup(Split("a", "b", split_index=5)):
        caches = [model(ids[:, :6], use_cache=True).past_key_values for _ in range(2)]
        expected = model(ids[:, 6:], past_key_values=caches[0]).logits
        before = [None] * names.index("past_key_values")
        before[0] = ids[:, 6:]
        close(model(*before, caches[1]).logits, expected)


def test_a_parallel_with_cross_attention():
    torch.manual_seed(1)
    config = BertConfig(**tiny.SIZES, is_decoder=True, add_cross_attention=True)
    model = BertLMHeadModel(config).eval()
    fastfusion.init(model)
    add_adapters(model)
    model.eval()
    ids, encoded = tiny.ids(2, LENGTH), torch.randn(2, 5, 32)
    mask = torch.tensor([[1, 1, 1, 1, 1], [1, 1, 1, 0, 0]])
    arguments = {"encoder_hidden_states": encoded, "encoder_attention_mask": mask}
    with torch.no_grad():
        with AdapterSetup(Parallel("a", "d")):
            actual = model(ids, **arguments).logits
        for channel, name in zip(actual.chunk(2), "ad", strict=True):
            with AdapterSetup(name):
                close(channel, model(ids, **arguments).logits)


def test_a_split_of_a_whole_sequence_with_a_cache():
    """The sum of the parts is the length with what the cache holds."""
    model, ids = decoder(), tiny.ids(2, 7)
    with torch.no_grad():
        cache = model(ids[:, :3], use_cache=True).past_key_values
        with AdapterSetup(Split("a", "b", splits=[3, 4])):
            with pytest.raises(ValueError, match=r"splits: expected sequences of 7 .* got 4"):
                model(ids[:, 3:])
            tail = model(ids[:, 3:], past_key_values=cache).logits
        with AdapterSetup("b"):
            cache = model(ids[:, :3], use_cache=True).past_key_values
        assert tail.shape[1] == 4
