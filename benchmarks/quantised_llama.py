"""llama.cpp's side of quantised.py and long_decode.py, run by the Python of its own environment.

Owns   a GGUF file of 7B's widths with random weights, its rounding, and the clock around decoding.
Takes  on stdin, one JSON object a line: first {"folder", "layers", "format", "threads"}, with
       "context" and "cache", the type of keys and values, unless they are 2048 and F16; then works
       {"prompts": [lengths], "new": count}; answers each with a line of seconds.
"""

from __future__ import annotations

import ctypes
import json
import os
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import llama_cpp as llama
import numpy

WIDTH, GATED, HEADS, VOCABULARY = 4096, 11008, 32, 32000
CONTEXT = 2048
MATRICES = {
    "attn_q": (WIDTH, WIDTH), "attn_k": (WIDTH, WIDTH), "attn_v": (WIDTH, WIDTH),
    "attn_output": (WIDTH, WIDTH), "ffn_gate": (GATED, WIDTH), "ffn_up": (GATED, WIDTH),
    "ffn_down": (WIDTH, GATED),
}  # fmt: skip


# Here, so that it lives as long as the library calls it.
@llama.llama_log_callback  # type: ignore[untyped-decorator]
def _say_nothing(*_: Any) -> None:
    """Drop a line of the library's log."""


def write_random(path: Path, num_layers: int) -> None:
    """A Llama in float16. All layers have the same numbers, which costs no speed."""
    import gguf

    rng = numpy.random.default_rng(0)

    def draw(*shape: int) -> Any:
        return (rng.standard_normal(shape, dtype=numpy.float32) * 0.02).astype(numpy.float16)

    writer = gguf.GGUFWriter(path, "llama")
    writer.add_context_length(CONTEXT)
    writer.add_embedding_length(WIDTH)
    writer.add_feed_forward_length(GATED)
    writer.add_block_count(num_layers)
    writer.add_head_count(HEADS)
    writer.add_head_count_kv(HEADS)
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_rope_dimension_count(WIDTH // HEADS)
    writer.add_vocab_size(VOCABULARY)
    writer.add_tokenizer_model("no_vocab")
    ones = numpy.ones(WIDTH, numpy.float32)
    writer.add_tensor("token_embd.weight", draw(VOCABULARY, WIDTH))
    writer.add_tensor("output.weight", draw(VOCABULARY, WIDTH))
    writer.add_tensor("output_norm.weight", ones)
    layer = {name: draw(*shape) for name, shape in MATRICES.items()}
    for index in range(num_layers):
        for name, weight in layer.items():
            writer.add_tensor(f"blk.{index}.{name}.weight", weight)
        for name in ("attn_norm", "ffn_norm"):
            writer.add_tensor(f"blk.{index}.{name}.weight", ones)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def rounded(folder: Path, num_layers: int, name: str) -> Path:
    """The file in a format, made where it is not there yet. The head is rounded as the layers."""
    path = folder / f"{num_layers}-{name}.gguf"
    if not path.exists():
        source = folder / f"{num_layers}-F16.gguf"
        if not source.exists():
            write_random(source, num_layers)
        settings = llama.llama_model_quantize_default_params()
        settings.ftype = getattr(llama, f"LLAMA_FTYPE_MOSTLY_{name}")
        settings.nthread = os.cpu_count() or 1
        settings.pure = True
        if llama.llama_model_quantize(str(source).encode(), str(path).encode(), settings):
            sys.exit(f"llama.cpp could not make {path}.")
    return path


class Rival:
    """A model of llama.cpp, asked through its C interface."""

    def __init__(self, path: Path, num_threads: int, *, context: int, cache: str) -> None:
        self._model = llama.llama_model_load_from_file(
            str(path).encode(), llama.llama_model_default_params()
        )
        settings = llama.llama_context_default_params()
        settings.n_ctx = settings.n_batch = context
        settings.type_k = settings.type_v = getattr(llama, f"GGML_TYPE_{cache}")
        if cache != "F16":
            settings.flash_attn_type = llama.LLAMA_FLASH_ATTN_TYPE_ENABLED
        settings.n_ubatch = 512
        settings.n_seq_max = 8
        settings.kv_unified = True
        settings.n_threads = settings.n_threads_batch = num_threads
        self._context = llama.llama_init_from_model(self._model, settings)
        self._batch = llama.llama_batch_init(context, 0, 1)

    def _decode(self, rows: list[tuple[int, int, bool]]) -> None:
        """Compute rows of (position, sequence, whether its logits are wanted)."""
        batch = self._batch
        batch.n_tokens = len(rows)
        for index, (position, sequence, is_wanted) in enumerate(rows):
            batch.token[index] = 3 + (position * 7919 + sequence) % (VOCABULARY - 3)
            batch.pos[index] = position
            batch.n_seq_id[index] = 1
            batch.seq_id[index][0] = sequence
            batch.logits[index] = is_wanted
        if llama.llama_decode(self._context, batch):
            sys.exit("llama.cpp could not decode.")

    def run(self, prompts: list[int], new: int) -> dict[str, float]:
        """Seconds until the first new token of all, and for the others."""
        llama.llama_memory_clear(llama.llama_get_memory(self._context), True)
        started = time.perf_counter()
        self._decode([
            (position, sequence, position == length - 1)
            for sequence, length in enumerate(prompts)
            for position in range(length)
        ])  # fmt: skip
        first = time.perf_counter()
        for step in range(new - 1):
            self._decode([(each + step, sequence, True) for sequence, each in enumerate(prompts)])
        return {"first": first - started, "others": time.perf_counter() - first}


def jobs() -> Iterator[dict[str, Any]]:
    """The lines of stdin."""
    for line in sys.stdin:
        yield json.loads(line)


def main() -> None:
    """Serve the works of one format."""
    llama.llama_log_set(_say_nothing, ctypes.c_void_p(0))
    lines = jobs()
    wanted = next(lines)
    path = rounded(Path(wanted["folder"]), wanted["layers"], wanted["format"])
    rival = Rival(
        path, wanted["threads"],
        context=wanted.get("context", CONTEXT), cache=wanted.get("cache", "F16"),
    )  # fmt: skip
    print(json.dumps({"bytes": path.stat().st_size}), flush=True)
    for work in lines:
        print(json.dumps(rival.run(work["prompts"], work["new"])), flush=True)


if __name__ == "__main__":
    main()
