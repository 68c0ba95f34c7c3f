"""The settings of every verb: what its flags are, and what they mean. Torch-free; see ``settings.py``.

Rooms take these objects, ``cli/`` makes them from a command line, Python calls and study.yaml make them from keywords.
Settings that several verbs share come first.
"""

from __future__ import annotations

from dataclasses import dataclass

from megatron_prune.settings import Settings, setting

GPUS = ("a100-80gb", "h100", "h200", "b200")
FP8_PRESETS = ("hybrid-delayed", "current", "blockwise")
TOKENIZERS = ("SentencePieceTokenizer", "HuggingFaceTokenizer", "TikTokenizer")
FORMATS = ("auto", "jsonl", "parquet", "text")
DOCUMENTS = ("file", "paragraph", "line")
DTYPES = ("float32", "bfloat16", "float16")
MODULES = ("qkv", "proj", "fc1", "fc2")

# -- what several verbs share ------------------------------------------------------------------------


@dataclass(frozen=True, kw_only=True)
class ModelSettings(Settings):
    """Flags that this package adds to Megatron's parser: they say what model Megatron builds."""

    TITLE = "model and layout"

    shape_from: str | None = setting(
        None,
        metavar="CKPT",
        help="take the model's arguments from this checkpoint and none of its weights: training from scratch in the "
        "same shape",
    )
    fp32: bool = setting(False, help="compute in fp32 (default: as the checkpoint)")
    fp8_preset: str | None = setting(
        None,
        choices=FP8_PRESETS,
        help="a named FP8 recipe, in place of Megatron's flags (needs Transformer Engine)",
    )


@dataclass(frozen=True, kw_only=True)
class CalibrationTextSettings(Settings):
    """Which text a parent is run on."""

    TITLE = "calibration text"

    calibration_data_path: str | None = setting(None, metavar="PREFIX", help="tokenized corpus, without .bin")
    calibration_sequences: int = setting(128, metavar="N", help="how many windows of it are read")
    calibration_seq_length: int = setting(2048, metavar="S", help="tokens per window")
    calibration_sampling: str = setting(
        "sequential",
        choices=("sequential", "random"),
        help="the first N windows, or N drawn with --seed",
    )


@dataclass(frozen=True, kw_only=True)
class AmountSettings(Settings):
    TITLE = "how much to remove"

    ratio: float | None = setting(None, metavar="R", help="fraction to remove, between 0 and 1")


@dataclass(frozen=True, kw_only=True)
class TargetSettings(AmountSettings):
    """The shape after structured pruning: one of ``ratio``, ``target_params`` and sizes (``structured/target.py``)."""

    TITLE = "how much to remove"

    ratio_of: str | None = setting(
        None,
        choices=("linears", "all"),
        help="of the blocks' linear weights (the default), or of all parameters",
    )
    target_params: int | None = setting(None, metavar="P", help="how many parameters, of all, should stay")
    target_num_layers: int | None = setting(None, metavar="N", help="a size that should stay; so the next four")
    target_hidden_size: int | None = setting(None, metavar="N", help="channels of the residual stream")
    target_num_attention_heads: int | None = setting(None, metavar="N", help="query heads")
    target_num_query_groups: int | None = setting(None, metavar="N", help="key-value heads")
    target_ffn_hidden_size: int | None = setting(None, metavar="N", help="channels of the MLP")
    divisible_by: int = setting(64, metavar="N", help="every width that changes is a multiple of N")
    tolerance: float | None = setting(
        None,
        metavar="T",
        help="how far a chosen width may miss the target, relatively (default: 0.02)",
    )


@dataclass(frozen=True, kw_only=True)
class SparsitySettings(AmountSettings):
    """Which weights a sparse method may remove (``sparse/request.py``)."""

    TITLE = "sparse methods"

    pattern: str = setting(
        "unstructured", metavar="P", help="unstructured, or N:M: N of every M consecutive inputs stay"
    )
    layers: str | None = setting(
        None, metavar="0-3,7", help="layers to prune, counted from 0 (default: all); the others stay dense"
    )
    modules: str | None = setting(
        None, metavar="M,…", help=f"linears to prune, of {','.join(MODULES)} (default: all); the others stay dense"
    )
    module_ratio: tuple[str, ...] = setting(
        (), metavar="M=R", help="another ratio for some linears, such as fc2=0.3; unstructured only"
    )


@dataclass(frozen=True, kw_only=True)
class WorkersSettings(Settings):
    TITLE = "work"

    workers: int = setting(1, metavar="N", help="processes that share the work")


