# The front door: `make help`. A variable given to make is the command line's option of the same name:
#   make plan MODEL=tiny SET="optim.lr=1e-4"   is   python -m jobs plan --model=tiny --set="optim.lr=1e-4"
.DEFAULT_GOAL := help
.NOTPARALLEL:
.PHONY: help env fetch smoke submit sweep report status logs why verify cancel resume plan layers schema image test-image tiny-base cluster cluster-down setup test test-all lint bench chaos simulate same-as gpu-check lock clean

VENV ?= .venv
ifneq ($(words $(VENV)),1)
$(error VENV names a folder without spaces, such as .venv)
endif
PY := $(VENV)/bin/python
# PYTHON makes the virtual environment; left out, env/setup.sh looks for one.
export PYTHON
# A site's modules set these, and their packages would come before the locked ones.
unexport PYTHONPATH PYTHONHOME

# Options --------------------------------------------------------------------------------------------------------------
VALUES := MODEL DATA CLUSTER SET RUN STAGE SWEEP NODES
FLAGS := DRY_RUN NEW JSON FOLLOW WATCH
# A flag is on when it is set, not empty and not 0.
# Values go through the environment, word for word: neither make nor the shell reads the $, quotes or newlines in them.
export COMMIT
unexport $(VALUES) $(FLAGS)
$(foreach v,$(VALUES),$(eval export OPT_$v := $$(value $v)))
option = --$(shell echo $1 | tr A-Z_ a-z-)
OPTIONS = $(foreach v,$(VALUES),$(if $(value $v),$(call option,$v)="$$OPT_$v")) \
	$(foreach v,$(FLAGS),$(if $(filter-out 0,$(value $v)),$(call option,$v)))
JOBS = @exec $(PY) -m jobs $@ $(OPTIONS)

# Set-up: one stamp a lock, named by its content ----------------------------------------------------------------------
stamp = $(VENV)/.$1-$(shell cat $2 | cksum | cut -d' ' -f1)
LOGIN := $(call stamp,login,env/login.lock)
TRAIN := $(call stamp,train,env/train.lock env/deepspeed.lock env/torch.txt)
DEV := $(call stamp,dev,env/dev.lock)
# An unfinished set-up may have to begin anew, with the first stage: then no stamp counts.
ifneq ($(wildcard $(VENV)/setup.log),)
.PHONY: $(LOGIN) $(TRAIN) $(DEV)
endif

$(LOGIN):
	@sh env/setup.sh login $(VENV) $@
$(TRAIN): $(LOGIN)
	@sh env/setup.sh train $(VENV) $@
$(DEV): $(LOGIN)
	@sh env/setup.sh dev $(VENV) $@

# The training packages, save where stages run in an image that brings them: in a CPU job where there is a Slurm. Exit 3
# of `packages`: install them here.
PACKAGES = @{ [ -e $(TRAIN) ] && ! [ -e $(VENV)/setup.log ]; } || { $(PY) -m jobs packages --venv=$(VENV) \
	--stamp=$(TRAIN) $(foreach v,CLUSTER SET,$(if $(value $v),$(call option,$v)="$$OPT_$v")); code=$$?; \
	[ $$code = 3 ] || exit $$code; $(MAKE) --no-print-directory $(TRAIN); }

# Runs -----------------------------------------------------------------------------------------------------------------
env: $(LOGIN) ## make the environment and check it on a GPU node: CLUSTER= SET= NEW=1
	@$(PY) -m jobs env --before $(OPTIONS)
	$(PACKAGES)
	$(JOBS)

smoke: $(LOGIN) ## ten real steps on a node before the long run: options as for submit
	$(PACKAGES)
	$(JOBS)

fetch: $(LOGIN) ## download a recipe's model and dataset to where jobs look for them: MODEL= CLUSTER= SET=
	$(PACKAGES)
	$(JOBS)

submit: $(LOGIN) ## start a run: MODEL= DATA= CLUSTER= NODES= SET="a.b=c d.e=f" NEW=1; DRY_RUN=1 only prints it
	$(if $(filter-out 0,$(value DRY_RUN)),,$(PACKAGES))
	$(JOBS)

plan: $(LOGIN) ## what a run would take (resources, memory, time): options as for submit
	$(JOBS)

sweep: $(LOGIN) ## start a run per point of a sweep: SWEEP= MODEL= DATA= CLUSTER= SET= DRY_RUN=1
	$(if $(filter-out 0,$(value DRY_RUN)),,$(PACKAGES))
	$(JOBS)

report: $(LOGIN) ## a sweep's points by their score, as table, CSV and plot: SWEEP= JSON=1
	$(JOBS)

layers: $(LOGIN) ## the names, shapes and sizes of a model's layers: MODEL= SET= JSON=1
	$(JOBS)

status: $(LOGIN) ## all sweeps and runs now, or one: RUN= SWEEP= JSON=1; WATCH=1 draws again until all has ended
	$(JOBS)

