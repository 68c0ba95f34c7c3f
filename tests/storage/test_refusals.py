"""Flags that cannot work with a store are refused by name, before anything starts."""

from __future__ import annotations

import re

import pytest

from megatron_prune.engine import arguments
from megatron_prune.errors import UsageError
from tests.training.small import MODEL, recipe

ON = "--enable-msc"


ADDRESSES = {  # the text after "expected "
    "--load msc://disk/x": "--enable-msc with the address of an object store",
    "--save=msc://disk/x": "--enable-msc with the address of an object store",
    f"{ON} --pretrained-checkpoint s3://b/x": "a directory, or msc://PROFILE",
    f"{ON} --masks gs://b/x": "a directory, or msc://PROFILE",
    f"{ON} --load msc://other/x": 'a profile of MSC_CONFIG, got msc://other/x (Profile "other"',
    f"{ON} --ckpt-convert-save msc://disk/x": "a directory of this machine",
}


@pytest.mark.parametrize("line", ADDRESSES)
def test_addresses(configured, job, line):
    done = job(["pretrain", *line.split()])
    flag, value = line.replace("=", " ").split()[-2:]
    assert (
        done.returncode == 2
        and f"{flag}: expected {ADDRESSES[line]}" in done.output
        and f", got {value} (" in done.output
    ), done.output
    assert "Traceback" not in done.output and "arguments" not in done.output


ON_DISKS = {
    "--save-retain-interval 4": "--save-retain-interval: expected .*, got 4 .*from disks only",
    "--log-progress": "--log-progress: expected .*, got on .*appends",
    "--ckpt-format torch": "--ckpt-format: expected torch_dist where --save is in an object store, got torch",
    "--non-persistent-ckpt-type global": "--non-persistent-ckpt-type: expected .*, got global .*from disks only",
    "--wandb-project p": "--wandb-save-dir: expected .*, got nothing",
}


@pytest.mark.parametrize("flags", ON_DISKS)
def test_what_megatron_does_on_disks_alone(disk, job, tmp_path, flags):
    done = job(["pretrain", *MODEL, *recipe(tmp_path / "none", "0:8", disk("run")), ON, *flags.split()])
    assert done.returncode == 2 and "Traceback" not in done.output, done.output
    assert re.search(ON_DISKS[flags], done.output), done.output
    assert not disk.path("run").exists()


def test_verbs_that_rename_what_they_wrote(disk, job, tmp_path):
    for verb in ("sparsify", "prune"):
        words = ["--load", tmp_path, "--method", "magnitude", "--ratio", "0.5", "--save", disk("run"), ON]
        done = job([verb, *words])
        assert done.returncode == 2 and "object stores cannot rename directories" in done.output, done.output


def test_without_the_client(monkeypatch):
    monkeypatch.setattr(arguments.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(UsageError, match=r"--enable-msc: expected .*, got none; pip install 'megatron-prune\[msc\]'"):
        arguments.refuse_unusable("pretrain", [ON])
    with pytest.raises(UsageError, match="--enable-msc: expected .*, got none"):
        arguments.refuse_unusable("pretrain", ["--load", "msc://disk/x", ON])
    arguments.refuse_unusable("pretrain", ["--load", "/a/directory"])
