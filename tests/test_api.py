"""What callers of MiniGPT4 rely on, on a golden checkpoint."""

import base64
import io
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from minigpt4_runtime import (
    BackendUnavailableError,
    CheckpointError,
    ConfigError,
    ImageError,
    Message,
    MiniGPT4,
    PromptTooLongError,
    Reply,
    RequestError,
    SamplingParams,
    image,
)
from minigpt4_runtime.devices.cpu import CpuBackend
from minigpt4_runtime.images.pixels import ImageLimits
from minigpt4_runtime.loaded import LoadedModel
from minigpt4_runtime.text.answer import AnswerText

IMAGES = Path(__file__).parent / "goldens/vicuna/images"
PHOTO = IMAGES / "photo_rgb.jpg"
SHORT = SamplingParams(max_new_tokens=6)


@pytest.fixture(scope="module")
def model(golden_model_dir) -> MiniGPT4:
    return MiniGPT4.load(golden_model_dir("vicuna"), device="cpu")


def ask(*parts, role="user"):
    return [{"role": role, "content": list(parts)}]


def test_auto_dtype_on_a_cpu_is_float32(model):
    assert (model.dtype, model.device) == ("float32", "cpu")


def test_a_picture_is_the_same_however_it_is_given(model):
    content = PHOTO.read_bytes()
    opened = Image.open(io.BytesIO(content)).convert("RGB")
    encoded = base64.b64encode(content).decode()
    given = [PHOTO, str(PHOTO), content, opened, np.asarray(opened), image(PHOTO),
             f"data:image/jpeg;base64,{encoded}"]  # fmt: skip
    replies = {model.describe(picture, "What?", SHORT).token_ids for picture in given}
    assert len(replies) == 1
    url = {"type": "image_url", "image_url": {"url": given[-1]}}
    text = {"type": "text", "text": "What?"}
    assert model.chat(ask(url, text), SHORT).token_ids in replies


def test_reply_says_what_it_cost_and_why_it_ended(model):
    reply = model.describe(PHOTO, "What?", SHORT)
    assert isinstance(reply, Reply)
    assert reply.finish_reason == "length"
    assert reply.usage.completion_tokens == len(reply.token_ids) == 6
    prompt = model.encode_prompt(ask(image(PHOTO), "What?"))
    assert reply.usage.prompt_tokens == len(prompt.token_ids)


def test_deltas_add_up_and_the_last_carries_the_reply(model):
    messages = ask(image(PHOTO), "What is in the picture?")
    sampling = SamplingParams(max_new_tokens=24)
    *deltas, last = model.stream(messages, sampling)
    assert all(delta.reply is None for delta in deltas)
    assert last.reply == model.chat(messages, sampling)
    assert "".join(delta.text for delta in (*deltas, last)) == last.reply.text


def test_interleaved_streams_equal_streams_alone(model):
    questions = ["What?", "Why?", "Who is it?"]
    alone = [model.describe(PHOTO, question, SHORT) for question in questions]
    streams = {q: model.stream(ask(image(PHOTO), q), SHORT) for q in questions}
    replies = {}
    while streams:
        for question in list(streams):
            delta = next(streams[question], None)
            if delta is None:
                del streams[question]
            elif delta.reply:
                replies[question] = delta.reply
    assert [replies[question] for question in questions] == alone


def test_the_same_seed_gives_the_same_answer(model):
    hot = {"temperature": 1.5, "top_p": 0.95, "top_k": 50, "max_new_tokens": 12}
    first, again, other = (
        model.describe(PHOTO, "What?", SamplingParams(seed=seed, **hot)).token_ids
        for seed in (3, 3, 4)
    )
    assert first == again != other


def test_stop_strings_end_an_answer_where_they_begin(model):
    messages = ask(image(PHOTO), "What is in the picture?")
    free = model.chat(messages, SamplingParams(max_new_tokens=24, stop=()))
    word = free.text.split()[2]
    stopped = model.chat(messages, SamplingParams(max_new_tokens=24, stop=(word,)))
    assert stopped.finish_reason == "stop"
    assert stopped.text == free.text[: free.text.index(word)].strip()
    assert stopped.token_ids == free.token_ids[: len(stopped.token_ids)]


