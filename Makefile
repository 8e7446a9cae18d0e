# make setup | demo | test | check | test-cluster | segmentation | bench | soak | launchers | docs | gpu | lint | clean: each sets up first what it needs.
# Nothing else has to be installed by hand; see tools/system_deps.sh for what is taken from the system.

VENV := .venv
LAUNCHERS := .venv-launchers
BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip
NATIVE := $(shell find hvd_syncbn torch_impl tf_impl -name "*.cc" -o -name "*.h" -o -name "*.cu" -o -name "*.cuh")
PATCHES := hvd_syncbn/horovod_build/patches
CMAKE := $(shell find CMakeLists.txt hvd_syncbn torch_impl tf_impl -name "CMakeLists.txt" -o -name "*.cmake")

# Pytest's options for three files of tests at a time, of which some wait; see TOGETHER in tests/conftest.py. What takes longest
# comes first.
THREE := -n 3 --no-loadscope-reorder

.PHONY: setup demo test check test-cluster segmentation bench soak launchers docs gpu lint clean
.DELETE_ON_ERROR:

setup: $(VENV)/.installed

demo: setup
	$(BIN)/python examples/demo.py

test: setup
	-@tools/cluster_deps.sh
	$(BIN)/python -m pytest tests/parallel tests/cluster tests/unit tests/gpu $(THREE)

# Lint and the quick unit tests: some 3 minutes.
check: setup lint
	$(BIN)/python -m pytest tests/unit $(THREE) -m "not slow and not matrix"

# With every way to die of an elastic job, in both frameworks: some 20 minutes more than what `make test` runs of it.
test-cluster: setup
	@tools/cluster_deps.sh
	$(BIN)/python -m pytest tests/cluster -m "matrix or not matrix"

# A real task at one image per rank: 5 to 10 minutes, a table and out/segmentation.png.
segmentation: setup
	$(BIN)/python examples/segmentation/run.py

bench: setup
	$(BIN)/hvd-syncbn bench

# 20,000 steps on 2 ranks in each framework: memory, threads, file handles, bytes. Takes its time; not in CI.
soak: setup
	$(BIN)/python -m benchmarks.soak

# Every launcher that can run here, in an environment of its own; needs Open MPI and Java. Not in CI.
launchers: $(LAUNCHERS)/.installed
	$(LAUNCHERS)/bin/python examples/launch/check.py

# The documentation, as pages in site/; needs the tools, not the build. A broken link is an error.
docs: $(VENV)/.docs
	NO_MKDOCS_2_WARNING=1 DISABLE_MKDOCS_2_WARNING=true $(BIN)/mkdocs build -q

# On a machine with a GPU, CUDA and a Python that has PyTorch; sets nothing up (docs/gpu.md).
gpu:
	python3 -m benchmarks.gpu --out out/gpu $(if $(wildcard build/carried),--carried build/carried)

# Needs the tools, not the build.
lint: $(VENV)/.requirements
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy hvd_syncbn benchmarks
	$(BIN)/clang-format --dry-run -Werror $(NATIVE) $(wildcard $(addprefix tests/,cuda_emulator/*.h cuda_emulator/*.cc horovod_native/*.h horovod_native/*.cc))

clean:
	rm -rf $(VENV) $(LAUNCHERS) build site

$(VENV)/.requirements: requirements.txt benchmarks/requirements.txt tools/system_deps.sh
	@tools/system_deps.sh $(VENV)
	@echo "Installing the requirements into $(VENV) (about 1.5 GB with both frameworks; takes minutes, once)"
	@tools/with_clock.sh $(PIP) install -qq --disable-pip-version-check -r requirements.txt
	@$(PIP) install -qq --disable-pip-version-check --no-deps -r benchmarks/requirements.txt
	@touch $@

$(VENV)/.docs: docs/requirements.txt $(VENV)/.requirements
	@$(PIP) install -qq --disable-pip-version-check -r docs/requirements.txt
	@touch $@

# The folder, too: its time tells that a patch was taken away.
$(VENV)/.horovod: $(wildcard hvd_syncbn/horovod_build/*.py) $(PATCHES) $(wildcard $(PATCHES)/*) $(VENV)/.requirements
	@$(BIN)/python -m hvd_syncbn.horovod_build
	@touch $@

$(VENV)/.installed: pyproject.toml $(CMAKE) $(NATIVE) $(VENV)/.requirements $(VENV)/.horovod
	@echo "Building the native parts"
	@tools/with_clock.sh $(PIP) install -qq --disable-pip-version-check --no-build-isolation --no-deps -e .
	@touch $@

# Beside .venv, as Ray and PySpark bring much along. The native parts get a build folder of their own: CMake remembers whose Python.
$(LAUNCHERS)/.installed: requirements.txt examples/launch/requirements.txt $(wildcard hvd_syncbn/horovod_build/*.py) $(PATCHES) \
		$(wildcard $(PATCHES)/*) pyproject.toml $(CMAKE) $(NATIVE)
	@command -v mpicxx && command -v java || { echo "Needs: apt-get install openmpi-bin libopenmpi-dev openjdk-17-jre-headless"; exit 1; }
	@tools/system_deps.sh $(LAUNCHERS)
	@echo "Installing the requirements, Ray and PySpark into $(LAUNCHERS) (takes minutes, once)"
	@tools/with_clock.sh $(LAUNCHERS)/bin/python -m pip install -qq --disable-pip-version-check \
		-r requirements.txt -r examples/launch/requirements.txt
	@$(LAUNCHERS)/bin/python -m hvd_syncbn.horovod_build --with-mpi
	@echo "Building the native parts"
	@tools/with_clock.sh $(LAUNCHERS)/bin/python -m pip install -qq --disable-pip-version-check --no-build-isolation --no-deps \
		--config-settings=build-dir=build/launchers -e .
	@touch $@
