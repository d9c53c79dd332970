"""The command line of every distortion library: list its operations, draw a sheet of them, apply some."""

import numpy as np
from PIL import Image, ImageDraw, ImageFont, ImageOps

from featdistill.atomic import replace_file
from featdistill.command_line import Parser, UserError, one_of, within
from featdistill.distortions.operation import LEVELS, MIN_SIDE_PX, Operation
from featdistill.distortions.plan import apply_chain
from featdistill.images.reading import BrokenImage, read_image

CELL_PX = 224
_SMALL_CELL_PX = 160
_TEXT_PX = 16
_MARGIN_PX = 6
_FORMATS = {".png": "PNG", ".jpg": "JPEG", ".jpeg": "JPEG", ".bmp": "BMP", ".tif": "TIFF", ".tiff": "TIFF"}


def main(library: dict[str, Operation], description: str, argv: list[str] | None = None) -> int:
    """Run the command line of a library; `--help` shows the first line of the description."""
    options = _build_parser(description).parse_args(argv)
    if options.list:
        print(listing(library))
    elif options.sheet:
        if not options.out:
            raise UserError("--sheet needs --out PNG")
        _save(draw_sheet(library, _read(options.sheet), options.seed, options.level), options.out)
    else:
        text, source, target = options.apply
        steps = parse_steps(text, library)
        image = _read(source)
        generators = np.random.default_rng(options.seed).spawn(len(steps))
        chain = ((*step, rng) for step, rng in zip(steps, generators, strict=True))
        _save(apply_chain(image, chain), target)
    return 0


def parse_steps(text: str, library: dict[str, Operation]) -> list[tuple[Operation, int]]:
    """Parse `name:level,name:level,...`.

    Raises:
        UserError: a step has another form, its name is unknown, or its level is not 1 to 5.
    """
    steps = []
    for step in text.split(","):
        name, separator, level = (part.strip() for part in step.partition(":"))
        if not separator:
            raise UserError(
                f"'{step.strip()}' is not a step; write name:level,name:level, e.g. 'jpeg:3,gausblur:2'"
            )
        operation = library[one_of("distortion operation", name, library)]
        if level not in map(str, LEVELS):
            raise UserError(f"the level of {name} must be 1 to 5, not '{level}'")
        steps.append((operation, int(level)))
    return steps


def listing(library: dict[str, Operation]) -> str:
    """Return a table of the operations: name, group, scale at level 1 to 5, traits, summary."""
    rows = [("name", "group", "scale at level 1 .. 5", "traits", "")]
    for operation in library.values():
        traits = {
            "random": operation.random,
            "moves or hides patches": not operation.keeps_layout,
            "changes size": not operation.keeps_size,
            "levels not ordered": not operation.monotone,
            f"needs {operation.missing()}": bool(operation.missing()),
        }
        scales = ", ".join(f"{scale:g}" for scale in operation.scales)
        listed_traits = ", ".join(trait for trait, holds in traits.items() if holds)
        summary = (operation.apply.__doc__ or "").split("\n")[0]
        rows.append((operation.name, operation.category, scales, listed_traits, summary))
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines = ("  ".join(map(str.ljust, row, widths)).rstrip() for row in rows)
    return "\n".join(lines)


def draw_sheet(
    library: dict[str, Operation], image: np.ndarray, seed: int, level: int | None = None
) -> np.ndarray:
    """Draw every operation at every level, one operation per row, or all of them at one level.

    The operations are applied to the middle square of the image at the size of a cell, because a resize
    afterwards would hide noise. Those that need something that is not installed are left out.
    """
    side = CELL_PX if level is None else _SMALL_CELL_PX
    cell = np.asarray(ImageOps.fit(Image.fromarray(image), (side, side), Image.Resampling.BICUBIC))
    cells = [] if level is None else [("undistorted", cell)]
    for operation in library.values():
        if operation.missing():
            continue
        if level is None:
            cells.append((operation.name, cell))
        for cell_level in LEVELS if level is None else (level,):
            result = operation(cell, cell_level, np.random.default_rng((seed, cell_level)))
            title = f"level {cell_level}: {operation.scales[cell_level - 1]:g}"
            cells.append((title if level is None else operation.name, result))
    return _in_rows(cells, side, 1 + len(LEVELS))


def _in_rows(cells: list[tuple[str, np.ndarray]], side: int, columns: int) -> np.ndarray:
    """Lay out titled pictures of at most `side` px."""
    font = ImageFont.load_default(_TEXT_PX)
    across, down = side + _MARGIN_PX, side + _TEXT_PX + 2 * _MARGIN_PX
    rows = -(-len(cells) // columns)
    sheet = Image.new("RGB", (_MARGIN_PX + across * columns, _MARGIN_PX + down * rows), "white")
    draw = ImageDraw.Draw(sheet)
    for index, (title, picture) in enumerate(cells):
        row, column = divmod(index, columns)
        left, top = _MARGIN_PX + column * across, _MARGIN_PX + row * down
        draw.text((left, top), title, fill="black", font=font)
        sheet.paste(Image.fromarray(picture), (left, top + _TEXT_PX + _MARGIN_PX))
    return np.asarray(sheet)


def _build_parser(description: str) -> Parser:
    parser = Parser(description=description.split("\n")[0])
    action = parser.add_mutually_exclusive_group(required=True)
    action.add_argument("--list", action="store_true", help="list the operations")
    action.add_argument(
        "--sheet", metavar="IMAGE", help="draw every operation at every level on this image; see --out"
    )
    action.add_argument(
        "--apply",
        nargs=3,
        metavar=("STEPS", "IN", "OUT"),
        help="apply steps such as 'jpeg:3,gausblur:2' (name:level) in order and save the result; "
        "PNG is lossless, JPEG (quality 95) compresses it once more",
    )
    parser.add_argument("--out", metavar="PNG", help="output file of --sheet")
    parser.add_argument("--level", type=int, choices=LEVELS, help="show only this level on the sheet")
    parser.add_argument("--seed", type=within(0), default=0, help="random seed of the random operations")
    return parser


def _read(location: str) -> np.ndarray:
    try:
        image = read_image(location)
    except BrokenImage as error:
        raise UserError(f"{location}: {error}") from error
    if min(image.shape[:2]) < MIN_SIDE_PX:
        height, width = image.shape[:2]
        raise UserError(
            f"{location}: images must be at least {MIN_SIDE_PX} px per side, not {width} x {height}"
        )
    return image


def _save(image: np.ndarray, location: str) -> None:
    suffix = "." + location.rpartition(".")[2].lower()
    if suffix not in _FORMATS:
        raise UserError(f"{location}: cannot save as '{suffix}'; use one of {', '.join(_FORMATS)}")
    try:
        with replace_file(location) as temporary:
            Image.fromarray(image).save(temporary, format=_FORMATS[suffix], quality=95, subsampling=0)
    except OSError as error:
        raise UserError(f"{location}: cannot write it: {error}") from error
