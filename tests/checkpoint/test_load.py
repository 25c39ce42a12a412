"""A model folder → memory: equal, strict, mapped where it can be, and never twice."""

import json
import subprocess
import sys
import textwrap
import threading
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from published_files import edit_json
from safetensors.torch import load_file, save_file

from minigpt4_runtime.checkpoint import folder, reading, writer
from minigpt4_runtime.checkpoint.blank_model import model_shapes
from minigpt4_runtime.checkpoint.config_file import load_config
from minigpt4_runtime.checkpoint.load import load_language, load_model
from minigpt4_runtime.checkpoint.mapped import map_tensors
from minigpt4_runtime.checkpoint.weights import cut, read_folder_weights, read_header
from minigpt4_runtime.convert.convert import convert
from minigpt4_runtime.errors import CheckpointError, ConfigError
from minigpt4_runtime.model.parallel import Solo, share, split_dimension

CPU = torch.device("cpu")


def load(model_dir, dtype=torch.float16):
    return load_model(model_dir, device=CPU, dtype=dtype)


# --- what is loaded ----------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
@pytest.mark.parametrize("piece_bytes", [16 * 2**20, 1000])
def test_every_weight_arrives(vicuna_folder, dtype, piece_bytes, monkeypatch):
    monkeypatch.setattr(reading, "PIECE_BYTES", piece_bytes)
    model, written = load(vicuna_folder, dtype), load_file(vicuna_folder / "model.safetensors")
    assert model.state_dict().keys() == written.keys()
    for name, weight in model.state_dict().items():
        assert weight.dtype == dtype
        assert weight.device == CPU
        assert torch.equal(weight, written[name].to(dtype)), name
    assert not model.training
    assert not any(weight.requires_grad for weight in model.parameters())


def test_shards_load_like_one_file(published, tmp_path):
    convert(published, tmp_path / "one")
    convert(published, tmp_path / "many", max_shard_bytes=300_000)
    one, many = load(tmp_path / "one"), load(tmp_path / "many")
    for (name, first), second in zip(
        one.state_dict().items(), many.state_dict().values(), strict=True
    ):
        assert torch.equal(first, second), name


def test_equal_dtype_stays_in_the_mapped_file(vicuna_folder):
    """Side by side, the weights lie exactly as they lie in the file: nothing was copied."""
    weights = load(vicuna_folder).state_dict()
    stored = read_folder_weights(vicuna_folder)
    bases = {weight.data_ptr() - stored[name].start for name, weight in weights.items()}
    assert len(bases) == 1
    assert bases.pop() % 4096 == 0
    if (maps := Path("/proc/self/maps")).exists():
        assert str(vicuna_folder / "model.safetensors") in maps.read_text()
        del weights
        assert str(vicuna_folder / "model.safetensors") not in maps.read_text()


class Late(reading.Reader):
    """Copies nothing before it has to, as a device may."""

    def __init__(self, stored, device):
        super().__init__(stored, torch.device("meta"))

    def _copy(self, piece, target):
        return lambda: target.copy_(piece)


def pin_nothing(monkeypatch):
    """Without a GPU no memory can be pinned."""
    empty = torch.empty
    monkeypatch.setattr(
        torch, "empty", lambda *size, pin_memory=False, **more: empty(*size, **more)
    )


