#!/bin/bash
# The life of the Debian packages on a bare Debian 12 with systemd: installation, restart, upgrade with
# pods that run, refused removal, removal, purge. `cargo xtask package-test` runs it in the lab, with
# packages of two versions in old/ and new/, and an OCI layout in busybox/. It ends at the first failure.
set -euo pipefail
cd "$(dirname "$0")"
export DEBIAN_FRONTEND=noninteractive
image=example.test/busybox:1

passed=0
ok() { passed=$((passed + 1)); echo "ok $SECONDS s: $*"; }
fail() {
    echo "FAILED: $*"
    systemctl status nacelled --no-pager --lines 0 || true
    journalctl -u nacelled --no-pager -n 40 || true
    exit 1
}
trap 'fail "line $LINENO: $BASH_COMMAND"' ERR

equal() { [ "$2" = "$3" ] || fail "$1: '$2', not '$3'"; }
property() { systemctl show nacelled --property "$1" --value; }
# The guest's boot id: another one if the pod was started anew.
boot_id() { nacelle exec "$1" cat /proc/sys/kernel/random/boot_id; }
# Of a process that may have ended.
command_line() { { tr '\0' ' ' <"$1/cmdline"; } 2>/dev/null || true; }
install() { apt-get install -y "$@" >/tmp/apt.log 2>&1 || { cat /tmp/apt.log; fail "apt-get install $*"; }; }
# Everything on this host that is named after nacelle, outside of the test's own files and of logs.
named() {
    find / -xdev \( -path /nacelle -o -path /proc -o -path /var/log -o -path /tmp -o -path /var/cache/apt \) -prune \
        -o -name '*nacelle*' -print
    find /run /sys/fs/cgroup -name '*nacelle*' 2>/dev/null
    grep nacelle /proc/self/mountinfo || true
    ip -o link | grep nacelle || true
    ls /run/netns 2>/dev/null || true
    iptables-save 2>/dev/null | grep nacelle || true
    for process in /proc/[0-9]*; do
        case "$(command_line "$process")" in
        *nacelle-vmm* | *nacelle-fs* | *nacelled*) echo "process $process" ;;
        esac
    done
}

