"""SecAgg+: the server learns the sum of the sites' updates and none of them (docs/secure-aggregation.md).

Bonawitz et al. 2017 ("Practical Secure Aggregation for Privacy-Preserving Machine Learning") on the
neighbour graphs of Bell et al. 2020 ("Secure Single-Server Aggregation with (Poly)Logarithmic Overhead").
"""
