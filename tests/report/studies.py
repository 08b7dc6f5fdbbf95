"""A study that was never made: three models, of which the last is shallower and has no maps.

Numbers follow what the papers report for contrastive (first) and masked (second) models, so that
pages can be looked at, and findings have something to find.
"""

import numpy as np
import torch

from contramask.analysis.reading import Reading
from contramask.analysis.study import Study

NAMES = ("MoCo v3 <tau 0.2>", "MAE & friends", "tiny_iBOT")
SUBLAYERS = (
    "norm1", "attn", "attn.qkv", "attn.proj", "norm2", "mlp", "mlp.fc1", "mlp.act", "mlp.fc2"
)  # fmt: skip
PARK = "Park et al., 2023 (arXiv:2305.00729)"
HEADS, DIM = 3, 24


def reading(name, axes, value, *, half=None, unit="", about="", missing=None) -> Reading:
    """A reading with an interval of `half` to either side."""
    value = torch.as_tensor(np.asarray(value, dtype=float))
    extra = {} if missing is None else {"missing": torch.as_tensor(missing)}
    ends = {} if half is None else {"low": value - half, "high": value + half}
    return Reading(name, axes, value, unit, about, **ends, **extra)


def layers(depth: int) -> tuple[str, ...]:
    return tuple(f"block_{i:02d}" for i in range(depth))


def attention(depth: int, kind: int, noise) -> list[Reading]:
    blocks = layers(depth)
    t = np.linspace(0, 1, depth)
    distance = (70 + 45 * np.abs(2 * t - 0.8), 75 - 20 * t)[kind]
    nmi = (0.3 * (1 - t) ** 0.7 + 0.01, 0.2 + 0.25 * t)[kind]
    by_head = distance[:, None] + noise.normal(0, 9, (depth, HEADS))
    gap = np.zeros(depth, dtype=bool)
    gap[1] = True
    one = {"layer": blocks}
    return [
        reading("attn/distance", one, distance, half=2, unit="px",
                about=f"Mean distance of a patch to what it attends to; {PARK}, section 3.1."),
        reading("attn/distance_by_head", {**one, "head": tuple(map(str, range(HEADS)))}, by_head,
                unit="px", about="The same for each head."),
        reading("attn/entropy", one, 4 + 0.5 * t, half=0.05, unit="nats",
                about="Mean entropy of a query's map."),
        reading("attn/nmi", one, nmi, half=0.01,
                about=f"Mutual information of query and key, 0 if queries attend alike; {PARK}."),
        reading("attn/diversity", one, 2 * nmi, half=0.02,
                about="1 \u2212 cosine of two queries' maps; Huang et al. (arXiv:2403.02233)."),
        reading("attn/to_cls", one, 0.1 + 0.2 * t, half=0.01, missing=gap,
                about="Mean attention of patches to the class token."),
        reading("attn/output_similarity_heads", one, 0.2 + (0.6, 0.1)[kind] * t, half=0.02,
                about=f"Mean cosine of the outputs of two heads; {PARK}, section 3.1."),
        reading("attn/output_similarity_positions", one, (0.3 + 0.6 * t, 0.2 + 0 * t)[kind],
                half=0.02, about=f"Mean cosine of the outputs at two positions; {PARK}."),
    ]  # fmt: skip


def frequencies(depth: int, kind: int, noise) -> list[Reading]:
    stream = ("embedding", *(x for b in layers(depth) for x in (f"{b}.mid", b)))
    bands = tuple(f"{f:.2f}" for f in np.linspace(0, 6 / 7, 7))
    fall = np.linspace(-2.2 - 0.6 * (kind == 0), -2.0 - 0.4 * (kind == 0), len(stream))
    table = fall[:, None] * np.linspace(0, 1, 7) ** 0.6
    high = ("embedding", *layers(depth))
    about = f"Log amplitude relative to that of frequency 0; {PARK}, section 3.2."
    return [
        reading("fourier/log_amplitude", {"layer": stream, "frequency": bands}, table, about=about),
        reading("fourier/high", {"layer": high}, fall[::2], half=0.08,
                about="Log amplitude of the highest frequency relative to frequency 0."),
    ]  # fmt: skip