@dataclass(frozen=True, kw_only=True)
class IntegritySettings(Settings):
    TITLE = "work"

    verify_integrity: bool = setting(False, help="check the files of --load against integrity.json first")


# -- pruning -----------------------------------------------------------------------------------------


@dataclass(frozen=True, kw_only=True)
class CalibrateSettings(CalibrationTextSettings):
    TITLE = "files"

    output: str | None = setting(None, metavar="FILE.safetensors", help="where the statistics go")
    score: str | None = setting(
        None,
        metavar="CANDIDATES.json",
        help="what plan wrote: add the losses of these candidates, on the windows of --statistics",
    )
    statistics: str | None = setting(
        None, metavar="FILE", help="with --score: what calibrate wrote; also the default of --output"
    )
    task_data: str | None = setting(
        None, metavar="FILE.jsonl", help="with --score: where the plan's --task-data is stored now"
    )


@dataclass(frozen=True, kw_only=True)
class PlanFilesSettings(IntegritySettings):
    TITLE = "files"

    load: str = setting(metavar="CKPT", help="the parent checkpoint")
    output: str = setting(metavar="PLAN.json", help="where the plan goes")
    statistics: tuple[str, ...] = setting(
        (), metavar="FILE", help="what calibrate wrote for this parent; several files are merged"
    )


@dataclass(frozen=True, kw_only=True)
class MethodSettings(Settings):
    TITLE = "method"

    method: str = setting(metavar="NAME", help="the pruning method")
    seed: int | None = setting(
        None, metavar="N", help="of the method random: the choice depends on it alone (default: 0)"
    )


@dataclass(frozen=True, kw_only=True)
class PlanSettings(TargetSettings, MethodSettings, PlanFilesSettings):
    TITLE = "how much to remove"

    tensor_model_parallel_size: int = setting(
        1, metavar="TP", help="refuse shapes that this tensor-parallel size does not divide"
    )


@dataclass(frozen=True, kw_only=True)
class ApplySettings(WorkersSettings, IntegritySettings):
    TITLE = "files"

    load: str = setting(metavar="CKPT", help="the parent that the plan was made for")
    plan: str = setting(metavar="PLAN.json", help="what plan wrote")
    save: str = setting(metavar="CKPT", help="where the pruned checkpoint goes")


@dataclass(frozen=True, kw_only=True)
class PrunedBySettings(Settings):
    TITLE = "method"

    method: str = setting(metavar="NAME", help="the pruning method")


@dataclass(frozen=True, kw_only=True)
class SparsifySettings(CalibrationTextSettings, SparsitySettings, PrunedBySettings):
    """``sparsify``; --load, --save and --seed are Megatron's."""


@dataclass(frozen=True, kw_only=True)
class PruneSettings(CalibrationTextSettings, SparsitySettings, TargetSettings, PrunedBySettings):
    """``prune`` of a checkpoint; --load, --save and --seed are Megatron's."""


@dataclass(frozen=True, kw_only=True)
class SourceSettings(Settings):
    TITLE = "from Hugging Face to Hugging Face"

    hf: str = setting(metavar="HF", help="model directory, or a name on the Hub")
    out: str = setting(metavar="OUT", help="directory to write; OUT.work holds what is finished until then")
    dtype: str | None = setting(
        None,
        choices=DTYPES,
        metavar="TYPE",
        help=f"cast every weight to {', '.join(DTYPES)} (default: it keeps its type)",
    )
    keep: bool = setting(False, help="keep OUT.work: checkpoints, corpora, scores and logs")


@dataclass(frozen=True, kw_only=True)
class TextSettings(Settings):
    TITLE = "text, of which one document in ten is held out"

    text: tuple[str, ...] = setting(
        (), metavar="FILE", help="JSON lines, Parquet or plain text (default: English that is on this machine)"
    )
    dataset: str | None = setting(
        None, metavar="NAME[:CONFIG]", help="in place of --text: a data set of the Hub, its split train"
    )
    json_keys: str = setting("text", metavar="KEY", help="the key of a JSON line, or the column, with the text")
    text_documents: str = setting(
        "file",
        choices=DOCUMENTS,
        metavar="HOW",
        help=f"what a document in a plain text file is: {', '.join(DOCUMENTS)}",
    )
    seq_length: int | None = setting(
        None, metavar="S", help="tokens per sequence (default: the model's, at most 2048 on GPUs and 512 on CPUs)"
    )
    calibration_sequences: int = setting(128, metavar="N", help="sequences of calibration text")
    windows: int | None = setting(
        None, metavar="N", help="sequences of held-out text to measure on (default: up to 64, as many as there are)"
    )


