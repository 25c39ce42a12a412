"""torch files from before the zip format (torch < 1.6): five pickles in a row, then the numbers.

Owns   a pickle reader with a few inert names and few opcodes, and the offsets of the numbers.
Takes  a path; gives its content with tensors that lie in the mapped file.
Never  imports or calls a name in a pickle, and reads into memory only the list of tensors.
"""

import io
import mmap
import pickle
import struct
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO, ClassVar

import torch
from torch import Tensor

from minigpt4_runtime.checkpoint.mapped import map_tensor

# 0x1950a86a20f9469cfc6c as pickle writes it; the first thing in such a file.
_MAGIC = b"\x8a\x0al\xfc\x9cF\xf9 j\xa8P\x19."
_BEFORE_MAGIC = (b"\x80\x02", b"\x80\x03", b"\x80\x04", b"\x80\x05")

_STORAGES = {
    "DoubleStorage": torch.float64, "FloatStorage": torch.float32, "HalfStorage": torch.float16,
    "BFloat16Storage": torch.bfloat16, "LongStorage": torch.int64, "IntStorage": torch.int32,
    "ShortStorage": torch.int16, "CharStorage": torch.int8, "ByteStorage": torch.uint8,
    "BoolStorage": torch.bool,
}  # fmt: skip
# Training programs save these beside tensors. Such an object is never made.
PASSED_OVER = (
    "argparse.Namespace", "numpy.dtype", "numpy.core.multiarray.scalar",
    "numpy._core.multiarray.scalar",
)  # fmt: skip
_ALSO_PASSED_OVER = (
    "_codecs.encode", "builtins.set", "__builtin__.set", "torch.device", "torch.Size",
    *map(str, _STORAGES.values()),
)  # fmt: skip
# All that a checkpoint needs. Others could ask for memory that the file does not have.
_OPCODES = (
    *("PROTO", "FRAME", "STOP", "MARK", "POP", "POP_MARK", "NONE", "NEWTRUE", "NEWFALSE"),
    *("INT", "BININT", "BININT1", "BININT2", "LONG", "LONG1", "LONG4", "FLOAT", "BINFLOAT"),
    *("UNICODE", "BINUNICODE", "SHORT_BINUNICODE", "BINUNICODE8"),
    *("STRING", "BINSTRING", "SHORT_BINSTRING", "BINBYTES", "SHORT_BINBYTES", "BINBYTES8"),
    *("EMPTY_TUPLE", "TUPLE", "TUPLE1", "TUPLE2", "TUPLE3", "EMPTY_SET", "ADDITEMS"),
    *("EMPTY_LIST", "LIST", "APPEND", "APPENDS", "EMPTY_DICT", "DICT", "SETITEM", "SETITEMS"),
    *("GET", "BINGET", "LONG_BINGET", "PUT", "BINPUT", "LONG_BINPUT", "MEMOIZE"),
    *("GLOBAL", "STACK_GLOBAL", "REDUCE", "BUILD", "NEWOBJ", "NEWOBJ_EX", "BINPERSID"),
)
# Of the few values that end with their line.
_LONGEST_LINE = 4096


def is_legacy(head: bytes) -> bool:
    """Whether a file that begins so was written by torch before it wrote zips."""
    return head.startswith(_BEFORE_MAGIC) and _MAGIC in head[:32]


def load_legacy(path: Path) -> object:
    """Read a file's content; its tensors lie in the mapped file until they are dropped.

    Raises:
        pickle.UnpicklingError: it wants more than tensors, or is damaged.
        ValueError: the same; also EOFError, LookupError, TypeError and others of a damaged file.
    """
    with path.open("rb") as plain:
        mapping = mmap.mmap(plain.fileno(), 0, access=mmap.ACCESS_COPY)
        file = _Bounded(plain, len(mapping))
        for _ in ("magic number", "protocol", "platform"):
            _PickleReader(file).load()
        reader = _PickleReader(file)
        content = reader.load()
        starts = {}
        for key in _PickleReader(file).load():
            storage = reader.storages[str(key)]
            (num_items,) = struct.unpack("<q", file.read(8))
            if num_items != storage.num_items:
                raise ValueError("its list of tensors does not fit its numbers")
            starts[storage.key] = file.tell()
            file.skip(num_items * storage.dtype.itemsize)
    views = {
        key: map_tensor(mapping, storage.dtype, storage.num_items, starts[key])
        for key, storage in reader.storages.items()
    }
    return _place_tensors(content, views)


