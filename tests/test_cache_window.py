"""With a cache_window no dialogue and no answer is too long; what is kept is as if asked anew."""

import itertools
import time
from pathlib import Path

import pytest
import torch

from minigpt4_runtime import ConfigError, EngineConfig, MiniGPT4, PromptTooLongError, SamplingParams
from minigpt4_runtime import image as picture
from minigpt4_runtime.messages import read_messages
from minigpt4_runtime.text.prompt import write_script
from minigpt4_runtime.text.window import dialogue_window

PICTURES = sorted((Path(__file__).parents[1] / "examples/images").glob("*.png"))
QUESTION = "What is in this picture?"
WINDOW = 200
ENDLESS = {"ignore_eos": True, "stop": ()}
NARROW = 100
DRAWN = SamplingParams(temperature=1.5, seed=3, max_new_tokens=130, **ENDLESS)


def user(*parts):
    return {"role": "user", "content": list(parts)}


def assistant(text):
    return {"role": "assistant", "content": text}


def long_dialogue(count):
    """Turns about pictures, the last question open."""
    turns = []
    for path in itertools.islice(itertools.cycle(PICTURES), count):
        turns += [user(picture(path), QUESTION), assistant("There is one shape on the right.")]
    return turns[:-1]


@pytest.fixture(scope="module")
def model():
    with MiniGPT4.load(device="cpu", engine={"cache_window": WINDOW}) as loaded:
        yield loaded


@pytest.fixture(scope="module")
def boundless():
    """The same model without a window."""
    with MiniGPT4.load(device="cpu") as loaded:
        yield loaded


def test_a_dialogue_is_answered_as_one_of_its_last_turns(model, boundless):
    dialogue = long_dialogue(12)
    reply = model.chat(dialogue)
    num_left = reply.usage.evicted_images
    assert 6 < num_left <= 10
    alone = boundless.chat(dialogue[2 * num_left :])
    assert reply.token_ids == alone.token_ids
    assert reply.usage.prompt_tokens == alone.usage.prompt_tokens
    whole = boundless.chat(dialogue).usage.prompt_tokens
    assert abs(reply.usage.prompt_tokens + reply.usage.evicted_tokens - whole) <= 12
    assert alone.usage.evicted_tokens == alone.usage.evicted_images == 0


def test_the_system_text_stays(model, boundless):
    system = {"role": "system", "content": "Answer in one word."}
    reply = model.chat([system, *long_dialogue(12)])
    kept = long_dialogue(12)[2 * reply.usage.evicted_images :]
    assert reply.token_ids == boundless.chat([system, *kept]).token_ids


def test_each_token_of_an_endless_answer_is_that_of_a_dense_computation(model, boundless):
    """The slow twin: no engine and no cache, what is kept computed anew for every token."""
    asked = long_dialogue(4)
    sampling = SamplingParams(max_new_tokens=500, logprobs=0, logit_bias={0: 0.0}, **ENDLESS)
    reply = model.chat(asked, sampling)
    assert len(reply.token_ids) == 500
    assert reply.usage.evicted_tokens > 2 * WINDOW
    assert reply.usage.evicted_images == 4

    script = write_script(read_messages(asked), model._template)
    room = model.config.language.max_position_embeddings
    window = dialogue_window(script, model._encode, size=WINDOW, room=room)
    # Every place after a change, and some others.
    places = [n for n in range(1, 500) if window.fit(n) != window.fit(n - 1) or n % 75 == 0]
    assert len(places) > 12
    rows = model.embed_images(script.images)
    for place in places:
        kept = window.fit(place)
        context = [*kept.token_ids, *reply.token_ids[kept.num_answer : place]]
        held = rows[len(rows) - len(kept.image_starts) :]
        image_rows = dict(zip(kept.image_starts, held, strict=True))
        answer = reply.token_ids[place : place + 1]
        expected = boundless.probe.expect(context, answer, image_rows=image_rows)[0]
        assert int(expected.argmax()) == answer[0]
        assert reply.logprobs[place].logprob == pytest.approx(float(expected.max()), abs=1e-4)


def test_each_picture_is_encoded_once_and_few_tokens_are_computed_again():
    with MiniGPT4.load(device="cpu", engine={"cache_window": WINDOW}) as fresh:
        dialogue, computed = [], []
        for number in range(25):
            shown = torch.full((3, 96, 96), number / 30)
            dialogue.append(user(picture(shown), QUESTION))
            before = fresh.stats().num_computed_tokens
            reply = fresh.chat(dialogue, SamplingParams(max_new_tokens=12))
            computed.append(fresh.stats().num_computed_tokens - before)
            dialogue.append(assistant(reply.text))
        assert fresh.stats().num_encoded_images == 25
        assert reply.usage.evicted_images > 18
        assert max(computed) <= WINDOW + 60 + 12
        # Of the later turns most found all but their own tokens in the prefix cache.
        assert sum(each < 80 for each in computed[5:]) >= 10


@pytest.fixture(scope="module")
def narrow_answers():
    """Drawn answers to three dialogues within a narrow window, each alone."""
    with MiniGPT4.load(device="cpu", engine={"cache_window": NARROW}) as narrow:
        return [narrow.chat(long_dialogue(count), DRAWN).token_ids for count in (1, 2, 9)]


