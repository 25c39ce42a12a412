"""What leaves a window: whole turns with their pictures, the oldest first, never more than due."""

import re
from itertools import pairwise

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from minigpt4_runtime import Message, PromptTooLongError, image
from minigpt4_runtime.api import DEMO_MODEL_DIR
from minigpt4_runtime.text.prompt import TEMPLATES, write_script
from minigpt4_runtime.text.tokenizer import Tokenizer
from minigpt4_runtime.text.window import dialogue_window, text_window

ROWS, ROOM = 10, 1000
TOKENIZER = Tokenizer(DEMO_MODEL_DIR / "tokenizer.model")
PARTS = st.one_of(st.just(image("a.png")), st.sampled_from(("Hi", "What is the largest star?", "")))
TURNS = st.lists(
    st.tuples(st.lists(PARTS, min_size=1, max_size=3), st.sampled_from(("", "One red star."))),
    min_size=1,
    max_size=12,
)


def encode(prompt):
    return TOKENIZER.encode_prompt(prompt, rows_per_image=ROWS, image_token_id=640)


def script_of(turns, template="vicuna"):
    messages = []
    for asked, answered in turns:
        messages += [Message("user", tuple(asked)), Message("assistant", (answered,))]
    return write_script(messages[:-1], TEMPLATES[template])


def window_of(script, size, room=ROOM):
    return dialogue_window(script, encode, size=size, room=room)


def beginning_of(script):
    return len(encode(script.prompt(len(script.exchanges))).token_ids)


@settings(max_examples=150, deadline=None)
@given(TURNS, st.sampled_from(sorted(TEMPLATES)), st.integers(80, 200), st.integers(0, 500))
def test_a_prompt_is_that_of_the_last_turns_and_is_kept_within_the_limit(
    turns, template, size, num_answer
):
    script = script_of(turns, template)
    window = window_of(script, size)
    assert window.limit == beginning_of(script) + size
    kept = window.fit(num_answer)
    assert len(kept.token_ids) + num_answer - kept.num_answer <= window.limit
    prompts = [encode(script.prompt(first)) for first in range(len(script.exchanges) + 1)]
    (same,) = (each for each in prompts if each.token_ids == kept.token_ids)
    assert kept.image_starts == tuple(span.start for span in same.image_spans)
    assert kept.num_answer == 0 or same is prompts[-1]
    # What left the prompt is counted; a token may differ at the ends of each text.
    left = len(prompts[0].token_ids) - len(kept.token_ids) + kept.num_answer
    num_texts = sum(len(asked) + 1 for asked, _ in turns)
    assert abs(kept.num_tokens - left) <= num_texts


@settings(max_examples=100, deadline=None)
@given(TURNS, st.integers(80, 200), st.integers(1, 400))
def test_more_leaves_only_when_one_more_token_does_not_fit(turns, size, num_answer):
    window = window_of(script_of(turns), size)
    before, after = window.fit(num_answer - 1), window.fit(num_answer)
    grown = len(before.token_ids) + num_answer - before.num_answer
    assert (after != before) == (grown > window.limit)


def test_a_dialogue_that_fits_is_whole():
    script = script_of([([image("a.png"), "Hi"], "Yes?")] * 3)
    whole = encode(script.prompt())
    size = len(whole.token_ids) - beginning_of(script)
    assert window_of(script, size).fit(0).token_ids == whole.token_ids
    assert window_of(script, size).fit(0).num_tokens == 0
    assert window_of(script, size - 1).fit(0).num_tokens > 0


def test_a_growing_dialogue_begins_alike_until_a_quarter_of_the_window_has_left():
    """So that its prompts are found in the prefix cache."""
    turn, size = ([image("a.png"), "What is the largest star?"], "One red star."), 200
    scripts = [script_of([turn] * count) for count in range(1, 60)]
    kept = [window_of(script, size).fit(0) for script in scripts]
    beginning, per_turn = beginning_of(scripts[0]), kept[1].num_tokens or 29
    changes = sum(a.num_tokens != b.num_tokens for a, b in pairwise(kept))
    assert 0 < changes <= 59 * per_turn / (size / 4) + 1
    for before, after in pairwise(kept):
        num_same = beginning - 10 if before.num_tokens != after.num_tokens else -10
        assert before.token_ids[:num_same] == after.token_ids[: len(before.token_ids[:num_same])]
    # Once something has left, three quarters of the window stay, but for a turn.
    assert all(len(each.token_ids) > size * 3 / 4 - 60 for each in kept if each.num_tokens)


def test_the_last_turn_leaves_as_a_whole_and_then_ids_of_the_answer():
    script = script_of([([image("a.png"), "Hi"], "Yes?")] * 3)
    window, size = window_of(script, 40), 40
    empty = beginning_of(script)
    last = len(encode(script.prompt(2)).token_ids)
    assert len(window.fit(window.limit - last).token_ids) == last
    without = window.fit(window.limit - last + 1)
    assert (len(without.token_ids), without.image_starts, without.num_answer) == (empty, (), 0)
    assert window.fit(size).num_answer == 0
    assert [window.fit(size + more).num_answer for more in (1, 10, 11)] == [10, 10, 20]


@pytest.mark.parametrize(("size", "room"), [(20, ROOM), (500, 40)])
def test_a_last_turn_that_does_not_fit_is_refused(size, room):
    script = script_of([(["Hi"], "Yes?"), ([image("a.png"), "What is the largest star?"], "")])
    size_of_last = len(encode(script.prompt(1)).token_ids)
    limit = min(beginning_of(script) + size, room)
    said = f"has {size_of_last} tokens and the window holds {limit}, .* raise cache_window"
    with pytest.raises(PromptTooLongError, match=said):
        window_of(script, size, room)


def test_a_text_keeps_its_first_four_ids():
    window = text_window(range(100), size=20, room=ROOM)
    assert window.limit == 24
    assert window.fit(0).token_ids == (0, 1, 2, 3, *range(84, 100))
    assert window.fit(0).num_tokens == 80
    kept = window.fit(9)
    assert (kept.token_ids, kept.num_answer) == ((0, 1, 2, 3, *range(89, 100)), 0)
    kept = window.fit(103)
    assert kept.token_ids == (0, 1, 2, 3)
    assert 103 - kept.num_answer <= 20


def test_the_exchanges_of_a_script_make_up_the_prompt():
    script = script_of([([image("a.png"), image("b.png"), "Hi"], "Yes?"), (["Why?"], "")])
    # Each picture opens a turn, which can leave without the other.
    assert len(script.exchanges) == 3
    assert [len(script.prompt(first).images) for first in range(4)] == [2, 1, 0, 0]
    assert re.search(r"###Human: Why\?###Assistant: $", script.prompt(2).text)
