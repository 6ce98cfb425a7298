"""Other libraries' models on sparse_attn. Each module needs the library it is named after."""
