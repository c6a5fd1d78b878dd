"""The tables and views of a store, and how an older store is upgraded."""
