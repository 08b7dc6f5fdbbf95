"""What an update is reported with."""

from collections.abc import Mapping

import torch
from torch import Tensor

from contramask import distributed


class Ledger:
    """Collects numbers of the micro-batches of an update; gives their means over all ranks.

    One all-reduce and one wait for the device in total, and only for updates that are reported.
    """

    def __init__(self) -> None:
        self._entries: dict[str, list[Tensor]] = {}

    def add(self, numbers: Mapping[str, Tensor | float]) -> None:
        """Note numbers of a micro-batch; tensors stay on their device."""
        for name, value in numbers.items():
            number = torch.as_tensor(value, dtype=torch.float32).detach()
            self._entries.setdefault(name, []).append(number)

    def close(self, device: torch.device) -> dict[str, float]:
        """The means, and begin anew."""
        entries, self._entries = self._entries, {}
        if not entries:
            return {}
        rows = [torch.stack([x.to(device) for x in values]).mean() for values in entries.values()]
        found = distributed.mean(torch.stack(rows)).tolist()
        return dict(zip(entries, found, strict=True))
