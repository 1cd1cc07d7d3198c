"""``diffsynth check``: everything that is wrong or odd in a data set, before anything is trained on it."""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..config import CheckConfig
from ..core.data import UnifiedDataset
from ..core.data.findings import Finding, LintReport
from ..core.data.lint import lint_dataset
from ..core.data.lint_captions import TokenLimit, estimated_limit
from ..core.data.lint_html import write_contact_sheet
from ..core.data.metadata import METADATA_SUFFIXES
from ..core.errors import UserError

if TYPE_CHECKING:
    from ..diffusion.base_pipeline import BasePipeline

USUAL_TOKENS = 77
"""Tokens that the shortest of today's text encoders takes: the limit where no model is given."""
USUAL_FACTOR = 16
"""What height and width are multiples of, where no model is given."""
_EXAMPLES = 3


def check(config: CheckConfig) -> LintReport:
    """Look at a data set with the sizes and the tokenizers that it would be trained with.

    Raises:
        UserError: an option is wrong or a tokenizer cannot be found. What is wrong in the data set is in the report.
    """
    from ..diffusion.progress import progress_bar

    pipe = _pipeline(config)
    try:
        dataset = _dataset(config, pipe)
    except UserError as error:
        return LintReport(config.dataset_base_path, findings=[Finding("unusable data set", "error", str(error))])
    with progress_bar(enabled=True, to_stderr=True) as bar:
        shown = bar.add_task("checking", total=None, loss="")
        return lint_dataset(
            dataset, limits=_token_limits(pipe, config.max_sequence_length), required=config.extra_inputs,
            with_pictures=config.html is not None, num_threads=config.num_workers,
            progress=lambda done, total: bar.update(shown, completed=done, total=total),
        )


def report(config: CheckConfig) -> None:
    """Check, and write what was asked for.

    Raises:
        UserError: training would refuse the data set; the report has been written.
    """
    found = check(config)
    if config.as_json:
        sys.stdout.write(json.dumps(found.as_json(), indent=2, ensure_ascii=True) + "\n")
    else:
        write_tables(found)
    if config.html is not None:
        write_contact_sheet(found, Path(config.html))
    if found.is_refused:
        raise UserError(_summary(found))


def _pipeline(config: CheckConfig) -> BasePipeline | None:
    """The pipeline with its tokenizers and none of its networks; None when no model is given."""
    from .run import choose_family, inspect_configs, load_pipeline_class, model_configs, tokenizer_configs

    if config.model_paths or config.model_id_with_origin_paths:
        files = model_configs(config)
        family = choose_family(config.family, inspect_configs(files))
        return load_pipeline_class(family).from_pretrained(
            model_configs=files, deferred=[component.name for component in family.components],
            **tokenizer_configs(family, config.tokenizer_path))
    if config.tokenizer_path is None:
        if config.family is not None:
            raise UserError("--family says nothing without the files of a model; add --model_paths or "
                            "--tokenizer_path.")
        return None
    from ..models.tokenizers import load_tokenizer

    family = choose_family(config.family, ())
    pipe = load_pipeline_class(family)()
    for name, (class_path, folder) in family.tokenizers.items():
        explicit = tokenizer_configs(family, config.tokenizer_path)[f"{name}_config"]
        setattr(pipe, name, load_tokenizer(class_path, folder, explicit, (), family))
    pipe.components_loaded()
    return pipe


def _dataset(config: CheckConfig, pipe: BasePipeline | None) -> UnifiedDataset:
    base, metadata = Path(config.dataset_base_path), config.dataset_metadata_path
    if metadata is None and base.is_file() and base.suffix.lower() in METADATA_SUFFIXES:
        base, metadata = base.parent, str(base)
    operator = UnifiedDataset.default_image_operator(
        base, config.max_pixels, config.height, config.width,
        pipe.height_division_factor if pipe else USUAL_FACTOR, pipe.width_division_factor if pipe else USUAL_FACTOR,
    )
    return UnifiedDataset(base, metadata, 1, config.data_file_keys, operator)


def _token_limits(pipe: BasePipeline | None, max_sequence_length: int | None) -> list[TokenLimit]:
    if pipe is None:
        return [estimated_limit(max_sequence_length or USUAL_TOKENS)]
    return [TokenLimit(name, limit, partial(_measure, getattr(pipe, name), limit))
            for name, limit in pipe.token_limits(max_sequence_length).items()]


def _measure(tokenizer: Any, limit: int, captions: Sequence[str]) -> list[tuple[int, str]]:
    """Tokens of each caption, and the text of those beyond the limit."""
    measured = []
    for tokens in tokenizer(list(captions), verbose=False).input_ids:
        # the last token that is seen marks the end
        cut = tokenizer.decode(tokens[limit - 1 :], skip_special_tokens=True) if len(tokens) > limit else ""
        measured.append((len(tokens), cut))
    return measured


def write_tables(found: LintReport) -> None:
    """Show a report on stdout."""
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    console = Console(markup=False)
    console.print(Text(f"{printable(found.dataset)}: {found.num_rows} rows, {found.num_pictures} pictures"),
                  soft_wrap=True)
    if found.buckets:
        sizes = Table(title="Sizes as trained", title_justify="left")
        sizes.add_column("width x height")
        sizes.add_column("rows", justify="right")
        for size, count in list(found.buckets.items())[:20]:
            sizes.add_row(size, str(count))
        if len(found.buckets) > 20:
            sizes.add_row(f"and {len(found.buckets) - 20} more", "")
        console.print(sizes)
    kinds: dict[tuple[str, str], list[Finding]] = {}
    for finding in found.findings:
        kinds.setdefault((finding.severity, finding.kind), []).append(finding)
    if kinds:
        table = Table(title="Found", title_justify="left")
        for heading in ("", "problem", "count", "where"):
            table.add_column(heading, justify="right" if heading == "count" else "left", overflow="fold")
        for (severity, kind), listed in kinds.items():
            examples = "\n".join(_one_line(finding) for finding in listed[:_EXAMPLES])
            more = f"\nand {len(listed) - _EXAMPLES} more" if len(listed) > _EXAMPLES else ""
            table.add_row(Text(severity, style=_STYLES[severity]), kind, str(len(listed)), Text(examples + more))
        console.print(table)
    if not found.is_refused:
        console.print(Text(_summary(found)), soft_wrap=True)


_STYLES = {"error": "bold red", "warning": "yellow", "note": "dim"}


def _one_line(finding: Finding) -> str:
    rows = f"row{'s' if len(finding.rows) > 1 else ''} {', '.join(map(str, finding.rows[:5]))}"
    dots = ", ..." if len(finding.rows) > 5 else ""
    return printable(f"{rows}{dots}: {finding.message}" if finding.rows else finding.message)


def _summary(found: LintReport) -> str:
    lengths = f" Length of captions: by {', '.join(found.measured_by)}." if found.measured_by else ""
    warnings = f"{found.num_rows_with('warning')} rows with warnings"
    if found.is_refused:
        skip = " --on_bad_item skip leaves such rows out." if found.num_rows_with("error") else ""
        return (f"training would refuse this data set: {found.num_rows_with('error')} rows with errors, {warnings}."
                f"{skip}{lengths}")
    return f"Training would take all {found.num_rows} rows; {warnings}.{lengths}"


def printable(text: str) -> str:
    """A text without characters that could move the cursor or colour the terminal."""
    return "".join(letter if letter.isprintable() or letter == " " else repr(letter)[1:-1] for letter in text)
