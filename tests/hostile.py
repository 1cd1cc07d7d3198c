"""Files made to harm whoever opens them. Each is small, made on the spot, and comes with a word of its refusal."""

from __future__ import annotations

import collections
import io
import json
import os
import pickle
import struct
import tarfile
import zipfile
import zlib
from collections.abc import Callable, Iterator
from functools import cache
from pathlib import Path
from typing import Any

import torch
from PIL import Image

# -- pickles


class Reduced:
    """Pickled, it becomes the call of a function."""

    def __init__(self, function: Callable, *args: Any) -> None:
        self.call = function, args

    def __reduce__(self) -> tuple:
        return self.call


class HidesMethods:
    """Pickled, it becomes a dictionary whose methods are texts."""

    def __reduce__(self) -> tuple:
        return collections.OrderedDict, (), {"items": "x", "get": "x", "keys": "x"}


def calls(marker: Path) -> dict[str, Reduced]:
    """Calls that each leave ``marker`` behind."""
    return {
        "os_system": Reduced(os.system, f"touch '{marker}'"), "mkdir": Reduced(os.mkdir, str(marker)),
        "eval": Reduced(eval, f"__import__('pathlib').Path({str(marker)!r}).touch()"),
        "exec": Reduced(exec, f"open({str(marker)!r}, 'w').close()"), "path_method": Reduced(Path.touch, marker),
        "getattr": Reduced(getattr, Reduced(__import__, "os"), "getcwd"),
    }


def malicious_pickles(folder: Path, marker: Path) -> Iterator[Path]:
    """Weight files that would run code, in every form that ``torch.load`` and ``pickle.load`` know."""
    tensors = {"a.weight": torch.zeros(2)}
    for name, call in calls(marker).items():
        for suffix, zipped in ((".ckpt", True), (".bin", False)):
            path = folder / f"{name}{'_zip' if zipped else '_legacy'}{suffix}"
            torch.save({**tensors, "x": call}, path, _use_new_zipfile_serialization=zipped)
            yield path
        path = folder / f"{name}.pt"
        path.write_bytes(pickle.dumps({"state_dict": call}, protocol=len(name) % 6))
        yield path
    nested = folder / "nested.pth"
    torch.save({"state_dict": {"model": [{"deep": calls(marker)["exec"]}]}}, nested)
    yield nested
    disguised = folder / "disguised.safetensors"
    torch.save(tensors | {"x": calls(marker)["eval"]}, disguised)
    yield disguised
    yield _in_tar(folder / "tar.pt", nested)
    whole = folder / "module.pt"
    torch.save(torch.nn.Linear(2, 2), whole)
    yield whole
    opcodes = {  # GLOBAL with a dotted name, STACK_GLOBAL, INST, OBJ, EXT1
        "global": b"\x80\x02cos\nsystem\nU\x04trueR.",
        "stack_global": b"\x80\x04\x8c\x02os\x8c\x06system\x93\x8c\x04true\x85R.", "inst": b"(U\x04trueios\nsystem\n.",
        "obj": b"(cos\nsystem\nU\x04trueo.", "ext": b"\x80\x02\x82\x01.", "persistent": b"\x80\x02U\x04trueQ.",
    }
    for name, content in opcodes.items():
        path = folder / f"opcode_{name}.bin"
        path.write_bytes(content if content[:1] == b"\x80" else b"\x80\x02" + content)
        yield path


def _in_tar(path: Path, content: Path) -> Path:
    with tarfile.open(path, "w") as archive:
        for name in ("sys_info", "pickle", "tensors", "storages"):
            archive.add(content, name)
    return path


def pickle_bombs(folder: Path) -> Iterator[Path]:
    """Weight files of a few kilobytes that run no code, and ask for gigabytes or for ever."""

    def saved(name: str, content: Any) -> Path:
        torch.save(content, folder / name)
        return folder / name

    yield saved("expanded.pt", {"a": torch.zeros(1).expand(10**12)})
    yield saved("sparse.pt", {"a": torch.sparse_coo_tensor(torch.tensor([[0]]), torch.tensor([1.0]), (10**12,))})
    yield saved("meta.pt", {"a": torch.empty(10**12, device="meta")})
    yield saved("bytearray.pt", {"a": torch.zeros(1), "b": Reduced(bytearray, 8 * 10**9)})
    yield saved("constructor.pt", {"a": Reduced(torch.FloatTensor, 2 * 10**9)})
    yield saved("hidden_methods.pt", HidesMethods())
    nested = folder / "hash.pt"
    nested.write_bytes(b"\x80\x02}" + b")q\x00" + b"h\x00h\x00\x86q\x00" * 60 + b"K\x01s.")
    yield nested
    deep = folder / "deep.pt"
    deep.write_bytes(b"\x80\x02})" + b"\x85" * 500_000 + b"K\x01s.")
    yield deep
    for name, inflated in (("data.pkl", "pickle_bomb.ckpt"), ("data/0", "storage_bomb.ckpt")):
        yield _compressed(folder / inflated, name)