def test_the_end_can_be_ignored_or_forbidden(golden_model_dir):
    llama2 = MiniGPT4.load(golden_model_dir("llama2"), device="cpu")
    alpha = IMAGES / "alpha.png"
    reply = llama2.describe(alpha, sampling=SamplingParams(max_new_tokens=24))
    assert reply.finish_reason == "stop"
    assert reply.token_ids[-1] == 2
    length = len(reply.token_ids)
    further = llama2.describe(alpha, sampling=SamplingParams(max_new_tokens=24, ignore_eos=True))
    assert further.token_ids[:length] == reply.token_ids
    assert len(further.token_ids) == 24
    forbidden = SamplingParams(max_new_tokens=24, min_new_tokens=length + 2)
    assert 2 not in llama2.describe(alpha, sampling=forbidden).token_ids[: length + 2]


def test_dialogues_take_messages_dicts_and_several_pictures(model):
    first = model.chat(ask(image(PHOTO), "What?"), SHORT)
    dicts = [*ask(image(PHOTO), "What?"), *ask(first.text, role="assistant"), *ask("Why?")]
    messages = [
        Message("user", (image(PHOTO), "What?")),
        Message("assistant", (first.text,)),
        Message("user", ("Why?",)),
    ]
    assert model.chat(dicts, SHORT) == model.chat(messages, SHORT)
    two = model.encode_prompt(ask(image(PHOTO), image(IMAGES / "grey.png"), "Which?"))
    assert len(two.image_spans) == 2
    swapped = ask(image(IMAGES / "grey.png"), image(PHOTO), "Which?")
    straight = ask(image(PHOTO), image(IMAGES / "grey.png"), "Which?")
    assert model.chat(swapped, SHORT).token_ids != model.chat(straight, SHORT).token_ids


def test_text_alone_is_answered(model):
    assert model.chat(ask("Hello"), SHORT).usage.completion_tokens == 6


def test_embedded_pictures_are_float32_rows(model):
    rows = model.embed_images([PHOTO] * 9 + [IMAGES / "grey.png"])
    assert rows.shape == (10, 8, 64)
    assert rows.dtype == torch.float32
    assert torch.allclose(rows[0], rows[8], atol=1e-5)
    assert not torch.allclose(rows[0], rows[9], atol=1e-3)
    assert model.embed_images([]).shape == (0, 8, 64)
    for single in (str(PHOTO), PHOTO, image(PHOTO), np.zeros((30, 40, 3), np.uint8)):
        with pytest.raises(RequestError, match="list of pictures"):
            model.embed_images(single)


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_half_precision_stays_near_float32(golden_model_dir, model, dtype):
    half = MiniGPT4.load(golden_model_dir("vicuna"), device="cpu", dtype=dtype)
    wide, narrow = model.embed_images([PHOTO]), half.embed_images([PHOTO])
    assert float((wide - narrow).abs().max() / wide.abs().max()) < 0.05
    assert half.describe(PHOTO, sampling=SHORT).usage.completion_tokens == 6


def test_what_cannot_fit_is_refused_before_any_work(model, monkeypatch):
    monkeypatch.setattr(LoadedModel, "open_image", None)
    with pytest.raises(PromptTooLongError, match=r"has \d+ tokens .* holds 2048") as caught:
        model.stream(ask(image("not-even-opened.jpg"), "word " * 3000))
    assert caught.value.limit == 2048 < caught.value.num_tokens
    far = {"far": ask(image("not-even-opened.jpg"), "word " * 3000)}
    with pytest.raises(PromptTooLongError):
        model.submit(ask("?"), processors=[lambda seen: seen.logits], branches=far)
    with pytest.raises(RequestError, match=r"do not fit.* hold 2048"):
        model.submit_score(ask(image("not-even-opened.jpg"), "word " * 3000), ["yes"])


def test_an_answer_ends_where_the_context_ends(model):
    used = len(model.encode_prompt(ask("")).token_ids)
    words = "a " * (2048 - used - 2)
    reply = model.chat(ask(words), SamplingParams(max_new_tokens=50, stop=(), ignore_eos=True))
    assert reply.finish_reason == "length"
    assert reply.usage.prompt_tokens + reply.usage.completion_tokens == 2048


def test_wrong_input_is_refused_at_once_and_by_name(model):
    with pytest.raises(ImageError, match=r"nothing-here\.png"):
        model.stream(ask(image("nothing-here.png"), "What?"))
    with pytest.raises(RequestError, match="role"):
        model.stream([{"role": "robot", "content": "x"}])
    with pytest.raises(RequestError, match="num_beams is 65, but only 64"):
        model.describe(PHOTO, sampling=SamplingParams(num_beams=65))
    with pytest.raises(ConfigError, match=r"max_runing.*Did you mean 'max_running'"):
        MiniGPT4.load(model.model_dir, engine={"max_runing": 3})
    with pytest.raises(ConfigError, match="dtype is 'int3'"):
        MiniGPT4.load(model.model_dir, dtype="int3")
    with pytest.raises(ConfigError, match="device is 'tpu'"):
        MiniGPT4.load(model.model_dir, device="tpu")


