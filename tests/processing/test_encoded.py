"""One way to a picture's size and orientation, wherever a file keeps it; metadata never decides whether pixels are read."""

import io
import struct
import sys
import threading
import warnings
import zlib

import numpy as np
import pytest
from PIL import Image, ImageOps

from gp_jax import GlimpseError
from gp_jax.data.checks import TO_UPRIGHT, Checker, upright_size
from gp_jax.processing.encoded import orientation
from gp_jax.processing.images import decode, open_image, read_picture
from gp_jax.processing.tiff import Directory

pytestmark = pytest.mark.quick

PICTURE = Image.fromarray(np.random.default_rng(0).integers(0, 255, (5, 8, 3), np.uint8)).resize((48, 30), Image.Resampling.BICUBIC)
FORMATS = ("JPEG", "PNG", "WEBP", "TIFF", "AVIF", "GIF", "BMP")


def saved(kind: str = "PNG", picture: Image.Image = PICTURE, **options) -> bytes:
    file = io.BytesIO()
    picture.save(file, kind, **options)
    return file.getvalue()


def exif(value: bytes, kind: int = 3, count: int = 1, order: str = "<") -> bytes:
    """An EXIF block of one entry, the orientation. value: what stands in its four bytes, then what these may point to, at byte 26."""
    mark, entry = {"<": b"II", ">": b"MM"}[order], struct.pack(f"{order}HHL", 0x112, kind, count)
    head = mark + struct.pack(f"{order}HLH", 42, 8, 1)
    return head + entry + value.ljust(4, b"\0")[:4] + bytes(4) + value[4:]


def xmp(value: int, form: str = 'tiff:Orientation="{}"') -> bytes:
    return f'<x:xmpmeta xmlns:x="adobe:ns:meta/"><r {form.format(value)}</x:xmpmeta>'.encode()


def chunk(kind: bytes, data: bytes) -> bytes:
    return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))


def png_with(*chunks: bytes, late: bool = False) -> bytes:
    plain = saved()
    at = plain.index(b"IEND" if late else b"IDAT") - 4
    return plain[:at] + b"".join(chunks) + plain[at:]


def tiff_with(entry: bytes, **options) -> bytes:
    """A TIFF whose orientation entry is replaced."""
    plain = saved("TIFF", tiffinfo={0x112: 6}, **options)
    return plain.replace(struct.pack("<HHLH", 0x112, 3, 1, 6) + bytes(2), entry.ljust(12, b"\0"))


def places(value: int) -> dict[str, bytes]:
    """A picture of this orientation, in every format and every place that a file may keep it."""
    little, big = exif(struct.pack("<H", value)), exif(struct.pack(">H", value), order=">")
    hexed = (b"Exif\0\0" + big).hex()
    profile = b"Raw profile type exif\0\0" + zlib.compress(f"\nexif\n{len(hexed) // 2:8}\n{hexed}\n".encode())
    text = b"XML:com.adobe.xmp\0\0\0\0\0" + xmp(value)
    packed = b"XML:com.adobe.xmp\0\1\0\0\0" + zlib.compress(xmp(value))
    made = {f"{kind} exif": saved(kind, exif=b"Exif\0\0" + little) for kind in ("JPEG", "PNG", "WEBP", "AVIF")}
    made |= {f"{kind} xmp": saved(kind, xmp=xmp(value)) for kind in ("JPEG", "WEBP", "AVIF")}
    made |= {f"PNG exif late={late}": png_with(chunk(b"eXIf", big), late=late) for late in (False, True)}
    made |= {f"PNG profile late={late}": png_with(chunk(b"zTXt", profile), late=late) for late in (False, True)}
    made |= {f"PNG xmp late={late}": png_with(chunk(b"iTXt", t), late=late) for late, t in ((False, text), (True, packed))}
    for compression in ("raw", "tiff_lzw", "jpeg"):
        made[f"TIFF {compression}"] = tiff_with(struct.pack("<HHLH", 0x112, 3, 1, value), compression=compression)
        made[f"TIFF {compression} xmp"] = saved("TIFF", compression=compression, tiffinfo={700: xmp(value)})
    made["BigTIFF"] = saved("TIFF", tiffinfo={0x112: 6}, big_tiff=True).replace(
        struct.pack("<HHQH", 0x112, 3, 1, 6), struct.pack("<HHQH", 0x112, 3, 1, value)
    )
    made["MPO"] = saved("MPO", save_all=True, append_images=[PICTURE.rotate(90, expand=True)], exif=b"Exif\0\0" + little)
    return made


@pytest.mark.parametrize("value", range(10))
def test_size_header_and_pixels_agree(tmp_path, value):
    """And are those of Pillow, with which every format and place was right at least one way."""
    for name, data in places(value).items():
        want = ImageOps.exif_transpose(Image.open(io.BytesIO(data))).convert("RGB")
        (tmp_path / "picture").write_bytes(data)
        picture = read_picture(data, name)
        assert picture.size == want.size == upright_size(tmp_path / "picture"), name
        np.testing.assert_array_equal(picture.rgb(), want, err_msg=name)
        checked = Checker(tmp_path).open(tmp_path / "picture")
        assert (checked.size, checked.stored_size) == (want.size, PICTURE.size), name
        assert checked.orientation == (value if value in TO_UPRIGHT else 1), name


