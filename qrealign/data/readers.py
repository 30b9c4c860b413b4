"""Rows of a data file or of a data set on the Hub, before anyone asks what the fields mean."""

from __future__ import annotations

import csv
import gzip
import io
import json
import os
import re
import zlib
from pathlib import Path
from typing import Any
from urllib.parse import unquote

from qrealign.errors import DataError

Row = dict[str, Any]

FORMATS = (".json", ".jsonl", ".ndjson", ".csv", ".tsv", ".txt")
_HUB_ID = re.compile(r"[\w][\w.-]*/[\w][\w.-]*(?::[\w.-]+)?")
_TOO_MUCH = "it holds a number of thousands of digits, or brackets nested too deep: take that out"
_LIST_KEYS = ("data", "rows", "prompts", "examples", "train", "test")


def split_spec(spec: str) -> tuple[str, dict[str, list[str]]]:
    """Split `location?field=value[,value]&field2=value` into the location and its filter.

    A value may carry percent escapes (`%2C` for a comma). A path that exists as it stands has no filter.

    Raises:
        DataError: the part after `?` is not a list of `field=value`.
    """
    if "?" not in spec or os.path.exists(spec):
        return spec, {}
    location, _, query = spec.partition("?")
    conditions: dict[str, list[str]] = {}
    for part in query.split("&"):
        field, equals, values = part.partition("=")
        if not (field and equals and values):
            raise DataError(f"the filter of {spec!r} must look like ?field=value,value&field2=value, got {part!r}")
        conditions[unquote(field)] = [unquote(value) for value in values.split(",")]
    return location, conditions


def filter_rows(rows: list[Row], conditions: dict[str, list[str]], location: str) -> list[Row]:
    """Keep the rows that meet every condition.

    Case does not count, and a `source` also matches by its first part: `star1` takes `star1/train` and `star1:train`.

    Raises:
        DataError: no row has the field, or no row is left.
    """
    for field, values in conditions.items():
        if not any(field in row for row in rows):
            raise DataError(f"{location} has no field {field!r} to filter by; its fields are {_field_names(rows)}")
        wanted = {value.casefold() for value in values}
        kept = [row for row in rows if _matches(row.get(field), wanted, by_prefix=field == "source")]
        if not kept:
            seen = sorted({str(row.get(field)) for row in rows})[:12]
            raise DataError(f"{location} has no row with {field} = {' or '.join(values)}; it holds {', '.join(seen)}")
        rows = kept
    return rows


def _matches(value: Any, wanted: set[str], *, by_prefix: bool) -> bool:
    text = str(value).casefold()
    return text in wanted or (by_prefix and re.split("[/:]", text, maxsplit=1)[0] in wanted)


def _field_names(rows: list[Row]) -> str:
    return ", ".join(sorted({str(name) for row in rows[:100] for name in row})) or "none"


def read_rows(location: str, *, paragraphs: bool = False) -> list[Row]:
    """Read all rows of a file (`.json`, `.jsonl`, `.csv`, `.tsv`, `.txt`, each also `.gz`) or of a Hub id.

    A Hub id is `owner/name` or `owner/name:configuration`; its rows get a `split` field. Plain strings become rows with
    one field `prompt`. A text file gives a row per line, or per block between blank lines with `paragraphs`.

    Raises:
        DataError: missing, empty, unreadable or malformed, or a format that is not known.
    """
    path = Path(location).expanduser()
    if not os.path.exists(path):  # Path.exists() raises where a name is too long or a folder is closed
        if _HUB_ID.fullmatch(location) and not _bare_name(path).endswith(FORMATS):
            return _read_hub(location)
        raise DataError(
            f"there is no data file {location}: give the path of an existing file, or a Hub id such as owner/name"
        )
    if path.is_dir():
        raise DataError(f"{location} is a folder: give one data file ({', '.join(FORMATS)}, each also as .gz)")
    suffix = Path(_bare_name(path)).suffix
    if suffix not in FORMATS:
        raise DataError(f"{location} has an unknown format: use {', '.join(FORMATS)}, each also as .gz")
    text = _read_text(path)
    if not text.strip():
        raise DataError(f"{location} is empty: it must hold at least one prompt")
    rows = _parse(text, suffix, location, paragraphs)
    if not rows:
        raise DataError(f"{location} holds no rows: it must hold at least one prompt")
    return rows