# --- installation
equal "names before" "$(named)" ""
udevadm settle
[ -e /dev/kvm ] || modprobe kvm-amd
[ -e /dev/kvm ] || fail "this machine has no /dev/kvm"
install ./old/*.deb
ok "apt installs the packages and their dependencies: $(dpkg-query -W -f '${Package} ${Version} ' 'nacelle*')"
equal "ActiveState" "$(property ActiveState)" active
equal "Type" "$(property Type)" notify
equal "UnitFileState" "$(property UnitFileState)" enabled
systemctl status nacelled --no-pager --lines 0
journalctl -u nacelled --no-pager | grep -q 'nacelled is ready' || fail "the journal has no 'nacelled is ready'"
ok "nacelled is enabled, and active after READY=1; its log is in the journal"

equal "mode of the state directory" "$(stat -c '%a %U %G' /run/nacelle)" "711 root root"
equal "mode of the socket" "$(stat -c '%a %U %G' /run/nacelle/nacelled.sock)" "660 root root"
if setpriv --reuid=65534 --regid=65534 --clear-groups nacelle pods >/tmp/nobody.log 2>&1; then
    fail "nobody may use the socket"
fi
grep -q 'ermission denied' /tmp/nobody.log || fail "the error of nobody: $(cat /tmp/nobody.log)"
ok "only root may use the socket"
equal "oom_score_adj" "$(cat "/proc/$(property MainPID)/oom_score_adj")" -999

nacelled config check | grep -q 'is valid'
bash -c '. /usr/share/bash-completion/completions/nacelle && complete -p nacelle' >/dev/null
for page in nacelle nacelle-run nacelled; do gzip -t "/usr/share/man/man1/$page.1.gz"; done
[ -s /usr/share/zsh/site-functions/_nacelle ] && [ -s /usr/share/fish/vendor_completions.d/nacelle.fish ]
[ -s /usr/share/doc/nacelle/copyright ] && [ -s /usr/share/doc/nacelle/docs/install.md ]
ok "configuration, completions, man pages and documents are there"
nacelle check || echo "(nacelle check: exit code $?)"

# --- a pod
nacelle import --name $image busybox
nacelle run -d --name one $image sleep 1000000
equal "output of a second pod" "$(nacelle run --rm $image echo hello)" hello
boot=$(boot_id one)
vmm=
for process in /proc/[0-9]*; do
    case "$(command_line "$process")" in
    *nacelle-vmm*) vmm=$process ;;
    esac
done
[ -n "$vmm" ] || fail "there is no process nacelle-vmm"
[ "$(cat "$vmm/oom_score_adj")" -gt -999 ] || fail "the VMM has the daemon's oom_score_adj"
ok "pods run: $(nacelle ps | tail -n 1)"

# --- the shim
install containerd
systemctl start containerd
tar -C busybox -cf /tmp/busybox.tar .
ctr image import --index-name $image /tmp/busybox.tar >/dev/null
ctr run -d --runtime io.containerd.nacelle.v2 $image two sleep 1000000
equal "exec in a task of containerd" "$(ctr task exec --exec-id e two echo hello)" hello
ok "containerd runs a task with the shim of the package nacelle-containerd"

# --- restart, crash, system calls that the unit forbids
pid=$(property MainPID)
systemctl restart nacelled
[ "$(property MainPID)" != "$pid" ] || fail "the daemon was not restarted"
equal "boot id after a restart" "$(boot_id one)" "$boot"
ok "the pod runs on through 'systemctl restart nacelled'"
kill -KILL "$(property MainPID)"
for _ in $(seq 100); do
    nacelle pods >/dev/null 2>&1 && break
    sleep 0.3
done
equal "boot id after kill -9" "$(boot_id one)" "$boot"
ok "systemd starts a killed nacelled again, and the pod runs on"
systemctl stop nacelled
sleep 1
[ -d "$vmm" ] || fail "the VMM ended with the daemon"
systemctl start nacelled
equal "boot id after stop and start" "$(boot_id one)" "$boot"
ok "the pod runs on while nacelled is stopped"

mkdir -p /etc/systemd/system/nacelled.service.d
cat >/etc/systemd/system/nacelled.service.d/no-host-pods.conf <<END
[Service]
MemoryDenyWriteExecute=yes
RestrictRealtime=yes
END
systemctl daemon-reload
systemctl restart nacelled
mkdir /tmp/volume
nacelle run --rm -v /tmp/volume:/v $image sh -c 'echo written >/v/file; chmod 6755 /v/file'
equal "a file on a volume" "$(stat -c %a /tmp/volume/file) $(cat /tmp/volume/file)" "6755 written"
rm -r /etc/systemd/system/nacelled.service.d /tmp/volume
systemctl daemon-reload
systemctl restart nacelled
equal "boot id after the drop-in" "$(boot_id one)" "$boot"
ok "pods with volumes start with the drop-in of docs/install.md, too"

# --- upgrade
sed -i 's/^#level = "info"/level = "info,sandbox=debug"/' /etc/nacelle/config.toml
grep -q '^level' /etc/nacelle/config.toml
pid=$(property MainPID)
install ./new/*.deb
[ "$(property MainPID)" != "$pid" ] || fail "the daemon was not restarted by the upgrade"
equal "ActiveState after the upgrade" "$(property ActiveState)" active
equal "boot id after the upgrade" "$(boot_id one)" "$boot"
grep -q '^level' /etc/nacelle/config.toml || fail "the upgrade has replaced the changed configuration"
equal "output of a new pod" "$(nacelle run --rm $image echo new)" new
equal "exec in the task after the upgrade" "$(ctr task exec --exec-id u two echo hello)" hello
ok "an upgrade to $(dpkg-query -W -f '${Version}' nacelle) restarts nacelled, the pod and the task run on, the configuration is kept"

echo 'unknown_setting = 1' >>/etc/nacelle/config.toml
pid=$(property MainPID)
install --reinstall ./new/nacelle_*.deb
grep -q 'refuses its configuration' /tmp/apt.log || fail "no word about the refused configuration: $(cat /tmp/apt.log)"
equal "MainPID with a refused configuration" "$(property MainPID)" "$pid"
sed -i '/unknown_setting/d' /etc/nacelle/config.toml
ok "nacelled is not restarted with a configuration that it would refuse"

systemctl disable --now nacelled
install --reinstall ./new/nacelle_*.deb
equal "ActiveState of a disabled daemon after an upgrade" "$(property ActiveState)" inactive
equal "UnitFileState of a disabled daemon after an upgrade" "$(property UnitFileState)" disabled
systemctl enable --now nacelled
equal "boot id" "$(boot_id one)" "$boot"
ok "an upgrade does not start a disabled daemon"

# --- removal of the shim
if apt-get remove -y nacelle-containerd >/tmp/apt.log 2>&1; then fail "the shim was removed below a pod"; fi
grep -q 'remove these pods first' /tmp/apt.log || fail "the reason is missing: $(cat /tmp/apt.log)"
equal "state of the package" "$(dpkg-query -W -f '${db:Status-Status}' nacelle-containerd)" installed
equal "exec after the refused removal" "$(ctr task exec --exec-id f two echo hello)" hello
ok "nacelle-containerd is not removed while a task runs"
ctr task kill --signal KILL two
for _ in $(seq 100); do
    ctr task delete two >/dev/null 2>&1 && break
    sleep 0.3
done
ctr containers delete two
apt-get purge -y nacelle-containerd containerd runc >/tmp/apt.log 2>&1 || fail "$(cat /tmp/apt.log)"
ok "nacelle-containerd is removed after its tasks"

# --- removal
pid=$(property MainPID)
if apt-get remove -y nacelle >/tmp/apt.log 2>&1; then fail "nacelle was removed below a pod"; fi
grep -q 'nacelle rm -f' /tmp/apt.log || fail "the advice is missing: $(cat /tmp/apt.log)"
equal "state of the package" "$(dpkg-query -W -f '${db:Status-Status}' nacelle)" installed
equal "MainPID after the refused removal" "$(property MainPID)" "$pid"
equal "boot id after the refused removal" "$(boot_id one)" "$boot"
ok "nacelle is not removed while a pod runs: $(grep 'nacelle rm -f' /tmp/apt.log)"

# An exited pod, whose record and network are left to the removal.
nacelle stop -t 1 one
[ -n "$(ls /var/lib/nacelle/pods)" ] || fail "the stopped pod has no record"
apt-get remove -y nacelle >/tmp/apt.log 2>&1 || fail "$(cat /tmp/apt.log)"
equal "unit after the removal" "$(systemctl is-active nacelled || true)" inactive
equal "network namespaces" "$(ls /run/netns)" ""
[ ! -e /run/nacelle ] && [ ! -e /usr/lib/nacelle ] && [ ! -e /sys/fs/cgroup/nacelle ]
[ -z "$(ls /var/lib/nacelle/pods)" ] || fail "records of pods are left"
[ -e /etc/nacelle/config.toml ] && [ -d /var/lib/nacelle ]
ok "a removal ends the daemon, and leaves configuration and images"

install ./new/nacelle_*.deb
equal "ActiveState after another installation" "$(property ActiveState)" active
nacelle images | grep -q example.test/busybox || fail "the image is not there any more"
equal "output" "$(nacelle run --rm $image echo again)" again
ok "another installation finds them"
apt-get purge -y nacelle >/tmp/apt.log 2>&1 || fail "$(cat /tmp/apt.log)"
equal "names after the purge" "$(named)" ""
ok "a purge leaves nothing: no files, cgroups, mounts, interfaces, namespaces, rules, processes"

# --- a host without KVM
mv /dev/kvm /dev/kvm.hidden
install ./new/nacelle_*.deb
grep -q 'no /dev/kvm' /tmp/apt.log || fail "no word about KVM: $(cat /tmp/apt.log)"
equal "ActiveState without KVM" "$(property ActiveState)" inactive
equal "UnitFileState without KVM" "$(property UnitFileState)" enabled
mv /dev/kvm.hidden /dev/kvm
ok "without /dev/kvm the daemon is enabled and not started, and the installation says so"
apt-get purge -y nacelle >/tmp/apt.log 2>&1 || fail "$(cat /tmp/apt.log)"
equal "names after the purge" "$(named)" ""

echo "test result: ok. $passed passed; 0 failed"
