"""Which files are images: by their first bytes, and by suffix where those do not tell."""

import os
import re
from collections.abc import Callable
from functools import cache


def _suffixes(names: str) -> tuple[str, ...]:
    return tuple(f".{name}" for name in names.split())


# Suffixes of formats that are decoded; the bytes decide which one it is.
IMAGE_SUFFIXES = _suffixes(
    "jpg jpeg png webp bmp tif tiff gif avif jpe jfif jif jfi pjpeg pjp apng dib avifs heic heif hif"
)
# The formats that Pillow may recognize. It knows more, some of which run other programs (EPS).
FORMATS = ("JPEG", "PNG", "WEBP", "BMP", "TIFF", "GIF", "AVIF")
HEIF = "HEIF"
_HEIF_SUFFIXES = (".heic", ".heif", ".hif")
_SUPPORTED = "JPEG, PNG, WebP, BMP, TIFF, GIF, AVIF and HEIC"
# Camera raw files start like a TIFF that holds a thumbnail of the picture.
RAW_SUFFIXES = _suffixes("3fr arw cr2 cr3 dng erf kdc mrw nef nrw orf pef raf raw rw2 sr2 srw")
_UNSUPPORTED_SUFFIXES = RAW_SUFFIXES + _suffixes(
    "jxl jp2 j2k jpf jpx jxr psd psb ppm pgm pbm pnm tga dds exr hdr ico qoi svg"
)
# Files of other kinds, which a listing does not open: telling by content takes a read of each.
_OTHER_SUFFIXES = frozenset(
    _suffixes(
        "txt caption csv tsv json jsonl ndjson xml yaml yml toml ini cfg md rst html htm css js py sh "
        "log ipynb pdf doc docx xls xlsx npy npz pt pth ckpt pkl safetensors onnx h5 hdf5 mat parquet "
        "arrow tfrecord mp4 mov avi mkv webm mp3 wav flac zip tar gz tgz bz2 tbz2 xz txz zst tzst 7z rar "
        "db sqlite lock sha256 md5"
    )
)
HEAD_BYTES = 64
_STARTS = {
    b"\xff\xd8\xff": "JPEG",
    b"\x89PNG\r\n\x1a\n": "PNG",
    b"GIF87a": "GIF",
    b"GIF89a": "GIF",
    b"II*\0": "TIFF",
    b"MM\0*": "TIFF",
    b"II+\0": "TIFF",
    b"MM\0+": "TIFF",
    b"8BPS": "Photoshop",
    b"\xff\x0a": "JPEG XL",
    b"\0\0\0\x0cJXL \r\n\x87\n": "JPEG XL",
    b"\0\0\0\x0cjP  \r\n\x87\n": "JPEG 2000",
    b"\xff\x4f\xff\x51": "JPEG 2000",
}
_SUFFIXES = {"JPEG": ".jpg", "PNG": ".png", "GIF": ".gif", "TIFF": ".tif", "BMP": ".bmp", "WEBP": ".webp"}
_SUFFIXES |= {"AVIF": ".avif", HEIF: ".heic"}
_BRANDS = re.compile(rb"(?P<avif>avi[fs])|(?P<heif>hei[cmsx]|hev[cmsx]|mif1|msf1)")
# Sizes of a bitmap's second header; `BM` alone could be the start of a text.
_BMP_HEADERS = (12, 40, 52, 56, 64, 108, 124)


def format_of(head: bytes) -> str:
    """Return the format of an image by its first `HEAD_BYTES` bytes, as Pillow calls it; "" if unknown."""
    for start, name in _STARTS.items():
        if head.startswith(start):
            return name
    if head[:4] == b"RIFF" and head[8:12] == b"WEBP":
        return "WEBP"
    if head[:2] == b"BM" and int.from_bytes(head[14:18], "little") in _BMP_HEADERS:
        return "BMP"
    if head[4:8] == b"ftyp":
        # The major brand, then the compatible ones: an AVIF may call itself by the general brand mif1.
        size = min(int.from_bytes(head[:4], "big"), len(head))
        brands = [head[8:12], *(head[at : at + 4] for at in range(16, size, 4))]
        kinds = {match.lastgroup for brand in brands if (match := _BRANDS.fullmatch(brand))}
        return "AVIF" if "avif" in kinds else HEIF if "heif" in kinds else ""
    return ""


def suffix_of(head: bytes) -> str:
    """Return the usual suffix of an image by its first bytes; `.bin` if they do not tell."""
    return _SUFFIXES.get(format_of(head), ".bin")


def refusal(location: str, head: bytes) -> str:
    """Return why an image is not decoded, as far as its name and first bytes tell; "" if it may be."""
    name = format_of(head)
    if location.lower().endswith(RAW_SUFFIXES) and name in ("TIFF", ""):
        return f"a camera's raw file is not supported; convert it to one of {_SUPPORTED}"
    if name == HEIF:
        return "" if has_heif() else "HEIC images need the package pillow-heif; pip install pillow-heif"
    if name and name not in FORMATS:
        return f"{name} is not supported; convert it to one of {_SUPPORTED}"
    return ""


def refusal_of_file(name: str, read_head: Callable[[], bytes | None]) -> str | None:
    """Return why a file that could be an image is not decoded, or ""; None for a file of another kind.

    Args:
        name: its path; the suffix decides if it tells. A folder, which ends in `/`, could hold images.
        read_head: returns the first `HEAD_BYTES` bytes, or None if they cannot be read; only called if they
            decide.
    """
    suffix = os.path.splitext(name)[1].lower()
    if suffix in _OTHER_SUFFIXES:
        return None
    if name.endswith("/") or (suffix in IMAGE_SUFFIXES and suffix not in _HEIF_SUFFIXES):
        return ""
    head = read_head()
    if head is None:
        return ""
    if reason := refusal(name, head):
        return reason
    if suffix in _UNSUPPORTED_SUFFIXES and not format_of(head):
        return f"{suffix} files are not supported; convert it to one of {_SUPPORTED}"
    return "" if suffix in IMAGE_SUFFIXES or format_of(head) else None


def without_extension(name: str) -> str:
    """Return a name without its image extension: `0a1b.jpg` is `0a1b`; `scan.v2` stays as it is."""
    front, extension = os.path.splitext(name)
    return front if extension.lower() in IMAGE_SUFFIXES else name


@cache
def has_heif() -> bool:
    """Tell whether HEIC images can be decoded, and prepare Pillow for them."""
    try:
        import pillow_heif
    except ImportError:
        return False
    pillow_heif.register_heif_opener()
    return True