def _bare_name(path: Path) -> str:
    """Return the file name in lower case without `.gz`."""
    return path.name.lower().removesuffix(".gz")


def _read_text(path: Path) -> str:
    try:
        raw = path.read_bytes()
        if path.suffix.lower() == ".gz":
            raw = gzip.decompress(raw)
    except (gzip.BadGzipFile, EOFError, zlib.error) as error:
        raise DataError(f"{path} is not a whole gzip file ({error}): write it again") from error
    except OSError as error:
        raise DataError(f"cannot read {path}: {error.strerror or error}") from error
    try:
        return raw.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise DataError(f"{path} is not UTF-8 text (byte {error.start}): save it as UTF-8") from error


def _parse(text: str, suffix: str, location: str, paragraphs: bool) -> list[Row]:
    if suffix == ".json":
        return _parse_json(text, location)
    if suffix in (".jsonl", ".ndjson"):
        return _parse_lines(text, location)
    if suffix in (".csv", ".tsv"):
        return _parse_csv(text, "," if suffix == ".csv" else "\t", location)
    if paragraphs:
        return [{"prompt": block.strip()} for block in re.split(r"\n\s*\n", text) if block.strip()]
    return [{"prompt": line} for line in text.splitlines()]


def _parse_json(text: str, location: str) -> list[Row]:
    try:
        return _rows_of(json.loads(text), location)
    except json.JSONDecodeError as error:
        if error.msg == "Extra data":  # JSON Lines under the name .json
            return _parse_lines(text, location)
        raise DataError(f"{location} is not valid JSON (line {error.lineno}: {error.msg})") from error
    except (ValueError, RecursionError) as error:
        raise DataError(f"{location} cannot be read: {_TOO_MUCH}") from error


def _rows_of(value: Any, location: str) -> list[Row]:
    if isinstance(value, dict):
        value = next((value[key] for key in _LIST_KEYS if isinstance(value.get(key), list)), None)
    if not isinstance(value, list):
        raise DataError(f'{location} must hold a list of prompts or {{"data": [...]}}')
    return [_as_row(item, location, number) for number, item in enumerate(value, 1)]


def _parse_lines(text: str, location: str) -> list[Row]:
    rows = []
    for number, line in enumerate(text.split("\n"), 1):
        if not line.strip():
            continue
        try:
            rows.append(_as_row(json.loads(line), location, number))
        except json.JSONDecodeError as error:
            raise DataError(f"{location} is not valid JSON Lines (line {number}: {error.msg})") from error
        except (ValueError, RecursionError) as error:
            raise DataError(f"{location} cannot be read (line {number}): {_TOO_MUCH}") from error
    return rows


def _as_row(item: Any, location: str, number: int) -> Row:
    try:
        json.dumps(item, ensure_ascii=False).encode()
    except UnicodeEncodeError as error:  # "\ud83d" without its second half: no tokenizer and no file takes it
        raise DataError(
            f"row {number} of {location} holds half a character (a lone surrogate, as of an emoji that was cut): "
            "remove it or write it whole"
        ) from error
    if isinstance(item, str):
        return {"prompt": item}
    if not isinstance(item, dict):
        raise DataError(
            f"row {number} of {location} is a {type(item).__name__}: each row must be an object or a string"
        )
    return item


def _parse_csv(text: str, delimiter: str, location: str) -> list[Row]:
    reader = csv.DictReader(io.StringIO(text, newline=""), delimiter=delimiter, strict=True)
    try:
        return [{name: value for name, value in row.items() if name is not None} for row in reader]
    except csv.Error as error:
        raise DataError(f"{location} is not a valid CSV file (line {reader.line_num}: {error})") from error


def _read_hub(location: str) -> list[Row]:
    try:
        import datasets
    except ImportError as error:
        raise DataError(f"reading {location} from the Hub needs the package datasets: pip install datasets") from error
    name, _, configuration = location.partition(":")
    try:
        splits = datasets.load_dataset(name, configuration or None)
        return [{"split": split, **row} for split, rows in splits.items() for row in rows]
    except Exception as error:  # the Hub's client raises a dozen unrelated classes: network, access, scripts, formats
        reason = " ".join(str(error).split()) or type(error).__name__
        raise DataError(f"there is no file {location}, and it cannot be loaded from the Hub: {reason[:300]}") from error