@pytest.mark.parametrize(
    "engine",
    [
        {"prefix_cache": False},
        {"max_step_tokens": 7, "max_running": 4},
        {"block_size": 3, "num_blocks": 70, "max_running": 4},
    ],
    ids=["no prefix cache", "small steps", "preemptions"],
)
def test_answers_are_the_same_alone_together_and_after_preemptions(narrow_answers, engine):
    with MiniGPT4.load(device="cpu", engine={"cache_window": NARROW, **engine}) as other:
        tickets = [other.submit(long_dialogue(count), DRAWN) for count in (1, 2, 9, 1, 2, 9)]
        replies = [list(ticket)[-1].reply for ticket in tickets]
        deadline = time.monotonic() + 60
        while (stats := other.stats()).num_free_blocks < stats.num_blocks:
            assert time.monotonic() < deadline, "blocks are held though nothing runs"
    assert [reply.token_ids for reply in replies] == narrow_answers * 2
    assert all(reply.usage.evicted_tokens > NARROW / 2 for reply in replies)
    assert (stats.num_preempted > 0) == ("num_blocks" in engine)


def test_two_ranks_answer_as_one(narrow_answers):
    with MiniGPT4.load(device="cpu", tensor_parallel=2, engine={"cache_window": NARROW}) as two:
        assert two.chat(long_dialogue(9), DRAWN).token_ids == narrow_answers[2]


def test_keys_of_half_the_size_slide_too():
    halved = {"cache_window": NARROW, "cache_dtype": "bfloat16"}
    with MiniGPT4.load(device="cpu", engine=halved) as other:
        reply = other.chat(long_dialogue(2), DRAWN)
    assert len(reply.token_ids) == DRAWN.max_new_tokens
    assert reply.usage.evicted_tokens > NARROW / 2


def test_beams_search_beyond_the_window(model):
    sampling = SamplingParams(num_beams=3, max_new_tokens=160, **ENDLESS)
    reply = model.chat(long_dialogue(4), sampling)
    assert len(reply.token_ids) == 160
    assert reply.usage.evicted_tokens > WINDOW / 2
    with MiniGPT4.load(
        device="cpu", engine={"cache_window": WINDOW, "prefix_cache": False, "num_blocks": 60}
    ) as other:
        assert other.chat(long_dialogue(4), sampling).token_ids == reply.token_ids


def test_a_form_and_a_stop_hold_across_the_window(model):
    letters = SamplingParams(regex="(ab){100}c", max_new_tokens=2000)
    reply = model.chat(long_dialogue(4), letters)
    assert reply.text == "ab" * 100 + "c"
    assert reply.usage.evicted_tokens > 0
    until = SamplingParams(regex="(ab){100}cabab", stop=("bca",), max_new_tokens=2000)
    stopped = model.chat(long_dialogue(4), until)
    assert stopped.text == "ab" * 99 + "a"
    assert stopped.finish_reason == "stop"


def test_a_text_goes_on_without_end(model):
    ticket = model.submit_text("A red star. " * 100, DRAWN)
    reply = list(ticket)[-1].reply
    assert len(reply.token_ids) == DRAWN.max_new_tokens
    assert reply.usage.prompt_tokens <= WINDOW + 4
    assert reply.usage.evicted_tokens > WINDOW


def test_the_deltas_tell_what_has_left_so_far(model):
    usages = [delta.usage for delta in model.stream(long_dialogue(4), DRAWN)]
    evicted = [usage.evicted_tokens for usage in usages]
    assert evicted == sorted(evicted)
    assert evicted[0] == 0 < evicted[-1]
    assert usages[0].evicted_images == 0 < usages[-1].evicted_images


def test_what_is_refused(boundless):
    with (
        MiniGPT4.load(device="cpu", engine={"cache_window": 30}) as narrow,
        pytest.raises(PromptTooLongError, match=r"the window holds .* raise cache_window"),
    ):
        narrow.chat([user(picture(PICTURES[0]), "What is it? " * 5)])
    with pytest.raises(ConfigError, match="cache_window is 1024, but the model's context holds"):
        MiniGPT4.load(device="cpu", engine={"cache_window": 1024})
    with pytest.raises(ConfigError, match=r"but the cache \(num_blocks\) holds 160 tokens"):
        MiniGPT4.load(device="cpu", engine={"cache_window": 200, "num_blocks": 10})
    for wrong in (0, -1, 1.5, True):
        with pytest.raises(ConfigError, match="cache_window"):
            EngineConfig(cache_window=wrong)
    too_large = EngineConfig(cache_window=5000)
    with pytest.raises(ConfigError, match="cache_window is 5000"):
        boundless.probe.use_engine(too_large)
    assert boundless.chat([user("Hi")]).token_ids


def test_without_a_window_the_end_of_the_context_is_told(boundless):
    with pytest.raises(PromptTooLongError, match="or let them leave with cache_window") as caught:
        boundless.chat(long_dialogue(30))
    assert "context holds 1024" in str(caught.value)
    reply = boundless.chat(long_dialogue(24), SamplingParams(max_new_tokens=5000, **ENDLESS))
    assert reply.usage.prompt_tokens + len(reply.token_ids) == 1024
    assert reply.finish_reason == "length"
