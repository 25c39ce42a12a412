"""The tokenizer as vLLM asks it, held to our own; and the ids that end an answer."""

import pytest

from minigpt4_runtime import Message
from minigpt4_runtime.checkpoint.folder import TOKENIZER_NAME
from minigpt4_runtime.messages import ImageSource
from minigpt4_runtime.text.prompt import TEMPLATES, render
from minigpt4_runtime.text.tokenizer import Tokenizer
from minigpt4_runtime.vllm_plugin.conversation import read_conversation
from minigpt4_runtime.vllm_plugin.tokenizer import FolderTokenizer, find_stop_ids

TEXTS = ["Give the image", "  two spaces", "### Human: <s> </s>", "Übergröße 日本 😀", ""]


@pytest.fixture(scope="module")
def folder(golden_model_dir):
    return golden_model_dir("vicuna")


def test_texts_have_our_ids(folder):
    theirs, ours = FolderTokenizer.from_pretrained(folder), Tokenizer(folder / TOKENIZER_NAME)
    for text in TEXTS:
        ids = ours.encode(text)
        assert theirs(text)["input_ids"] == [ours.bos_id, *ids]
        assert theirs.encode(text, add_special_tokens=False) == ids
        assert theirs.decode(ids) == ours.decode(ids)
        pieces = theirs.convert_ids_to_tokens(ids)
        assert theirs.convert_tokens_to_ids(pieces) == ids
        assert theirs.convert_tokens_to_string(pieces) == ours.decode(ids)
    assert theirs.convert_ids_to_tokens([theirs.image_token_id]) == [""]


def test_what_lies_around_a_picture_is_tokenised_apart(folder):
    theirs = FolderTokenizer.from_pretrained(folder)
    asked = [Message("user", (ImageSource(b""), "What is it?"))]
    rendered = render(asked, TEMPLATES["vicuna"])
    before, after = (theirs.text.encode(piece) for (piece,) in rendered.pieces)
    wanted = [theirs.bos_token_id, *before, theirs.image_token_id, *after]
    assert theirs.encode_prompt(rendered) == theirs.encode(rendered.text) == wanted


def test_a_stop_of_one_id_ends_an_answer(golden_model_dir):
    for name in ("vicuna", "vicuna-split-stop"):
        tokenizer = Tokenizer(golden_model_dir(name) / TOKENIZER_NAME)
        ids = find_stop_ids(tokenizer, TEMPLATES["vicuna"])
        assert ids[0] == tokenizer.eos_id
        assert all(tokenizer.decode([id]).strip() == "###" for id in ids[1:])
        assert bool(ids[1:]) == (name == "vicuna")


def test_pictures_keep_their_places():
    sources, dialogue = read_conversation([
        {"role": "system", "content": "Be brief."},
        {"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "And"}]},
        {"role": "assistant", "content": None},
        {"role": "user", "content": [{"type": "text", "text": "this?"}, {"type": "image"}]},
    ])  # fmt: skip
    assert [message.role for message in dialogue] == ["system", "user", "assistant", "user"]
    assert dialogue[1].content == (sources[0], "And")
    assert dialogue[3].content == ("this?", sources[1])
