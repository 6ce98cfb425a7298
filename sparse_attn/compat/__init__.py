"""Other libraries' signatures on this library's operations, for callers that switch by an import::

    from sparse_attn.compat import flash_mla    # FlashMLA: sparse prefill, sparse and dense decode
    from sparse_attn.compat import deep_gemm    # DeepGEMM: logits of the lightning indexer

Shapes, layouts and meanings are theirs; what runs is :mod:`sparse_attn`, on CPUs and on the GPUs that Triton
compiles for. A parameter is honoured or refused with an error. Nothing of theirs is imported or replaced.
Code that cannot be changed finds a module under its usual name if you run this line first::

    sys.modules["flash_mla"] = flash_mla

Only the functions listed here exist then: the rest of either library is not part of this one.
"""
