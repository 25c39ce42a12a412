"""What people's config.json files hold: read where it means something, else one sentence."""

import itertools
import json

import pytest
from published_files import GOLDENS, copy_golden, edit_json

from minigpt4_runtime.checkpoint.config_file import load_config
from minigpt4_runtime.config import LanguageConfig
from minigpt4_runtime.convert import convert as convert_module
from minigpt4_runtime.convert.architecture import detect_config
from minigpt4_runtime.convert.convert import convert
from minigpt4_runtime.convert.language_folder import read_language_folder
from minigpt4_runtime.errors import CheckpointError, ConfigError
from minigpt4_runtime.rope_scaling import RopeScaling

LLAMA = GOLDENS / "llama2" / "checkpoint" / "llama"
NUMBERS = (
    "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads",
    "num_key_value_heads", "vocab_size", "max_position_embeddings", "rms_norm_eps",
)  # fmt: skip
ODD = [
    None, True, False, "", "null", "abc", "NaN", "1e999", [], {}, [1], {"a": 1}, 0, -1, 0.5, 1e-300,
    float("inf"), float("nan"), 10**30, 2**31, "-4", {"type": None}, {"factor": "x"},
]  # fmt: skip


@pytest.fixture
def read(tmp_path):
    """Reads the golden's folder with some values changed."""
    files = copy_golden("llama2", tmp_path / "published")

    def run(**changes):
        edit_json(files.language_dir / "config.json", **changes)
        return read_language_folder(files.language_dir).config

    return run


@pytest.mark.parametrize("as_text", [str, float, lambda value: f" {value} ", lambda v: f"{v:e}"])
def test_numbers_as_text_or_with_a_point(read, as_text):
    values = json.loads((LLAMA / "config.json").read_text("utf-8"))
    wanted = read()
    assert read(**{name: as_text(values[name]) for name in NUMBERS if name in values}) == wanted
    assert read(rope_theta=as_text(10000.0), head_dim=as_text(16)) == wanted
    assert all(type(getattr(wanted, name)) is int for name in NUMBERS[:-1])


@pytest.mark.parametrize(
    "scaling",
    [
        None, {}, {"type": "default"}, {"rope_type": "default"},
        {"rope_type": "default", "factor": 8}, {"type": "linear", "factor": 1.0},
        {"type": "dynamic", "factor": 1},
        {"rope_type": "linear", "factor": "1.0"}, {"rope_type": "llama3", "factor": 1.0},
        {"factor": 1.0}, {"type": None, "factor": None},
    ],
)  # fmt: skip
@pytest.mark.parametrize("name", ["rope_scaling", "rope_parameters"])
def test_scaling_that_scales_nothing(read, name, scaling):
    assert read(**{name: scaling}) == read()


@pytest.mark.parametrize(
    ("scaling", "said"),
    [
        ({"type": "dynamic", "factor": "4"}, "the keys in the cache are already turned by the"),
        ({"type": "longrope", "factor": 4, "short_factor": [1]}, "already turned"),
        ({"factor": 2}, "of the kind None; known are linear, llama3, yarn, ntk"),
        ({"type": "su"}, "of the kind 'su'; known are"),
        ({"type": "linear"}, "factor is None; it must be a number of at least 1"),
        ({"rope_type": "yarn", "factor": 0.5}, "factor is 0.5; it must be a number of at least 1"),
        ({"rope_type": "yarn", "factor": 2, "beta_fats": 3}, "has no setting 'beta_fats'"),
        ({"rope_type": "yarn", "factor": 2, "beta_slow": 40}, "beta_slow is 40; it must be below"),
        ({"rope_type": "yarn", "factor": 2, "truncate": 1}, "it must be true or false"),
        ({"rope_type": "default", "partial_rotary_factor": 0.5}, "turns only a part of each head"),
        ("linear", "named values are wanted"), ([1.0], "give named values"), (2.0, "give named"),
        ({"type": ["default"]}, "of the kind ['default'], which is no name"),
    ],
)  # fmt: skip
@pytest.mark.parametrize("name", ["rope_scaling", "rope_parameters"])
def test_scaling_that_is_not_possible(read, name, scaling, said):
    with pytest.raises(CheckpointError) as caught:
        read(**{name: scaling})
    assert f"config.json: {name} is {json.dumps(scaling)[:80]}; " in str(caught.value)
    assert said in str(caught.value)


@pytest.mark.parametrize("name", ["rope_scaling", "rope_parameters"])
def test_scaling_is_read_as_transformers_reads_it(read, name):
    linear = read(**{name: {"type": "linear", "factor": "4.0"}})
    assert linear.rope_scaling == RopeScaling(rope_type="linear", factor=4)
    assert (linear.max_position_embeddings, linear.context_length) == (2048, 8192)
    published = {"type": "yarn", "factor": 2, "finetuned": True, "rope_theta": 5e5}
    yarn = read(**{name: published}, rope_theta=7.0, max_position_embeddings=4096)
    assert (yarn.rope_theta, yarn.rope_scaling.original_max_position_embeddings) == (5e5, 4096)
    assert yarn.context_length == 8192
    llama3 = {"rope_type": "llama3", "factor": 32.0, "original_max_position_embeddings": 1024}
    assert read(**{name: llama3}).context_length == 4096  # As the file says, not 32 times 1024.
    outer = read(**{name: llama3}, original_max_position_embeddings=512).rope_scaling
    assert outer.original_max_position_embeddings == 512
    ntk = read(**{name: {"rope_type": "ntk", "factor": 2}}, rope_theta=1e4)
    assert ntk.rope_theta == pytest.approx(1e4 * 2 ** (16 / 14))
    assert (ntk.rope_scaling, ntk.context_length) == (None, 8192)


