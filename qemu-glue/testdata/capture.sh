#!/bin/bash
# Makes the golden migration streams in streams/: small real ones of QEMU 10.0.2 and 7.2.
#
#   capture.sh [OUTPUT_DIR]
#
# Environment: QEMU (default qemu-system-x86_64) and QEMU_72 (default: what testbed/qemu-7.2.sh
# unpacks) name the two binaries. Needs socat and zstd. Guests run under TCG, without a system,
# with no network and no display; nothing outside a temporary directory is touched.
set -euo pipefail

here=$(cd "$(dirname "$0")" && pwd)
output=${1:-$here/streams}
qemu_10=${QEMU:-qemu-system-x86_64}
qemu_72=${QEMU_72:-$("$here/../../testbed/qemu-7.2.sh")}
work=$(mktemp -d)
qemu_pid='' reader_pid=''
stop_children() {
    for pid in $qemu_pid $reader_pid; do kill "$pid" 2>/dev/null || true; done
}
trap 'stop_children; rm -rf "$work"' EXIT
mkdir -p "$output"

# A boot sector that counts in memory for ever. Pages 0x20-0x27 change everywhere between two
# passes, so that passes take time; 0x28-0x2f change in a few bytes, so that deltas are sent:
#      mov ax,0x2000; mov ds,ax; xor bx,bx; xor di,di; xor cx,cx
#   l: inc byte [bx]; add bx,0x1001; and bh,0x7f; dec cx; jnz l
#      inc byte [di+0x8000]; add di,0x1001; and di,0x7fff; in al,0x92; xor al,2; out 0x92,al; jmp l
# The switch of the A20 line flushes TCG's TLB: QEMU before 9.0 does not notice writes to a page
# whose TLB entry was writable before the dirty log was cleared (see README.md).
boot=$work/boot.img
printf '\xb8\x00\x20\x8e\xd8\x31\xdb\x31\xff\x31\xc9' >"$boot"
printf '\xfe\x07\x81\xc3\x01\x10\x80\xe7\x7f\x49\x75\xf4' >>"$boot"
printf '\xfe\x85\x00\x80\x81\xc7\x01\x10\x81\xe7\xff\x7f\xe4\x92\x34\x02\xe6\x92\xeb\xe0' >>"$boot"
truncate -s 510 "$boot"
printf '\x55\xaa' >>"$boot"
truncate -s 1440K "$boot"

start_qemu() { # binary arguments...
    local binary=$1
    shift
    coproc MONITOR { exec "$binary" -accel tcg -display none -serial none -parallel none \
        -nodefaults -no-user-config -m 16 -qmp stdio "$@" 2>"$work/qemu.err"; }
    qemu_pid=$MONITOR_PID
    exec 3<&"${MONITOR[0]}" 4>&"${MONITOR[1]}"
    qmp '{"execute":"qmp_capabilities"}'
}

qmp() { # one command; its answer ends in $answer
    echo "$1" >&4
    while IFS= read -r -t 20 answer <&3; do
        case $answer in
        *'"return"'*) return 0 ;;
        *'"error"'*) echo "capture: $1: $answer" >&2; return 1 ;;
        esac
    done
    echo "capture: no answer to $1: $(cat "$work/qemu.err")" >&2
    return 1
}

capabilities() { # name...
    local list='' name
    for name in "$@"; do list="$list${list:+,}{\"capability\":\"$name\",\"state\":true}"; done
    qmp "{\"execute\":\"migrate-set-capabilities\",\"arguments\":{\"capabilities\":[$list]}}"
}

parameters() { qmp "{\"execute\":\"migrate-set-parameters\",\"arguments\":{$1}}"; }
migrate() { qmp "{\"execute\":\"migrate\",\"arguments\":{\"uri\":\"$1\"}}"; }

listen() { # a reader for a source with a return path: writes raw to $work/stream
    rm -f "$work/socket"
    socat -u "UNIX-LISTEN:$work/socket" "CREATE:$work/stream" &
    reader_pid=$!
    while [ ! -S "$work/socket" ]; do sleep 0.05; done
}

wait_completed() {
    for _ in $(seq 300); do
        qmp '{"execute":"query-migrate"}'
        case $answer in
        *'"status": "completed"'*) return 0 ;;
        *'"status": "failed"'*) echo "capture: migration failed: $answer" >&2; return 1 ;;
        esac
        sleep 0.1
    done
    echo "capture: not completed: $answer" >&2
    return 1
}

