"""Show the state of a run at the coordinator, or of a site at the site, from the files on its disk."""
