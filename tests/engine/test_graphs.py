"""Which steps have a graph, what pads them, and what becomes of one that cannot be captured."""

import logging

import pytest
import torch
from fake_graphs import DeviceAttention, Recorder

from minigpt4_runtime.checkpoint.load import load_model
from minigpt4_runtime.config import EngineConfig
from minigpt4_runtime.engine.graphs import padded_size
from minigpt4_runtime.engine.plan import ImageRows, Slice, StepPlan
from minigpt4_runtime.engine.runner import Runner
from minigpt4_runtime.errors import ConfigError
from minigpt4_runtime.kernels.attention_reference import ReferenceAttention

NUM_BLOCKS, BLOCK_SIZE = 12, 4


@pytest.fixture(scope="module")
def language(golden_model_dir):
    model_dir = golden_model_dir("llama2-gqa")
    return load_model(model_dir, device=torch.device("cpu"), dtype=torch.float32).language


def make_runner(language, kernel=DeviceAttention, **more):
    config = EngineConfig(max_running=10, max_step_tokens=64, block_size=BLOCK_SIZE)
    return Runner(language, None, kernel, config=config, num_blocks=NUM_BLOCKS, **more)


def prompts(*lengths):
    """Each sequence has two blocks of its own."""
    return StepPlan(
        tuple(
            Slice(row, 0, 0, tuple(range(3, 3 + length)), row, 0, (2 * row, 2 * row + 1), (), True)
            for row, length in enumerate(lengths)
        )
    )


def next_tokens(*starts, **changes):
    slices = (Slice(row, 0, at, (9 + row,), row, 2, (), (), True) for row, at in enumerate(starts))
    return StepPlan(tuple(slices), **changes)


@pytest.mark.parametrize(
    ("counts", "size"), [([1], 1), ([2], 2), ([3, 4], 4), ([5, 8], 8), ([9, 16], 16), ([17], 20)]
)
def test_sizes(counts, size):
    assert {padded_size(count, 20) for count in counts} == {size}


def test_no_setting_but_auto_and_off():
    with pytest.raises(ConfigError, match="cuda_graphs is 'on'; it must be auto or off"):
        EngineConfig(cuda_graphs="on")


@pytest.mark.parametrize("filling", [0.0, float("nan")])
def test_padding_touches_nothing_but_the_scratch_block(language, filling):
    padded, plain = (make_runner(language, capture=Recorder().capture), make_runner(language))
    for runner in (padded, plain):
        for side in (runner._cache.keys, runner._cache.values):
            side[:, :NUM_BLOCKS] = 7.0
            side[:, NUM_BLOCKS:] = filling
        runner.execute(prompts(5, 2, 4), {})
    for at in range(3):
        plan = next_tokens(5 + at, 2 + at, 4 + at)
        logits = padded.execute(plan, {})
        assert logits.shape == (3, language.config.vocab_size)
        torch.testing.assert_close(logits, plain.execute(plan, {}))
    for name in ("keys", "values"):
        ours, theirs = (getattr(runner._cache, name) for runner in (padded, plain))
        torch.testing.assert_close(ours[:, :NUM_BLOCKS], theirs[:, :NUM_BLOCKS])
        # The fourth row of each step was padding, and it went there.
        assert not torch.equal(ours[:, NUM_BLOCKS, 0], theirs[:, NUM_BLOCKS, 0])


def test_a_graph_serves_all_steps_of_its_size(language):
    recorder = Recorder()
    runner = make_runner(language, capture=recorder.capture)
    runner.execute(prompts(3, 3, 3), {})
    for starts in ((3, 3, 3), (4, 4), (5, 5), (4, 4, 4), (6,), (5, 5, 5)):
        runner.execute(next_tokens(*starts), {})
    assert (recorder.num_captured, recorder.num_replayed) == (3, 6)


