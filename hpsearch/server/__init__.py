"""Pages over HTTP: reports of studies, and the unmodified Optuna dashboard."""
