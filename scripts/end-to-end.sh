# shellcheck shell=bash
# The end-to-end tests, where KVM is. Sourced, behind scripts/packages.sh, by scripts/test, which has set $root and $log, a file.
#
#   build_end_to_end         builds their program, $end_to_end
#   run_end_to_end NAME…     runs those that the names, or parts of names, mean; all without a name
#   kill_on_kvm SEED         kills coordinators and VMs of pivots under real guests, tells how many
#
# Where QEMU emulates the processor, a machine is now and then lost: seen were a guest's kernel that took a timer interrupt with
# a zero GS base, a panic of the outer machine's own kernel in an interrupt, triple faults and hangs, and under QEMU's own
# microvm machine guests that hung or started again, and an outer machine that stood still. The cause is not known. So an
# attempt has a limit, and what did not come to its end is tried again.

build_end_to_end() {
    end_to_end=$(cargo test --locked --package vmm --test e2e --no-run --message-format json-render-diagnostics |
        sed -n '/"reason":"compiler-artifact".*"profile":{[^}]*"test":true/s/.*"executable":"\([^"]*\)".*/\1/p' | tail -n 1)
}

# where_kvm_is ARGUMENT…: the program there, in the package's directory as Cargo does it; its output is in $log, too.
where_kvm_is() { (cd "${root:?}/vmm" && "$root/scripts/with-kvm" "$end_to_end" "$@" 2>&1) | tee "${log:?}"; }

# failed_by_itself: the tests of the last attempt that failed, but not those whose guest triple-faulted, which guests do on an
# emulated processor. One that always does so passes in no attempt.
failed_by_itself() {
    local faulted
    faulted=$(awk '/^---- .* stdout ----$/ { name = $2 } /The guest triple-faulted/ { print name }' "$log" | sort -u)
    sed -n 's/^test \([^ ]*\) .*FAILED$/\1/p' "$log" | grep -vxF -- "$faulted" || true
}

# Tests that did not pass are run again, as long as each has failed only once by itself, and attempts are not in vain.
run_end_to_end() {
    if [[ -z ${WITH_KVM_FORCE:-} ]] && grep -qwE 'svm|vmx' /proc/cpuinfo; then
        (cd "$root/vmm" && exec "$end_to_end" "$@")
        return
    fi
    # Alone on two processors all tests take some ten minutes.
    export WITH_KVM_TIMEOUT=${WITH_KVM_TIMEOUT:-$((${TARN_SOAK:-0} ? 7200 : 1000))}
    local left remaining name passed status attempt=0 vain=0
    local -A failures=()
    mapfile -t left < <("$end_to_end" --list "$@" | sed -n 's/: test$//p')
    ((${#left[@]})) || { say "no end-to-end test has such a name"; return 0; }
    while ((vain < 4 && attempt < 12)); do
        ((++attempt == 1)) ||
            say "the processor is emulated; attempt $attempt with ${#left[@]} tests that have not passed: ${left[*]}"
        status=0
        where_kvm_is --exact "${left[@]}" || status=$?
        ((status)) || break
        passed=" $(sed -n 's/^test \([^ ]*\) .*ok$/\1/p' "$log" | paste -sd ' ') "
        while read -r name; do failures[$name]=$((${failures[$name]:-0} + 1)); done < <(failed_by_itself)
        remaining=()
        for name in "${left[@]}"; do
            ((${failures[$name]:-0} < 2)) || return "$status"
            [[ $passed == *" $name "* ]] || remaining+=("$name")
        done
        # All passed, and the machine died behind them.
        ((${#remaining[@]})) || { status=0; break; }
        vain=$((${#remaining[@]} < ${#left[@]} ? 0 : vain + 1))
        left=("${remaining[@]}")
    done
    return "$status"
}

# Seventeen lives of VMs, one after the other, a few to an attempt. A machine that is lost takes one of them with it, which is
# lived again, once, with the same moments. What is never repeated is a life that has begun and come to an end that is wrong.
kill_on_kvm() {
    local seed=$1 left before life died moved lost='' lives=0 deaths=0 pivots=0 status
    mapfile -t left < <(seq 17)
    export REQUIRE_KVM=1 TARN_SEED=$seed WITH_KVM_TIMEOUT=${WITH_KVM_TIMEOUT:-600}
    while ((${#left[@]})); do
        before=${#left[@]}
        status=0
        TARN_LIVES="${left[*]:0:6}" where_kvm_is operations::crashes --nocapture || status=$?
        while read -r died moved; do
            left=("${left[@]:1}")
            lives=$((lives + 1)) deaths=$((deaths + died)) pivots=$((pivots + moved))
        done < <(sed -n 's/.*life [0-9]* of seed [0-9]* is over: \([0-9]*\) deaths, \([0-9]*\) pivots$/\1 \2/p' "$log")
        life=${left[0]:-}
        if [[ -z $life ]] || ((status == 0 && ${#left[@]} < before)); then continue; fi
        # The program says 101 when it has come to its end with a failure.
        if ((status == 101)) && grep -q "life $life begins$" "$log"; then
            say "after $deaths deaths: life $life of seed $seed has failed"
            return 1
        elif [[ $life == "$lost" ]]; then
            say "after $deaths deaths: life $life of seed $seed has not come to an end for the second time"
            return 1
        fi
        lost=$life
        say "after $deaths deaths: the machine was lost in life $life of seed $seed, which is lived again"
    done
    printf 'crash matrix on KVM: %s deaths in %s lives of VMs, %s pivots, every acknowledged write found\n' \
        "$deaths" "$lives" "$pivots"
}
