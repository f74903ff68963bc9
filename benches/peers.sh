#!/bin/bash
# `nacelle-bench share` or `create` on a separate node in the lab: a registry, nacelled, and containerd
# with runc and virtiofsd where Debian's packages of them were brought in. The arguments go to the bench.
#
#   cargo xtask lab --images --timeout 1800 --in benches/peers.sh --in DEBS:/nacelle/debs \
#       -- 'bash /nacelle/here/peers.sh share --rounds 3'
#
# DEBS is a folder with containerd, runc and qemu-system-common (7.2, the last with virtiofsd), as
# `apt-get download` gets them, and `pause`, an OCI layout of an image for containerd's sandboxes.
# VMM_DIR names another folder with nacelle-vmm and nacelle-fs.
set -euo pipefail
dir=$(mktemp -d /tmp/peers.XXXX)
root=$(mktemp -d /var/lib/nacelle/peers.XXXX)
debs=/nacelle/debs
vmm=${VMM_DIR:-$(dirname "$(command -v nacelled)")}
trap 'kill $(jobs -p) 2>/dev/null; wait' EXIT
mountpoint -q /sys/kernel/debug || mount -t debugfs none /sys/kernel/debug
mkdir -p "$dir/cni" "$dir/registry"
nacelled config cni >"$dir/cni/10-bench.conflist"
cat >"$dir/config.toml" <<END
root = "$root"
state = "$dir/run"
vmm = "$vmm/nacelle-vmm"
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
await() {
    for _ in $(seq 300); do "$@" >/dev/null 2>&1 && return; sleep 0.1; done
    echo "no success within 30 s: $*" >&2
    return 1
}
push() {
    skopeo copy --quiet --insecure-policy --dest-tls-verify=false "oci:$1" "docker://127.0.0.1:5055/$2"
}
docker-registry serve "$dir/registry.yml" >/dev/null 2>&1 &
await curl -fs http://127.0.0.1:5055/v2/
push "$NACELLE_IMAGES/busybox" busybox:1
nacelled --config "$dir/config.toml" >"$dir/nacelled.log" 2>&1 &
await test -S "$dir/run/nacelled.sock"
sides=(--runtime "nacelle=$dir/run/nacelled.sock")
if [ -d "$debs" ]; then
    for deb in "$debs"/*.deb; do dpkg-deb -x "$deb" /opt/peers; done
    export PATH=$PATH:/opt/peers/usr/bin:/opt/peers/usr/sbin
    [ "$1" = share ] && sides+=(--virtiofsd /opt/peers/usr/lib/qemu/virtiofsd)
    push "$debs/pause" pause:1
    cat >"$dir/containerd.toml" <<END
version = 2
root = "$root/containerd"
state = "$dir/containerd"
[grpc]
address = "$dir/containerd.sock"
[plugins."io.containerd.grpc.v1.cri"]
  sandbox_image = "127.0.0.1:5055/pause:1"
  [plugins."io.containerd.grpc.v1.cri".cni]
    bin_dir = "/usr/lib/cni"
    conf_dir = "$dir/cni"
END
    containerd --config "$dir/containerd.toml" >"$dir/containerd.log" 2>&1 &
    await test -S "$dir/containerd.sock"
    sides+=(--runtime "runc=$dir/containerd.sock")
fi
verb=$1
shift
nacelle-bench "$verb" "${sides[@]}" --image 127.0.0.1:5055/busybox:1 "$@" || {
    tail -n 20 "$dir"/*.log >&2
    exit 1
}
