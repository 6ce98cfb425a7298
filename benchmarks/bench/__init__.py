"""Cases of every operation, the strongest forms to compare with, how they are measured, and plots.

``rich`` and ``matplotlib`` come with ``pip install "sparse_attn[demo]"``.
"""
