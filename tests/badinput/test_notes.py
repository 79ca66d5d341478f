"""Good pictures whose notes are bad: EXIF, texts, profiles, thumbnails. They never fail a picture; broken pixels do. Every file is
put together here, from raw bytes."""
import io
import itertools
import struct
import subprocess
import sys
import threading
import warnings
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image as Picture
from PIL import ImageCms

from myspinbot.graph.files import check_file
from myspinbot.core import InputError
from myspinbot.media.video import thumbnail
from myspinbot.media.picture import load_picture
from myspinbot.schema import Port
from myspinbot.executor.step import preview_jpeg

PORT = Port(name="portrait", type="Image", ge=48)
RGB = np.zeros((64, 96, 3), np.uint8)  # four fields, so that each of the eight orientations looks different
RGB[:32, :48], RGB[:32, 48:], RGB[32:, :48], RGB[32:, 48:] = (220, 40, 40), (40, 200, 40), (40, 60, 220), (230, 220, 60)
UPRIGHT = Picture.fromarray(RGB)
LYING = UPRIGHT.transpose(Picture.Transpose.ROTATE_90)  # upright again by orientation 6


def encoded(form: str, im: Picture.Image = LYING, **how: Any) -> bytes:
    im.save(out := io.BytesIO(), form, **(dict(quality=95) if form in ("JPEG", "WEBP", "AVIF", "MPO") else {}) | how)
    return out.getvalue()


Entry = tuple[int, int, int, bytes]  # tag, type, count, value or offset


def exif(*entries: Entry, order: str = ">", more: bytes = b"", link: int = 0, count: int | None = None) -> bytes:
    "EXIF of such entries; what they point to follows behind them."
    head = struct.pack(f"{order}2sHIH", b"MM" if order == ">" else b"II", 42, 8, len(entries) if count is None else count)
    return head + b"".join(struct.pack(f"{order}HHI4s", *o) for o in entries) + struct.pack(f"{order}I", link) + more


def number(n: int, size: int = 2, order: str = ">") -> bytes: return n.to_bytes(size, "big" if order == ">" else "little")


def segment(marker: int, data: bytes, size: int | None = None) -> bytes:
    return bytes([0xff, marker]) + number(len(data) + 2 if size is None else size) + data


def chunk(kind: bytes, data: bytes, crc: int = 0) -> bytes:
    return number(len(data), 4) + kind + data + number(zlib.crc32(kind + data) ^ crc, 4)


def riff(kind: bytes, data: bytes, size: int | None = None) -> bytes:
    return kind + number(len(data) if size is None else size, 4, "<") + data + bytes(len(data) & 1)


def jpeg(*segments: bytes, im: Picture.Image = LYING) -> bytes:
    data = encoded("JPEG", im)
    return data[:2] + b"".join(segments) + data[2:]


def png(*chunks: bytes, im: Picture.Image = LYING, behind: bool = False) -> bytes:
    data = encoded("PNG", im)
    at = len(data) - 12 if behind else 33  # before the end, or behind the header
    return data[:at] + b"".join(chunks) + data[at:]


def webp(*chunks: bytes, flags: int = 0x08, im: Picture.Image = LYING) -> bytes:
    pixels, size = encoded("WEBP", im, lossless=True)[12:], im.size
    body = riff(b"VP8X", bytes([flags, 0, 0, 0]) + number(size[0] - 1, 3, "<") + number(size[1] - 1, 3, "<")) + pixels
    return riff(b"RIFF", b"WEBP" + body + b"".join(chunks))


def tiff(*entries: Entry, im: Picture.Image = LYING, more: bytes = b"", link: int = 0, order: str = "<") -> bytes:
    "An uncompressed TIFF of one strip, behind its directory."
    w, h = im.size
    long = lambda n: struct.pack(f"{order}I", n)
    short = lambda n: struct.pack(f"{order}HH", n, 0)
    table = [(256, 4, 1, long(w)), (257, 4, 1, long(h)), (258, 3, 1, short(8)), (259, 3, 1, short(1)), (262, 3, 1, short(2)),
             (273, 4, 1, b"\0\0\0\0"), (277, 3, 1, short(3)), (278, 4, 1, long(h)), (279, 4, 1, long(3 * w * h)), *entries]
    at = 14 + 12 * len(table)
    table = sorted((t, k, n, long(at) if t == 273 else v) for t, k, n, v in table)
    return exif(*table, order=order, link=link, more=im.tobytes() + more)


def avif(block: bytes) -> bytes:
    "An AVIF with such an EXIF block; what turns an AVIF stands elsewhere, so the picture is not LYING."
    held = exif((0x010f, 2, 4, b"abc\0"), more=b"\xa5" * len(block))
    data = encoded("AVIF", UPRIGHT, exif=b"Exif\0\0" + held)
    assert held in data
    return data.replace(held, block.ljust(len(held), b"\0"))


BEHIND = number(14 + 12 * 10 + 3 * 64 * 96, 4, "<")  # where the pixels of a TIFF with one more entry end
HOLDERS: dict[str, Callable[[bytes], bytes]] = {  # files that hold an EXIF block
    "JPEG": lambda e: jpeg(segment(0xe1, b"Exif\0\0" + e)),
    "PNG": lambda e: png(chunk(b"eXIf", e)),
    "PNG, behind the pixels": lambda e: png(chunk(b"eXIf", e), behind=True),
    "PNG of ImageMagick": lambda e: png(chunk(b"zTXt", b"Raw profile type exif\0\0" + zlib.compress(
        b"\nexif\n%8d\n" % (len(e) + 6) + (b"Exif\0\0" + e).hex().encode()))),
    "WebP": lambda e: webp(riff(b"EXIF", e)),
    "WebP, with a prefix": lambda e: webp(riff(b"EXIF", b"Exif\0\0" + e)),
}


