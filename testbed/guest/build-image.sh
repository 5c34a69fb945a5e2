#!/bin/sh
# Builds the lab's guest from Debian packages:
#   OUT/vmlinuz     Debian's cloud kernel
#   OUT/initrd      busybox, the virtio modules and the load program; by itself it is the small guest
#   OUT/disk.img    ext4 with a minimal Debian and redis
# Usage: build-image.sh RECIPE_DIR GUESTLOAD OUT
# Needs root, mmdebstrap, mke2fs and the network of the machine's own apt sources.
set -eu
recipe=$1 guestload=$2 out=$3
root=$out/rootfs
packages=linux-image-cloud-amd64,busybox-static,redis-server,iproute2,iputils-ping,iputils-arping

# The mirror that this machine itself uses for bookworm, so that a local mirror is honoured.
sources() {
    apt-get indextargets --format '$(REPO_URI) $(CODENAME)' 'Created-By: Packages' | sort -u |
        while read -r uri codename; do
            case $codename in bookworm | bookworm-updates | bookworm-security) ;; *) continue ;; esac
            echo "deb [signed-by=/usr/share/keyrings/debian-archive-keyring.gpg] $uri $codename main"
        done
}

# INITRD=No: the kernel package would else build a large initrd of its own.
sources >"$out/sources.list"
[ -s "$out/sources.list" ] || echo 'deb http://deb.debian.org/debian bookworm main' >"$out/sources.list"
INITRD=No mmdebstrap --quiet --mode=root --variant=minbase --include="$packages" \
    --dpkgopt='path-exclude=/usr/share/man/*' --dpkgopt='path-exclude=/usr/share/doc/*' \
    --dpkgopt='path-exclude=/usr/share/locale/*' --dpkgopt='path-exclude=/usr/share/info/*' \
    bookworm "$root" "$out/sources.list"

release=$(ls "$root/lib/modules")
cp "$root/boot/vmlinuz-$release" "$out/vmlinuz"

# The order is the order of loading: virtio_ring comes before virtio, which needs its symbols.
modules='failover net_failover virtio_ring virtio virtio_pci_legacy_dev virtio_pci_modern_dev
    virtio_pci virtio_blk virtio_net overlay'
initrd=$out/initrd.d
mkdir -p "$initrd/bin" "$initrd/modules" "$initrd/dev" "$initrd/proc" "$initrd/sys" "$initrd/root"
for module in $modules; do
    path=$(find "$root/lib/modules/$release/kernel" -name "$module.ko" | head -n 1)
    # A module that this kernel has built in has no file, and needs none.
    [ -z "$path" ] || { cp "$path" "$initrd/modules/"; echo "$module" >>"$initrd/modules/order"; }
done
cp "$root/bin/busybox" "$initrd/bin/busybox"
install -m 755 "$guestload" "$initrd/bin/guestload"
install -m 755 "$recipe/init" "$initrd/init"
install -m 755 "$recipe/service" "$initrd/bin/lab-service"
(cd "$initrd" && find . | sort | busybox cpio -o -H newc -R 0:0) >"$out/initrd" 2>/dev/null

rm -rf "$root/boot" "$root"/var/cache/apt/* "$root"/var/lib/apt/lists/*
mkdir -p "$root/boot"
install -m 755 "$guestload" "$root/usr/local/bin/guestload"
install -m 755 "$recipe/service" "$root/usr/local/bin/lab-service"
install -m 755 "$recipe/use" "$root/usr/local/bin/lab-use"
# mke2fs copies a folder into a file system without a loop device.
rm -f "$out/disk.img"
mke2fs -q -t ext4 -L labroot -d "$root" "$out/disk.img" 1024M
rm -rf "$root" "$initrd" "$out/sources.list"
