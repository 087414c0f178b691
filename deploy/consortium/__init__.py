"""Provision and start a consortium of separate machines."""
