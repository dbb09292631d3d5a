"""Configurations: the values, hashes and files of `adapters`, and what is refused."""

import copy
import json
import pickle
from dataclasses import FrozenInstanceError, asdict
from pathlib import Path

import pytest

from fastfusion.configuration import (
    ADAPTER_CONFIG_MAP,
    ADAPTERFUSION_CONFIG_MAP,
    AdapterConfig,
    AdapterFusionConfig,
    AdapterPlusConfig,
    BnConfig,
    CompacterConfig,
    DoubleSeqBnConfig,
    DynamicAdapterFusionConfig,
    HoulsbyConfig,
    ModelAdaptersConfig,
    ParallelConfig,
    ParBnConfig,
    PfeifferConfig,
    SeqBnConfig,
    SeqBnInvConfig,
    StaticAdapterFusionConfig,
    get_adapter_config_hash,
)

GOLDEN = Path(__file__).parent / "golden"
GROUPS = json.loads((GOLDEN / "manifest.json").read_text())["groups"]
CONFIG_FILES = sorted(GOLDEN.glob("groups/*/adapters/*/adapter_config.json"))
FUSION_FILES = sorted(GOLDEN.glob("groups/*/fusions/*/adapter_fusion_config.json"))

HASHES = {
    "seq_bn": "9076f36a74755ac4",
    "double_seq_bn": "b1017368d7a97b11",
    "par_bn": "211b85d66ae909db",
    "scaled_par_bn": "4197b24ec21c92f8",
    "seq_bn_inv": "9ed5b5a29de19b71",
    "double_seq_bn_inv": "bcdbfdc759d7abf1",
    "compacter": "934efc0c1022a56f",
    "compacter++": "cfa13994accfb5f4",
    "pfeiffer": "9076f36a74755ac4",
    "houlsby": "b1017368d7a97b11",
    "parallel": "211b85d66ae909db",
    "scaled_parallel": "4197b24ec21c92f8",
}


@pytest.mark.parametrize(("name", "expected"), HASHES.items())
def test_hash_of_named_config(name, expected):
    config = AdapterConfig.load(name)
    assert get_adapter_config_hash(config) == expected
    assert get_adapter_config_hash(config.to_dict()) == expected


def test_hash_of_fusion_configs():
    assert get_adapter_config_hash(StaticAdapterFusionConfig()) == "368b8b00d16e5e95"
    assert get_adapter_config_hash(DynamicAdapterFusionConfig()) == "39f0b9fc022449eb"
    assert get_adapter_config_hash(AdapterFusionConfig()) == "39f0b9fc022449eb"


@pytest.mark.parametrize("file", CONFIG_FILES, ids=lambda f: f"{f.parts[-4]}/{f.parts[-2]}")
def test_golden_adapter_config(file):
    saved = json.loads(file.read_text())
    config = AdapterConfig.load(file)
    assert type(config) is BnConfig
    assert config.to_dict() == saved["config"]
    assert get_adapter_config_hash(config) == saved["config_id"]
    config.check_supported()


@pytest.mark.parametrize("group", GROUPS, ids=lambda g: g["id"])
def test_golden_config_from_name_and_overrides(group):
    for name, spec in group["adapters"].items():
        try:
            config = AdapterConfig.load(spec["config"], **spec["kwargs"])
        except NotImplementedError:
            continue
        assert get_adapter_config_hash(config) == group["config_hashes"][name]


@pytest.mark.parametrize("file", FUSION_FILES, ids=lambda f: f"{f.parts[-4]}/{f.parts[-2]}")
def test_golden_fusion_config(file):
    saved = json.loads(file.read_text())
    config = AdapterFusionConfig.load(str(file))
    assert config.to_dict() == saved["config"]
    assert get_adapter_config_hash(config) == saved["config_id"]


def test_aliases():
    assert PfeifferConfig() == SeqBnConfig() == AdapterConfig.load("pfeiffer")
    assert HoulsbyConfig() == DoubleSeqBnConfig()
    assert ParallelConfig() == ParBnConfig()
    assert AdapterConfig.load("pfeiffer+inv") == SeqBnInvConfig()
    assert AdapterConfig.load(None) == SeqBnConfig()
    plus = AdapterPlusConfig()
    assert (plus.reduction_factor, plus.scaling, plus.stochastic_depth) == (96, "channel", 0.1)


