"""``torch.save`` files: looked through before they are opened, and read by torch's restricted unpickler alone.

The restricted unpickler runs no code, but it still allocates what a file asks for, follows structures that grow
exponentially, and builds tensors without content. So the opcodes are read first (reading them executes nothing), and
afterwards no tensor may be larger than the file that it is said to come from.
"""

from __future__ import annotations

import pickle
import pickletools
import re
import struct
import zipfile
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, BinaryIO

import torch

from ..device import is_cpu
from ..errors import UserError
from .header import DTYPE_NAMES, MAX_ELEMENTS, MAX_TENSORS

WRAPPERS = ("state_dict", "model_state", "module", "ema", "model", "params_ema", "params")
_ZIP_START = b"PK\x03\x04"
_ALLOWED = re.compile(
    r"collections (OrderedDict|Counter)|_codecs encode|(__builtin__|builtins) set|"
    r"torch\._utils _rebuild_(tensor(_v[23])?|parameter)|"
    r"torch(\.storage)? (\w+Storage|Size|device|b?float\d+(_\w+)?|u?int\d+|bool|complex\d+)"
)
_TUPLES = ("TUPLE", "TUPLE1", "TUPLE2", "TUPLE3", "EMPTY_TUPLE")
_PUTS, _GETS = ("PUT", "BINPUT", "LONG_BINPUT"), ("GET", "BINGET", "LONG_BINGET")
_CALLS = ("STACK_GLOBAL", "INST", "OBJ", "EXT1", "EXT2", "EXT4", "NEWOBJ_EX", "DUP")
_MARK = -1
_MAX_DEPTH = 20
_READ_ERRORS = (RuntimeError, EOFError, ValueError, OSError, KeyError, AttributeError, IndexError, TypeError,
                AssertionError, ArithmeticError, MemoryError, struct.error, zipfile.BadZipFile)


def read_checkpoint(path: Path) -> dict[str, torch.Tensor]:
    """The state dict in a ``torch.save`` file.

    Raises:
        UserError: the file is damaged, holds no state dict, asks for more memory than it has bytes, or could run code.
    """
    tensors = _state_dict(path, _load(path))
    _check_tensors(path, tensors)
    return tensors


def _load(path: Path) -> Any:
    try:
        with path.open("rb") as file:
            is_zip = file.read(4) == _ZIP_START
            file.seek(0)
            for stream in [_pickle_in_zip(path)] if is_zip else [file] * 5:
                _check_opcodes(path, stream)
            file.seek(0)
            if not is_zip or path.suffix == ".safetensors":  # torch would go by the name of a path
                return torch.load(file, map_location="cpu", weights_only=True)
        return torch.load(path, map_location="cpu", weights_only=True, mmap=True)
    except pickle.UnpicklingError as error:
        damaged = " or is damaged" if "Unsupported operand" in str(error) else ""
        raise _runs_code(path, damaged) from error
    except UserError:
        raise
    except _READ_ERRORS as error:
        raise UserError(f"{path} is no readable PyTorch checkpoint, perhaps truncated ({_first_line(error)}); "
                        "download it again.") from error


def _runs_code(path: Path, more: str = "") -> UserError:
    return UserError(f"{path} is a pickle that holds more than tensors and could run code when opened{more}, so it was "
                     "refused; use a safetensors file of this model.")


def _first_line(error: BaseException) -> str:
    return str(error).strip().split("\n", 1)[0][:160]


def _pickle_in_zip(path: Path) -> BinaryIO:
    with zipfile.ZipFile(path) as archive:
        entries = archive.infolist()
        names = {entry.filename for entry in entries}
        # torch stores its entries as they are; what is compressed may grow a thousandfold
        if any(entry.compress_type or entry.file_size != entry.compress_size for entry in entries):
            raise UserError(f"{path} is a compressed archive or a TorchScript program and no state dict; it was "
                            "refused.")
        if len(names) != len(entries) or len(entries) > MAX_TENSORS:
            raise UserError(f"{path} is an archive with names that occur twice or more files than a model has; it was "
                            "refused.")
        found = [entry for entry in entries if entry.filename.endswith("/data.pkl")]
        if len(found) != 1:
            raise UserError(f"{path} is a zip archive without a PyTorch checkpoint in it.")
        return archive.open(found[0])  # type: ignore[return-value]


