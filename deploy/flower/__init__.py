"""Start Flower's programs, and hold what is private of them."""