def test_what_is_no_step_of_decoding_has_no_graph(language):
    recorder = Recorder()
    runner = make_runner(language, capture=recorder.capture)
    first = prompts(3, 2)
    runner.execute(first, {})
    unsampled = StepPlan((Slice(0, 0, 3, (9,), 0, 2, ()),))
    # The other ranks are not told which row belongs to an image: its id says so.
    of_image = (language.config.vocab_size,)
    images = StepPlan((Slice(0, 0, 3, of_image, 0, 2, (), (ImageRows("a", 0, 0, 1),), True),))
    sent = StepPlan.decode(images.encode())
    assert [runner._graphs.size_of(plan) for plan in (first, unsampled, images, sent)] == [0] * 4
    assert runner._graphs.size_of(next_tokens(3)) == 1
    assert recorder.num_captured == 0


def test_a_kernel_that_reads_its_step_from_the_host_is_not_captured(language):
    recorder = Recorder()
    runner = make_runner(language, kernel=ReferenceAttention, capture=recorder.capture)
    runner.execute(prompts(3), {})
    runner.execute(next_tokens(3), {})
    assert recorder.num_captured == 0


def test_the_kernel_of_gpus_reads_its_step_from_the_device(language, monkeypatch):
    pytest.importorskip("triton")
    from minigpt4_runtime.kernels import attention_triton as attention

    monkeypatch.setattr(attention, "_WANTED_PROGRAMS", 1)  # The interpreter takes long for each.
    recorder = Recorder()
    graphs = make_runner(language, attention.TritonAttention, capture=recorder.capture)
    plain = make_runner(language)
    for runner in (graphs, plain):
        runner.execute(prompts(5, 2, 4), {})
    for plan in (next_tokens(5, 2, 4), next_tokens(6, 3, 5)):
        torch.testing.assert_close(
            graphs.execute(plan, {}), plain.execute(plan, {}), atol=1e-4, rtol=1e-4
        )
    assert (recorder.num_captured, recorder.num_replayed) == (1, 2)


@pytest.mark.parametrize("fails_here", [True, False])
def test_a_failed_capture_is_told_once_and_the_steps_go_on(language, caplog, fails_here):
    recorder = Recorder()
    recorder.trouble = RuntimeError("operation not permitted\nmore") if fails_here else None
    other = (lambda number: number) if fails_here else (lambda number: 0)
    runner = make_runner(language, capture=recorder.capture, least=other)
    plain = make_runner(language)
    for each in (runner, plain):
        each.execute(prompts(3, 2), {})
    with caplog.at_level(logging.WARNING):
        for plan in (next_tokens(3, 2), next_tokens(4)):
            torch.testing.assert_close(runner.execute(plan, {}), plain.execute(plan, {}))
    (record,) = caplog.records
    why = "operation not permitted" if fails_here else "another rank could not be captured"
    assert f"of 2 sequences could not be captured as a graph ({why})" in record.getMessage()
    assert recorder.num_replayed == 0


@pytest.mark.gpu
def test_a_gpu_computes_the_same_from_graphs(golden_model_dir):
    from minigpt4_runtime.devices.cuda import CudaBackend
    from minigpt4_runtime.kernels.registry import bind_attention

    backend = CudaBackend()
    model_dir = golden_model_dir("vicuna")
    there = load_model(model_dir, device=backend.device, dtype=torch.float32).language

    def kernel(cache):
        return bind_attention(backend.facts.attention, cache)

    graphs, plain = (make_runner(there, kernel, capture=each) for each in (backend.capture, None))
    for runner in (graphs, plain):
        runner.execute(prompts(5, 2, 4), {})
    for starts in ((5, 2, 4), (6, 3, 5), (7, 4), (8,), (7, 4, 6), (9,)):
        plan = next_tokens(*starts)
        torch.testing.assert_close(
            graphs.execute(plan, {}), plain.execute(plan, {}), atol=1e-4, rtol=1e-4
        )
    assert graphs._graphs.size_of(next_tokens(3)) == 1, "a capture has failed, or the kernel cannot"
