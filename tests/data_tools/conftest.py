"""Files as people have them, and the data tools called as a command line calls them."""

import gzip
import json

import pytest

from dfactory.data_tools.command import dispatch
from dfactory.data_tools.files import writing


@pytest.fixture
def files(tmp_path):
    """files("name.jsonl", row, ...) writes rows and gives the path as text."""

    def write_file(name, *rows):
        path = tmp_path / name
        with writing(path) as write:
            for row in rows:
                write(row)
        return str(path)

    return write_file


@pytest.fixture
def tool(tmp_path, capsys):
    """tool("verb", word, ...) -> (exit status, what it printed)."""

    def call(verb, *words):
        status = dispatch(verb, [str(word) for word in words])
        captured = capsys.readouterr()
        return status, captured.out + captured.err

    return call


@pytest.fixture
def rows_of():
    def read(path):
        with (gzip.open if str(path).endswith(".gz") else open)(path, "rt", encoding="utf-8") as file:
            return [json.loads(line) for line in file]

    return read
