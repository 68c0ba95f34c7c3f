"""The launcher ``slurm`` on a stand-in that actually runs its scripts: dependencies, kills, failures, by hand."""

from __future__ import annotations

import io
import os
import re
import signal
import subprocess
import sys
import threading
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path

import pytest
import yaml
from rich.console import Console

from megatron_prune.cli.study_commands import study_main
from megatron_prune.engine.launch import launch
from megatron_prune.errors import RunError, UsageError
from megatron_prune.study import begun, jobs, outlook, schema
from megatron_prune.study.evidence import Ledger
from megatron_prune.study.prunings import Places
from megatron_prune.study.run import scheduler, slurm
from megatron_prune.study.run.status import CellProgress
from tests.study import made_up, slurm_stand_in
from tests.study.test_end_to_end import ARGUMENTS
from tests.waiting import GENEROUS, content, wait_for_progress

NODE = Path(__file__).resolve().parents[2] / "megatron_prune" / "launch" / "node.sh"
LAUNCH = {"launcher": "slurm", "slurm": {"poll_seconds": 0.1, "options": {"partition": "debug", "exclusive": True}}}


def study(prefixes: dict[str, str], stand_in: slurm_stand_in.StandIn, **changes) -> schema.StudyConfig:
    return schema.from_mapping(mapping(prefixes, stand_in, **changes))


def mapping(prefixes: dict[str, str], stand_in: slurm_stand_in.StandIn, **changes) -> dict:
    launching = {**LAUNCH, "slurm": {**LAUNCH["slurm"], "setup": [f"export PATH={stand_in.bin}:$PATH"]}}
    return made_up.mapping(prefixes, **{"launch": launching, "settings": ["equal-training"], **changes})


def run(
    made: schema.StudyConfig, runs: Path, queue: type[slurm.Queue] = slurm.Queue, output: io.StringIO | None = None
) -> Places:
    places = Places(runs / made.name)
    with CellProgress(Console(file=output or io.StringIO())) as progress:
        scheduler.run(made, places, launcher=queue(made, places, progress), progress=progress)
    return places


def records(places: Places) -> dict[str, dict]:
    found = Ledger(places.ledger).read()
    return {
        cell: {k: v for k, v in record.items() if k not in ("seconds", "artifacts")} for cell, record in found.items()
    }


def test_jobs_wait_for_each_other_and_end_with_the_ledger_of_a_local_run(tmp_path, prefixes, monkeypatch) -> None:
    monkeypatch.chdir(tmp_path)
    local = made_up.study(prefixes, settings=["equal-training"])
    expected = records(made_up.run(local, Path("local"), made_up.FakeLauncher()))
    with slurm_stand_in.installed(tmp_path / "slurm", slurm_stand_in.made_up_verbs, monkeypatch) as stand_in:
        places = run(study(prefixes, stand_in), Path("runs"))
    assert records(places) == expected
    after = stand_in.after()
    assert after["parent"] == [] and after["calibration-s1"] == ["parent"]
    assert after["pruning-shortgpt-r50-s1"] == ["parent", "calibration-s1"]
    assert after["pruned-shortgpt-r50-s1-t1280"] == ["pruning-shortgpt-r50-s1"]
    script = (places.cell("pruned-shortgpt-r50-s1-t1280") / "job.sh").read_text()
    assert "#SBATCH --partition=debug\n#SBATCH --exclusive\n" in script
    assert f"stage pretrain -- bash {NODE} pretrain --pretrained-checkpoint runs/made-up" in script
    assert " --exit-signal-handler\n" in script and "#SBATCH --signal=B:USR1@600\n" in script


def test_a_killed_runner_finds_its_jobs_again_and_submits_none_twice(tmp_path, prefixes, monkeypatch) -> None:
    monkeypatch.chdir(tmp_path)
    kills = 0

    class Killed(slurm.Queue):
        """Five runners are killed while they wait, every other one after a look at the queue; jobs go on."""

        def ended(self) -> Mapping:
            nonlocal kills
            if kills < 5:
                kills += 1
                found = super().ended() if kills % 2 else {}
                if not found:
                    raise made_up.Killed
                return found
            return super().ended()

    with slurm_stand_in.installed(tmp_path / "slurm", slurm_stand_in.made_up_verbs, monkeypatch) as stand_in:
        made = study(prefixes, stand_in)
        for _ in range(6):
            try:
                places = run(made, Path("runs"), Killed)
                break
            except made_up.Killed:
                continue
    assert set(Counter(stand_in.submissions()).values()) == {1}
    assert len(records(places)) == len(stand_in.submissions()) == 8


