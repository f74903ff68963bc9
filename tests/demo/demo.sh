#!/bin/bash
# A pod's life, shown: an image, a pod with a kernel of its own, a served page, logs, exec, stats,
# where the start-up time went, and a removal that leaves nothing. `make demo` runs it, in the lab
# or on this host; every command that it prints can be typed by hand.
set -euo pipefail

# Short: the paths of the sockets in it have room for 107 bytes.
dir=$(mktemp -d /tmp/nd.XXXX)
# On a disk: what the pods write is in it.
mkdir -p /var/lib/nacelle
root=$(mktemp -d /var/lib/nacelle/demo.XXXX)
export NACELLE_SOCKET=$dir/run/nacelled.sock
image=127.0.0.1:5055/nginx:demo
pids=()

finish() {
    status=$?
    trap - EXIT
    if [ $status != 0 ]; then
        echo "the demo failed; the end of nacelled's log:" >&2
        tail -n 25 "$dir/nacelled.log" >&2 || true
    fi
    for pid in "${pids[@]}"; do kill "$pid" 2>/dev/null || true; done
    wait 2>/dev/null || true
    rm -rf "$dir" "$root"
    exit $status
}
trap finish EXIT

bold=$(printf '\033[1m') dim=$(printf '\033[2m') plain=$(printf '\033[0m')
if [ -n "${NO_COLOR:-}" ]; then bold='' dim='' plain=''; fi
chapter() { printf '\n%s%s%s\n' "$bold" "$*" "$plain"; }
note() { printf '%s%s%s\n' "$dim" "$*" "$plain"; }
# Prints a command as one would type it, then runs it.
run() { printf '%s$ %s%s\n' "$dim" "$*" "$plain"; "$@"; }
# Waits for a command to succeed.
until_ok() {
    for _ in $(seq 200); do
        if "$@" >/dev/null 2>&1; then return 0; fi
        sleep 0.1
    done
    echo "gave up waiting for: $*" >&2
    return 1
}

# What a pod could leave behind, a line a kind.
inventory() {
    printf 'VMM processes       %s\n' "$(pgrep -c -x nacelle-vmm || true)"
    printf 'network namespaces  %s\n' "$(find /run/netns -mindepth 1 2>/dev/null | wc -l)"
    printf 'taps and veths      %s\n' "$(ip -o link | grep -cE 'tun|tap|veth' || true)"
    # /run/netns itself becomes a mount point with the host's first named namespace, and stays one.
    printf 'mounts              %s\n' "$(grep -vc ' /run/netns ' /proc/self/mounts)"
    printf 'cgroups             %s\n' "$(find /sys/fs/cgroup -type d -path '*nacelle*pod*' | wc -l)"
    printf 'pod folders         %s\n' "$(find "$root/pods" -mindepth 1 -maxdepth 1 2>/dev/null | wc -l)"
}

bin=$(dirname "$(command -v nacelled)")
mkdir -p "$dir/cni" "$dir/registry"
nacelled config cni >"$dir/cni/10-demo.conflist"
cat >"$dir/config.toml" <<END
root = "$root"
state = "$dir/run"
vmm = "$bin/nacelle-vmm"
kernel = "$NACELLE_GUEST/vmlinux"
initramfs = "$NACELLE_GUEST/initramfs.cpio"
[network]
conf_dir = "$dir/cni"
END
cat >"$dir/registry.yml" <<END
version: 0.1
log: {level: error}
storage: {filesystem: {rootdirectory: $dir/registry}}
http: {addr: '127.0.0.1:5055'}
END

note "A registry with one image in it starts on loopback, and nacelled, the node's daemon."
docker-registry serve "$dir/registry.yml" >"$dir/registry.log" 2>&1 &
pids+=($!)
until_ok curl -fs http://127.0.0.1:5055/v2/
skopeo copy --quiet --insecure-policy --dest-tls-verify=false "oci:$NACELLE_IMAGES/nginx" "docker://$image"
nacelled --config "$dir/config.toml" >"$dir/nacelled.log" 2>&1 &
pids+=($!)
until_ok test -S "$NACELLE_SOCKET"

chapter "Can this host run pods?"
run nacelle check

chapter "An image"
run nacelle pull "$image"
run nacelle images
before=$(inventory)

chapter "A pod: a virtual machine with a kernel of its own"
run nacelle run -d --name web -p 8080:80 "$image"
run nacelle pods
printf '%s%-16s%s %s\n' "$dim" "this kernel:" "$plain" "$(uname -r)"
printf '%s%-16s%s %s\n' "$dim" "the pod's:" "$plain" "$(nacelle exec web uname -r)"

chapter "It serves"
until_ok curl -fs http://127.0.0.1:8080/
run curl -fsS -o "$dir/page" http://127.0.0.1:8080/
sed -n 's/.*<title>\(.*\)<\/title>.*/  \1/p' "$dir/page"

chapter "Looking in"
run nacelle logs web
run nacelle exec web sh -c 'echo "pid 1 here is $(tr "\0" " " </proc/1/cmdline)"; id; ip -br address show eth0'
run nacelle stats

chapter "Where its start-up time went"
run nacelle trace web

chapter "Gone without a trace"
run nacelle rm -f web
after=$(inventory)
printf '%s\n' "                    before  after"
paste <(printf '%s\n' "$before") <(printf '%s\n' "$after" | awk '{print $NF}') | awk -F'\t' '{printf "  %-24s %s\n", $1, $2}'
if [ "$before" != "$after" ]; then
    echo "something was left behind" >&2
    exit 1
fi
note "Nothing is left. Next: 'make lab-shell' for a prompt beside it, README.md for a kubelet."
