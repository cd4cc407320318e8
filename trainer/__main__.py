"""The command line: `python -m trainer VERB ...`, the same under `deepspeed --module`, `torchrun -m` and alone."""

import argparse
import logging
import os
import sys
import warnings
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from trainer import protocols, stopping
from trainer.scaling import Network, Plan

log = logging.getLogger("trainer")


def main(argv: Sequence[str] | None = None) -> int:
    """Run one verb; 0: done, 1: something broke, 2: the user must change something, 75: stopped, start it again."""
    argv = list(sys.argv[1:] if argv is None else argv)
    if argv[:1] == ["doctor"]:
        from trainer import doctor

        return doctor.main(argv[1:])
    parser = _parser()
    args, overrides = parser.parse_known_args(argv)
    for override in overrides:
        if override.startswith("-") or "=" not in override:
            parser.error(f"unknown argument {override!r}; overrides are written key.sub=value")
    if args.verb == "show" and args.images < 1:
        parser.error(f"--images must be at least 1, got {args.images}")
    if args.verb == "show" and args.nodes is not None and (fault := _plan(args).check()):
        parser.error(fault)
    if args.verb == "slice" and min(args.images, args.multiple) < 1:
        parser.error(f"--images and --multiple must be at least 1, got {args.images} and {args.multiple}")
    if args.verb == "export" and args.size is not None and (args.to == "sslight" or args.size < 1):
        parser.error(f"--size is the pixels of an ONNX file's images, got {args.size} for {args.to}")
    if overrides and args.verb not in ("pretrain", "evaluate", "show", "sweep", "slice"):
        parser.error(f"{args.verb} reads no recipe, so it takes no {overrides[0]!r}")
    _log_to_console()
    return _run(args, overrides)


def _parser() -> argparse.ArgumentParser:
    launched = argparse.ArgumentParser(add_help=False)
    launched.add_argument("--local_rank", "--local-rank", default=argparse.SUPPRESS, help="the launcher sets it")
    parser = argparse.ArgumentParser(
        prog="trainer", description=__doc__, parents=[launched], epilog="Recipe overrides follow as key.sub=value."
    )
    verbs = parser.add_subparsers(dest="verb", required=True)
    pretrain = verbs.add_parser("pretrain", parents=[launched], help="train a network without labels")
    pretrain.add_argument("recipe", type=Path)
    pretrain.add_argument("--deepspeed_config", type=Path, help="such as ds_configs/zero1.json; stage 0 without")
    evaluate = verbs.add_parser("evaluate", parents=[launched], help="measure what a network has learnt")
    evaluate.add_argument(
        "run", type=Path, metavar="RUN_OR_WEIGHTS", help="or a timm name, or a published FILE.pth.tar"
    )
    evaluate.add_argument("--protocol", required=True, choices=protocols.EVALS)
    evaluate.add_argument(
        "--networks", type=lambda names: names.split(","), default=(), metavar="NAME,...",
        help="such as student,untrained; default: all, or the student where the protocol trains",
    )  # fmt: skip
    show = verbs.add_parser("show", help="print what a recipe decides, and draw its views of data.train")
    show.add_argument("recipe", type=Path)
    show.add_argument("--out", type=Path, help="the contact sheet, a PNG (default: RECIPE.views.png)")
    show.add_argument("--images", type=int, default=6, help="images on the contact sheet (default: %(default)s)")
    _add_scaling(show)
    sweep = verbs.add_parser("sweep", help="train and compare the cases of a study, such as those of recipes/sweeps")
    sweep.add_argument("sweep", type=Path)
    sweep.add_argument("--out", type=Path, help="folder for runs, table and plot (default: runs/sweeps/NAME)")
    sweep.add_argument("--launcher", help="starts each run, such as 'deepspeed --num_gpus 8 --module'")
    report = verbs.add_parser("report", help="evaluations of many runs as one table, beside published figures")
    report.add_argument("runs", type=Path, nargs="+", metavar="RUN_OR_WEIGHTS")
    report.add_argument("--out", type=Path, default=Path("report.md"), help="also .csv and .tex (default: %(default)s)")
    imports = verbs.add_parser("import-weights", help="turn a published SSLight checkpoint into weights folders")
    imports.add_argument("source", type=Path, metavar="FILE.pth.tar")
    imports.add_argument("folder", type=Path, help="where to: its student/ and teacher/ load in timm")
    imports.add_argument("--backbone", help="the network's timm name; found by its tensors if it is a published one")
    _add_slice(verbs)
    export = verbs.add_parser("export", help="write a run's weights in another form")
    export.add_argument("source", type=Path, metavar="RUN_OR_WEIGHTS", help="ONNX takes a run's student")
    export.add_argument("file", type=Path)
    export.add_argument(
        "--to", required=True, choices=("sslight", "onnx", "onnx-dynamic"),
        help="sslight: what the published loaders read; onnx: normalised images -> features, batches of any size; "
        "onnx-dynamic: of weights/gated, one image at a time, computing open channels only",
    )  # fmt: skip
    export.add_argument("--size", type=int, help="pixels of an ONNX file's images (default: the weights' own)")
    verbs.add_parser("doctor", help="check this machine, and build what DeepSpeed compiles; it has its own --help")
    return parser


