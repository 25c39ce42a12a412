"""Beams that shun over-trusted tokens and go back behind them (OPERA, Huang et al., 2023).

python examples/study/opera.py examples/images/three.png [MODEL]
"""

import sys

import torch
from torch.nn.functional import normalize, pad

from minigpt4_runtime import MiniGPT4, image
from minigpt4_runtime.lab import Lab, StudiedPrompt


def opera(  # noqa: PLR0913 - the settings of the paper.
    lab: Lab, prompt: StudiedPrompt, *, beams: int = 5, candidates: int = 5, scale: float = 50.0,
    weight: float = 1.0, threshold: int = 15, early: int = 10, max_new_tokens: int = 300,
) -> tuple[tuple[int, ...], int]:  # fmt: skip
    """The ids of the best beam, and how often the search went back."""
    state, span = lab.start(prompt, beams, keep={"attention": -1}), prompt.image_columns
    scores = torch.tensor([0.0] + [-1e9] * (beams - 1), device=lab.device)
    local = scores.new_zeros(beams, 0, 0)  # How much each token of the answer looks at each.
    steps, taken = list[tuple[torch.Tensor, ...]](), list[list[int]]()
    barred, done = list[tuple[int, int]](), list[tuple[float, list[int]]]()
    times = [0] * (max_new_tokens + 2)
    while (length := state.ids.shape[1]) < max_new_tokens and len(done) < beams:
        raw, ids = state.logits.topk(candidates)
        ahead = state.fork([row for row in range(beams) for _ in range(candidates)])
        ahead.step(ids.flatten())
        looks = normalize(ahead.attention[0, :, :, -1].amax(1), p=1)  # type: ignore[index]
        square = pad(local.repeat_interleave(candidates, 0), (0, 1, 0, 1), value=1 / scale)
        square[:, -1] = looks[:, -length - 1 :]
        trust, places = (1e-7 * (scale * square).prod(1)).max(-1)  # Down each column.
        penalty = trust if length >= early else -looks[:, span].sum(-1)
        values = raw - weight * penalty.view_as(raw)
        values.view(-1)[[each for at, each in barred if at == length]] = float("-inf")
        steps[length:] = [(state.ids, scores, local, places.view_as(raw).mode(1).values)]
        often = int(steps[-1][3].mode().values)
        counts = torch.stack([each[3] == often for each in steps]).sum(0)
        back = next((at for at in (often + 1, often) if times[at] < candidates - 1), 0)
        may_go_back = length not in dict(barred) and often >= early and 0 < back < length
        if may_go_back and counts.min() > threshold:
            times[back] += 1
            barred = [b for b in barred if b[0] <= back] + [(back, each) for each in taken[back]]
            done = [each for each in done if len(each[1]) <= back]
            said, scores, local, _ = steps[back]
            state.rollback(length)
            state.step(said)
            continue
        scores, chosen = (scores[:, None] + values.log_softmax(-1)).view(-1).topk(beams)
        taken[length:] = [chosen.tolist()]
        state, local = ahead.fork(taken[length]), square[chosen]
        for row, ended in enumerate(state.ids.tolist()):
            if lab.answer(prompt, ended).finish_reason == "stop":
                done.append((float(scores[row]) / len(ended), ended))
                scores[row] = -1e9
    return tuple(max(done)[1] if done else state.ids[scores.argmax()].tolist()), sum(times)


if __name__ == "__main__":
    opened = MiniGPT4.load(*sys.argv[2:3]).lab()
    content = [image(sys.argv[1]), "Describe this image in detail."]
    asked = opened.prompt([{"role": "user", "content": content}])
    print(opened.answer(asked, opera(opened, asked)[0]).text)
