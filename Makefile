# The doors of the repository; `make` lists them. What takes more than a line is in crates/xtask.
# Everything slow is cached in $NACELLE_CACHE (default ~/.cache/nacelle) by its content.

SHELL := /bin/bash
.SHELLFLAGS := -euo pipefail -c
MAKEFLAGS += --no-print-directory

XTASK := cargo xtask
# Prints how long a stage took: $(call timed,name,command)
timed = start=$$SECONDS; $(2) || exit $$?; echo "--- $(1): $$((SECONDS - start)) s"

# KVM counts exits there; most distributions mount it, the lab does not.
DEBUGFS = mountpoint -q /sys/kernel/debug || mount -t debugfs none /sys/kernel/debug

CMD ?=
TIMEOUT ?= 600
FUZZ_SECONDS ?= 20
PREFIX ?= /usr/local
DESTDIR ?=

.PHONY: help
help: ## this list
	@sed -n 's/^\([a-z-]*\):.*## /\1\t/p' $(MAKEFILE_LIST) | column -t -s "$$(printf '\t')"

.PHONY: deps
deps: ## install the Debian packages that are missing
	@crates/xtask/host/deps.sh

.PHONY: build
build: deps ## all binaries, optimized
	@$(call timed,build,cargo build --quiet --release --workspace --exclude xtask --bins)

.PHONY: guest-kernel
guest-kernel: deps ## build/guest/vmlinux from Debian's linux-source-6.12
	@$(call timed,guest kernel,$(XTASK) guest-kernel)

.PHONY: guest-image
guest-image: build ## build/guest/initramfs.cpio with the agent as init
	@$(call timed,guest image,$(XTASK) guest-image)

.PHONY: images
images: build ## build/images: what stories and demo run, from Debian packages
	@$(call timed,images,$(XTASK) images)

.PHONY: assets
assets: guest-kernel guest-image ## everything a pod boots from

.PHONY: lab
lab: deps ## run CMD='...' in an outer VM with a true KVM (TIMEOUT=600)
	@test -n "$$CMD" || { echo "make lab CMD='uname -a'" >&2; exit 2; }
	@$(XTASK) lab --timeout $(TIMEOUT) -- "$$CMD"

.PHONY: lab-shell
lab-shell: deps ## a shell in that VM
	@$(XTASK) lab --shell

.PHONY: demo
demo: assets images ## a pod's life, shown
	@$(XTASK) lab --auto --images --timeout $(TIMEOUT) --share tests/demo -- 'bash demo.sh'

.PHONY: unit
unit: deps ## the tests that need neither root nor KVM
	@$(call timed,unit tests,cargo test --quiet --release --workspace --tests -- --show-output)

.PHONY: e2e
e2e: assets images ## the stories end to end, on this host or in the lab: ONLY='filter'
	@$(call timed,stories,$(XTASK) stories $${ONLY:-})

.PHONY: test
test: ## everything: unit tests, then the stories
	@start=$$SECONDS; $(MAKE) unit && $(MAKE) e2e; echo "--- all tests: $$((SECONDS - start)) s"

.PHONY: bench
bench: assets images ## tables, beside Debian's QEMU in the same run
	@$(XTASK) lab --auto --images --timeout 1200 -- '$(DEBUGFS); nacelle-bench boot && nacelle-bench list'

.PHONY: lint
lint: deps ## rustfmt, clippy, the project's own rules
	@cargo fmt --all --check
	@$(call timed,clippy,cargo clippy --quiet --release --workspace --all-targets -- -D warnings)
	@$(XTASK) check

.PHONY: fuzz
fuzz: deps ## a short run of every fuzz target (FUZZ_SECONDS=20 each)
	@$(XTASK) fuzz --seconds $(FUZZ_SECONDS)

.PHONY: install
install: assets ## binaries, guest files and the systemd unit, below DESTDIR and PREFIX
	@$(XTASK) install --prefix "$(DESTDIR)$(PREFIX)" --root "$(DESTDIR)/"

.PHONY: clean
clean: ## what was built here; the cache stays
	@cargo clean --quiet; rm -rf build

export CMD ONLY
