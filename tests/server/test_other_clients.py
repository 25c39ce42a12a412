"""Clients of other makers work unchanged: with pictures, streams and dialogues.

instructor, LiteLLM and LlamaIndex are tried where they are installed: they ask for other versions
of packages than this project is pinned to.
"""

import asyncio
import gc
import json
from typing import Literal

import pytest
from pydantic import BaseModel
from running import IMAGES, NAME, data_url, picture, user

# They close neither their connections nor the event loops that they make.
pytestmark = [
    pytest.mark.filterwarnings("ignore::ResourceWarning"),
    pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning"),
]

QUESTION = "How many shapes are there?"
ABOUT = [picture(), {"type": "text", "text": QUESTION}]


class Scene(BaseModel):
    """What is asked for as JSON, by a schema that does not say that this is all."""

    number: Literal["one", "two", "three"]
    is_bright: bool


@pytest.fixture(autouse=True)
def nothing_left():
    """What a client leaves is collected here, not in the middle of another test."""
    loop = asyncio.new_event_loop()
    asyncio.set_event_loop(loop)
    yield
    asyncio.set_event_loop(None)
    loop.close()
    gc.collect()


@pytest.fixture
def expected(server):
    answer = server.openai().chat.completions.create(model=NAME, messages=[user(ABOUT)])
    return answer.choices[0].message.content


class TestLangChain:
    @pytest.fixture
    def chat(self, server):
        langchain = pytest.importorskip("langchain_openai")
        return langchain.ChatOpenAI(base_url=f"{server.url}/v1", api_key="none", model=NAME)

    def test_chat_and_stream(self, chat, expected):
        answer = chat.invoke([user(ABOUT)])
        assert answer.content == expected
        assert answer.usage_metadata["output_tokens"] > 0
        pieces = list(chat.stream([user(ABOUT)]))
        assert len(pieces) > 2
        assert "".join(piece.content for piece in pieces) == expected

    def test_an_answer_is_sent_back(self, chat):
        from langchain_core.messages import HumanMessage, SystemMessage

        asked = [SystemMessage("Be brief."), HumanMessage(ABOUT, name="me")]
        first = chat.invoke(asked)
        assert chat.invoke([*asked, first, HumanMessage("And in the centre?")]).content

    def test_responses(self, chat, expected):
        content = [
            {"type": "input_image", "image_url": data_url()},
            {"type": "input_text", "text": QUESTION},
        ]
        over_responses = type(chat)(
            base_url=chat.openai_api_base, api_key="none", model=NAME, use_responses_api=True
        )
        first = over_responses.invoke([user(content)])
        assert first.text == expected
        assert over_responses.invoke([user(content), first, user("And in the centre?")]).text
        assert "".join(piece.text for piece in over_responses.stream([user(content)])) == expected

    def test_completions(self, server):
        langchain = pytest.importorskip("langchain_openai")
        asked = {"max_tokens": 16, "temperature": 0}
        complete = langchain.OpenAI(
            base_url=f"{server.url}/v1", api_key="none", model=NAME, **asked
        )
        prompt = "Human: What do you see?###Assistant: "
        expected = server.openai().completions.create(model=NAME, prompt=prompt, **asked)
        assert complete.invoke(prompt) == expected.choices[0].text != ""


class TestPydanticAI:
    @pytest.fixture(params=["OpenAIChatModel", "OpenAIResponsesModel"])
    def agent(self, server, request):
        pytest.importorskip("pydantic_ai")
        from pydantic_ai import Agent
        from pydantic_ai.models import openai
        from pydantic_ai.providers.openai import OpenAIProvider

        provider = OpenAIProvider(base_url=f"{server.url}/v1", api_key="none")
        return Agent(getattr(openai, request.param)(NAME, provider=provider))

    def test_chat_and_dialogue(self, agent, expected):
        from pydantic_ai import BinaryContent

        seen = BinaryContent((IMAGES / "three.png").read_bytes(), media_type="image/png")
        first = agent.run_sync([seen, QUESTION])
        assert first.output == expected
        again = agent.run_sync("And in the centre?", message_history=first.all_messages())
        assert again.output
        assert again.usage.output_tokens > 0

    def test_stream(self, agent, expected):
        from pydantic_ai import BinaryContent

        seen = BinaryContent((IMAGES / "three.png").read_bytes(), media_type="image/png")
        streamed = agent.run_stream_sync([seen, QUESTION])
        assert list(streamed.stream_text(debounce_by=None))[-1] == expected

    def test_an_answer_of_a_type(self, agent):
        from pydantic_ai import BinaryContent, NativeOutput

        seen = BinaryContent((IMAGES / "three.png").read_bytes(), media_type="image/png")
        answer = agent.run_sync([seen, QUESTION], output_type=NativeOutput(Scene))
        assert isinstance(answer.output, Scene)

    def test_tools_are_refused_by_name(self, agent):
        with pytest.raises(Exception, match="calls no tools: leave them out"):
            agent.run_sync(QUESTION, output_type=Scene)