@pytest.mark.parametrize("order", "<>")
def test_orientations_of_other_types(order):
    """Numbers of any type count, their first where there are several; anything else is upright."""
    far = struct.pack(f"{order}L", 26)
    for found, kind, count, value in (
        (6, 4, 1, struct.pack(f"{order}L", 6)),
        (6, 3, 3, far + struct.pack(f"{order}HHH", 6, 3, 1)),
        (6, 5, 1, far + struct.pack(f"{order}LL", 12, 2)),
        (6, 12, 1, far + struct.pack(f"{order}d", 6)),
        (1, 10, 1, far + struct.pack(f"{order}ll", -1, 0)),
        (1, 5, 1, far + bytes(8)),
        (1, 12, 1, far + struct.pack(f"{order}d", np.nan)),
        (1, 2, 2, b"6\0"),
        (1, 1, 1, b"\6"),
        (1, 3, 0, struct.pack(f"{order}H", 6)),
        (1, 99, 1, struct.pack(f"{order}H", 6)),
        (1, 5, 1, struct.pack(f"{order}L", 2**31)),
    ):
        block = exif(value, kind, count, order)
        assert orientation(block, b"") == orientation(b"Exif\0\0" * 2 + block, b"") == found
        assert all(orientation(block[:cut], b"") in (1, 6) for cut in range(len(block)))
    assert orientation(b"", xmp(5, "><tiff:Orientation>{}</tiff:Orientation>")) == 5
    assert orientation(exif(struct.pack(f"{order}H", 3), order=order), xmp(6)) == 3, "EXIF comes first"
    assert orientation(b"junk" * 9, xmp(6)) == 6 and orientation(b"", xmp(9)) == orientation(b"", b"") == 1


BOMB = zlib.compress(bytes(3 << 20))
METADATA = {
    "zTXt above Pillow's limit": png_with(chunk(b"zTXt", b"workflow\0\0" + BOMB)),
    "behind the pixels": png_with(chunk(b"zTXt", b"workflow\0\0" + BOMB), late=True),
    "iTXt": png_with(chunk(b"iTXt", b"XML:com.adobe.xmp\0\1\0\0\0" + BOMB)),
    "iCCP": png_with(chunk(b"iCCP", b"profile\0\0" + BOMB)),
    "many texts": png_with(*[chunk(b"tEXt", b"a%d\0" % i + bytes(1 << 20)) for i in range(3)], chunk(b"zTXt", b"b\0\0" + BOMB)),
    "checksum of a text": png_with(chunk(b"tEXt", b"a\0b")[:-1] + b"?"),
    "unknown packing": png_with(chunk(b"zTXt", b"a\0\7b"), chunk(b"iCCP", b"a\0\7b")),
    "gamma cut off": png_with(chunk(b"gAMA", b"1"), chunk(b"pHYs", b"1"), chunk(b"cHRM", b"1"), chunk(b"sRGB", b"")),
    "EXIF that is none": png_with(chunk(b"eXIf", b"junkjunkjunk")),
    "animation that is none": png_with(chunk(b"acTL", b"1"), chunk(b"fcTL", b"2")),
    "JPEG, EXIF that is none": saved("JPEG", exif=b"Exif\0\0junkjunkjunk"),
    "JPEG, profile": saved("JPEG", icc_profile=bytes(200000), comment=bytes(60000)),
    "JPEG, MPO that is none": saved("JPEG").replace(b"\xff\xdb", b"\xff\xe2\0\x0aMPF\0junk\xff\xdb", 1),
    "WebP, EXIF that is none": saved("WEBP", exif=b"junkjunkjunk", xmp=b"\xff" * 99, icc_profile=b"junk"),
    "WebP, metadata cut off": saved("WEBP", exif=b"Exif\0\0" + exif(b"\1") + bytes(500))[:-300],
    "AVIF, EXIF that is none": saved("AVIF", exif=b"Exif\0\0" + exif(b"\1")).replace(b"II\x2a\0", b"IIII"),
    "TIFF, rationals without sense": saved("TIFF").replace(struct.pack("<LL", 72, 1), struct.pack("<LL", 0, 0)),
    "TIFF, EXIF and XMP that are none": saved("TIFF", tiffinfo={34665: 2**31, 700: b"\xff" * 99, 270: "x" * 999}),
}


@pytest.mark.parametrize("case", METADATA)
def test_metadata_does_not_decide(case):
    picture = np.asarray(decode(METADATA[case], case), int)
    assert picture.shape == (30, 48, 3) and np.abs(picture - np.asarray(PICTURE)).mean() < 20


