"""The front door: light to open, and exactly the names that are promised."""

import re
import subprocess
import sys

import pytest

import minigpt4_runtime

PUBLIC_NAMES = [
    "BackendUnavailableError",
    "Box",
    "CheckpointError",
    "ConfigError",
    "EngineConfig",
    "ImageError",
    "ImageSource",
    "Message",
    "MiniGPT4",
    "MiniGPT4Error",
    "NextLogits",
    "PromptTooLongError",
    "Reply",
    "RequestError",
    "SamplingParams",
    "TextDelta",
    "Usage",
    "__version__",
    "follow",
    "image",
]
HEAVY = ["torch", "numpy", "PIL", "typer", "rich", "sentencepiece", "safetensors"]


def run_python(code: str) -> str:
    """What `code` prints in a fresh interpreter, where nothing else has imported anything."""
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=False, timeout=120
    )
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


def test_importing_the_package_loads_nothing_heavy() -> None:
    loaded = run_python(
        f"import minigpt4_runtime, sys\nprint(*(name for name in {HEAVY} if name in sys.modules))"
    )
    assert loaded == ""


def test_public_names_are_the_promised_ones() -> None:
    assert sorted(minigpt4_runtime.__all__) == PUBLIC_NAMES


@pytest.mark.parametrize("name", PUBLIC_NAMES)
def test_public_name_resolves(name: str) -> None:
    assert getattr(minigpt4_runtime, name) is not None


def test_dir_shows_the_public_names() -> None:
    assert set(PUBLIC_NAMES) <= set(dir(minigpt4_runtime))


def test_unknown_name_is_an_attribute_error() -> None:
    with pytest.raises(AttributeError, match="MiniGPT5"):
        minigpt4_runtime.MiniGPT5  # noqa: B018


def test_image_stays_a_function_and_triton_waits_for_its_kernel() -> None:
    """Loading a module sets its name on the package: it must not take a public name's place."""
    kind = run_python(
        "import minigpt4_runtime, sys\n"
        "minigpt4_runtime.MiniGPT4\n"
        "from minigpt4_runtime import image\n"
        "import minigpt4_runtime.devices.cuda\n"
        "print(type(image).__name__, type(minigpt4_runtime.image).__name__)\n"
        "print('triton' in sys.modules)"
    )
    assert kind.split() == ["function", "function", "False"]


def test_version_is_one_that_packages_may_have() -> None:
    assert re.fullmatch(r"\d+\.\d+\.\d+", minigpt4_runtime.__version__)
