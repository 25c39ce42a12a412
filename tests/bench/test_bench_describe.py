"""The whole job: each point does its own work, and failures are counted and named."""

import pytest
from PIL import Image

from minigpt4_runtime import SamplingParams
from minigpt4_runtime.bench.describe import folder_sizes, measure_describe


@pytest.mark.parametrize(
    ("num_images", "sizes"),
    [(1, [1]), (2, [1, 2]), (3, [1, 2, 3]), (4, [1, 2, 4]), (100, [1, 2, 4, 8, 16, 32, 64, 100])],
)
def test_a_folder_grows_by_doubling(num_images, sizes):
    assert folder_sizes(num_images) == sizes


@pytest.fixture
def pictures(tmp_path):
    paths = [tmp_path / f"{number}.png" for number in range(3)]
    for number, path in enumerate(paths):
        Image.new("RGB", (40, 40), (80 * number, 10, 200)).save(path)
    return paths


def measure(model, pictures, **settings):
    sampling = SamplingParams(max_new_tokens=4, ignore_eos=True, stop=())
    *_, whole = measure_describe(model, pictures, "Describe this image.", sampling, **settings)
    return whole


def test_every_number_of_a_folder(demo_model, pictures):
    described = measure(demo_model, pictures, repeats=3)
    point = described.point
    assert (point.num_images, point.num_failed, described.failures) == (3, 0, {})
    assert point.seconds == sorted(described.tries["seconds"])[1]
    assert len(described.tries["seconds"]) == 3
    assert point.images_per_second == pytest.approx(3 / point.seconds)
    assert point.tokens_per_second == pytest.approx(12 / point.seconds)
    assert point.ms_per_image == pytest.approx(1e3 * point.seconds / 3)
    assert point.tokens_per_image == 4


def test_a_folder_is_measured_as_it_grows(demo_model, pictures):
    sampling = SamplingParams(max_new_tokens=2)
    points = [
        each.point for each in measure_describe(demo_model, pictures, "?", sampling, repeats=1)
    ]
    assert [point.num_images for point in points] == [1, 2, 3]


def test_nothing_is_left_for_the_next_run(demo_model, pictures):
    measure(demo_model, pictures, repeats=2)
    assert demo_model.stats().num_encoded_images == 3


def test_a_broken_picture_is_named_and_counts_in_no_rate(demo_model, pictures):
    pictures[1].write_bytes(b"no picture")
    described = measure(demo_model, pictures, repeats=1)
    point = described.point
    assert (point.num_images, point.num_failed) == (3, 1)
    assert point.images_per_second == pytest.approx(2 / point.seconds)
    assert list(described.failures) == [str(pictures[1])]
    assert "1.png is not a picture" in described.failures[str(pictures[1])]


def test_where_nothing_could_be_read_there_is_no_cost(demo_model, tmp_path):
    path = tmp_path / "torn.png"
    path.write_bytes(b"no picture")
    point = measure(demo_model, [path], repeats=1).point
    assert (point.num_failed, point.ms_per_image, point.tokens_per_image) == (1, None, None)
    assert point.images_per_second == 0
