"""What chooses the short run's cases."""

import itertools

from hypothesis import given, settings
from hypothesis import strategies as st

from tests.support.covering import covering, factors, pairs


@settings(max_examples=30)
@given(sizes=st.lists(st.integers(1, 4), min_size=1, max_size=4), strength=st.integers(1, 3), data=st.data())
def test_every_combination_that_occurs_is_covered(sizes, strength, data) -> None:
    product = [dict(enumerate(values)) for values in itertools.product(*map(range, sizes))]
    cases = data.draw(st.lists(st.sampled_from(product), min_size=1, unique_by=str))
    chosen = [cases[i] for i in covering(cases, strength)]

    def combinations(some):
        return {c for case in some for c in itertools.combinations(case.items(), min(strength, len(sizes)))}

    assert combinations(chosen) == combinations(cases)


def test_few_of_a_product_cover_it() -> None:
    product = [dict(enumerate(values)) for values in itertools.product(range(5), range(3), range(3))]
    assert len(covering(product, 1)) == 5
    assert len(covering(product, 2)) <= 18
    first_three = covering(product, most=3)
    assert len({product[i][1] for i in first_three}) == len({product[i][2] for i in first_three}) == 3


def test_two_values_of_two_lists_meet() -> None:
    lists = ["abcde", [1, 2], [None, 0.5, "f"]]
    cases = pairs(*lists)
    assert len(cases) < 20
    for i, j in itertools.combinations(range(3), 2):
        assert {(case[i], case[j]) for case in cases} == {*itertools.product(lists[i], lists[j])}


def test_a_dict_has_a_factor_for_each_entry() -> None:
    assert factors({"case": {"K": 1, "mesh": (2, 2)}, "f": max}) == {"case.K": "1", "case.mesh": "(2, 2)", "f.": "max"}
