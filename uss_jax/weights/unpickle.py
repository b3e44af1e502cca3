"""Reads untrusted PyTorch checkpoints without running any code they name.

A checkpoint is a pickle, and a pickle is a program: it names functions and calls them. Here it can
build tensors and plain containers only. Every other name becomes an inert placeholder and is not
imported; training checkpoints hold many (configurations, loops, schedules).

Memory is bounded too: reading takes at most six times the file's size (the file is mapped; the
arrays take up to four times its size when half precision becomes float32 and tensors share
storage), and half a gigabyte for the objects of its pickle. A pickle is scanned before it is run,
and rejected if it claims more than it holds.
"""

import io
import math
import os
import pathlib
import pickle
import pickletools
import tarfile
import types
import zipfile
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import numpy as np

from uss_jax.errors import UserError

# Keys of the state dict in a checkpoint: Lightning's, PANNs'.
_STATE_DICT_KEYS = ("state_dict", "model")
# Prefixes that module wrappers add to all names: DataParallel's, torch.compile's.
_WRAPPERS = ("module.", "_orig_mod.")

# Limit on pickle instructions, each of which makes an object of at most 250 bytes. A checkpoint has
# about thirty per tensor.
_MOST_INSTRUCTIONS = 2_000_000
# Limit on the bytes of all arrays, as a multiple of the file's size; see above.
_MOST_COPIES = 4
_MOST_AXES = 16


def read_checkpoint(path: str | pathlib.Path) -> dict[str, np.ndarray]:
    """Reads the state dict (torch names and arrays) of a `.pth` or `.ckpt` file.

    The state dict may be under "state_dict" (Lightning) or "model" (PANNs), or be the whole file.
    Half-precision tensors become float32. Prefixes of module wrappers are removed.

    Raises:
      UserError: PyTorch is not installed, or the file is missing, damaged or no such checkpoint.
    """
    try:
        import torch
    except ImportError as error:
        raise UserError(
            "reading a PyTorch checkpoint needs PyTorch: pip install 'uss-jax[torch]'"
        ) from error
    path = pathlib.Path(path)
    content = _load(torch, path)
    held = content
    for key in _STATE_DICT_KEYS:
        if isinstance(content, dict) and isinstance(content.get(key), dict):
            held = content[key]
            break
    tensors = {}
    if isinstance(held, dict):
        tensors = {str(name): t for name, t in held.items() if isinstance(t, torch.Tensor)}
    if not tensors:
        keys = ", ".join(map(str, content)) if isinstance(content, dict) else "not a dictionary"
        raise UserError(
            f'{path} holds no state dict at its top level or under "state_dict" or "model"; '
            f"it holds: {keys or 'nothing'}"
        )
    copied = sum(tensor.numel() * max(tensor.element_size(), 4) for tensor in tensors.values())
    if copied > _MOST_COPIES * path.stat().st_size:
        raise UserError(
            f"{path} holds tensors of {copied:,} bytes, more than {_MOST_COPIES} times its own "
            "size; save it again with torch.save"
        )
    arrays = {name: _to_numpy(torch, tensor) for name, tensor in tensors.items()}
    for wrapper in _WRAPPERS:
        if all(name.startswith(wrapper) for name in arrays):
            arrays = {name.removeprefix(wrapper): array for name, array in arrays.items()}
    return arrays


def _load(torch: types.ModuleType, path: pathlib.Path) -> Any:
    """Returns a file's unpickled content: tensors and containers, placeholders for the rest."""
    if not path.is_file():
        raise UserError(f"{path} is not a file")
    if path.suffix == ".safetensors":
        raise UserError(f"{path} is a safetensors file; give a .pth or .ckpt")
    size = path.stat().st_size
    with path.open("rb") as file:
        is_zip = file.read(4) == b"PK\x03\x04"  # torch.load's own test of the format
    try:
        if not is_zip and tarfile.is_tarfile(path):
            raise UserError(f"{path} is in PyTorch's format from before 2017; save it again")
        if is_zip:
            _check_archive(torch, path, size)
        # mmap leaves the optimiser's moments, half of a training checkpoint, unread.
        return torch.load(
            os.fspath(path),
            map_location="cpu",
            pickle_module=_restricted_pickle(torch, size),
            weights_only=False,
            mmap=is_zip,
        )
    except UserError:
        raise
    except Exception as error:  # a damaged file can raise anything inside torch
        reason = (str(error).splitlines() or [""])[0][:200] or type(error).__name__
        raise UserError(
            f"{path} is not a PyTorch checkpoint or is damaged ({reason}); download it again"
        ) from error


def _check_archive(torch: types.ModuleType, path: pathlib.Path, size: int) -> None:
    """Rejects TorchScript archives and compressed members, which torch.save never writes."""
    # Python's reader comes first because torch's unpacks a member when it opens an archive. Torch's
    # is then checked too, since it might see other members in a crafted archive.
    with zipfile.ZipFile(path) as archive:
        sizes = [member.file_size for member in archive.infolist()]
    if sum(sizes) <= size:
        reader = torch._C.PyTorchFileReader(os.fspath(path))
        names = reader.get_all_records()
        if "constants.pkl" in names:
            # torch.load would pass it to the TorchScript interpreter.
            raise UserError(f"{path} is a TorchScript program; a state dict is needed")
        sizes = [reader.get_record_size(name) for name in names]
    if sum(sizes) > size:
        raise ValueError(f"its members claim {sum(sizes):,} bytes, the file has {size:,}")


def _to_numpy(torch: types.ModuleType, tensor: Any) -> np.ndarray:
    """Copies a tensor out of the mapped file; half precision becomes float32."""
    if tensor.dtype in (torch.float16, torch.bfloat16):
        tensor = tensor.float()
    return tensor.detach().numpy().copy()


