"""Federated fine-tuning of mixture-of-experts models."""