def test_frozen_mapping():
    config = SeqBnConfig()
    assert config["reduction_factor"] == 16
    assert config.get("nothing") is None
    assert "scaling" in config and len(config) == len(dict(config)) == len(asdict(config))
    with pytest.raises(FrozenInstanceError, match="reduction_factor"):
        config.reduction_factor = 8
    with pytest.raises(FrozenInstanceError):
        del config.reduction_factor
    config.note = "mine"
    with pytest.raises(FrozenInstanceError):
        config.note = "other"
    assert config["note"] == "mine"
    assert config == SeqBnConfig()
    assert config != SeqBnConfig(reduction_factor=8)
    assert config != "seq_bn"
    with pytest.raises(TypeError, match="abstract"):
        AdapterConfig()


def test_replace_and_dict_round_trip():
    config = ParBnConfig().replace(reduction_factor=8, leave_out=[1])
    assert type(config) is ParBnConfig and config.reduction_factor == 8
    values = config.to_dict()
    values["leave_out"].append(7)
    assert config.leave_out == [1]
    extended = BnConfig.from_dict({**config, "trained_on": "wordnet"})
    assert extended.trained_on == "wordnet"
    assert "trained_on" not in extended.to_dict()
    assert extended.replace(dropout=0.1).trained_on == "wordnet"
    for same in (copy.deepcopy(config), pickle.loads(pickle.dumps(config))):
        assert same == config and type(same) is ParBnConfig
    named = ADAPTER_CONFIG_MAP["seq_bn"]
    assert AdapterConfig.load("seq_bn", reduction_factor=None) == named


def test_config_string():
    config = AdapterConfig.load("seq_bn[reduction_factor={'1': 8, 'default': 2}, leave_out=[0, 3]]")
    assert config.reduction_factor == {"1": 8, "default": 2}
    assert config.leave_out == [0, 3]
    fusion = AdapterFusionConfig.load("dynamic[temperature=True]")
    assert fusion == DynamicAdapterFusionConfig(temperature=True)
    assert AdapterConfig.load("par_bn[]") == ParBnConfig()


@pytest.mark.parametrize(
    "text",
    [
        "seqbn",
        "seq_bn[reduction_factor=8",
        "seq_bn[8]",
        "seq_bn[reduction_factor=f()]",
        "seq_bn[no_such_key=1]",
        "seq_bn[reduction_factor=1] + 2]",
        "no/such/file.json",
    ],
)
def test_config_string_refused(text):
    with pytest.raises(ValueError, match="config: expected"):
        AdapterConfig.load(text)


@pytest.mark.parametrize(
    "config",
    [
        "mam",
        "lora",
        "lora[r=8]",
        "prefix_tuning|seq_bn",
        {"architecture": "lora", "r": 8},
        {"architecture": "union", "configs": []},
    ],
)
def test_other_methods_are_not_supported_yet(config):
    with pytest.raises(NotImplementedError, match=r"mam|lora|union"):
        AdapterConfig.load(config)


def test_check_supported():
    SeqBnConfig(stochastic_depth=0.1, use_gating=True).check_supported()
    with pytest.raises(NotImplementedError, match="phm_layer"):
        CompacterConfig().check_supported()
    with pytest.raises(NotImplementedError, match="inv_adapter"):
        SeqBnInvConfig().check_supported()


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("mh_adapter", "yes"),
        ("output_adapter", 1),
        ("original_ln_before", None),
        ("reduction_factor", 0),
        ("reduction_factor", -2),
        ("reduction_factor", "16"),
        ("reduction_factor", True),
        ("reduction_factor", float("nan")),
        ("reduction_factor", {"first": 2}),
        ("reduction_factor", {"0": 0}),
        ("non_linearity", "reluu"),
        ("non_linearity", 3),
        ("init_weights", "xavier"),
        ("init_weights_seed", 1.5),
        ("init_weights_seed", 2**64),
        ("scaling", "big"),
        ("scaling", None),
        ("scaling", float("inf")),
        ("scaling", [1.0]),
        ("residual_before_ln", "after"),
        ("residual_before_ln", None),
        ("residual_before_ln", 1),
        ("inv_adapter", "real_nvp"),
        ("inv_adapter_reduction_factor", 0),
        ("leave_out", 3),
        ("leave_out", "12"),
        ("leave_out", [-1]),
        ("leave_out", ["1"]),
        ("dropout", 1.5),
        ("dropout", "0.1"),
        ("stochastic_depth", -0.1),
        ("phm_dim", 0),
    ],
)
def test_invalid_values_are_named(field, value):
    with pytest.raises(ValueError, match=field):
        SeqBnConfig(**{field: value})
    with pytest.raises(ValueError, match=field):
        AdapterConfig.load({**SeqBnConfig().to_dict(), field: value})


