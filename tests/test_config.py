"""SparsityConfig: what is accepted, what is refused with which words, and every way it travels."""

import json

import pytest

from hf_sparse.config import CONFIG_KEY, CONFIG_VERSION, SparsityConfig


def rich_config() -> SparsityConfig:
    """A config that differs from the default in every field but the options of a named allocation."""
    return SparsityConfig(
        pattern="2:4",
        saliency="ria",
        allocation={"re:.*mlp.*": 0.25, "re:.*": 0.5},
        overrides={"re:.*down_proj": 0.0, "q_proj": "1:4"},
        targets=["Linear", "re:.*experts"],
        ignore=["lm_head"],
        repair=True,
        permute=True,
        block_size=64,
        damp=0.1,
        seed=7,
        provenance={"base_model": "tiny", "calibration": {"samples": 4}},
    )


@pytest.mark.parametrize(
    "config",
    [
        SparsityConfig(),
        rich_config(),
        SparsityConfig(allocation="owl", allocation_options={"lam": 0.1, "outlier": 7.0}),
    ],
    ids=["default", "rich", "owl"],
)
def test_round_trips(config, tmp_path):
    assert SparsityConfig.from_dict(config.to_dict()) == config
    (tmp_path / "c.json").write_text(json.dumps(config.to_dict()))
    (tmp_path / "c.yaml").write_text(config.to_yaml())
    assert SparsityConfig.from_file(tmp_path / "c.json") == config
    assert SparsityConfig.from_file(str(tmp_path / "c.yaml")) == config


def test_it_travels_in_config_json(tiny_llama, tmp_path):
    from transformers import AutoConfig, AutoModelForCausalLM

    config = rich_config()
    assert SparsityConfig.from_model_config(tiny_llama.config) is None
    setattr(tiny_llama.config, CONFIG_KEY, config.to_dict())
    tiny_llama.save_pretrained(tmp_path)
    assert json.loads((tmp_path / "config.json").read_text())["hf_sparse"]["version"] == CONFIG_VERSION
    assert SparsityConfig.from_model_config(AutoConfig.from_pretrained(tmp_path)) == config
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert type(loaded) is type(tiny_llama) and SparsityConfig.from_model_config(loaded.config) == config


def test_defaults():
    config = SparsityConfig()
    assert (config.sparsity, config.pattern, config.saliency, config.allocation) == (
        0.5,
        "unstructured",
        "magnitude",
        "uniform",
    )
    assert config.targets is None and config.ignore == []


@pytest.mark.parametrize("saliency", ["magnitude", "random", "ria", "obs", "gradient", "taylor", "sparsegpt", "alps"])
def test_most_saliencies_compare_over_the_matrix(saliency):
    assert SparsityConfig(saliency=saliency).pattern == "unstructured"


def test_wanda_compares_within_a_row_unless_told_otherwise():
    assert SparsityConfig(saliency="wanda").pattern == "row"
    assert SparsityConfig(saliency="wanda", pattern="unstructured").pattern == "unstructured"


def test_a_pattern_of_n_m_fixes_the_sparsity():
    assert SparsityConfig(pattern="1:4").sparsity == 0.75
    assert SparsityConfig(pattern="2:4", sparsity=0.5).sparsity == 0.5
    assert SparsityConfig(pattern="1:3", sparsity=0.6666667).sparsity == pytest.approx(2 / 3, abs=1e-12)
    with pytest.raises(ValueError, match="pattern 2:4 keeps 2 of 4 weights and so always has sparsity 0.5.*for 0.7"):
        SparsityConfig(pattern="2:4", sparsity=0.7)


def test_only_keywords():
    with pytest.raises(TypeError):
        SparsityConfig(0.5)


def test_a_callable_saliency_is_recorded_by_name():
    def mine(weight, statistics):
        return weight.abs()

    recorded = SparsityConfig(saliency=mine).to_dict()["saliency"]
    assert recorded.endswith("mine") and recorded.startswith(__name__)
    json.dumps(SparsityConfig(saliency=mine).to_dict())


