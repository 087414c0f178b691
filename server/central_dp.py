"""State the guarantee of noise added by the server, for the summary and the report.

The mechanism itself is Flower's DifferentialPrivacyServerSideFixedClipping (McMahan et al. 2018). This
module only states, in numbers and words, what it guarantees and what it does not.
"""

from typing import Any

from common.config import RunConfig

LIMITS = (
    "The server sees every update without noise and is trusted; only what comes after it is protected.",
    "The unit is the whole site: the guarantee is that no one can tell whether a site took part with other "
    "data, which a handful of sites can hardly reach.",
    "The noise comes from NumPy's generator, which is not a cryptographic one.",
    "Metrics, label counts and the number of bags are not covered.",
)


def central_statement(config: RunConfig, rounds: int) -> dict[str, Any] | None:
    """Return the epsilon of the server's noise over all rounds, with its unit and limits.

    The result is None when the noise is off.
    """
    central = config.central_dp
    if not central.noise_multiplier:
        return None
    from common.privacy.accounting import spent
    from common.privacy.events import Adjacency, PoissonGaussian

    # Every site is in every round (no amplification), weights are equal and the quorum is all sites, so one
    # site moves the clipped sum by at most the clip norm (add/remove), or twice that (replace-one).
    event = PoissonGaussian(sample_rate=1.0, noise_multiplier=central.noise_multiplier, steps=rounds)
    return {
        "unit": "site",
        "trust": "the server is trusted",
        "noise_multiplier": central.noise_multiplier,
        "clip_norm": central.clip_norm,
        "rounds": rounds,
        "delta": config.dp.delta,
        "epsilon": {
            Adjacency.REPLACE_ONE.value: spent([event], config.dp.delta, Adjacency.REPLACE_ONE),
            Adjacency.ADD_REMOVE.value: spent([event], config.dp.delta, Adjacency.ADD_REMOVE),
        },
        "accountant": "dp-accounting PLD",
        "limits": list(LIMITS),
    }
