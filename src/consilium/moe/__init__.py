"""Mixture-of-experts models: addressing, slicing, observing, budgeting and building them."""
