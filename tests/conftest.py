"""Shared fixtures: jobs and forked ranks, tiny Hugging Face models, a tiny corpus, a tiny parent.

``job(argv, nproc=2)`` runs a verb as a user would, ``distributed(function, 2, …)`` runs a test's
own function in ranks; both fork from one process that lives for the session, since importing
torch and Megatron dominates otherwise. Everything built here is small, seeded, and built once.
"""

from __future__ import annotations

import dataclasses
import itertools
import os
import pickle
import shutil
import subprocess
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import hypothesis
import pytest

from tests import tiny
from tests.tiers import pytest_addoption, pytest_collection_modifyitems, pytest_configure  # noqa: F401  # hooks
from tests.waiting import GENEROUS

os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
os.environ.setdefault("WANDB_MODE", "disabled")
os.environ.setdefault("MEGATRON_PRUNE_VERBOSE", "1")  # so that tests see the output of Megatron

# Other work may share the machine: no example has a time.
SLOW = hypothesis.HealthCheck.too_slow
hypothesis.settings.register_profile("shared machine", deadline=None, suppress_health_check=[SLOW])
hypothesis.settings.load_profile("shared machine")

ROOT = Path(__file__).resolve().parents[1]
WITH_TE = os.environ.get("MEGATRON_PRUNE_TE_TESTS") == "1"  # tests/run.sh --te sets it

if WITH_TE:  # ranks build Transformer Engine's layers
    from megatron_prune.engine import launch

    launch.FORK_SERVER = "tests.te.fork_server"


@dataclasses.dataclass(frozen=True)
class FinishedJob:
    """A verb that has run: its exit code and the output of all ranks."""

    argv: list[str]
    returncode: int
    output: str

    def ok(self) -> FinishedJob:
        """This job, or a failure that shows its output."""
        if self.returncode:
            shown = self.output[-6000:]
            pytest.fail(f"{' '.join(self.argv)}\nleft with {self.returncode}:\n{shown}", pytrace=False)
        return self


@pytest.fixture(scope="session")
def job(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., FinishedJob]:
    """``job(argv, nproc=1, env=None, timeout=GENEROUS)`` runs ``megatron_prune <argv>`` to its end."""
    from megatron_prune.engine.launch import launch

    folder = tmp_path_factory.mktemp("jobs")
    numbers = itertools.count()

    def run(
        argv: Sequence[str | os.PathLike[str]],
        nproc: int = 1,
        env: dict[str, str] | None = None,
        timeout: float = GENEROUS,
    ) -> FinishedJob:
        words = [str(word) for word in argv]
        log = folder / f"{next(numbers):03d}-{words[0]}.txt"
        code = launch(words, nproc=nproc, log=log, env=env, timeout=timeout)
        return FinishedJob(words, code, log.read_text(errors="replace"))

    return run


@pytest.fixture(scope="session")
def distributed(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., list[Any]]:
    """``distributed(function, nproc, *args, **kwargs)``: its results in ``nproc`` forked ranks.

    ``function`` is a module-level function of a test file, or of any importable module; it finds
    RANK, WORLD_SIZE, MASTER_ADDR and MASTER_PORT in its environment, as under torchrun, and
    initialises what it needs. Arguments and results are pickled.
    """
    from megatron_prune.engine.launch import start_function
    from tests.distributed_work import FunctionCall, results

    def run(function: Callable[..., Any], nproc: int, *arguments: Any, timeout: float = GENEROUS, **keywords: Any):
        folder = tmp_path_factory.mktemp(function.__name__)
        log = folder / "log.txt"
        call = FunctionCall(
            file=str(sys.modules[function.__module__].__file__),
            module=function.__module__,
            function=function.__name__,
            arguments=pickle.dumps((arguments, keywords)),
            results=str(folder),
        )
        with start_function(call, nproc=nproc, log=log) as running:
            code = running.wait(timeout)
        if code:
            shown = log.read_text(errors="replace")[-6000:]
            pytest.fail(f"{function.__name__} on {nproc} ranks left with {code}:\n{shown}", pytrace=False)
        return results(folder, nproc)

    return run


@pytest.fixture(scope="session")
def tiny_documents() -> list[str]:
    """Three hundred paragraphs of real English, about 110 kB."""
    return tiny.documents(300)


@pytest.fixture(scope="session")
def tiny_jsonl(tmp_path_factory: pytest.TempPathFactory, tiny_documents: list[str]) -> Path:
    """``tiny_documents`` as a JSONL file with the key ``text``."""
    return tiny.write_jsonl(tmp_path_factory.mktemp("text") / "tiny.jsonl", tiny_documents)


@pytest.fixture(scope="session")
def tiny_tokenizer(tmp_path_factory: pytest.TempPathFactory, tiny_documents: list[str]) -> Path:
    """A Hugging Face tokenizer directory with ``tiny.VOCABULARY`` tokens, end of text ``</s>``."""
    return tiny.write_tokenizer(tmp_path_factory.mktemp("tokenizer"), tiny_documents)


@pytest.fixture(scope="session")
def tiny_hf(tmp_path_factory: pytest.TempPathFactory, tiny_tokenizer: Path) -> Callable[..., Path]:
    """``tiny_hf(name, layers=2, seed=None, **config)``: a directory with a model of ``tiny.HF_MODELS``.

    Float32, with ``tiny_tokenizer``'s files next to the weights. Built once for each set of arguments.
    """
    built: dict[str, Path] = {}

    def get(name: str, **changes: Any) -> Path:
        key = f"{name} {sorted(changes.items())}"
        if key not in built:
            folder = tmp_path_factory.mktemp(name)
            tiny.write_hf_model(folder, name, **changes)
            for file in tiny_tokenizer.iterdir():
                shutil.copy(file, folder)
            built[key] = folder
        return built[key]

    return get


@pytest.fixture(scope="session")
def tiny_corpus(tmp_path_factory: pytest.TempPathFactory, tiny_jsonl: Path, tiny_tokenizer: Path) -> Path:
    """Prefix of ``tiny_jsonl`` as ``.bin``/``.idx``, made by ``preprocess``."""
    prefix = tmp_path_factory.mktemp("corpus") / "tiny"
    command = [sys.executable, ROOT / "tools" / "preprocess_data.py", "--input", tiny_jsonl]
    command += ["--output-prefix", prefix, "--tokenizer-type", "HuggingFaceTokenizer"]
    command += ["--tokenizer-model", tiny_tokenizer, "--append-eod", "--workers", "1"]
    subprocess.run([str(word) for word in command], check=True, stdin=subprocess.DEVNULL)
    return prefix


@pytest.fixture(scope="session")
def tiny_parent(tmp_path_factory: pytest.TempPathFactory, tiny_hf: Callable[..., Path]) -> Path:
    """A Megatron checkpoint of ``tiny_hf("llama-gqa", layers=4)``: random weights, not trained."""
    from megatron_prune.convert.huggingface import import_hf

    checkpoint = tmp_path_factory.mktemp("parent") / "checkpoint"
    import_hf(tiny_hf("llama-gqa", layers=4), checkpoint)
    return checkpoint