def test_missing_keys_are_named():
    with pytest.raises(ValueError, match="non_linearity"):
        AdapterConfig.load({"mh_adapter": True, "output_adapter": True, "reduction_factor": 16})


def test_wrong_kind_of_configuration():
    with pytest.raises(ValueError, match="adapter's configuration"):
        AdapterConfig.load(AdapterFusionConfig())
    with pytest.raises(ValueError, match="fusion's configuration"):
        AdapterFusionConfig.load(SeqBnConfig())
    with pytest.raises(ValueError, match="mapping, name or path"):
        AdapterConfig.load(16)


def test_config_file(tmp_path):
    file = tmp_path / "config.json"
    file.write_text(json.dumps(ParBnConfig().to_dict()))
    assert AdapterConfig.load(str(file)) == ParBnConfig()
    file.write_text("{")
    with pytest.raises(ValueError, match="not a JSON file"):
        AdapterConfig.load(file)
    file.write_text("[1]")
    with pytest.raises(ValueError, match="JSON object"):
        AdapterConfig.load(file)


def test_integer_scaling_is_the_float():
    config = ParBnConfig(scaling=4)
    assert config == ParBnConfig() and isinstance(config.scaling, float)
    assert get_adapter_config_hash(config) == HASHES["par_bn"]


def test_bottleneck_size():
    assert SeqBnConfig().bottleneck_size(768, 0) == 48
    assert SeqBnConfig(reduction_factor=64).bottleneck_size(32, 0) == 1
    assert SeqBnConfig(reduction_factor=0.5).bottleneck_size(32, 3) == 64
    for keys in ({"0": 4, "default": 16}, {0: 4, "default": 16}):
        config = SeqBnConfig(reduction_factor=keys)
        assert [config.bottleneck_size(32, i) for i in range(3)] == [8, 2, 2]
        assert json.loads(json.dumps(config.to_dict())) == config.to_dict()
    with pytest.raises(ValueError, match="layer 1"):
        SeqBnConfig(reduction_factor={"0": 4}).bottleneck_size(32, 1)


def test_match():
    config = DoubleSeqBnConfig(leave_out=[1])
    assert config.match(0, "mh_adapter") and config.match(0, "output_adapter")
    assert not config.match(1, "mh_adapter")
    assert not config.match(0, "cross_adapter")
    with pytest.raises(ValueError, match="location"):
        config.match(0, "attention")


def test_nested_invertible_adapter_of_old_files():
    old = {**SeqBnConfig().to_dict(), "invertible_adapter": None}
    del old["inv_adapter"], old["inv_adapter_reduction_factor"]
    assert AdapterConfig.load(old) == SeqBnConfig()
    old["invertible_adapter"] = {"block_type": "nice", "reduction_factor": 2}
    assert AdapterConfig.load(old) == SeqBnInvConfig()
    old["leave_out"] = None
    assert AdapterConfig.load(old).leave_out == []


def test_fusion_config():
    assert AdapterFusionConfig.load(None) == ADAPTERFUSION_CONFIG_MAP["dynamic"]
    assert "peer_temperature" not in AdapterFusionConfig().to_dict()
    decaying = AdapterFusionConfig.load("dynamic", temperature=True, peer_temperature=True)
    assert decaying.to_dict()["peer_temperature"] is True
    assert AdapterFusionConfig.load(decaying.to_dict()) == decaying
    assert AdapterFusionConfig.load("static", dropout_prob=0.0).dropout_prob == 0.0
    for field, value in [("key", 1), ("dropout_prob", 2), ("value_initialized", "yes")]:
        with pytest.raises(ValueError, match=field):
            AdapterFusionConfig(**{field: value})
    with pytest.raises(ValueError, match="config"):
        AdapterFusionConfig.load("seq_bn")


def _record():
    record = ModelAdaptersConfig()
    record.adapters["a"] = AdapterConfig.load("seq_bn", reduction_factor=8)
    record.adapters["b"] = AdapterConfig.load("seq_bn", reduction_factor=8)
    record.adapters["c"] = AdapterConfig.load("double_seq_bn", leave_out=[1])
    record.fusions["a,b"] = AdapterFusionConfig.load("static")
    record.fusion_names["a,b"] = ["a", "b"]
    record.adapters["d"] = AdapterConfig.load("double_seq_bn")
    record.fusions["warm"] = AdapterFusionConfig.load("dynamic", temperature=True)
    record.fusion_names["warm"] = ["a", "b"]
    record.fusions["mine"] = AdapterFusionConfig.load("dynamic")
    record.fusion_names["mine"] = ["c", "a"]
    return record