@dataclass(frozen=True)
class _Storage:
    """Where tensors take their numbers from."""

    key: str
    dtype: torch.dtype
    num_items: int


@dataclass(frozen=True)
class _Wanted:
    """A tensor that has not been made yet."""

    storage: _Storage
    offset: int
    shape: tuple[int, ...]
    strides: tuple[int, ...]


class Inert:
    """Stands for an object that is not needed; takes anything and does nothing."""

    __slots__ = ()

    def __new__(cls, *_: object, **__: object) -> "Inert":
        """Take any arguments."""
        return super().__new__(cls)

    def __setstate__(self, _: object) -> None:
        """Take anything that a pickle sets on it."""


class _Named(dict[object, object]):
    """Stands for OrderedDict; attributes set on it are dropped."""

    __slots__ = ()

    def __setstate__(self, _: object) -> None:
        """Take anything that a pickle sets on it."""


class _Rebuild:
    """Stands for torch's functions that make a tensor of a storage, or a parameter of a tensor."""

    __slots__ = ()

    def __call__(self, storage: object, *rest: Any) -> object:
        if not isinstance(storage, _Storage):
            return storage
        offset, shape, strides = rest[:3]
        return _Wanted(storage, int(offset), tuple(map(int, shape)), tuple(map(int, strides)))

    def __setstate__(self, _: object) -> None:
        """Take anything that a pickle sets on it."""


_NAMES: dict[str, object] = {
    **{f"torch.{name}": dtype for name, dtype in _STORAGES.items()},
    **dict.fromkeys((*PASSED_OVER, *_ALSO_PASSED_OVER), Inert),
    "collections.OrderedDict": _Named,
    "torch._utils._rebuild_tensor": _Rebuild(),
    "torch._utils._rebuild_tensor_v2": _Rebuild(),
    "torch._utils._rebuild_parameter": _Rebuild(),
}


class _Bounded:
    """A file that is never asked for more than it has: a damaged length must not take memory."""

    def __init__(self, file: BinaryIO, size: int) -> None:
        self._file, self._size = file, size
        self.tell = file.tell

    def readline(self) -> bytes:
        return self._file.readline(_LONGEST_LINE)

    def read(self, num_bytes: int) -> bytes:
        self._check_rest(num_bytes)
        return self._file.read(num_bytes)

    def skip(self, num_bytes: int) -> None:
        self._check_rest(num_bytes)
        self._file.seek(num_bytes, io.SEEK_CUR)

    def _check_rest(self, num_bytes: int) -> None:
        if not 0 <= num_bytes <= self._size - self._file.tell():
            raise EOFError("it ends too early")


# The private class, whose opcodes are a table. The one in C has a fixed set of opcodes, and the
# largest memo number in a file decides about its memory.
class _PickleReader(pickle._Unpickler):  # noqa: SLF001
    """Python's own pickle reader, with fewer opcodes and names."""

    dispatch: ClassVar = {
        code: run
        for code, run in pickle._Unpickler.dispatch.items()  # noqa: SLF001
        if code in {getattr(pickle, name)[0] for name in _OPCODES}
    }

    def __init__(self, file: _Bounded) -> None:
        super().__init__(file, encoding="utf-8")
        self.storages: dict[str, _Storage] = {}

    def find_class(self, module: str, name: str) -> object:
        full_name = f"{module}.{name}"
        if full_name not in _NAMES:
            raise pickle.UnpicklingError(f"global {full_name}")
        return _NAMES[full_name]

    def persistent_load(self, saved: Any) -> object:
        kind, dtype, key, _device, num_items = saved[:5]
        if kind != "storage" or (len(saved) > 5 and saved[5] is not None):
            raise pickle.UnpicklingError(f"global {kind}")
        if not isinstance(dtype, torch.dtype):
            raise pickle.UnpicklingError("a storage of no known dtype")
        return self.storages.setdefault(str(key), _Storage(str(key), dtype, int(num_items)))


def _place_tensors(content: object, views: dict[str, Tensor]) -> object:
    """Replace each `_Wanted` by its tensor, in mappings within mappings."""
    # Each mapping is visited once, however often it is named.
    seen: dict[int, object] = {}

    def place(value: object) -> object:
        if isinstance(value, _Wanted):
            view = views[value.storage.key]
            return view.as_strided(value.shape, value.strides, value.offset)
        if not isinstance(value, dict):
            return value
        if id(value) not in seen:
            seen[id(value)] = placed = dict[object, object]()
            placed |= {key: place(each) for key, each in value.items()}
        return seen[id(value)]

    return place(content)