logs: $(LOGIN) ## what a run's newest life wrote: RUN= STAGE=; FOLLOW=1 goes on, across lives and stages
	$(JOBS)

why: $(LOGIN) ## what happened in each life of a run, and what to do now: RUN=
	$(JOBS)

verify: $(LOGIN) ## check a run's checkpoints: RUN=
	$(JOBS)

cancel: $(LOGIN) ## end a run or a sweep, for good until it is resumed: RUN= SWEEP=
	$(JOBS)

resume: $(LOGIN) ## go on with a run or a sweep that failed or was cancelled: RUN= SWEEP=; a run with other nodes: NODES=
	$(JOBS)

schema: $(LOGIN) ## the recipes' JSON Schema, for editors
	$(JOBS)

image: $(LOGIN) ## build the image that stages run in, where the profile wants one: CLUSTER= SET=
	$(JOBS)

# Around it ------------------------------------------------------------------------------------------------------------
cluster: ## start a real Slurm of three nodes on this machine, to try things on
	@python=$$(sh env/setup.sh python) && exec "$$python" env/local_slurm/cluster.py up $(value ARGS)

cluster-down: ## stop it
	@python=$$(sh env/setup.sh python) && exec "$$python" env/local_slurm/cluster.py down $(value ARGS)

tiny-base: $(TRAIN) ## train anew the base model of MODEL=tiny
	@exec $(PY) models/tiny-base/build.py $(value ARGS)

setup: $(TRAIN) ## install all that runs need; the other targets do it when they need it: PYTHON= VENV=

# Side by side, see tests/schedule.py. ARGS="-n 0" runs them one after the other, in one process.
PYTEST := $(PY) -m pytest -n auto --dist loadgroup --no-loadscope-reorder

test: $(TRAIN) $(DEV) ## run the tests, several at once; REQUIRE=slurm: without Slurm they fail; ARGS="-k word" goes to pytest
	@exec $(PYTEST) $(value ARGS)

test-all: $(TRAIN) $(DEV) ## run the tests that are too long for every change, too: ARGS=
	@exec $(PYTEST) -m "" $(value ARGS)

lint: $(DEV) ## ruff and mypy
	@$(PY) -m ruff check .
	@$(PY) -m mypy

simulate: $(DEV) ## random histories of a run in memory, on all cores: ARGS="--histories 100000 --workers 2 --first SEED"
	@exec $(PY) -m benchmarks.simulate $(value ARGS)

bench: $(TRAIN) ## measure: every file of benchmarks/, or those named in ARGS
	@for name in $(or $(value ARGS),$(basename $(notdir $(wildcard benchmarks/[a-z]*.py)))); do \
		echo "== $$name"; $(PY) -m "benchmarks.$$name" || exit; done

chaos: $(TRAIN) ## kill runs in every way on the local Slurm, and write docs/chaos.md (half an hour): ARGS="--kills 12"
	@exec $(PY) -m benchmarks.chaos --write docs/chaos.md $(value ARGS)

same-as: $(TRAIN) ## run every method and print every script in COMMIT= and in this tree, and compare (10 min): ARGS="--only qlora"
	@exec $(PY) -m benchmarks.same_as $(if $(value COMMIT),--commit="$$COMMIT") $(value ARGS)

test-image: $(TRAIN) $(DEV) ## runs inside the image beside runs outside it, on the local Slurm, into docs/image.md (half an hour; root)
	@exec $(PY) -m benchmarks.image --write docs/image.md $(value ARGS)

# On a machine without a network the pack brings what that machine's own Python (PYTHON=) lacks; elsewhere the virtual
# environment serves. The pack itself needs a Python with pip alone.
BARE := $(and $(value PYTHON),$(wildcard .gpu-wheels/*.whl))
PACKING := $(findstring --pack,$(value ARGS))
gpu-check: $(if $(BARE),,$(if $(PACKING),$(LOGIN),$(TRAIN))) ## what only a GPU can show, in ten minutes: ARGS="basics --out FOLDER" ARGS=--pack PYTHON= (docs/gpu.md)
	@exec $(if $(BARE),"$$PYTHON",$(PY)) -m benchmarks.gpu_check $(value ARGS)

lock: $(DEV) ## remake env/*.lock from pyproject.toml; ARGS=--upgrade takes newer versions
	@sh env/lock.sh $(PY) $(value ARGS)

clean: ## remove caches; the runs and the virtual environment stay
	@rm -rf .pytest_cache .ruff_cache .mypy_cache
	@find . -path ./$(VENV) -prune -o -path ./runs -prune -o -name __pycache__ -type d -exec rm -rf {} +

help: ## this list
	@echo "make TARGET [VARIABLE=value ...]"
	@sed -n 's/^\([a-z-]*\):.*## \(.*\)/\1|\2/p' Makefile | while IFS='|' read -r target text; do \
		printf '  %-13s %s\n' "$$target" "$$text"; done
