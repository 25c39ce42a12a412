"""Rotary positions of every kind against transformers' own, and what scaling does to a context."""

import json
from functools import cache

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from minigpt4_runtime.config import LanguageConfig
from minigpt4_runtime.convert.key_map import language_origins
from minigpt4_runtime.errors import ConfigError
from minigpt4_runtime.model.causal import causal_attention
from minigpt4_runtime.model.llama import Llama
from minigpt4_runtime.model.rotary import Rotation, rotary_speeds
from minigpt4_runtime.rope_scaling import RopeScaling

CPU = torch.device("cpu")


@cache
def llama():
    """transformers' own: loading it takes seconds, also of those who only collect tests."""
    import transformers
    from transformers.models.llama import modeling_llama

    transformers.logging.set_verbosity_error()
    return modeling_llama


def shape(**changes):
    values = dict(
        hidden_size=64, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, vocab_size=50, max_position_embeddings=64, rms_norm_eps=1e-6,
    )  # fmt: skip
    return values | changes


def some(names_and_values):
    """A mapping with any of these names."""
    return st.fixed_dictionaries({}, optional=names_and_values)


FACTORS = st.floats(1, 64)
LENGTHS = st.integers(8, 10**5)
PUBLISHED = st.one_of(
    st.fixed_dictionaries({"rope_type": st.just("linear"), "factor": FACTORS}),
    st.fixed_dictionaries({
        "type": st.just("llama3"), "factor": FACTORS, "low_freq_factor": st.floats(0.1, 2),
        "high_freq_factor": st.floats(3, 50), "original_max_position_embeddings": LENGTHS,
    }),
    st.builds(
        lambda needed, more: needed | more,
        st.fixed_dictionaries({"rope_type": st.just("yarn"), "factor": FACTORS}),
        some({
            "original_max_position_embeddings": LENGTHS, "beta_fast": st.floats(8, 64),
            "beta_slow": st.floats(0.2, 7), "attention_factor": st.floats(0.5, 2),
            "mscale": st.floats(0.1, 2), "mscale_all_dim": st.floats(0.1, 2),
            "truncate": st.booleans(),
        }),
    ),
)  # fmt: skip


@settings(max_examples=300, deadline=None)
@given(
    published=PUBLISHED,
    head_dim=st.integers(1, 64).map(lambda half: 2 * half),
    theta=st.floats(1.5, 1e7),
    length=LENGTHS,
    seed=st.integers(0, 2**31),
)
def test_tables_are_those_of_transformers(published, head_dim, theta, length, seed):
    values = shape(hidden_size=4 * head_dim, max_position_embeddings=length, rope_theta=theta)
    ours = LanguageConfig(**values, rope_scaling=published)
    generator = torch.Generator().manual_seed(seed)
    heads = torch.randn(1, 4, 9, head_dim, generator=generator)
    positions = torch.randint(0, 40, (1, 9), generator=generator)
    turned = Rotation(positions[0], ours, torch.float32)(heads[0].transpose(0, 1))
    # Both what was published and what a model folder would have of it.
    for named in (values | {"rope_scaling": dict(published)}, ours.to_mapping()):
        config = llama().LlamaConfig(**json.loads(json.dumps(named)))
        theirs = llama().LlamaRotaryEmbedding(config)
        speeds = rotary_speeds(ours, CPU)
        # llama3 divides rounded turns by a difference of 1 or more, and a factor multiplies that.
        torch.testing.assert_close(speeds, theirs.inv_freq, rtol=1e-4, atol=0)
        wanted, _ = llama().apply_rotary_pos_emb(heads, heads, *theirs(heads, positions))
        torch.testing.assert_close(turned, wanted[0].transpose(0, 1), rtol=0, atol=1e-2)


@settings(max_examples=50, deadline=None)
@given(
    factor=FACTORS, half=st.integers(2, 64), theta=st.floats(1.5, 1e5), length=st.integers(8, 4096)
)
def test_static_ntk_is_transformers_dynamic_one_at_its_full_length(factor, half, theta, length):
    values = shape(hidden_size=8 * half, max_position_embeddings=length, rope_theta=theta)
    ours = LanguageConfig(**values, rope_scaling={"rope_type": "ntk", "factor": factor})
    # Dynamic NTK by 1 has, in a text of factor times the length, the base of static NTK by factor.
    dynamic = {"rope_type": "dynamic", "factor": 1.0}
    config = llama().LlamaConfig(**values, rope_scaling=dynamic)
    wanted, _ = llama().ROPE_INIT_FUNCTIONS["dynamic"](config, CPU, seq_len=factor * length)
    torch.testing.assert_close(rotary_speeds(ours, CPU), wanted, rtol=1e-5, atol=0)
    # In a model folder it is a base, which transformers needs no name for.
    written = llama().LlamaRotaryEmbedding(llama().LlamaConfig(**ours.to_mapping()))
    torch.testing.assert_close(rotary_speeds(ours, CPU), written.inv_freq, rtol=1e-6, atol=0)
    assert ours.context_length == int(factor * length)


