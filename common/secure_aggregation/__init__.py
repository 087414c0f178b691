"""Implement SecAgg+, under which the server learns only the sum of the sites' updates.

The protocol is that of Bonawitz et al. 2017 ("Practical Secure Aggregation for Privacy-Preserving Machine
Learning") on the neighbour graphs of Bell et al. 2020 ("Secure Single-Server Aggregation with
(Poly)Logarithmic Overhead"). See docs/secure-aggregation.md.
"""
