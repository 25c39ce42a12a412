"""llama.cpp's side of benchmarks/perplexity.py, run by the Python of its own environment.

Owns   the rounding by llama.cpp, and the losses that it computes.
Takes  on stdin, as JSON: a folder with model.gguf in float32, formats, and windows of ids; gives
       on stdout, as the last line, a list of formats with bits and perplexity.
"""

from __future__ import annotations

import json
import math
import os
import sys
from pathlib import Path
from typing import Any


def main() -> None:
    """Do the job."""
    job = json.load(sys.stdin)
    folder = Path(job["folder"])
    source = folder / "model.gguf"
    rows = [_judge("llama.cpp F32", source, job["windows"])]
    for name in job["formats"]:
        path = folder / f"{name}.gguf"
        _round(source, path, name)
        rows.append(_judge(f"llama.cpp {name}", path, job["windows"]))
        path.unlink()
    print()
    print(json.dumps(rows))


def _round(source: Path, path: Path, name: str) -> None:
    import llama_cpp

    settings = llama_cpp.llama_model_quantize_default_params()
    settings.ftype = getattr(llama_cpp, f"LLAMA_FTYPE_MOSTLY_{name}")
    settings.nthread = os.cpu_count() or 1
    if llama_cpp.llama_model_quantize(str(source).encode(), str(path).encode(), settings):
        sys.exit(f"llama.cpp could not make {path}.")


def _judge(name: str, path: Path, windows: list[list[int]]) -> dict[str, Any]:
    import llama_cpp
    import numpy

    model = llama_cpp.Llama(
        str(path), n_ctx=len(windows[0]), n_batch=len(windows[0]), logits_all=True, verbose=False
    )
    loss, num_ids = 0.0, 0
    for window in windows:
        model.reset()
        model.eval(window)
        logits = numpy.array(model.scores[: len(window) - 1], dtype=numpy.float64)
        highest = logits.max(axis=1)
        total = numpy.log(numpy.exp(logits - highest[:, None]).sum(axis=1)) + highest
        loss += float((total - logits[numpy.arange(len(total)), window[1:]]).sum())
        num_ids += len(total)
    return {"format": name, "bits": _count_bits(path), "perplexity": math.exp(loss / num_ids)}


def _count_bits(path: Path) -> float:
    """Bits a weight of the layers' matrices."""
    import gguf

    matrices = [
        each
        for each in gguf.GGUFReader(path).tensors
        if each.name.startswith("blk.") and len(each.shape) == 2
    ]
    num_bytes = sum(int(each.n_bytes) for each in matrices)
    return 8 * num_bytes / sum(int(each.n_elements) for each in matrices)


if __name__ == "__main__":
    main()
