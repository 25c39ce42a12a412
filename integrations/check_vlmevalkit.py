"""Ask the demo model through VLMEvalKit's own base class: `check_vlmevalkit.py CHECKOUT`.

Owns   the stubs of what that class imports and does not need here: data sets and file types.
"""

from __future__ import annotations

import importlib.util
import mimetypes
import sys
import types
from pathlib import Path


def parse_file(value: str) -> tuple[str | None, str]:
    """The kind and the path of a file; None for a text."""
    return (mimetypes.guess_type(value)[0] if Path(value).is_file() else None), value


def main(checkout: Path) -> None:
    """Load `vlmeval/vlm/base.py` of the checkout, and print an answer."""
    for name in ("vlmeval", "vlmeval.vlm", "vlmeval.dataset", "vlmeval.smp"):
        sys.modules[name] = types.ModuleType(name)
    sys.modules["vlmeval.dataset"].DATASET_TYPE = str  # type: ignore[attr-defined]
    for unused in ("concat_images_vlmeval", "encode_image_to_base64", "listinstr"):
        setattr(sys.modules["vlmeval.smp"], unused, None)
    sys.modules["vlmeval.smp"].parse_file = parse_file  # type: ignore[attr-defined]
    path = checkout / "vlmeval" / "vlm" / "base.py"
    spec = importlib.util.spec_from_file_location("vlmeval.vlm.base", path)
    assert spec is not None, "a .py file has a loader"
    assert spec.loader is not None, "a .py file has a loader"
    base = importlib.util.module_from_spec(spec)
    sys.modules["vlmeval.vlm.base"] = base
    spec.loader.exec_module(base)

    from vlmevalkit_model import MiniGPT4Runtime

    import minigpt4_runtime

    picture = Path(minigpt4_runtime.__file__).parent / "assets" / "example.png"
    answer = MiniGPT4Runtime().generate([str(picture), "Describe this image."])
    print(answer)  # noqa: T201 - what it is for.


if __name__ == "__main__":
    main(Path(sys.argv[1]))
