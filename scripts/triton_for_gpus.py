"""All Triton kernels that a 7B launches, compiled for GPUs that are not there.

python scripts/triton_for_gpus.py [--capabilities 80,90] [--quick]

A language model of 7B's widths takes steps on torch's device without numbers, in several formats of
weights and of the cache. Each launch is compiled for what it is given, as Triton does it on a GPU,
down to machine code, and nothing is launched. Printed are the registers of a thread, what spills
from them to memory, and the shared memory of a program: those of the largest number in each row.

It needs Triton, and no GPU. A compiler's error ends it.
"""

from __future__ import annotations

import argparse
import re
import subprocess
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from pkgutil import resolve_name
from types import SimpleNamespace
from typing import Any, Literal

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.runtime import driver
from triton.runtime.jit import JITFunction, KernelInterface

from minigpt4_runtime import SamplingParams
from minigpt4_runtime.checkpoint.blank_model import blank_model, dtype_of, list_parts
from minigpt4_runtime.checkpoint.joining import make_room
from minigpt4_runtime.config import CacheDTypeName, EngineConfig
from minigpt4_runtime.engine.plan import Slice, StepPlan
from minigpt4_runtime.engine.runner import Runner
from minigpt4_runtime.formats.contracts import LinearKernel, WeightFormat
from minigpt4_runtime.kernels import launching
from minigpt4_runtime.kernels.contracts import Lots
from minigpt4_runtime.kernels.registry import (
    LINEAR_KERNELS,
    ROW_CHOICES,
    ROW_OPERATIONS,
    attention_kernel,
)
from minigpt4_runtime.model.linear import settle
from minigpt4_runtime.model.row_operations import use_operations
from minigpt4_runtime.presets import PRESETS

META = torch.device("meta")
FORMATS = (
    "float", "w8a16", "w8a16-g128", "w8a8", "w8a8-g128", "w4a16-g32", "w4a16-g128",
    "w4a16-g128-asymmetric", "w4a8-g128", "w4a8-g32", "w8a16-sparse24", "w8a8-sparse24", "w8a8-fp8",
)  # fmt: skip
CACHES: tuple[CacheDTypeName | Literal["auto"], ...] = ("auto", "int8", "int4", "fp8")
DECODES, PROMPT = (1, 8, 64, 128), 512
FLOAT8_FROM, OVERLAP_FROM = 89, 90
CUOBJDUMP = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
# What a GPU of this capability gives a program at most: KiB of shared memory.
MOST_SHARED = {80: 163, 86: 99, 89: 99, 90: 227}


@dataclass
class Launches:
    """What was compiled: by the name of a kernel, the machine code of each variant."""

    compiled: dict[str, dict[int, Any]] = field(default_factory=dict)

    def compile(self, kernel: JITFunction, grid: Any, *args: Any, **sizes: Any) -> None:
        """In place of a launch."""
        made = kernel.run(*args, grid=grid, warmup=True, **sizes)
        self.compiled.setdefault(kernel.fn.__name__.strip("_"), {})[id(made)] = made


@contextmanager
def gpu_of(capability: int) -> Iterator[Launches]:
    """Triton believes in a GPU of this capability, and compiles for it in place of launching."""
    launches = Launches()
    launching.can_overlap = lambda _: capability >= OVERLAP_FROM  # type: ignore[assignment]
    # What has no kernels for 8-bit floats is not asked for them.
    torch.cuda.get_device_capability = lambda *_: (9, 0)
    stand_in = SimpleNamespace(
        get_current_device=lambda: capability, get_current_stream=lambda _: 0,
        get_current_target=lambda: GPUTarget("cuda", capability, 32),
    )  # fmt: skip
    launch = KernelInterface.__getitem__
    driver.set_active(stand_in)
    KernelInterface.__getitem__ = lambda self, grid: partial(launches.compile, self, grid)
    try:
        yield launches
    finally:
        KernelInterface.__getitem__ = launch


def product(chosen: WeightFormat) -> LinearKernel:
    """The kernel that CUDA has for a format."""
    target = LINEAR_KERNELS.get((chosen.family, "cuda"))
    return resolve_name(target)(None) if target else chosen.multiply


def step_of(batch: int, num_rows: int) -> StepPlan:
    """A step of sequences with so many new tokens each, behind three of their own."""
    return StepPlan(
        tuple(
            Slice(row, 0, 3, (5,) * num_rows, row, 0, tuple(range(40)), num_sampled=1)
            for row in range(batch)
        )
    )


