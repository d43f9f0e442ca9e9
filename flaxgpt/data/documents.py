"""Documents out of files of text, JSON lines and Parquet, as a stream of text: a part of one file is in memory at a time."""

from __future__ import annotations

import codecs
import json
import re
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path

from flaxgpt.data.tokenizer import END_OF_TEXT
from flaxgpt.errors import InputError

SUFFIXES = (".txt", ".jsonl", ".parquet")
"""Files that are taken from a folder."""
_READ = 2**20


class Documents:
    """Iterates over pieces of text, with END_OF_TEXT after each document; a text file is one.

    Attributes:
        files: what is read, in this order.
        total: bytes of all files.
        read: bytes that were read.
        skipped: lines that were left out.
    """

    def __init__(self, inputs: Sequence[Path], *, field: str = "text", column: str = "text", skip_broken: bool = False) -> None:
        """Files are found, and not opened.

        Args:
            inputs: files and folders. A name ends with .jsonl (or .ndjson) or .parquet; everything else is text.
            field: of the objects in JSON lines.
            column: of Parquet files.
            skip_broken: leave out lines that are not JSON objects with the field, and count them.

        Raises:
            InputError: a file is not there, or there are none.
        """
        self.files = [file for path in inputs for file in _found(path)]
        if not self.files:
            raise InputError("give files or folders to read")
        self.total, self.read, self.skipped = sum(file.stat().st_size for file in self.files), 0, 0
        self._field, self._column, self._skip_broken = field, column, skip_broken

    @property
    def options(self) -> dict[str, object]:
        """What decides which documents come out of the files."""
        return {"field": self._field, "column": self._column, "skip_broken": self._skip_broken}

    def __iter__(self) -> Iterator[str]:
        """Raises InputError for what can't be read; it names the file, and the line or byte."""
        readers = {".jsonl": self._lines, ".ndjson": self._lines, ".parquet": self._parquet}
        for file in self.files:
            try:
                yield from readers.get(file.suffix.lower(), self._text)(file)
            except OSError as error:
                raise InputError(f"can't read {file} ({error.strerror or error})") from None

    def _text(self, path: Path) -> Iterator[str]:
        decoder, offset = codecs.getincrementaldecoder("utf-8")(), 0
        with path.open("rb") as file:
            while True:
                part, held = file.read(_READ), len(decoder.getstate()[0])
                try:
                    text = decoder.decode(part, final=not part)
                except UnicodeDecodeError as error:
                    raise InputError(f"{path} is not UTF-8 text (byte {offset - held + error.start}); convert it first") from None
                if not part:
                    break
                yield text
                offset += len(part)
                self.read += len(part)
        if offset:
            yield END_OF_TEXT

    def _lines(self, path: Path) -> Iterator[str]:
        with path.open("rb") as file:
            for number, line in enumerate(file, 1):
                self.read += len(line)
                try:
                    found = json.loads(line) if line.strip() else {self._field: ""}
                    if not isinstance(found, dict) or not isinstance(found.get(self._field), str):
                        raise ValueError(f"expected an object with a text {self._field!r}")
                    found[self._field].encode()  # half of a surrogate pair is no text
                except (ValueError, RecursionError) as error:  # not JSON, not UTF-8, or nested too deeply
                    if not self._skip_broken:
                        raise InputError(f"{path}, line {number}: {error}; --skip-broken leaves such lines out") from None
                    self.skipped += 1
                    continue
                if text := found[self._field]:
                    yield text
                    yield END_OF_TEXT

    def _parquet(self, path: Path) -> Iterator[str]:
        try:
            from pyarrow import ArrowException
            from pyarrow.parquet import ParquetFile
        except ImportError:
            raise InputError(f'{path}: Parquet needs pyarrow: pip install "flaxgpt[parquet]"') from None
        before, size = self.read, path.stat().st_size
        try:
            with ParquetFile(path) as table:
                columns = table.schema_arrow.names
                if self._column not in columns:
                    raise InputError(f"{path} has no column {self._column!r}: its columns are {', '.join(columns)}; choose with --column")
                if str(kind := table.schema_arrow.field(self._column).type) not in ("string", "large_string"):
                    raise InputError(f"{path}: the column {self._column!r} holds {kind}, not text")
                n_rows = 0
                for batch in table.iter_batches(batch_size=256, columns=[self._column]):
                    n_rows += len(batch)
                    self.read = before + size * n_rows // table.metadata.num_rows
                    for text in filter(None, batch[0].to_pylist()):
                        yield text
                        yield END_OF_TEXT
        except (ArrowException, UnicodeDecodeError) as error:
            raise InputError(f"{path} can't be read as Parquet ({' '.join(str(error).split())})") from None


# GPT-2's pattern ends a match before a space, tab or newline that follows anything but white space, and looks no further back. So a text
# that is cut there has the tokens of the whole. (White space for Python is all that is for tiktoken, and four control characters more.)
_LAST_CUT = re.compile(r"(?s).*(?:(?<=\S)(?=[ \t\r\n])|(?<=" + re.escape(END_OF_TEXT) + r"))")


def chunks(pieces: Iterable[str], size: int) -> Iterator[str]:
    """The same text in chunks of at most `size` characters (more where a word is longer), whose tokens are those of the whole."""
    parts: list[str] = []
    length, limit = 0, size
    for piece in pieces:
        parts.append(piece)
        length += len(piece)
        while length >= limit:
            text = "".join(parts)
            if (found := _LAST_CUT.match(text, 0, limit)) and found.end():
                yield text[: found.end()]
                text, limit = text[found.end() :], size
            else:
                limit *= 2
            parts, length = [text], len(text)
    if length:
        yield "".join(parts)


def _found(path: Path) -> list[Path]:
    if path.is_file():
        return [path]
    if path.is_dir():
        if files := sorted(file for file in path.rglob("*") if file.suffix.lower() in SUFFIXES and file.is_file()):
            return files
        raise InputError(f"the folder {path} holds no files that end with {', '.join(SUFFIXES)}")
    raise InputError(f"{path} is not there: expected a file or a folder")
