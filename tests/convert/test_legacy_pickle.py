"""torch files from before the zip format: the same tensors, and nothing of them is ever run."""

import io
import os
import pickle
import random
import struct
import sys
from collections import OrderedDict

import pytest
import torch
from torch import nn

from minigpt4_runtime.convert.published import open_tensors
from minigpt4_runtime.convert.recognise import recognise
from minigpt4_runtime.errors import CheckpointError

MAGIC = 0x1950A86A20F9469CFC6C


def save(content, path, **options):
    torch.save(content, path, _use_new_zipfile_serialization=False, **options)
    return path


def fails(path) -> str:
    with pytest.raises(CheckpointError) as caught:
        open_tensors(path)
    assert caught.value.__cause__ is None
    message = str(caught.value)
    assert str(path) in message
    assert "\n" not in message
    return message


DTYPES = [
    torch.float64, torch.float32, torch.float16, torch.bfloat16, torch.int64, torch.int32,
    torch.int16, torch.int8, torch.uint8, torch.bool,
]  # fmt: skip


@pytest.mark.parametrize("seed", range(20))
def test_the_same_tensors_as_torchs_own(seed, tmp_path):
    torch.manual_seed(seed)
    rng = random.Random(seed)
    shared = torch.randn(6, 5)
    tensors = OrderedDict(
        {
            f"weight{number}": (torch.randn([rng.randint(0, 7) for _ in range(rng.randint(0, 4))])
                                * 50).to(rng.choice(DTYPES))
            for number in range(8)
        },
        row=shared[2], column=shared[:, 1], crosswise=shared.T, repeated=shared[:1].expand(4, 5),
        parameter=nn.Parameter(torch.randn(3)),
    )  # fmt: skip
    path = save(tensors, tmp_path / "old.pth", pickle_protocol=rng.choice([2, 3, 4]))
    found, wanted = open_tensors(path), torch.load(path, weights_only=False)
    assert list(found) == list(wanted)
    for name, tensor in found.items():
        assert (tensor.dtype, tensor.shape) == (wanted[name].dtype, wanted[name].shape)
        assert torch.equal(tensor.nan_to_num(), wanted[name].detach().nan_to_num()), name


def test_a_state_dict_with_its_metadata(tmp_path):
    model = nn.Sequential(nn.Linear(3, 4), nn.LayerNorm(4))
    found = open_tensors(save(model.state_dict(), tmp_path / "old.pth"))
    assert all(torch.equal(found[name], tensor) for name, tensor in model.state_dict().items())


def test_it_is_recognised(tmp_path):
    path = save({"llama_proj.weight": torch.ones(4, 3)}, tmp_path / "some.file")
    assert recognise(path).kind == "projection"


def test_the_numbers_are_not_read_before_they_are_used(tmp_path):
    """A tensor lies in the file: what is changed there behind its back is seen."""
    path = save({"weight": torch.zeros(4096 * 1024)}, tmp_path / "old.pth")
    tensor = open_tensors(path)["weight"]
    with path.open("r+b") as file:
        file.seek(-4, os.SEEK_END)
        file.write(struct.pack("<f", 5.0))
    assert float(tensor[-1]) == 5.0


# --- hostile and damaged files ------------------------------------------------------------------


class Runs:
    """What a hostile pickle holds: a call, and where a trace of it would be seen."""

    def __init__(self, function, *arguments):
        self.call = function, arguments

    def __reduce__(self):
        return self.call


@pytest.mark.parametrize(
    ("function", "arguments", "named"),
    [
        (os.system, ("touch it_ran",), "posix.system"),
        (eval, ("open('it_ran', 'w')",), "__builtin__.eval"),
        (getattr, (os, "getcwd"), "__builtin__.getattr"),
        (nn.Linear, (3, 4), "torch.nn.modules.linear.Linear"),
        (torch.load, ("it_ran",), "torch.serialization.load"),
    ],
)
@pytest.mark.parametrize("where", ["beside", "inside"])
def test_what_a_pickle_names_is_never_called(
    function, arguments, named, where, tmp_path, monkeypatch
):
    monkeypatch.chdir(tmp_path)
    if arguments[0] is os:
        arguments = ("text", "upper")
    hostile = Runs(function, *arguments)
    content = {"weight": torch.ones(2), "x": hostile if where == "beside" else {"y": [hostile]}}
    message = fails(save(content, tmp_path / "old.pth"))
    assert f"wants to run code while it is opened ({named})" in message
    assert not (tmp_path / "it_ran").exists()


def test_a_pickled_model_is_not_built(tmp_path):
    message = fails(save(nn.Linear(3, 4), tmp_path / "old.pth"))
    assert "wants to run code while it is opened (torch.nn.modules.linear.Linear)" in message
    assert "save its tensors alone" in message


def old_file(path, *pickles: bytes):
    """A file whose pickles after the head are written by hand."""
    head = io.BytesIO()
    for value in (MAGIC, 1001, {"little_endian": True}):
        pickle.dump(value, head, protocol=2)
    path.write_bytes(head.getvalue() + b"".join(pickles))
    return path


STORAGE = b"((X\x07\x00\x00\x00storagectorch\nFloatStorage\nX\x01\x00\x00\x00aX\x03\x00\x00\x00cpu"
TENSOR = b"ctorch._utils\n_rebuild_tensor_v2\n"


