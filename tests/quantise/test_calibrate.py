"""Calibration: which pictures are read, and what the walk through the layers makes of them."""

import json
import random
from pathlib import Path
from typing import get_args

import pytest
import torch
from safetensors.torch import load_file

from minigpt4_runtime.checkpoint.config_file import load_config
from minigpt4_runtime.checkpoint.load import load_model
from minigpt4_runtime.checkpoint.manifest import read_manifest
from minigpt4_runtime.errors import ConfigError
from minigpt4_runtime.evaluation import scenes
from minigpt4_runtime.formats.registry import format_of
from minigpt4_runtime.model.causal import causal_attention
from minigpt4_runtime.quantise import samples as samples_module
from minigpt4_runtime.quantise.choice import Method, QuantisePlan
from minigpt4_runtime.quantise.quantise import quantise
from minigpt4_runtime.quantise.samples import Sample, encode_samples, read_samples

DEMO_DIR = Path(__file__).parents[2] / "src/minigpt4_runtime/assets/demo"
CPU = torch.device("cpu")
PLAN = QuantisePlan(weights="w4a16", image_side="keep", head="keep")


@pytest.fixture(scope="module")
def pictures(tmp_path_factory):
    """A folder of drawn scenes, and a .jsonl of what they show."""
    folder, rng = tmp_path_factory.mktemp("pictures"), random.Random(5)
    lines = []
    for number in range(8):
        scene = scenes.random_scene(rng, held_out=False)
        scenes.draw(scene, rng).save(folder / f"{number}.png")
        lines.append(json.dumps({"image": f"{number}.png", "answer": scenes.describe(scene)}))
    (folder / "texts.jsonl").write_text("\n".join(lines))
    return folder


def hidden_of(folder, rows):
    language = load_model(folder, device=CPU, dtype=torch.float32).language
    with torch.inference_mode():
        return torch.cat([
            language(each, torch.arange(len(each)), causal_attention()) for each in rows
        ])  # fmt: skip


def test_layers_come_nearer_to_the_floats_than_without(pictures, tmp_path):
    quantise(DEMO_DIR, tmp_path / "plain", PLAN)
    for method in get_args(Method):
        by, texts = tmp_path / method, pictures / "texts.jsonl"
        quantise(DEMO_DIR, by, PLAN, calibrate=texts, method=method)
        # It is a folder like any other.
        assert read_manifest(by) == read_manifest(tmp_path / "plain")
        assert forms_in(by) == forms_in(tmp_path / "plain")
    config = load_config(DEMO_DIR)
    table = load_model(DEMO_DIR, device=CPU, dtype=torch.float32).language.token_embedding.weight
    # Pictures that were not calibrated by.
    rng, others = random.Random(99), []
    for number in range(6):
        scene = scenes.random_scene(rng, held_out=True)
        scenes.draw(scene, rng).save(tmp_path / f"{number}.png")
        others.append(Sample(tmp_path / f"{number}.png", scenes.describe(scene)))
    rows = encode_samples(others, DEMO_DIR, config, table)
    truth = hidden_of(DEMO_DIR, rows)
    errors = {
        each: float((hidden_of(tmp_path / each, rows) - truth).square().mean())
        for each in ("plain", *get_args(Method))
    }
    assert 0 < errors["gptq"] < 0.75 * errors["plain"]
    assert 0 < errors["awq"] < 0.9 * errors["plain"]
    assert 0 < errors["awq+gptq"] < 0.75 * errors["plain"]


def forms_in(folder):
    return {
        name: (tensor.shape, tensor.dtype)
        for name, tensor in load_file(folder / "model.safetensors").items()
    }


def test_only_layers_are_rounded_otherwise(pictures, tmp_path):
    plan = QuantisePlan(weights="w8a8", image_side="w8a8")
    quantise(DEMO_DIR, tmp_path / "plain", plan)
    quantise(DEMO_DIR, tmp_path / "by", plan, calibrate=pictures)
    plain, by = (
        load_model(tmp_path / each, device=CPU, dtype=torch.float32).state_dict()
        for each in ("plain", "by")
    )
    differ = {name for name in plain if not torch.equal(plain[name], by[name])}
    assert any("layers.5.mlp_down.weight" in name for name in differ)
    assert all(name.startswith("language.layers.") for name in differ)
    assert not any("norm" in name for name in differ)
    assert format_of(read_manifest(tmp_path / "by").weight_format, "vision.qformer").name == "w8a8"


