# make book: run every chapter at protocol "quick" and build the HTML.
# make test: lint, types, every test.
# Both need python3 >= 3.11 and a package index, and nothing else.

PYTHON ?= python3
BIN := .venv/bin

.PHONY: book course test bench sync execute results status
.DELETE_ON_ERROR:

book: .venv/.book
	@$(BIN)/python -m book.build

# As many workers as cores: threads of their own would stall them.
test: export OMP_NUM_THREADS = 1
test: .venv/.test
	$(BIN)/ruff check
	$(BIN)/ruff format --check
	$(BIN)/mypy
	$(BIN)/python -m pytest -n auto --dist loadscope -rs

# Stores what it measured also where a target is missed; then the page that shows it is run anew.
bench: .venv/.test
	@$(BIN)/python -m pytest tests/benchmarks --record; status=$$?; \
	    $(BIN)/python -m book.execute book/performance.ipynb && exit $$status

# Computes what the folder runs lacks, best value first, and goes on where it was killed. For instance:
# make results CHAPTERS="batchout attacks" PROTOCOL=short DATASET=mnist SEEDS="0 1" MINUTES=60 JOBS=1
results: .venv/.sweep
	@$(BIN)/python -m book.campaign results $(if $(CHAPTERS),--chapters $(CHAPTERS)) \
	    $(if $(PROTOCOL),--protocol $(PROTOCOL)) $(if $(DATASET),--dataset $(DATASET)) \
	    $(if $(SEEDS),--seeds $(SEEDS)) $(if $(MINUTES),--minutes $(MINUTES)) $(if $(JOBS),--jobs $(JOBS))

# What is stored of each table, and which of it comes from code that has changed since.
status: .venv/.book
	@$(BIN)/python -m book.campaign status $(if $(CHAPTERS),--chapters $(CHAPTERS))

# For teachers: the assignments for nbgrader and otter, students' and instructors' notebooks.
course: .venv/.book
	@$(BIN)/python -m book.course

# For authors: the address into every place that needs it, code formatted, .ipynb and .md in step,
# and the notebooks that readers open. Where both sides of a pair were edited it says so and writes
# neither.
sync: .venv/.test
	$(BIN)/python -m book.address
	$(BIN)/python -m book.pairs
	$(BIN)/ruff format --quiet chapters book
	$(BIN)/python -m book.pairs
	$(BIN)/python -m book.colab

# For authors: run the committed notebooks in place, at their default parameters.
execute: sync
	$(BIN)/python -m book.execute

.venv/.created:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || { \
	    echo "This book needs Python 3.11 or newer; '$(PYTHON)' is $$($(PYTHON) -V 2>&1)."; \
	    echo "Name a newer one: make PYTHON=python3.12"; exit 1; }
	@$(PYTHON) -c 'import ensurepip, venv' || { \
	    echo "'$(PYTHON)' cannot make virtual environments; on Debian and Ubuntu: apt install python3-venv"; exit 1; }
	$(PYTHON) -m venv .venv
	@touch $@

.venv/.book: pyproject.toml | .venv/.created
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -e '.[book]'
	@touch $@

.venv/.sweep: .venv/.book
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -e '.[sweep]'
	@touch $@

.venv/.test: .venv/.book
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -e '.[test,peers]'
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --no-deps torchattacks adv-lib
	@touch $@
