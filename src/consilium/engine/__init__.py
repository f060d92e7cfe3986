"""The engines that carry payloads between the server half and the client halves, meter them, and keep checkpoints."""
