"""GPU kernels in Triton, one file per operation. Installed as ``sparse_attn.kernels``."""

if "." not in __name__:  # inside a package, whatever that is called
    raise ImportError(
        f"this folder is the package 'sparse_attn.kernels', but it was imported as {__name__!r}; "
        "install sparse_attn (pip install -e .) and import sparse_attn.kernels. "
        "When running tests from the repository root use 'pytest', not 'python -m pytest'."
    )