class TestInstructor:
    @pytest.fixture
    def create(self, server):
        instructor = pytest.importorskip("instructor")

        def ask(mode, **asked):
            client = instructor.from_openai(server.openai(), mode=getattr(instructor.Mode, mode))
            more = {"model": NAME, "response_model": Scene, "max_retries": 0}
            return client.chat.completions.create(**more | asked)

        return ask

    def test_a_picture_and_a_text(self, create):
        for content in (ABOUT, "Hello"):
            seen = create("JSON_SCHEMA", messages=[user(content)])
            assert isinstance(seen, Scene)

    def test_tools_are_refused_by_name(self, create):
        with pytest.raises(Exception, match="calls no tools: leave them out"):
            create("TOOLS", messages=[user(ABOUT)])


@pytest.mark.filterwarnings("ignore")  # Its own, of its database.
class TestLlm:
    """simonw/llm, by its command line."""

    @pytest.fixture
    def llm(self, server, tmp_path, monkeypatch):
        pytest.importorskip("llm")
        from click.testing import CliRunner
        from llm.cli import cli

        monkeypatch.setenv("LLM_USER_PATH", str(tmp_path))
        model = {"model_id": "demo", "model_name": NAME, "api_base": f"{server.url}/v1"}
        more = {"vision": True, "supports_schema": True, "api_key_name": "none"}
        lines = [f"{name}: {json.dumps(value)}" for name, value in (model | more).items()]
        (tmp_path / "extra-openai-models.yaml").write_text("- " + "\n  ".join(lines) + "\n")
        (tmp_path / "keys.json").write_text('{"none": "none"}')

        def ask(*arguments):
            done = CliRunner().invoke(cli, arguments)
            assert done.exit_code == 0, done.output
            return done.stdout.strip()

        return ask

    def test_a_picture_and_a_dialogue(self, llm, server):
        content = [{"type": "text", "text": QUESTION}, picture()]  # The order in which it asks.
        expected = server.ask(messages=[user(content)], max_tokens=None).json()
        answer = llm("-m", "demo", QUESTION, "-a", str(IMAGES / "three.png"))
        assert answer == expected["choices"][0]["message"]["content"]
        assert llm("-c", "And in the centre?", "--no-stream", "-s", "Be brief.")

    def test_a_schema(self, llm):
        schema = json.dumps(Scene.model_json_schema())
        answer = llm("-m", "demo", QUESTION, "-a", str(IMAGES / "three.png"), "--schema", schema)
        assert Scene.model_validate_json(answer)


@pytest.mark.filterwarnings("ignore")  # Its own, of its own types.
class TestLiteLLM:
    @pytest.fixture
    def complete(self, server):
        litellm = pytest.importorskip("litellm")
        asked = {"model": f"openai/{NAME}", "api_base": f"{server.url}/v1", "api_key": "none"}
        return lambda **more: litellm.completion(**asked | more)

    def test_chat_stream_and_dialogue(self, complete, expected):
        asked = [user(ABOUT)]
        answer = complete(messages=asked)
        assert answer.choices[0].message.content == expected
        stream = complete(messages=asked, stream=True)
        assert "".join(each.choices[0].delta.content or "" for each in stream) == expected
        turns = [*asked, answer.choices[0].message.model_dump(), user("And in the centre?")]
        assert complete(messages=turns).choices[0].message.content

    def test_an_answer_of_a_type(self, complete):
        answer = complete(messages=[user(ABOUT)], response_format=Scene)
        assert Scene.model_validate_json(answer.choices[0].message.content)


@pytest.mark.filterwarnings("ignore")
class TestLlamaIndex:
    @pytest.fixture
    def chat(self, server):
        llama_index = pytest.importorskip("llama_index.llms.openai_like")
        return llama_index.OpenAILike(
            model=NAME, api_base=f"{server.url}/v1", api_key="none", is_chat_model=True
        )

    def test_chat_and_stream(self, chat, expected):
        from llama_index.core.base.llms.types import ChatMessage, ImageBlock, TextBlock

        shown = ImageBlock(path=IMAGES / "three.png")
        asked = ChatMessage(role="user", blocks=[shown, TextBlock(text=QUESTION)])
        answer = chat.chat([asked])
        assert answer.message.content == expected
        assert [each.message.content for each in chat.stream_chat([asked])][-1] == expected
        again = ChatMessage(role="user", content="And in the centre?")
        assert chat.chat([asked, answer.message, again]).message.content
