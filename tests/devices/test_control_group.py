"""Limits of containers and services, as Linux writes them down."""

import sys

import pytest

from minigpt4_runtime.devices import cpu
from minigpt4_runtime.devices.control_group import allowed_memory_bytes

GIB = 2**30


@pytest.fixture
def machine(tmp_path):
    """A tree of groups; gives what is read of it."""

    def write(membership, groups):
        (tmp_path / "cgroup").write_text(membership, encoding="utf-8")
        for folder, files in groups.items():
            where = tmp_path / "groups" / folder
            where.mkdir(parents=True, exist_ok=True)
            for name, text in files.items():
                (where / name).write_text(f"{text}\n", encoding="ascii")
        return allowed_memory_bytes(tmp_path / "groups", tmp_path / "cgroup")

    return write


def second(limit, used, stat="anon 5"):
    return {"memory.max": limit, "memory.current": used, "memory.stat": stat}


def first(limit, used, stat="rss 5"):
    return {
        "memory.limit_in_bytes": limit, "memory.usage_in_bytes": used, "memory.stat": stat,
    }  # fmt: skip


def test_the_tightest_of_all_levels_counts(machine):
    groups = {
        "a.slice": second(8 * GIB, 7 * GIB),
        "a.slice/b.service": second(4 * GIB, GIB),
        "a.slice/b.service/inner": second("max", GIB),
    }
    assert machine("0::/a.slice/b.service/inner\n", groups) == GIB


def test_cached_files_are_free(machine):
    stat = f"inactive_file {GIB}\nactive_file {2 * GIB}\nfile {3 * GIB}"
    assert machine("0::/\n", {"": second(8 * GIB, 4 * GIB, stat)}) == 7 * GIB


def test_a_container_sees_its_own_group_at_the_top(machine):
    groups = {"memory": first(2 * GIB, GIB, f"total_inactive_file {GIB // 2}\ntotal_active_file 0")}
    membership = "5:devices:/docker/abc\n4:memory,hugetlb:/docker/abc\n0::/\n"
    assert machine(membership, groups) == 2 * GIB - GIB // 2


def test_nothing_is_left_where_more_is_used(machine):
    assert machine("0::/\n", {"": second(GIB, 2 * GIB)}) == 0


def test_no_limit(machine, tmp_path):
    assert machine("0::/a\n", {"a": second("max", GIB)}) is None
    assert machine("4:memory:/a\n", {"memory/a": first(2**63 - 4096, GIB)}) is None
    assert allowed_memory_bytes(tmp_path, tmp_path / "no such file") is None


@pytest.mark.skipif(sys.platform != "linux", reason="only Linux tells what is free")
def test_the_cpu_takes_no_more_than_it_is_allowed(monkeypatch):
    monkeypatch.setattr(cpu, "allowed_memory_bytes", lambda: 12345)
    assert cpu.CpuBackend().free_memory_bytes() == 12345
    monkeypatch.setattr(cpu, "allowed_memory_bytes", lambda: None)
    assert cpu.CpuBackend().free_memory_bytes() > 12345