def test_model_adapters_config_round_trip():
    record = _record()
    values = json.loads(json.dumps(record.to_dict()))
    assert values["adapters"]["a"] == values["adapters"]["b"] == "26cd1b10db746518"
    assert values["adapters"]["d"] == "double_seq_bn"
    assert values["fusions"] == {"a,b": "static", "mine": "dynamic", "warm": "6dd5614848be8b45"}
    assert list(values["config_map"]) == ["26cd1b10db746518", values["adapters"]["c"]]
    assert list(values["fusion_config_map"]) == [values["fusions"]["warm"]]
    assert values["fusion_name_map"] == {"mine": ["c", "a"], "warm": ["a", "b"]}
    again = ModelAdaptersConfig.from_dict(values)
    assert again.adapters == record.adapters
    assert again.fusions == record.fusions
    assert again.fusion_names == record.fusion_names
    assert again.active_setup is None and again.skip_layers == []


def test_model_adapters_config_by_names_of_the_map():
    # what `adapters` writes for add_adapter("a", config="houlsby")
    values = {
        "adapters": {"a": "houlsby"},
        "config_map": {},
        "fusions": {"a,b": "dynamic"},
        "fusion_config_map": {},
        "fusion_name_map": {},
    }
    record = ModelAdaptersConfig.from_dict(values)
    assert record.adapters == {"a": DoubleSeqBnConfig()}
    assert record.fusion_names == {"a,b": ["a", "b"]}


def test_model_adapters_config_by_names_with_changes():
    record = ModelAdaptersConfig.from_dict(
        {"adapters": {"a": "seq_bn[reduction_factor=4]"}, "fusions": {"a": "static[query=False]"}}
    )
    assert record.adapters == {"a": SeqBnConfig(reduction_factor=4)}
    assert record.fusions == {"a": StaticAdapterFusionConfig(query=False)}
    with pytest.raises(NotImplementedError, match=r"adapters\['a'\]: 'lora'"):
        ModelAdaptersConfig.from_dict({"adapters": {"a": "lora"}})


@pytest.mark.parametrize(
    ("kind", "map_name"), [("adapters", "config_map"), ("fusions", "fusion_config_map")]
)
def test_model_adapters_config_opens_no_file(kind, map_name, tmp_path, monkeypatch):
    config = {"adapters": SeqBnConfig(), "fusions": StaticAdapterFusionConfig()}[kind]
    path = tmp_path / "config.json"
    path.write_text(json.dumps(config.to_dict()))
    monkeypatch.chdir(tmp_path)
    for specifier in (str(path), "config.json", None, 3, config.to_dict()):
        with pytest.raises(ValueError, match=rf"{kind}\['zz'\]: expected"):
            ModelAdaptersConfig.from_dict({kind: {"zz": specifier}})
    for mapped in (str(path), "config.json", 3, [1]):
        with pytest.raises(ValueError, match=rf"{map_name}\['x'\]: expected a mapping"):
            ModelAdaptersConfig.from_dict({kind: {"zz": "x"}, map_name: {"x": mapped}})


def test_deeply_nested_file(tmp_path):
    path = tmp_path / "config.json"
    path.write_text("[" * 200_000)
    with pytest.raises(ValueError, match=r"config\.json' is not a JSON file"):
        AdapterConfig.load(path)


def test_model_adapters_config_equal_hashes():
    record = ModelAdaptersConfig()
    record.adapters = {
        name: SeqBnConfig(reduction_factor=8, scaling=scaling)
        for name, scaling in (("a", 1.0), ("b", 0.0))
    }
    assert ModelAdaptersConfig.from_dict(record.to_dict()).adapters == record.adapters


def test_model_adapters_config_lookup():
    record = _record()
    assert list(record) == ["a", "b", "c", "d"] and len(record) == 4 and "a" in record
    assert record.get("a") is record.adapters["a"] and record.get("z") is None
    assert record.match("a", 0, "output_adapter") is record.adapters["a"]
    assert record.match("a", 0, "mh_adapter") is None
    assert record.match("c", 1, "mh_adapter") is None
    assert record.match("z", 0, "mh_adapter") is None


@pytest.mark.parametrize("key", ["match", "to_dict", "keys", "bottleneck_size"])
def test_keys_that_would_hide_a_method(key):
    with pytest.raises(ValueError, match=f"config: expected keys .* free; got '{key}'"):
        AdapterConfig.load({**AdapterConfig.load("seq_bn"), key: 1})