def close(got: np.ndarray, want: np.ndarray = RGB) -> bool:
    return got.shape == want.shape and np.abs(got.astype(int) - want).mean() < 8


def used(data: bytes, folder: Path, want: np.ndarray = RGB) -> str:
    "What is wrong with how a picture is read: at submission, in a step, in a preview and in a thumbnail."
    (path := folder / "me.picture").write_bytes(data)
    try:
        check_file("portrait", str(path), PORT)
        if not close(load_picture(path), want): return "pixels"
        if not close(load_picture(data), want): return "pixels from memory"
        for small in (preview_jpeg(path), thumbnail(path)):
            if not close(np.asarray(Picture.open(io.BytesIO(small))), want): return "small picture"
    except Exception as e: return f"{type(e).__name__}: {e}"
    return ""


# --- EXIF

ORIENTED = (0x0112, 3, 1, b"\0\6\0\0")
TAGS = {"resolution": 0x011a, "y resolution": 0x011b, "unit": 0x0128, "software": 0x0131, "exif": 0x8769, "gps": 0x8825,
        "maker": 0x010f, "interop": 0xa005, "thumbnail": 0x0201, "unknown": 0xeeee}
VALUES = (b"\0\0\0\0", b"\xff\xff\xff\xff", b"\0\0\0\x08", b"abc\0")


@pytest.mark.parametrize("holder", HOLDERS)
@pytest.mark.parametrize("tag", TAGS)
def test_no_value_of_an_exif_tag_fails_a_picture(tag: str, holder: str, tmp_path: Path) -> None:
    (path := tmp_path / "me").touch()
    failed = {}
    for kind, many, value in itertools.product((*range(14), 99), (0, 1, 2, 0xffffffff), VALUES):
        entries = sorted([(TAGS[tag], kind, many, value), (0x0128, 3, 1, b"\0\3\0\0"), ORIENTED])
        path.write_bytes(HOLDERS[holder](exif(*entries)))
        try:
            check_file("portrait", str(path), PORT)
            if not close(load_picture(path)): failed[kind, many, value] = "pixels"
        except Exception as e: failed[kind, many, value] = repr(e)
    assert not failed, (len(failed), next(iter(failed.items())))


@pytest.mark.parametrize("form", ["-1/0", "1/0", "0/0"])
@pytest.mark.parametrize("holder", HOLDERS)
def test_rationals_without_a_denominator_fail_no_picture(form: str, holder: str, tmp_path: Path) -> None:
    a, b = map(int, form.split("/"))
    for kind, order in itertools.product((5, 10), "><"):
        if a < 0 and kind == 5: continue
        offset = number(8 + 2 + 3 * 12 + 4, 4, order)
        block = exif((0x0112, 3, 1, number(6, 2, order)), (0x011a, kind, 1, offset), (0x011b, kind, 1, offset), order=order,
                     more=struct.pack(f"{order}ii", a, b))
        assert used(HOLDERS[holder](block), tmp_path) == ""


TURNS: dict[str, tuple[tuple[int, int, bytes], bool]] = {  # type, count and value of the orientation; does it count?
    "short": ((3, 1, b"\0\6\0\0"), True), "long": ((4, 1, b"\0\0\0\6"), True), "byte": ((1, 1, b"\6\0\0\0"), True),
    "signed": ((8, 1, b"\0\6\0\0"), True), "undefined": ((7, 1, b"\6\0\0\0"), True),
    "float": ((11, 1, struct.pack(">f", 6)), True),
    "text": ((2, 2, b"6\0\0\0"), True), "two": ((3, 2, b"\0\6\0\6"), True), "rational": ((5, 1, b"\0\0\0\x1a"), True),
    "zero": ((3, 1, b"\0\0\0\0"), False), "nine": ((3, 1, b"\0\x09\0\0"), False), "65535": ((3, 1, b"\xff\xff\0\0"), False),
    "a word": ((2, 4, b"left"), False), "NaN": ((11, 1, b"\x7f\xc0\0\0"), False), "infinite": ((11, 1, b"\x7f\x80\0\0"), False),
    "6.5": ((11, 1, struct.pack(">f", 6.5)), False), "no such type": ((99, 1, b"\0\6\0\0"), False),
    "minus one": ((8, 1, b"\xff\xff\0\0"), False), "outside": ((5, 1, b"\xff\xff\xff\xff"), False),
}


@pytest.mark.parametrize("holder", HOLDERS)
@pytest.mark.parametrize("turn", TURNS)
def test_the_orientation_counts_if_it_is_one_of_eight(turn: str, holder: str, tmp_path: Path) -> None:
    entry, counts = TURNS[turn]
    data = HOLDERS[holder](exif((0x0112, *entry), more=struct.pack(">II", 12, 2)))
    assert used(data, tmp_path, RGB if counts else np.asarray(LYING)) == ""


