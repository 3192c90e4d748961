# Last lines of every stage's batch script, on the host, right after srun. Sourced; decides how the job ends.
# The outcome file is the truth; srun's exit code is a hint, because the first rank to leave decides it.
ft_code=$?
ft_outcome="$FT_RUN/outcomes/$FT_STAGE-$FT_LIFE"
ft_job="${SLURM_ARRAY_JOB_ID:+${SLURM_ARRAY_JOB_ID}_$SLURM_ARRAY_TASK_ID}"
ft_job="${ft_job:-$SLURM_JOB_ID}"
# Lives that ended without a word, one after the other, before we give up.
ft_most_silent=3

ft_event() { # event, cause
    printf '{"time": "%s", "event": "%s", "stage": "%s", "life": %d, "job_id": "%s", "code": %d, "cause": "%s"}\n' \
        "$(date -u +%Y-%m-%dT%H:%M:%S.%3N+00:00)" "$1" "$FT_STAGE" "$FT_LIFE" "$ft_job" "$ft_code" "$2" \
        >>"$FT_RUN/events/$FT_STAGE-$FT_LIFE-epilogue.jsonl"
}

ft_requeue() { # cause
    if [ "$FT_REQUEUE" != 1 ]; then
        echo "ftlib: saved, and this site forbids requeueing: make resume RUN=$(basename "$FT_RUN") goes on from here"
        ft_event failed "$1; requeueing is forbidden here"
        exit 75
    fi
    ft_event requeued "$1"
    ft_wait=1
    while [ "$ft_wait" -le 64 ]; do
        # Incomplete leaves a job alone that its owner has cancelled; a plain requeue would revive it.
        if scontrol requeue Incomplete "$ft_job"; then
            ft_requeued=1
        else
            # The controller forgets a job at the limit to be incomplete; it says TIMEOUT then, and only then we insist.
            case "$(scontrol show job "$ft_job" 2>/dev/null | grep -o 'JobState=[A-Z_]*')" in
            JobState=TIMEOUT) scontrol requeue "$ft_job" && ft_requeued=1 ;;
            JobState=CANCELLED) exit 143 ;;
            esac
        fi
        if [ -n "${ft_requeued:-}" ]; then
            # Slurm ends this shell when it takes the job back.
            for _ in $(seq 300); do sleep 1; done
            exit 75
        fi
        echo "ftlib: the requeue was not accepted; trying again in $ft_wait s"
        sleep "$ft_wait"
        ft_wait=$((ft_wait * 2))
    done
    ft_event failed "the controller did not accept the requeue"
    exit 75
}

if [ -s "$ft_outcome" ]; then
    read -r ft_code ft_words <"$ft_outcome"
    case "$ft_code" in
    0) exit 0 ;;
    75) ft_requeue "$ft_words" ;;
    *) exit "$ft_code" ;;
    esac
fi

case "$ft_code" in
140 | 143)
    ft_silent=0
    ft_n=$FT_LIFE
    while [ "$ft_n" -ge 1 ] && [ ! -e "$FT_RUN/outcomes/$FT_STAGE-$ft_n" ]; do
        ft_silent=$((ft_silent + 1))
        ft_n=$((ft_n - 1))
    done
    if [ "$ft_silent" -le "$ft_most_silent" ]; then
        ft_requeue "interrupted before it could save"
    fi
    ft_event failed "interrupted $ft_silent times in a row before it could save"
    exit "$ft_code"
    ;;
*)
    ft_event failed "ended with code $ft_code and left no outcome"
    [ "$ft_code" -ne 0 ] || ft_code=1
    exit "$ft_code"
    ;;
esac
