"""Lists of image names, such as the published 1 % and 10 % splits: reading them, and finding what they mean."""

from collections.abc import Sequence
from pathlib import Path, PurePosixPath


class NamesError(ValueError):
    """A list of image names that does not say which images are meant."""


def read_names(path: Path) -> list[str]:
    """The lines of a text file that lists images, one a line; empty lines do not count. raises: NamesError"""
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise NamesError(f"{path}: a text file with one image name a line was wanted ({error})") from error
    return [line.strip() for line in lines if line.strip()]


def find_names(known: Sequence[str], wanted: Sequence[str], *, allow_missing: bool = False) -> list[int]:
    """Where the wanted names stand among the known ones, in the known order, each once.

    wanted: paths as known, or bare file names as in the SimCLR lists
    raises: NamesError for names that fit several images, or (unless allow_missing) none, and where nothing is left
    """
    places: dict[str, list[int]] = {}
    for place, name in enumerate(known):
        for key in {name, PurePosixPath(name).name}:
            places.setdefault(key, []).append(place)
    exact = {name: place for place, name in enumerate(known)}
    chosen: set[int] = set()
    unknown: list[str] = []
    for name in wanted:
        fits = [exact[name]] if name in exact else places.get(name, [])
        if len(fits) > 1:
            several = f"{name} fits {len(fits)} images ({known[fits[0]]}, {known[fits[1]]} ...)"
            raise NamesError(f"{several}; write their paths below the source instead")
        chosen.update(fits)
        unknown += [] if fits else [name]
    if unknown and not allow_missing:
        raise NamesError(
            f"{len(unknown)} of {len(wanted)} names are not there ({some(unknown)}); take them out of the list, give "
            "the data that have them, or allow missing ones"
        )
    if not chosen:
        raise NamesError("names no image that is there; write one name a line")
    return sorted(chosen)


def some(names: Sequence[str], most: int = 5) -> str:
    """The first few of many names, for a message."""
    more = f" and {len(names) - most} more" if len(names) > most else ""
    return (", ".join(names[:most]) or "nothing") + more
