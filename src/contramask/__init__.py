"""contramask: pretrain ViTs by contrastive, masked and hybrid objectives, and watch them."""

__version__ = "0.1.0"
