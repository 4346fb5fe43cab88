"""Who a process is, from its launcher's variables; whose failure is shown."""

import asyncio
import os
import socket
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import zmq

from moeserve import launch
from moeserve.config import parse_arguments
from moeserve.launch import RankPlace, RankSet, check_reachable, place_from_environment
from moeserve.messages import RankFailed, RankReady, Wake, decode_to_rank, encode
from moeserve.plan import make_plan

TORCHRUN = {
    "RANK": "3",
    "LOCAL_RANK": "1",
    "LOCAL_WORLD_SIZE": "2",
    "WORLD_SIZE": "4",
    "MASTER_ADDR": "10.0.0.1",
    "MASTER_PORT": "29500",
}
SLURM = {
    "SLURM_PROCID": "3",
    "SLURM_LOCALID": "1",
    "SLURM_NODEID": "1",
    "SLURM_STEP_TASKS_PER_NODE": "2(x2)",
    "SLURM_STEP_NUM_TASKS": "4",
    "MASTER_ADDR": "10.0.0.1",
    "MASTER_PORT": "29500",
}


@pytest.mark.parametrize("environment", [TORCHRUN, SLURM])
def test_a_launched_rank_knows_its_place(environment: dict[str, str]) -> None:
    place = place_from_environment(environment)
    assert place is not None
    assert (place.rank, place.local_rank, place.local_size, place.world_size) == (3, 1, 2, 4)
    assert place.store == ("10.0.0.1", 29500)
    assert place.mail == "tcp://10.0.0.1:29501"


@pytest.mark.parametrize(("node", "tasks"), [("0", 4), ("1", 4), ("2", 3), ("3", 12)], ids="node {}".format)
def test_nodes_may_have_different_numbers_of_tasks(node: str, tasks: int) -> None:
    uneven = {"SLURM_NODEID": node, "SLURM_STEP_TASKS_PER_NODE": "4(x2),3,12", "SLURM_STEP_NUM_TASKS": "23"}
    place = place_from_environment(SLURM | uneven)
    assert place is not None and place.local_size == tasks


BATCH_SCRIPT = {"SLURM_PROCID": "0", "SLURM_NTASKS": "4", "SLURM_TASKS_PER_NODE": "2(x2)"}


@pytest.mark.parametrize("environment", [{}, {**SLURM, "SLURM_STEP_NUM_TASKS": "1"}, BATCH_SCRIPT])
def test_without_a_launcher_the_ranks_are_local(environment: dict[str, str]) -> None:
    assert place_from_environment(environment) is None


@pytest.mark.parametrize("environment", [TORCHRUN, SLURM])
def test_a_missing_variable_is_named(environment: dict[str, str]) -> None:
    for name in environment.keys() - {"RANK", "SLURM_STEP_NUM_TASKS"}:
        with pytest.raises(ValueError, match=name):
            place_from_environment({key: value for key, value in environment.items() if key != name})
    with pytest.raises(ValueError, match="MASTER_PORT = 'soon'"):
        place_from_environment({**environment, "MASTER_PORT": "soon"})


class SilentProcess:
    """Stands for a rank that never ends by itself."""

    def __init__(self) -> None:
        self.sentinel, self.end = os.pipe()

    def is_alive(self) -> bool:
        return True

    def kill(self) -> None:
        os.close(self.end)

    def join(self) -> None:
        os.close(self.sentinel)


@pytest.fixture
def mails(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Where the ranks would send their mail; none is started."""
    addresses: list[str] = []

    def start_process(
        function: Callable[..., None], given: tuple[object, RankPlace], name: str, *, with_main: bool
    ) -> SilentProcess:
        addresses.append(given[1].mail)
        return SilentProcess()

    monkeypatch.setattr(launch, "start_process", start_process)
    return addresses


def two_ranks() -> RankSet:
    return RankSet(make_plan(parse_arguments(["--device", "cpu", "--tp-size", "2"])))


def speak_as_ranks(mails: list[str]) -> list[Any]:
    speakers = []
    for rank, address in enumerate(mails):
        speakers.append(zmq.asyncio.Context.instance().socket(zmq.DEALER))
        speakers[rank].setsockopt(zmq.IDENTITY, str(rank).encode())
        speakers[rank].setsockopt(zmq.LINGER, 0)
        speakers[rank].connect(address)
    return speakers


def test_no_file_is_left_once_the_ranks_are_there(mails: list[str]) -> None:
    async def main() -> None:
        ranks = two_ranks()
        ranks.start()
        folder = Path(mails[0].removeprefix("ipc://")).parent
        speakers = speak_as_ranks(mails)
        for rank, speaker in enumerate(speakers):
            assert folder.exists()
            await speaker.send(encode(RankReady(rank, 1, 1, 1)))
            await ranks.receive()
        assert not folder.exists()
        await ranks.send(0, Wake())
        assert decode_to_rank(await speakers[0].recv()) == Wake()
        await ranks.stop(timeout=0)
        for speaker in speakers:
            speaker.close()

    asyncio.run(main())


def test_the_first_failure_is_shown_though_it_is_heard_last(mails: list[str]) -> None:
    async def main() -> None:
        ranks = two_ranks()
        ranks.start()
        speakers = speak_as_ranks(mails)
        await speakers[1].send(encode(RankFailed(1, 20.0, "rank 0 has died")))
        assert await ranks.receive() == (0, RankFailed(1, 20.0, "rank 0 has died"))
        stopping = asyncio.create_task(ranks.stop())
        await asyncio.sleep(0.1)
        await speakers[0].send(encode(RankFailed(0, 10.0, "the cause")))
        await stopping
        for speaker in speakers:
            speaker.close()
        ranks.raise_failure()

    with pytest.raises(RuntimeError, match="rank 0 failed\nthe cause"):
        asyncio.run(main())


def test_a_taken_port_for_the_ranks_mail_is_named() -> None:
    with socket.socket() as holder:
        holder.bind(("127.0.0.1", 0))
        holder.listen()
        port = holder.getsockname()[1]
        place = RankPlace(0, 0, 1, 1, ("127.0.0.1", port - 1), f"tcp://127.0.0.1:{port}")
        ranks = RankSet(make_plan(parse_arguments(["--device", "cpu"])), place)

        async def start() -> None:
            ranks.start()

        with pytest.raises(ValueError, match=f"MASTER_PORT = {port - 1}: .*:{port}.*in use"):
            asyncio.run(start())


def test_a_name_that_other_hosts_cannot_reach_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    def place(host: str, local_size: int) -> RankPlace:
        return RankPlace(0, 0, local_size, 4, (host, 29500), f"tcp://{host}:29501")

    monkeypatch.setattr(socket, "gethostbyname", {"n1": "127.0.1.1", "127.0.0.1": "127.0.0.1"}.__getitem__)
    with pytest.raises(ValueError, match="MASTER_ADDR = n1: is 127.0.1.1 on that host"):
        check_reachable(place("n1", local_size=2))
    check_reachable(place("n1", local_size=4))
    check_reachable(place("127.0.0.1", local_size=2))


def test_an_unknown_name_is_refused() -> None:
    with pytest.raises(ValueError, match="MASTER_ADDR = no host: not known"):
        check_reachable(RankPlace(0, 0, 1, 2, ("no host", 29500), "tcp://no host:29501"))
