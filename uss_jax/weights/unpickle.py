"""Reading PyTorch checkpoints of strangers without running anything they name.

A checkpoint is a pickle, and a pickle is a program: it names functions and calls them. Here it gets
tensors and plain containers only. Every other name becomes an inert placeholder, whatever it is,
without being imported; training checkpoints hold many (configurations, loops, schedules).
"""

import collections
import pathlib
import pickle
import tarfile
import types
from typing import Any

import numpy as np

from uss_jax.errors import UserError

# Where a checkpoint keeps its tensors: Lightning, PANNs.
_STATE_DICT_KEYS = ("state_dict", "model")


def read_checkpoint(path: str | pathlib.Path) -> dict[str, np.ndarray]:
    """The state dict of a `.pth` or `.ckpt`: torch names and arrays.

    Takes a file with the state dict under "state_dict" (Lightning) or "model" (PANNs), or one that
    is a state dict itself. Half-precision tensors become float32.

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
        tensors = {name: t for name, t in held.items() if isinstance(t, torch.Tensor)}
    if not tensors:
        keys = ", ".join(map(str, content)) if isinstance(content, dict) else "no dictionary"
        raise UserError(
            f'{path} holds no state dict, neither itself nor under "state_dict" or "model"; '
            f"it holds: {keys or 'nothing'}"
        )
    return {str(name): _to_numpy(torch, tensor) for name, tensor in tensors.items()}


def _load(torch: types.ModuleType, path: pathlib.Path) -> Any:
    """The unpickled content of a file, with placeholders for all that is not a tensor."""
    if not path.is_file():
        raise UserError(f"{path} is not a file")
    with path.open("rb") as file:
        is_zip = file.read(4) == b"PK\x03\x04"  # as torch.load tells the two formats apart
    if not is_zip and tarfile.is_tarfile(path):
        raise UserError(f"{path} is in PyTorch's format from before 2017; save it again")
    try:
        # torch.load would hand a TorchScript archive on to its interpreter; asked of torch's own
        # reader, because another one might see other members in a crafted archive.
        if is_zip and "constants.pkl" in torch._C.PyTorchFileReader(str(path)).get_all_records():
            raise UserError(f"{path} is a TorchScript program; a state dict is needed")
        # Mapped, so that the optimiser's moments, half of a training checkpoint, stay unread.
        return torch.load(
            str(path),
            map_location="cpu",
            pickle_module=_restricted_pickle(torch),
            weights_only=False,
            mmap=is_zip,
        )
    except UserError:
        raise
    except Exception as error:  # damaged files fail in many ways, all inside the reader
        reason = (str(error).splitlines() or [""])[0] or type(error).__name__
        raise UserError(
            f"{path} is no PyTorch checkpoint or is damaged ({reason}); get it again"
        ) from error


def _to_numpy(torch: types.ModuleType, tensor: Any) -> np.ndarray:
    """A copy that does not depend on the mapped file."""
    if tensor.dtype in (torch.float16, torch.bfloat16):
        tensor = tensor.float()
    return tensor.detach().numpy().copy()


class Placeholder:
    """Stands for any object that is not a tensor; takes whatever a pickle does to it."""

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


def _restricted_pickle(torch: types.ModuleType) -> types.SimpleNamespace:
    """What torch.load wants of a pickle module, with an unpickler that looks up no names."""

    def tensor(storage, offset, size, stride, *_hooks):
        return torch._utils._rebuild_tensor(storage, offset, size, stride)

    known = {
        ("collections", "OrderedDict"): collections.OrderedDict,
        ("torch._utils", "_rebuild_tensor"): tensor,
        ("torch._utils", "_rebuild_tensor_v2"): tensor,
        ("torch._utils", "_rebuild_parameter"): lambda data, *_hooks: data,
    }

    class Unpickler(pickle.Unpickler):
        def find_class(self, module: str, name: str) -> Any:
            return known.get((module, name), Placeholder)

    def load(file: Any, **options: Any) -> Any:
        return Unpickler(file, **options).load()

    return types.SimpleNamespace(Unpickler=Unpickler, load=load, __name__="restricted_pickle")
