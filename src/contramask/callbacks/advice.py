"""What diagnoses mean, and what the field does about them, in plain language with its sources."""

Advice = tuple[str, str]  # what it means, what helps

UNIFORM: Advice = (
    "all images get nearly the same feature, from which nothing can be read",
    "a lower model.optim.lr or a longer warm-up; with a teacher a momentum nearer to 1, and "
    "centred or Sinkhorn targets (SimSiam, arXiv:2011.10566, sec. 4.1; DINO, arXiv:2104.14294, "
    "sec. 5.3)",
)
DIMENSIONAL: Advice = (
    "features keep to a few directions of the many they have, which linear probes will show",
    "a larger batch, milder augmentations, a deeper or wider projector, a lower model.optim.lr; "
    "KoLeo beside distillation (arXiv:2110.09348; RankMe, arXiv:2210.02885; DINOv2, "
    "arXiv:2304.07193)",
)
CHANCE_OF_PAIRS: Advice = (
    "the two views of an image find each other no better than by chance: nothing is learned",
    "see in pictures/ that both views show the image; a lower model.optim.lr or a longer warm-up; "
    "freeze_patch_embed of the backbone (MoCo v3, arXiv:2104.02057, sec. 4); a larger batch and "
    "another temperature (SimCLR, arXiv:2002.05709, sec. 5)",
)
CHANCE_OF_WORDS: Advice = (
    "all words are equally likely to the network: nothing is learned",
    "a lower model.optim.lr or a longer warm-up; see that the tokenizer fits the data, and its "
    "mean and std those of data.images (BEiT, arXiv:2106.08254)",
)
ONE_PROTOTYPE: Advice = (
    "the teacher gives all images the same prototype: centring is too weak",
    "a centre that follows faster (centre_momentum 0.9 or lower), a higher teacher_temperature, a "
    "longer warm-up, or Sinkhorn targets (DINO, arXiv:2104.14294, sec. 5.3; DINOv2, "
    "arXiv:2304.07193)",
)
SAME_CODES: Advice = (
    "the teacher says the same of every image and the student has learned to repeat it: targets "
    "are not sharp enough",
    "a lower teacher_temperature (0.04, raised slowly if at all), prototypes frozen at first "
    "(freeze in model.optim.rules), a longer warm-up, a lower model.optim.lr (DINO, "
    "arXiv:2104.14294, sec. 5.3 and the authors' notes on training)",
)
CONSTANT_TARGETS: Advice = (
    "the teacher's tokens are the same everywhere, and easy to predict for that",
    "model.momentum nearer to 1 from the start (0.996), normalised targets, a lower model.optim.lr "
    "(I-JEPA, arXiv:2301.08243)",
)
PREDICTS_MEAN: Advice = (
    "the network predicts the mean and nothing of the image",
    "a longer warm-up and a lower model.optim.lr; targets normalised within patches (normalise: "
    "true of MAE, arXiv:2111.06377, table 1d); a smaller ratio of hidden patches. Targets that "
    "are noise cannot be predicted at all",
)
SPIKES: Advice = (
    "training is unstable; such runs may go on and end with a worse encoder, unseen in the loss",
    "freeze_patch_embed of the backbone, a lower model.optim.lr, a longer warm-up (MoCo v3, "
    "arXiv:2104.02057, sec. 4); model.optim.clip",
)
ATTENTION: Advice = (
    "queries of late blocks attend to the same places; contrastive models do so by nature and "
    "lose local detail by it, masked ones do not",
    "nothing, if the images as wholes are what counts; else a masked term beside (Park et al., "
    "arXiv:2305.00729, sec. 2 and 5)",
)
