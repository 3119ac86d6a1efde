"""Does an inverse that knows nothing of Kronecker factors agree with EK-FAC, and at what cost?

    python benchmarks/inverse.py

LiSSA and conjugate gradients solve (G+λI) x = ∇log p(query) with products of the Gauss-Newton
matrix of the tracked weights, across modules, neither Kronecker-factored nor diagonal in any basis
(Grosse et al. 2023, §5.1). Model and queries are those of `fidelity.py` and `baselines.py`.
"""

import copy
import sys
import time
from pathlib import Path

import click
import numpy as np
import torch
from scipy.stats import pearsonr, spearmanr
from torch import Tensor

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from benchmarks.baselines import BATCH_TOKENS, ByModule, Seen, look, recall, sides_of
from benchmarks.fidelity import options
from benchmarks.workload import Size, Workload, make_workload
from gradindex.influence.split_batches import plan_batches
from gradindex.progress import duration, stderr_progress
from gradindex.results import UNSCORED
from gradindex.storage.records import Record
from indexer.defaults import DAMPING

Check = tuple[str, float, float, str]  # inverse, seconds a query, passes over its sample, how near


class GaussNewton:
    """x → (G+λI)x for the weights of all tracked modules together, several x at once: [q, P].

    G is the mean over `records` of Σ_t J_tᵀ H_t J_t, J_t = ∂logits_t/∂weights and
    H_t = diag(p) − p pᵀ over scored positions: the expectation of what Λ is an expectation of,
    taken exactly over labels. λ = DAMPING · mean(Λ) of each module.
    """

    def __init__(self, work: Workload, records: list[Record]):
        self.modules, self.ekfac = work.modules, work.ekfac
        self.network = copy.deepcopy(work.model.network)
        self.network.set_attn_implementation("eager")  # the fused kernels have no forward mode
        self.count = len(records)
        self.batches = [
            work.model.batch([records[r] for r in rows])
            for rows in plan_batches([len(record.tokens) for record in records], BATCH_TOKENS)
        ]
        self.passes = 0.0  # over the records: the cost
        weights = dict(self.network.named_parameters())
        self.weights = {
            f"{m.name}.{part}": weights[f"{m.name}.{part}"].detach()
            for m in work.modules for part in ("weight", "bias")
        }
        self.damping = torch.cat([
            work.ekfac[m.name].eigenvalues.mean().repeat(m.size) * DAMPING
            for m in work.modules
        ])

    def join(self, matrices: ByModule) -> Tensor:
        """[q, P] from [q, o, i] by module."""
        return torch.cat([matrices[m.name].flatten(1) for m in self.modules], dim=1)

    def split(self, x: Tensor) -> ByModule:
        """[q, o, i] by module from [q, P]."""
        parts = x.split([m.size for m in self.modules], dim=1)
        return {m.name: part.unflatten(1, m.shape)
                for m, part in zip(self.modules, parts, strict=True)}

    def product(self, x: Tensor, batches: list | None = None) -> Tensor:
        """(G+λI)x [q, P], G over all the records or over some batches of them."""
        rows: list[ByModule] = [{} for _ in x]
        for name, matrices in self.split(x).items():
            for row, matrix in zip(rows, matrices, strict=True):
                row[f"{name}.weight"], row[f"{name}.bias"] = matrix[:, :-1], matrix[:, -1]
        total = torch.zeros_like(x)
        chosen = self.batches if batches is None else batches
        for batch in chosen:
            def logits(weights: ByModule) -> Tensor:
                return torch.func.functional_call(
                    self.network, weights, kwargs={"input_ids": batch.tokens, "use_cache": False},  # noqa: B023
                ).logits

            output, pull_back = torch.func.vjp(logits, self.weights)
            p = torch.softmax(output.detach(), dim=-1)
            p *= (batch.targets != UNSCORED).unsqueeze(-1)
            for summed, tangent in zip(total, rows, strict=True):
                _, pushed = torch.func.jvp(logits, (self.weights,), (tangent,))
                pushed -= (p * pushed).sum(-1, keepdim=True)
                (pulled,) = pull_back(pushed.mul_(p))
                summed += torch.cat([
                    torch.cat([pulled[f"{m.name}.weight"],
                               pulled[f"{m.name}.bias"].unsqueeze(-1)], dim=-1).flatten()
                    for m in self.modules
                ])
        seen = sum(len(batch.tokens) for batch in chosen)
        self.passes += seen / self.count
        return total / seen + self.damping * x

    def precondition(self, x: Tensor) -> Tensor:
        """What EK-FAC says (G+λI)⁻¹x is: [q, P]."""
        return self.join({
            name: self.ekfac[name].leave_eigenbasis(self.ekfac[name].coordinates(part, DAMPING))
            for name, part in self.split(x).items()
        })

    def size(self, x: Tensor) -> Tensor:
        """x's length [q] in the metric of EK-FAC's inverse, in which errors of scores are felt."""
        return (x * self.precondition(x)).sum(1).sqrt()

    def residual(self, x: Tensor, v: Tensor) -> float:
        """‖v − (G+λI)x‖ / ‖v‖ by `size`, G over all the records: the mean over queries."""
        return float((self.size(v - self.product(x)) / self.size(v)).mean())


