"""`minigpt4 describe --ray`: the same question about any number of pictures, on a cluster.

Owns   the options of a cluster, and which of the command's others go with them.
Takes  what was typed; starts a run, shows its progress and says what failed.
Never  prints an answer: they are in the folder of --out.
"""

from __future__ import annotations

import hashlib
import re
import sys
from collections.abc import Sequence
from contextlib import redirect_stdout
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from minigpt4_runtime.cli.options import DEMO_NOTICE, ModelOptions, option
from minigpt4_runtime.cli.terminal import note, progress_bar, report
from minigpt4_runtime.config import EngineConfig, SamplingParams
from minigpt4_runtime.errors import CheckpointError, ConfigError
from minigpt4_runtime.messages import TaskName

if TYPE_CHECKING:
    from minigpt4_runtime.cluster.run import Tally

AUTO = "auto"
_ADDRESS = re.compile(r"auto|local|ray://.+|[^/\\]+:\d+")
# On what a model runs, and what its answers do not depend on.
_WHERE_ALONE = ("device", "cuda_graphs", "tensor_parallel", "provider", "vision_graph")


def complete_ray(arguments: list[str]) -> None:
    """Write --ray without an address as `--ray auto`: what follows it is then something else."""
    end = arguments.index("--") if "--" in arguments else len(arguments)
    if "--ray" in arguments[:end]:
        after = arguments.index("--ray") + 1
        if not (after < end and _ADDRESS.fullmatch(arguments[after])):
            arguments.insert(after, AUTO)


@dataclass(frozen=True, kw_only=True)
class RayOptions:
    """The cluster, its workers, and the shards that they fill."""

    ray: Annotated[
        str | None,
        option(
            "[ADDRESS]",
            "Describe on a Ray cluster: HOST:PORT, or local for one that is started here; without "
            "an address the cluster that this machine is in, or else local. --out is then a "
            "folder for the records in shards, also in an object store (s3://…). A list of "
            "pictures (.txt, one a line), a table (.parquet) and a store can then be a PATH too.",
        ),
    ] = None
    workers: Annotated[
        int | None,
        option("COUNT", "With --ray: workers, a model each. Without it, as many as there is room."),
    ] = None
    worker_cpus: Annotated[
        float | None, option("NUMBER", "With --ray: CPUs that a worker takes; 1 without it.")
    ] = None
    worker_gpus: Annotated[
        float | None, option("NUMBER", "With --ray: GPUs that a worker takes; 0 without it.")
    ] = None
    column: Annotated[
        str | None,
        option("NAME", "With --ray: the column of a table with pictures, or with their places."),
    ] = None
    shard_format: Annotated[
        str | None, option("FORMAT", "With --ray: jsonl or parquet; jsonl without it.")
    ] = None
    shard_size: Annotated[
        int | None, option("COUNT", "With --ray: pictures in a shard; 1000 without it.")
    ] = None

    def check_absent(self) -> None:
        """Refuse an option that goes with --ray.

        Raises:
            ConfigError: there is one.
        """
        for name, value in asdict(self).items():
            if value is not None:
                raise ConfigError(f"--{name.replace('_', '-')} goes with --ray. Add one of them.")


@dataclass(frozen=True, kw_only=True)
class Question:
    """What is asked about each picture, and what is done with the answer."""

    prompt: str
    task: TaskName | None
    params: SamplingParams
    cache_window: int | None
    allow_local_urls: bool
    recursive: bool
    resume: bool
    draw: Path | None


