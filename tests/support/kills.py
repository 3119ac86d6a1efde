"""A process that ends in the middle, played in this one: at every sync of a file to the disk."""

import itertools
import os

from gradindex.errors import GradindexError


class KilledError(BaseException):
    """Stands for SIGKILL: nothing catches it, no handler cleans up."""


def each_kill(monkeypatch, fresh, run, error=KilledError, every=1):
    """Run on a fresh folder that `error` strikes at the n-th sync and any later one, for each n.

    Yields n and the folder, until a run gets to its end.
    """
    real = os.fsync
    for which in itertools.count(step=every):
        folder, left = fresh(which), [which]

        def fsync(descriptor, left=left):
            left[0] -= 1
            if left[0] < 0:
                raise error
            real(descriptor)

        monkeypatch.setattr(os, "fsync", fsync)
        try:
            run(folder)
            return
        except KilledError:
            pass
        except GradindexError as said:
            assert isinstance(error, OSError), said
            assert said.exit_code == 4, said
        finally:
            monkeypatch.setattr(os, "fsync", real)
        yield which, folder
