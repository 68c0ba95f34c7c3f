"""launch/node.sh: a job whose node dies and comes back ends with the losses of an undisturbed run."""

from __future__ import annotations

from pathlib import Path

import pytest

from megatron_prune.artifacts import read_json
from tests.launch import nodes
from tests.waiting import GENEROUS, content, wait_for_progress


@pytest.fixture(scope="module")
def undisturbed(job, tiny_corpus, tmp_path_factory) -> Path:
    save = tmp_path_factory.mktemp("undisturbed") / "run"
    job(nodes.training(tiny_corpus, save), nproc=2).ok()
    return save


@pytest.mark.slow
def test_a_node_is_killed_and_comes_back(undisturbed, tiny_corpus, tmp_path) -> None:
    save, port = tmp_path / "run", nodes.free_port()
    argv = nodes.training(tiny_corpus, save)
    with nodes.node(argv, port, tmp_path / "first.txt") as first:
        wait_for_progress(lambda: nodes.holds_a_store(port), "the first node's store")
        with nodes.node(argv, port, tmp_path / "second.txt"):
            wait_for_progress(lambda: nodes.saved(save) >= 10, "a save", lambda: content(tmp_path))
        assert nodes.saved(save) < nodes.STEPS, "it was over before the kill"
        with nodes.node(argv, port, tmp_path / "third.txt") as third:
            assert third.wait(GENEROUS) == 0, (tmp_path / "third.txt").read_text()[-3000:]
            assert first.wait(GENEROUS) == 0, (tmp_path / "first.txt").read_text()[-3000:]
    account = read_json(save / "account.json")
    assert account["complete"] and len(account["attempts"]) == 2
    assert nodes.losses(save) == nodes.losses(undisturbed)


@pytest.mark.slow
def test_a_node_is_killed_and_the_other_goes_on_alone(undisturbed, tiny_corpus, tmp_path) -> None:
    save, port = tmp_path / "run", nodes.free_port()
    argv = nodes.training(tiny_corpus, save)
    with nodes.node(argv, port, tmp_path / "first.txt", "1:2") as first:
        wait_for_progress(lambda: nodes.holds_a_store(port), "the first node's store")
        with nodes.node(argv, port, tmp_path / "second.txt", "1:2"):
            wait_for_progress(
                lambda: nodes.sizes(save)[-1:] == [2] and nodes.saved(save) >= 10,
                "a save of both",
                lambda: content(tmp_path),
            )
        assert nodes.saved(save) < nodes.STEPS, "it was over before the kill"
        assert first.wait(GENEROUS) == 0, (tmp_path / "first.txt").read_text()[-3000:]
    assert read_json(save / "account.json")["complete"] and nodes.sizes(save)[-2:] == [2, 1]
    found, expected = (
        [float(loss) for _, _, loss, *_ in nodes.losses(run)[1:]] for run in (save, undisturbed)
    )  # one rank sums in another order than two ranks
    assert len(found) == nodes.STEPS and found == pytest.approx(expected, rel=1e-5)
