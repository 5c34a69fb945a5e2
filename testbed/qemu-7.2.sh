#!/bin/sh
# Unpacks Debian 12's own QEMU 7.2 into DIR, beside whatever QEMU is installed, and prints the path
# of a wrapper that runs it:  qemu=$(testbed/qemu-7.2.sh [DIR])
#
# Nothing is installed: packages are downloaded from the suite "bookworm" and unpacked, and so is
# every library that they need and that this machine lacks. A second run finds DIR complete and
# only prints the path. DIR defaults to ~/.cache/scaleaway/qemu-7.2.
set -eu

dir=${1:-${XDG_CACHE_HOME:-$HOME/.cache}/scaleaway/qemu-7.2}
mkdir -p "$dir"
dir=$(cd "$dir" && pwd)
wrapper=$dir/qemu-system-x86_64
if [ -x "$wrapper" ]; then
    echo "$wrapper"
    exit 0
fi

say() { echo "qemu-7.2: $*" >&2; }

# Packages whose files are used from DIR even when another version of them is installed.
own="qemu-system-x86 qemu-system-common qemu-system-data qemu-utils seabios ipxe-qemu"

debs=$dir/debs
root=$dir/root
rm -rf "$root"
mkdir -p "$debs/partial" "$root"
cd "$debs"

fetch() { # package [suite]
    ls "$1"_*.deb >/dev/null 2>&1 && return 0
    say "downloading $1"
    apt-get -q -o APT::Sandbox::User=root download "$1${2:+/$2}" >&2
}

for package in $own; do
    fetch "$package" bookworm
    dpkg-deb -x "$package"_*.deb "$root"
done

# Libraries: the dependencies of what was unpacked, and theirs, as far as they are not installed.
installed() { dpkg-query -W -f '${Status}' "$1" 2>/dev/null | grep -q ' installed$'; }
depends() { # FILE.deb -> names, first alternative only, no versions
    dpkg-deb -f "$1" Depends Pre-Depends | sed 's/^[A-Za-z-]*: //' | tr ',' '\n' |
        sed 's/|.*//; s/(.*//; s/:any//; s/[[:space:]]//g' | sed '/^$/d'
}
todo=$(for package in $own; do depends "$package"_*.deb; done | sort -u)
seen=" $own "
while [ -n "$todo" ]; do
    next=
    for package in $todo; do
        case $seen in *" $package "*) continue ;; esac
        seen="$seen$package "
        if installed "$package"; then continue; fi
        # A virtual package has no file of its own; what provides it is installed or not needed.
        fetch "$package" || { say "no file for $package, left out"; continue; }
        dpkg-deb -x "$package"_*.deb "$root"
        next="$next $(depends "$package"_*.deb)"
    done
    todo=$next
done

libraries=$root/usr/lib/x86_64-linux-gnu
cat >"$wrapper.new" <<END
#!/bin/sh
# Debian 12's QEMU 7.2, unpacked by testbed/qemu-7.2.sh.
export LD_LIBRARY_PATH=$libraries:$root/lib/x86_64-linux-gnu:$libraries/pulseaudio
export QEMU_MODULE_DIR=$libraries/qemu
exec $root/usr/bin/qemu-system-x86_64 -L $root/usr/share/qemu -L $root/usr/share/seabios \\
    -L $root/usr/lib/ipxe/qemu "\$@"
END
chmod +x "$wrapper.new"
version=$("$wrapper.new" -version | head -n 1) || { say "the unpacked QEMU does not start"; exit 1; }
case $version in *" 7.2."*) ;; *) say "not QEMU 7.2: $version"; exit 1 ;; esac
say "$version"
mv "$wrapper.new" "$wrapper"
echo "$wrapper"
