"""Tests of megatron-adam-mini."""