def test_exif_that_cannot_be_written_back():
    """A rational of -1/0: reading the orientation needs no writing of the rest."""
    entries = struct.pack("<HHLHHHHLL", 0x0112, 3, 1, 6, 0, 0x011A, 10, 1, 38)
    block = b"Exif\0\0" + b"II" + struct.pack("<HLH", 42, 8, 2) + entries + bytes(4) + struct.pack("<ll", -1, 0)
    for kind in ("JPEG", "PNG", "WEBP"):
        picture = Image.open(io.BytesIO(saved(kind, exif=block)))
        with pytest.raises(Exception, match=r"."):
            ImageOps.exif_transpose(picture)
        assert decode(saved(kind, exif=block), kind).size == open_image(Image.open(io.BytesIO(saved(kind, exif=block)))).size == (30, 48)


def test_globals_of_pillow_stay_for_other_threads():
    """Neither is its limit on pixels touched nor asked, and nothing is warned of."""
    files = [saved(kind) for kind in FORMATS] + [saved("TIFF", PICTURE.quantize(9), compression="tiff_lzw")]
    seen, stop = set(), threading.Event()
    old, Image.MAX_IMAGE_PIXELS = Image.MAX_IMAGE_PIXELS, 1000

    def watch() -> None:
        while not stop.is_set():
            seen.add((Image.MAX_IMAGE_PIXELS, len(warnings.filters)))

    threads = [threading.Thread(target=lambda: [read_picture(data, "x", 10**8).rgb() for data in files]) for _ in range(4)]
    watcher, before = threading.Thread(target=watch), sys.getswitchinterval()
    try:
        sys.setswitchinterval(1e-5)
        with warnings.catch_warnings(record=True) as said:
            warnings.simplefilter("always")
            watcher.start()
            for thread in threads:
                thread.start()
            for thread in threads:
                thread.join()
            stop.set()
            watcher.join()
    finally:
        Image.MAX_IMAGE_PIXELS = old
        sys.setswitchinterval(before)
    assert len(seen) == 1 and seen.pop()[0] == 1000 and not said


def scans(count: int, size: tuple[int, int]) -> bytes:
    """A progressive JPEG whose last scan comes again and again."""
    data = saved("JPEG", Image.new("L", size, 128), progressive=True)
    return data[:-2] + data[data.rindex(b"\xff\xda") : -2] * count + b"\xff\xd9"


def test_work_is_bounded_by_what_a_file_holds():
    assert decode(scans(60, (100, 100)), "x").size == (100, 100), "small pictures may have many scans"
    large = bytearray(saved("JPEG"))
    at = large.index(b"\xff\xc0")
    large[at + 5 : at + 9] = struct.pack(">HH", 9000, 9000)
    lossy = bytearray(saved("WEBP"))
    at = lossy.index(b"\x9d\x01\x2a")
    lossy[at + 3 : at + 7] = struct.pack("<HH", 9000, 9000)
    for data, message in (
        (scans(60, (4000, 5000)), "scans of 20000000 pixels"),
        (bytes(large), "81000000 pixels in"),
        (bytes(lossy), "9000 x 9000 pixels in"),
        (b"\x89PNG\r\n\x1a\n" + chunk(b"tIME", b"") * (1 << 18) + saved()[8:], "more than 262144 chunks"),
        (saved("JPEG")[:2] + b"\xff\xe1\0\2" * (1 << 18) + saved("JPEG")[2:], "more than 262144 segments"),
        (tiff_with(struct.pack("<HHLL", 322, 4, 1, 10**5) + struct.pack("<HHLL", 323, 4, 1, 10**5)), "tiles of 100000 x 100000"),
        (tiff_with(struct.pack("<HHLL", 320, 3, 2**31, 8)), "directory that is larger than its file"),
    ):
        with pytest.raises(GlimpseError, match=f"x: is truncated or damaged.*{message}"):
            decode(data, "x")


@pytest.mark.filterwarnings("ignore")  # Pillow's, of damaged metadata
@pytest.mark.parametrize("kind", FORMATS)
def test_damaged_files_are_one_line(kind):
    """A few hundred mutations of every format; the project's fuzzer tries more."""
    options = {"exif": b"Exif\0\0" + exif(b"\6")} if kind in ("JPEG", "PNG") else {}
    rng, good = np.random.default_rng(1), np.frombuffer(saved(kind, **options), np.uint8)
    for _ in range(200):
        data = good[: rng.integers(1, good.size + 1)].copy() if rng.random() < 0.2 else good.copy()
        data[rng.integers(0, data.size, rng.integers(1, 4))] = rng.integers(0, 256)
        try:
            picture = read_picture(data.tobytes(), "x", 10**6)
            assert picture.rgb().size == picture.size
        except GlimpseError as error:
            assert str(error).startswith("x: ") and "\n" not in str(error)


def test_directories_hold_what_pixels_need():
    data = saved("TIFF", tiffinfo={0x112: 6, 270: "a long description", 700: xmp(3)})
    kept = Directory(Directory(data).with_pixels_only()).entries
    assert {256, 257, 258, 259, 262, 273} <= set(kept) and not {0x112, 270, 700, 282} & set(kept)
    assert Directory(b"").entries == Directory(b"II").entries == Directory(b"II\x2a\0\xff\xff\xff\xff").entries == {}
