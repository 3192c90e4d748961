"""The table of causes in docs/interruptions.md, from the policy itself: python -m tests.policy_page writes it."""

from __future__ import annotations

from ftlib.runs.diagnosis import Cause
from ftlib.runs.policy import KINDS, MOST_BACKOFF_S, MOST_WITHOUT_PROGRESS, SILENT_MOST, Life, decide
from tests.wishes import CHECKOUT

PAGE = CHECKOUT / "docs" / "interruptions.md"
BEGIN, END = "<!-- causes: python -m tests.policy_page -->", "<!-- end of causes -->"


def table() -> str:
    """A row for each cause: what it means, what the run does, how often, and what its owner does after a stop."""
    rows = ["| cause | meaning | what the run does | how often | once it has stopped, you |", "|---|---|---|---|---|"]
    for cause, kind in KINDS.items():
        cells = (f"`{cause}`", kind.plain, does(cause), often(cause), kind.mend.replace("{run}", "…"))
        rows.append(f"| {' | '.join(cells)} |")
    return "\n".join(rows)


def does(cause: Cause) -> str:
    """What the decision says about the first such end of an attempt that had made progress."""
    decision = decide([Life(cause, progressed=True)], micro_batch=8)
    if not decision.requeue:
        return "stops"
    done = decision.words.removeprefix(f"{KINDS[cause].plain}; ")
    if decision.backoff_s:
        done += f", then after twice as long each time, {MOST_BACKOFF_S // 60} minutes at most"
    return done.replace("micro-batch 4", "half the micro-batch")


def often(cause: Cause) -> str:
    """For how many ends of that cause the run continues."""
    budget = KINDS[cause].budget
    if budget == 0:
        return "–"
    barren = SILENT_MOST if KINDS[cause].foreign else MOST_WITHOUT_PROGRESS
    without = f"at most {barren - 1} in a row without progress"
    return f"any number of times; {without}" if budget is None else f"{budget} time{'s' * (budget > 1)}; {without}"


def page() -> str:
    """The page with the table as it must be."""
    before, _, rest = PAGE.read_text(encoding="utf-8").partition(BEGIN)
    return f"{before}{BEGIN}\n{table()}\n{END}{rest.partition(END)[2]}"


if __name__ == "__main__":
    PAGE.write_text(page(), encoding="utf-8")
