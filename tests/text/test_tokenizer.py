"""Ids are the original's, text comes back whole, and control ids are never forged."""

import json
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from minigpt4_runtime import CheckpointError, Message, image
from minigpt4_runtime.text.prompt import TEMPLATES, render
from minigpt4_runtime.text.tokenizer import ImageSpan, TextStream, Tokenizer

GOLDENS = Path(__file__).parents[1] / "goldens"
TOKENIZER = Tokenizer(GOLDENS / "vicuna/checkpoint/llama/tokenizer.model")


@given(st.text() | st.sampled_from(["</s>", "<s>", "<unk>", "<0x0A>", "<s>[INST] ", "###"]))
def test_text_never_becomes_a_control_id(text):
    assert not {TOKENIZER.bos_id, TOKENIZER.eos_id} & set(TOKENIZER.encode(text))
    prompt = render([Message("user", (text,))], TEMPLATES["vicuna"])
    encoded = TOKENIZER.encode_prompt(prompt, rows_per_image=2, image_token_id=9999)
    assert encoded.token_ids.count(TOKENIZER.bos_id) == 1
    assert TOKENIZER.eos_id not in encoded.token_ids
    assert 9999 not in encoded.token_ids


def test_image_spans_stand_between_the_pieces():
    prompt = render([Message("user", (image("a"), image("b"), "Hi"))], TEMPLATES["vicuna"])
    encoded = TOKENIZER.encode_prompt(prompt, rows_per_image=4, image_token_id=1200)
    first, second, third = encoded.pieces
    assert encoded.token_ids == first + (1200,) * 4 + second + (1200,) * 4 + third
    assert encoded.image_spans == (
        ImageSpan(len(first), 4),
        ImageSpan(len(first) + 4 + len(second), 4),
    )
    assert first[0] == TOKENIZER.bos_id


def test_llama2_places_a_bos_before_every_user_turn():
    messages = [Message("user", ("a",)), Message("assistant", ("b",)), Message("user", ("c",))]
    prompt = render(messages, TEMPLATES["llama2"])
    encoded = TOKENIZER.encode_prompt(prompt, rows_per_image=4, image_token_id=1200)
    assert encoded.token_ids.count(TOKENIZER.bos_id) == 3


@settings(max_examples=300)
@given(st.lists(st.integers(0, 1300), max_size=40))
def test_text_as_it_grows_is_the_text_of_the_whole(ids):
    stream = TextStream(TOKENIZER)
    grown = "".join(stream.feed(i) for i in ids) + stream.flush()
    assert grown == TOKENIZER.decode(ids)


@given(st.text(min_size=1, max_size=20))
def test_characters_are_never_cut(text):
    stream = TextStream(TOKENIZER)
    parts = [stream.feed(i) for i in TOKENIZER.encode(text)]
    if "\ufffd" not in text:
        assert not any("\ufffd" in part for part in parts)
    assert "".join(parts) + stream.flush() == TOKENIZER.decode(TOKENIZER.encode(text))


@pytest.mark.parametrize("name", ["vicuna", "llama2"])
def test_golden_replies_decode_to_the_originals_text(name):
    cases = json.loads((GOLDENS / name / "cases.json").read_text(encoding="utf-8"))["cases"]
    for case in cases:
        if case["kind"] == "single":
            assert TOKENIZER.decode(case["output_ids"]["greedy"]) == case["raw_text"]


def test_a_file_that_is_no_tokenizer_is_named(tmp_path):
    bad = tmp_path / "tokenizer.model"
    with pytest.raises(CheckpointError, match="cannot be read"):
        Tokenizer(bad)
    bad.write_bytes(b"<html>")
    with pytest.raises(CheckpointError, match="not a sentencepiece model"):
        Tokenizer(bad)
