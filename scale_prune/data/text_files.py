"""The rows of csv and txt files as they stand there: every word of the file, as a text, or an error that says where."""

import csv
import fcntl
import hashlib
import os
import sys
import zlib
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from functools import cache
from gzip import BadGzipFile, GzipFile
from io import BufferedReader, TextIOWrapper
from itertools import chain, islice
from pathlib import Path
from secrets import token_hex

import datasets
import pyarrow as pa
import tokenizers

BATCH = 1000
CONTENT_ERRORS = (ValueError, EOFError, BadGzipFile, zlib.error)
QUOTING = 'a text with a comma stands in quotation marks, and one inside of it is doubled, ""'


def read(file: GzipFile | BufferedReader, cache: Path, *, is_csv: bool, label: str | None) -> datasets.Dataset:
    """Read the lines of a txt file, which keep their newline, or the columns of a csv file.

    Columns are texts, whatever they look like; a label that is a number throughout is a number.

    Args:
        file: UTF-8, with or without a byte order mark; in a csv file commas stand between fields.
        cache: where the rows are kept; its name must follow from the file's content.
        is_csv: whether it is a csv or a txt file.
        label: the column of the label, if there is one.

    Raises:
        ValueError: a csv file has no header, or one with a name twice, or a row that has more or fewer fields than
            that, or a stray or open quotation mark.
    """
    if not cache.exists():
        text = TextIOWrapper(file, encoding="utf-8-sig", newline="" if is_csv else None)
        _write_once(_records(text) if is_csv else chain([["text"]], ([line] for line in text)), cache)
    rows = datasets.Dataset.from_file(str(cache))
    if label in rows.column_names and len(rows):
        for kind in (pa.int64(), pa.float64(), pa.bool_()):
            with suppress(pa.ArrowInvalid):
                numbers = rows.data.column(label).cast(kind).to_numpy()
                return rows.remove_columns([label]).add_column(label, numbers)
    return rows


def _write_once(found: Iterator[Sequence[str]], cache: Path) -> None:
    """Let one process write, while all others that want the same wait for the file, or for why there is none."""
    cache.parent.mkdir(exist_ok=True)
    with cache.with_name(f"{cache.name}.lock").open("a+", encoding="utf-8") as lock:
        with suppress(OSError):  # a disk without locks, where everyone writes
            fcntl.flock(lock, fcntl.LOCK_EX)  # until the file is closed, by the end of the process too
        lock.seek(0)
        # The launcher ends all ranks soon after the first, before rank 0, which says why, could have tried it too.
        if reason := lock.read():
            raise ValueError(reason)
        if not cache.exists():
            try:
                _write(found, cache)
            except CONTENT_ERRORS as error:
                lock.write(str(error))
                raise


def _write(found: Iterator[Sequence[str]], cache: Path) -> None:
    """Write the names of the columns, then the rows, as an arrow file that is there as a whole or not at all."""
    schema = pa.schema([(name, pa.string()) for name in next(found)])
    with whole_or_absent(cache) as partial, pa.ipc.new_stream(str(partial), schema) as stream:
        while rows := list(islice(found, BATCH)):
            columns = [pa.array(column, pa.string()) for column in zip(*rows, strict=True)]
            stream.write(pa.record_batch(columns, schema=schema))


@cache
def code_version() -> str:
    """Return a hash of the code that reads and tokenizes rows: what other code has cached may be something else."""
    package = Path(__file__).parents[1]
    files = sorted(path for room in ("data", "tasks") for path in (package / room).glob("*.py"))
    return hashlib.sha256(b"".join(path.read_bytes() for path in files) + tokenizers.__version__.encode()).hexdigest()


def cache_folder() -> Path:
    """Return a folder beside the other caches, not beside the rows: they may be in a folder that cannot be written."""
    folder = Path(datasets.config.HF_DATASETS_CACHE) / "scale_prune"
    folder.mkdir(parents=True, exist_ok=True)
    return folder


@contextmanager
def whole_or_absent(file: Path) -> Iterator[Path]:
    """Yield a name to write to, which becomes `file` unless something fails: then nothing is left."""
    partial = file.with_name(f"{file.name}.{token_hex(4)}")  # nobody's: containers have the same numbers of processes
    try:
        yield partial
        os.replace(partial, file)
    finally:
        partial.unlink(missing_ok=True)


def _records(text: TextIOWrapper) -> Iterator[list[str]]:
    """Yield the header of a csv file and its rows; lines without anything are no rows."""
    csv.field_size_limit(sys.maxsize)  # 131,072 characters otherwise, and a document may have more
    # Strict: otherwise a quotation mark after a backslash ends the text, and an open one swallows the rest of the file.
    rows = filter(None, csv.reader(text, strict=True))
    number = 0
    try:
        header = next(rows, None)
        if header is None:
            raise ValueError("it has no header")
        names = [name or f"Unnamed: {place}" for place, name in enumerate(header)]
        if twice := [name for place, name in enumerate(names) if name in names[:place]]:
            raise ValueError(f"its header has the column {twice[0]!r} twice")
        yield names
        for number, row in enumerate(rows, 1):
            if len(row) != len(names):
                raise ValueError(f"row {number} has {len(row)} fields, the header {len(names)}; {QUOTING}")
            yield row
    except csv.Error as error:
        raise ValueError(f"row {number + 1}: {error}; {QUOTING}") from None