@pytest.mark.parametrize("piece_bytes", [16 * 2**20, 1000])
def test_a_piece_stays_until_a_slow_device_has_it(vicuna_folder, piece_bytes, monkeypatch):
    """Read by several threads, through two buffers."""
    monkeypatch.setattr(reading, "PIECE_BYTES", piece_bytes)
    pin_nothing(monkeypatch)
    monkeypatch.setattr("minigpt4_runtime.checkpoint.load.Reader", Late)
    started = []
    start = threading.Thread.start
    monkeypatch.setattr(threading.Thread, "start", lambda own: started.append(own) or start(own))
    language = load_language(vicuna_folder, device=CPU, dtype=torch.float32, group=OneOf(1, 2))
    monkeypatch.undo()
    assert 0 < len(started) <= 4, "of all weights together"
    assert not any(thread.is_alive() for thread in started)
    wanted = load_language(vicuna_folder, device=CPU, dtype=torch.float32, group=OneOf(1, 2))
    for name, weight in wanted.state_dict().items():
        assert torch.equal(language.state_dict()[name], weight), name


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float16, torch.float32])
@pytest.mark.parametrize("piece_bytes", [16 * 2**20, 1000])
def test_every_weight_arrives_on_a_gpu(vicuna_folder, piece_bytes, dtype, monkeypatch):
    """Whose copies and the next pieces go on at once."""
    monkeypatch.setattr(reading, "PIECE_BYTES", piece_bytes)
    found = load_language(vicuna_folder, device=torch.device("cuda", 0), dtype=dtype)
    wanted = load_language(vicuna_folder, device=CPU, dtype=dtype)
    for name, weight in wanted.state_dict().items():
        assert torch.equal(found.state_dict()[name].cpu(), weight), name


