"""The tables of 0.1.0, which `schema` makes."""

revision = "0001"
down_revision = None


def upgrade() -> None:
    """Nothing was before."""
