# Each target calls cargo or a script in scripts/.

PREFIX ?= /usr/local

.PHONY: build demo check bench bench-quick install uninstall deb site man completions

build:
	cargo build --release --bins
	bridges=$$(scripts/bridges) && cargo build --release $$(printf -- '--package %s ' $$bridges)
	scripts/ocaml "$${CARGO_TARGET_DIR:-target}/release/ocaml"

# Shows the main job: an image with a file system, mounted through FUSE, loop-mounted, listed, unmounted.
demo:
	scripts/demo

# Everything CI runs: formatting, lints and all tests. Installs what the tests need.
check:
	scripts/check

# The project beside its peers on this machine. See BENCHMARKING.md. With BASELINE=DIR also beside the nbdkit and
# nbdkit-mount of an earlier release in that directory.
baseline = $(if $(BASELINE),--baseline "$(BASELINE)")

bench: build
	cargo run --release --package nbdkit-bench -- $(baseline)

bench-quick: build
	cargo run --release --package nbdkit-bench -- --quick $(baseline)

man:
	scripts/man target/man

completions:
	scripts/completions target/completions

# The documentation as a site, in target/site/html.
site:
	scripts/site target/site

# Debian packages of what was built, in target/debian.
deb: build
	scripts/deb target/debian

# DESTDIR is for packages: everything goes beneath it. Nothing is built here, so that root need not have a compiler.
install:
	DESTDIR="$(DESTDIR)" scripts/install "$(PREFIX)"

uninstall:
	DESTDIR="$(DESTDIR)" scripts/uninstall "$(PREFIX)"
