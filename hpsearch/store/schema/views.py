"""Views for any SQL client. They hold no data: a launch makes them anew when their definition has changed.

Commands read the definitions below, not the views of a store, which another version may have made.
"""

from __future__ import annotations

from hashlib import sha256

import sqlalchemy as sa

_LEADERBOARD = """SELECT
    study.name AS study,
    study.task AS task,
    RANK() OVER (
        PARTITION BY trial.study_id
        ORDER BY CASE WHEN study.higher_is_better THEN -score.value ELSE score.value END
    ) AS test_rank,
    RANK() OVER (
        PARTITION BY trial.study_id
        ORDER BY CASE WHEN study.objective = 'loss' THEN trial.best_valid_loss ELSE -trial.best_valid_score END
    ) AS valid_rank,
    trial.number AS trial,
    trial.state AS state,
    study.metric AS metric,
    score.value AS score,
    score.low AS score_low,
    score.high AS score_high,
    score.n AS score_n,
    perplexity.value AS test_perplexity,
    bits.value AS test_bits_per_byte,
    bleu.value AS test_bleu,
    f1.value AS test_f1,
    trial.best_valid_loss AS valid_loss,
    trial.best_valid_score AS valid_score,
    trial.best_epoch AS best_epoch,
    trial.last_epoch AS last_epoch,
    trial.num_parameters AS num_parameters,
    trial.device_seconds AS device_seconds,
    trial.params AS params,
    trial.reason AS reason,
    trial.checkpoint AS checkpoint
FROM hpsearch_trials AS trial
JOIN hpsearch_studies AS study ON study.id = trial.study_id
JOIN hpsearch_scores AS score ON score.trial_id = trial.id AND score.metric = study.metric
LEFT JOIN hpsearch_scores AS perplexity ON perplexity.trial_id = trial.id AND perplexity.metric = 'perplexity'
LEFT JOIN hpsearch_scores AS bits ON bits.trial_id = trial.id AND bits.metric = 'bits_per_byte'
LEFT JOIN hpsearch_scores AS bleu ON bleu.trial_id = trial.id AND bleu.metric = 'bleu'
LEFT JOIN hpsearch_scores AS f1 ON f1.trial_id = trial.id AND f1.metric = 'f1'
WHERE trial.state IN ('completed', 'overfit', 'plateau', 'paused', 'interrupted') AND trial.repeat_of IS NULL
ORDER BY study.name, test_rank, valid_rank, trial.number"""

_CURVES = """SELECT
    study.name AS study,
    trial.number AS trial,
    trial.state AS state,
    point.evaluation AS evaluation,
    point.epoch AS epoch,
    point.step AS step,
    point.train_loss AS train_loss,
    point.valid_loss AS valid_loss,
    point.valid_score AS valid_score,
    point.learning_rate AS learning_rate,
    point.tokens AS tokens,
    point.seconds AS seconds
FROM hpsearch_points AS point
JOIN hpsearch_trials AS trial ON trial.id = point.trial_id
JOIN hpsearch_studies AS study ON study.id = trial.study_id
ORDER BY study.name, trial.number, point.evaluation"""

_FINALS = """SELECT
    study.name AS study,
    trial.repeat_of AS trial,
    study.metric AS metric,
    chosen.value AS chosen_score,
    COUNT(*) AS seeds,
    AVG(score.value) AS mean_score,
    MIN(score.value) AS lowest_score,
    MAX(score.value) AS highest_score
FROM hpsearch_trials AS trial
JOIN hpsearch_studies AS study ON study.id = trial.study_id
JOIN hpsearch_scores AS score ON score.trial_id = trial.id AND score.metric = study.metric
JOIN hpsearch_trials AS original ON original.study_id = trial.study_id AND original.number = trial.repeat_of
JOIN hpsearch_scores AS chosen ON chosen.trial_id = original.id AND chosen.metric = study.metric
WHERE trial.state IN ('completed', 'overfit', 'plateau')
GROUP BY study.name, trial.repeat_of, study.metric, chosen.value
ORDER BY study.name, trial.repeat_of"""

VIEWS = {"hpsearch_leaderboard": _LEADERBOARD, "hpsearch_curves": _CURVES, "hpsearch_finals": _FINALS}
FINGERPRINT = sha256(repr(VIEWS).encode()).hexdigest()[:16]


def refresh(connection: sa.Connection) -> None:
    """Make all views anew, inside the caller's transaction."""
    for name in VIEWS:
        connection.execute(sa.text(f"DROP VIEW IF EXISTS {name}"))
    for name, query in VIEWS.items():
        connection.execute(sa.text(f"CREATE VIEW {name} AS {query}"))
