"""How weights move: rates by rules, LARS, clipping."""

from contramask.optim.clipping import Clip as Clip
from contramask.optim.lars import LARS as LARS
from contramask.optim.rates import Optim as Optim
from contramask.optim.rates import Rule as Rule
