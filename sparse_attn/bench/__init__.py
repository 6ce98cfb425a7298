"""Benchmarks: timing, the strongest dense forms to compare with, and the DeepSeek-V3.2-shaped layer.

``rich`` and ``matplotlib`` come with ``pip install "sparse_attn[demo]"``.
"""
