"""Clients on a Ray cluster: two nodes on this machine give the bits of one process, also where one
of them is killed in the middle of a round.
"""

import os
import socket
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from fedsieve.engine.loop import Round
from fedsieve.engine.spread import Spread, Worker
from fedsieve.errors import FedSieveError
from fedsieve.recipe import read as recipe
from fedsieve.recipe.experiment import from_recipe
from fedsieve.run import rundir
from tests import runs
from tests.conftest import Tiny

# Read where Ray is imported: this machine's nodes then call themselves 127.0.0.1.
os.environ["RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER"] = "0"

pytestmark = pytest.mark.usefixtures("no_report")


@pytest.fixture(scope="module")
def cluster() -> Iterator[Any]:
    """Two nodes of one CPU each, and a driver that is connected to the first."""
    ray = pytest.importorskip("ray", reason="needs Ray: pip install 'fedsieve[ray]'")
    from ray.cluster_utils import Cluster

    small = {"num_cpus": 1, "object_store_memory": 100 << 20, "include_dashboard": False}
    made = Cluster(initialize_head=True, head_node_args={**small, "node_ip_address": "127.0.0.1"})
    try:
        made.second = made.add_node(**small, node_ip_address="127.0.0.1")
        ray.init(made.address, log_to_driver=False)
        yield made
    finally:
        ray.shutdown()
        made.shutdown()


def engine(count: int) -> dict[str, Any]:
    return {"kind": "ray", "workers": count, "threads": 1}


def test_a_cluster_that_is_not_there_is_told_in_seconds(tiny: Tiny) -> None:
    pytest.importorskip("ray", reason="needs Ray: pip install 'fedsieve[ray]'")
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        address = f"127.0.0.1:{free.getsockname()[1]}"
    given = recipe.check(tiny.table(engine={**engine(1), "address": address}))
    with pytest.raises(FedSieveError, match=f"no Ray cluster answers at {address}"):
        from_recipe(given)


@pytest.mark.slow
def test_two_nodes_give_the_bits_of_one_process(
    tiny: Tiny, tmp_path: Path, cluster: Any, whole_with_memories: Path
) -> None:
    runs.start(tiny, tmp_path / "ray", engine=engine(2), **runs.FLASC)
    runs.assert_same(tmp_path / "ray", whole_with_memories)


@pytest.mark.slow
def test_a_node_that_is_killed_in_a_round_costs_no_bit(
    tiny: Tiny,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    cluster: Any,
    whole_with_memories: Path,
) -> None:
    """The last test of the cluster: it has one node then. Its one CPU is what is left."""
    ask = Spread._ask
    killed: list[str] = []

    def kill(self: Spread, worker: Worker, job: Any) -> None:
        if b'"round": 2' in job.request and not killed:
            killed.append(job.client.id)
            cluster.remove_node(cluster.second, allow_graceful=False)
        ask(self, worker, job)

    monkeypatch.setattr(Spread, "_ask", kill)
    ends: list[int] = []

    def show(summary: Round, receipts: Any) -> None:
        ends.append(summary.round)

    with pytest.warns(UserWarning, match="Ray worker .* ended .* while client .* runs again"):
        runs.start(tiny, tmp_path / "ray", show, engine=engine(2), **runs.FLASC)
    assert ends == [0, 1, 2, 3, 4, 5]
    runs.assert_same(tmp_path / "ray", whole_with_memories)
    assert not any(line.get("dropped") for line in runs.lines(tmp_path / "ray", rundir.CLIENTS))
