"""Several adapters in one engine: each request gets its own, alone and beside others."""

import pytest
import torch
from adapter_folders import write_lora, write_projection
from fake_graphs import use_graphs
from golden_cases import GOLDENS
from safetensors.torch import save_file

from minigpt4_runtime import CheckpointError, ConfigError, MiniGPT4, RequestError, SamplingParams
from minigpt4_runtime.api import DEMO_MODEL_DIR
from minigpt4_runtime.checkpoint.adapter import encode_adapter, read_projection
from minigpt4_runtime.checkpoint.config_file import load_config
from minigpt4_runtime.checkpoint.graph_folder import vision_digest
from minigpt4_runtime.checkpoint.mapped import FolderTensors
from minigpt4_runtime.checkpoint.weights import read_folder_weights
from minigpt4_runtime.quantise.choice import QuantisePlan
from minigpt4_runtime.quantise.quantise import quantise

PICTURE = sorted((GOLDENS / "llama2-gqa/images").iterdir())[0]
SAMPLING = SamplingParams(max_new_tokens=10, ignore_eos=True, stop=())
CPU = {"device": "cpu", "dtype": "float32"}
NAMES = (None, "lora", "rows", "both")


@pytest.fixture(scope="module")
def base(golden_model_dir):
    return golden_model_dir("llama2-gqa")


@pytest.fixture(scope="module")
def paths(base, tmp_path_factory):
    return write_adapters(tmp_path_factory.mktemp("adapters"), base)


def write_adapters(made, base):
    """LoRA alone; a projection alone; both, of another rank and with fewer matrices."""
    language = load_config(base).language
    write_lora(made / "lora", language, seed=1, size=0.6)
    write_projection(made / "rows.safetensors", base, seed=2, size=1.0)
    some = ("self_attn.q_proj", "self_attn.o_proj", "mlp.down_proj")
    write_lora(made / "both", language, seed=3, rank=5, targets=some, size=0.8)
    write_projection(made / "both/projection.safetensors", base, seed=4, size=1.0)
    return {"lora": made / "lora", "rows": made / "rows.safetensors", "both": made / "both"}


def ask(model, name):
    return model.describe(PICTURE, "What?", SAMPLING, adapter=name).token_ids


def ask_together(model, names):
    tickets = [
        model.submit([{"role": "user", "content": [_part(), "What?"]}], SAMPLING, adapter=name)
        for name in names
    ]
    return [list(ticket)[-1].reply.token_ids for ticket in tickets]


def _part():
    return {"type": "image_url", "image_url": {"url": str(PICTURE)}}


@pytest.fixture(scope="module")
def alone(base, paths):
    """What each adapter answers that is loaded for all requests; None: without any."""
    found = {}
    for name in NAMES:
        with MiniGPT4.load(base, adapter=paths.get(name), **CPU) as model:
            found[name] = ask(model, None)
    assert len(set(found.values())) == len(NAMES), "adapters that change nothing test nothing"
    return found


def test_each_request_gets_its_own(base, paths, alone):
    """In turn, over one another's caches, and all in the same steps."""
    with MiniGPT4.load(base, adapters=paths, **CPU) as model:
        assert model.adapters == ("lora", "rows", "both")
        for name in (*NAMES, *NAMES):
            assert ask(model, name) == alone[name], name
        mixed = [*NAMES, "both", None, "lora"]
        assert ask_together(model, mixed) == [alone[name] for name in mixed]
        # What is equal is still shared: the picture without a projection of its own, three encoded.
        assert model.stats().num_encoded_images == 3
        described = list(model.describe_all([PICTURE], "What?", SAMPLING, adapter="lora"))
        assert described[0].reply.token_ids == alone["lora"]
        for asking in (lambda: ask(model, "none"),
                       lambda: model.describe_all([], adapter="none"),
                       lambda: model.submit_text("a", adapter="none")):  # fmt: skip
            with pytest.raises(RequestError, match="adapter is 'none'; this model has lora, rows"):
                list(asking())


def test_what_is_beside_a_request_has_its_adapter(base, paths):
    """Branches and candidates are computed as by a model that has the adapter for all requests."""
    blind = {"blind": [{"role": "user", "content": [_part(), "Where?"]}]}
    scored = [{"role": "user", "content": [_part(), "What?"]}], ["a", "of the"]

    def take(model, name):
        told = model.describe(
            PICTURE, "What?", SAMPLING, adapter=name, branches=blind,
            processors=[lambda seen: seen.logits - 0.8 * seen.branches["blind"]],
        )  # fmt: skip
        return told.token_ids, pytest.approx(model.score(*scored, adapter=name), abs=1e-4)

    alone = {}
    for name in NAMES:
        with MiniGPT4.load(base, adapter=paths.get(name), **CPU) as model:
            alone[name] = take(model, None)
    assert len({ids for ids, _ in alone.values()}) == len(NAMES)
    with MiniGPT4.load(base, adapters=paths, **CPU) as model:
        for name in NAMES:
            ids, scores = take(model, name)
            assert (ids, scores.expected) == alone[name]
        with pytest.raises(RequestError, match="adapter is 'none'"):
            model.score(*scored, adapter="none")


