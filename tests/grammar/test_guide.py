"""Exactly the ids that can still lead to a match are allowed, and no grammar can do harm."""

import re
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from minigpt4_runtime import BackendUnavailableError, SamplingParams
from minigpt4_runtime.api import DEMO_MODEL_DIR
from minigpt4_runtime.errors import GrammarError
from minigpt4_runtime.grammar import guide as guide_module
from minigpt4_runtime.grammar.guide import Grammars
from minigpt4_runtime.text.tokenizer import Tokenizer

TOKENIZER = Tokenizer(DEMO_MODEL_DIR / "tokenizer.model")
VOCAB_SIZE = TOKENIZER.vocab_size + 5  # Some models have ids that their tokenizer lacks.
GRAMMARS = Grammars(TOKENIZER, VOCAB_SIZE)
BYTES = [TOKENIZER.bytes_of(i) if TOKENIZER.is_text(i) else b"" for i in range(VOCAB_SIZE)]


def guide_of(**form):
    return GRAMMARS.guide(SamplingParams(**form))


def allowed_ids(guide):
    mask = guide.allowed()
    assert mask.shape == (VOCAB_SIZE,)
    return set(mask.nonzero()[0].tolist())


def feed(guide, text):
    """A guide that was fed a text in the longest ids that are allowed; None where none was."""
    rest = text.encode()
    while rest:
        fitting = [i for i in allowed_ids(guide) if BYTES[i] and rest.startswith(BYTES[i])]
        if not fitting:
            return None
        token_id = max(fitting, key=lambda each: len(BYTES[each]))
        guide.feed(token_id)
        rest = rest[len(BYTES[token_id]) :]
    return guide


def matches(text, **form):
    guide = feed(guide_of(**form), text)
    return guide is not None and TOKENIZER.eos_id in allowed_ids(guide)


words = st.lists(st.text("abé/ th", min_size=1, max_size=5), min_size=1, max_size=4)


@settings(max_examples=25, deadline=None)
@given(words, st.data())
def test_what_is_allowed_is_what_can_still_match(texts, data):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(guide_module, "_try_out", lambda source: "")  # A process for each is slow.
        guide = guide_of(regex="|".join(map(re.escape, texts)))
    # An answer may open with a space, which a reply leaves out.
    ends = {start + text.encode() for text in texts for start in (b"", b" ")}
    said = b""
    while True:
        expected = {
            token_id
            for token_id, more in enumerate(BYTES)
            if more and any(end.startswith(said + more) for end in ends)
        }
        expected |= {TOKENIZER.eos_id} if said in ends else set()
        allowed = allowed_ids(guide)
        if len({end[len(said) : len(said) + 1] for end in ends if end.startswith(said)}) > 1:
            assert allowed == expected
        # Where one byte alone can follow, only the usual ids of what must follow are allowed.
        assert allowed
        assert allowed <= expected
        token_id = data.draw(st.sampled_from(sorted(allowed)))
        guide.feed(token_id)
        if token_id == TOKENIZER.eos_id:
            return
        said += BYTES[token_id]


def test_a_fork_goes_its_own_way():
    guide = feed(guide_of(regex="ab|cd"), "a")
    fork = guide.fork()
    assert feed(fork, "b") is fork
    assert allowed_ids(fork) == {TOKENIZER.eos_id}
    assert {BYTES[token_id] for token_id in allowed_ids(guide)} == {b"b"}
    assert feed(guide_of(regex="ab|cd"), "c") is not None


def test_json_is_of_the_schema_and_on_one_line():
    schema = {
        "type": "object",
        "properties": {"n": {"type": "integer"}, "all": {"type": "array", "maxItems": 2}},
        "required": ["n"],
        "additionalProperties": False,
    }
    for text in ('{"n":1}', '{"n": -5, "all": [true, "é"]}', '{"n":1,"all":[[],{"a":null}]}'):
        assert matches(text, json_schema=schema)
    for text in (
        "{}",
        '{"n":1.5}',
        '{"n":1,"x":2}',
        '{"n":1,"all":[1,2,3]}',
        '{"n":\n1}',
        '{"n":1',
    ):
        assert not matches(text, json_schema=schema)
    assert matches(' {"a": 1}', json_schema='{"type": "object"}')
    assert not matches("[1]", json_schema='{"type": "object"}')


