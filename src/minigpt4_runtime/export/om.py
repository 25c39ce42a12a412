"""The ONNX graph, compiled for Ascend NPUs by Ascend's compiler, atc.

Owns   atc's arguments, its run, and a script for another host with atc.
Takes  a folder that `export_onnx` made; puts atc.sh into it, and vision.om if atc is installed.
Never  removes the ONNX file, even if atc fails.
"""

import re
import shlex
import shutil
import subprocess
import tempfile
from collections.abc import Sequence
from pathlib import Path

from minigpt4_runtime.checkpoint.graph_folder import ATC_NAME, OM_NAME, ONNX_NAME
from minigpt4_runtime.checkpoint.writer import write_text
from minigpt4_runtime.config import VisionConfig
from minigpt4_runtime.errors import CheckpointError, ConfigError
from minigpt4_runtime.export.onnx import INPUT_NAME

_ONNX_FRAMEWORK = 5
_SCRIPT = """\
#!/bin/sh
# For an Ascend host, with the set_env.sh of its CANN toolkit sourced.
cd "$(dirname "$0")" && exec {command}
"""


def atc_command(
    config: VisionConfig, *, soc_version: str, batch_sizes: Sequence[int], output: str = "vision"
) -> list[str]:
    """The command that makes `output`.om, run in a folder with vision.onnx.

    Raises:
        ConfigError: `soc_version` is not a chip's name.
    """
    if not re.fullmatch(r"Ascend\w+", soc_version):
        raise ConfigError(
            f"soc version is {soc_version!r}; it must be a chip's name, as in Ascend910B3. "
            "`npu-smi info` shows it, without the Ascend."
        )
    is_single = len(batch_sizes) == 1
    shape = [batch_sizes[0] if is_single else -1, 3, config.image_size, config.image_size]
    command = [
        "atc",
        f"--framework={_ONNX_FRAMEWORK}",
        f"--model={ONNX_NAME}",
        f"--output={output}",
        "--input_format=NCHW",
        f"--input_shape={INPUT_NAME}:{','.join(map(str, shape))}",
        f"--soc_version={soc_version}",
    ]
    if not is_single:
        command.append(f"--dynamic_batch_size={','.join(map(str, batch_sizes))}")
    return command


def compile_om(graph_dir: Path, command: Sequence[str]) -> bool:
    """Write the command as a script, and run it if atc is on the PATH; return whether it ran.

    Raises:
        CheckpointError: atc failed; the ONNX graph and the script are still there.
    """
    script = _SCRIPT.format(command=shlex.join(command))
    write_text(graph_dir / ATC_NAME, script)
    if shutil.which("atc") is None:
        return False
    # atc writes temporary folders into its working directory.
    with tempfile.TemporaryDirectory(dir=graph_dir, prefix=".atc-") as name:
        work_dir = Path(name)
        for path in graph_dir.glob(f"{ONNX_NAME}*"):
            (work_dir / path.name).symlink_to(path.resolve())
        done = subprocess.run(
            command, cwd=work_dir, stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
            text=True, errors="replace", check=False,
        )  # fmt: skip
        made = work_dir / OM_NAME
        if done.returncode or not made.is_file():
            words = done.stdout.strip().splitlines()
            raise CheckpointError(
                f"atc ended with status {done.returncode} and made no {OM_NAME}"
                f"{f' ({words[-1]})' if words else ''}. {graph_dir / ONNX_NAME} is there; "
                f"{graph_dir / ATC_NAME} runs atc again."
            )
        made.rename(graph_dir / OM_NAME)
    return True
