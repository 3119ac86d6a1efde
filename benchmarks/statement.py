"""Where does the recall statement err? Claimed against actual on synthetic heavy-tailed scores.

    python benchmarks/statement.py

The draws are those of tests/rank/test_recall.py, at more noise and for smaller k than the test
allows.
"""

import sys
from pathlib import Path

import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "tests"))
sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "tests" / "rank"))

from test_recall import claimed_and_actual

N, DRAWS = 2000, 500


def main() -> None:
    """Print a line a case: shortlist, k, noise, mean claim, mean truth."""
    print(f"N = {N}, {DRAWS} draws\nshortlist  k  noise  claimed  actual  (standard error)")
    for shortlist in (100, 400):
        for k in (1, 2, 10):
            for noise in (3.0, 5.0, 9.0):
                random = np.random.default_rng(1)
                pairs = np.array([
                    claimed_and_actual(random, N, shortlist, k, noise, False) for _ in range(DRAWS)
                ])
                claimed, actual = pairs.mean(0)
                error = (pairs[:, 0] - pairs[:, 1]).std() / DRAWS**0.5
                print(f"{shortlist:>9} {k:>2}  {noise:>5}  {claimed:7.3f} {actual:7.3f}  "
                      f"({error:.3f})")


if __name__ == "__main__":
    main()
