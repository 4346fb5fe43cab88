"""Who a process is, from its launcher's variables."""

import pytest

from moeserve.launch import place_from_environment

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
    "SLURM_STEP_TASKS_PER_NODE": "2(x2)",
    "SLURM_NTASKS": "4",
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


@pytest.mark.parametrize("environment", [{}, {"SLURM_PROCID": "0", "SLURM_NTASKS": "1"}])
def test_without_a_launcher_the_ranks_are_local(environment: dict[str, str]) -> None:
    assert place_from_environment(environment) is None


@pytest.mark.parametrize("environment", [TORCHRUN, SLURM])
def test_a_missing_variable_is_named(environment: dict[str, str]) -> None:
    for name in environment.keys() - {"RANK", "SLURM_PROCID", "SLURM_NTASKS"}:
        with pytest.raises(ValueError, match=name):
            place_from_environment({key: value for key, value in environment.items() if key != name})
    with pytest.raises(ValueError, match="MASTER_PORT = 'soon'"):
        place_from_environment({**environment, "MASTER_PORT": "soon"})
