"""Watch a run at the coordinator or at a site: what is on the disk, folded into one state and shown."""
