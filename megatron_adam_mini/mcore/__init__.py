"""Glue to Megatron-Core: the only folder that imports ``megatron``."""