@pytest.mark.parametrize("device", ["cpu", "meta"])
def test_a_file_that_is_cut_off_while_it_is_read(model_dir, device, monkeypatch):
    """By one thread, and by several: the error arrives, and none of them stays."""
    pin_nothing(monkeypatch)
    stored, before = read_folder_weights(model_dir), threading.active_count()
    last = max(stored.values(), key=lambda place: place.start)
    with last.path.open("r+b") as file:
        file.truncate(last.start + last.num_bytes // 2)
    with (
        pytest.raises(CheckpointError, match="was cut off while it was read"),
        reading.Reader([last], torch.device(device)) as reader,
    ):
        list(reader.pieces(last))
    assert threading.active_count() == before


class OneOf(Solo):
    def __init__(self, rank, size):
        self.rank, self.size = rank, size


@pytest.mark.parametrize("dtype", [torch.float16, torch.float32])
@pytest.mark.parametrize("size", [2, 4])
@pytest.mark.parametrize("piece_bytes", [16 * 2**20, 1000])
def test_ranks_read_their_parts_and_no_more(vicuna_folder, dtype, size, piece_bytes, monkeypatch):
    monkeypatch.setattr(reading, "PIECE_BYTES", piece_bytes)
    parts = [
        load_language(vicuna_folder, device=CPU, dtype=dtype, group=OneOf(rank, size)).state_dict()
        for rank in range(size)
    ]
    whole = {
        name.removeprefix("language."): weight.to(dtype)
        for name, weight in load_file(vicuna_folder / "model.safetensors").items()
        if name.startswith("language.")
    }
    assert all(part.keys() == whole.keys() for part in parts)
    for name, weight in whole.items():
        dimension = split_dimension(name)
        mine = [part[name] for part in parts]
        if dimension is None:
            assert all(torch.equal(one, weight) for one in mine), name
        else:
            assert torch.equal(torch.cat(mine, dimension), weight), name
    leader = load_model(vicuna_folder, device=CPU, dtype=dtype, group=OneOf(0, size))
    assert all(torch.equal(leader.language.state_dict()[name], parts[0][name]) for name in whole)


@pytest.mark.parametrize("dimension", [0, 1])
def test_the_parts_of_a_weight_share_no_byte(vicuna_folder, dimension):
    stored = read_folder_weights(vicuna_folder)["language.layers.0.mlp_down.weight"]
    num_ranks, read = 4, []
    for rank in range(num_ranks):
        part = cut(stored, dimension, share(stored.shape[dimension], OneOf(rank, num_ranks)))
        runs = [at for start, count in part.runs() for at in range(start, start + count)]
        assert len(runs) == part.num_bytes
        read += runs
    assert sorted(read) == list(range(stored.start, stored.start + stored.num_bytes))


def test_of_a_mixed_folder_only_the_other_dtypes_are_copied(mixed_folder):
    weights = load(mixed_folder).state_dict()
    written, stored = (
        load_file(mixed_folder / "model.safetensors"),
        read_folder_weights(mixed_folder),
    )
    mapped = [name for name, weight in written.items() if weight.dtype == torch.float16]
    bases = {weights[name].data_ptr() - stored[name].start for name in mapped}
    assert 0 < len(mapped) < len(written)
    assert len(bases) == 1
    assert bases.pop() % 4096 == 0
    for name, weight in weights.items():
        assert weight.dtype == torch.float16
        assert torch.equal(weight, written[name].half()), name


def test_a_write_to_a_mapped_weight_stays_private(model_dir):
    before = (model_dir / "model.safetensors").read_bytes()
    model = load(model_dir)
    model.language.norm.weight.fill_(3.0)
    assert (model_dir / "model.safetensors").read_bytes() == before
    assert not torch.equal(load(model_dir).language.norm.weight, model.language.norm.weight)


def test_another_dtype_maps_no_file(vicuna_folder):
    model = load(vicuna_folder, torch.float32)
    if (maps := Path("/proc/self/maps")).exists():
        assert str(vicuna_folder) not in maps.read_text()
    assert model.language.norm.weight.dtype == torch.float32


MEASURE = """
    import sys
    from pathlib import Path
    import torch
    from minigpt4_runtime.checkpoint import load

    def peak_bytes():
        status = Path("/proc/self/status")
        if status.exists():
            line = next(l for l in status.read_text().splitlines() if l.startswith("VmHWM"))
            return int(line.split()[1]) * 1024
        import resource
        unit = 1 if sys.platform == "darwin" else 1024
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit

    torch.ones(8, 8) @ torch.ones(8, 8)
    before, modules = peak_bytes(), set(sys.modules)
    dtype = getattr(torch, sys.argv[2])
    model = load.load_model(Path(sys.argv[1]), device=torch.device("cpu"), dtype=dtype)
    total = sum(float(w.view(-1)[:: 1024].sum()) for w in model.parameters())  # Touches each page.
    size = sum(w.nbytes for w in model.parameters())
    imported = len(set(sys.modules) - modules)
    print(before, peak_bytes(), size, imported)
"""


@pytest.fixture(scope="module")
def large_folder(vicuna_folder, tmp_path_factory) -> Path:
    """About 300 MB in float16, in three shards."""
    config = load_config(vicuna_folder)
    language = replace(
        config.language, hidden_size=2048, intermediate_size=5504, num_hidden_layers=3,
        num_attention_heads=16, num_key_value_heads=16, vocab_size=1200,
    )  # fmt: skip
    config = replace(config, language=language)
    shapes = model_shapes(config)

    class Made(Mapping):
        """Tensors that exist only while they are asked for."""

        def __getitem__(self, name):
            return torch.full(shapes[name], 0.01, dtype=torch.float16)

        def __iter__(self):
            return iter(shapes)

        def __len__(self):
            return len(shapes)

    out_dir = tmp_path_factory.mktemp("large") / "model"
    with pytest.MonkeyPatch.context() as patch:
        default = writer.write_weights.__kwdefaults__
        patch.setitem(default, "max_shard_bytes", 120 * 2**20)
        tokenizer = vicuna_folder / "tokenizer.model"
        folder.write_folder(out_dir, config, Made(), tokenizer, dtype="float16")
    return out_dir


@pytest.mark.parametrize("dtype", ["float16", "float32"])
def test_loading_takes_little_more_memory_than_the_weights(large_folder, dtype):
    if not Path("/proc/self/status").exists():
        pytest.importorskip("resource")
    done = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(MEASURE), large_folder, dtype],
        capture_output=True, text=True, check=True, timeout=120,
    )  # fmt: skip
    before, peak, size, imported = map(int, done.stdout.split())
    assert size > (600 if dtype == "float32" else 300) * 10**6
    assert peak - before <= 1.15 * size
    # Torch's compiler, which an initialiser on the meta device asks for, is some 800 modules.
    assert imported < 100


# --- folders that are not right ----------------------------------------------------------------


def rewrite(model_dir, change) -> None:
    path = model_dir / "model.safetensors"
    weights = load_file(path)
    change(weights)
    save_file(weights, path)