def _compressed(path: Path, entry: str) -> Path:
    """A checkpoint in which one entry is a hundred megabytes of zeros, packed."""
    plain = io.BytesIO()
    torch.save({"a": torch.zeros(4)}, plain)
    with zipfile.ZipFile(plain) as source, zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as target:
        for info in source.infolist():
            with target.open(info.filename, "w") as file:
                file.write(source.read(info))
                if info.filename.endswith(entry):
                    for _ in range(100):
                        file.write(b"\0" * 2**20)
    return path


# -- safetensors


@cache
def headers() -> dict[str, tuple[bytes, int]]:
    """Headers that lie: name -> the whole header and the bytes of data after it."""
    one = {"dtype": "F32", "shape": [2], "data_offsets": [0, 8]}

    def entry(**changes: Any) -> bytes:
        return json.dumps({"a": {**one, **changes}}).encode()

    huge_number = "9" * 4000
    return {
        "negative_shape": (entry(shape=[-2]), 8), "negative_offsets": (entry(data_offsets=[-8, 0]), 8),
        "offsets_backwards": (entry(data_offsets=[8, 0]), 8),
        "offsets_beyond_the_file": (entry(data_offsets=[8, 16]), 8),
        "overlap": (json.dumps({"a": one, "b": {**one, "data_offsets": [4, 12]}}).encode(), 12),
        "same_place": (json.dumps({"a": one, "b": one}).encode(), 8),
        "gap": (json.dumps({"a": one, "b": {**one, "data_offsets": [12, 20]}}).encode(), 20),
        "bytes_left_over": (entry(), 16), "truncated": (entry(), 4), "huge_tensor": (entry(shape=[2**60]), 8),
        "product_overflows": (entry(shape=[2**32, 2**32]), 8),
        "empty_and_vast": (entry(shape=[0, 2**62], data_offsets=[0, 0]), 0),
        "vast_and_empty": (entry(shape=[2**40, 2**40, 0], data_offsets=[0, 0]), 0),
        "billion_without_data": (entry(shape=[10**9], data_offsets=[0, 0]), 0),
        "many_dimensions": (entry(shape=[1] * 5000, data_offsets=[0, 4]), 4),
        "numbers_of_4000_digits": (
            f'{{"a":{{"dtype":"F32","shape":[{huge_number},{huge_number}],"data_offsets":[0,8]}}}}'.encode(), 8,
        ),
        "number_of_5000_digits": (b'{"a":{"dtype":"F32","shape":[' + b"9" * 5000 + b'],"data_offsets":[0,8]}}', 8),
        "offsets_of_4000_digits": (
            f'{{"a":{{"dtype":"F32","shape":[2],"data_offsets":[{huge_number},{huge_number}1]}}}}'.encode(), 8,
        ),
        "duplicate_names": (b'{"a":' + json.dumps(one).encode() + b',"a":' + json.dumps(one).encode() + b"}", 8),
        "duplicate_fields": (b'{"a":{"dtype":"F32","dtype":"F32","shape":[2],"data_offsets":[0,8]}}', 8),
        "unknown_dtype": (entry(dtype="F4096"), 8), "dtype_is_a_list": (entry(dtype=["F32"]), 8),
        "wrong_dtype": (entry(dtype="I8"), 8), "deep": (b'{"a":' + b"[" * 100_000, 0),
        "deep_objects": (b'{"a":' * 100_000, 0), "nan": (entry(shape=float("nan")), 8),
        "infinity": (entry(more=float("inf")), 8), "metadata_not_text": (b'{"__metadata__":{"x":1}}', 0),
        "metadata_is_a_list": (b'{"__metadata__":["x"]}', 0),
        "lone_surrogate": (b'{"\\ud800":{"dtype":"F32","shape":[2],"data_offsets":[0,8]}}', 8),
        "lone_surrogate_in_metadata": (b'{"__metadata__":{"x":"\\udfff"}}', 0), "not_utf_8": (b'{"\xff\xfe":1}', 0),
        "list": (b"[1]", 0), "text": (b'"x"', 0), "nothing": (b"", 0),
        "long_name": (json.dumps({"n" * 100_000: one}).encode(), 8),
        "million_tensors": (b"{" + b",".join(b'"%d":{}' % number for number in range(300_000)) + b"}", 0),
    }


