"""What callers rely on when they ask for many things at once: tickets, folders, searches."""

import asyncio
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch

from minigpt4_runtime import ConfigError, ImageError, MiniGPT4, RequestError, SamplingParams, image

GOLDEN = Path(__file__).parent / "goldens/vicuna"
PHOTO = GOLDEN / "images/photo_rgb.jpg"
SHORT = SamplingParams(max_new_tokens=6, stop=())
ENDLESS = SamplingParams(max_new_tokens=1500, stop=(), ignore_eos=True)


@pytest.fixture
def model(golden_model_dir) -> MiniGPT4:
    return MiniGPT4.load(golden_model_dir("vicuna"), device="cpu", engine={"max_running": 4})


def ask(*parts):
    return [{"role": "user", "content": list(parts)}]


def wait_until_idle(model) -> None:
    """Who cancels is not told when it is done: it is within a step."""
    deadline = time.monotonic() + 60
    while model.stats().num_running + model.stats().num_waiting:
        assert time.monotonic() < deadline, model.stats()
        time.sleep(0.01)


def assert_nothing_is_held(model) -> None:
    wait_until_idle(model)
    assert model.stats().num_free_blocks == model.stats().num_blocks


def test_a_ticket_grows_unread_and_ends_with_its_reply(model):
    ticket = model.submit(ask(image(PHOTO), "What?"), SHORT)
    wait_until_idle(model)
    *_, last = ticket
    assert last.reply == model.chat(ask(image(PHOTO), "What?"), SHORT)
    assert list(ticket) == []


def test_tickets_can_be_read_by_asyncio(model):
    questions = ["What?", "Why?", "Who?", "When?", "Where?", "How?"]
    alone = [model.chat(ask(image(PHOTO), question), SHORT) for question in questions]

    async def read(question):
        async for delta in model.submit(ask(image(PHOTO), question), SHORT):
            reply = delta.reply
        return reply

    async def read_all():
        return await asyncio.gather(*map(read, questions))

    assert asyncio.run(read_all()) == alone


def test_who_cancels_frees_the_blocks_and_disturbs_nobody(model):
    alone = model.chat(ask("Why?"), SHORT)
    endless = [model.submit(ask(image(PHOTO), str(number)), ENDLESS) for number in range(6)]
    other = model.submit(ask("Why?"), SHORT)
    assert next(endless[0]).text
    endless.pop().cancel()
    del endless  # A ticket that nobody holds is cancelled too.
    *_, last = other
    assert last.reply == alone
    assert_nothing_is_held(model)


def test_a_stream_that_is_left_ends_its_request(model):
    for delta in model.stream(ask(image(PHOTO), "What?"), ENDLESS):
        assert delta.text
        break
    assert_nothing_is_held(model)


def test_a_folder_is_opened_only_as_far_as_it_is_needed(model):
    taken = []

    def pictures():
        for number in range(200):
            taken.append(number)
            yield PHOTO

    results = model.describe_all(pictures(), "What?", SHORT)
    assert taken == []
    seen = [next(results) for _ in range(5)]
    assert len(taken) < 60
    results.close()
    assert_nothing_is_held(model)
    alone = model.describe(PHOTO, "What?", SHORT)
    assert all(result.reply == alone for result in seen)


def test_each_picture_of_many_has_its_own_result(model, tmp_path):
    torn = tmp_path / "torn.png"
    torn.write_bytes((GOLDEN / "images/alpha.png").read_bytes()[:200])
    good = sorted((GOLDEN / "images").iterdir())
    pictures = [torn, *good * 5, tmp_path / "missing.png"]
    results = sorted(model.describe_all(pictures, "What?", SHORT), key=lambda each: each.index)
    assert [result.index for result in results] == list(range(len(pictures)))
    alone = {path: model.describe(path, "What?", SHORT) for path in good}
    for path, result in zip(pictures, results, strict=True):
        assert result.seconds > 0
        if path in alone:
            assert (result.reply, result.error) == (alone[path], None)
        else:
            assert result.reply is None
            assert isinstance(result.error, ImageError)
            assert path.name in str(result.error)
    # Encoded at the most once each, however often they were asked about.
    assert model.stats().num_encoded_images == len(good)


def test_an_error_that_is_no_picture_s_ends_a_folder(model):
    (result,) = model.describe_all([PHOTO], prompt=7)
    assert isinstance(result.error, RequestError)
    with pytest.raises(OSError, match="the disk is gone"):
        list(model.describe_all(_fail_after_one()))
    steering = {"processors": [print], "branches": lambda _: sys.exit("enough")}
    with pytest.raises(SystemExit, match="enough"):  # In one of the threads that open pictures.
        list(model.describe_all([PHOTO], **steering))
    assert_nothing_is_held(model)


def _fail_after_one():
    yield PHOTO
    raise OSError("the disk is gone")


def test_logprobs_are_the_model_s_own(model):
    """Those of the original's first logits, whatever the sampling settings make of them."""
    logits = torch.from_numpy(np.load(GOLDEN / "arrays.npz")["case0/first_logits"])
    wanted = logits.log_softmax(-1)
    question = ask(image(GOLDEN / "images/alpha.png"), "Describe this image in detail.")
    for changes in ({}, {"temperature": 2.0, "top_k": 3, "seed": 5}, {"repetition_penalty": 3.0}):
        params = SamplingParams(max_new_tokens=4, stop=(), logprobs=3, **changes)
        reply = model.chat(question, params)
        assert [each.token_id for each in reply.logprobs] == list(reply.token_ids)
        first = reply.logprobs[0]
        assert first.logprob == pytest.approx(float(wanted[first.token_id]), abs=1e-3)
        best = wanted.topk(3)
        assert [token_id for token_id, _ in first.top] == best.indices.tolist()
        assert [value for _, value in first.top] == pytest.approx(best.values.tolist(), abs=1e-3)
    assert model.chat(question, SHORT).logprobs is None
    none_beside = SamplingParams(max_new_tokens=2, stop=(), logprobs=0)
    assert [each.top for each in model.chat(question, none_beside).logprobs] == [(), ()]


def test_a_beam_that_reaches_a_stop_is_a_finished_answer(model):
    """The original goes on until every beam ends in it at once, which never happens."""
    question = ask(image(PHOTO), "What is in the picture?")
    free = model.chat(question, SamplingParams(max_new_tokens=12, num_beams=3, stop=()))
    word = free.text.split()[3]
    stopped = model.chat(
        question, SamplingParams(max_new_tokens=12, num_beams=3, length_penalty=-5, stop=(word,))
    )
    assert stopped.finish_reason == "stop"
    assert word in model._tokenizer.decode(stopped.token_ids)
    assert word not in stopped.text


def test_beams_cannot_sample_or_give_logprobs():
    with pytest.raises(ConfigError, match="does not sample"):
        SamplingParams(num_beams=2, temperature=1.0)
    with pytest.raises(ConfigError, match="no logprobs"):
        SamplingParams(num_beams=2, logprobs=1)
    with pytest.raises(ConfigError, match="logprobs is 21"):
        SamplingParams(logprobs=21)