def test_limits_on_pictures_are_the_callers(golden_model_dir):
    small = MiniGPT4.load(
        golden_model_dir("vicuna"), device="cpu", image_limits=ImageLimits(max_pixels=100)
    )
    with pytest.raises(ImageError, match="pixels"):
        small.describe(PHOTO)


def test_a_model_that_does_not_fit_is_refused_before_it_is_loaded(golden_model_dir, monkeypatch):
    monkeypatch.setattr(CpuBackend, "free_memory_bytes", lambda self: 1000)
    with pytest.raises(BackendUnavailableError, match=r"MiB in bfloat16, .* 1000 bytes free"):
        MiniGPT4.load(golden_model_dir("vicuna"), device="cpu", dtype="bfloat16")


def test_a_folder_that_is_no_model_says_what_to_do(tmp_path):
    with pytest.raises(CheckpointError, match="convert"):
        MiniGPT4.load(tmp_path)
    with pytest.raises(CheckpointError, match="missing"):
        MiniGPT4.load(tmp_path / "missing")


def test_logit_bias_reaches_the_answer(model):
    plain, biased = (
        model.chat(ask("What?"), SamplingParams(max_new_tokens=4, logit_bias=bias)).token_ids
        for bias in ((), {7: 100})
    )
    assert set(biased) == {7} != set(plain)


def test_text_is_decoded_once(model, monkeypatch):
    fed, feed = [], AnswerText.feed
    monkeypatch.setattr(
        AnswerText, "feed", lambda self, token_id: fed.append(token_id) or feed(self, token_id)
    )
    assert model.chat(ask("Why?"), SHORT).token_ids == tuple(fed)


@pytest.mark.parametrize("way", ["chat", "submit_text"])
def test_a_bias_for_an_id_that_is_none_is_refused(model, way):
    size = model.config.language.vocab_size
    asked = ask("What?") if way == "chat" else [1]
    with pytest.raises(
        RequestError, match=f"names the id {size}; the vocabulary ends at {size - 1}"
    ):
        getattr(model, way)(asked, SamplingParams(logit_bias={size: 1}))


BOXED = SamplingParams(regex=r"<p>a cat</p> \{<10><20><50><100>\} \{<1><2>", max_new_tokens=80)


@pytest.fixture(scope="module")
def boxed_model(golden_model_dir) -> MiniGPT4:
    """MiniGPT-v2, which writes boxes."""
    return MiniGPT4.load(golden_model_dir("minigptv2"), device="cpu")


def test_boxes_are_parts_of_the_last_picture(boxed_model):
    wide, high = (image(Image.new("RGB", size)) for size in ((300, 60), (40, 200)))
    asked = ask(wide, "What?") + ask("It.", role="assistant") + ask(high, "And now?")
    (box,) = boxed_model.chat(asked, BOXED).boxes
    assert (box.label, box.box) == ("a cat", (4, 40, 20, 200))
    (box,) = boxed_model.chat(ask(high, wide, "Where?"), BOXED).boxes
    assert box.box == (30, 12, 150, 60)
    # A text before its picture is about that picture too.
    (box,) = boxed_model.chat(ask(wide, "What?") + ask("Where?", high), BOXED).boxes
    assert box.box == (4, 40, 20, 200)


def test_boxes_stand_where_the_text_has_them(boxed_model):
    reply = boxed_model.describe(PHOTO, "Where?", BOXED)
    (box,) = reply.boxes
    assert reply.text == "<p>a cat</p> {<10><20><50><100>} {<1><2>"
    assert reply.text[box.start : box.stop] == "{<10><20><50><100>}"
    assert boxed_model.chat(ask("Where?"), BOXED).boxes == ()  # No picture has this part.


def test_a_picture_is_measured_upright(boxed_model):
    exif = Image.Exif()
    exif[0x0112] = 6  # A quarter turn.
    file = io.BytesIO()
    Image.new("RGB", (300, 60)).save(file, "JPEG", exif=exif)
    (box,) = boxed_model.describe(file.getvalue(), "Where?", BOXED).boxes
    assert box.box == (6, 60, 30, 300)


def test_a_model_without_boxes_in_its_template_gives_none(model):
    reply = model.describe(PHOTO, "Where?", BOXED)
    assert "{<10><20><50><100>}" in reply.text
    assert reply.boxes == ()
