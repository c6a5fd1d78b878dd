"""Models of transformers: building, loading, adapting and trying them."""
