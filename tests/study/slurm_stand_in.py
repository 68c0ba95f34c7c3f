"""A Slurm of one machine for tests: ``sbatch`` and ``squeue`` that actually run scripts, with their dependencies.

Jobs live on when the runner that submitted them is killed. So that no test waits for imports, the ``python`` that the
scripts find is a client of the test's own process, which runs ``study stage`` itself and hands every other verb to a
function: the made-up verbs, or the engine.
"""

from __future__ import annotations

import contextlib
import json
import os
import re
import socketserver
import sys
import tempfile
import threading
import traceback
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import pytest

from megatron_prune.cli.study_commands import study_main
from megatron_prune.errors import MegatronPruneError
from megatron_prune.study.commands import Command
from tests.study import made_up

Verb = Callable[[Sequence[str], Path], int]  # the words after ``python -m megatron_prune``, and a log

SBATCH = """#!/bin/bash
jobs={jobs}; after=
limit={limit}; [ ! -f $limit ] || [ $(squeue --me --noheader '--format=%i %T %j' | wc -l) -lt $(cat $limit) ] || {{
  echo "sbatch: error: QOSMaxSubmitJobPerUserLimit" >&2; exit 1; }}
for word in "$@"; do
  case $word in
    --dependency=afterok:*) after=${{word#*:}} ;;
    --parsable | --kill-on-invalid-dep=yes) ;;
    -*) echo "sbatch: unrecognized option $word" >&2; exit 1 ;;
    *) script=$word ;;
  esac
done
[ "$(head -c 2 "$script")" = '#!' ] || {{ echo "sbatch: This does not look like a batch script" >&2; exit 1; }}
id=1; until mkdir $jobs/$id 2>/dev/null; do id=$((id + 1)); done
sed -n 's/^#SBATCH --job-name=//p' "$script" > $jobs/$id/name
echo PENDING > $jobs/$id/state
cp "$script" $jobs/$id/script; echo "$after" > $jobs/$id/after
setsid bash -c '
  cd "$0"; jobs=$1; id=$2
  for other in ${{3//:/ }}; do
    until [ -f $jobs/$other/end ]; do sleep 0.02; done
    [ "$(cat $jobs/$other/end)" = 0 ] || {{ echo dropped > $jobs/$id/code; mv $jobs/$id/code $jobs/$id/end; exit; }}
  done
  echo RUNNING > $jobs/$id/state
  SLURM_JOB_ID=$id bash $jobs/$id/script > $jobs/$id/output 2>&1
  echo $? > $jobs/$id/code; mv $jobs/$id/code $jobs/$id/end  # never seen empty, which would read as a failure
' "$PWD" $jobs $id "$after" < /dev/null > /dev/null 2>&1 &
echo "$id;cluster"
"""
SQUEUE = """#!/bin/bash
[ "$*" = "--me --noheader --format=%i %T %j" ] || {{ echo "squeue: unknown $*" >&2; exit 1; }}
for job in {jobs}/*/; do
  job=${{job%/}}
  [ -f $job/state ] && [ ! -f $job/end ] && echo "${{job##*/}} $(cat $job/state) $(cat $job/name)"
done
exit 0
"""
PYTHON = """#!{python} -IS
import json, os, socket, sys
with socket.socket(socket.AF_UNIX) as server:
    server.connect({address!r})
    server.sendall(json.dumps(sys.argv[1:]).encode() + b"\\n")
    answer = json.loads(server.makefile().readline())
print(answer["text"], end="")
sys.exit(answer["code"])
"""


class StandIn:
    """The machine: its programs under ``bin``, every job that was ever submitted under ``jobs``."""

    def __init__(self, folder: Path):
        self.bin, self.jobs = folder / "bin", folder / "jobs"
        self.limit = folder / "limit"  # the file with the limit of jobs in the queue
        for path in (self.bin, self.jobs):
            path.mkdir(parents=True)

    def names(self) -> list[str]:
        """Names of all jobs in the order of their submission."""
        return [(self.jobs / str(number) / "name").read_text().strip() for number in self._numbers()]

    def submissions(self) -> list[str]:
        """The same without the study: cells."""
        return [name.partition("/")[2] for name in self.names()]

    def after(self) -> dict[str, list[str]]:
        """Dependencies of each job, by cell."""
        names = dict(zip(map(str, self._numbers()), self.submissions(), strict=True))
        texts = {job: (self.jobs / job / "after").read_text().strip() for job in names}
        return {names[job]: [names[one] for one in text.split(":") if one] for job, text in texts.items()}

    def idle(self) -> bool:
        return all((self.jobs / str(number) / "end").is_file() for number in self._numbers())

    def _numbers(self) -> list[int]:
        return sorted(int(path.name) for path in self.jobs.iterdir())


@contextlib.contextmanager
def installed(folder: Path, verb: Verb, monkeypatch: pytest.MonkeyPatch) -> Iterator[StandIn]:
    """The stand-in first on PATH, with ``verb`` behind its ``python``."""
    made = StandIn(folder)
    address = str(Path(tempfile.mkdtemp(prefix="slurm-")) / "python")  # a socket's path may not be long
    programs = {
        "sbatch": SBATCH.format(jobs=made.jobs, limit=made.limit),
        "squeue": SQUEUE.format(jobs=made.jobs),
        "python": PYTHON.format(python=sys.executable, address=address),
    }
    for name, text in programs.items():
        (made.bin / name).write_text(text)
        (made.bin / name).chmod(0o755)
    monkeypatch.setenv("PATH", f"{made.bin}:{os.environ['PATH']}")

    class Handler(socketserver.StreamRequestHandler):
        def handle(self) -> None:
            code, text = _run(json.loads(self.rfile.readline()), verb)
            with contextlib.suppress(BrokenPipeError):
                self.wfile.write(json.dumps({"code": code, "text": text}).encode() + b"\n")

    class Server(socketserver.ThreadingUnixStreamServer):
        daemon_threads = True

    with Server(address, Handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield made
        server.shutdown()


def _run(argv: Sequence[str], verb: Verb) -> tuple[int, str]:
    """A call of ``python``, or of torchrun through it: its exit code and output."""
    if list(argv[:2]) == ["-m", "megatron_prune.engine.agent"]:
        argv = argv[2:]
    if list(argv[:3]) == ["-m", "megatron_prune.engine.launch", "-"]:  # the same on one machine
        argv = argv[3:]
    assert list(argv[:2]) == ["-m", "megatron_prune"], argv
    try:
        if argv[2:4] == ["study", "stage"]:
            return study_main(list(argv[3:])), ""
        with tempfile.NamedTemporaryFile() as log:
            return verb(argv[2:], Path(log.name)), Path(log.name).read_text()
    except MegatronPruneError as error:
        return 2, f"{error}\n"
    except Exception:
        return 1, traceback.format_exc()


def made_up_verbs(argv: Sequence[str], log: Path) -> int:
    """The verbs of ``made_up.FakeLauncher``."""
    return made_up.FakeLauncher()(Command(argv[0], tuple(argv)), log=log, env={})


def words_of_script(path: Path) -> list[str]:
    """The commands of a job's script."""
    return re.findall(r"^stage (\S+) -- ", path.read_text(), re.MULTILINE)