def representation(depth: int, kind: int, noise) -> list[Reading]:
    both, t = ("cls", "mean"), np.linspace(0.1, 1, depth + 1)
    where = {"feature": both, "layer": (*layers(depth), "final")}
    ranks = tuple(str(i) for i in range(DIM))
    fade = -np.linspace(0.3, 1, depth)[::-1, None] * np.arange(DIM) * (0.08, 0.3, 0.15)[kind]
    share = np.exp(fade) / np.exp(fade).sum(1, keepdims=True)
    wide = {"layer": layers(depth), "index": ranks}
    peak = (t, np.where(t < 0.7, t, 1.4 - t), t**0.8)[kind]
    return [
        reading("repr/rankme", {}, (19.5, 6.1, 12.0)[kind], half=0.4,
                about="Effective rank of the final features; Garrido et al. (arXiv:2210.02885)."),
        reading("repr/effective_rank", where, np.stack([12 * t, 18 * t]), half=0.5,
                about="exp of the entropy of singular values."),
        reading("repr/uniformity", where, -np.stack([2 * t, 3 * t]), half=0.1,
                about="Wang and Isola (arXiv:2005.10242)."),
        reading("repr/lidar", {"feature": both}, np.array([7.0, 8.0]) + kind, about="LiDAR."),
        reading("repr/spectrum_image", wide, fade, about=f"Singular values of images; {PARK}."),
        reading("repr/spectrum_token", wide, 2 * fade, about=f"Singular values of tokens; {PARK}."),
        reading("repr/channel_variance", {"layer": layers(depth), "rank": ranks}, share,
                about="Share of the variance; Vanyan et al. (arXiv:2401.00463)."),
        reading("repr/variance_top10", {"layer": layers(depth)}, share[:, :10].sum(1), half=0.01,
                about="Share of the variance that the ten largest channels hold."),
        reading("class/knn", where, np.array([[0.7], [0.5 + 0.1 * kind]]) * peak, half=0.02,
                about="Accuracy of 20 nearest neighbours by cosine."),
        reading("class/ridge", where, np.stack([0.75 * peak, 0.74 * peak]), half=0.02,
                about="Accuracy of ridge regression on one-hot labels."),
        *invariances(where, kind, t),
    ]  # fmt: skip


def invariances(where, kind: int, t) -> list[Reading]:
    found = []
    for name, loss in (("flip", 0.05), ("crop", 0.2)):
        base = np.stack([(0.2, 0.95, 0.4)[kind] * t] * 2)
        value = base + (1 - base) * (1 - loss * (1 + kind))
        about = f"Cosine of an image and its {name}; Shekhar et al. (arXiv:2304.13089)."
        found += [
            reading(f"invariance/{name}", where, value, half=0.002, about=about),
            reading(f"invariance/{name}_shuffled", where, base, half=0.01, about="Of two images."),
        ]
    return found


def similarity(depths: tuple[int, int], level: float, noise) -> list[Reading]:
    def labels(depth):
        inner = (x for b in layers(depth) for x in (*(f"{b}.{s}" for s in SUBLAYERS), b))
        return ("embedding", *inner)

    a, b = map(labels, depths)
    far = np.abs(np.linspace(0, 1, len(a))[:, None] - np.linspace(0, 1, len(b)))
    found = []
    for name, more in (("raw", 0.0), ("standardised", 0.1)):
        value = np.clip((level + more) * (1 - 0.7 * far), 0, 1) + noise.normal(0, 0.01, far.shape)
        key = f"cka/flat/{name}"
        about = "Linear CKA, unbiased, over batches of 32; Shekhar et al. (arXiv:2304.13089)."
        found.append(reading(key, {"layer_a": a, "layer_b": b}, value, about=about))
        found.append(reading(f"cka/mean/{name}", {"layer_a": a, "layer_b": b}, value, about=about))
        if depths[0] == depths[1]:
            found += at_same_depth(key, depths[0], min(1.0, level + more), noise)
        best = np.argmax(value[10::10, 10::10], axis=1)
        found.append(
            reading(f"{key}/correspondence", {"layer_a": layers(depths[0])}, best, about=about)
        )
    return found


