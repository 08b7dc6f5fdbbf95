"""Parts of an evaluation survive a stop, and never serve other settings."""

import pytest

from contramask.probes.parts import Parts
from contramask.types import UserError


def test_what_is_done_is_there_after_a_stop(tmp_path):
    path = tmp_path / "new" / "parts.jsonl"
    parts = Parts(path, "a")
    parts.add("first", {"x": 0.25})
    parts.add("second", 2.5)
    with open(path, "a") as file:
        file.write('{"name": "third", "val')  # killed while it wrote
    again = Parts(path, "a")
    assert again.done == {"first": {"x": 0.25}, "second": 2.5}
    again.add("third", [1, 2])
    assert Parts(path, "a").done == {"first": {"x": 0.25}, "second": 2.5, "third": [1, 2]}


def test_other_settings_begin_anew(tmp_path):
    path = tmp_path / "parts.jsonl"
    Parts(path, "a").add("first", 1.0)
    assert Parts(path, "b").done == {}
    assert Parts(path, "a").done == {}


@pytest.mark.parametrize("content", ["", "garbage\n", '{"settings": 3}\n', "[1, 2]\n"])
def test_a_damaged_file_begins_anew(tmp_path, content):
    path = tmp_path / "parts.jsonl"
    path.write_text(content)
    assert Parts(path, "a").done == {}


def test_a_folder_that_cannot_be_is_told(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="cannot be written"):
        Parts(tmp_path / "file" / "parts.jsonl", "a")
