"""A Hugging Face model in float64, and its losses on fixed windows of a corpus, computed without any of our code."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import torch


def float64(of: Path | torch.nn.Module) -> torch.nn.Module:
    """The model in a folder; a model as it is."""
    import transformers

    if isinstance(of, torch.nn.Module):
        return of
    return transformers.AutoModelForCausalLM.from_pretrained(of, dtype=torch.float64).eval()


def window_losses(model: Any, corpus: Path, seq_length: int, count: int, width: Any = np.uint16) -> list[float]:
    """Mean loss of window k: tokens k·S+1 … (k+1)·S from the S before, cut out of the .bin by hand."""
    tokens = np.fromfile(f"{corpus}.bin", dtype=width).astype(np.int64)
    losses = []
    for k in range(count):
        window = torch.from_numpy(tokens[k * seq_length : (k + 1) * seq_length + 1])[None]
        with torch.no_grad():
            logits = model(window[:, :-1]).logits[0]
        losses.append(torch.nn.functional.cross_entropy(logits, window[0, 1:]).item())
    return losses
