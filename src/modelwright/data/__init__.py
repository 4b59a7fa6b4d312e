"""Reading and writing the user's records."""

from modelwright.data.records import Record, Records, read_texts
from modelwright.data.write import write_rows

__all__ = ["Record", "Records", "read_texts", "write_rows"]