@dataclass(frozen=True, kw_only=True)
class RetrainSettings(Settings):
    TITLE = "training before the export"

    retrain_tokens: int | None = setting(None, metavar="N", help="train the pruned model on N tokens (default: none)")
    retrain_lr: float = setting(1e-4, metavar="LR", help="peak learning rate: 5% warm-up, then cosine to a tenth")
    retrain_batch_size: int = setting(8, metavar="N", help="sequences per step")


@dataclass(frozen=True, kw_only=True)
class ProcessesSettings(WorkersSettings):
    TITLE = "work"

    nproc: int = setting(1, metavar="N", help="processes that run the model, on this machine")
    devices: tuple[int, ...] = setting((), metavar="GPU", help="which GPUs they use (default: the first)")
    tensor_model_parallel_size: int = setting(1, metavar="T", help="as for Megatron")
    pipeline_model_parallel_size: int = setting(1, metavar="P", help="as for Megatron")


@dataclass(frozen=True, kw_only=True)
class PruneHFSettings(
    ProcessesSettings, RetrainSettings, TextSettings, SparsitySettings, TargetSettings, MethodSettings, SourceSettings
):
    """``prune --hf``."""


@dataclass(frozen=True, kw_only=True)
class RetrainCandidatesSettings(Settings):
    TITLE = "files and processes"

    load: str = setting(metavar="CKPT", help="the parent")
    candidates: str = setting(metavar="CANDIDATES.json", help="what plan wrote")
    statistics: str = setting(metavar="FILE", help="what calibrate --score wrote")
    scratch: str = setting(metavar="DIR", help="where the candidates are cut and trained; of no use afterwards")
    output: str | None = setting(None, metavar="FILE", help="where the statistics go (default: --statistics)")
    nproc: int = setting(1, metavar="N", help="processes per run, on this machine")
    commands: bool = setting(False, help="print what would be run; run nothing")


# -- training and evaluation -------------------------------------------------------------------------


@dataclass(frozen=True, kw_only=True)
class MasksSettings(Settings):
    TITLE = "masks"

    masks: str | None = setting(
        None,
        metavar="DIR",
        help="train with the zeros of these masks held; a resumed run finds its own in its save directory",
    )
    random_masks: int | None = setting(
        None,
        metavar="SEED",
        help="train a new model under random masks with the pattern and the counts of --masks (per row; per group "
        "for N:M)",
    )
    let_zeros_fill: bool = setting(
        False, help="train a sparse checkpoint as a dense one: its zeros become weights again"
    )


@dataclass(frozen=True, kw_only=True)
class StreamSettings(Settings):
    TITLE = "token stream"

    stream_range: str | None = setting(
        None,
        metavar="START:END",
        help="train on exactly these samples of the stream over --train-data-path or --data-path; END - START is the "
        "global batch size times the number of steps",
    )
    stream_seed: int = setting(1234, metavar="SEED", help="order of the stream; one for a whole study")
    stream_epochs: int = setting(
        1, metavar="N", help="declare the stream as this many differently shuffled passes over its corpora"
    )
    stream_allow_seen: bool = setting(
        False, help="train on samples that the pretrained checkpoint has seen; such a run is compared with nothing"
    )
    stream_permutation_seed: int | None = setting(
        None, metavar="SEED", help="permute the samples inside the range (a replicate of the same training)"
    )


@dataclass(frozen=True, kw_only=True)
class PretrainSettings(MasksSettings, StreamSettings):
    """``pretrain``; everything else is Megatron's."""


@dataclass(frozen=True, kw_only=True)
class TasksSettings(Settings):
    TITLE = "lm-eval's tasks (a task reads up to --seq-length tokens, and --micro-batch-size of its sequences at once)"

    tasks: str | None = setting(
        None, metavar="NAME,…", help="tasks, groups or tags of lm-eval (pip install 'megatron_prune[eval]')"
    )
    tasks_path: str | None = setting(None, metavar="DIR", help="a folder with YAML files of more tasks")
    num_fewshot: int | None = setting(None, metavar="N", help="examples before a question (default: the task's)")
    limit: int | None = setting(None, metavar="N", help="only the first N questions of each task")
    task_samples: str | None = setting(
        None, metavar="FILE.jsonl", help="write every question and its likelihoods there"
    )


