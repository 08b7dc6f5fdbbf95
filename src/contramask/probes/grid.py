"""A grid of linear probes in one pass: features x norms x learning rates, for shares of the labels.

All heads of a share train in one walk over the same batches: a row is read once for every feature
of it. On a held-out part of train the best rate of each (feature, norm) is chosen; the chosen heads
are trained again on all rows of the share, in one more walk, and scored on val. A grid of one cell
is `LinearProbe.fit`: the same start, rows and steps.
"""

import logging
from collections.abc import Callable, Mapping
from dataclasses import replace

import torch
from jaxtyping import Float, Int
from torch import Tensor

from contramask.distributed import rank, total, world
from contramask.probes.features import Feature
from contramask.probes.grid_cells import Axes, Cell, Input
from contramask.probes.grid_heads import Heads, drawn
from contramask.probes.grid_rows import Share, resident
from contramask.probes.linear_recipe import diverged
from contramask.probes.store import Bank, StoredRows
from contramask.types import UserError

log = logging.getLogger(__name__)
Progress = Callable[[str, int, int], None]  # what is trained, steps done, of how many
Rows = Mapping[Feature, Tensor | StoredRows]


class LinearGrid:
    """Trains and scores a grid. Every rank trains the same heads on the same rows.

    Attributes:
        cells: in the order shares, features, norms, once fitted.
        heads: of each cell, the one that was chosen.
        notes: what a reader of the numbers must know, each a sentence.
    """

    def __init__(self, axes: Axes, classes: int, *, device: torch.device | str = "cpu"):
        self.axes, self.classes, self.device = axes, classes, torch.device(device)
        self.cells: list[Cell] = []
        self.heads: list[Heads] = []
        self.notes: list[str] = []

    @torch.no_grad()
    def fit(self, train: Bank, *, progress: Progress | None = None) -> None:
        """Train all shares. A pure function of the rows and the axes.

        Raises:
            UserError: labels out of range, fewer than four rows or than a share wants of each
                class, or every head diverges; where
                some do, their cells are left out, which a note tells.
        """
        train.check("train", self.classes)
        x = resident(train.x, self.axes.features, self.device)
        y = train.y.to(self.device)
        self.cells, self.heads, self.notes = [], [], []
        for share in self.axes.shares:
            rows = share.of(train.y, train.keys, self.axes.recipe.seed)
            self._fit_share(share, rows, x, y, progress or (lambda *_: None))
        if not self.cells:
            raise diverged(self.axes.recipe.rates)
        if edges := sum(cell.edge for cell in self.cells):
            self._note(
                f"{edges} of {len(self.cells)} cells chose the smallest or largest rate; the best "
                "may lie beyond: widen recipe.rates"
            )

    @torch.no_grad()
    def score(self, val: Bank) -> None:
        """Accuracy of every cell on val; each rank scores its part."""
        val.check("val", self.classes)
        mine = torch.arange(rank(), len(val), world())
        x = resident(val.x, self.axes.features, self.device)
        tops = (1, 5) if self.classes > 5 else (1,)
        right = torch.zeros((len(self.cells), len(tops)), dtype=torch.long, device=self.device)
        for part in mine.split(self.axes.recipe.batch):
            y = val.y[part].to(self.device)
            read = self._read(x, part)
            for i, (cell, heads) in enumerate(zip(self.cells, self.heads, strict=True)):
                scores = heads.logits(read[cell.feature])[:, 0]
                hits = scores.topk(tops[-1]).indices == y[:, None]
                right[i] += torch.stack([hits[:, :k].sum() for k in tops])
        found = (total(right) / len(val)).tolist()
        self.cells = [
            replace(c, images=len(val), **dict(zip(("top1", "top5"), f, strict=False)))
            for c, f in zip(self.cells, found, strict=True)
        ]

    def best(self, share: Share) -> Cell:
        """The cell of a share that is best on the held-out rows; of equals the one of less loss."""
        cells = [cell for cell in self.cells if cell.share == share]
        return max(cells, key=lambda c: (c.held_out or 0.0, -c.loss))

    def _fit_share(
        self, share: Share, rows: Tensor, x: Rows, y: Tensor, progress: Progress
    ) -> None:
        if len(rows) < 4:
            raise UserError(
                f"linear probe: {len(rows)} labelled images ({share} of the labels); give at least "
                "4 to train on"
            )
        recipe, inputs = self.axes.recipe, self.axes.inputs
        found = dict.fromkeys(inputs, ({}, recipe.rates[0], 0.0))
        if len(inputs) * len(recipe.rates) > 1:
            order = rows[torch.randperm(len(rows), generator=drawn(recipe, "split"))]
            held = max(1, round(len(rows) * recipe.holdout))
            self._tell_missing(share, rows, order[held:], y.cpu())
            sweep = dict.fromkeys(inputs, recipe.rates)
            heads = self._train(sweep, order[held:], x, y, f"{share}: rates", progress)
            found = self._choose(share, heads, order[:held], x, y)
        rates = {i: (rate,) for i, (_, rate, _) in found.items()}
        trained = self._train(rates, rows, x, y, f"{share}: chosen", progress)
        # One number of a head that is not finite spoils the loss of all rows.
        tallied = self._tallied(trained, rows[: recipe.batch], x, y)
        ends = (min(recipe.rates), max(recipe.rates)) if len(recipe.rates) > 1 else ()
        for (feature, norm), heads in trained.items():
            sweep, rate, loss = found[feature, norm]
            if tallied[feature, norm][0] < 0:
                self._note(
                    f"left out: rate {rate:g} diverged on {feature}, norm {norm}, {share}, when "
                    "it was trained on all rows"
                )
                continue
            self.heads.append(heads)
            self.cells.append(
                Cell(feature, norm, share, len(rows), rate, rate in ends, sweep, loss)
            )

    def _train(
        self,
        rates: Mapping[Input, tuple[float, ...]],
        rows: Int[Tensor, " N"],
        x: Rows,
        y: Tensor,
        what: str,
        progress: Progress,
    ) -> dict[Input, Heads]:
        """Heads of all inputs, trained on the same batches of these rows."""
        recipe = self.axes.recipe
        batch = min(recipe.batch, len(rows))
        each = len(rows) // batch
        steps = each * recipe.epochs
        shared = {"recipe": recipe, "steps": steps, "device": self.device}
        heads: dict[Input, Heads] = {
            (f, n): Heads(x[f].shape[1], self.classes, some, norm=n, **shared)
            for (f, n), some in rates.items()
        }
        for epoch in range(recipe.epochs if heads else 0):
            mixed = torch.randperm(len(rows), generator=drawn(recipe, "order", epoch))
            for number, part in enumerate(rows[mixed][: each * batch].split(batch), 1):
                read, labels = self._read(x, part), y[part.to(y.device)]
                for (feature, _), some in heads.items():
                    some.step(read[feature], labels)
                progress(what, epoch * each + number, steps)
        return heads

    def _choose(
        self, share: Share, heads: Mapping[Input, Heads], rows: Tensor, x: Rows, y: Tensor
    ) -> dict[Input, tuple[dict[float, float], float, float]]:
        """Input -> (accuracy of each rate, the best rate, its loss); without inputs that diverge.

        Of equally accurate heads the one of smaller loss is best.
        """
        kept, recipe = {}, self.axes.recipe
        for place, (accuracy, loss) in self._tallied(heads, rows, x, y).items():
            sweep = dict(zip(recipe.rates, accuracy.tolist(), strict=True))
            ranked = zip(accuracy.tolist(), (-loss).tolist(), recipe.rates, strict=True)
            good = [row for row in ranked if row[0] >= 0]
            if good:
                _, less, rate = max(good)
                kept[place] = (sweep, rate, -less)
            else:
                feature, norm = place
                self._note(f"left out: every rate diverged on {feature}, norm {norm}, {share}")
        return kept

    def _tallied(
        self, heads: Mapping[Input, Heads], rows: Tensor, x: Rows, y: Tensor
    ) -> dict[Input, tuple[Float[Tensor, " G"], Float[Tensor, " G"]]]:
        """Accuracy (-1 where the loss is not finite) and mean loss of all heads on these rows."""
        sums = {i: torch.zeros((2, len(h.rates)), device=self.device) for i, h in heads.items()}
        for part in rows.split(self.axes.recipe.batch):
            read, truth = self._read(x, part), y[part.to(y.device)]
            for place, some in heads.items():
                scores = some.logits(read[place[0]])
                sums[place][0] += (scores.argmax(-1) == truth[:, None]).sum(0)
                numbers = torch.arange(len(truth), device=truth.device)
                of_truth = scores.log_softmax(-1)[numbers, :, truth]
                sums[place][1] -= of_truth.sum(0)
        means = {i: s / len(rows) for i, s in sums.items()}
        return {i: (right.where(loss.isfinite(), -1.0), loss) for i, (right, loss) in means.items()}

    def _read(self, x: Rows, part: Tensor) -> dict[Feature, Tensor]:
        """Rows of all features on the device; each is read once for all heads."""
        found = {}
        for feature, rows in x.items():
            here = part.to(rows.device) if isinstance(rows, Tensor) else part
            found[feature] = rows[here].to(self.device)
        return found

    def _tell_missing(self, share: Share, rows: Tensor, kept: Tensor, y: Tensor) -> None:
        """Classes that have rows, but none to train on while rates are chosen."""
        lost = sorted({*y[rows].tolist()} - {*y[kept].tolist()})
        if lost:
            named = ", ".join(map(str, lost[:5])) + (", ..." if len(lost) > 5 else "")
            self._note(
                f"{share} of the labels: {len(lost)} classes ({named}) have no row left to train "
                "on while rates are chosen; they have in the training that is reported"
            )

    def _note(self, text: str) -> None:
        self.notes.append(text)
        log.warning("linear probe: %s", text)
