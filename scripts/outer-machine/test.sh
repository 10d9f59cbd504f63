#!/bin/bash
# Checks what scripts/with-kvm promises, in the outer machine, even where this machine has KVM.
#
#   scripts/outer-machine/test.sh        takes about two minutes; prints one line per promise, exit status 1 if one is broken
set -euo pipefail

root=$(cd "$(dirname "${BASH_SOURCE[0]}")/../.." && pwd -P)
target=$(realpath -m "${CARGO_TARGET_DIR:-$root/target}")
export WITH_KVM_FORCE=1 WITH_KVM_TIMEOUT=300
with_kvm=$root/scripts/with-kvm
failures=0

mkdir -p "$target"
here=$(mktemp -d "$target/with kvm.XXXXXX") # with a blank: working directories have them
trap 'rm -rf "$here"' EXIT
cd "$here"

# expect WHAT GOT WANTED
expect() {
    if [[ $2 == "$3" ]]; then
        printf 'ok      %s\n' "$1"
    else
        printf 'BROKEN  %s\n  wanted: %q\n  got:    %q\n' "$1" "$3" "$2"
        failures=$((failures + 1))
    fi
}

# status COMMAND…: its exit status, output to files.
status() {
    local status=0
    "$@" >out 2>err || status=$?
    printf '%s' "$status"
}

# soon CONDITION…: waits until it holds, at most a minute.
soon() {
    local tries
    for ((tries = 0; tries < 600; tries++)); do
        "$@" && return
        sleep 0.1
    done
    return 1
}

# Ours are those that log into a run directory of this target/. The brackets keep grep from finding itself.
machines() { grep -las "file:$target/with-kvm/[r]uns/" /proc/[0-9]*/cmdline || true; }
no_machine() { [[ -z $(machines) ]]; }
a_machine() { [[ -n $(machines) ]]; }
runs() { find "$target/with-kvm/runs" -mindepth 1 -maxdepth 1 | wc -l; }

streams() {
    head -c 5000000 /dev/urandom >random
    local sum
    sum=$(sha256sum <random)
    expect "stdin and stdout are binary-clean, 5 MB there and back" "$("$with_kvm" cat <random | sha256sum)" "$sum"
    expect "100 MB arrive in full" \
        "$("$with_kvm" sh -c 'yes 0123456789abcdef | head -c 100000000' | sha256sum)" \
        "$({ yes 0123456789abcdef || true; } | head -c 100000000 | sha256sum)"
    expect "exit status of a command with both outputs" "$(status "$with_kvm" sh -c 'echo out; echo err >&2; exit 7')" 7
    expect "stdout" "$(cat out)" out
    expect "stderr is kept apart" "$(cat err)" err
    local statuses
    statuses=$(set +o pipefail; "$with_kvm" yes | head -n 1 >out; printf '%s' "${PIPESTATUS[0]}")
    expect "a reader who has enough ends the command as SIGPIPE does" "$statuses $(cat out)" "141 y"
}

statuses() {
    expect "killed by a signal" "$(status "$with_kvm" sh -c 'kill -TERM $$')" 143
    expect "command not found" "$(status "$with_kvm" no-such-command)" 127
    expect "not executable" "$(status "$with_kvm" /etc/passwd)" 126
    expect "time limit" "$(WITH_KVM_TIMEOUT=8 status "$with_kvm" sh -c "echo begun; echo saved >saved; sleep 1000")" 124
    expect "output before the time limit" "$(cat out saved | tr '\n' ' ')" "begun saved "
    if ((EUID)); then
        printf 'skipped a panic is an error (only root can cause one)\n'
        return
    fi
    expect "a panic is an error" "$(status "$with_kvm" sh -c 'echo c >/proc/sysrq-trigger; sleep 1000')" 125
    expect "the panic's console is shown" "$(grep -c 'Kernel panic - not syncing: sysrq triggered crash' err)" 1
}

surroundings() {
    # shellcheck disable=SC2016 # expanded inside
    TEXT=$'two\nlines' "$with_kvm" bash -c '
        pwd
        printf "%q " "$@" "$TEXT"; echo
        id -u; id -g; id -G
        [ "$(stat -c %a /dev/kvm)" = 666 ] && echo kvm
        grep -qwE "svm|vmx" /proc/cpuinfo && echo virtualization
        [ "$(cat)" = "" ] && echo "end of input"
        ping_loopback() { (exec 3<>/dev/tcp/127.0.0.1/9) 2>&1 | grep -q refused && echo refused; }
        ping_loopback
        (( $(date +%s) - '"$(date +%s)"' < 60 )) && echo clock
        echo kept >kept; ln -s kept link; chmod 640 kept
        echo lost >/var/tmp/with-kvm-lost
        sleep 1000 &
    ' - 'a  b' '' $'c\nd' </dev/null >out
    expect "working directory, arguments, environment, user, KVM, clock, loopback" "$(cat out)" \
        "$(pwd; printf '%q ' 'a  b' '' $'c\nd' $'two\nlines'; echo; id -u; id -g; id -G
            printf '%s\n' kvm virtualization 'end of input' refused clock)"
    expect "target/ is kept, with modes and owners" "$(stat -c '%a %U' kept) $(cat link)" "640 $(id -un) kept"
    expect "the rest is thrown away" "$(ls /var/tmp/with-kvm-lost 2>/dev/null)" ""
}

scratch_disk() {
    # shellcheck disable=SC2016 # expanded inside
    WITH_KVM_DISK=256M "$with_kvm" bash -c '
        cd "$TMPDIR" && stat -f -c %T .
        dd if=/dev/zero of=direct bs=4096 count=16 oflag=direct,dsync status=none && echo direct
        fallocate -p -o 0 -l 32768 direct && [ "$(stat -c %b direct)" = 64 ] && echo hole
        dd if=/dev/zero of=full bs=1M 2>&1 | grep -o "No space left on device"
        rm full; (flock -n 9 && echo lock) 9>lock
        touch /tmp/overlaid && echo overlay
    ' >out
    expect "the scratch disk is a real disk with a real end" "$(tr '\n' ' ' <out)" \
        "ext2/ext3 direct hole No space left on device lock overlay "
}

endings() {
    expect "nothing is left behind by runs that ended" "$(machines)$(runs)" 0
    local signal script
    for signal in INT TERM KILL; do
        # A shell without job control starts background commands deaf to SIGINT; env makes them hear again.
        env --default-signal=INT "$with_kvm" sleep 1000 &
        script=$!
        soon a_machine || true
        kill "-$signal" "$script"
        wait "$script" 2>/dev/null || true
        soon no_machine || true
        expect "SIG$signal leaves no machine" "$(machines)" ""
        [[ $signal == KILL ]] || expect "SIG$signal leaves no files" "$(runs)" 0
    done
    "$with_kvm" sh -c 'sleep 3; echo one' >one &
    "$with_kvm" sh -c 'sleep 3; echo two' >two
    wait
    expect "two side by side" "$(cat one two | tr '\n' ' ')" "one two "
    expect "what the killed run left was swept up" "$(runs)" 0
}

streams
statuses
surroundings
scratch_disk
endings
if ((failures)); then
    printf '%s promises broken\n' "$failures"
    exit 1
fi