def test_rope_scaling_counts_before_rope_parameters(read):
    both = {"rope_parameters": {"rope_type": "yarn", "factor": 2, "rope_theta": 5e5}}
    assert read(rope_scaling={"type": "default"}, **both) == read(rope_parameters=None)


def test_rope_theta_as_text_in_both_places(read):
    assert read(rope_theta="500000").rope_theta == 500000
    assert read(rope_theta=None).rope_theta == 10000
    assert read(rope_parameters={"rope_type": "default", "rope_theta": "5e5"}).rope_theta == 5e5


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"hidden_size": None}, "lacks hidden_size (null)"),
        ({"vocab_size": ...}, "lacks vocab_size (absent)"),
        ({"model_type": None}, "of model_type null; only"),
        ({"model_type": ...}, "of model_type absent; only"),
        ({"attention_bias": "yes"}, 'attention_bias is "yes"; only false is known'),
        ({"rope_theta": "fast"}, "rope_theta is 'fast'; it must be a number above 0"),
        ({"rms_norm_eps": -1}, "rms_norm_eps is -1; it must be a number above 0"),
        ({"hidden_size": 10**12}, "hidden_size is above 2147483647"),
    ],
)
def test_null_and_others_are_said_as_the_file_has_them(read, changes, said):
    with pytest.raises(CheckpointError) as caught:
        read(**changes)
    assert said in str(caught.value)


@pytest.mark.parametrize("value", ODD, ids=repr)
def test_no_value_ends_in_a_traceback(read, value, tmp_path):
    names = (
        *NUMBERS, "rope_theta", "head_dim", "rope_scaling", "rope_parameters", "architectures",
        "model_type", "attention_bias", "mlp_bias", "hidden_act", "quantization_config",
        "tie_word_embeddings",
    )  # fmt: skip
    values = json.loads((LLAMA / "config.json").read_text("utf-8"))
    for name in names:
        try:
            assert isinstance(read(**{name: value}), LanguageConfig)
        except CheckpointError as error:
            assert "config.json" in str(error) or "tokenizer.model" in str(error)  # noqa: PT017
        read(**{name: values.get(name, ...)})


def test_a_depth_that_the_weights_have_not(llama2, tmp_path):
    edit_json(llama2.language_dir / "config.json", num_hidden_layers=2**31 - 1)
    with pytest.raises(CheckpointError, match="num_hidden_layers 2147483647, and the weights have"):
        convert(llama2, tmp_path / "out")


@pytest.mark.parametrize("name", ["hidden_size", "intermediate_size", "num_hidden_layers"])
def test_berts_numbers_as_text(vicuna, name, tmp_path):
    path = vicuna.bert_dir / "config.json"
    values = json.loads(path.read_text("utf-8"))
    changes = {name: str(values[name]), "num_attention_heads": "4", "layer_norm_eps": "1e-12"}
    edit_json(path, **changes, hidden_act=None)
    assert convert(vicuna, tmp_path / "out").config.qformer.layer_norm_eps == 1e-12


@pytest.mark.parametrize("value", ODD, ids=repr)
def test_no_value_of_berts_ends_in_a_traceback(vicuna, value):
    path = vicuna.bert_dir / "config.json"
    published, _ = convert_module._look_at(vicuna, None, keep_lora=False)
    for name in ("layer_norm_eps", "num_attention_heads", "hidden_act", "hidden_size"):
        before = path.read_bytes()
        edit_json(path, **{name: value})
        try:
            detect_config(published)
        except CheckpointError as error:
            assert str(path) in str(error)  # noqa: PT017
        path.write_bytes(before)


def test_no_value_of_a_model_folder_ends_in_a_traceback(vicuna, tmp_path):
    convert(vicuna, model_dir := tmp_path / "model")
    path = model_dir / "config.json"
    before = json.loads(path.read_text("utf-8"))
    places = [(None, name) for name in before]
    for section in ("vision_config", "qformer_config", "text_config"):
        places += [(section, name) for name in before[section]]
    for (section, name), value in itertools.product(places, ODD):
        changes = {name: value} if section is None else {section: before[section] | {name: value}}
        edit_json(path, **changes)
        try:
            load_config(model_dir)
        except (CheckpointError, ConfigError) as error:
            assert str(model_dir) in str(error)  # noqa: PT017
            assert " is None" not in str(error), (section, name, value)  # noqa: PT017
        path.write_text(json.dumps(before), "utf-8")
