"""Small models, of which every client may have its own: extractors, a head, and what is built of them.

The folders here are models that come with the package (`moe.build.shipped`).
"""