def _check_opcodes(path: Path, stream: BinaryIO) -> None:
    """Refuse what is no part of a state dict, and tuples in tuples in tuples: the hash of one takes for ever, or more
    of the C stack than there is."""
    stack: list[int] = []  # how deep in tuples each object is
    memo: dict[Any, int] = {}
    try:
        for opcode, argument, _ in pickletools.genops(stream):
            if opcode.name in _CALLS or (opcode.name == "GLOBAL" and not _ALLOWED.fullmatch(str(argument))):
                raise _runs_code(path)
            if opcode.name in _PUTS:
                memo[argument] = stack[-1]
            elif opcode.name in _GETS:
                stack.append(memo[argument])
            elif opcode.name == "MARK":
                stack.append(_MARK)
            else:
                depth = _pop(stack, opcode) + (opcode.name in _TUPLES)
                if depth > _MAX_DEPTH:
                    raise UserError(f"{path} is a pickle of tuples nested without end; it was refused.")
                keeps = opcode.name in _TUPLES or opcode.name == "REDUCE"
                stack += [depth if keeps else 0] * len(opcode.stack_after)
    except UserError:
        raise
    except (ValueError, IndexError, KeyError) as error:
        raise _runs_code(path, " or is damaged") from error


def _pop(stack: list[int], opcode: pickletools.OpcodeInfo) -> int:
    """Take from the stack what an opcode takes; returns the greatest depth among it."""
    depth, wanted = 0, len(opcode.stack_before)
    if pickletools.markobject in opcode.stack_before:
        while (found := stack.pop()) != _MARK:
            depth = max(depth, found)
        wanted -= 2
    for _ in range(wanted):
        depth = max(depth, stack.pop())
    return depth


def _state_dict(path: Path, content: Any) -> dict[str, torch.Tensor]:
    """The state dict inside a checkpoint: its tensors, or those of the wrapper that holds them."""
    for _ in range(3):
        if not isinstance(content, dict):
            break
        # the class's own methods: a pickle may put attributes of these names on the object
        items: dict[Any, Any] = dict(dict.items(content))
        wrapper = next((key for key in WRAPPERS if isinstance(items.get(key), Mapping)), None)
        if wrapper is None:
            tensors = {key: value for key, value in items.items() if isinstance(value, torch.Tensor)}
            if tensors and all(isinstance(key, str) for key in tensors):
                return tensors
            break
        content = items[wrapper]
    raise UserError(f"{path} is a PyTorch file without a dictionary of tensors; expected a state dict.")


def _check_tensors(path: Path, tensors: Mapping[str, torch.Tensor]) -> None:
    for key, value in tensors.items():
        plain = value.layout == torch.strided and is_cpu(value.device) and not value.is_nested
        if not plain or value.dtype not in DTYPE_NAMES or value.is_conj() or value.is_neg():
            raise UserError(f"{path} stores {key!r} as a tensor of a special kind, which cannot be read; use a "
                            "safetensors file of this model.")
        if value.numel() > MAX_ELEMENTS or value.numel() * value.itemsize > value.untyped_storage().nbytes():
            raise UserError(f"{path} says that {key!r} has {value.numel()} elements and does not hold them; it was "
                            "refused.")
    size = path.stat().st_size
    claimed = sum(_storages(tensors.values()).values())
    if claimed > size:
        raise UserError(f"{path} claims {claimed} bytes of tensors and has {size}; it was refused.")


def _storages(tensors: Iterable[torch.Tensor]) -> dict[int, int]:
    """Bytes of every storage that tensors lie in, by address."""
    storages = [tensor.untyped_storage() for tensor in tensors]
    return {storage.data_ptr(): storage.nbytes() for storage in storages}
