"""Images that a trained expert gets wrong, or should: adversarial ones, and reconstructions of real ones.

    python -m data_prep.hard_negatives data/train.csv --expert runs/a/stage1/clip_l14_a/expert \\
        --method pgd --epsilon 4 --steps 10 --out data/hard_pgd
    python -m data_prep.hard_negatives data/train.csv --method reconstruct \\
        --autoencoder diffusers:stabilityai/sd-vae-ft-mse --out data/hard_vae

The paper (4.6) trains on hard negatives from targeted adversarial attacks, without naming the attacks. Here
an attack (`pgd`, `mi-pgd`) changes an image by at most `--epsilon` in 8-bit steps so that the expert assigns
the other class; the label stays. `reconstruct` passes images, by default the real ones, through an
autoencoder and labels the result AI-generated: the content stays, the traces of the decoder are new.

docs/data.md describes the files and columns. `group` is the original's, or for one without a group the one
that `manifest.split_holdout` assigns, so that both stay on the same side of a hold-out. An image whose longer
side exceeds `--max-side` is reduced first, and the budget applies to the reduced image.

Attack both classes, which is the default, and store negatives like the other training images (see
data_prep.equalize): otherwise the noise or the PNG format gives the class away. The same command continues a
stopped run, batch by batch; finished output is left as it is.
"""

import logging
from argparse import Namespace
from dataclasses import asdict

from data_prep.writing.copies import ImageCopy, file_names
from data_prep.writing.flags import add_flags, copy_parser
from featdistill import command_line
from featdistill.command_line import Parser, UserError, counted, within
from featdistill.inference import flags
from featdistill.records.manifest import read_manifest
from featdistill.records.parts import content_sha256

_log = logging.getLogger(__name__)
ATTACKS = ("pgd", "mi-pgd")
METHODS = (*ATTACKS, "reconstruct")
LABELS = {"real": (0,), "ai": (1,), "both": (0, 1)}
FORMATS = {"png": ".png", "jpeg": ".jpg"}


def build_parser() -> Parser:
    parser = copy_parser("hard_negatives", "Make adversarial images for an expert, or reconstructions.")
    parser.add_argument("--method", required=True, metavar="NAME", help=f"one of {', '.join(METHODS)}")
    parser.add_argument(
        "--expert",
        metavar="DIR",
        help="folder of the expert that is attacked, or that scores; or hub:OWNER/NAME",
    )
    parser.add_argument("--label", choices=LABELS, help="which images (default: both; real for reconstruct)")
    add_flags(parser, "seed")
    attack = parser.add_argument_group("attacks")
    attack.add_argument("--epsilon", type=within(1, 255), default=4, help="budget in 8-bit steps")
    attack.add_argument("--steps", type=within(1), default=10, help="gradient steps")
    attack.add_argument(
        "--step-size",
        type=within(0, kind=float, exclusive=True),
        help="in 8-bit steps (default: 2.5 or, for mi-pgd, 1 x epsilon / steps)",
    )
    attack.add_argument("--momentum", type=within(0, kind=float), default=1.0, help="decay of mi-pgd")
    parser.add_argument_group("reconstructions").add_argument(
        "--autoencoder", metavar="NAME", help="module:function or diffusers:REPO"
    )
    storage = parser.add_argument_group("storage and computing")
    storage.add_argument("--format", choices=FORMATS, default="png", help="of the images")
    storage.add_argument("--quality", type=within(1, 100), default=95, help="of JPEGs")
    storage.add_argument("--max-side", type=within(16), default=1024, help="reduce longer images, in px")
    storage.add_argument("--batch-size", type=within(1), default=8, help="images per batch")
    flags.add_flags(storage, "device")
    return parser


def main(argv: list[str] | None = None) -> int:
    arguments = build_parser().parse_args(argv)
    _check(arguments)
    # Imported late: PyTorch takes seconds to import.

    from data_prep.attacks.adversarial import Attack
    from data_prep.attacks.negatives import Maker, describe, make_batches
    from data_prep.attacks.reconstructions import generator_name, load_autoencoder
    from featdistill.inference.compute import choose_device
    from featdistill.inference.references import located
    from featdistill.models.expert import load_expert, read_card

    device = choose_device(arguments.device)
    folder = located(arguments.expert)[0] if arguments.expert else None
    attack = None
    if arguments.method in ATTACKS:
        settings = ("method", "epsilon", "steps", "step_size", "momentum")
        attack = Attack(**{setting: getattr(arguments, setting) for setting in settings})
    label = arguments.label or ("both" if attack else "real")
    frame = read_manifest(arguments.manifest)
    rows = frame[frame["label"].isin(LABELS[label])].reset_index(drop=True)
    if rows.empty:
        raise UserError(f"{arguments.manifest} has no image with label {label}")
    made_with = {
        "manifest_sha256": content_sha256(arguments.manifest),
        "expert": read_card(folder)["weights_sha256"] if folder else None,
        "attack": asdict(attack) if attack else None,
        "autoencoder": arguments.autoencoder,
        # Sums are rounded differently on another device or in another batch.
        "device": device.type,
        "label": label,
    }
    flags = ("seed", "format", "quality", "max_side", "batch_size")
    made_with |= {flag: getattr(arguments, flag) for flag in flags}
    suffix = FORMATS[arguments.format]
    copy = ImageCopy(arguments.out, "hard_negatives.json", made_with, suffix)
    if (status := copy.finished_status()) is not None:
        return status
    names = file_names(rows["name"], f"_{arguments.method}{suffix}")
    expert = load_expert(folder).to(device).requires_grad_(False) if folder else None
    if expert:
        expert.preprocessing.require_one_size("an attack")
    # The attack works on what the expert sees, which is reduced to the expert's own limit.
    limit = expert.preprocessing.max_side_px if expert else None
    maker = Maker(
        expert=expert,
        attack=attack,
        autoencoder=None if attack else load_autoencoder(arguments.autoencoder, device),
        device=device,
        seed=arguments.seed,
        file_format=arguments.format,
        quality_0_100=arguments.quality,
        max_side_px=min(arguments.max_side, limit or arguments.max_side),
    )
    scores, errors = make_batches(maker, rows, copy, arguments.batch_size)
    good = sorted(scores)
    generator = "" if attack else generator_name(arguments.autoencoder)
    made = describe(rows.iloc[good], [scores[row] for row in good], attack, generator)
    made["name"] = [names[row] for row in good]
    status = copy.finish(made, rows, errors)
    _log.info(f"{arguments.out}: {counted(len(made), 'image')}")
    for label, same_label in made.groupby(rows["label"].iloc[good]) if arguments.expert else ():
        before, after = (same_label[f"score_{when}"].astype(float).mean() for when in ("before", "after"))
        wrong = (same_label["survives"] == "1").mean()
        _log.info(
            f"{len(same_label)} made from label {label}: mean P(AI) {before:.3f} before, {after:.3f} after; "
            f"wrong as stored {wrong:.1%}"
        )
    return status


def _check(arguments: Namespace) -> None:
    command_line.one_of("--method", arguments.method, METHODS)
    if arguments.method == "reconstruct":
        if not arguments.autoencoder:
            raise UserError("--method reconstruct needs --autoencoder module:function or diffusers:REPO")
    elif not arguments.expert:
        raise UserError(f"--method {arguments.method} needs --expert DIR, the expert that is attacked")
    elif arguments.autoencoder:
        raise UserError(f"--autoencoder is for --method reconstruct, not {arguments.method}")


if __name__ == "__main__":
    command_line.run(main)
