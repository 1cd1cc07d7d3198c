"""What foreign bytes are fed to: each target reads one input, and only a ``UserError`` may come out of it.

Used by ``tests/contract/test_safety.py`` (the checked-in inputs and a few thousand mutations of them) and by
``benchmarks/fuzz.py`` (millions, guided by coverage where ``atheris`` is installed).
"""

from __future__ import annotations

import json
import logging
import os
import random
import tempfile
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any, TypeVar

import torch

from diffsynth.adapters.reading import from_tensors
from diffsynth.config import TrainConfig
from diffsynth.core.data.metadata import read_metadata
from diffsynth.core.errors import UserError
from diffsynth.core.loader import WeightReader
from diffsynth.core.loader.header import DTYPES, parse_header
from diffsynth.core.loader.reader import TensorInfo
from diffsynth.core.options import read_yaml
from diffsynth.models.recognition import assign_weights, find_components
from diffsynth.models.registry import all_component_specs, all_families

T = TypeVar("T")
DATA = Path(__file__).parent / "data"
CORPUS = DATA / "fuzz"
SIZES = (0, 1, 2, 3, 4, 6, 8, 16, 24, 64, 127, 128, 1000, 2**31, 2**48, 2**63)
MAX_DATA = 2**16


class Choices:
    """Decisions drawn from the bytes of an input; when they are used up, always the first."""

    def __init__(self, data: bytes) -> None:
        self.data, self.position = data, 0

    def below(self, count: int) -> int:
        if self.position >= len(self.data):
            return 0
        self.position += 1
        return self.data[self.position - 1] % count

    def pick(self, options: Sequence[T]) -> T:
        return options[
            self.below(len(options)) if len(options) < 256 else (self.below(256) << 8 | self.below(256)) % len(options)
        ]

    def take(self, count: int) -> bytes:
        self.position += count
        return self.data[self.position - count : self.position]

    def text(self) -> str:
        return self.take(self.below(40)).decode("utf-8", "replace")

    def rest(self) -> bytes:
        return self.data[self.position :]


@cache
def scratch() -> Path:
    """A folder in memory where there is one; each process its own."""
    base = "/dev/shm" if os.access("/dev/shm", os.W_OK) else None
    return Path(tempfile.mkdtemp(prefix="diffsynth-fuzz-", dir=base))


def write(name: str, content: bytes, size: int | None = None) -> Path:
    path = scratch() / name
    path.write_bytes(content)
    if size is not None:
        os.truncate(path, size)
    return path


# -- weight files: the header, then what is in it


def header(data: bytes) -> None:
    """A weight file of any bytes, one with any header, or one whose header is nearly right."""
    choices = Choices(data)
    kind = choices.below(8)
    if kind == 0:
        _read_file(write("weights.bin", choices.rest()))
        return
    if kind % 2:
        num_bytes = choices.below(256)
        raw = choices.rest()
    else:
        raw, num_bytes = _nearly_right(choices)
    path, size = Path("weights.safetensors"), 8 + len(raw) + num_bytes
    entries, described = parse_header(path, raw, size)
    if kind < 4:
        _read_file(write(path.name, len(raw).to_bytes(8, "little") + raw, size))
    _recognise(HeaderAlone({key: TensorInfo(entry.shape, entry.dtype) for key, entry in entries.items()}, described))


@dataclass(frozen=True)
class HeaderAlone:
    """A reader of a file of which only the header is there, which is all that recognition looks at."""

    tensors: dict[str, TensorInfo]
    metadata: dict[str, str]
    paths: tuple[Path, ...] = (Path("weights.safetensors"),)

    def describe(self) -> str:
        return str(self.paths[0])


def _read_file(path: Path) -> None:
    with WeightReader(path) as reader:
        for key in list(reader.tensors)[:3]:
            reader.get(key)
        reader.fingerprint()
        _recognise(reader)


def _recognise(reader: Any) -> None:
    found = find_components(reader, all_component_specs())
    assign_weights(reader.tensors, found, [part.expected_names() if part.spec.our_names else [] for part in found])


@cache
def _signatures() -> list[tuple[str, dict[str, Any]]]:
    return [
        (prefix, dict(layout.signature))
        for spec in all_component_specs()
        for layout in spec.layouts
        for prefix in layout.prefixes
    ]


@cache
def _real_names() -> list[str]:
    files = sorted((DATA / "real_keys").glob("*.json"))
    return [key for file in files for key in json.loads(file.read_text(encoding="utf-8"))["keys"]]


