"""Tables in and out: CSV, TSV, JSONL and Parquet, streamed."""

from .batch import Batch, Format, Marks, Row, Table
from .source import FORMATS, check_format, choose_format, find_files, format_of, open_table
from .write import TableWriter, open_writer

__all__ = [
    "FORMATS",
    "Batch",
    "Format",
    "Marks",
    "Row",
    "Table",
    "TableWriter",
    "check_format",
    "choose_format",
    "find_files",
    "format_of",
    "open_table",
    "open_writer",
]
