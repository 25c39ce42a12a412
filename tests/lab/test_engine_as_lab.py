"""What needs no layer gives the same in the engine, many at once, as in the laboratory."""

import math

import pytest
import torch
from fake_graphs import use_graphs
from golden_cases import GOLDENS, Golden

from minigpt4_runtime import MiniGPT4, RequestError, SamplingParams, image

LENGTH = 12
# The first is cut into chunks and pushed out; the second runs ahead, with graphs.
ENGINES = {"crowded": {"max_step_tokens": 24, "max_running": 8}, "ahead": {"block_size": 7}}


def contrast(seen):
    """Takes away what is as likely elsewhere. For the engine and the laboratory alike."""
    is_unlikely = seen.logits < seen.logits.amax(-1, keepdim=True) + math.log(0.1)
    for other in seen.branches.values():
        seen = type(seen)(**{**vars(seen), "logits": 2 * seen.logits - other})
    return seen.logits.masked_fill(is_unlikely, -math.inf)


def shun_what_was_said(seen):
    logits = seen.logits.clone()
    for row, ids in zip(logits, seen.ids, strict=True):
        row[ids] -= 1
    return logits


def open_engine(golden_model_dir, name, **engine):
    model = MiniGPT4.load(golden_model_dir(name), device="cpu", dtype="float32", engine=engine)
    return Golden(GOLDENS / name, model)


def others_of(golden, case):
    """The question without pictures, and about another one."""
    words = [each for each in case["turns"] if isinstance(each, str)]
    other = golden.picture(golden.pictures[-1])
    return {
        "blind": [{"role": "user", "content": words}],
        "other": [{"role": "user", "content": [other, *words]}],
    }