@pytest.mark.parametrize("form", ["JPEG", "PNG", "WEBP", "TIFF", "AVIF"])
@pytest.mark.parametrize("turn", range(1, 9))
def test_each_of_the_eight_orientations_is_upright(turn: int, form: str, tmp_path: Path) -> None:
    back = {2: "FLIP_LEFT_RIGHT", 3: "ROTATE_180", 4: "FLIP_TOP_BOTTOM", 5: "TRANSPOSE", 6: "ROTATE_90", 7: "TRANSVERSE",
            8: "ROTATE_270"}
    lying = UPRIGHT.transpose(Picture.Transpose[back[turn]]) if turn > 1 else UPRIGHT
    notes = Picture.Exif()
    notes[0x0112] = turn
    data = encoded(form, lying, exif=notes)
    assert used(data, tmp_path) == ""
    given = Picture.open(io.BytesIO(data))  # a Pillow image that a step opened itself
    assert close(load_picture(given)) and close(np.asarray(Picture.open(io.BytesIO(preview_jpeg(given)))))


BLOCKS: dict[str, tuple[bytes, bool]] = {  # EXIF blocks, and whether their orientation can be known
    "a chain without an end": (exif(ORIENTED, link=8), True),
    "a directory in itself": (exif(ORIENTED, (0x8769, 4, 1, number(8, 4)), (0x8825, 4, 1, number(8, 4))), True),
    "65535 entries": (exif(ORIENTED, count=65535), True),
    "no entries": (exif(ORIENTED, count=0), False),
    "cut off in its table": (exif(ORIENTED)[:15], False),
    "cut off behind its header": (exif()[:8], False),
    "a directory outside": (b"MM\0*\xff\xff\xff\xf0", False),
    "neither order": (b"XX" + exif(ORIENTED)[2:], False),
    "noise": (bytes(range(256)), False), "one byte": (b"M", False), "nothing": (b"", False),
    "the other order": (exif((0x0112, 3, 1, b"\6\0\0\0"), order="<"), True),
    "twice": (b"Exif\0\0" + exif(ORIENTED), True),
    "a maker outside before it": (exif((0x010f, 2, 400, b"\0\0\xff\0"), ORIENTED), True),
    "a maker of 4 GB before it": (exif((0x010f, 2, 0xffffffff, b"\0\0\0\x08"), ORIENTED), True),
    "a broken one before it": (exif((0x0112, 99, 1, b"\0\3\0\0"), ORIENTED), True),
}


@pytest.mark.parametrize("holder", HOLDERS)
@pytest.mark.parametrize("block", BLOCKS)
def test_a_broken_exif_block_fails_no_picture(block: str, holder: str, tmp_path: Path) -> None:
    data, known = BLOCKS[block]
    assert used(HOLDERS[holder](data), tmp_path, RGB if known else np.asarray(LYING)) == ""


XMP = b'<x:xmpmeta xmlns:x="adobe:ns:meta/"><rdf:Description tiff:Orientation="6"/></x:xmpmeta>'
XMPS: dict[str, Callable[[bytes], bytes]] = {
    "JPEG": lambda x: jpeg(segment(0xe1, b"http://ns.adobe.com/xap/1.0/\0" + x)),
    "PNG": lambda x: png(chunk(b"iTXt", b"XML:com.adobe.xmp\0\0\0\0\0" + x)),
    "packed PNG": lambda x: png(chunk(b"iTXt", b"XML:com.adobe.xmp\0\1\0\0\0" + zlib.compress(x))),
    "WebP": lambda x: webp(riff(b"XMP ", x), flags=4),
    "TIFF": lambda x: tiff((700, 1, len(x), BEHIND), more=x),
}


@pytest.mark.parametrize("form", XMPS)
def test_the_orientation_may_stand_in_xmp(form: str, tmp_path: Path) -> None:
    assert used(XMPS[form](XMP), tmp_path) == ""
    assert used(XMPS[form](b"<tiff:Orientation>6</tiff:Orientation>"), tmp_path) == ""
    for bad in (XMP.replace(b"6", b"9"), XMP.replace(b"6", b"six"), b"\xff\xfe\0<", bytes(9), XMP[:60]):
        assert used(XMPS[form](bad), tmp_path, np.asarray(LYING)) == ""


@pytest.mark.parametrize("first", [b"", b"hello", b"MM", exif(), exif((0x0112, 3, 1, b"\0\x09\0\0"))])
def test_the_first_block_with_an_orientation_counts(first: bytes, tmp_path: Path) -> None:
    blocks = [segment(0xe1, b"Exif\0\0" + e) for e in (first, exif(ORIENTED), exif((0x0112, 3, 1, b"\0\3\0\0")))]
    assert used(jpeg(*blocks), tmp_path) == ""


def test_exif_goes_before_xmp(tmp_path: Path) -> None:
    both = segment(0xe1, b"Exif\0\0" + exif((0x0112, 3, 1, b"\0\1\0\0"))), segment(0xe1, b"http://ns.adobe.com/xap/1.0/\0" + XMP)
    assert used(jpeg(*both), tmp_path, np.asarray(LYING)) == ""


# --- PNG

def text(size: int) -> bytes: return zlib.compress(b"x" * size, 9)


