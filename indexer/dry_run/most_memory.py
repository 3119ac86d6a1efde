"""The most memory that each stage of a build takes.

In each stage: the process with the model loaded, as measured; what the stage holds, which follows
from the modules' shapes (below); what a batch takes on top (activations, logits), measured as the
peak while batches ran; and, on the host, what is still taken when they are done: the C library
keeps freed pieces below 32 MB, into which batches of other shapes, still to come, don't fit.
With c = Σ (i² + o²), or what their blocks have, and e = Σ o·i entries over modules, w bytes an
entry of sums and curvature (4; 8 for a float64 model):
- covariance, eigenvectors, eigenvalues: see `FitMoments`;
- pairs: curvature w·(c + e), and P_u of the queries that are scored together;
- encode: curvature, the codes' projections, records and codes of a segment and of the one before,
  which is being sealed.
What is kept on the model's device and what in the host's memory is told apart.
"""

from collections.abc import Iterator
from dataclasses import dataclass

from gradindex.influence.codes import CodeSettings
from gradindex.modules import Module
from gradindex.storage.layout import code_bytes
from indexer.fit.budget import FitMoments, curvature_bytes, held_bytes, projection_bytes

RECORD_BYTES = 2000  # of a Record in memory besides its tokens


@dataclass
class Memory:
    """Bytes on the host and on the model's device, which is the host where there is no GPU."""

    host: int = 0
    device: int = 0


@dataclass(frozen=True)
class Held:
    """What decides what a build holds.

    `partitions` of modules are fitted one after the other; `width` is the bytes of a number of
    curvature, of which at most `curvature_room` bytes stay in memory [all]. `segment` sequences of
    at most `longest` tokens get a `code`; `together` queries are scored exactly in a pass. `batch`
    bytes are a batch's.
    """

    partitions: list[list[Module]]
    covariance_blocks: int
    width: int
    curvature_room: int | None
    segment: int
    longest: int
    code: CodeSettings
    together: int
    batch: int
    gpu: int | None = None

    def moments(self) -> Iterator[Memory]:
        """What is held besides the model at the moments of a build at which it is most."""
        modules = [module for group in self.partitions for module in group]
        largest = max(self.partitions, key=lambda group: held_bytes(
            group, self.covariance_blocks, self.width, self.gpu))
        fit = FitMoments.of(largest, self.covariance_blocks, self.width, self.gpu)
        yield Memory(fit.covariance.host, fit.covariance.device + self.batch)
        yield Memory(fit.eigenvectors.host, fit.eigenvectors.device)
        yield Memory(fit.eigenvalues.host, fit.eigenvalues.device + self.batch)
        yield Memory(fit.curvature.host)
        whole = curvature_bytes(modules, self.covariance_blocks, self.width)
        curvature = whole if self.curvature_room is None else min(whole, self.curvature_room)
        tables = [self.width * self.together * module.size for module in modules]
        # the queries of a module are joined into one tensor, beside what they were
        yield Memory(0, curvature + sum(tables) + max(self.batch, *tables))
        held = curvature + projection_bytes(modules, self.width, self.code)
        texts = self.segment * (RECORD_BYTES + 5 * self.longest)
        codes = self.segment * code_bytes(self.code.length)
        yield Memory(2 * texts + 4 * codes, held + self.batch)  # those that are sealed, three times


def most_memory(held: Held, host: int, device: int | None) -> Memory:
    """The most of a build beside a model: `host` and `device` bytes are taken by now.

    `device` is None where there is no GPU: both are one memory then, and add up.
    """
    moments = list(held.moments())
    if device is None:
        return Memory(host + max(moment.host + moment.device for moment in moments))
    return Memory(host + max(moment.host for moment in moments),
                  device + max(moment.device for moment in moments))
