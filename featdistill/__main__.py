"""The tools of the package: `python -m featdistill` lists them.

Each imports what it runs only after its arguments are parsed, so that `--help` answers at once.
"""

import logging
import os
import sys

from featdistill import atomic, command_line
from featdistill.bank import embed_flags
from featdistill.cluster import flags as cluster_flags
from featdistill.command_line import Parser, UserError, counted, within
from featdistill.export import flags as export_flags
from featdistill.hub import push_flags
from featdistill.records.flags import add_labels
from featdistill.service import flags as serve_flags

_log = logging.getLogger(__name__)


def backbones(arguments: list[str]) -> None:
    """list the backbones, or describe one"""
    parser = Parser(description="The backbones an expert can be built on; nothing is downloaded.")
    action = parser.add_mutually_exclusive_group(required=True)
    action.add_argument("--list", action="store_true", help="list the backbones that have short names")
    action.add_argument("--show", metavar="NAME", help="describe one, also timm:NAME and open_clip:NAME")
    args = parser.parse_args(arguments)
    from featdistill.models.backbones import BACKBONES, facts_table

    print(facts_table(list(BACKBONES) if args.list else [args.show]))


def calibrate(arguments: list[str]) -> None:
    """fit thresholds and probabilities that turn scores into verdicts with a promise"""
    parser = Parser(
        description="Fit a calibrator: thresholds that keep a promise about real images, and calibrated "
        "probabilities. docs/verdicts.md explains both."
    )
    parser.add_argument(
        "--predictions", nargs="+", default=[], metavar="FILE", help="predictions of labeled images"
    )
    add_labels(parser)
    rate = within(0, 1, float, exclusive=True)
    parser.add_argument(
        "--fpr", type=rate, required=True, metavar="RATE", help="share of real images that may be called AI"
    )
    parser.add_argument(
        "--fnr", type=rate, metavar="RATE", help="share of AI images that may be called real (default: --fpr)"
    )
    parser.add_argument(
        "--by",
        nargs="+",
        default=[],
        metavar="COLUMN",
        help="keep the promise in each group by these columns of the labels, such as is_distorted or source",
    )
    parser.add_argument(
        "--without-labels",
        nargs="+",
        default=[],
        metavar="FILE",
        help="predictions of images of a new place that are taken to be real; they replace the real ones of "
        "--predictions, which may be left out",
    )
    parser.add_argument("--seed", type=within(0, 2**32 - 1), default=0, help="random seed of held-out folds")
    parser.add_argument(
        "--out",
        required=True,
        type=command_line.file_name(".json"),
        metavar="FILE.json",
        help="where to write the calibrator",
    )
    args = parser.parse_args(arguments)
    if not args.predictions and not args.without_labels:
        raise UserError("pass labeled --predictions, or predictions of real images with --without-labels")
    from featdistill.calibration import fit, tables
    from featdistill.calibration.calibrator import FORMAT
    from featdistill.calibration.reading import read_rows
    from featdistill.records.provenance import check_replaceable

    check_replaceable(args.out, FORMAT)
    rows = read_rows(args.predictions, args.labels, args.without_labels, args.by)
    calibrator = fit.fit(rows, args.fpr, args.fnr, args.seed)
    calibrator.save(args.out)
    print(tables.markdown(calibrator), end="")
    print(f"-> {args.out}")


def convert(arguments: list[str]) -> None:
    """turn the authors' released experts into expert folders"""
    parser = Parser(description="Convert the authors' released experts, once, into expert folders.")
    parser.add_argument("folder", help="folder with manifest.json and the files it lists")
    parser.add_argument("--out", required=True, metavar="DIR", help="where to write one folder per expert")
    args = parser.parse_args(arguments)
    from featdistill.models.released import convert

    convert(args.folder, args.out)


def embed(arguments: list[str]) -> int:
    """keep what a frozen backbone returns for the views of images, in a bank"""
    parser = Parser(
        description="Run a frozen backbone once over views of images, and keep what it returns in a bank.",
        epilog="The same command continues a killed run; with torchrun, several processes share the work.",
    )
    embed_flags.add_arguments(parser)
    args = parser.parse_args(arguments)
    embed_flags.check(args)
    from featdistill.bank import embed
    from featdistill.inference.processes import Processes

    settings = embed.settings_of(args)
    return Processes().run(lambda processes: embed.embed(settings, args.manifest, args.out, processes))


