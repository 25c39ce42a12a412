"""Show examples/ray_serve.py: sticky dialogues, a replica that dies, and one that is taken away.

python scripts/show_ray_serve.py

Two replicas of the demo model are started on this machine. Dialogues of three turns are held, with
and without an x-session-id, and each turn's replica is found by the counts in its /metrics. Then
a replica is killed, and the dialogues go on; at last one is taken away while answers stream.
"""

from __future__ import annotations

import base64
import importlib.util
import json
import os
import re
import secrets
import signal
import sys
import threading
import time
import urllib.error
import urllib.request
from pathlib import Path
from types import ModuleType
from typing import Any

from minigpt4_runtime.optional import require

ROOT = Path(__file__).parents[1]
URL = "http://127.0.0.1:8000"
QUESTIONS = ("How many shapes are there?", "What colour is the star?", "Where is the ring?")


def load_example() -> ModuleType:
    """The example as a module."""
    spec = importlib.util.spec_from_file_location("ray_serve", ROOT / "examples" / "ray_serve.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules["ray_serve"] = module
    spec.loader.exec_module(module)
    return module


def open_url(path: str, body: Any = None, *, session: str | None = None) -> Any:
    """Ask the server; POST where there is a body."""
    content = None if body is None else json.dumps(body).encode()
    headers = {"Content-Type": "application/json"} | ({"x-session-id": session} if session else {})
    request = urllib.request.Request(URL + path, content, headers)
    return urllib.request.urlopen(request, timeout=120)


def ask(messages: list[dict[str, Any]], session: str | None, **more: Any) -> Any:
    """Ask a question of a dialogue."""
    body = {"model": "minigpt4", "messages": messages, **more}
    return open_url("/v1/chat/completions", body, session=session)


def picture(name: str) -> dict[str, Any]:
    """An example picture as a part of a message."""
    content = base64.b64encode((ROOT / "examples" / "images" / name).read_bytes()).decode()
    return {"type": "image_url", "image_url": {"url": f"data:image/png;base64,{content}"}}


def counts(homes: list[str]) -> dict[str, tuple[float, float]]:
    """The answers and the cached tokens of each replica, by the session that belongs to it."""
    found = {}
    for session in homes:
        with open_url("/metrics", session=session) as answer:
            text = answer.read().decode()
        answers = re.findall(r"^minigpt4_requests_total\{.*chat.*\} (.*)$", text, re.MULTILINE)
        found[session] = sum(map(float, answers)), value_of(text, "minigpt4_cached_tokens_total")
    return found


def find_homes() -> list[str]:
    """A session of each replica: a question of the first is not counted by the second."""
    first = secrets.token_hex(8)
    while True:
        second = secrets.token_hex(8)
        before = counts([second])
        ask([{"role": "user", "content": "Hello?"}], first).close()
        if counts([second]) == before:
            return [first, second]


def value_of(text: str, name: str) -> float:
    """A value of the metrics."""
    match = re.search(rf"^{name} (\S+)$", text, re.MULTILINE)
    assert match, f"there is no {name} in the metrics"
    return float(match[1])


def hold_dialogues(homes: list[str], *, sticky: bool, number: int) -> None:
    """Print how many later turns came to the replica of their first turn, and what was cached."""
    num_home = num_later = 0
    cached = -sum(tokens for _, tokens in counts(homes).values())
    for dialogue in range(number):
        session = secrets.token_hex(8) if sticky else None
        messages: list[dict[str, Any]] = []
        home = ""
        for turn, question in enumerate(QUESTIONS):
            begins = [] if turn else [picture("four.png")]
            # Another beginning for each dialogue: only its own turns find it cached.
            text = question if turn else f"({dialogue}{'s' * sticky}) {question}"
            messages.append({"role": "user", "content": [*begins, {"type": "text", "text": text}]})
            before = counts(homes)
            with ask(messages, session) as answer:
                said = json.load(answer)["choices"][0]["message"]["content"]
            messages.append({"role": "assistant", "content": said})
            after = counts(homes)
            (replica,) = [each for each in after if after[each][0] > before[each][0]]
            num_later += turn > 0
            num_home += turn > 0 and replica == home
            home = home or replica
    cached += sum(tokens for _, tokens in counts(homes).values())
    kind = "with" if sticky else "without"
    print(
        f"{kind} x-session-id: {num_home} of {num_later} later turns reached the replica of their "
        f"first; {cached:.0f} tokens were found in caches",
        flush=True,
    )


def kill_a_replica() -> None:
    """Kill one of the replicas of this program's cluster."""
    mark = f"SHOW_RAY_SERVE={os.environ['SHOW_RAY_SERVE']}".encode()
    for folder in Path("/proc").glob("[0-9]*"):
        try:
            is_replica = b"ServeReplica" in (folder / "cmdline").read_bytes()
            if is_replica and mark in (folder / "environ").read_bytes():
                os.kill(int(folder.name), signal.SIGKILL)
                return
        except OSError:  # It has ended.
            continue
    raise SystemExit("no replica was found")


def ask_while_a_replica_is_replaced(count: int) -> None:
    """Print how many questions were answered while one replica was dead."""
    kill_a_replica()
    answered, failures = 0, []
    for number in range(count):
        try:
            with ask([{"role": "user", "content": f"{number}?"}], secrets.token_hex(8)):
                answered += 1
        except urllib.error.HTTPError as error:
            failures.append(error.code)
    print(
        f"replica killed: {answered} of {count} questions were answered; the others: {failures}",
        flush=True,
    )


def take_a_replica_away(example: ModuleType, serve: Any) -> None:
    """Print how many streams ended as they should while the second replica was taken away."""
    ended = []

    def stream(number: int) -> None:
        messages = [{"role": "user", "content": f"Tell me {number}."}]
        more = {"stream": True, "max_tokens": 600, "ignore_eos": True}
        with ask(messages, secrets.token_hex(8), **more) as answer:
            ended.append(b"[DONE]" in answer.read())

    threads = [threading.Thread(target=stream, args=(number,)) for number in range(8)]
    for thread in threads:
        thread.start()
    time.sleep(1)
    unfinished = sum(thread.is_alive() for thread in threads)
    serve.run(example.Replica.options(num_replicas=1).bind())
    for thread in threads:
        thread.join()
    print(
        f"replica taken away while {unfinished} answers streamed: {sum(ended)} of {len(threads)} "
        "ended as they should",
        flush=True,
    )


def wait_for_replicas(serve: Any, count: int) -> None:
    """Wait until so many replicas run, and the proxy knows them."""
    while True:
        (application,) = serve.status().applications.values()
        (deployment,) = application.deployments.values()
        if deployment.replica_states.get("RUNNING") == count:
            time.sleep(2)
            return
        time.sleep(0.5)


def main() -> None:
    """Start the application, and show each part."""
    os.environ |= {
        "RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": secrets.token_hex(32),
        "SHOW_RAY_SERVE": secrets.token_hex(8),
    }  # fmt: skip
    example = load_example()
    ray, serve = require("ray", extra="ray"), require("ray.serve", extra="ray")
    ray.cloudpickle.register_pickle_by_value(example)  # Replicas cannot import it.
    ray.init(num_cpus=2, log_to_driver=False, logging_level="ERROR")
    serve.run(example.Replica.bind())
    wait_for_replicas(serve, 2)
    with open_url("/v1/models") as answer:
        print("models:", [each["id"] for each in json.load(answer)["data"]], flush=True)
    homes = find_homes()
    hold_dialogues(homes, sticky=True, number=6)
    hold_dialogues(homes, sticky=False, number=6)
    ask_while_a_replica_is_replaced(20)
    wait_for_replicas(serve, 2)
    take_a_replica_away(example, serve)
    serve.shutdown()
    ray.shutdown()


if __name__ == "__main__":
    main()
