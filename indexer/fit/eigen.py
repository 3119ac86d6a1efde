"""Eigenvectors of a covariance, in float64, with something to fall back on.

LAPACK's divide and conquer is fast and now and then fails, or gives vectors that are none. So what
it gives is checked, and a slower method is tried before a fit is given up.
"""

import scipy.linalg
import torch
from torch import Tensor
from torch.linalg import LinAlgError  # type: ignore[attr-defined, unused-ignore]  # no stub

from gradindex.errors import GradindexError
from gradindex.influence.blockwise import symmetric

SOUND = 1e-8  # residual and departure from orthogonality in float64, relative


def eigenvectors(covariance: Tensor, name: str) -> Tensor:
    """Eigenvectors (columns, ascending eigenvalues) of a symmetric float64 matrix.

    Its upper triangle is read, which is all that `add_outer` sums.
    The sign of each is fixed: its entry of largest magnitude is positive. Where the first method
    (divide and conquer) fails or gives something unsound, QR iteration is tried, then once more on
    the matrix with 1e-12 of its mean eigenvalue added. Raises GradindexError, naming the matrix.

    >>> a = torch.tensor([[2.0, 1.0], [0.0, 2.0]], dtype=torch.float64)  # 1 also below, unread
    >>> [[round(entry, 4) for entry in row] for row in eigenvectors(a, "x/A").T.tolist()]
    [[0.7071, -0.7071], [0.7071, 0.7071]]
    """
    matrix = symmetric(covariance)
    reasons = []
    for solve, jitter in ((_divide_and_conquer, 0.0), (_qr_iteration, 0.0),
                          (_qr_iteration, 1e-12)):
        matrix.diagonal().add_(jitter * matrix.diagonal().mean())
        try:
            values, vectors = solve(matrix)
        except (LinAlgError, scipy.linalg.LinAlgError, ValueError) as error:
            reasons.append(" ".join(str(error).split()))
            continue
        if (wrong := _unsound(matrix, values, vectors)) is None:
            # either sign is an eigenvector's: fixed, an index has the same bytes on every machine
            largest = vectors.gather(0, vectors.abs().argmax(0, keepdim=True))
            return vectors.mul_(torch.where(largest < 0, -1.0, 1.0))
        reasons.append(wrong)
    raise GradindexError(
        f"the covariance {name} has no eigendecomposition ({'; '.join(reasons)[:300]}). Leave the "
        "module out with --modules REGEX, or fit on more sequences with --fit-sequences."
    )


def _divide_and_conquer(matrix: Tensor) -> tuple[Tensor, Tensor]:
    values, vectors = torch.linalg.eigh(matrix)
    return values, vectors


def _qr_iteration(matrix: Tensor) -> tuple[Tensor, Tensor]:
    values, vectors = scipy.linalg.eigh(matrix.numpy(), driver="ev")
    return torch.from_numpy(values), torch.from_numpy(vectors)


def _unsound(matrix: Tensor, values: Tensor, vectors: Tensor) -> str | None:
    """What is unsound about an eigendecomposition, or None."""
    residual = torch.linalg.norm((matrix @ vectors).addcmul_(vectors, values, value=-1))
    product = vectors.T @ vectors
    product.diagonal().sub_(1)
    turned = torch.linalg.norm(product)
    size = torch.linalg.norm(matrix)
    sound = residual <= SOUND * size and turned <= SOUND * len(matrix)
    return None if sound else f"residual {residual:.1e} of {size:.1e}, orthogonal to {turned:.1e}"
