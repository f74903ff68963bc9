#!/bin/bash
# PID 1 of the lab's outer machine, or a service of systemd there (`lab --systemd`): makes a host that
# a container runtime can live on, runs one command, and reports its exit status. Files come in as a
# tar on the second disk; everything that goes out has a virtio-serial port: output, errors, status,
# and one tar stream a folder.
export PATH=/nacelle/bin:/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin
export HOME=/root TERM=${TERM:-linux} LC_ALL=C.UTF-8 NACELLE_LAB=1
export NACELLE_GUEST=/nacelle/guest NACELLE_IMAGES=/nacelle/images

for f in /sys/class/virtio-ports/*/name; do
    [ -e "$f" ] || continue
    d=${f%/name}
    ports[${#ports[@]}]=$(cat "$f")=/dev/${d##*/}
done
port() {
    for p in "${ports[@]}"; do [ "${p%%=*}" = "$1" ] && echo "${p#*=}"; done
}
exec 9>"$(port status)"

host() {
    mkdir -p /dev/pts /dev/shm
    mount -t devpts -o gid=5,mode=620,ptmxmode=666 devpts /dev/pts
    mount -t tmpfs -o mode=1777 tmpfs /dev/shm
    mount -t mqueue mqueue /dev/mqueue 2>/dev/null || { mkdir -p /dev/mqueue; mount -t mqueue mqueue /dev/mqueue; }
    mount -t tmpfs -o mode=755 tmpfs /run
    mount -t tmpfs -o mode=1777 tmpfs /tmp
    mount -t cgroup2 -o nsdelegate cgroup2 /sys/fs/cgroup
    mount -t securityfs securityfs /sys/kernel/security 2>/dev/null
    mount -t bpf bpf /sys/fs/bpf 2>/dev/null
    mount --make-rshared /
    ln -sf /proc/self/fd /dev/fd
    ln -sf fd/0 /dev/stdin
    ln -sf fd/1 /dev/stdout
    ln -sf fd/2 /dev/stderr
    mkdir -p /run/lock /run/netns /var/lib/nacelle

    # As systemd leaves it: processes below a child group, every controller handed down.
    mkdir -p /sys/fs/cgroup/lab
    echo $$ >/sys/fs/cgroup/lab/cgroup.procs
    for c in $(cat /sys/fs/cgroup/cgroup.controllers); do
        echo "+$c" >/sys/fs/cgroup/cgroup.subtree_control 2>/dev/null
    done

    # What no request ever loads by itself; the rest (veth, overlay, nf_tables, ...) comes on demand.
    modprobe -a kvm-amd tun loop br_netfilter vhost_net vhost_vsock vsock erofs overlay 2>/dev/null
    chmod 666 /dev/kvm 2>/dev/null
    # Guest memory is shared memory: huge pages where the VMM asks for them cost a third of the exits.
    echo advise >/sys/kernel/mm/transparent_hugepage/shmem_enabled
    ip link set lo up
    hostname lab
    echo 1 >/proc/sys/net/ipv4/ip_forward
    echo 1 >/proc/sys/net/ipv6/conf/all/forwarding
    echo 1048576 >/proc/sys/fs/inotify/max_user_watches
    echo 8192 >/proc/sys/fs/inotify/max_user_instances
    ulimit -n 1048576

    # Room to write: what the daemon and the stories keep is on the scratch disk.
    mkdir -p /scratch
    mount -t ext4 -o noatime,discard /dev/vdc /scratch || echo "lab: no scratch disk"
    for d in /var/lib/nacelle /var/lib/nacelle-stories; do
        mkdir -p "$d" "/scratch/${d##*/}"
        mount --bind "/scratch/${d##*/}" "$d"
    done
}

# systemd makes a host of its own.
[ $$ = 1 ] && host
tar -xf /dev/vdb -C / || echo "lab: the files could not be unpacked"
[ -e /nacelle/lab/env ] && . /nacelle/lab/env
mkdir -p /nacelle/here
cd /nacelle/here || exit 1
echo ready >&9
while sleep 5; do echo alive >&9; done &

if [ -e /nacelle/lab/shell ]; then
    setsid -c bash -l </dev/hvc0 >/dev/hvc0 2>&1
    status=$?
else
    # Through pipes, since a port can be opened only once and programs reopen /dev/stdout.
    mkfifo /run/lab.out /run/lab.err
    cat </run/lab.out >"$(port stdout)" &
    out=$!
    cat </run/lab.err >"$(port stderr)" &
    err=$!
    bash /nacelle/lab/command </dev/null >/run/lab.out 2>/run/lab.err 9>&-
    status=$?
    # A daemon left behind keeps the pipes open: what it printed so far is out after a moment.
    for _ in $(seq 100); do
        kill -0 $out 2>/dev/null || kill -0 $err 2>/dev/null || break
        sleep 0.02
    done
fi

n=0
while read -r path; do
    if [ -e "$path" ]; then
        if [ -d "$path" ]; then tar -C "$path" -cf "$(port "out$n")" .
        else tar -C "$(dirname "$path")" -cf "$(port "out$n")" "$(basename "$path")"; fi
    else
        echo "missing $n" >&9
    fi
    n=$((n + 1))
done </nacelle/lab/outputs

echo "exit $status" >&9
/lab/busybox poweroff -f
sleep 10
