"""Attack a site's private training to test its claimed epsilon, for ``fedbags audit``."""