N = {"type": "integer", "minimum": 0, "maximum": 9}
ITEM = {"properties": {"n": N}, "required": ["n"], "type": "object"}  # As pydantic writes it.


@pytest.mark.parametrize(
    ("schema", "good", "bad"),
    [
        (ITEM, '{"n": 1}', '{"n": 1, "m": 2}'),
        (
            {"properties": {"all": {"items": {"$ref": "#/$defs/I"}}}, "$defs": {"I": ITEM}},
            '{"all": [{"n": 1}]}',
            '{"all": [{"n": 1, "m": 2}]}',
        ),
        (
            {"properties": {"a": {"anyOf": [ITEM, {"type": "null"}]}}},
            '{"a": null}',
            '{"a": {"n": 1, "m": 2}}',
        ),
    ],
)
def test_an_object_has_the_properties_that_are_listed(schema, good, bad):
    assert matches(good, json_schema=schema)
    assert not matches(bad, json_schema=schema)


@pytest.mark.parametrize(
    "schema",
    [
        {**ITEM, "additionalProperties": True}, {**ITEM, "additionalProperties": N},
        {**ITEM, "required": ["n", "m"]}, {**ITEM, "patternProperties": {"m": N}},
        {"allOf": [ITEM, {"properties": {"m": N}}]},
        {**ITEM, "anyOf": [{"properties": {"m": N}}, {"properties": {"n": N}}]},
        {"properties": {}, "$ref": "#/$defs/I", "$defs": {"I": ITEM}},
        {"required": ["m"], "$ref": "#/$defs/I", "$defs": {"I": ITEM}},
        {**ITEM, "minProperties": 2},
    ],
)  # fmt: skip
def test_an_object_may_have_others_where_its_schema_says_so(schema):
    assert matches('{"n": 1, "m": 2}', json_schema=schema)


@pytest.mark.parametrize(
    ("regex", "good", "bad"),
    [
        ("^a|b$", ["a", "b"], ["ab", "c"]), (r"a\$", ["a$"], ["a"]), ("a$", ["a"], ["a$"]),
        (r"a\\$", ["a\\"], ["a$"]), (r"[a-c]{2}/\d", ["ab/1"], ["a/1"]), ("", [""], ["a"]),
        ("(?i)yes", ["YES", "yes"], ["no"]), ("a\nb", ["a\nb"], ["a b"]),
    ],
)  # fmt: skip
def test_a_regex_matches_the_whole(regex, good, bad):
    assert all(matches(text, regex=regex) for text in good)
    assert not any(matches(text, regex=regex) for text in bad)


def chain(length):
    """Definitions that lead from each to the next: compiling them takes a stack as deep."""
    objects = {
        f"d{i}": {"type": "object", "properties": {"a": {"$ref": f"#/$defs/d{i + 1}"}}}
        for i in range(length)
    }
    return {"$ref": "#/$defs/d0", "$defs": {**objects, f"d{length}": {"type": "string"}}}


