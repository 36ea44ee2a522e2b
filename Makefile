# make demo: set up, train on the embedded dataset, show the result.   make test: set up, test.
# make docs: the documentation as a site, site/index.html
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
DEMO := deeplabv3_r18_bcn_300_shapes-128x128
PIP := $(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt

.PHONY: demo test test-all lint docs setup setup-dev clean

setup: $(VENV)/.onedl
setup-dev: $(VENV)/.dev

$(VENV)/.onedl: pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	@echo "installing torch and the mm packages into $(VENV) ..."
	$(PIP) torch
	$(PIP) -e ".[onedl]"
	@touch $@

$(VENV)/.dev: $(VENV)/.onedl
	$(PIP) -e ".[onedl,dev]"
	@touch $@

demo: setup
	$(BIN)/python tools/train.py configs/deeplabv3/$(DEMO).py --seed 0
	$(BIN)/python tools/test.py configs/deeplabv3/$(DEMO).py work_dirs/$(DEMO)/iter_300.pth \
	  --show-dir work_dirs/$(DEMO)/pictures --show-num 12
	@echo
	@echo "The mIoU table is above. Image, ground truth and prediction side by side:"
	@ls work_dirs/$(DEMO)/pictures | sed 's|^|  work_dirs/$(DEMO)/pictures/|'
	@echo "Next: the same model with another normalization, at one image per step:"
	@echo "  $(BIN)/python tools/train.py configs/deeplabv3/$(DEMO).py --norm microbcn_ws \\"
	@echo "    --cfg-options train_dataloader.batch_size=1 --work-dir work_dirs/microbcn_ws"

# a process per core, each on one thread: several threads in each would wait for one another
PYTEST := OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n auto --maxprocesses 8 --dist worksteal

test: setup-dev
	$(PYTEST)

test-all: setup-dev
	$(PYTEST) -m "slow or not slow"

lint: setup-dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

docs: setup-dev
	NO_MKDOCS_2_WARNING=1 $(BIN)/python -m mkdocs build --strict
	@echo "open site/index.html; to search in it: $(BIN)/python -m mkdocs serve"

clean:
	rm -rf $(VENV) build dist site .pytest_cache .ruff_cache