def test_a_failing_job_is_retried_then_marked_and_the_rest_goes_on(tmp_path, prefixes, monkeypatch, capsys) -> None:
    monkeypatch.chdir(tmp_path)

    def breaking(argv: Sequence[str], log: Path) -> int:
        return 1 if argv[0] == "apply" and "shortgpt" in argv[-1] else slurm_stand_in.made_up_verbs(argv, log)

    with slurm_stand_in.installed(tmp_path / "slurm", breaking, monkeypatch) as stand_in:
        made = study(prefixes, stand_in)
        Path("study.yaml").write_text(yaml.safe_dump(mapping(prefixes, stand_in), sort_keys=False))
        with pytest.raises(RunError, match="pruning-shortgpt-r50-s1: apply ended without saying that it succeeded"):
            run(made, Path("runs"))
    submitted = Counter(stand_in.submissions())
    assert submitted["pruning-shortgpt-r50-s1"] == 3  # the first got as far as its plan
    finished = records(Places(Path("runs/made-up")))
    assert sorted(finished) == [
        "calibration-s1", "parent", "pruned-minitron-width-r50-s1-t1280", "pruning-minitron-width-r50-s1",
        "scratch-L2h32H4G2d8F64-equal-training-t1280-s1", "scratch-L4h24H4G2d8F32-equal-training-t1280-s1",
    ]  # fmt: skip
    study_main(["status", "study.yaml"])
    printed = capsys.readouterr().out
    rows = {words[1]: line for line in printed.splitlines() if len(words := line.split()) > 2 and words[0] == "│"}
    assert "failed after 2 attempts" in rows["pruning-shortgpt-r50-s1"]
    assert "blocked, needs pruning-shortgpt-r50-s1" in rows["pruned-shortgpt-r50-s1-t1280"]
    assert "6 finished, 1 failed, 1 blocked; no runner is at work" in printed


def test_scripts_are_plain_and_can_be_submitted_by_hand(tmp_path, prefixes, monkeypatch) -> None:
    monkeypatch.chdir(tmp_path)
    with slurm_stand_in.installed(tmp_path / "slurm", slurm_stand_in.made_up_verbs, monkeypatch) as stand_in:
        Path("study.yaml").write_text(yaml.safe_dump(mapping(prefixes, stand_in), sort_keys=False))
        study_main(["plan", "study.yaml", "--scripts"])
        places = Places(Path("runs/made-up"))
        assert len(list(places.root.glob("cells/*/job.sh"))) == 8 and not stand_in.submissions()
        script = places.cell("parent") / "job.sh"
        assert slurm_stand_in.words_of_script(script) == ["pretrain", "evaluate"]
        subprocess.run(["bash", "-n", script], check=True)
        subprocess.run(["sbatch", "--parsable", script], check=True)
        wait_for_progress(stand_in.idle, "the queue's end", lambda: content(tmp_path))
        assert places.account("parent").is_file() and not places.ledger.exists()
        run(study(prefixes, stand_in), Path("runs"))
    assert Counter(stand_in.submissions())["parent"] == 1  # by hand; the runner found it done


def test_several_nodes_meet_at_the_first(prefixes, tmp_path, monkeypatch) -> None:
    monkeypatch.chdir(tmp_path)
    launching = {"launcher": "slurm", "nproc": 16, "tensor_parallel": 2, "slurm": {"ranks_per_node": 8}}
    content = made_up.mapping(prefixes, launch=launching, recipe={"lr": 1e-3, "global_batch_size": 8,
                                                                  "micro_batch_size": 1})  # fmt: skip
    Path("study.yaml").write_text(yaml.safe_dump(content))
    study_main(["plan", "study.yaml", "--scripts"])
    script = Path("runs/made-up/cells/parent/job.sh")
    subprocess.run(["bash", "-n", script], check=True)
    text = script.read_text()
    assert "#SBATCH --nodes=2\n#SBATCH --ntasks-per-node=1\n" in text
    assert (f"stage pretrain -- srun --nodes 2 --ntasks 2 --ntasks-per-node 1 bash {NODE} pretrain --") in text
    assert "\nexport PET_NNODES=2 PET_NPROC_PER_NODE=8 PET_MAX_RESTARTS=0\n" in text
    assert "\nstage plan -- python -m megatron_prune plan" in Path(
        "runs/made-up/cells/pruning-shortgpt-r50-s1/job.sh"
    ).read_text()  # fmt: skip


