"""What a long evaluation has finished, kept on disk part by part, so that a stopped one goes on."""

import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from contramask.types import UserError


class Parts:
    """Named results, one JSON line each, that belong to one set of settings.

    A file of other settings is begun anew; a last line that a kill cut short is dropped. One
    process writes a file: with several ranks each has its own.

    Attributes:
        done: what there is, by name.

    Args:
        path: of the file; its folder is made.
        settings: a checksum of all that the results hang on, see `digest_of`.

    Raises:
        UserError: if the file cannot be written.
    """

    def __init__(self, path: Path, settings: str):
        self.path = path
        self.done: dict[str, Any] = {}
        lines = self._lines()
        if not lines or lines[0] != {"settings": settings}:
            lines = [{"settings": settings}]
        for line in lines[1:]:
            self.done[line["name"]] = line["value"]
        text = "".join(json.dumps(line) + "\n" for line in lines)
        temporary = path.with_name(f".{path.name}.{os.getpid()}")
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            temporary.write_text(text, "utf-8")
            temporary.replace(path)
        except OSError as error:
            raise UserError(
                f"{path} cannot be written ({error.strerror}); set --out to a folder that can"
            ) from error

    def add(self, name: str, value: Mapping[str, Any] | list[Any] | float) -> None:
        """One part is finished. It is on the disk when this returns."""
        self.done[name] = value
        with open(self.path, "a", encoding="utf-8") as file:
            file.write(json.dumps({"name": name, "value": value}) + "\n")
            file.flush()
            os.fsync(file.fileno())

    def _lines(self) -> list[Any]:
        try:
            text = self.path.read_text("utf-8")
        except (FileNotFoundError, NotADirectoryError, UnicodeDecodeError):
            return []
        whole, _, _ = text.rpartition("\n")  # what follows the last newline was cut short
        try:
            return [json.loads(line) for line in whole.splitlines()]
        except ValueError:
            return []
