"""Read a site's bags, images and tables."""
