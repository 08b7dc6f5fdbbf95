"""How a network moves: CKA to its start, to its last state, and to frozen anchors."""

from typing import Any

import torch
from torch import Tensor

from contramask.analysis.cka import compare
from contramask.analysis.grams import GramStack
from contramask.analysis.reading import Reading

Stacks = dict[str, GramStack]
LEAST = 0.01  # of the sum of both: below, the network is like neither
INITIAL, PREVIOUS, COORDINATE = "initial", "previous", "coordinate"


class Course:
    """Remembers Gram matrices of a network over time, and those of anchors.

    Attributes:
        anchors: name -> Gram matrices of a frozen network over the same images, by the way they
            were taken. Not part of the state: they are what their files say.
    """

    def __init__(self) -> None:
        self.anchors: dict[str, Stacks] = {}
        self._past: dict[str, Stacks] = {}

    def compare(self, now: Stacks) -> list[Reading]:
        """CKA of each block with the same block of the start, the last time and the anchors.

        The first call is the start. Only minibatches of the same images are compared; where there
        are none, as after a change of the images, nothing is said.

        Returns:
            For the first way of taking CKA `cka/initial`, `cka/previous`, `cka/NAME` ({layer}), the
            whole maps `cka/initial/map` ({layer_a, layer_b}), and with two anchors
            `cka/coordinate`: (first - second) / (first + second). An anchor of another depth counts
            with its most similar block. The maps of further ways are `cka/NAME/WAY/map`.
        """
        found: list[Reading] = []
        lines: dict[str, Reading] = {}
        for name, then in {**self._past, **self.anchors}.items():
            for i, way in enumerate(w for w in now if w in then):
                pair = _shared(now[way], then[way])
                if pair is None:
                    continue
                whole = compare(*pair)[0]
                line = _along(whole, f"cka/{name}" if i == 0 else f"cka/{name}/{way}")
                found += [line, _renamed(whole, f"{line.name}/map")]
                if i == 0:
                    lines[name] = line
        anchors = [lines[a] for a in self.anchors if a in lines]
        if len(anchors) == 2:
            found.append(_coordinate(anchors[0], anchors[1], list(self.anchors)))
        self._past = {INITIAL: self._past.get(INITIAL, now), PREVIOUS: now}
        return found

    def state_dict(self) -> dict[str, Any]:
        """The start and the last state, as plain values and tensors."""
        return {
            name: {way: [*s[:2], s.table, list(s.keys)] for way, s in stacks.items()}
            for name, stacks in self._past.items()
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """What `state_dict` gave."""
        self._past = {
            name: {
                way: GramStack(kind, tuple(labels), table, tuple(keys))
                for way, (kind, labels, table, keys) in stacks.items()
            }
            for name, stacks in state.items()
        }


def _shared(a: GramStack, b: GramStack) -> tuple[GramStack, GramStack] | None:
    """Both over the minibatches that they have in common."""
    shared = [k for k in a.keys if k in b.keys]
    if not shared:
        return None

    def only(stack: GramStack) -> GramStack:
        rows = torch.tensor([stack.keys.index(k) for k in shared])
        return stack._replace(table=stack.table[rows], keys=tuple(shared))

    return only(a), only(b)


def _along(whole: Reading, name: str) -> Reading:
    """The diagonal; of networks of different depth the best of each row."""
    axes = {"layer": whole.axes["layer_a"]}
    if whole.value.shape[0] == whole.value.shape[1]:
        value, missing = whole.value.diagonal(), whole.missing.diagonal()
        about = "CKA with the same layer"
    else:
        value, missing = whole.value.amax(1), whole.missing.all(1)
        about = "CKA with the most similar layer"
    return Reading(name, axes, value, "", f"{about} ({whole.about})", missing=missing)


def _renamed(reading: Reading, name: str) -> Reading:
    return Reading(name, reading.axes, reading.value, "", reading.about, missing=reading.missing)


def _coordinate(a: Reading, b: Reading, names: list[str]) -> Reading:
    # Unbiased estimates of no similarity are as often below 0.
    first, second = a.value.clamp(min=0), b.value.clamp(min=0)
    total: Tensor = first + second
    about = f"CKA with {names[0]} minus that with {names[1]}, over their sum: +1 to -1"
    missing = a.missing | b.missing | (total < LEAST)
    value = (first - second) / total.clamp(min=LEAST)
    return Reading(f"cka/{COORDINATE}", a.axes, value, "", about, missing=missing)
