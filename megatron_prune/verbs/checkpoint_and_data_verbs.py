"""Settings of the verbs for checkpoints, text and tokenized data."""

from __future__ import annotations

from dataclasses import dataclass

from megatron_prune.settings import Settings, setting
from megatron_prune.verbs.shared import (
    DTYPES,
    FORMATS,
    TOKEN_TYPES,
    TOKENIZERS,
    IntegritySettings,
    MissingMasksSettings,
    NonFiniteSettings,
    WorkersSettings,
)


@dataclass(frozen=True, kw_only=True)
class ImportSettings(NonFiniteSettings, WorkersSettings):
    TITLE = "files"

    hf: str = setting(metavar="DIR", help="model directory with safetensors, or a name on the Hub")
    save: str = setting(metavar="CKPT", help="checkpoint to write; must not exist")
    dtype: str | None = setting(None, choices=DTYPES, help="cast every weight; by default each keeps its dtype")
    make_vocab_size_divisible_by: int = setting(128, metavar="N", help="pad the vocabulary to a multiple of N x TP")
    tensor_model_parallel_size: int = setting(
        1, metavar="TP", help="tensor-parallel size that must divide the padded vocabulary"
    )
    max_position_embeddings: int | None = setting(
        None, metavar="N", help="import for sequences up to N only (if a sliding window is shorter)"
    )


@dataclass(frozen=True, kw_only=True)
class ExportSettings(MissingMasksSettings, NonFiniteSettings, WorkersSettings, IntegritySettings):
    TITLE = "files"

    load: str = setting(metavar="CKPT", help="checkpoint, or one of its iter_… or release folders")
    hf: str = setting(metavar="DIR", help="Hugging Face directory to write; must not exist")
    gguf: bool = setting(False, help="write DIR/model.gguf too, for llama.cpp")


@dataclass(frozen=True, kw_only=True)
class RewriteSettings(MissingMasksSettings, NonFiniteSettings, WorkersSettings, IntegritySettings):
    TITLE = "files"

    load: str = setting(metavar="CKPT", help="checkpoint, or one of its iter_… or release folders")
    save: str = setting(metavar="CKPT", help="checkpoint to write; must not exist")


@dataclass(frozen=True, kw_only=True)
class InspectSettings(Settings):
    checkpoint: str = setting(
        positional=True, metavar="CKPT", help="checkpoint, or one of its iter_… or release directories"
    )
    json: bool = setting(False, help="print JSON instead of a tree")
    sparsity: bool = setting(False, help="count exact zeros (reads every weight once)")
    full_hash: bool = setting(False, help="hash every number of every weight, independent of the layout")
    verify_integrity: bool = setting(False, help="check every file's SHA-256 against integrity.json first")


@dataclass(frozen=True, kw_only=True)
class ReshardOptimizerSettings(Settings):
    save: str = setting(positional=True, metavar="SAVE", help="the newest save of a run, or one of its iter_… folders")


@dataclass(frozen=True, kw_only=True)
class LaunchFilesSettings(Settings):
    folder: str = setting(
        "launch", positional=True, metavar="DIR", help="directory to write; must not exist (default: launch)"
    )


@dataclass(frozen=True, kw_only=True)
class BuildCorpusSettings(Settings):
    output: str = setting(metavar="DIR", help="directory for train, calibration, validation and test .jsonl")
    max_bytes: int = setting(16_000_000, metavar="N", help="stop after this many bytes of text; 0: no limit")
    split: str = setting("94,2,2,2", metavar="SHARES", help="shares of the four splits")
    longest_held_out: int = setting(
        0, metavar="CHARACTERS", help="longest document of the last three splits; 0: no limit"
    )
    debian: tuple[str, ...] = setting((), metavar="NAME", help="also the text of these Debian packages (not installed)")
    pypi: tuple[str, ...] = setting((), metavar="NAME", help="also the text of these PyPI packages (not installed)")
    packages_only: bool = setting(False, help="no text of this machine, so that every machine makes the same corpus")
    downloads: str | None = setting(
        None,
        metavar="DIR",
        help="directory for the packages; those in it are not fetched again (default: OUTPUT.downloads)",
    )
    workers: int | None = setting(
        None, metavar="N", help="processes; the files do not depend on their number (default: the cores, 8 at most)"
    )


@dataclass(frozen=True, kw_only=True)
class TrainTokenizerSettings(Settings):
    input: tuple[str, ...] = setting(metavar="FILE", help="JSON lines, Parquet or text, optionally .gz or .zst")
    output: str = setting(metavar="FILE.model", help="the SentencePiece model to write")
    vocab_size: int = setting(metavar="N", help="number of ids, special ones and 256 bytes included")
    model_type: str = setting("bpe", choices=("bpe", "unigram"), help="kind of model")
    json_keys: str = setting("text", metavar="KEY", help="the JSON key that holds the text")
    input_format: str = setting("auto", choices=FORMATS, help="auto goes by the endings")
    max_bytes: int | None = setting(None, metavar="N", help="learn from at most N bytes of text")


