"""Define a site's refusal to spend privacy budget.

It has a module of its own, so that the guard need not load the accountants.
"""

from common.errors import RunError


class BudgetRefused(RunError):  # noqa: N818 (a refusal is an answer, not a fault)
    """Report that the site's cap does not allow an event, so that nothing was spent.

    Holds no data but the budget's figures.

    Attributes:
        site: who refuses.
        asked: epsilon that the event would add to what is spent.
        left: epsilon that the cap leaves.
        cap: the site's cap. All three at the cap's delta, replace-one of the ledger's unit (PLD).
    """

    def __init__(self, site: str, asked: float, left: float, cap: float) -> None:
        self.site, self.asked, self.left, self.cap = site, asked, left, cap
        super().__init__(
            f"site {site!r} refuses: this would add epsilon {asked:.4g}, and of its budget of {cap:g} "
            f"{left:.4g} is left"
        )
