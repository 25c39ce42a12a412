"""The table of sources: ours, and a user's own over it."""

import math
import re

import pytest

from minigpt4_runtime.checkpoint.blank_model import model_shapes
from minigpt4_runtime.checkpoint.sizes import running_bytes
from minigpt4_runtime.checkpoint.sizes import weight_bytes as bytes_of
from minigpt4_runtime.checkpoint.sources import read_sources
from minigpt4_runtime.errors import ConfigError
from minigpt4_runtime.presets import PRESETS

PART = """
[parts.tower]
role = "vision"
hosts = ["https://mirror.example/{name}"]
files = [{ name = "tower.pth", size = 12 }]
"""


@pytest.fixture
def own(tmp_path):
    def write(text):
        path = tmp_path / "own.toml"
        path.write_text(text, encoding="utf-8")
        return path

    return write


def test_our_models_are_the_published_ones():
    table = read_sources()
    assert list(table) == ["vicuna-7b", "vicuna-13b", "llama2-7b", "minigpt-v2"]
    assert {model.preset for model in table.values()} == set(PRESETS)
    for name, model in table.items():
        roles = {part.role for part in model.parts}
        assert ("qformer" in roles) == (PRESETS[name].qformer is not None)
        assert all(part.what and part.licence != "not stated" for part in model.parts)


def test_our_places_are_the_originals():
    places = [
        place
        for model in read_sources().values()
        for part in model.parts
        for file in part.files
        for place in file.hosts
    ]
    text = "\n".join(places)
    bucket = "https://storage.googleapis.com/sfr-vision-language-research/LAVIS/models/BLIP2"
    drive = "https://drive.google.com/file/d"
    for place in (
        f"{bucket}/eva_vit_g.pth",
        f"{bucket}/blip2_pretrained_flant5xxl.pth",
        f"{drive}/1RY9jV0dyqLX-o38LrumkKRh6Jtaop58R/view",
        f"{drive}/1a4zLvaiDBr-36pasffmgpvH5P7CKmpze/view",
        f"{drive}/11nAPjEok8eAGGEG1N2vXo3kBLCg0WgUk/view",
        "hub:meta-llama/Llama-2-7b-chat-hf/config.json",
        "hub:google-bert/bert-base-uncased/config.json",
    ):
        assert place in places, place
    assert re.search(r"hub:Vision-CAIR/vicuna-7b@[0-9a-f]{40}/tokenizer.model", text)
    assert re.search(r"hub:Vision-CAIR/vicuna@[0-9a-f]{40}/pytorch_model-00003-of-00003.bin", text)


def test_what_no_host_tells_is_in_our_table():
    """The Hub tells size and digest of what it gives; Drive and the bucket do not."""
    for model in read_sources().values():
        for part in model.parts:
            for file in part.files:
                if not file.hosts[0].startswith("hub:"):
                    assert file.size is not None, file.name
                    assert file.sha256 is not None, file.name


def test_an_own_entry_takes_the_place_of_ours(own):
    text = PART.replace("tower", "eva-vit-g")
    model = read_sources(own(text))["vicuna-7b"]
    (file,) = next(part.files for part in model.parts if part.role == "vision")
    assert file.hosts == ("https://mirror.example/eva-vit-g.pth",)
    assert file.size == 12
    # The others are as they were.
    ours = read_sources()["vicuna-7b"].parts
    assert [part for part in model.parts if part.role != "vision"] == [
        part for part in ours if part.role != "vision"
    ]


def test_an_own_model_is_one_more(own):
    text = (
        f'[models.mine]\nparts = ["vicuna-7b", "tower", "projection-7b", "blip2", "bert"]\n{PART}'
    )
    table = read_sources(own(text))
    assert "vicuna-7b" in table
    assert table["mine"].preset is None


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("= 3", "is no TOML"),
        ("[hosts.a]", "hosts is not known here"),
        ("models = 3", "its content is not known here"),
        ("[models.a]", "models.a lacks parts"),
        ("[models.a]\nparts = ['no-such']", "there is no [parts.no-such]"),
        ("[models.a]\nparts = ['bert']", "its parts are bert; a model has"),
        ("[models.'../a']\nparts = []", "a model's name is letters"),
        (
            "[models.vicuna-7b]\nparts = ['vicuna-7b', 'eva-vit-g', 'projection-7b']\npreset = 'x'",
            "preset is 'x'; it must be one of vicuna-7b",
        ),
        (PART.replace('role = "vision"', ""), "parts.tower lacks role"),
        (PART.replace("vision", "ear"), "role is 'ear'; it must be one of language"),
        (PART.replace("hosts", "host"), "has no setting 'host'. Did you mean 'hosts'?"),
        (PART.replace('["https://mirror.example/{name}"]', "[]"), "hosts is []"),
        (PART.replace("https://mirror", "mirror"), "'mirror.example/{name}' is no place; https://"),
        (PART.replace("https://mirror.example", "http://[::1"), "is no place"),
        (PART.replace("mirror.example", "mirror.example:65536"), "is no place"),
        (PART.replace("https://mirror.example/{name}", "hub:owner/{name}"), "hub:OWNER/REPOSITORY"),
        ("[models.a]\nparts = [['bert']]", "there is no [parts.['bert']]"),
        (PART.replace('"tower.pth"', '"../tower.pth"'), "'../tower.pth' is no plain file name"),
        (PART.replace("size = 12", "size = '12'"), "size is '12'; a whole number is wanted"),
        (PART.replace("size = 12", "size = true"), "size is True; a whole number is wanted"),
        (PART.replace('"vision"', "3"), "role is 3; a text is wanted"),
        (PART.replace("size = 12", "size = 0"), "the size of tower.pth is 0"),
        (PART.replace("size = 12", "sha256 = 'ab'"), "the sha256 of tower.pth is no 64 digits"),
        (PART.replace('[{ name = "tower.pth", size = 12 }]', "[]"), "files must be there"),
        ("parts.tower = 3", "parts.tower is 3; named values are wanted"),
    ],
)
def test_a_table_that_makes_no_sense_is_refused(own, text, words):
    path = own(text)
    with pytest.raises(ConfigError) as failure:
        read_sources(path)
    assert words in str(failure.value)
    assert str(path) in str(failure.value)


def test_a_table_that_is_not_there(tmp_path):
    with pytest.raises(ConfigError, match="cannot be read"):
        read_sources(tmp_path / "none.toml")


def test_presets_are_of_the_published_sizes():
    """Llama 7B has 6.74 billion numbers and 13B 13.02, EVA-ViT-g 0.99 and the Q-Former 0.1."""
    shapes = {name: model_shapes(config).values() for name, config in PRESETS.items()}
    billions = {name: sum(map(math.prod, each)) / 1e9 for name, each in shapes.items()}
    assert billions == pytest.approx(
        {"vicuna-7b": 7.83, "vicuna-13b": 14.11, "llama2-7b": 7.75, "minigpt-v2": 7.75}, abs=0.02
    )
    assert bytes_of("vicuna-7b", "float32") == 2 * bytes_of("vicuna-7b", "bfloat16")
    # Keys and values of 2048 tokens: 2 · 32 layers · 4096 · 2048 · 2 bytes are 1 GiB.
    assert running_bytes("vicuna-7b", "float16") - bytes_of("vicuna-7b", "float16") == 2**30
