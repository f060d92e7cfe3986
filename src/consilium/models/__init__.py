"""Small models, with possibly a different one for each client: extractors, heads and sub-networks.

The folders in this package are models that ship with it (`moe.build.shipped`).
"""
