"""Packages, of which one lies elsewhere: configs/ becomes uss_jax/configs in a wheel."""

from setuptools import find_packages, setup

setup(
    packages=[*find_packages(include=["uss_jax*"]), "uss_jax.configs"],
    package_dir={"uss_jax.configs": "configs"},
)
