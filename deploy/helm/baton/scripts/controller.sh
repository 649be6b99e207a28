# controller.sh SPEC PAUSE_S COMMAND...
# Runs COMMAND when SPEC has changed, when Ray was started anew, and again after a failure.
# Nothing else: what was changed by `baton scale`, `drain` or `flip` since then stays.
set -u
spec=$1 pause_s=$2
shift 2
child=
trap '[ -z "$child" ] || kill -TERM "$child" 2>/dev/null; exit 0' TERM INT
applied=${BATON_APPLIED_FILE:-/run/baton/applied}
session=${BATON_RAY_SESSION:-/tmp/ray/session_latest}
while :; do
    wanted="$(sha256sum <"$spec") $(readlink "$session")"
    if [ "$(cat "$applied" 2>/dev/null)" != "$wanted" ]; then
        "$@" &
        child=$!
        wait "$child" && echo "$wanted" >"$applied"
    fi
    sleep "$pause_s" &
    child=$!
    wait "$child"
    child=
done
