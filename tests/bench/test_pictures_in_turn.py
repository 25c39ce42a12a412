"""Which pictures the image side is measured with."""

from pathlib import Path

from minigpt4_runtime.bench import vision


class Model:
    """Remembers which pictures it was shown."""

    def __init__(self):
        self.shown = []
        self.probe = self

    def embed_images(self, batch, *, at_once, on_stage):
        self.shown.append("".join(picture.name for picture in batch))

    def synchronize(self):
        pass

    def reset_peak_memory(self):
        pass

    def use_engine(self, config):
        pass


def test_each_repeat_goes_on_with_the_pictures(monkeypatch):
    monkeypatch.setattr(vision, "_summarise", lambda *_: None)
    model = Model()
    pictures = [Path(name) for name in "abcde"]
    list(vision.measure_vision("torch", lambda: model, pictures, batch_sizes=[2], repeats=4))
    # Cold, the one that warms up, and then all pictures in turn.
    assert model.shown == ["a", "ab", "ab", "cd", "ea", "bc"]
