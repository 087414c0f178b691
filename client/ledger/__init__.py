"""Keep the append-only record of the privacy budget that a site has spent."""
