"""How fast pictures become rows: each stage has its own time, and the times add up."""

import io

import pytest
from PIL import Image

from minigpt4_runtime import MiniGPT4
from minigpt4_runtime.bench import vision
from minigpt4_runtime.bench.ceilings import measure_ceilings
from minigpt4_runtime.bench.costs import vision_gigaflops
from minigpt4_runtime.bench.vision import StageClock, made_up_photo, measure_vision

STAGES = ["decode", "preprocess", "tower", "projection"]


class Compiled:
    """Stands for a model whose image side is one graph, on a clock of its own."""

    device, dtype = "cpu", "float32"

    def __init__(self, config, clock):
        self.config = config
        self.clock = clock
        self.probe = self

    def embed_images(self, pictures, *, at_once, on_stage):
        assert at_once == len(pictures)
        for _ in pictures:
            self.end("decode", 0.010, on_stage)
            self.end("preprocess", 0.004, on_stage)
        self.end("projection", 0.050 + 0.010 * len(pictures), on_stage)

    def end(self, stage, seconds, on_stage):
        self.clock.now += seconds
        on_stage(stage)

    def synchronize(self):
        self.clock.num_synchronized += 1

    def use_engine(self, engine):
        assert engine.num_blocks == 1, "a cache would count in the peak of memory"

    def reset_peak_memory(self):
        pass

    def peak_memory_bytes(self):
        return 5


class Clock:
    now = 100.0
    num_synchronized = 0


@pytest.fixture
def clock(monkeypatch):
    clock = Clock()
    # Ceilings are measured before: they need the real clock.
    measure_ceilings("cpu", "float32")
    monkeypatch.setattr(vision.time, "perf_counter", lambda: clock.now)
    return clock


def test_stages_of_the_same_name_add_up(clock):
    stages = StageClock()
    for stage, seconds in [("decode", 1.0), ("tower", 2.0), ("decode", 4.0)]:
        clock.now += seconds
        stages(stage)
    assert stages.seconds == {"decode": 5.0, "tower": 2.0}


def test_every_number_of_a_compiled_graph(clock, demo_model):
    def load():
        clock.now += 3.0
        return Compiled(demo_model.config, clock)

    pictures = [made_up_photo()]
    cold, warm = measure_vision("onnx", load, pictures, batch_sizes=[4], repeats=3)
    ceiling = measure_ceilings("cpu", "float32").gigaflops_per_second
    point = cold.point
    assert (point.start, point.batch_size, point.load_ms) == ("cold", 1, pytest.approx(3000))
    assert point.latency_ms == pytest.approx(74)
    point = warm.point
    assert (point.runtime, point.start, point.batch_size) == ("onnx", "warm", 4)
    assert (point.decode_ms, point.preprocess_ms) == pytest.approx((10, 4))
    assert point.encode_ms == pytest.approx(22.5)
    assert point.latency_ms == pytest.approx(36.5)
    assert (point.tower_ms, point.projection_ms, point.load_ms) == (None, None, None)
    assert point.images_per_second == pytest.approx(1e3 / 36.5)
    gigaflops = vision_gigaflops(demo_model.config) / 0.0225
    assert point.gigaflops_per_second == pytest.approx(gigaflops)
    assert point.ceiling_share == pytest.approx(gigaflops / ceiling)
    assert point.peak_memory_bytes == 5
    assert warm.tries["latency_ms"] == pytest.approx([36.5] * 3)
    assert warm.tries["encode_ms"] == pytest.approx([22.5] * 3)
    # Once loaded, the cold picture, a warm-up and three tries.
    assert clock.num_synchronized == 6


def test_torch_shows_every_stage():
    points = [
        each.point
        for each in measure_vision(
            "torch", lambda: MiniGPT4.load(device="cpu"), [made_up_photo()], batch_sizes=[1, 3],
            repeats=2,
        )
    ]  # fmt: skip
    assert [(p.start, p.batch_size) for p in points] == [("cold", 1), ("warm", 1), ("warm", 3)]
    for point in points:
        stages = [getattr(point, f"{stage}_ms") for stage in STAGES]
        assert all(ms > 0 for ms in stages)
        assert point.latency_ms == pytest.approx(sum(stages))
        assert point.encode_ms == pytest.approx(point.tower_ms + point.projection_ms)


def test_the_made_up_photo_is_a_photo_and_always_the_same():
    with Image.open(io.BytesIO(made_up_photo())) as picture:
        assert (picture.format, picture.size, picture.mode) == ("JPEG", (640, 480), "RGB")
        assert len(picture.getcolors(2**20)) > 10_000
    assert made_up_photo() == made_up_photo()