def explain(arguments: list[str]) -> None:
    """draw which parts of an image an expert looks at"""
    parser = Parser(description="Draw what an expert sees in an image, and where it looks.")
    parser.add_argument("image", metavar="IMAGE", help="an image file, or archive.zip::member")
    parser.add_argument(
        "--expert",
        required=True,
        metavar="DIR",
        help="folder of the expert, hub:OWNER/NAME or published:NAME",
    )
    _add_picture(parser)
    for flag, choices, purpose in (
        ("--mask", ("texture", "smooth", "random"), "which patches to hide"),
        ("--mask-select", ("top", "sample"), "by the order of texture, or drawn in proportion to it"),
        ("--mask-score", ("differences", "sobel", "variance"), "how texture is measured"),
    ):
        parser.add_argument(flag, choices=choices, default=choices[0], help=purpose)
    parser.add_argument(
        "--mask-ratio", type=within(0, 1, float), default=0.5, help="share of the patches to hide"
    )
    parser.add_argument("--seed", type=within(0), default=0, help="random seed of masks that are drawn")
    args = parser.parse_args(arguments)
    from featdistill.interactive.explain import explain_file
    from featdistill.recipe_groups import Masking

    options = Masking(
        mask=args.mask,
        mask_ratio=args.mask_ratio,
        mask_select=args.mask_select,
        mask_score=args.mask_score,
    )
    print(explain_file(args.image, args.expert, args.out, options, args.seed))


def export(arguments: list[str]) -> None:
    """write experts as one ONNX or OpenVINO graph that needs no PyTorch, and check it"""
    parser = Parser(description="Write experts and their fusion as one graph, if it gives the same scores.")
    export_flags.add_arguments(parser)
    args = parser.parse_args(arguments)
    export_flags.check(args)
    from featdistill.export.run import export

    print(export(args))


def fuse(arguments: list[str]) -> None:
    """fit or measure the weights of an ensemble on labeled predictions"""
    parser = Parser(description="Find the weights of an ensemble's experts on labeled predictions.")
    parser.add_argument(
        "--predictions", nargs="+", required=True, metavar="FILE.csv", help="files written by predict.py"
    )
    add_labels(parser)
    parser.add_argument("--out", required=True, metavar="FILE.json", help="where to write the fusion")
    parser.add_argument(
        "--method", default="logit_mean", choices=("probability_mean", "logit_mean"), help="what is averaged"
    )
    parser.add_argument(
        "--weights-by",
        default="fit",
        choices=("fit", "robust_auc"),
        help="fit: weights and temperatures with the lowest log loss; robust_auc: weights in proportion to "
        "each expert's AUC on the distorted images, without temperatures (default: fit)",
    )
    parser.add_argument("--folds", type=within(3), help="folds that the fit holds out in turn (default: 5)")
    parser.add_argument("--seed", type=within(0, 2**32 - 1), help="random seed of the folds (default: 0)")
    args = parser.parse_args(arguments)
    if args.weights_by == "robust_auc" and (args.folds, args.seed) != (None, None):
        raise UserError("--folds and --seed have an effect with --weights-by fit only")
    folds, seed = args.folds or 5, args.seed or 0
    from featdistill.inference import fusion_fit, fusion_weights

    rows, files = fusion_fit.read_labeled(args.predictions, args.labels)
    if args.weights_by == "robust_auc":
        content = fusion_weights.report(rows, fusion_weights.by_robust_auc(rows, args.method), files)
        atomic.write_json(args.out, content)
        print(fusion_weights.score_table(content))
        count = counted(content["measured_on"]["distorted"], "distorted image")
        print(f"{args.out}: weights by the AUC of {count}")
        return
    fitted = fusion_fit.fit(rows, args.method, folds, seed)
    content = fusion_fit.report(rows, fitted, files, seed)
    atomic.write_json(args.out, content)
    print(fusion_fit.score_table(content))
    gain = content["held_out_gain"]
    print(
        f"gain over {gain['over']} with equal weights, mean of the held-out folds: {gain['auc']:+.5f} AUC, "
        f"standard error {gain['standard_error']:.5f}"
    )
    print(
        f"{args.out}: fitted on {counted(len(rows.label), 'row')}, pull to equal weights {fitted.strength:g}"
    )
    if gain["auc"] <= 0:
        _log.warning(
            "the fitted weights are not better than equal ones on held-out folds; use probability_mean or "
            "logit_mean"
        )


def plot(arguments: list[str]) -> None:
    """plot the training curves of one or several runs"""
    parser = Parser(description="Draw the curves of one or several training runs in one PNG.")
    parser.add_argument("runs", nargs="+", metavar="RUN", help="run folders of train.py and distill.py")
    _add_picture(parser)
    args = parser.parse_args(arguments)
    from featdistill.training import plot_run

    plot_run.draw(plot_run.read_runs(args.runs), args.out)
    print(f"{counted(len(args.runs), 'run')} -> {args.out}")


def _add_picture(parser: Parser) -> None:
    parser.add_argument(
        "--out",
        required=True,
        type=command_line.file_name(".png"),
        metavar="FILE.png",
        help="where to write the picture",
    )


