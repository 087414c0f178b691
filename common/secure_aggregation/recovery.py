"""The server's side of a session that is not waiting and sending: add up, and take the masks off the sum.

Holds one vector and nothing per site, however many sites there are. Knows nothing of Flower.
"""

from collections.abc import Mapping

import numpy as np

from common.errors import RunError
from common.secure_aggregation import keys
from common.secure_aggregation.cohort import neighbourhood, threshold
from common.secure_aggregation.masking import add_mask, subtract_mask
from common.secure_aggregation.member import PAIR_MASK, SELF_MASK
from common.secure_aggregation.records import SessionPlan, UnmaskShares, Words


class MaskedSum:
    """The sum of masked vectors, modulo 2**32.

    Args:
        plan: what all sites agreed on.
        sharing: the sites whose shares were handed on, and whose masks may therefore be in the vectors.
        length: words of a vector.
    """

    def __init__(self, plan: SessionPlan, sharing: list[str], length: int) -> None:
        self.plan, self.sharing = plan, sorted(sharing)
        self.survivors: list[str] = []
        self.total: Words = np.zeros(length, np.uint32)

    def add(self, site: str, vector: Words) -> None:
        """Add one site's vector, once.

        Raises:
            RunError: another length, a site that shared no secrets, or a second vector.
        """
        if len(vector) != len(self.total):
            raise RunError(f"a masked vector of {len(vector)} words, {len(self.total)} expected")
        if site not in self.sharing or site in self.survivors:
            raise RunError("a masked vector of a site that may not send one (now)")
        np.add(self.total, vector, out=self.total)
        self.survivors.append(site)

    def weight(self) -> float:
        """Total weight of the sites in the sum."""
        return sum(self.plan.weights[site] for site in sorted(self.survivors))

    def missing(self, answered: list[str]) -> list[str]:
        """Sites of which fewer shares than needed can be had from those who answered."""
        return [
            site
            for site in self._secrets_needed()
            if len(self._holders(site) & set(answered)) < self._needed(site)
        ]

    def unmask(self, answers: Mapping[str, UnmaskShares]) -> None:
        """Remove every mask from the sum.

        Raises:
            RunError: a secret cannot be recovered; says whose. The sum is of no use then.
        """
        transcript = self.plan.transcript()
        survivors = set(self.survivors)
        for site in self._secrets_needed():
            survived = site in survivors
            shares = {
                holder: given[site]
                for holder in sorted(self._holders(site) & answers.keys())
                if site in (given := answers[holder].self_masks if survived else answers[holder].mask_keys)
            }
            secret = keys.join(shares, self._needed(site))
            advert = self.plan.advert(site)
            if secret is None or not keys.same(
                keys.commit(secret) if survived else keys.public_key(secret),
                advert.commitment if survived else advert.mask_key,
            ):
                raise RunError(
                    f"the {'self-mask' if survived else 'mask key'} of {site!r} cannot be recovered from "
                    f"{len(shares)} shares: too few, or a site gave a wrong one"
                )
            if survived:
                subtract_mask(self.total, keys.derive(secret, SELF_MASK, transcript))
            else:
                self._remove_pairs(site, secret, transcript)

    def _remove_pairs(self, lost: str, secret: bytes, transcript: bytes) -> None:
        for peer in sorted(self._holders(lost) & set(self.survivors)):
            key = keys.pairwise_key(secret, self.plan.advert(peer).mask_key, PAIR_MASK, transcript)
            if peer < lost:
                subtract_mask(self.total, key)
            else:
                add_mask(self.total, key)

    def _secrets_needed(self) -> list[str]:
        # A lost site without a neighbour in the sum left no mask in it.
        return [site for site in self.sharing if self._holders(site) & set(self.survivors)]

    def _holders(self, site: str) -> set[str]:
        return set(neighbourhood(self.plan, site)) & set(self.sharing)

    def _needed(self, site: str) -> int:
        return threshold(len(neighbourhood(self.plan, site)), self.plan.threshold_share)