class Placeholder:
    """Stands for any object that is not a tensor; accepts everything a pickle does to it."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        pass

    def __new__(cls, *args: Any, **kwargs: Any) -> "Placeholder":
        return object.__new__(cls)

    def __setstate__(self, state: Any) -> None:
        pass

    def __setitem__(self, key: Any, value: Any) -> None:
        pass

    def __call__(self, *args: Any, **kwargs: Any) -> "Placeholder":
        return Placeholder()

    append = extend = add = __setstate__


def _restricted_pickle(torch: types.ModuleType, file_size: int) -> types.SimpleNamespace:
    """Returns a replacement for the pickle module, to be passed to torch.load.

    Its unpickler imports nothing, and allocates no tensor larger than a file of this size can hold.
    """
    entries = 0

    class Mapping(dict):
        """Replaces OrderedDict; limits the entries, which a pickle could copy again and again."""

        __slots__ = ()

        def __init__(self, items: Iterable[Any] = ()):
            nonlocal entries
            entries += len(items)
            if entries > _MOST_INSTRUCTIONS:
                raise ValueError("it repeats its entries too often")
            super().__init__(items)

        def __setstate__(self, state: Any) -> None:
            pass

    def tensor(storage: Any, offset: int, size: Sequence[int], stride: Sequence[int], *_: Any):
        length = storage._untyped_storage.nbytes() // torch._utils._element_size(storage.dtype)
        _check_view(length, offset, size, stride)
        return torch._utils._rebuild_tensor(storage, offset, size, stride)

    known = {
        ("collections", "OrderedDict"): Mapping,
        ("torch._utils", "_rebuild_tensor"): tensor,
        ("torch._utils", "_rebuild_tensor_v2"): tensor,
        ("torch._utils", "_rebuild_parameter"): lambda data, *_hooks: data,
    }

    class Unpickler(pickle.Unpickler):
        def __init__(self, file: Any, **options: Any):
            super().__init__(file, **options)
            self._file = file

        def find_class(self, module: str, name: str) -> Any:
            return known.get((module, name), Placeholder)

        def load(self) -> Any:
            _check_pickle(self._file)
            if storage_of := getattr(self, "persistent_load", None):  # set by torch
                self.persistent_load = _checking_storages(torch, storage_of, file_size)
            return super().load()

    def load(file: Any, **options: Any) -> Any:
        return Unpickler(file, **options).load()

    return types.SimpleNamespace(Unpickler=Unpickler, load=load, __name__="restricted_pickle")


def _check_pickle(file: Any) -> None:
    """Scans a pickle without running it; restores the file's position.

    Raises:
      ValueError: the pickle has too many instructions, or claims more than the file holds: strings
        or frames beyond its end, or memo indexes beyond the number of instructions, for which
        Python would allocate a table.
    """
    begin = file.tell()
    end = file.seek(0, io.SEEK_END)
    file.seek(begin)
    for count, (opcode, argument, _) in enumerate(pickletools.genops(_Bounded(file, end)), 1):
        if count > _MOST_INSTRUCTIONS:
            raise ValueError(f"its pickle has more than {_MOST_INSTRUCTIONS:,} instructions")
        if opcode.name in _PLACES and not 0 <= argument <= count:
            raise ValueError(f"its pickle claims {argument:,} objects after {count:,} instructions")
        if opcode.name == "FRAME" and argument > end - file.tell():
            raise ValueError("its pickle claims a frame beyond its end")
    file.seek(begin)


_LONGEST_LINE = 1 << 16
_PLACES = ("PUT", "BINPUT", "LONG_BINPUT", "GET", "BINGET", "LONG_BINGET")


class _Bounded:
    """A file that limits reads to the bytes left, since Python allocates before it reads."""

    def __init__(self, file: Any, end: int):
        self._file, self._end = file, end

    def tell(self) -> int:
        return self._file.tell()

    def readline(self) -> bytes:
        return self._file.readline(_LONGEST_LINE)

    def read(self, size: int) -> bytes:
        return self._file.read(min(size, self._end - self._file.tell()))


def _checking_storages(
    torch: types.ModuleType, storage_of: Callable[[Any], Any], file_size: int
) -> Callable[[Any], Any]:
    """Wraps torch's lookup of storages by persistent id to limit their total to the file's size."""
    seen: set[Any] = set()
    total = 0

    def checked(identity: Any) -> Any:
        nonlocal total
        if identity[0] == "module":  # torch would look up its source
            return identity[1]
        _, kind, key, _, count, *_ = identity
        if not isinstance(count, int) or count < 0:
            raise ValueError(f"it claims a storage of {count!r} elements")
        size = count * torch._utils._element_size(getattr(kind, "dtype", torch.uint8))
        total += 0 if key in seen else size
        seen.add(key)
        if max(total, size) > file_size:
            raise ValueError(f"it claims storages of {total:,} bytes, the file has {file_size:,}")
        return storage_of(identity)

    return checked


def _check_view(length: int, offset: int, size: Sequence[int], stride: Sequence[int]) -> None:
    """Raises a ValueError if a tensor exceeds its storage, or has more elements than it."""
    numbers = (offset, *size, *stride)
    sound = (
        len(size) == len(stride) <= _MOST_AXES
        and all(type(number) is int and number >= 0 for number in numbers)
        and math.prod(size) <= length
    )
    if sound and math.prod(size):
        sound = offset + sum((n - 1) * s for n, s in zip(size, stride, strict=True)) < length
    if not sound:
        raise ValueError(f"it claims a tensor of shape {tuple(size)[:8]} of {length:,} elements")