def probe(arguments: list[str]) -> None:
    """fit heads on the features of a bank, and write them as experts"""
    parser = Parser(
        description="Fit heads on the features of banks, score what was held out, and write experts."
    )
    from featdistill.bank import probe_flags

    probe_flags.add_arguments(parser)
    args = parser.parse_args(arguments)
    settings = probe_flags.settings_of(args)
    from featdistill.bank.probe import probe
    from featdistill.bank.probe_files import markdown

    print(markdown(probe(settings, args.out)), end="")


def published(arguments: list[str]) -> None:
    """list published detectors that can be used as experts, or check the file of one"""
    parser = Parser(
        description="Published detectors that can be used as --experts published:NAME; docs/published.md "
        "explains how."
    )
    action = parser.add_mutually_exclusive_group(required=True)
    action.add_argument("--list", action="store_true", help="list them with license, size, input and source")
    action.add_argument(
        "--check",
        nargs="+",
        metavar=("NAME", "FILE"),
        help="check hash, keys, shapes and a known output of a file (default: download it)",
    )
    args = parser.parse_args(arguments)
    from featdistill.published import loading

    if args.list:
        print(loading.detector_table())
        return
    if len(args.check) > 2:
        raise UserError("--check accepts the name of one detector and one file")
    print("\n".join(loading.check(*args.check)))


def push(arguments: list[str]) -> None:
    """upload an expert to the Hugging Face Hub, with a model card"""
    parser = Parser(
        description="Upload an expert to the Hugging Face Hub with a model card of what is known about it; "
        "docs/hub.md explains what goes out."
    )
    push_flags.add_arguments(parser)
    args = parser.parse_args(arguments)
    push_flags.check(args)
    from featdistill.hub.push import push

    print(push(args))


def recipes(arguments: list[str]) -> None:
    """list the recipes with what their training needs, or show one"""
    parser = Parser(description="The recipes, with the challenge's teams first; nothing is downloaded.")
    action = parser.add_mutually_exclusive_group(required=True)
    action.add_argument(
        "--list", action="store_true", help="list all recipes (builds each model without memory; a minute)"
    )
    action.add_argument(
        "--show",
        nargs="+",
        metavar="NAME",
        help="show all settings of a recipe, or of several on top of each other, as YAML for --config",
    )
    action.add_argument(
        "--plan", nargs="+", metavar="NAME", help="show what run_all.sh does with these, one line per expert"
    )
    parser.add_argument(
        "--on-top", nargs="*", default=[], metavar="NAME", help="with --plan, recipes on top of each"
    )
    args = parser.parse_args(arguments)
    if args.on_top and not args.plan:
        raise UserError("--on-top is for --plan; with --show, name all recipes in their order")
    from featdistill.training import recipe_list
    from featdistill.training.recipe import list_recipes

    if args.list:
        print(recipe_list.recipe_table(list_recipes()))
    elif args.show:
        print(recipe_list.show(args.show), end="")
    else:
        print("\n".join(recipe_list.plan(args.plan, args.on_top)))


def ray(arguments: list[str]) -> int:
    """score a manifest in parts on a cluster that has Ray"""
    args = cluster_flags.build_parser().parse_args(arguments)
    from featdistill.cluster import ray_data

    return ray_data.run(args)


def serve(arguments: list[str]) -> None:
    """answer requests with scores and verdicts, over HTTP"""
    parser = Parser(
        description="An HTTP service around an ensemble, reachable from this machine only unless --host says "
        "otherwise; docs/service.md describes it."
    )
    serve_flags.add_arguments(parser)
    args = parser.parse_args(arguments)
    limits, key = serve_flags.check(args)
    # Read once, when PyTorch is loaded: idle threads must not keep the decoders' cores busy.
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    from featdistill.service import server

    server.serve(args, limits, key)


TOOLS = {
    tool.__name__: tool
    for tool in (
        backbones,
        calibrate,
        convert,
        embed,
        explain,
        export,
        fuse,
        plot,
        probe,
        published,
        push,
        ray,
        recipes,
        serve,
    )
}


def main(argv: list[str]) -> int | None:
    if not argv or argv[0] in ("-h", "--help"):
        print("usage: python -m featdistill TOOL [arguments]\n\nTOOL --help shows the arguments of a tool.\n")
        print("\n".join(f"  {name:10} {tool.__doc__}" for name, tool in TOOLS.items()))
        return None
    if argv[0] == "--debug":
        raise UserError("--debug comes after the name of a tool")
    name = command_line.one_of("tool", argv[0], TOOLS)
    sys.argv = [f"python -m featdistill {name}", *argv[1:]]
    return TOOLS[name](argv[1:])


if __name__ == "__main__":
    command_line.run(main)
