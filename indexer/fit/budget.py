"""What memory and disk a model's parts take, from the shapes of its modules alone.

A batch is measured; everything else that a build or a search holds follows from shapes.
`benchmarks/budget.py` compares it with real peaks.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from gradindex.influence.blockwise import square_entries, square_shapes
from gradindex.influence.codes import CodeSettings
from gradindex.influence.curvature import file_entries
from gradindex.memory import LOW_RANK
from gradindex.modules import Module
from indexer.fit.eigen import TOGETHER

SOLVER = 34  # bytes of an eigendecomposition's work for each entry of its matrix, as measured
GPU_SOLVER = 5  # numbers of a GPU's: matrix, vectors and a residual, and what its solver works in


@dataclass(frozen=True)
class Moment:
    """Bytes held on the host and on the model's device, besides model and batch."""

    host: int
    device: int

    @property
    def both(self) -> int:
        """Bytes of both together: one memory, where there is no GPU."""
        return self.host + self.device


@dataclass(frozen=True)
class FitMoments:
    """The moments of a fit of some modules at which it holds most.

    covariance: sums A and S, and their totals in float64. eigenvectors: the totals, the work on the
    largest matrix (on a GPU on as many as go together), a module's eigenvectors in float64.
    eigenvalues: eigenvectors and sums Λ, their totals in float64. curvature: these, a module's
    eigenvectors in float64 and its curvature.
    """

    covariance: Moment
    eigenvectors: Moment
    eigenvalues: Moment
    curvature: Moment

    @classmethod
    def of(
        cls, modules: Sequence[Module], covariance_blocks: int, width: int, gpu: int | None = None
    ) -> "FitMoments":
        """`width` is the bytes of a number of curvature (4; 8 for a float64 model).

        `gpu` is those of a number in which a GPU decomposes (`gpu_width`), None on a host.

        >>> moments = FitMoments.of([Module("m", 0, "mlp", 2, 3, False)], 1, 4)
        >>> moments.covariance  # A [3, 3] and S [2, 2]: 13 numbers, as totals and as sums
        Moment(host=104, device=52)
        """
        squares = [square_entries(module, covariance_blocks) for module in modules]
        tables = [module.size for module in modules]
        square, table = sum(squares), sum(tables)
        # a host decomposes matrices one by one, so the largest block's work is all there is at once
        largest = max(m for module in modules
                      for _, m in square_shapes(module, covariance_blocks).values())
        # a module's eigenvectors as they are read, and the curvature that is made of them
        saved = max((8 + width) * s + width * t for s, t in zip(squares, tables, strict=True))
        return cls(
            Moment(8 * square, width * square),
            Moment(8 * square + SOLVER * largest**2 + 8 * max(squares), 0) if gpu is None else
            Moment(8 * square + 8 * max(min(TOGETHER, square), *squares),
                   GPU_SOLVER * gpu * max(min(TOGETHER, square), largest**2)),
            Moment(8 * table, width * (square + table)), Moment(8 * table + saved, 0))

    @property
    def all(self) -> tuple[Moment, ...]:
        """All of them, in order."""
        return self.covariance, self.eigenvectors, self.eigenvalues, self.curvature

    @property
    def most(self) -> Moment:
        """The one that holds most."""
        return max(self.all, key=lambda moment: moment.both)


def gpu_width(device: torch.device, eigen_dtype: str) -> int | None:
    """The bytes of a number in which a GPU decomposes, None on a host.

    >>> gpu_width(torch.device("cuda"), "float32"), gpu_width(torch.device("cpu"), "float64")
    (4, None)
    """
    return None if device.type == "cpu" else int(getattr(torch, eigen_dtype).itemsize)


def held_bytes(
    modules: Sequence[Module], covariance_blocks: int, width: int, gpu: int | None = None
) -> int:
    """The most that fitting some modules together holds besides model and batch, in bytes.

    That is where the model is: with `gpu` (`gpu_width`), on the GPU alone.
    """
    moments = FitMoments.of(modules, covariance_blocks, width, gpu)
    return moments.most.both if gpu is None else max(moment.device for moment in moments.all)


def curvature_bytes(modules: Sequence[Module], covariance_blocks: int, width: int) -> int:
    """Bytes of eigenvectors and eigenvalues.

    >>> curvature_bytes([Module("m", 0, "mlp", 2, 3, False)], 1, 4)  # 9 + 4 + 6 numbers
    76
    """
    return width * sum(file_entries(module, covariance_blocks) for module in modules)


def projection_bytes(modules: Sequence[Module], width: int, code: CodeSettings) -> int:
    """Bytes of what a code needs of each module: P and R of both sides, R as int8, and signs."""
    return sum((width + 1) * (k_s * module.shape[0] + k_a * module.shape[1]) + width * k_s * k_a
               for module in modules for k_s, k_a in [code.sides(module)])


