"""The same images give the same .beton from a folder, from archives of every kind, and from a list."""

import io
import tarfile
from collections.abc import Callable
from pathlib import Path

import pytest

from data_prep.convert import convert
from data_prep.images import Encoding
from data_prep.sources import SourceError, list_source

SMALL = Encoding(max_size=64)


def pack(path: Path, members: dict[str, bytes], mode: str = "w") -> Path:
    with tarfile.open(path, mode) as archive:
        for name, data in members.items():
            member = tarfile.TarInfo(name)
            member.size = len(data)
            archive.addfile(member, io.BytesIO(data))
    return path


@pytest.fixture
def files(images: Path) -> dict[str, bytes]:
    return {path.relative_to(images).as_posix(): path.read_bytes() for path in sorted(images.glob("*/*.jpg"))}


def class_archives(files: dict[str, bytes], folder: Path) -> dict[str, bytes]:
    """One archive a class, as bytes by name."""
    folder.mkdir()
    archives = {}
    for name in {path.split("/")[0] for path in files}:
        inner = {path.split("/")[1]: data for path, data in files.items() if path.startswith(name + "/")}
        archives[f"{name}.tar"] = pack(folder / f"{name}.tar", inner).read_bytes()
    return archives


def shuffled(files: dict[str, bytes], prefix: str = "") -> dict[str, bytes]:
    return {prefix + name: files[name] for name in sorted(files, key=lambda name: name[::-1])}


Make = Callable[[dict[str, bytes], Path], Path]
SOURCES: dict[str, Make] = {
    "plain": lambda files, at: pack(at / "x.tar", shuffled(files)),
    "gzip": lambda files, at: pack(at / "x.tgz", shuffled(files, "./"), "w:gz"),
    "xz": lambda files, at: pack(at / "x.tar.xz", shuffled(files, "shapes-v2/data/"), "w:xz"),
    "bzip2": lambda files, at: pack(at / "x.tar.bz2", {**shuffled(files, "top/"), "top/README": b"text"}, "w:bz2"),
    "archive of archives": lambda files, at: pack(at / "x.tar", class_archives(files, at / "inner")),
    "folder of archives": lambda files, at: class_archives(files, at / "inner") and at / "inner",
}


@pytest.mark.parametrize("kind", SOURCES)
def test_an_archive_gives_the_same_file_as_its_folder(
    files: dict[str, bytes], converted: Path, tmp_path: Path, kind: str
) -> None:
    source = SOURCES[kind](files, tmp_path)
    listing = list_source(source, scratch=tmp_path / "scratch")
    out = tmp_path / "x.beton"
    convert(listing, out, encoding=SMALL, workers=1)
    assert out.read_bytes() == converted.read_bytes()


def test_a_split_inside_an_archive_is_found_and_compressed_ones_leave_nothing_behind(
    files: dict[str, bytes], converted: Path, tmp_path: Path, run: Callable[..., tuple[int, str, str]]
) -> None:
    members = {**shuffled(files, "v2/train/"), "v2/val/brick_square/9.jpg": b"x", "v2/train.txt": b"x"}
    source, out = pack(tmp_path / "x.tar.gz", members, "w:gz"), tmp_path / "out" / "x.beton"
    assert run("convert", source, out, "--split", "train", "--max-size", 64)[0] == 0
    assert out.read_bytes() == converted.read_bytes()
    assert sorted(path.name for path in out.parent.iterdir()) == ["x.beton", "x.beton.json", "x.beton.samples.tsv"]
    code, _, error = run("convert", source, out, "--split", "test")
    assert (code, "no folder test for --split test; its folders: train, v2, val" in error) == (2, True)
    code, _, error = run("convert", source, out)
    assert (code, "look like splits" in error) == (2, True)


def test_webdataset_shards_take_their_labels_from_cls_files(files: dict[str, bytes], tmp_path: Path) -> None:
    data = list(files.values())
    for shard in range(2):
        members: dict[str, bytes] = {}
        for index in range(4):
            number = shard * 4 + index
            members |= {
                f"{index:03d}.jpg": data[number],
                f"{index:03d}.cls": f"{number}\n".encode(),
                f"{index:03d}.json": b"{}",
            }
        pack(tmp_path / f"shard-{shard}.tar", members)
    listing = list_source(tmp_path)
    assert [(item.name, item.label) for item in listing.items][3:5] == [("shard-0/003.jpg", 3), ("shard-1/000.jpg", 4)]
    assert [listing.reader.read(item) for item in listing.items] == data[:8]
    assert listing.classes == tuple("01234567")
    assert listing.num_ignored == 8


