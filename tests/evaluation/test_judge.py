"""The judge gives transformers' own numbers, from either layout, and refuses what is no judge."""

import json
import shutil

import numpy
import pytest
import torch
from PIL import Image

from minigpt4_runtime.errors import BackendUnavailableError, CheckpointError
from minigpt4_runtime.evaluation import open_clip
from minigpt4_runtime.evaluation.judge import Judge

TEXTS = ["a dog", "", "Zwei Hunde, 2 dogs!", "very long " * 30, "x" * 75, "x" * 74]


@pytest.fixture
def pictures(images):
    return [Image.open(images / f"{number}.png").convert("RGB") for number in range(4)]


@pytest.fixture(scope="module")
def reference(clip_dir):
    import transformers  # It takes a second, also of those who only collect tests.

    model = transformers.CLIPModel.from_pretrained(clip_dir)
    tokenizer = transformers.CLIPTokenizer.from_pretrained(clip_dir)
    return model.eval(), tokenizer


def test_scores_are_those_of_transformers(judge, reference, pictures):
    model, tokenizer = reference
    words = tokenizer(TEXTS, padding=True, truncation=True, max_length=77, return_tensors="pt")
    pixels = torch.stack([preprocess(picture) for picture in pictures])
    with torch.inference_mode():
        output = model(**words, pixel_values=pixels)
    expected = output.logits_per_image / model.logit_scale.detach().exp()
    found = judge.embed_images(pictures) @ judge.embed_texts(TEXTS).T
    assert found.shape == (4, len(TEXTS))
    torch.testing.assert_close(found, expected, atol=2e-6, rtol=0)
    assert found.std() > 0.02, "a score that never changes would agree with anything"


