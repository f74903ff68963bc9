# Entry points; `make help` lists them. Anything longer than a line is in crates/xtask. Slow results are
# cached by content in $NACELLE_CACHE (default ~/.cache/nacelle).

SHELL := /bin/bash
.SHELLFLAGS := -euo pipefail -c
MAKEFLAGS += --no-print-directory

XTASK := cargo xtask
# Prints how long a stage took: $(call timed,name,command)
timed = start=$$SECONDS; $(2) || exit $$?; echo "--- $(1): $$((SECONDS - start)) s"

# KVM counts exits in debugfs; most distributions mount it, the lab does not.
DEBUGFS = mountpoint -q /sys/kernel/debug || mount -t debugfs none /sys/kernel/debug

CMD ?=
TIMEOUT ?= 600
FUZZ_SECONDS ?= 20
PREFIX ?= /usr/local
DESTDIR ?=

.PHONY: help
help: ## show this list
	@sed -n 's/^\([a-z-]*\):.*## /\1\t/p' $(MAKEFILE_LIST) | column -t -s "$$(printf '\t')"

.PHONY: deps
deps: ## install missing Debian packages (Debian 12, as root)
	@crates/xtask/host/deps.sh

.PHONY: build
build: deps ## build all binaries, optimized
	@$(call timed,build,cargo build --quiet --release --workspace --exclude xtask --bins)

.PHONY: guest-kernel
guest-kernel: deps ## build build/guest/vmlinux from Debian's linux-source-6.12
	@$(call timed,guest kernel,$(XTASK) guest-kernel)

.PHONY: guest-image
guest-image: build ## build build/guest/initramfs.cpio with the agent as init
	@$(call timed,guest image,$(XTASK) guest-image)

.PHONY: images
images: build ## build the images of tests and demo in build/images, from Debian packages
	@$(call timed,images,$(XTASK) images)

.PHONY: assets
assets: guest-kernel guest-image ## build guest kernel and initramfs

.PHONY: lab
lab: deps ## run CMD='...' in the lab, a VM with nested KVM (TIMEOUT=600)
	@test -n "$$CMD" || { echo "make lab CMD='uname -a'" >&2; exit 2; }
	@$(XTASK) lab --timeout $(TIMEOUT) -- "$$CMD"

.PHONY: lab-shell
lab-shell: deps ## start a shell in the lab
	@$(XTASK) lab --shell

.PHONY: demo
demo: assets images ## show the life of a pod, on this host or in the lab
	@$(XTASK) lab --auto --images --timeout $(TIMEOUT) --share tests/demo -- 'bash demo.sh'

.PHONY: unit
unit: deps ## run the tests that do not need KVM
	@$(call timed,unit tests,cargo test --quiet --release --workspace --tests -- --show-output)

.PHONY: e2e
e2e: assets images ## run the end-to-end tests, on this host or in the lab (ONLY='filter')
	@$(call timed,stories,$(XTASK) stories $${ONLY:-})

.PHONY: test
test: ## run unit and end-to-end tests
	@start=$$SECONDS; $(MAKE) unit && $(MAKE) e2e; echo "--- all tests: $$((SECONDS - start)) s"

.PHONY: bench
bench: assets images ## run benchmarks, with Debian's QEMU for comparison
	@$(XTASK) lab --auto --images --timeout 1200 -- '$(DEBUGFS); nacelle-bench boot && nacelle-bench list'

.PHONY: lint
lint: deps ## run rustfmt, clippy and the project's own checks
	@cargo fmt --all --check
	@$(call timed,clippy,cargo clippy --quiet --release --workspace --all-targets -- -D warnings)
	@$(XTASK) check

.PHONY: fuzz
fuzz: deps ## run every fuzz target for a short time (FUZZ_SECONDS=20)
	@$(XTASK) fuzz --seconds $(FUZZ_SECONDS)

.PHONY: install
install: assets ## install binaries, guest files, unit, man pages, completions (DESTDIR, PREFIX)
	@umask 022; $(XTASK) install --prefix "$(DESTDIR)$(PREFIX)" --root "$(DESTDIR)/"

.PHONY: uninstall
uninstall: ## remove what `make install` installed (DESTDIR, PREFIX)
	@$(XTASK) install --remove --prefix "$(DESTDIR)$(PREFIX)" --root "$(DESTDIR)/"

.PHONY: packaging-deps
packaging-deps: deps
	@crates/xtask/host/deps.sh packaging

.PHONY: deb
deb: assets packaging-deps ## build Debian packages in build/deb
	@$(call timed,deb,$(XTASK) deb)

.PHONY: rpm
rpm: assets packaging-deps ## build RPM packages in build/rpm
	@$(call timed,rpm,$(XTASK) rpm)

.PHONY: package-test
package-test: assets images ## install, upgrade and remove the Debian packages in a lab with systemd
	@$(call timed,package test,$(XTASK) package-test)

.PHONY: clean
clean: ## delete build results; the cache stays
	@cargo clean --quiet; rm -rf build

export CMD ONLY