def test_shards_without_cls_files_have_no_labels(tmp_path: Path) -> None:
    pack(tmp_path / "00000.tar", {"a.jpg": b"1", "a.txt": b"a cat", "b.jpg": b"2", "b.txt": b"a dog"})
    listing = list_source(tmp_path / "00000.tar")
    assert ([item.label for item in listing.items], listing.classes) == ([-1, -1], None)


@pytest.mark.parametrize(
    ("members", "message"),
    [
        ({"a.jpg": b"1", "a.cls": b"3", "b.jpg": b"2"}, "1 of 2 images have no .cls"),
        ({"a.jpg": b"1", "a.cls": b"cat"}, "a class number was wanted, found 'cat'"),
        ({"a.jpg": b"1", "a.cls": b"123456789"}, "label 123456789 is no class number"),
        ({"a.txt": b"1"}, "no images found"),
        ({"a.jpg": b"1", "cat/b.jpg": b"1"}, "holds both images"),
    ],
)
def test_archives_that_make_no_sense_are_refused(tmp_path: Path, members: dict[str, bytes], message: str) -> None:
    with pytest.raises(SourceError, match=message):
        list_source(pack(tmp_path / "x.tar", members))


@pytest.mark.parametrize("mode", ["w", "w:gz", "w:xz"])
def test_a_damaged_archive_is_refused(files: dict[str, bytes], tmp_path: Path, mode: str) -> None:
    suffix = mode.removeprefix("w").replace(":", ".")
    path = pack(tmp_path / f"x.tar{suffix}", files, mode)
    path.write_bytes(path.read_bytes()[:5000])
    with pytest.raises(SourceError, match=r"x\.tar"):
        list_source(path, scratch=tmp_path / "scratch")
    path.write_bytes(b"no archive at all " * 100)
    with pytest.raises(SourceError, match="not a sound tar archive"):
        list_source(path, scratch=tmp_path / "scratch")


@pytest.mark.parametrize("line", ["{path} {label}", "{path}\t{label}", "{path}\t{name}"])
def test_a_list_of_images_gives_the_same_file_as_its_folder(
    images: Path, converted: Path, tmp_path: Path, line: str
) -> None:
    (tmp_path / "my images").symlink_to(images)
    lines = [
        line.format(path=f"my images/{item.name}", label=item.label, name=item.name.split("/")[0])
        for item in list_source(images).items
    ]
    (tmp_path / "list.txt").write_text("\n".join(lines))
    listing = list_source(tmp_path / "list.txt")
    convert(listing, tmp_path / "x.beton", encoding=SMALL, workers=1)
    assert (tmp_path / "x.beton").read_bytes() == converted.read_bytes()
    assert listing.classes == (
        tuple(sorted(folder.name for folder in images.iterdir())) if "name" in line else ("0", "1", "2")
    )


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("a.jpg 1\nb.jpg", "1 of its 2 images have no label, such as b.jpg"),
        ("a.jpg\nc.jpg", r"1 of its 2 images do not exist .*\(c.jpg\)"),
        ("", "0 of its 0 images"),
    ],
)
def test_lists_that_make_no_sense_are_refused(tmp_path: Path, text: str, message: str) -> None:
    for name in ("a.jpg", "b.jpg"):
        (tmp_path / name).touch()
    (tmp_path / "list.txt").write_text(text)
    with pytest.raises(SourceError, match=message):
        list_source(tmp_path / "list.txt")


def test_a_list_without_labels_may_hold_names_with_spaces(tmp_path: Path) -> None:
    (tmp_path / "my cat.jpg").touch()
    (tmp_path / "list.txt").write_text("my cat.jpg\n")
    assert [(item.name, item.label) for item in list_source(tmp_path / "list.txt").items] == [("my cat.jpg", -1)]
    with pytest.raises(SourceError, match="--split train chooses a part"):
        list_source(tmp_path / "list.txt", split="train")
