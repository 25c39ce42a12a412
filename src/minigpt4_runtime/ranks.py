"""The processes that share one model: rank 0 leads, the others follow.

Owns   their start, their rendezvous, their agreement on what to load, and their end.
Takes  a number of ranks, and the leader's Setup. Under torchrun it uses torchrun's processes; else
       the leader starts the others itself, on this machine.
Never  leaves a process behind: a follower ends when the leader is gone, and with its first error.
"""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path

import torch

from minigpt4_runtime.checkpoint.weight_source import WeightSource
from minigpt4_runtime.config import DTypeName, EngineConfig
from minigpt4_runtime.devices.contracts import DeviceBackend, Traffic
from minigpt4_runtime.devices.group import TorchGroup
from minigpt4_runtime.devices.registry import open_device
from minigpt4_runtime.engine import worker
from minigpt4_runtime.engine.engine import is_out_of_memory
from minigpt4_runtime.engine.runner import Runner, fit_num_blocks
from minigpt4_runtime.errors import (
    BackendUnavailableError,
    ConfigError,
    MiniGPT4Error,
    RankLostError,
)
from minigpt4_runtime.kernels.registry import bind_attention
from minigpt4_runtime.model.parallel import Group, Solo
from minigpt4_runtime.rank_model import RankModel, load_rank_model

# A step's ranks wait for each other twice a layer; none of them lags that long.
PATIENCE_SECONDS = 20.0
_FOLDER = "MINIGPT4_RANKS"  # The folder in which ranks meet that a leader has started.
# The exit status of a follower that has lost another rank or the leader.
_BEREFT = 3
_CLEARING_SECONDS = 2.0
_LOOPBACK = {"linux": "lo", "darwin": "lo0"}


@dataclass(frozen=True)
class Setup:
    """Everything that all ranks load alike. The leader sends it to its followers."""

    source: WeightSource
    device: str
    dtype: DTypeName
    engine: EngineConfig

    def encode(self) -> bytes:
        """As JSON."""
        plain = {"source": self.source.to_mapping(), "engine": asdict(self.engine)}
        return json.dumps({**plain, "device": self.device, "dtype": self.dtype}).encode()

    @classmethod
    def decode(cls, message: bytes) -> Setup:
        """Read what `encode` gave."""
        values = json.loads(message)
        values["source"] = WeightSource.from_mapping(values["source"])
        values["engine"] = EngineConfig(**values["engine"])
        return cls(**values)


# --- every rank ---------------------------------------------------------------------------------


def open_rank_device(name: str, group_size: int) -> DeviceBackend:
    """The device of this process: of several ranks on a machine, each has its own.

    Raises:
        ConfigError: one device is named for several ranks.
    """
    if group_size == 1:
        return open_device(name)
    if ":" in name:
        raise ConfigError(
            f"device is {name!r}, and {group_size} ranks need a device each. Name the kind alone: "
            f"{name.partition(':')[0]}."
        )
    kind = open_device(name).device.type
    return open_device(kind if kind == "cpu" else f"{kind}:{os.environ.get('LOCAL_RANK', 0)}")


def free_memory_bytes(backend: DeviceBackend, group_size: int) -> int | None:
    """This rank's share of the memory that is free now."""
    free_bytes = backend.free_memory_bytes()
    if free_bytes is None or not backend.facts.shares_memory:
        return free_bytes
    return free_bytes // group_size


def make_runner(model: RankModel, backend: DeviceBackend, config: EngineConfig) -> Runner:
    """The runner of a rank. All ranks make as many blocks as the one with the least memory can.

    Raises:
        BackendUnavailableError: the cache does not fit, or the device lacks its format.
        ConfigError: the format is not for heads of this width.
    """
    if config.cache_dtype == "fp8" and not backend.facts.has_float8:
        raise BackendUnavailableError(
            f"cache_dtype is 'fp8', which {backend.device} does not compute with: it takes a CUDA "
            "device of capability 8.9 or newer. Choose int8, which takes as much memory."
        )
    head_dim = model.language.config.head_dim
    # Steps of few numbers each take more than int8 does; and CPU kernels hold 128 of them.
    if config.cache_dtype == "int4" and (head_dim % 8 or head_dim > 512):
        raise ConfigError(
            "cache_dtype is 'int4', which is for heads whose width is a multiple of 8 up to 512, "
            f"and this model's are {head_dim} wide. Choose int8."
        )
    language, share = model.language, backend.facts.cache_share
    num_blocks = config.num_blocks or fit_num_blocks(
        config, language, free_bytes=model.left_bytes, share=share
    )
    capture = backend.capture if config.cuda_graphs == "auto" else None
    least: Callable[[int], int] = int
    if isinstance(language.group, TorchGroup):
        least = language.group.least
        num_blocks = least(num_blocks)
        capture = capture if backend.facts.captures_sums else None
    bind = partial(bind_attention, backend.facts.attention)
    try:
        return Runner(
            language, model.vision, bind,
            config=config, num_blocks=num_blocks, capture=capture, least=least,
            tuned=model.tuned,
        )  # fmt: skip
    except RuntimeError as error:
        if not is_out_of_memory(error):
            raise
        raise BackendUnavailableError(
            f"{backend.device} has no memory for {num_blocks} blocks of {config.block_size} "
            "tokens' keys and values. Lower num_blocks or max_running."
        ) from None