wait_quiet() { # until the stream's file has not grown for a second; the source waits for SHUT
    local before=-1 now=0
    while [ "$now" != "$before" ] || [ "$now" -lt 1000 ]; do
        before=$now
        sleep 1
        now=$(stat -c %s "$work/stream")
    done
}

finish() { # name
    echo '{"execute":"quit"}' >&4
    wait "$qemu_pid" || true
    qemu_pid=''
    if [ -n "$reader_pid" ]; then wait "$reader_pid" || true; fi
    reader_pid=''
    zstd -q -19 --ultra -f "$work/stream" -o "$output/$1.zst"
    echo "$1: $(stat -c %s "$work/stream") bytes, compressed $(stat -c %s "$output/$1.zst")"
    rm -f "$work/stream"
}

devices="-device VGA,vgamem_mb=1 -device virtio-balloon-pci -netdev socket,id=n0,udp=127.0.0.1:9,localaddr=127.0.0.1:0"
uuid="-uuid 11223344-5566-7788-99aa-bbccddeeff00"

plain() { # name binary machine: everything default, return path off, QEMU closes at the end
    # shellcheck disable=SC2086
    start_qemu "$2" -M "$3" $devices $uuid -device virtio-net-pci,netdev=n0,romfile=
    sleep 2
    capabilities validate-uuid
    migrate "exec:cat > $work/stream"
    wait_completed
    finish "$1"
}

return_path() { # name binary machine: the source waits for SHUT with its socket open
    # shellcheck disable=SC2086
    start_qemu "$2" -M "$3" $devices -device virtio-net-pci,netdev=n0,romfile=
    sleep 2
    capabilities return-path
    listen
    migrate "unix:$work/socket"
    wait_quiet
    finish "$1"
}

dirty_bitmap() { # name binary machine: two bitmaps, one with bits, one without
    start_qemu "$2" -M "$3" -blockdev null-co,node-name=disk,size=1073741824,read-zeroes=on \
        -device virtio-blk-pci,drive=disk
    for bitmap in changed untouched; do
        qmp "{\"execute\":\"block-dirty-bitmap-add\",\"arguments\":{\"node\":\"disk\",\"name\":\"$bitmap\"}}"
        if [ "$bitmap" = changed ]; then
            qmp "{\"execute\":\"block-dirty-bitmap-disable\",\"arguments\":{\"node\":\"disk\",\"name\":\"changed\"}}"
            qmp "{\"execute\":\"block-dirty-bitmap-enable\",\"arguments\":{\"node\":\"disk\",\"name\":\"changed\"}}"
            qmp '{"execute":"human-monitor-command","arguments":{"command-line":"qemu-io disk \"write 64k 192k\""}}'
            qmp '{"execute":"human-monitor-command","arguments":{"command-line":"qemu-io disk \"write 768M 4M\""}}'
        fi
    done
    capabilities dirty-bitmaps
    migrate "exec:cat > $work/stream"
    wait_completed
    finish "$1"
}

xbzrle() { # name binary machine: a guest that keeps changing, so that deltas are sent
    start_qemu "$2" -M "$3" -drive "if=floppy,format=raw,readonly=on,file=$boot"
    sleep 2
    capabilities xbzrle
    parameters '"downtime-limit":1,"max-bandwidth":200000'
    migrate "exec:cat > $work/stream"
    sleep 7
    parameters '"downtime-limit":2000'
    wait_completed
    finish "$1"
}

without_description() { # name binary machine: the stream ends with EOF
    start_qemu "$2" -M "$3,suppress-vmdesc=on"
    sleep 2
    migrate "exec:cat > $work/stream"
    wait_completed
    finish "$1"
}

if [ -n "${ONLY:-}" ]; then # one capture: ONLY="xbzrle 7.2 pc"
    read -r kind version machine <<<"$ONLY"
    case $version in 7.2) binary=$qemu_72 ;; *) binary=$qemu_10 ;; esac
    "$kind" "qemu-$version-${kind//_/-}" "$binary" "$machine"
    exit 0
fi
"$qemu_10" -version | head -n 1
"$qemu_72" -version | head -n 1
plain qemu-10.0-plain "$qemu_10" q35
return_path qemu-10.0-return-path "$qemu_10" q35
dirty_bitmap qemu-10.0-dirty-bitmap "$qemu_10" pc
xbzrle qemu-10.0-xbzrle "$qemu_10" pc
without_description qemu-10.0-no-description "$qemu_10" pc
plain qemu-7.2-plain "$qemu_72" q35
return_path qemu-7.2-return-path "$qemu_72" pc
dirty_bitmap qemu-7.2-dirty-bitmap "$qemu_72" pc
xbzrle qemu-7.2-xbzrle "$qemu_72" pc
