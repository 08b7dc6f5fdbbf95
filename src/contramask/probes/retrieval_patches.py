"""Patches of transformed images found again among those of all originals (Vanyan et al., 2024)."""

from typing import Literal

import torch
from jaxtyping import Int
from torch import Tensor

from contramask.distributed import largest, total
from contramask.functional.cleaning import Cleaning
from contramask.functional.retrieval import Match, Metric, match_patches
from contramask.functional.warps import Warp, warp
from contramask.probes.retrieval import Reader, Space, Stock, Values, everywhere, rounded
from contramask.types import UserError

# Which patch of the original is "the same": of the same index, or at the place it was moved to.
Same = Literal["index", "place"]


class PatchBank:
    """All patches of all originals of all ranks, on every rank: 4 M P D bytes.

    Attributes:
        labels: of the M images.

    Args:
        reader: of features.
        originals: this rank's, with pixels.
        cleaning: fitted on the bank.
        metric: what is near; Vanyan et al. (arXiv:2401.00463) take the inner product.

    Raises:
        UserError: for fewer than two different images.
    """

    def __init__(self, reader: Reader, originals: Stock, *, cleaning: Cleaning, metric: Metric):
        self.reader, self.originals = reader, originals
        spec, device = reader.backbone.spec, reader.device
        # A rank without images knows their size from the others.
        size = largest(torch.tensor(originals.size, device=device)).tolist()
        patches = (size[0] // spec.patch) * (size[1] // spec.patch)
        width = spec.dim * len(reader.feature.blocks(spec.depth))
        read = [torch.empty((0, patches, width), device=device)]
        read += [reader.patches(part.float() / 255) for part, _, _ in originals.chunks()]
        rows = (torch.cat(read), originals.labels)
        self._ids, (x, self.labels) = everywhere(originals.ids, *rows, via=device)
        if len(self._ids) < 2:
            raise UserError(
                f"retrieval: {len(self._ids)} image(s) for patches; at least 2 different ones are "
                "needed; give more in data.val, or raise --queries or --limit"
            )
        self.space = Space(x.flatten(0, 1), cleaning, metric)
        self.rows = self.space.bank.unflatten(0, (len(self._ids), -1))

    def chances(self) -> Values:
        """`images` and `patches` of the bank; expected rates of an answer drawn from it."""
        images, patches = self.rows.shape[:2]
        values: Values = {"images": images, "patches": images * patches}
        values |= {"same_patch_rate": 1 / (images * patches), "same_image_rate": 1 / images}
        known = self.labels[self.labels >= 0]
        count = self._others(known).double() + 1
        if len(known):
            values["same_class_rate"] = float(count.mean()) / images
        if (count > 1).any():
            values["other_image_class_rate"] = float((count[count > 1] - 1).mean()) / (images - 1)
        return {name: round(value, 9) for name, value in values.items()}

    def identify(self, wanted: Warp, *, same: Same = "index", seed: int = 0) -> Values:
        """How many patches of the transformed images find what, over all ranks.

        Queries are the patches whose centre shows something of the original (`origins`).

        Args:
            wanted: the warp of the images.
            same: `index`, the patch of the same place in the grid, as in the paper: after a large
                shift it shows something else. `place`, the patch of the original at whose place
                the query's centre was.
            seed: of noise.

        Returns:
            `queries`; `same_patch_rate` and `same_image_rate`; `same_class_rate`, of queries of
            labelled images; `other_image_class_rate`, of those again whose class has another
            image, where the nearest is sought in other images only. Rates without a query are
            missing.

        Raises:
            UserError: if no patch is left in the image.
        """
        sums = torch.zeros(7, dtype=torch.float64, device=self.reader.device)
        for part, keys, here in self.originals.chunks():
            images = part.to(self.reader.device).float() / 255
            patch = self.reader.backbone.spec.patch
            moved, origin = warp(images, wanted, keys=keys, patch=patch, seed=seed)
            queries = (origin >= 0).nonzero()[:, 0].to(moved.device)
            x = self.reader.patches(moved)[:, queries].flatten(0, 1)
            own = torch.searchsorted(self._ids, self.originals.ids[here])
            own = own.repeat_interleave(len(queries))
            right = queries if same == "index" else origin.to(queries)[queries]
            target = own * self.rows.shape[1] + right.repeat(len(images))
            x, metric = self.space(x), self.space.metric
            found = match_patches(x, self.rows, target, self.labels, metric=metric)
            sums += self._count(found, own)
        return self._rates(wanted, total(sums))

    def _count(self, found: Match, own: Tensor) -> Tensor:
        label = self.labels[own]
        known = label >= 0
        other = known & (self._others(label) > 0)
        hits = (
            torch.ones_like(known),
            found.patch,
            found.image,
            known,
            known & found.label,
            other,
            other & found.elsewhere,
        )
        return torch.stack([hit.sum() for hit in hits]).double()

    def _others(self, labels: Int[Tensor, " Q"]) -> Int[Tensor, " Q"]:
        """How many other images of the bank have the label of each image of the bank."""
        known = self.labels[self.labels >= 0]
        count = known.bincount(minlength=int(self.labels.max().clamp(min=0)) + 1)
        return (count[labels.clamp(min=0)] - 1) * (labels >= 0)

    def _rates(self, wanted: Warp, sums: Tensor) -> Values:
        queries, patch, image, known, same, other, elsewhere = sums.tolist()
        if not queries:
            raise UserError(
                f"warp {wanted} leaves nothing of the images in any patch; set a smaller one in "
                "--warps"
            )
        values: Values = {"queries": int(queries)}
        values["same_patch_rate"], values["same_image_rate"] = rounded([patch, image], queries)
        if known:
            values["same_class_rate"] = rounded([same], known)[0]
        if other:
            values["other_image_class_rate"] = rounded([elsewhere], other)[0]
        return values
