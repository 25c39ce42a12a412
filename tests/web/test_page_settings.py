"""The controls beside the dialogue: what they say is what is asked for."""

import pytest
from adapter_folders import write_lora
from page_server import PICTURES, Serving
from page_steps import (
    ANSWERS,
    BOX,
    QUESTIONS,
    ask,
    choose,
    open_page,
    put_pictures,
    retry,
    set_number,
    set_text,
    texts,
)

from minigpt4_runtime import MiniGPT4
from minigpt4_runtime.checkpoint.config_file import load_config
from minigpt4_runtime.web.controls import read_controls
from minigpt4_runtime.web.dialogue import AnswerSettings, DialogueError

# Gradio and what it stands on warn of their own.
pytestmark = pytest.mark.filterwarnings("default")


@pytest.fixture
def asked(serving, monkeypatch):
    """What the server was asked for: a list of messages and settings that grows."""
    asked, submit = [], serving.model.submit

    def remember(messages, sampling=None, **more):
        asked.append((messages, sampling))
        return submit(messages, sampling, **more)

    monkeypatch.setattr(serving.model, "submit", remember)
    return asked


def test_every_control_reaches_the_server(page, asked):
    put_pictures(page, PICTURES / "two.png")
    set_text(page, "system", "Answer in few words.")
    for name, value in (
        ("top_p", 0.5), ("top_k", 7), ("num_beams", 2), ("repetition_penalty", 1.2),
        ("max_tokens", 5),
    ):  # fmt: skip
        set_number(page, name, value)
    ask(page, "What is it?")
    ((messages, sampling),) = asked
    assert (sampling.temperature, sampling.top_p, sampling.top_k) == (0, 0.5, 7)
    assert (sampling.num_beams, sampling.repetition_penalty) == (2, 1.2)
    assert sampling.max_new_tokens == 5
    assert messages[0].role == "system"
    assert messages[0].content == ("Answer in few words.",)


@pytest.fixture
def many_choices(browser, golden_model_dir, tmp_path, monkeypatch):
    """The page of a model that knows tasks and has an adapter, and the adapters asked for."""
    folder, asked = golden_model_dir("minigptv2"), []
    write_lora(tmp_path, load_config(folder).language, seed=1)
    with MiniGPT4.load(folder, adapters={"tuned": tmp_path}, device="cpu") as model:
        submit = model.submit

        def remember(*arguments, adapter=None, **more):
            asked.append(adapter)
            return submit(*arguments, adapter=adapter, **more)

        monkeypatch.setattr(model, "submit", remember)
        serving = Serving(model)
        context = browser.new_context()
        context.set_default_timeout(60_000)
        try:
            page = open_page(context.new_page(), serving.url)
            set_number(page, "max_tokens", 4)
            yield page, asked
        finally:
            context.close()
            serving.close()


def test_a_task_and_an_adapter_are_chosen_where_there_are_any(page, many_choices):
    assert page.locator("#task, #model").count() == 0
    page, asked = many_choices
    choose(page, "task", "refer")
    ask(page, "the lamp")
    choose(page, "model", "tuned")
    ask(page, "[vqa] what colour?")
    choose(page, "model", "demo")
    ask(page, "again")
    assert texts(page, QUESTIONS) == ["[refer] the lamp", "[vqa] what colour?", "[refer] again"]
    assert asked[-3:] == [None, "tuned", None]  # The server asked one itself before.


def test_an_empty_seed_draws_anew_and_the_same_seed_the_same(page, serving, asked):
    set_number(page, "temperature", 2)
    set_number(page, "max_tokens", 20)
    set_text(page, "seed", "17")
    ask(page, "Describe a picture.")
    (seeded,) = texts(page, ANSWERS)
    # Typed once and taken away again, it is still no 0.
    set_text(page, "seed", "")
    retry(page, serving)
    drawn = texts(page, ANSWERS)
    retry(page, serving)
    assert texts(page, ANSWERS) != drawn
    set_text(page, "seed", "17")
    retry(page, serving)
    assert texts(page, ANSWERS) == [seeded]
    assert [sampling.seed for _, sampling in asked] == [17, None, None, 17]


def test_a_setting_that_cannot_be_is_said_and_the_question_comes_back(page):
    set_text(page, "seed", "twelve")
    put_pictures(page, PICTURES / "two.png")
    page.fill(BOX, "What is it?")
    page.press(BOX, "Enter")
    page.wait_for_selector(".toast-body:has-text('it must be a whole number from 0 to')")
    page.wait_for_function(f"document.querySelector('{BOX}').value === 'What is it?'")
    page.wait_for_selector("#question img")
    set_text(page, "seed", "")
    set_number(page, "temperature", 1)
    set_number(page, "num_beams", 3)
    page.press(BOX, "Enter")
    page.wait_for_selector(".toast-body:has-text('Beam search does not sample')")


def test_settings_ask_only_for_what_is_not_usual():
    fields = AnswerSettings().as_fields()
    assert fields == {"temperature": 0.0, "top_p": 1.0, "max_tokens": 300, "extra_body": {}}
    fields = AnswerSettings(seed=0, top_k=3).as_fields()
    assert (fields["seed"], fields["extra_body"]) == (0, {"top_k": 3})


@pytest.mark.parametrize(
    ("text", "seed"), [("", None), (" ", None), ("0", 0), (" 12 ", 12), (str(2**63 - 1), 2**63 - 1)]
)
def test_a_seed_is_a_number_or_none(text, seed):
    assert read_controls(None, "", 0, 1, 0, 1, 1, 20, text) == AnswerSettings(
        max_tokens=20, seed=seed
    )


@pytest.mark.parametrize("text", ["-1", "1.5", "a", "²", str(2**63), "9" * 5000])
def test_another_seed_is_refused_in_a_sentence(text):
    with pytest.raises(DialogueError, match="Leave it empty for a new draw each time"):
        read_controls(None, "", 0, 1, 0, 1, 1, 20, text)