def test_a_queued_job_of_other_settings_is_not_taken_for_this_one(tmp_path, prefixes, monkeypatch) -> None:
    monkeypatch.chdir(tmp_path)
    go_on = threading.Event()

    def waiting(argv: Sequence[str], log: Path) -> int:
        assert go_on.wait(60)
        return slurm_stand_in.made_up_verbs(argv, log)

    class Killed(slurm.Queue):
        def ended(self) -> Mapping:
            raise made_up.Killed

    edited = {"calibration": {"sequences": 12}}
    with slurm_stand_in.installed(tmp_path / "slurm", waiting, monkeypatch) as stand_in:
        with pytest.raises(made_up.Killed):
            run(study(prefixes, stand_in), Path("runs"), Killed)
        cell_json = Path("runs/made-up/cells/calibration-s1/cell.json")
        before = cell_json.read_bytes()
        job = stand_in.submissions().index("calibration-s1") + 1
        says = f"script of job {job} .*calibration-s1 with --calibration-sequences 12 in place of 8.*scancel {job}"
        with pytest.raises(UsageError, match=says):
            run(study(prefixes, stand_in, **edited), Path("runs"))
        assert cell_json.read_bytes() == before
        go_on.set()
        places = run(study(prefixes, stand_in), Path("runs"))
    assert set(Counter(stand_in.submissions()).values()) == {1} and len(records(places)) == 8


def test_a_job_refuses_a_command_that_is_not_its_cells(tmp_path, prefixes, monkeypatch) -> None:
    monkeypatch.chdir(tmp_path)
    made = schema.from_mapping(made_up.mapping(prefixes, launch=LAUNCH))
    places = Places(Path("runs/made-up"))
    (parent,) = jobs.parents(made, places, outlook.look(made, places))
    begun.keep(places, parent)
    words = ["false", *parent.stages[0].command.argv]
    stage = ["stage", str(places.cell("parent")), "pretrain", "--"]
    with pytest.raises(RunError, match="without saying that it succeeded"):
        study_main([*stage, *words])
    words[words.index("--lr") + 1] = "0.5"
    with pytest.raises(UsageError, match="expected the command line in cell.json, got another one"):
        study_main([*stage, *words])


def test_studies_of_one_name_in_two_folders_have_jobs_of_their_own(tmp_path, prefixes, monkeypatch) -> None:
    monkeypatch.chdir(tmp_path)
    Path("here").mkdir()
    Path("again").symlink_to("here")
    made = schema.from_mapping(made_up.mapping(prefixes, launch=LAUNCH))
    names = [slurm.job_name(made, Places(Path(folder) / "made-up"), "parent") for folder in ("here", "there", "again")]
    assert names[0] == names[2] != names[1]
    assert all(re.fullmatch("made-up@[0-9a-f]{6}/parent", name) for name in names)


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ("time: 24:00:00", 'time: expected a time in quotes, such as "24:00:00", got 86400'),
        ("exclusive: false", "exclusive: expected a value, or true for a flag without one, got False"),
        ("comment:", "comment: expected a value, or true for a flag without one, got None"),
        ("gres: [gpu:8]", "gres: expected text as sbatch takes it.*, got .'gpu:8'."),
        ('comment: "one\\ntwo"', "comment: expected text on one line.*, got 'one.ntwo'"),
        ("comment: it's", "comment: expected text on one line.*, got .*"),
        ("signal: TERM@60", "signal: expected B:USR1@SECONDS.*, got 'TERM@60'"),
        ("job-name: mine", "job-name: expected options that a job's script does not set itself.*, got 'mine'"),
        ("container-image: image", "container-image: expected no container here.*, got 'image'"),
        ("ntasks_per_node: 8", "ntasks-per-node: expected options that a job's script does not set.*, got 8"),
    ],
)
def test_options_that_slurm_would_read_otherwise_are_refused(prefixes, options: str, says: str) -> None:
    launching = {"launcher": "slurm", "slurm": {"options": yaml.safe_load(options)}}
    with pytest.raises(UsageError, match=rf"launch\.slurm\.options\.{says}"):
        schema.from_mapping(made_up.mapping(prefixes, launch=launching))


