"""``diffsynth convert``: the same adapter in the names of another program."""

from __future__ import annotations

from pathlib import Path

from ..adapters.files import recognise_lora_file
from .lora_files import check_output, describe_lora, write_lora, write_table
from .lora_options import ConvertLoraConfig


def convert_lora(config: ConvertLoraConfig) -> Path:
    """Write a LoRA file in another format, and show what was read and written.

    Returns:
        The file written.
    Raises:
        UserError: the file is no LoRA of a known family, or the format cannot represent it.
    """
    source, output = Path(config.input), Path(config.output)
    check_output(output, [source], config.overwrite)
    read = recognise_lora_file(source, config.family)
    written, difference = write_lora(
        output, read.states, read.family, config.format, config.dtype, read.metadata,
        f"converted from {source.name} ({read.format})", keep_dtype=True)
    write_table("Converted", {
        "from": f"{source} ({read.format})", "to": f"{output} ({written.format})", "family": read.family.name,
        "modules": f"matched {read.num_matched} of {read.num_modules}, written {written.num_modules}",
        **describe_lora(written), "difference of the changes": f"{difference:.1e} of their norm",
    })
    return output
