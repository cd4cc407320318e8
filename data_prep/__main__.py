"""python -m data_prep convert | verify | info | synth"""

import argparse
import hashlib
import os
import shutil
import signal
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from types import FrameType
from typing import Any, NoReturn

from data_prep.clevr import LABELS
from data_prep.pool import WorkerDiedError, num_cores

FAULT, MISUSE = 1, 2
"""Exit codes: a file that was checked is faulty; a command that could not be carried out."""


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command; returns its exit code."""
    arguments = _parser().parse_args(argv)
    try:
        with _stoppable():
            return int(arguments.run(arguments))
    except (ValueError, WorkerDiedError, OSError) as error:
        print(f"data_prep {arguments.command}: {error}", file=sys.stderr)
        return MISUSE
    except _Stopped as stopped:
        print(f"data_prep {arguments.command}: stopped; nothing was written", file=sys.stderr)
        return 128 + stopped.number


class _Stopped(BaseException):
    """A signal asks this process to end; as an exception, so that every temporary file goes."""

    def __init__(self, number: int) -> None:
        self.number = number


@contextmanager
def _stoppable() -> Iterator[None]:
    def stop(number: int, frame: FrameType | None) -> NoReturn:
        raise _Stopped(number)

    before = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)}
    caught = [number for number, handler in before.items() if handler is not signal.SIG_IGN]  # nohup ignores SIGHUP
    for number in caught:
        signal.signal(number, stop)
    try:
        yield
    finally:
        for number in caught:
            signal.signal(number, before[number])


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser("python -m data_prep", description="Prepare image data sets for training.")
    commands = parser.add_subparsers(dest="command", required=True)
    _add_convert(commands)
    _add_verify(commands)
    info = commands.add_parser("info", help="print what is in a .beton")
    info.add_argument("beton", type=Path)
    info.set_defaults(run=_info)
    _add_synth(commands)
    return parser


def _add_convert(commands: Any) -> None:
    command = commands.add_parser("convert", help="turn a source of images into OUT.beton and its manifest")
    command.add_argument(
        "source",
        type=Path,
        help="folder of class folders or of images; tar archive, WebDataset "
        "shards, parquet, CIFAR-10 or -100, STL-10; or a list of images",
    )
    command.add_argument("out", type=Path, metavar="OUT.beton")
    command.add_argument("--split", help="take this part of the source, such as train")
    command.add_argument("--subset", type=Path, metavar="LIST", help="text file with the names to take, one a line")
    command.add_argument("--allow-missing", action="store_true", help="take what is there of the LIST")
    command.add_argument("--unlabelled", action="store_true", help="take every image without a label")
    command.add_argument("--labels", choices=LABELS, help="of a CLEVR folder: images/, and scenes/ beside it")
    command.add_argument("--max-size", type=int, help="longest side in pixels, longer images are shrunk (default: 500)")
    command.add_argument("--quality", type=int, default=90, help="of the JPEG encoder (default: %(default)s)")
    command.add_argument("--copy-jpeg", action="store_true", help="keep the bytes of files that are sound JPEGs")
    command.add_argument(
        "--on-bad",
        choices=("skip", "fail"),
        default="skip",
        help="what to do with an image that cannot be read (default: skip, and say so)",
    )
    command.add_argument(
        "--page-size",
        type=int,
        default=8,
        metavar="MIB",
        help="of the file, a power of two; no image may be larger (default: %(default)s)",
    )
    command.add_argument("--overwrite", action="store_true", help="replace OUT.beton if it was made differently")
    _add_workers(command)
    command.set_defaults(run=_convert)


def _add_verify(commands: Any) -> None:
    command = commands.add_parser("verify", help="check structure, checksums, labels, and decode the images")
    command.add_argument("beton", type=Path)
    command.add_argument("--every", type=int, default=1, metavar="N", help="decode every N-th image (default: all)")
    _add_workers(command)
    command.set_defaults(run=_verify)


def _add_synth(commands: Any) -> None:
    command = commands.add_parser("synth", help="draw a labelled data set: OUT_DIR/{train,val}/CLASS/*.jpg")
    command.add_argument("out", type=Path, metavar="OUT_DIR")
    command.add_argument("--images-per-class", type=int, default=400)
    command.add_argument("--val-per-class", type=int, default=100)
    command.add_argument("--seed", type=int, default=0)
    command.add_argument(
        "--size",
        type=int,
        nargs=2,
        default=(96, 160),
        metavar=("MIN", "MAX"),
        help="shortest and longest side in pixels (default: 96 160)",
    )
    command.add_argument("--overwrite", action="store_true", help="replace OUT_DIR if synth drew it otherwise")
    _add_workers(command)
    command.set_defaults(run=_synth)


def _add_workers(command: argparse.ArgumentParser) -> None:
    command.add_argument("--workers", type=int, default=num_cores(), help="processes (default: one a core)")


def _convert(arguments: argparse.Namespace) -> int:
    _check_convert(arguments)
    scratch = arguments.out.parent / f".data_prep-{os.getpid()}"
    try:
        return _convert_with(arguments, scratch)
    finally:
        shutil.rmtree(scratch, ignore_errors=True)


def _convert_with(arguments: argparse.Namespace, scratch: Path) -> int:
    from data_prep.convert import convert
    from data_prep.images import Encoding
    from data_prep.names import read_names
    from data_prep.sources import list_source, take_subset

    options: dict[str, Any] = {name: getattr(arguments, name) for name in ("split", "unlabelled", "labels")}
    listing = list_source(arguments.source, scratch=scratch, **options)
    options["subset_sha256"] = None
    if arguments.subset is not None:
        names = read_names(arguments.subset)
        listing = take_subset(listing, names, list_name=arguments.subset.name, allow_missing=arguments.allow_missing)
        options["subset_sha256"] = hashlib.sha256("\n".join(sorted(names)).encode()).hexdigest()
    for note in listing.notes:
        print(f"{listing.name}: {note}", file=sys.stderr)
    max_size = None if arguments.copy_jpeg else arguments.max_size or 500
    encoding = Encoding(max_size, arguments.quality, arguments.copy_jpeg, arguments.page_size << 20)
    done = convert(
        listing,
        arguments.out,
        encoding=encoding,
        on_bad=arguments.on_bad,
        options=options,
        workers=arguments.workers,
        overwrite=arguments.overwrite,
    )
    print(f"{arguments.out}: up to date" if done is None else _summary(arguments.out, *done))
    return 0


def _check_convert(arguments: argparse.Namespace) -> None:
    if arguments.copy_jpeg and arguments.max_size is not None:
        raise ValueError("--copy-jpeg keeps images as they are, --max-size shrinks them; give one of the two")
    if arguments.labels and arguments.unlabelled:
        raise ValueError(f"--labels {arguments.labels} gives labels, --unlabelled takes none; give one of the two")
    if not (2 <= arguments.page_size < 4096 and arguments.page_size & (arguments.page_size - 1) == 0):
        raise ValueError(f"--page-size must be a power of two from 2 to 2048 (FFCV), got {arguments.page_size}")
    _check_workers(arguments.workers)


def _check_workers(workers: int) -> None:
    if workers < 1:
        raise ValueError(f"--workers must be 1 or more, got {workers}")


def _summary(out: Path, manifest: Any, tally: Any) -> str:
    kinds = f" of {len(manifest.classes)} classes" if manifest.classes else " without labels"
    lines = [
        f"{out}: {manifest.num_samples} images{kinds}, {manifest.beton_bytes / 1e6:.1f} MB; "
        f"{manifest.num_reencoded} encoded again, {manifest.num_copied} copied, {manifest.num_left_out} left out, "
        f"{manifest.num_ignored} other files ignored"
    ]
    lines += [f"  left out: {name}: {reason}" for name, reason in tally.left_out[:10]]
    if len(tally.left_out) > 10:
        lines.append(f"  and {len(tally.left_out) - 10} more, all named in {out.name}.left_out.tsv")
    if tally.damaged:
        lines.append(f"  {tally.damaged} images decode, but with warnings of damage: marked in {out.name}.samples.tsv")
    return "\n".join(lines)


def _verify(arguments: argparse.Namespace) -> int:
    from data_prep.schema import BetonError
    from data_prep.verify import verify

    _check_workers(arguments.workers)
    try:
        report = verify(arguments.beton, every=arguments.every, workers=arguments.workers)
    except BetonError as error:
        print(f"data_prep verify: {error}", file=sys.stderr)
        return FAULT
    against = "manifest and checksums agree" if report.info.has_manifest else "no manifest to compare with"
    print(f"{arguments.beton}: sound; {report.info.num_samples} samples, {report.num_decoded} decoded, {against}")
    return 0


def _info(arguments: argparse.Namespace) -> int:
    from data_prep.verify import describe

    rows = describe(arguments.beton)
    width = max(len(name) for name, _ in rows)
    print("\n".join(f"{name:<{width}}  {value}" for name, value in [("beton", str(arguments.beton)), *rows]))
    return 0


def _synth(arguments: argparse.Namespace) -> int:
    from data_prep.synth import Plan, draw_dataset

    _check_workers(arguments.workers)
    plan = Plan(arguments.images_per_class, arguments.val_per_class, arguments.seed, tuple(arguments.size))
    drawn = draw_dataset(arguments.out, plan, workers=arguments.workers, overwrite=arguments.overwrite)
    print(f"{arguments.out}: {f'{drawn} images drawn' if drawn else 'up to date'}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
