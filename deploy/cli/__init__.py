"""Define the commands of ``fedbags``, a module per group."""
