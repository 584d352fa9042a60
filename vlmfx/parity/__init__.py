"""The parity doctor: vlmfx and a reference, stage by stage, up to the first stage that departs."""
