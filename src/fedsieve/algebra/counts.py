"""How many of n things a share is: one rule, in whole numbers, the same at both ends of a wire.

    how_many   ceil(share n), at least 1: entries that pass a mask, at a density
    nearest    share n, rounded: ranks that a client can afford, at a ratio
    at_least_one_less   ceil(share n), but fewer than n: ranks that are left when some are to go

A share is the fraction that was meant and not its floating-point number, which is off by a little:
0.07 of 100 is 7, though 0.07 * 100 is above 7, and 5/7 of 7 is 5, though the float 5/7 is above
that. No rounding is ever rounded again: what is left after t prunings to a share is
ceil(share^t n), and not a ceiling of ceilings.
"""

from fractions import Fraction
from functools import lru_cache
from math import ceil

_LARGEST = 10**7  # a fraction of a smaller denominator is known from its float alone
_ROUNDING = Fraction(1, 2**50)  # relative: some steps of a float64, as after a few products


@lru_cache(maxsize=1024)
def exact(share: float | Fraction) -> Fraction:
    """The fraction that a share stands for: the simplest within rounding, else its decimals."""
    if isinstance(share, Fraction):
        return share
    own = Fraction(float(share))  # NumPy's too
    simple = own.limit_denominator(_LARGEST)
    return simple if abs(simple - own) <= own * _ROUNDING else Fraction(repr(float(share)))


def how_many(share: float | Fraction, of: int) -> int:
    """ceil(share * of), at least one where there is any."""
    return min(of, max(1, ceil(exact(share) * of)))


def nearest(share: float | Fraction, of: int) -> int:
    """share * of to the nearest whole number, halves to the even one; at least one."""
    return min(of, max(1, round(exact(share) * of)))


def at_least_one_less(share: float | Fraction, of: int) -> int:
    """ceil(share * of), but below `of`, so that something goes; one stays."""
    return max(1, min(of - 1, how_many(share, of)))