def partitions(
    modules: list[Module], covariance_blocks: int, width: int, held: int | None,
    gpu: int | None = None,
) -> list[list[Module]]:
    """Modules that follow each other, fitted together: what they hold is at most `held` bytes.

    One that holds more is alone. None: all together.

    >>> modules = [Module(name, 0, "mlp", 2, 3, False) for name in "abcde"]
    >>> two = held_bytes(modules[:2], 1, 4)
    >>> ["".join(module.name for module in group) for group in partitions(modules, 1, 4, two)]
    ['ab', 'cd', 'e']
    """
    groups: list[list[Module]] = []
    for module in modules:
        if groups and (held is None or held_bytes(
                [*groups[-1], module], covariance_blocks, width, gpu) <= held):
            groups[-1].append(module)
        else:
            groups.append([module])
    return groups


def disk_bytes(
    groups: list[list[Module]], covariance_blocks: int, width: int, waiting: int = 0
) -> int:
    """The most that a fit of some partitions holds on the disk at once.

    Of the partition under way its running sums, and eigenvectors, float64 until its end, and a file
    is replaced as a whole: A and S beside Q_A and Q_S, then Λ twice, or once beside the curvature;
    where several processes share the fit, the sums of at most `waiting` blocks that are yet to be
    added. Of those before it the curvature, `width` bytes a number.
    """
    most = finished = 0
    for modules in groups:
        square = sum(square_entries(module, covariance_blocks) for module in modules)
        table = sum(module.size for module in modules)
        fitted = width * (square + table)  # what stays of the partition: its curvature
        ahead = waiting * width * max(square, table)
        # A, S beside Q_A, Q_S, 8 bytes a number each; then Λ twice, or once beside the curvature
        most = max(most, finished + ahead + 16 * square + max(16 * table, 8 * table + fitted))
        finished += fitted
    return most


@dataclass(frozen=True)
class Budget:
    """Bytes of each part, on the model's device but for `host_sums`.

    `model`; `sums`, the most that a partition of the fit holds, and `host_sums` of it on the host
    whatever the device, in `partitions`; `module`, the largest module's curvature, and
    `curvature` all of it; `projections` of the codes; `query`, one query's preconditioned gradient,
    and at rank 32; `code` of a sequence; `fit_disk`, the most that the fit holds on disk.
    """

    model: int
    sums: int
    host_sums: int
    partitions: int
    module: int
    curvature: int
    projections: int
    query: int
    query_low_rank: int
    fit_disk: int

    @property
    def parts(self) -> dict[str, int]:
        """What a dry run shows, by name."""
        return {
            "model": self.model,
            f"sums of the fit, in {self.partitions} partition{'s' * (self.partitions > 1)}":
                self.sums + self.host_sums,
            "curvature": self.curvature, "projections": self.projections,
            "a query's gradient": self.query, f"at rank {LOW_RANK}": self.query_low_rank,
        }


@dataclass(frozen=True)
class FitBytes:
    """Bytes of all A and S (`squares`) and of all Λ (`tables`) in float64, and of the curvature.

    >>> FitBytes.of([Module("m", 0, "mlp", 2, 3, False)], 1, 4)  # 9 + 4 and 6 numbers
    FitBytes(squares=104, tables=48, curvature=76)
    """

    squares: int
    tables: int
    curvature: int

    @classmethod
    def of(cls, modules: Sequence[Module], covariance_blocks: int, width: int) -> "FitBytes":
        """`width` is the bytes of a number of curvature."""
        return cls(8 * sum(square_entries(module, covariance_blocks) for module in modules),
                   8 * sum(module.size for module in modules),
                   curvature_bytes(modules, covariance_blocks, width))


def budget(
    model_bytes: int, groups: list[list[Module]], covariance_blocks: int, width: int,
    code: CodeSettings, gpu: int | None = None,
) -> Budget:
    """The budget of a model of `model_bytes` whose modules are fitted in these partitions.

    `width` is the bytes of a number of curvature (4, or 8 for a float64 model), `gpu` as for
    `FitMoments.of`.
    """
    modules = [module for group in groups for module in group]
    most = max((FitMoments.of(group, covariance_blocks, width, gpu).most for group in groups),
               key=lambda moment: moment.both)
    return Budget(
        model=model_bytes, sums=most.device, host_sums=most.host, partitions=len(groups),
        module=max(curvature_bytes([module], covariance_blocks, width) for module in modules),
        curvature=curvature_bytes(modules, covariance_blocks, width),
        projections=projection_bytes(modules, width, code),
        query=width * sum(module.size for module in modules),
        query_low_rank=width * sum(min(LOW_RANK * sum(module.shape), module.size)
                                   for module in modules),
        fit_disk=disk_bytes(groups, covariance_blocks, width),
    )
