"""Candidates take turns."""

from benchmarks import timing


def test_every_round_has_every_candidate_in_an_order_of_its_own():
    names = [str(i) for i in range(6)]
    taken = list(timing.turns(names, 20))
    rounds = [tuple(taken[i : i + 6]) for i in range(0, 120, 6)]
    assert [sorted(each) for each in rounds] == 20 * [names]
    assert len(set(rounds)) > 15
    assert list(timing.turns(names, 20)) == taken  # two runs compare
