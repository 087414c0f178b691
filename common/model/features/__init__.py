"""Turn images into fixed features: which, how standardised, and the backbone that serves them."""
