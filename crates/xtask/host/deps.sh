#!/bin/sh
# Installs what building and testing nacelle needs on a bare Debian 12, as root, from the Debian
# mirror that this machine already uses. Nothing happens (in well under a second) when everything
# is there. A shell script because it runs before cargo can build anything.
#
# It also leaves two files for `cargo xtask`, in the cache folder:
#   apt/sources.list   the Debian suites of this machine, plus the backports suite beside them
#   apt/apt.conf       an apt set-up that sees these suites only, so that third-party sources
#                      with problems of their own cannot break ours
set -eu

cache=${NACELLE_CACHE:-${XDG_CACHE_HOME:-$HOME/.cache}/nacelle}
apt=$cache/apt

# What the build runs: the C linker, protoc, the static libseccomp of the agent and libcap-ng of the
# file server, and the C++ compiler that libFuzzer is built with.
build="gcc g++ make protobuf-compiler libseccomp-dev libcap-ng-dev"
# What the guest kernel's build runs.
kernel="flex bison bc libelf-dev libssl-dev xz-utils lz4 cpio patch"
# What makes images: the lab's root file system, scratch disks, EROFS images.
images="kmod mmdebstrap e2fsprogs erofs-utils zstd"
# What unit tests work with; they are skipped where it is missing.
tests="busybox-static attr skopeo docker-registry iproute2 iptables containernetworking-plugins"
# What a node needs beside nacelle, when tests run on this host and not in the lab: `deps.sh node`.
node="iproute2 iptables nftables containernetworking-plugins docker-registry curl jq procps psmisc
    socat openssl"
# What `make deb` and `make rpm` run: `deps.sh packaging`.
packaging="lintian rpm"
# The lab's machine, from backports (see `qemu` below).
qemu="qemu-system-x86"

say() { echo "deps: $*"; }
die() { echo "deps: $*" >&2; exit 1; }

missing() {
    for p in "$@"; do
        case $(dpkg-query -W -f '${db:Status-Status}' "$p" 2>/dev/null || true) in
            installed) ;;
            *) echo "$p" ;;
        esac
    done
}

# True when the QEMU that is installed virtualizes SVM soundly: 7.2 lacks XSETBV for nested guests.
qemu_is_new() {
    version=$(dpkg-query -W -f '${Version}' $qemu 2>/dev/null) || return 1
    dpkg --compare-versions "$version" ge 1:8.2
}

codename=$(. /etc/os-release && echo "${ID:-}-${VERSION_CODENAME:-}")
[ "$codename" = debian-bookworm ] || die "this script knows Debian 12 (bookworm), not '$codename'"

command -v cargo >/dev/null 2>&1 ||
    die "no cargo: install Rust with rustup first (rust-version in Cargo.toml names the least version)"

# The mirrors come from apt's own idea of its sources: both file formats, whatever their names.
derive_sources() {
    mkdir -p "$apt/lists/partial" "$apt/archives/partial"
    apt-get indextargets --format '$(REPO_URI) $(RELEASE) $(COMPONENT) $(SOURCESENTRY)' \
        'Created-By: Packages' | sort -u |
        while read -r uri release component entry; do
            [ "$component" = main ] || continue
            case $release in
                bookworm | bookworm-updates | bookworm-security | bookworm/updates) ;;
                *) continue ;;
            esac
            file=${entry%:*}
            keyring=$(sed -n \
                -e 's/^Signed-By:[[:space:]]*\(\/[^[:space:]]*\).*/\1/p' \
                -e "s|^deb .*signed-by=\(/[^] ]*\).*|\1|p" "$file" | head -n 1)
            [ -n "$keyring" ] || keyring=/usr/share/keyrings/debian-archive-keyring.gpg
            echo "deb [signed-by=$keyring] $uri $release main"
            if [ "$release" = bookworm ]; then
                echo "deb [signed-by=$keyring] $uri bookworm-backports main"
            fi
        done >"$apt/sources.list.new"
    grep -q ' bookworm main$' "$apt/sources.list.new" ||
        die "apt knows no source for bookworm/main; add one to /etc/apt/sources.list.d"
    cat >"$apt/apt.conf.new" <<CONF
Dir::Etc::sourcelist "$apt/sources.list";
Dir::Etc::sourceparts "-";
Dir::State::lists "$apt/lists";
Dir::Cache::archives "$apt/archives";
Dir::Cache::pkgcache "";
Dir::Cache::srcpkgcache "";
APT::Install-Recommends "false";
APT::Get::Assume-Yes "true";
APT::Sandbox::User "root";
Acquire::Languages "none";
Acquire::Retries "3";
DPkg::Lock::Timeout "600";
CONF
    for f in sources.list apt.conf; do
        if cmp -s "$apt/$f.new" "$apt/$f"; then rm "$apt/$f.new"; else mv "$apt/$f.new" "$apt/$f"; fi
    done
}

apt_get() { APT_CONFIG=$apt/apt.conf DEBIAN_FRONTEND=noninteractive apt-get -qq "$@"; }

[ "${1:-}" = node ] || node=
[ "${1:-}" = packaging ] || packaging=
wanted=$(missing $build $kernel $images $tests $node $packaging)
qemu_is_new || wanted="$wanted $qemu"

if [ -f "$apt/updated" ] && [ -f "$apt/sources.list" ] && [ -z "$wanted" ]; then
    exit 0
fi
[ "$(id -u)" = 0 ] || die "missing:$(echo " $wanted" | tr '\n' ' ') (run 'make deps' as root)"

derive_sources
if ! apt_get update; then
    # A mirror without backports: the rest must still work.
    say "no bookworm-backports on this machine's mirror; continuing without it"
    sed -i '/bookworm-backports/d' "$apt/sources.list"
    apt_get update
fi
: >"$apt/updated"

wanted=$(missing $build $kernel $images $tests $node $packaging)
if [ -n "$wanted" ]; then
    say "installing" $wanted
    apt_get install $wanted >"$apt/install.log" 2>&1 || { cat "$apt/install.log" >&2; die "apt-get install failed"; }
fi
if ! qemu_is_new; then
    say "installing $qemu"
    if grep -q bookworm-backports "$apt/sources.list" &&
        apt_get install -t bookworm-backports $qemu >"$apt/install.log" 2>&1; then
        :
    elif [ -z "$(missing $qemu)" ] || apt_get install $qemu >"$apt/install.log" 2>&1; then
        say "only QEMU 7.2 is available: the lab runs with one CPU and without XSAVE"
    else
        cat "$apt/install.log" >&2
        die "apt-get install $qemu failed"
    fi
fi