def test_options_are_written_as_slurm_reads_them(prefixes) -> None:
    options = {"time": "24:00:00", "gres": "gpu:8", "mem": 0, "exclusive": True, "comment": "for the paper"}
    launching = {"launcher": "slurm", "slurm": {"options": options}}
    made = schema.from_mapping(made_up.mapping(prefixes, launch=launching))
    places = Places(Path("runs/made-up"))
    text = slurm.script(made, places, jobs.parents(made, places, outlook.look(made, places))[0])
    for line in ("--time=24:00:00", "--gres=gpu:8", "--mem=0", "--exclusive", "--comment='for the paper'"):
        assert f"\n#SBATCH {line}\n" in text


@pytest.mark.parametrize(("most", "refused"), [(None, True), (2, False)])
def test_a_full_queue_is_waited_for(tmp_path, prefixes, monkeypatch, most: int | None, refused: bool) -> None:
    monkeypatch.chdir(tmp_path)
    with slurm_stand_in.installed(tmp_path / "slurm", slurm_stand_in.made_up_verbs, monkeypatch) as stand_in:
        stand_in.limit.write_text("2")
        content = mapping(prefixes, stand_in)
        content["launch"]["slurm"]["most_jobs"] = most
        places = run(schema.from_mapping(content), Path("runs"), output=(told := io.StringIO()))
    assert set(Counter(stand_in.submissions()).values()) == {1} and len(records(places)) == 8
    assert ("not taken, tried again later: sbatch" in told.getvalue()) == refused


def test_a_job_that_was_taken_though_nobody_answered_is_found(tmp_path, prefixes, monkeypatch) -> None:
    monkeypatch.chdir(tmp_path)
    submit, lost, found = slurm._submit, [], threading.Event()

    def losing(script: Path, after: Sequence[str]) -> str:
        job = submit(script, after)
        if not lost:
            lost.append(job)
            raise slurm.NoAnswer("sbatch: error: Socket timed out on send/recv operation")
        found.set()
        return job

    def waiting(argv: Sequence[str], log: Path) -> int:
        assert found.wait(60)
        return slurm_stand_in.made_up_verbs(argv, log)

    monkeypatch.setattr(slurm, "_submit", losing)
    with slurm_stand_in.installed(tmp_path / "slurm", waiting, monkeypatch) as stand_in:
        run(study(prefixes, stand_in), Path("runs"))
    assert lost and Counter(stand_in.submissions())["parent"] == 1


def test_an_option_that_slurm_does_not_know_ends_the_runner(tmp_path, prefixes, monkeypatch) -> None:
    monkeypatch.chdir(tmp_path)
    with slurm_stand_in.installed(tmp_path / "slurm", slurm_stand_in.made_up_verbs, monkeypatch) as stand_in:
        (stand_in.bin / "sbatch").write_text("#!/bin/bash\necho 'sbatch: error: invalid partition: x' >&2; exit 1\n")
        with pytest.raises(RunError, match="invalid partition: x"):
            run(study(prefixes, stand_in), Path("runs"))


TORCHRUN = """#!{python} -IS
import os, pathlib, signal, subprocess, sys, time
words, saved = sys.argv[1:], pathlib.Path("runs/made-up/cells/parent/checkpoint/latest_checkpointed_iteration.txt")
if "stage" in words:
    subprocess.call(words[words.index("--") + 1 :])
    sys.exit(0 if os.path.exists("done") else 1)
if "megatron_prune.engine.launch" in words:
    sys.exit(subprocess.call([sys.argv[0], "rank"]))
if words == ["rank"] and not saved.exists():
    def save(*_):
        if {saves}:
            saved.parent.mkdir()
            saved.write_text("20")
        sys.exit()
    signal.signal(signal.SIGTERM, save)
    open("started", "w").close()
    time.sleep(7200)
open("done", "w").close()
"""


