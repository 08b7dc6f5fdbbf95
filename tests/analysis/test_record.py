"""Hooks: what a pattern names, what is said if it names nothing, and when there is no attention."""

import pytest
import torch
from torch import nn

from contramask.analysis.attention import AttentionStatistics
from contramask.analysis.geometry import Geometry
from contramask.analysis.record import label, matches
from contramask.analysis.run import analyse, fitting
from contramask.models.attention import attend
from contramask.models.backbone import Backbone
from contramask.types import Spec, Tokens, UserError
from tests.builders import SIZE, SPEC, randn, tiny_vit


class Blind(Backbone):
    """Tokens without attention."""

    def __init__(self):
        super().__init__()
        self.spec, self.config = Spec(dim=24, patch=4, grid=(4, 5), depth=1), {}
        self.embed = nn.Conv2d(3, 24, 4, 4)

    def forward(self, image, mask=None, fill=None, layers=()):
        x = self.embed(image).flatten(2).mT
        return Tokens(x[:, :0], x)


def test_patterns_match_part_by_part():
    assert matches("blocks.3", "blocks.*")
    assert not matches("blocks.3.mlp", "blocks.*")
    assert matches("blocks.3.mlp.fc1", "blocks.*.mlp.fc?")
    assert label("blocks.3.mlp.fc1") == "block_03.mlp.fc1"
    assert label("blocks.11") == "block_11"
    assert label("patch_embed") == "patch_embed"


def test_attention_of_a_backbone_without_it():
    with pytest.raises(UserError, match=r"Blind has no attention.*--analyses"):
        analyse(Blind(), [randn(3, 3, *SIZE)], {"attention": AttentionStatistics()})
    with pytest.raises(UserError, match="Blind has no attention"):
        fitting(Blind(), {"attention": AttentionStatistics()}, SIZE)
    both = {"attention": AttentionStatistics(), "geometry": Geometry()}
    chosen, notes = fitting(tiny_vit(), both, SIZE)
    assert (list(chosen), notes) == (["attention", "geometry"], [])


@pytest.mark.parametrize("changes", [{}, {"positions": "relative"}, {"timm": {"reg_tokens": 2}},
                                     {"timm": {"qk_norm": True}}])  # fmt: skip
def test_attention_computed_again_is_the_attention(changes):
    """What heads read of it, mixed by the projection, is what the fused module gives."""
    vit = tiny_vit(**changes).eval()
    seen = []
    for module in vit.attentions():
        module.register_forward_hook(lambda *given: seen.append(given), with_kwargs=True)
    with torch.no_grad():
        vit(randn(5, 3, *SIZE))
        for module, args, kwargs, output in seen:
            maps, heads = attend(module, args[0], kwargs.get("attn_mask"))
            torch.testing.assert_close(maps.sum(-1), torch.ones(maps.shape[:3]))
            mixed = module.proj(heads.transpose(1, 2).flatten(2))
            torch.testing.assert_close(mixed, output, rtol=1e-5, atol=1e-6)
    assert len(seen) == SPEC.depth


def test_no_images_is_told():
    with pytest.raises(UserError, match="0 images over 1 ranks"):
        analyse(tiny_vit(), [], {"attention": AttentionStatistics()})
