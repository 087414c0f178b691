"""Add up the masked vectors at the server and take the masks off the sum.

This is the server's part of a session apart from waiting and sending. It holds one vector and nothing per
site, however many sites there are. It knows nothing of Flower.
"""

import random
from collections.abc import Iterable, Mapping

import numpy as np

from common.errors import RunError
from common.secure_aggregation import keys
from common.secure_aggregation.cohort import neighbourhoods, threshold
from common.secure_aggregation.masking import add_mask, subtract_mask
from common.secure_aggregation.member import PAIR_MASK, SELF_MASK, mask_context
from common.secure_aggregation.records import SessionPlan, UnmaskShares, Words

_ATTEMPTS = 200
"""Choices of holders that are tried for one secret, where one of them or more gave a wrong share."""


class MaskedSum:
    """Hold the sum of masked vectors, modulo 2**32.

    Args:
        plan: what all sites agreed on.
        sharing: the sites whose shares were handed on, and whose masks may therefore be in the vectors.
        length: words of a vector.
        model: SHA-256 of the model that all of them trained.
    """

    def __init__(self, plan: SessionPlan, sharing: list[str], length: int, model: bytes) -> None:
        self.plan, self.sharing, self.model = plan, sorted(sharing), model
        self._neighbourhoods = neighbourhoods(plan)
        self.survivors: list[str] = []
        self.total: Words = np.zeros(length, np.uint32)
        self._secrets: dict[str, bytes] = {}

    def add(self, site: str, vector: Words) -> None:
        """Add one site's vector, once.

        Raises:
            RunError: another length, a site that shared no secrets, or a second vector.
        """
        if len(vector) != len(self.total):
            raise RunError(f"a masked vector of {len(vector)} words, {len(self.total)} expected")
        # The others count on no masks with a site that shared no secrets, and a second vector would count
        # twice.
        if site not in self.sharing or site in self.survivors:
            raise RunError("a masked vector of a site that may not send one (now)")
        np.add(self.total, vector, out=self.total)
        self.survivors.append(site)

    def weight(self) -> float:
        """Return the total weight of the sites in the sum."""
        return sum(self.plan.weights[site] for site in sorted(self.survivors))

    def short_of(self, there: Iterable[str]) -> list[str]:
        """Return the sites in ``there`` that have too few of ``there`` as neighbours for unmasking."""
        left = set(there)
        return [site for site in sorted(left) if len(self._holders(site) & left) < self._needed(site)]

    def quorum(self) -> int:
        """Return the number of sites that must sign a list of survivors."""
        return threshold(len(self.plan.sites), self.plan.threshold_share)

    def missing(self, answers: Mapping[str, UnmaskShares]) -> list[str]:
        """Return the sites whose secret cannot be recovered from these answers."""
        return [site for site in self._secrets_needed() if self._secret(site, answers) is None]

    def unmask(self, answers: Mapping[str, UnmaskShares]) -> None:
        """Remove every mask from the sum.

        Raises:
            RunError: a secret cannot be recovered; the text says whose. The sum is of no use then.
        """
        context = mask_context(self.plan, self.sharing, self.model)
        for site in self._secrets_needed():
            secret = self._secret(site, answers)
            survived = site in self.survivors
            if secret is None:
                raise RunError(
                    f"the {'self-mask' if survived else 'mask key'} of {site!r} cannot be recovered: too few "
                    "sites gave a share of it, or one gave a wrong one"
                )
            if survived:
                subtract_mask(self.total, keys.derive(secret, SELF_MASK, context))
            else:
                self._remove_pairs(site, secret, context)

    def wrong_shares(self, answers: Mapping[str, UnmaskShares]) -> list[tuple[str, str]]:
        """Return (holder, owner) of shares that stand in the way of recovering the owner's secret.

        Either may be to blame: the holder gave another share than it has, or the owner sealed it a wrong
        one. The other shares are examined only where the first ones by name did not fit.
        """
        wrong = []
        for site in self._secrets_needed():
            shares, needed = self._given(site, answers), self._needed(site)
            if self._fitting(site, shares) is not None:
                continue
            fit = self._search(site, shares)
            good = sorted(fit)[: needed - 1]
            wrong += [
                (holder, site)
                for holder in shares
                if holder not in fit
                and self._fitting(site, {name: shares[name] for name in [*good, holder]}) is None
            ]
        return wrong

    def _secret(self, site: str, answers: Mapping[str, UnmaskShares]) -> bytes | None:
        """Return a survivor's seed or a lost site's mask key, if it is the one that was advertised."""
        if site not in self._secrets:
            shares = self._given(site, answers)
            secret = self._fitting(site, self._search(site, shares))
            if secret is None:
                return None
            self._secrets[site] = secret
        return self._secrets[site]

    def _given(self, site: str, answers: Mapping[str, UnmaskShares]) -> dict[str, bytes]:
        """Return the shares of one site's secret, by holder."""
        given = {
            holder: answers[holder].self_masks if site in self.survivors else answers[holder].mask_keys
            for holder in sorted(self._holders(site) & answers.keys())
        }
        return {holder: shares[site] for holder, shares in given.items() if site in shares}

    def _search(self, site: str, shares: dict[str, bytes]) -> dict[str, bytes]:
        """Return shares that fit, or none where no tried choice leaves out all wrong ones."""
        if self._fitting(site, shares) is not None:
            return shares
        # A fixed seed: which choices are tried is no secret, and a repeated run finds the same shares.
        needed, draw = self._needed(site), random.Random(0)
        if len(shares) <= needed:
            return {}
        for _ in range(_ATTEMPTS):
            some = {holder: shares[holder] for holder in draw.sample(sorted(shares), needed)}
            if self._fitting(site, some) is not None:
                return some
        return {}

    def _fitting(self, site: str, shares: Mapping[str, bytes]) -> bytes | None:
        """Return the secret that the first shares give, if it is what the site committed to."""
        survived, advert = site in self.survivors, self.plan.advert(site)
        secret = keys.join(shares, self._needed(site))
        if secret is None:
            return None
        made = keys.commit(secret) if survived else keys.public_key(secret)
        # A wrong share gives a wrong secret, and with it masks that do not come off; the commitment shows
        # it in time.
        return secret if made == (advert.commitment if survived else advert.mask_key) else None

    def _remove_pairs(self, lost: str, secret: bytes, context: bytes) -> None:
        for peer in sorted(self._holders(lost) & set(self.survivors)):
            key = keys.pairwise_key(secret, self.plan.advert(peer).mask_key, PAIR_MASK, context)
            if peer < lost:
                subtract_mask(self.total, key)
            else:
                add_mask(self.total, key)

    def _secrets_needed(self) -> list[str]:
        # A lost site without a neighbour in the sum left no mask in it.
        return [site for site in self.sharing if self._holders(site) & set(self.survivors)]

    def _holders(self, site: str) -> set[str]:
        return set(self._neighbourhoods[site]) & set(self.sharing)

    def _needed(self, site: str) -> int:
        return threshold(len(self._neighbourhoods[site]), self.plan.threshold_share)
