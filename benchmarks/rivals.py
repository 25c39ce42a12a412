"""The sides that benchmarks/engine.py compares: our engine, transformers' `generate`, and vLLM.

Owns   the construction and timing of the sides, and the one import of transformers.
Takes  prompts as ids and the numbers of new tokens; gives TimedAnswers.
Never  copies a weight in this process: transformers' model uses our tensors, since a 7B model may
       not fit twice. vLLM runs in a process of its own, which reads a folder with the same weights.
"""

from __future__ import annotations

import json
import subprocess
import tempfile
import threading
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any, Protocol, TypeVar

import torch
from safetensors.torch import save_file
from torch import Tensor

from minigpt4_runtime import EngineConfig, MiniGPT4, SamplingParams
from minigpt4_runtime.bench.presets import cut_layers
from minigpt4_runtime.config import DTypeName, ModelConfig, VisionConfig
from minigpt4_runtime.convert.key_map import language_origins
from minigpt4_runtime.formats.registry import FormatChoice
from minigpt4_runtime.model.llama import Llama
from minigpt4_runtime.optional import require
from minigpt4_runtime.presets import PRESETS

T = TypeVar("T")
SETTINGS = ("dynamic", "static", "compiled")
VLLM_SCRIPT = Path(__file__).with_name("engine_vllm.py")


@dataclass(frozen=True)
class TimedAnswers:
    """Each prompt's new ids, and the time of each on perf_counter's clock."""

    started: float
    token_ids: list[list[int]]
    times: list[list[float]]


class Rival(Protocol):
    """The other side."""

    name: str

    def generate(
        self, prompts: Sequence[Sequence[int]], counts: Sequence[int], *, batch_size: int
    ) -> TimedAnswers:
        """Answer each prompt with that many new tokens."""
        ...


def in_own_thread(compute: Callable[[], T]) -> T:
    """Compute in a thread that ends afterwards.

    Every thread that computes keeps its own OpenMP threads, which slow each other down.
    """
    with ThreadPoolExecutor(1) as pool:
        return pool.submit(compute).result()


class Program:
    """A script of another environment, which answers each line of JSON with one."""

    def __init__(self, python: str, script: Path) -> None:
        self._name = script.name
        self._process = subprocess.Popen(
            [python, script], stdin=subprocess.PIPE, stdout=subprocess.PIPE, encoding="utf-8"
        )

    def ask(self, **line: Any) -> Any:
        """Ask, and wait for the answer. The end of the script is the end of this one."""
        assert self._process.stdin
        assert self._process.stdout
        with suppress(BrokenPipeError):
            self._process.stdin.write(json.dumps(line) + "\n")
            self._process.stdin.flush()
        if answer := self._process.stdout.readline():
            return json.loads(answer)
        with suppress(BrokenPipeError), self._process:
            pass  # It is waited for, and its pipes are closed.
        ended = self._process.returncode
        raise SystemExit(f"{self._name} ended with {ended}; what it wrote says why.")


# --- our side ------------------------------------------------------------------------------


class Ours:
    """The engine with its defaults, without a prefix cache."""

    def __init__(
        self, config: ModelConfig | None, *, device: str, dtype: DTypeName,
        num_blocks: int | None = None, formats: FormatChoice = "float",
    ) -> None:  # fmt: skip
        """Random weights in a shape and formats, or without a shape the demo model."""
        settings: Any = {"device": device, "dtype": dtype}
        settings["engine"] = EngineConfig(prefix_cache=False, num_blocks=num_blocks)
        if config is None:
            self._model = MiniGPT4.load(**settings)
        else:
            self._model = MiniGPT4.with_random_weights(config, formats=formats, **settings)
        self.language: Llama = self._model._loaded.rank_model.language  # noqa: SLF001 - for transformers.

    def generate(self, prompts: Sequence[Sequence[int]], counts: Sequence[int]) -> TimedAnswers:
        """Submit all prompts at once, and read the answers in order."""
        times: list[list[float]] = [[] for _ in prompts]
        started = time.perf_counter()
        tickets = [
            self._model.probe.submit_tokens(
                prompt,
                SamplingParams(ignore_eos=True, max_new_tokens=count),
                on_token=partial(_note_time, own),
            )
            for prompt, count, own in zip(prompts, counts, times, strict=True)
        ]
        return TimedAnswers(started, [list(ticket) for ticket in tickets], times)

    def use_engine(self, **settings: Any) -> None:
        """Change the engine's settings."""
        self._model.probe.use_engine({**asdict(self._model.engine_config), **settings})

    def reset_peak_memory(self) -> None:
        """Let `peak_memory_bytes` count from here on."""
        self._model.probe.reset_peak_memory()

    def peak_memory_bytes(self) -> int | None:
        """The largest size of this process; None if the system does not tell."""
        return self._model.probe.peak_memory_bytes()

    def close(self) -> None:
        """Let the model go."""
        self._model.close()

    def rest(self) -> None:
        """Wait for the end of the engine's thread, after a second without work."""
        for thread in threading.enumerate():
            if thread.name == "engine":
                thread.join()


def _note_time(times: list[float], _: int) -> None:
    times.append(time.perf_counter())


def wide_config(num_layers: int) -> ModelConfig:
    """7B's widths with fewer layers, and a tiny image side."""
    vision = VisionConfig(
        image_size=28, patch_size=14, hidden_size=32, num_hidden_layers=1, num_attention_heads=2,
        intermediate_size=32,
    )  # fmt: skip
    language = replace(PRESETS["llama2-7b"].language, max_position_embeddings=2048)
    whole = ModelConfig(vision=vision, qformer=None, language=language, template="llama2")
    return cut_layers(whole, language=num_layers)


