"""Many dimensions laid out in two. The only importer of scikit-learn."""

import numpy as np
from jaxtyping import Float
from numpy.typing import NDArray
from sklearn.manifold import TSNE

PERPLEXITY = 20.0  # of Park et al., 2023 (arXiv:2305.00729)


def plane(points: Float[NDArray[np.float32], "n D"], *, seed: int = 0) -> Float[NDArray, "n 2"]:
    """t-SNE with the settings of Park et al.: perplexity 20, 1,000 iterations.

    It starts from principal components, so that equal points have equal pictures; the paper starts
    at random.

    Args:
        points: finite; fewer than 3 are laid out as zeros.
        seed: of the descent.
    """
    if len(points) < 3 or not np.isfinite(points).all():
        return np.zeros((len(points), 2))
    perplexity = min(PERPLEXITY, (len(points) - 1) / 3)
    tsne = TSNE(perplexity=perplexity, init="pca", random_state=seed, max_iter=1000)
    return tsne.fit_transform(points)