def test_a_missing_weight_is_named(model_dir):
    rewrite(model_dir, lambda w: w.pop("vision.projection.bias"))
    with pytest.raises(CheckpointError) as caught:
        load(model_dir)
    assert str(caught.value) == (
        f"{model_dir}: 1 weight missing (vision.projection.bias). Convert the model again."
    )


def test_an_extra_weight_is_named(model_dir):
    rewrite(model_dir, lambda w: w.update(extra=torch.ones(1)))
    with pytest.raises(CheckpointError, match=r"1 weight too many \(extra\)"):
        load(model_dir)


def test_many_names_are_shortened(model_dir):
    rewrite(model_dir, lambda w: [w.pop(name) for name in list(w) if "language" in name])
    with pytest.raises(CheckpointError, match=r"30 weights missing \(language\..* and 26 more\)"):
        load(model_dir)


def test_a_wrong_shape_is_named(model_dir):
    rewrite(model_dir, lambda w: w.update({"vision.projection.bias": torch.ones(65)}))
    with pytest.raises(
        CheckpointError, match=r"vision\.projection\.bias is 65; the model needs 64"
    ):
        load(model_dir)


def test_a_wrong_dtype_is_named(model_dir):
    rewrite(
        model_dir, lambda w: w.update({"vision.projection.bias": torch.ones(64).to(torch.int8)})
    )
    with pytest.raises(CheckpointError, match=r"vision\.projection\.bias of dtype I8; float32"):
        load(model_dir)


def test_dtypes_may_differ(model_dir):
    weight = torch.rand(64)
    rewrite(model_dir, lambda w: w.update({"vision.projection.bias": weight}))
    assert torch.equal(load(model_dir, torch.float32).vision.projection.bias, weight)
    assert load(model_dir).vision.projection.bias.dtype == torch.float16


def test_a_weight_too_large_for_the_asked_dtype_is_refused(model_dir):
    rewrite(model_dir, lambda w: w.update({"vision.projection.bias": torch.full((64,), 7e4)}))
    with pytest.raises(CheckpointError, match="a weight of 70000, more than float16 can"):
        load(model_dir)
    assert float(load(model_dir, torch.bfloat16).vision.projection.bias[0]) == 70144.0


def test_a_missing_shard_is_named(published, tmp_path):
    convert(published, tmp_path / "out", max_shard_bytes=300_000)
    path = sorted((tmp_path / "out").glob("model-00003-of-*"))[0]
    path.unlink()
    with pytest.raises(CheckpointError, match=f"names {path.name}, which is not there"):
        load(tmp_path / "out")


def test_a_weight_in_two_shards(published, tmp_path):
    convert(published, tmp_path / "out", max_shard_bytes=300_000)
    first, second = sorted((tmp_path / "out").glob("model-*"))[:2]
    second.write_bytes(first.read_bytes())
    with pytest.raises(CheckpointError, match=f"stands both in {first} and in {second}"):
        load(tmp_path / "out")


@pytest.mark.parametrize(
    ("damage", "said"),
    [
        (lambda c: c[:-1], "is cut off"),
        (lambda c: c[:100], "is no safetensors file, or cut off"),
        (lambda c: c + b"\0", "is damaged"),
        (lambda c: b"\xff" * 8 + c[8:], "is no safetensors file"),
        (lambda c: c.replace(b'"F16"', b'"F32"', 1), "has a damaged header"),
        (lambda c: c.replace(b'"shape"', b'"sha"  ', 1), "has a damaged header"),
        (lambda _: b"version https://git-lfs.github.com/spec/v1\n", "is a Git LFS pointer"),
        (lambda _: b"", "is empty"),
    ],
)
@pytest.mark.parametrize("dtype", [torch.float16, torch.float32])
def test_a_damaged_weight_file(model_dir, damage, said, dtype):
    path = model_dir / "model.safetensors"
    path.write_bytes(damage(path.read_bytes()))
    with pytest.raises(CheckpointError) as caught:
        load(model_dir, dtype)
    assert str(path) in str(caught.value)
    assert said in str(caught.value)