def conjugate_gradients(
    system: GaussNewton, v: Tensor, tolerance: float, limit: int
) -> tuple[Tensor, Tensor, float]:
    """x [q, P] after at most `limit` steps, x after half as many, and how near the end x is: the
    share of xᵀ(G+λI)x that the last five steps added (the largest of the queries').

    The error e of x has eᵀ(G+λI)e = what all steps still to come would add (Hestenes and Stiefel
    1952); it stops where that share is `tolerance`. Started at zero and preconditioned by EK-FAC:
    that changes the number of steps, not the solution.
    """
    progress = stderr_progress()
    progress.start("conjugate gradients", limit, "steps")
    x, residual, added = torch.zeros_like(v), v.clone(), []
    direction = system.precondition(residual)
    weight = (residual * direction).sum(1, keepdim=True)
    half, share = x, 1.0
    for step in range(limit):
        product = system.product(direction)
        length = weight / (direction * product).sum(1, keepdim=True)
        x += length * direction
        residual -= length * product
        added.append(length * weight)
        if step + 1 <= limit // 2:
            half = x.clone()
        share = float((sum(added[-5:]) / sum(added)).max())
        progress.update(1)
        progress.say(f"  step {step + 1}: the last five added {share:.4f}")
        if share <= tolerance:
            break
        z = system.precondition(residual)
        before, weight = weight, (residual * z).sum(1, keepdim=True)
        direction = z + weight / before * direction
    progress.finish()
    return x, half, share


def lissa(system: GaussNewton, v: Tensor, depth: int) -> tuple[Tensor, float]:
    """α r_J after J = depth steps r_j = v + (I − α(G̃+λI)) r_{j−1}, each on the next batch, and α.

    α is half of what the largest eigenvalue of G̃+λI allows, which power iteration finds over the
    batches: the largest seen, with a margin for the batches it can't tell apart.
    """
    progress = stderr_progress()
    progress.start("LiSSA", depth, "steps")
    largest, probe = 0.0, v[:1] / v[:1].norm()
    for step in range(min(16, 2 * len(system.batches))):
        probe = system.product(probe, [system.batches[step % len(system.batches)]])
        largest = max(largest, float(probe.norm()))
        probe = probe / probe.norm()
    alpha = 1 / (2 * largest)
    r = v.clone()
    for step in range(depth):
        batch = system.batches[step % len(system.batches)]
        r = v + r - alpha * system.product(r, [batch])
        progress.update(1)
    progress.finish()
    return alpha * r, alpha


def solve(
    work: Workload, rotated: ByModule, sample: list[Record], steps: int, depth: int
) -> tuple[dict[str, ByModule], list[Check]]:
    """LiSSA's and CG's inverse of the queries' gradients, in the eigenbasis, and what each took."""
    system = GaussNewton(work, sample)
    v = system.join({m.name: work.ekfac[m.name].leave_eigenbasis(
        rotated[m.name].unflatten(1, m.shape)) for m in work.modules})
    near = system.residual(system.precondition(v), v)
    checks = [("EK-FAC", 0.0, 0.0, f"residual {near:.2f}")]

    def check(name: str, begun: float, x: Tensor, how: str) -> None:
        seconds, passes = (time.monotonic() - begun) / len(v), system.passes
        checks.append((name, seconds, passes, f"{how}; residual {system.residual(x, v):.2f}"))
        system.passes = 0.0

    system.passes, begun = 0.0, time.monotonic()
    x, half, share = conjugate_gradients(system, v, 0.01, steps)
    check("CG", begun, x, f"the last five steps added {share:.3f} of xᵀ(G+λI)x")
    begun = time.monotonic()
    y, alpha = lissa(system, v, depth)
    check("LiSSA", begun, y, f"{depth} steps, α = {alpha:.2g}, αλ = "
          f"{alpha * float(system.damping.min()):.2g} to {alpha * float(system.damping.max()):.2g}")
    solutions = {"LiSSA": y, f"CG, {steps // 2} steps": half, "CG": x}
    return {
        name: {
            m: (work.ekfac[m].eigenvectors_s.T @ part @ work.ekfac[m].eigenvectors_a).flatten(1)
            for m, part in system.split(solution).items()
        } for name, solution in solutions.items()
    }, checks


