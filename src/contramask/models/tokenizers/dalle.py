"""The encoder of DALL-E's discrete VAE, BEiT's tokenizer. Ramesh et al., 2021: arXiv:2102.12092.

The architecture is that of the published weights; names of layers are theirs.
"""

import re
from collections import OrderedDict
from collections.abc import Mapping

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from contramask.models.tokenizers.tokenizer import Tokenizer
from contramask.types import UserError

GROUPS = 4  # at full, half, fourth and eighth size
EPSILON = 0.1  # of the logit-Laplace distribution the VAE was trained with


class _Block(nn.Module):
    """id(x) + gain res(x), res: four times ReLU and convolution; the gain is 1 / blocks^2."""

    def __init__(self, width: int, out: int, gain: float):
        super().__init__()
        inner, self.gain = out // 4, gain
        self.id_path = nn.Identity() if width == out else nn.Conv2d(width, out, 1)
        parts: OrderedDict[str, nn.Module] = OrderedDict()
        for i, (a, b) in enumerate([(width, inner), (inner, inner), (inner, inner), (inner, out)]):
            side = 1 if i == 3 else 3
            parts[f"relu_{i + 1}"] = nn.ReLU()
            parts[f"conv_{i + 1}"] = nn.Conv2d(a, b, side, padding=side // 2)
        self.res_path = nn.Sequential(parts)

    def forward(self, x: Float[Tensor, "B C H W"]) -> Float[Tensor, "B K H W"]:
        return self.id_path(x) + self.gain * self.res_path(x)


class DalleTokenizer(Tokenizer):
    """The word with the largest logit, one for 8 x 8 pixels.

    In the published code the convolutions run in half precision on a GPU; here in float32.

    Args:
        width: channels of the first group; each of the four has twice as many as the one before.
        blocks: of a group.
        vocabulary: words.
    """

    def __init__(self, *, width: int = 256, blocks: int = 2, vocabulary: int = 8192):
        super().__init__()
        self.vocabulary, self.stride = vocabulary, 2 ** (GROUPS - 1)
        gain, last = 1 / (GROUPS * blocks) ** 2, width
        parts: OrderedDict[str, nn.Module] = OrderedDict(input=nn.Conv2d(3, width, 7, padding=3))
        for g in range(GROUPS):
            group: OrderedDict[str, nn.Module] = OrderedDict()
            for i in range(blocks):
                group[f"block_{i + 1}"] = _Block(last, width << g, gain)
                last = width << g
            if g < GROUPS - 1:
                group["pool"] = nn.MaxPool2d(2)
            parts[f"group_{g + 1}"] = nn.Sequential(group)
        head: OrderedDict[str, nn.Module] = OrderedDict(relu=nn.ReLU())
        head["conv"] = nn.Conv2d(last, vocabulary, 1)
        self.blocks = nn.Sequential(OrderedDict([*parts.items(), ("output", nn.Sequential(head))]))

    def forward(self, image: Float[Tensor, "B 3 H W"]) -> Int[Tensor, "B N"]:
        return self.logits(image).argmax(1).flatten(1)

    def logits(self, image: Float[Tensor, "B 3 H W"]) -> Float[Tensor, "B V h w"]:
        """Scores of all words for an image in [0, 1], (H / 8, W / 8) places."""
        x = image.to(self.blocks[0].weight.dtype)  # pyright: ignore
        return self.blocks((1 - 2 * EPSILON) * x + EPSILON)

    @classmethod
    def from_state(cls, state: Mapping[str, Tensor]) -> "DalleTokenizer":
        """The network of a state dict with the published names (`blocks.input.w` ...).

        Raises:
            UserError: if a tensor is missing, left over or of another size.
        """
        named = {re.sub(r"^.*?(?=blocks\.)", "", k): v.float() for k, v in state.items()}
        named = {
            re.sub(r"\.w$", ".weight", re.sub(r"\.b$", ".bias", k)): v for k, v in named.items()
        }
        first, last = (named.get(f"blocks.{k}.weight") for k in ("input", "output.conv"))
        if first is None or last is None:
            raise UserError(
                f"no encoder of DALL-E: it has blocks.input.w and blocks.output.conv.w, the file "
                f"has {', '.join(list(state)[:3]) or 'nothing'} ...; give its state dict"
            )
        found = [re.match(r"blocks\.group_1\.block_(\d+)\.", k) for k in named]
        blocks = max((int(m[1]) for m in found if m), default=0)
        with torch.device("meta"):
            net = cls(width=len(first), blocks=max(blocks, 1), vocabulary=len(last))
        try:
            net.load_state_dict(named, strict=True, assign=True)
        except RuntimeError as error:
            text = " ".join(str(error).split())
            raise UserError(f"not the encoder of DALL-E: {text[:400]}") from error
        return net
