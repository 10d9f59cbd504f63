#!/run/with-kvm/busybox sh
# shellcheck shell=dash
# The init of the outer machine: from the bare kernel to a copy of the host's file tree with KVM in it.
#
#   host's /          ── 9p, read-only ──▶ lower ┐
#   scratch disk      ── ext4 ──▶ upper ─────────┴▶ overlay = the new /    (writes are thrown away with the disk)
#                                 tmp ────────────▶ /run/with-kvm/tmp      ($TMPDIR: a real filesystem on a real disk)
#   host's target/    ── 9p, writable ───────────▶ the same path           (what is written there stays)
#
# scripts/with-kvm puts busybox, relay, this file, modules/ with modules.order, and job/ into /run/with-kvm.
# A command that fails here ends the init and so panics the kernel, which scripts/with-kvm reports with the console.
set -eu
here=/run/with-kvm

if [ "$$" = 1 ] && [ ! -e "$here/up" ]; then
    # First life: on the initramfs. 9p is told to cache everything it can: nobody changes the tree while we look at it,
    # and target/ is written back in full before the exit status goes out.
    "$here/busybox" --install -s /bin
    export PATH=/bin
    mkdir -p /proc /sys /dev /lower /scratch /root
    mount -t proc proc /proc
    mount -t sysfs sysfs /sys
    mount -t devtmpfs devtmpfs /dev
    while read -r module options; do
        # shellcheck disable=SC2086 # options are words
        insmod "$here/modules/$module" $options
    done <"$here/modules/order"

    mount_9p() { mount -t 9p -o "trans=virtio,version=9p2000.L,msize=512000,$3" "$1" "$2"; }
    mount_9p root /lower ro,cache=loose
    mount -t ext4 -o noatime,discard /dev/vda /scratch
    mkdir /scratch/upper /scratch/work /scratch/tmp
    mount -t overlay -o lowerdir=/lower,upperdir=/scratch/upper,workdir=/scratch/work overlay /root

    mount -t tmpfs -o mode=755 run /root/run
    cp -a "$here" /root/run/
    : >/root/run/with-kvm/up
    mkdir -m 1777 /root/run/with-kvm/tmp /root/run/lock
    mount -o bind /scratch/tmp /root/run/with-kvm/tmp
    chmod 1777 /root/run/with-kvm/tmp
    mount_9p target "/root$(cat "$here/job/target")" rw,cache=loose
    for there in proc sys dev; do
        mkdir -p "/root/$there"
        mount -o move "/$there" "/root/$there"
    done
    exec switch_root /root "$here/busybox" sh "$here/init.sh"
fi

# Second life: on the new root.
export PATH=/usr/sbin:/usr/bin:/sbin:/bin
busybox="$here/busybox"
mkdir -p /dev/pts /dev/shm
for link in fd: stdin:/0 stdout:/1 stderr:/2; do
    ln -sfn "/proc/self/fd${link#*:}" "/dev/${link%%:*}"
done
"$busybox" mount -t devpts -o mode=620,ptmxmode=666,gid=5 devpts /dev/pts
"$busybox" mount -t tmpfs -o mode=1777 shm /dev/shm
"$busybox" mount -t cgroup2 cgroup2 /sys/fs/cgroup
mkdir /sys/fs/cgroup/command
mkdir -p /lib/modules # for modprobe
"$busybox" mount -o bind "$(cat "$here/job/target")/with-kvm/linux/lib/modules" /lib/modules
chmod 0666 /dev/kvm
# What is written to target/ goes out within seconds, so that little is lost if the machine is ended from outside.
echo 200 >/proc/sys/vm/dirty_expire_centisecs
echo 100 >/proc/sys/vm/dirty_writeback_centisecs
"$busybox" ip link set lo up
"$busybox" hostname with-kvm

# A run-time directory of the user, where the environment names one: /run is empty here.
read -r directory <"$here/job/xdg-runtime-dir" || true
if [ -n "$directory" ] && [ ! -e "$directory" ]; then
    read -r uid gid _ <"$here/job/ids"
    mkdir -p "$directory"
    chmod 700 "$directory"
    chown "$uid:$gid" "$directory"
fi

# This shell stays behind as process 1 and reaps; the host ends the machine when it has the exit status.
"$here/relay" guest /dev/vport0p1 "$here/job" &
while :; do
    wait
    "$busybox" sleep 1
done