def test_what_is_of_another_kind_is_refused_in_words(base):
    for adapters in (["a"], {"a": None}):
        with pytest.raises(ConfigError, match="adapters is a mapping from names to paths"):
            MiniGPT4.load(base, adapters=adapters, **CPU)
    asked, steered = [{"role": "user", "content": "a"}], {"processors": [lambda seen: seen.logits]}
    with MiniGPT4.load(base, **CPU) as model:
        for words, asking in (
            ("branches is a mapping", lambda: model.chat(asked, branches=[asked], **steered)),
            ("branches is a mapping", lambda: model.submit_raw("a", branches=["a"], **steered)),
            ("candidates is a list", lambda: model.score(asked, None)),
            ("candidates is a list", lambda: model.score(asked, [5])),
        ):
            with pytest.raises(RequestError, match=words):
                asking()


def test_searches_and_small_steps(base, paths, alone):
    """Beams fork rows, and prompts come in pieces beside answers of other adapters."""
    beams = SamplingParams(max_new_tokens=6, num_beams=3, ignore_eos=True, stop=())
    engine = {"max_step_tokens": 24, "block_size": 8, "max_running": 8}
    with MiniGPT4.load(base, adapters=paths, engine=engine, **CPU) as model:
        before = {n: model.describe(PICTURE, "a", beams, adapter=n).token_ids for n in NAMES}
        tickets = [
            model.submit([{"role": "user", "content": [_part(), "a"]}], beams, adapter=n)
            for n in NAMES
        ]
        together = [list(each)[-1].reply.token_ids for each in tickets]
        assert together == list(before.values())
        assert ask_together(model, NAMES) == list(alone.values())


def test_scores_branches_and_processors(base, paths):
    """All at once, over caches that hold the same prompt of other adapters, as each is alone."""
    asked = [{"role": "user", "content": [_part(), "What?"]}]
    steering = {
        "processors": [lambda seen: 2 * seen.logits - seen.branches["blind"]],
        "branches": {"blind": [{"role": "user", "content": "What?"}]},
    }
    ids = [[7, 8, 9], [10], [30, 4]]
    alone = []
    for name in NAMES:
        with MiniGPT4.load(base, adapter=paths.get(name), **CPU) as model:
            answer = model.chat(asked, SAMPLING, **steering).token_ids
            alone.append((answer, model.score(asked, ids)))
    with MiniGPT4.load(base, adapters=paths, **CPU) as model:
        answers = [model.submit(asked, SAMPLING, adapter=name, **steering) for name in NAMES]
        scores = [model.submit_score(asked, ids, adapter=name) for name in NAMES]
        for answer, score, (token_ids, wanted) in zip(answers, scores, alone, strict=True):
            assert list(answer)[-1].reply.token_ids == token_ids
            assert next(score) == pytest.approx(wanted, abs=1e-4)
        with pytest.raises(RequestError, match="adapter is 'none'"):
            model.score(asked, ids, adapter="none")
        with pytest.raises(RequestError, match="ids from 0 to"):
            model.score(asked, [[1.5]])


def looked(lab):
    """The logits of an answer, and where a word of it looked."""
    prompt = lab.prompt([{"role": "user", "content": [_part(), "What?"]}])
    return lab.forward(prompt, answer="a red one").logits, lab.look(prompt, "a red one", 3).heat


@pytest.mark.parametrize("weights", ["float", "w4a16"])
def test_the_laboratory_under_an_adapter(tmp_path, weights):
    """It sees what the model that has the adapter for all requests is; 4 bits lie in an order."""
    folder = DEMO_MODEL_DIR
    if weights != "float":
        plan = QuantisePlan(weights=weights, image_side="keep")
        quantise(folder, folder := tmp_path / weights, plan)
    paths = write_adapters(tmp_path, folder)
    alone = {}
    for name in NAMES:
        with MiniGPT4.load(folder, adapter=paths.get(name), **CPU) as model:
            alone[name] = looked(model.lab())
    with MiniGPT4.load(folder, adapters=paths, **CPU) as model:
        lab = plain = model.lab()
        for name in (*NAMES, *NAMES):
            lab = lab.under(name) if name else plain
            logits, heat = looked(lab)
            for other, (wanted, places) in alone.items():
                near = 1e-4 * wanted.abs().max()
                assert bool((logits - wanted).abs().max() <= near) == (name == other), (name, other)
                assert heat == pytest.approx(places, abs=1e-5) or name != other
        with pytest.raises(RequestError, match="adapter is 'none'; this model has lora, rows"):
            plain.under("none")


