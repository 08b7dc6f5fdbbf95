"""The layouts that are known, in the order in which a file is held against them."""

from contramask.checkpoints.layouts.beit import BEIT, SIMMIM
from contramask.checkpoints.layouts.contramask import CONTRAMASK
from contramask.checkpoints.layouts.dino import DINO, DINO_V2, IBOT
from contramask.checkpoints.layouts.ijepa import IJEPA
from contramask.checkpoints.layouts.layout import Layout
from contramask.checkpoints.layouts.lightning import LIGHTNING
from contramask.checkpoints.layouts.mae import MAE
from contramask.checkpoints.layouts.moco import MOCO_V3
from contramask.checkpoints.layouts.plain import PLAIN

# What is told by its own marks stands before what would take any ViT.
KNOWN = (
    CONTRAMASK,
    MOCO_V3,
    DINO_V2,
    IBOT,
    DINO,
    SIMMIM,
    BEIT,
    IJEPA,
    MAE,
    PLAIN,
    LIGHTNING,
)
LAYOUTS: dict[str, Layout] = {layout.name: layout for layout in KNOWN}
