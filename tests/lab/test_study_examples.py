"""The published methods of examples/study, each held to a dense computation of its own."""

import math
import runpy
import sys
from pathlib import Path

import pytest
import torch
from dense import Dense

from minigpt4_runtime import MiniGPT4, image

ROOT = Path(__file__).parents[2]
STUDIES = sorted((ROOT / "examples/study").glob("*.py"))
LENGTH = 6
FOLDERS = {"vcd_batch.py"}  # Those that take a folder, where others take a picture.
# On the demo model, with a picture of the examples.
SHOWN = {
    "image_lens.py": "layer  6:",
    "knock_out.py": "nats a token",
    "pgd.py": "perturbed:",
}


def names_of(study):
    return runpy.run_path(str(ROOT / f"examples/study/{study}.py"))


@pytest.fixture(scope="module")
def dense(vicuna):
    return Dense(vicuna.model.lab())


@pytest.fixture
def rows(lab, prompt):
    """The rows of the prompt's picture."""
    return lab.encode(prompt.pixels)


def last(dense, prompt, rows, ids, change=None):
    """(V,) log-probabilities behind a prompt and ids, from the whole sequence."""
    whole = dense.rows_of(prompt, rows, ids)
    return dense.run(whole, *([change] if change else []))[0][-1].log_softmax(-1)


def keep_likely(logprobs, values, share=0.1):
    return values.masked_fill(logprobs < logprobs.max() + math.log(share), float("-inf"))


@pytest.mark.parametrize("study", STUDIES, ids=lambda path: path.name)
def test_a_study_is_short_names_its_paper_and_runs(study, monkeypatch, capsys):
    text = study.read_text(encoding="utf-8")
    assert sum(1 for line in text.splitlines() if line.strip()) < 60
    about = text.split('"""')[1]
    assert ", 20" in about
    (command,) = [line for line in about.splitlines() if line.startswith("python ")]
    shown = "examples/images" if study.name in FOLDERS else "examples/images/three.png"
    assert command == f"python examples/study/{study.name} {shown} [MODEL]"
    monkeypatch.chdir(ROOT)
    monkeypatch.syspath_prepend(study.parent)
    monkeypatch.setattr(sys, "argv", command.split()[1:3])
    runpy.run_path(str(study), run_name="__main__")
    assert SHOWN.get(study.name, "There are three shapes") in capsys.readouterr().out


def test_vcd(lab, dense, prompt, rows):
    study = names_of("vcd")
    noisy = study["add_noise"](lab, prompt.pixels, 500)
    noisy_rows = lab.encode(noisy)

    def step(ids):
        clean = last(dense, prompt, rows, ids)
        other = last(dense, prompt, noisy_rows, ids)
        return keep_likely(clean, 2 * clean - other)

    answer = study["vcd"](lab, prompt, max_new_tokens=LENGTH)
    assert list(answer.token_ids) == dense.greedy(step, LENGTH, lab._loaded.tokenizer.eos_id)


def test_vcd_over_a_folder(monkeypatch):
    """What the laboratory says of each picture beside the same noisy copy."""
    monkeypatch.syspath_prepend(ROOT / "examples/study")
    study, model = names_of("vcd_batch"), MiniGPT4.load(device="cpu")
    lab, paths = model.lab(), sorted((ROOT / "examples/images").glob("*.png"))
    found = dict(study["vcd_batch"](model, paths))
    assert len(found) == len(paths) > 1
    for number, path in enumerate(paths[:2]):
        noisy = study["noisy_copy"](model, path, step=500)
        asked = {"role": "user", "content": [image(path), study["QUESTION"]]}
        beside = {"role": "user", "content": [image(noisy), study["QUESTION"]]}
        (answer,) = lab.generate(
            lab.prompt([asked]), [names_of("vcd")["contrasting"]("noisy", 1.0, 0.1)],
            branches={"noisy": lab.prompt([beside])},
        )  # fmt: skip
        assert found[number] == answer.text


def test_vcds_noise(lab, prompt):
    """Its variance and what is left of the picture add up to one, as in a diffusion."""
    add_noise = names_of("vcd")["add_noise"]
    vision = lab.config.vision
    mean, std = (torch.tensor(x)[:, None, None] for x in (vision.image_mean, vision.image_std))
    flat = mean[None].expand(1, 3, vision.image_size, vision.image_size)
    bright = flat + std
    kept = []
    for step in (0, 500, 999):
        alone = (add_noise(lab, flat, step) - mean) / std
        share = float(((add_noise(lab, bright, step) - mean) / std - alone).mean())
        assert float(alone.var()) == pytest.approx(1 - share**2, rel=0.05, abs=1e-4)
        kept.append(share)
    assert kept[0] > 0.999 > kept[1] > 0.4 > kept[2] > 0


