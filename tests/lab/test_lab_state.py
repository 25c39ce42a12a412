"""Sequences that grow, fork and go back are those of whole passes."""

import pytest
import torch

from minigpt4_runtime import RequestError

KEEP = {"hidden": "all", "attention": [2]}


def whole(lab, prompt, ids):
    """(V,) logits behind these ids, all computed at once."""
    return lab.forward(prompt, answer=ids).logits[0, -1]


def test_rollback_is_a_fresh_start(lab, prompt):
    state = lab.start(prompt, keep=KEEP)
    first, attention = state.logits, state.attention
    for each in (5, 9, 17, 4):
        state.step([each])
    state.rollback(2)
    assert state.ids.tolist() == [[5, 9]]
    assert torch.allclose(state.logits[0], whole(lab, prompt, (5, 9)), atol=1e-4)
    fresh = lab.start(prompt, keep=KEEP)
    fresh.step([5])
    fresh.step([9])
    assert torch.allclose(fresh.attention, state.attention, atol=1e-5)
    assert torch.allclose(fresh.hidden, state.hidden, atol=1e-5)
    for each in (8, 3):
        state.step([each])
        fresh.step([each])
        assert torch.allclose(fresh.logits, state.logits, atol=1e-5)
    assert torch.allclose(state.logits[0], whole(lab, prompt, (5, 9, 8, 3)), atol=1e-4)
    state.rollback(0)
    state.rollback(4)
    assert torch.equal(state.logits, first)
    assert torch.equal(state.attention, attention)
    assert state.ids.shape == (1, 0)


def test_several_ids_at_once(lab, prompt):
    state = lab.start(prompt, keep=KEEP)
    state.step([[5, 9, 17]])
    assert torch.allclose(state.logits[0], whole(lab, prompt, (5, 9, 17)), atol=1e-4)
    done = lab.forward(prompt, answer=(5, 9, 17), keep=KEEP)
    assert torch.allclose(state.attention, done.attention[..., -3:, :], atol=1e-5)
    assert torch.allclose(state.hidden, done.hidden[:, :, -3:], atol=1e-4)


def test_forks_go_their_own_ways(lab, prompt):
    state = lab.start(prompt, 3, keep=KEEP)
    assert state.logits.shape[0] == 3
    state.step([5, 6, 7])
    other = state.fork([2, 2, 0, 1])
    state.step([1, 2, 3])
    other.step([10, 11, 12, 13])
    assert state.ids.tolist() == [[5, 1], [6, 2], [7, 3]]
    assert other.ids.tolist() == [[7, 10], [7, 11], [5, 12], [6, 13]]
    for each in (state, other):
        for logits, ids in zip(each.logits, each.ids.tolist(), strict=True):
            assert torch.allclose(logits, whole(lab, prompt, ids), atol=1e-4)
    other.rollback(2)
    assert torch.allclose(other.logits, lab.start(prompt).logits.expand(4, -1), atol=1e-5)
    alone = other.fork(1)
    alone.step([9])
    assert torch.allclose(alone.logits[0], whole(lab, prompt, (9,)), atol=1e-4)


def test_processors_and_branches(vicuna, lab, prompt):
    """A branch's logits are those of its own prompt with the same ids; processors go in order."""
    other = lab.prompt("No picture here. ###Assistant:")
    seen = []

    def swap(view):
        seen.append((view.ids.clone(), view.logits, view.hidden, view.branches["other"]))
        return view.branches["other"]

    def ban(view):
        assert torch.equal(view.logits, seen[-1][3])
        logits = view.logits.clone()
        logits[:, 7] = float("-inf")
        return logits

    (answer,) = lab.generate(
        prompt, [swap, ban], branches={"other": other}, keep={"hidden": -1}, max_new_tokens=6,
        stop=(),
    )  # fmt: skip
    for ids, logits, hidden, branch in seen:
        ids = ids[0].tolist()
        assert tuple(ids) == answer.token_ids[: len(ids)]
        assert torch.allclose(logits[0], whole(lab, prompt, ids), atol=1e-4)
        assert torch.allclose(branch[0], whole(lab, other, ids), atol=1e-4)
        assert torch.allclose(lab.lens(hidden[0, :, -1]), logits, atol=1e-4)
    assert len(seen) == len(answer.token_ids)
    assert 7 not in answer.token_ids


def test_choosing_by_lot(lab, prompt):
    def draw(seed):
        generator = torch.Generator().manual_seed(seed)
        return lambda logits: torch.multinomial((logits / 2).softmax(-1), 1, generator=generator)[
            :, 0
        ]

    said = [lab.generate(prompt, choose=draw(seed), max_new_tokens=8)[0] for seed in (1, 1, 2)]
    assert said[0] == said[1] != said[2]


def test_what_cannot_be_is_said(lab, prompt):
    state = lab.start(prompt, 2)

    def steered(processor):
        return lab.generate(prompt, [processor], max_new_tokens=2)

    for said, ask in {
        "there are 2 answers": lambda: state.step([1]),
        r"choose gave ids of \(2,\)\. Return one": lambda: lab.generate(
            prompt, choose=lambda _: torch.tensor([5, 6])
        ),
        r"rollback\(1\): the answers have 0": lambda: state.rollback(1),
        "rows are": lambda: state.fork([2]),
        r"gave \(1, 3\)\. Return the logits": lambda: steered(lambda seen: seen.logits[:, :3]),
        "gave NoneType": lambda: steered(lambda seen: None),
        "gave complex numbers": lambda: steered(lambda seen: seen.logits + 0j),
        "left no id to choose": lambda: steered(lambda seen: seen.logits * float("nan")),
        "hooks and in edited": lambda: lab.generate(prompt.showing(prompt.pixels * float("nan"))),
    }.items():
        with pytest.raises(RequestError, match=said):
            ask()