def _published_weights(language: Llama) -> dict[str, Tensor]:
    """Our tensors by the names of a published Llama."""
    return {
        origin.names[0]: language.get_parameter(name.removeprefix("language."))
        for name, origin in language_origins(language.config).items()
    }


# --- transformers --------------------------------------------------------------------------


def _library() -> Any:
    library: Any = require("transformers", install="pip install 'transformers>=5'")
    library.logging.set_verbosity_error()
    return library


class _Clock:
    """A streamer, with the two methods that transformers calls."""

    def __init__(self) -> None:
        self.times: list[float] = []

    def put(self, _: Tensor) -> None:
        """Called once with the prompts and then for each step."""
        self.times.append(time.perf_counter())

    def end(self) -> None:
        """Nothing to do."""


class Transformers:
    """A LlamaForCausalLM that decodes greedily and ignores the end-of-text token.

    `setting` is its cache: growing (dynamic), of full size (static), or of full size with a
    compiled forward pass.
    """

    def __init__(self, language: Llama, setting: str = "dynamic") -> None:
        self._library = _library()
        self.name = f"transformers {self._library.__version__} ({setting} cache, sdpa)"
        self._device = language.token_embedding.weight.device
        self._model = self._assemble(language)
        self._model.generation_config = self._generation_config(setting)

    def _assemble(self, language: Llama) -> Any:
        config = self._library.LlamaConfig(
            **language.config.to_mapping(),
            dtype=language.token_embedding.weight.dtype,
            attn_implementation="sdpa",
        )
        with torch.device("meta"):
            model = self._library.LlamaForCausalLM(config)
        model.load_state_dict(_published_weights(language), strict=True, assign=True)
        # The frequencies are not in a checkpoint, so they are still on the meta device.
        model.model.rotary_emb = type(model.model.rotary_emb)(model.config).to(self._device)
        return model.requires_grad_(False).eval()

    def _generation_config(self, setting: str) -> Any:
        config = self._library.GenerationConfig(
            do_sample=False, use_cache=True, pad_token_id=0,
            cache_implementation=None if setting == "dynamic" else "static",
            disable_compile=setting != "compiled",
        )  # fmt: skip
        if setting == "compiled":
            # On a GPU also with graphs, as gpt-fast.
            mode = "reduce-overhead" if self._device.type == "cuda" else None
            config.compile_config = self._library.CompileConfig(fullgraph=False, mode=mode)
            # By default only a GPU's forward pass is compiled.
            config.compile_config._compile_all_devices = True  # noqa: SLF001
        return config

    def generate(
        self, prompts: Sequence[Sequence[int]], counts: Sequence[int], *, batch_size: int
    ) -> TimedAnswers:
        """Answer in batches in the order given; each runs until its longest answer is done.

        `counts` are the new tokens for each prompt; further tokens of a batch are dropped.
        """
        started = time.perf_counter()
        token_ids: list[list[int]] = []
        times: list[list[float]] = []
        for first in range(0, len(prompts), batch_size):
            wanted = counts[first : first + batch_size]
            clock = _Clock()
            new = self._generate_batch(prompts[first : first + batch_size], max(wanted), clock)
            token_ids += [ids[:count] for ids, count in zip(new, wanted, strict=True)]
            times += [clock.times[1 : 1 + count] for count in wanted]
        return TimedAnswers(started, token_ids, times)

    @torch.inference_mode()
    def _generate_batch(
        self, prompts: Sequence[Sequence[int]], max_new_tokens: int, clock: _Clock
    ) -> list[list[int]]:
        width = max(map(len, prompts))
        # Padded on the left, so that all answers begin in the same column.
        ids = torch.tensor([[0] * (width - len(p)) + list(p) for p in prompts])
        mask = torch.tensor([[0] * (width - len(p)) + [1] * len(p) for p in prompts])
        out = self._model.generate(
            input_ids=ids.to(self._device),
            attention_mask=mask.to(self._device),
            max_new_tokens=max_new_tokens,
            streamer=clock,
        )
        new: list[list[int]] = out[:, width:].tolist()
        return new


# --- vLLM ----------------------------------------------------------------------------------


class Vllm:
    """vLLM's engine in a process of its own: decodes greedily and ignores the end-of-text token."""

    def __init__(self, language: Llama, python: str) -> None:
        """`python` is that of vLLM's environment. The weights are on the disk while it starts."""
        dtype = str(language.token_embedding.weight.dtype).removeprefix("torch.")
        self._program = Program(python, VLLM_SCRIPT)
        with tempfile.TemporaryDirectory() as folder:
            settings = {"architectures": ["LlamaForCausalLM"], "model_type": "llama"}
            text = json.dumps({**language.config.to_mapping(), **settings})
            Path(folder, "config.json").write_text(text, encoding="utf-8")
            save_file(_published_weights(language), Path(folder, "model.safetensors"))
            started = self._program.ask(folder=folder, dtype=dtype, threads=torch.get_num_threads())
        self.name = f"vLLM {started['version']}"

    def generate(
        self, prompts: Sequence[Sequence[int]], counts: Sequence[int], *, batch_size: int
    ) -> TimedAnswers:
        """Submit all prompts at once; it batches them itself."""
        del batch_size
        return TimedAnswers(**self._program.ask(prompts=prompts, counts=counts))