def test_rows_hold_prompt_picture_and_text(pictures):
    config = load_config(DEMO_DIR)
    model = load_model(DEMO_DIR, device=CPU, dtype=torch.float32)
    table = model.language.token_embedding.weight
    with_text, without = (
        encode_samples([Sample(pictures / "0.png", text)], DEMO_DIR, config, table)[0]
        for text in ("a large blue cross", "")
    )
    assert with_text.shape[1] == config.language.hidden_size
    assert len(without) < len(with_text)
    assert torch.equal(without, with_text[: len(without)])
    # Every row but the picture's is an embedding.
    is_embedding = (without[:, None] == table).all(-1).any(-1)
    assert int((~is_embedding).sum()) == config.rows_per_image


def test_what_is_read_of_a_folder_and_of_a_file(pictures, tmp_path, monkeypatch):
    assert [each.path.name for each in read_samples(pictures)][:2] == ["0.png", "1.png"]
    assert all(each.text == "" for each in read_samples(pictures))
    found = read_samples(pictures / "texts.jsonl")
    assert len(found) == 8
    assert found[3].path == pictures / "3.png"
    assert found[3].text.startswith("There ")
    monkeypatch.setattr(samples_module, "MOST_SAMPLES", 3)
    assert len(read_samples(pictures)) == len(read_samples(pictures / "texts.jsonl")) == 3
    lines = '{"image": "a.png", "answer": null, "error": "no"}\n\n{"image": "b.png", "text": "t"}'
    (tmp_path / "some.jsonl").write_text(lines)
    assert read_samples(tmp_path / "some.jsonl") == [Sample(Path("b.png"), "t")]


@pytest.mark.parametrize(
    ("make", "said"),
    [
        (lambda folder: folder, "There are no pictures in the folder"),
        (lambda folder: folder / "none", "it must be a folder or a .jsonl file"),
        (lambda folder: write(folder, ""), "holds no pictures with texts"),
        (lambda folder: write(folder, "[1]"), r"line 1 is no \{\"image\""),
        (lambda folder: folder / "none.jsonl", "cannot be read"),
    ],
)
def test_what_cannot_be_calibrated_by_leaves_nothing(make, said, tmp_path):
    (tmp_path / "given").mkdir()
    place = make(tmp_path / "given")
    with pytest.raises(ConfigError, match=said):
        quantise(DEMO_DIR, tmp_path / "out", PLAN, calibrate=place)
    assert not (tmp_path / "out").exists()


def test_a_method_without_pictures_is_refused(tmp_path):
    with pytest.raises(ConfigError, match="--method is awq, and there is nothing to read"):
        quantise(DEMO_DIR, tmp_path / "out", PLAN, method="awq")
    assert not (tmp_path / "out").exists()


def write(folder, text):
    (folder / "texts.jsonl").write_text(text)
    return folder / "texts.jsonl"


def test_two_of_four_are_kept_by_magnitude_or_by_inputs(pictures, tmp_path):
    plan = QuantisePlan(weights="w8a8-sparse24", image_side="keep")
    quantise(DEMO_DIR, tmp_path / "plain", plan)
    # 2:4 formats are not scaled, whatever the method.
    quantise(DEMO_DIR, tmp_path / "by", plan, calibrate=pictures / "texts.jsonl", method="awq")
    floats = load_model(DEMO_DIR, device=CPU, dtype=torch.float32).language
    plain, by = (
        load_model(tmp_path / each, device=CPU, dtype=torch.float32).language
        for each in ("plain", "by")
    )
    kept = {}
    for name, model in (("plain", plain), ("by", by)):
        linear = model.layers[2].mlp_up
        assert linear.weight_format.name == "w8a8-sparse24"
        found = linear.weight_format.unpack(dict(linear.named_parameters()))
        fours = (found != 0).view(-1, 4).sum(1)
        assert int(fours.max()) == 2
        kept[name] = found != 0
    # By magnitude, the smallest number that is kept is no smaller than those that are not.
    magnitudes = floats.layers[2].mlp_up.weight.abs().view(-1, 4)
    dropped = magnitudes.masked_fill(kept["plain"].view(-1, 4), 0).amax(1)
    smallest = magnitudes.masked_fill(~kept["plain"].view(-1, 4), 9).amin(1)
    assert bool((smallest >= dropped).all())
    assert not torch.equal(kept["plain"], kept["by"])