@pytest.mark.parametrize(
    ("form", "words"),
    [
        ({"json_schema": "{"}, "json_schema cannot be followed: Expecting property name"),
        ({"json_schema": "[1]"}, "a schema is an object"),
        ({"json_schema": {"type": "strin"}}, "json_schema cannot be followed"),
        ({"json_schema": {"uniqueItems": True}}, 'Unimplemented keys: \\["uniqueItems"\\]'),
        ({"json_schema": {"$ref": "https://example.com/a.json"}}, "example.com"),
        ({"json_schema": {"enum": []}}, "json_schema cannot be followed"),
        ({"json_schema": {"properties": {}, "required": [[]]}}, "json_schema cannot be followed"),
        ({"json_schema": "[" * 60_000}, "nested too deeply"),
        ({"json_schema": '{"a":' + "1" * 5000 + "}"}, "json_schema cannot be followed"),
        ({"json_schema": " " * 70_000}, "has 70,000 characters, and 65,536 are allowed"),
        ({"regex": "["}, "regex cannot be followed: unclosed character class"),
        ({"regex": "a(?=b)"}, "look-around"),
        ({"regex": r"[^\s\S]"}, "no text matches it"),
        ({"regex": "(" * 5000 + ")" * 5000}, "regex cannot be followed"),
        ({"regex": "\ud800"}, "regex cannot be followed"),
        # These would end or hold up the process that compiles them.
        ({"json_schema": chain(700)}, "too much time or memory"),
        ({"json_schema": {"type": "integer", "multipleOf": 99_999_989}}, "too much time or memory"),
    ],
    ids=lambda value: str(value)[:40],
)  # fmt: skip
def test_what_cannot_be_followed_is_one_sentence(form, words):
    with pytest.raises(GrammarError, match=words) as caught:
        guide_of(**form)
    message = str(caught.value)
    assert message.endswith(".")
    assert "\n" not in message
    assert len(message) < 300


def test_a_chain_of_definitions_that_people_have_is_followed():
    assert guide_of(json_schema=chain(20)) is not None


def test_work_without_bounds_ends_the_answer_alone():
    properties = {f"p{i}": {"type": "string"} for i in range(1500)}
    guide = guide_of(json_schema={"type": "object", "properties": properties})
    with pytest.raises(GrammarError, match=r"too much work to follow .*row has"):
        feed(guide, "{")


def test_a_grammar_is_compiled_once_and_a_fault_found_once(monkeypatch):
    tried, try_out = [], guide_module._try_out
    monkeypatch.setattr(guide_module, "_try_out", lambda text: tried.append(text) or try_out(text))
    grammars = Grammars(TOKENIZER, VOCAB_SIZE)
    for _ in range(2):
        assert grammars.guide(SamplingParams(regex="[ab]x")) is not None
        with pytest.raises(GrammarError, match="unclosed"):
            grammars.guide(SamplingParams(regex="["))
    assert len(tried) == 2


def test_a_machine_that_was_busy_is_asked_again(monkeypatch):
    grammars = Grammars(TOKENIZER, VOCAB_SIZE)
    with monkeypatch.context() as patch:
        patch.setattr(guide_module, "_TRIAL_SECONDS", 0)
        with pytest.raises(GrammarError, match="Ask again"):
            grammars.guide(SamplingParams(regex="[ab]y"))
    assert grammars.guide(SamplingParams(regex="[ab]y")) is not None


def test_many_answers_are_guided_at_once():
    def follow(_):
        return matches('{"a": [1, "two", {"b": null}]}', json_schema='{"type": "object"}')

    with ThreadPoolExecutor(8) as threads:
        assert all(threads.map(follow, range(16)))


def test_without_the_package_one_sentence_says_what_to_install(monkeypatch):
    monkeypatch.setitem(sys.modules, "llguidance", None)
    with pytest.raises(
        BackendUnavailableError, match=r"pip install 'minigpt4-runtime\[structured\]'"
    ):
        Grammars(TOKENIZER, VOCAB_SIZE).guide(SamplingParams(regex="a"))


def test_a_free_answer_needs_no_package(monkeypatch):
    monkeypatch.setitem(sys.modules, "llguidance", None)
    assert Grammars(TOKENIZER, VOCAB_SIZE).guide(SamplingParams()) is None


@pytest.mark.parametrize("regex", ["the [a-z]+", "the cat|the dog", "the cat"])
def test_a_llama_vocabulary_s_own_ids_are_allowed(regex):
    path = Path(__file__).parents[1] / "goldens/vicuna/checkpoint/llama/tokenizer.model"
    tokenizer = Tokenizer(path)
    guide = Grammars(tokenizer, tokenizer.vocab_size).guide(SamplingParams(regex=regex))
    ids = tokenizer.encode("the cat")
    assert tokenizer.bytes_of(ids[0]) == b" the"
    for token_id in ids:
        assert guide.allowed()[token_id]
        guide.feed(token_id)
    assert guide.allowed()[tokenizer.eos_id]
