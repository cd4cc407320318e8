"""Which samples of a beton a list names, such as the published 1 % and 10 % splits."""

from pathlib import Path

from data_prep.schema import BetonError, NamesError, find_names, open_beton, read_names, sample_names


def read_subset(beton: Path, list_file: Path | None) -> list[int] | None:
    """Sample ids of the images in a list, ascending, each once; None (all of them) without a list.

    list_file: text, one image a line: its name in the sample list, its bare file name, or (all lines) its sample id
    raises: BetonError for a name that is unknown or fits several images, and for an id that is not there
    """
    if list_file is None:
        return None
    try:
        lines = read_names(list_file)
        if lines and all(line.isdecimal() for line in lines):
            return _checked([int(line) for line in lines], open_beton(beton).num_samples)
        return find_names(sample_names(beton), lines)
    except NamesError as error:
        raise BetonError(f"{list_file}, for {beton}: {error}") from None


def _checked(ids: list[int], num_samples: int) -> list[int]:
    beyond = max(ids)
    if beyond >= num_samples:
        raise NamesError(f"asks for sample {beyond}, samples are 0 to {num_samples - 1}")
    return sorted(set(ids))
