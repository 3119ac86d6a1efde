"""What a build has ahead of it, as far as its time depends on it."""

from collections.abc import Sequence
from dataclasses import dataclass

from gradindex.influence.codes import CodeSettings, default_length
from gradindex.memory import Allowance
from gradindex.model.network import LanguageModel
from gradindex.modules import Module
from gradindex.storage.build_plan import Plan
from indexer.calibrate import stacked_queries
from indexer.code_length import longest
from indexer.fit.budget import FitBytes, gpu_width, partitions
from indexer.pace.speed import Work, in_groups


@dataclass(frozen=True)
class Ahead:
    """What a build has ahead of it: sequences, and what of them is held at once.

    `lengths` are the tokens of all sequences or of a sample, `count` the number of all. `code` has
    K as it is or is thought to be. The modules of each of the `partitions` are fitted together;
    `together` queries are scored exactly in a pass.
    """

    lengths: Sequence[int]
    count: int
    batch_tokens: int
    code: CodeSettings
    partitions: list[list[Module]]
    fit: FitBytes
    together: int

    @classmethod
    def of(
        cls, model: LanguageModel, modules: list[Module], plan: Plan, allowance: Allowance,
        lengths: Sequence[int], count: int, batch_tokens: int, bits: int | None,
    ) -> "Ahead":
        """What a plan has ahead of it with this model; `bits` is K, None where it isn't settled."""
        blocks, width = plan.covariance_blocks, model.accumulate.itemsize
        return cls(
            lengths, count, batch_tokens,
            CodeSettings.of(bits or longest(modules, default_length(plan.sequence_length)), modules,
                            plan.seed, plan.damping),
            partitions(modules, blocks, width, allowance.planned,
                       gpu_width(model.device, plan.eigen_dtype)),
            FitBytes.of(modules, blocks, width), stacked_queries(model, modules, allowance))

    def work(self, sequences: int, group: int) -> Work:
        """The work on so many of the sequences, batched within groups."""
        whole = Work.of(list(in_groups(self.lengths, group)), self.batch_tokens)
        return whole * (sequences / len(self.lengths))
