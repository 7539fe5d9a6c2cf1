"""The comparison of pictures, one by one, that benchmarks.precision prints."""

import pytest

from benchmarks.precision import compare


def test_a_format_is_charged_for_pictures_that_it_alone_has_wrong():
    reference = [True] * 700 + [False] * 25
    same = compare(reference, reference)
    assert (same.lost, same.won, same.share) == (0, 0, 0.0) and same.low < 0 < same.high < 0.006

    right = [False] * 8 + [True] * 692 + [True] * 2 + [False] * 23
    worse = compare(right, reference)
    assert (worse.lost, worse.won) == (8, 2) and worse.share == pytest.approx(6 / 725)
    assert worse.low < 0 < worse.share < worse.high

    # A picture that both have wrong says nothing; what is won counts against what is lost.
    swapped = compare(reference, right)
    assert swapped.share == -worse.share and swapped.low == pytest.approx(-worse.high)
