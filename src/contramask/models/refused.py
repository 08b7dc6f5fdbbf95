"""Arguments of timm that are given elsewhere here."""

from typing import Any

from contramask.types import UserError

# What timm would take and the forward here, the sizes or DDP would not, and what to do instead.
ELSEWHERE = {
    "img_size": "set model.backbone.init_args.img_size",
    "patch_size": "set model.backbone.init_args.patch_size",
    "pos_embed": "set model.backbone.init_args.positions",
    "dynamic_img_size": "crops of other sizes are taken without it",
    "dynamic_img_pad": "set crops of whole patches at data.views",
    "patch_drop_rate": "set a mask that drops patches at model.masks",
    "num_classes": "heads belong to objectives and probes",
    "in_chans": "images have three channels",
}


def refuse(arguments: dict[str, Any]) -> None:
    """Raise `UserError` for an argument that belongs elsewhere."""
    for key in arguments:
        if key in ELSEWHERE:
            raise UserError(f"timm: {key} cannot be given here: {ELSEWHERE[key]}")
    pool = arguments.get("global_pool", "token")
    if pool not in ("token", ""):
        raise UserError(
            f"timm: global_pool is {pool!r}; tokens are pooled by those who read them: leave it "
            "out, or '' for models without class token; set model.backbone.init_args.timm"
        )
