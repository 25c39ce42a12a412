"""Run the steps of a Containerfile without a container engine, and ask the server that comes out.

python scripts/check_containers.py containers/Containerfile.cpu
PIP_RETRIES=0 python scripts/check_containers.py containers/Containerfile.cuda --extras server,ray

COPY copies into a new folder, and RUN runs in it with a shell, as in the file, but with the paths
of the image within the new folder. What would change this machine is left out and named: apt-get
and useradd. The entry point then serves the demo model, as no other is there: /health, /ready and
a question must be answered, and SIGTERM must end it with status 0. PIP_RETRIES=0 is for a machine
that does not reach every index that is named.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import shlex
import shutil
import subprocess
import tempfile
import time
import urllib.error
import urllib.request
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).parents[1]
LEFT_OUT = ("apt-get", "useradd")


@dataclass(frozen=True)
class Step:
    """One instruction of a Containerfile: `RUN`, and what stands after it."""

    keyword: str
    text: str

    def without(self, flags: str) -> list[str]:
        """The words after the flags that match, such as the names of a COPY."""
        return [word for word in shlex.split(self.text) if not re.match(flags, word)]


def read_steps(path: Path) -> list[Step]:
    """The instructions, with continued lines joined and comments left out."""
    lines = (line for line in path.read_text("utf-8").splitlines() if not line.startswith("#"))
    joined = "\n".join(lines).replace("\\\n", " ")
    return [
        Step(*line.split(maxsplit=1))
        for line in filter(None, map(str.strip, joined.splitlines()))
    ]  # fmt: skip


class Image:
    """A folder in which the steps are done; /opt and /build are within it."""

    def __init__(self, folder: Path, arguments: dict[str, str]) -> None:
        self._folder = folder
        self._given = arguments
        self._workdir = folder
        self.environment = dict(os.environ)
        for name in ("PYTHONPATH", "VIRTUAL_ENV"):
            self.environment.pop(name, None)

    def within(self, text: str) -> str:
        """The text with the image's paths, which here lie within the folder."""
        return re.sub(r"(?<![\w./])/(opt|build)\b", rf"{self._folder}/\1", text)

    def do(self, step: Step) -> None:
        """Do one step."""
        if step.keyword == "WORKDIR":
            self._workdir = Path(self.within(step.text))
            self._workdir.mkdir(parents=True)
        elif step.keyword == "COPY" and "--from" not in step.text:
            *sources, target = step.without("--")
            for source in sources:
                copy_from = ROOT / source
                if copy_from.is_dir():
                    shutil.copytree(copy_from, self._workdir / target)
                else:
                    shutil.copy(copy_from, self._workdir / target)
        elif step.keyword in ("ENV", "ARG"):
            for name, _, value in (word.partition("=") for word in shlex.split(step.text)):
                value = self._given.get(name, value) if step.keyword == "ARG" else value
                path = self.environment["PATH"]
                self.environment[name] = self.within(value).replace("$PATH", path)
        elif step.keyword == "RUN":
            self._run(step)

    def _run(self, step: Step) -> None:
        if left_out := [word for word in LEFT_OUT if word in step.text]:
            print(f"left out: {', '.join(left_out)}", flush=True)
            return
        print(f"RUN {step.text[:90]}", flush=True)
        command = self.within(step.text)
        environment = self.environment | {"PIP_DISABLE_PIP_VERSION_CHECK": "1", "PIP_QUIET": "2"}
        subprocess.run(command, shell=True, check=True, cwd=self._workdir, env=environment)


def serve_and_ask(image: Image, entry: list[str]) -> None:
    """Start the entry point on a free port of this machine, and ask it."""
    command = [*entry[:2], "--host", "127.0.0.1", "--port", "0", *entry[4:]]
    program = shutil.which(command[0], path=image.environment["PATH"])
    print(f"starting {' '.join(command)}: {program}", flush=True)
    with subprocess.Popen(
        [program or command[0], *command[1:]], env=image.environment, stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL, text=True,
    ) as server:  # fmt: skip
        assert server.stdout is not None
        url = server.stdout.readline().strip()
        for path in ("/health", "/ready"):
            print(path, wait_for(url + path), flush=True)
        body = {"messages": [{"role": "user", "content": "Hello?"}], "model": "minigpt4-demo"}
        request = urllib.request.Request(
            f"{url}/v1/chat/completions", json.dumps(body).encode(),
            {"Content-Type": "application/json"},
        )  # fmt: skip
        with urllib.request.urlopen(request, timeout=60) as answer:
            print("a question:", json.load(answer)["choices"][0]["finish_reason"], flush=True)
        server.terminate()
        print("SIGTERM: exit status", server.wait(60), flush=True)
    if server.returncode:
        raise SystemExit(1)


def wait_for(url: str) -> str:
    """The status that is told there, within a minute."""
    deadline = time.monotonic() + 60
    while True:
        try:
            with urllib.request.urlopen(url, timeout=10) as answer:
                return str(json.load(answer)["status"])
        except urllib.error.HTTPError:
            if time.monotonic() > deadline:
                raise
            time.sleep(0.5)


def main() -> None:
    """Do all steps, then serve."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("containerfile", type=Path)
    parser.add_argument("--extras", default="server")
    options = parser.parse_args()
    steps = read_steps(options.containerfile)
    with tempfile.TemporaryDirectory(prefix="containers") as name:
        image = Image(Path(name), {"EXTRAS": options.extras})
        for step in steps:
            image.do(step)
        (entry,) = [json.loads(step.text) for step in steps if step.keyword == "ENTRYPOINT"]
        serve_and_ask(image, entry)


if __name__ == "__main__":
    main()
