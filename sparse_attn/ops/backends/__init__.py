"""What runs an op on a CPU: C++ and torch. The GPU kernels are :mod:`sparse_attn.kernels`."""
