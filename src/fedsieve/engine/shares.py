"""What a round's masks kept of A, B and head, in words, and the warning while B gets nothing.

Needs no torch, so that whoever shows a run can say it (`kept.py` counts the shares).
"""

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from fedsieve.engine.loop import Round

Shares = tuple[float | None, float | None, float | None]


def in_words(shares: Shares) -> str:
    """Shares of A, of B and of the head, as "A 0.5, B 0, head 0.12"; "" where no mask kept any."""
    named = zip(("A", "B", "head"), shares, strict=True)
    return ", ".join(f"{name} {share:.2g}" for name, share in named if share is not None)


def starving(summary: "Round") -> str | None:
    """What to say, once in a run, of a round whose downloads bring clients nothing of B.

    Not of the first round: nothing has been learned of B then, and masks hide nothing of it.
    """
    if not summary.starved or summary.round < 2:
        return None
    said = in_words((summary.down_a, summary.down_b, summary.down_head))
    return (
        f"round {summary.round}: the masks let nothing of B pass down to {summary.starved} of "
        f"{summary.clients} clients (kept {said}). While this lasts, they begin each round with B "
        "at zero, whatever was learned of it. What helps: ranked = 'change' if the method has it, "
        "denser downloads, or more rounds (docs/methods.md, What a mask may hide)"
    )
