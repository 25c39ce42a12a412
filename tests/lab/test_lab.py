"""The laboratory computes what the engine does, and lets gradients through."""

from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from dense import Dense
from golden_cases import NAMES, assert_same_ids

from minigpt4_runtime import (
    ConfigError,
    MiniGPT4,
    PromptTooLongError,
    RequestError,
    SamplingParams,
)
from minigpt4_runtime.lab import Lab
from minigpt4_runtime.model.row_operations import Residual

CASES_EACH = 6
ROOT = Path(__file__).parents[2]


@pytest.mark.parametrize("name", NAMES)
def test_the_engines_tokens_and_the_originals_logits(golden_of, name):
    golden = golden_of(name)
    lab, cases = golden.model.lab(), golden.cases("single")
    for case in cases[:: max(1, len(cases) // CASES_EACH)]:
        asked = golden.question(case)
        prompt = lab.prompt(asked)
        assert prompt.token_ids == golden.model.encode_prompt(asked).token_ids
        # One way has all scores in memory, the other does not.
        for keep in ((), ("attention",)):
            (answer,) = lab.generate(
                prompt, max_new_tokens=golden.content["max_new_tokens"], keep=keep
            )
            assert_same_ids(golden, answer.token_ids, case["output_ids"]["greedy"])
            assert answer.text == case["reply"]
        logits = lab.start(prompt).logits[0]
        if (theirs := golden.arrays.get(f"case{case['id']}/first_logits")) is not None:
            theirs = torch.from_numpy(theirs)
            assert (logits - theirs).abs().max() <= 1e-4 * theirs.abs().max()


@pytest.mark.parametrize("name", ["vicuna", "llama2-gqa"])
def test_a_pass_is_the_one_written_down_once_more(golden_of, name):
    golden = golden_of(name)
    lab = golden.model.lab()
    prompt = lab.prompt(golden.question(golden.cases("single")[0]))
    answer = (5, 9, 17)
    done = lab.forward(prompt, answer=answer, keep=("hidden", "attention"))
    dense = Dense(lab)
    rows = dense.rows_of(prompt, lab.encode(prompt.pixels), answer)
    logits, hidden, shares = dense.run(rows)
    assert torch.allclose(done.logits[0].double(), logits, atol=1e-4)
    assert torch.allclose(done.hidden[:, 0].double(), hidden, atol=1e-4)
    assert torch.allclose(done.attention[:, 0].double(), shares, atol=1e-5)
    said = logits[-4:-1].log_softmax(-1)
    assert float(done.loss) == pytest.approx(-float(said[[0, 1, 2], answer].mean()), abs=1e-4)
    assert torch.allclose(lab.lens(done.hidden[-1]), done.logits, atol=1e-5)


def test_what_is_kept_is_what_was_named(lab, prompt):
    whole = lab.forward(prompt, keep=("hidden", "attention"))
    span = prompt.image_columns
    part = lab.forward(
        prompt,
        keep={"hidden": [-1, 0], "attention": 1, "heads": [3, 0], "columns": span,
              "rows": slice(prompt.answer_start - 2, None)},
    )  # fmt: skip
    assert torch.allclose(part.hidden, whole.hidden[[-1, 0], :, -2:], atol=1e-5)
    wanted = whole.attention[[1]][:, :, [3, 0], -2:, span]
    assert part.attention.shape == wanted.shape == (1, 1, 2, 2, span.stop - span.start)
    assert torch.allclose(part.attention, wanted, atol=1e-6)
    assert lab.forward(prompt).hidden is None
    assert lab.forward(prompt).attention is None


def test_no_more_is_held_than_was_named(lab, prompt):
    """Not the whole tensors, of which those rows and columns are a part."""
    keep = {"hidden": "all", "attention": [1], "heads": [0], "rows": slice(-2, None),
            "columns": prompt.image_columns}  # fmt: skip
    kept = lab.start(prompt, keep=keep)._now.kept
    for held in (*kept.rows_of.values(), *kept.shares_of.values()):
        assert held.untyped_storage().nbytes() == held.numel() * held.element_size()
    columns = prompt.image_columns.stop - prompt.image_columns.start
    assert {tuple(each.shape) for each in kept.shares_of.values()} == {(1, 1, 2, columns)}
    assert len(kept.rows_of) == lab.config.language.num_hidden_layers + 1


def test_raw_text_is_taken_as_it_is(vicuna, lab):
    picture = vicuna.picture(vicuna.pictures[0])
    raw = "###Human: <Img><ImageHere></Img> Is there a dog? ###Assistant:"
    prompt = lab.prompt(raw, [picture])
    before, after = raw.split("<ImageHere>")
    tokenizer = vicuna.model._tokenizer
    place = (vicuna.model.config.image_token_id,) * vicuna.model.config.rows_per_image
    assert prompt.token_ids == (
        tokenizer.bos_id, *tokenizer.encode(before), *place, *tokenizer.encode(after)
    )  # fmt: skip
    assert prompt.answer_start == len(prompt.token_ids)
    assert torch.equal(prompt.pixels, lab.pixels(picture))
    # What the template writes, written by hand.
    asked = vicuna.question(vicuna.cases("single")[0])
    written = vicuna.model.encode_prompt(asked)
    assert lab.prompt(written.text, [asked[0].content[0]]).token_ids == written.token_ids


def test_an_answer_that_is_begun(vicuna, lab):
    asked = [
        {"role": "user", "content": [vicuna.picture(vicuna.pictures[0]), "What?"]},
        {"role": "assistant", "content": "there is"},
    ]
    prompt = lab.prompt(asked)
    begun = lab.ids_of("there is")
    assert prompt.token_ids[prompt.answer_start :] == begun
    (answer,) = lab.generate(prompt, max_new_tokens=8)
    reply = vicuna.model.chat(asked, SamplingParams(max_new_tokens=8))
    assert (answer.text, answer.token_ids) == (reply.text, reply.token_ids)


def in_float64(lab):
    return lab.edited({name: weight.double() for name, weight in lab.weights.items()})


def assert_is_the_slope(function, at):
    """The gradient agrees with central differences along random directions, in float64."""
    at = at.detach().requires_grad_()
    (gradient,) = torch.autograd.grad(function(at), at)
    generator = torch.Generator().manual_seed(3)
    for _ in range(3):
        direction = torch.randn(at.shape, generator=generator, dtype=torch.float64)
        with torch.no_grad():
            step = 1e-5 * direction
            slope = float(function(at + step) - function(at - step)) / 2e-5
        assert float((gradient * direction).sum()) == pytest.approx(slope, rel=1e-6, abs=1e-9)


@pytest.mark.parametrize("keep", [(), ("attention",)])
def test_gradients_in_float64(lab, prompt, keep):
    answer, name = (5, 9, 17), "language.layers.1.attention.key.weight"
    bias = "vision.qformer.layers.0.cross_attention.key.bias"
    with in_float64(lab):
        pixels = prompt.pixels.double()
        assert_is_the_slope(lambda x: lab.forward(prompt, x, answer, keep=keep).loss, pixels)
        rows = lab.encode(pixels)
        assert rows.dtype == torch.float64
        assert_is_the_slope(
            lambda x: lab.forward(prompt, answer=answer, embeddings=x, keep=keep).loss, rows
        )
        for each in (name, bias, "language.norm.weight"):
            base = lab.weights[each].double()
            delta = torch.zeros_like(base)

            def loss(x, each=each, base=base):
                with lab.edited({each: base + x}):
                    return lab.forward(prompt, pixels, answer, keep=keep).loss

            assert_is_the_slope(loss, delta)


def test_gradients_reach_a_weight_that_wants_one(lab, prompt):
    weight = lab.weights["language.layers.0.mlp_up.weight"].requires_grad_()
    lab.forward(prompt, answer=(5,)).loss.backward()
    assert weight.grad.abs().max() > 0
    # It is the laboratory's own parameter, over the memory that the engine reads.
    engines = lab._loaded.rank_model.language.layers[0].mlp_up.weight
    assert engines.data_ptr() == weight.data_ptr()
    assert engines.grad is None
    assert not engines.requires_grad


def test_scores_are_those_of_whole_passes(vicuna, lab, prompt):
    candidates = ["yes", "no", (5, 9, 17, 4), "a small red circle", (7,)]
    scores = lab.score(prompt, candidates)
    for score, candidate in zip(scores, candidates, strict=True):
        ids = lab.ids_of(candidate) if isinstance(candidate, str) else candidate
        loss = lab.forward(prompt, answer=ids).loss
        assert float(score) == pytest.approx(-float(loss) * len(ids), abs=1e-3)
    many = lab.score(prompt, [(each,) for each in range(40)])
    wanted = lab.start(prompt).logits[0].log_softmax(-1)[:40]
    assert torch.allclose(many, wanted, atol=1e-5)
    assert lab.score(prompt, []).shape == (0,)


def test_variants_side_by_side(vicuna, lab):
    """Each of several pictures gets the answer that it gets alone."""
    case = vicuna.cases("single")[0]
    pictures = [vicuna.picture(name) for name in vicuna.pictures]
    question = case["turns"][0]
    alone = [lab.prompt([{"role": "user", "content": [each, question]}]) for each in pictures]
    together = alone[0].showing(torch.cat([each.pixels for each in alone]))
    answers = lab.generate(together, max_new_tokens=12)
    assert answers == [lab.generate(each, max_new_tokens=12)[0] for each in alone]
    logits = lab.forward(together, answer=[(3,), (4,), (5,)]).logits
    assert torch.allclose(logits[1:2], lab.forward(alone[1], answer=(4,)).logits, atol=1e-4)


def test_the_towers_exit_and_the_queries_gaze(golden_of, lab, prompt):
    vision = lab._opened.model.vision
    rows = lab.encode(prompt.pixels)
    looked = lab.encode(prompt.pixels, cross_attention=True)
    assert torch.equal(rows, looked.embeddings)
    config = lab.config
    queries, patches = config.qformer.num_query_tokens, config.vision.num_patches
    shape = (1, config.qformer.num_attention_heads, queries, patches + 1)
    assert looked.cross_attention.shape[1:] == shape
    assert torch.allclose(looked.cross_attention.sum(-1), torch.ones(()), atol=1e-5)
    # The first reader's shares, written out.
    reader = vision.qformer.layers[0].cross_attention
    seen = vision.ln_vision(vision.vit((prompt.pixels - mean(config)) / std(config)))
    asked = vision.qformer.query_norm(vision.qformer.query_tokens)[None]
    itself = vision.qformer.layers[0].attention
    asked = itself(asked, itself.query(asked), itself.key(asked), itself.value(asked))
    size = config.qformer.hidden_size // config.qformer.num_attention_heads
    for head in range(config.qformer.num_attention_heads):
        part = slice(head * size, (head + 1) * size)
        scores = reader.query(asked)[0, :, part] @ reader.key(seen)[0, :, part].T / size**0.5
        assert torch.allclose(looked.cross_attention[0, 0, head], scores.softmax(-1), atol=1e-5)
    # Left early: the blocks one by one.
    hidden = vision.vit.patch_embedding(
        vision.vit._cut((prompt.pixels - mean(config)) / std(config))
    )
    hidden = torch.cat([vision.vit.class_embedding.expand(1, 1, -1), hidden], 1)
    hidden = vision.vit.blocks[0](Residual(hidden + vision.vit.position_embedding)).total
    early = vision.projection(vision.qformer(vision.ln_vision(hidden)))
    assert torch.allclose(lab.encode(prompt.pixels, exit_layer=1), early, atol=1e-5)
    assert torch.equal(lab.encode(prompt.pixels), rows)
    without = golden_of("llama2").model.lab()
    with pytest.raises(RequestError, match="no Q-Former"):
        without.encode(torch.zeros(1, 3, 56, 56), cross_attention=True)


def mean(config):
    return torch.tensor(config.vision.image_mean)[:, None, None]


def std(config):
    return torch.tensor(config.vision.image_std)[:, None, None]


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_halves(vicuna, dtype):
    """What the engine's own pass expects, to a half's precision."""
    model = MiniGPT4.load(vicuna.model.model_dir, device="cpu", dtype=dtype)
    asked = vicuna.question(vicuna.cases("single")[0])
    lab, answer = model.lab(), (5, 9, 17)
    prompt = lab.prompt(asked)
    pixels = prompt.pixels.clone().requires_grad_()
    done = lab.forward(prompt, pixels, answer, keep=("attention",))
    start = prompt.image_spans[0].start
    rows = model.embed_images(asked[0].content[:1])[0]
    expected = model.probe.expect(prompt.token_ids, answer, image_rows={start: rows})
    ours = done.logits[0, -4:-1].double().log_softmax(-1)
    assert (ours - expected).abs().max() < {"float16": 0.02, "bfloat16": 0.15}[dtype]
    done.loss.backward()
    assert pixels.grad.isfinite().all()
    assert pixels.grad.abs().max() > 0


@pytest.mark.parametrize("name", ["w8a16", "w4a16-g32"])
def test_quantised_weights(name):
    """They are the engine's, in the order of a kernel or not, and are edited as matrices."""
    config = MiniGPT4.load(device="cpu").config
    model = MiniGPT4.with_random_weights(config, device="cpu", formats={"language.layers": name})
    lab, answer = model.lab(), (5, 9, 17)
    prompt = lab.prompt("Who is it?")
    expected = model.probe.expect(prompt.token_ids, answer, image_rows={})
    before = lab.forward(prompt, answer=answer).logits
    assert torch.allclose(before[0, -4:-1].double().log_softmax(-1), expected, atol=1e-3)
    matrix = torch.zeros(config.language.hidden_size, config.language.hidden_size)
    with lab.edited({"language.layers.0.attention.out.weight": matrix}):
        edited = lab.forward(prompt, answer=answer).logits
    with lab.hook("attention", 0, lambda value, place: value * 0):
        assert torch.allclose(lab.forward(prompt, answer=answer).logits, edited, atol=1e-5)
    assert torch.equal(lab.forward(prompt, answer=answer).logits, before)


def test_a_compiled_graph_is_studied_as_torch(graph_dir):
    """Of the demo model: many tests share its graph."""
    demo = {"device": "cpu", "dtype": "float32"}
    lab = MiniGPT4.load(**demo, vision_runtime="onnx", vision_graph=graph_dir()).lab()
    pixels = lab.pixels(ROOT / "examples/images/three.png")
    wanted = MiniGPT4.load(**demo).lab().encode(pixels)
    assert torch.allclose(lab.encode(pixels), wanted, atol=1e-5)


WRONG_IDS = {
    r"An id is 1000000, outside the vocabulary, which is 0 to \d+\. Give": [5, 10**6],
    "An id is -1, outside": (-1,),
    "An id is -3, outside": torch.tensor([5, -3]),
    r"ids are \[1180591620717411303424\]; give whole numbers from 0 to": [2**70],
    r"ids are \[1\.5\]; give": [1.5],
    r"ids are \[True\]; give": [True],
    r"ids are \['a'\]; give": ["a"],
    r"ids are tensor\(\[1\.\+0\.j\]\); give": torch.tensor([1 + 0j]),
    "ids are 5; give": 5,
    r"ids are \[\[5\], \[6, 7\]\]; give": [[5], [6, 7]],
}


@pytest.mark.parametrize("said", WRONG_IDS)
def test_ids_of_no_model_are_refused_wherever_they_come_in(lab, prompt, said):
    ids = WRONG_IDS[said]
    for ask in (
        lambda: lab.forward(prompt, answer=ids),
        lambda: lab.score(prompt, ["yes", ids]),
        lambda: lab.explain(prompt, ids),
        lambda: lab.answer(prompt, ids),
        lambda: lab.text_of(ids),
        lambda: lab.start(prompt).step(ids),
        lambda: lab.generate(prompt, choose=lambda _: ids, max_new_tokens=1),
    ):
        with pytest.raises(RequestError, match=said):
            ask()


def test_what_cannot_be_is_said(vicuna, lab, prompt):
    picture, asked = vicuna.picture(vicuna.pictures[0]), vicuna.question(vicuna.cases("single")[0])
    for said, ask in {
        "2 places <ImageHere> and there are 1": lambda: lab.prompt(2 * "<ImageHere>", [picture]),
        "leave out pictures": lambda: lab.prompt(asked, [picture]),
        r"pixels are \(1, 3, 9, 9\)": lambda: lab.forward(prompt, torch.zeros(1, 3, 9, 9)),
        r"embeddings are \(1, 3, 9\)": lambda: lab.forward(prompt, embeddings=torch.zeros(1, 3, 9)),
        "not both": lambda: lab.forward(prompt, prompt.pixels, embeddings=torch.zeros(1, 3, 9)),
        "was given 0": lambda: lab.forward(prompt, prompt.pixels[:0]),
        "pixels are torch.uint8; give": lambda: lab.encode(255 * prompt.pixels.byte()),
        "pixels are ndarray; give": lambda: lab.encode(prompt.pixels.numpy()),
        "has 0 pictures and was given 1": lambda: lab.forward(lab.prompt("Hi"), prompt.pixels),
        "ids are tensor": lambda: lab.forward(prompt, answer=torch.zeros(1, 1, 1).long()),
        "candidates is 'Yes'; give a list": lambda: lab.score(prompt, "Yes"),
        "ids of 2 answers; give those of one": lambda: lab.score(prompt, ["yes", [(1, 2), (3, 4)]]),
        "ids of 3 answers; give": lambda: lab.explain(prompt, torch.zeros(3, 2).long()),
        "ids of 4 answers; give": lambda: lab.text_of(torch.zeros(4, 2).long()),
        "A candidate is empty": lambda: lab.score(prompt, ["yes", ()]),
        "2 answers for 1 sequences": lambda: lab.forward(prompt, answer=[(1,), (2,)]),
        "beams is 0": lambda: lab.start(prompt, 0),
        "There is no layer 3": lambda: lab.forward(prompt, keep={"attention": 3}),
        "must be a slice": lambda: lab.forward(prompt, keep={"rows": 3}),
        "write keep=": lambda: lab.forward(prompt, keep="hidden"),
        "A branch needs a name": lambda: lab.generate(prompt, branches={"": prompt}),
        "differ in their numbers": lambda: lab.generate(
            prompt, branches={"two": prompt.showing(prompt.pixels.expand(2, -1, -1, -1))}
        ),
        "exit_layer is 9": lambda: lab.encode(prompt.pixels, exit_layer=9),
    }.items():  # fmt: skip
        with pytest.raises(RequestError, match=said):
            ask()
    with pytest.raises(RequestError, match="Ranks share this model"):
        Lab(SimpleNamespace(ranks=SimpleNamespace(size=2)))
    with pytest.raises(ConfigError, match="Did you mean 'hidden'"):
        lab.forward(prompt, keep=("hiden",))
    limit = lab.config.language.context_length
    with pytest.raises(PromptTooLongError):
        lab.forward(prompt, answer=(5,) * limit)
    with pytest.raises(PromptTooLongError):
        lab.generate(lab.prompt("a " * limit))
    assert len(lab.generate(lab.prompt("Yes"), max_new_tokens=2, stop=())[0].token_ids) <= 2