def _add_slice(verbs: "argparse._SubParsersAction[argparse.ArgumentParser]") -> None:
    cut = verbs.add_parser("slice", help="make an ordinary smaller network of a gated run (docs/gating.md)")
    cut.add_argument("run", type=Path)
    cut.add_argument(
        "--keep", required=True, metavar="RULE",
        help="safe: channels that ever open; threshold=0.5: those open for half of the images or more; budget=0.3: the "
        "best for 0.3 of the dense network's multiply-accumulates",
    )  # fmt: skip
    cut.add_argument("--out", type=Path, help="folder (default: among the run's weights, named by the rule)")
    cut.add_argument("--multiple", type=int, default=1, help="of which widths are, such as 8 (default: %(default)s)")
    cut.add_argument("--images", type=int, default=10_000, help="of data.train, unlabelled (default: %(default)s)")
    cut.add_argument(
        "--repair", default="auto", choices=("auto", "always", "never"),
        help="statistics of norms, measured anew on those images; auto: if features then come nearer to hard gates'",
    )  # fmt: skip


def _add_scaling(show: argparse.ArgumentParser) -> None:
    links = Network()
    scaling = show.add_argument_group("on more nodes, on paper (docs/clusters.md)")
    scaling.add_argument("--nodes", type=int, help="print bytes, memory and time for 1, 2, 4 ... nodes")
    scaling.add_argument("--gpus-per-node", type=int, default=8, help="default: %(default)s")
    scaling.add_argument("--weak", action="store_true", help="every node brings a global batch of its own")
    scaling.add_argument("--measured", type=Path, metavar="RUN", help="a run directory, for the time of a step")
    scaling.add_argument("--step-time-s", type=float, help="or that time itself, on one node")
    for name, help in (
        ("gpu-gbps", "Gbit/s of a GPU within a node"),
        ("link-gbps", "Gbit/s of a node, all adapters together"),
        ("gpu-latency-us", "a step of a ring within a node"),
        ("link-latency-us", "a step between nodes"),
    ):
        default = getattr(links, name.replace("-", "_"))
        scaling.add_argument(f"--{name}", type=float, default=default, help=f"{help} (default: %(default)s)")


def _plan(args: argparse.Namespace) -> Plan:
    """The nodes that `show` is asked for."""
    names = ("gpu_gbps", "link_gbps", "gpu_latency_us", "link_latency_us")
    return Plan(
        nodes=args.nodes,
        gpus_per_node=args.gpus_per_node,
        network=Network(**{name: getattr(args, name) for name in names}),
        weak=args.weak,
        step_s=args.step_time_s,
        run=args.measured,
    )


def _log_to_console() -> None:
    """Rank 0 speaks; other ranks only warn, and say who they are."""
    rank = int(os.environ.get("RANK", "0"))
    if log.handlers:
        return
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(logging.Formatter("%(message)s" if rank == 0 else f"[rank {rank}] %(message)s"))
    log.addHandler(handler)
    log.setLevel(logging.INFO if rank == 0 else logging.WARNING)


def _run(args: argparse.Namespace, overrides: list[str]) -> int:
    # These imports take seconds, and --help need not wait for them.
    warnings.filterwarnings("ignore", category=FutureWarning)
    from data_prep.schema import BetonError
    from trainer import published
    from trainer.checkpoint import CheckpointError
    from trainer.data.loader import DataError
    from trainer.engine import DSConfigError
    from trainer.evals.command import evaluate
    from trainer.guards import TrainingError
    from trainer.loop import pretrain
    from trainer.onnx_files import export_onnx
    from trainer.recipe import RecipeError
    from trainer.recipe_file import load_recipe
    from trainer.report import ReportError, report
    from trainer.run_dir import RunDirError
    from trainer.run_state import StateError
    from trainer.show import show
    from trainer.slimming import parse_rule, slice_run
    from trainer.sweep import SweepError, sweep
    from trainer.weights import WeightsError

    try:
        match args.verb:
            case "pretrain":
                if not pretrain(load_recipe(args.recipe, overrides), args.recipe, args.deepspeed_config):
                    return stopping.REQUEUE
            case "evaluate":
                evaluate(published.as_folder(args.run), args.protocol, overrides, args.networks)
            case "report":
                report(args.runs, args.out)
            case "show":
                plan = None if args.nodes is None else _plan(args)
                show(args.recipe, overrides, out=args.out, num_images=args.images, plan=plan)
            case "sweep":
                sweep(args.sweep, overrides, out=args.out, launcher=args.launcher)
            case "import-weights":
                published.import_weights(args.source, args.folder, args.backbone)
            case "slice":
                rule = replace(parse_rule(args.keep), multiple=args.multiple)
                slice_run(args.run, args.out, rule, overrides, num_images=args.images, repair=args.repair)
            case "export" if args.to == "sslight":
                published.export(args.source, args.file)
            case "export":
                export_onnx(args.source, args.file, dynamic=args.to == "onnx-dynamic", size=args.size)
    except (RecipeError, DSConfigError, RunDirError, BetonError, WeightsError, ReportError) as error:
        if os.environ.get("LOCAL_RANK", "0") == "0":  # every rank of the machine came to the same fault
            log.error("%s", error)
        return 2
    except (DataError, CheckpointError, StateError, TrainingError, SweepError) as error:
        log.error("%s", error)
        return 1
    return 0


def command() -> int:
    """`main` as a process of its own, which leaves the process group at its end."""
    stopping.follow_launcher()
    code = main()
    if "torch" in sys.modules:
        from trainer import distributed

        distributed.stop()
    return code


if __name__ == "__main__":
    sys.exit(command())
