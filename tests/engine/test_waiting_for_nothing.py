"""A step never waits for the device: it reads nothing from it, and sends from pinned memory alone.

The device is torch's "meta", which has shapes and no numbers: what reads a number of it fails. What
is sent to it is watched here, since a plain copy to a GPU waits for all that the GPU was given.
"""

from functools import partial

import numpy
import pytest
import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from minigpt4_runtime import SamplingParams
from minigpt4_runtime.api import DEMO_MODEL_DIR
from minigpt4_runtime.cache.image_cache import ImageCache
from minigpt4_runtime.checkpoint.blank_model import blank_model
from minigpt4_runtime.checkpoint.config_file import load_config
from minigpt4_runtime.checkpoint.load import load_model
from minigpt4_runtime.config import EngineConfig
from minigpt4_runtime.devices.registry import open_device
from minigpt4_runtime.engine import sampler as sampling
from minigpt4_runtime.engine.plan import UNKNOWN_ID, ImageRows, Slice, StepPlan
from minigpt4_runtime.engine.request import Beside, Request
from minigpt4_runtime.engine.runner import Runner
from minigpt4_runtime.engine.sequence import Sequence
from minigpt4_runtime.kernels.registry import attention_kernel, bind_attention
from minigpt4_runtime.vision.torch import TorchVisionEncoder

META = torch.device("meta")
SENDS = {torch.ops.aten.to, torch.ops.aten._to_copy, torch.ops.aten.copy_}

TRITON_KERNELS = (
    "attention_triton._attend_tile", "attention_triton._join_shares",
    "cache_write_triton._turn_and_write",
)  # fmt: skip


class HostWaitsError(Exception):
    pass


class Pinned(TorchFunctionMode):
    """Notes what would be pinned, and refuses sending by calls that torch hides from dispatch."""

    def __init__(self):
        super().__init__()
        self.held = []  # Alive, so that no other memory has their addresses.

    def __torch_function__(self, func, types, args=(), kwargs=None):
        kwargs = dict(kwargs or {})
        if func is Tensor.pin_memory:
            return self._hold(args[0].clone())
        if func is torch.empty and kwargs.pop("pin_memory", False):
            return self._hold(func(*args, **kwargs))
        if func in {torch.tensor, torch.as_tensor} and kwargs.get("device") == META:
            raise HostWaitsError("a tensor is made of the host's numbers")
        if func in {Tensor.__getitem__, Tensor.__setitem__} and args[0].is_meta:
            index = args[1] if isinstance(args[1], tuple) else (args[1],)
            if any(isinstance(i, list) or (isinstance(i, Tensor) and i.is_cpu) for i in index):
                raise HostWaitsError("an index is on the host")
        return func(*args, **kwargs)

    def _hold(self, tensor):
        self.held.append(tensor)
        return tensor

    def has(self, tensor):
        place = tensor.untyped_storage().data_ptr()
        return any(each.untyped_storage().data_ptr() == place for each in self.held)


class Watched(TorchDispatchMode):
    """Refuses operations on tensors of both sides, but for sending what is pinned."""

    def __init__(self, pinned):
        super().__init__()
        self._pinned = pinned
        self.num_sent = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        made = func(*args, **kwargs)
        leaves = [x for x in tree_leaves((args, kwargs, made)) if isinstance(x, Tensor)]
        here = [x for x in leaves if x.is_cpu and x.ndim]
        if here and any(x.is_meta for x in leaves):
            does_not_wait = kwargs.get("non_blocking") or args[2:] == (True,)
            is_sent = func.overloadpacket in SENDS and does_not_wait
            if not is_sent or not all(map(self._pinned.has, here)):
                raise HostWaitsError(f"{func} is given {len(here)} tensors of the host")
            self.num_sent += 1
        return made


@pytest.fixture
def watched():
    with Pinned() as pinned, Watched(pinned) as watching:
        yield watching


@pytest.mark.parametrize(
    "wait",
    [
        lambda there, here: torch.tensor([1, 2], device=META),
        lambda there, here: there[[0, 1]],
        lambda there, here: there.__setitem__(here, 0),
        lambda there, here: there.copy_(here),
        lambda there, here: there.copy_(here, non_blocking=True),
        lambda there, here: here.to(META),
        lambda there, here: here.pin_memory().to(META),
        lambda there, here: there[there > 0],
        lambda there, here: there.sum().item(),
        lambda there, here: there.tolist(),
        lambda there, here: there.cpu(),
    ],
)
def test_what_waits_is_seen(watched, wait):
    here = torch.tensor([1, 2])
    there = here.pin_memory().to(META, non_blocking=True)
    assert watched.num_sent == 1
    with pytest.raises((HostWaitsError, RuntimeError, NotImplementedError)):
        wait(there, here)


def make_runner(name, cache_dtype, monkeypatch):
    """The demo model without numbers. Triton's kernels are prepared, and not launched."""
    model = blank_model(load_config(DEMO_MODEL_DIR))
    if name == "triton":
        pytest.importorskip("triton", reason="triton is not installed")
        launch = type("Launch", (), {"__getitem__": lambda self, grid: lambda *a, **k: None})()
        for kernel in TRITON_KERNELS:
            monkeypatch.setattr(f"minigpt4_runtime.kernels.{kernel}", launch)
    assert model.language.token_embedding.weight.is_meta
    config = EngineConfig(max_running=8, max_step_tokens=64, cache_dtype=cache_dtype)
    vision = TorchVisionEncoder(model.vision)
    return Runner(model.language, vision, attention_kernel(name), config=config, num_blocks=40)


