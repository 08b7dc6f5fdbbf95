"""Name the visual words of hidden patches. Bao et al., 2022: BEiT, arXiv:2106.08254."""

from pathlib import Path
from typing import Any, Literal

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor, nn

from contramask import distributed
from contramask.functional.patches import blacken
from contramask.models.tokenizers.files import fingerprint, load_tokenizer
from contramask.models.tokenizers.tokenizer import Beside, Tokenizer
from contramask.objectives.objective import Feats, Objective, need_fill
from contramask.types import Batch, Loss, Pass, Spec, Step, UserError


class BEiT(Objective):
    """Cross-entropy of the words of hidden patches, by one linear layer.

        loss = mean over hidden patches of -log softmax(head(token))[word]

    The words are those of the whole image at the tokenizer's own size: the crop is resized on the
    device (bicubic, antialiased). The authors cut the crop from the image twice, the tokenizer's
    with a Lanczos filter, which an objective cannot: it sees crops.

    Args:
        spec: of the backbone.
        mask: a mask with a fill.
        tokenizer: a file of `contramask tokenizer fit` or of DALL-E's encoder, as a path from where
            the run is started; or a tokenizer.
        vocabulary: words the head knows, as many as the tokenizer's.
        view: the group of crops it looks at.
        average: over which hidden patches: of a `rank`, as in the authors' code, where a rank with
            few of them weighs each more, or of the `world`. The same where masks hide equally many.
        mean: of the data's normalisation (data.images.mean), undone for the tokenizer.
        std: likewise.
    """

    fingerprint: Tensor

    def __init__(
        self,
        spec: Spec,
        *,
        mask: str,
        tokenizer: str | Tokenizer,
        vocabulary: int = 8192,
        view: str = "mild",
        average: Literal["rank", "world"] = "rank",
        mean: tuple[float, float, float] = (0.485, 0.456, 0.406),
        std: tuple[float, float, float] = (0.229, 0.224, 0.225),
    ):
        super().__init__()
        self.passes = (Pass(view, mask),)
        self.spec, self.average = spec, average
        found = load_tokenizer(Path(tokenizer)) if isinstance(tokenizer, str) else tokenizer
        if found.vocabulary != vocabulary:
            raise UserError(
                f"the tokenizer has {found.vocabulary} words and the head {vocabulary}; set "
                f"model.objectives.NAME.init_args.vocabulary: {found.vocabulary}"
            )
        self.tokenizer = Beside(found)  # in a file already: no part of checkpoints
        self.register_buffer("fingerprint", torch.tensor(fingerprint(found)))
        self.register_load_state_dict_pre_hook(_same_tokenizer)
        scale = torch.tensor([mean, std])[..., None, None]  # (2, 3, 1, 1)
        self.register_buffer("scale", scale, persistent=False)
        self.head = nn.Linear(spec.dim, vocabulary)
        nn.init.trunc_normal_(self.head.weight, std=0.02, a=-0.02, b=0.02)
        nn.init.zeros_(self.head.bias)

    def words(self, image: Float[Tensor, "B 3 H W"]) -> Int[Tensor, "B N"]:
        """The words of normalised images, one for each patch."""
        mean, std = self.get_buffer("scale")
        return self.tokenizer.module.words(image * std + mean, self.spec.grid)

    def forward(
        self,
        feats: Feats,
        batch: Batch,
        step: Step,
        words: Int[Tensor, "VB N"] | None = None,
    ) -> Loss:
        """The loss. `words` are those of every patch where they are known; None: asked for."""
        tokens = feats[self.passes[0]]
        assert tokens.mask is not None
        need_fill("BEiT", tokens, self.passes[0])
        image = batch["views"][self.passes[0].view].flatten(0, 1)  # (VB, 3, H, W)
        hidden, visible = tokens.mask.hidden, tokens.mask.visible
        words = self.words(image) if words is None else words
        if visible is None:
            asked, words = tokens.patch[hidden], words[hidden]
        else:  # equally many in each image: no need to wait for the device
            where = hidden.to(torch.uint8).argsort(dim=1, descending=True, stable=True)
            where = where[:, : hidden.shape[1] - visible]
            width = tokens.patch.shape[2]
            asked = tokens.patch.gather(1, where[..., None].expand(-1, -1, width)).flatten(0, 1)
            words = words.gather(1, where).flatten()
        scores = self.head(asked).float()
        loss = F.cross_entropy(scores, words, reduction="sum") / self._count(len(words), scores)
        return Loss(loss, {"accuracy": (scores.detach().argmax(1) == words).float().mean()})

    def _count(self, own: int, like: Tensor) -> Tensor:
        """Hidden patches to divide by: of this rank, or the mean of all ranks."""
        count = like.new_tensor(max(own, 1))
        return distributed.mean(count) if self.average == "world" else count

    def picture(self, feats: Feats, batch: Batch, step: Step) -> dict[str, Tensor]:
        tokens = feats[self.passes[0]]
        assert tokens.mask is not None
        image = batch["views"][self.passes[0].view].flatten(0, 1)
        return {"image": image, "masked": blacken(image, tokens.mask.hidden, self.spec.patch)}


def _same_tokenizer(module: BEiT, state: dict[str, Any], prefix: str, *_: object) -> None:
    """Refuse to go on with other words than the head has learned."""
    told = state.get(f"{prefix}fingerprint")
    if told is not None and int(told) != int(module.fingerprint):
        raise UserError(
            "the run was begun with another tokenizer than the one given now: its words would be "
            "others; give the same file at model.objectives.NAME.init_args.tokenizer"
        )
