"""Several stop strings in one piece of text: it ends at the first of them."""

import itertools

import pytest

from jaxmoe.generation.detokenize import StopStrings


@pytest.mark.parametrize("stops", list(itertools.permutations(["cd", "b", "e"])))
def test_a_text_ends_at_the_first_of_several_stop_strings(stops):
    stop = StopStrings(stops)
    assert stop.push("abcde") + stop.finish() == "a"
    assert stop.found
