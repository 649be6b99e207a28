# drain.sh DELAY_S WITHIN_S
# Before a pod ends: waits DELAY_S for its address to be taken out of every list, then asks Baton's
# processes here to drain, and waits for their end, at most WITHIN_S. They drain on SIGTERM, which
# Kubernetes sends to Ray alone. Who comes late is asked as well: nothing is to begin here now.
set -u
delay_s=$1 within_s=$2
proc=${BATON_PROC:-/proc}

ours() {
    for folder in "$proc"/[0-9]*; do
        case "$(tr '\0' ' ' <"$folder/cmdline" 2>/dev/null)" in
        ray::InstanceActor* | ray::GatewayActor*) echo "${folder##*/}" ;;
        esac
    done
}

sleep "$delay_s"
while [ "$within_s" -gt 0 ] && found=$(ours) && [ -n "$found" ]; do
    for pid in $found; do
        kill -TERM "$pid" 2>/dev/null
    done
    sleep 1
    within_s=$((within_s - 1))
done
