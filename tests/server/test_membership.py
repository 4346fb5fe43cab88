"""Who may meet when: all that are left, and only after a loss."""

from __future__ import annotations

from moeserve.server.membership import MEETINGS_AGAIN, Membership


def test_they_meet_once_all_that_are_left_wait_and_the_loss_is_known() -> None:
    members = Membership([0, 1, 2, 3])
    assert not members.may_meet()
    members.leave(0)
    members.leave(1)
    members.leave(3)  # they found it out before the launcher did
    assert not members.may_meet()
    members.lose(2)
    assert members.may_meet() and members.number == 1
    assert (members.ranks, members.lost) == ([0, 1, 3], [2])
    assert not members.may_meet(), "once"


def test_one_more_loss_on_the_way_makes_another_meeting() -> None:
    members = Membership([0, 1, 2])
    members.lose(1)
    members.leave(0)
    assert not members.may_meet()
    members.lose(2)  # while rank 0 waits for it
    members.leave(2)  # its last words, heard late
    assert members.may_meet() and members.ranks == [0]

    members = Membership([0, 1, 2, 3])
    members.lose(3)
    for rank in (0, 1, 2):
        members.leave(rank)
    assert members.may_meet()
    members.lose(0)  # before they had met
    members.leave(1)
    assert not members.may_meet()
    members.leave(2)
    assert members.may_meet()
    assert (members.number, members.ranks, members.lost) == (2, [1, 2], [3, 0])


def test_a_lost_rank_is_not_waited_for_and_does_not_count() -> None:
    members = Membership([0, 1, 2, 3])
    members.leave(2)
    members.leave(3)
    members.lose(2)  # it had left, as another was lost before
    members.lose(1)
    assert not members.may_meet(), "rank 0 has not left"
    members.leave(1)  # its last words, heard late
    assert not members.may_meet()
    members.leave(0)
    assert members.may_meet() and members.ranks == [0, 3]


def test_ranks_that_could_not_meet_may_try_again_but_not_for_ever() -> None:
    members = Membership([0, 1, 2])
    members.lose(2)
    for number in range(1, 2 + MEETINGS_AGAIN):
        members.leave(0)
        assert not members.may_meet(), "rank 1 may have met nobody yet"
        members.leave(1)
        assert members.may_meet() and members.number == number
    members.leave(0)
    members.leave(1)
    assert not members.may_meet()
    members.lose(1)
    assert members.may_meet(), "another loss, another reason"


def test_nobody_meets_without_a_loss() -> None:
    members = Membership([0, 1])
    members.leave(0)
    members.leave(1)
    assert not members.may_meet()
