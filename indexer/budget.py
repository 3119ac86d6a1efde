"""What memory and disk a model's parts take, from the shapes of its modules alone.

The dry run measures a batch; everything else that a build or a search holds follows from shapes.
`benchmarks/budget.py` compares it with real peaks.
"""

from dataclasses import dataclass

from gradindex.curvature import file_entries
from gradindex.modules import Module
from indexer.fit import disk_bytes, held_bytes, partitions

LOW_RANK = 32  # of a query's gradient, where all of it doesn't fit


@dataclass(frozen=True)
class Budget:
    """Bytes of each part, on the model's device but for `host_sums`.

    `model`; `sums`, the most that a partition of the fit holds (float32, its share of it on the
    host in float64 as `host_sums`), in `partitions`; `module`, the largest module's curvature, and
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


def budget(
    model_bytes: int, modules: list[Module], width: int, held: int | None, inner: int
) -> Budget:
    """The budget of a model with these modules tracked.

    `width` is the bytes of a number of curvature (4, or 8 for a float64 model), `held` what a
    partition of the fit may hold, `inner` the codes' k.
    """
    every = partitions(modules, held)
    shapes = [module.shape for module in modules]

    def square(some: list[Module]) -> int:
        return sum(o * o + i * i for o, i in (module.shape for module in some))

    def table(some: list[Module]) -> int:
        return sum(o * i for o, i in (module.shape for module in some))

    on_device = max(width * max(square(some), square(some) + table(some)) for some in every)
    on_host = max(sum(map(held_bytes, some)) for some in every) - on_device
    return Budget(
        model=model_bytes, sums=on_device, host_sums=max(0, on_host), partitions=len(every),
        module=width * max(map(file_entries, modules)),
        curvature=width * sum(map(file_entries, modules)),
        projections=sum((width + 1) * min(inner, o, i) * (o + i) + width * min(inner, o, i) ** 2
                        for o, i in shapes),
        query=width * table(modules),
        query_low_rank=width * sum(min(LOW_RANK * (o + i), o * i) for o, i in shapes),
        fit_disk=disk_bytes(every, width),
    )
