"""Label propagation: patches of a frame take the labels of the most similar patches before it.

The protocol of Jabri et al. (arXiv:2006.14613) as DINO evaluates features by it (arXiv:2104.14294),
without training.
"""

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float, Int, UInt8
from torch import Tensor

from contramask.errors import UserError


@torch.no_grad()
def propagate(
    target: Float[Tensor, "N F"],
    context: Float[Tensor, "C N F"],
    labels: Float[Tensor, "C N L"],
    *,
    grid: tuple[int, int],
    radius: int = 12,
    topk: int = 5,
    temperature: float = 0.1,
    elements: int = 2**24,
) -> Float[Tensor, "N L"]:
    """Labels of a frame from those of C frames with as many patches.

    The weight of a context patch is exp(cosine / temperature) if it is one of the `topk` most
    similar within the window, else 0; weights sum to 1. Patches as similar as the last of the top k
    count too, so that the result does not hang on an order. Target patches are taken in slices:
    about max(elements, C N) affinities are held at once.

    Args:
        target: patches of the frame, of unit length, row by row.
        context: patches of frames with labels, of unit length.
        labels: of each context patch, summing to 1.
        grid: (rows, columns) of patches, N = rows * columns.
        radius: of the window in patches: |Δrow| <= radius and |Δcolumn| <= radius; 0: no window.
        topk: how many context patches count.
        temperature: the smaller, the more the most similar count.
        elements: bound of the memory.

    Raises:
        UserError: for a top k outside 1..C N, a radius below 0 or a temperature of 0.
    """
    count = context.shape[0] * context.shape[1]
    if not 1 <= topk <= count:
        raise UserError(
            f"propagation: topk is {topk}; the context has {count} patches and topk lies in "
            f"1..{count}; set topk, or larger frames"
        )
    if radius < 0 or temperature <= 0:
        raise UserError(
            f"propagation: radius is {radius} and temperature {temperature:g}; a radius is at "
            "least 0 (no window), a temperature more than 0"
        )
    bank, values = context.flatten(0, 1), labels.flatten(0, 1)
    slices = torch.arange(len(target), device=target.device).split(max(1, elements // count))
    found = []
    # Under autocast bfloat16 would tie patches that are not alike.
    with torch.autocast(target.device.type, enabled=False):
        for rows in slices:
            cosine = target[rows].float() @ bank.float().mT  # (n, C N)
            if radius:
                near = window(rows, grid, radius).repeat(1, len(context))
                cosine = cosine.masked_fill(~near, -torch.inf)
            top = cosine.topk(topk, dim=1).values
            # Less than the k-th is left out; an infinite k-th means that all in the window count.
            weights = ((cosine - top[:, :1]) / temperature).exp()
            weights = weights.masked_fill(cosine < top[:, -1:], 0.0)
            found.append(weights / weights.sum(1, keepdim=True) @ values.float())
    return torch.cat(found)


def window(places: Int[Tensor, " n"], grid: tuple[int, int], radius: int) -> Bool[Tensor, "n N"]:
    """Which patches of a grid lie within `radius` rows and columns of each of some places."""
    columns = grid[1]
    every = torch.arange(grid[0] * columns, device=places.device)
    rows = (places[:, None] // columns - every // columns).abs()
    return (rows <= radius) & ((places[:, None] % columns - every % columns).abs() <= radius)


def labels_on_grid(
    mask: UInt8[Tensor, "H W"], objects: Int[Tensor, " O"], grid: tuple[int, int]
) -> Float[Tensor, "N L"]:
    """One-hot labels of patches: background, then each object; the nearest pixel decides.

    Args:
        mask: the index of the object at each pixel; any other index is background.
        objects: the indices of the O = L - 1 objects.
        grid: (rows, columns) of patches, N = rows * columns.
    """
    small = _nearest(mask, grid).flatten()
    hit = small[:, None] == objects.to(small.device)  # (N, O)
    return torch.cat([~hit.any(1, keepdim=True), hit], dim=1).float()


def mask_of_labels(
    labels: Float[Tensor, "N L"],
    objects: Int[Tensor, " O"],
    *,
    grid: tuple[int, int],
    patch: int,
    size: tuple[int, int],
) -> UInt8[Tensor, "H W"]:
    """Soft labels of patches to the index of an object at each pixel, 0 for background.

    Each label's map is enlarged by the patch, bilinearly, and stretched to [0, 1]; the largest
    wins; the nearest pixel of that decides at the video's own size.

    Args:
        labels: background, then each object.
        objects: the indices of the O = L - 1 objects, 1..255.
        grid: (rows, columns) of patches.
        patch: side of a patch in pixels.
        size: (height, width) of the mask.
    """
    maps = labels.mT.reshape(1, -1, *grid).float()
    maps = F.interpolate(maps, scale_factor=float(patch), mode="bilinear", align_corners=False)[0]
    flat = maps.flatten(1)
    least = flat.amin(1, keepdim=True)
    span = flat.amax(1, keepdim=True) - least
    # A label with one value everywhere cannot be stretched: nothing (0), or everything (1).
    stretched = torch.where(span > 0, (flat - least) / span.clamp(min=1e-30), (least > 0).float())
    index = torch.cat([objects.new_zeros(1), objects]).to(torch.uint8).to(labels.device)
    return _nearest(index[stretched.argmax(0)].view(maps.shape[1:]), size)


def _nearest(mask: UInt8[Tensor, "h w"], size: tuple[int, int]) -> UInt8[Tensor, "H W"]:
    """Resized; each pixel takes the one its centre falls into. In whole numbers: no rounding."""
    for dim, (old, new) in enumerate(zip(mask.shape, size, strict=True)):
        centres = 2 * torch.arange(new, device=mask.device) + 1
        mask = mask.index_select(dim, centres * old // (2 * new))
    return mask
