"""Stand-ins for Ascend's atc and ais_bench, which hold their callers to what the real ones demand.

As a script it is atc: it notes its arguments and "compiles" a graph by keeping the ONNX file behind
them. `InferSession` runs such a file through ONNX Runtime, with the batches it was made for alone.
"""

import json
import os
import stat
import sys
import types
from pathlib import Path

SOC_VERSION = "Ascend910B3"


def install_atc(folder: Path, *, fails: bool = False) -> Path:
    """Put an executable `atc` into `folder`, for the PATH."""
    folder.mkdir(exist_ok=True)
    atc = folder / "atc"
    what = "print('E40021: no such chip'); sys.exit(7)" if fails else "ascend.compile_graph()"
    atc.write_text(
        f"#!{sys.executable}\nimport sys\nsys.path.insert(0, {str(Path(__file__).parent)!r})\n"
        f"import ascend\n{what}\n"
    )
    atc.chmod(atc.stat().st_mode | stat.S_IXUSR)
    return folder


def compile_graph() -> None:
    options = dict(argument.removeprefix("--").split("=", 1) for argument in sys.argv[1:])
    assert options["framework"] == "5"
    assert options["input_format"] == "NCHW"
    assert options["soc_version"] == SOC_VERSION
    graph = Path(options["model"]).read_bytes()
    Path("kernel_meta").mkdir()  # The real one leaves such things where it runs.
    words = json.dumps(options).encode()
    Path(f"{options['output']}.om").write_bytes(words + b"\n" + graph)
    print("ATC run success")


def read_options(om_path: Path) -> dict[str, str]:
    return json.loads(om_path.read_bytes().split(b"\n", 1)[0])


class InferSession:
    def __init__(self, device_id: int, model_path: str) -> None:
        import onnxruntime

        assert isinstance(device_id, int)
        assert isinstance(model_path, str)
        assert model_path.endswith(".om")
        words, graph = Path(model_path).read_bytes().split(b"\n", 1)
        options = json.loads(words)
        self._shape = [int(n) for n in options["input_shape"].split(":")[1].split(",")]
        sizes = options.get("dynamic_batch_size")
        self._sizes = [int(size) for size in sizes.split(",")] if sizes else self._shape[:1]
        self._mode = "dymbatch" if sizes else "static"
        quiet = onnxruntime.SessionOptions()
        quiet.log_severity_level = 3
        self._session = onnxruntime.InferenceSession(graph, quiet)

    def infer(self, feeds, mode="static"):
        (pixels,) = feeds
        assert mode == self._mode
        assert pixels.dtype.name == "float32"
        assert pixels.flags["C_CONTIGUOUS"]
        assert len(pixels) in self._sizes
        assert list(pixels.shape[1:]) == self._shape[1:]
        return self._session.run(None, {self._session.get_inputs()[0].name: pixels})


def install_ais_bench(monkeypatch) -> None:
    for name in ("ais_bench", "ais_bench.infer", "ais_bench.infer.interface"):
        monkeypatch.setitem(sys.modules, name, types.ModuleType(name))
    sys.modules["ais_bench.infer.interface"].InferSession = InferSession


def put_on_path(monkeypatch, folder: Path) -> None:
    monkeypatch.setenv("PATH", f"{folder}{os.pathsep}{os.environ['PATH']}")
