"""Splitting documents into sentences with NLTK's Punkt, as Megatron's ``--split-sentences`` does.

A document's sentences become its sequences in the ``.idx``. That is what BERT-like objectives need.
Megatron's GPT data sets shuffle *sequences*: on such a corpus a GPT sees sentences out of their order.

The models are data (``punkt_tab``), never the pickles of old NLTK releases, which can run code.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from megatron_prune.artifacts import sha256_json
from megatron_prune.errors import DataError, UsageError

# As in Megatron: Punkt sees a document in slices of this many characters, so a slice's end ends a sentence.
LONGEST_SLICE = 1_000_000


class SentenceSplitter:
    """``split(text)``: its sentences in order.

    The white space between sentences goes, or with ``keep_newlines`` stays at the end of the sentence
    before it, so that the sentences joined are the text.
    """

    def __init__(self, punkt: Any, name: str, keep_newlines: bool = False):
        self.name, self.keep_newlines, self._punkt = name, keep_newlines, punkt

    def split(self, text: str) -> list[str]:
        found: list[str] = []
        for begin in range(0, len(text), LONGEST_SLICE):
            part = text[begin : begin + LONGEST_SLICE]
            if not self.keep_newlines:
                found += self._punkt.tokenize(part)
            elif starts := [start for start, _ in self._punkt.span_tokenize(part)]:
                ends = [*starts[1:], len(part)]
                starts[0] = 0
                found += [part[start:end] for start, end in zip(starts, ends, strict=True)]
            else:
                found.append(part)
        return found

    def digest(self) -> str:
        """Identity of what decides where a sentence ends, 64 hex digits."""
        parameters = self._punkt._params
        return sha256_json(
            {
                "sentences": 1,
                "keep_newlines": self.keep_newlines,
                "abbreviations": sorted(parameters.abbrev_types),
                "collocations": sorted(map(list, parameters.collocations)),
                "starters": sorted(parameters.sent_starters),
                "orthography": sorted(parameters.ortho_context.items()),
            }
        )


def load_splitter(
    language: str = "english", nltk_data: str | Path | None = None, keep_newlines: bool = False
) -> SentenceSplitter:
    """The Punkt model of a language from ``nltk_data`` or from where NLTK looks ($NLTK_DATA, ~/nltk_data, …).

    Raises UsageError (no such folder) and DataError, which says what to download.
    """
    import nltk.data
    from nltk.tokenize.punkt import PunktTokenizer

    if nltk_data is not None:
        folder = Path(nltk_data).absolute()
        if not folder.is_dir():
            raise UsageError("--nltk-data", given=nltk_data, allowed="a folder that holds tokenizers/punkt_tab")
        if str(folder) not in nltk.data.path:
            nltk.data.path.insert(0, str(folder))
    try:
        punkt = PunktTokenizer(language)
    except (LookupError, OSError) as error:
        raise DataError(
            f"NLTK has no Punkt model for '{language}' (looked for tokenizers/punkt_tab/{language} in "
            f"{', '.join(map(str, nltk.data.path))}). On a machine with the network: "
            f"python -m nltk.downloader -d DIR punkt_tab; then give --nltk-data DIR or set NLTK_DATA=DIR"
        ) from error
    except ValueError as error:
        raise UsageError("--lang", given=language, allowed="the name of a Punkt model, such as english") from error
    return SentenceSplitter(punkt, language, keep_newlines)
