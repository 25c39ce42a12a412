"""The requests of load tools, as they send them: so many tokens come, and are counted.

vLLM's `bench serve`, guidellm and aiperf, by the bodies that they make.
"""

import json

import pytest
from running import NAME, picture

TEXT = {"type": "text", "text": "What do you see?"}
USAGE = {"include_usage": True}
COUNTS = {"include_usage": True, "continuous_usage_stats": True}
REQUESTS = {
    "vllm openai-chat": ("/v1/chat/completions", {
        "messages": [{"role": "user", "content": [TEXT, picture()]}], "temperature": 0.0,
        "repetition_penalty": 1.0, "max_completion_tokens": 20, "ignore_eos": True,
        "stream_options": USAGE,
    }),
    "vllm openai": ("/v1/completions", {
        "prompt": "What do you see?", "temperature": 0.0, "repetition_penalty": 1.0,
        "max_tokens": 20, "logprobs": None, "ignore_eos": True, "stream_options": USAGE,
    }),
    "guidellm chat": ("/v1/chat/completions", {
        "messages": [{"role": "user", "content": [TEXT]}], "max_completion_tokens": 20,
        "ignore_eos": True, "stream_options": COUNTS,
    }),
    "guidellm text": ("/v1/completions", {
        "prompt": "What do you see?", "max_tokens": 20, "ignore_eos": True, "stop": None,
        "stream_options": COUNTS,
    }),
    "aiperf chat": ("/v1/chat/completions", {
        "messages": [{"role": "user", "name": "", "content": [TEXT, picture()]}],
        "max_completion_tokens": 20, "min_tokens": 20, "ignore_eos": True, "stream_options": USAGE,
    }),
}  # fmt: skip


@pytest.mark.parametrize("tool", REQUESTS)
def test_all_tokens_come_and_the_last_count_is_right(server, tool):
    path, body = REQUESTS[tool]
    with server.client() as client:
        answer = client.post(path, json={"model": NAME, "stream": True, **body})
    assert answer.headers["content-type"].startswith("text/event-stream")
    *events, done = [line.removeprefix("data: ") for line in answer.text.split("\n\n") if line]
    assert done == "[DONE]"
    chunks = [json.loads(event) for event in events]
    texts = [choice.get("text") or choice.get("delta", {}).get("content")
             for chunk in chunks for choice in chunk["choices"]]  # fmt: skip
    assert len([text for text in texts if text]) > 1
    counted = [chunk for chunk in chunks if chunk["usage"]]
    assert counted[-1]["usage"]["completion_tokens"] == 20
    assert (len(counted) > 1) == ("continuous_usage_stats" in body["stream_options"])


def test_metrics_may_be_looked_for_first(server):
    """As aiperf asks before it reads them."""
    with server.client() as client:
        assert client.head("/metrics").status_code == client.get("/metrics").status_code == 200


def test_responses_without_an_end(server):
    content = [{"type": "input_text", "text": "hi"}]
    body = {"model": NAME, "max_output_tokens": 20, "ignore_eos": True}
    body["input"] = [{"role": "user", "content": content}]
    with server.client() as client:
        answer = client.post("/v1/responses", json=body)
    assert answer.json()["usage"]["output_tokens"] == 20
