"""Mixture-of-experts models: where experts live, how to cut them out, watch them, budget them and build them."""
