"""What carries payloads between the halves, meters them, and keeps checkpoints."""
