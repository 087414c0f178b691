"""Add up the masked vectors at the server and take the masks off the sum.

This is the server's part of a session apart from waiting and sending. It holds one vector, however
many sites there are, and digests of the shares that they sealed. It knows nothing of Flower.
"""

from collections import Counter
from collections.abc import Iterable, Mapping

import numpy as np

from common.errors import RunError
from common.secure_aggregation import keys
from common.secure_aggregation.cohort import neighbourhoods, threshold
from common.secure_aggregation.keys import add_mask, subtract_mask
from common.secure_aggregation.member import PAIR_MASK, SELF_MASK, mask_context
from common.secure_aggregation.records import SealedShares, SessionPlan, UnmaskShares, Words


class MaskedSum:
    """Hold the sum of masked vectors, modulo 2**32.

    Args:
        plan: what all sites agreed on.
        sealed: by site, the shares that were handed on. These sites' masks may be in the vectors.
        length: words of a vector.
        model: SHA-256 of the model that all of them trained.
    """

    def __init__(
        self, plan: SessionPlan, sealed: Mapping[str, SealedShares], length: int, model: bytes
    ) -> None:
        self.plan, self.sharing, self.model = plan, sorted(sealed), model
        self._digests = {
            (owner, holder): (shares[:32], shares[32:64])
            for owner, reply in sealed.items()
            for holder, shares in reply.shares.items()
        }
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
                    "sites gave the share of it that they hold, or what it sealed does not fit together"
                )
            if survived:
                subtract_mask(self.total, keys.derive_key(secret, SELF_MASK, context))
            else:
                self._remove_pairs(site, secret, context)

    def wrong_shares(self, answers: Mapping[str, UnmaskShares]) -> list[tuple[str, str]]:
        """Return (holder, owner) where a holder gave another share than the owner sealed for it."""
        return [
            (holder, owner)
            for owner in self._secrets_needed()
            for holder in sorted(self._revealed(owner, answers).keys() - self._given(owner, answers).keys())
        ]

    def withheld(self, answers: Mapping[str, UnmaskShares]) -> dict[str, list[str]]:
        """Return by site with whom it has no share, though one was sealed and the holder answered.

        Either the owner sealed none that opens, or the holder keeps it back. Of each such two the one with
        more of them is named, or else the owner.
        """
        pairs = [
            (owner, holder)
            for owner in self._secrets_needed()
            for holder in self._without(owner, answers)
            if holder != owner
        ]
        accused = Counter(site for pair in pairs for site in pair)
        named: dict[str, list[str]] = {}
        for owner, holder in pairs:
            site, other = (holder, owner) if accused[holder] > accused[owner] else (owner, holder)
            named.setdefault(site, []).append(other)
        return {site: sorted(named[site]) for site in sorted(named)}

    def bad_owners(self, answers: Mapping[str, UnmaskShares]) -> list[str]:
        """Return the sites whose secret cannot be recovered by their own doing.

        They sealed shares that do not fit together; or, of n in the neighbourhood with a threshold of t, more
        than n - t have no share of theirs, their own counted too. Fewer holders than that cannot get an
        honest site named by keeping shares back, nor by giving wrong ones: the digests tell those.
        """
        bad = []
        for owner in self.missing(answers):
            needed = self._needed(owner)
            spare = len(self._neighbourhoods[owner]) - needed
            if len(self._given(owner, answers)) >= needed or len(self._without(owner, answers)) > spare:
                bad.append(owner)
        return bad

    def _secret(self, site: str, answers: Mapping[str, UnmaskShares]) -> bytes | None:
        """Return a survivor's seed or a lost site's mask key, if it is the one that was advertised."""
        if site not in self._secrets:
            secret = self._fitting(site, self._given(site, answers))
            if secret is None:
                return None
            self._secrets[site] = secret
        return self._secrets[site]

    def _revealed(self, owner: str, answers: Mapping[str, UnmaskShares]) -> dict[str, bytes]:
        """Return the shares of one site's secret, by holder, the owner's own last."""
        holders = sorted(self._holders(owner) & answers.keys(), key=lambda holder: (holder == owner, holder))
        revealed = {
            holder: answers[holder].self_masks if owner in self.survivors else answers[holder].mask_keys
            for holder in holders
        }
        return {holder: shares[owner] for holder, shares in revealed.items() if owner in shares}

    def _given(self, owner: str, answers: Mapping[str, UnmaskShares]) -> dict[str, bytes]:
        """Return those shares that are the ones which the owner sealed."""
        # Of the owner's own share nobody else knows. It comes last, and can spoil its own secret only.
        place = 0 if owner in self.survivors else 1
        return {
            holder: share
            for holder, share in self._revealed(owner, answers).items()
            if holder == owner or keys.commit_share(share) == self._digests[owner, holder][place]
        }

    def _without(self, owner: str, answers: Mapping[str, UnmaskShares]) -> list[str]:
        """Return who answered without a share of this site's secret, and the site itself if it gave none."""
        asked = self._holders(owner) & answers.keys() | {owner}
        return sorted(asked - self._revealed(owner, answers).keys())

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