@dataclass(frozen=True, kw_only=True)
class EvaluateSettings(TasksSettings):
    TITLE = "what to score"

    output: str = setting(metavar="FILE", help="scores.json to write")
    windows: int | None = setting(
        None, metavar="N", help="windows of --seq-length tokens to score of each corpus (default: all)"
    )
    labels: tuple[str, ...] | None = setting(
        None, metavar="NAME", help="names for the corpora of --data-path, in order"
    )


# -- clusters, studies, advice -----------------------------------------------------------------------


@dataclass(frozen=True, kw_only=True)
class PreflightSettings(Settings):
    TITLE = "cluster"

    gpus: int = setting(metavar="N", help="ranks of the job")
    gpu: str = setting("h100", choices=GPUS, help="kind of GPU")
    gpus_per_node: int = setting(8, metavar="N", help="GPUs in a node")
    installed: str = setting(
        "te,apex,flash-attn",
        metavar="WORDS",
        help="what every node has besides PyTorch, of te, apex, flash-attn, nvrx and emerging-optimizers, with commas "
        "between, or none (default: te,apex,flash-attn, as launch/Dockerfile.ngc has; launch/Dockerfile: none)",
    )
    mfu: float = setting(0.4, metavar="F", help="share of dense bf16 FLOPs that is reached, for times; measure yours")
    reserve_gb: float = setting(
        6.0, metavar="GB", help="of every GPU, for the CUDA context, NCCL, workspaces and fragmentation"
    )
    host_memory_gb: float | None = setting(
        None, metavar="GB", help="memory of a node, without which it is told and not judged"
    )
    model: str | None = setting(
        None,
        metavar="FILE",
        help="the model's flags, while the checkpoint that says them is not here (# begins a comment)",
    )
    corpus_tokens: str | None = setting(
        None, metavar="N", help="what the corpora hold, such as 750B, while they are not here"
    )
    output: str | None = setting(None, metavar="FILE.json", help="write the answer as data, too")


@dataclass(frozen=True, kw_only=True)
class StudySettings(Settings):
    TITLE = "study"

    study: str = setting(positional=True, metavar="STUDY.yaml", help="the study's file")
    runs_dir: str = setting("runs", metavar="DIR", help="where studies are stored")
    parent: str | None = setting(
        None, metavar="LABEL", help="only the study of this one, where STUDY.yaml has several parents"
    )


@dataclass(frozen=True, kw_only=True)
class StudyPlanSettings(StudySettings):
    TITLE = "what is shown"

    commands: bool = setting(False, help="print the command line of every stage too")
    scripts: bool = setting(False, help="write the Slurm script of every cell that is known")
    corpus_tokens: str | None = setting(
        None, metavar="N", help="tokens in data.train, such as 750B, while the corpora are not there"
    )
    throughput: str | None = setting(
        None, metavar="T", help="of one GPU: tokens per second on the parent's shape, or an MFU as 40%"
    )
    gpus: int | None = setting(
        None, metavar="N", help="how many there are (default: launch.nproc x launch.parallel_cells)"
    )
    peak_tflops: float | None = setting(
        None, metavar="TFLOPS", help="what an MFU is of (default: 989, an H100 in bf16)"
    )


@dataclass(frozen=True, kw_only=True)
class StudyStatusSettings(StudySettings):
    TITLE = "what is shown"

    watch: float | None = setting(
        None, metavar="SECONDS", alone=2.0, help="show it again and again while a runner is at work (every 2 s)"
    )


@dataclass(frozen=True, kw_only=True)
class StudyStageSettings(Settings):
    TITLE = "stage"

    cell: str = setting(positional=True, metavar="CELL", help="a cell's directory, with its cell.json")
    stage: str = setting(positional=True, metavar="STAGE", help="its name in cell.json")


@dataclass(frozen=True, kw_only=True)
class AdvisedBySettings(Settings):
    TITLE = "where the answer comes from"

    ledger: str | None = setting(
        None,
        metavar="STUDY",
        help="a study's folder with a report, or its results.json (default: the quickstart's, where it is shipped)",
    )
    json: str | None = setting(None, metavar="FILE", help="write the advice as JSON too")


@dataclass(frozen=True, kw_only=True)
class AdvisedParentSettings(Settings):
    TITLE = "parent (default: the ledger's)"

    parent: str | None = setting(None, metavar="CKPT", help="its checkpoint")
    parent_params: str | None = setting(None, metavar="N", help="its parameters, such as 8B")
    parent_tokens: str | None = setting(None, metavar="N", help="tokens that it was trained on, such as 15T")