def test_no_weight_file(model_dir):
    (model_dir / "model.safetensors").unlink()
    with pytest.raises(CheckpointError, match=r"model\.safetensors does not exist"):
        load(model_dir)


WORDS = st.sampled_from(["dtype", "shape", "data_offsets", "a", "__metadata__"])
JSON = st.recursive(
    st.none() | st.integers() | st.text(max_size=5) | st.floats(),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(WORDS, inner, max_size=4),
    max_leaves=12,
).map(lambda value: json.dumps(value).encode())


@settings(max_examples=100, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(header=st.binary(max_size=200) | JSON)
def test_no_header_escapes_as_another_error(tmp_path, header):
    path = tmp_path / "model.safetensors"
    path.write_bytes(len(header).to_bytes(8, "little") + header)
    try:
        tensors = read_header(path)
    except CheckpointError:
        return
    assert all(stored.num_bytes == 0 for stored in tensors.values())


def test_a_mapped_dtype_that_nobody_knows(tmp_path):
    save_file({"a": torch.ones(2).to(torch.float8_e4m3fn)}, tmp_path / "a.safetensors")
    with pytest.raises(CheckpointError, match="a is of dtype F8_E4M3"):
        map_tensors(read_header(tmp_path / "a.safetensors"))


# --- load_config and the manifest --------------------------------------------------------------


def test_folders_that_are_no_model_folders(tmp_path, published):
    with pytest.raises(CheckpointError, match=r"absent does not exist\. .* or the name of a"):
        load_config(tmp_path / "absent")
    with pytest.raises(CheckpointError, match="is a file, not a model folder"):
        load_config(published.vision)
    with pytest.raises(CheckpointError, match=r"has no config\.json.*`minigpt4 convert` first"):
        load_config(tmp_path)
    with pytest.raises(CheckpointError) as caught:
        load_config(published.language_dir)
    assert 'holds a language model alone (model_type "llama"), not MiniGPT-4' in str(caught.value)
    assert "`minigpt4 convert` first" in str(caught.value)


def test_another_kind_of_model(model_dir):
    edit_json(model_dir / "config.json", model_type="llava")
    with pytest.raises(CheckpointError, match=r'holds another model \(model_type "llava"\)'):
        load_config(model_dir)


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"templat": "vicuna"}, "no setting 'templat'. Did you mean 'template'"),
        ({"vision_config": 3}, "VisionConfig wants named settings"),
        ({"text_config": {}}, "LanguageConfig lacks"),
        ({"patches_per_row": "four"}, "patches_per_row is 'four'"),
    ],
)
def test_a_config_that_cannot_work(model_dir, changes, said):
    path = model_dir / "config.json"
    edit_json(path, **changes)
    with pytest.raises(ConfigError) as caught:
        load_config(model_dir)
    assert str(caught.value).startswith(f"{path}: ")
    assert said in str(caught.value)


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"format_version": 2}, "is of format version 2 and this program reads up to 1. Update"),
        ({"weight_format": "int3"}, "in the format 'int3', which this program does not read"),
        ({"dtypes": ["float8"]}, "is not the manifest of a MiniGPT-4 model folder"),
        ({"dtypes": "float16"}, "is not the manifest of a MiniGPT-4 model folder"),
        ({"dtypes": []}, "is not the manifest of a MiniGPT-4 model folder"),
        ({"sources": [{"path": "x"}]}, "is not the manifest of a MiniGPT-4 model folder"),
        ({"made_by": ...}, "is not the manifest of a MiniGPT-4 model folder"),
    ],
)
def test_a_manifest_that_cannot_be_read(model_dir, changes, said):
    edit_json(model_dir / "manifest.json", **changes)
    with pytest.raises(CheckpointError) as caught:
        load(model_dir)
    assert str(model_dir / "manifest.json") in str(caught.value)
    assert said in str(caught.value)


def test_no_manifest(model_dir):
    (model_dir / "manifest.json").unlink()
    with pytest.raises(CheckpointError, match=r"manifest\.json does not exist"):
        load(model_dir)