@pytest.mark.parametrize(
    "arguments,message",
    [
        ({"sparsity": 50}, r"sparsity is the fraction of zeros and lies in \[0, 1\), got 50; did you mean 0.5\?"),
        ({"sparsity": 97.5}, r"did you mean 0.975\?"),
        ({"sparsity": 1.0}, r"lies in \[0, 1\), got 1$"),
        ({"sparsity": 1}, r"lies in \[0, 1\), got 1$"),
        ({"sparsity": -0.1}, r"lies in \[0, 1\), got -0.1$"),
        ({"sparsity": float("nan")}, r"lies in \[0, 1\), got nan$"),
        ({"sparsity": "0.5"}, r"sparsity is a number in \[0, 1\), got '0.5'"),
        ({"sparsity": True}, r"sparsity is a number in \[0, 1\), got True"),
        ({"pattern": "2:5x"}, "unknown pattern '2:5x'"),
        ({"pattern": "4:2"}, "0 < n <= m, got 4:2"),
        ({"saliency": "sparsgpt"}, r"unknown saliency 'sparsgpt'; did you mean 'sparsegpt'\?"),
        (
            {"targets": "q_proj"},
            r"targets is a list of names and patterns, got the string 'q_proj'; write \['q_proj'\]",
        ),
        ({"ignore": "re:.*"}, r"ignore is a list .* write \['re:.\*'\]"),
        ({"targets": ["re:(("]}, r"'re:\(\(' is not a valid regular expression"),
        ({"ignore": ["re:*"]}, "is not a valid regular expression"),
        ({"overrides": {"re:[": 0.5}}, "is not a valid regular expression"),
        ({"allocation": {"re:[": 0.5}}, "is not a valid regular expression"),
        ({"overrides": {"q_proj": 80}}, r"the override of 'q_proj' is the fraction of zeros.* did you mean 0.8\?"),
        ({"overrides": {"q_proj": "2:x"}}, "unknown pattern '2:x'"),
        ({"allocation": {"q_proj": 1.5}}, "the allocation of 'q_proj' is the fraction of zeros"),
        ({"allocation": "owll"}, r"unknown allocation 'owll'; did you mean 'owl'\?"),
        ({"allocation": "zzz"}, "unknown allocation 'zzz'; known are a dict of sparsities, uniform, erk, owl"),
        ({"allocation": "even"}, "unknown allocation 'even'"),
        ({"method": "rig"}, "unknown method 'rig'; did you mean 'rigl'?"),
        ({"method": "rigl", "schedule": {"evry": 1}}, "has no schedule option 'evry'; it has every, begin, end"),
        ({"method": "static", "schedule": {"every": 1}}, "'static' has no schedule option 'every'; it has none"),
        ({"schedule": {"every": 1}}, "needs a training method, one of static, set"),
        ({"method": "rigl", "schedule": {"begin": 0.8, "end": 0.2}}, "ends .0.2. before it begins .0.8."),
        ({"method": "rigl", "schedule": {"begin": 100, "end": 50}}, "ends .50. before it begins .100."),
        ({"method": "rigl", "schedule": {"end": 1.5}}, "end is a step .a whole number. or a share of training"),
        (
            {"method": "rigl", "schedule": {"every": 0.5}},
            "every is a whole number of optimizer steps, at least 1, got 0.5",
        ),
        (
            {"method": "rigl", "schedule": {"anneal": "cosinus"}},
            "unknown schedule 'cosinus' for anneal; known are constant",
        ),
        ({"method": "rigl", "schedule": {"drop_fraction": 30}}, "drop_fraction is a fraction in .0, 1., got 30"),
        ({"method": "gmp", "schedule": {"ramp": "constant"}}, "ramp='constant' never reaches the sparsity"),
        ({"method": "gmp", "schedule": {"scope": "model"}}, "scope is 'layer' or 'global', got 'model'"),
        ({"method": "sr-ste", "schedule": {"decay": -1}}, "decay is a number >= 0, got -1"),
        ({"method": "rigl", "pattern": "2:4"}, "train n:m with method 'sr-ste', or 'static'"),
        (
            {"method": "rigl", "pattern": "16x16"},
            "its pattern is 'unstructured', not '16x16'; 'static' and 'gmp' take any",
        ),
        ({"method": "rigl", "saliency": "zeros"}, "'zeros' keeps the zeros a model has; method 'rigl' chooses its own"),
        ({"method": "static", "saliency": "wanda"}, "'wanda' looks at data.*prune.. the model first"),
        ({"method": "static", "saliency": "alps"}, "'alps' looks at data"),
        ({"method": "static", "allocation": "owl"}, "allocation 'owl' looks at data"),
        ({"method": "static", "repair": True}, "repair belongs to one-shot pruning"),
        ({"saliency": "zeros"}, "unknown saliency 'zeros'"),
        ({"allocation": "owl", "allocation_options": {"lamda": 1}}, "'owl' has no option 'lamda'; it has lam, outlier"),
        ({"allocation_options": {"lam": 1}}, "'uniform' has no option 'lam'; it has none"),
        ({"allocation": {"re:.*": 0.5}, "allocation_options": {"lam": 1}}, "allocation of a dict has no option 'lam'"),
        ({"targets": [1]}, "targets are named by strings, got 1"),
        ({"permute": True}, "permute reorders channels for an n:m pattern; with pattern 'unstructured'"),
        ({"block_size": 0}, "block_size is a whole number >= 1, got 0"),
        ({"damp": -1}, "damp is a number >= 0, a share of the Hessian.s diagonal, got -1"),
    ],
)
def test_bad_values_are_named(arguments, message):
    with pytest.raises(ValueError, match=message):
        SparsityConfig(**arguments)


