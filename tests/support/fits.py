"""A fit of curvature on sequences in memory."""

from gradindex.progress import Progress
from gradindex.storage.records import Part, Record
from indexer.fit.notes import FitSettings
from indexer.fit.schedule import fit


def records_of(sequences):
    """The records of texts, a document each."""
    return [Record(n, text[0], text[1], [Part(n, "x", n + 1, 0, 1, 0)], *text[2:])
            for n, text in enumerate(sequences)]


def fitted(model, modules, sequences, folder, labels="data", block=2, allowance=None, most=None):
    """Interrupted when more than `most` blocks are read."""
    records, reads = records_of(sequences), []

    def read(ids):
        reads.append(ids)
        if len(reads) - 1 == most:
            raise KeyboardInterrupt
        return [records[n] for n in ids]

    settings = FitSettings(list(range(len(records))), labels, block, 24, 5)
    return fit(model, modules, read, settings, folder, Progress(), allowance=allowance)[0]