def test_a_qformer_of_its_own(golden_model_dir, tmp_path):
    """It answers as it does alone, and its bytes are counted."""
    base, path = golden_model_dir("vicuna"), tmp_path / "projection.safetensors"
    held = FolderTensors(read_folder_weights(base))
    generator, qformer = torch.Generator().manual_seed(1), {}
    for name in held:
        if name.startswith("vision.qformer."):
            noise = torch.randn(held[name].shape, generator=generator)
            qformer[name] = held[name].float() + noise * held[name].float().std(correction=0)
    record = {"base": vision_digest(base)}
    path.write_bytes(encode_adapter(*read_projection(base), record, qformer))
    found = []
    for loaded, name in (({}, None), ({"adapter": path}, None), ({"adapters": {"q": path}}, "q")):
        with MiniGPT4.load(base, **loaded, **CPU) as model:
            num_bytes = model.probe.weight_bytes()["vision"]
            lab = model.lab()
            seen = looked(lab.under(name) if name else lab)[1]
            found.append((ask(model, name), num_bytes, ask(model, None), seen))
    (plain, least, *_), (alone, same, _, wanted), (chosen, most, beside, seen) = found
    assert seen == pytest.approx(wanted, abs=1e-5)
    assert alone == chosen != plain == beside
    own = [*qformer.values(), *read_projection(base)]
    assert most - least == sum(each.nbytes for each in own)
    assert same == least


def test_numbers_that_would_reach_the_rows_of_others(base, tmp_path):
    name = "base_model.model.model.layers.0.mlp.down_proj.lora_B.weight"
    tensors = write_lora(tmp_path / "broken", load_config(base).language, seed=1)
    tensors[name][0, 0] = torch.nan
    save_file(tensors, tmp_path / "broken/adapter_model.safetensors")
    with pytest.raises(CheckpointError, match=r"layers\.0\.mlp\.down_proj\.lora_B.* holds NaN"):
        MiniGPT4.load(base, adapters={"broken": tmp_path / "broken"}, **CPU)


def test_ranks_know_the_adapters_of_rows(base, paths, alone):
    with MiniGPT4.load(base, adapters=paths, tensor_parallel=2, **CPU) as model:
        assert ask_together(model, NAMES) == list(alone.values())


def test_graphs_read_the_adapters_from_their_tensors(base, paths, alone, monkeypatch):
    """On a device that runs ahead. A step without adapters has a graph of its own, without them."""
    recorder = use_graphs(monkeypatch, runs_ahead=True)
    with MiniGPT4.load(base, adapters=paths, **CPU) as model:
        assert ask_together(model, [None] * 2) == [alone[None]] * 2
        before = recorder.num_captured
        for names in (("lora", "rows"), ("both", None), ("rows", "lora")):
            assert ask_together(model, names) == [alone[name] for name in names]
        assert recorder.num_captured > before > 0
        captured = recorder.num_captured
        assert ask_together(model, ("lora", "both")) == [alone["lora"], alone["both"]]
        assert recorder.num_captured <= captured + 1  # One of a single sequence may be new.


def test_over_weights_of_integers(base, paths, tmp_path):
    plan = QuantisePlan(weights="w8a16", image_side="keep")
    quantise(base, tmp_path / "w8", plan)
    found = {}
    for name in NAMES:
        with MiniGPT4.load(tmp_path / "w8", adapter=paths.get(name), **CPU) as model:
            found[name] = ask(model, None)
    with MiniGPT4.load(tmp_path / "w8", adapters=paths, **CPU) as model:
        assert ask_together(model, NAMES) == list(found.values())


def test_in_half_precision(base, paths):
    """On a CPU the image side is widened, which encoders share; rows are as the model computes."""
    half = {"device": "cpu", "dtype": "float16"}
    with MiniGPT4.load(base, adapter=paths["rows"], **half) as model:
        expected = ask(model, None)
    with MiniGPT4.load(base, adapters=paths, **half) as model:
        assert ask_together(model, ["rows", None])[0] == expected
        size = model.config.vision.image_size
        encoded = model._loaded.rank_model.tuned[2].encode(torch.zeros(1, 3, size, size))
        assert encoded.dtype == torch.float16


def test_what_cannot_be(base, paths):
    with pytest.raises(ConfigError, match="adapter and adapters are both given"):
        MiniGPT4.load(base, adapter=paths["lora"], adapters=paths)
    with pytest.raises(ConfigError, match="vision_graph and adapter are both given"):
        MiniGPT4.load(base, adapters=paths, vision_graph=PICTURE.parent)
    with MiniGPT4.load(base, **CPU) as model:
        assert model.adapters == ()
        with pytest.raises(RequestError, match="this model has none: load the model with adapters"):
            ask(model, "lora")
        assert torch.is_tensor(model.embed_images([PICTURE]))
