"""An explanation has the numbers of one pass over everything, and its page lets no text act."""

import base64
import hashlib
import json
import math
import re

import pytest
import torch
from golden_cases import NAMES

from minigpt4_runtime import RequestError
from minigpt4_runtime.lab import explaining
from minigpt4_runtime.lab.explaining import bands_of, words_of
from minigpt4_runtime.lab.explanation import END, Word

ANSWER = (5, 9, 17, 23, 8, 6, 12, 31, 40, 11)
EVIL = "</script><script>alert('x')</script> & \"<b>"


def place_of_rows(lab, pixels):
    """(R, patches), from the definitions: see `row_places`."""
    if lab.config.qformer is not None:
        cross = lab.encode(pixels[None], cross_attention=True).cross_attention
        return torch.stack([cross[layer, 0, head, :, 1:] for layer in range(len(cross))
                            for head in range(cross.shape[2])]).mean(0)  # fmt: skip
    patches, rows = lab.config.vision.num_patches, lab.config.rows_per_image
    places = torch.zeros(rows, patches)
    for patch in range(patches):
        places[patch * rows // patches, patch] = rows / patches
    return places


@pytest.mark.parametrize("name", NAMES)
def test_the_numbers_are_those_of_one_pass(golden_of, name, monkeypatch):
    golden = golden_of(name)
    lab = golden.model.lab()
    cases = golden.cases("single")
    case = max(cases, key=lambda each: len(each["images"]))
    prompt = lab.prompt(golden.question(case))
    monkeypatch.setattr(explaining, "_IDS_AT_ONCE", 3)
    found = lab.explain(prompt, ANSWER)
    whole = lab.forward(prompt, answer=ANSWER, keep=("hidden", "attention"))

    rows = slice(len(prompt.token_ids) - 1, -1)
    shares, hidden = whole.attention[:, 0, :, rows, :-1], whole.hidden[:, 0, rows]
    spans = [slice(each.start, each.start + each.num_rows) for each in prompt.image_spans]
    on_rows = [shares[..., span] for span in spans]
    looks = sum(each.sum(-1) for each in on_rows)
    close = {"atol": 1e-5, "rtol": 1e-4}
    assert torch.allclose(torch.from_numpy(found.looks), looks.mean(1).T, **close)
    num_said = found.words[-1].first if found.words[-1].text == END else len(ANSWER)
    heads = looks[..., : num_said or None].mean(-1)
    assert torch.allclose(torch.from_numpy(found.heads), heads, **close)
    for number, (pixels, each) in enumerate(zip(prompt.pixels, on_rows, strict=True)):
        by_layer = each.mean(1) @ place_of_rows(lab, pixels)
        for index, band in enumerate(bands_of(len(shares))):
            expected = by_layer[band.first : band.stop].mean(0)
            heat = torch.from_numpy(found.heat[index, :, number]).flatten(1)
            assert torch.allclose(heat, expected, **close)
    # Each row of the map has all that was read, pictures as one column each.
    assert found.map.shape == (len(ANSWER), len(found.columns))
    assert found.map.sum(1) == pytest.approx(1, abs=1e-4)
    pictures = [i for i, column in enumerate(found.columns) if column.startswith("picture")]
    assert found.map[:, pictures].sum(1) == pytest.approx(looks.mean((0, 1)).numpy(), abs=1e-5)
    assert found.map[:, 0] == pytest.approx(shares.mean((0, 1))[:, 0].numpy(), abs=1e-5)

    logs = lab.lens(hidden).log_softmax(-1)
    said = whole.logits[0, rows].log_softmax(-1)
    for index, (piece, token_id) in enumerate(zip(found.pieces, ANSWER, strict=True)):
        assert piece.said.log_probability == pytest.approx(float(said[index, token_id]), abs=1e-3)
        others = [each.log_probability for each in piece.others]
        assert others == pytest.approx(said[index].topk(5).values.tolist(), abs=1e-3)
        lens = [row[index].log_probability for row in found.lens]
        assert lens == pytest.approx(logs[:, index].amax(-1).tolist(), abs=1e-3)
        wrong = [number for number, row in enumerate(logs[:, index]) if row.argmax() != token_id]
        since = max(wrong, default=-1) + 1
        assert piece.since == (since if since < len(logs) else None)


def test_the_answer_is_the_models_own_where_none_is_given(vicuna, lab, prompt):
    reply = vicuna.model.chat(vicuna.question(vicuna.cases("single")[0]))
    found = lab.explain(prompt)
    assert found.answer == reply.text
    assert tuple(piece.token_id for piece in found.pieces) == reply.token_ids
    assert [piece.since is not None for piece in found.pieces] == [True] * len(found.pieces)
    assert "".join(piece.text for piece in found.pieces).strip().startswith(reply.text)


@pytest.mark.parametrize(
    ("texts", "answer", "words"),
    [
        (["A", " re", "d", " ball", ".", "###"], "A red ball.",
         [("A", 0, 1), ("red", 1, 3), ("ball.", 3, 5), (END, 5, 6)]),
        # Vocabularies with the space behind a word.
        (["A ", "red ", "ball", ". ", ""], "A red ball.",
         [("A", 0, 1), ("red", 1, 2), ("ball.", 2, 4), (END, 4, 5)]),
        # Chinese has no spaces, and a character may come in bytes.
        (["一", "个", "", "", "红", "球", "。"], "一个红球。",
         [("一", 0, 1), ("个", 1, 2), ("红", 2, 5), ("球。", 5, 7)]),
        (["", " ", "A", "b", " ", "c"], "Ab c", [("Ab", 0, 4), ("c", 4, 6)]),
        (["###"], "", [(END, 0, 1)]),
    ],
)  # fmt: skip
def test_words_of_pieces(texts, answer, words):
    assert words_of(texts, answer) == tuple(Word(*each) for each in words)


def test_thirds_have_each_layer_once():
    assert [(band.first, band.stop) for band in bands_of(2)] == [(0, 2)]
    for num_layers in (3, 7, 32, 40):
        whole, *thirds = bands_of(num_layers)
        assert (whole.first, whole.stop) == (0, num_layers)
        layers = [each for band in thirds for each in range(band.first, band.stop)]
        assert layers == list(range(num_layers))


def test_what_cannot_be_explained_is_named(lab, prompt):
    with pytest.raises(RequestError, match="The answer is empty"):
        lab.explain(prompt, "")
    two = prompt.showing(prompt.pixels.repeat(2, 1, 1, 1))
    with pytest.raises(RequestError, match="not with variants"):
        lab.explain(two, ANSWER)
    with pytest.raises(RequestError, match="0 pictures to show; the prompt has 1"):
        lab.explain(prompt, ANSWER).showing([])


def test_the_page_is_complete_and_no_text_acts_on_it(vicuna, lab):
    picture = vicuna.picture(vicuna.pictures[0])
    prompt = lab.prompt([{"role": "user", "content": [picture, EVIL]}])
    found = lab.explain(prompt, EVIL)
    page = found.as_page()
    assert EVIL not in page
    assert page.count("<script") == 3
    *_, script = re.findall(r"<script>(.*?)</script>", page, re.DOTALL)
    digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
    (policy,) = re.findall(r'Policy" content="(.*?)"', page)
    assert policy.startswith("default-src 'none'; ")
    assert policy.endswith(f"; script-src 'sha256-{digest}'")
    assert "http" not in re.sub(r'"data:[^"]*"', "", page).replace("http-equiv", "").replace(
        "http://www.w3.org/2000/svg", ""
    )
    numbers = json.loads(re.search(r'id="numbers">(.*?)</script>', page, re.DOTALL)[1])
    assert numbers["columns"] == list(found.columns)
    # What the script draws is right to a level of 256.
    for word, heat in zip(found.words, numbers["heat"], strict=True):
        levels = base64.b64decode(heat[0][0]["levels"])
        drawn = torch.tensor(list(levels)) / 255 * heat[0][0]["most"]
        expected = torch.from_numpy(found.heat_of(word)[0, 0]).flatten()
        assert torch.allclose(drawn, expected, atol=heat[0][0]["most"] / 500 + 1e-6)


def test_a_page_without_pictures_has_the_rest(lab, tmp_path):
    prompt = lab.prompt("###Human: Hello ###Assistant:")
    page = lab.plot(prompt, tmp_path / "page.html", ANSWER).as_page()
    assert (tmp_path / "page.html").read_text(encoding="utf-8") == page
    assert "Where each word looked" not in page
    assert "What each layer would have said" in page


def test_the_reports_agree(lab, prompt):
    found = lab.explain(prompt, ANSWER)
    mapping = found.as_mapping()
    assert json.loads(json.dumps(mapping)) == mapping
    rows = found.as_rows().rows
    assert [row[2] for row in rows] == pytest.approx(
        [each["log_probability"] for each in mapping["pieces"]], abs=1e-5
    )
    for word in found.words:
        log = sum(row[2] for row in rows[word.first : word.stop])
        assert found.probability(word) == pytest.approx(math.exp(log))
        assert (f"{word.text} " if word.text else "") in found.as_text()


@pytest.mark.parametrize("name", NAMES)
def test_a_look_at_a_word_is_that_of_the_explanation(golden_of, name):
    golden = golden_of(name)
    lab = golden.model.lab()
    prompt = lab.prompt(golden.question(golden.cases("single")[0]))
    answer = lab.text_of(lab.ids_of("the dog is on the left"))
    found = lab.explain(prompt, answer)
    place = 0
    for word in found.words:
        place = answer.index(word.text, place)
        looked = lab.look(prompt, answer, place + len(word.text) - 1)
        assert answer[looked.start : looked.stop] == looked.word == word.text
        assert looked.start == place
        assert looked.heat == pytest.approx(found.heat_of(word)[0], abs=1e-5)
        assert looked.on_pictures == pytest.approx(found.on_pictures(word), abs=1e-5)
        place += len(word.text)
    for at in (-1, len(answer)):
        with pytest.raises(RequestError, match=f"at is {at}; the answer has {len(answer)}"):
            lab.look(prompt, answer, at)