SRGB = ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes()
PNGS: dict[str, Callable[[], bytes]] = {
    "iTXt of 2 MB": lambda: png(chunk(b"iTXt", b"Comment\0\0\0\0\0" + b"x" * 2_000_000)),
    "packed iTXt of 2 MB": lambda: png(chunk(b"iTXt", b"Comment\0\1\0\0\0" + text(2_000_000))),
    "packed XMP of 20 MB": lambda: png(chunk(b"iTXt", b"XML:com.adobe.xmp\0\1\0\0\0" + text(20_000_000))),
    "zTXt of 20 MB": lambda: png(chunk(b"zTXt", b"Comment\0\0" + text(20_000_000)), behind=True),
    "many texts of 1 MB": lambda: png(*[chunk(b"zTXt", b"c%d\0\0" % i + text(1_000_000)) for i in range(80)]),
    "tEXt of 70 MB": lambda: png(chunk(b"tEXt", b"Comment\0" + b"x" * 70_000_000)),
    "profile of 2 MB": lambda: png(chunk(b"iCCP", b"p\0\0" + text(2_000_000))),
    "profile of 50 MB": lambda: png(chunk(b"iCCP", b"p\0\0" + text(50_000_000))),
    "profile packed another way": lambda: png(chunk(b"iCCP", b"p\0\7" + text(9))),
    "profile of noise": lambda: png(chunk(b"iCCP", b"p\0\0" + bytes(range(99)))),
    "profile without a name": lambda: png(chunk(b"iCCP", b"")),
    "profile without an end": lambda: png(chunk(b"iCCP", b"p\0\0" + zlib.compress(SRGB)[:-9])),
    "zTXt packed another way": lambda: png(chunk(b"zTXt", b"Comment\0\7abc")),
    "zTXt without a key": lambda: png(chunk(b"zTXt", b"")),
    "iTXt that is cut off": lambda: png(chunk(b"iTXt", b"XML:com.adobe.xmp\0\1")),
    "tEXt in another alphabet": lambda: png(chunk(b"tEXt", "Ключ\0значение".encode())),
    "hex that is none": lambda: png(chunk(b"tEXt", b"Raw profile type exif\0\nexif\n  4\nzz")),
    "stray bytes behind the end": lambda: png() + b"MPEG" * 1000,
    "no end": lambda: png()[:-12],
    "half an end": lambda: png()[:-5],
    "a private chunk": lambda: png(chunk(b"prVt", bytes(99))),
    "texts between the pixels": lambda: between(chunk(b"tEXt", b"Comment\0hello")),
    "an animation of no frames": lambda: png(chunk(b"acTL", bytes(8))),
    "an animation that is cut off": lambda: png(chunk(b"acTL", b"\0"), chunk(b"fcTL", b"\0")),
    "frames out of order": lambda: png(chunk(b"acTL", number(2, 4) + bytes(4)), chunk(b"fcTL", number(7, 4) + bytes(22))),
}
PNGS |= {f"short {k.decode()}": lambda k=k: png(chunk(k, b"\0"))
         for k in (b"gAMA", b"cHRM", b"sRGB", b"pHYs", b"tRNS", b"bKGD", b"eXIf")}
PNGS |= {f"wrong checksum in {k.decode()}": lambda k=k, d=d: png(chunk(k, d, crc=1)) for k, d in {
    b"tEXt": b"Comment\0hello", b"zTXt": b"Comment\0\0" + text(9), b"iTXt": b"Comment\0\0\0\0\0hello", b"tIME": bytes(7),
    b"pHYs": bytes(9),
    b"gAMA": bytes(4), b"iCCP": b"p\0\0" + zlib.compress(SRGB), b"eXIf": exif((0x0112, 3, 1, b"\0\1\0\0")), b"tRNS": bytes(6),
    b"sRGB": b"\0", b"cHRM": bytes(32), b"prVt": b"hello", b"acTL": bytes(8), b"PLTE": bytes(6)}.items()}
PNGS |= {f"wrong checksum in {k.decode()} behind the pixels": lambda k=k: png(chunk(k, b"Comment\0hello", crc=1), behind=True)
         for k in (b"tEXt", b"zTXt", b"iTXt", b"tIME")}


def between(data: bytes) -> bytes:
    "A PNG whose pixels are in two chunks, with something between them."
    whole = encoded("PNG", LYING)
    at = whole.index(b"IDAT") - 4
    size = int.from_bytes(whole[at:at + 4])
    pixels = whole[at + 8:at + 8 + size]
    return whole[:at] + chunk(b"IDAT", pixels[:40]) + data + chunk(b"IDAT", pixels[40:]) + whole[-12:]


@pytest.mark.parametrize("case", PNGS)
def test_no_note_fails_a_png(case: str, tmp_path: Path) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # what Pillow warns of would reach the user's notebook
        assert used(PNGS[case](), tmp_path, np.asarray(LYING)) == ""


def test_a_large_sound_profile_counts(tmp_path: Path) -> None:
    "Three megabytes behind the tables of a profile that swaps red and blue."
    swapped = swapping_profile()
    padded = number(len(swapped) + 3_000_000, 4) + swapped[4:] + bytes(3_000_000)
    for profile in (swapped, padded):
        assert used(png(chunk(b"iCCP", b"p\0\0" + zlib.compress(profile))), tmp_path, np.asarray(LYING)[..., ::-1]) == ""
        pieces = [profile[i:i + 60_000] for i in range(0, len(profile), 60_000)]
        parts = [segment(0xe2, b"ICC_PROFILE\0" + bytes([i, len(pieces)]) + p) for i, p in enumerate(pieces, 1)]
        assert used(jpeg(*reversed(parts)), tmp_path, np.asarray(LYING)[..., ::-1]) == ""
        assert used(webp(riff(b"ICCP", profile), flags=0x20), tmp_path, np.asarray(LYING)[..., ::-1]) == ""
        assert used(encoded("TIFF", icc_profile=profile), tmp_path, np.asarray(LYING)[..., ::-1]) == ""
    assert used(jpeg(*parts[1:]), tmp_path, np.asarray(LYING)) == "", "a profile that misses a piece is none"


