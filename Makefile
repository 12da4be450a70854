# Every target creates .venv and installs what is missing, so each works on a fresh machine.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed
BEAT ?= 30
EXTRAS := all,dev

# Install with pip, $(1) said first. On a terminal pip shows its own progress; anywhere else it would say nothing for the minutes
# that torch takes, so a line every BEAT seconds says that it goes on. That loop ends with its shell, however that ends.
define install
@echo '$(1)'
@pip="$(BIN)/python -m pip install --disable-pip-version-check"; \
if [ -t 1 ]; then exec $$pip $(2); fi; \
(n=0; while sleep $(BEAT) >/dev/null 2>&1; kill -0 $$$$ 2>/dev/null; do n=$$((n + $(BEAT))); echo "... still installing ($$n s)"; done) & \
$$pip --quiet $(2); status=$$?; kill $$!; exit $$status
endef

.PHONY: quickstart test browser lint bench api html figures install clean

quickstart: $(STAMP)  ## train a small model with CAGSR from nothing, offline, and show before and after
	$(BIN)/cagsr quickstart

test: $(STAMP) browser  ## the test suite, a process a core with one thread each
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest --numprocesses auto

browser:  ## a Chromium for the browser tests, where it can be had; without one they are skipped
	$(PYTHON) tests/setup_browser.py

lint: $(STAMP)  ## ruff, mypy, and who may import whom (pyproject.toml)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports --no-cache --no-logo

bench: $(STAMP) benchmarks/.trl  ## benchmarks: ratios measured alternately in one call
	$(BIN)/python -m benchmarks

benchmarks/.trl: $(STAMP)  ## the last TRL with a PPOTrainer, beside the one that is used: only to compare with
	$(call install,Installing an older TRL into $@.,--no-deps --upgrade --target $@ trl==1.12.0)
	touch $@

# The public modules; those that the first page names.
API := cagsr $(addprefix cagsr., train config flow errors attention reward view notebook integrations)

api: $(STAMP)  ## the API's pages from the docstrings, in build/api
	$(BIN)/python -m pdoc --docformat google --no-show-source --output-directory build/api $(API)

html: $(STAMP)  ## the documents as HTML, in build/html
	$(BIN)/python -m tools.html build/html README.md CONTRIBUTING.md CHANGELOG.md docs examples

figures: $(STAMP)  ## make the figures small that a command has written into docs
	$(BIN)/python -m tools.compact_svg docs

install: $(STAMP)

$(STAMP): pyproject.toml constraints.txt
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(call install,Installing PyTorch into $(VENV): a large download that takes minutes.,--constraint constraints.txt torch)
	$(call install,Installing cagsr and the other packages it needs: a minute or two.,--constraint constraints.txt --editable '.[$(EXTRAS)]')
	touch $@

clean:
	rm -rf $(VENV) benchmarks/.trl build/api build/html
