"""Models from whatever a user has: a run, an export, an official file, a timm name with weights."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from contramask.checkpoints.architecture import Wishes
from contramask.checkpoints.export import SHEET, WEIGHTS, load_backbone
from contramask.checkpoints.importing import import_backbone
from contramask.checkpoints.layouts.layout import IMAGENET
from contramask.models.backbone import Backbone
from contramask.types import UserError

TIMM = "timm/"


@dataclass(frozen=True)
class Source:
    """A model as it was given: `PATH` or `timm/MODEL=PATH`, with `NAME=` before."""

    name: str
    path: Path
    timm: str | None = None

    @classmethod
    def parse(cls, text: str) -> "Source":
        """Raises `UserError` where nothing is there."""
        labels, rest = [], text
        while "=" in rest and not Path(rest).exists():
            label, _, rest = rest.partition("=")
            labels.append(label)
        path = Path(rest)
        if not path.exists():
            raise UserError(
                f"there is no {path}; a model is a run, a folder with backbone.safetensors, or a "
                "checkpoint file, with a name of your choice as NAME=PATH"
            )
        timm = next((x.removeprefix(TIMM) for x in labels if x.startswith(TIMM)), None)
        chosen = next((x for x in labels if not x.startswith(TIMM)), None)
        name = path.resolve().name if path.is_dir() else path.resolve().stem
        return cls(chosen or timm or name, path, timm)

    def load(self) -> tuple[Backbone, dict[str, Any]]:
        """The backbone and what is known of it: `step`, `net`, and `data` it was fed with."""
        exported = self.path.is_dir() or self.path.name in (WEIGHTS, SHEET)
        if exported and self.timm is None:
            backbone, sheet = load_backbone(self.path)
            return backbone, {
                "step": sheet["step"],
                "net": sheet["weights"]["net"],
                "data": sheet["data"],
            }
        try:
            wishes = Wishes(name=self.timm) if self.timm else None
            imported = import_backbone(self.path, wishes=wishes)
        except UserError as error:
            raise UserError(
                f"{error}; `contramask convert import` has these options, and what it writes can "
                "be given here"
            ) from error
        size = min(imported.backbone.spec.grid) * imported.backbone.spec.patch
        return imported.backbone, {
            "step": imported.step,
            "net": imported.net,
            "data": {**IMAGENET, "size": size},
        }


def named(texts: list[str]) -> list[Source]:
    """Sources with different names; equal ones get a number."""
    found: list[Source] = []
    for text in texts:
        source = Source.parse(text)
        same = sum(s.name.split("#")[0] == source.name for s in found)
        name = f"{source.name}#{same + 1}" if same else source.name
        found.append(Source(name, source.path, source.timm))
    return found
