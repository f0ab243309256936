#!/bin/bash
# The lab's init: makes of it a machine like a user's, runs the lines of the file
# "run", each with its output in out.1, out.2 and so on and its exit code in code.1,
# code.2 and so on, and powers off.
export PATH=/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin HOME=/root TERM=dumb
mount -t tmpfs run /run
mkdir -p /dev/pts /dev/shm /run/lock
mount -t devpts devpts /dev/pts
mount -t tmpfs shm /dev/shm
mount -t cgroup2 cgroup2 /sys/fs/cgroup
rm -rf "/lib/modules/$(uname -r)"
ln -s "/lab/lib/modules/$(uname -r)" "/lib/modules/$(uname -r)"
for m in kvm_amd virtio_blk ext4 tun veth bridge nf_tables nft_masq nft_nat nft_ct nft_chain_nat loop dm_snapshot nbd vhost_net fuse; do
	modprobe "$m" || echo "lab: no module $m"
done
# Agents ask apt when they start. Without its cache that takes half a minute here.
printf 'Dir::Cache::pkgcache "pkgcache.bin";\nDir::Cache::srcpkgcache "srcpkgcache.bin";\n' >/etc/apt/apt.conf.d/zz-lab
apt-cache gencaches >/dev/null
ip link set lo up
mkdir -p /disk
mount /dev/vda /disk
mkdir -p /disk/tmp
export TMPDIR=/disk/tmp WRENN_TEST_CACHE=/disk
set -a
. /job/env
set +a
echo "lab: $(ls -l /dev/kvm 2>&1), up for $(cut -d' ' -f1 /proc/uptime) s"
n=0
while read -r line; do
	n=$((n + 1))
	echo "lab: begin $line"
	(eval "$line") </dev/null >/job/out.$n 2>&1
	code=$?
	echo $code >/job/code.$n
	echo "lab: end with $code"
done </job/run
sync
touch /job/done
poweroff -f
