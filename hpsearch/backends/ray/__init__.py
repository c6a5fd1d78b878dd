"""Trials on Ray Tune, and studies as jobs of a Ray cluster."""

import os

from hpsearch.backends import auth_environment

# Read by Ray and Tune when they are imported or started.
os.environ.update(
    {
        "RAY_AIR_NEW_OUTPUT": "0",
        "RAY_CHDIR_TO_TRIAL_DIR": "0",
        "RAY_DEDUP_LOGS": "0",
        "RAY_USAGE_STATS_ENABLED": "0",
        "TUNE_DISABLE_AUTO_CALLBACK_LOGGERS": "1",
        "TUNE_DISABLE_SIGINT_HANDLER": "1",
        "TUNE_DISABLE_STRICT_METRIC_CHECKING": "1",
        "TUNE_GLOBAL_CHECKPOINT_S": "86400",
        # Our searcher knows how many fit. By itself Tune asks for one, and for the next when its worker has come up.
        "TUNE_MAX_PENDING_TRIALS_PG": "1000",
        "TUNE_PRINT_ALL_TRIAL_ERRORS": "0",
        "TUNE_WARN_EXCESSIVE_EXPERIMENT_CHECKPOINT_SYNC_THRESHOLD_S": "0",
        "TUNE_WARN_THRESHOLD_S": "10",
        # Processes that wait for tasks, one a CPU: trials are actors, which begin in processes of their own.
        "RAY_prestart_worker_first_driver": "0",
        **auth_environment(),
    }
)