def describe_on_ray(
    paths: Sequence[str],
    out: str | None,
    question: Question,
    where: ModelOptions,
    options: RayOptions,
) -> None:
    """Describe, and say what became of the pictures.

    Raises:
        MiniGPT4Error: nothing can be described like this.
    """
    from minigpt4_runtime.cluster.places import find_names
    from minigpt4_runtime.cluster.result_places import open_place
    from minigpt4_runtime.cluster.run import WorkerPlan, describe_names
    from minigpt4_runtime.cluster.run_folder import RunFolder, ShardChoice
    from minigpt4_runtime.cluster.worker import Job
    from minigpt4_runtime.optional import require

    if out is None:
        raise ConfigError("--ray writes its records into a folder: name it with --out DIR.")
    if question.draw is not None:
        raise ConfigError("--draw does not go with --ray: the boxes are in the records.")
    require("ray", extra="ray")
    plan = WorkerPlan(
        address=options.ray or AUTO,
        num_workers=options.workers,
        cpus=1 if options.worker_cpus is None else options.worker_cpus,
        gpus=options.worker_gpus or 0,
    )
    if 0 < plan.gpus < where.tensor_parallel:
        raise ConfigError(
            f"A worker takes {plan.gpus:g} GPUs, and --tensor-parallel divides its model over "
            f"{where.tensor_parallel}: give --worker-gpus {where.tensor_parallel}."
        )
    shards = ShardChoice(num_pictures=options.shard_size, form=options.shard_format)
    model, settings = _model(where, question)
    place = open_place(out)
    names = find_names(paths, recursive=question.recursive, column=options.column)
    folder = RunFolder.open(place, names, settings, shards, resume=question.resume)
    job = Job(
        model=model, prompt=question.prompt, sampling=question.params, task=question.task,
        folder=Path.cwd(), column=options.column, allows_local=question.allow_local_urls,
    )  # fmt: skip
    if where.is_demo():
        note(DEMO_NOTICE)
    with progress_bar(len(names)) as bar:

        def start(num_remaining: int, num_workers: int) -> None:
            bar.advance(len(names) - num_remaining)
            with bar.aside():
                note(f"{num_remaining} pictures, {num_workers} worker{'s' * (num_workers > 1)}")

        try:
            # Ray prints what it has to say about lost workers.
            with redirect_stdout(sys.stderr):
                tally = describe_names(job, folder, plan, on_start=start, on_done=bar.advance)
        except KeyboardInterrupt:
            note(f"What was done is in {out}: go on with --resume.")
            raise
    _show(tally, out)


def _model(where: ModelOptions, question: Question) -> tuple[dict[str, Any], dict[str, Any]]:
    """The arguments of `MiniGPT4.load`, and all that answers depend on, as JSON.

    Raises:
        CheckpointError: there is no such model on this machine.
    """
    from minigpt4_runtime import __version__
    from minigpt4_runtime.checkpoint.adapters import AdapterParts
    from minigpt4_runtime.checkpoint.manifest import MANIFEST_NAME
    from minigpt4_runtime.checkpoint.shelf import find_model

    arguments = where.arguments(EngineConfig(cache_window=question.cache_window))
    for name in ("model", "vision_graph", "adapter"):  # Workers have folders of their own.
        if arguments[name] is not None:
            path = find_model(arguments[name]) if name == "model" else arguments[name]
            arguments[name] = str(Path(path).resolve())
    manifest, adapter = Path(arguments["model"] or "") / MANIFEST_NAME, arguments["adapter"]
    settings = {name: value for name, value in asdict(where).items() if name not in _WHERE_ALONE}
    settings |= {
        "model": arguments["model"] or f"demo {__version__}",
        "manifest_sha256": _digest(manifest) if manifest.is_file() else None,
        "adapter": None if adapter is None else AdapterParts.find(Path(adapter)).digests(),
        "prompt": question.prompt,
        "task": question.task,
        "sampling": asdict(question.params),
        "cache_window": question.cache_window,
    }
    return arguments, settings


def _digest(path: Path) -> str:
    try:
        return hashlib.sha256(path.read_bytes()).hexdigest()
    except OSError as error:
        raise CheckpointError(f"{path} cannot be read: {error.strerror}.") from None


def note_ends(*, outgrown: int, cut_off: int) -> None:
    """Say how many answers outgrew the window, and how many were cut off."""
    if outgrown:
        note(
            f"{outgrown} of the answers outgrew the window: the end of such an answer was "
            "chosen without the picture."
        )
    if cut_off:
        note(
            f"{cut_off} of the answers are cut off: --max-new-tokens, or the model's context, "
            "allows no longer ones."
        )


def _show(tally: Tally, out: str) -> None:
    for image, error in tally.failures:
        report(error, about=image)
    if tally.failed > len(tally.failures):
        note(f"… and {tally.failed - len(tally.failures)} more: see the records with an error.")
    note_ends(outgrown=tally.outgrown, cut_off=tally.cut_off)
    if tally.lost_workers:
        what = "worker was" if tally.lost_workers == 1 else "workers were"
        note(f"{tally.lost_workers} {what} lost, and others did their work.")
    before = f", {tally.done_before} done before" if tally.done_before else ""
    note(f"{tally.described} described, {tally.failed} failed{before}: see {out}")
    if tally.failed:
        raise typer.Exit(1)