def preprocess(picture):
    """CLIP's preprocessing in plain Pillow and numpy: short side to 32, middle cut, normalised."""
    width, height = picture.size
    short = min(width, height)
    resized = picture.resize((width * 32 // short, height * 32 // short), Image.Resampling.BICUBIC)
    left, top = (resized.width - 32) // 2, (resized.height - 32) // 2
    levels = numpy.asarray(resized.crop((left, top, left + 32, top + 32)), numpy.float64) / 255
    mean, std = (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)
    return torch.from_numpy(((levels - mean) / std).transpose(2, 0, 1)).float()


def test_one_at_a_time_or_many_is_the_same(judge, pictures):
    alone = torch.cat([judge.embed_images([picture]) for picture in pictures])
    torch.testing.assert_close(judge.embed_images(pictures), alone, atol=2e-6, rtol=0)
    alone = torch.cat([judge.embed_texts([text]) for text in TEXTS])
    torch.testing.assert_close(judge.embed_texts(TEXTS), alone, atol=2e-6, rtol=0)


def test_tokens_are_counted_before_they_are_cut(judge):
    # Each letter is a token, the begin and the end are two more.
    assert judge.count_tokens(TEXTS) == [6, 2, 18, 242, 77, 76]
    assert judge.max_tokens == 77
    longer = judge.embed_texts(["x " * 75, "x " * 99])
    torch.testing.assert_close(longer[0], longer[1])


def test_half_a_character_is_read_as_a_question_mark(judge):
    odd, plain = judge.embed_texts(["caf\udce9", "caf?"])
    torch.testing.assert_close(odd, plain)


@pytest.mark.parametrize("name", ["", "open_clip_pytorch_model.bin"])
def test_open_clip_s_layout_gives_the_same_scores(judge, open_clip_dir, pictures, name):
    other = Judge.load(open_clip_dir / name, device="cpu")
    torch.testing.assert_close(other.embed_images(pictures), judge.embed_images(pictures))
    torch.testing.assert_close(other.embed_texts(TEXTS), judge.embed_texts(TEXTS))
    assert other.max_tokens == 77


def test_the_digest_names_the_weights(judge, clip_dir, tmp_path):
    assert Judge.load(clip_dir, device="cpu").digest == judge.digest
    import transformers

    model = transformers.CLIPModel.from_pretrained(clip_dir)
    with torch.no_grad():
        model.text_projection.weight[3, 3] += 1e-3
    shutil.copytree(clip_dir, tmp_path / "other")
    model.save_pretrained(tmp_path / "other")
    assert Judge.load(tmp_path / "other", device="cpu").digest != judge.digest


@pytest.mark.parametrize(
    ("width", "num_heads"), [(768, 12), (1024, 16), (1280, 16), (1408, 16), (1664, 16)]
)
def test_published_widths_tell_their_heads(width, num_heads):
    weights = {
        "visual.conv1.weight": torch.empty(width, 3, 14, 14, device="meta"),
        "visual.positional_embedding": torch.empty(257, width, device="meta"),
        "visual.transformer.resblocks.0.mlp.c_fc.weight": torch.empty(8, width, device="meta"),
        "visual.proj": torch.empty(width, 1024, device="meta"),
    }
    config = open_clip._vision_config(weights, {}, "gelu")
    assert (config["num_attention_heads"], config["image_size"]) == (num_heads, 224)


def test_openai_s_activation_is_found(open_clip_dir, tmp_path):
    folder = tmp_path / "quick"
    shutil.copytree(open_clip_dir, folder)
    config = json.loads((folder / "open_clip_config.json").read_text())
    config["model_cfg"]["quick_gelu"] = True
    (folder / "open_clip_config.json").write_text(json.dumps(config))
    plain, _ = open_clip.read(open_clip_dir / open_clip.FILE_NAME)
    quick, _ = open_clip.read(folder / open_clip.FILE_NAME)
    assert plain["vision_config"]["hidden_act"] == plain["text_config"]["hidden_act"] == "gelu"
    assert (
        quick["vision_config"]["hidden_act"] == quick["text_config"]["hidden_act"] == "quick_gelu"
    )


class Exploit:
    def __reduce__(self):
        return print, ("run",)


class TestRefusals:
    @pytest.fixture
    def broken(self, open_clip_dir, tmp_path):
        """Changes a copy of the weights and loads it."""

        def load(change):
            folder = tmp_path / "broken"
            shutil.copytree(open_clip_dir, folder)
            path = folder / open_clip.FILE_NAME
            weights = torch.load(path, weights_only=True)
            torch.save(change(weights) or weights, path)
            return Judge.load(folder, device="cpu")

        return load

    def test_a_missing_weight(self, broken):
        with pytest.raises(CheckpointError, match=r"has no weight visual\.proj"):
            broken(lambda weights: weights.pop("visual.proj") is None)

    def test_a_missing_bias(self, broken):
        with pytest.raises(CheckpointError, match=r"1 weights are missing .*pre_layrnorm\.bias"):
            broken(lambda weights: weights.pop("visual.ln_pre.bias") is None)

    def test_a_weight_of_another_architecture(self, broken):
        with pytest.raises(CheckpointError, match=r"holds visual\.trunk\.stem\.weight"):
            broken(lambda weights: weights.update({"visual.trunk.stem.weight": torch.ones(1)}))

    def test_code_in_a_pickle_is_not_run(self, broken, capsys):
        with pytest.raises(CheckpointError, match="not run") as caught:
            broken(lambda weights: {"x": Exploit()})
        assert "weights_only" not in str(caught.value)
        assert "run" not in capsys.readouterr().out

    def test_something_that_is_no_dict(self, broken):
        with pytest.raises(CheckpointError, match="has no weight"):
            broken(lambda weights: [torch.ones(1)])

    def test_an_unknown_width_without_a_config(self, open_clip_dir, tmp_path):
        for path in open_clip_dir.iterdir():
            if path.name != "open_clip_config.json":
                shutil.copy(path, tmp_path)
        with pytest.raises(CheckpointError, match=r"40 wide.* Put .*open_clip_config\.json"):
            Judge.load(tmp_path, device="cpu")

    @pytest.mark.parametrize("kind", ["clip_dir", "open_clip_dir"])
    def test_no_tokenizer(self, request, tmp_path, kind):
        for path in request.getfixturevalue(kind).iterdir():
            if not path.name.startswith("tokenizer"):
                shutil.copy(path, tmp_path)
        with pytest.raises(CheckpointError, match=r"has no tokenizer. Put tokenizer"):
            Judge.load(tmp_path, device="cpu")

    def test_half_a_hugging_face_folder(self, clip_dir, tmp_path):
        from safetensors.torch import load_file, save_file

        shutil.copytree(clip_dir, tmp_path / "half")
        weights = load_file(tmp_path / "half" / "model.safetensors")
        del weights["visual_projection.weight"]
        save_file(weights, tmp_path / "half" / "model.safetensors", metadata={"format": "pt"})
        with pytest.raises(CheckpointError, match=r"visual_projection\.weight among them"):
            Judge.load(tmp_path / "half", device="cpu")

    def test_cut_weights(self, clip_dir, tmp_path):
        shutil.copytree(clip_dir, tmp_path / "cut")
        path = tmp_path / "cut" / "model.safetensors"
        path.write_bytes(path.read_bytes()[:-100])
        with pytest.raises(CheckpointError, match=r"weights in .*cut are damaged .*Download them"):
            Judge.load(tmp_path / "cut", device="cpu")

    @pytest.mark.parametrize("name", ["model.safetensors", "config.json"])
    def test_a_file_that_is_none_of_open_clip(self, clip_dir, name):
        with pytest.raises(CheckpointError, match=rf"{name} is a file\. Name the judge's folder"):
            Judge.load(clip_dir / name, device="cpu")

    def test_a_bin_that_is_no_pickle(self, open_clip_dir, tmp_path):
        shutil.copytree(open_clip_dir, tmp_path / "text")
        (tmp_path / "text" / open_clip.FILE_NAME).write_text("Not found\n")
        with pytest.raises(CheckpointError, match="is no file of weights alone") as caught:
            Judge.load(tmp_path / "text", device="cpu")
        assert "weights_only" not in str(caught.value)

    @pytest.mark.parametrize(
        ("config", "message"),
        [
            ([1], "is no JSON object"),
            ({"model_cfg": []}, "model_cfg is \\[\\], and must be an object"),
            ({"model_cfg": {"text_cfg": 3}}, "text_cfg is 3, and must be an object"),
            ({"model_cfg": {"text_cfg": {"heads": "two"}}}, "heads is 'two', and must be a whole"),
            ({"model_cfg": {"vision_cfg": {"head_width": 0}}}, "head_width is 0, and must be"),
            ({"preprocess_cfg": "none"}, "preprocess_cfg is 'none', and must be an object"),
            ({"model_cfg": {"text_cfg": {"heads": 2}, "vision_cfg": {"head_width": 20}},
              "preprocess_cfg": {"mean": 1}}, "mean is 1, and must be three numbers"),
        ],
    )  # fmt: skip
    def test_a_config_of_other_types(self, open_clip_dir, tmp_path, config, message):
        folder = shutil.copytree(open_clip_dir, tmp_path / "odd")
        (folder / "open_clip_config.json").write_text(json.dumps(config))
        with pytest.raises(CheckpointError, match=rf"open_clip_config\.json:? {message}"):
            Judge.load(folder, device="cpu")

    def test_a_folder_without_weights(self, clip_dir, tmp_path):
        for path in clip_dir.iterdir():
            if path.name != "model.safetensors":
                shutil.copy(path, tmp_path)
        with pytest.raises(CheckpointError, match="no CLIP model that can be loaded"):
            Judge.load(tmp_path, device="cpu")

    def test_nothing_there(self, tmp_path):
        with pytest.raises(CheckpointError, match=r"There is no judge at .*hf download laion/"):
            Judge.load(tmp_path / "no")

    def test_another_model(self, clip_dir, tmp_path):
        (tmp_path / "tokenizer.json").touch()
        with pytest.raises(
            CheckpointError, match=r"has neither config\.json nor open_clip_pytorch"
        ):
            Judge.load(tmp_path)

    @pytest.mark.parametrize("device", ["cuda:99", "toaster"])
    def test_no_such_device(self, clip_dir, device):
        with pytest.raises(BackendUnavailableError, match=f"cannot run on {device}"):
            Judge.load(clip_dir, device=device)