# --- the leader ---------------------------------------------------------------------------------


class Ranks:
    """All ranks of one model, as its leader holds them.

    With a single rank, no process is started and no message is sent.
    """

    def __init__(self, size: int) -> None:
        """Raises ConfigError in a process that torchrun has started to follow another."""
        self.size = size
        rank = torchrun_rank(size)
        if rank:
            raise ConfigError(
                f"This process is rank {rank} of {size} under torchrun, and rank 0 alone has the "
                f"model. Call minigpt4_runtime.follow({size}) before MiniGPT4.load, and end the "
                "program where it gives True."
            )
        self._is_torchrun = rank is not None
        self._group: TorchGroup | None = None
        self._followers = _Followers()

    def start(self, setup: Setup, collective: str) -> Group:
        """Bring all ranks together and let them load.

        Raises:
            RankLostError: one of them ended before it joined.
        """
        if self.size == 1:
            return Solo()
        if self._is_torchrun:
            self._group = TorchGroup(0, self.size, folder=None)
        else:
            self._group = self._followers.start(self.size)
        self._group.send(setup.encode())
        self._group.use(collective)
        return self._group

    @contextlib.contextmanager
    def loading(self) -> Iterator[None]:
        """End all ranks if loading fails in any of them."""
        try:
            yield
        except RankLostError as error:
            explained = self._followers.explain(error)
            self.close()
            raise explained from error
        except BaseException:
            self.close()
            raise

    def lead(self, runner: Runner) -> Runner | worker.Leader:
        """The runner for the engine. From now on a rank that does not answer is lost."""
        if self._group is None:
            return runner
        self._group.set_patience(PATIENCE_SECONDS)
        return worker.Leader(runner, self._group, self._followers.explain)

    def renew(self, engine: EngineConfig) -> None:
        """Let the other ranks make another runner, before the leader does.

        Raises:
            RankLostError: one of them is gone.
        """
        if self._group:
            worker.renew(self._group, engine)

    @property
    def traffic(self) -> Traffic:
        """The messages of this rank so far."""
        return self._group.traffic if self._group else Traffic()

    def close(self) -> None:
        """End all other ranks. This process can then join another group."""
        group, self._group = self._group, None
        if group and self._is_torchrun:
            with contextlib.suppress(RankLostError):
                group.send(b"")
        self._followers.stop()
        if group:
            group.leave()


