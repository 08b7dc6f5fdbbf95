"""Where patches are hidden: the masks that a configuration may name."""

from contramask.masks.blocks import BlockMasking as BlockMasking
from contramask.masks.blocks import StratifiedBlockMasking as StratifiedBlockMasking
from contramask.masks.blocks import VariedBlockMasking as VariedBlockMasking
from contramask.masks.masking import Masking as Masking
from contramask.masks.multiblock import MultiblockMasking as MultiblockMasking
from contramask.masks.scattered import RandomMasking as RandomMasking
from contramask.masks.scattered import UnitMasking as UnitMasking