@dataclass(frozen=True, kw_only=True)
class AdvisedAmountSettings(Settings):
    TITLE = "what is to be removed: one of these"

    ratio: float | None = setting(None, metavar="R", help="fraction removed")
    ratio_of: str | None = setting(
        None, choices=("linears", "all"), help="of the blocks' linear weights (the default), or of all"
    )
    target_params: str | None = setting(None, metavar="P", help="parameters, of all, that should stay")
    target_num_layers: int | None = setting(None, metavar="N", help="a size that should stay; so the next four")
    target_hidden_size: int | None = setting(None, metavar="N", help="channels of the residual stream")
    target_num_attention_heads: int | None = setting(None, metavar="N", help="query heads")
    target_num_query_groups: int | None = setting(None, metavar="N", help="key-value heads")
    target_ffn_hidden_size: int | None = setting(None, metavar="N", help="channels of the MLP")
    pattern: str | None = setting(None, metavar="unstructured|N:M", help="a sparse model; N:M says its own ratio")
    method: str | None = setting(None, metavar="M", help="this method alone (default: every one that was measured)")


@dataclass(frozen=True, kw_only=True)
class AdvisedBudgetSettings(Settings):
    TITLE = "budget: tokens of retraining, or GPU-hours"

    tokens: str | None = setting(None, metavar="N", help="such as 10B")
    gpu_hours: float | None = setting(None, metavar="H", help="in place of --tokens")
    gpu_flops: float | None = setting(None, metavar="F", help="FLOP/s that a GPU really does: its peak times the MFU")
    setting: str = setting(
        "equal-training",
        choices=("equal-training", "equal-total", "equal-flops"),
        help="equal-training (the default): the parent is there, its tokens are spent; equal-total, equal-flops: the "
        "scratch run has what the parent has cost as well",
    )


@dataclass(frozen=True, kw_only=True)
class AdviseSettings(AdvisedBudgetSettings, AdvisedAmountSettings, AdvisedParentSettings, AdvisedBySettings):
    """``advise``."""


# -- checkpoints and data ----------------------------------------------------------------------------


@dataclass(frozen=True, kw_only=True)
class ImportSettings(WorkersSettings):
    TITLE = "files"

    hf: str = setting(metavar="DIR", help="model directory with safetensors, or a name on the Hub")
    save: str = setting(metavar="CKPT", help="checkpoint to write; must not exist")
    dtype: str | None = setting(
        None, choices=("float32", "bfloat16", "float16"), help="cast every weight; by default each keeps its type"
    )
    make_vocab_size_divisible_by: int = setting(128, metavar="N", help="pad the vocabulary to a multiple of N x TP")
    tensor_model_parallel_size: int = setting(
        1, metavar="TP", help="tensor parallelism that the padded vocabulary must divide by"
    )
    max_position_embeddings: int | None = setting(
        None, metavar="N", help="import for sequences up to N only (where a sliding window is shorter)"
    )


@dataclass(frozen=True, kw_only=True)
class ExportSettings(WorkersSettings, IntegritySettings):
    TITLE = "files"

    load: str = setting(metavar="CKPT", help="checkpoint, or one of its iter_… or release folders")
    hf: str = setting(metavar="DIR", help="Hugging Face directory to write; must not exist")


@dataclass(frozen=True, kw_only=True)
class RewriteSettings(WorkersSettings, IntegritySettings):
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
    full_hash: bool = setting(False, help="hash every number of every weight, whatever the layout")
    verify_integrity: bool = setting(False, help="check every file's SHA-256 against integrity.json first")


@dataclass(frozen=True, kw_only=True)
class ReshardOptimizerSettings(Settings):
    save: str = setting(positional=True, metavar="SAVE", help="the newest save of a run, or one of its iter_… folders")


@dataclass(frozen=True, kw_only=True)
class LaunchFilesSettings(Settings):
    folder: str = setting(
        "launch", positional=True, metavar="DIR", help="where they go; must not exist (default: launch)"
    )


@dataclass(frozen=True, kw_only=True)
class BuildCorpusSettings(Settings):
    output: str = setting(metavar="DIR", help="gets train, calibration, validation and test .jsonl")
    max_bytes: int = setting(16_000_000, metavar="N", help="stop after this much text; 0 takes all there is")
    split: str = setting("94,2,2,2", metavar="SHARES", help="shares of the four splits")
    longest_held_out: int = setting(
        0, metavar="CHARACTERS", help="of a document of the last three splits; 0 has no limit"
    )
    workers: int | None = setting(
        None, metavar="N", help="processes; the files do not depend on them (default: the cores, 8 at most)"
    )


