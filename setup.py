"""Package mapping only: everything declarative is in pyproject.toml.

The folder ``kernels/`` is installed as ``sparse_attn.kernels``, because the top-level name
``kernels`` belongs to another project on the package index.
"""

from setuptools import find_packages, setup

setup(
    packages=[
        *find_packages(include=["sparse_attn", "sparse_attn.*"]),
        "sparse_attn.kernels",
        *(f"sparse_attn.kernels.{name}" for name in find_packages("kernels")),
    ],
    package_dir={"sparse_attn.kernels": "kernels"},
)
