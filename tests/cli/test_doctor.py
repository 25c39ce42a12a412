"""`minigpt4 doctor` and `minigpt4 models`: true on this machine, and when something is missing."""

import functools
import json
import os
import re
import subprocess
import sys
from types import SimpleNamespace

import pytest

from minigpt4_runtime import MiniGPT4
from minigpt4_runtime.cli.fetch import EXAMPLE_PATH
from minigpt4_runtime.devices.cpu import CpuBackend
from minigpt4_runtime.errors import CheckpointError
from minigpt4_runtime.hub import diagnosis
from minigpt4_runtime.kernels import native
from minigpt4_runtime.presets import PRESETS

pytestmark = pytest.mark.usefixtures("cache_home", "loaded_once")


@pytest.fixture(scope="module")
def loaded_once():
    """The model that the doctor tries is the same each time."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(MiniGPT4, "load", functools.cache(MiniGPT4.load))
        yield


def ask(real_minigpt4):
    shown = real_minigpt4("doctor", "--json")
    return shown.status, json.loads(shown.out)


def test_a_machine_that_can(real_minigpt4):
    status, found = ask(real_minigpt4)
    assert status == 0
    assert found["can_run"]
    checks = {check["name"]: check for check in found["checks"]}
    assert all(check["is_well"] for check in checks.values() if check["is_needed"])
    answer = MiniGPT4.load().describe(EXAMPLE_PATH).text
    assert checks["describe a picture"]["seen"] == answer
    assert "cpu" in [device["name"] for device in found["devices"]]
    hub = next(extra for extra in found["extras"] if extra["name"] == "hub")
    assert hub == {"name": "hub", "missing": [], "install": "pip install 'minigpt4-runtime[hub]'"}


def test_the_cpu_kernels_are_named_or_what_is_lost_without_them(monkeypatch):
    kernels = SimpleNamespace(levels=lambda: ("portable", "avx2"), level=lambda: "avx2")
    monkeypatch.setattr(native, "find", lambda: (kernels, ""))
    check = diagnosis._check_kernels()
    assert (check.is_well, check.seen) == (True, "chosen of portable, avx2: avx2")
    monkeypatch.setattr(native, "find", lambda: (None, "They are not here. Run: pip install them"))
    check = diagnosis._check_kernels()
    assert (check.is_well, check.is_needed) == (False, False)
    assert (check.seen, check.todo) == ("They are not here.", "Run: pip install them")


def test_what_fits_follows_from_the_memory(real_minigpt4, monkeypatch):
    monkeypatch.setattr(CpuBackend, "free_memory_bytes", lambda _: 20 * 2**30)
    _, found = ask(real_minigpt4)
    fits = {(fit["preset"], fit["weights"], fit["dtype"]) for fit in found["fits"]
            if fit["device"] == "cpu" and fit["fits"]}  # fmt: skip
    quantised = {(preset, weights, dtype) for preset in PRESETS for weights in ("w8a16", "w4a16")
                 for dtype in ("float32", "float16")}  # fmt: skip
    assert fits == quantised | {
        (preset, "float", dtype)
        for preset in ("vicuna-7b", "llama2-7b", "minigpt-v2")
        for dtype in ("float16", "bfloat16")
    }
    whole = next(fit for fit in found["fits"] if fit["preset"] == "vicuna-7b"
                 and (fit["weights"], fit["dtype"]) == ("w4a16", "float16"))  # fmt: skip
    context = PRESETS["vicuna-7b"].language.max_position_embeddings
    left = 20 * 2**30 - (whole["needed_bytes"] - context * 2**19)
    room = int(left * CpuBackend.facts.cache_share)
    assert whole["tokens"] == {
        "float16": room // 2**19, "int8": room // (264 * 2**10), "int4": room // (200 * 2**10),
    }  # fmt: skip


def test_what_is_read_by_people_says_the_same(real_minigpt4, monkeypatch):
    monkeypatch.setattr(CpuBackend, "free_memory_bytes", lambda _: 20 * 2**30)
    found = {"httpx2": []}
    monkeypatch.setattr(diagnosis.metadata, "distributions", lambda name: found.get(name, [name]))
    shown = real_minigpt4("doctor")
    assert shown.status == 0
    assert "ok    torch: 2." in shown.out
    assert "      cpu: 20.0 GiB free" in shown.out
    assert "no    vicuna-7b in float32: " in shown.out
    assert "ok    vicuna-7b in float16: " in shown.out
    assert "ok    vicuna-7b as w4a16 in float16: 5.8 GiB, on cpu; room for " in shown.out
    assert re.search(r"room for [\d,]+ tokens in float16, [\d,]+ tokens in int8", shown.out)
    assert "no    hub: pip install 'minigpt4-runtime[hub]'" in shown.out
    assert shown.out.endswith("Pictures can be described.\n")


def test_missing_packages_are_findings():
    """In a process of its own: nothing on the way to the doctor may need what it looks for."""
    code = (
        "import sys; sys.modules |= dict.fromkeys(['torch', 'numpy', 'PIL']);"
        "sys.argv = ['minigpt4', 'doctor']\n"
        "from minigpt4_runtime.cli.main import run; run()"
    )
    shown = subprocess.run([sys.executable, "-c", code], capture_output=True, encoding="utf-8")
    assert shown.returncode == 1, shown.stderr
    for package in ("torch", "numpy", "PIL"):
        assert f"FAIL  {package}: " in shown.stdout
    assert "Run: pip install minigpt4-runtime" in shown.stdout
    assert shown.stdout.endswith("Something is missing.\n")


def test_a_broken_package_is_a_finding(real_minigpt4, monkeypatch):
    def load(name):
        if name == "torch":
            raise OSError("libtorch_cpu.so: cannot open shared object file")

    monkeypatch.setattr(diagnosis.importlib, "import_module", load)
    status, found = ask(real_minigpt4)
    assert status == 1
    torch = next(check for check in found["checks"] if check["name"] == "torch")
    assert "libtorch_cpu.so" in torch["seen"]
    assert "installed but broken" in torch["todo"]


def test_a_package_that_lacks_a_module_of_its_own(real_minigpt4, monkeypatch):
    def load(name):
        if name == "numpy":
            raise ModuleNotFoundError("No module named 'numpy._core'", name="numpy._core")

    monkeypatch.setattr(diagnosis.importlib, "import_module", load)
    _, found = ask(real_minigpt4)
    numpy = next(check for check in found["checks"] if check["name"] == "numpy")
    assert numpy["todo"] == "Run: pip install --force-reinstall numpy"


def test_a_package_under_another_name_is_no_fault(real_minigpt4, monkeypatch):
    monkeypatch.setitem(diagnosis._INSTALLED_AS, "PIL", "not-installed-by-that-name")
    status, found = ask(real_minigpt4)
    assert status == 0
    pillow = next(check for check in found["checks"] if check["name"] == "PIL")
    assert pillow["seen"] == "here, though not installed as not-installed-by-that-name"


def test_a_model_that_does_not_answer_is_a_finding(real_minigpt4, monkeypatch):
    def fail(*_, **__):
        raise CheckpointError("assets/demo has no config.json.")

    monkeypatch.setattr(MiniGPT4, "load", fail)
    status, found = ask(real_minigpt4)
    assert status == 1
    assert "no config.json" in str(found["checks"])
    seen = "CheckpointError: assets/demo has no config.json"
    todo = "Install the package again; if that does not help, report what `minigpt4 demo --debug`"
    assert f"FAIL  describe a picture: {seen}. {todo}" in real_minigpt4("doctor").out


def test_a_cache_that_cannot_be_written_is_worth_a_note(real_minigpt4, monkeypatch, tmp_path):
    (tmp_path / "file").touch()
    monkeypatch.setenv("MINIGPT4_HOME", str(tmp_path / "file" / "home"))
    shown = real_minigpt4("doctor")
    assert shown.status == 0
    assert "note  cache: " in shown.out
    assert "Set MINIGPT4_HOME" in shown.out


@pytest.mark.skipif(os.name != "posix", reason="~user as Unix has it")
def test_a_cache_in_nobodys_home_is_worth_a_note(real_minigpt4, monkeypatch):
    monkeypatch.setenv("MINIGPT4_HOME", "~no-such-user/home")
    shown = real_minigpt4("doctor")
    assert shown.status == 0
    assert "note  cache: no user's home is known. Set MINIGPT4_HOME" in shown.out


def test_a_cache_that_cannot_be_read_is_worth_a_note(real_minigpt4, monkeypatch, cache_home):
    def refuse():
        raise PermissionError(13, "Permission denied", "home/models")

    monkeypatch.setattr(diagnosis.shelf, "list_models", refuse)
    shown = real_minigpt4("doctor")
    assert shown.status == 0
    seen = f"{cache_home} cannot be read and written (Permission denied)"
    assert f"note  cache: {seen}. Set MINIGPT4_HOME" in shown.out


def test_models_of_an_empty_cache(real_minigpt4, cache_home):
    shown = real_minigpt4("models")
    assert (shown.status, shown.out) == (0, "")
    assert "Get one: minigpt4 fetch vicuna-7b" in shown.err
    listed = json.loads(real_minigpt4("models", "--json").out)
    assert listed == {"home": str(cache_home), "models": [], "downloads_bytes": 0}
    shown = real_minigpt4("models", "--delete", "vicuna-7b")
    assert shown.status == 1
    assert "there is nothing" in shown.err


def test_models_are_listed_and_deleted(real_minigpt4, cache_home, golden_model_dir):
    (cache_home / "models").mkdir(parents=True)
    (cache_home / "models" / "mine").symlink_to(golden_model_dir("vicuna"))
    assert real_minigpt4("models").out.startswith("mine\t3.5 MiB\t")
    (entry,) = json.loads(real_minigpt4("models", "--json").out)["models"]
    assert entry["name"] == "mine"
    assert "mine (3.5 MiB, context of 2048 tokens)" in real_minigpt4("doctor").out
    # A link is taken away, and not what it leads to.
    shown = real_minigpt4("models", "--delete", "mine")
    assert (shown.status, shown.err) == (0, "mine is deleted: 0 bytes are free again.\n")
    assert real_minigpt4("models").out == ""
    assert (golden_model_dir("vicuna") / "config.json").exists()
