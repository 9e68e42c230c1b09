"""Build step of the package: what must be compiled. Its metadata is in pyproject.toml."""

from setuptools import setup

setup()
