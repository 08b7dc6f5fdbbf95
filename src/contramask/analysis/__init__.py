"""What an objective does to the representation.

from contramask.analysis import analyse, suite
from contramask.checkpoints.export import load_backbone

backbone, _ = load_backbone(Path("runs/mae"))
found = analyse(backbone, [images], suite(["attention", "fourier", "geometry"]))
found.readings["attn/distance"].value  # in pixels, a number for each block
"""

from contramask.analysis.analysis import Analysis as Analysis
from contramask.analysis.analysis import Tap as Tap
from contramask.analysis.cka import compare as compare
from contramask.analysis.grams import Grams as Grams
from contramask.analysis.reading import Reading as Reading
from contramask.analysis.run import analyse as analyse
from contramask.analysis.study import Study as Study
from contramask.analysis.suite import Settings as Settings
from contramask.analysis.suite import suite as suite