PICTURES = (ImageRows("p", 0, 1, 2), ImageRows("n", 0, 3, 1))
SIDE = load_config(DEMO_MODEL_DIR).vision.image_size


def mixed_plan():
    """A prompt with two pictures, a later chunk, two that decode, and two copies of blocks.

    The rows of picture "p" are known, and those of "n" are not.
    """
    return StepPlan(
        (
            Slice(0, 0, 0, (1, 2, 3, 4, 5), 0, 0, (0,), PICTURES),
            Slice(1, 0, 17, (5, 6, 7), 1, 0, (1, 2), num_sampled=1),
            Slice(2, 0, 20, (UNKNOWN_ID,), 2, 0, (3, 4), num_sampled=1, choice=1),
            Slice(3, 0, 30, (8,), 3, 0, (5, 7), num_sampled=1),
        ),
        copies=((1, 9), (3, 8)),
    )


@pytest.mark.parametrize("cache_dtype", ["auto", "int8", "int4", "fp8"])
@pytest.mark.parametrize("name", ["sdpa", "triton"])
def test_a_step_waits_for_nothing(monkeypatch, name, cache_dtype):
    runner = make_runner(name, cache_dtype, monkeypatch)
    width = runner._language.config.hidden_size
    runner._images.put("p", torch.empty(2, width, device=META))
    decode = StepPlan((Slice(0, 0, 3, (5,), 0, 0, (0,), num_sampled=1),) * 2)
    choices = torch.empty(3, dtype=torch.int64, device=META)
    with Pinned() as pinned:
        runner.execute(decode, {})  # What is made once may wait.
        with Watched(pinned) as watching:
            logits = runner.execute(mixed_plan(), {"n": torch.zeros(3, SIDE, SIDE)}, choices)
            runner.execute(decode, {})
    assert logits.shape == (3, runner._language.config.vocab_size)
    assert watching.num_sent > 3


@pytest.mark.gpu
@pytest.mark.parametrize("cache_dtype", ["auto", "int8", "int4"])
def test_a_gpu_is_not_waited_for(cache_dtype):
    """As torch itself watches it."""
    backend = open_device("cuda")
    model = load_model(DEMO_MODEL_DIR, device=backend.device, dtype=torch.float16)
    config = EngineConfig(max_running=8, max_step_tokens=64, cache_dtype=cache_dtype)
    bind = partial(bind_attention, backend.facts.attention)
    vision = TorchVisionEncoder(model.vision)
    runner = Runner(model.language, vision, bind, config=config, num_blocks=40)
    rows = torch.zeros(2, model.config.language.hidden_size, dtype=torch.float16)
    runner._images.put("p", rows.to(backend.device))
    choices = torch.zeros(3, dtype=torch.int64, device=backend.device)
    # What is compiled and made once may wait.
    runner.execute(mixed_plan(), {"n": torch.zeros(3, SIDE, SIDE)}, choices)
    runner._images = ImageCache(2**20)
    runner._images.put("p", rows.to(backend.device))
    torch.cuda.set_sync_debug_mode("error")
    try:
        logits = runner.execute(mixed_plan(), {"n": torch.zeros(3, SIDE, SIDE)}, choices)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert len(logits) == len(choices)


def test_sampling_waits_for_nothing(monkeypatch, watched):
    monkeypatch.setattr(sampling, "_fetch", lambda numbers: numbers.tolist)
    settings = [
        {}, {"repetition_penalty": 1.3, "logprobs": 3}, {"logit_bias": {3: 1.0}},
        {"temperature": 0.8, "top_k": 20, "top_p": 0.9, "min_p": 0.1, "min_new_tokens": 4},
    ]  # fmt: skip
    placed = [
        (row, Sequence(row, Request((1, 3), (), SamplingParams(**each)), seed=7, max_new_tokens=9))
        for row, each in enumerate(settings)
    ]
    sampler = sampling.Sampler(bos_id=1, eos_id=2, runs_ahead=True)
    choices = sampler.start(torch.empty(4, 200, device=META), placed)
    assert choices.ids.is_meta
    assert watched.num_sent > 5


class Form:
    """A guide that allows every second id."""

    def allowed(self):
        return numpy.arange(200) % 2 == 0

    def fork(self):
        return self


def test_scores_and_processors_wait_for_nothing(monkeypatch, watched):
    """But for what a processor itself does."""
    monkeypatch.setattr(sampling, "_fetch", lambda numbers: numbers.tolist)
    scored = Request((1, 3), (), SamplingParams(), candidates=((5, 6),))
    steered = Request(
        (1, 3), (), SamplingParams(), guide=Form(), beside=(Beside("other", (1, 4)),),
        processors=(lambda seen: seen.logits - seen.branches["other"] + len(seen.ids[0]),),
    )  # fmt: skip
    placed = [
        (2 * number, Sequence(number, request, seed=7, max_new_tokens=9))
        for number, request in enumerate((scored, steered))
    ]
    placed[0][1].scoring.plan([(0, 0, 2)])
    sampler = sampling.Sampler(bos_id=1, eos_id=2, runs_ahead=True)
    choices = sampler.start(torch.empty(4, 200, device=META), placed)
    assert choices.ids.is_meta
    assert watched.num_sent > 5