def _nearly_right(choices: Choices) -> tuple[bytes, int]:
    prefix, signature = choices.pick(_signatures())
    names = {prefix + key: shape for key, shape in signature.items()}
    for _ in range(choices.below(6)):
        names[prefix + _mutated(choices, choices.pick(_real_names()))] = None
    for _ in range(choices.below(3)):
        names.pop(choices.pick(list(names)), None)
    described: dict[str, Any] = {}
    position = 0
    for name, asked in names.items():
        shape = [
            size if size is not None else choices.pick(SIZES[:12]) for size in (asked or [None] * choices.below(5))
        ]
        dtype = choices.pick(list(DTYPES))
        num_bytes = DTYPES[dtype].itemsize
        for size in shape:
            num_bytes *= size
        end = position + min(num_bytes, MAX_DATA)
        described[name] = {"dtype": dtype, "shape": shape, "data_offsets": [position, end]}
        position = end
    _spoil(choices, described)
    if choices.below(2):
        described["__metadata__"] = {
            "config": json.dumps({choices.pick(_CONFIG_NAMES): choices.pick(_VALUES) for _ in range(choices.below(5))}),
            "x": choices.text(),
        }
    return json.dumps(described).encode(), position


_CONFIG_NAMES = (
    "num_layers", "hidden_size", "num_hidden_layers", "vocab_size", "block_out_channels", "layers_per_block",
    "guidance_embeds", "_class_name", "architectures", "in_channels", "attention_head_dim", "axes_dims_rope",
    "num_single_layers", "down_block_types", "latent_channels", "use_quant_conv", "num_heads", "attn_implementation",
    "num_labels", "auto_map", "mid_block_add_attention", "hidden_act",
)
_VALUES: tuple[Any, ...] = (
    0, 1, -1, 2, 3, 10**6, 10**9, 10**30, 0.5, float("nan"), float("inf"), True, False, None, "", "x",
    "FluxTransformer2DModel", [], [1], [1, 2, 3, 4], [[[[]]]], {}, {"a": 1}, "a/b", [10**9] * 4, "AutoencoderKL",
    "T5EncoderModel", [None],
)


def _mutated(choices: Choices, name: str) -> str:
    parts = name.split(".")
    place = choices.below(len(parts))
    replacement = (
        "", parts[place], "0", "7", "99999999999999999999", "\u00b2", "\u0663", "weight", choices.text(), "*", "{i}",
        "-1",
    )
    parts[place] = choices.pick(replacement)
    return ".".join(parts)


def _spoil(choices: Choices, described: dict[str, Any]) -> None:
    for _ in range(choices.below(3)):
        name = choices.pick(list(described) or [""])
        if name not in described:
            continue
        field = choices.pick(("dtype", "shape", "data_offsets", "more"))
        described[name][field] = choices.pick(
            (*_VALUES, [choices.pick(SIZES)], [choices.pick(SIZES), choices.pick(SIZES)], "F32", "F4", [0] * 40)
        )


# -- metadata of data sets


