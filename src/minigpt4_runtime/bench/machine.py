"""The machine that a number was measured on.

Owns   the names of processor and device, the versions, and the sizes of memory.
Takes  what the system reports; facts that it does not report are left out.
"""

import os
import platform
import re
from pathlib import Path

import torch

from minigpt4_runtime import __version__

GIB = 2**30


def machine_facts(device: str) -> dict[str, str]:
    """The facts that a reader needs before comparing two numbers."""
    facts = {"processor": processor_name()}
    if device != "cpu":
        module = getattr(torch, torch.device(device).type)
        facts["device"] = f"{device}: {module.get_device_name(torch.device(device))}"
    facts |= {
        "cores": f"{os.cpu_count()}, of which torch uses {torch.get_num_threads()}",
        "system": f"{platform.system()} {platform.machine()}, Python {platform.python_version()}",
        "versions": f"minigpt4-runtime {__version__}, torch {torch.__version__}",
    }
    if (memory := _meminfo("MemTotal")) is not None:
        facts["memory"] = f"{memory / GIB:.0f} GiB"
    return facts


def processor_name() -> str:
    """The CPU's name, or its architecture where the system does not report a name."""
    name = _search("/proc/cpuinfo", r"^model name\s*:\s*(.+)$")
    return name or platform.processor() or platform.machine()


def available_memory_bytes() -> int | None:
    """Memory available without swapping; None where the system does not report it."""
    return _meminfo("MemAvailable")


def _meminfo(name: str) -> int | None:
    """A number of /proc/meminfo in bytes."""
    found = _search("/proc/meminfo", rf"^{name}:\s*(\d+) kB$")
    return int(found) * 1024 if found else None


def _search(path: str, pattern: str) -> str | None:
    """The pattern's group in a file that only Linux has."""
    try:
        found = re.search(pattern, Path(path).read_text(encoding="utf-8"), flags=re.MULTILINE)
    except OSError:
        return None
    return found[1] if found else None