class _Followers:
    """The processes that the leader has started."""

    def __init__(self) -> None:
        self._folder: Path | None = None
        self._processes: dict[int, subprocess.Popen[bytes]] = {}
        self._num_threads = 0  # This process's own, before it shared the cores.

    def start(self, size: int) -> TorchGroup:
        """See `Ranks.start`."""
        self._num_threads = torch.get_num_threads()
        num_threads = max(1, self._num_threads // size)
        torch.set_num_threads(num_threads)
        self._folder = folder = Path(tempfile.mkdtemp(prefix="minigpt4-ranks-"))
        for rank in range(1, size):
            self._processes[rank] = _start_follower(rank, size, folder, num_threads)
        while not all(_ready(folder, rank).exists() for rank in self._processes):
            if any(process.poll() is not None for process in self._processes.values()):
                raise RankLostError("A rank ended before it had joined.")
            time.sleep(0.02)
        return _join(0, size, folder)

    def explain(self, error: RankLostError) -> RankLostError:
        """Name the lost rank and its last words. It may exit later than those that lost it."""
        deadline = time.monotonic() + 1.0
        while self._folder and time.monotonic() < deadline:
            for rank, process in self._processes.items():
                if process.poll() not in (None, _BEREFT):
                    return RankLostError(
                        f"Rank {rank} of {len(self._processes) + 1} ended with status "
                        f"{process.returncode}{_last_words(self._folder, rank)}. "
                        "Load the model again."
                    )
            time.sleep(0.02)
        return error

    def stop(self) -> None:
        """Kill them: they hold nothing that must be saved."""
        for process in self._processes.values():
            process.kill()
        for process in self._processes.values():
            process.communicate()  # Closes its standard input, and waits.
        self._processes = {}
        if self._folder:
            torch.set_num_threads(self._num_threads)
            shutil.rmtree(self._folder, ignore_errors=True)
            self._folder = None


def _start_follower(
    rank: int, size: int, folder: Path, num_threads: int
) -> subprocess.Popen[bytes]:
    package_root = str(Path(__file__).parent.parent)
    paths = [package_root, *filter(None, [os.environ.get("PYTHONPATH")])]
    environment = {
        **os.environ,
        "RANK": str(rank),
        "LOCAL_RANK": str(rank),
        "WORLD_SIZE": str(size),
        "OMP_NUM_THREADS": str(num_threads),
        "PYTHONPATH": os.pathsep.join(paths),
        _FOLDER: str(folder),
    }
    with _log(folder, rank).open("wb") as log:
        return subprocess.Popen(
            [sys.executable, "-m", "minigpt4_runtime.ranks"],
            env=environment,
            stdin=subprocess.PIPE,  # Never written to: it closes when the leader ends.
            stdout=log,
            stderr=log,
            start_new_session=True,  # Ctrl-C goes to the leader alone.
        )


def _ready(folder: Path, rank: int) -> Path:
    return folder / f"ready-{rank}"


def _log(folder: Path, rank: int) -> Path:
    return folder / f"rank-{rank}.log"


def _last_words(folder: Path, rank: int) -> str:
    words = _log(folder, rank).read_text("utf-8", "replace").strip().splitlines()
    return f" ({words[-1]})" if words else ""


def torchrun_rank(size: int, setting: str = "tensor_parallel") -> int | None:
    """The rank that torchrun gave to this process; None where torchrun started no group.

    Raises:
        ConfigError: the environment is not whole, or has another size than the setting.
    """
    if size < 2 or not {"RANK", "WORLD_SIZE"} <= os.environ.keys():
        return None
    names = ("RANK", "WORLD_SIZE", "MASTER_PORT")
    wrong = [name for name in names if not os.environ.get(name, "").isdecimal()]
    if wrong or not os.environ.get("MASTER_ADDR"):
        raise ConfigError(
            f"The environment has RANK and WORLD_SIZE, but {', '.join(wrong) or 'MASTER_ADDR'} "
            "is not set as torchrun sets it. Start with torchrun, or unset RANK and WORLD_SIZE."
        )
    rank, world_size = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
    if world_size != size or rank >= size:
        raise ConfigError(
            f"{setting} is {size}, but the environment says RANK={rank} of "
            f"WORLD_SIZE={world_size}. Start {size} processes with torchrun, or unset RANK and "
            "WORLD_SIZE."
        )
    return rank


def _join(rank: int, size: int, folder: Path) -> TorchGroup:
    """Join the group over gloo, which listens on this machine alone."""
    name = "GLOO_SOCKET_IFNAME"
    is_ours = name not in os.environ and sys.platform in _LOOPBACK
    if is_ours:
        os.environ[name] = _LOOPBACK[sys.platform]
    try:
        return TorchGroup(rank, size, folder=folder)
    finally:
        if is_ours:
            del os.environ[name]


# --- a follower ---------------------------------------------------------------------------------


def follow(tensor_parallel: int) -> bool:
    """Follow rank 0 if torchrun has started this process as another rank of a divided model.

    A program that torchrun starts calls this before `MiniGPT4.load`, with the same number. It
    returns False at once in rank 0 and without torchrun: load the model there. In any other rank
    it computes what rank 0 asks for and returns True when rank 0 has closed its model: end the
    program there.

    Raises:
        ConfigError: the number is not torchrun's, or its environment is not whole.
        RankLostError: another rank is gone.
    """
    rank = torchrun_rank(tensor_parallel)
    if rank:
        serve(TorchGroup(rank, tensor_parallel, folder=None))
    return bool(rank)


def serve(group: TorchGroup) -> None:
    """Load this rank's part of the leader's model, and execute plans until the leader ends."""
    setup = Setup.decode(group.receive())
    backend = open_rank_device(setup.device, group.size)
    group.use(backend.facts.collective)
    free_bytes = free_memory_bytes(backend, group.size)
    model = load_rank_model(setup.source, backend, setup.dtype, group=group, free_bytes=free_bytes)
    worker.follow(partial(make_runner, model, backend), setup.engine, group)
    group.leave()


def _end_with_leader(folder: Path) -> None:
    """Wait until standard input closes, which the leader never writes to."""
    os.read(0, 1)  # Not through sys.stdin, whose lock Python needs at its end.
    shutil.rmtree(folder, ignore_errors=True)  # A leader that was killed has not removed it.
    os._exit(_BEREFT)


def main() -> None:
    """Follow the leader that has started this process."""
    rank, folder = int(os.environ["RANK"]), Path(os.environ[_FOLDER])
    watching = threading.Thread(target=_end_with_leader, args=(folder,), daemon=True)
    watching.start()
    (folder / f"ready-{rank}").touch()
    try:
        serve(_join(rank, int(os.environ["WORLD_SIZE"]), folder))
    except RankLostError:
        # If the leader is gone, the other thread clears up and ends this process.
        watching.join(_CLEARING_SECONDS)
        sys.exit(_BEREFT)
    except MiniGPT4Error as error:
        sys.exit(f"error: {error}")


if __name__ == "__main__":
    main()
