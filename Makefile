# Thin: each target is one or two commands that can be typed by hand.
CARGO ?= cargo
TARGET := $(or $(CARGO_TARGET_DIR),target)
# Members that must build with nothing but their core: no sockets, no async runtime.
CORE := transport qemu-glue
ARGS ?=

.PHONY: demo test check bench lab setup test-qemu-7.2 model fuzz

# A live Debian guest moves over an emulated WAN, beside QEMU's own migration (root, ~10 minutes).
demo: setup
	$(CARGO) build --release -p scaleaway -p testbed --bin scaleaway --bin testbed
	$(TARGET)/release/testbed run demo --report $(TARGET)/demo.json

# All tests that a machine without special hardware can run, then the lab's smoke scenario (root).
test: setup
	$(CARGO) build -p scaleaway -p testbed --bin scaleaway --bin testbed
	@if $(CARGO) nextest --version >/dev/null 2>&1; then \
	    $(CARGO) nextest run --workspace --no-fail-fast && $(CARGO) test --workspace --doc; \
	else \
	    $(CARGO) test --workspace --no-fail-fast; \
	fi
	$(TARGET)/debug/testbed run smoke

check:
	$(CARGO) fmt --all --check
	$(CARGO) clippy --workspace --all-targets -- -D warnings
	RUSTDOCFLAGS='-D warnings' $(CARGO) doc --workspace --no-deps
	for member in $(CORE); do $(CARGO) check -p $$member --no-default-features || exit 1; done

bench:
	$(CARGO) bench $(ARGS)

# make lab ARGS='run dirty8/wan-100m --arm scaleaway'
lab: setup
	$(CARGO) build --release -p scaleaway -p testbed --bin scaleaway --bin testbed
	$(TARGET)/release/testbed $(or $(ARGS),list)

setup:
	sh testbed/setup.sh

# A live migration between two QEMUs of 7.2, unpacked beside the installed one.
test-qemu-7.2: setup
	$(CARGO) build -p scaleaway -p testbed --bin scaleaway --bin testbed
	QEMU_7_2=$$(sh testbed/qemu-7.2.sh) $(CARGO) test -p testbed --test qemu_7_2 -- --ignored --nocapture

# The dirty flags (S7) in every interleaving that the memory model allows; builds with loom, apart.
model:
	RUSTFLAGS='--cfg model' $(CARGO) test -p transport --no-default-features --lib model \
	    --target-dir $(TARGET)/model

# Needs cargo-fuzz and a nightly compiler; FUZZ_SECONDS for each target.
FUZZ_SECONDS ?= 300
fuzz:
	for member in $(CORE); do \
	    for target in $$(cd $$member && $(CARGO) +nightly fuzz list); do \
	        (cd $$member && $(CARGO) +nightly fuzz run $$target -- -max_total_time=$(FUZZ_SECONDS)) \
	            || exit 1; \
	    done; \
	done
