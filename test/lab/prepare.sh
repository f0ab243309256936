#!/usr/bin/env bash
# Fills the folder $1 with what boot.sh starts: the distribution's ordinary
# kernel with its modules, and an initrd that makes this machine's own root, read
# only over 9p below an overlay in memory, the lab's root. So the lab has every
# program that this machine has, and nothing is installed twice.
# Debian only; needs busybox-static, kmod and dpkg.
set -euo pipefail
mkdir -p "$1"
cd "$1"

package=$(apt-cache depends --important linux-image-amd64 | awk '$1 == "Depends:" && $2 ~ /^linux-image-/ { print $2; exit }')
version=${package#linux-image-}
if [ ! -e "kernel-$version/done" ]; then
	rm -rf kernel-*
	mkdir "kernel-$version"
	(
		cd "kernel-$version"
		apt-get -qq -o APT::Sandbox::User=root download "$package"
		dpkg-deb -x "$package"_*.deb .
		rm "$package"_*.deb
		depmod -b . "$version"
		touch done
	)
fi
ln -sfn "kernel-$version" kernel
ln -sfn "boot/vmlinuz-$version" kernel/vmlinuz

rm -rf initrd
mkdir -p initrd/{bin,dev,proc,sys,low,mem,job,new,modules}
cp "$(command -v busybox)" initrd/bin/
for m in $(for x in virtio_pci 9pnet_virtio 9p overlay; do
	modprobe -d kernel -S "$version" --show-depends "$x"
done | awk '$1 == "insmod" && !seen[$2]++ { print $2 }'); do
	cp "$m" initrd/modules/
	basename "$m" >>initrd/modules/order
done
cat >initrd/init <<'INIT'
#!/bin/busybox sh
B=/bin/busybox
$B mount -t proc none /proc; $B mount -t sysfs none /sys; $B mount -t devtmpfs none /dev
for m in $($B cat /modules/order); do $B insmod "/modules/$m"; done
O=trans=virtio,version=9p2000.L,msize=512000
$B mount -t 9p -o "ro,cache=loose,$O" root /low || exec $B poweroff -f
$B mount -t tmpfs -o size=90% mem /mem; $B mkdir -p /mem/up /mem/work
$B mount -t overlay -o lowerdir=/low,upperdir=/mem/up,workdir=/mem/work overlay /new
$B mount -t 9p -o "rw,cache=none,$O" job /job
$B mkdir -p /new/lib/modules /new/job /new/lab
$B mount -t 9p -o "ro,cache=loose,$O" kernel /new/lab
for d in dev proc sys job; do $B mount --move /$d /new/$d; done
exec $B switch_root /new /job/init
INIT
chmod +x initrd/init
(cd initrd && find . | busybox cpio -o -H newc 2>/dev/null) >initrd.cpio