@dataclass(frozen=True, kw_only=True)
class TrainTokenizerSettings(Settings):
    input: tuple[str, ...] = setting(metavar="FILE", help="JSON lines, Parquet or text, .gz, .zst or not")
    output: str = setting(metavar="FILE.model", help="the SentencePiece model to write")
    vocab_size: int = setting(metavar="N", help="number of ids, special ones and 256 bytes included")
    model_type: str = setting("bpe", choices=("bpe", "unigram"), help="kind of model")
    json_keys: str = setting("text", metavar="KEY", help="the key of a JSON line that holds the text")
    input_format: str = setting("auto", choices=FORMATS, help="auto goes by the endings")
    max_bytes: int | None = setting(None, metavar="N", help="learn from no more than this much text")


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
        None, choices=("v1", "v2"), help="TikTokenizer: how text is cut (Megatron's default: v2)"
    )
    tiktoken_num_special_tokens: int | None = setting(
        None, metavar="N", help="TikTokenizer: ids before the ranks (default: 1000)"
    )
    tokenizer_special_tokens: tuple[str, ...] | None = setting(
        None, metavar="TOKEN", help="TikTokenizer: names of the first ids"
    )
    checkpoint: str | None = setting(None, metavar="CKPT", help="refuse a tokenizer that does not fit this checkpoint")


@dataclass(frozen=True, kw_only=True)
class DocumentsSettings(Settings):
    TITLE = "documents"

    append_eod: bool = setting(False, help="end every document with the end-of-document id")
    json_keys: str = setting("text", metavar="KEY", help="the key of a JSON line, or the column, with the text")
    input_format: str = setting("auto", choices=FORMATS, help="auto goes by the endings")
    text_documents: str = setting(
        "file", choices=("file", "paragraph", "line"), help="what a document in a text file is"
    )
    split_sentences: bool = setting(
        False,
        help="a document's sentences (NLTK's Punkt) become its sequences, as in Megatron; for BERT-like training: GPT "
        "data sets shuffle sequences",
    )
    keep_newlines: bool = setting(False, help="sentences keep the white space that follows them")
    lang: str = setting("english", metavar="NAME", help="Punkt model of --split-sentences")
    nltk_data: str | None = setting(
        None, metavar="DIR", help="folder with tokenizers/punkt_tab (else where NLTK looks)"
    )


@dataclass(frozen=True, kw_only=True)
class PreprocessSettings(DocumentsSettings, TokenizerSettings):
    TITLE = "files"

    input: tuple[str, ...] = setting(
        (),
        metavar="FILE",
        help="JSON lines, Parquet or text, perhaps .gz or .zst, in order; a run that was stopped keeps those finished",
    )
    dataset: str | None = setting(
        None, metavar="NAME[:CONFIG]", help="a data set of the Hugging Face hub or a folder, streamed"
    )
    dataset_split: str = setting("train", metavar="NAME", help="the split of --dataset")
    output_prefix: str = setting(metavar="P", help="writes P.bin, P.idx and P.json")
    workers: int = setting(1, metavar="N", help="processes; the files do not depend on their number")


@dataclass(frozen=True, kw_only=True)
class CheckContaminationSettings(Settings):
    TITLE = "corpora and limits"

    train: tuple[str, ...] = setting((), metavar="PREFIX", help="corpora of training")
    calibration: tuple[str, ...] = setting((), metavar="PREFIX", help="corpora of calibration")
    validation: tuple[str, ...] = setting((), metavar="PREFIX", help="corpora of validation")
    test: tuple[str, ...] = setting((), metavar="PREFIX", help="corpora of the test")
    similarity: float = setting(0.8, metavar="J", help="Jaccard index of 5-token shingles of near documents")
    max_duplicates: float = setting(
        0.0, metavar="SHARE", help="of the smaller corpus's documents that may be in the other (default: 0)"
    )
    max_near_duplicates: float = setting(
        0.0, metavar="SHARE", help="that may be near one, exact ones not counted (default: 0)"
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
        help="also check that the stream has these samples, and count their unique tokens, which a run over several "
        "epochs would otherwise count at its start; repeated, that the ranges are disjoint",
    )
    held_out: tuple[str, ...] = setting(
        (),
        metavar="PREFIX",
        help="also check that no document of these corpora (calibration, validation, test) is in the stream's",
    )
