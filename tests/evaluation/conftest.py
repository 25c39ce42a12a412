"""A tiny random CLIP, in Hugging Face's layout and in open_clip's, and pictures to judge."""

import json

import numpy
import pytest
import torch
from PIL import Image


@pytest.fixture(scope="session")
def clip_dir(tmp_path_factory):
    """A folder as transformers writes it: every width small, a vocabulary of single letters."""
    import transformers
    from tokenizers.pre_tokenizers import ByteLevel

    letters = sorted(ByteLevel.alphabet())
    words = [*letters, *(f"{letter}</w>" for letter in letters), "<|startoftext|>"]
    vocab = {word: index for index, word in enumerate([*words, "<|endoftext|>"])}
    torch.manual_seed(0)
    towers = {"num_hidden_layers": 2, "num_attention_heads": 2, "hidden_act": "gelu"}
    model = transformers.CLIPModel(transformers.CLIPConfig(
        projection_dim=24,
        text_config={
            "vocab_size": len(vocab), "hidden_size": 32, "intermediate_size": 48,
            "max_position_embeddings": 77, "eos_token_id": len(vocab) - 1, "projection_dim": 24,
            **towers,
        },
        vision_config={
            "hidden_size": 40, "intermediate_size": 56, "image_size": 32, "patch_size": 8,
            "projection_dim": 24, **towers,
        },
    ))  # fmt: skip
    for weight in model.parameters():  # Norms and biases too, so that none may be forgotten.
        torch.nn.init.normal_(weight, std=0.3)
    folder = tmp_path_factory.mktemp("clip")
    model.save_pretrained(folder)
    transformers.CLIPTokenizer(vocab=vocab, merges=[]).save_pretrained(folder)
    transformers.CLIPImageProcessorPil(
        size={"shortest_edge": 32}, crop_size={"height": 32, "width": 32}
    ).save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def open_clip_dir(clip_dir, tmp_path_factory):
    """The same model as open_clip would save it, written from the modules and not by a key map."""
    import transformers

    model = transformers.CLIPModel.from_pretrained(clip_dir)
    weights = {
        "logit_scale": model.logit_scale,
        "positional_embedding": model.text_model.embeddings.position_embedding.weight,
        "token_embedding.weight": model.text_model.embeddings.token_embedding.weight,
        "text_projection": model.text_projection.weight.T,
        "attn_mask": torch.full((77, 77), -torch.inf).triu(1),
        "visual.class_embedding": model.vision_model.embeddings.class_embedding,
        "visual.positional_embedding": model.vision_model.embeddings.position_embedding.weight,
        "visual.conv1.weight": model.vision_model.embeddings.patch_embedding.weight,
        "visual.proj": model.visual_projection.weight.T,
    }

    def add(name, module):
        weights[f"{name}.weight"], weights[f"{name}.bias"] = module.weight, module.bias

    add("ln_final", model.text_model.final_layer_norm)
    add("visual.ln_pre", model.vision_model.pre_layrnorm)
    add("visual.ln_post", model.vision_model.post_layernorm)
    for tower, prefix in ((model.text_model, ""), (model.vision_model, "visual.")):
        for number, layer in enumerate(tower.encoder.layers):
            block, heads = f"{prefix}transformer.resblocks.{number}", layer.self_attn
            fused = heads.q_proj, heads.k_proj, heads.v_proj
            weights[f"{block}.attn.in_proj_weight"] = torch.cat([each.weight for each in fused])
            weights[f"{block}.attn.in_proj_bias"] = torch.cat([each.bias for each in fused])
            add(f"{block}.attn.out_proj", heads.out_proj)
            add(f"{block}.ln_1", layer.layer_norm1)
            add(f"{block}.ln_2", layer.layer_norm2)
            add(f"{block}.mlp.c_fc", layer.mlp.fc1)
            add(f"{block}.mlp.c_proj", layer.mlp.fc2)
    folder = tmp_path_factory.mktemp("open_clip")
    torch.save(
        {name: weight.detach().clone() for name, weight in weights.items()},
        folder / "open_clip_pytorch_model.bin",
    )
    config = {
        "model_cfg": {
            "embed_dim": 24,
            "vision_cfg": {"image_size": 32, "layers": 2, "width": 40, "head_width": 20},
            "text_cfg": {"context_length": 77, "width": 32, "heads": 2, "layers": 2},
        },
        "preprocess_cfg": {"mean": [0.48145466, 0.4578275, 0.40821073],
                           "std": [0.26862954, 0.26130258, 0.27577711]},
    }  # fmt: skip
    (folder / "open_clip_config.json").write_text(json.dumps(config))
    for name in ("tokenizer.json", "tokenizer_config.json"):
        (folder / name).write_bytes((clip_dir / name).read_bytes())
    return folder


@pytest.fixture(scope="session")
def judge(clip_dir):
    from minigpt4_runtime.evaluation.judge import Judge

    return Judge.load(clip_dir, device="cpu")


@pytest.fixture
def images(tmp_path):
    """Ten pictures of noise in several shapes, and one that is none."""
    folder = tmp_path / "images"
    folder.mkdir()
    draws = numpy.random.default_rng(0)
    for number in range(10):
        shape = (40 + 7 * number, 75 - 4 * number, 3)
        picture = Image.fromarray(draws.integers(0, 256, shape, dtype=numpy.uint8))
        picture.save(folder / f"{number}.png")
    (folder / "bad.png").write_bytes(b"\x89PNG\r\n\x1a\n and no more")
    return folder