def metadata(data: bytes) -> None:
    """A csv, json or jsonl file of any bytes."""
    choices = Choices(data)
    suffix = choices.pick(("csv", "json", "jsonl"))
    table = read_metadata(None, write(f"metadata.{suffix}", choices.rest()))
    for index in (0, table.num_rows // 2, table.num_rows - 1):
        table.row(index)
    for column in table.columns.values():
        json.dumps(list(column[:3]), default=str).encode()


# -- LoRA files


def lora_keys(data: bytes) -> None:
    """Tensors of any names, shapes and dtypes, with metadata, as every known family reads them."""
    choices = Choices(data)
    family = choices.pick(all_families())
    tensors: dict[str, torch.Tensor] = {}
    rank = choices.pick((1, 2, 3, 4, 0))
    for _ in range(1 + choices.below(5)):
        module = choices.pick(_modules())
        if choices.below(8) == 1:
            module = _mutated(choices, module)
        for suffix in choices.pick(_SUFFIXES[:3] if choices.below(4) else _SUFFIXES):
            tensors[module + suffix] = _factor(choices, suffix, rank)
    if choices.below(8) == 1:
        tensors[choices.text() + choices.pick(("", ".alpha", ".lora_A.weight", ".diff_b"))] = torch.zeros(1)
    described = {} if choices.below(4) else {"lora_adapter_metadata": _peft(choices)}
    allow = bool(choices.below(2))
    read = from_tensors(tensors, tensors.__getitem__, {**described, "x": choices.text()}, family, allow)
    read.format(family)


_SUFFIXES = (
    (".lora_A.weight", ".lora_B.weight"), (".lora_down.weight", ".lora_up.weight", ".alpha"),
    (".lora_A.default.weight", ".lora_B.default.weight"), (".lora_A.weight",), (".alpha",), (".lora_up.weight",),
    (".lora_A.weight", ".lora_B.weight", ".lora_magnitude_vector"),
    (".lora_A.weight", ".lora_B.weight", ".dora_scale"), (".hada_w1_a",),
    (".lora_down.weight", ".lora_up.weight", ".lora_mid.weight"), ("_lora.down.weight", "_lora.up.weight"),
)
_FACTOR_DTYPES = (
    torch.float32, torch.bfloat16, torch.float16, torch.float64, torch.float8_e4m3fn, torch.int8, torch.bool,
    torch.complex64, torch.uint8, torch.float8_e5m2,
)


@cache
def _modules() -> list[str]:
    names: list[str] = []
    for file in sorted((DATA / "lora_keys").glob("*.json")):
        modules = json.loads(file.read_text(encoding="utf-8")).get("modules", {})
        names += list(modules)[:: max(1, len(modules) // 60)]
    return names


def _factor(choices: Choices, suffix: str, rank: int) -> torch.Tensor:
    dtype = choices.pick(_FACTOR_DTYPES) if choices.below(8) == 1 else torch.float32
    if choices.below(16) == 15:
        shape: tuple[int, ...] = tuple(choices.pick(SIZES[:8]) for _ in range(choices.below(5)))
    elif "alpha" in suffix or "magnitude" in suffix or "scale" in suffix:
        shape = choices.pick(((), (), (), (1,), (12,), (2, 2), (0,)))
    else:
        size = choices.pick((21, 21, 21, 21, 12, 1, 7, 0))
        shape = (rank, size) if "A" in suffix or "down" in suffix else (size, rank)
        shape = (*shape, *choices.pick(((), (), (), (), (), (), (1, 1), (3, 3))))
    value = choices.pick((1.0, 1.0, 1.0, 3.5, 0.0, -1.0, float("nan"), float("inf")))
    return torch.full(shape, value if dtype.is_floating_point or dtype.is_complex else 1, dtype=torch.float32).to(dtype)


def _peft(choices: Choices) -> str:
    if choices.below(16) == 15:
        return choices.text()
    pattern = choices.pick(
        (
            "^transformer_blocks.0.attn.to_q", ".*", "(a+)+$", "((((", "a{99999999999}", "[", choices.text(),
            "x" * 2000, "(" * 900 + ")" * 900, r"\1", "(?P<a>",
        )
    )
    values: dict[str, Any] = {}
    for prefix in choices.pick((("transformer.",), ("",), ("transformer.", "text_encoder."))):
        for key in ("r", "lora_alpha", "alpha_pattern", "rank_pattern", "use_rslora"):
            if choices.below(5):
                values[prefix + key] = (
                    {pattern: choices.pick(_VALUES)}
                    if "pattern" in key and choices.below(5)
                    else (choices.pick(_VALUES))
                )
    return json.dumps(values)


# -- options


def options(data: bytes) -> None:
    """A configuration file of any text, or the text of any option."""
    choices = Choices(data)
    kind = choices.below(4)
    if kind == 2:
        lines = [
            f"{choices.pick(list(TrainConfig.model_fields))}: {choices.pick(_WORDS) or choices.text()}"
            for _ in range(choices.below(5))
        ]
        values, _ = read_yaml(write("run.yaml", "\n".join(lines).encode()), TrainConfig)
        TrainConfig(**values)
        return
    if kind % 2:
        values, _ = read_yaml(write("run.yaml", choices.rest()), TrainConfig)
        resolved = TrainConfig(**values)
        if len(data) % 16 == 0:  # ten times the work of reading
            resolved.resolved_yaml()
        return
    name = choices.pick(list(TrainConfig.model_fields))
    if choices.below(2):
        name = choices.pick(("model_paths", "optimizer_args", "fp8_models", "lora_target_modules"))
    value: Any = (
        choices.rest().decode("utf-8", "surrogatepass" if choices.below(2) else "replace")
        if choices.below(8)
        else choices.pick(_VALUES)
    )
    TrainConfig(**{name: value})


_WORDS = (
    "", "1", "-1", "0", "2", "8", "0.5", "1e-4", "1e400", ".nan", ".inf", "true", "no", "off", "null", "~", "[a, b]",
    "[]", "{a: 1}", "'x'", '"\\0"', "a,b", "auto", "never", "fp16", "AdamW", "dit", "os.system", "[[a], b]", "9" * 30,
    "2001-01-01", "0x10", "1:2:3", "|\n  a",
)

TARGETS: dict[str, Callable[[bytes], None]] = {
    "header": header, "metadata": metadata, "lora_keys": lora_keys, "options": options,
}


def run_one(target: str, data: bytes) -> bool:
    """Feed one input to a target; returns whether it was accepted. Anything but a ``UserError`` comes out as it is."""
    try:
        TARGETS[target](data)
    except UserError as error:
        assert str(error).strip(), "an error without a word"  # noqa: PT017
        return False
    except UnicodeDecodeError as error:
        if error.object in data:  # of the harness: not every input is text
            return False
        raise
    return True


def quiet() -> None:
    """What the readers log would cost more than the reading."""
    logging.disable(logging.WARNING)
    warnings.simplefilter("ignore")


def corpus(target: str) -> list[bytes]:
    """The checked-in inputs of a target; in the file, a character stands for a byte."""
    inputs = json.loads((CORPUS / f"{target}.json").read_text(encoding="utf-8"))
    return [text.encode("latin-1") for text in inputs]


def add_to_corpus(target: str, found: Sequence[bytes], most: int = 16_000) -> int:
    """Keep the shortest inputs of the corpus and of what was found; returns how many bytes they have together."""
    chosen: list[bytes] = []
    for data in sorted({*corpus(target), *found}, key=lambda data: (len(data), data)):
        if sum(map(len, chosen)) + len(data) <= most:
            chosen.append(data)
    text = json.dumps([data.decode("latin-1") for data in chosen], indent=0)
    (CORPUS / f"{target}.json").write_text(text + "\n", encoding="utf-8")
    return sum(map(len, chosen))


TOKENS = (
    b'{"a":{"dtype":"F32","shape":[2],"data_offsets":[0,8]}}', b'"__metadata__"', b'"shape":[', b"[", b"]", b"{", b"}",
    b'"', b",", b":", b"\n", b"\r\n", b"\0", b"\xff\xfe", b"\xef\xbb\xbf", b"image,prompt\n",
    b'{"image":"a.png","prompt":"x"}', b"../", b"\\\\h\\s", b"C:\\", b"NaN", b"Infinity", b"-0", b"1e999",
    b"99999999999999999999", b"null", b"true", b"\\ud800", b"\xed\xa0\x80", b"&a ", b"*a",
    b"!!python/object:os.system", b"---\n", b"%YAML 1.1\n", b"lora_rank: ", b"- ", b"? ", b"| \n", b"lora_A.weight",
    b".alpha", b"PK\x03\x04", b"\x80\x02", b"cos\nsystem\n", b"R.", b"=cmd|' /C calc'!A0", b"9" * 5000, b"[" * 300,
    b'{"a":' * 500, b"a" * 1000,
)
MAX_INPUT = 1 << 14


def mutate(data: bytes, other: bytes, draw: random.Random) -> bytes:
    """A few random changes: bytes flipped, cut, repeated, spliced with another input, or replaced by telling tokens."""
    buffer = bytearray(data)
    for _ in range(1 + draw.randrange(4)):
        place = draw.randrange(len(buffer) + 1)
        length = draw.randrange(1, 9)
        kind = draw.randrange(8)
        if kind == 0 and buffer:
            buffer[place % len(buffer)] ^= 1 << draw.randrange(8)
        elif kind == 1 and buffer:
            buffer[place % len(buffer)] = draw.randrange(256)
        elif kind == 2:
            del buffer[place : place + length]
        elif kind == 3:
            buffer[place:place] = buffer[place : place + length] * draw.randrange(1, 4)
        elif kind == 4:
            start = draw.randrange(len(other) + 1)
            buffer[place : place + length] = other[start : start + draw.randrange(1, 64)]
        elif kind == 5:
            buffer[place:place] = draw.choice(TOKENS)
        elif kind == 6:
            buffer[place : place + length] = draw.choice(TOKENS)
        else:
            buffer[place:place] = draw.randbytes(length)
    return bytes(buffer[:MAX_INPUT])