@pytest.mark.parametrize(
    "content,message",
    [
        ({"sparsty": 0.5}, r"unknown field 'sparsty' in a sparsity config; did you mean 'sparsity'\?"),
        ({"zzz": 1}, "unknown field 'zzz' in a sparsity config; the fields are sparsity, pattern, saliency"),
        (
            {"version": CONFIG_VERSION + 1},
            f"has version {CONFIG_VERSION + 1}, but this hf_sparse reads up to .*pip install -U",
        ),
        ({"version": "x"}, "has version x"),
        (["sparsity"], "a sparsity config is a mapping of fields, got list"),
        (None, "got NoneType"),
    ],
)
def test_bad_dicts_are_named(content, message):
    with pytest.raises(ValueError, match=message):
        SparsityConfig.from_dict(content)


def test_a_newer_version_is_the_complaint_even_with_fields_unknown_here():
    with pytest.raises(ValueError, match="upgrade it"):
        SparsityConfig.from_dict({"version": CONFIG_VERSION + 1, "brand_new": 1})


def test_bad_files_are_named(tmp_path):
    with pytest.raises(FileNotFoundError, match="no sparsity config at .*missing.yaml"):
        SparsityConfig.from_file(tmp_path / "missing.yaml")
    with pytest.raises(FileNotFoundError):
        SparsityConfig.from_file(tmp_path)
    (tmp_path / "broken.json").write_text("{")
    with pytest.raises(ValueError, match="broken.json is not valid JSON"):
        SparsityConfig.from_file(tmp_path / "broken.json")
    (tmp_path / "broken.yaml").write_text("a: [")
    with pytest.raises(ValueError, match="broken.yaml is not valid YAML"):
        SparsityConfig.from_file(tmp_path / "broken.yaml")
    (tmp_path / "empty.yaml").write_text("")
    with pytest.raises(ValueError, match="a mapping of fields"):
        SparsityConfig.from_file(tmp_path / "empty.yaml")


def test_an_empty_entry_in_yaml_is_an_empty_list(tmp_path):
    (tmp_path / "c.yaml").write_text("sparsity: 0.5\nignore:\noverrides:\ntargets:\n")
    assert SparsityConfig.from_file(tmp_path / "c.yaml") == SparsityConfig()


def test_yaml_keeps_the_order_and_is_readable():
    lines = SparsityConfig(saliency="wanda").to_yaml().splitlines()
    assert lines[:4] == ["version: 1", "sparsity: 0.5", "pattern: row", "saliency: wanda"]


def test_options_of_an_allocation_are_numbers():
    with pytest.raises(ValueError, match="option 'lam' of the allocation is a number >= 0, got 'abc'"):
        SparsityConfig(allocation="owl", allocation_options={"lam": "abc"})
