"""Which document an evaluation window belongs to, for resampling documents.

Windows are cut from the concatenated documents, so that one may hold parts of several: it counts as the
document's of which it predicts most tokens. Read from the ``.idx`` alone; nothing here imports Megatron.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
from scipy import stats

from megatron_prune.data.index_file import document_tokens


def of_windows(prefix: str | Path, windows: int, seq_length: int) -> np.ndarray | None:
    """The document of each of the first ``windows`` windows, int64 [windows]; None where the corpus is not there.

    Window *k* predicts tokens k·S+1 … (k+1)·S (``data.windows``).
    """
    index = Path(f"{prefix}.idx")
    if not index.is_file():
        return None
    ends = np.cumsum(document_tokens(index))
    predicted = np.arange(1, windows * seq_length + 1).reshape(windows, seq_length)
    most: np.ndarray = stats.mode(np.searchsorted(ends, predicted, side="right"), axis=1).mode
    return most
