"""Where Triton's kernels run in tests, and what compiles them for GPUs that are not there."""

import os
import subprocess
import sys
from dataclasses import replace
from functools import cache
from pathlib import Path

import numpy
import pytest
import torch

# Under Triton's interpreter, and on a GPU.
PLACES = ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)]

COMPILE = """
import re
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

def compile_for(capability, kernel, types, sizes, divisible=()):
    # Some arguments 16 divides, as a launch finds it.
    if "OVERLAPS" in kernel.arg_names:
        sizes = sizes | {"OVERLAPS": capability >= 90}
    launch = {name: sizes.pop(name) for name in ("num_warps", "num_stages") if name in sizes}
    names = kernel.arg_names
    signature = {name: "constexpr" if name in sizes else types[name] for name in names}
    divisible = set(divisible) - set(sizes)
    attrs = {(names.index(name),): [["tt.divisibility", 16]] for name in divisible}
    source = ASTSource(fn=kernel, signature=signature, constexprs=sizes, attrs=attrs)
    made = triton.compile(source, target=GPUTarget("cuda", capability, 32), options=launch)
    if sizes.get("OVERLAPS"):
        before, wait, after = made.asm["ptx"].partition("griddepcontrol.wait")
        access = r"(ld|st|atom|red)\\S*[.]global|cp[.]async[.]c"
        assert wait and re.search(access, after), "it waits for nothing"
        assert not re.search(access, before), "it reads or writes before it waits"
        # Nor does the assembler move any of that to the front. ACQBULK is what it calls the wait.
        before, wait, after = made.asm["sass"].partition("ACQBULK")
        access = r"\\b(LD|ST|LDG|STG|LDGSTS|ATOM|ATOMG|RED)\\b"
        assert wait and re.search(access, after) and not re.search(access, before)
    return made
"""


def skip_unless_interpreted() -> None:
    pytest.importorskip("triton", reason="triton is not installed")
    if os.environ.get("TRITON_INTERPRET") != "1":
        pytest.skip("TRITON_INTERPRET is not set: here Triton's kernels run on the GPU")
    hasten_interpreter()


@cache
def hasten_interpreter() -> None:
    """Let Triton's interpreter leave out what changes nothing: half of its time.

    It puts its own functions into `triton.language` for a launch, and again for each call of a
    function within. It makes a table of dtypes whenever it reads one. It computes whether integers
    overflow, and says nothing where they do.
    """
    interpreter = pytest.importorskip("triton.runtime.interpreter", reason="no Triton here")
    language, patch = interpreter.tl, interpreter._patch_lang
    find_dtype, dtypes = interpreter._get_np_dtype, {}

    def patch_once(function):
        places = [
            each for each in function.__globals__.values() if each in (language, language.core)
        ]
        if any(language.core.is_builtin(each.load) for each in places):
            return patch(function)
        return interpreter._LangPatchScope()

    def find_once(dtype):
        if dtype.name not in dtypes:
            dtypes[dtype.name] = find_dtype(dtype)
        return dtypes[dtype.name]

    interpreter._patch_lang, interpreter._get_np_dtype = patch_once, find_once
    builder = interpreter.interpreter_builder
    builder.options = replace(builder.options, sanitize_overflow=builder.options.debug)


def need_fewer_programs(monkeypatch) -> None:
    """Let attention cut the contexts of few sequences only, and join several shares in turns."""
    sizes = {"_WANTED_PROGRAMS": 64, "_SHARES_AT_ONCE": 4}
    for name, size in sizes.items():
        monkeypatch.setattr(f"minigpt4_runtime.kernels.attention_triton.{name}", size)


def mend_rounding(monkeypatch) -> None:
    """Let Triton's interpreter round to bfloat16 and float8 as GPUs and torch do.

    Its own way cuts bfloat16 off, and loses the carry of a float8 that rounds up to a power of two.
    """
    interpreter = pytest.importorskip("triton.runtime.interpreter", reason="no Triton here")
    dtypes = {
        "fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16,
        "fp8e4nv": torch.float8_e4m3fn,
    }  # fmt: skip
    bits = {1: torch.uint8, 2: torch.int16, 4: torch.int32}

    def convert(numbers, before, after, rounding_mode):
        held = torch.from_numpy(numpy.ascontiguousarray(numbers)).view(dtypes[str(before)])
        found = held.to(dtypes[str(after)])
        return found.view(bits[found.itemsize]).numpy()

    monkeypatch.setattr(interpreter, "_convert_float", convert)


def run_compiler(program: str, cache_dir: Path) -> None:
    """Run a program that has `compile_for`: in a process of its own, since Triton is either.

    The compiler refuses what the interpreter lets pass; it needs no GPU.
    """
    pytest.importorskip("triton", reason="triton is not installed")
    env = os.environ | {"TRITON_INTERPRET": "0", "TRITON_CACHE_DIR": str(cache_dir)}
    subprocess.run([sys.executable, "-c", COMPILE + program], check=True, env=env)
