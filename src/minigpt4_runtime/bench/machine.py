"""On what a number was measured.

Owns   the names of processor and device, the versions, and how much memory is there.
Takes  nothing but what the system tells; what it does not tell is left out.
Never  measures.
"""

from __future__ import annotations

import os
import platform
import re
from pathlib import Path

import torch

from minigpt4_runtime import __version__

GIB = 2**30


def machine_facts(device: str) -> dict[str, str]:
    """What a reader must know before comparing two numbers."""
    facts = {"processor": processor_name()}
    if device != "cpu":
        facts["device"] = f"{device}: {_device_name(device)}"
    facts |= {
        "cores": f"{os.cpu_count()}, of which torch uses {torch.get_num_threads()}",
        "system": f"{platform.system()} {platform.machine()}, Python {platform.python_version()}",
        "versions": f"minigpt4-runtime {__version__}, torch {torch.__version__}",
    }
    if (memory := _meminfo("MemTotal")) is not None:
        facts["memory"] = f"{memory / GIB:.0f} GiB"
    return facts


def processor_name() -> str:
    """The CPU's name, as far as this system tells it."""
    lines = Path("/proc/cpuinfo")
    if lines.exists():
        for line in lines.read_text("utf-8").splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()


def available_memory_bytes() -> int | None:
    """What this machine can give before it swaps; None where it does not say."""
    return _meminfo("MemAvailable")


def _meminfo(name: str) -> int | None:
    """A number of /proc/meminfo, which only Linux has, in bytes."""
    try:
        text = Path("/proc/meminfo").read_text(encoding="ascii")
    except OSError:
        return None
    found = re.search(rf"^{name}:\s*(\d+) kB$", text, flags=re.MULTILINE)
    return int(found[1]) * 1024 if found else None


def _device_name(device: str) -> str:
    module = getattr(torch, torch.device(device).type)
    return str(module.get_device_name(torch.device(device)))