def at_same_depth(key: str, depth: int, level: float, noise) -> list[Reading]:
    table = np.full((len(SUBLAYERS), depth), level) - 0.1 * noise.random((len(SUBLAYERS), depth))
    table[[0, 2], 1:] *= 0.4 if key.endswith("raw") and level < 0.6 else 1.0
    distance = tuple(map(str, range(depth)))
    about = "CKA of layers at the same place in both models, mean over blocks."
    return [
        reading(f"{key}/same_depth", {"sublayer": SUBLAYERS, "layer": layers(depth)}, table,
                about=about),
        reading(f"{key}/same_depth_mean", {}, table.mean(), half=0.01, about=about),
        reading(f"{key}/by_distance", {"distance": distance}, level * 0.9 ** np.arange(depth),
                about="Mean CKA over all layers so many blocks apart."),
    ]  # fmt: skip


def agreement(level: float) -> list[Reading]:
    about = "Share of images on which both predict the same; Shekhar et al. (arXiv:2304.13089)."
    names = {"top1": level, "tau": level / 3, "both_correct": level / 2, "both_incorrect": 0.1}
    return [reading(f"agree/{k}", {}, v, half=0.01, about=about) for k, v in names.items()]


def smooth(side: int, noise) -> np.ndarray:
    """A picture of soft waves, as easy to compress as a photo is."""
    x = np.linspace(0, 2 * np.pi, side)
    waves = [np.sin(a * x[:, None] + b * x + c) for a, b, c in noise.uniform(-3, 3, (3, 3))]
    return (127.5 * (1 + np.stack(waves, -1))).astype(np.uint8)


def study(depth: int = 5, shallow: int = 3, *, side: int = 40) -> Study:
    """The whole of it. The last of the models has `shallow` blocks and no attention readings."""
    noise = np.random.default_rng(0)
    depths = (depth, depth, shallow)
    models = {
        name: {"path": f"runs/{i}/export", "backbone": "vit", "step": 1000 * i, "net": "student",
               "depth": d, "dim": DIM, "patch": 16, "grid": [14, 14], "parameters": 21_600_000 + i,
               "sha256": f"{i}" * 64}
        for i, (name, d) in enumerate(zip(NAMES, depths, strict=True))
    }  # fmt: skip
    data = {"shards": "data/imagenette-val-{000..003}.tar", "images": 1024, "size": 224,
            "resize": 256, "mean": [0.485, 0.456, 0.406], "std": [0.229, 0.224, 0.225]}  # fmt: skip
    notes = [f"{NAMES[2]} has {shallow} blocks, the others {depth}: not compared at equal depth."]
    made = Study(models, data, notes=notes)
    image = np.stack([smooth(side, noise) for _ in range(3)])
    for kind, (name, deep) in enumerate(zip(NAMES, depths, strict=True)):
        parts = [frequencies, representation, *([attention] if kind < 2 else [])]
        made.add((name,), [r for part in parts for r in part(deep, kind, noise)])
        made.points[(name,)] = {
            label: np.column_stack([noise.normal(0, 1, (90, 2)), np.arange(90) % 3])
            for label in layers(deep)
        }
        made.pictures[(name,)] = {f"image_{i}": x for i, x in enumerate(image)}
        if kind < 2:
            maps = {
                f"image_{i}/attention_block_{deep - 1:02d}": x[::-1] for i, x in enumerate(image)
            }
            made.pictures[(name,)] |= maps
    levels = {(0, 0): 1.0, (0, 1): 0.46, (0, 2): 0.73, (1, 1): 1.0, (1, 2): 0.42, (2, 2): 1.0}
    for (i, j), level in levels.items():
        made.add((NAMES[i], NAMES[j]), similarity((depths[i], depths[j]), level, noise))
        if i != j:
            made.add((NAMES[i], NAMES[j]), agreement(level + 0.2))
    return made
