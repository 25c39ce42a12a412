"""The memory that a container or a service may still take, by Linux's control groups.

Owns   the reading of their limits, of both versions (man 7 cgroups).
Takes  nothing; gives bytes, or None where nothing is limited.
Never  changes a limit.
"""

from collections.abc import Iterator
from pathlib import Path, PurePosixPath

# Version 1 writes a number beyond this one where there is no limit.
_NO_LIMIT = 2**60


def allowed_memory_bytes(
    root: Path = Path("/sys/fs/cgroup"), membership: Path = Path("/proc/self/cgroup")
) -> int | None:
    """The rest of the tightest limit of this process's groups. Cached files count as free."""
    try:
        lines = membership.read_text(encoding="utf-8").splitlines()
    except OSError:
        return None
    left: list[int] = []
    for line in lines:
        _, controllers, group = line.split(":", 2)
        if not controllers:
            left += _read_left(root, group, "memory.max", "memory.current", "")
        elif "memory" in controllers.split(","):
            names = ("memory.limit_in_bytes", "memory.usage_in_bytes", "total_")
            left += _read_left(root / "memory", group, *names)
    return min(left, default=None)


def _read_left(root: Path, group: str, limit: str, usage: str, prefix: str) -> Iterator[int]:
    """The rest in a group and in each above it. A container sees only the uppermost ones."""
    path = PurePosixPath(group.lstrip("/"))
    for folder in (root / each for each in (path, *path.parents)):
        try:
            limit_bytes = int((folder / limit).read_text(encoding="ascii"))  # "max" is none.
            used_bytes = int((folder / usage).read_text(encoding="ascii"))
            words = (folder / "memory.stat").read_text(encoding="ascii").split()
        except (OSError, ValueError):
            continue
        stat = dict(zip(words[::2], words[1::2], strict=False))
        cached = (int(stat.get(f"{prefix}{kind}_file", 0)) for kind in ("inactive", "active"))
        if limit_bytes < _NO_LIMIT:
            yield max(0, limit_bytes - max(0, used_bytes - sum(cached)))
