"""One pass over the sequences: gradients become codes, segment after segment.

A segment is written in `NNNNNN.partial/` (its records are there already) and renamed when whole.
Its batches are a function of its sequences' lengths alone.
"""

import io
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from gradindex import tfidf
from gradindex.codes import Codes
from gradindex.errors import GradindexError
from gradindex.files import atomic_write, rename_folder
from gradindex.gradients import backward, make_batch, plan_batches
from gradindex.model import LanguageModel
from gradindex.modules import Module
from gradindex.progress import Progress
from gradindex.records import Record
from gradindex.vectors import CodeIndex, code_bytes


def encode_segment(
    model: LanguageModel, codes: Codes, records: list[Record], folder: Path, batch_tokens: int,
    progress: Progress,
) -> None:
    """Encode a segment's records in `folder` (…/NNNNNN.partial) and seal it.

    Raises GradindexError for a gradient that isn't finite, naming the sequence.
    """
    length = codes.settings.length
    index = CodeIndex(length)
    rows_codes = np.zeros((len(records), code_bytes(length)), dtype=np.uint8)
    norms = np.zeros(len(records), dtype=np.float32)
    for rows in plan_batches([len(record.ids) for record in records], batch_tokens):
        vectors = encode_batch(model, codes, [records[row] for row in rows])
        array = vectors.float().cpu().numpy()
        norms[rows] = np.linalg.norm(array.astype(np.float64), axis=1)
        bad = [records[row] for row in rows if not np.isfinite(norms[row])]
        if bad:
            where = bad[0].parts[0]
            raise GradindexError(
                f"the gradient of sequence {bad[0].id} ({where.source}:{where.row}) is not finite. "
                "Try --dtype float32, or take the record out of the data."
            )
        rows_codes[rows] = index.encode(array)
        progress.update(len(rows))
    index.add(rows_codes)
    index.write(folder / "vectors.faiss")
    buffer = io.BytesIO()
    np.save(buffer, norms, allow_pickle=False)
    atomic_write(folder / "norms.npy", buffer.getvalue())
    vocabulary = model.network.config.get_text_config().vocab_size
    tfidf.write(folder / "tokens.npz", [record.ids for record in records], vocabulary)
    rename_folder(folder, folder.with_suffix(""))


def encode_batch(model: LanguageModel, codes: Codes, records: list[Record]) -> Tensor:
    """Vectors [b, K] of sequences, from one forward and one backward pass."""
    batch = make_batch([(record.ids, record.scored) for record in records], model.device)
    vectors = codes.empty(len(records))

    def each(module: Module, a: Tensor, d: Tensor) -> None:
        codes.add(vectors, module, a, d)

    with torch.no_grad():
        backward(model, codes.modules, batch, each)
    return vectors
