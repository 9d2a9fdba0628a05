"""A short soak: no request fails and no text changes."""

from tests.campaigns.soak_serve import main, quarters


def test_short_soak():
    assert main(["--minutes", "0.1", "--clients", "4"]) == 0


def test_medians_of_quarters():
    points = [(float(moment), float(moment)) for moment in range(100)]
    assert quarters(points, 0, 100) == (37.0, 87.0)
    assert quarters([], 0, 100) == (0.0, 0.0)
