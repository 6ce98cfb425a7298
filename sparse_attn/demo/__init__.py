"""The demo behind ``sparse-attn demo``: a real pretrained model with its attention made sparse."""
