#!/usr/bin/env bash
# Boots the lab that prepare.sh made in the folder $1, which has a real /dev/kvm:
# QEMU emulates a processor with AMD's SVM. It runs $1/job/init and powers off.
# $2 is its memory in MiB.
set -euo pipefail
cd "$1"
khz=$(awk -F: '/cpu MHz/ { printf "%d", $2 * 1000; exit }' /proc/cpuinfo)
# Without tsc_early_khz the lab's clock may run several times too fast. QEMU ends
# with the process that waits for it.
exec setpriv --pdeathsig KILL qemu-system-x86_64 -M q35 -cpu max -smp 2 -m "$2M" -accel tcg,thread=multi \
	-nodefaults -no-user-config -display none -no-reboot \
	-kernel kernel/vmlinuz -initrd initrd.cpio -serial stdio \
	-append "console=ttyS0 panic=-1 mitigations=off tsc=reliable random.trust_cpu=on nokaslr quiet tsc_early_khz=$khz" \
	-virtfs local,path=/,mount_tag=root,security_model=none,readonly=on,multidevs=remap \
	-virtfs local,path="$PWD/kernel",mount_tag=kernel,security_model=none,readonly=on,multidevs=remap \
	-virtfs local,path="$PWD/job",mount_tag=job,security_model=none \
	-drive file=disk.img,if=virtio,format=raw,cache=unsafe \
	-device virtio-rng-pci
