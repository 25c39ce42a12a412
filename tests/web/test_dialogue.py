"""What a dialogue says where there is no answer to be had."""

import asyncio

import pytest

from minigpt4_runtime.web.dialogue import AnswerSettings, DialogueError, Server, Turn

pytestmark = pytest.mark.filterwarnings("default")


async def answer(url, turns):
    return [text async for text in Server(url).answer(turns, AnswerSettings())]


def test_a_picture_that_is_gone_is_said_to_be(tmp_path):
    turns = [Turn("What is it?", (tmp_path / "gone.png",), "A star."), Turn("Where?")]
    with pytest.raises(DialogueError, match="not kept any more") as caught:
        asyncio.run(answer("http://127.0.0.1:9", turns))
    assert str(tmp_path) not in str(caught.value)