def swapping_profile() -> bytes:
    "sRGB whose red and blue are exchanged: their names in the table of tags."
    b, names = bytearray(SRGB), {b"rXYZ": b"bXYZ", b"bXYZ": b"rXYZ"}
    for at in range(132, 132 + 12 * int.from_bytes(SRGB[128:132]), 12): b[at:at + 4] = names.get(SRGB[at:at + 4], SRGB[at:at + 4])
    return bytes(b)


def profile(space: bytes) -> bytes: return SRGB[:16] + space + SRGB[20:]


PROFILES = {"for CMYK": profile(b"CMYK"), "for grey": profile(b"GRAY"), "of nothing": profile(b"    "),
            "of noise": bytes(range(200)), "half": SRGB[:200], "head": SRGB[:128], "one byte": b"x",
            "a table of 4 GB": SRGB[:128] + b"\xff\xff\xff\xff" + SRGB[132:]}


@pytest.mark.parametrize("name", PROFILES)
def test_a_profile_that_does_not_fit_fails_no_picture(name: str, tmp_path: Path) -> None:
    icc = PROFILES[name]
    for data in (png(chunk(b"iCCP", b"p\0\0" + zlib.compress(icc))), jpeg(segment(0xe2, b"ICC_PROFILE\0\1\1" + icc)),
                 webp(riff(b"ICCP", icc), flags=0x20), tiff((34675, 7, len(icc), BEHIND), more=icc)):
        assert used(data, tmp_path, np.asarray(LYING)) == ""
    four = encoded("JPEG", LYING.convert("CMYK"))
    assert used(four[:2] + segment(0xe2, b"ICC_PROFILE\0\1\1" + icc) + four[2:], tmp_path, np.asarray(LYING)) == ""


def test_a_wrong_checksum_of_the_transparency_drops_it(tmp_path: Path) -> None:
    transparent = chunk(b"tRNS", struct.pack(">HHH", *RGB[0, 0]))
    assert used(png(transparent, im=UPRIGHT), tmp_path, clear()) == ""
    assert used(png(transparent[:-1] + b"?", im=UPRIGHT), tmp_path) == ""


# --- JPEG

THUMBNAIL = encoded("JPEG", Picture.new("RGB", (64, 48), "white"))
JPEGS: dict[str, Callable[[], bytes]] = {
    "comments of 20 MB": lambda: jpeg(*[segment(0xfe, b"x" * 65_000)] * 320),
    "an empty comment": lambda: jpeg(segment(0xfe, b"")),
    "a short JFIF": lambda: jpeg(segment(0xe0, b"JFIF")),
    "a short Adobe": lambda: jpeg(segment(0xee, b"Adobe")),
    "an Adobe of no known kind": lambda: jpeg(segment(0xee, b"Adobe\0\x64\0\0\0\0\7")),
    "an Adobe of four colours": lambda: jpeg(segment(0xee, b"Adobe\0\x64\0\0\0\0\2")),
    "a short profile": lambda: jpeg(segment(0xe2, b"ICC_PROFILE\0")),
    "a profile without pieces": lambda: jpeg(segment(0xe2, b"ICC_PROFILE\0\0\0")),
    "a short Photoshop": lambda: jpeg(segment(0xed, b"Photoshop 3.0\0" + b"8BIM\3\xed")),
    "a Photoshop that is cut off": lambda: jpeg(segment(0xed, b"Photoshop 3.0\0" + b"8BIM\3\xed\0\0\0\0\0\1")),
    "a Photoshop without a name": lambda: jpeg(segment(0xed, b"Photoshop 3.0\0" + b"8BIM\0\0")),
    "a short MPF": lambda: jpeg(segment(0xe2, b"MPF\0")),
    "an MPF of noise": lambda: jpeg(segment(0xe2, b"MPF\0" + bytes(range(99)))),
    "an MPF that leads nowhere": lambda: jpeg(segment(0xe2, b"MPF\0" + exif(
        (0xb000, 7, 4, b"0100"), (0xb001, 4, 1, number(2, 4)), (0xb002, 7, 32, number(50, 4)), more=b"\xff" * 32))),
    "an MPF of fewer entries than it says": lambda: jpeg(segment(0xe2, b"MPF\0" + exif(
        (0xb000, 7, 4, b"0100"), (0xb001, 4, 1, number(9, 4)), (0xb002, 7, 16, number(50, 4)), more=bytes(16)))),
    "an MPF that counts in text": lambda: jpeg(segment(0xe2, b"MPF\0" + exif((0xb001, 2, 4, b"two\0"), (0xb002, 2, 4, b"two\0")))),
    "a segment of length 0": lambda: jpeg(segment(0xe5, b"", size=0)),
    "a segment of length 1": lambda: jpeg(segment(0xe5, b"", size=1)),
    "a segment that is longer than it says": lambda: jpeg(segment(0xe5, b"hello" * 9, size=9)),
    "a thumbnail that is longer than it says": lambda: jpeg(segment(0xe1, b"Exif\0\0" + exif() + THUMBNAIL, size=12)),
    "a thumbnail that is cut off": lambda: jpeg(segment(0xe1, b"Exif\0\0" + exif(link=26, more=THUMBNAIL[:90]))),
    "bytes between segments": lambda: jpeg(segment(0xe5, b"hello"), b"\0\0\0", segment(0xe5, b"hello"), b"\xff\xff\xff"),
    "EXIF in two segments": lambda: jpeg(segment(0xe1, b"Exif\0\0" + exif()), segment(0xe1, b"Exif\0\0hello")),
    "a film behind its end": lambda: jpeg() + b"\0\0\0\x18ftypmp42" + bytes(100_000),
    "a picture behind its end": lambda: jpeg() + THUMBNAIL,
    "half a picture behind its end": lambda: jpeg() + THUMBNAIL[:-9],
    "no end": lambda: jpeg()[:-2],
    "no end, progressive": lambda: encoded("JPEG", LYING, progressive=True)[:-2],
    "half an end": lambda: jpeg()[:-1],
}