@pytest.mark.parametrize("engine", ENGINES)
@pytest.mark.parametrize("name", ["vicuna", "minigptv2"])
def test_processors_and_branches(golden_model_dir, monkeypatch, name, engine):
    recorder = use_graphs(monkeypatch, runs_ahead=True) if engine == "ahead" else None
    golden = open_engine(golden_model_dir, name)
    model, cases = golden.model, golden.cases("single")[:5]
    longest = max(len(model.encode_prompt(golden.question(each)).token_ids) for each in cases)
    num_blocks = {"num_blocks": 3 * -(-(longest + LENGTH) // 16)} if engine == "crowded" else {}
    model.probe.use_engine({**ENGINES[engine], **num_blocks})
    lab, sampling = model.lab(), SamplingParams(max_new_tokens=LENGTH, stop=())
    asked, wanted = [], []
    for number, case in enumerate(cases):
        processors = [contrast, shun_what_was_said][: 1 + number % 2]
        names = [["blind"], ["blind", "other"], []][number % 3]
        branches = {each: others_of(golden, case)[each] for each in names}
        asked.append((golden.question(case), processors, branches))
        studied = {each: lab.prompt(messages) for each, messages in branches.items()}
        (answer,) = lab.generate(
            lab.prompt(golden.question(case)), processors, branches=studied,
            max_new_tokens=LENGTH, stop=(),
        )  # fmt: skip
        wanted.append((answer.token_ids, answer.text, answer.finish_reason))
    tickets = [
        model.submit(question, sampling, processors=processors, branches=branches)
        for question, processors, branches in asked
    ]
    replies = [list(ticket)[-1].reply for ticket in tickets]
    assert [(each.token_ids, each.text, each.finish_reason) for each in replies] == wanted
    plain = [model.chat(golden.question(case), sampling).token_ids for case in cases]
    assert plain != [ids for ids, *_ in wanted]
    assert recorder is None or recorder.num_replayed > 0
    assert model.stats().num_preempted > 0 or engine != "crowded"


CANDIDATES = ("a cat", [5], "There is a dog on a mat.", *([n, n + 1] for n in range(3, 25)))


@pytest.mark.parametrize("name", ["vicuna", "llama2-gqa"])
def test_scores(golden_model_dir, name):
    golden = open_engine(golden_model_dir, name, max_running=16)
    model, cases = golden.model, golden.cases("single")[:3]
    lab = model.lab()
    tickets = [model.submit_score(golden.question(case), CANDIDATES) for case in cases]
    for ticket, case in zip(tickets, cases, strict=True):
        (found,) = ticket
        expected = lab.score(lab.prompt(golden.question(case)), CANDIDATES)
        torch.testing.assert_close(torch.tensor(found), expected, atol=1e-4, rtol=1e-5)
    raw, pictures = "###Human: <Img><ImageHere></Img> What? ###Assistant:", [golden.pictures[0]]
    pictures = [golden.picture(each) for each in pictures]
    expected = lab.score(lab.prompt(raw, pictures), CANDIDATES[:3])
    assert model.score(raw, CANDIDATES[:3], pictures) == pytest.approx(expected.tolist(), abs=1e-4)


def test_raw_prompts_and_many_pictures(vicuna):
    model, lab = vicuna.model, vicuna.model.lab()
    pictures = [vicuna.picture(each) for each in vicuna.pictures[:3]]
    text = "###Human: <Img><ImageHere></Img> What is this? ###Assistant:"
    blind, sampling = "###Human: What is this? ###Assistant:", SamplingParams(max_new_tokens=6)
    ticket = model.submit_raw(
        text, pictures[:1], sampling, processors=[contrast], branches={"blind": (blind, ())}
    )
    (answer,) = lab.generate(
        lab.prompt(text, pictures[:1]), [contrast], branches={"blind": lab.prompt(blind)},
        max_new_tokens=6,
    )  # fmt: skip
    assert list(ticket)[-1].reply.token_ids == answer.token_ids

    def turned(picture):
        other = pictures[(pictures.index(picture) + 1) % 3]
        return {"turned": [{"role": "user", "content": [other, "What?"]}]}

    done = model.describe_all(pictures, "What?", sampling, processors=[contrast], branches=turned)
    found = {each.index: each.reply.token_ids for each in done}
    assert found == {
        number: model.describe(
            each, "What?", sampling, processors=[contrast], branches=turned(each)
        ).token_ids
        for number, each in enumerate(pictures)
    }


def test_a_window_holds_for_processors_and_not_for_branches(golden_model_dir):
    golden = open_engine(golden_model_dir, "vicuna", cache_window=60)
    sampling = SamplingParams(max_new_tokens=40, stop=(), ignore_eos=True)
    question = [{"role": "user", "content": ["What is there? " * 3]}]
    assert golden.model.chat(question, sampling, processors=[shun_what_was_said]).usage
    blind = {"blind": [{"role": "user", "content": ["What is there? " * 60]}]}
    reply = golden.model.chat(question, sampling, processors=[contrast], branches=blind)
    assert reply.usage.evicted_tokens == 0
    assert len(reply.token_ids) == 40


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"processors": contrast}, "processors is a list of functions"),
        ({"processors": [3]}, "processors is a list of functions"),
        ({"branches": {"blind": []}}, None),
        ({"branches": {"blind": [{"role": "user", "content": "?"}]}}, r"branches \(blind\) and no"),
        ({"processors": [contrast], "branches": {"": [{"role": "user", "content": "?"}]}},
         "A branch needs a name"),
        ({"processors": [contrast],
          "branches": {"far": [{"role": "user", "content": [image("no.png"), "?"]}]}},
         "no.png does not exist"),
    ],
)  # fmt: skip
def test_what_is_no_steering(vicuna, given, message):
    with pytest.raises(RequestError, match=message):
        vicuna.model.submit([{"role": "user", "content": "?"}], **given)


@pytest.mark.parametrize("candidates", [[], [""], ["a", []], "yes", [[10**6]]])
def test_what_is_no_candidate(vicuna, candidates):
    with pytest.raises(RequestError, match=r"one or more"):
        vicuna.model.score([{"role": "user", "content": "?"}], candidates)
