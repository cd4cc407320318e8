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
    if not path.is_file() or not zipfile.is_zipfile(path):
        raise PickleError(f"{path}: wanted a checkpoint as torch.save writes since 1.6 (a zip file)")
    with zipfile.ZipFile(path) as archive:
        if any(name.endswith("constants.pkl") for name in archive.namelist()):
            raise PickleError(f"{path}: is a TorchScript program; wanted a checkpoint of tensors")
    refused: set[str] = set()

    class Unpickler(pickle.Unpickler):
        def find_class(self, module: str, name: str) -> Any:
            if (module, name) not in _HARMLESS:
                refused.add(f"{module}.{name}")
            return _HARMLESS.get((module, name), _NotMade)

    restricted = ModuleType("restricted_pickle")
    restricted.Unpickler = Unpickler  # type: ignore[attr-defined]
    try:
        tree = torch.load(path, map_location="cpu", weights_only=False, mmap=True, pickle_module=restricted)
    except Exception as error:  # a damaged or hostile file may make the unpickler fail in any way
        asked = f"; it asks for {', '.join(sorted(refused))}" if refused else ""
        raise PickleError(f"{path}: cannot be read: {type(error).__name__}: {error}{asked}") from error
    return tree, refused
