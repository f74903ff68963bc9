#!/bin/busybox sh
# First program of the lab's outer machine: loads what the root disk needs, then hands over.
/bin/busybox --install -s /bin
mount -t proc proc /proc
mount -t sysfs sys /sys
mount -t devtmpfs dev /dev
for m in $(cat /modules.order); do insmod "$m" || echo "lab: insmod $m failed"; done
# The PCI probe of a disk is asynchronous.
i=0
while [ ! -b /dev/vda ] && [ $i -lt 100 ]; do sleep 0.05; i=$((i + 1)); done
mount -t ext4 -o rw,noatime /dev/vda /root || { echo "lab: no root disk"; poweroff -f; }
mount --move /dev /root/dev
mount --move /sys /root/sys
mount --move /proc /root/proc
mkdir -p /root/lab
cp /lab-init /root/lab/init
cp /bin/busybox /root/lab/busybox
init=/lab/init
# There, a unit of systemd starts /lab/init.
grep -q lab.systemd /root/proc/cmdline && init=/lib/systemd/systemd
exec switch_root /root $init