def take_steps(
    dtype: torch.dtype, *, weights: str, cache: CacheDTypeName | Literal["auto"], quick: bool
) -> None:
    """Decode in several sizes, and a prompt. Torch's own operations have no numbers."""
    config = PRESETS["llama2-7b"]
    config = replace(config, language=replace(config.language, num_hidden_layers=1))
    language = blank_model(config, formats={"language": weights}, kernel_of=product).language
    parts = list_parts(language).items()
    language.load_state_dict(
        {n: torch.empty(p.shape, dtype=dtype_of(p, dtype), device=META) for n, p in parts}
        | make_room(language, device=META, dtype=dtype),
        assign=True,
    )
    settle(language)
    use_operations(language, resolve_name(ROW_OPERATIONS["cuda"])())
    engine = EngineConfig(max_running=128, max_step_tokens=2048, cache_dtype=cache)
    runner = Runner(language, None, attention_kernel("triton"), config=engine, num_blocks=128)
    for batch in DECODES[-2:] if quick else DECODES:
        runner.execute(step_of(batch, 1), {})
    runner.execute(step_of(1, PROMPT), {})


def choose_ids() -> None:
    """Of 64 rows, the best and drawn ones."""
    choice = resolve_name(ROW_CHOICES["cuda"])()
    logits = torch.empty(64, PRESETS["llama2-7b"].language.vocab_size, device=META)
    choice.best(logits)
    choice.draw(logits, Lots((SamplingParams(temperature=1.0),) * 64, (0,) * 64))


def compile_all(capability: int, *, quick: bool) -> Launches:
    """All variants for a GPU."""
    has_float8 = capability >= FLOAT8_FROM
    with gpu_of(capability) as launches:
        choose_ids()
        for dtype in (torch.float16,) if quick else (torch.float16, torch.bfloat16):
            for cache in CACHES[:1] if quick else CACHES:
                if cache != "fp8" or has_float8:
                    take_steps(dtype, weights="float", cache=cache, quick=quick)
            for name in FORMATS[1::4] if quick else FORMATS[1:]:
                if not name.endswith("fp8") or has_float8:
                    take_steps(dtype, weights=name, cache="auto", quick=quick)
    return launches


def registers_of(machine_code: bytes) -> tuple[int, int]:
    """A thread's registers, and the bytes that it spills to memory."""
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(machine_code)
        file.flush()
        command = [str(CUOBJDUMP), "--dump-resource-usage", file.name]
        done = subprocess.run(command, capture_output=True, text=True, check=True)
    found = dict(re.findall(r"\b(REG|STACK):(\d+)", done.stdout))
    return int(found["REG"]), int(found["STACK"])


def table(capability: int, launches: Launches) -> Iterator[str]:
    """A row for each kernel."""
    head = "variants | threads | registers | spilled bytes | shared KiB"
    yield f"| kernel, {capability / 10} | {head} |"
    yield "|---|---|---|---|---|---|"
    for name, variants in sorted(launches.compiled.items()):
        used = [registers_of(each.asm["cubin"]) for each in variants.values()]
        threads = {32 * each.metadata.num_warps for each in variants.values()}
        shared = max(each.metadata.shared for each in variants.values()) / 1024
        spills = [stack for _, stack in used if stack]
        cells = (
            name, len(variants), ", ".join(map(str, sorted(threads))), max(r for r, _ in used),
            f"{max(spills)} in {len(spills)}" if spills else "0", f"{shared:.0f}",
        )  # fmt: skip
        yield "| " + " | ".join(map(str, cells)) + " |"
        if shared > MOST_SHARED[capability]:
            raise SystemExit(f"{name} takes more shared memory than a GPU of {capability} has.")


def main() -> None:
    """Print a table for each capability."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--capabilities", default="80,90", help="of 80, 86, 89, 90")
    parser.add_argument("--quick", action="store_true", help="a few of the variants")
    args = parser.parse_args()
    # There is no memory to pin without CUDA, and nothing is sent.
    torch.Tensor.pin_memory = torch.Tensor.detach  # type: ignore[assignment]
    for capability in map(int, args.capabilities.split(",")):
        print(*table(capability, compile_all(capability, quick=args.quick)), sep="\n")


if __name__ == "__main__":
    main()