def test_early_exit(lab, dense, prompt, rows):
    shallow = lab.encode(prompt.pixels, exit_layer=1)

    def step(ids):
        deep = last(dense, prompt, rows, ids)
        return keep_likely(deep, 1.5 * deep - 0.5 * last(dense, prompt, shallow, ids))

    answer = names_of("early_exit")["contrast_early_exit"](
        lab, prompt, exit_layer=1, max_new_tokens=LENGTH
    )
    assert list(answer.token_ids) == dense.greedy(step, LENGTH, lab._loaded.tokenizer.eos_id)


def test_pai(vicuna, lab, dense):
    study = names_of("pai")
    question, picture = "Is there a dog?", vicuna.picture(vicuna.pictures[0])
    prompt = lab.prompt(study["WITH_PICTURE"].format(question=question), [picture])
    blind = lab.prompt(study["WITHOUT"].format(question=question))
    rows, span, alpha, gamma = lab.encode(prompt.pixels), prompt.image_columns, 0.5, 1.5

    def step(ids):
        def look_more(site, layer, value):
            if site != "scores" or layer < 1:
                return value
            value = value.clone()
            # Each token that is generated looked more when it came, and so did the prompt's last.
            for row in range(len(prompt.token_ids) - 1, value.shape[1]):
                value[:, row, span] += alpha * value[:, row, span].abs()
            return value

        seeing = last(dense, prompt, rows, ids, look_more)
        other = last(dense, blind, (), ids)
        return keep_likely(seeing, gamma * (seeing - other) + other)

    answer = study["pai"](
        lab, prompt, blind, alpha=alpha, gamma=gamma, first_layer=1, max_new_tokens=LENGTH
    )
    assert list(answer.token_ids) == dense.greedy(step, LENGTH, lab._loaded.tokenizer.eos_id)


def test_dola(lab, dense, prompt, rows):
    layers, head = (0, 1, 2), dense.weights["head.weight"]
    chosen = []

    def step(ids):
        logits, hidden, _ = dense.run(dense.rows_of(prompt, rows, ids))
        final = logits[-1].log_softmax(-1)
        early = [(hidden[layer, -1] @ head.T).log_softmax(-1) for layer in layers]

        def distance(other):
            mean = (final.exp() + other.exp()) / 2
            return sum(float((mean * (mean.log() - each)).sum()) for each in (final, other))

        chosen.append(max(range(len(early)), key=lambda at: distance(early[at])))
        return keep_likely(final, final - early[chosen[-1]])

    answer = names_of("dola")["dola"](lab, prompt, layers, max_new_tokens=LENGTH)
    assert list(answer.token_ids) == dense.greedy(step, LENGTH, lab._loaded.tokenizer.eos_id)


def test_image_lens(lab, dense, prompt, rows):
    ids, shares = names_of("image_lens")["read_image_rows"](lab, prompt)
    _, hidden, _ = dense.run(dense.rows_of(prompt, rows))
    best = dense.logits(hidden[:, prompt.image_columns]).softmax(-1).max(-1)
    assert ids.tolist() == best.indices.tolist()
    assert torch.allclose(shares.double(), best.values, atol=1e-4)


def test_knock_out(lab, dense, prompt, rows):
    answer = (5, 9, 17)

    def loss(change):
        logits, _, _ = dense.run(dense.rows_of(prompt, rows, answer), change)
        said = logits[-len(answer) - 1 : -1].log_softmax(-1)
        return -float(said[[0, 1, 2], answer].mean())

    whole = loss(lambda site, layer, value: value)

    def silent(layer, head):
        def change(site, at, value):
            if site == "heads" and at == layer:
                value = value.clone()
                value[:, head] = 0
            return value

        return loss(change) - whole

    grown = names_of("knock_out")["needed_heads"](lab, prompt, answer)
    wanted = [
        [silent(layer, head) for head in range(grown.shape[1])] for layer in range(len(grown))
    ]
    assert torch.allclose(grown.double(), torch.tensor(wanted).double(), atol=1e-4)


def test_pgd(lab, dense, prompt):
    """Its gradient is that of the dense loss, its picture within the bound, the answer unlikely."""
    answer, bound = (5, 9, 17), 8 / 255
    pixels = prompt.pixels.clone().requires_grad_()
    rows = lab.encode(pixels)
    logits, _, _ = dense.run(dense.rows_of(prompt, rows, answer))
    loss = -logits[-4:-1].log_softmax(-1)[[0, 1, 2], answer].mean()
    (gradient,) = torch.autograd.grad(loss, pixels)
    perturb = names_of("pgd")["perturb"]
    once = perturb(lab, prompt, answer, bound=bound, step=bound, num_steps=1)
    wanted = (prompt.pixels + bound * gradient.sign()).clamp(0, 1)
    # Where the gradient is nearly nothing, its sign is anyone's.
    is_clear = gradient.abs() > 1e-3 * gradient.abs().max()
    assert is_clear.float().mean() > 0.5
    assert torch.allclose(once[is_clear], wanted[is_clear], atol=1e-6)
    far = perturb(lab, prompt, answer, bound=bound, step=bound / 4, num_steps=8)
    assert (far - prompt.pixels).abs().max() <= bound + 1e-6
    assert far.min() >= 0
    assert far.max() <= 1
    losses = [float(lab.forward(prompt, each, answer).loss) for each in (prompt.pixels, once, far)]
    assert losses[0] < losses[1] < losses[2]