def write_header(path: Path, header: bytes, num_bytes: int, length: int | None = None) -> Path:
    """A safetensors file with this header; ``length`` is what the file says of the header's length."""
    path.write_bytes((len(header) if length is None else length).to_bytes(8, "little") + header)
    os.truncate(path, 8 + len(header) + num_bytes)
    return path


# -- pictures


def _chunk(kind: bytes, data: bytes) -> bytes:
    return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))


def _png(width: int, height: int, *more: bytes, colour: int = 2, pixels: bytes = b"") -> bytes:
    header = _chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, 8, colour, 0, 0, 0))
    return (
        b"\x89PNG\r\n\x1a\n"
        + header
        + b"".join(more)
        + _chunk(b"IDAT", zlib.compress(pixels, 9))
        + _chunk(b"IEND", b"")
    )


def _saved(kind: str, size: int = 8, **options: Any) -> bytearray:
    buffer = io.BytesIO()
    Image.new("RGB", (size, size)).save(buffer, kind, **options)
    return bytearray(buffer.getvalue())


def _patched(content: bytearray, after: bytes, skip: int, value: bytes) -> bytes:
    place = content.find(after) + len(after) + skip
    content[place : place + len(value)] = value
    return bytes(content)


@cache
def pictures() -> dict[str, bytes]:
    """Pictures of vast declared sizes, packed megabytes, other formats under a picture's name, and damaged ones."""
    packed = zlib.compress(b"\0" * 10**8, 9)
    animated = io.BytesIO()
    frames = [Image.new("RGB", (8, 8), colour) for colour in ("red", "blue")]
    frames[0].save(animated, "PNG", save_all=True, append_images=frames[1:])
    webp = _saved("WEBP", lossless=True)[12:]
    frame = b"ANMF" + struct.pack("<I", 16 + len(webp)) + bytes(6) + b"\x07\0\0" * 2 + b"\x0a\0\0\0" + bytes(webp)
    canvas = b"VP8X" + struct.pack("<I", 10) + b"\x02\0\0\0" + (16382).to_bytes(3, "little") * 2
    webp_bomb = b"WEBP" + canvas + b"ANIM" + struct.pack("<I", 6) + bytes(6) + frame * 2
    side = 13_377
    return {
        "png_declared.png": _png(2**31 - 1, 2**31 - 1), "png_ztxt.png": _png(8, 8, _chunk(b"zTXt", b"k\0\0" + packed)),
        "png_itxt.png": _png(8, 8, _chunk(b"iTXt", b"k\0\1\0\0\0" + packed)),
        "png_iccp.png": _png(8, 8, _chunk(b"iCCP", b"k\0\0" + packed)),
        "png_packed.png": _png(side, side, colour=0, pixels=bytes(side * (side + 1))),
        "gif_declared.gif": bytes(_saved("GIF")[:6]) + b"\xff\xff\xff\xff" + bytes(_saved("GIF")[10:]),
        "webp_declared.webp": b"RIFF" + struct.pack("<I", len(webp_bomb)) + webp_bomb,
        "tiff_declared.tif": _tiff(2**31 - 1, 2**31 - 1),
        "jpeg_declared.jpg": _patched(_saved("JPEG"), b"\xff\xc0", 3, b"\xff\xff\xff\xff"),
        "jpeg2000_declared.jp2": _patched(_saved("JPEG2000"), b"ihdr", 0, struct.pack(">II", 2**31 - 1, 2**31 - 1)),
        "ppm_declared.ppm": b"P6 999999999 999999999 255\n",
        "svg.png": b"<svg><script>1</script></svg>",
        "bmp_declared.bmp": b"BM"
        + struct.pack("<IHHI", 99, 0, 0, 54)
        + struct.pack("<IiiHHIIiiII", 40, 2**31 - 1, 2**31 - 1, 1, 24, *[0] * 6),
        "pdf.png": b"%PDF-1.4\n1 0 obj<</Type/Catalog/OpenAction<</S/JavaScript>>>>endobj",
        "html.jpg": b"<html><script>1</script>",
        "eps.png": b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 8 8\n%%EndComments\n(%pipe%touch x) (w) file\n",
        "truncated.png": bytes(_saved("PNG", 64))[:60], "truncated.jpg": bytes(_saved("JPEG", 64))[:300],
        "empty.png": b"", "animated_truncated.png": animated.getvalue()[:-30][:60],
        "pickle.png": b"\x80\x02cos\nsystem\n.",
    }


def _tiff(width: int, height: int) -> bytes:
    tags = (
        (256, 4, width), (257, 4, height), (258, 3, 8), (259, 3, 1), (262, 3, 1), (273, 4, 8), (277, 3, 1),
        (278, 4, height), (279, 4, 1),
    )
    listed = b"".join(struct.pack("<HHII", tag, kind, 1, value) for tag, kind, value in tags)
    return b"II*\0" + struct.pack("<IH", 8, len(tags)) + listed + bytes(4)