def tensor_of(num_items: bytes, offset: bytes = b"K\x00", size: bytes = b"K\x02") -> bytes:
    """{"w": a tensor of storage "a"}, with these numbers."""
    storage = STORAGE.replace(b"((", b"(") + num_items + b"NtQ"
    tensor = TENSOR + b"(" + storage + offset + size + b"\x85K\x01\x85\x89}tR"
    return b"\x80\x02}X\x01\x00\x00\x00w" + tensor + b"s."


KEYS = pickle.dumps(["a"], protocol=2)
TWO = struct.pack("<q2f", 2, 1.0, 2.0)


def test_a_file_written_by_hand(tmp_path):
    """So that the hostile ones below fail for what is hostile in them."""
    path = old_file(tmp_path / "old.pth", tensor_of(b"K\x02"), KEYS, TWO)
    assert open_tensors(path)["w"].tolist() == [1.0, 2.0]


HUGE = b"\x8a\x08" + struct.pack("<q", 2**60)
BEYOND = [
    (tensor_of(HUGE), KEYS, struct.pack("<q2f", 2**60, 1.0, 2.0)),
    (tensor_of(HUGE), KEYS, TWO),
    (tensor_of(b"K\x02"), KEYS, struct.pack("<q2f", 3, 1.0, 2.0)),
    (tensor_of(b"K\x02", offset=b"K\x01"), KEYS, TWO),
    (tensor_of(b"K\x02", size=HUGE), KEYS, TWO),
    (tensor_of(b"K\x02", offset=b"\x8a\x01\xff"), KEYS, TWO),
    (tensor_of(b"K\x02"), pickle.dumps(["b"], protocol=2), TWO),
    (tensor_of(b"K\x02"), pickle.dumps([], protocol=2), TWO),
    (tensor_of(b"K\x02"), pickle.dumps(7, protocol=2), TWO),
    (tensor_of(b"K\x02"), KEYS, TWO[:-1]),
    (tensor_of(b"K\x02"), KEYS),
]


@pytest.mark.parametrize("pickles", BEYOND)
def test_numbers_beyond_the_file(pickles, tmp_path):
    assert "is damaged (" in fails(old_file(tmp_path / "old.pth", *pickles))


@pytest.mark.parametrize(
    "content",
    [
        # A place in the table of memorised values, 2**31; the table must not be made as long.
        b"\x80\x02}r\xff\xff\xff\x7f" + b"0" * 3 + b".",
        # Bytes, a text and a frame of 2**40.
        b"\x80\x04\x8e" + struct.pack("<Q", 2**40) + b".",
        b"\x80\x04\x8d" + struct.pack("<Q", 2**40) + b".",
        b"\x80\x04\x95" + struct.pack("<Q", 2**40) + b".",
        # Writable bytes of 2**40, an opcode that is not known here.
        b"\x80\x05\x96" + struct.pack("<Q", 2**40) + b".",
        # What is set on a name that is known.
        b"\x80\x02ccollections\nOrderedDict\n}X\x01\x00\x00\x00aK\x01sb.",
        TENSOR + b"(N}X\x08\x00\x00\x00__call__K\x01stb.",
        b"\x80\x02ctorch\nFloatStorage\n)R.",
        b"\x82\x01.",
    ],
)
def test_opcodes_that_ask_for_more_than_there_is(content, tmp_path):
    fails(old_file(tmp_path / "old.pth", content))


def test_what_a_pickle_sets_on_known_names_stays_undone(tmp_path):
    """BUILD sets attributes: on what stands for torch's functions it must set nothing."""
    content = TENSOR + b"}X\x05\x00\x00\x00shapeK\x01sb0" + tensor_of(b"K\x02")[2:]
    path = old_file(tmp_path / "old.pth", b"\x80\x02" + content, KEYS, TWO)
    for _ in range(2):
        assert open_tensors(path)["w"].tolist() == [1.0, 2.0]


def test_many_names_of_one_mapping_are_read_once(tmp_path):
    """Twenty mappings of twenty, each the same: 20**20 if each were gone through."""
    content: dict = {"weight": torch.ones(2)}
    for _ in range(20):
        content = {f"name{number}": content for number in range(20)}
    path = save({"model": {"weight": torch.ones(2)}, "more": content}, tmp_path / "old.pth")
    assert list(open_tensors(path)) == ["weight"]


def test_mappings_within_mappings_without_end(tmp_path):
    depth = sys.getrecursionlimit() * 2
    content = b"\x80\x02" + b"}X\x01\x00\x00\x00a" * depth + b"N" + b"s" * depth + b"."
    fails(old_file(tmp_path / "old.pth", content, pickle.dumps([], protocol=2)))


@pytest.mark.parametrize("seed", range(150))
def test_a_damaged_file_is_opened_or_refused(seed, tmp_path):
    rng = random.Random(seed)
    path = save({"model": {f"w{n}": torch.randn(3, 4) for n in range(4)}}, tmp_path / "old.pth")
    content = bytearray(path.read_bytes())
    for _ in range(rng.randint(1, 4)):
        content[rng.randrange(20, len(content))] = rng.randrange(256)
    if rng.random() < 0.2:
        del content[rng.randrange(20, len(content)) :]
    path.write_bytes(content)
    try:
        for tensor in open_tensors(path).values():
            tensor.float().sum()
    except CheckpointError as error:
        assert str(path) in str(error)  # noqa: PT017
