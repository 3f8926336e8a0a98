# make demo: everything, from nothing to a running shop. make test: lint, types and the whole suite.
PYTHON ?= python3
VENV := .venv
RUN := $(VENV)/bin/python
ADDRESS := http://127.0.0.1:8000

.PHONY: demo release serve test llm results results-hm results-rtr results-beauty ablations clean

demo: release serve

# The pinned packages; made again when a requirements file changes.
$(VENV)/installed: requirements.txt
	$(PYTHON) -c 'import sys; sys.exit("StyleTower needs Python 3.11 or newer; set PYTHON=" if sys.version_info < (3, 11) else 0)'
	$(PYTHON) -m venv $(VENV)
	$(RUN) -m pip install --quiet --disable-pip-version-check -r requirements.txt
	touch $@

$(VENV)/installed-dev: $(VENV)/installed requirements-dev.txt
	$(RUN) -m pip install --quiet --disable-pip-version-check -r requirements-dev.txt
	touch $@

# The sample shop's release, built once; `saved_models/current` says that one is live.
release: $(VENV)/installed
	@test -f saved_models/current || $(MAKE) --no-print-directory train

.PHONY: train
train: $(VENV)/installed
	$(RUN) import_data.py sample
	$(RUN) extract_features.py --reader embedded --extract-examples 0 --answers datasets/sample_shop_answers.jsonl.gz
	$(RUN) train_simcse.py --epochs 6 --batch-size 256
	$(RUN) train_user.py --epochs 3 --learning-rate 0.002 --history 20
	$(RUN) train_reranker.py
	$(RUN) build_index.py

serve: $(VENV)/installed
	@echo "StyleTower serves at $(ADDRESS) (stop with Ctrl-C; its interactive API page is $(ADDRESS)/docs). Try:"
	@echo "  curl -s $(ADDRESS)/recommend -H 'Content-Type: application/json' -d '{\"context\": \"beach vacation\", \"profile\": {\"height_cm\": 165, \"weight_kg\": 55}, \"k\": 3}'"
	$(VENV)/bin/uvicorn api_controller.app:app --host 127.0.0.1 --port 8000

test: $(VENV)/installed-dev
	$(VENV)/bin/ruff check .
	$(VENV)/bin/ruff format --check .
	$(VENV)/bin/mypy
	$(RUN) -m pytest

# The embedded language model: its runtime, and 1.1 GB of weights into DATA_DIR, verified. The demo does without: its answers about
# the sample shop are in the repository.
llm: $(VENV)/installed
	$(RUN) -m pip install --quiet --disable-pip-version-check -r requirements-llm.txt
	$(RUN) embedded_llm.py

# The standard splits: `make results HM=folder RTR=folder BEAUTY=folder`, or one of them alone. With PEERS=python, other libraries too.
results: results-hm results-rtr results-beauty

results-hm: $(VENV)/installed
	$(RUN) run_split.py hm-week $(HM)

results-rtr: $(VENV)/installed
	$(RUN) run_split.py rtr $(RTR)

results-beauty: $(VENV)/installed
	$(RUN) run_split.py s3rec-beauty $(BEAUTY)

# What each idea of the design is worth: every variant three times, days in all; a stopped run goes on where it was.
ablations: $(VENV)/installed
	$(RUN) ablate.py sample-week
	$(RUN) ablate.py rtr $(RTR)
	$(RUN) ablate.py hm-week $(HM)

clean:
	rm -rf $(VENV) .data .mypy_cache .ruff_cache .pytest_cache
