"""Tensors out of files that torch.save wrote elsewhere, without running what else is pickled in them."""

import pickle
import zipfile
from collections import OrderedDict
from pathlib import Path
from types import ModuleType
from typing import Any

import torch

_HARMLESS = {
    ("collections", "OrderedDict"): OrderedDict,
    ("torch._utils", "_rebuild_tensor_v2"): torch._utils._rebuild_tensor_v2,
    ("torch._utils", "_rebuild_parameter"): torch._utils._rebuild_parameter,
}

_OLD = pickle.dumps(torch.serialization.MAGIC_NUMBER, protocol=2)


class PickleError(ValueError):
    """A file that cannot be read, or not safely."""


class _NotMade(dict[Any, Any]):
    """Stands for every object whose class or function we do not call: it takes whatever comes and does nothing."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__()

    def __setstate__(self, state: Any) -> None:
        """Forget the state."""


def load_without_code(path: Path) -> tuple[Any, set[str]]:
    """What torch.save wrote, tensors and plain values; and the names of what else the file asked for and did not get.

    torch's own weights_only mode refuses what holds a class derived from dict, as the published files' config is.
    raises: PickleError if the file is damaged or none of torch's
    """
    is_zip = path.is_file() and zipfile.is_zipfile(path)
    if not is_zip and not _is_old(path):
        raise PickleError(f"{path}: wanted a checkpoint of torch.save (a zip file; a pickle before torch 1.6)")
    if is_zip and _is_program(path):
        raise PickleError(f"{path}: is a TorchScript program; wanted a checkpoint of tensors")
    refused: set[str] = set()

    class Unpickler(pickle.Unpickler):
        def find_class(self, module: str, name: str) -> Any:
            if (module, name) not in _HARMLESS:
                refused.add(f"{module}.{name}")
            return _HARMLESS.get((module, name), _NotMade)

    restricted = ModuleType("restricted_pickle")
    restricted.Unpickler = Unpickler  # type: ignore[attr-defined]
    restricted.load = lambda file, **settings: Unpickler(file, **settings).load()  # type: ignore[attr-defined]
    try:
        tree = torch.load(path, map_location="cpu", weights_only=False, mmap=is_zip, pickle_module=restricted)
    except Exception as error:  # a damaged or hostile file may make the unpickler fail in any way
        asked = f"; it asks for {', '.join(sorted(refused))}" if refused else ""
        raise PickleError(f"{path}: cannot be read: {type(error).__name__}: {error}{asked}") from error
    return tree, refused


def _is_old(path: Path) -> bool:
    """Whether torch wrote it before 1.6; the first pickle of such a file is a number."""
    if not path.is_file():
        return False
    with path.open("rb") as file:
        return file.read(len(_OLD)) == _OLD


def _is_program(path: Path) -> bool:
    with zipfile.ZipFile(path) as archive:
        return any(name.endswith("constants.pkl") for name in archive.namelist())
