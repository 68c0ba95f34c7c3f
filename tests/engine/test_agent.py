"""The agent of launch/node.sh: which failures it restarts, and what it prints when the other nodes are gone."""

from __future__ import annotations

import logging
import subprocess
from pathlib import Path

import pytest

from megatron_prune.engine import agent
from tests.launch import nodes


@pytest.mark.parametrize(
    ("node_count", "code", "starts", "retry", "expected"),
    [("1:2", 2, 1, "143", 2), (1, 2, 1, "", 2), (1, 7, 2, "143", 143)],
)
def test_a_refusal_is_not_restarted(tmp_path: Path, node_count, code, starts, retry, expected) -> None:
    # In a rank alone: it exits before the verb is imported.
    (tmp_path / "sitecustomize.py").write_text(
        "import os\n"
        f"if 'RANK' in os.environ:\n    open({str(tmp_path / 'starts')!r}, 'a').write('x')\n    os._exit({code})\n"
    )
    env = nodes.environment(nodes.free_port(), node_count) | {"PET_MAX_RESTARTS": "1"}
    env |= {"PYTHONPATH": f"{tmp_path}:{nodes.ROOT}"} | ({"MEGATRON_PRUNE_RETRY_CODE": retry} if retry else {})
    done = subprocess.run(
        ["bash", "launch/node.sh", "pretrain"], cwd=nodes.ROOT, env=env, capture_output=True, text=True
    )
    assert done.returncode == expected, done.stderr
    assert (tmp_path / "starts").read_text() == "x" * starts
    assert f"exited with code {code}" in done.stderr and "Traceback" not in done.stderr


def test_a_lost_rendezvous_is_one_line() -> None:
    from torch.distributed.elastic.rendezvous import RendezvousConnectionError

    try:
        raise RendezvousConnectionError("the connection failed\nsecond line")
    except RendezvousConnectionError as error:
        info = (type(error), error, error.__traceback__)
    record = logging.LogRecord("x", logging.ERROR, "", 0, "Error shutting down", (), info)
    assert agent._shorten(record) and record.exc_info is None
    assert record.getMessage() == "Error shutting down: the connection failed"