@pytest.mark.parametrize("threshold", [1, 99])
def test_opera(lab, dense, prompt, rows, threshold):
    search = {"beams": 2, "threshold": threshold, "max_new_tokens": 9}
    plan = {"candidates": 3, "early": 2}
    found, num_back = names_of("opera")["opera"](lab, prompt, **search, **plan)

    def ends(ids):
        return lab.answer(prompt, ids).finish_reason == "stop"

    wanted = DenseOpera(dense, prompt, rows, ends, **plan).search(**search)
    assert (list(found), num_back) == wanted
    assert (num_back > 0) == (threshold == 1)


class DenseOpera:
    """OPERA as its paper tells it, over lists of ids, with each sequence computed as a whole."""

    def __init__(self, dense, prompt, rows, ends, *, candidates, early):
        self.dense, self.prompt, self.rows, self.ends = dense, prompt, rows, ends
        self.candidates, self.early = candidates, early

    def judge(self, ids):
        """(penalty, where the most trusted token stands), by the last layer's strongest heads."""
        start = len(self.prompt.token_ids)
        _, _, shares = self.dense.run(self.dense.rows_of(self.prompt, self.rows, ids))
        looks = shares[-1].amax(0)[start:]
        looks = looks / looks.sum(-1, keepdim=True)
        trust = [
            1e-7 * math.prod(50 * float(looks[i, start + j]) for i in range(j, len(ids)))
            for j in range(len(ids))
        ]
        place = max(range(len(ids)), key=lambda j: trust[j])
        seen = float(looks[-1, self.prompt.image_columns].sum())
        return (trust[place] if len(ids) > self.early else -seen), place

    def options_of(self, ids, banned):
        """[(log-probability, ids)] of a beam's candidates, and the place they trust most."""
        best = last(self.dense, self.prompt, self.rows, ids).topk(self.candidates)
        judged = [self.judge([*ids, int(each)]) for each in best.indices]
        values = best.values - torch.tensor([penalty for penalty, _ in judged])
        values[banned] = float("-inf")
        said = [[*ids, int(each)] for each in best.indices]
        scored = list(zip(values.log_softmax(-1).tolist(), said, strict=True))
        return scored, mode([place for _, place in judged])

    def search(self, *, beams, threshold, max_new_tokens):
        """The ids of the best beam, and the number of times it went back."""
        running = [(0.0, []), *[(-1e9, [])] * (beams - 1)]
        history, barred, times, came_back, done = [], {}, {}, False, []
        while (length := len(running[0][1])) < max_new_tokens and len(done) < beams:
            options, places = [], []
            for beam, (score, ids) in enumerate(running):
                banned = [c for b, c in barred.get(length, []) if b == beam]
                scored, place = self.options_of(ids, banned)
                options += [(score + s, beam, c, said) for c, (s, said) in enumerate(scored)]
                places.append(place)
            history[length:] = [{"running": running, "places": places}]
            often = mode(places)
            counts = [sum(each["places"][b] == often for each in history) for b in range(beams)]
            most = self.candidates - 1
            back = next((at for at in (often + 1, often) if times.get(at, 0) < most), 0)
            returns = often >= self.early and 0 < back < length and min(counts) > threshold
            if returns and not came_back:
                times[back] = times.get(back, 0) + 1
                barred = {at: pairs for at, pairs in barred.items() if at <= back}
                barred[back] = barred.get(back, []) + history[back]["chosen"]
                running, came_back = history[back]["running"], True
                done = [(score, ids) for score, ids in done if len(ids) <= back]
                continue
            came_back = False
            options.sort(key=lambda each: -each[0])
            history[-1]["chosen"] = [(beam, c) for _, beam, c, _ in options[:beams]]
            best = [(score, said) for score, _, _, said in options[:beams]]
            done += [(score / len(said), said) for score, said in best if self.ends(said)]
            running = [(-1e9 if self.ends(said) else score, said) for score, said in best]
        return max(done or running)[1], sum(times.values())


def mode(numbers):
    """The most frequent number; of equals the smallest, as torch has it."""
    return min(set(numbers), key=lambda number: (-numbers.count(number), number))
