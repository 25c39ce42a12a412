"""Settings are frozen, strict and explain themselves."""

import dataclasses
import json

import pytest

from minigpt4_runtime import ConfigError, SamplingParams
from minigpt4_runtime.config import (
    SAMPLING_RANGES,
    LanguageConfig,
    ModelConfig,
    QFormerConfig,
    Range,
    VisionConfig,
)


def tiny_vision(**changes) -> VisionConfig:
    values = dict(
        image_size=28, patch_size=14, hidden_size=16, num_hidden_layers=1,
        num_attention_heads=2, intermediate_size=32,
    )  # fmt: skip
    return VisionConfig(**{**values, **changes})


def tiny_language(**changes) -> LanguageConfig:
    values = dict(
        hidden_size=16, intermediate_size=24, num_hidden_layers=1, num_attention_heads=2,
        num_key_value_heads=1, vocab_size=30, max_position_embeddings=64, rms_norm_eps=1e-6,
    )  # fmt: skip
    return LanguageConfig(**{**values, **changes})


def tiny_qformer(**changes) -> QFormerConfig:
    values = dict(
        hidden_size=8, num_hidden_layers=2, num_attention_heads=2, intermediate_size=16,
        num_query_tokens=3,
    )  # fmt: skip
    return QFormerConfig(**{**values, **changes})


@pytest.mark.parametrize("qformer", [None, tiny_qformer()])
def test_model_config_survives_its_mapping(qformer):
    config = ModelConfig(
        vision=tiny_vision(), qformer=qformer, language=tiny_language(), template="vicuna"
    )
    assert ModelConfig.from_mapping(config.to_mapping()) == config
    assert config.rows_per_image == (3 if qformer else 1)
    assert config.projection_width == (8 if qformer else 64)


def test_unknown_setting_names_the_nearest():
    with pytest.raises(ConfigError, match=r"no setting 'temprature'.*'temperature'"):
        SamplingParams.from_mapping({"temprature": 1.0})


def test_missing_setting_is_named():
    with pytest.raises(ConfigError, match="VisionConfig lacks image_size"):
        VisionConfig.from_mapping({})


def test_config_of_another_model_type_says_what_to_do():
    config = ModelConfig(
        vision=tiny_vision(), qformer=None, language=tiny_language(), template="vicuna"
    )
    with pytest.raises(ConfigError, match="minigpt4 convert"):
        ModelConfig.from_mapping({**config.to_mapping(), "model_type": "llama"})


@pytest.mark.parametrize(
    ("build", "words"),
    [
        (lambda: tiny_vision(image_size=30), "not a multiple of patch_size"),
        (lambda: tiny_vision(hidden_size=0), "whole number ≥ 1"),
        (lambda: tiny_vision(num_attention_heads=3), "does not divide into 3 heads"),
        (lambda: tiny_qformer(num_attention_heads=3), "does not divide into 3 heads"),
        (lambda: tiny_language(num_attention_heads=16), "even width"),
        (lambda: tiny_language(num_key_value_heads=3), "evenly"),
        (lambda: tiny_language(model_type="opt"), "only 'llama'"),
    ],
)
def test_shapes_that_cannot_work_are_refused(build, words):
    with pytest.raises(ConfigError, match=words):
        build()


@pytest.mark.parametrize(
    "changes",
    [
        {"max_new_tokens": 0}, {"max_new_tokens": 1.5}, {"min_new_tokens": -1},
        {"temperature": -0.1}, {"temperature": float("nan")}, {"temperature": "hot"},
        {"top_p": 0.0}, {"top_p": 1.1}, {"top_k": -1}, {"repetition_penalty": 0.0},
        {"num_beams": 0}, {"seed": -1}, {"seed": 2**63}, {"seed": True},
        {"length_penalty": float("inf")}, {"seed": 10**400}, {"temperature": 10**400},
        {"min_p": -0.1}, {"min_p": 1.1}, {"presence_penalty": 2.1}, {"frequency_penalty": -2.1},
        {"logit_bias": {3: 101}}, {"logit_bias": {-1: 1}}, {"logit_bias": {"a": 1}},
        {"logit_bias": {True: 1}}, {"logit_bias": {3: float("nan")}}, {"logit_bias": 5},
        {"logit_bias": {3: "x"}}, {"logit_bias": ((1, 2, 3),)},
        {"max_new_tokens": 10**400}, {"ignore_eos": "no"}, {"stop": 5},
    ],
)  # fmt: skip
def test_sampling_values_without_meaning_are_refused_by_name(changes):
    (name,) = changes
    with pytest.raises(ConfigError, match=name):
        SamplingParams(**changes)


@pytest.mark.parametrize(
    ("allowed", "words", "good", "bad"),
    [
        (Range(int, 1), "a whole number ≥ 1", [1, 10**9], [0, 1.0, True, None, 10**400]),
        (Range(int, 0, 20), "a whole number from 0 to 20", [0, 20], [-1, 21]),
        (Range(float, 0), "a number ≥ 0", [0, 0.5], [-0.1, float("nan"), float("inf"), "1"]),
        (Range(float, -2, 2), "from -2 to 2", [-2, 2.0], [2.1]),
        (Range(float, above=0), "above 0", [0.01, 5], [0, -1]),
        (Range(float, above=0, high=1), "above 0 and at most 1", [0.01, 1], [0, 1.1]),
    ],
)
def test_a_range_says_what_it_allows(allowed, words, good, bad):
    assert str(allowed) == words
    for value in good:
        allowed.check("it", value)
    for value in bad:
        with pytest.raises(ConfigError, match=f"^it is .*; it must be {words}"):
            allowed.check("it", value)


def test_every_default_is_in_its_range():
    assert SAMPLING_RANGES.keys() <= SamplingParams().to_mapping().keys()
    for name, allowed in SAMPLING_RANGES.items():
        if (default := getattr(SamplingParams, name)) is not None:
            allowed.check(name, default)


def test_sampling_refuses_what_contradicts_itself():
    with pytest.raises(ConfigError, match="min_new_tokens is 5"):
        SamplingParams(max_new_tokens=3, min_new_tokens=5)
    with pytest.raises(ConfigError, match="Beam search does not sample"):
        SamplingParams(num_beams=2, temperature=1.0)
    with pytest.raises(ConfigError, match="Beam search does not sample: set min_p to 0"):
        SamplingParams(num_beams=2, min_p=0.1)
    with pytest.raises(ConfigError, match="tuple of strings"):
        SamplingParams(stop="###")
    with pytest.raises(ConfigError, match="non-empty"):
        SamplingParams(stop=("",))


def test_sampling_survives_json():
    params = SamplingParams(logit_bias={7: -100, 3: 1.5}, stop=("a",), min_p=0.1)
    assert params.logit_bias == ((3, 1.5), (7, -100))
    assert SamplingParams.from_mapping(json.loads(json.dumps(params.to_mapping()))) == params
    assert (
        len({params, SamplingParams(logit_bias=[(3, 1.5), (7, -100)], stop=("a",), min_p=0.1)}) == 1
    )


def test_sampling_defaults_are_greedy_and_frozen():
    params = SamplingParams()
    assert (params.temperature, params.max_new_tokens, params.stop) == (0.0, 300, None)
    with pytest.raises(dataclasses.FrozenInstanceError):
        params.seed = 3
    assert SamplingParams(stop=["a"]).stop == ("a",)