def score(
    work: Workload, sides: dict[str, ByModule], records: list[Record]
) -> dict[str, np.ndarray]:
    """Σ over modules of side · rotated gradient, of every record and side: [q, n]."""
    names = [m.name for m in work.modules]
    stacked = {name: torch.cat([side[name] for side in sides.values()]) for name in names}
    totals = torch.zeros(len(stacked[names[0]]), len(records), dtype=torch.float64)

    def each(rows: list[int], seen: Seen) -> None:
        totals[:, rows] += (stacked[seen.module.name] @ seen.rotated.T).double()

    look(work, records, each)
    return {name: part.numpy()
            for name, part in zip(sides, totals.chunk(len(sides)), strict=True)}


def print_checks(scores: dict[str, np.ndarray], checks: list[Check]) -> None:
    """How scores by independent inverses, by EK-FAC and by others agree, and what they took."""
    names = list(scores)
    print("| scores of | against | Pearson | Spearman | top 10 shared | top 100 shared |")
    print("|---|---|---|---|---|---|")
    for truth in ("CG", "LiSSA"):
        for name in names[: names.index(truth)]:
            pairs = list(zip(scores[name], scores[truth], strict=True))
            print(f"| {name} | {truth} | {np.mean([pearsonr(a, b)[0] for a, b in pairs]):.3f} | "
                  f"{np.mean([spearmanr(a, b)[0] for a, b in pairs]):.3f} | "
                  f"{recall(scores[truth], scores[name], 10, 10):.2f} | "
                  f"{recall(scores[truth], scores[name], 100, 100):.2f} |")
    print("\n| inverse | seconds a query | passes over the sample | how near |\n|---|---|---|---|")
    for name, seconds, passes, how in checks:
        print(f"| {name} | {seconds:,.0f} | {passes:.0f} | {how} |")


@click.command()
@options
@click.option("--queries", type=int, default=4, show_default=True)
@click.option("--sample", type=int, default=256, show_default=True,
              help="Training sequences that G is taken from.")
@click.option("--scored", type=int, default=2048, show_default=True,
              help="Other training sequences, whose scores are compared.")
@click.option("--cg-steps", type=int, default=40, show_default=True, help="At most.")
@click.option("--lissa-steps", type=int, default=200, show_default=True,
              help="Each on one batch of the sample.")
@click.option("--cache", type=click.Path(path_type=Path), default=Path(".demo/benchmark"),
              show_default=True)
def main(queries: int, sample: int, scored: int, cg_steps: int, lissa_steps: int, cache: Path,
         **size: object) -> None:
    """Solve for a few queries, compare scores, print two tables."""
    begun = time.monotonic()
    work = make_workload(cache, Size(**size), queries, stderr_progress())  # type: ignore[arg-type]
    rotated = {m.name: torch.zeros(queries, m.size) for m in work.modules}

    def of_query(rows: list[int], seen: Seen) -> None:
        rotated[seen.module.name][rows] = seen.rotated

    look(work, work.queries, of_query)
    # A sequence that G was taken from has its own part in G, which takes most of its score away,
    # and EK-FAC knows no single sequence: others are scored.
    solved, checks = solve(work, rotated, work.train[-sample:], cg_steps, lissa_steps)
    sides = sides_of(work, rotated) | solved
    others = work.train[:min(scored, len(work.train) - sample)]
    print(f"{work.summary()}; G over {sample} training sequences, scores of {len(others):,} "
          f"others\n")
    print_checks(score(work, sides, others), checks)
    print(f"\ntotal {duration(time.monotonic() - begun)}")


if __name__ == "__main__":
    main()
