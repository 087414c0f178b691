"""Define the LHFGLP model, its backbones and its file."""