@pytest.mark.parametrize("saves", [True, False])
def test_a_job_at_its_time_limit_saves_and_is_queued_again(tmp_path, prefixes, monkeypatch, saves: bool) -> None:
    monkeypatch.chdir(tmp_path)
    Path("bin").mkdir()
    programs = {"python": TORCHRUN.format(python=sys.executable, saves=saves),
                "scontrol": '#!/bin/bash\necho "$*" >> requeued\n'}  # fmt: skip
    for name, text in programs.items():
        Path("bin", name).write_text(text)
        Path("bin", name).chmod(0o755)
    launching = {"launcher": "slurm", "slurm": {"setup": [f"export PATH={tmp_path}/bin:$PATH"]}}
    made, places = schema.from_mapping(made_up.mapping(prefixes, launch=launching)), Places(Path("runs/made-up"))
    (parent,) = jobs.parents(made, places, outlook.look(made, places))
    job = ["bash", slurm.write_script(made, places, parent)]
    environment = {**os.environ, "SLURM_JOB_ID": "7"}
    running = subprocess.Popen(job, env=environment)
    wait_for_progress(lambda: Path("started").exists() or running.poll() is not None, "the rank")
    assert running.poll() is None
    running.send_signal(signal.SIGUSR1)  # as `--signal=B:USR1@600` does
    assert running.wait(GENEROUS) == (0 if saves else 1)
    assert Path("requeued").is_file() == saves
    if saves:
        assert Path("requeued").read_text() == "requeue 7\n" and not Path("done").exists()
        subprocess.run(job, env=environment, check=True)
        assert Path("done").exists() and Path("requeued").read_text() == "requeue 7\n"


def test_without_slurm_it_says_so(prefixes, tmp_path, monkeypatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(RunError, match="expected squeue on this machine, got none"):
        run(schema.from_mapping(made_up.mapping(prefixes, launch=LAUNCH)), Path("runs"))


def test_jobs_on_the_real_engine(tmp_path, monkeypatch) -> None:
    monkeypatch.chdir(tmp_path)

    def engine(argv: Sequence[str], log: Path) -> int:
        return launch(argv, log=log, env={"OMP_NUM_THREADS": "1"})

    with slurm_stand_in.installed(tmp_path / "slurm", engine, monkeypatch) as stand_in:
        prefixes = made_up.corpora(tmp_path)
        parent = {"pretrain": {"tokens": 1280, "arguments": ARGUMENTS}}
        made = study(prefixes, stand_in, parent=parent, budgets=[640], methods=[{"name": "shortgpt"}])
        places = run(made, Path("runs"))
    found = records(places)
    assert sorted(record["kind"] for record in found.values()) == [
        "calibration", "parent", "pruned", "pruning", "scratch"
    ]  # fmt: skip
    assert 0 < found["parent"]["test_loss"] < 20


@pytest.mark.parametrize(
    ("code", "ends", "says"),
    [(75, 75, "another job is at work on parent"), (71, 1, "exit code 71 of flock): its file system has no locks")],
)
def test_a_lock_that_cannot_be_had(tmp_path, prefixes, monkeypatch, code: int, ends: int, says: str) -> None:
    """util-linux's flock exits with its conflict code if the lock is held, else with one of sysexits.h."""
    monkeypatch.chdir(tmp_path)
    Path("bin").mkdir()
    Path("bin", "flock").write_text(
        f"#!/bin/bash\n[[ \"$*\" == *'--conflict-exit-code 75'* ]] && exit {code}\nexit 1\n"
    )
    Path("bin", "flock").chmod(0o755)
    made, places = schema.from_mapping(made_up.mapping(prefixes, launch={"launcher": "slurm"})), Places(Path("runs/x"))
    (parent,) = jobs.parents(made, places, outlook.look(made, places))
    environment = {**os.environ, "PATH": f"{tmp_path}/bin:{os.environ['PATH']}"}
    job = ["bash", slurm.write_script(made, places, parent)]
    done = subprocess.run(job, env=environment, capture_output=True, text=True)
    assert done.returncode == ends and says in done.stdout + done.stderr


def test_a_name_in_the_queue_may_hold_any_character(monkeypatch) -> None:
    """Other jobs of this user are in the answer too, and are called what they like."""
    answer = "12 RUNNING a|b|c\n13_4 PENDING two words\n14 COMPLETING \n\n15 PENDING study@abc/cell\n"
    monkeypatch.setattr(slurm, "_ask", lambda words: answer)
    assert slurm._queue() == [
        ("12", "a|b|c", "RUNNING"), ("13_4", "two words", "PENDING"), ("14", "", "COMPLETING"),
        ("15", "study@abc/cell", "PENDING"),
    ]  # fmt: skip
