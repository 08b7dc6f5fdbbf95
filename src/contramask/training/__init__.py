"""LightningModules, all final.

Contrastive, masked and hybrid pretraining are one module under three configurations; the three
names are for readers who look for them.
"""
