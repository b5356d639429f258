"""How the report writes numbers: the same number reads the same in a plot, a caption and a table.

MB is 10^6 bytes everywhere, as network tariffs count, not 2^20.
"""

import math
from collections.abc import Mapping

NONE = "–"  # noqa: RUF001


def significant(x: float) -> str:
    """Three significant digits, never an exponent: 0.0123, 4.21, 160, 12,345."""
    if x == 0 or not math.isfinite(x):
        return f"{x:.0f}"
    return f"{x:,.{max(0, 2 - math.floor(math.log10(abs(x))))}f}"


def megabytes(n: float, deviation: float | None = None) -> str:
    """Bytes as "4.21 MB", or with how they vary as "4.21 ± 0.35 MB"."""
    mean = significant(n / 1e6)
    if deviation is None:
        return f"{mean} MB"
    places = len(mean.partition(".")[2])
    return f"{mean} ± {deviation / 1e6:,.{places}f} MB"


def score(x: float, deviation: float | None = None) -> str:
    """An accuracy or a loss, to four places: "0.6125", or with how it varies "0.6125 ± 0.0100"."""
    return f"{x:.4f}" if deviation is None else f"{x:.4f} ± {deviation:.4f}"


def fewer(sent: float, dense: float) -> str:
    """How the bytes sent compare with those of dense LoRA: "38x fewer", "about as many"."""
    if min(sent, dense) <= 0:
        return "no ratio"
    ratio = max(sent, dense) / min(sent, dense)
    if ratio < 1.05:
        return "about as many"
    size = f"{ratio:,.0f}" if ratio >= 9.95 else f"{ratio:.1f}"
    return f"{size}x {'fewer' if sent < dense else 'more'}"


def duration(seconds: float, deviation: float | None = None) -> str:
    """Seconds as "41.3 s", "2 min 05 s" or "3 h 07 min", or as "41.3 s ± 2.0 s"."""
    if deviation is not None:
        return f"{duration(seconds)} ± {duration(deviation)}"
    if seconds < 59.95:
        return f"{seconds:.1f} s"
    minutes, rest = divmod(round(seconds), 60)
    if minutes < 60:
        return f"{minutes} min {rest:02d} s"
    return f"{minutes // 60} h {minutes % 60:02d} min"


def data(n: float) -> str:
    """Megabytes to read, as HTML: the exact bytes for machines and for those who point at it."""
    return f'<data value="{n:.0f}" title="{n:,.0f} bytes">{megabytes(n)}</data>'


def plain(value: object) -> str:
    """A setting in words: "yes", "query, value", "share 0.5, ratio 1; share 0.5, ratio 0.25"."""
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, float):
        return repr(value).removesuffix(".0")
    if isinstance(value, Mapping):
        return ", ".join(f"{key} {plain(each)}" for key, each in value.items())
    if isinstance(value, list):
        between = "; " if any(isinstance(each, Mapping) for each in value) else ", "
        return between.join(map(plain, value))
    return str(value)
