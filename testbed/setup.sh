#!/bin/sh
# Installs what building and the lab need on a bare Debian 12, and says what it does.
# Run as root. Does nothing, and asks no server, when everything is there.
#
#   from Debian 12            a C compiler, iproute2, iputils-ping, ethtool, iperf3, mmdebstrap,
#                             e2fsprogs, busybox-static, ovmf, openssh-server (not started), ...
#   from bookworm-backports   QEMU 10; the source is a file of its own that pins nothing else:
#                             /etc/apt/sources.list.d/scaleaway-backports.list
#   from Debian 12            rustc-web, cargo-web, rustfmt-web, only where no cargo of 1.88 or later is found
set -eu

packages='build-essential pkg-config iproute2 iputils-ping ethtool iperf3 mmdebstrap e2fsprogs
    busybox-static ovmf zstd util-linux procps openssh-client openssh-server ca-certificates
    debian-archive-keyring'
backports_list=/etc/apt/sources.list.d/scaleaway-backports.list
rust_min_minor=88
qemu_min=10

say() {
    printf 'setup: %s\n' "$*"
}

missing_packages() {
    for package in $packages; do
        state=$(dpkg-query -W -f '${db:Status-Status}' "$package" 2>/dev/null || true)
        [ "$state" = installed ] || printf '%s ' "$package"
    done
}

has_qemu() {
    command -v qemu-system-x86_64 >/dev/null || return 1
    command -v qemu-img >/dev/null || return 1
    major=$(qemu-system-x86_64 --version | sed -n 's/^QEMU emulator version \([0-9]*\)\..*/\1/p')
    [ "${major:-0}" -ge $qemu_min ]
}

has_rust() {
    command -v cargo >/dev/null && command -v rustc >/dev/null || return 1
    minor=$(rustc --version | sed -n 's/^rustc 1\.\([0-9]*\)\..*/\1/p')
    [ "${minor:-0}" -ge $rust_min_minor ]
}

update() {
    say 'apt-get update'
    apt-get -q=2 update
}

# openssh-server must not start a daemon on a machine that had none: the lab runs its own.
install() {
    say "installing: $*"
    policy=/usr/sbin/policy-rc.d
    if [ -e $policy ]; then
        DEBIAN_FRONTEND=noninteractive apt-get -q=2 -y --no-install-recommends install "$@" >/dev/null
        return
    fi
    printf '#!/bin/sh\nexit 101\n' >$policy
    chmod 755 $policy
    result=0
    DEBIAN_FRONTEND=noninteractive apt-get -q=2 -y --no-install-recommends install "$@" \
        >/dev/null || result=$?
    rm -f $policy
    return $result
}

# The mirror that this machine uses for bookworm, so that a local mirror is honoured.
add_backports() {
    known=$(apt-get indextargets --format '$(CODENAME)' 'Created-By: Packages' | sort -u)
    case "$known" in *bookworm-backports*) return ;; esac
    mirror=$(apt-get indextargets --format '$(REPO_URI) $(CODENAME)' 'Created-By: Packages' |
        sed -n 's/ bookworm$//p' | head -n 1)
    mirror=${mirror:-http://deb.debian.org/debian/}
    keyring=/usr/share/keyrings/debian-archive-keyring.gpg
    say "adding bookworm-backports from $mirror in $backports_list"
    printf 'deb [signed-by=%s] %s bookworm-backports main\n' $keyring "$mirror" >$backports_list
}

missing=$(missing_packages)
if [ -z "$missing" ] && has_qemu && has_rust; then
    say 'everything is there'
    exit 0
fi
if [ "$(id -u)" != 0 ]; then
    say 'something is missing and only root can install it: run this as root' >&2
    exit 1
fi
has_qemu || add_backports
update
# shellcheck disable=SC2086  # a list of words
[ -z "$missing" ] || install $missing
if ! has_qemu; then
    install -t bookworm-backports qemu-system-x86 qemu-utils
fi
if ! has_rust; then
    # Debian keeps these new for its browsers, in the security archive: 1.96 when this was written.
    install rustc-web cargo-web rustfmt-web
fi
has_qemu || { say 'QEMU 10 is still missing' >&2; exit 1; }
has_rust || { say "cargo 1.$rust_min_minor is still missing" >&2; exit 1; }
say 'done'