@torch.inference_mode()
@pytest.mark.parametrize("text", ["none", "linear:2", "ntk:2.5", "llama3:8", "yarn:4"])
def test_logits_are_those_of_transformers(text):
    config = LanguageConfig(**shape(), rope_scaling=RopeScaling.read(text))
    theirs = llama().LlamaForCausalLM(llama().LlamaConfig(**config.to_mapping())).eval()
    weights = theirs.state_dict()
    generator = torch.Generator().manual_seed(4)
    for weight in weights.values():
        weight.copy_(torch.randn(weight.shape, generator=generator) * 0.2)
    ours = Llama(config).requires_grad_(False)
    ours.load_state_dict({
        name.removeprefix("language."): weights[origin.names[0]]
        for name, origin in language_origins(config).items()
    })  # fmt: skip
    ids = torch.randint(0, 50, (150,), generator=generator)
    hidden = ours(ours.embed(ids), torch.arange(150), causal_attention())
    wanted = theirs(ids[None]).logits[0]
    torch.testing.assert_close(ours.logits(hidden), wanted, rtol=0, atol=2e-4)
    if text != "none":
        plain = Llama(LanguageConfig(**shape())).requires_grad_(False)
        plain.load_state_dict(ours.state_dict())
        unscaled = plain(plain.embed(ids), torch.arange(150), causal_attention())
        assert float((plain.logits(unscaled) - wanted).abs().max()) > 0.02


# --- settings -----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "context"),
    [("none", 64), ("linear:2", 128), ("yarn:4", 256), ("llama3:8", 512), ("ntk:1.5", 96)],
)
def test_a_scaling_from_text_replaces_the_folder_s(text, context):
    said = {"rope_type": "yarn", "factor": 2, "original_max_position_embeddings": 64}
    folder = LanguageConfig(**shape(max_position_embeddings=128), rope_scaling=said)
    assert folder.context_length == 128
    changed = folder.stretched(text)
    assert changed.context_length == context
    assert changed == LanguageConfig(**shape(), rope_scaling=RopeScaling.read(text))
    assert LanguageConfig.from_mapping(json.loads(json.dumps(changed.to_mapping()))) == changed
    limited = changed.stretched(None, 50)
    assert (limited.context_length, limited.rope_scaling) == (50, changed.rope_scaling)
    assert LanguageConfig.from_mapping(limited.to_mapping()) == limited


@pytest.mark.parametrize(
    ("scaling", "max_context", "said"),
    [
        ("yarn", None, "rope_scaling is 'yarn'; give KIND:FACTOR, such as yarn:4, or none"),
        ("yarn:x", None, "give KIND:FACTOR"),
        ("yarn:nan", None, "factor is nan; it must be a number of at least 1"),
        ("linear:0.5", None, "factor is 0.5; it must be a number of at least 1"),
        ("dynamic:2", None, "the keys in the cache are already turned by the base before"),
        ("longrope:2", None, "the keys in the cache are already turned"),
        ("spiral:2", None, "of the kind 'spiral'; known are linear, llama3, yarn, ntk"),
        (3, None, "rope_scaling is 3; give named values or text"),
        ({"rope_type": "linear", "factor": [2]}, None, "factor is [2]; it must be a number"),
        ("linear:1e7", None, "it must be a number"),
        (None, 65, "max_context is 65, but the positions of this model reach 64 tokens"),
        ("yarn:2", 129, "reach 128 tokens. Lower it, or stretch them with rope_scaling"),
        (None, 0, "max_context is 0; it must be a whole number"),
    ],
)
def test_what_is_refused_is_said(scaling, max_context, said):
    config = LanguageConfig(**shape())
    with pytest.raises(ConfigError) as caught:
        config.stretched(scaling, max_context)
    assert said in str(caught.value)


def test_a_field_of_another_kind_is_refused():
    with pytest.raises(ConfigError, match="of the kind 'linear' has no beta_fast"):
        RopeScaling(rope_type="linear", factor=2, beta_fast=3)
    with pytest.raises(ConfigError, match="by yarn needs a rope_theta above 1"):
        LanguageConfig(**shape(rope_theta=0.5), rope_scaling="yarn:2")
    with pytest.raises(ConfigError, match="by ntk needs heads wider than 2"):
        LanguageConfig(**shape(hidden_size=8), rope_scaling="ntk:2")
