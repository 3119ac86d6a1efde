"""Eigenvectors of covariances, checked, with something to fall back on.

LAPACK's divide and conquer is fast and now and then fails, or gives vectors that are none; so may
a GPU's solver. So what either gives is checked. What is unsound from a GPU is decomposed on the
host, and there a slower method is tried before a fit is given up.

A GPU decomposes matrices of one size together, in float64, or in float32 where it computes in
float64 at a sixty-fourth of its speed. Λ is estimated anew in whatever basis comes out, so float32
changes little (George et al. 2018, §3); eigenvectors are kept in float32 anyway.
"""

from collections.abc import Callable, Iterable, Iterator, Sequence

import scipy.linalg
import torch
from torch import Tensor
from torch.linalg import LinAlgError  # type: ignore[attr-defined, unused-ignore]  # no stub

from gradindex.errors import GradindexError
from gradindex.influence.blockwise import symmetric
from gradindex.memory import ran_out
from gradindex.model.devices import float32_products
from gradindex.transfers import stacked_on_host

# residual and departure from orthogonality, relative
SOUND = {torch.float64: 1e-8, torch.float32: 1e-4}
TOGETHER = 1 << 24  # entries of matrices that a GPU is given at once: 128 MB in float64


def eigenvectors_of_all(
    covariances: Iterable[tuple[str, Tensor, torch.device]], dtype: torch.dtype,
    say: Callable[[str], object],
) -> Iterator[Tensor]:
    """The eigenvectors of covariances [n, n], float64 on the host, given with names, in order.

    Each is found on its device, on a GPU in `dtype` and those of one size together. `say` is told
    of each that had to be decomposed on the host instead. Raises GradindexError, naming the matrix,
    where one has none.
    """
    named = list[tuple[str, Tensor]]()
    # A and S come in turns and are of unlike sizes; a GPU is busy with several of one size only
    alike: dict[tuple[torch.device, int], list[int]] = {}
    for name, covariance, device in covariances:
        if device.type == "cpu":  # which are all, or none
            yield eigenvectors(covariance, name)
            continue
        alike.setdefault((device, len(covariance)), []).append(len(named))
        named.append((name, covariance))
    found: dict[int, Tensor] = {}
    for (device, _), own in alike.items():
        made = _on_device([symmetric(named[number][1]) for number in own], device, dtype)
        for number, (vectors, reason) in zip(own, made, strict=True):
            name, covariance = named[number]
            if vectors is None:
                say(f"{name} is decomposed on the host: {reason}")
                vectors = eigenvectors(covariance, name)
            found[number] = vectors
    yield from (found[number] for number in range(len(named)))


def _on_device(
    matrices: list[Tensor], device: torch.device, dtype: torch.dtype
) -> list[tuple[Tensor | None, str | None]]:
    """Eigenvectors [n, n] of matrices of one size, float64 on the host, or why there are none.

    What memory doesn't hold together is halved.
    """
    try:
        with float32_products(device):
            return _checked(torch.stack(matrices).to(device, dtype))
    except RuntimeError as error:  # a LinAlgError is one, and doesn't say of which
        no_memory = ran_out(error)
        if not (no_memory or isinstance(error, LinAlgError) or "cusolver" in str(error).lower()):
            raise
        reason = " ".join(str(error).split())[:100]
    if no_memory and len(matrices) > 1:
        half = len(matrices) // 2
        return [made for part in (matrices[:half], matrices[half:])
                for made in _on_device(part, device, dtype)]
    return [(None, f"the GPU failed ({reason})")] * len(matrices)


def _checked(matrices: Tensor) -> list[tuple[Tensor | None, str | None]]:
    """Eigenvectors of matrices [k, n, n] on a GPU, as `_on_device` gives them."""
    values, vectors = torch.linalg.eigh(matrices)
    residuals = _residuals(matrices, values, vectors)
    on_host = _fixed(vectors).cpu().double()  # waits once, for all of them
    made = list[tuple[Tensor | None, str | None]]()
    for own, row in zip(on_host, stacked_on_host(residuals).T, strict=True):
        wrong = _unsound(row.tolist(), len(own), matrices.dtype)
        made.append((own, None) if wrong is None else
                    (None, f"the GPU's eigenvectors are unsound ({wrong})"))
    return made


def eigenvectors(covariance: Tensor, name: str) -> Tensor:
    """Eigenvectors (columns, ascending eigenvalues) of a symmetric float64 matrix of the host.

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
        residuals = [float(one) for one in _residuals(matrix, values, vectors)]
        wrong = _unsound(residuals, len(matrix), matrix.dtype)
        if wrong is None:
            return _fixed(vectors)
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


def _fixed(vectors: Tensor) -> Tensor:
    """The same eigenvectors [..., n, n], the largest entry of each positive; changed in place."""
    # either sign is an eigenvector's: fixed, an index has the same bytes on every machine
    largest = vectors.gather(-2, vectors.abs().argmax(-2, keepdim=True))
    return vectors.mul_(torch.where(largest < 0, -1.0, 1.0))


def _residuals(matrices: Tensor, values: Tensor, vectors: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """‖A Q − Q Λ‖, ‖QᵀQ − I‖ and ‖A‖ of eigendecompositions, each [...]."""
    residual = torch.linalg.matrix_norm(
        (matrices @ vectors).addcmul_(vectors, values.unsqueeze(-2), value=-1))
    product = vectors.mT @ vectors
    product.diagonal(dim1=-2, dim2=-1).sub_(1)
    return residual, torch.linalg.matrix_norm(product), torch.linalg.matrix_norm(matrices)


def _unsound(residuals: Sequence[float], n: int, dtype: torch.dtype) -> str | None:
    """What is unsound about an eigendecomposition [n, n] of these `_residuals`, or None."""
    residual, turned, size = residuals
    sound = residual <= SOUND[dtype] * size and turned <= SOUND[dtype] * n
    return None if sound else f"residual {residual:.1e} of {size:.1e}, orthogonal to {turned:.1e}"