@pytest.mark.parametrize("case", JPEGS)
def test_no_note_fails_a_jpeg(case: str, tmp_path: Path) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert used(JPEGS[case](), tmp_path, np.asarray(LYING)) == ""


# --- the others

def long_comment(size: int) -> bytes: return b"!\xfe" + (b"\xff" + b"x" * 255) * (size // 255) + b"\0"


def gif(*blocks: bytes) -> bytes:
    data = encoded("GIF", LYING.convert("P", palette=Picture.Palette.ADAPTIVE))
    at = 13 + (3 << (data[10] & 7) + 1)
    return data[:at] + b"".join(blocks) + data[at:]


OTHERS: dict[str, tuple[Callable[[], bytes], np.ndarray]] = {
    "GIF: a comment of 20 MB": (lambda: gif(long_comment(20_000_000)), np.asarray(LYING)),
    "GIF: an empty comment": (lambda: gif(b"!\xfe\0"), np.asarray(LYING)),
    "GIF: an empty control": (lambda: gif(b"!\xf9\0"), np.asarray(LYING)),
    "GIF: a short control": (lambda: gif(b"!\xf9\1\1\0"), np.asarray(LYING)),
    "GIF: an application of no length": (lambda: gif(b"!\xff\0"), np.asarray(LYING)),
    "GIF: a loop that is cut off": (lambda: gif(b"!\xff\x0bNETSCAPE2.0\1\1\0"), np.asarray(LYING)),
    "GIF: no end": (lambda: gif()[:-1], np.asarray(LYING)),
    "WebP: a note longer than the file": (lambda: webp(riff(b"EXIF", b"Exif\0\0", size=0x7ffffff0)), np.asarray(LYING)),
    "WebP: notes that are announced and missing": (lambda: webp(flags=0x2c), np.asarray(LYING)),
    "WebP: notes that are not announced": (lambda: webp(riff(b"EXIF", exif(ORIENTED)), flags=0), RGB),
    "WebP: an unknown note": (lambda: webp(riff(b"abcd", b"hello")), np.asarray(LYING)),
    "WebP: a wrong length of all": (lambda: b"RIFF\xff\xff\xff\x7f" + webp()[8:], np.asarray(LYING)),
    "WebP: bytes behind its end": (lambda: webp() + b"hello", np.asarray(LYING)),
    "TIFF: a chain without an end": (lambda: tiff(link=8), np.asarray(LYING)),
    "TIFF: the next directory outside": (lambda: tiff(link=0xffffff), np.asarray(LYING)),
    "BMP: a resolution without sense": (lambda: encoded("BMP")[:38] + b"\xff" * 8 + encoded("BMP")[46:], np.asarray(LYING)),
    "PPM: comments": (lambda: b"P6\n#" + b"x" * 100_000 + b"\n64 #y\n96\n255\n" + LYING.tobytes(), np.asarray(LYING)),
}


@pytest.mark.parametrize("case", OTHERS)
def test_no_note_fails_a_picture_of_another_form(case: str, tmp_path: Path) -> None:
    make, want = OTHERS[case]
    assert used(make(), tmp_path, want) == ""


@pytest.mark.parametrize("order", ["<", ">"])
@pytest.mark.parametrize("tag", [254, 269, 270, 274, 282, 283, 296, 305, 306, 330, 700, 33723, 34377, 34665, 34675, 34853, 50706,
                                 65000])
def test_no_value_of_a_tag_fails_a_tiff(tag: int, order: str, tmp_path: Path) -> None:
    path, failed = tmp_path / "me.tif", {}
    for kind, many, value in itertools.product((*range(14), 99), (0, 1, 2, 0xffffffff), VALUES):
        entries = [(tag, kind, many, value)] + [(296, 3, 1, struct.pack(f"{order}HH", 3, 0))] * (tag != 296)
        path.write_bytes(tiff(*entries, order=order))
        try:
            check_file("portrait", str(path), PORT)
            got = load_picture(path)
            if not close(got, np.asarray(LYING)) and tag != 274: failed[kind, many, value] = "pixels"
        except Exception as e: failed[kind, many, value] = repr(e)
    assert not failed, (len(failed), next(iter(failed.items())))


@pytest.mark.parametrize("compression", ["raw", "tiff_lzw", "tiff_adobe_deflate", "jpeg", "packbits"])
def test_every_compression_of_a_tiff_is_read(compression: str, tmp_path: Path) -> None:
    assert used(encoded("TIFF", compression=compression, dpi=(300, 300), tiffinfo={270: "me", 274: 6}), tmp_path) == ""
    assert used(encoded("TIFF", compression=compression, big_tiff=True, tiffinfo={270: "me", 274: 6}), tmp_path) == ""
    pages = encoded("TIFF", UPRIGHT, compression=compression, save_all=True, append_images=[LYING])
    assert used(pages, tmp_path) == ""


@pytest.mark.parametrize("block", BLOCKS)
def test_a_broken_exif_block_fails_no_avif(block: str, tmp_path: Path) -> None:
    assert used(avif(BLOCKS[block][0]), tmp_path) == ""


# --- what good pictures look like, as before

GOOD: dict[str, Callable[[], tuple[bytes, np.ndarray]]] = {
    "16 bit grey": lambda: (encoded("PNG", Picture.fromarray(RGB[..., 0].astype(np.uint16) * 257)), grey(RGB[..., 0])),
    "one bit": lambda: (encoded("PNG", Picture.fromarray(RGB[..., 0] > 100)), grey((RGB[..., 0] > 100) * np.uint8(255))),
    "grey and alpha": lambda: (encoded("PNG", UPRIGHT.convert("LA")), grey(UPRIGHT.convert("L"))),
    "a palette with transparency": lambda: (encoded("PNG", clear_palette()), clear()),
    "a palette with one clear colour": lambda: (encoded("PNG", clear_palette(), transparency=first()), clear()),
    "a GIF with a clear colour": lambda: (encoded("GIF", clear_palette(), transparency=first()), clear()),
    "alpha": lambda: (encoded("PNG", clear_rgba()), clear()),
    "alpha in WebP": lambda: (encoded("WEBP", clear_rgba(), lossless=True), clear()),
    "alpha in AVIF": lambda: (encoded("AVIF", clear_rgba()), clear()),
    "alpha in TIFF": lambda: (encoded("TIFF", clear_rgba()), clear()),
    "CMYK": lambda: (encoded("JPEG", UPRIGHT.convert("CMYK")), RGB),
    "CMYK in TIFF": lambda: (encoded("TIFF", UPRIGHT.convert("CMYK")), RGB),
    "grey": lambda: (encoded("JPEG", UPRIGHT.convert("L")), grey(UPRIGHT.convert("L"))),
    "progressive": lambda: (encoded("JPEG", UPRIGHT, progressive=True), RGB),
    "restart markers": lambda: (encoded("JPEG", UPRIGHT, restart_marker_rows=1), RGB),
    "RGB, not YCbCr": lambda: (encoded("JPEG", UPRIGHT, keep_rgb=True), RGB),
    "a moving PNG": lambda: (encoded("PNG", UPRIGHT, save_all=True, append_images=[LYING.resize(UPRIGHT.size)]), RGB),
    "a moving PNG with a still": lambda: (encoded("PNG", UPRIGHT, save_all=True, default_image=True,
                                                  append_images=[LYING.resize(UPRIGHT.size)]), RGB),
    "a moving WebP": lambda: (encoded("WEBP", UPRIGHT, save_all=True, append_images=[LYING.resize(UPRIGHT.size)]), RGB),
    "a moving AVIF": lambda: (encoded("AVIF", UPRIGHT, save_all=True, append_images=[LYING.resize(UPRIGHT.size)]), RGB),
    "a lossy WebP": lambda: (encoded("WEBP", UPRIGHT), RGB),
    "two photographs": lambda: (encoded("MPO", UPRIGHT, save_all=True, append_images=[LYING]), RGB),
}


def grey(a: Any) -> np.ndarray: return np.stack([np.asarray(a)] * 3, 2)


def first() -> int: return clear_palette().getpixel((0, 0))


def clear_rgba() -> Picture.Image:
    im = UPRIGHT.convert("RGBA")
    im.putalpha(Picture.fromarray(np.where((RGB == RGB[0, 0]).all(2), 0, 255).astype(np.uint8)))
    return im


def clear() -> np.ndarray: return np.where((RGB == RGB[0, 0]).all(2)[..., None], 225, RGB)


def clear_palette() -> Picture.Image:
    im = UPRIGHT.convert("P", palette=Picture.Palette.ADAPTIVE, colors=4)
    im.info["transparency"] = bytes(0 if i == im.getpixel((0, 0)) else 255 for i in range(4))
    return im


@pytest.mark.parametrize("name", GOOD)
def test_good_pictures_look_as_before(name: str, tmp_path: Path) -> None:
    data, want = GOOD[name]()
    assert used(data, tmp_path, want) == ""


# --- memory and threads

def test_bombs_in_notes_cost_no_memory(tmp_path: Path) -> None:
    gigabyte = zlib.compressobj(9)
    packed = b"".join(gigabyte.compress(bytes(1 << 20)) for _ in range(1024)) + gigabyte.flush()
    kinds = (b"zTXt", b"a\0\0"), (b"iTXt", b"a\0\1\0\0\0"), (b"iTXt", b"XML:com.adobe.xmp\0\1\0\0\0"), (b"iCCP", b"a\0\0"), \
        (b"zTXt", b"Raw profile type exif\0\0")
    (tmp_path / "bomb.png").write_bytes(png(*[chunk(k, d + packed) for k, d in kinds]))
    with open(tmp_path / "sparse.png", "wb") as f:  # a text of 2 GB, of which the disk holds nothing
        f.write(png()[:33] + number(0x7fffffff, 4) + b"tEXt")
        f.seek(0x7fffffff + 4, 1)
        f.write(png()[33:])
    code = ("import resource, sys; from myspinbot.graph.files import check_file; "
            "from myspinbot.media.picture import load_picture\n"
            "from myspinbot.schema import Port\n"
            "def use(path):\n"
            "    check_file('portrait', path, Port(name='portrait', type='Image'))\n"
            "    return load_picture(path).shape\n"
            "use(sys.argv[1])\n"
            "peak = lambda: resource.getrusage(resource.RUSAGE_SELF).ru_maxrss // 1024\n"
            "before = peak()\n"
            "print([use(p) for p in sys.argv[2:]], peak() - before)")
    (tmp_path / "small.png").write_bytes(png())
    done = subprocess.run([sys.executable, "-c", code, *(str(tmp_path / f"{o}.png") for o in ("small", "bomb", "sparse"))],
                          capture_output=True, text=True, check=True, timeout=120)
    shapes, grown = done.stdout.rsplit(maxsplit=1)
    assert shapes == str([(96, 64, 3)] * 2) and int(grown) < 48, done.stdout


def test_a_picture_of_many_tiny_pieces_is_read(tmp_path: Path) -> None:
    whole = png()
    at = whole.index(b"IDAT") - 4
    size = int.from_bytes(whole[at:at + 4])
    tiny = b"".join(chunk(b"IDAT", whole[at + 8 + i:at + 9 + i]) for i in range(size)) + chunk(b"IDAT", b"") * 100_000
    assert used(whole[:at] + tiny + whole[-12:], tmp_path, np.asarray(LYING)) == ""


def test_pillows_own_limits_are_left_alone() -> None:
    from PIL import ImageFile, PngImagePlugin
    limits = lambda: (ImageFile.LOAD_TRUNCATED_IMAGES, PngImagePlugin.MAX_TEXT_CHUNK, PngImagePlugin.MAX_TEXT_MEMORY,
                      Picture.MAX_IMAGE_PIXELS)
    before, seen, stop = limits(), set(), threading.Event()
    def watch() -> None:
        while not stop.is_set(): seen.add(limits())
    t = threading.Thread(target=watch)
    t.start()
    try:
        for make in (PNGS["iTXt of 2 MB"], PNGS["wrong checksum in tEXt"], JPEGS["no end"]): load_picture(make())
    finally:
        stop.set()
        t.join()
    assert seen == {before} and limits() == before


# --- broken pixels are refused

def flipped(data: bytes, at: int) -> bytes: return data[:at] + bytes([data[at] ^ 0xff]) + data[at + 1:]


def noisy() -> Picture.Image: return Picture.fromarray(np.random.default_rng(1).integers(0, 255, (200, 300, 3), np.uint8))


def part(data: bytes, share: float) -> bytes: return data[:int(len(data) * share)]


def between_marks(data: bytes, out_from: bytes, out_to: bytes) -> bytes:
    "Without what stands from one mark to another."
    return data[:data.index(out_from)] + data[data.index(out_to):]


SHARES = (0.3, 0.6, 0.97)
CUT = {f"{form}, {share:.0%} of it": lambda form=form, share=share: part(encoded(form, noisy()), share)
       for form in ("JPEG", "PNG", "WEBP", "TIFF", "GIF", "AVIF", "BMP", "PPM") for share in SHARES}
CUT |= {f"progressive JPEG, {share:.0%} of it": lambda share=share: part(encoded("JPEG", noisy(), progressive=True), share)
        for share in SHARES}
CUT |= {f"JPEG without its last {n} bytes": lambda n=n: encoded("JPEG", noisy())[:-n] for n in (20, 50, 200, 1000)}
CUT |= {"PNG: wrong checksum of its pixels": lambda: flipped(png(), png().index(b"IDAT") + 20),
        "PNG: wrong checksum of its size": lambda: flipped(png(), 19),
        "PNG: no pixels": lambda: png()[:33] + png()[-12:],
        "JPEG: no pixels": lambda: jpeg()[:jpeg().index(b"\xff\xda")],
        "JPEG: no size": lambda: between_marks(jpeg(), b"\xff\xc0", b"\xff\xc4"),
        "WebP: no pixels": lambda: webp()[:30], "TIFF: no directory": lambda: tiff()[:9],
        "TIFF: a directory outside": lambda: b"II*\0\xff\xff\xff\0" + bytes(90),
        "TIFF: no known compression": lambda: tiff().replace(*(struct.pack("<HHIH", 259, 3, 1, n) for n in (1, 999))),
        "GIF: no pixels": lambda: gif()[:gif().index(b",")], "AVIF: no pixels": lambda: encoded("AVIF")[:60],
        "AVIF: pixels of noise": lambda: encoded("AVIF").partition(b"mdat")[0] + b"mdat" + bytes(range(256)) * 9,
        "AVIF: no such item": lambda: encoded("AVIF").replace(b"av01Color", b"av99Color")}


@pytest.mark.parametrize("case", CUT)
def test_pixels_that_are_broken_are_refused_with_a_reason(case: str, tmp_path: Path) -> None:
    (path := tmp_path / "me.picture").write_bytes(CUT[case]())
    for source in (path, path.read_bytes()):
        with pytest.raises(InputError) as e: load_picture(source, "me.picture")
        assert "me.picture" in e.value.message and "damaged" in e.value.message and e.value.hint, e.value
        assert "0x" not in e.value.message and len(str(e.value)) < 300, e.value
    with pytest.raises(InputError): preview_jpeg(path)


EARLY = [k for k in CUT if k.startswith("PNG") or ": no" in k or "outside" in k]


@pytest.mark.parametrize("case", EARLY)
def test_what_the_header_tells_is_refused_at_submission(case: str, tmp_path: Path) -> None:
    (path := tmp_path / "me.picture").write_bytes(CUT[case]())
    with pytest.raises(InputError) as e: check_file("portrait", str(path), PORT)
    assert "portrait" in e.value.message and "damaged" in e.value.message and e.value.hint, e.value