# -- metadata


@cache
def metadata_files() -> dict[str, bytes]:
    """Metadata that no reader may take in, by file name."""
    deep = b"[" * 100_000
    row = b'{"image": "a.png", "prompt": "x"}'
    return {
        "nul.csv": b"image,prompt\na.png,x\0y\n", "utf16.csv": "image,prompt\na.png,x\n".encode("utf-16"),
        "utf16.json": '[{"image": "a.png", "prompt": "x"}]'.encode("utf-16"),
        "mixed.csv": "image,prompt\na.png,é\n".encode("latin-1"),
        "mixed.jsonl": row + b"\n" + '{"image": "a.png", "prompt": "é"}'.encode("latin-1"),
        "caption_10mb.csv": b"image,prompt\na.png," + b"x" * 10**7,
        "caption_10mb.json": b'[{"image": "a.png", "prompt": "' + b"x" * 10**7 + b'"}]',
        "duplicate_header.csv": b"image,prompt,image\na.png,x,b.png\n",
        "duplicate_key.jsonl": b'{"image": "a.png", "image": "b.png"}\n', "too_few.csv": b"image,prompt\na.png\n",
        "too_many.csv": b"image,prompt\na.png,x,y\n", "quote.csv": b'image,prompt\na.png,"never closed\n',
        "columns.csv": b",".join(b"c%d" % number for number in range(200_000)) + b"\n", "deep.json": deep,
        "deep.jsonl": b'{"image": ' + deep, "deep_value.json": b'[{"image": ' + b"[" * 500 + b"]" * 500 + b"}]",
        "surrogate.json": b'[{"image": "a.png", "prompt": "\\ud800"}]',
        "nul_in_json.json": b'[{"image": "a\\u0000.png", "prompt": "x"}]',
        "digits.json": b'[{"image": ' + b"9" * 5000 + b"}]",
        "different_names.jsonl": b"\n".join(b'{"k%d": 1}' % number for number in range(5000)),
        "binary.csv": bytes(range(256)) * 10,
        "duplicate_names.json": b"[{" + b",".join(b'"a": 1' for _ in range(100_000)) + b"}]",
        "pickle.json": b"\x80\x02cos\nsystem\n.",
    }


FILE_NAMES = (
    "../secret.png", "sub/../../secret.png", "{outside}/secret.png", "link.png", "linked/secret.png", "/etc/passwd",
    "/dev/zero", "C:\\Users\\me\\secret.png", "c:/secret.png", "\\\\host\\share\\secret.png",
    "//host/share/secret.png", "\\/host\\share\\a.png", "a\0.png", "", "a" * 5000 + ".png", "a/" * 60_000 + "b.png",
    "file:///etc/passwd", "http://localhost/a.png", "pipe.png", "~/secret.png",
)
"""Names in metadata that lead out of the folder, to another machine, or nowhere."""


# -- configuration files


def yaml_files(marker: Path) -> dict[str, bytes]:
    """Configuration files that refer, compute, repeat or run something."""
    laughs = "a: &a [x, x, x, x, x, x, x, x, x, x]\n" + "".join(
        f"{chr(98 + level)}: &{chr(98 + level)} [{', '.join(['*' + chr(97 + level)] * 10)}]\n" for level in range(9)
    )
    return {
        "laughs": f"{laughs}lora_rank: *j\n".encode(),
        "apply": f"seed: !!python/object/apply:os.system ['touch {marker}']\n".encode(),
        "new": f"seed: !!python/object/new:os.mkdir ['{marker}']\n".encode(),
        "name": b"optimizer: !!python/name:os.system\n", "tag": b"seed: !mine 3\n", "twice": b"seed: 1\nseed: 2\n",
        "merge": b"<<: {seed: 1}\n", "binary": b"seed: !!binary AAAA\n", "nul": b'output_path: "a\\0b"\n',
        "not_text": b"\xff\xfe\x00", "deep": b"model_paths: " + b"[" * 100_000,
        "documents": b"---\nseed: 1\n---\nseed: 2\n", "digits": b"seed: " + b"9" * 5000 + b"\n",
        "date": b"seed: 2001-13-45\n",
        "large": b"# " + b"x" * 3 * 2**20,
        "list": b"- seed: 1\n", "unknown": b"sede: 1\n", "code": b"optimizer: evil_optimizer.Evil\n",
        "process": b"optimizer: subprocess.Popen\n", "directive": b"%TAG ! tag:yaml.org,2002:\n---\nseed: !int 1\n",
    }