@dataclass(frozen=True, kw_only=True)
class TokenizerSettings(Settings):
    TITLE = "tokenizer"

    tokenizer_type: str = setting(metavar="TYPE", help=", ".join(TOKENIZERS))
    tokenizer_model: str = setting(
        metavar="PATH", help="directory with tokenizer.json, a .model file, a tiktoken .json"
    )
    vocab_size: int | None = setting(
        None, metavar="N", help="TikTokenizer: ids, special ones included (Megatron's default: 131072)"
    )
    tiktoken_pattern: str | None = setting(
        None, choices=("v1", "v2"), help="TikTokenizer: pattern that splits text (Megatron's default: v2)"
    )
    tiktoken_num_special_tokens: int | None = setting(
        None, metavar="N", help="TikTokenizer: number of special ids before the ranks (default: 1000)"
    )
    tokenizer_special_tokens: tuple[str, ...] | None = setting(
        None, metavar="TOKEN", help="TikTokenizer: names of the first ids"
    )
    checkpoint: str | None = setting(None, metavar="CKPT", help="refuse a tokenizer that does not fit this checkpoint")


@dataclass(frozen=True, kw_only=True)
class DocumentsSettings(Settings):
    TITLE = "documents"

    append_eod: bool = setting(False, help="end every document with the end-of-document id")
    json_keys: str = setting("text", metavar="KEY", help="the JSON key or the column that holds the text")
    input_format: str = setting("auto", choices=FORMATS, help="auto goes by the endings")
    input_tokens: str | None = setting(
        None, choices=TOKEN_TYPES, help="records of array_record files are token ids of this type, not text"
    )
    text_documents: str = setting(
        "file", choices=("file", "paragraph", "line"), help="what a document in a text file is"
    )
    split_sentences: bool = setting(
        False,
        help="store each sentence (NLTK's Punkt) of a document as a sequence, as in Megatron; for BERT-like training: "
        "GPT data sets shuffle sequences",
    )
    keep_newlines: bool = setting(False, help="sentences keep the white space that follows them")
    lang: str = setting("english", metavar="NAME", help="Punkt model of --split-sentences")
    nltk_data: str | None = setting(
        None, metavar="DIR", help="folder with tokenizers/punkt_tab (default: NLTK's own paths)"
    )


@dataclass(frozen=True, kw_only=True)
class PreprocessSettings(DocumentsSettings, TokenizerSettings):
    TITLE = "files"

    input: tuple[str, ...] = setting(
        (),
        metavar="FILE",
        help="JSON lines, Parquet or text, optionally .gz or .zst, in order; a resumed run keeps finished files",
    )
    dataset: str | None = setting(
        None, metavar="NAME[:CONFIG]", help="a data set of the Hugging Face hub or a folder, streamed"
    )
    dataset_split: str = setting("train", metavar="NAME", help="the split of --dataset")
    output_prefix: str = setting(metavar="P", help="writes P.bin, P.idx and P.json")
    workers: int = setting(1, metavar="N", help="processes; the files do not depend on their number")


@dataclass(frozen=True, kw_only=True)
class PrepareSuiteSettings(Settings):
    TITLE = "files"

    suite: str = setting(positional=True, metavar="SUITE", help="paper-zero-shot, paper-perplexity, or one of --suites")
    suites: str | None = setting(None, metavar="FILE.yaml", help="a file of more suites, of the package's form")
    output: str | None = setting(None, metavar="DIR", help="folder for the tokenized corpora, one for each label")
    tokenizer_type: str | None = setting(None, metavar="TYPE", help=", ".join(TOKENIZERS))
    tokenizer_model: str | None = setting(None, metavar="PATH", help="as for preprocess")
    append_eod: bool = setting(False, help="end every document with the end-of-document id")
    workers: int = setting(1, metavar="N", help="processes; the files do not depend on their number")


@dataclass(frozen=True, kw_only=True)
class CheckContaminationSettings(Settings):
    TITLE = "corpora and limits"

    train: tuple[str, ...] = setting((), metavar="PREFIX", help="corpora of training")
    calibration: tuple[str, ...] = setting((), metavar="PREFIX", help="corpora of calibration")
    validation: tuple[str, ...] = setting((), metavar="PREFIX", help="corpora of validation")
    test: tuple[str, ...] = setting((), metavar="PREFIX", help="corpora of the test")
    similarity: float = setting(
        0.8, metavar="J", help="Jaccard index of 5-token shingles from which documents are near-duplicates"
    )
    max_duplicates: float = setting(
        0.0, metavar="SHARE", help="share of the smaller corpus's documents that may be in the other (default: 0)"
    )
    max_near_duplicates: float = setting(
        0.0, metavar="SHARE", help="share that may have a near-duplicate there, exact ones not counted (default: 0)"
    )
    json: str | None = setting(None, metavar="FILE", help="write the report here")


@dataclass(frozen=True, kw_only=True)
class BuildIndexSettings(Settings):
    TITLE = "the training run's flags, and two checks"

    data_path: tuple[str, ...] | None = setting(
        None, metavar="PREFIX", help="as for pretrain: PREFIX…, or WEIGHT PREFIX …"
    )
    train_data_path: tuple[str, ...] | None = setting(None, metavar="PREFIX", help="the same, by pretrain's other name")
    seq_length: int = setting(metavar="S", help="tokens per sample")
    stream_seed: int = setting(1234, metavar="SEED", help="pretrain's")
    stream_epochs: int = setting(1, metavar="N", help="pretrain's")
    data_cache_path: str | None = setting(
        None, metavar="DIR", help="where the caches go (default: next to the first prefix)"
    )
    stream_range: tuple[str, ...] = setting(
        (),
        metavar="START:END",
        repeated=True,
        help="also check that the stream has these samples, and count their unique tokens, which a run of several "
        "epochs would otherwise count at its start; if repeated, check that the ranges are disjoint",
    )
    held_out: tuple[str, ...] = setting(
        (),
        metavar="PREFIX",
        help="also check that the stream contains no document of these corpora (calibration, validation, test)",
    )
