"""Picture files: a few photographs, and what Pillow cannot write, made by hand."""

import struct
import zlib

import numpy as np

from diffpeft.pipeline.open import EMBEDDED
from tests.families.pipelines import EDITS

DATA = EMBEDDED.parent / "demo" / "train"


def photos_in(place, names=("cat_face", "airplane", "automobile")):
    """A folder of pictures without captions."""
    folder = place / "photos"
    folder.mkdir()
    for name in names:
        (folder / f"{name}.png").write_bytes((DATA / f"{name}.png").read_bytes())
    return folder


def shown_beside(kind, photos):
    """The options that a run of this kind of model needs beside its pictures: those that are edited stand in as their own control images."""
    folders = {"flux fill": 2}.get(kind, 1)  # a picture, and what is to be filled in of it
    return {"control": ",".join([str(photos)] * folders)} if kind in EDITS else {}


def png16(path, values):
    """A PNG of 16 bits a sample. values [h, w] or [h, w, 2 | 3 | 4] uint16."""
    values = np.atleast_3d(values)
    height, width, channels = values.shape
    kind = {1: 0, 2: 4, 3: 2, 4: 6}[channels]
    rows = b"".join(b"\0" + row.astype(">u2").tobytes() for row in values)

    def chunk(name, data):
        return struct.pack(">I", len(data)) + name + data + struct.pack(">I", zlib.crc32(name + data))

    header = struct.pack(">IIBBBBB", width, height, 16, kind, 0, 0, 0)
    path.write_bytes(
        b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(rows)) + chunk(b"IEND", b"")
    )


def tiff(path, values, *, order="<", white_is_zero=False, orientation=1):
    """A grey TIFF of integers or floats, in either byte order. values [h, w]."""
    kind = {"u": 1, "i": 2, "f": 3}[values.dtype.kind]
    data = values.astype(values.dtype.newbyteorder(order)).tobytes()
    height, width = values.shape
    tags = [(256, width), (257, height), (258, values.dtype.itemsize * 8), (259, 1), (262, 0 if white_is_zero else 1)]
    tags += [(273, 8), (274, orientation), (277, 1), (278, height), (279, len(data)), (339, kind)]
    directory = struct.pack(order + "H", len(tags))
    directory += b"".join(struct.pack(order + "HHII", tag, 4, 1, value) for tag, value in tags)
    start = 8 + len(data) + len(data) % 2
    mark = b"II" if order == "<" else b"MM"
    path.write_bytes(
        mark
        + struct.pack(order + "HI", 42, start)
        + data
        + b"\0" * (len(data) % 2)
        + directory
        + struct.pack(order + "I", 0)
    )
